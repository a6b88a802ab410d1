"""The standard SAE: ReLU latents, mean squared error and an L1 penalty."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from sae.architectures.auxk import Dead
from sae.architectures.linear import LinearSAE
from sae.config import TrainConfig
from sae.ops import Above, DenseOps, Ops
from sae.sae import TrainingLoss, row_mean


class StandardSAE(LinearSAE):
    """f = ReLU((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec (Bricken et al. 2023, "Towards Monosemanticity").

    With `apply_b_dec_to_input` false, b_dec is not subtracted from the input (Anthropic, April 2024 update).
    """

    architecture: ClassVar[str] = "standard"
    rowwise: ClassVar[bool] = True

    def rule(self) -> Above:
        """ReLU."""
        return Above()

    def training_loss(
        self, x: Tensor, config: TrainConfig, coefficient: Tensor | float, ops: Ops | None = None,
        dead: Callable[[], Dead | None] | None = None,
    ) -> TrainingLoss:  # fmt: skip
        """Return mean_x ||x - x_hat||^2 + coefficient * mean_x sum_i f_i ||W_dec,i|| (April 2024 update, "Loss").

        The squared error is summed over d_in, so that with E||x|| = sqrt(d_in) one coefficient suits all widths.
        """
        ops = ops or DenseOps()
        f = ops.encode(x, self.W_enc, self.b_enc, self.rule(), self.b_dec if self.cfg.apply_b_dec_to_input else None)
        out = ops.reconstruct(f, self.W_dec, self.b_dec, x)
        mse = row_mean(out.error)
        # rows have norm 1 with unit_norm, and the penalty must not pull at them
        l1 = row_mean(f.row_sum(f.values) if config.unit_norm_decoder else f.dot(ops.norms(self.W_dec)))
        return TrainingLoss(mse + coefficient * l1, mse, l1, f, out.error.detach())
