"""What a unit does to the output: the tokens whose logits its direction raises and lowers most."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from activation_store.errors import InputError
from explain.examples import Unit
from sae.readout import output_logits
from sae.sae import SAE

_UNITS_AT_ONCE = 64  # (units, vocabulary) logits of more would take gigabytes
TOKENS = 10


def with_outputs(units: Sequence[Unit], sae: SAE, model: nn.Module, tokenizer: Any, number: int = TOKENS) -> list[Unit]:
    """Return the units with the `number` tokens that each promotes and suppresses most; as they were where that is not known.

    Logit changes are those of a unit step along the direction, centred over the vocabulary (see sae.readout).
    """
    found = list[Unit]()
    for start in range(0, len(units), _UNITS_AT_ONCE):
        some = units[start : start + _UNITS_AT_ONCE]
        try:
            logits = output_logits(sae, model, [unit.latent for unit in some])
        except InputError:  # the hook's way to the logits is not known
            return list(units)
        sides = []
        for largest in (True, False):
            values, ids = logits.topk(number, dim=1, largest=largest)
            sides.append([
                [(str(tokenizer.decode([i])), float(f"{v:.5g}")) for v, i in zip(of_values, of_ids, strict=True)]
                for of_values, of_ids in zip(values.tolist(), ids.tolist(), strict=True)
            ])  # fmt: skip
        found += [
            replace(unit, promoted=promoted, suppressed=suppressed)
            for unit, promoted, suppressed in zip(some, *sides, strict=True)
        ]
    return found
