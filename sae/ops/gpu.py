"""The operations in Triton, written for NVIDIA Hopper. Nothing here waits for the device, save where plain PyTorch steps in.

Arrays of entries have the length that there is room for, and are zero behind starts[-1]. Where starts[-1] says that there
were more, row ends are cut at the room: nothing is read or written outside, and the caller drops what comes out.
Every sum has a fixed order, and no kernel uses atomics.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product as product_of
from typing import Any

import torch
from torch import Tensor

from sae.ops.float8 import Float8
from sae.ops.kernels import AdamStep, Screen, Term, product
from sae.ops.latents import ByLatent, SparseLatents, each
from sae.ops.reference import ReferenceKernels
from sae.ops.triton_kernels import (
    _adam,
    _candidates,
    _count_above,
    _decode,
    _gradient,
    _pack,
    _pick,
    _sample,
    _segment_sum,
    _write_above,
    available,
)

log = logging.getLogger(__name__)

MAX_D = 8192  # a whole row of d float32 stands in one program's registers
MAX_K = 4096  # as many candidates again and more do in `_pick`
Z_BYTES = 512 << 20  # pre-activations at a time: long enough for a full-speed product, and no (batch, d_sae) in memory
BLOCK = 512  # latents at a time where a program walks along rows of z; more, and registers leave one program a processor


class TritonKernels:
    """See `Kernels` for what each one means. What it does not cover (`MAX_D`, `MAX_K`), plain PyTorch does, which waits."""

    name = "triton"
    screens = False

    def __init__(self) -> None:
        """Raise ImportError where there is no Triton."""
        if not available:
            raise ImportError("triton is not installed")

    def above(
        self, x: Tensor, weight: Tensor | Float8, bias: Tensor, threshold: Tensor, room: int, screen: Screen | None = None,
        members: int = 1,
    ) -> SparseLatents:  # fmt: skip
        """See Kernels; never raises TooDense, starts[-1] tells."""
        batch, d_each, constants = len(x), len(weight) // members, {"ROWS": 4, "BLOCK": BLOCK}
        bias, threshold, capacity = bias.contiguous(), threshold.contiguous(), min(room, batch * d_each)
        f = self._room(batch, capacity, len(weight), x.device, members)
        counts = torch.empty(batch, dtype=torch.int32, device=x.device)
        for begin, end, first, several, z in _products(x, weight, members):
            rows, base = (end - begin) // several, first * d_each
            programs, shape = _ceil(rows, 4), (rows, d_each, _ceil(rows, 4))
            arrays = (z, bias[base:], threshold[base:])
            _launch(_count_above, several * programs, 8, *arrays, counts[begin:], *shape, **constants)
            f.starts[begin + 1 : end + 1] = counts[begin:end].cumsum(0) + f.starts[begin]
            if capacity:
                entries = (f.starts[begin:], f.latents, f.values, capacity, base)
                _launch(_write_above, several * programs, 8, *arrays, *entries, *shape, **constants)
        return f

    def topk(
        self, x: Tensor, weight: Tensor | Float8, bias: Tensor, k: int | tuple[int, ...], screen: Screen | None = None,
        members: int = 1,
    ) -> SparseLatents:  # fmt: skip
        """See Kernels."""
        batch, d_sae, device = len(x), len(weight) // members, x.device
        each_k = tuple(min(one, d_sae) for one in each(k, members))
        k, bias = max(each_k), bias.contiguous()
        if k > MAX_K:
            _warn(f"k > {MAX_K}")
            return replace(ReferenceKernels().topk(x, weight, bias, each_k, None, members), kernels=self)
        ks = _on_device(each_k, device)
        block = max(128, min(max(2 * BLOCK, _power(2 * k)), _power(d_sae)))
        rows, warps = max(1, 4 * BLOCK // block), 8 if block <= 2048 else 16
        constants = {"ROWS": rows, "BLOCK": block}
        f = self._room(batch, batch // members * sum(each_k), len(weight), device, members)
        latents = torch.empty(batch, k, dtype=torch.int32, device=device)
        values = torch.empty(batch, k, device=device)
        counts = torch.empty(batch, dtype=torch.int32, device=device)
        for begin, end, first, several, z in _products(x, weight, members) if k else ():
            keys, places = torch.empty(2, end - begin, block, dtype=torch.int32, device=device)
            candidates = torch.empty(end - begin, dtype=torch.int32, device=device)
            mine, base = (end - begin) // several, first * d_sae
            programs = _ceil(mine, rows)
            arrays, shape = (z, bias[base:], keys, places, candidates), (mine, d_sae, programs)
            _launch(_candidates, several * programs, warps, *arrays, ks[first:], *shape, **constants)
            _launch(
                _pick, several * programs, warps, *arrays, latents[begin:], values[begin:], counts[begin:], ks[first:], k, base,
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
        rounding: Tensor | None = None,
    ) -> None:  # fmt: skip
        """See Kernels; rows of norm 0 stay. Where no norm is asked for, rows may have any length."""
        rows, d = weight.shape
        whole = unit or norms is not None
        known = all(t.is_contiguous() for t in (weight, m, v, low, norms) if t is not None)
        if rounding is not None or (whole and d > MAX_D) or not known:  # there are no screens here
            return self._reference(d).adam(step, weight, gradient, slots, m, v, low, norms, unit, rounding)
        block = _power(d) if whole else min(BLOCK, _power(d))
        rate, second_scale = step.lr / (1 - step.beta1**step.step), 1 / (1 - step.beta2**step.step)
        numbers = (rate, 1 - step.beta1, step.beta2, 1 - step.beta2, second_scale, step.eps, d, _ceil(d, block))
        _launch(
            _adam, rows * _ceil(d, block), _warps(block), weight, gradient.contiguous(),
            weight if slots is None else slots.contiguous(), m, v, weight if low is None else low,
            weight if norms is None else norms, step.clip, step.pace, rows // len(step.clip), *numbers,
            SLOTS=slots is not None, LOW=low is not None, NORMS=norms is not None, UNIT=unit, BLOCK=block,
        )  # fmt: skip

    def _room(self, batch: int, capacity: int, d_sae: int, device: torch.device, members: int) -> SparseLatents:
        starts = torch.zeros(batch + 1, dtype=torch.int64, device=device)
        latents = torch.zeros(capacity, dtype=torch.int32, device=device)
        return SparseLatents(starts, latents, torch.zeros(capacity, device=device), d_sae, self, members)

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


def _products(x: Tensor, weight: Tensor | Float8, members: int) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """Yield x weight^T in parts, each in the same memory: rows of one member of a stack, or as many whole members as fit.

    With each part: the bounds of its rows, its first member, and how many it is of.
    """
    x = x.detach()
    weight = weight if isinstance(weight, Float8) else weight.detach()
    batch, d_each = len(x) // members, len(weight) // members
    rows = min(max(1, Z_BYTES // max(1, d_each * weight.dtype.itemsize)), len(x))
    z = torch.empty(0 if isinstance(weight, Float8) else rows, d_each, dtype=weight.dtype, device=x.device)
    if members > 1 and 0 < 2 * batch <= rows:
        assert isinstance(weight, Tensor)
        for first in range(0, members, rows // batch):
            several = min(rows // batch, members - first)
            begin, end, low = first * batch, (first + several) * batch, first * d_each
            left = x[begin:end].to(weight.dtype).view(several, batch, -1)
            right = weight[low : low + several * d_each].view(several, d_each, -1).mT
            part = z[: several * batch]
            torch.bmm(left, right, out=part.view(several, batch, d_each))
            yield begin, end, first, several, part
        return
    for member, begin in product_of(range(members), range(0, batch, max(min(rows, batch), 1))):
        end = min(begin + rows, batch)
        own = weight if isinstance(weight, Float8) or members == 1 else weight.chunk(members)[member]
        start = member * batch
        yield start + begin, start + end, member, 1, product(x[start + begin : start + end], own, z[: end - begin])


@cache
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _exact(f: SparseLatents) -> SparseLatents:
    """Return f in arrays of the length there is, for plain PyTorch; this waits for the device."""
    entries = min(int(f.starts[-1]), len(f.latents))
    entries_of = (f.latents[:entries], f.values[:entries], f.d_sae)
    return SparseLatents(f.starts.clamp(max=entries), *entries_of, ReferenceKernels(), f.members)


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
