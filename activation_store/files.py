"""Files that are either whole or absent: write aside, fsync, rename."""

import contextlib
import errno
import itertools
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from activation_store.errors import InputError

# A sink is one bytes-like object or several, so that a header or a checksum needs no copy of the payload.
Payload = bytes | bytearray | memoryview
HOST = platform.node() or "localhost"
_counter = itertools.count()
_ASIDE = re.compile(r"~(?P<host>[^~]+)~(?P<pid>\d+)-\d+\.tmp$")


def _aside(path: Path) -> Path:
    """Name what becomes `path`: unlike that of any other thread, process or host that writes there."""
    return path.with_name(f".{path.name}~{HOST}~{os.getpid()}-{next(_counter)}.tmp")


def is_running(host: str, pid: int) -> bool:
    """Say whether a process may be alive: one of another host may, one of this host is looked up."""
    if host != HOST:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove_leftovers(folder: Path, older_than: float = 86_400.0) -> None:
    """Delete what killed writers left half written below `folder`: of dead processes here, or `older_than` seconds old."""
    for path in folder.rglob(".*.tmp"):
        writer = _ASIDE.search(path.name)
        with contextlib.suppress(FileNotFoundError):
            abandoned = time.time() - path.stat().st_mtime > older_than
            dead = writer is not None and not is_running(writer["host"], int(writer["pid"]))
            if abandoned or dead:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def full_disk_is_input(path: Path) -> Iterator[None]:
    """Turn "no space left" into one clear InputError that names the file and the folder to free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there = next(folder for folder in path.absolute().parents if folder.exists())
        free = shutil.disk_usage(there).free
        raise InputError(
            f"disk full while writing {path} ({free / 1e6:.0f} MB free): free space there, or point runs_dir elsewhere, "
            "then run the same command again; finished work is kept"
        ) from error


def write_atomic(path: Path, *parts: Payload, sync: bool = True) -> None:
    """Write `parts` one after another to `path`, so that a reader or a crash sees the old file or the new one.

    `sync=False` leaves it to the caller to `sync_folder` once for many files: until then a power cut may undo the rename.
    """
    _write_parts(path, parts, sync)


def _write_parts(path: Path, parts: Iterable[Payload], sync: bool = True) -> None:
    aside = _aside(path)
    with full_disk_is_input(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        if sync:
            sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: it is not JSON, and no reader agrees on it."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_json_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically, holding one at a time: what `read_json_lines` reads."""
    _write_parts(path, ((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode() for line in lines))


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it replaces `path`, on failure it is removed."""
    aside, old = _aside(path), _aside(path)
    with full_disk_is_input(path):
        aside.mkdir(parents=True)
        try:
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():  # moved away whole, and deleted only once the new one has its place
                os.replace(path, old)
            try:
                os.replace(aside, path)
            except BaseException:
                if old.exists():
                    os.replace(old, path)
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        sync_folder(path.parent)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a journal of one JSON object a line; a last line cut off by a crash is left out, any other fault raises."""
    return list(iterate_json_lines(path))


def iterate_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read as `read_json_lines` does, holding one line at a time; a file that is not there has none."""
    if not path.exists():
        return
    with open(path, "rb") as file:  # bytes: the cut may go through a character
        for line in file:
            if line.endswith(b"\n") and line != b"\n":  # what follows the last newline was never committed
                yield json.loads(line)


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON object to a journal, durably, mending a line that a crash cut off before."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with full_disk_is_input(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # cut the torn line, back to the last committed one
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
