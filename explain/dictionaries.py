"""What is explained: an SAE's latents, neurons, and directions that nothing was learnt for, all through the same path."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from activation_store.errors import InputError
from activation_store.store import ActivationStore
from explain.config import ExplainConfig
from sae.architectures.directions import DirectionsSAE
from sae.architectures.identity import IdentitySAE
from sae.sae import SAE

_SAMPLE_ROWS, _BLOCK = 65_536, 256


@dataclass(frozen=True)
class Dictionary:
    """Units to explain: their name in results, the config field that chooses them, what encodes them, and of which activations.

    `signs`, one a unit, are those of directions that were turned so that the stronger tail is the positive one.
    """

    name: str
    field: str
    sae: SAE
    store: ActivationStore
    hook: str
    choice: int | tuple[int, ...]
    signs: Sequence[int] | None = None

    def check(self) -> None:
        """Refuse a list of units that does not exist or names one twice."""
        listed = () if isinstance(self.choice, int) else self.choice
        bad = [n for n in listed if not 0 <= n < self.sae.cfg.d_sae]
        if bad:
            raise InputError(f"explain.{self.field}: {bad} given; allowed: 0 to {self.sae.cfg.d_sae - 1}")
        if len(set(listed)) < len(listed):
            raise InputError(f"explain.{self.field}: {list(listed)} given; each number once")


def dictionaries(sae: SAE, store: ActivationStore, config: ExplainConfig, seed: int) -> list[Dictionary]:
    """Return what the config asks for, the SAE first. Directions of either sign are turned to their stronger tail.

    Neurons, principal components and random directions have no sign of their own, and a ranking of strongest windows sees but one
    tail of them: whichever is stronger on a sample of the training rows becomes the positive one.
    """
    hook = sae.cfg.hook_name or store.hooks[0]
    rows_of = cache(partial(sample_rows, store))  # several kinds may be of one hook
    found = [Dictionary("sae", "latents", sae, store, hook, config.latents)]
    if config.neurons:
        neuron_hook = config.neuron_hook or hook
        width = store.width(neuron_hook)
        signs = stronger_tails(rows_of(neuron_hook))
        neurons = IdentitySAE.of(neuron_hook, width, signs)
        found.append(Dictionary("neurons", "neurons", neurons, store, neuron_hook, config.neurons, signs))
    if config.random or config.principal:
        rows = rows_of(hook)
        width = rows.shape[1]
        if config.random:
            drawn = DirectionsSAE.random(width, min(config.random, width), rows.mean(0), seed=seed, hook=hook)
            found.append(_turned("random", drawn, rows, store, hook, config.random))
        if config.principal:
            found.append(_turned("principal", DirectionsSAE.pca(rows, hook=hook), rows, store, hook, config.principal))
    return found


def _turned(name: str, sae: DirectionsSAE, rows: Tensor, store: ActivationStore, hook: str, number: int) -> Dictionary:
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_dec.T)  # a unit's activation is the projection on its direction, whatever the others are
        signs = stronger_tails(sae.encode(rows))
        turn = torch.tensor(signs, dtype=torch.float32)
        sae.W_enc.mul_(turn)
        sae.W_dec.mul_(turn[:, None])
    return Dictionary(name, name, sae, store, hook, number, signs)


def stronger_tails(values: Tensor) -> list[int]:
    """Return 1 or -1 for each column of values (rows, units): the sign of its entry of greatest size."""
    return torch.where(values.amax(0) >= -values.amin(0), 1, -1).tolist()


def sample_rows(store: ActivationStore, hook: str) -> Tensor:
    """Return rows of the training split, (rows, d), special tokens left out: blocks evenly spread over it, 65,536 at most."""
    border = store.train_sequences * store.context
    blocks = -(-min(border, _SAMPLE_ROWS) // _BLOCK)
    starts = np.linspace(0, max(border - _BLOCK, 0), blocks).astype(int)
    rows = np.unique(np.concatenate([np.arange(start, min(start + _BLOCK, border)) for start in starts]))
    return store.read(hook, rows[~store.special.reshape(-1)[rows]])
