"""TopK: each token fires its k largest latents."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from sae.architectures.auxk import Dead, auxk_loss
from sae.architectures.linear import LinearSAE
from sae.config import TrainConfig
from sae.ops import DenseOps, Ops, Rule, TopK
from sae.sae import TrainingLoss, row_mean


class TopKSAE(LinearSAE):
    """f = TopK(ReLU((x - b_dec) W_enc + b_enc)), x_hat = f W_dec + b_dec, decoder rows of norm 1 (Gao et al. 2024, 2.3)."""

    architecture: ClassVar[str] = "topk"

    def rule(self) -> Rule:
        """The k largest of each row."""
        assert self.cfg.k is not None
        return TopK(self.cfg.k)

    def training_rule(self, config: TrainConfig) -> Rule:
        """Say which latents fire while training."""
        return self.rule()

    def training_loss(
        self, x: Tensor, config: TrainConfig, coefficient: Tensor | float, ops: Ops | None = None,
        dead: Callable[[], Dead | None] | None = None,
    ) -> TrainingLoss:  # fmt: skip
        """Return mean_x ||x - x_hat||^2 + auxk_coefficient * AuxK; `coefficient` has no part, k sets the sparsity."""
        ops = ops or DenseOps()
        shift = self.b_dec if self.cfg.apply_b_dec_to_input else None
        f = ops.encode(x, self.W_enc, self.b_enc, self.training_rule(config), shift)
        out = ops.reconstruct(f, self.W_dec, self.b_dec, x)
        mse = row_mean(out.error)
        loss, parts = mse, {}
        revive = dead() if dead is not None and config.auxk_coefficient > 0 else None
        if revive is not None and len(x):
            k = config.auxk_k or max(1, x.shape[1] // 2)
            aux = auxk_loss(x, out.residual, revive, k, ops, self.W_enc, self.b_enc, self.W_dec, shift)
            loss, parts = mse + config.auxk_coefficient * aux, {"auxk": aux.detach()}
        with torch.no_grad():
            l1 = row_mean(f.row_sum(f.values))
        return TrainingLoss(loss, mse, l1, f, out.error.detach(), parts)
