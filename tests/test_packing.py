"""Documents -> rows: packing by hand, no token lost or put to the wrong place, in any number of processes, in little memory."""

import os
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import BOS, EOS, FastLetters, Letters, NoSpecials, letters, many, rows_of, write_jsonl

from activation_store import DataConfig, InputError, packing
from activation_store import text as text_module
from activation_store.packing import ARRAYS
from activation_store.text import TokenRows, is_held_out, token_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rows of another test are found, nor those of whoever runs the tests."""
    monkeypatch.setenv("MONOSEM_CACHE", str(tmp_path_factory.mktemp("cache")))


# By hand


@pytest.fixture
def by_first_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that begin with h are held out, so that a golden value needs no hash."""
    monkeypatch.setattr(text_module, "is_held_out", lambda text, fraction, seed: text.startswith("h"))


GOLDEN = ["abc", "hi", "", "de", "   ", "hjk", "fghij", "h"]


@pytest.mark.usefixtures("by_first_letter")
def test_packing_golden_value(tmp_path: Path) -> None:
    """Training stream: abc. de. fghij.   Held-out stream: hi. hjk. h.   (the dot is EOS; a row holds 3 after its BOS)

    Records are numbered as they come, the two empty ones too: abc 0, hi 1, de 3, hjk 5, fghij 6, h 7.
    """
    path = write_jsonl(tmp_path / "x.jsonl", GOLDEN)
    found = rows_of(path, FastLetters(), context=4, tokens=400, held_out=0.5)
    a, b, c, d, e, f, g, h, i, j, k = range(10, 21)
    np.testing.assert_array_equal(
        found.tokens,
        [
            [BOS, a, b, c],
            [BOS, EOS, d, e],
            [BOS, EOS, f, g],
            [BOS, h, i, j],
            [BOS, h, i, EOS],
            [BOS, h, j, k],
            [BOS, EOS, h, EOS],
        ],
    )
    np.testing.assert_array_equal(
        found.documents,
        [[0, 0, 0, 0], [0, 0, 3, 3], [3, 3, 6, 6], [6, 6, 6, 6], [1, 1, 1, 1], [5, 5, 5, 5], [5, 5, 7, 7]],
    )
    np.testing.assert_array_equal(
        found.offsets,
        [[0, 0, 1, 2], [3, 3, 0, 1], [2, 2, 0, 1], [2, 2, 3, 4], [0, 0, 1, 2], [0, 0, 1, 2], [3, 3, 0, 1]],
    )
    assert found.tokens.dtype == found.documents.dtype == found.offsets.dtype == np.int32
    assert found.train_sequences == 4
    # the last EOS of the training stream found no row
    assert found.counts == {"documents": 6, "empty_documents": 2, "unused_documents": 0, "tokens_left_over": 1}
    assert found.facts["offsets"] is True


