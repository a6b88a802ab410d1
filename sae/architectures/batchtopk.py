"""BatchTopK: the batch fires batch * k latents, as many a token as it needs; JumpReLU with one threshold afterwards."""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sae.architectures.jumprelu import JumpReLUSAE
from sae.architectures.topk import TopKSAE
from sae.config import TrainConfig
from sae.ops import Above, BatchTopK
from sae.sae import SAEConfig

if TYPE_CHECKING:
    from sae.dense_or_sparse import Step


class BatchTopKSAE(TopKSAE):
    """TopK over all of a batch (Bussmann et al. 2024, "BatchTopK Sparse Autoencoders").

    Outside of training a latent fires above `threshold`, the mean over batches of the smallest latent kept (section 3.2):
    exponentially weighted, and the plain mean before there are enough of them.
    """

    architecture: ClassVar[str] = "batchtopk"
    threshold: Tensor
    batches: Tensor

    def __init__(self, cfg: SAEConfig) -> None:
        """Create parameters, uninitialised, and a threshold of zero."""
        super().__init__(cfg)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def rule(self) -> Above:
        """The threshold learnt in training."""
        return Above(self.threshold)

    def training_rule(self, k: tuple[int, ...]) -> BatchTopK:
        """The batch * k largest."""
        return BatchTopK(k)

    @torch.no_grad()
    def after_step(self, config: TrainConfig, found: "Step") -> None:
        """Move the threshold towards the batch's smallest latent; a batch in which nothing fires says nothing."""
        least = found.last.latents.least().view_as(self.threshold)
        fired = least.isfinite()
        self.batches.add_(fired)
        share = torch.clamp(1 / self.batches.clamp(min=1), min=config.threshold_lr)
        self.threshold.add_(torch.where(fired, share * (least - self.threshold), 0))

    def finished(self) -> JumpReLUSAE:
        """Return the SAE to use: JumpReLU, every latent with the same threshold."""
        sae = self.become(JumpReLUSAE, "jumprelu")
        with torch.no_grad():
            sae.threshold.fill_(float(self.threshold))
        return sae
