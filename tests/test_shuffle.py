"""The order of an epoch: a bijection, each row once, in memory that does not grow, worked out alone by any draw."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from stores import create

from activation_store import ActivationStore, InputError
from activation_store.shuffle import WINDOW, Epoch, Kept, Layout, ShuffleQuality, draws_from, measure, permute


class Plain:
    """Rows to draw from, with no store behind them: tokens 0 are special, and shards and blocks are cut as asked."""

    hooks = ("h",)
    norms_known = True
    in_background = False

    def __init__(self, sequences: int, context: int, shard: int, block: int, train: int, chance: np.random.Generator) -> None:
        self.context, self.block_rows, self.train_sequences = context, block, train
        self._shard = min(shard, sequences)
        self.rows = sequences * context
        self.tokens = chance.integers(0, chance.integers(1, 5) + 1, (sequences, context), dtype=np.int32)
        self.documents = chance.integers(-1, 9, (sequences, context), dtype=np.int32)
        self.loudness = chance.random(self.rows).astype(np.float32)
        self.shard_rows = self._shard * context
        self.shard_blocks = -(-self.shard_rows // block)

    def block_of(self, rows: Any) -> Any:
        return rows // self.shard_rows * self.shard_blocks + rows % self.shard_rows // self.block_rows

    def block_start(self, blocks: Any) -> Any:
        return blocks // self.shard_blocks * self.shard_rows + blocks % self.shard_blocks * self.block_rows

    def sequence_array(self, name: str, shard: int) -> NDArray[np.int32]:
        return getattr(self, name)[shard * self._shard : (shard + 1) * self._shard]

    def special_of(self, shard: int) -> NDArray[np.bool_]:
        return (self.sequence_array("tokens", shard) == 0) | (self.sequence_array("documents", shard) < 0)

    def norms(self, hook: str, shard: int) -> NDArray[np.float32]:
        return self.loudness[shard * self.shard_rows : (shard + 1) * self.shard_rows]

    def split(self, split: str) -> slice:
        border = self.train_sequences * self.context
        return slice(border) if split == "train" else slice(border, None)

    def drawable(self, split: str, limit: float = 9.0) -> NDArray[np.int64]:
        """Say it all again, plainly: which rows a split may draw."""
        good = (self.tokens != 0) & (self.documents >= 0)
        inside = np.zeros(self.rows, bool)
        inside[self.split(split)] = True
        return np.flatnonzero(good.reshape(-1) & inside & (self.loudness <= limit))


@st.composite
def sources(draw: st.DrawFn) -> tuple[Plain, str, float]:
    """A source of any geometry, a split of it that has rows to draw, and a norm limit."""
    sequences = draw(st.integers(1, 40))
    source = Plain(
        sequences, draw(st.integers(1, 9)), draw(st.integers(1, 12)), 1 << draw(st.integers(0, 5)),
        draw(st.integers(0, sequences)), np.random.default_rng(draw(st.integers(0, 999))),
    )  # fmt: skip
    split, limit = draw(st.sampled_from(["train", "held_out"])), draw(st.sampled_from([9.0, 0.6]))
    assume(len(source.drawable(split, limit)))
    return source, split, limit


def kept_of(source: Plain, split: str = "train", limit: float = 9.0, whole_shards: bool = False) -> Kept:
    return Kept(source, split, {"h": limit}, whole_shards)


# permute


@given(n=st.integers(1, 5000), key=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_permute_is_a_bijection_of_any_size_under_any_key(n: int, key: list[int]) -> None:
    found = permute(np.arange(n), n, np.array(key, np.uint64))
    assert found.dtype == np.int64
    np.testing.assert_array_equal(np.sort(found), np.arange(n))


@given(n=st.integers(1, 2**40), x=st.integers(0, 2**40), key=st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
@settings(max_examples=50, deadline=None)
def test_permute_needs_no_table_and_takes_any_part(n: int, x: int, key: list[int]) -> None:
    some = (x + np.arange(20)) % n
    found = permute(some, n, np.array(key, np.uint64))
    assert found.min() >= 0
    assert found.max() < n
    assert len(np.unique(found)) == len(np.unique(some))
    np.testing.assert_array_equal(found[3:5], permute(some[3:5], n, np.array(key, np.uint64)))


def chi_square_is_plausible(counts: NDArray[np.int64]) -> bool:
    """Whether counts may come from equal chances: within 5 standard deviations of what chi-square is then."""
    expected, freedom = counts.mean(), counts.size - 1
    return abs(float(((counts - expected) ** 2 / expected).sum()) - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2, 3, 5, 16, 17, 100])
def test_over_keys_every_place_is_as_likely_and_so_is_every_pair(n: int) -> None:
    keys = np.random.default_rng(n).integers(0, 2**64, (3000, 6), dtype=np.uint64)
    images = np.array([permute(np.array([0, 1, n - 1]), n, key) for key in keys])
    for column in (0, 2):
        assert chi_square_is_plausible(np.bincount(images[:, column], minlength=n))
    if n <= 17:  # both at once: every ordered pair of different places
        pairs = np.bincount(images[:, 0] * n + images[:, 1], minlength=n * n)
        assert chi_square_is_plausible(pairs[~np.eye(n, dtype=bool).reshape(-1)])


# Kept


@given(case=sources(), whole_shards=st.booleans())
@settings(max_examples=150, deadline=None)
def test_kept_rows_are_those_of_the_split_that_are_no_special_token_no_padding_and_not_too_loud(
    case: tuple[Plain, str, float], whole_shards: bool
) -> None:
    source, split, limit = case
    kept = kept_of(source, split, limit, whole_shards)
    expected = source.drawable(split, limit)
    assert kept.rows == len(expected)
    np.testing.assert_array_equal(np.flatnonzero(kept.is_kept(np.arange(source.rows))), expected)
    blocks = np.arange(kept.first_block, kept.first_block + kept.blocks)
    rows, places = kept.of(blocks)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(kept.counts, np.bincount(source.block_of(rows), minlength=blocks[-1] + 1)[blocks])
    np.testing.assert_array_equal(source.block_start(blocks)[places // source.block_rows] + places % source.block_rows, rows)


def test_what_is_left_out_is_counted_once_by_its_first_reason() -> None:
    source = Plain(2, 4, 1, 2, 2, np.random.default_rng(0))
    source.tokens = np.array([[0, 0, 5, 5], [5, 5, 5, 0]], np.int32)
    source.documents = np.array([[0, -1, -1, 0], [0, 0, 0, 0]], np.int32)
    source.loudness = np.array([9, 9, 9, 9, 0, 1, np.nan, 9], np.float32)
    kept = kept_of(source, limit=1.0)
    assert kept.left_out == {"padding": 2, "special_tokens": 2, "norm_outliers": 2}
    assert kept.rows == 2
    assert Kept(source, "train", {}, False).left_out == {"padding": 2, "special_tokens": 2}
    source.tokens[:] = 5
    with pytest.raises(InputError, match=r"'train'.*2 padding.*6 norm_outliers") as error:
        kept_of(source, limit=-1.0)
    assert "\n" not in str(error.value)


# An epoch


@given(case=sources(), turn=st.integers(1, 9), region=st.one_of(st.none(), st.integers(1, 5)), seed=st.integers(0, 2**70))
@settings(max_examples=100, deadline=None)
def test_an_epoch_gives_each_row_once_from_blocks_its_window_holds(
    case: tuple[Plain, str, float], turn: int, region: int | None, seed: int
) -> None:
    source, split, limit = case
    kept = kept_of(source, split, limit, region is not None)
    epoch = Epoch(kept, Layout(turn, region), seed, 0)
    turns = [epoch.blocks(number) for number in range(epoch.turns)]
    expected = np.arange(kept.first_block, kept.first_block + kept.blocks)
    np.testing.assert_array_equal(np.sort(np.concatenate(turns)), expected)  # each block in one turn
    assert all(len(blocks) == turn for blocks in turns[:-1])
    drawn = []
    for draw in range(epoch.draws):
        rows, of, places = epoch.draw(draw)
        window = epoch.window(draw)
        assert len(window) <= WINDOW
        assert set(of.tolist()) <= set(window)
        for number in window:  # a place is where the row lies when the turn's blocks are read one after another
            here = of == number
            blocks, size = turns[number], source.block_rows
            np.testing.assert_array_equal(
                rows[here], source.block_start(blocks)[places[here] // size] + places[here] % size
            )
        drawn.append(rows)
    np.testing.assert_array_equal(epoch.starts, np.r_[0, np.cumsum([len(rows) for rows in drawn])])
    np.testing.assert_array_equal(np.sort(np.concatenate(drawn)), source.drawable(split, limit))


@given(case=sources(), turn=st.integers(1, 4), seed=st.integers(0, 9), number=st.integers(0, 3), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_draw_can_be_worked_out_by_itself(
    case: tuple[Plain, str, float], turn: int, seed: int, number: int, data: st.DataObject
) -> None:
    kept = kept_of(*case)
    whole = Epoch(kept, Layout(turn), seed, number)
    everything = [whole.draw(draw) for draw in range(whole.draws)]
    again = Epoch(kept_of(*case), Layout(turn), seed, number)
    for draw in data.draw(st.permutations(range(whole.draws))):
        for found, expected in zip(again.draw(draw), everything[draw], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_orders_differ_by_seed_and_by_epoch_in_blocks_and_in_rows() -> None:
    source = Plain(160, 8, 1, 4, 160, np.random.default_rng(1))
    for layout, moved_alone in ((Layout(999), 800), (Layout(3), 320), (Layout(3, 2), 80)):  # rows, blocks, regions
        whole = kept_of(source, whole_shards=layout.region_shards is not None)
        epochs = [Epoch(whole, layout, seed, number) for seed, number in itertools.product((0, 1, 7), (0, 1, 2))]
        orders = [np.concatenate([epoch.draw(draw)[0] for draw in range(epoch.draws)]) for epoch in epochs]
        assert len({tuple(order.tolist()) for order in orders}) == 9
        ranks = np.vstack([np.argsort(order) for order in orders] + [np.arange(whole.rows)])
        assert np.abs(np.corrcoef(ranks) - np.eye(10)).max() < 4.5 / np.sqrt(moved_alone)


def test_in_one_window_every_row_is_as_likely_in_every_place() -> None:
    source = Plain(5, 4, 2, 2, 5, np.random.default_rng(3))
    source.tokens[:], source.documents[:], source.loudness[:] = 5, 0, 0
    kept = kept_of(source)
    orders = np.array([Epoch(kept, Layout(2), seed, 0).draw(0)[0] for seed in range(800)])
    assert orders.shape == (800, 20)
    for place in (0, 7, 19):
        assert chi_square_is_plausible(np.bincount(orders[:, place], minlength=20))
    assert chi_square_is_plausible(np.bincount((orders[:, 1] - orders[:, 0]) % 20, minlength=20)[1:])  # nor do neighbours stay


def test_a_row_comes_early_or_late_wherever_it_lies_also_over_many_windows() -> None:
    source = Plain(40, 4, 40, 2, 40, np.random.default_rng(3))
    source.tokens[:], source.documents[:], source.loudness[:] = 5, 0, 0
    kept = kept_of(source)
    epochs = [Epoch(kept, Layout(3), seed, 0) for seed in range(150)]
    assert epochs[0].turns == 27
    orders = np.array([np.concatenate([epoch.draw(draw)[0] for draw in range(epoch.draws)]) for epoch in epochs])
    tenth = orders[:, ::16].astype(int) // 16  # ten places of the order, ten parts of the store
    for place in range(10):
        assert chi_square_is_plausible(np.bincount(tenth[:, place], minlength=10))


@given(shards=st.integers(1, 20), region=st.integers(1, 5), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=60, deadline=None)
def test_blocks_stay_within_regions_of_so_many_shards_drawn_one_after_the_other(
    shards: int, region: int, seed: int, data: st.DataObject
) -> None:
    source = Plain(shards, 6, 1, 2, shards, np.random.default_rng(0))
    source.tokens[:], source.documents[:], source.loudness[:] = 5, 0, 0
    turn = data.draw(st.integers(1, region * source.shard_blocks), label="blocks a turn")
    epoch = Epoch(kept_of(source, whole_shards=True), Layout(turn, region), seed, 0)
    used = [set((epoch.blocks(number) // source.shard_blocks).tolist()) for number in range(epoch.turns)]
    assert all(len(found) <= 2 * region for found in used)  # a turn touches two regions at most: what must lie on disk
    turns = {shard: [number for number, found in enumerate(used) if shard in found] for shard in range(shards)}
    span = -(-region * source.shard_blocks // turn)
    assert all(max(of) - min(of) <= span for of in turns.values())  # each is needed during its region only


# Seeking


@given(case=sources(), turn=st.integers(1, 6), seed=st.integers(0, 9), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_stream_can_be_entered_at_any_row(case: tuple[Plain, str, float], turn: int, seed: int, data: st.DataObject) -> None:
    kept = kept_of(*case)

    def rows(position: int, epochs: int | None) -> list[int]:
        found = (epoch.draw(draw)[0][skip:] for epoch, draw, skip in draws_from(kept, Layout(turn), seed, position, epochs))
        return [int(row) for part in found for row in part]

    everything = rows(0, 3)
    assert len(everything) == 3 * kept.rows
    position = data.draw(st.integers(0, 3 * kept.rows + 2), label="row number")
    assert rows(position, 3) == everything[position:]


# How well it mixes


def test_measure_golden_values() -> None:
    documents = np.array([0, 0, 0, 0, 1, 1, 2, 3])
    assert measure([np.array([0, 1, 2, 3])], documents) == (0.0, 0.75)  # one document; all but the last are followed
    assert measure([np.array([7, 0, 4, 6])], documents) == (2.0, 0.25)  # four documents; 7 follows 6
    assert measure([np.array([1, 5])], documents) == (1.0, 0.0)
    assert measure([np.array([0, 1, 2, 3]), np.array([7, 0, 4, 6])], documents) == (1.0, 0.5)  # means over batches


def test_the_entropy_share_of_a_store_of_one_document_is_one() -> None:
    assert ShuffleQuality(0.0, 0.0, 0.0, 0.0, 1).entropy_share == 1.0
    assert ShuffleQuality(3.0, 4.0, 0.0, 0.0, 1).entropy_share == 0.75


@pytest.fixture(scope="module")
def long_documents(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """2.6 million rows in documents of 2,600, d = 1, blocks of 16 rows: 164,000 blocks. Tokens only, nothing is harvested."""
    tokens = np.full((2560, 1024), 5, np.int32)
    documents = (np.arange(tokens.size, dtype=np.int32) // 2600).reshape(tokens.shape)
    return create(tmp_path_factory.mktemp("long") / "s", tokens, documents, {"h": 1}, dtype="float32", block_bytes=64)


def test_long_documents_mix_nearly_as_well_as_in_an_ideal_shuffle(long_documents: ActivationStore) -> None:
    """memory_mb is to 2.6 million narrow rows what the default is to a store of 10 GB: 14,000 blocks in the window."""
    batches = long_documents.batches("h", 2048, memory_mb=16384 * 16 * 8 / (1 << 20))
    assert batches.layout.turn_blocks * WINDOW == 14336
    quality = batches.quality(16)
    assert quality.batches == 16
    assert 0.98 < quality.entropy_share < 1.005
    assert quality.adjacency < 0.02  # 2048 of 230,000 rows in the window, mostly
    # The ideal, from counting: 2048 rows out of 1,009 documents; each row's successor is in the batch with 2047 / 2,621,439.
    chance = np.random.default_rng(0)
    shares = np.bincount(chance.integers(0, long_documents.rows, 2048) // 2600) / 2048
    entropy = -sum(float(p) * float(np.log2(p)) for p in shares if p)
    assert quality.ideal_document_entropy == pytest.approx(entropy, rel=0.01)
    assert quality.ideal_adjacency == pytest.approx(2047 / 2_621_439, rel=0.5)


def test_too_little_memory_mixes_badly_and_the_figures_say_so(long_documents: ActivationStore) -> None:
    tiny = long_documents.batches("h", 2048, memory_mb=1e-9).quality(4)
    assert tiny.entropy_share < 0.8
    assert tiny.adjacency > 0.3
    assert tiny.ideal_document_entropy > 9
    middling = long_documents.batches("h", 2048, memory_mb=0.1).quality(4)
    assert tiny.entropy_share < middling.entropy_share < 0.97
    assert tiny.adjacency > middling.adjacency


def test_quality_of_a_store_that_fits_is_ideal_and_of_a_batch_that_is_the_epoch_too(tmp_path: Path) -> None:
    tokens = np.random.default_rng(5).integers(0, 9, (53, 7), dtype=np.int32)
    facts = {"special_token_ids": [0, 1], "train_sequences": 40}
    store = create(tmp_path / "s", tokens, tokens, {"h": 2}, attributes=facts, block_bytes=32)
    fits = store.batches("h", 64).quality()
    assert fits.adjacency == pytest.approx(fits.ideal_adjacency, abs=0.1)
    for epochs in (1, 3, 0, None):  # measured is the first epoch, whatever is drawn
        everything = store.batches("h", 10_000, epochs=epochs).quality()
        assert everything.batches == 1
        assert everything.adjacency == everything.ideal_adjacency > 0.5
