"""The order in which rows are drawn: an epoch's permutation as a pure function of (seed, epoch), in bounded memory.

Blocks of a few dozen rows are put in a random order by a keyed bijection, which needs no table. In that order they are
cut into turns, and a window of `WINDOW` turns slides over them: the rows of each turn are dealt out at random, in equal
shares, to the draws whose window holds it, and each draw is shuffled. So a draw mixes the rows of a whole window, about
as many blocks as memory holds, from all over the store; where the store fits into one window, the order is uniform over
all permutations. Any draw can be worked out by itself: that is the exact seek.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from activation_store.arrays import new_table
from activation_store.errors import InputError

WINDOW = 14
"""Turns that are mixed together."""
SLOTS = 16
"""Turns that memory holds: those of the window, and two that are read meanwhile."""
_ROUNDS = 6
Ints = NDArray[np.int64]
Room = tuple[NDArray[Any], NDArray[np.float32] | None]


class Source(Protocol):
    """What rows can be drawn from: a store on disk, or a model that runs while they are drawn."""

    hooks: list[str]
    norms_known: bool  # before the rows are read

    @property
    def in_background(self) -> bool: ...  # noqa: D102  # whether threads of their own should read and cut ahead
    @property
    def rows(self) -> int: ...  # noqa: D102
    @property
    def context(self) -> int: ...  # noqa: D102
    @property
    def train_sequences(self) -> int: ...  # noqa: D102
    @property
    def block_rows(self) -> int: ...  # noqa: D102
    @property
    def shard_rows(self) -> int: ...  # noqa: D102
    @property
    def shard_blocks(self) -> int: ...  # noqa: D102
    def width(self, hook: str) -> int: ...  # noqa: D102
    def dtype(self, hook: str) -> str: ...  # noqa: D102
    def block_of(self, rows: Ints) -> Ints: ...  # noqa: D102
    def block_start(self, blocks: Ints) -> Ints: ...  # noqa: D102
    def special_of(self, shard: int) -> NDArray[np.bool_]: ...  # noqa: D102
    def sequence_array(self, name: str, shard: int) -> NDArray[np.int32]: ...  # noqa: D102
    def norm_limit(self, hook: str, multiple: float) -> float: ...  # noqa: D102
    def norms(self, hook: str, shard: int) -> NDArray[np.float32]: ...  # noqa: D102
    def loud(self, limits: Mapping[str, float], rows: Ints) -> NDArray[np.bool_]: ...  # noqa: D102
    def expect(self, blocks: Ints, hooks: Sequence[str]) -> None: ...  # noqa: D102
    def fill(self, blocks: Ints, into: Mapping[str, Room]) -> None:
        """Read whole blocks, ascending, of several hooks: each `Room` is raw (rows, d) as on disk, and scales for int8."""


def permute(x: Ints, n: int, key: NDArray[np.uint64]) -> Ints:
    """Return the image of x under a keyed bijection of 0..n-1: a Feistel network, walked until it lands inside.

    `key` is (rounds,) uint64. Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4 (cycle walking).

    >>> sorted(permute(np.arange(7), 7, np.arange(6, dtype=np.uint64)).tolist())
    [0, 1, 2, 3, 4, 5, 6]
    """
    half = np.uint64(max(1, -(-max(n - 1, 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    out = x.astype(np.uint64)
    todo = np.ones(len(x), bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for k in key:
            mixed = (right + k) * np.uint64(0xBF58476D1CE4E5B9)  # one round of splitmix64's finaliser
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        out[todo] = (left << half) | right
        todo = out >= np.uint64(n)
    return out.astype(np.int64)


def _key(*parts: int) -> NDArray[np.uint64]:
    return np.random.SeedSequence(parts).generate_state(_ROUNDS, np.uint64).astype(np.uint64)


def _chance(*parts: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(parts)))


class Kept:
    """Which rows of a split may be drawn: one bit a row, found in one pass over tokens (and norms, where they count).

    `left_out` counts the others of the split by reason; `first_block` and `blocks` are the range to draw from, whole shards
    where `whole_shards` asks for it; `counts` holds the kept rows of each block.
    """

    def __init__(self, source: Source, split: str, limits: Mapping[str, float], whole_shards: bool) -> None:
        """Look through the split; rows above a hook's norm limit are out. Raises InputError where nothing is left."""
        self.source = source
        border = source.train_sequences * source.context
        low, high = (0, border) if split == "train" else (border, source.rows)
        per_shard, size = source.shard_blocks, source.block_rows
        self._first_shard, last_shard = low // source.shard_rows, -(-high // source.shard_rows)
        if whole_shards:
            self.first_block, end = self._first_shard * per_shard, last_shard * per_shard
        else:
            self.first_block, end = (int(source.block_of(np.array([row]))[0]) for row in (low, max(high - 1, low)))
            end += 1
        self.blocks = end - self.first_block
        shards = max(0, last_shard - self._first_shard)
        self._bits = new_table((shards, -(-per_shard * size // 8)), np.dtype(np.uint8))
        counts = new_table((shards, per_shard), np.dtype(np.uint32))
        self.left_out = {"special_tokens": 0, "padding": 0, **({"norm_outliers": 0} if limits else {})}
        for number in range(shards):
            shard = self._first_shard + number
            start = shard * source.shard_rows
            special = source.special_of(shard).reshape(-1)
            inside = np.zeros(len(special), bool)
            inside[max(low - start, 0) : max(high - start, 0)] = True
            padding = source.sequence_array("documents", shard).reshape(-1) < 0
            loud = np.zeros(len(special), bool)
            for hook, limit in limits.items():
                loud |= ~(source.norms(hook, shard) <= limit)
            self.left_out["padding"] += int((inside & padding).sum())
            self.left_out["special_tokens"] += int((inside & special & ~padding).sum())
            if limits:
                self.left_out["norm_outliers"] += int((inside & loud & ~special).sum())
            kept = np.zeros(per_shard * size, bool)
            kept[: len(special)] = inside & ~special & ~loud
            self._bits[number] = np.packbits(kept)
            counts[number] = kept.reshape(per_shard, size).sum(1)
        offset = self.first_block - self._first_shard * per_shard
        self.counts = counts.reshape(-1)[offset : offset + self.blocks]
        self.rows = int(self.counts.sum(dtype=np.int64))
        if not self.rows:
            raise InputError(
                f"split {split!r}: no row to draw ({', '.join(f'{n} {what}' for what, n in self.left_out.items())} left out "
                f"of {high - low}); give more text, or another filter"
            )

    def of(self, blocks: Ints) -> tuple[Ints, Ints]:
        """Return the kept rows of these blocks, and where each lies when the blocks are read one after another."""
        source = self.source
        size = source.block_rows
        shard = blocks // source.shard_blocks
        within = (blocks % source.shard_blocks * size)[:, None] + np.arange(size)
        bits = self._bits[(shard - self._first_shard)[:, None], within >> 3] >> (7 - (within & 7)).astype(np.uint8) & 1
        at = np.flatnonzero(bits.reshape(-1))
        return (source.block_start(blocks)[:, None] + np.arange(size)).reshape(-1)[at], at

    def is_kept(self, rows: Ints) -> NDArray[np.bool_]:
        """Say of each row of the store whether it may be drawn."""
        shard = rows // self.source.shard_rows - self._first_shard
        inside = (shard >= 0) & (shard < len(self._bits))
        at = rows % self.source.shard_rows
        bits = self._bits[np.where(inside, shard, 0), at >> 3] >> (7 - (at & 7)).astype(np.uint8) & 1
        found: NDArray[np.bool_] = inside & (bits == 1)
        return found


@dataclass(frozen=True)
class Layout:
    """What besides seed and epoch decides the order: `turn_blocks` a turn; `region_shards` keeps blocks of so many shards
    together, in regions drawn one after the other (None: blocks mix over the whole store)."""

    turn_blocks: int
    region_shards: int | None = None


class Epoch:
    """One epoch's order: `turns` of blocks to be read, `draws` of rows to be given out. Draw s needs turns `window(s)`."""

    def __init__(self, kept: Kept, layout: Layout, seed: int, epoch: int) -> None:
        """Count the rows of every turn; nothing is read."""
        self._kept, self._layout, self._seed = kept, layout, (seed, epoch)
        self.number = epoch
        self.turns = -(-kept.blocks // layout.turn_blocks)
        self.draws = max(1, self.turns - WINDOW + 1)
        self._dealt: dict[int, tuple[Ints, Ints]] = {}

    @cached_property
    def starts(self) -> Ints:
        """(draws + 1,): how many rows of the epoch come before each draw."""
        size = self._layout.turn_blocks
        turn_rows = np.zeros(self.turns, np.int64)
        for first in range(0, self.turns, -(-(1 << 20) // size)):  # a million blocks at a time
            turns = range(first, min(first + -(-(1 << 20) // size), self.turns))
            blocks = self._blocks_at(np.arange(turns.start * size, min(turns.stop * size, self._kept.blocks)))
            counts = self._kept.counts[blocks - self._kept.first_block].astype(np.int64)
            turn_rows[turns.start : turns.stop] = np.add.reduceat(counts, np.arange(0, len(counts), size))
        rows = np.zeros(self.draws, np.int64)
        turn = np.arange(self.turns)
        first_draw, shares = self._shares(turn)
        for part in range(WINDOW):
            has = part < shares
            amount = turn_rows // shares + (part < turn_rows % shares)
            np.add.at(rows, (first_draw + part)[has], amount[has])
        starts: Ints = np.r_[0, np.cumsum(rows)]
        return starts

    def _shares(self, turn: Any) -> tuple[Any, Any]:
        """Return the first draw whose window holds the turn, and how many draws do."""
        first = np.maximum(0, turn - WINDOW + 1)
        return first, np.minimum(turn, self.draws - 1) - first + 1

    def _blocks_at(self, positions: Ints) -> Ints:
        """Return the block at each position of the epoch's order of blocks."""
        kept, region = self._kept, self._layout.region_shards
        if region is None:
            return kept.first_block + permute(positions, kept.blocks, _key(*self._seed, 0))
        per_shard = kept.source.shard_blocks
        shards = kept.blocks // per_shard
        found = np.empty(len(positions), np.int64)
        for number in np.unique(positions // (region * per_shard)).tolist():
            here = positions // (region * per_shard) == number
            size = min(region, shards - number * region) * per_shard
            local = permute(positions[here] - number * region * per_shard, size, _key(*self._seed, 1, number))
            shard = permute(number * region + local // per_shard, shards, _key(*self._seed, 2))
            found[here] = kept.first_block + shard * per_shard + local % per_shard
        return found

    def window(self, draw: int) -> range:
        """Return the turns that a draw takes rows from."""
        return range(draw, min(draw + WINDOW, self.turns))

    def blocks(self, turn: int) -> Ints:
        """Return the blocks of a turn, ascending: the order to read them in."""
        size = self._layout.turn_blocks
        return np.sort(self._blocks_at(np.arange(turn * size, min((turn + 1) * size, self._kept.blocks))))

    def draw(self, draw: int) -> tuple[Ints, Ints, Ints]:
        """Return the rows of a draw in the order they are given out, the turn of each, and its place among the turn's rows."""
        window = self.window(draw)
        self._dealt = {turn: found for turn, found in self._dealt.items() if turn in window}
        rows, turns, places = [], [], []
        for turn in window:
            if turn not in self._dealt:
                found, at = self._kept.of(self.blocks(turn))
                order = _chance(*self._seed, 3, turn).permutation(len(found))
                self._dealt[turn] = found[order], at[order]
            first, shares = self._shares(turn)
            found, at = (np.array_split(values, shares)[draw - first] for values in self._dealt[turn])
            rows.append(found)
            places.append(at)
            turns.append(np.full(len(found), turn))
        order = _chance(*self._seed, 4, draw).permutation(sum(map(len, rows)))
        return np.concatenate(rows)[order], np.concatenate(turns)[order], np.concatenate(places)[order]


def draws_from(
    kept: Kept, layout: Layout, seed: int, position: int, epochs: int | None
) -> Iterator[tuple[Epoch, int, int]]:
    """Yield (epoch, draw, rows of it to skip) from row number `position` of the endless stream on."""
    number = position // kept.rows
    skip = position - number * kept.rows
    while epochs is None or number < epochs:
        epoch = Epoch(kept, layout, seed, number)
        first = int(np.searchsorted(epoch.starts, skip, side="right")) - 1 if skip else 0
        for draw in range(first, epoch.draws):
            yield epoch, draw, max(0, skip - int(epoch.starts[draw]))
        number, skip = number + 1, 0


def turns_from(kept: Kept, layout: Layout, seed: int, position: int, epochs: int | None) -> Iterator[tuple[Epoch, int]]:
    """Yield (epoch, turn) in the order in which the draws of `draws_from` first need them."""
    last = (-1, -1)
    for epoch, draw, _ in draws_from(kept, layout, seed, position, epochs):
        for turn in epoch.window(draw):
            if (epoch.number, turn) > last:
                last = (epoch.number, turn)
                yield epoch, turn


@dataclass(frozen=True)
class ShuffleQuality:
    """How well batches are mixed, beside batches drawn from the same rows uniformly at random.

    `document_entropy` is the entropy, in bits, of the document a row of a batch comes from; `adjacency` the share of a
    batch's rows whose successor in the text is in the batch too. Means over `batches` batches spread over the epoch.
    """

    document_entropy: float
    ideal_document_entropy: float
    adjacency: float
    ideal_adjacency: float
    batches: int

    @property
    def entropy_share(self) -> float:
        """Entropy as a share of the ideal's."""
        return self.document_entropy / self.ideal_document_entropy if self.ideal_document_entropy else 1.0


def measure(batches: list[Ints], documents: NDArray[np.int32]) -> tuple[float, float]:
    """Return mean document entropy (bits) and mean adjacency rate of batches of row numbers.

    >>> measure([np.array([0, 1, 2, 9])], np.array([7, 7, 7, 7, 7, 8, 8, 8, 8, 8]))
    (0.8112781244591328, 0.5)
    """
    entropies, adjacent = [], []
    for rows in batches:
        counts = np.unique(documents[rows], return_counts=True)[1]
        share = counts / len(rows)
        entropies.append(float(-(share * np.log2(share)).sum()))
        adjacent.append(float(np.isin(rows + 1, rows).mean()))
    return float(np.mean(entropies)), float(np.mean(adjacent))
