"""The operations as compiled loops for CPUs (numba).

Each loop runs over a range of rows or latents and lets go of the GIL; a thread pool as wide as torch's deals out the ranges.
So no sum of theirs depends on how many threads there are, and no second pool of spinning workers fights torch's own.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from sae.ops.kernels import AdamStep, Screen, Term, TooDense, lowered
from sae.ops.latents import ByLatent, SparseLatents

# numpy's error model, since a division that may raise is not vectorised; fastmath, since a sum that may not be reordered
# is not either. NaN and infinity still come through: nnan and ninf are left out.
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "arcp", "contract", "afn"})

_CHUNK_ROWS = 1024  # pre-activations of this many rows at a time: smaller products run slower, more would leave the cache
_CHUNK_BYTES = 64 * 2**20
# How far a pre-activation from a bfloat16 product may be from that of a float32 one: by rounding x and W to 8 bits at most
# (2 u + u^2) ||x|| ||w_i|| with u = 2^-8 (Cauchy-Schwarz; rows so small that their squares underflow are not covered), by
# summing d products in float32, twice that of each, and by rounding the result, u |z|; each a little more, for what
# rounding does to the bounds themselves.
_PRODUCT, _SUM, _ROUNDED = 0.00786, 2.4e-7, 0.00395
_FIRST = 0.93  # of the k-th largest that a row's norm suggests: the first bar to try
_ROW_LOAD = 2  # what a gradient row costs beside its entries, in entries
_RANGES = 4  # a thread; more than one evens out rows of different length
_NO_VECTOR, _NO_MATRIX = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)


def _product_is_fast_in_bfloat16() -> bool:
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


class CPUKernels:
    """See `Kernels` for what each one means."""

    name = "cpu"

    screens = _product_is_fast_in_bfloat16()

    def above(
        self, x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, room: int, screen: Screen | None = None
    ) -> SparseLatents:
        """See Kernels."""
        weights, bars = (weight.numpy() if screen else None), threshold.numpy()
        x, norms = x.contiguous(), x.norm(dim=1).numpy()
        rows = x.numpy()

        def select(z: Any, first: int, low: int, high: int) -> Any:
            if screen is None:
                return _above(z, low, high, bias.numpy(), bars)
            return _above_screened(
                z, low, high, rows[first:], norms[first:], weights, screen.norms.numpy(), bias.numpy(), bars
            )

        return self._selected(x, screen.low if screen else weight, room, select)

    def topk(self, x: Tensor, weight: Tensor, bias: Tensor, k: int, screen: Screen | None = None) -> SparseLatents:
        """See Kernels."""
        k, weights = min(k, len(weight)), weight.numpy() if screen else None
        x, norms = x.contiguous(), x.norm(dim=1).numpy()
        rows = x.numpy()

        def select(z: Any, first: int, low: int, high: int) -> Any:
            if screen is None:
                return _topk(z, norms[first:], low, high, bias.numpy(), k)
            return _topk_screened(
                z, low, high, rows[first:], norms[first:], weights, screen.norms.numpy(), bias.numpy(), k
            )

        return self._selected(x, screen.low if screen else weight, len(x) * k, select)

    def _selected(self, x: Tensor, weight: Tensor, room: int, select: Callable[[Any, int, int, int], Any]) -> SparseLatents:
        """Take the product a few rows at a time, and of each only what is selected: z is never whole.

        select(z, first, low, high) looks at rows low to high of a part that begins at row `first`.
        """
        d_sae = weight.shape[0]
        chunk = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // (4 * d_sae)))
        z = torch.empty(min(chunk, len(x)), d_sae, dtype=weight.dtype)
        found: list[tuple[Any, Any, Any]] = []
        for start in range(0, len(x), chunk):
            part = lowered(x[start : start + chunk], weight)
            here = torch.mm(part, weight.T, out=z[: len(part)])
            array = here.view(torch.int16 if here.dtype == torch.bfloat16 else torch.int32).numpy()
            found += _in_ranges(partial(select, array, start), len(part), each=2)
            if sum(len(values) for _, _, values in found) > room:
                raise TooDense
        counts = np.concatenate([np.zeros(1, np.int64), *(c for c, _, _ in found)])
        latents = np.concatenate([np.zeros(0, np.int32), *(i for _, i, _ in found)])
        values = np.concatenate([np.zeros(0, np.float32), *(v for _, _, v in found)])
        starts = torch.from_numpy(counts.cumsum())
        return SparseLatents(starts, torch.from_numpy(latents), torch.from_numpy(values), d_sae, self)

    def decode(self, f: SparseLatents, weight: Tensor, bias: Tensor) -> Tensor:
        """See Kernels."""
        out = torch.empty(len(f), weight.shape[1])
        _over(len(f), _decode, *_csr(f), weight.numpy(), bias.numpy(), out.numpy())
        return out

    def reconstruct(self, f: SparseLatents, weight: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernels."""
        residual, error, dots = torch.empty(len(f), weight.shape[1]), torch.empty(len(f)), torch.empty(len(f.values))
        _over(
            len(f), _reconstruct, *_csr(f), weight.numpy(), bias.numpy(), x.contiguous().numpy(), residual.numpy(),
            error.numpy(), dots.numpy(),
        )  # fmt: skip
        return residual, error, dots

    def sample(self, f: SparseLatents, g: Tensor, weight: Tensor) -> Tensor:
        """See Kernels."""
        dots = torch.empty(len(f.values))
        starts, latents, _ = _csr(f)
        _over(len(f), _sample, starts, latents, weight.numpy(), g.contiguous().numpy(), dots.numpy())
        return dots

    def row_sum(self, f: SparseLatents, values: Tensor) -> Tensor:
        """See Kernels."""
        out = torch.empty(len(f))
        _over(len(f), _row_sum, f.starts.numpy(), values.detach().contiguous().numpy(), out.numpy(), each=1)
        return out

    def by_latent(self, f: SparseLatents) -> ByLatent:
        """See Kernels; a counting sort."""
        starts, latents, _ = _csr(f)
        return ByLatent(*map(torch.from_numpy, _by_latent(starts, latents, f.d_sae)))

    def latent_sum(self, by: ByLatent, values: Tensor) -> Tensor:
        """See Kernels."""
        out = torch.empty(len(by.starts) - 1)
        arrays = by.starts.numpy(), by.entries.numpy(), values.detach().contiguous().numpy(), out.numpy()
        _over(len(out), _latent_sum, *arrays, each=1)
        return out

    def gradient(
        self, terms: Sequence[Term], weight: Tensor, along: Tensor | None, tangent: bool, out: Tensor, slots: Tensor | None,
        fresh: bool,
    ) -> Tensor:  # fmt: skip
        """See Kernels."""
        squares = torch.zeros(len(weight))
        places = torch.arange(len(weight)) if slots is None else slots
        nothing = (np.zeros(len(weight) + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32), _NO_VECTOR, _NO_MATRIX)
        arrays = [
            (by.starts.numpy(), by.rows.numpy(), by.entries.numpy(), t.coefficients.numpy(), t.dense.contiguous().numpy())
            for t in terms
            for by in (t.latents.by_latent,)
        ] or [nothing]
        for i, term in enumerate(arrays):
            last = i == len(arrays) - 1
            _over(
                len(weight), _gradient, *term, out.numpy(), places.numpy(), fresh and i == 0, last, weight.detach().numpy(),
                _NO_VECTOR if along is None else along.numpy(), tangent, squares.numpy(),
                load=term[0] + _ROW_LOAD * np.arange(len(weight) + 1),
            )  # fmt: skip
        return squares

    def adam(
        self, step: AdamStep, weight: Tensor, gradient: Tensor, slots: Tensor | None, m: Tensor, v: Tensor,
        low: Tensor | None, norms: Tensor | None, unit: bool,
    ) -> None:  # fmt: skip
        """See Kernels."""
        places = torch.arange(len(weight)) if slots is None else slots
        constants = np.array(
            [
                step.lr / (1 - step.beta1**step.step), 1 / math.sqrt(1 - step.beta2**step.step), step.beta1, step.beta2,
                1 - step.beta1, 1 - step.beta2, step.eps, float(step.clip),
            ],
            dtype=np.float32,
        )  # fmt: skip
        _over(
            len(weight), _adam, constants, weight.detach().numpy(), gradient.detach().numpy(), places.numpy(), m.numpy(),
            v.numpy(), np.zeros((0, 0), np.int16) if low is None else low.view(torch.int16).numpy(),
            _NO_VECTOR if norms is None else norms.numpy(), unit,
        )  # fmt: skip


