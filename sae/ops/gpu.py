"""The operations in Triton, written for NVIDIA Hopper. Nothing here waits for the device, save where plain PyTorch steps in.

Arrays of entries have the length that there is room for, and are zero behind starts[-1]. Where starts[-1] says that there
were more, row ends are cut at the room: nothing is read or written outside, and the caller drops what comes out.
Every sum has a fixed order, and no kernel uses atomics.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the kernels are written in Triton's language, whose arguments have no Python types)

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sae.ops.kernels import AdamStep, Term, lowered
from sae.ops.latents import ByLatent, SparseLatents
from sae.ops.reference import ReferenceKernels

try:
    import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

    jit: Any = triton.jit
except ImportError:  # the module imports everywhere; TritonKernels() raises
    triton, tl, jit = None, SimpleNamespace(constexpr=object), lambda kernel: kernel

log = logging.getLogger(__name__)

MAX_D = 8192  # a whole row of d float32 stands in one program's registers
MAX_K = 4096  # as many candidates again and more do in `_pick`
Z_BYTES = 512 << 20  # pre-activations at a time: long enough for a full-speed product, and no (batch, d_sae) in memory
BLOCK = 1024  # latents at a time where a program walks along rows of z


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
def _count_above(z, bias, threshold, counts, batch, d_sae, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # Several rows a program: bias and threshold, 8 bytes a latent beside z's 2, are loaded once for all of them.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    found = tl.zeros([ROWS, BLOCK], tl.int32)
    for first in range(0, d_sae, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        value = _preactivations(z, bias, rows, columns, batch, d_sae)
        bound = tl.load(threshold + columns, mask=columns < d_sae, other=float("inf"))
        found += (value > bound[None, :]).to(tl.int32)
    tl.store(counts + rows, tl.sum(found, 1), mask=rows < batch)


@jit
def _write_above(
    z, bias, threshold, starts, latents, values, capacity, batch, d_sae, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.load(starts + rows, mask=rows < batch, other=0)
    for first in range(0, d_sae, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        value = _preactivations(z, bias, rows, columns, batch, d_sae)
        bound = tl.load(threshold + columns, mask=columns < d_sae, other=float("inf"))
        chosen = (value > bound[None, :]).to(tl.int32)
        at = place[:, None] + tl.cumsum(chosen, 1) - 1
        put = (chosen > 0) & (at < capacity)
        tl.store(latents + at, tl.broadcast_to(columns[None, :], [ROWS, BLOCK]), mask=put)
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
def _candidates(z, bias, keys_out, latents_out, counts, k, batch, d_sae, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write what may be among each row's k largest: BLOCK places a row, latents ascending, and how many there are.

    The k-th largest of BLOCK >= 2k strided groups' maxima is a bound that at least k keys reach, and hardly more than
    1.4k do. So two walks along z are enough, the second out of L2, for 31 of a search on z itself, or 3 or 4 histograms
    whose bins cost several times a comparison: most pre-activations share a few exponents.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest = tl.zeros([ROWS, BLOCK], tl.int32)
    for first in range(0, d_sae, BLOCK):
        largest = tl.maximum(largest, _keys(z, bias, rows, first + tl.arange(0, BLOCK), batch, d_sae))
    bound = tl.maximum(_kth(largest, k, ROWS), 1)
    found = tl.zeros([ROWS], tl.int32)
    row_start = rows.to(tl.int64) * BLOCK
    for first in range(0, d_sae, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        keys = _keys(z, bias, rows, columns, batch, d_sae)
        chosen = (keys >= bound[:, None]).to(tl.int32)
        place = found[:, None] + tl.cumsum(chosen, 1) - 1
        put = (chosen > 0) & (place < BLOCK)
        tl.store(keys_out + row_start[:, None] + place, keys, mask=put)
        tl.store(latents_out + row_start[:, None] + place, tl.broadcast_to(columns[None, :], [ROWS, BLOCK]), mask=put)
        found += tl.sum(chosen, 1)
    tl.store(counts + rows, found, mask=rows < batch)


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
    z, bias, keys_in, latents_in, candidates, latents_out, values_out, counts, k, batch, d_sae,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write each row's k largest to k places of its own, and how many there are."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK)
    count = tl.load(candidates + rows, mask=rows < batch, other=0)
    row_start = rows.to(tl.int64) * k
    none = tl.zeros([ROWS], tl.int32)
    if tl.max(count, 0) <= BLOCK:
        at = rows.to(tl.int64)[:, None] * BLOCK + lanes[None, :]
        keys = tl.load(keys_in + at, mask=lanes[None, :] < count[:, None], other=0)
        latents = tl.load(latents_in + at, mask=lanes[None, :] < count[:, None], other=0)
        bound = _kth(keys, k, ROWS)
        ties = k - tl.sum((keys > bound[:, None]).to(tl.int32), 1)
        found, _ = _pick_in(keys, latents, bound, ties, none, none, latents_out, values_out, row_start, ROWS)
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
            latents = tl.broadcast_to((first + lanes)[None, :], [ROWS, BLOCK])
            found, tied = _pick_in(
                keys, latents, bound, k - above, found, tied, latents_out, values_out, row_start, ROWS
            )  # fmt: skip
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
def _write_dots(
    vector, begin, end, latents, weight, dots, columns, d, ENTRIES: tl.constexpr
):  # fmt: skip
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
    inside = (columns < d) & (slot >= 0)  # without a slot everything is masked: nothing written, squared norm 0
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
    weight, gradient, slots, m, v, low, norms, clip, rate, first_share, beta2, second_share, second_scale, eps, d, blocks,
    SLOTS: tl.constexpr, LOW: tl.constexpr, NORMS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    slot = row
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    at = row * d + columns
    g = tl.load(gradient + slot * d + columns, mask=(columns < d) & (slot >= 0), other=0.0) * tl.load(clip)
    first = tl.load(m + at, mask=columns < d, other=0.0)
    first += (g - first) * first_share
    second = tl.load(v + at, mask=columns < d, other=0.0) * beta2 + g * g * second_share
    w = tl.load(weight + at, mask=columns < d, other=0.0)
    w -= rate * first / (tl.sqrt(second * second_scale) + eps)
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


class TritonKernels:
    """See `Kernels` for what each one means. What it does not cover (`MAX_D`, `MAX_K`), plain PyTorch does, which waits."""

    name = "triton"

    def __init__(self) -> None:
        """Raise ImportError where there is no Triton."""
        if triton is None:
            raise ImportError("triton is not installed")

    def above(self, x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, room: int) -> SparseLatents:
        """See Kernels; never raises TooDense, starts[-1] tells."""
        (batch, d_sae), constants = (len(x), len(weight)), {"ROWS": 4, "BLOCK": BLOCK}
        bias, threshold, capacity = bias.contiguous(), threshold.contiguous(), min(room, batch * d_sae)
        f = self._room(batch, capacity, d_sae, x.device)
        counts = torch.empty(batch, dtype=torch.int32, device=x.device)
        for begin, end, z in _products(x, weight):
            programs, part = _ceil(end - begin, 4), f.starts[begin:]
            _launch(_count_above, programs, 4, z, bias, threshold, counts[begin:], end - begin, d_sae, **constants)
            f.starts[begin + 1 : end + 1] = counts[begin:end].cumsum(0) + f.starts[begin]
            if capacity:
                _launch(
                    _write_above, programs, 4, z, bias, threshold, part, f.latents, f.values, capacity, end - begin, d_sae,
                    **constants,
                )  # fmt: skip
        return f

    def topk(self, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> SparseLatents:
        """See Kernels."""
        (batch, d_sae), device = (len(x), len(weight)), x.device
        if k > MAX_K:
            _warn(f"k > {MAX_K}")
            return replace(ReferenceKernels().topk(x, weight, bias, k), kernels=self)
        k, bias = min(k, d_sae), bias.contiguous()
        block = max(BLOCK, _power(2 * k))
        rows = max(1, 4 * BLOCK // block)
        constants, warps = {"ROWS": rows, "BLOCK": block}, 8 if block > 4096 else 4
        f = self._room(batch, batch * k, d_sae, device)
        latents = torch.empty(batch, k, dtype=torch.int32, device=device)
        values = torch.empty(batch, k, device=device)
        counts = torch.empty(batch, dtype=torch.int32, device=device)
        for begin, end, z in _products(x, weight) if k else ():
            keys, places = torch.empty(2, end - begin, block, dtype=torch.int32, device=device)
            candidates = torch.empty(end - begin, dtype=torch.int32, device=device)
            programs, shape = _ceil(end - begin, rows), (k, end - begin, d_sae)
            _launch(_candidates, programs, warps, z, bias, keys, places, candidates, *shape, **constants)
            _launch(
                _pick, programs, warps, z, bias, keys, places, candidates, latents[begin:], values[begin:], counts[begin:],
                *shape, **constants,
            )  # fmt: skip
        if k:
            torch.cumsum(counts, 0, out=f.starts[1:])
            _launch(_pack, batch, 4, f.starts, latents, values, f.latents, f.values, k, BLOCK=_power(k))
        return f

    def decode(self, f: SparseLatents, weight: Tensor, bias: Tensor) -> Tensor:
        """See Kernels."""
        d = weight.shape[1]
        if d > MAX_D:
            return self._reference(d).decode(_exact(f), weight, bias)
        out = torch.empty(len(f), d, device=weight.device)
        self._decode(f, weight, bias, out, None, out, out)
        return out

    def reconstruct(self, f: SparseLatents, weight: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernels; a decoder row is read again soon after, so that part of the second reads come from L2."""
        d = weight.shape[1]
        dots = torch.zeros(len(f.latents), device=weight.device)
        if d > MAX_D:
            out, squares, exact = self._reference(d).reconstruct(_exact(f), weight, bias, x)
            dots[: len(exact)] = exact
            return out, squares, dots
        out, squares = torch.empty(len(f), d, device=weight.device), torch.empty(len(f), device=weight.device)
        self._decode(f, weight, bias, out, x.contiguous(), squares, dots)
        return out, squares, dots

    def sample(self, f: SparseLatents, g: Tensor, weight: Tensor) -> Tensor:
        """See Kernels."""
        d, dots = weight.shape[1], torch.zeros(len(f.latents), device=weight.device)
        if d > MAX_D:
            exact = self._reference(d).sample(_exact(f), g, weight)
            dots[: len(exact)] = exact
            return dots
        entries = (f.starts, f.latents, g.contiguous(), weight.contiguous(), dots, len(f.latents), d)
        _launch(_sample, len(f), _warps(d), *entries, **_tile(d))
        return dots

    def row_sum(self, f: SparseLatents, values: Tensor) -> Tensor:
        """See Kernels."""
        return self._segment_sum(f.starts, None, values)

    def by_latent(self, f: SparseLatents) -> ByLatent:
        """See Kernels; what stands behind starts[-1] is sorted behind the last latent."""
        entries = torch.arange(len(f.latents), device=f.starts.device)
        keys = torch.where(entries < f.starts[-1], f.latents, f.d_sae)
        keys, order = keys.sort(stable=True)
        bounds = torch.arange(f.d_sae + 1, dtype=keys.dtype, device=keys.device)
        return ByLatent(torch.searchsorted(keys, bounds), f.rows[order].int(), order.int())

    def latent_sum(self, by: ByLatent, values: Tensor) -> Tensor:
        """See Kernels."""
        return self._segment_sum(by.starts, by.entries, values)

    def gradient(
        self, terms: Sequence[Term], weight: Tensor, along: Tensor | None, tangent: bool, out: Tensor, slots: Tensor | None,
        fresh: bool,
    ) -> Tensor:  # fmt: skip
        """See Kernels; one launch a term, and the last one finishes."""
        d_sae, d = weight.shape
        if d > MAX_D or not out.is_contiguous():
            exact = [replace(term, latents=_exact(term.latents)) for term in terms]
            exact = [replace(term, coefficients=term.coefficients[: len(term.latents.latents)]) for term in exact]
            return self._reference(d).gradient(exact, weight, along, tangent, out, slots, fresh)
        weight, squares = weight.contiguous(), torch.empty(d_sae, device=weight.device)
        vector = squares if along is None else along.contiguous()
        for i, term in enumerate(terms or (None,)):
            arrays = (squares,) * 5
            if term is not None:
                by = term.latents.by_latent
                arrays = (by.starts, by.rows, by.entries, term.coefficients.contiguous(), term.dense.contiguous())
            last = i >= len(terms) - 1
            _launch(
                _gradient, d_sae, _warps(d), *arrays, weight, vector, squares if slots is None else slots.contiguous(), out,
                squares, d, TERM=term is not None, FRESH=fresh and i == 0, ALONG=last and along is not None,
                TANGENT=last and tangent, SLOTS=slots is not None, SQUARES=last, **_tile(d),
            )  # fmt: skip
        return squares

    def adam(
        self, step: AdamStep, weight: Tensor, gradient: Tensor, slots: Tensor | None, m: Tensor, v: Tensor,
        low: Tensor | None, norms: Tensor | None, unit: bool,
    ) -> None:  # fmt: skip
        """See Kernels; rows of norm 0 stay. Where no norm is asked for, rows may have any length."""
        rows, d = weight.shape
        whole = unit or norms is not None
        if (whole and d > MAX_D) or not all(t.is_contiguous() for t in (weight, m, v, low, norms) if t is not None):
            return self._reference(d).adam(step, weight, gradient, slots, m, v, low, norms, unit)
        block = _power(d) if whole else min(BLOCK, _power(d))
        rate, second_scale = step.lr / (1 - step.beta1**step.step), 1 / (1 - step.beta2**step.step)
        numbers = (rate, 1 - step.beta1, step.beta2, 1 - step.beta2, second_scale, step.eps, d, _ceil(d, block))
        _launch(
            _adam, rows * _ceil(d, block), _warps(block), weight, gradient.contiguous(),
            weight if slots is None else slots.contiguous(), m, v, weight if low is None else low,
            weight if norms is None else norms, step.clip, *numbers,
            SLOTS=slots is not None, LOW=low is not None, NORMS=norms is not None, UNIT=unit, BLOCK=block,
        )  # fmt: skip

    def _room(self, batch: int, capacity: int, d_sae: int, device: torch.device) -> SparseLatents:
        starts = torch.zeros(batch + 1, dtype=torch.int64, device=device)
        latents = torch.zeros(capacity, dtype=torch.int32, device=device)
        return SparseLatents(starts, latents, torch.zeros(capacity, device=device), d_sae, self)

    def _decode(
        self, f: SparseLatents, weight: Tensor, bias: Tensor, out: Tensor, x: Tensor | None, squares: Tensor, dots: Tensor
    ) -> None:
        d, entries = weight.shape[1], (f.starts, f.latents, f.values.contiguous(), weight.contiguous(), bias.contiguous())
        shape = (len(f.latents), d)
        given = out if x is None else x
        _launch(_decode, len(f), _warps(d), *entries, given, out, squares, dots, *shape, RECONSTRUCT=x is not None, **_tile(d))

    def _segment_sum(self, starts: Tensor, entries: Tensor | None, values: Tensor) -> Tensor:
        out = torch.empty(len(starts) - 1, device=values.device)
        arrays = (starts, starts if entries is None else entries, values.float().contiguous(), out, len(values))
        _launch(_segment_sum, len(out), 1, *arrays, INDIRECT=entries is not None, BLOCK=128)
        return out.to(values.dtype)

    def _reference(self, d: int) -> ReferenceKernels:
        _warn(f"rows of {d} > {MAX_D}" if d > MAX_D else "matrices that are not contiguous")
        return ReferenceKernels()


