"""What losses are written with: `Ops`, as plain autograd, and for training dense or sparse.

Those for training compute no weight gradient during backward. They leave terms on `Rows`, and the optimiser evaluates them in
its own pass over the weights: so several losses on one matrix cost no additional pass, and latents that did not fire no memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sae.ops.float8 import Float8
from sae.ops.kernels import DenseTerm, Kernels, Screen, Term, TooDense, product
from sae.ops.latents import Above, BatchTopK, DenseLatents, Latents, Rule, SparseLatents, TopK

AnyLatents = DenseLatents | SparseLatents

_SAMPLE = 256  # rows whose top k tell where a batch's cut will lie
_SLACK = 0.8  # candidates for the next batch's cut lie above this share of the last


@dataclass(frozen=True)
class Reconstruction:
    """x_hat - x (batch, d_in), without gradient, and its squared norm (batch,), with it."""

    residual: Tensor
    error: Tensor


class Ops(Protocol):
    """The operations of a loss. Weights are the SAE's own parameters; gradients reach them when the loss is backpropagated."""

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, rule: Rule, b_dec: Tensor | None = None) -> Latents:
        """Return the pre-activations z = (x - b_dec) W_enc + b_enc that the rule keeps; x is (batch, d_in) float32."""

    def reconstruct(self, f: Latents, W_dec: Tensor, b_dec: Tensor, x: Tensor, frozen: bool = False) -> Reconstruction:
        """Return how far f W_dec + b_dec is from x: the squared error is taken in the same pass as the decoding.

        With `frozen`, no gradient reaches W_dec.
        """

    def decode(self, f: Latents, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """Return f W_dec + b_dec, (batch, d_in), for losses that are more than a squared error."""

    def norms(self, W_dec: Tensor) -> Tensor:
        """Return ||W_dec,i||, (d_sae,)."""

    def block_norms(self, W_dec: Tensor, widths: Sequence[int]) -> Tensor:
        """Return the norms of parts of rows, so many columns wide, (d_sae, parts)."""

    def preactivation_sum(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, weights: Tensor, b_dec: Tensor | None = None) -> Tensor:
        """Return sum_i weights_i z_i over all latents, (batch,), as one product; no gradient reaches the weights (d_sae,)."""

    def encoder_rows(self, W_enc: Tensor, which: Tensor) -> Tensor:
        """Return the columns of W_enc of a few different latents, as rows (n, d_in)."""

    def decoder_rows(self, W_dec: Tensor, which: Tensor) -> Tensor:
        """Return the rows of W_dec of a few different latents, (n, d_in)."""

    def entries(self) -> int:
        """Return how many entries the step's latents had, so far. Raises TooDense where they did not fit."""


class HostCount:
    """A number on its way to the host. Waiting for it lets whatever was queued behind it run on."""

    def __init__(self, count: Tensor) -> None:
        """Start the copy of a scalar."""
        self._host = torch.empty((), dtype=torch.int64, pin_memory=count.is_cuda)
        self._host.copy_(count.detach(), non_blocking=count.is_cuda)
        self._arrived = torch.cuda.Event() if count.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> int:
        """Return the number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._host)


class DenseOps:
    """Plain autograd over (batch, d_sae) matrices: the reference of everything.

    With compute_dtype bfloat16 all products are taken in it (autocast); sums and losses are float32.
    """

    def __init__(self, compute_dtype: torch.dtype = torch.float32) -> None:
        """Say what dtype products are taken in."""
        self._dtype = compute_dtype
        self._counts: list[HostCount] = []

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            product: Tensor = a @ b
        return product

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, rule: Rule, b_dec: Tensor | None = None) -> Latents:
        """See Ops."""
        x = x if b_dec is None else x - b_dec
        z = torch.addmm(b_enc, x, W_enc) if self._dtype == torch.float32 else self._product(x, W_enc) + b_enc
        f = DenseLatents(select(z, rule))
        self._counts.append(HostCount(torch.count_nonzero(f.values.detach())))
        return f

    def reconstruct(self, f: Latents, W_dec: Tensor, b_dec: Tensor, x: Tensor, frozen: bool = False) -> Reconstruction:
        """See Ops."""
        residual = self.decode(f, W_dec.detach() if frozen else W_dec, b_dec) - x
        return Reconstruction(residual.detach(), residual.square().sum(-1))

    def decode(self, f: Latents, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """See Ops."""
        return self._product(f.values, W_dec) + b_dec

    def norms(self, W_dec: Tensor) -> Tensor:
        """See Ops."""
        norms: Tensor = W_dec.norm(dim=1)
        return norms

    def block_norms(self, W_dec: Tensor, widths: Sequence[int]) -> Tensor:
        """See Ops."""
        return torch.stack([block.norm(dim=1) for block in torch.split(W_dec, list(widths), dim=1)], dim=1)

    def preactivation_sum(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, weights: Tensor, b_dec: Tensor | None = None) -> Tensor:
        """See Ops."""
        weights = weights.detach()
        return (x if b_dec is None else x - b_dec) @ (W_enc @ weights) + b_enc @ weights

    def encoder_rows(self, W_enc: Tensor, which: Tensor) -> Tensor:
        """See Ops."""
        return W_enc.T[which]

    def decoder_rows(self, W_dec: Tensor, which: Tensor) -> Tensor:
        """See Ops."""
        return W_dec[which]

    def entries(self) -> int:
        """See Ops."""
        counts, self._counts = self._counts, []
        return sum(count.wait() for count in counts)


def thresholds(rule: Above, d_sae: int, device: torch.device) -> Tensor:
    """Return the rule's threshold of each latent, (d_sae,) float32."""
    if isinstance(rule.threshold, Tensor):
        return rule.threshold.detach().float().expand(d_sae).contiguous()
    return torch.full((d_sae,), rule.threshold, dtype=torch.float32, device=device)


def select(z: Tensor, rule: Rule) -> Tensor:
    """Return z (batch, d_sae) where the rule keeps it, else 0: the dense form of every rule. z itself may be overwritten."""
    if isinstance(rule, Above):
        if isinstance(rule.threshold, float) and rule.threshold == 0:
            return torch.relu_(z)
        return torch.where(z > rule.threshold, z, 0)
    flat = z.flatten() if isinstance(rule, BatchTopK) else z
    count = min(rule.k * (len(z) if isinstance(rule, BatchTopK) else 1), flat.shape[-1])
    # a stable sort, for torch.topk promises nothing about ties
    kept = flat.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, kept, True).view_as(z)
    return torch.where(mask & (z > 0), z, 0)


