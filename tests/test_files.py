"""Files are whole or absent, journals lose at most the line that a crash cut, a full disk is said in one line."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import InputError
from activation_store.files import (
    HOST,
    append_json_line,
    folder_aside,
    is_running,
    read_json_lines,
    remove_leftovers,
    sync_folder,
    write_atomic,
    write_json,
)


class Injected(Exception):
    """The fault that a test put in."""


def fail_at(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], call: int, error: BaseException) -> list[str]:
    """Make the `call`-th call (from 1) of any of os.<names> raise; the list returned holds the name once it has."""
    fired: list[str] = []
    count = 0

    def faulty(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                fired.append(name)
                raise error
            return real(*args, **kwargs)

        return run

    for name in names:
        monkeypatch.setattr(os, name, faulty(name, getattr(os, name)))
    return fired


# write_atomic


def test_write_atomic_joins_its_parts_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomic(path, b"head", bytearray(b"-body-"), memoryview(b"tail"))
    assert path.read_bytes() == b"head-body-tail"
    write_atomic(path, b"short")
    assert path.read_bytes() == b"short"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize(
    ("name", "call", "left"),
    [("fsync", 1, b"old"), ("replace", 1, b"old"), ("fsync", 2, b"new")],
    ids=["data not on disk", "not renamed", "renamed, folder not synced"],
)
def test_a_failed_write_leaves_old_or_new_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int, left: bytes
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        fail_at(patch, (name,), call, Injected())
        with pytest.raises(Injected):
            write_atomic(path, b"n", b"ew")
    assert path.read_bytes() == left
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_part_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_atomic(path, b"new", "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_the_file_is_on_disk_before_it_has_its_name_and_the_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        events.append("sync folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "sync file")
        real_fsync(fd)

    def replace(source: Any, target: Any) -> None:
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(tmp_path / "file.bin", b"x")
    assert events == ["sync file", "rename", "sync folder"]


def test_threads_that_write_the_same_file_never_meet(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    contents = [bytes([n]) * size for n, size in ((1, 100_000), (2, 150_000), (3, 1))]
    start = threading.Barrier(len(contents))
    faults: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(25):
                start.wait(30)
                write_atomic(path, content[:1], content[1:], sync=False)
                if path.read_bytes() not in contents:
                    raise AssertionError("half a file")
        except BaseException as error:
            faults.append(error)
            start.abort()

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_name_can_be_made_durable_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.path.isdir(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "file.bin", b"x", sync=False)
    assert synced == [False]  # the bytes are on disk
    sync_folder(tmp_path)
    assert synced == [False, True]


# Leftovers


def killed_while_writing(path: Path) -> int:
    """Let a process of its own be killed in the middle of write_atomic; return its id, which no process has any more."""
    child = os.fork()
    if not child:
        os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        try:
            write_atomic(path, b"half a file")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return child


def leave(path: Path, age: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a file")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


DAY = 86_400.0


def test_what_a_killed_process_left_is_removed_and_its_target_is_not(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.bin"
    write_atomic(path, b"old")
    dead = killed_while_writing(path)
    (left,) = [name for name in os.listdir(path.parent) if name != "file.bin"]
    assert f"~{dead}-" in left
    folder = tmp_path / f".sae~{HOST}~{dead}-7.tmp"  # a folder_aside that was cut off
    leave(folder / "weights.safetensors")
    leave(folder / f".config~{HOST}~{dead}-8.tmp")
    remove_leftovers(tmp_path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["file.bin"]
    assert not folder.exists()


def test_what_others_may_be_writing_stays_until_it_is_a_day_old(tmp_path: Path) -> None:
    dead = killed_while_writing(tmp_path / "file.bin")
    alive = subprocess.Popen(["sleep", "60"])
    try:
        fresh = [
            leave(tmp_path / f".a~{HOST}~{alive.pid}-0.tmp", DAY / 2),
            leave(tmp_path / f".b~{HOST}~{os.getpid()}-3.tmp"),
            leave(tmp_path / "c" / f".c~not-{HOST}.example.org~{dead}-0.tmp", DAY - 600),
            leave(tmp_path / f".d~e~elsewhere~{alive.pid}-0.tmp"),
        ]
        old = [
            leave(tmp_path / f".a~{HOST}~{alive.pid}-1.tmp", DAY + 600),
            leave(tmp_path / "c" / f".c~elsewhere~{dead}-1.tmp", DAY + 600),
            leave(tmp_path / f".d~{HOST}~{dead}-1.tmp"),
        ]
        others = [leave(tmp_path / name, 9 * DAY) for name in ("notes.tmp", ".hidden", f"a~{HOST}~{dead}-1.txt")]
        remove_leftovers(tmp_path)
        assert [path for path in fresh + old + others if path.exists()] == fresh + others
        assert is_running(HOST, alive.pid)
    finally:
        alive.kill()
        alive.wait()
    assert not is_running(HOST, alive.pid)
    assert is_running("elsewhere", alive.pid)
    remove_leftovers(tmp_path)
    assert [path for path in fresh if path.exists()] == fresh[1:]


def test_nothing_is_left_over_where_there_is_no_folder(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


# write_json


def test_write_json_golden_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, 0.5, None], "b": "é"})
    expected = '{\n  "a": [\n    1,\n    0.5,\n    null\n  ],\n  "b": "é"\n}\n'
    assert (tmp_path / "x.json").read_bytes() == expected.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_write_json_refuses_what_is_not_json_and_keeps_the_old_file(tmp_path: Path, value: float) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"loss": [value]})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]


# folder_aside


def make_old_folder(path: Path) -> dict[str, bytes]:
    path.mkdir()
    content = {f"old{i}": f"old {i}".encode() for i in range(4)}
    for name, data in content.items():
        (path / name).write_bytes(data)
    return content


def content_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_folder_aside_replaces_the_whole_folder(tmp_path: Path) -> None:
    path = tmp_path / "sae"
    make_old_folder(path)
    with folder_aside(path) as aside:
        (aside / "new").write_bytes(b"new")
        assert "old0" in os.listdir(path)  # until the end, readers see the old one
    assert content_of(path) == {"new": b"new"}
    assert os.listdir(tmp_path) == ["sae"]


def test_folder_aside_leaves_the_old_folder_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "sae"
    old = make_old_folder(path)

    def write() -> None:
        with folder_aside(path) as aside:
            (aside / "new").write_bytes(b"new")
            raise Injected

    with pytest.raises(Injected):
        write()
    assert content_of(path) == old
    assert os.listdir(tmp_path) == ["sae"]


@pytest.mark.parametrize("names", [("replace", "rename"), ("unlink",), ("rmdir",), ("fsync",)], ids="/".join)
def test_a_failure_while_a_folder_is_replaced_never_leaves_half_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    new = {"new1": b"1", "new2": b"2"}
    for call in range(1, 20):  # fail at the first call, the second, ... until the work needs no more of them
        path = tmp_path / str(call) / "sae"
        path.parent.mkdir()
        old = make_old_folder(path)
        with monkeypatch.context() as patch:
            fired = fail_at(patch, names, call, OSError(errno.EIO, "injected"))
            with contextlib.suppress(OSError), folder_aside(path) as aside:
                for name, data in new.items():
                    (aside / name).write_bytes(data)
        if not fired:
            break
        assert not path.exists() or content_of(path) in (old, new), f"call {call} of os.{'/'.join(names)} failed"
    assert call > 1, "nothing was made to fail"
    assert content_of(path) == new


# Journals

records = st.lists(
    st.dictionaries(
        st.text(max_size=5),
        st.one_of(st.text(max_size=12), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.none()),
        max_size=3,
    ),
    max_size=6,
)


@given(records=records, extra=records, data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_journal_cut_anywhere_reads_as_a_prefix_and_can_be_continued(
    records: list[dict[str, Any]], extra: list[dict[str, Any]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        for record in records:
            append_json_line(path, record)
        whole = path.read_bytes() if records else b""
        cut = whole[: data.draw(st.integers(0, len(whole)), label="cut at byte")]
        path.write_bytes(cut)
        kept = records[: cut.count(b"\n")]  # a record is committed by its newline
        assert read_json_lines(path) == kept
        for record in extra:
            append_json_line(path, record)
        assert read_json_lines(path) == kept + extra


def test_a_character_cut_in_the_middle_is_a_torn_line_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    append_json_line(path, {"a": "é"})
    append_json_line(path, {"a": "é"})
    path.write_bytes(path.read_bytes()[:-4])  # ends in 0xc3, the first of the two bytes of é
    assert read_json_lines(path) == [{"a": "é"}]


def test_a_journal_line_is_one_line_of_json_that_any_reader_reads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    append_json_line(path, {"text": "two\nlines\u2028é\x85"})
    append_json_line(path, {"n": 1})
    lines = path.read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [{"text": "two\nlines\u2028é\x85"}, {"n": 1}]
    assert lines[-1] == b""
    assert read_json_lines(path) == [{"text": "two\nlines\u2028é\x85"}, {"n": 1}]


def test_a_missing_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_a_fault_that_no_crash_makes_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match="Expecting value"):
        read_json_lines(path)


def test_a_line_that_is_not_json_is_refused_and_the_journal_stays(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    append_json_line(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        append_json_line(path, {"a": float("nan")})
    assert path.read_bytes() == b'{"a": 1}\n'


# A full disk


def aside_with_file(path: Path) -> None:
    with folder_aside(path) as aside:
        (aside / "x").write_bytes(b"x")


WRITES: dict[str, Callable[[Path], None]] = {
    "write_atomic": lambda path: write_atomic(path, b"data"),
    "write_json": lambda path: write_json(path, {"a": 1}),
    "append_json_line": lambda path: append_json_line(path, {"a": 1}),
    "folder_aside": aside_with_file,
}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_is_one_line_that_names_the_file_and_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, code: int
) -> None:
    path = tmp_path / "target"
    with monkeypatch.context() as patch:
        fail_at(patch, ("fsync",), 1, OSError(code, "no room"))
        with pytest.raises(InputError) as error:
            WRITES[write](path)
    message = str(error.value)
    assert str(path) in message
    assert "disk full" in message
    assert "free" in message
    assert "\n" not in message
    if write != "append_json_line":  # a journal may end in the line that found no room: that is what torn lines are
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", WRITES)
def test_a_disk_too_full_for_a_new_folder_is_said_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    path = tmp_path / "new" / "target"

    def no_room(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "mkdir", no_room)
    with pytest.raises(InputError, match="disk full"):
        WRITES[write](path)


@pytest.mark.parametrize("write", WRITES)
def test_another_fault_of_the_disk_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    fail_at(monkeypatch, ("fsync",), 1, OSError(errno.EIO, "bad sector"))
    with pytest.raises(OSError, match="bad sector") as error:
        WRITES[write](tmp_path / "target")
    assert error.value.errno == errno.EIO


def test_what_a_full_disk_cut_off_can_be_appended_to_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.jsonl"
    append_json_line(path, {"a": 1})
    with open(path, "ab") as file:  # what reached the disk before the room ended
        file.write(b'{"a": 2')
    append_json_line(path, {"a": 3})
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}]
