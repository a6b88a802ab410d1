"""Text -> rows: what is read, where a row leads back to, what stands on which side, what is kept, how bad text is refused."""

import gzip
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import BOS, EOS, FastLetters, Letters, letters, many, rows_of, write_jsonl

from activation_store import DataConfig, InputError
from activation_store.text import document_text, is_held_out, read_documents, token_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rows of another test are found, nor those of whoever runs the tests."""
    monkeypatch.setenv("MONOSEM_CACHE", str(tmp_path_factory.mktemp("cache")))


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
    train = {texts[i] for i in np.unique(found.documents[: found.train_sequences])}
    held = {texts[i] for i in np.unique(found.documents[found.train_sequences :])}
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
    batches = read_documents(DataConfig(source=str(source), **settings), 0)
    return (text for batch in batches for text in batch if text is not None)


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
        batches = read_documents(DataConfig(source=str(path), shuffle_buffer=50), seed)
        return [text for batch in batches for text in batch if text]

    assert sorted(shuffled(0)) == sorted(texts)
    assert shuffled(0) == shuffled(0)
    assert shuffled(0) != texts
    assert shuffled(0) != shuffled(1)


def test_empty_documents_are_counted_and_leave_but_their_numbers(tmp_path: Path) -> None:
    texts = many()
    with_empty = [text for pair in zip(texts, ["", "  \n", None, "\t"] * 15, strict=True) for text in pair]
    clean = rows_of(write_jsonl(tmp_path / "clean.jsonl", texts), tokens=100_000)
    found = rows_of(write_jsonl(tmp_path / "empty.jsonl", with_empty), tokens=100_000)
    np.testing.assert_array_equal(found.tokens, clean.tokens)
    np.testing.assert_array_equal(found.documents, 2 * clean.documents)  # every other record has no text
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


# What a row leads back to


def test_every_row_leads_back_to_its_text(tmp_path: Path) -> None:
    texts = [text for pair in zip(many(), ["", None, " "] * 20, strict=True) for text in pair]
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    config = DataConfig(source=str(source), context=8, tokens=800, held_out=0.3, shuffle_buffer=20)
    found = token_rows(config, FastLetters(), 3)
    for row in range(0, len(found.tokens), 7):
        for token, number, offset in zip(found.tokens[row], found.documents[row], found.offsets[row], strict=True):
            text = document_text(config, 3, int(number))
            assert token in (BOS, [*letters(text), EOS][offset])


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("shuffle_buffer", [0, 50])
@pytest.mark.parametrize("kind", ["jsonl", "txt", "folder"])
def test_a_record_is_found_by_its_number(tmp_path: Path, kind: str, shuffle_buffer: int, streaming: bool) -> None:
    """In a file and in what `datasets` finds by itself, streamed and not, over the end of the first batch of 256."""
    texts = many(300)
    if kind == "txt":
        source = tmp_path / "x.txt"
        source.write_text("\n\n".join(texts))
    else:
        source = write_jsonl(tmp_path / "x.jsonl", texts)
    config = DataConfig(
        source=str(tmp_path if kind == "folder" else source), shuffle_buffer=shuffle_buffer, streaming=streaming
    )
    read = [text for batch in read_documents(config, 5) for text in batch]
    assert sorted(filter(None, read)) == sorted(texts)
    assert (read == texts) == (shuffle_buffer == 0)
    assert [document_text(config, 5, number) for number in (0, 1, 255, 256, 299)] == [read[n] for n in (0, 1, 255, 256, 299)]
    for number in (300, 10**6, -1):
        with pytest.raises(InputError, match=f"data.source.*{number}"):
            document_text(config, 5, number)


def test_a_record_without_text_is_refused(tmp_path: Path) -> None:
    config = DataConfig(source=str(write_jsonl(tmp_path / "x.jsonl", ["a", None, "", "b"])))
    assert [document_text(config, 0, number) for number in (0, 2, 3)] == ["a", "", "b"]
    with pytest.raises(InputError, match="has no text of number 1"):
        document_text(config, 0, 1)


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
