"""The operations in plain PyTorch, a few lines each: what the compiled kernels are tested against, and run where they do not."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae.ops.float8 import Float8
from sae.ops.kernels import AdamStep, Screen, Term, TooDense, by_member, product
from sae.ops.latents import ByLatent, SparseLatents, each, of_dense, stacked


class ReferenceKernels:
    """See `Kernels` for what each one means."""

    name = "reference"
    screens = False

    def above(
        self, x: Tensor, weight: Tensor | Float8, bias: Tensor, threshold: Tensor, room: int, screen: Screen | None = None,
        members: int = 1,
    ) -> SparseLatents:  # fmt: skip
        """See Kernels."""
        if members > 1:
            parts = by_member(members, x, weight, bias, threshold)
            found = stacked([self.above(rows, own, biases, bars, room) for rows, own, biases, bars in parts])
            if len(found.values) > room:
                raise TooDense
            return found
        z = product(x, weight).float() + bias
        if int((z > threshold).sum()) > room:
            raise TooDense
        return _selected(z, z > threshold, self)

    def topk(
        self, x: Tensor, weight: Tensor | Float8, bias: Tensor, k: int | tuple[int, ...], screen: Screen | None = None,
        members: int = 1,
    ) -> SparseLatents:  # fmt: skip
        """See Kernels; a stable sort, since torch.topk promises nothing about ties."""
        if members > 1:
            parts = zip(by_member(members, x, weight, bias), each(k, members), strict=True)
            return stacked([self.topk(rows, own, biases, one) for (rows, own, biases), one in parts])
        (k,) = each(k, 1)
        z = product(x, weight).float() + bias
        order = z.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return _selected(z, torch.zeros_like(z, dtype=torch.bool).scatter_(1, order, True) & (z > 0), self)

    def decode(self, f: SparseLatents, weight: Tensor, bias: Tensor) -> Tensor:
        """See Kernels."""
        out = bias.repeat(len(f), 1)
        return out.index_add_(0, f.rows, f.values[:, None] * weight[f.index])

    def reconstruct(self, f: SparseLatents, weight: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernels."""
        residual = self.decode(f, weight, bias) - x
        return residual, residual.square().sum(1), self.sample(f, residual, weight)

    def sample(self, f: SparseLatents, g: Tensor, weight: Tensor) -> Tensor:
        """See Kernels."""
        return (g[f.rows] * weight[f.index]).sum(1)

    def row_sum(self, f: SparseLatents, values: Tensor) -> Tensor:
        """See Kernels."""
        return values.new_zeros(len(f)).index_add_(0, f.rows, values)

    def by_latent(self, f: SparseLatents) -> ByLatent:
        """See Kernels."""
        order = f.latents.sort(stable=True).indices
        starts = torch.nn.functional.pad(torch.bincount(f.index, minlength=f.d_sae).cumsum(0), (1, 0))
        return ByLatent(starts, f.rows[order].int(), order.int())

    def latent_sum(self, by: ByLatent, values: Tensor) -> Tensor:
        """See Kernels."""
        latents = torch.repeat_interleave(by.counts)
        return values.new_zeros(len(by.starts) - 1).index_add_(0, latents, values[by.entries.long()])

    def gradient(
        self, terms: Sequence[Term], weight: Tensor, along: Tensor | None, tangent: bool, out: Tensor, slots: Tensor | None,
        fresh: bool,
    ) -> Tensor:  # fmt: skip
        """See Kernels."""
        full = torch.zeros_like(weight)
        which = torch.arange(len(weight), device=weight.device) if slots is None else torch.nonzero(slots >= 0).squeeze(1)
        places = which if slots is None else slots[which]
        if not fresh:
            full[which] = out[places]
        for term in terms:
            f = term.latents
            full.index_add_(0, f.index, term.coefficients[:, None] * term.dense[f.rows])
        if along is not None:
            full.add_(along[:, None] * weight)
        if tangent:
            full.sub_((full * weight).sum(1, keepdim=True) * weight)
        out[places] = full[which]
        squares = full[which].square().sum(1)
        return squares if slots is None else weight.new_zeros(len(weight)).index_put_((which,), squares)

    def adam(
        self, step: AdamStep, weight: Tensor, gradient: Tensor, slots: Tensor | None, m: Tensor, v: Tensor,
        low: Tensor | None, norms: Tensor | None, unit: bool,
        rounding: Tensor | None = None,
    ) -> None:  # fmt: skip
        """See Kernels."""
        if slots is not None:
            compact, gradient = gradient, torch.zeros_like(weight)
            gradient[slots >= 0] = compact[slots[slots >= 0]]
        clip, pace = (t.repeat_interleave(len(weight) // len(t))[:, None] for t in (step.clip, step.pace))
        g = gradient * clip
        m.lerp_(g, 1 - step.beta1)
        v.mul_(step.beta2).addcmul_(g, g, value=1 - step.beta2)
        root = (v / (1 - step.beta2**step.step)).sqrt_().add_(step.eps)
        weight.addcdiv_(m * pace, root, value=-step.lr / (1 - step.beta1**step.step))
        if unit:
            norm = weight.norm(dim=1, keepdim=True)
            weight.div_(torch.where(norm > 0, norm, 1))
        if norms is not None:
            norms.copy_(weight.norm(dim=1))
        if low is not None:
            low.copy_(weight)
        if low is not None and rounding is not None:
            rounding.copy_((weight - low).norm(dim=1))


def _selected(z: Tensor, mask: Tensor, kernels: ReferenceKernels) -> SparseLatents:
    kept = of_dense(mask.float(), kernels)
    return kept.with_values(z[kept.rows, kept.index])
