"""The standard SAE: ReLU latents, mean squared error and an L1 penalty."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from sae.config import TrainConfig
from sae.sae import SAE, SAEConfig, TrainingLoss


class StandardSAE(SAE):
    """f = ReLU((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec (Bricken et al. 2023, "Towards Monosemanticity").

    With `apply_b_dec_to_input` false, b_dec is not subtracted from the input (Anthropic, April 2024 update).
    """

    architecture: ClassVar[str] = "standard"

    def __init__(self, cfg: SAEConfig) -> None:
        """Create parameters, uninitialised."""
        super().__init__(cfg)
        dtype = getattr(torch, cfg.dtype)
        self.W_enc = nn.Parameter(torch.empty(cfg.d_in, cfg.d_sae, dtype=dtype))
        self.b_enc = nn.Parameter(torch.empty(cfg.d_sae, dtype=dtype))
        self.W_dec = nn.Parameter(torch.empty(cfg.d_sae, cfg.d_in, dtype=dtype))
        self.b_dec = nn.Parameter(torch.empty(cfg.d_in, dtype=dtype))

    def encode(self, x: Tensor) -> Tensor:
        """Return latents, (..., d_in) -> (..., d_sae), never negative."""
        if self.cfg.apply_b_dec_to_input:
            x = x - self.b_dec
        return torch.relu(x @ self.W_enc + self.b_enc)

    def decode(self, f: Tensor) -> Tensor:
        """Return reconstructions, (..., d_sae) -> (..., d_in)."""
        return f @ self.W_dec + self.b_dec

    @classmethod
    def initialise(cls, config: TrainConfig, d_in: int, mean: Tensor) -> "StandardSAE":
        """Random decoder rows of norm `decoder_init_norm` (1 for unit_norm), encoder its transpose, b_dec = mean."""
        sae = cls(
            SAEConfig("standard", d_in, config.d_sae, config.hook, apply_b_dec_to_input=config.apply_b_dec_to_input)
        )
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randn(config.d_sae, d_in, generator=generator)
        norm = 1.0 if config.sparsity_norm == "unit_norm" else config.decoder_init_norm
        with torch.no_grad():
            sae.W_dec.copy_(rows * (norm / rows.norm(dim=1, keepdim=True)))
            sae.W_enc.copy_(sae.W_dec.T)  # a copy: tied at the start only
            sae.b_enc.zero_()
            sae.b_dec.copy_(mean)
        return sae

    def training_loss(self, x: Tensor, config: TrainConfig, coefficient: Tensor | float) -> TrainingLoss:
        """Return mean_x ||x - x_hat||^2 + coefficient * mean_x sum_i f_i ||W_dec,i|| (April 2024 update, "Loss").

        The squared error is summed over d_in, so that with E||x|| = sqrt(d_in) one coefficient suits all widths.
        """
        f = self.encode(x)
        reconstruction = self.decode(f)
        mse = (reconstruction.float() - x).square().sum(-1).mean()
        # f @ norms, not (f * norms).sum(-1): one pass over (batch, d_sae) instead of three
        l1 = (f.sum(-1) if config.sparsity_norm == "unit_norm" else f @ self.W_dec.norm(dim=1)).float().mean()
        return TrainingLoss(mse + coefficient * l1, mse, l1, f, reconstruction)

    @torch.no_grad()
    def before_step(self, config: TrainConfig) -> None:
        """With unit_norm, drop the gradient's part along each decoder row: it would only change the norm."""
        if config.sparsity_norm == "unit_norm" and self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad.sub_(along * self.W_dec)

    @torch.no_grad()
    def after_step(self, config: TrainConfig) -> None:
        """With unit_norm, bring decoder rows back to norm 1."""
        if config.sparsity_norm == "unit_norm":
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Fold the input scale, then the decoder norms: x -> x_hat and the active sets stay, decoder rows get norm 1.

        Scale s: W_enc *= s, W_dec /= s, b_dec /= s. Norms n_i: W_enc column i and b_enc_i times n_i, W_dec row i over n_i.
        Rows of norm zero stay as they are.
        """
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)
        norm = self.W_dec.norm(dim=1)
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        self.W_enc.mul_(norm)
        self.b_enc.mul_(norm)
        self.W_dec.div_(norm[:, None])
