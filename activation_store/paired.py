"""Batches of the same tokens from several stores, as crosscoders of two models are trained on."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from activation_store.errors import InputError

if TYPE_CHECKING:
    from activation_store.store import ActivationStore


class PairedBatches:
    """Tuples of (batch, d) float32 tensors, one from each store, whose row i is of the same token in all; exact seek.

    The order is that of the first store's own batches; the others are read by row number, which random reads make slower than
    one store with several hooks: where one model has all the hooks, harvest them together.
    """

    def __init__(
        self, stores: "Sequence[ActivationStore]", hooks: Sequence[str], batch_size: int = 2048, seed: int = 0, *,
        split: str = "train", memory_mb: float = 1024,
    ) -> None:  # fmt: skip
        """Take a hook of each store. Raises InputError where the stores do not hold the same tokens."""
        if len(stores) < 2 or len(stores) != len(hooks):
            raise InputError(f"hooks: {len(hooks)} given for {len(stores)} stores; give two stores or more, and a hook for each")
        for one, other in pairwise(stores):
            if one.tokens.shape != other.tokens.shape or not np.array_equal(one.tokens, other.tokens):
                raise InputError(f"stores: {one.path} and {other.path} hold other tokens; harvest both models on the same data "
                                 "section, with one tokenizer")  # fmt: skip
        self.stores, self.hooks = tuple(stores), tuple(hooks)
        for store, hook in zip(self.stores[1:], self.hooks[1:], strict=True):
            store.width(hook)  # which raises where there is none
        self._first = stores[0].batches(hooks[0], batch_size, seed, split=split, memory_mb=memory_mb)
        self.left_out, self.rows = self._first.left_out, self._first.rows

    def stream(self, start: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield batches `start`, `start` + 1, ... without end."""
        return self._draw(start, None)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches of one epoch."""
        return self._draw(0, 1)

    def _draw(self, start: int, epochs: int | None) -> Iterator[tuple[Tensor, ...]]:
        for rows in self._first.numbers(start, epochs):
            yield tuple(store.read(hook, rows) for store, hook in zip(self.stores, self.hooks, strict=True))

    def whereabouts(self, batch: int, row: int) -> str:
        """Say where a row of a batch stands in the stores."""
        return self._first.whereabouts(batch, row)
