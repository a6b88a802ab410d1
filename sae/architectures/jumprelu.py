"""JumpReLU: each latent fires above a threshold of its own."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from sae.architectures.linear import LinearSAE
from sae.ops import Above
from sae.sae import SAEConfig


class JumpReLUSAE(LinearSAE):
    """f_i = z_i where z_i > threshold_i, else 0 (Rajamanoharan et al. 2024, "Jumping Ahead"); thresholds are >= 0."""

    architecture: ClassVar[str] = "jumprelu"
    threshold: Tensor

    def __init__(self, cfg: SAEConfig) -> None:
        """Create parameters, uninitialised."""
        super().__init__(cfg)
        self.threshold = nn.Parameter(torch.empty(cfg.d_sae, dtype=getattr(torch, cfg.dtype)))

    def rule(self) -> Above:
        """The thresholds."""
        return Above(self.threshold)

    def fold_norms(self, norm: Tensor) -> None:
        """See LinearSAE; thresholds grow with the latents."""
        super().fold_norms(norm)
        self.threshold.mul_(norm)
