"""What goes wrong in training, said while it happens: values that are not finite, spikes, collapse."""

import logging
import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_HISTORY = 10  # logged losses that a spike stands out against
_SPIKE = 3.0  # times their median


class Finite:
    """Whether every loss so far was finite: kept on the device, looked at where the host waits anyway.

    `names` are those of the SAEs whose losses they are, in a sweep.
    """

    def __init__(self, start: int, device: torch.device, names: Sequence[str] = ("",)) -> None:
        """Begin at step `start`."""
        self.checked, self.names = start, names
        self._fine = torch.ones(len(names), dtype=torch.bool, device=device)

    def add(self, loss: Tensor) -> None:
        """Take in a step's losses, one of each SAE."""
        self._fine &= loss.isfinite()

    def check(self, step: int, batches: Iterable[Any], checkpoint: str | None) -> None:
        """Raise FloatingPointError if a loss before `step` was not finite, naming the row of the batch that it came from."""
        if bool(self._fine.all()):
            self.checked = step
            return
        whose = ", ".join(name for name, fine in zip(self.names, self._fine.tolist(), strict=True) if name and not fine)
        loss = f"the loss of {whose}" if whose else "the loss"
        if iter(batches) is batches:  # a generator: what it gave cannot be looked at again
            raise FloatingPointError(
                f"{loss} is not finite between step {self.checked + 1} and {step}; which row it comes from cannot be looked up, "
                "for the batches cannot be read twice: give a list or a store's batches"
            )
        kept = f"the checkpoint {checkpoint} is from before; " if checkpoint else ""
        found = _culprit(batches, self.checked, step)
        if found is None:
            raise FloatingPointError(
                f"{loss} is not finite between step {self.checked + 1} and {step}, though the activations are; {kept}lower "
                "train.lr, or leave rows out by train.max_norm_multiple"
            )
        raise FloatingPointError(f"{loss} is not finite: {found}; {kept}`monosem store verify` says whether the store is whole")


def _culprit(batches: Iterable[Any], begin: int, end: int) -> str | None:
    """Return where the first value that is not finite stands in batches `begin` to `end`, if there is one."""
    stream = batches.stream(begin) if hasattr(batches, "stream") else islice(batches, begin, None)
    for number, batch in zip(range(begin, end), stream, strict=False):
        found = bad_row((batch,) if isinstance(batch, Tensor) else batch, batches, number)
        if found is not None:
            return found
    return None


def bad_row(tensors: Sequence[Tensor], batches: Iterable[Any], number: int) -> str | None:
    """Return where the first value that is not finite stands in batch `number`, if there is one."""
    for tensor in tensors:
        bad = (~tensor.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            where = f", {batches.whereabouts(number, row)}" if hasattr(batches, "whereabouts") else ""
            return f"step {number + 1}, row {row} of the batch has {float(tensor[row, column])} in column {column}{where}"
    return None


class Watch:
    """Says when a loss spikes, and when an SAE has collapsed; once each time, not at every logged step."""

    def __init__(self) -> None:
        """Begin with no history."""
        self._losses, self._said = list[float](), set[str]()

    def look(self, step: int, figures: dict[str, float]) -> str | None:
        """Take in a logged step's figures, and return what is wrong with them, if that is new."""
        loss, found = figures["loss"], dict[str, str]()
        usual = statistics.median(self._losses) if len(self._losses) >= _HISTORY // 2 else math.inf
        if loss > _SPIKE * usual:
            found["spike"] = f"the loss jumped to {loss:.4g} from about {usual:.4g}; lower train.lr if it stays there"
        if figures["l0"] == 0:
            found["silent"] = "no latent fires (L0 = 0); lower the sparsity coefficient or train.lr"
        if figures["dead_fraction"] == 1:
            found["dead"] = "all latents are dead; lower the sparsity coefficient or train.lr"
        self._losses = [*self._losses, loss][-_HISTORY:] if math.isfinite(loss) else self._losses
        fresh = [text for name, text in found.items() if name not in self._said]
        self._said = set(found)
        if not fresh:
            return None
        text = "; ".join(fresh)
        log.warning("step %d: %s", step, text)
        return text
