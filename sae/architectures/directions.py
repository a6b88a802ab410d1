"""Dictionaries that nothing was learnt for: the directions of PCA, and random ones. What an SAE has to be better than."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from activation_store.errors import InputError
from sae.sae import SAE, SAEConfig


class DirectionsSAE(SAE):
    """f = (x - b_dec) W_enc, x_hat = f W_dec + b_dec: a change of basis, or part of one. Latents may be negative.

    W_dec has rows of norm 1, and W_enc is its pseudo-inverse: x_hat is the point nearest to x among all sums of directions.
    """

    architecture: ClassVar[str] = "directions"

    def __init__(self, cfg: SAEConfig) -> None:
        """Create parameters, uninitialised."""
        super().__init__(cfg)
        self.W_enc = nn.Parameter(torch.empty(cfg.d_in, cfg.d_sae))
        self.W_dec = nn.Parameter(torch.empty(cfg.d_sae, cfg.d_in))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.b_dec = nn.Parameter(torch.empty(cfg.d_in))

    def encode(self, x: Tensor) -> Tensor:
        """Return coordinates, (..., d_in) -> (..., d_sae)."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def decode(self, f: Tensor) -> Tensor:
        """Return reconstructions, (..., d_sae) -> (..., d_in)."""
        return f @ self.W_dec + self.b_dec

    @classmethod
    def _of(cls, rows: Tensor, mean: Tensor, hook: str | None, **facts: object) -> "DirectionsSAE":
        d_sae, d_in = rows.shape
        sae = cls(SAEConfig(cls.architecture, d_in, d_sae, hook, metadata=dict(facts)))
        with torch.no_grad():
            sae.W_dec.copy_(torch.nn.functional.normalize(rows, dim=1))
            sae.W_enc.copy_(torch.linalg.pinv(sae.W_dec.double()))
            sae.b_dec.copy_(mean)
        return sae.eval().requires_grad_(False)

    @classmethod
    def random(
        cls, d_in: int, d_sae: int, mean: Tensor | None = None, *, seed: int = 0, hook: str | None = None
    ) -> "DirectionsSAE":
        """Return d_sae directions drawn evenly from the sphere; `mean` (d_in,) is where they start from, by default 0."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(d_sae, d_in, generator=generator)
        return cls._of(rows, torch.zeros(d_in) if mean is None else mean, hook, directions="random", seed=seed)

    @classmethod
    def pca(cls, x: Tensor, d_sae: int | None = None, *, hook: str | None = None) -> "DirectionsSAE":
        """Return the first d_sae (all, by default) principal components of x (rows, d_in), that of most variance first.

        Raises InputError where there are fewer components than that.
        """
        rows, d_in = x.shape
        wanted = d_in if d_sae is None else d_sae
        if not 1 <= wanted <= min(d_in, rows):
            raise InputError(f"d_sae: {wanted} given; {rows} rows of {d_in} have {min(d_in, rows)} principal components")
        mean = x.double().mean(0)
        centred = x.double() - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
        rows_of_most = vectors.T.flip(0)[:wanted]
        return cls._of(rows_of_most.float(), mean.float(), hook, directions="pca")