@pytest.mark.usefixtures("by_first_letter")
def test_packing_without_bos(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", GOLDEN)
    a, b, c, d, e, f, g, h, i, j, k = range(10, 21)
    train = [[a, b, c, EOS], [d, e, EOS, f], [g, h, i, j]]
    held = [[h, i, EOS, h], [j, k, EOS, h]]
    documents = [[0, 0, 0, 0], [3, 3, 3, 6], [6, 6, 6, 6], [1, 1, 1, 5], [5, 5, 5, 7]]
    found = rows_of(path, FastLetters(), context=4, tokens=400, held_out=0.5, prepend_bos=False)
    np.testing.assert_array_equal(found.tokens, train + held)
    np.testing.assert_array_equal(found.documents, documents)
    np.testing.assert_array_equal(found.offsets, [[0, 1, 2, 3], [0, 1, 2, 0], [1, 2, 3, 4], [0, 1, 2, 0], [1, 2, 3, 0]])
    assert found.counts["tokens_left_over"] == 2
    tokenizer = Letters()
    tokenizer.bos_token_id = None  # a tokenizer without one, though it is asked for
    np.testing.assert_array_equal(rows_of(path, tokenizer, context=4, tokens=400, held_out=0.5).tokens, train + held)


@pytest.mark.usefixtures("by_first_letter")
def test_packing_without_eos(tmp_path: Path) -> None:
    found = rows_of(write_jsonl(tmp_path / "x.jsonl", GOLDEN), NoSpecials(), context=4, tokens=400, held_out=0.5)
    a, b, c, d, e, f, g, h, i, j = range(10, 20)
    np.testing.assert_array_equal(found.tokens, [[a, b, c, d], [e, f, g, h], [h, i, h, j]])
    np.testing.assert_array_equal(found.documents, [[0, 0, 0, 3], [3, 6, 6, 6], [1, 1, 5, 5]])
    assert found.counts["tokens_left_over"] == 4  # ij of training; k and the last h of held-out
    assert (found.offsets == -1).all()  # a tokenizer in Python
    assert found.facts["offsets"] is False


@pytest.mark.usefixtures("by_first_letter")
def test_it_stops_at_the_tokens_asked_for(tmp_path: Path) -> None:
    """16 tokens of 4 are 4 rows, a quarter of them held out; what comes later is counted, not packed."""
    texts = ["abcdefghijk", "hab", "late", "hlate"]
    found = rows_of(write_jsonl(tmp_path / "x.jsonl", texts), context=4, tokens=16, held_out=0.25)
    np.testing.assert_array_equal(
        found.tokens, [[BOS, 10, 11, 12], [BOS, 13, 14, 15], [BOS, 16, 17, 18], [BOS, 17, 10, 11]]
    )
    assert found.train_sequences == 3
    assert found.counts == {"documents": 2, "empty_documents": 0, "unused_documents": 2, "tokens_left_over": 3 + 1}


def test_a_document_longer_than_many_rows_is_cut_without_a_gap(tmp_path: Path) -> None:
    texts = [f"{'abcdefghijklmnopqrstuvwxyz' * 40}{i}" for i in range(6)]
    side = [is_held_out(text, 0.5, 0) for text in texts]
    assert len(set(side)) == 2
    found = rows_of(write_jsonl(tmp_path / "x.jsonl", texts), tokens=100_000, held_out=0.5)
    flat = found.tokens[: found.train_sequences, 1:].reshape(-1)
    whole = [token for text, held in zip(texts, side, strict=True) if not held for token in [*letters(text), EOS]]
    assert flat.tolist() == whole[: len(flat)]
    assert len(whole) - len(flat) < 7


# Against a reference that handles one token at a time

Place = tuple[int, int, int]  # token, document, offset


def reference(texts: Sequence[str | None], config: DataConfig, seed: int, bos: bool) -> dict[str, Any]:
    wanted = max(config.tokens // config.context, 2)
    held_rows = max(1, round(wanted * config.held_out))
    body = config.context - bos
    sides: dict[bool, list[Place]] = {False: [], True: []}
    limit = {False: wanted - held_rows, True: held_rows}
    counts = {"documents": 0, "empty_documents": 0, "unused_documents": 0}
    for number, text in enumerate(texts):
        if text is None or not text.strip():
            counts["empty_documents"] += 1
            continue
        held = is_held_out(text, config.held_out, seed)
        if len(sides[held]) // body >= limit[held]:
            counts["unused_documents"] += 1
            continue
        sides[held] += [(token, number, at) for at, token in enumerate([*letters(text), EOS])]
        counts["documents"] += 1
    packed = {held: sides[held][: min(len(sides[held]) // body, limit[held]) * body] for held in sides}
    counts["tokens_left_over"] = sum(len(sides[held]) - len(packed[held]) for held in sides)
    return {"train": packed[False], "held_out": packed[True], "counts": counts, "body": body}


document = st.tuples(st.integers(2, 40), st.integers(0, 10**6)).map(lambda drawn: (f"{drawn[1]:x}-" * 20)[: drawn[0]])
documents = st.lists(st.one_of(document, document, st.text("xyz \n", max_size=9), st.none()), min_size=9, max_size=40)


def batches_of(texts: Sequence[str | None], size: int, read: list[str | None]) -> Iterator[list[str | None]]:
    """Yield batches of `texts`, and note in `read` what was asked for."""
    for i in range(0, len(texts), size):
        read.extend(texts[i : i + size])
        yield list(texts[i : i + size])


def without_bos(rows: TokenRows, where: slice, bos: int | None) -> list[Place]:
    """Return the places of all rows one after another, BOS left out once it was found in its place."""
    planes = [getattr(rows, name)[where] for name in ARRAYS]
    if bos is not None:
        assert (planes[0][:, 0] == bos).all()
        assert all((plane[:, 0] == plane[:, 1]).all() for plane in planes[1:])
    return list(zip(*(plane[:, int(bos is not None) :].reshape(-1).tolist() for plane in planes), strict=True))


@given(
    texts=documents,
    batch=st.integers(1, 9),
    held_out=st.floats(0.2, 0.6),
    seed=st.integers(0, 2**32),
    context=st.integers(2, 9),
    tokens=st.integers(20, 300),
    bos=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_no_token_is_lost_or_doubled_or_put_to_the_wrong_place(
    texts: list[str | None], batch: int, held_out: float, seed: int, context: int, tokens: int, bos: bool
) -> None:
    tokenizer = FastLetters()
    tokenizer.bos_token_id = BOS if bos else None
    read: list[str | None] = []
    config = DataConfig(source="x", context=context, tokens=tokens, held_out=held_out)
    expected = reference(texts, config, seed, bos)
    with patch.object(text_module, "read_documents", lambda *_: batches_of(texts, batch, read)):
        try:
            found = token_rows(config, tokenizer, seed)
        except InputError as error:
            assert "row of" in str(error)  # noqa: PT017 (it depends on the example whether it raises)
            assert not expected["train"] or not expected["held_out"]
            return
    train, held = slice(found.train_sequences), slice(found.train_sequences, None)
    for name, where in (("train", train), ("held_out", held)):
        assert found.tokens[where].shape == (len(expected[name]) // expected["body"], context)
        assert without_bos(found, where, tokenizer.bos_token_id) == expected[name]
    assert found.counts == reference(read, config, seed, bos)["counts"]
    if len(read) < len(texts):  # it stopped reading, so both sides must be full
        assert len(found.tokens) == max(tokens // context, 2)


@pytest.fixture(scope="module")
def bpe(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


ascii_texts = st.lists(st.text(st.characters(max_codepoint=127), max_size=60), min_size=4, max_size=20)


@given(texts=ascii_texts, context=st.integers(2, 20))
@settings(max_examples=80, deadline=None)
def test_every_token_of_a_true_tokenizer_leads_back_to_its_text(bpe: Any, texts: list[str], context: int) -> None:
    texts = [*texts, "the sea " * 30, "salt and wind " * 30, "a b c " * 30]
    sides = {text: i % 2 == 0 for i, text in enumerate(texts)}
    config = DataConfig(source="x", context=context, tokens=10**6)
    with (
        patch.object(text_module, "read_documents", lambda *_: batches_of(texts, 7, [])),
        patch.object(text_module, "is_held_out", lambda text, fraction, seed: sides[text]),
    ):
        found = token_rows(config, bpe, 0)
    for held, where in ((False, slice(found.train_sequences)), (True, slice(found.train_sequences, None))):
        places = without_bos(found, where, bpe.bos_token_id)
        mine = [text for text in texts if text.strip() and sides[text] == held]
        ids = [token for text in mine for token in [*bpe.encode(text, add_special_tokens=False), bpe.eos_token_id]]
        assert [token for token, _, _ in places] == ids[: len(places)]
        assert len(ids) - len(places) < context
        for token, number, offset in places:
            text, word = texts[number], bpe.decode([token])
            assert text[offset:].startswith(word) if token != bpe.eos_token_id else offset == len(text)


# In several processes


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have a pool work on texts as small as a test's; returns the number of processes of each pool as they start."""
    monkeypatch.setattr(packing, "_WORTH_A_POOL", 2_000)
    monkeypatch.setattr(packing, "_PIECE", 60_000)
    pools: list[int] = []
    true_map = datasets.Dataset.map

    def counted(self: datasets.Dataset, *args: Any, num_proc: int, **kwargs: Any) -> Any:
        pools.append(num_proc)
        return true_map(self, *args, num_proc=num_proc, **kwargs)

    monkeypatch.setattr(datasets.Dataset, "map", counted)
    return pools


def in_a_new_cache(path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], TokenRows]) -> tuple[TokenRows, list[bytes]]:
    monkeypatch.setenv("MONOSEM_CACHE", str(path))
    rows = make()
    return rows, [(next((path / "rows").glob("*/")) / name).read_bytes() for name in ARRAYS]


@pytest.mark.parametrize("parallelism", [None, "true"])
def test_rows_are_the_same_however_many_processes_make_them(
    tmp_path: Path, bpe: Any, small_pieces: list[int], monkeypatch: pytest.MonkeyPatch, parallelism: str | None
) -> None:
    """One document in four has no text; the text goes on after the last row is full."""
    texts = [text if i % 4 else "" for i, text in enumerate(many(4000))]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    (monkeypatch.delenv if parallelism is None else monkeypatch.setenv)("TOKENIZERS_PARALLELISM", *filter(None, [parallelism]))
    environ = os.environ
    found = {}
    torch.ones(300, 300) @ torch.ones(300, 300)  # threads that a forked process must not wait for
    for workers in (1, 2, 3):
        make = lambda: rows_of(path, bpe, tokens=30_000, held_out=0.1, workers=workers)  # noqa: B023, E731 (called at once)
        found[workers] = in_a_new_cache(tmp_path / str(workers), monkeypatch, make)
        assert os.environ is environ
        assert os.environ.get("TOKENIZERS_PARALLELISM") == parallelism
    assert set(small_pieces) == {2, 3}
    rows, data = found[1]
    assert rows.tokens.size == 30_000
    assert rows.counts["documents"] + rows.counts["unused_documents"] < 3000  # it did stop
    for others, other_data in found.values():
        assert other_data == data
        assert (others.counts, others.facts["rows_hash"]) == (rows.counts, rows.facts["rows_hash"])


class Odd(Letters):
    """Fails at one document."""

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, Any]:
        if any("number 1900" in text for text in texts):
            raise ValueError("an odd text")
        return super().__call__(texts, **options)


def test_a_fault_in_a_process_is_raised_and_leaves_no_rows(tmp_path: Path, small_pieces: list[int]) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", many(4000))
    with pytest.raises(ValueError, match="an odd text"):
        rows_of(path, Odd(), tokens=10**6, workers=2)
    assert small_pieces
    assert [p.suffix for p in (Path(os.environ["MONOSEM_CACHE"]) / "rows").iterdir()] == [".lock"]


def test_little_text_starts_no_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.Dataset, "map", None)  # to call it would be a TypeError
    found = rows_of(write_jsonl(tmp_path / "x.jsonl", many(2000)), tokens=10**6, workers=4)
    assert found.counts["documents"] == 2000


def test_what_is_not_needed_is_not_read(tmp_path: Path, small_pieces: list[int]) -> None:
    """What a pool is given ends near the last row, or a fault far behind it would matter."""
    path = write_jsonl(tmp_path / "x.jsonl", many(3000))
    read: list[str | None] = []
    with patch.object(text_module, "read_documents", lambda *_: batches_of(many(40_000), 256, read)):
        found = rows_of(path, FastLetters(), tokens=100_000, workers=2)
    assert found.tokens.size == 100_000
    assert small_pieces
    needed = found.counts["documents"] + found.counts["unused_documents"]
    assert needed <= len(read) < 1.1 * needed + 256


# In little memory


class Bytes(Letters):
    """As fast as a tokenizer can be: a token a byte."""

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, Any]:
        return {"input_ids": [text.encode() for text in texts]}


@pytest.mark.parametrize(("length", "bound"), [(500, 16e6), (100_000, 30e6)], ids=["pages", "books"])
def test_memory_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch, length: int, bound: float) -> None:
    """6 million tokens are 72 MB of rows; what is held is a batch, of 256 pages or as many books as fill its characters."""
    monkeypatch.setattr(text_module, "_CHARACTERS_A_BATCH", 200_000)
    texts = (f"{i:08d} ".ljust(length, "x") for i in range(10**6))

    def read(config: DataConfig, seed: int, revision: str | None) -> Iterator[list[str | None]]:
        while True:
            yield from text_module._checked(config, list(islice(texts, 256 if length < 1000 else 16)))

    monkeypatch.setattr(text_module, "read_documents", read)
    tracemalloc.start()
    try:
        found = token_rows(DataConfig(source="x", tokens=6_000_000, held_out=0.1), Bytes(), 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.tokens.nbytes * 3 > 70e6
    assert peak < bound
