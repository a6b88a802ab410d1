"""The loops behind cpu.py, compiled by numba: each over a range of rows or of latents, without the GIL."""

from typing import Any

import numpy as np
from numba import njit

# numpy's error model, since a division that may raise is not vectorised; fastmath, since a sum that may not be reordered
# is not either. NaN and infinity still come through: nnan and ninf are left out.
compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "arcp", "contract", "afn"})

# How far a pre-activation from a bfloat16 product may be from that of a float32 one. With dx and dw what rounding takes from
# x and w, |x.w - (x - dx).(w - dw)| <= ||dx|| ||w|| + ||x - dx|| ||dw|| (Cauchy-Schwarz; rows so small that their squares
# underflow are not covered), ||x - dx|| <= (1 + 2^-8) ||x||; summing d products in float32 adds at most d u ||x|| ||w||,
# u = 2^-24, twice, in both products and in norms; rounding the result 2^-8 |z|; each a little more here.
_LONGER, _SUM, _ROUNDED = 1.004, 2.4e-7, 0.00395
_FIRST = 0.93  # of the k-th largest that a row's norm suggests: the first bar to try
_SURELY = 0.96  # likewise, where that is to leave room for the rounding of a screen


# Selection


@compiled
def _flag(z: Any, bias: Any, bars: Any, bar: Any, bits: Any, row: Any, flags: Any) -> None:  # pragma: no cover - compiled
    """Bring a row of z, the bits of float32 or bfloat16, with the bias added, into `row`, and flag what is above the bars.

    `bits` is a view of `row`. The bar is bars[j] + bar. All three loops are vectorised.
    """
    shift = np.int32(32 - 8 * z.itemsize)  # a bfloat16 is the upper half of a float32
    for j in range(row.size):
        bits[j] = np.int32(z[j]) << shift
    for j in range(row.size):
        value = row[j] + bias[j]
        row[j] = value
        flags[j] = value > bars[j] + bar


@compiled
def _collect(row: Any, flags: Any, words: Any, latents: Any, values: Any, end: int) -> int:  # pragma: no cover - compiled
    """Append the flagged entries of a row; eight flags at a time are looked at, and most times none of them is set."""
    for w in range(words.size):
        if words[w]:
            for j in range(8 * w, 8 * w + 8):
                if flags[j]:
                    latents[end], values[end] = j, row[j]
                    end += 1
    return end


@compiled
def _with_room(array: Any, end: int, more: int) -> Any:  # pragma: no cover - compiled
    """Return the array, twice as long if there is no room for so many more behind `end`."""
    if end + more <= array.size:
        return array
    longer = np.empty(max(2 * array.size, end + more), array.dtype)
    longer[:end] = array[:end]
    return longer


@compiled
def _above(z: Any, low: int, high: int, bias: Any, threshold: Any) -> Any:  # pragma: no cover - compiled
    d_sae = z.shape[1]
    row, flags = np.empty(d_sae, np.float32), np.zeros(d_sae + 7 & ~7, np.uint8)
    bits, words = row.view(np.int32), flags.view(np.uint64)
    counts = np.empty(high - low, np.int64)
    latents, values = np.empty(2 * d_sae, np.int32), np.empty(2 * d_sae, np.float32)
    end = 0
    for r in range(low, high):
        begin = end
        _flag(z[r], bias, threshold, np.float32(0), bits, row, flags)
        latents, values = _with_room(latents, end, d_sae), _with_room(values, end, d_sae)
        end = _collect(row, flags, words, latents, values, end)
        counts[r - low] = end - begin
    return counts, latents[:end], values[:end]


@compiled
def _largest(
    candidates: Any, strengths: Any, count: int, k: int, latents: Any, values: Any, end: int
) -> Any:  # pragma: no cover - compiled
    """Append the k largest positive of the first `count` candidates, in their order; return the new end and the least."""
    least = np.float32(0)
    if count > k:
        least = max(least, np.partition(strengths[:count], count - k)[count - k])
    ties = k
    for p in range(count):
        ties -= strengths[p] > least
    for p in range(count):
        if strengths[p] > least or (strengths[p] == least and least > 0 and ties > 0):
            ties -= strengths[p] == least
            latents[end], values[end] = candidates[p], strengths[p]
            end += 1
    return end, least


