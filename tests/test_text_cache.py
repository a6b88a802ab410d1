"""Rows that were made are found again: by what decides them and nothing else, whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
from letters import FastLetters, Letters, many, rows_of, write_jsonl

from activation_store import InputError
from activation_store import text as text_module
from activation_store.packing import ARRAYS
from activation_store.text import TokenRows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all rows, which is not there yet."""
    monkeypatch.setenv("MONOSEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "x.jsonl", many())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were opened, one an opening."""
    opened: list[str] = []
    true_read = text_module.read_documents

    def read(config: Any, *rest: Any) -> Iterator[Any]:
        opened.append(config.source)
        return true_read(config, *rest)

    monkeypatch.setattr(text_module, "read_documents", read)
    return opened


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.suffix != ".lock")


def assert_same_rows(found: TokenRows, expected: TokenRows) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.train_sequences, found.counts) == (expected.train_sequences, expected.counts)
    assert found.facts["rows_hash"] == expected.facts["rows_hash"]


def test_a_second_call_reads_no_text_and_tokenises_nothing(source: Path, reads: list[str], cache: Path) -> None:
    class Once(Letters):
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            Once.calls += 1
            return super().__call__(*args, **kwargs)

        def __reduce__(self) -> Any:  # by its name, for its hash
            return (Letters, ())

    first, calls = rows_of(source, Once()), Once.calls
    assert_same_rows(rows_of(source, Once()), first)
    assert (len(reads), Once.calls) == (1, calls)
    assert len(entries(cache)) == 1


def test_progress_ends_at_the_total_of_rows_that_are_found_too(source: Path) -> None:
    config = text_module.DataConfig(source=str(source), context=8, tokens=800, held_out=0.3)
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        found = text_module.token_rows(config, Letters(), 0, lambda done, total: seen.append((done, total)))  # noqa: B023
        assert seen[-1] == (found.tokens.size, 800)


def test_rows_are_mapped_from_disk_and_cannot_be_written(source: Path, cache: Path) -> None:
    found = rows_of(source, FastLetters())
    for name in ARRAYS:
        assert isinstance(getattr(found, name), np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            getattr(found, name)[0, 0] = 1
    data = b"".join((entries(cache)[0] / name).read_bytes() for name in ARRAYS)
    assert found.facts["rows_hash"] == hashlib.sha256(data).hexdigest()[:16]
    assert data == found.tokens.tobytes() + found.documents.tobytes() + found.offsets.tobytes()


def moved(source: Path) -> Path:
    return source.rename(source.with_name("y.jsonl"))


def touched(source: Path) -> Path:
    os.utime(source, (1, 1))
    return source


@pytest.mark.parametrize("change", [moved, touched])
def test_the_same_bytes_are_the_same_text(source: Path, reads: list[str], change: Callable[[Path], Path]) -> None:
    first = rows_of(source)
    source = change(source)
    found = rows_of(source, workers=2)
    assert_same_rows(found, first)
    assert len(reads) == 1
    assert found.facts["source"] == str(source)  # what is said of the text is of this call
    assert list(found.facts["sha256"]) == [source.name]


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path: Path, reads: list[str]) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "x.jsonl", [f"{folder} {text}" for text in many()])
    first = rows_of(tmp_path / "*" / "x.jsonl")
    assert list(first.facts["sha256"]) == ["a/x.jsonl", "b/x.jsonl"]
    write_jsonl(tmp_path / "a" / "x.jsonl", many())
    second = rows_of(tmp_path / "*" / "x.jsonl")
    assert second.facts["sha256"] != first.facts["sha256"]
    assert len(reads) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"context": 9}, {"tokens": 400}, {"held_out": 0.4}, {"prepend_bos": False}, {"seed": 1}, {"shuffle_buffer": 9},
        {"column": "body"}, {"txt_unit": "line"}, {"tokenizer": FastLetters()},
    ],
    ids=lambda change: "-".join(change),  # the same in every process
)  # fmt: skip
def test_whatever_decides_the_rows_makes_other_rows(source: Path, reads: list[str], change: dict[str, Any]) -> None:
    source.write_text("".join(json.dumps({"text": text, "body": text[::-1]}) + "\n" for text in many()))
    rows_of(source)
    rows_of(source, **change)
    assert len(reads) == 2


def test_another_text_or_end_of_sequence_makes_other_rows(source: Path, reads: list[str]) -> None:
    tokenizer = Letters()
    first = rows_of(source, tokenizer)
    tokenizer.eos_token_id = 7
    assert rows_of(source, tokenizer).facts["rows_hash"] != first.facts["rows_hash"]
    source.write_text(source.read_text().replace("red", "der"))
    assert rows_of(source).facts["rows_hash"] != first.facts["rows_hash"]
    assert len(reads) == 3


