"""JumpReLU: each latent fires above a threshold of its own."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sae.architectures.linear import LinearSAE
from sae.config import TrainConfig
from sae.ops import Above
from sae.sae import Fired, Moment, SAEConfig, Site

# Adam's steps have the size of the learning rate, whatever the gradient: thresholds move so many times that far, in ratios
_SPEED = 10.0


class JumpReLUSAE(LinearSAE):
    """f_i = z_i where z_i > threshold_i, else 0 (Rajamanoharan et al. 2024, "Jumping Ahead"); thresholds are >= 0."""

    architecture: ClassVar[str] = "jumprelu"
    threshold: Tensor

    def __init__(self, cfg: SAEConfig) -> None:
        """Create parameters, uninitialised."""
        super().__init__(cfg)
        self.threshold = nn.Parameter(torch.empty(cfg.d_sae, dtype=getattr(torch, cfg.dtype)))

    @classmethod
    def initialise(cls, config: TrainConfig, site: Site, mean: Tensor) -> "LinearSAE":
        """Return one in training."""
        return JumpReLUTraining.initialise(config, site, mean)

    def rule(self) -> Above:
        """The thresholds."""
        return Above(self.threshold)

    def fold_norms(self, norm: Tensor) -> None:
        """See LinearSAE; thresholds grow with the latents."""
        super().fold_norms(norm)
        self.threshold.mul_(norm)


class JumpReLUTraining(LinearSAE):
    """A JumpReLU SAE in training, whose thresholds have a logarithm for a parameter: they stay above 0.

    A threshold has no gradient of its own: it gets one through a rectangular kernel, from the pre-activations within half a
    `bandwidth` of it (Rajamanoharan et al., eq. 11). So these, and those above, are all that a step looks at.
    """

    architecture: ClassVar[str] = "jumprelu"

    def __init__(self, cfg: SAEConfig) -> None:
        """Create parameters, uninitialised."""
        super().__init__(cfg)
        self.log_threshold = nn.Parameter(torch.empty(cfg.d_sae))  # over `_SPEED`

    @classmethod
    def initialise(cls, config: TrainConfig, site: Site, mean: Tensor) -> "JumpReLUTraining":
        """As LinearSAE's, every threshold at `threshold_init`."""
        sae = super().initialise(config, site, mean)
        assert isinstance(sae, JumpReLUTraining)
        with torch.no_grad():
            sae.log_threshold.fill_(math.log(config.threshold_init) / _SPEED)
        return sae

    @property
    def threshold(self) -> Tensor:
        """Of each latent, (d_sae,)."""
        return (_SPEED * self.log_threshold).exp()

    def rule(self) -> Above:
        """The thresholds as they are now."""
        return Above(self.threshold.detach())

    def restart(self, config: TrainConfig, latents: Tensor, decoders: Tensor, encoders: Tensor) -> None:
        """See LinearSAE."""
        super().restart(config, latents, decoders, encoders)
        self.log_threshold[latents] = math.log(config.threshold_init) / _SPEED

    def finished(self) -> JumpReLUSAE:
        """Return the SAE to use."""
        sae = self.become(JumpReLUSAE, "jumprelu")
        with torch.no_grad():
            sae.threshold.copy_(self.threshold)
        return sae

    def rowwise(self, config: TrainConfig) -> bool:
        """See SAE; the quadratic penalty is of the batch's mean."""
        return config.l0_penalty != "quadratic" and super().rowwise(config)

    def fire(self, x: Tensor, now: Moment) -> Fired:
        """What is above its threshold; coefficient * penalty, by `l0_penalty`:

        - "tanh": mean_x sum_i tanh(c f_i ||W_dec,i||) (Anthropic, "Dictionary Learning Optimization Techniques", January 2025),
        - "step": mean_x L0 (Rajamanoharan et al., eq. 9), with a gradient to thresholds alone,
        - "quadratic": (mean_x L0 / target - 1)^2 (the same, appendix F);

        and, with "tanh", pre_act_coefficient * mean_x sum_i ReLU(threshold_i - z_i) ||W_dec,i||, which brings latents that never
        fire back. That is a sum over all latents: it is taken as one product with sum_i W_enc,i ||W_dec,i|| for those below
        their threshold and those above alike, and the latter, which are few, are then taken off again.
        """
        config, ops, threshold = now.config, now.ops, self.threshold
        near = self.encode_with(ops, x, Above(threshold.detach() - config.bandwidth / 2))
        z, thresholds = near.values, near.of_latent(threshold).expand_as(near.values)
        f = near.with_values(_Jump.apply(z, thresholds, config.bandwidth))  # type: ignore[no-untyped-call]
        parts: dict[str, Tensor] = {}
        price: Tensor | float = 0.0
        if config.l0_penalty == "tanh":
            norms = self.norms(ops)
            score = torch.tanh(config.tanh_scale * f.values * f.of_latent(norms))
            penalty = self.mean(f.row_sum(score))
            if config.pre_act_coefficient > 0:
                fixed = norms.detach()  # it is to move encoders, not to shrink the decoders of latents that rest
                every = ops.preactivation_sum(x, self.W_enc, self.b_enc - threshold, fixed, self.shift)
                above = torch.where(f.values > 0, (z - thresholds) * f.of_latent(fixed), 0)
                pre_act = self.mean(f.row_sum(above) - every)
                price, parts["pre_act"] = config.pre_act_coefficient * pre_act, pre_act.detach()
        else:
            fires = _Step.apply(z, thresholds, config.bandwidth)  # type: ignore[no-untyped-call]
            penalty = self.mean(f.row_sum(fires))
            if config.l0_penalty == "quadratic":
                assert config.target_l0 is not None
                penalty = (penalty / (config.target_l0 if now.aim is None else now.aim) - 1).square()
        parts["sparsity"] = penalty.detach()
        with torch.no_grad():
            l1 = self.mean(f.row_sum(f.values))
        return Fired(f, price + now.coefficient * penalty, l1, parts)


# What was not selected, and what pads arrays on a GPU, has value 0 and must get no gradient.


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where((z > threshold) & (z != 0), z, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        fires, near = (z > threshold) & (z != 0), ((z - threshold).abs() < ctx.bandwidth / 2) & (z != 0)
        of_threshold = torch.where(near, gradient * threshold / -ctx.bandwidth, 0)
        return torch.where(fires, gradient, 0), of_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return ((z > threshold) & (z != 0)).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = ((z - threshold).abs() < ctx.bandwidth / 2) & (z != 0)
        return None, torch.where(near, gradient / -ctx.bandwidth, 0), None
