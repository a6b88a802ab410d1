"""The threads that read ahead of the consumer: gone when it is, their errors its errors, their memory what was allowed."""

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import DTYPES, MEND, Made, create, flipped, numbered, reading_threads

from activation_store import ActivationStore, InputError
from activation_store.shuffle import SLOTS


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """53 sequences of 7 tokens, shards of 11, blocks of 4 rows: 97 blocks, some of them short."""
    return numbered(tmp_path_factory.mktemp("numbered") / "s", block_bytes=48)


def begun(store: Made) -> Iterator[torch.Tensor]:
    batches = iter(store.store.batches("h", 4, epochs=None, memory_mb=1e-9))
    next(batches)
    assert {"batches-fill", "batches-deal", "batches-cut"} <= {thread.name for thread in reading_threads()}
    return batches


def test_threads_end_when_the_iterator_is_dropped(store: Made) -> None:
    batches = begun(store)
    del batches
    gc.collect()
    assert reading_threads() == []


def test_threads_end_when_the_iterator_is_closed(store: Made) -> None:
    batches: Any = begun(store)
    batches.close()
    assert reading_threads() == []


def test_threads_end_when_the_consumer_raises(store: Made) -> None:
    def consume() -> None:
        for _ in store.store.batches("h", 4, epochs=None):
            assert reading_threads()
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        consume()
    gc.collect()
    assert reading_threads() == []


def test_threads_end_with_the_last_batch_and_do_not_begin_before_the_first(store: Made) -> None:
    batches = iter(store.store.batches("h", 100))
    assert reading_threads() == []
    list(batches)
    assert reading_threads() == []


@pytest.mark.parametrize("background", [True, False])
def test_an_error_in_the_reading_thread_reaches_the_consumer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    monkeypatch.setattr(ActivationStore, "in_background", background)
    made = numbered(tmp_path / "s", block_bytes=48)
    file = tmp_path / "s" / "h" / "activations" / "c" / "3" / "0"
    with flipped(file, 100):
        for batches in (made.store.batches("h", 8, memory_mb=1e-9), made.store.batches(("other", "h"), 8).stream(5)):
            with pytest.raises(InputError) as error:
                for _ in batches:
                    pass
            assert str(file) in str(error.value)
            assert MEND in str(error.value)
            assert reading_threads() == []
    file.unlink()
    with pytest.raises(InputError, match="missing"):
        list(made.store.batches("h", 8, memory_mb=1e-9))


def test_reading_runs_ahead_and_no_further_than_memory_allows(store: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = ActivationStore.fill

    def fill(self: ActivationStore, blocks: Any, into: Any) -> None:
        read.extend(blocks.tolist())
        real(self, blocks, into)

    monkeypatch.setattr(ActivationStore, "fill", fill)
    batches = iter(store.store.batches("h", 4, epochs=None, memory_mb=0.002))
    next(batches)
    turn = store.store.batches("h", memory_mb=0.002).layout.turn_blocks
    give_up = time.monotonic() + 30
    while len(read) < SLOTS * turn and time.monotonic() < give_up:
        time.sleep(0.01)
    time.sleep(0.3)  # nothing holds it back but memory: it would be epochs further by now
    assert SLOTS * turn <= len(read) <= (SLOTS + 3) * turn  # one turn for each slot, and for each given back since
    del batches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", [0.01, 0.05])
def test_what_is_held_for_mixing_stays_within_memory_mb(tmp_path: Path, dtype: str, memory: float) -> None:
    tokens = np.full((4000, 7), 5, np.int32)
    store = create(tmp_path / "s", tokens, tokens, {"h": 2, "other": 3}, dtype=dtype, block_bytes=48)
    entry = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[dtype]
    for hooks in (("h",), ("h", "other")):
        layout = store.batches(hooks, memory_mb=memory).layout
        rows = SLOTS * layout.turn_blocks * store.block_rows
        held = rows * sum(store.width(hook) * entry + (4 if dtype == "int8" else 0) for hook in hooks)
        assert 0.3 * memory < held / (1 << 20) <= memory