def test_a_tokenizer_is_known_by_all_that_it_does(source: Path, tiny_model_dir: Path, reads: list[str]) -> None:
    """One vocabulary, but words cut at other places; and one that was only used before."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    one, other = (AutoTokenizer.from_pretrained(tiny_model_dir) for _ in range(2))
    first = rows_of(source, one)
    one(["a b", "c"], truncation=True, max_length=1, padding=True)  # which stays set in it
    assert_same_rows(rows_of(source, one), first)
    assert len(reads) == 1
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    assert other.get_vocab() == one.get_vocab()
    assert rows_of(source, other).facts["rows_hash"] != first.facts["rows_hash"]


def cut(folder: Path) -> None:
    os.truncate(folder / "documents", 100)


def lengthened(folder: Path) -> None:
    with open(folder / "offsets", "ab") as file:
        file.write(bytes(4))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": cut,
    "lengthened": lengthened,
    "a file missing": lambda folder: (folder / "tokens").unlink(),
    "rows.json missing": lambda folder: (folder / "rows.json").unlink(),
    "rows.json no json": lambda folder: (folder / "rows.json").write_text("{"),
    "rows.json of something else": lambda folder: (folder / "rows.json").write_text('{"shape": null}'),
    "rows.json of an older kind": lambda folder: (folder / "rows.json").write_text(
        json.dumps({"shape": json.loads((folder / "rows.json").read_text())["shape"]})
    ),
    "a list": lambda folder: (folder / "rows.json").write_text("[]"),
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_rows_are_made_again(source: Path, reads: list[str], cache: Path, damage: str) -> None:
    expected = rows_of(source, FastLetters())
    kept = {name: np.array(getattr(expected, name)) for name in ARRAYS}  # before the file under them is cut
    DAMAGES[damage](entries(cache)[0])
    found = rows_of(source, FastLetters())
    assert len(reads) == 2
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), kept[name])
    rows_of(source, FastLetters())
    assert len(reads) == 2


def test_what_fails_leaves_nothing_that_could_be_found(source: Path, cache: Path, reads: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match="not enough"):
            rows_of(source, context=5000)
    assert entries(cache) == []
    assert len(reads) == 2


def test_who_wants_the_same_rows_meanwhile_waits_for_them(source: Path, reads: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: rows_of(source), range(4)))
    assert len(reads) == 1
    for rows in found:
        assert_same_rows(rows, found[0])


def test_a_cache_that_cannot_be_written_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOSEM_CACHE", str(source))  # a file
    with pytest.raises(InputError, match=r"MONOSEM_CACHE: cannot write to .*x\.jsonl"):
        rows_of(source)


# Text that is no local file


def test_text_that_may_change_is_read_each_time_and_leaves_nothing(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    """A folder: `datasets` decides what of it is read."""
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "x.jsonl", many())
    first, second = (rows_of(tmp_path / "data", tokens=10_000) for _ in range(2))
    assert len(reads) == 2
    assert list(cache.iterdir()) == []
    with pytest.raises(InputError, match="not enough"):
        rows_of(tmp_path / "data", context=5000)
    assert list(cache.iterdir()) == []
    assert_same_rows(first, second)  # they can be read as long as they are held
    assert first.counts["documents"] == 60


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub with one data set, whose `commit` is the newest; None when it cannot be reached. `loaded`: revisions read."""
    state = SimpleNamespace(commit="a" * 40, loaded=[])

    def dataset_info(self: Any, name: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        if state.commit is None:
            raise OSError("offline")
        return SimpleNamespace(sha=state.commit)

    def load_dataset(source: str, name: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        state.loaded.append(revision)
        data = datasets.Dataset.from_dict({"text": many()})
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


@pytest.mark.parametrize("streaming", [True, False])
def test_a_data_set_of_the_hub_is_known_by_its_commit(hub: SimpleNamespace, streaming: bool) -> None:
    first = rows_of("some/text", revision="main", streaming=streaming)
    assert first.facts["revision"] == "a" * 40
    assert_same_rows(rows_of("some/text", streaming=streaming), first)
    assert hub.loaded == ["a" * 40]
    hub.commit = "b" * 40
    assert rows_of("some/text", streaming=streaming).facts["revision"] == "b" * 40
    assert hub.loaded == ["a" * 40, "b" * 40]


def test_without_the_hub_only_a_commit_is_a_name(hub: SimpleNamespace, cache: Path) -> None:
    hub.commit = None
    for _ in range(2):
        assert rows_of("some/text", revision="main").facts["revision"] == "main"
    assert hub.loaded == ["main", "main"]
    assert list(cache.iterdir()) == []
    for _ in range(2):
        assert rows_of("some/text", revision="c" * 40).facts["revision"] == "c" * 40
    assert hub.loaded == ["main", "main", "c" * 40]
    shutil.rmtree(cache)
