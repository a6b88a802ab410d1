"""Matryoshka: the first latents reconstruct by themselves, so that general features are not absorbed by special ones."""

from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sae.architectures.batchtopk import BatchTopKSAE
from sae.config import TrainConfig
from sae.ops.training import Reconstruction, minus
from sae.sae import Moment, TrainingLoss

_HALVINGS = 4  # of d_sae, where no prefixes are given
_PARETO = 0.5  # the power of random prefixes' lengths


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK whose loss is that of several dictionaries, one inside the other (Bussmann et al. 2025, "Learning Multi-Level
    Features with Matryoshka Sparse Autoencoders"): the first m_1 < m_2 < ... < d_sae latents.

    Who fires is chosen among all latents at once, then each prefix takes those of its own. Prefixes are fixed, or drawn anew
    for each step from a truncated Pareto distribution (Nabeshima 2024, "Matryoshka Sparse Autoencoders").
    """

    architecture: ClassVar[str] = "matryoshka"

    def training_loss(self, x: Tensor, now: Moment) -> TrainingLoss:
        """Return the mean over prefixes m of mean_x ||x - f_{:m} W_dec,{:m} - b_dec||^2, and AuxK on what the whole leaves.

        The paper adds them up; the mean has the scale of one of them, which is what rates and AuxK's weight are made for.
        The decoder is gone through once: each prefix adds its own latents' part to the one before.
        """
        x, target = self.sides(x)
        fired = self.fire(x, now)
        rest = self.rest(x, target)
        edges = prefixes_of(now.config, now.step)
        errors, residual = [], -minus(rest, self.b_dec)
        for low, high in pairwise((0, *edges)):
            part = now.ops.decode(fired.latents.between(low, high), self.W_dec, torch.zeros_like(self.b_dec))
            residual = residual + part
            errors.append(residual.square().sum(-1))
        out = Reconstruction(residual.detach(), errors[-1])
        mse = self.mean(out.error)
        extra, parts = self.revived(now, x, target, out)
        nested = self.mean(torch.stack(errors).mean(0))
        parts |= {"smallest_prefix_mse": self.mean(errors[0]).detach()}
        return TrainingLoss(nested + extra, mse.detach(), fired.l1, fired.latents, out.error.detach(), parts)


def prefixes_of(config: TrainConfig, step: int) -> tuple[int, ...]:
    """Return the prefixes of `step`, rising, the last d_sae.

    >>> prefixes_of(TrainConfig(architecture="matryoshka", d_sae=64, k=2, steps=1), 0)
    (4, 8, 16, 32, 64)
    """
    if config.prefixes is not None:
        return config.prefixes
    if config.random_prefixes is None:
        return tuple(sorted({max(1, config.d_sae >> i) for i in range(_HALVINGS + 1)}))
    chance = np.random.Generator(np.random.PCG64([config.seed, step]))
    # inverse of the distribution function of P(m) ~ m^-(1 + power) between 1 and d_sae
    draws = chance.random(config.random_prefixes - 1)
    lengths = (1 - draws * (1 - config.d_sae**-_PARETO)) ** (-1 / _PARETO)
    return tuple(sorted({*np.floor(lengths).astype(int).clip(1, config.d_sae).tolist(), config.d_sae}))