@dataclass
class Rows:
    """A matrix by latent, (d_sae, d) float32, what the optimiser keeps beside it, and a step's gradient in parts.

    `low` is its copy in bfloat16 or float8, in which an encoder's product is taken, or `screen` what its float32 product is
    selected by; `norms` are a decoder's rows' norms. All are those after the last step. The gradient is the sum of `terms`, of
    along_i * row i, and of the `subsets`' (latents, gradient of their rows).
    """

    weight: Tensor
    low: Tensor | Float8 | None = None
    norms: Tensor | None = None
    screen: Screen | None = None
    terms: list[Term | DenseTerm] = field(default_factory=list)
    along: Tensor | None = None
    subsets: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add_term(self, f: AnyLatents, coefficients: Tensor, dense: Tensor) -> None:
        """Add to the gradient what these entries make of `dense` (batch, d)."""
        self.terms.append(
            DenseTerm(f.low, coefficients, dense) if isinstance(f, DenseLatents) else Term(f, coefficients, dense)
        )

    def clear(self) -> None:
        """Forget the gradient."""
        self.terms, self.along, self.subsets = [], None, []


class SparseOps:
    """The same operations over the entries that fire. `room` is the share of (batch, d_sae) that they may take."""

    def __init__(self, kernels: Kernels, rows: Mapping[Tensor, Rows], room: float = 1.0) -> None:
        """Work on the parameters that `rows` knows."""
        self.kernels, self.room = kernels, room
        self._rows = rows
        self._counts: list[tuple[HostCount, int, int]] = []  # with the least and the most that it may be
        self._floors: dict[Tensor, Tensor] = {}  # where the last cut of BatchTopK lay: what only speeds up the next

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, rule: Rule, b_dec: Tensor | None = None) -> Latents:
        """See Ops."""
        rows = self._rows[W_enc]
        with torch.no_grad():
            centred = x if b_dec is None else x - b_dec
            try:
                f = self._select(centred, rows, b_enc, rule)
            except TooDense:
                self._counts.clear()  # of what the step had before: it is computed anew
                self._floors.clear()
                raise
        values: Tensor = _Encode.apply(W_enc, b_enc, b_dec, x, f, centred, rows)  # type: ignore[no-untyped-call]
        if isinstance(rows.low, Float8):  # of those that it selected, some turn out not to pass
            with torch.no_grad():
                bar = thresholds(rule, len(b_enc), x.device)[f.latents] if isinstance(rule, Above) else 0.0
                fails = f.values <= bar
            values = values.masked_fill(fails, 0)
        return f.with_values(values)

    def _in_float32(self, f: SparseLatents, x: Tensor, rows: Rows, bias: Tensor) -> SparseLatents:
        """Give what float8 selected its float32 values: few are selected, and four bits tell who may fire, not how strongly."""
        if not isinstance(rows.low, Float8):
            return f
        exact = self.kernels.sample(f, x, rows.weight) + bias.detach()[f.latents]
        return f.with_values(torch.where(f.values != 0, exact, 0))  # what stands behind the last entry stays 0

    def _select(self, x: Tensor, rows: Rows, bias: Tensor, rule: Rule) -> SparseLatents:
        room, screen = int(self.room * len(x) * len(bias)), rows.screen
        weight = rows.weight if rows.low is None else rows.low
        if isinstance(rule, Above):
            f = self.kernels.above(x, weight, bias.detach(), thresholds(rule, len(bias), x.device), room, screen)
            self._counts.append((HostCount(f.starts[-1]), 0, room))
            return self._in_float32(f, x, rows, bias)
        if isinstance(rule, TopK):
            f = self.kernels.topk(x, weight, bias.detach(), min(rule.k, len(bias)), screen)
            self._counts.append((HostCount(f.starts[-1]), 0, len(x) * rule.k))
            return self._in_float32(f, x, rows, bias)
        return self._batch_topk(x, rows, weight, bias, rule.k, screen)

    def _batch_topk(
        self, x: Tensor, rows: Rows, weight: Tensor | Float8, bias: Tensor, k: int, screen: Screen | None
    ) -> SparseLatents:
        """Take the entries above a floor that the cut surely lies above, then the largest of them; exact, whatever the floor."""
        wanted = min(k, len(bias)) * len(x)
        room = min(len(x) * len(bias), 4 * wanted) if x.is_cuda else len(x) * len(bias)
        floor = self._floors.get(bias)
        if floor is None:
            some = self.kernels.topk(x[:_SAMPLE], weight, bias.detach(), min(2 * k, len(bias)), screen).values
            rank = min(int(1.5 * k * min(len(x), _SAMPLE)), len(some) - 1)
            floor = some.sort(descending=True).values[rank] if len(some) else bias.new_zeros(())
        candidates = self.kernels.above(x, weight, bias.detach(), floor.expand(len(bias)).contiguous(), room, screen)
        if not x.is_cuda and len(candidates.values) < wanted and float(floor) > 0:  # too high a floor: take all there are
            candidates = self.kernels.above(x, weight, bias.detach(), torch.zeros(len(bias)), x.shape[0] * len(bias), screen)
        if x.is_cuda:  # whether the floor served is known later
            self._counts.append((HostCount(candidates.starts[-1]), wanted, room))
        candidates = self._in_float32(candidates, x, rows, bias)  # the cut is between float32 values
        values = candidates.values
        if len(values) <= wanted:
            if not x.is_cuda:
                self._counts.append((HostCount(candidates.starts[-1]), 0, wanted))
            return candidates
        if x.is_cuda:  # the next floor aims at twice as many as are wanted, where there is room for four times
            ordered = values.sort(descending=True).values
            cut, after = ordered[wanted - 1], ordered[min(2 * wanted, len(ordered) - 1)]
            self._floors[bias] = torch.where(after > 0, after, 0.93 * cut)
        else:
            cut = values.kthvalue(len(values) - wanted + 1).values
            self._floors[bias] = _SLACK * cut
        above, ties = values > cut, values == cut
        kept = candidates.keep(above | (ties & (ties.cumsum(0) <= wanted - above.sum())))
        if not x.is_cuda:
            self._counts.append((HostCount(kept.starts[-1]), 0, wanted))
        return kept

    def reconstruct(self, f: Latents, W_dec: Tensor, b_dec: Tensor, x: Tensor, frozen: bool = False) -> Reconstruction:
        """See Ops."""
        rows = self._rows[W_dec]
        rows = replace(rows, terms=[]) if frozen else rows  # whose terms nobody asks for
        residual, error = _Reconstruct.apply(f.values, W_dec, b_dec, x, f, rows)  # type: ignore[no-untyped-call]
        return Reconstruction(residual, error)

    def decode(self, f: Latents, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """See Ops."""
        result: Tensor = _Decode.apply(f.values, W_dec, b_dec, f, self._rows[W_dec])  # type: ignore[no-untyped-call]
        return result

    def norms(self, W_dec: Tensor) -> Tensor:
        """See Ops."""
        result: Tensor = _Norms.apply(W_dec, self._rows[W_dec])  # type: ignore[no-untyped-call]
        return result

    def block_norms(self, W_dec: Tensor, widths: Sequence[int]) -> Tensor:
        """See Ops."""
        every = self.decoder_rows(W_dec, torch.arange(len(W_dec), device=W_dec.device))
        return torch.stack([block.norm(dim=1) for block in torch.split(every, list(widths), dim=1)], dim=1)

    def preactivation_sum(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, weights: Tensor, b_dec: Tensor | None = None) -> Tensor:
        """See Ops."""
        rows, centred = self._rows[W_enc], x if b_dec is None else x - b_dec
        along: Tensor = _Along.apply(W_enc, weights.detach(), rows)  # type: ignore[no-untyped-call]
        return centred @ along + b_enc @ weights.detach()

    def encoder_rows(self, W_enc: Tensor, which: Tensor) -> Tensor:
        """See Ops."""
        result: Tensor = _Subset.apply(W_enc, which, self._rows[W_enc])  # type: ignore[no-untyped-call]
        return result

    def decoder_rows(self, W_dec: Tensor, which: Tensor) -> Tensor:
        """See Ops."""
        result: Tensor = _Subset.apply(W_dec, which, self._rows[W_dec])  # type: ignore[no-untyped-call]
        return result

    def entries(self) -> int:
        """See Ops."""
        counts, self._counts = self._counts, []
        total = 0
        for count, least, most in counts:
            if not least <= count.wait() <= most:
                self._floors.clear()
                raise TooDense
            total += count.wait()
        return total


class DenseTermOps(SparseOps):
    """The same over (batch, d_sae) matrices, the faster way while much fires: DenseOps that leaves weight gradients as terms."""

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, rule: Rule, b_dec: Tensor | None = None) -> Latents:
        """See Ops."""
        rows = self._rows[W_enc]
        with torch.no_grad():
            centred, bias = x if b_dec is None else x - b_dec, b_enc.detach()
            # where all the values count float8 is too coarse
            low = rows.weight.bfloat16() if isinstance(rows.low, Float8) else rows.low
            z = torch.addmm(bias, centred, rows.weight.T) if low is None else product(centred, low) + bias
            f = DenseLatents(select(z, rule), low=rows.low is not None)
            self._counts.append((HostCount(torch.count_nonzero(f.values)), 0, f.values.numel()))
        return f.with_values(_Encode.apply(W_enc, b_enc, b_dec, x, f, centred, rows))  # type: ignore[no-untyped-call]

    def reconstruct(self, f: Latents, W_dec: Tensor, b_dec: Tensor, x: Tensor, frozen: bool = False) -> Reconstruction:
        """See Ops."""
        rows = self._rows[W_dec]
        decoded = _Decode.apply(f.values, W_dec, b_dec, f, replace(rows, terms=[]) if frozen else rows)  # type: ignore[no-untyped-call]
        residual = decoded - x
        return Reconstruction(residual.detach(), residual.square().sum(-1))


