"""The Triton kernels behind gpu.py, written for NVIDIA Hopper: one program a row, a latent, or a block of either.

Row ends are cut at the room there is, sums have a fixed order, and no kernel uses atomics.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (they are written in Triton's language, whose arguments have no Python types)

from types import SimpleNamespace
from typing import Any

try:
    import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

    jit: Any = triton.jit
except ImportError:  # the module imports everywhere; TritonKernels() raises
    triton, tl, jit = None, SimpleNamespace(constexpr=object), lambda kernel: kernel

available = triton is not None


@jit
def _preactivations(z, bias, rows, columns, batch, d_sae):
    """z + bias in float32, [rows, columns]; outside of the matrix -inf, which no rule selects."""
    inside = (rows < batch)[:, None] & (columns < d_sae)[None, :]
    at = rows.to(tl.int64)[:, None] * d_sae + columns[None, :]
    product = tl.load(z + at, mask=inside, other=float("-inf")).to(tl.float32)
    return product + tl.load(bias + columns, mask=columns < d_sae, other=0.0)[None, :]


@jit
def _keys(z, bias, rows, columns, batch, d_sae):
    """The bits of positive pre-activations, which order as the numbers do; 0 where there is none (NaN included)."""
    value = _preactivations(z, bias, rows, columns, batch, d_sae)
    return tl.where(value > 0, value.to(tl.int32, bitcast=True), 0)


@jit
def _here(z, bias, batch, d_sae, programs, ROWS: tl.constexpr):
    """Which member of a stack a program works for, which rows of its z, and where those and its bias begin.

    Each member has `programs` of them. Several rows a program: bias and threshold, 8 bytes a latent beside z's 2, are loaded
    once for all of them.
    """
    member = (tl.program_id(0) // programs).to(tl.int64)
    rows = (tl.program_id(0) % programs) * ROWS + tl.arange(0, ROWS)
    return member, rows, z + member * batch * d_sae, bias + member * d_sae


@jit
def _count_above(z, bias, threshold, counts, batch, d_sae, programs, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    member, rows, z, bias = _here(z, bias, batch, d_sae, programs, ROWS)
    threshold += member * d_sae
    found = tl.zeros([ROWS, BLOCK], tl.int32)
    for first in range(0, d_sae, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        value = _preactivations(z, bias, rows, columns, batch, d_sae)
        bound = tl.load(threshold + columns, mask=columns < d_sae, other=float("inf"))
        found += (value > bound[None, :]).to(tl.int32)
    tl.store(counts + member * batch + rows, tl.sum(found, 1), mask=rows < batch)


@jit
def _write_above(
    z, bias, threshold, starts, latents, values, capacity, base, batch, d_sae, programs, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    member, rows, z, bias = _here(z, bias, batch, d_sae, programs, ROWS)
    threshold += member * d_sae
    base += (member * d_sae).to(tl.int32)  # the number of the member's first latent
    place = tl.load(starts + member * batch + rows, mask=rows < batch, other=0)
    for first in range(0, d_sae, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        value = _preactivations(z, bias, rows, columns, batch, d_sae)
        bound = tl.load(threshold + columns, mask=columns < d_sae, other=float("inf"))
        chosen = (value > bound[None, :]).to(tl.int32)
        at = place[:, None] + tl.cumsum(chosen, 1) - 1
        put = (chosen > 0) & (at < capacity)
        tl.store(latents + at, tl.broadcast_to((base + columns)[None, :], [ROWS, BLOCK]), mask=put)
        tl.store(values + at, value, mask=put)
        place += tl.sum(chosen, 1)


@jit
def _kth(keys, k, ROWS: tl.constexpr):
    """The k-th largest key of each row, bit by bit from the top; 0 where fewer than k are positive."""
    low = tl.zeros([ROWS], tl.int32)
    bit = 1 << 30
    for _ in range(31):
        trial = low | bit
        low = tl.where(tl.sum((keys >= trial[:, None]).to(tl.int32), 1) >= k, trial, low)
        bit = bit >> 1
    return low


@jit
def _candidates(
    z, bias, keys_out, latents_out, counts, ks, batch, d_sae, programs, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write what may be among each row's k largest: BLOCK places a row, latents ascending, and how many there are.

    The k-th largest of BLOCK >= 2k strided groups' maxima is a bound that at least k keys reach, and hardly more than
    1.4k do. So two walks along z are enough, the second largely out of L2, for 31 of a search on z itself, or 4 of
    histograms, where finding an element's bin costs many times a comparison.
    """
    member, rows, z, bias = _here(z, bias, batch, d_sae, programs, ROWS)
    k = tl.load(ks + member)
    largest = tl.zeros([ROWS, BLOCK], tl.int32)
    for first in range(0, d_sae, BLOCK):
        largest = tl.maximum(largest, _keys(z, bias, rows, first + tl.arange(0, BLOCK), batch, d_sae))
    bound = tl.maximum(_kth(largest, k, ROWS), 1)
    found = tl.zeros([ROWS], tl.int32)
    row_start = (member * batch + rows) * BLOCK
    for first in range(0, d_sae, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        keys = _keys(z, bias, rows, columns, batch, d_sae)
        chosen = (keys >= bound[:, None]).to(tl.int32)
        place = found[:, None] + tl.cumsum(chosen, 1) - 1
        put = (chosen > 0) & (place < BLOCK)
        tl.store(keys_out + row_start[:, None] + place, keys, mask=put)
        tl.store(latents_out + row_start[:, None] + place, tl.broadcast_to(columns[None, :], [ROWS, BLOCK]), mask=put)
        found += tl.sum(chosen, 1)
    tl.store(counts + member * batch + rows, found, mask=rows < batch)


@jit
def _pick_in(keys, latents, bound, ties, found, tied, latents_out, values_out, row_start, ROWS: tl.constexpr):
    """Write the keys above each row's bound, and the first `ties` equal to it; return how many came of both so far."""
    equal = ((keys == bound[:, None]) & (keys > 0)).to(tl.int32)
    before = tied[:, None] + tl.cumsum(equal, 1)
    chosen = ((keys > bound[:, None]) | ((equal > 0) & (before <= ties[:, None]))).to(tl.int32)
    at = row_start[:, None] + found[:, None] + tl.cumsum(chosen, 1) - 1
    tl.store(latents_out + at, latents, mask=chosen > 0)
    tl.store(values_out + at, keys.to(tl.float32, bitcast=True), mask=chosen > 0)
    return found + tl.sum(chosen, 1), tied + tl.sum(equal, 1)


@jit
def _pick(
    z, bias, keys_in, latents_in, candidates, latents_out, values_out, counts, ks, places, base, batch, d_sae, programs,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write each row's k largest to `places` of its own, and how many there are."""
    member, rows, z, bias = _here(z, bias, batch, d_sae, programs, ROWS)
    base += (member * d_sae).to(tl.int32)  # the number of the member's first latent
    k = tl.load(ks + member)
    counts += member * batch
    lanes = tl.arange(0, BLOCK)
    count = tl.load(candidates + member * batch + rows, mask=rows < batch, other=0)
    row_start = (member * batch + rows) * places
    none = tl.zeros([ROWS], tl.int32)
    if tl.max(count, 0) <= BLOCK:
        at = (member * batch + rows)[:, None] * BLOCK + lanes[None, :]
        keys = tl.load(keys_in + at, mask=lanes[None, :] < count[:, None], other=0)
        latents = base + tl.load(latents_in + at, mask=lanes[None, :] < count[:, None], other=0)
        bound = _kth(keys, k, ROWS)
        ties = k - tl.sum((keys > bound[:, None]).to(tl.int32), 1)
        found, tied = _pick_in(keys, latents, bound, ties, none, none, latents_out, values_out, row_start, ROWS)
        tl.store(counts + rows, found, mask=rows < batch)
    else:  # rows of very many equal values, say: the same search, slow, on z itself
        bound = tl.zeros([ROWS], tl.int32)
        bit = 1 << 30
        for _ in range(31):
            trial = bound | bit
            reached = tl.zeros([ROWS], tl.int32)
            for first in range(0, d_sae, BLOCK):
                keys = _keys(z, bias, rows, first + lanes, batch, d_sae)
                reached += tl.sum((keys >= trial[:, None]).to(tl.int32), 1)
            bound = tl.where(reached >= k, trial, bound)
            bit = bit >> 1
        above = tl.zeros([ROWS], tl.int32)
        for first in range(0, d_sae, BLOCK):
            keys = _keys(z, bias, rows, first + lanes, batch, d_sae)
            above += tl.sum((keys > bound[:, None]).to(tl.int32), 1)
        found = tl.zeros([ROWS], tl.int32)
        tied = tl.zeros([ROWS], tl.int32)
        for first in range(0, d_sae, BLOCK):
            keys = _keys(z, bias, rows, first + lanes, batch, d_sae)
            latents = tl.broadcast_to((base + first + lanes)[None, :], [ROWS, BLOCK])
            found, tied = _pick_in(keys, latents, bound, k - above, found, tied, latents_out, values_out, row_start, ROWS)
        tl.store(counts + rows, found, mask=rows < batch)


@jit
def _pack(starts, latents_in, values_in, latents, values, k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + row)
    lanes = tl.arange(0, BLOCK)
    here = lanes < tl.load(starts + row + 1) - begin
    tl.store(latents + begin + lanes, tl.load(latents_in + row * k + lanes, mask=here, other=0), mask=here)
    tl.store(values + begin + lanes, tl.load(values_in + row * k + lanes, mask=here, other=0.0), mask=here)


@jit
def _write_dots(vector, begin, end, latents, weight, dots, columns, d, ENTRIES: tl.constexpr):
    """Write vector . weight_latent at each entry from begin to end."""
    for first in range(begin, end, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        latent = tl.load(latents + at, mask=at < end, other=0).to(tl.int64)
        inside = (at < end)[:, None] & (columns < d)[None, :]
        tile = tl.load(weight + latent[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dots + at, tl.sum(vector[None, :] * tile, 1), mask=at < end)


@jit
def _decode(
    starts, latents, values, weight, bias, x, out, squares, dots, capacity, d,
    RECONSTRUCT: tl.constexpr, BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    # ENTRIES rows of the decoder at a time, so that their loads are under way together
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + row)
    end = tl.minimum(tl.load(starts + row + 1), capacity)
    columns = tl.arange(0, BLOCK_D)
    total = tl.load(bias + columns, mask=columns < d, other=0.0).to(tl.float32)
    for first in range(begin, end, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        latent = tl.load(latents + at, mask=at < end, other=0).to(tl.int64)
        value = tl.load(values + at, mask=at < end, other=0.0)
        inside = (at < end)[:, None] & (columns < d)[None, :]
        tile = tl.load(weight + latent[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * tile, 0)
    if RECONSTRUCT:
        total -= tl.load(x + row * d + columns, mask=columns < d, other=0.0)
        tl.store(squares + row, tl.sum(total * total, 0))
        _write_dots(total, begin, end, latents, weight, dots, columns, d, ENTRIES)
    tl.store(out + row * d + columns, total, mask=columns < d)


@jit
def _sample(starts, latents, g, weight, dots, capacity, d, BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    end = tl.minimum(tl.load(starts + row + 1), capacity)
    columns = tl.arange(0, BLOCK_D)
    vector = tl.load(g + row * d + columns, mask=columns < d, other=0.0)
    _write_dots(vector, tl.load(starts + row), end, latents, weight, dots, columns, d, ENTRIES)


@jit
def _segment_sum(starts, entries, values, out, capacity, INDIRECT: tl.constexpr, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    end = tl.minimum(tl.load(starts + segment + 1), capacity)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.load(starts + segment), end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        here = at < end
        if INDIRECT:
            at = tl.load(entries + at, mask=here, other=0).to(tl.int64)
        total += tl.load(values + at, mask=here, other=0.0)
    tl.store(out + segment, tl.sum(total, 0))


@jit
def _gradient(
    starts, rows, entries, coefficients, dense, weight, along, slots, out, squares, d,
    TERM: tl.constexpr, FRESH: tl.constexpr, ALONG: tl.constexpr, TANGENT: tl.constexpr, SLOTS: tl.constexpr,
    SQUARES: tl.constexpr, BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    slot = latent
    if SLOTS:
        slot = tl.load(slots + latent).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < tl.where(slot >= 0, d, 0)  # without a slot everything is masked: nothing written, squared norm 0
    total = tl.zeros([BLOCK_D], tl.float32)
    if not FRESH:
        total += tl.load(out + slot * d + columns, mask=inside, other=0.0)
    if TERM:
        begin = tl.load(starts + latent)
        end = tl.where(slot >= 0, tl.load(starts + latent + 1), begin)
        for first in range(begin, end, ENTRIES):
            at = first + tl.arange(0, ENTRIES)
            here = at < end
            row = tl.load(rows + at, mask=here, other=0).to(tl.int64)
            entry = tl.load(entries + at, mask=here, other=0)
            coefficient = tl.load(coefficients + entry, mask=here, other=0.0)
            tile = tl.load(dense + row[:, None] * d + columns[None, :], mask=here[:, None] & inside[None, :], other=0.0)
            total += tl.sum(coefficient[:, None] * tile, 0)
    if ALONG or TANGENT:
        own = tl.load(weight + latent * d + columns, mask=inside, other=0.0)
        if ALONG:
            total += tl.load(along + latent) * own
        if TANGENT:
            total -= tl.sum(total * own, 0) * own
    tl.store(out + slot * d + columns, total, mask=inside)
    if SQUARES:
        tl.store(squares + latent, tl.sum(total * total, 0))


@jit
def _adam(
    weight, gradient, slots, m, v, low, norms, clip, pace, each, rate, first_share, beta2, second_share, second_scale, eps, d,
    blocks, SLOTS: tl.constexpr, LOW: tl.constexpr, NORMS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    slot = row
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    at = row * d + columns
    g = tl.load(gradient + slot * d + columns, mask=columns < tl.where(slot >= 0, d, 0), other=0.0)
    g *= tl.load(clip + row // each)
    first = tl.load(m + at, mask=columns < d, other=0.0)
    first += (g - first) * first_share
    second = tl.load(v + at, mask=columns < d, other=0.0) * beta2 + g * g * second_share
    w = tl.load(weight + at, mask=columns < d, other=0.0)
    w -= rate * tl.load(pace + row // each) * first / (tl.sqrt(second * second_scale) + eps)
    if UNIT:
        norm = tl.sqrt(tl.sum(w * w, 0))
        w = w / tl.where(norm > 0, norm, 1.0)
    if NORMS:
        tl.store(norms + row, tl.sqrt(tl.sum(w * w, 0)))
    tl.store(m + at, first, mask=columns < d)
    tl.store(v + at, second, mask=columns < d)
    tl.store(weight + at, w, mask=columns < d)
    if LOW:
        tl.store(low + at, w.to(tl.bfloat16), mask=columns < d)
