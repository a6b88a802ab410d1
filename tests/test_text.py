"""Text -> rows: packing by hand, no token lost, documents on one side of the split, and how bad text is refused."""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import DataConfig, InputError
from activation_store import text as text_module
from activation_store.text import TokenRows, is_held_out, token_rows

EOS, BOS = 1, 2


class Letters:
    """A tokenizer of one id a character: a = 10, b = 11, ..., space and the rest = 9."""

    eos_token_id: int | None = EOS
    bos_token_id: int | None = BOS

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [letters(text) for text in texts]}


def letters(text: str) -> list[int]:
    return [10 + ord(c) - ord("a") if "a" <= c <= "z" else 9 for c in text]


class NoSpecials(Letters):
    eos_token_id = None
    bos_token_id = None


def write_jsonl(path: Path, texts: Sequence[Any], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def many(count: int = 60) -> list[str]:
    """Texts of 3 to 7 words, no two alike."""
    words = ("red", "green", "blue", "one", "two", "three", "stone", "river", "cloud", "grass")
    return [" ".join(words[(i * k) % 10] for k in range(1, 4 + i % 5)) + f" number {i}" for i in range(count)]


def rows_of(source: Path | str, tokenizer: Any = None, seed: int = 0, **settings: Any) -> TokenRows:
    settings = {"context": 8, "tokens": 800, "held_out": 0.3, **settings}
    return token_rows(DataConfig(source=str(source), **settings), tokenizer or Letters(), seed)


# Packing, by hand


@pytest.fixture
def by_first_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that begin with h are held out, so that a golden value needs no hash."""
    monkeypatch.setattr(text_module, "is_held_out", lambda text, fraction, seed: text.startswith("h"))


GOLDEN = ["abc", "hi", "", "de", "   ", "hjk", "fghij", "h"]


@pytest.mark.usefixtures("by_first_letter")
def test_packing_golden_value(tmp_path: Path) -> None:
    """Training stream: abc. de. fghij.   Held-out stream: hi. hjk. h.   (the dot is EOS; a row holds 3 after its BOS)

    Documents are numbered as they come, the two empty ones not at all: abc 0, hi 1, de 2, hjk 3, fghij 4, h 5.
    """
    found = rows_of(write_jsonl(tmp_path / "x.jsonl", GOLDEN), context=4, tokens=400, held_out=0.5)
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
        [[0, 0, 0, 0], [0, 0, 2, 2], [2, 2, 4, 4], [4, 4, 4, 4], [1, 1, 1, 1], [3, 3, 3, 3], [3, 3, 5, 5]],
    )
    assert found.tokens.dtype == found.documents.dtype == np.int32
    assert found.train_sequences == 4
    # the last EOS of the training stream found no row
    assert found.counts == {"documents": 6, "empty_documents": 2, "unused_documents": 0, "tokens_left_over": 1}


@pytest.mark.usefixtures("by_first_letter")
def test_packing_without_bos(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", GOLDEN)
    a, b, c, d, e, f, g, h, i, j, k = range(10, 21)
    train = [[a, b, c, EOS], [d, e, EOS, f], [g, h, i, j]]
    held = [[h, i, EOS, h], [j, k, EOS, h]]
    documents = [[0, 0, 0, 0], [2, 2, 2, 4], [4, 4, 4, 4], [1, 1, 1, 3], [3, 3, 3, 5]]
    found = rows_of(path, context=4, tokens=400, held_out=0.5, prepend_bos=False)
    np.testing.assert_array_equal(found.tokens, train + held)
    np.testing.assert_array_equal(found.documents, documents)
    assert found.counts["tokens_left_over"] == 2
    tokenizer = Letters()
    tokenizer.bos_token_id = None  # a tokenizer without one, though it is asked for
    np.testing.assert_array_equal(rows_of(path, tokenizer, context=4, tokens=400, held_out=0.5).tokens, train + held)


@pytest.mark.usefixtures("by_first_letter")
def test_packing_without_eos(tmp_path: Path) -> None:
    found = rows_of(write_jsonl(tmp_path / "x.jsonl", GOLDEN), NoSpecials(), context=4, tokens=400, held_out=0.5)
    a, b, c, d, e, f, g, h, i, j = range(10, 20)
    np.testing.assert_array_equal(found.tokens, [[a, b, c, d], [e, f, g, h], [h, i, h, j]])
    np.testing.assert_array_equal(found.documents, [[0, 0, 0, 2], [2, 4, 4, 4], [1, 1, 3, 3]])
    assert found.counts["tokens_left_over"] == 4  # ij of training; k and the last h of held-out


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


# The same against a reference that handles one token at a time


def reference(texts: list[str | None], held_out: float, seed: int, context: int, tokens: int, bos: bool) -> dict[str, Any]:
    wanted = max(tokens // context, 2)
    held_rows = max(1, round(wanted * held_out))
    body = context - bos
    sides: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    limit = {False: wanted - held_rows, True: held_rows}
    number = empty = unused = 0
    for text in texts:
        if text is None or not text.strip():
            empty += 1
            continue
        held = is_held_out(text, held_out, seed)
        if len(sides[held]) // body >= limit[held]:
            unused += 1
            continue
        sides[held] += [(token, number) for token in [*letters(text), EOS]]
        number += 1
    packed = {held: sides[held][: min(len(sides[held]) // body, limit[held]) * body] for held in sides}
    counts = {
        "documents": number, "empty_documents": empty, "unused_documents": unused,
        "tokens_left_over": sum(len(sides[held]) - len(packed[held]) for held in sides),
    }  # fmt: skip
    return {"train": packed[False], "held_out": packed[True], "counts": counts, "body": body}


document = st.tuples(st.integers(2, 40), st.integers(0, 10**6)).map(lambda drawn: (f"{drawn[1]:x}-" * 20)[: drawn[0]])
documents = st.lists(st.one_of(document, document, st.text("xyz \n", max_size=9), st.none()), min_size=9, max_size=40)


@given(
    texts=documents,
    chunk=st.integers(1, 9),
    held_out=st.floats(0.2, 0.6),
    seed=st.integers(0, 2**32),
    context=st.integers(2, 9),
    tokens=st.integers(20, 300),
    bos=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_no_token_is_lost_or_doubled_or_put_to_the_wrong_document(
    texts: list[str | None], chunk: int, held_out: float, seed: int, context: int, tokens: int, bos: bool
) -> None:
    tokenizer = Letters()
    tokenizer.bos_token_id = BOS if bos else None
    read: list[str | None] = []

    def batches() -> Iterator[list[str | None]]:
        for i in range(0, len(texts), chunk):
            read.extend(texts[i : i + chunk])
            yield texts[i : i + chunk]

    config = DataConfig(source="x", context=context, tokens=tokens, held_out=held_out)
    expected = reference(texts, held_out, seed, context, tokens, bos)
    with patch.object(text_module, "read_documents", lambda config, seed: (batches(), {})):
        try:
            found = token_rows(config, tokenizer, seed)
        except InputError as error:
            assert "row of" in str(error)  # noqa: PT017 (it depends on the example whether it raises)
            assert not expected["train"] or not expected["held_out"]
            return
    train, held = slice(found.train_sequences), slice(found.train_sequences, None)
    for name, where in (("train", train), ("held_out", held)):
        rows, owners = found.tokens[where], found.documents[where]
        assert rows.shape == owners.shape == (len(expected[name]) // expected["body"], context)
        if bos:
            assert (rows[:, 0] == BOS).all()
            assert (owners[:, 0] == owners[:, 1]).all()
        flat = [part[:, int(bos) :].reshape(-1).tolist() for part in (rows, owners)]
        assert list(zip(*flat, strict=True)) == expected[name]
    assert found.counts == reference(read, held_out, seed, context, tokens, bos)["counts"]
    if len(read) < len(texts):  # it stopped reading, so both sides must be full
        assert len(found.tokens) == max(tokens // context, 2)


# The split


@given(texts=st.lists(st.text(max_size=20), max_size=20), seed=st.integers(0, 2**63), fraction=st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_equal_texts_fall_on_the_same_side(texts: list[str], seed: int, fraction: float) -> None:
    first = [is_held_out(text, fraction, seed) for text in texts]
    assert [is_held_out(str(text), fraction, seed) for text in reversed(texts)] == first[::-1]
    assert [is_held_out(f" \n{text}\t ", fraction, seed) for text in texts] == first  # white space around is no difference
    wider = [is_held_out(text, fraction + (1 - fraction) / 2, seed) for text in texts]
    assert all(after or not before for before, after in zip(first, wider, strict=True))  # a larger part holds the smaller


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_the_held_out_part_is_as_large_as_asked_and_moves_with_the_seed(fraction: float) -> None:
    sides = np.array([[is_held_out(f"text {i}", fraction, seed) for i in range(2000)] for seed in range(3)])
    limit = 4 * np.sqrt(fraction * (1 - fraction) / 2000)
    assert np.abs(sides.mean(1) - fraction).max() < limit
    both = (sides[0] & sides[1]).mean()
    assert abs(both - fraction**2) < limit  # independent, not merely shifted


def test_no_document_stands_on_both_sides(tmp_path: Path) -> None:
    texts = many(40) * 3  # every document three times
    found = rows_of(write_jsonl(tmp_path / "x.jsonl", texts), tokens=100_000)
    kept = [text for text in texts if text.strip()]
    train = {kept[i] for i in np.unique(found.documents[: found.train_sequences])}
    held = {kept[i] for i in np.unique(found.documents[found.train_sequences :])}
    assert len(train) > 10
    assert len(held) > 4
    assert not train & held
    for texts_of_side, rows in ((train, found.tokens[: found.train_sequences]), (held, found.tokens[found.train_sequences :])):
        pieces = bytes(rows[:, 1:].reshape(-1).astype(np.uint8)).split(bytes([EOS]))
        assert {bytes(letters(text)) for text in texts_of_side} >= set(pieces[:-1])


def test_the_seed_decides_the_split_and_nothing_else_does(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", many())
    first, again, other = rows_of(path, seed=0), rows_of(path, seed=0), rows_of(path, seed=1)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.tokens.shape != other.tokens.shape or (first.tokens != other.tokens).any()


def test_a_large_held_out_part_leaves_a_row_for_training(tmp_path: Path) -> None:
    """4 rows, 0.9 of them held out, and text enough for both sides."""
    found = rows_of(write_jsonl(tmp_path / "x.jsonl", many(300)), context=4, tokens=16, held_out=0.9)
    assert len(found.tokens) == 4
    assert found.train_sequences == 1


# What is read


def paragraphs(texts: Sequence[str]) -> str:
    return "\n\n".join(texts) + "\n"


WRITERS: dict[str, tuple[str, Callable[[Path, list[str]], Any], dict[str, Any]]] = {
    "jsonl": ("x.jsonl", write_jsonl, {}),
    "json lines in .json": ("x.json", write_jsonl, {}),
    "parquet": (
        "x.parquet",
        lambda path, texts: pyarrow.parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), path),
        {},
    ),
    "txt, lines": ("x.txt", lambda path, texts: path.write_text("\n".join(texts) + "\n"), {"txt_unit": "line"}),
    "txt, paragraphs": ("x.txt", lambda path, texts: path.write_text(paragraphs(texts)), {"txt_unit": "paragraph"}),
    "txt, paragraphs by default": ("x.txt", lambda path, texts: path.write_text(paragraphs(texts)), {}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    texts = many()
    expected = rows_of(write_jsonl(tmp_path / "reference.jsonl", texts), tokens=100_000)
    assert expected.counts["documents"] == len(texts)
    name, write, settings = WRITERS[kind]
    write(tmp_path / name, texts)
    found = rows_of(tmp_path / name, tokens=100_000, **settings)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.documents, expected.documents)
    assert found.facts["sha256"] == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}
    assert found.facts["source"] == str(tmp_path / name)


def test_a_paragraph_keeps_its_lines_together_and_a_document_its_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\ntwo\n\nthree\n" * 40)
    found = {unit: list(documents_of(tmp_path / "x.txt", txt_unit=unit)) for unit in ("line", "paragraph", "document")}
    assert [len(texts) for texts in found.values()] == [160, 41, 1]  # "three" runs on into the next "one"
    assert found["paragraph"][:2] == ["one\ntwo", "three\none\ntwo"]
    assert found["document"] == ["one\ntwo\n\nthree\n" * 40]


def documents_of(source: Path | str, **settings: Any) -> Iterator[str]:
    batches, _ = text_module.read_documents(DataConfig(source=str(source), **settings), 0)
    return (text for batch in batches for text in batch)


def test_a_glob_reads_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(3)])
    assert list(documents_of(tmp_path / "*.jsonl")) == [f"{name} {i}" for name in "abc" for i in range(3)]


def test_brackets_in_a_path_are_letters_when_there_is_such_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    write_jsonl(folder / "x.jsonl", ["one", "two"])
    assert list(documents_of(folder / "x.jsonl")) == ["one", "two"]


def test_another_column_and_text_beyond_ascii(tmp_path: Path) -> None:
    texts = ["Füße", "日本語 😀", "a\u2028b", "tab\there"]
    assert list(documents_of(write_jsonl(tmp_path / "x.jsonl", texts, "body"), column="body")) == texts


def test_shuffling_keeps_the_documents_and_follows_the_seed(tmp_path: Path) -> None:
    texts = many(200)
    path = write_jsonl(tmp_path / "x.jsonl", texts)

    def shuffled(seed: int) -> list[str]:
        batches, _ = text_module.read_documents(DataConfig(source=str(path), shuffle_buffer=50), seed)
        return [text for batch in batches for text in batch]

    assert sorted(shuffled(0)) == sorted(texts)
    assert shuffled(0) == shuffled(0)
    assert shuffled(0) != texts
    assert shuffled(0) != shuffled(1)


def test_empty_documents_are_counted_and_leave_no_trace(tmp_path: Path) -> None:
    texts = many()
    with_empty = [text for pair in zip(texts, ["", "  \n", None, "\t"] * 15, strict=True) for text in pair]
    clean = rows_of(write_jsonl(tmp_path / "clean.jsonl", texts), tokens=100_000)
    found = rows_of(write_jsonl(tmp_path / "empty.jsonl", with_empty), tokens=100_000)
    np.testing.assert_array_equal(found.tokens, clean.tokens)
    np.testing.assert_array_equal(found.documents, clean.documents)
    assert (clean.counts["empty_documents"], found.counts["empty_documents"]) == (0, 60)


def test_text_that_ends_early_gives_fewer_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", many())
    found = rows_of(path, tokens=1_000_000)
    available = sum(len(text) + 1 for text in many())
    packed = len(found.tokens) * 7
    assert packed + found.counts["tokens_left_over"] == available
    assert found.counts["tokens_left_over"] < 2 * 7
    assert found.tokens.size < 1_000_000
    assert 0 < found.train_sequences < len(found.tokens)


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    path, seen = write_jsonl(tmp_path / "x.jsonl", many(1500)), []
    config = DataConfig(source=str(path), context=8, tokens=16_000, held_out=0.3)
    token_rows(config, Letters(), 0, lambda done, total: seen.append((done, total)))
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {16_000}
    assert seen[-1][0] == 16_000


# What is refused


def refused(source: Path | str, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        rows_of(source, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["none.jsonl", "none.txt", "none.parquet", "none/*.jsonl"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    message = refused(tmp_path / name)
    assert message.startswith("data.source")
    assert str(tmp_path / name) in message


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.json"])
def test_an_empty_file_is_called_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    message = refused(tmp_path / name)
    assert message.startswith("data.source")
    assert str(tmp_path / name) in message
    said = message.replace(str(tmp_path), "")  # this test's own name is in there
    assert "empty" in said or "0 documents" in said


def test_a_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"title": "a", "body": "b"}\n' * 50)
    message = refused(path)
    assert message.startswith("data.column")
    assert all(part in message for part in ("'text'", "title", "body"))
    pyarrow.parquet.write_table(pyarrow.table({"title": ["a"], "body": ["b"]}), tmp_path / "x.parquet")
    assert "title, body" in refused(tmp_path / "x.parquet")
    (tmp_path / "x.txt").write_text("a line\n" * 50)
    assert "it has: text" in refused(tmp_path / "x.txt", column="body")


@pytest.mark.parametrize(("value", "kind"), [(3, "int"), (["a", "b"], "list"), ({"a": 1}, "dict"), (True, "bool")])
def test_a_column_that_holds_no_text(tmp_path: Path, value: Any, kind: str) -> None:
    message = refused(write_jsonl(tmp_path / "x.jsonl", [value] * 50))
    assert message.startswith("data.column")
    assert f"holds {kind}" in message


@pytest.mark.parametrize("texts", [["a"], [None] * 50, [" "] * 50], ids=["too short", "null", "blank"])
def test_too_little_text(tmp_path: Path, texts: list[Any]) -> None:
    message = refused(write_jsonl(tmp_path / "x.jsonl", texts))
    assert message.startswith("data.source")
    assert "8 tokens" in message
    assert "context" in message


def test_text_enough_for_one_side_only_says_which_is_missing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ["the same text again and again"] * 50)
    held = is_held_out("the same text again and again", 0.3, 0)
    assert ("training" if held else "held-out") in refused(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl", b'{"text": "abc"}\n{"text": \n'),
        ("x.jsonl", b"just words\n"),
        ("x.parquet", b"PAR1 but not really"),
        ("x.parquet", b""),
        ("x.txt", "café".encode("latin-1") * 20),
        ("x.jsonl", gzip.compress(b'{"text": "abc"}\n')[:-9]),
    ],
    ids=["half a record", "no json", "no parquet", "empty parquet", "latin-1", "cut gzip"],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    message = refused(tmp_path / name)
    assert message.startswith("data.")
    assert str(tmp_path / name) in message


@pytest.mark.parametrize(
    "second", ['{"text": "fine"}\nnot json\n', '{"body": "another column"}\n'], ids=["broken", "other columns"]
)
def test_a_fault_further_on_is_named_too(tmp_path: Path, second: str) -> None:
    """Files are read as they come, so the second is opened long after the first was found good."""
    write_jsonl(tmp_path / "a.jsonl", many())
    (tmp_path / "b.jsonl").write_text(second)
    message = refused(tmp_path / "*.jsonl", tokens=1_000_000)
    assert message.startswith("data.")
    assert str(tmp_path) in message


def test_a_folder_is_read_or_refused_but_never_a_fault(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", many())
    try:
        found = rows_of(tmp_path, tokens=100_000)
    except InputError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017 (either is right)
        return
    assert found.counts["documents"] == 60


@pytest.mark.parametrize("source", ["no/such-data-set", "nosuchdataset", "x.csv"])
def test_a_data_set_that_cannot_be_had(source: str) -> None:
    message = refused(source)
    assert message.startswith("data.source")
    assert source in message