def _products(x: Tensor, weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield x weight^T in parts of whole rows, each in the same memory, with the rows' bounds."""
    x, weight = x.detach(), weight.detach()
    rows = min(max(1, Z_BYTES // max(1, len(weight) * weight.element_size())), len(x))
    z = torch.empty(rows, len(weight), dtype=weight.dtype, device=x.device)
    for begin in range(0, len(x), max(rows, 1)):
        end = min(begin + rows, len(x))
        yield begin, end, torch.mm(lowered(x[begin:end], weight), weight.T, out=z[: end - begin])


def _exact(f: SparseLatents) -> SparseLatents:
    """Return f in arrays of the length there is, for plain PyTorch; this waits for the device."""
    entries = min(int(f.starts[-1]), len(f.latents))
    return SparseLatents(f.starts.clamp(max=entries), f.latents[:entries], f.values[:entries], f.d_sae, ReferenceKernels())


def _launch(kernel: Any, programs: int, warps: int, *arguments: Any, **constants: Any) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]  # Triton launches on the current device, wherever the tensors are
            kernel[(programs,)](*arguments, **constants, num_warps=warps)


def _tile(d: int) -> dict[str, int]:
    """Rows of d at a time: about 64 registers a thread hold them."""
    block = _power(d)
    return {"BLOCK_D": block, "ENTRIES": max(2, min(16, 16384 // block))}


def _warps(d: int) -> int:
    return 8 if d > 2048 else 4 if d > 256 else 2


def _power(n: int) -> int:
    """The next power of two, and 16 at least."""
    return max(16, 1 << max(n - 1, 0).bit_length())


def _ceil(n: int, size: int) -> int:
    return -(-n // size)


@cache
def _warn(reason: str) -> None:
    log.warning("no Triton kernel for %s: plain PyTorch computes those, slower", reason)