@compiled
def _reaching(
    z: Any, bias: Any, zeros: Any, likely: Any, k: int, bits: Any, row: Any, flags: Any, words: Any, candidates: Any,
    strengths: Any,
) -> int:  # pragma: no cover - compiled  # fmt: skip
    """Collect what lies above a bar, a little under the likely k-th largest and lowered until there are k, or down to 0."""
    bar = np.float32(_FIRST) * likely
    while True:
        _flag(z, bias, zeros, bar, bits, row, flags)
        count = _collect(row, flags, words, candidates, strengths, 0)
        if count >= k or bar == 0:
            return count
        bar = bar * np.float32(0.7) if bar > np.float32(0.1) * likely else np.float32(0)


@compiled
def _topk(z: Any, norms: Any, low: int, high: int, bias: Any, k: int) -> Any:  # pragma: no cover - compiled
    """The k-th largest is nearly in proportion to the row's norm: the rows before tell where to look for it first."""
    d_sae = z.shape[1]
    row, flags = np.empty(d_sae, np.float32), np.zeros(d_sae + 7 & ~7, np.uint8)
    bits, words = row.view(np.int32), flags.view(np.uint64)
    candidates, strengths = np.empty(d_sae, np.int32), np.empty(d_sae, np.float32)
    counts, zeros = np.empty(high - low, np.int64), np.zeros(d_sae, np.float32)
    latents, values = np.empty((high - low) * k, np.int32), np.empty((high - low) * k, np.float32)
    end, ratio = 0, np.float32(0)
    for r in range(low, high):
        count = _reaching(z[r], bias, zeros, ratio * norms[r], k, bits, row, flags, words, candidates, strengths)
        begin = end
        end, least = _largest(candidates, strengths, count, k, latents, values, end)
        ratio = _followed(ratio, least, norms[r])
        counts[r - low] = end - begin
    return counts, latents[:end], values[:end]


@compiled
def _followed(ratio: Any, least: Any, norm: Any) -> Any:  # pragma: no cover - compiled
    if not (least > 0 and norm > 0):
        return ratio
    fresh = least / norm
    if not fresh < np.float32(1e38):
        return ratio
    return fresh if ratio == 0 else np.float32(0.75) * ratio + np.float32(0.25) * fresh


# Selection by a bfloat16 product, of float32 pre-activations: exact, see `Screen`


@compiled
def _flag_screened(
    z: Any, bias: Any, bars: Any, of_norm: Any, of_rounding: Any, norms: Any, rounding: Any, bits: Any, row: Any, flags: Any
) -> None:  # pragma: no cover - compiled
    """As `_flag`, but flag all whose float32 pre-activation may lie above the bars."""
    for j in range(row.size):
        bits[j] = np.int32(z[j]) << np.int32(16)
    for j in range(row.size):
        value = row[j] + bias[j]
        row[j] = value
        most = value + (of_norm * norms[j] + of_rounding * rounding[j] + np.float32(_ROUNDED) * (abs(value) + abs(bias[j])))
        flags[j] = not (most <= bars[j])  # also where it is not a number: that is for the float32 value to tell