# Dealing out work


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sae-ops")


def _in_ranges(work: Callable[[int, int], Any], count: int, each: int = _RANGES, load: Any = None) -> list[Any]:
    """Return work(low, high) for ranges that make up 0 to count, in their order, `each` a thread.

    `load` (count + 1) says how much lies before each item, where they differ.
    """
    threads = torch.get_num_threads()
    parts = min(count, threads * each)
    cuts = [count * i // parts for i in range(parts + 1)] if parts else [0]
    if load is not None and parts:
        cuts[1:-1] = np.searchsorted(load, load[-1] * np.arange(1, parts) / parts).tolist()
    if threads == 1:
        return [work(low, high) for low, high in pairwise(cuts)]
    return list(_pool(threads).map(work, cuts[:-1], cuts[1:]))


def _over(count: int, loop: Callable[..., None], *arrays: Any, each: int = _RANGES, load: Any = None) -> None:
    _in_ranges(lambda low, high: loop(low, high, *arrays), count, each, load)


def _csr(f: SparseLatents) -> tuple[Any, Any, Any]:
    return f.starts.numpy(), f.latents.numpy(), f.values.detach().contiguous().numpy()


# Selection


@_compiled
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


@_compiled
def _collect(row: Any, flags: Any, words: Any, latents: Any, values: Any, end: int) -> int:  # pragma: no cover - compiled
    """Append the flagged entries of a row; eight flags at a time are looked at, and most times none of them is set."""
    for w in range(words.size):
        if words[w]:
            for j in range(8 * w, 8 * w + 8):
                if flags[j]:
                    latents[end], values[end] = j, row[j]
                    end += 1
    return end


@_compiled
def _above(z: Any, low: int, high: int, bias: Any, threshold: Any) -> Any:  # pragma: no cover - compiled
    d_sae = z.shape[1]
    row, flags = np.empty(d_sae, np.float32), np.zeros(d_sae + 7 & ~7, np.uint8)
    bits, words = row.view(np.int32), flags.view(np.uint64)
    counts = np.empty(high - low, np.int64)
    # room for everything: pages that are never written cost nothing
    latents, values = np.empty((high - low) * d_sae, np.int32), np.empty((high - low) * d_sae, np.float32)
    end = 0
    for r in range(low, high):
        begin = end
        _flag(z[r], bias, threshold, np.float32(0), bits, row, flags)
        end = _collect(row, flags, words, latents, values, end)
        counts[r - low] = end - begin
    return counts, latents[:end].copy(), values[:end].copy()


@_compiled
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


@_compiled
def _topk(z: Any, norms: Any, low: int, high: int, bias: Any, k: int) -> Any:  # pragma: no cover - compiled
    """Candidates are what lies above a bar, which is lowered until there are k of them, or down to 0.

    The k-th largest is nearly in proportion to the row's norm: the rows before tell the bar to try first.
    """
    d_sae = z.shape[1]
    row, flags = np.empty(d_sae, np.float32), np.zeros(d_sae + 7 & ~7, np.uint8)
    bits, words = row.view(np.int32), flags.view(np.uint64)
    candidates, strengths = np.empty(d_sae, np.int32), np.empty(d_sae, np.float32)
    counts, zeros = np.empty(high - low, np.int64), np.zeros(d_sae, np.float32)
    latents, values = np.empty((high - low) * k, np.int32), np.empty((high - low) * k, np.float32)
    end, ratio = 0, np.float32(0)
    for r in range(low, high):
        bar = np.float32(_FIRST) * ratio * norms[r]
        while True:
            _flag(z[r], bias, zeros, bar, bits, row, flags)
            count = _collect(row, flags, words, candidates, strengths, 0)
            if count >= k or bar == 0:
                break
            bar = bar * np.float32(0.7) if bar > np.float32(0.1) * ratio * norms[r] else np.float32(0)
        begin = end
        end, least = _largest(candidates, strengths, count, k, latents, values, end)
        ratio = _followed(ratio, least, norms[r])
        counts[r - low] = end - begin
    return counts, latents[:end].copy(), values[:end].copy()


@_compiled
def _followed(ratio: Any, least: Any, norm: Any) -> Any:  # pragma: no cover - compiled
    if not (least > 0 and norm > 0):
        return ratio
    fresh = least / norm
    return fresh if ratio == 0 else np.float32(0.75) * ratio + np.float32(0.25) * fresh


# Selection by a bfloat16 product, of float32 pre-activations: exact, see `Screen`


@_compiled
def _flag_screened(
    z: Any, bias: Any, bars: Any, bar: Any, slack: Any, norms: Any, bits: Any, row: Any, flags: Any
) -> None:  # pragma: no cover - compiled
    """As `_flag`, but flag all whose float32 pre-activation may lie above the bars."""
    for j in range(row.size):
        bits[j] = np.int32(z[j]) << np.int32(16)
    for j in range(row.size):
        value = row[j] + bias[j]
        row[j] = value
        most = value + (slack * norms[j] + np.float32(_ROUNDED) * (abs(value) + abs(bias[j])))
        flags[j] = not (most <= bars[j] + bar)  # also where it is not a number: that is for the float32 value to tell


@_compiled
def _exact(x: Any, weight: Any, bias: Any, candidates: Any, strengths: Any, count: int) -> None:  # pragma: no cover - compiled
    """Put the float32 pre-activations of the candidates into `strengths`."""
    _dots(0, count, candidates, weight, x, strengths)
    for p in range(count):
        strengths[p] += bias[candidates[p]]


@_compiled
def _above_screened(
    z: Any, low: int, high: int, x: Any, x_norms: Any, weight: Any, norms: Any, bias: Any, threshold: Any
) -> Any:  # pragma: no cover - compiled
    d_sae = z.shape[1]
    row, flags = np.empty(d_sae, np.float32), np.zeros(d_sae + 7 & ~7, np.uint8)
    bits, words = row.view(np.int32), flags.view(np.uint64)
    candidates, strengths = np.empty(d_sae, np.int32), np.empty(d_sae, np.float32)
    counts = np.empty(high - low, np.int64)
    latents, values = np.empty((high - low) * d_sae, np.int32), np.empty((high - low) * d_sae, np.float32)
    error = np.float32(_PRODUCT + _SUM * x.shape[1])
    end = 0
    for r in range(low, high):
        _flag_screened(z[r], bias, threshold, np.float32(0), error * x_norms[r], norms, bits, row, flags)
        count = _collect(row, flags, words, candidates, strengths, 0)
        _exact(x[r], weight, bias, candidates, strengths, count)
        begin = end
        for p in range(count):
            if strengths[p] > threshold[candidates[p]]:
                latents[end], values[end] = candidates[p], strengths[p]
                end += 1
        counts[r - low] = end - begin
    return counts, latents[:end].copy(), values[:end].copy()


@_compiled
def _topk_screened(
    z: Any, low: int, high: int, x: Any, x_norms: Any, weight: Any, norms: Any, bias: Any, k: int
) -> Any:  # pragma: no cover - compiled
    """k latents that surely reach some value make it a bound: who may not reach it is not among the k largest."""
    d_sae = z.shape[1]
    row, flags = np.empty(d_sae, np.float32), np.zeros(d_sae + 7 & ~7, np.uint8)
    bits, words = row.view(np.int32), flags.view(np.uint64)
    candidates, strengths = np.empty(d_sae, np.int32), np.empty(d_sae, np.float32)
    counts, zeros, nothing = np.empty(high - low, np.int64), np.zeros(d_sae, np.float32), np.zeros(d_sae, np.float32)
    latents, values = np.empty((high - low) * k, np.int32), np.empty((high - low) * k, np.float32)
    error = np.float32(_PRODUCT + _SUM * x.shape[1])
    end, ratio = 0, np.float32(0)
    for r in range(low, high):
        slack = error * x_norms[r]
        bar = np.float32(_FIRST) * ratio * x_norms[r]
        while True:
            _flag(z[r], bias, zeros, bar, bits, row, flags)
            count = _collect(row, flags, words, candidates, strengths, 0)
            if count >= k or bar == 0:
                break
            bar = bar * np.float32(0.7) if bar > np.float32(0.1) * ratio * x_norms[r] else np.float32(0)
        bound = np.float32(0)
        if count >= k:
            for p in range(count):
                j = candidates[p]
                strengths[p] -= slack * norms[j] + np.float32(_ROUNDED) * (abs(strengths[p]) + abs(bias[j]))
            bound = max(bound, np.partition(strengths[:count], count - k)[count - k])
        # a hair below the bound, for what it takes to be among the k largest is to reach it, not to pass it
        _flag_screened(z[r], bias, nothing, bound * np.float32(0.999999), slack, norms, bits, row, flags)
        count = _collect(row, flags, words, candidates, strengths, 0)
        _exact(x[r], weight, bias, candidates, strengths, count)
        begin = end
        end, least = _largest(candidates, strengths, count, k, latents, values, end)
        ratio = _followed(ratio, least, x_norms[r])
        counts[r - low] = end - begin
    return counts, latents[:end].copy(), values[:end].copy()


# Over rows


@_compiled
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


@_compiled
def _decode(
    low: int, high: int, starts: Any, latents: Any, values: Any, weight: Any, bias: Any, out: Any
) -> None:  # pragma: no cover - compiled
    for r in range(low, high):
        out[r, :] = bias
        _add_rows(starts[r], starts[r + 1], latents, values, weight, out[r])


@_compiled
def _dots(begin: int, end: int, latents: Any, weight: Any, g: Any, dots: Any) -> None:  # pragma: no cover - compiled
    for p in range(begin, end):
        w = weight[latents[p]]
        total = np.float32(0)
        for j in range(g.size):
            total += g[j] * w[j]
        dots[p] = total


@_compiled
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


@_compiled
def _sample(low: int, high: int, starts: Any, latents: Any, weight: Any, g: Any, dots: Any) -> None:  # pragma: no cover
    for r in range(low, high):
        _dots(starts[r], starts[r + 1], latents, weight, g[r], dots)


@_compiled
def _row_sum(low: int, high: int, starts: Any, values: Any, out: Any) -> None:  # pragma: no cover - compiled
    for r in range(low, high):
        total = np.float32(0)
        for p in range(starts[r], starts[r + 1]):
            total += values[p]
        out[r] = total


# Over latents


@_compiled
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


@_compiled
def _latent_sum(low: int, high: int, starts: Any, entries: Any, values: Any, out: Any) -> None:  # pragma: no cover - compiled
    for i in range(low, high):
        total = np.float32(0)
        for p in range(starts[i], starts[i + 1]):
            total += values[entries[p]]
        out[i] = total


@_compiled
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


@_compiled
def _adam(
    low: int, high: int, constants: Any, weight: Any, gradient: Any, slots: Any, m: Any, v: Any, low_copy: Any, norms: Any,
    unit: bool,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    lr, root, beta1, beta2, rest1, rest2, eps, clip = constants
    d = weight.shape[1]
    none = np.zeros(d, np.float32)
    one = np.float32(1)
    for i in range(low, high):
        w, mi, vi = weight[i], m[i], v[i]
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
                low_copy[i, j] = np.int16((bits[j] + up) >> np.int32(16))
