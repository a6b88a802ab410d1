"""What the model writes with a unit clamped, at a strength that changes its next-token distribution as much as any other's does.

Strengths of different units are not comparable, effects are: the clamp is turned up until the mean KL from the unsteered model
reaches a target (Paulo et al. 2024, intervention scoring). The SAE's error is kept (see sae.intervene).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_store.errors import InputError, first_line
from activation_store.store import ActivationStore
from explain.examples import Unit
from sae.intervene import Clamp, intervene
from sae.sae import SAE

KL = 0.5
"""Nats, the mean over positions: Paulo et al.'s default."""
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 3, 12, 12
_LEAST, _MOST = 0.1, 300.0  # times the unit's maximum on the corpus
_AT_ONCE, _ROUNDS = 8, 4  # strengths in one pass, and how often the range is narrowed to one step of them
_CLOSE = 0.1  # of the target


@dataclass(frozen=True)
class Written:
    """Continuations of the prompts with a unit clamped at `strength`, in activations, and the mean KL that this gives.

    `reached` is False where no strength gives the target; then, or where the unit cannot be clamped, there are no texts, and
    a reason.
    """

    unit: str
    strength: float | None
    kl: float | None
    reached: bool
    texts: list[str]
    reason: str | None = None


def prompts_of(store: ActivationStore, seed: int) -> Tensor:
    """Return the first tokens of a few held-out sequences, (prompt, token): what the model continues."""
    chance = np.random.Generator(np.random.PCG64([seed, 8]))
    sequences, context = store.tokens.shape
    number = min(_PROMPTS, sequences - store.train_sequences)
    rows = np.sort(chance.choice(np.arange(store.train_sequences, sequences), size=number, replace=False))
    return torch.from_numpy(store.tokens[rows, : min(_PROMPT_TOKENS, context)].astype(np.int64))


@torch.inference_mode()
def mean_kl(model: Any, sae: SAE, latent: int, strengths: Sequence[float], prompts: Tensor, clean: Tensor) -> Tensor:
    """Return for each strength the mean over prompts and positions of KL(clean || clamped), in nats, from one pass.

    clean (prompt, token, vocabulary): log-probabilities of the unsteered model. Infinite where the clamped model's are not
    finite.
    """
    n = len(prompts)
    rows = prompts.repeat(len(strengths), 1)
    values = torch.tensor(strengths).repeat_interleave(n)
    with intervene(model, sae, [Clamp(latent, value=values)]):
        logits = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
    steered = logits.float().log_softmax(-1).view(len(strengths), *clean.shape)
    kl = (clean.exp() * (clean - steered)).sum(-1).mean((1, 2))
    return torch.where(kl.isfinite(), kl, torch.inf).cpu()


@torch.inference_mode()
def matched_strength(
    model: Any, sae: SAE, latent: int, top: float, prompts: Tensor, clean: Tensor, target: float = KL
) -> tuple[float, float]:  # fmt: skip
    """Return the strength, in activations, at which the mean KL comes nearest the target from a growing clamp, and that KL.

    `top` is the unit's maximum. Looked for between 0.1 and 300 times it, evenly in logarithm, at the first crossing.
    """
    low, high = math.log(_LEAST * top), math.log(_MOST * top)
    best = (math.nan, math.inf)
    for _ in range(_ROUNDS):
        grid = torch.linspace(low, high, _AT_ONCE).exp().tolist()
        found = mean_kl(model, sae, latent, grid, prompts, clean).tolist()
        best = min([best, *zip(grid, found, strict=True)], key=lambda pair: abs(pair[1] - target))
        above = next((i for i, kl in enumerate(found) if kl >= target), None)
        if above is None or above == 0 or abs(best[1] - target) <= 0.2 * _CLOSE * target:
            break
        low, high = math.log(grid[above - 1]), math.log(grid[above])
    return best


@torch.inference_mode()
def written(model: Any, tokenizer: Any, sae: SAE, unit: Unit, prompts: Tensor, target: float = KL) -> Written:
    """Clamp a unit at the strength whose KL is the target, and let the model go on from the prompts, greedily."""
    if unit.max_activation <= 0:
        return Written(unit.name, None, None, False, [], "it never fires")
    prompts = prompts.to(next(iter(model.parameters())).device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    mask = torch.ones_like(prompts)
    try:
        clean = model(input_ids=prompts, attention_mask=mask).logits.float().log_softmax(-1)
        strength, kl = matched_strength(model, sae, unit.latent, unit.max_activation, prompts, clean, target)
        if abs(kl - target) > _CLOSE * target:
            return Written(unit.name, strength, kl, False, [], f"no strength gives a KL of {target:g}, the nearest is {kl:.3g}")
        with intervene(model, sae, [Clamp(unit.latent, value=strength)]):
            out = model.generate(
                input_ids=prompts, attention_mask=mask, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=pad or 0
            )
    except InputError as error:  # transcoders, hooks that the model lacks
        return Written(unit.name, None, None, False, [], first_line(error))
    texts = [str(tokenizer.decode(row[prompts.shape[1] :], skip_special_tokens=True)) for row in out]
    return Written(unit.name, strength, kl, True, texts)