@compiled
def _dot(a: Any, b: Any) -> Any:  # pragma: no cover - compiled
    total = np.float32(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@compiled
def _above_screened(
    z: Any, first: int, low: int, high: int, x: Any, x_norms: Any, x_rounding: Any, weight: Any, norms: Any, rounding: Any,
    bias: Any, threshold: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    d_sae = z.shape[1]
    row, flags = np.empty(d_sae, np.float32), np.zeros(d_sae + 7 & ~7, np.uint8)
    bits, words = row.view(np.int32), flags.view(np.uint64)
    candidates, strengths = np.empty(d_sae, np.int32), np.empty(d_sae, np.float32)
    counts = np.empty(high - low, np.int64)
    latents, values = np.empty(2 * d_sae, np.int32), np.empty(2 * d_sae, np.float32)
    end = 0
    for r in range(low, high):
        of_norm = x_rounding[first + r] + np.float32(_SUM * x.shape[1]) * x_norms[first + r]
        of_rounding = np.float32(_LONGER) * x_norms[first + r]
        _flag_screened(z[r], bias, threshold, of_norm, of_rounding, norms, rounding, bits, row, flags)
        count = _collect(row, flags, words, candidates, strengths, 0)
        begin = end
        latents, values = _with_room(latents, end, count), _with_room(values, end, count)
        for p in range(count):
            j = candidates[p]
            value = _dot(x[first + r], weight[j]) + bias[j]
            if value > threshold[j]:
                latents[end], values[end] = j, value
                end += 1
        counts[r - low] = end - begin
    return counts, latents[:end], values[:end]


@compiled
def _lowered(bar: Any, slack: Any) -> Any:  # pragma: no cover - compiled
    """Return the screen's value below which a float32 pre-activation surely lies under the bar, whichever latent's it is.

    Where the slack is not finite there is none.
    """
    bar = bar - slack
    lowered = bar / np.float32(1 + _ROUNDED) if bar > 0 else bar / np.float32(1 - _ROUNDED)
    return lowered if lowered > -np.float32(np.inf) else -np.float32(np.inf)


@compiled
def _largest_of(values: Any) -> Any:  # pragma: no cover - compiled
    """Return the largest of numbers not below 0, those left out that are not numbers: they concern no other latent."""
    largest = np.float32(0)
    for value in values:
        if value > largest:
            largest = value
    return largest


@compiled
def _topk_screened(
    z: Any, first: int, low: int, high: int, x: Any, x_norms: Any, x_rounding: Any, weight: Any, norms: Any, rounding: Any,
    bias: Any, k: int,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """The float32 pre-activations of the k that the screen finds largest bound the k-th largest: who cannot reach the bound
    is not among them.

    Where the bound will lie the rows before tell, as in `_topk`. So one pass over a row mostly finds all who may reach it;
    where the bound turns out lower than thought, a second one does, lower still if there were fewer than k.
    """
    d_sae = z.shape[1]
    row, flags = np.empty(d_sae, np.float32), np.zeros(d_sae + 7 & ~7, np.uint8)
    bits, words = row.view(np.int32), flags.view(np.uint64)
    candidates, strengths = np.empty(d_sae, np.int32), np.empty(d_sae, np.float32)
    exact = np.empty(d_sae, np.float32)
    counts, zeros = np.empty(high - low, np.int64), np.zeros(d_sae, np.float32)
    latents, values = np.empty((high - low) * k, np.int32), np.empty((high - low) * k, np.float32)
    largest = _largest_of(norms), _largest_of(rounding), _largest_of(np.abs(bias))
    end, ratio = 0, np.float32(0)
    for r in range(low, high):
        mine, norm = x[first + r], x_norms[first + r]
        of_norm, of_rounding = x_rounding[first + r] + np.float32(_SUM * x.shape[1]) * norm, np.float32(_LONGER) * norm
        slack = of_norm * largest[0] + of_rounding * largest[1] + np.float32(_ROUNDED) * largest[2]
        slack *= np.float32(1.0001)
        likely = np.float32(_SURELY) * ratio * norm
        wanted, last = likely, False
        while True:
            bar = _lowered(wanted, slack)
            _flag(z[r], bias, zeros, bar, bits, row, flags)
            count = _collect(row, flags, words, candidates, strengths, 0)
            bound, edge = np.float32(0), np.float32(0)
            if count >= k:
                edge, bound = np.partition(strengths[:count], count - k)[count - k], np.float32(np.inf)
                for p in range(count):
                    if strengths[p] >= edge:
                        exact[p] = _dot(mine, weight[candidates[p]]) + bias[candidates[p]]
                        if not exact[p] >= bound:  # lower, or not a number
                            bound = exact[p] if exact[p] > 0 else np.float32(0)
            # a hair below the bound, for what it takes to be among the k largest is to reach it, not to pass it
            bound *= np.float32(0.99999)
            if last or bar <= _lowered(bound, slack):
                break
            if count >= k:
                wanted = bound
            elif wanted > np.float32(0.1) * likely:
                wanted *= np.float32(0.7)
            else:
                wanted = np.float32(0)
            last = count >= k or wanted == 0
        ratio = _followed(ratio, bound, norm)
        reached = 0
        for p in range(count):
            j, value = candidates[p], strengths[p]
            if count >= k and value >= edge:
                value = exact[p]
            else:
                margin = of_norm * norms[j] + of_rounding * rounding[j] + np.float32(_ROUNDED) * (abs(value) + abs(bias[j]))
                if value + margin <= bound:
                    continue
                value = _dot(mine, weight[j]) + bias[j]
            candidates[reached], strengths[reached] = j, value
            reached += 1
        begin = end
        end, _ = _largest(candidates, strengths, reached, k, latents, values, end)
        counts[r - low] = end - begin
    return counts, latents[:end], values[:end]


# Over rows


@compiled
def _add_rows(begin: int, end: int, latents: Any, values: Any, weight: Any, total: Any) -> None:  # pragma: no cover - compiled
    """total += sum of value * row of weight; four rows at a time spare three of four passes over `total`."""
    d = total.size
    p = begin
    while p + 4 <= end:
        a, b, c, e = weight[latents[p]], weight[latents[p + 1]], weight[latents[p + 2]], weight[latents[p + 3]]
        va, vb, vc, ve = values[p], values[p + 1], values[p + 2], values[p + 3]
        for j in range(d):
            total[j] += va * a[j] + vb * b[j] + vc * c[j] + ve * e[j]
        p += 4
    while p < end:
        a, va = weight[latents[p]], values[p]
        for j in range(d):
            total[j] += va * a[j]
        p += 1


@compiled
def _decode(
    low: int, high: int, starts: Any, latents: Any, values: Any, weight: Any, bias: Any, out: Any
) -> None:  # pragma: no cover - compiled
    for r in range(low, high):
        out[r, :] = bias
        _add_rows(starts[r], starts[r + 1], latents, values, weight, out[r])


@compiled
def _dots(begin: int, end: int, latents: Any, weight: Any, g: Any, dots: Any) -> None:  # pragma: no cover - compiled
    for p in range(begin, end):
        dots[p] = _dot(g, weight[latents[p]])


@compiled
def _reconstruct(
    low: int, high: int, starts: Any, latents: Any, values: Any, weight: Any, bias: Any, x: Any, residual: Any, error: Any,
    dots: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    for r in range(low, high):
        total = residual[r]
        for j in range(total.size):
            total[j] = bias[j] - x[r, j]
        _add_rows(starts[r], starts[r + 1], latents, values, weight, total)
        square = np.float32(0)
        for j in range(total.size):
            square += total[j] * total[j]
        error[r] = square
        _dots(starts[r], starts[r + 1], latents, weight, total, dots)  # the same rows again, now from the nearest cache


@compiled
def _sample(low: int, high: int, starts: Any, latents: Any, weight: Any, g: Any, dots: Any) -> None:  # pragma: no cover
    for r in range(low, high):
        _dots(starts[r], starts[r + 1], latents, weight, g[r], dots)


@compiled
def _row_sum(low: int, high: int, starts: Any, values: Any, out: Any) -> None:  # pragma: no cover - compiled
    for r in range(low, high):
        total = np.float32(0)
        for p in range(starts[r], starts[r + 1]):
            total += values[p]
        out[r] = total


# Over latents


@compiled
def _by_latent(starts: Any, latents: Any, d_sae: int) -> Any:  # pragma: no cover - compiled
    entries_of = np.zeros(d_sae + 1, np.int64)
    count = starts[-1]
    for p in range(count):
        entries_of[latents[p] + 1] += 1
    for i in range(d_sae):
        entries_of[i + 1] += entries_of[i]
    place = entries_of[:-1].copy()
    rows, entries = np.empty(count, np.int32), np.empty(count, np.int32)
    for r in range(starts.size - 1):
        for p in range(starts[r], starts[r + 1]):
            i = latents[p]
            rows[place[i]], entries[place[i]] = r, p
            place[i] += 1
    return entries_of, rows, entries


@compiled
def _latent_sum(low: int, high: int, starts: Any, entries: Any, values: Any, out: Any) -> None:  # pragma: no cover - compiled
    for i in range(low, high):
        total = np.float32(0)
        for p in range(starts[i], starts[i + 1]):
            total += values[entries[p]]
        out[i] = total


@compiled
def _gradient(
    low: int, high: int, starts: Any, rows: Any, entries: Any, coefficients: Any, dense: Any, out: Any, slots: Any,
    fresh: bool, last: bool, weight: Any, along: Any, tangent: bool, squares: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    d = out.shape[1]
    most = 0
    for i in range(low, high):
        most = max(most, starts[i + 1] - starts[i])
    mine = np.empty(most, np.float32)
    for i in range(low, high):
        if slots[i] < 0:
            continue
        total = out[slots[i]]
        if fresh:
            for j in range(d):
                total[j] = np.float32(0)
        begin, count = starts[i], starts[i + 1] - starts[i]
        for p in range(count):
            mine[p] = coefficients[entries[begin + p]]
        _add_rows(0, count, rows[begin : begin + count], mine, dense, total)
        if last:
            w = weight[i]
            if along.size:
                a = along[i]
                for j in range(d):
                    total[j] += a * w[j]
            if tangent:
                inner = np.float32(0)
                for j in range(d):
                    inner += total[j] * w[j]
                for j in range(d):
                    total[j] -= inner * w[j]
            square = np.float32(0)
            for j in range(d):
                square += total[j] * total[j]
            squares[i] = square


@compiled
def _adam(
    low: int, high: int, constants: Any, clips: Any, paces: Any, weight: Any, gradient: Any, slots: Any, m: Any, v: Any,
    low_copy: Any, norms: Any, rounding: Any, unit: bool,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    rate, root, beta1, beta2, rest1, rest2, eps = constants
    d, each = weight.shape[1], weight.shape[0] // clips.size
    none, kept = np.zeros(d, np.float32), np.empty(d, np.float32)
    kept_bits = kept.view(np.int32)
    one = np.float32(1)
    for i in range(low, high):
        w, mi, vi = weight[i], m[i], v[i]
        clip, lr = clips[i // each], rate * paces[i // each]
        gi = gradient[slots[i]] if slots[i] >= 0 else none
        for j in range(d):
            g = gi[j] * clip
            first, second = beta1 * mi[j] + rest1 * g, beta2 * vi[j] + rest2 * g * g
            mi[j], vi[j] = first, second
            w[j] -= lr * first / (np.sqrt(second) * root + eps)
        if unit or norms.size:
            square = np.float32(0)
            for j in range(d):
                square += w[j] * w[j]
            norm = np.sqrt(square)
            if unit and norm > 0:
                inverse = one / norm
                for j in range(d):
                    w[j] *= inverse
                norm = one
            if norms.size:
                norms[i] = norm
        if low_copy.size:
            bits = w.view(np.int32)
            for j in range(d):  # to the nearest bfloat16, ties to even
                up = np.int32(0x7FFF) + ((bits[j] >> np.int32(16)) & np.int32(1))
                kept_bits[j] = (bits[j] + up) & np.int32(-0x10000)
                low_copy[i, j] = np.int16(kept_bits[j] >> np.int32(16))
            if rounding.size:
                square = np.float32(0)
                for j in range(d):
                    square += (w[j] - kept[j]) * (w[j] - kept[j])
                rounding[i] = np.sqrt(square)
