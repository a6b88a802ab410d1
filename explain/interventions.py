"""What the model writes with a unit clamped, at a strength that changes its next-token distribution as much as any other's does.

Strengths of different units are not comparable, effects are: the clamp is turned up until the mean KL from the unsteered model
reaches a target (Paulo et al. 2024, intervention scoring). The SAE's error is kept (see sae.intervene).
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from activation_store.errors import InputError
from activation_store.hooks import locate_hooks
from activation_store.store import ActivationStore
from explain.examples import Unit
from sae.architectures.directions import DirectionsSAE
from sae.architectures.identity import IdentitySAE
from sae.evaluation.splice import Passes
from sae.intervene import Add, Clamp, Edit, intervene, steerable
from sae.sae import SAE

KL = 0.5
"""Nats, the mean over positions: Paulo et al.'s default."""
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 3, 12, 12
_DOWN, _UP = (1 / 4, 1 / 16, 1 / 64), (4.0, 16.0, 64.0, 256.0)  # times the unit's maximum on the corpus: where to look
_HALVINGS = 12  # of the distance between two of these
_CLOSE = 0.1  # of the target


@dataclass(frozen=True)
class Written:
    """Continuations of the prompts with a unit steered at `strength`, in activations, and the mean KL that this gives.

    `clean` are those of the model as it is. `edit` is "clamp", or "add" for neurons and other given directions. `reached` is
    False where no strength gives the target; then, or where the unit cannot be steered, there are no texts, and a reason;
    strength and KL are then those nearest the target, None where there are none. `forwards` counts the model's passes for this
    unit, of which those of the search run the layers above the hook only, and those of writing one token each after the first.
    """

    unit: str
    strength: float | None
    kl: float | None
    reached: bool
    texts: list[str]
    reason: str | None = None
    clean: list[str] = field(default_factory=list)
    edit: Literal["clamp", "add"] = "clamp"
    forwards: int = 0


def prompts_of(store: ActivationStore, seed: int) -> Tensor:
    """Return the first tokens of a few held-out sequences, (prompt, token): what the model continues."""
    chance = np.random.Generator(np.random.PCG64([seed, 8]))
    sequences, context = store.tokens.shape
    number = min(_PROMPTS, sequences - store.train_sequences)
    rows = np.sort(chance.choice(np.arange(store.train_sequences, sequences), size=number, replace=False))
    return torch.from_numpy(store.tokens[rows, : min(_PROMPT_TOKENS, context)].astype(np.int64))


