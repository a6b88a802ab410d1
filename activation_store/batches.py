"""Batches of shuffled rows with exact seek: what `ActivationStore.batches` returns."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from activation_store.dtypes import bytes_a_row
from activation_store.errors import InputError
from activation_store.ring import drawn_ahead
from activation_store.shuffle import (
    SLOTS,
    WINDOW,
    Epoch,
    Ints,
    Kept,
    Layout,
    ShuffleQuality,
    Source,
    draws_from,
    measure,
)

Item = Any  # a (batch, d) tensor, or a tuple of them when several hooks are drawn


class Batches:
    """Shuffled (batch, d) batches with exact seek; iterate it, as often as wanted. Made by `ActivationStore.batches`.

    Attributes: `left_out` counts the split's rows that are never drawn, by reason; `rows` counts those of an epoch.
    """

    def __init__(
        self, source: Source, hooks: tuple[str, ...], single: bool, *, batch_size: int, seed: int, start: int,
        epochs: int | None, split: str, memory_mb: float, max_norm_multiple: float | None,
        device: torch.device | str | None, as_stored: bool = False, region_shards: int | None = None,
    ) -> None:  # fmt: skip
        """Draw from `source`; see `ActivationStore.batches`."""
        if split not in ("train", "held_out"):
            raise InputError(f"split: {split!r} given; allowed: train, held_out")
        limits = (("batch_size", batch_size, 1), ("seed", seed, 0), ("start", start, 0), ("epochs", epochs or 0, 0))
        for name, value, least in limits:
            if value < least:
                raise InputError(f"{name}: {value} given; must be at least {least}")
        if not hooks:
            raise InputError(f"hook: none given; allowed: one or several of {', '.join(source.hooks)}")
        if len(set(hooks)) < len(hooks):
            raise InputError(f"hook: {', '.join(hooks)} given; name each hook once")
        if max_norm_multiple is not None and not max_norm_multiple > 0:
            raise InputError(f"max_norm_multiple: {max_norm_multiple} given; must be above 0, or None")
        if not 0 < memory_mb < float("inf"):
            raise InputError(f"memory_mb: {memory_mb} given; must be above 0, and finite")
        self.source, self.hooks, self.single, self.batch_size, self.seed, self.start, self.epochs = (
            source, hooks, single, batch_size, seed, start, epochs,
        )  # fmt: skip
        if as_stored and any(source.dtype(hook) == "int8" for hook in hooks):
            raise InputError("as_stored: True given, but int8 rows mean nothing without their scales; leave it out")
        self.as_stored = as_stored
        self.device = None if device is None else torch.device(device)
        known = source.norms_known
        norm_limits = {hook: source.norm_limit(hook, max_norm_multiple) for hook in hooks} if max_norm_multiple else {}
        self.kept = Kept(source, split, norm_limits if known else {}, whole_shards=region_shards is not None)
        self.late_limits = {} if known else norm_limits  # limits that can only be applied once the rows are there
        block = source.block_rows * sum(bytes_a_row(source.width(hook), source.dtype(hook)) for hook in hooks)
        slot = int(memory_mb * (1 << 20)) // SLOTS // block
        if region_shards is not None:  # a turn must not reach over more than two regions
            slot = min(slot, region_shards * source.shard_blocks)
        self.layout = Layout(max(1, min(slot, -(-self.kept.blocks // WINDOW))), region_shards)
        self.left_out, self.rows = self.kept.left_out, self.kept.rows
        if self.late_limits:
            self.left_out["norm_outliers"] = 0  # counted as they come

    def __len__(self) -> int:
        """Count the batches from `start` on; an endless stream has no length."""
        if self.epochs is None:
            raise TypeError("an endless stream of batches has no length; pass epochs=1 for one epoch")
        return max(0, -(-self.epochs * self.rows // self.batch_size) - self.start)

    def order(self, epoch: int) -> Ints:
        """Return the rows of one epoch in the order they are drawn. 8 bytes a row: for looking at, not for training."""
        order = Epoch(self.kept, self.layout, self.seed, epoch)
        return np.concatenate([order.draw(draw)[0] for draw in range(order.draws)])

    def row_numbers(self) -> Iterator[Ints]:
        """Yield the store rows of each batch, from batch `start` on, without reading any activation."""
        return self.numbers(self.start, self.epochs)

    def numbers(self, start: int, epochs: int | None) -> Iterator[Ints]:
        """Yield the store rows of batches `start`, `start` + 1, ... of so many epochs, None for no end."""
        held = np.empty(0, np.int64)
        for order, draw, skip in draws_from(self.kept, self.layout, self.seed, start * self.batch_size, epochs):
            held = np.concatenate([held, order.draw(draw)[0][skip:]])
            while len(held) >= self.batch_size:
                yield held[: self.batch_size]
                held = held[self.batch_size :]
        if len(held):
            yield held

    def whereabouts(self, batch: int, row: int) -> str:
        """Say where a row of a batch stands in the source."""
        number = int(next(self.numbers(batch, None))[row])
        place = f"row {number} of {getattr(self.source, 'path', 'the stream')}"
        shard_rows = getattr(self.source, "shard_rows", None)
        return place if shard_rows is None else f"{place}, in shard {number // shard_rows}"

    def quality(self, batches: int = 32) -> ShuffleQuality:
        """Measure how well up to `batches` batches, evenly spread over the first epoch, are mixed, beside an ideal shuffle."""
        whole = max(1, self.rows // self.batch_size)
        chosen = np.unique(np.linspace(0, whole - 1, batches).astype(np.int64)).tolist()
        ours = [next(self.numbers(number, 1)) for number in chosen]
        chance = np.random.Generator(np.random.PCG64(0))
        low = int(self.source.block_start(np.array([self.kept.first_block]))[0])
        ideal = []
        for rows in ours:
            found = np.empty(0, np.int64)
            while len(found) < len(rows):
                drawn = chance.integers(low, self.source.rows, 2 * len(rows))
                found = np.unique(np.r_[found, drawn[self.kept.is_kept(drawn)]])
            ideal.append(chance.permutation(found)[: len(rows)])
        documents = np.asarray(self._documents)
        entropy, adjacency = measure(ours, documents)
        ideal_entropy, ideal_adjacency = measure(ideal, documents)
        return ShuffleQuality(entropy, ideal_entropy, adjacency, ideal_adjacency, len(ours))

    @cached_property
    def _documents(self) -> NDArray[np.int32]:
        source: Any = self.source
        found: NDArray[np.int32] = source.documents.reshape(-1)
        return found

    def stream(self, start: int) -> Iterator[Item]:
        """Yield batches `start`, `start` + 1, ... without end: what a trainer draws, and where it resumes."""
        return self._draw(start, None)

    def __iter__(self) -> Iterator[Item]:
        """Yield (batch, d) float32 tensors, or tuples of them when several hooks are drawn."""
        return self._draw(self.start, self.epochs)

    def _draw(self, start: int, epochs: int | None) -> Iterator[Item]:
        for tensors in drawn_ahead(self, start * self.batch_size, epochs):
            yield tensors[0] if self.single else tensors