# The derivatives. Matrices go in so that autograd knows there is something to find, and get None: see `Rows`.


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, x: Tensor, f: AnyLatents, centred: Tensor, rows: Rows
    ) -> Tensor:
        ctx.f, ctx.centred, ctx.rows = f, centred, rows
        return f.values.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        f, rows = ctx.f, ctx.rows
        gradient = torch.where(f.values != 0, gradient, 0) if isinstance(f, DenseLatents) else gradient.contiguous()
        rows.add_term(f, gradient, ctx.centred)
        of_bias = f.latent_sum(gradient)
        # every row has the same b_dec: its gradient is W_enc times the column sums, not a (batch, d_in) matrix
        of_centre = -(of_bias @ rows.weight) if ctx.needs_input_grad[2] else None
        of_x = f.with_values(gradient).decode(rows.weight, torch.zeros_like(rows.weight[0])) if ctx.needs_input_grad[3] else None
        return None, of_bias, of_centre, of_x, None, None, None


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor, f: SparseLatents, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        residual, error, ctx.dots = f.kernels.reconstruct(f, rows.weight, b_dec, x)
        ctx.f, ctx.rows, ctx.residual = f, rows, residual
        ctx.mark_non_differentiable(residual)
        return residual, error

    @staticmethod
    def backward(ctx: Any, _: Tensor, gradient: Tensor) -> Any:
        f = ctx.f
        weights = f.of_row(2 * gradient)
        ctx.rows.add_term(f, weights * f.values.detach(), ctx.residual)
        of_x = -2 * gradient[:, None] * ctx.residual if ctx.needs_input_grad[3] else None
        return weights * ctx.dots, None, 2 * gradient @ ctx.residual, of_x, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor, f: AnyLatents, rows: Rows) -> Tensor:
        ctx.f, ctx.rows = f, rows
        return f.decode(rows.weight, b_dec.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        f, rows = ctx.f, ctx.rows
        gradient = gradient.contiguous()
        rows.add_term(f, f.values.detach(), gradient)
        return f.sample(gradient, rows.weight), None, gradient.sum(0), None, None


class _Norms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_dec: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        ctx.norms = rows.weight.norm(dim=1) if rows.norms is None else rows.norms.clone()
        norms: Tensor = ctx.norms.clone()
        return norms

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        along = torch.where(ctx.norms > 0, gradient / ctx.norms, 0)  # d||w|| = w / ||w||
        ctx.rows.along = along if ctx.rows.along is None else ctx.rows.along + along
        return None, None


class _Subset(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, which: Tensor, rows: Rows) -> Tensor:
        ctx.which, ctx.rows = which, rows
        return rows.weight[which]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.rows.subsets.append((ctx.which, gradient))
        return None, None, None


class _Along(torch.autograd.Function):
    """W_enc weights, (d_in,): every latent's row gets the same gradient, times its weight."""

    @staticmethod
    def forward(ctx: Any, W_enc: Tensor, weights: Tensor, rows: Rows) -> Tensor:
        ctx.weights, ctx.rows = weights, rows
        return weights @ rows.weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.rows.terms.append(DenseTerm(False, ctx.weights[None], gradient[None]))
        return None, None, None
