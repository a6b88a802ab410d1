"""Which latents fire, and how strongly: as compressed sparse rows, or as the plain (batch, d_sae) matrix.

Losses are written once against `Latents`: `values` is a tensor that autograd follows, `of_latent` and `of_row` bring
vectors into its shape, `dot` and `row_sum` bring it back to one number a row.

SAEs of equal shape can be stacked: `members` of them are one of members * d_sae latents over members * batch rows, of which
the rows of member m, m * batch to (m + 1) * batch, fire only latents m * d_sae to (m + 1) * d_sae. So all that works by entry,
row or latent does a stack's work at once and need not know of it; what does is said here. Everywhere else members is 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sae.ops.kernels import Kernels


@dataclass(frozen=True)
class Above:
    """Keep pre-activations z > threshold: a number, or (d_sae,) of one a latent. 0 is ReLU; with JumpReLU's thresholds
    lowered by half the bandwidth, exactly the entries that its straight-through estimator needs are kept."""

    threshold: Tensor | float = 0.0


@dataclass(frozen=True)
class TopK:
    """Keep the k largest positive pre-activations of each row (Gao et al. 2024, section 2.3); ties: the lower latent.

    In a stack, one k for all members or one for each.
    """

    k: int | tuple[int, ...]


@dataclass(frozen=True)
class BatchTopK:
    """Keep the batch * k largest positive pre-activations of the batch (Bussmann et al. 2024); ties: the earlier entry.

    In a stack, one k for all members or one for each.
    """

    k: int | tuple[int, ...]


Rule = Above | TopK | BatchTopK


def each(k: int | tuple[int, ...], members: int) -> tuple[int, ...]:
    """Return every member's k."""
    return (k,) * members if isinstance(k, int) else k * members if len(k) == 1 else k


@dataclass(frozen=True)
class ByLatent:
    """The same entries in the order of their latents: latent i has `rows` and `entries` from starts[i] to starts[i + 1].

    starts (d_sae + 1) int64; rows (entry) int32; entries (entry) int32, where the entry stands in the rows' order.
    """

    starts: Tensor
    rows: Tensor
    entries: Tensor

    @property
    def counts(self) -> Tensor:
        """Entries of each latent, (d_sae,) int64."""
        return self.starts.diff()


