"""What batches() draws: each row once an epoch, the same wherever reading began, and right to the bit."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import (
    DTYPES,
    MLP,
    RESID,
    Made,
    create,
    drawable,
    joined,
    make,
    numbered,
    numbers,
    read_by_zarr,
    reading_threads,
)

from activation_store import ActivationStore, HookStatistics, InputError
from activation_store.shuffle import WINDOW
from activation_store.statistics import NORM_EDGES

SEQUENCES, CONTEXT, TRAIN = 53, 7, 40
memories = st.sampled_from([1e-9, 0.002, 1024])  # blocks a turn: one, five, all there are


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """53 sequences of 7 tokens, shards of 11, blocks of 4 rows: 97 blocks, some of them short; sequences from 40 on held out."""
    return numbered(tmp_path_factory.mktemp("numbered") / "s", sequences=SEQUENCES, train=TRAIN, block_bytes=48)


def rows_of(made: Made, split: str) -> list[int]:
    return drawable(made, *((0, TRAIN) if split == "train" else (TRAIN, SEQUENCES)))


def test_the_geometry_is_what_the_tests_below_want(store: Made) -> None:
    assert (store.store.block_rows, store.store.shard_blocks, store.store.shards) == (4, 20, 5)
    turns = [store.store.batches("h", memory_mb=memory).layout.turn_blocks for memory in (1e-9, 0.002, 1024)]
    assert turns[0] == 1
    assert 1 < turns[1] < 10
    assert turns[2] * WINDOW >= 70


# What an epoch holds


@pytest.mark.parametrize("memory", [1e-9, 0.002, 1024])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_an_epoch_draws_every_row_of_the_split_once_and_no_other(store: Made, split: str, memory: float) -> None:
    rows = rows_of(store, split)
    assert 0 < len(rows) < SEQUENCES * CONTEXT / 1.2
    made = store.store.batches("h", 16, seed=3, split=split, memory_mb=memory)
    batches = list(made)
    assert all(batch.dtype == torch.float32 and batch.shape == (16, 2) for batch in batches[:-1])
    assert len(batches[-1]) == len(rows) % 16
    assert all(torch.equal(batch[:, 1], -batch[:, 0]) for batch in batches)  # whole rows, not columns mixed
    assert sorted(joined(batches)) == rows
    assert made.rows == len(rows)
    assert [n.tolist() for n in made.row_numbers()] == numbers(batches)
    assert made.order(0).tolist() == joined(batches)


def test_the_splits_share_no_row_and_leave_out_only_the_special(store: Made) -> None:
    train = set(joined(store.store.batches("h", 50)))
    held = set(joined(store.store.batches("h", 50, split="held_out")))
    assert not train & held
    assert max(train) < TRAIN * CONTEXT <= min(held)
    special = set(np.flatnonzero(np.isin(store.tokens.reshape(-1), [0, 1])).tolist())
    assert train | held | special == set(range(SEQUENCES * CONTEXT))
    assert not (train | held) & special
    np.testing.assert_array_equal(store.store.special.reshape(-1).nonzero()[0], sorted(special))


@pytest.mark.parametrize("memory", [1e-9, 0.002, 1024])
def test_each_of_several_epochs_draws_every_row_once_in_another_order(store: Made, memory: float) -> None:
    rows = rows_of(store, "train")
    batches = store.store.batches("h", 33, seed=1, epochs=3, memory_mb=memory)
    drawn = joined(batches)
    epochs = [drawn[i * len(rows) : (i + 1) * len(rows)] for i in range(3)]
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(drawn) == 3 * len(rows)
    assert [batches.order(number).tolist() for number in range(3)] == epochs


def test_orders_are_thoroughly_shuffled_and_differ_by_seed(store: Made) -> None:
    rows = rows_of(store, "train")
    orders = [joined(store.store.batches("h", 20, seed=seed)) for seed in range(6)]
    orders += [joined(store.store.batches("h", 20, seed=0, epochs=3))[i * len(rows) :][: len(rows)] for i in (1, 2)]
    ranks = np.argsort(orders, axis=1)  # where each row falls in each order
    correlation = np.corrcoef(np.vstack([ranks, np.arange(len(rows))]))
    limit = 4.5 / np.sqrt(len(rows))  # of independent orders, one in 150,000 pairs goes beyond; seeds are fixed
    assert np.abs(correlation - np.eye(len(correlation))).max() < limit


@pytest.mark.parametrize("memory", [0.002, 1024])
def test_equal_seeds_give_equal_batches_again_and_again(store: Made, memory: float) -> None:
    batches = store.store.batches("h", 20, seed=4, memory_mb=memory)
    first = numbers(batches)
    assert numbers(batches) == first  # the object can be iterated as often as wanted
    assert numbers(ActivationStore.open(store.store.path).batches("h", 20, seed=4, memory_mb=memory)) == first
    pairs = list(zip(batches, batches, strict=True))  # two at once
    assert numbers(one for one, _ in pairs) == numbers(other for _, other in pairs) == first


def test_without_threads_the_batches_are_the_same(store: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = numbers(store.store.batches("h", 20, epochs=2, memory_mb=0.002))
    monkeypatch.setattr(ActivationStore, "in_background", False)
    drawn = iter(store.store.batches("h", 20, epochs=2, memory_mb=0.002))
    first = [int(n) for n in next(drawn)[:, 0]]
    assert reading_threads() == []
    assert [first, *numbers(drawn)] == expected


# Seeking


@given(
    batch_size=st.integers(1, 300), start=st.integers(0, 40), seed=st.integers(0, 2**40), epochs=st.integers(1, 3),
    memory=memories,
)
@settings(max_examples=20, deadline=None)
def test_a_batch_does_not_depend_on_where_reading_began(
    store: Made, batch_size: int, start: int, seed: int, epochs: int, memory: float
) -> None:
    whole = store.store.batches("h", batch_size, seed=seed, epochs=epochs, memory_mb=memory)
    everything = numbers(whole)
    later = store.store.batches("h", batch_size, seed=seed, start=start, epochs=epochs, memory_mb=memory)
    assert numbers(later) == everything[start:]
    assert [rows.tolist() for rows in later.row_numbers()] == everything[start:]
    assert len(whole) == len(everything) == -(-epochs * len(rows_of(store, "train")) // batch_size)
    assert len(later) == max(0, len(everything) - start)


@given(one=st.integers(1, 300), other=st.integers(1, 300), seed=st.integers(0, 9), memory=memories)
@settings(max_examples=12, deadline=None)
def test_the_batch_size_only_cuts_the_stream(store: Made, one: int, other: int, seed: int, memory: float) -> None:
    def stream(size: int) -> list[int]:
        return joined(store.store.batches("h", size, seed=seed, epochs=2, memory_mb=memory))

    assert stream(one) == stream(other)


@given(batch_size=st.integers(1, 100), start=st.integers(0, 6), begun=st.integers(0, 5), seed=st.integers(0, 9), memory=memories)
@settings(max_examples=12, deadline=None)
def test_the_endless_stream_seeks_exactly(
    store: Made, batch_size: int, start: int, begun: int, seed: int, memory: float
) -> None:
    batches = store.store.batches("h", batch_size, seed=seed, start=begun, memory_mb=memory)
    count = start + 8
    expected = numbers(itertools.islice(batches.stream(0), count))
    assert numbers(itertools.islice(batches.stream(start), 8)) == expected[start:]
    endless = store.store.batches("h", batch_size, seed=seed, start=start, epochs=None, memory_mb=memory)
    assert numbers(itertools.islice(endless, 8)) == expected[start:]
    assert all(len(batch) == batch_size for batch in expected)  # no short batch at the border of two epochs
    rows = len(rows_of(store, "train"))
    epochs = count * batch_size // rows + 1
    flat = [n for batch in expected for n in batch]
    assert flat == joined(store.store.batches("h", batch_size, seed=seed, epochs=epochs, memory_mb=memory))[: len(flat)]


def test_a_batch_larger_than_the_epoch_is_the_epoch(store: Made) -> None:
    rows = rows_of(store, "train")
    (batch,) = store.store.batches("h", 10_000)
    assert sorted(int(n) for n in batch[:, 0]) == rows
    endless = next(iter(store.store.batches("h", 3 * len(rows) + 1, epochs=None, memory_mb=0.002)))
    times = np.bincount(endless[:, 0].int().numpy())[rows]
    assert sorted(times.tolist()) == [3] * (len(rows) - 1) + [4]


def test_an_endless_stream_has_no_length_and_no_epochs_no_batch(store: Made) -> None:
    with pytest.raises(TypeError, match="endless"):
        len(store.store.batches("h", 20, epochs=None))
    none = store.store.batches("h", 20, epochs=0)
    assert (len(none), list(none)) == (0, [])


# Several hooks, all dtypes


@pytest.mark.parametrize("memory", [1e-6, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_hold_what_read_gives_bit_for_bit_in_every_hook(tmp_path: Path, dtype: str, memory: float) -> None:
    store = make(tmp_path / "s", dtype, sequences=23, shard=5, block_bytes=24, seed=2).store
    batches = store.batches((MLP, RESID), 17, seed=1, start=1, epochs=3, memory_mb=memory)
    drawn = list(batches)
    assert len(drawn) > 5
    for (mlp, resid), rows in zip(drawn, batches.row_numbers(), strict=True):
        for hook, batch in ((MLP, mlp), (RESID, resid)):
            assert batch.dtype == torch.float32
            assert batch.numpy().tobytes() == store.read(hook, rows).numpy().tobytes()


def test_hooks_are_drawn_in_step_together_and_one_by_one(store: Made) -> None:
    alone = numbers(store.store.batches("h", 20, seed=4))
    assert numbers(store.store.batches("other", 20, seed=4)) == alone
    together = list(store.store.batches(("h", "other"), 20, seed=4))
    assert all(isinstance(item, tuple) for item in together)
    assert numbers(one for one, _ in together) == numbers(other for _, other in together) == alone
    (single,) = next(iter(store.store.batches(["other"], 20, seed=4)))  # a list of one gives tuples of one
    assert [int(n) for n in single[:, 0]] == alone[0]


@pytest.mark.parametrize("hooks", [(), ("h", "h"), ("h", "nothing")], ids=str)
def test_hooks_that_cannot_be_drawn_are_refused(store: Made, hooks: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="hook"):
        store.store.batches(hooks)


@pytest.mark.parametrize("memory", [0.002, 1024])
def test_a_batch_belongs_to_whoever_took_it(store: Made, memory: float) -> None:
    expected = numbers(store.store.batches("h", 20, epochs=2, memory_mb=memory))
    drawn, kept = [], []
    for batch in store.store.batches("h", 20, epochs=2, memory_mb=memory):
        drawn.append([int(n) for n in batch[:, 0]])
        kept.append(batch.fill_(float("nan")))
    assert drawn == expected
    assert all(bool(batch.isnan().all()) for batch in kept)  # nor does anyone write into it later


def test_batches_come_on_the_device_asked_for(store: Made) -> None:
    item = next(iter(store.store.batches(("h", "other"), 20, device="meta")))
    assert [(x.device.type, tuple(x.shape)) for x in item] == [("meta", (20, 2)), ("meta", (20, 3))]
    assert numbers(store.store.batches("h", 20, device="cpu")) == numbers(store.store.batches("h", 20))


# What is left out


def with_median(edge: int) -> HookStatistics:
    """Statistics whose median norm is in the middle of bin `edge`: NORM_EDGES[edge] * 2^(1/16)."""
    histogram = np.zeros(len(NORM_EDGES) - 1, np.int64)
    histogram[edge] = 1
    return HookStatistics(1, np.zeros(1), 1.0, 1.0, 1.0, norm_histogram=histogram)


def test_special_tokens_padding_and_loud_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    """Row n of "h" is (n, -n), of "other" (n, n, n): norms are n sqrt(2) and n sqrt(3)."""
    tokens = np.array([[0, 5, 5, 1], [5, 5, 0, 5], [5, 5, 5, 5], [0, 5, 5, 5]], np.int32)
    documents = np.array([[0, 0, 1, 1], [1, 1, -1, -1], [2, 2, 2, 2], [3, 3, 3, -1]], np.int32)
    edge = NORM_EDGES.index(8.0)
    made = numbered(
        tmp_path / "s", tokens=tokens, documents=documents, sequences=4, context=4, shard=2, train=3, block_bytes=36,
        statistics=with_median(edge),
    )  # fmt: skip
    median = 8 * 2 ** (1 / 16)
    assert made.store.statistics("h").median_norm == pytest.approx(median)

    def drawn(hook: Any, **options: Any) -> tuple[list[int], dict[str, int]]:
        batches = made.store.batches(hook, 3, **options)
        found = [n for item in batches for n in (item[0] if isinstance(item, tuple) else item)[:, 0].int().tolist()]
        return sorted(found), batches.left_out

    assert drawn("h") == ([1, 2, 4, 5, 8, 9, 10, 11], {"special_tokens": 2, "padding": 2})
    assert drawn("h", split="held_out") == ([13, 14], {"special_tokens": 1, "padding": 1})
    multiple = 10.5 * np.sqrt(2) / median  # above it: 11 of "h"; of "other" 9 and more, for 9 sqrt(3) > 10.5 sqrt(2)
    assert drawn("h", max_norm_multiple=multiple) == (
        [1, 2, 4, 5, 8, 9, 10], {"special_tokens": 2, "padding": 2, "norm_outliers": 1},
    )  # fmt: skip
    for hook in ("other", ("h", "other")):  # together: out where any hook is loud
        assert drawn(hook, max_norm_multiple=multiple) == (
            [1, 2, 4, 5, 8], {"special_tokens": 2, "padding": 2, "norm_outliers": 3},
        )  # fmt: skip
    assert drawn("h", max_norm_multiple=float("inf"))[0] == [1, 2, 4, 5, 8, 9, 10, 11]
    with pytest.raises(InputError, match="8 norm_outliers"):
        made.store.batches("h", max_norm_multiple=1e-6)


@pytest.mark.parametrize("memory", [1e-9, 0.002, 1024])
def test_norms_known_only_when_rows_are_read_change_no_other_row(
    store: Made, monkeypatch: pytest.MonkeyPatch, memory: float
) -> None:
    """As a live model has it: a loud row gives its place to another of the same draw. Blocks 0 to 19 are all special."""
    empty = store.tokens.copy()
    empty[:11] = 0
    monkeypatch.setattr(ActivationStore, "norms_known", False)
    monkeypatch.setattr(ActivationStore, "norm_limit", lambda self, hook, multiple: multiple)
    monkeypatch.setattr(
        ActivationStore, "sequence_array", lambda self, name, shard: {"tokens": empty, "documents": store.documents}[name][
            self.shard_sequences(shard)
        ]
    )  # fmt: skip
    plain = joined(store.store.batches("h", 16, memory_mb=memory))
    assert min(plain) >= 77
    limit = (90 if memory < 1e-6 else 250) * float(np.sqrt(2))
    drawn = store.store.batches("h", 16, memory_mb=memory, max_norm_multiple=limit)
    if memory < 1e-6:  # fourteen blocks a draw: some hold loud rows only, and that is said
        with pytest.raises(InputError, match=r"every one of [1-9]\d* rows is above the limit"):
            list(drawn)
        return
    found = joined(drawn)
    assert len(found) == len(plain)
    assert [n for n, before in zip(found, plain, strict=True) if before <= 250] == [n for n in plain if n <= 250]
    assert max(found) <= 250
    assert drawn.left_out["norm_outliers"] == sum(n > 250 for n in plain)
    assert joined(store.store.batches("h", 16, start=3, memory_mb=memory, max_norm_multiple=limit)) == found[48:]


def test_a_draw_without_rows_is_no_fault(store: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivationStore, "norms_known", False)
    monkeypatch.setattr(ActivationStore, "norm_limit", lambda self, hook, multiple: 1e9)
    monkeypatch.setattr(ActivationStore, "special_of", lambda self, shard: np.full((11, CONTEXT), shard != 2)[: 53 - 11 * shard])
    found = joined(store.store.batches("h", 16, memory_mb=1e-9, max_norm_multiple=1.0))
    assert sorted(found) == list(range(22 * CONTEXT, 33 * CONTEXT))


def test_splits_that_cannot_be_drawn_from_are_refused(store: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'test'.*train, held_out"):
        store.store.batches("h", split="test")
    tokens = np.zeros((2, 3), np.int32)
    facts = {"special_token_ids": [0], "train_sequences": 2}
    special = ActivationStore.create(tmp_path / "s", tokens, tokens, {"h": 1}, attributes=facts)
    with pytest.raises(InputError, match="held_out"):
        special.batches("h", split="held_out")
    with pytest.raises(InputError, match="6 special_tokens"):
        special.batches("h")


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"batch_size": -4}, {"start": -1}, {"seed": -1}, {"epochs": -1}, {"memory_mb": 0.0},
     {"memory_mb": float("nan")}, {"memory_mb": float("inf")}, {"max_norm_multiple": 0.0}, {"max_norm_multiple": -1.0}],
    ids=str,
)  # fmt: skip
def test_arguments_that_make_no_batches_are_refused_by_name(store: Made, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        store.store.batches("h", **{"batch_size": 16, **wrong})


def test_a_harvested_store_is_drawn_the_same_way(tiny_store: ActivationStore) -> None:
    hook = "blocks.1.hook_resid_post"
    values = read_by_zarr(tiny_store.path, f"{hook}/activations")
    tokens = read_by_zarr(tiny_store.path, "tokens")
    kept = [i for i in range(tiny_store.train_sequences * 16) if tokens.reshape(-1)[i] not in (0, 1)]
    drawn = torch.cat(list(tiny_store.batches(hook, 512, seed=0))).numpy()
    assert len(drawn) == len(kept)
    np.testing.assert_array_equal(np.sort(drawn, axis=0), np.sort(values[kept], axis=0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_as_stored_are_those_of_the_float32_batches(tmp_path: Path, dtype: str) -> None:
    tokens = np.full((40, 7), 5, np.int32)
    made = create(tmp_path / "s", tokens, tokens, {"h": 3}, dtype=dtype, block_bytes=48)
    kind = getattr(torch, dtype)
    for shard in range(made.shards):
        span = made.shard_sequences(shard)
        made.write_shard(shard, {"h": torch.randn(((span.stop - span.start) * 7, 3)).to(kind)})
    made.change_attributes(complete=True)
    stored = list(made.batches("h", 16, seed=1, as_stored=True))
    assert {x.dtype for x in stored} == {kind}
    floats = list(made.batches("h", 16, seed=1))
    assert all(torch.equal(a.float(), b) for a, b in zip(stored, floats, strict=True))


def test_int8_rows_are_not_handed_out_without_their_scales(tmp_path: Path) -> None:
    tokens = np.full((4, 7), 5, np.int32)
    made = create(tmp_path / "s", tokens, tokens, {"h": 3}, dtype="int8", block_bytes=48)
    with pytest.raises(InputError, match="as_stored: True given"):
        made.batches("h", as_stored=True)
