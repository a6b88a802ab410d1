"""What losses are written with: `Ops`, as plain autograd, and for training dense or sparse.

Those for training compute no weight gradient during backward. They leave terms on `Rows`, and the optimiser evaluates them in
its own pass over the weights: so several losses on one matrix cost no additional pass, and latents that did not fire no memory.

They also work for stacks of SAEs (see latents.py): then rows and latents are those of all members, and b_dec is (members, d_in).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from sae.ops.float8 import Float8
from sae.ops.kernels import DenseTerm, Kernels, Screen, Term, TooDense, by_member, product
from sae.ops.latents import Above, BatchTopK, DenseLatents, Latents, Rule, SparseLatents, TopK, each, stacked

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


@cache
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return whole numbers as a tensor. A copy from ordinary memory makes a GPU wait: it is made once."""
    return torch.tensor(numbers, device=device)


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
    """Return z (batch, d_sae), of a stack (members, batch, d_sae), where the rule keeps it, else 0: the dense form of every
    rule. z itself may be overwritten."""
    if isinstance(rule, Above):
        if isinstance(rule.threshold, float) and rule.threshold == 0:
            return torch.relu_(z)
        threshold = rule.threshold
        if z.dim() == 3 and isinstance(threshold, Tensor):
            threshold = threshold.view(len(z), 1, -1)
        return torch.where(z > threshold, z, 0)
    if z.dim() == 3:
        return torch.stack([select(own, type(rule)(k)) for own, k in zip(z, each(rule.k, len(z)), strict=True)])
    (k,) = each(rule.k, 1)
    flat = z.flatten() if isinstance(rule, BatchTopK) else z
    count = min(k * (len(z) if isinstance(rule, BatchTopK) else 1), flat.shape[-1])
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