class Latents:
    """The latents of a batch, (batch, d_sae) in effect; of a stack, (members, batch, d_sae). `d_sae` is that of all members."""

    values: Tensor
    members: int
    d_sae: int

    @property
    def d_each(self) -> int:
        """The width of a member."""
        return self.d_sae // self.members

    def with_values(self, values: Tensor) -> "Latents":
        """Return the same entries with other values."""
        raise NotImplementedError

    def of_latent(self, vector: Tensor) -> Tensor:
        """Bring (d_sae,) into the shape of `values`."""
        raise NotImplementedError

    def of_row(self, vector: Tensor) -> Tensor:
        """Bring (batch,) into the shape of `values`."""
        raise NotImplementedError

    def row_sum(self, values: Tensor) -> Tensor:
        """Sum what has the shape of `values` over each row, (batch,)."""
        raise NotImplementedError

    def dot(self, vector: Tensor) -> Tensor:
        """Return sum_i f_i vector_i of each row, (batch,); the vector is (d_sae,)."""
        return self.row_sum(self.values * self.of_latent(vector))

    def latent_sum(self, values: Tensor) -> Tensor:
        """Sum what has the shape of `values` over each latent, (d_sae,)."""
        raise NotImplementedError

    def decode(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return f weight + bias, (batch, d); without gradient, as `sample`."""
        raise NotImplementedError

    def sample(self, g: Tensor, weight: Tensor) -> Tensor:
        """Return g weight^T, g (batch, d), at the entries, in the shape of `values`: the gradient of a decode."""
        raise NotImplementedError

    def between(self, low: int, high: int) -> "Latents":
        """Return each member's latents low <= i < high, the others silent; gradients reach their values."""
        raise NotImplementedError

    def least(self) -> Tensor:
        """Return the smallest value above zero of each member, (members,); infinity where nothing fires."""
        raise NotImplementedError

    def latent_counts(self) -> Tensor:
        """Return in how many rows each latent is above zero, (d_sae,) int64."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return the (batch, d_sae) matrix, of a stack (members, batch, d_sae); what is not kept is 0."""
        raise NotImplementedError


@dataclass(frozen=True)
class DenseLatents(Latents):
    """The plain matrix, of a stack (members, batch, d_sae). With `low`, products with it are taken in bfloat16."""

    values: Tensor
    low: bool = False

    @property
    def members(self) -> int:  # type: ignore[override]
        """How many are stacked."""
        return 1 if self.values.dim() == 2 else len(self.values)

    @property
    def d_sae(self) -> int:  # type: ignore[override]
        """See Latents."""
        return self.members * self.values.shape[-1]

    def blocks(self, matrix: Tensor) -> Tensor:
        """Return what has rows by row or by latent as one block a member, where there are several: views."""
        return matrix if self.members == 1 else matrix.view(self.members, -1, matrix.shape[-1])

    def with_values(self, values: Tensor) -> "DenseLatents":
        """See Latents."""
        return replace(self, values=values)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a b in float32."""
        return (a.bfloat16() @ b.bfloat16()).float() if self.low else a @ b

    def of_latent(self, vector: Tensor) -> Tensor:
        """See Latents."""
        return vector if self.members == 1 else vector.view(self.members, 1, -1)

    def of_row(self, vector: Tensor) -> Tensor:
        """See Latents."""
        return vector.view(*self.values.shape[:-1], 1)

    def row_sum(self, values: Tensor) -> Tensor:
        """See Latents."""
        return values.sum(-1).flatten()

    def dot(self, vector: Tensor) -> Tensor:
        """One matrix-vector product, where values * vector would be another (batch, d_sae)."""
        return (self.values @ self.blocks(vector[:, None])).flatten()

    def latent_sum(self, values: Tensor) -> Tensor:
        """See Latents."""
        return values.sum(-2).flatten()

    def decode(self, weight: Tensor, bias: Tensor) -> Tensor:
        """See Latents."""
        return self.product(self.values.detach(), self.blocks(weight)).view(-1, weight.shape[1]) + bias

    def sample(self, g: Tensor, weight: Tensor) -> Tensor:
        """See Latents."""
        return self.product(self.blocks(g), self.blocks(weight).mT)

    def between(self, low: int, high: int) -> "DenseLatents":
        """See Latents."""
        index = torch.arange(self.d_each, device=self.values.device)
        return self.with_values(self.values * ((index >= low) & (index < high)))

    def least(self) -> Tensor:
        """See Latents."""
        return torch.where(self.values > 0, self.values, torch.inf).view(self.members, -1).amin(1)

    def latent_counts(self) -> Tensor:
        """See Latents."""
        return (self.values > 0).sum(-2).flatten()

    def dense(self) -> Tensor:
        """See Latents."""
        return self.values


@dataclass(frozen=True)
class SparseLatents(Latents):
    """Only what fires: row r has `latents` and `values` from starts[r] to starts[r + 1], latents ascending.

    starts (batch + 1) int64; latents (entry) int32; values (entry) float32. Arrays may be longer than starts[-1] where
    their length had to be fixed before it was known (CUDA): what stands behind it has latent 0 and value 0, and no
    method of this class counts it.
    """

    starts: Tensor
    latents: Tensor
    values: Tensor
    d_sae: int
    kernels: "Kernels" = field(repr=False, compare=False)
    members: int = 1
    known: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # of the entries, found when first asked for

    def __len__(self) -> int:
        """The rows."""
        return len(self.starts) - 1

    def with_values(self, values: Tensor) -> "SparseLatents":
        """See Latents; what is known of the entries is shared."""
        return replace(self, values=values)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]

    @property
    def index(self) -> Tensor:
        """`latents` as int64, which torch indexes with."""
        index: Tensor = self._once("index", self.latents.long)
        return index

    @property
    def rows(self) -> Tensor:
        """The row of each entry, (entry) int32; behind the last one it is the last row."""

        def find() -> Tensor:
            entries = torch.arange(len(self.latents), device=self.starts.device)
            return torch.searchsorted(self.starts[1:], entries, right=True, out_int32=True).clamp_(max=max(len(self) - 1, 0))

        rows: Tensor = self._once("rows", find)
        return rows

    @property
    def by_latent(self) -> ByLatent:
        """The entries in the order of their latents."""
        by: ByLatent = self._once("by_latent", lambda: self.kernels.by_latent(self))
        return by

    def of_latent(self, vector: Tensor) -> Tensor:
        """See Latents."""
        taken: Tensor = _Take.apply(vector, self)  # type: ignore[no-untyped-call]
        return taken

    def of_row(self, vector: Tensor) -> Tensor:
        """See Latents."""
        return vector[self.rows]

    def row_sum(self, values: Tensor) -> Tensor:
        """See Latents."""
        result: Tensor = _RowSum.apply(values, self)  # type: ignore[no-untyped-call]
        return result

    def dot(self, vector: Tensor) -> Tensor:
        """See Latents; only the result is kept for the backward pass, nothing as long as the entries."""
        result: Tensor = _Dot.apply(self.values, vector, self)  # type: ignore[no-untyped-call]
        return result

    def latent_sum(self, values: Tensor) -> Tensor:
        """See Latents."""
        return self.kernels.latent_sum(self.by_latent, values)

    def decode(self, weight: Tensor, bias: Tensor) -> Tensor:
        """See Latents."""
        return self.kernels.decode(self, weight, bias)

    def sample(self, g: Tensor, weight: Tensor) -> Tensor:
        """See Latents."""
        return self.kernels.sample(self, g, weight)

    def between(self, low: int, high: int) -> "SparseLatents":
        """See Latents."""
        within = self.latents if self.members == 1 else self.latents % self.d_each
        return self.keep((within >= low) & (within < high))

    def least(self) -> Tensor:
        """See Latents."""
        above = torch.where(self.values > 0, self.values, torch.inf)
        if self.members == 1:
            return above.amin(0, keepdim=True) if len(above) else above.new_full((1,), torch.inf)
        of = self.index // self.d_each
        return above.new_full((self.members,), torch.inf).scatter_reduce_(0, of, above, "amin")

    def latent_counts(self) -> Tensor:
        """See Latents."""
        return self.latent_sum((self.values > 0).float()).long()

    def dense(self) -> Tensor:
        """See Latents."""
        filled = torch.arange(len(self.latents), device=self.starts.device) < self.starts[-1]
        out = self.values.new_zeros(len(self), self.d_each)
        if out.numel():
            at = self.rows.long(), self.index % self.d_each
            out = out.index_put(at, torch.where(filled, self.values, 0), accumulate=True)
        return out if self.members == 1 else out.view(self.members, -1, self.d_each)

    def at(self, rows: Tensor, latents: Tensor) -> Tensor:
        """Return f[rows, latents], which broadcast against each other; 0 where a latent does not fire."""
        entries = torch.arange(len(self.latents), device=self.starts.device)
        codes = torch.where(entries < self.starts[-1], self.rows.long() * self.d_sae + self.index, len(self) * self.d_sae)
        wanted = rows * self.d_sae + latents
        place = torch.searchsorted(codes, wanted.contiguous())
        there = place.clamp(max=max(len(codes) - 1, 0))
        if len(codes) == 0:
            return torch.zeros(wanted.shape, device=wanted.device)
        return torch.where(codes[there] == wanted, self.values[there], 0)

    def keep(self, mask: Tensor) -> "SparseLatents":
        """Return only the entries where `mask` (entry,) holds, in arrays as long as before on CUDA: no host wait."""
        entries = torch.arange(len(self.latents), device=self.starts.device)
        mask = mask & (entries < self.starts[-1])
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        starts = before[self.starts.clamp(max=len(mask))]  # which after an overflow say more than there is
        if mask.is_cuda:
            target = torch.where(mask, before[1:] - 1, len(mask))  # one place more than there is, for what is dropped
            latents = self.latents.new_zeros(len(mask) + 1).index_put_((target,), self.latents)[:-1]
            values = self.values.new_zeros(len(mask) + 1).index_put_((target,), self.values)[:-1]
            inside = entries < starts[-1]
            return SparseLatents(starts, latents * inside, values * inside, self.d_sae, self.kernels, self.members)
        return SparseLatents(starts, self.latents[mask], self.values[mask], self.d_sae, self.kernels, self.members)


def of_dense(f: Tensor, kernels: "Kernels") -> SparseLatents:
    """Return what is not zero in (batch, d_sae)."""
    row, latent = torch.nonzero(f, as_tuple=True)
    starts = torch.nn.functional.pad(torch.bincount(row, minlength=len(f)).cumsum(0), (1, 0))
    return SparseLatents(starts, latent.int(), f[row, latent].float(), f.shape[1], kernels)


def stacked(parts: Sequence[SparseLatents]) -> SparseLatents:
    """Return the latents of SAEs of equal width as those of a stack of them. Arrays must end with the last entry."""
    width, ends = parts[0].d_sae, torch.tensor([0, *(len(part.values) for part in parts)]).cumsum(0).tolist()
    starts = [part.starts[bool(number) :] + ends[number] for number, part in enumerate(parts)]
    latents = [part.latents + number * width for number, part in enumerate(parts)]
    values = torch.cat([part.values for part in parts])
    return SparseLatents(torch.cat(starts), torch.cat(latents), values, width * len(parts), parts[0].kernels, len(parts))


class _RowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, f: SparseLatents) -> Tensor:
        ctx.f = f
        return f.kernels.row_sum(f, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _spread(gradient, ctx.f), None


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, vector: Tensor, f: SparseLatents) -> Tensor:
        ctx.save_for_backward(values, vector)
        ctx.f = f
        return f.kernels.row_sum(f, vector[f.latents].mul_(values))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, vector = ctx.saved_tensors
        f, spread = ctx.f, _spread(gradient, ctx.f)
        of_vector = f.latent_sum(spread * values) if ctx.needs_input_grad[1] else None
        return spread.mul_(vector[f.latents]) if ctx.needs_input_grad[0] else None, of_vector, None


def _spread(gradient: Tensor, f: SparseLatents) -> Tensor:
    """Return each entry's row's gradient, (entry,)."""
    spread = gradient[f.rows]
    if spread.is_cuda:  # what stands behind the last entry belongs to no row
        spread = torch.where(torch.arange(len(spread), device=spread.device) < f.starts[-1], spread, 0)
    return spread


class _Take(torch.autograd.Function):
    """vector[latents], whose gradient is a sum by latent: torch's own scatters with atomics, in no fixed order."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, f: SparseLatents) -> Tensor:
        ctx.f = f
        return vector[f.latents]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.f.latent_sum(gradient.contiguous()), None
