"""What a unit does to the output: the tokens whose logits its direction raises and lowers most."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from activation_store.errors import InputError, first_line
from explain.examples import Unit
from sae.readout import output_logits
from sae.sae import SAE

_LOGITS_AT_ONCE = 1 << 24  # latents times vocabulary: 64 MB, and as much again where they are ranked
TOKENS = 10

Ranked = list[tuple[str, float]]


@dataclass(frozen=True)
class Outputs:
    """Tokens with the change of their logit for a unit step along a latent's direction, strongest first.

    Where the hook's way to the logits is not known, both are empty, and `reason` says so.
    """

    promoted: Ranked = field(default_factory=list)
    suppressed: Ranked = field(default_factory=list)
    reason: str | None = None


def promoted_tokens(model: nn.Module, tokenizer: Any, sae: SAE, latents: Sequence[int], k: int = TOKENS) -> list[Outputs]:
    """Return the k tokens that each latent promotes and suppresses most, by its direct effect on the logits.

    `model` is a transformers model. Changes of logits are centred over the vocabulary and leave out the norms' scales, one
    positive number a token (see sae.readout). Rows of the unembedding that are no token of the tokenizer's (padding) are not
    listed. Raises InputError for latents that the SAE lacks.
    """
    bad = [latent for latent in latents if not 0 <= latent < sae.cfg.d_sae]
    if bad:
        raise InputError(f"latents {bad} are outside this SAE's 0..{sae.cfg.d_sae - 1}")
    vocabulary = len(model.get_output_embeddings().weight)  # type: ignore[operator]
    known = min(vocabulary, len(tokenizer))
    at_once, found = max(1, _LOGITS_AT_ONCE // vocabulary), list[Outputs]()
    for start in range(0, len(latents), at_once):
        try:
            logits = output_logits(sae, model, latents[start : start + at_once])[:, :known]
        except InputError as error:  # the same for all latents
            return [Outputs(reason=first_line(error)) for _ in latents]
        sides = (_ends(logits, tokenizer, k, largest) for largest in (True, False))
        found += [Outputs(promoted, suppressed) for promoted, suppressed in zip(*sides, strict=True)]
    return found


def _ends(logits: Tensor, tokenizer: Any, k: int, largest: bool) -> list[Ranked]:
    values, ids = logits.topk(min(k, logits.shape[1]), dim=1, largest=largest)
    return [
        [(str(tokenizer.decode([i])), float(f"{v:.5g}")) for v, i in zip(of_values, of_ids, strict=True)]
        for of_values, of_ids in zip(values.tolist(), ids.tolist(), strict=True)
    ]


def with_outputs(units: Sequence[Unit], sae: SAE, model: nn.Module, tokenizer: Any, number: int = TOKENS) -> list[Unit]:
    """Return the units with the `number` tokens that each promotes and suppresses most; with none where that is not known."""
    found = promoted_tokens(model, tokenizer, sae, [unit.latent for unit in units], number)
    return [replace(u, promoted=o.promoted, suppressed=o.suppressed) for u, o in zip(units, found, strict=True)]
