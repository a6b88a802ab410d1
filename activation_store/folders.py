"""Where a store's files lie: a local folder, or a prefix of an object store behind an fsspec URL (s3://, gs://).

A store asks very little of the place it lies in: files that appear whole or not at all, a file that only one of several
processes can create, and many small reads at once. Names are relative to the folder, with "/" between parts.
"""

import contextlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from activation_store.errors import InputError
from activation_store.files import Payload, full_disk_is_input, remove_leftovers, sync_folder, write_atomic

# One read: file, offset in bytes, and the writable buffer to be filled.
Read = tuple[str, int, memoryview]
_READERS = 4  # threads a local read is split over; each asks the kernel for all its blocks before it takes the first


class Folder(Protocol):
    """A place for files. `str(folder)` is what a user calls it."""

    def beside(self, suffix: str) -> "Folder":
        """Return the folder whose name is this one's with `suffix` at its end."""

    def write(self, name: str, *parts: Payload, sync: bool = True) -> None:
        """Write `parts` one after another as one file that appears whole or not at all, over an old one if there is one.

        `sync=False` puts off what makes the new name durable until `sync(parent)`; object stores know no such thing.
        """

    def sync(self, name: str) -> None:
        """Make the files written with sync=False in the sub-folder `name` durable."""

    def create(self, name: str, data: bytes) -> bool:
        """Create a small file; return False, and change nothing, where it exists already. One of several callers wins."""

    def read(self, name: str) -> bytes:
        """Return a whole file. Raises FileNotFoundError."""

    def read_many(self, reads: Sequence[Read]) -> None:
        """Fill every buffer. Raises FileNotFoundError, or EOFError naming a file that ends too early."""

    def size(self, name: str) -> int | None:
        """Return a file's length in bytes, or None where there is none."""

    def modified(self, name: str) -> float | None:
        """Return when a file was last written, in seconds by the clock of the place, or None where there is none."""

    def names(self, name: str = "") -> list[str]:
        """Return the names of the files directly in the sub-folder `name`, sorted, leaving out half-written ones."""

    def empty(self) -> bool:
        """Say whether nothing at all lies here."""

    def remove(self, name: str) -> None:
        """Delete a file; do nothing where there is none."""

    def remove_all(self) -> None:
        """Delete the folder with everything in it."""

    def remove_leftovers(self) -> None:
        """Delete what killed writers left half written."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder of a file system; shared ones (NFS, Lustre) serve many hosts at once."""

    path: Path

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    def beside(self, suffix: str) -> "LocalFolder":
        """See `Folder`."""
        return LocalFolder(self.path.with_name(self.path.name + suffix))

    def write(self, name: str, *parts: Payload, sync: bool = True) -> None:
        """See `Folder`."""
        write_atomic(self.path / name, *parts, sync=sync)

    def sync(self, name: str) -> None:
        """See `Folder`."""
        sync_folder(self.path / name)

    def create(self, name: str, data: bytes) -> bool:
        """See `Folder`."""
        path = self.path / name
        with full_disk_is_input(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            try:
                os.write(file, data)
            finally:
                os.close(file)
        return True

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        return (self.path / name).read_bytes()

    def read_many(self, reads: Sequence[Read]) -> None:
        """See `Folder`. Reads should come sorted by file and offset, as a disk likes them."""
        if len(reads) < 64:
            self._read_in_turn(reads)
            return
        share = -(-len(reads) // _READERS)
        parts = [reads[start : start + share] for start in range(0, len(reads), share)]
        for _ in self._readers.map(self._read_in_turn, parts):
            pass

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")

    def _read_in_turn(self, reads: Sequence[Read]) -> None:
        with contextlib.ExitStack() as stack:
            opened: list[tuple[int, list[Read]]] = []
            for name, group in groupby(reads, key=itemgetter(0)):
                file = os.open(self.path / name, os.O_RDONLY)
                stack.callback(os.close, file)
                wanted = list(group)
                opened.append((file, wanted))
                if len(opened) > 512:  # stay far from the limit of open files
                    self._fill(opened)
                    stack.close()
                    opened = []
            self._fill(opened)

    @staticmethod
    def _fill(opened: list[tuple[int, list[Read]]]) -> None:
        if hasattr(os, "posix_fadvise"):
            for file, reads in opened:
                for _, offset, buffer in reads:  # all at once: the disk sees a deep queue, though one thread reads
                    os.posix_fadvise(file, offset, len(buffer), os.POSIX_FADV_WILLNEED)
        for file, reads in opened:
            for name, offset, buffer in reads:
                got = os.preadv(file, [buffer], offset)
                while got < len(buffer):
                    more = os.preadv(file, [buffer[got:]], offset + got)
                    if not more:
                        raise EOFError(name)
                    got += more

    def size(self, name: str) -> int | None:
        """See `Folder`."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return (self.path / name).stat().st_size
        return None

    def modified(self, name: str) -> float | None:
        """See `Folder`."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return (self.path / name).stat().st_mtime
        return None

    def names(self, name: str = "") -> list[str]:
        """See `Folder`."""
        try:
            with os.scandir(self.path / name) as entries:
                return sorted(e.name for e in entries if e.is_file() and not (e.name[0] == "." and e.name.endswith(".tmp")))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def empty(self) -> bool:
        """See `Folder`."""
        return not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))

    def remove(self, name: str) -> None:
        """See `Folder`."""
        (self.path / name).unlink(missing_ok=True)

    def remove_all(self) -> None:
        """See `Folder`."""
        shutil.rmtree(self.path, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """See `Folder`."""
        remove_leftovers(self.path)


def folder_at(where: "str | os.PathLike[str] | Folder") -> Folder:
    """Return the folder that a path, a file:// URL or another fsspec URL means. Raises InputError for a bare bucket."""
    if not isinstance(where, str | os.PathLike):
        return where
    text = os.fspath(where)
    if "://" not in text:
        return LocalFolder(Path(text))
    if text.startswith("file://"):
        return LocalFolder(Path(text.removeprefix("file://")))
    text = text.rstrip("/")
    if "/" not in text.partition("://")[2]:
        raise InputError(f"{text}: a whole bucket, which a new store would empty; name a folder in it: {text}/activations")
    from activation_store.objects import ObjectFolder  # which a local folder has no need of

    return ObjectFolder(text)
