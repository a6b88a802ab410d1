"""The standard SAE: ReLU latents, mean squared error and an L1 penalty."""

from typing import ClassVar

from torch import Tensor

from sae.architectures.linear import LinearSAE
from sae.ops import Above
from sae.sae import Fired, Moment


class StandardSAE(LinearSAE):
    """f = ReLU((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec (Bricken et al. 2023, "Towards Monosemanticity").

    With `apply_b_dec_to_input` false, b_dec is not subtracted from the input (Anthropic, April 2024 update).
    """

    architecture: ClassVar[str] = "standard"

    def rule(self) -> Above:
        """ReLU."""
        return Above()

    def fire(self, x: Tensor, now: Moment) -> Fired:
        """ReLU; coefficient * mean_x sum_i f_i ||W_dec,i|| (April 2024 update, "Loss").

        The squared error is summed over d_in, so that with E||x|| = sqrt(d_in) one coefficient suits all widths.
        """
        f = self.encode_with(now.ops, x, self.rule())
        l1 = self.l1(f, now)
        return Fired(f, now.coefficient * l1, l1)
