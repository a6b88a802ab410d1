"""p-annealing: the L1 penalty turns into one nearer to L0 while training goes on."""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sae.architectures.standard import StandardSAE
from sae.config import TrainConfig
from sae.sae import Fired, Moment, SAEConfig

if TYPE_CHECKING:
    from sae.dense_or_sparse import Step

_END = 0.85  # of the steps before the decay: p is at its last by then
_SMALLEST = 1e-6  # the derivative of f^p has no bound at 0


class PAnnealSAE(StandardSAE):
    """The standard SAE with penalty sum_i (f_i ||W_dec,i||)^p, p falling from 1 to `p_end` (Karvonen et al. 2024,
    "Measuring Progress in Dictionary Learning", section 4).

    As p falls the same latents cost more or less than before; `scale` makes up for that, so that the penalty of a batch
    is the same under the old p and the new one (theirs does so every so many steps, ours in each).
    """

    architecture: ClassVar[str] = "p_anneal"
    scale: Tensor

    def __init__(self, cfg: SAEConfig) -> None:
        """Create parameters, uninitialised."""
        super().__init__(cfg)
        self.register_buffer("scale", torch.ones(()))

    @staticmethod
    def p(step: int, config: TrainConfig) -> float:
        """Return p at `step`: 1 until `p_start_fraction` of the steps, then falling linearly to `p_end`.

        It gets there somewhat before the rate begins to decay, so that L0 can settle.

        >>> c = TrainConfig(architecture="p_anneal", d_sae=1, steps=100, p_start_fraction=0.4, p_end=0.2, lr_decay_fraction=0.2)
        >>> [round(PAnnealSAE.p(step, c), 2) for step in (0, 40, 54, 68, 99)]
        [1.0, 1.0, 0.6, 0.2, 0.2]
        """
        start, end = config.p_start_fraction * config.steps, _END * (1 - config.lr_decay_fraction) * config.steps
        share = (step - start) / max(end - start, 1)
        return 1 - (1 - config.p_end) * min(max(share, 0.0), 1.0)

    def fire(self, x: Tensor, now: Moment) -> Fired:
        """ReLU; coefficient * scale * mean_x sum_i (f_i ||W_dec,i||)^p."""
        config = now.config
        f = self.encode_with(now.ops, x, self.rule())
        sizes = f.values if config.unit_norm_decoder else f.values * f.of_latent(self.norms(now.ops))
        sparsity = self.mean(f.row_sum(_power(sizes, self.p(now.step, config))))
        with torch.no_grad():
            after = self.mean(f.row_sum(_power(sizes, self.p(now.step + 1, config))))
            l1 = self.mean(f.row_sum(sizes))
        return Fired(f, now.coefficient * self.scale * sparsity, l1, {"sparsity": sparsity.detach(), "sparsity_after": after})

    @torch.no_grad()
    def after_step(self, config: TrainConfig, found: "Step") -> None:
        """Make up for the change of p."""
        before, after = (found.parts[name].view_as(self.scale) for name in ("sparsity", "sparsity_after"))
        self.scale.mul_(torch.where(after > 0, before / after, 1))

    def finished(self) -> StandardSAE:
        """Return the SAE to use: a standard one."""
        return self.become(StandardSAE, "standard")


def _power(sizes: Tensor, p: float) -> Tensor:
    """Return sizes^p, 0 and without gradient where a latent does not fire."""
    return torch.where(sizes > 0, sizes.clamp(min=_SMALLEST) ** p, 0) if p < 1 else sizes
