"""The operations as compiled loops for CPUs (numba).

Each loop runs over a range of rows or latents and lets go of the GIL; a thread pool as wide as torch's deals out the ranges.
So no sum of theirs depends on how many threads there are, and no second pool of spinning workers fights torch's own.
"""

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.ops.cpu_loops import (
    _above,
    _above_screened,
    _adam,
    _by_latent,
    _decode,
    _gradient,
    _latent_sum,
    _reconstruct,
    _row_sum,
    _sample,
    _topk,
    _topk_screened,
)
from sae.ops.float8 import Float8
from sae.ops.kernels import AdamStep, Screen, Term, TooDense, by_member, product
from sae.ops.latents import ByLatent, SparseLatents, each, stacked

log = logging.getLogger(__name__)

_CHUNK_ROWS = 1024  # pre-activations of this many rows at a time: smaller products run slower, more would leave the cache
_CHUNK_BYTES = 64 * 2**20
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

    def __init__(self) -> None:
        """Bring the compiled loops into memory, now and not in the midst of the first step.

        Where this machine has not compiled them yet, which takes a minute or two, that is logged.
        """
        if _row_sum.signatures:
            return
        _over(1, _row_sum, np.zeros(2, np.int64), _NO_VECTOR, np.zeros(1, np.float32), each=1)
        if _row_sum.stats.cache_misses:
            log.info("compiling the sparse loops for this processor; this is done once and kept")
        x, bias, weight = torch.ones(2, 2), torch.zeros(2), torch.ones(2, 2)
        for screen in (None, Screen.of(weight)) if self.screens else (None,):
            for matrix in (weight, weight.bfloat16()) if screen is None else (weight,):
                f = self.above(x, matrix, bias, bias, 4, screen)
                self.topk(x, matrix, bias, 1, screen)
        self.decode(f, weight, bias)
        self.sample(f, x, weight)
        _, _, dots = self.reconstruct(f, weight, bias, x)
        self.latent_sum(f.by_latent, dots)
        out, one = torch.zeros(2, 2), torch.ones(1)
        self.gradient([Term(f, dots, x)], weight, None, False, out, None, True)
        self.adam(AdamStep(0.0, 0.9, 0.999, 1e-8, 1, one, one), weight, out, None, out.clone(), out.clone(), None, None, False)

    def above(
        self, x: Tensor, weight: Tensor | Float8, bias: Tensor, threshold: Tensor, room: int, screen: Screen | None = None,
        members: int = 1,
    ) -> SparseLatents:  # fmt: skip
        """See Kernels."""
        if members > 1:
            found = list[SparseLatents]()
            for rows, own, b, bars, its_screen in by_member(members, x, weight, bias, threshold, screen):
                found.append(self.above(rows, own, b, bars, room - sum(len(f.values) for f in found), its_screen))
            return stacked(found)
        biases, bars = bias.numpy(), threshold.numpy()
        if screen is None:
            return self._selected(x, weight, room, lambda z, first, low, high: _above(z, low, high, biases, bars))
        arrays = [*_screened(x, weight, screen), biases, bars]

        def select(z: Any, first: int, low: int, high: int) -> Any:
            return _above_screened(z, first, low, high, *arrays)

        return self._selected(x, screen.low, room, select)

    def topk(
        self, x: Tensor, weight: Tensor | Float8, bias: Tensor, k: int | tuple[int, ...], screen: Screen | None = None,
        members: int = 1,
    ) -> SparseLatents:  # fmt: skip
        """See Kernels."""
        if members > 1:
            parts = zip(by_member(members, x, weight, bias, screen), each(k, members), strict=True)
            return stacked([self.topk(rows, own, b, one, its_screen) for (rows, own, b, its_screen), one in parts])
        k, biases = min(*each(k, 1), len(weight)), bias.numpy()
        if screen is None:
            lengths = x.norm(dim=1).numpy()
            return self._selected(
                x, weight, len(x) * k, lambda z, first, low, high: _topk(z, lengths[first:], low, high, biases, k)
            )
        arrays = [*_screened(x, weight, screen), biases, k]

        def select(z: Any, first: int, low: int, high: int) -> Any:
            return _topk_screened(z, first, low, high, *arrays)

        return self._selected(x, screen.low, len(x) * k, select)

    def _selected(
        self, x: Tensor, weight: Tensor | Float8, room: int, select: Callable[[Any, int, int, int], Any]
    ) -> SparseLatents:
        """Take the product a few rows at a time, and of each only what is selected: z is never whole.

        select(z, first, low, high) looks at rows low to high of a part that begins at row `first`.
        """
        d_sae = len(weight)
        chunk = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // (4 * d_sae)))
        z = torch.empty(min(chunk, len(x)), d_sae, dtype=weight.dtype)
        found: list[tuple[Any, Any, Any]] = []
        for start in range(0, len(x), chunk):
            part = x[start : start + chunk]
            here = product(part, weight, z[: len(part)])
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
        rounding: Tensor | None = None,
    ) -> None:  # fmt: skip
        """See Kernels."""
        places = torch.arange(len(weight)) if slots is None else slots
        constants = np.array(
            [
                step.lr / (1 - step.beta1**step.step), 1 / math.sqrt(1 - step.beta2**step.step), step.beta1, step.beta2,
                1 - step.beta1, 1 - step.beta2, step.eps,
            ],
            dtype=np.float32,
        )  # fmt: skip
        _over(
            len(weight), _adam, constants, step.clip.numpy(), step.pace.numpy(), weight.detach().numpy(),
            gradient.detach().numpy(), places.numpy(), m.numpy(), v.numpy(),
            np.zeros((0, 0), np.int16) if low is None else low.view(torch.int16).numpy(),
            _NO_VECTOR if norms is None else norms.numpy(), _NO_VECTOR if rounding is None else rounding.numpy(), unit,
        )  # fmt: skip


def _screened(x: Tensor, weight: Tensor | Float8, screen: Screen) -> list[Any]:
    """Return what the bound on a screen's error is made of: x, the norms of its rows and of what rounding takes from them,
    weight, and the same of its rows."""
    assert isinstance(weight, Tensor)  # float32: a product in a lower dtype has no screen
    rounding = (x - x.bfloat16()).norm(dim=1)
    return [t.numpy() for t in (x.contiguous(), x.norm(dim=1), rounding, weight, screen.norms, screen.rounding)]


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