class Continuations:
    """What a model writes after prompts (prompt, token), as it is, and with one unit of an SAE steered at equal effect.

    Deterministic: greedy. The clean pass and text are made once for all units. Making it raises InputError for an SAE that
    cannot be steered (transcoders, crosscoders), a hook that the model lacks, and prompts of special tokens alone.

        continuations = Continuations(model, tokenizer, sae, prompts_of(store, seed=0))
        for unit in units:
            print(continuations.of(unit).texts, continuations.clean)
    """

    def __init__(
        self, model: Any, tokenizer: Any, sae: SAE, prompts: Tensor, *, target: float = KL, tokens: int = _NEW_TOKENS
    ) -> None:  # fmt: skip
        """Run the model once on the prompts, and once more to see that the layers below the hook may be skipped."""
        if not (math.isfinite(target) and target > 0):
            raise InputError(f"target: a mean KL of {target} given; it has to be positive and finite")
        hook = sae.cfg.hook_name
        if not steerable(sae) or hook is None:
            raise InputError(f"{sae.cfg.architecture}: steering takes an SAE, which reads and writes one hook that it names")
        self.model, self.tokenizer, self.sae, self.target, self.tokens = model, tokenizer, sae, target, tokens
        self.prompts = prompts.to(next(iter(model.parameters())).device)
        self._site = locate_hooks(model, [hook])[hook]
        special = torch.tensor(sae.cfg.metadata.get("special_token_ids", []), device=self.prompts.device)
        self._counts = ~torch.isin(self.prompts, special)  # special tokens are not steered: their KL is 0 whatever is done
        if not self._counts.any():
            raise InputError(f"prompts: {tuple(prompts.shape)} given, in which no token is steered")
        # Passes leaves out what follows the last token, so a token is added: what it is reaches no position before it
        longer = torch.cat([self.prompts, self.prompts[:, -1:]], 1)
        with torch.inference_mode():
            self._passes = Passes(model, [self._site], longer)
            if not self._passes.exact([self._site]):
                self._passes = Passes(model, [self._site], longer, skip=False)
            self._clean = self._log_probabilities(self._passes.logits)

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """Return those of the positions that count, (position, vocabulary)."""
        return logits[self._counts].float().log_softmax(-1)

    def edit(self, latent: int, strength: float) -> Edit:
        """Return the edit that stands for a strength: a clamp, or, along neurons and other given directions, an addition."""
        if isinstance(self.sae, IdentitySAE | DirectionsSAE):
            return Add(latent, strength)  # such units have values everywhere, which a clamp would take away
        return Clamp(latent, value=strength)

    @torch.inference_mode()
    def kl(self, latent: int, strength: float) -> float:
        """Return the mean over prompts and positions, special tokens left out, of KL(clean || steered), in nats.

        One pass of the layers above the hook. Infinite where the steered model's logits are not finite.
        """
        with intervene(self.model, self.sae, [self.edit(latent, strength)], hook=self._site):
            logits = self._passes.changed({self._site: lambda x: None})
        steered = self._log_probabilities(logits)
        kl = float((self._clean.exp() * (self._clean - steered)).sum(-1).mean())
        return kl if math.isfinite(kl) else math.inf

    def matched(self, latent: int, top: float) -> tuple[float | None, float | None, int]:
        """Return the strength at which the KL is the target, within a tenth, or else comes nearest; that KL; and the passes.

        From `top`, the unit's maximum, the strength is moved in steps of 4, down where the KL is too large, else up, and then
        the other way, between 1/64 and 256 times `top`, until the KL rises past the target from one step to the next; then their
        distance in logarithm is halved. At most 20 passes. None where no KL was finite.
        """
        tried: dict[float, float] = {}

        def reaches(times: float) -> bool:
            tried[times] = self.kl(latent, times * top)
            return abs(tried[times] - self.target) <= _CLOSE * self.target

        def rise() -> tuple[float, float] | None:
            steps = pairwise(sorted(tried))
            return next(((low, high) for low, high in steps if tried[low] < self.target <= tried[high]), None)

        done, between = reaches(1.0), None
        for times in (*_DOWN, *_UP) if tried[1.0] >= self.target else (*_UP, *_DOWN):
            if done or between:
                break
            done, between = reaches(times), rise()
        for _ in range(_HALVINGS):
            if done or between is None:
                break
            middle = math.sqrt(between[0] * between[1])
            done = reaches(middle)
            between = (middle, between[1]) if tried[middle] < self.target else (between[0], middle)
        finite = [(times, kl) for times, kl in tried.items() if math.isfinite(kl)]
        if not finite:
            return None, None, len(tried)
        times, kl = min(finite, key=lambda pair: abs(pair[1] - self.target))
        return times * top, kl, len(tried)

    @cached_property
    def clean(self) -> list[str]:
        """What the model writes as it is."""
        return self._written([])[0]

    @torch.inference_mode()
    def _written(self, edits: Sequence[Edit]) -> tuple[list[str], int]:
        """Return the texts, and how many passes the model took, of which without edits nothing is known."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        with intervene(self.model, self.sae, edits, hook=self._site) if edits else nullcontext() as state:
            out = self.model.generate(
                input_ids=self.prompts, attention_mask=torch.ones_like(self.prompts), max_new_tokens=self.tokens,
                do_sample=False, pad_token_id=pad or 0,
            )  # fmt: skip
        texts = [str(self.tokenizer.decode(row[self.prompts.shape[1] :], skip_special_tokens=True)) for row in out]
        return texts, state.forwards if state is not None else 0

    def of(self, unit: Unit) -> Written:
        """Steer a unit at the strength whose KL is the target, and let the model go on from the prompts."""
        edit: Literal["clamp", "add"] = "add" if isinstance(self.edit(unit.latent, 1.0), Add) else "clamp"
        if unit.max_activation <= 0:
            return Written(unit.name, None, None, False, [], "it never fires", self.clean, edit)
        strength, kl, passes = self.matched(unit.latent, unit.max_activation)
        if strength is None or kl is None:
            reason = "no strength leaves the model's logits finite"
        elif abs(kl - self.target) > _CLOSE * self.target:
            reason = f"no strength gives a KL of {self.target:g}, the nearest is {kl:.3g}"
        else:
            texts, more = self._written([self.edit(unit.latent, strength)])
            return Written(unit.name, strength, kl, True, texts, None, self.clean, edit, passes + more)
        return Written(unit.name, strength, kl, False, [], reason, self.clean, edit, passes)
