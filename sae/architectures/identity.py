"""The identity dictionary: latent i is neuron i, so that neurons go through everything that features go through."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sae.sae import SAE, SAEConfig


class IdentitySAE(SAE):
    """f = x, x_hat = f; d_sae = d_in. The neuron baseline of every comparison. Latents may be negative.

    Neurons may be turned about: f = s x with a sign s for each, which is kept with the config.
    """

    architecture: ClassVar[str] = "identity"
    signs: Tensor

    def __init__(self, cfg: SAEConfig) -> None:
        """Hold no parameters; the matrices exist when asked for."""
        super().__init__(cfg)
        self.register_buffer("b_enc", torch.zeros(cfg.d_in), persistent=False)
        self.register_buffer("b_dec", torch.zeros(cfg.d_in), persistent=False)
        signs = cfg.metadata.get("signs") or [1] * cfg.d_in
        self.register_buffer("signs", torch.tensor(signs, dtype=torch.float32), persistent=False)

    @classmethod
    def of(cls, hook: str, d_in: int, signs: Sequence[int] | None = None) -> "IdentitySAE":
        """Return the dictionary of the d_in neurons at `hook`; `signs`, 1 or -1 each, turns some about."""
        turned = {"signs": list(signs)} if signs is not None and min(signs) < 0 else {}
        return cls(SAEConfig("identity", d_in, d_in, hook, apply_b_dec_to_input=False, metadata=turned))

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        """The identity, (d_in, d_in), each column with its neuron's sign."""
        return self.signs.diag()

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """The identity, (d_in, d_in)."""
        return self.W_enc

    def directions(self, latents: Tensor) -> Tensor:
        """Return unit vectors, (n, d_in), without building the identity."""
        latents = latents.to(self.signs.device)
        return torch.nn.functional.one_hot(latents, self.cfg.d_in).float() * self.signs[latents, None]

    def encode(self, x: Tensor) -> Tensor:
        """Return x, turned about where the signs say so."""
        return x * self.signs if "signs" in self.cfg.metadata else x

    def decode(self, f: Tensor) -> Tensor:
        """Return f, turned back."""
        return f * self.signs if "signs" in self.cfg.metadata else f
