"""The small set of sparse operations that training and inference are made of, and the choice of who computes them.

`reference` is plain PyTorch on any device, `cpu` compiled loops (numba), `gpu` Triton. All three agree, the tests say.
A matrix "by latent" is (d_sae, d) contiguous, one row a latent: W_dec as it is, W_enc transposed.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from sae.ops.float8 import Float8
from sae.ops.latents import ByLatent, SparseLatents

log = logging.getLogger(__name__)


class TooDense(Exception):
    """More entries than there is room for, or than sparse work is worth."""


@dataclass(frozen=True)
class Term:
    """A part of a matrix's gradient: row i is the sum over latent i's entries e of coefficients[e] * dense[row of e].

    coefficients (entry,) float32, in the rows' order; dense (batch, d) float32.
    """

    latents: SparseLatents
    coefficients: Tensor
    dense: Tensor


@dataclass(frozen=True)
class DenseTerm:
    """The same where every latent may have an entry in every row: coefficients^T dense, coefficients (batch, d_sae).

    Of a stack, coefficients are (members, batch, d_sae), and each member's rows of `dense` stand behind one another. With
    `low` the product is taken in bfloat16.
    """

    low: bool
    coefficients: Tensor
    dense: Tensor

    def add_to(self, out: Tensor, fresh: bool) -> None:
        """Add it to `out` (d_sae, d), or put it there if that is `fresh`."""
        dense = self.dense
        if self.coefficients.dim() == 3:
            out, dense = (t.view(len(self.coefficients), -1, t.shape[-1]) for t in (out, dense))
        if self.low:
            (out.copy_ if fresh else out.add_)(self.coefficients.mT.bfloat16() @ dense.bfloat16())
        elif out.dim() == 3:
            out.baddbmm_(self.coefficients.mT, dense, beta=0 if fresh else 1)
        else:
            torch.addmm(out, self.coefficients.T, dense, beta=0 if fresh else 1, out=out)


@dataclass(frozen=True)
class Screen:
    """What lets float32 pre-activations be selected by a bfloat16 product: weight's copy `low`, the norms of weight's rows,
    and `rounding`, the norms of the rows of weight - low.

    The product's error has a bound, so it tells who may be selected; for those few, z is then taken in float32. What comes
    out is what the float32 product would have given, and the product costs less than half.
    """

    low: Tensor
    norms: Tensor
    rounding: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Screen":
        """Take them from (d_sae, d) float32."""
        low = weight.bfloat16()
        return cls(low, weight.norm(dim=1), (weight - low).norm(dim=1))

    def chunk(self, members: int) -> "list[Screen]":
        """Return those of the members of a stack."""
        return [Screen(*t) for t in zip(*(t.chunk(members) for t in (self.low, self.norms, self.rounding)), strict=True)]


@dataclass(frozen=True)
class AdamStep:
    """One step's constants (Kingma & Ba 2015, algorithm 1).

    `clip`, on the device, multiplies every gradient first, and `pace` the learning rate: (members,) float32, one for each of
    as many equal blocks of rows.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int  # from 1
    clip: Tensor
    pace: Tensor


class Kernels(Protocol):
    """What each implementation offers. Sums have a fixed order: equal inputs give equal bits."""

    name: str
    screens: bool  # whether a `Screen` for float32 products is of use

    def above(
        self, x: Tensor, weight: Tensor | Float8, bias: Tensor, threshold: Tensor, room: int, screen: Screen | None = None,
        members: int = 1,
    ) -> SparseLatents:  # fmt: skip
        """Return the entries of z = x weight^T + bias that lie above threshold (d_sae,), with value z.

        x (batch, d) float32, weight (d_sae, d) float32, bfloat16 or float8, in which the product is then taken. Of a stack,
        each member's rows of x meet its own rows of weight. Raises TooDense where there are more than `room` entries and
        that is known without waiting; else starts[-1] tells.
        """

    def topk(
        self, x: Tensor, weight: Tensor | Float8, bias: Tensor, k: int | tuple[int, ...], screen: Screen | None = None,
        members: int = 1,
    ) -> SparseLatents:  # fmt: skip
        """Return the k largest positive entries of each row of z; see `above`."""

    def decode(self, f: SparseLatents, weight: Tensor, bias: Tensor) -> Tensor:
        """Return f weight + bias, (batch, d) float32."""

    def reconstruct(self, f: SparseLatents, weight: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual r = f weight + bias - x (batch, d), its squared norm (batch,), and r . weight_i at each entry."""

    def sample(self, f: SparseLatents, g: Tensor, weight: Tensor) -> Tensor:
        """Return g_row . weight_latent at each entry, (entry,): the gradient of a decode, only where latents fire."""

    def row_sum(self, f: SparseLatents, values: Tensor) -> Tensor:
        """Sum values (entry,) over each row, (batch,)."""

    def by_latent(self, f: SparseLatents) -> ByLatent:
        """Return the entries in the order of their latents, rows ascending within each."""

    def latent_sum(self, by: ByLatent, values: Tensor) -> Tensor:
        """Sum values (entry, in the rows' order) over each latent, (d_sae,)."""

    def gradient(
        self, terms: Sequence[Term], weight: Tensor, along: Tensor | None, tangent: bool, out: Tensor, slots: Tensor | None,
        fresh: bool,
    ) -> Tensor:  # fmt: skip
        """Write the gradient of a matrix by latent to `out`, and return each row's squared norm, (d_sae,).

        Row i is the sum of the terms, plus along_i * weight_i, and with `tangent` less its part along weight_i, whose norm
        is 1 then. It goes to out[slots_i]; a latent with slot -1 has no gradient. Where not `fresh`, out's content is
        added to.
        """

    def adam(
        self, step: AdamStep, weight: Tensor, gradient: Tensor, slots: Tensor | None, m: Tensor, v: Tensor,
        low: Tensor | None, norms: Tensor | None, unit: bool,
        rounding: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take Adam's step in place, in a pass that also brings rows to norm 1 (`unit`), and writes norms, bfloat16 copy and,
        with both, what the copy's rounding comes to (see `Screen`)."""


def by_member(members: int, *arrays: "Tensor | Float8 | Screen | None") -> Iterator[Any]:
    """Yield each member's part of a stack's arrays: an equal share of their rows."""
    yield from zip(*([None] * members if a is None else a.chunk(members) for a in arrays), strict=True)  # type: ignore[union-attr]


@cache
def kernels_for(device_type: str, reference: bool = False) -> Kernels:
    """Return the fastest kernels that run on this device; a fallback to the reference is logged once."""
    from sae.ops.reference import ReferenceKernels

    if reference:
        return ReferenceKernels()
    try:
        if device_type == "cpu":
            from sae.ops.cpu import CPUKernels

            return CPUKernels()
        if device_type == "cuda":
            from sae.ops.gpu import TritonKernels

            return TritonKernels()
    except (ImportError, RuntimeError) as error:  # numba raises the latter where it finds no folder for its cache
        log.warning("sparse kernels for %s are not to be had (%s); plain PyTorch computes them, slower", device_type, error)
    else:
        log.warning("no sparse kernels for %s; plain PyTorch computes them, slower", device_type)
    return ReferenceKernels()


def product(x: Tensor, weight: Tensor | Float8, out: Tensor | None = None) -> Tensor:
    """Return x weight^T in the dtype that weight says, in `out` where torch can put it there."""
    if isinstance(weight, Float8):
        return weight.product(x)
    return torch.mm(x.to(weight.dtype), weight.T, out=out)
