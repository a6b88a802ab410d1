"""TopK: each token fires its k largest latents."""

from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.linear import LinearSAE
from sae.config import TrainConfig
from sae.ops import Rule, TopK
from sae.sae import Fired, Moment, Site

# Who fires does not depend on the encoder's scale, how fast its directions turn does: Adam's steps have one size. Measured on
# a residual stream (500 steps, k 32 and 64): explained variance 0.010 higher at a quarter than at 1, no more at less; the
# smaller, the more latents never fire.
_ENCODER_SHARE = 0.25


class TopKSAE(LinearSAE):
    """f = TopK(ReLU((x - b_dec) W_enc + b_enc)), x_hat = f W_dec + b_dec, decoder rows of norm 1 (Gao et al. 2024, 2.3)."""

    architecture: ClassVar[str] = "topk"

    @classmethod
    def initialise(cls, config: TrainConfig, site: Site, mean: Tensor) -> LinearSAE:
        """As LinearSAE's, but beside decoder rows of norm 1 the encoder's columns start at `_ENCODER_SHARE` of that."""
        sae = super().initialise(config, site, mean)
        if config.unit_norm_decoder:
            with torch.no_grad():
                sae.W_enc.mul_(_ENCODER_SHARE)
        return sae

    def rule(self) -> Rule:
        """The k largest of each row."""
        assert self.cfg.k is not None
        return TopK(self.cfg.k)

    def training_rule(self, k: tuple[int, ...]) -> Rule:
        """Say which latents fire while training; of a stack, `k` is every member's."""
        return TopK(k)

    def fold_norms(self, norm: Tensor) -> None:
        """See LinearSAE. Who is among the k largest stays so only where all latents are scaled alike: by the mean norm.

        So decoder rows that are free in training, as those of transcoders and crosscoders, keep what their norms are to each
        other.
        """
        super().fold_norms(norm.mean().expand_as(norm) if float(norm.max()) > 1.0001 * float(norm.min()) else norm)

    def fire(self, x: Tensor, now: Moment) -> Fired:
        """The k largest, at no price: k sets the sparsity."""
        assert self.cfg.k is not None
        f = self.encode_with(now.ops, x, self.training_rule(now.k or (self.cfg.k,)))
        with torch.no_grad():
            l1 = self.mean(f.row_sum(f.values))
        return Fired(f, 0.0, l1)