def minus(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (batch, d) less the bias (d,), of a stack less each member's, (members, d)."""
    if bias is None:
        return x
    return x - bias if bias.dim() == 1 else (x.view(len(bias), -1, x.shape[1]) - bias[:, None]).view_as(x)


def column_sums(x: Tensor, like: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum over the rows of x (rows, d), `weights` (rows,) times each, in the shape of a bias: one a member."""
    if like.dim() == 1:
        return x.sum(0) if weights is None else weights @ x
    x = x.view(len(like), -1, x.shape[1])
    return x.sum(1) if weights is None else (weights.view(len(like), 1, -1) @ x).squeeze(1)


class SparseOps:
    """The same operations over the entries that fire, of one SAE or a stack of `members`.

    `room` is the share of (batch, d_sae) that they may take.
    """

    def __init__(self, kernels: Kernels, rows: Mapping[Tensor, Rows], room: float = 1.0, members: int = 1) -> None:
        """Work on the parameters that `rows` knows."""
        self.kernels, self.room, self.members = kernels, room, members
        self._rows = rows
        self._counts: list[tuple[HostCount, int, int]] = []  # with the least and the most that it may be
        self._floors: dict[Tensor, Tensor] = {}  # where the last cut of BatchTopK lay: what only speeds up the next

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, rule: Rule, b_dec: Tensor | None = None) -> Latents:
        """See Ops."""
        rows = self._rows[W_enc]
        with torch.no_grad():
            centred = minus(x, b_dec)
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
        members, d_each, bare = self.members, len(bias) // self.members, bias.detach()
        room, screen = int(self.room * len(x) * d_each), rows.screen
        weight = rows.weight if rows.low is None else rows.low
        if isinstance(rule, Above):
            f = self.kernels.above(x, weight, bare, thresholds(rule, len(bias), x.device), room, screen, members)
            self._counts.append((HostCount(f.starts[-1]), 0, room))
            return self._in_float32(f, x, rows, bias)
        ks = tuple(min(k, d_each) for k in each(rule.k, members))
        if isinstance(rule, TopK):
            f = self.kernels.topk(x, weight, bare, ks, screen, members)
            self._counts.append((HostCount(f.starts[-1]), 0, len(x) // members * sum(ks)))
            return self._in_float32(f, x, rows, bias)
        parts: list[Any] = [(x, weight, bare, screen)] if members == 1 else list(by_member(members, x, weight, bare, screen))
        if bias not in self._floors:
            self._floors[bias] = torch.stack([self._floor(k, *part) for part, k in zip(parts, ks, strict=True)])
        if x.is_cuda:
            return self._batch_topk_unseen(x, rows, weight, bias, ks)
        floors, found = self._floors[bias], []
        for number, (part, k) in enumerate(zip(parts, ks, strict=True)):
            own, floors[number] = self._batch_topk(rows, k, float(floors[number]), *part)
            found.append(own)
        f = found[0] if members == 1 else stacked(found)
        self._counts.append((HostCount(f.starts[-1]), 0, len(x) // members * sum(ks)))
        return f

    def _floor(self, k: int, x: Tensor, weight: Tensor | Float8, bias: Tensor, screen: Screen | None) -> Tensor:
        """Return a value that the cut of BatchTopK lies above, by what some rows fire."""
        some = self.kernels.topk(x[:_SAMPLE], weight, bias, min(2 * k, len(bias)), screen).values
        rank = min(int(1.5 * k * min(len(x), _SAMPLE)), len(some) - 1)
        return some.sort(descending=True).values[rank] if len(some) else bias.new_zeros(())

    def _batch_topk(
        self, rows: Rows, k: int, floor: float, x: Tensor, weight: Tensor | Float8, bias: Tensor, screen: Screen | None
    ) -> tuple[SparseLatents, float]:
        """Take the entries above a floor that the cut surely lies above, then the largest of them; exact, whatever the floor.

        Return with them the floor for the next batch.
        """
        wanted, most = k * len(x), len(x) * len(bias)
        candidates = self.kernels.above(x, weight, bias, torch.full((len(bias),), floor), most, screen)
        if len(candidates.values) < wanted and floor > 0:  # too high a floor: take all there are
            candidates = self.kernels.above(x, weight, bias, torch.zeros(len(bias)), most, screen)
        candidates = self._in_float32(candidates, x, rows, bias)  # the cut is between float32 values
        values = candidates.values
        if len(values) <= wanted:
            return candidates, floor
        cut = values.kthvalue(len(values) - wanted + 1).values
        above, ties = values > cut, values == cut
        return candidates.keep(above | (ties & (ties.cumsum(0) <= wanted - above.sum()))), float(_SLACK * cut)

    def _batch_topk_unseen(
        self, x: Tensor, rows: Rows, weight: Tensor | Float8, bias: Tensor, ks: tuple[int, ...]
    ) -> SparseLatents:
        """The same on a GPU, all members at once and without a look at a number: whether the floors served is known later."""
        members, batch, d_each = self.members, len(x) // self.members, len(bias) // self.members
        wanted = [k * batch for k in ks]
        room, floors = min(len(x) * d_each, 4 * sum(wanted)), self._floors[bias]
        f = self.kernels.above(x, weight, bias.detach(), floors.repeat_interleave(d_each), room, rows.screen, members)
        ends = f.starts[:: max(batch, 1)][: members + 1]  # where each member's entries begin, and the last's end
        many = on_device(tuple(wanted), x.device)
        short = (ends.diff() < many).any()
        self._counts.append((HostCount(torch.where(short, -1, f.starts[-1])), 0, room))
        f = self._in_float32(f, x, rows, bias)  # the cut is between float32 values
        values = f.values
        if len(values) <= sum(wanted):
            return f
        of = torch.where(torch.arange(len(values), device=x.device) < ends[-1], f.index // d_each, members)
        ordered, order = values.sort(descending=True)
        ordered = ordered[of[order].sort(stable=True).indices] if members > 1 else ordered
        last = len(ordered) - 1
        cuts = ordered[(ends[:-1] + many - 1).clamp(0, last)]
        # the next floor aims at twice as many as are wanted, where there is room for four times
        after = ordered[torch.minimum(ends[:-1] + 2 * many, ends[1:] - 1).clamp(0, last)]
        self._floors[bias] = torch.where(after > 0, after, 0.93 * cuts)
        of = of.clamp(max=members - 1)
        above, ties = values > cuts[of], values == cuts[of]
        before, passed = (torch.nn.functional.pad(t.cumsum(0), (1, 0)) for t in (ties, above))
        ends = ends.clamp(max=len(values))
        spare = many - passed[ends].diff()  # of those that equal the cut, so many
        return f.keep(above | (ties & (before[1:] - before[ends[:-1]][of] <= spare[of])))

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
        rows, centred, weights = self._rows[W_enc], minus(x, b_dec), weights.detach()
        along: Tensor = _Along.apply(W_enc, weights, rows, self.members)  # type: ignore[no-untyped-call]
        biases = (b_enc * weights).view(self.members, 1, -1).sum(-1)
        return (centred.view(self.members, -1, x.shape[1]) @ along[..., None]).squeeze(-1).add(biases).flatten()

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
            centred, bias = minus(x, b_dec), b_enc.detach()
            # where all the values count float8 is too coarse
            low = rows.weight.bfloat16() if isinstance(rows.low, Float8) else rows.low
            if self.members > 1:
                weight, biases = rows.weight if low is None else low, bias.view(self.members, 1, -1)
                left, right = (t.view(self.members, -1, x.shape[1]) for t in (centred.to(weight.dtype), weight))
                z = torch.baddbmm(biases, left, right.mT) if low is None else torch.bmm(left, right.mT) + biases
            else:
                z = torch.addmm(bias, centred, rows.weight.T) if low is None else product(centred, low) + bias
            f = DenseLatents(select(z, rule), low=rows.low is not None)
            self._counts.append((HostCount(torch.count_nonzero(f.values)), 0, f.values.numel()))
        return f.with_values(_Encode.apply(W_enc, b_enc, b_dec, x, f, centred, rows))  # type: ignore[no-untyped-call]

    def reconstruct(self, f: Latents, W_dec: Tensor, b_dec: Tensor, x: Tensor, frozen: bool = False) -> Reconstruction:
        """See Ops."""
        rows = self._rows[W_dec]
        residual = _Decode.apply(f.values, W_dec, b_dec, f, replace(rows, terms=[]) if frozen else rows) - x  # type: ignore[no-untyped-call]
        return Reconstruction(residual.detach(), residual.square().sum(-1))


# The derivatives. Matrices go in so that autograd knows there is something to find, and get None: see `Rows`.


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, x: Tensor, f: AnyLatents, centred: Tensor, rows: Rows
    ) -> Tensor:
        ctx.f, ctx.centred, ctx.rows, ctx.b_dec = f, centred, rows, b_dec
        return f.values.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        f, rows = ctx.f, ctx.rows
        gradient = torch.where(f.values != 0, gradient, 0) if isinstance(f, DenseLatents) else gradient.contiguous()
        rows.add_term(f, gradient, ctx.centred)
        of_bias = f.latent_sum(gradient)
        # every row has the same b_dec: its gradient is W_enc times the column sums, not a (batch, d_in) matrix
        of_centre = -column_sums(rows.weight, ctx.b_dec, of_bias) if ctx.needs_input_grad[2] else None
        of_x = f.with_values(gradient).decode(rows.weight, torch.zeros_like(rows.weight[0])) if ctx.needs_input_grad[3] else None
        return None, of_bias, of_centre, of_x, None, None, None


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor, f: SparseLatents, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        bias, target = (b_dec, x) if b_dec.dim() == 1 else (torch.zeros_like(b_dec[0]), minus(x, b_dec))
        residual, error, ctx.dots = f.kernels.reconstruct(f, rows.weight, bias, target)
        ctx.f, ctx.rows, ctx.residual, ctx.b_dec = f, rows, residual, b_dec
        ctx.mark_non_differentiable(residual)
        return residual, error

    @staticmethod
    def backward(ctx: Any, _: Tensor, gradient: Tensor) -> Any:
        f = ctx.f
        weights = f.of_row(2 * gradient)
        ctx.rows.add_term(f, weights * f.values.detach(), ctx.residual)
        of_x = -2 * gradient[:, None] * ctx.residual if ctx.needs_input_grad[3] else None
        return weights * ctx.dots, None, column_sums(ctx.residual, ctx.b_dec, 2 * gradient), of_x, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor, f: AnyLatents, rows: Rows) -> Tensor:
        ctx.f, ctx.rows, ctx.b_dec = f, rows, b_dec
        if b_dec.dim() == 1:
            return f.decode(rows.weight, b_dec.detach())
        return minus(f.decode(rows.weight, torch.zeros_like(b_dec[0])), -b_dec.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        f, rows = ctx.f, ctx.rows
        gradient = gradient.contiguous()
        rows.add_term(f, f.values.detach(), gradient)
        return f.sample(gradient, rows.weight), None, column_sums(gradient, ctx.b_dec), None, None


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
    """W_enc weights of each member, (members, d_in): every latent's row gets the same gradient, times its weight."""

    @staticmethod
    def forward(ctx: Any, W_enc: Tensor, weights: Tensor, rows: Rows, members: int) -> Tensor:
        ctx.weights, ctx.rows = weights.view(members, 1, -1), rows
        along: Tensor = (ctx.weights @ rows.weight.view(members, -1, rows.weight.shape[1])).squeeze(1)
        return along

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        ctx.rows.terms.append(DenseTerm(False, ctx.weights, gradient))
        return None, None, None, None
