"""The identity dictionary: latent i is neuron i, so that neurons go through everything that features go through."""

from typing import ClassVar

import torch
from torch import Tensor

from sae.sae import SAE, SAEConfig


class IdentitySAE(SAE):
    """f = x, x_hat = f; d_sae = d_in. The neuron baseline of every comparison. Latents may be negative."""

    architecture: ClassVar[str] = "identity"

    def __init__(self, cfg: SAEConfig) -> None:
        """Hold no parameters; the matrices exist when asked for."""
        super().__init__(cfg)
        self.register_buffer("b_enc", torch.zeros(cfg.d_in), persistent=False)
        self.register_buffer("b_dec", torch.zeros(cfg.d_in), persistent=False)

    @classmethod
    def of(cls, hook: str, d_in: int) -> "IdentitySAE":
        """Return the dictionary of the d_in neurons at `hook`."""
        return cls(SAEConfig("identity", d_in, d_in, hook, apply_b_dec_to_input=False))

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        """The identity, (d_in, d_in)."""
        return torch.eye(self.cfg.d_in, device=self.b_dec.device)

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """The identity, (d_in, d_in)."""
        return self.W_enc

    def directions(self, latents: Tensor) -> Tensor:
        """Return unit vectors, (n, d_in), without building the identity."""
        return torch.nn.functional.one_hot(latents, self.cfg.d_in).float().to(self.b_dec.device)

    def encode(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def decode(self, f: Tensor) -> Tensor:
        """Return f."""
        return f
