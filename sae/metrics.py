"""The log of a training run: one line of JSON a logged step, written without the device ever being waited for."""

import math
import time
from pathlib import Path

import torch
from torch import Tensor

from activation_store.files import append_json_line, read_json_lines, write_json_lines
from sae.health import Watch


class MetricsLog:
    """Writes each logged step when the next one comes, so that reading its figures never makes the device wait."""

    def __init__(self, path: Path | None, start: int, tokens: int) -> None:
        """Begin at step `start`; what a file holds of later steps is dropped."""
        self.path, self.last = path, dict[str, float | None]()
        self._pending: tuple[int, int, list[str], Tensor, torch.cuda.Event | None, dict[str, float]] | None = None
        self._clock, self._tokens = time.perf_counter(), tokens
        self._watch, self.fine = Watch(), True  # whether every loss written so far was finite
        self.waited = 0.0  # seconds since the last logged step that the loop stood still for want of a batch
        if path is not None:  # drop what was logged after the checkpoint that we resume from
            kept = [line for line in read_json_lines(path) if line["step"] <= start]
            write_json_lines(path, kept)

    def add(self, step: int, tokens: int, figures: dict[str, Tensor], facts: dict[str, float]) -> None:
        """Take a step's figures, scalars on the device, and facts; they are written with the next ones."""
        self.flush()
        now = time.perf_counter()
        rate, waiting = (tokens - self._tokens) / (now - self._clock), self.waited / (now - self._clock)
        self._clock, self._tokens, self.waited = now, tokens, 0.0
        values = torch.stack([value.float() for value in figures.values()])
        host = torch.empty(len(figures), pin_memory=values.is_cuda)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event() if values.is_cuda else None  # type: ignore[no-untyped-call]
        if arrived is not None:
            arrived.record()
        self._pending = (step, tokens, list(figures), host, arrived, {**facts, "tokens_per_second": rate, "waiting": waiting})

    def flush(self) -> None:
        """Write what was taken last, with a `warning` where it looks wrong."""
        if self._pending is None:
            return
        step, tokens, names, host, arrived, facts = self._pending
        self._pending = None
        if arrived is not None:
            arrived.synchronize()  # long past: it was recorded a whole log ago
        values = dict(zip(names, host.tolist(), strict=True))
        self.fine = self.fine and math.isfinite(values["loss"])
        warning = self._watch.look(step, values)
        # explained variance has no value on a batch that does not vary
        self.last = {name: value if math.isfinite(value) else None for name, value in values.items()}
        if self.path is not None:
            said = {} if warning is None else {"warning": warning}
            append_json_line(self.path, {"step": step, "tokens": tokens, **self.last, **facts, **said})
