"""Where a store's files lie: a local folder, or a prefix of an object store behind an fsspec URL (s3://, gs://).

A store asks very little of the place it lies in: files that appear whole or not at all, a file that only one of several
processes can create, and many small reads at once. Names are relative to the folder, with "/" between parts.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from activation_store.errors import InputError
from activation_store.files import Payload, full_disk_is_input, remove_leftovers, sync_folder, write_atomic

# One read: file, offset in bytes, and the writable buffer to be filled.
Read = tuple[str, int, memoryview]
# A stretch of a file: its name, offset and length in bytes.
Stretch = tuple[str, int, int]


Then = Callable[[int], None]


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

    def expect(self, places: Sequence[Stretch]) -> None:
        """Say what will be read soon, where that helps; return without waiting for it to arrive."""

    def read_many(self, reads: Sequence[Read], then: Then = lambda number: None) -> None:
        """Fill every buffer, and call `then` with the number of each read once it is there, while it is in the cache.

        Raises FileNotFoundError, or EOFError naming a file that ends too early, or what `then` raises.
        """

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


def _fill(name: str, file: int, offset: int, buffer: memoryview) -> None:
    got = 0
    while got < len(buffer):
        more = os.preadv(file, [buffer[got:]], offset + got)
        if not more:
            raise EOFError(name)
        got += more


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

    def expect(self, places: Sequence[Stretch]) -> None:
        """See `Folder`. The kernel fetches all of it into its page cache: a deep queue at the disk, though one thread asks."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name, group in groupby(places, key=itemgetter(0)):
            with contextlib.suppress(OSError), open(self.path / name, "rb", buffering=0) as file:  # reading says what is wrong
                for _, offset, length in group:
                    os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def read_many(self, reads: Sequence[Read], then: Then = lambda number: None) -> None:
        """See `Folder`. Reads should come sorted by file and offset, as a disk likes them."""
        for name, group in groupby(enumerate(reads), key=lambda item: item[1][0]):
            with open(self.path / name, "rb", buffering=0) as file:
                for number, (_, offset, buffer) in group:
                    _fill(name, file.fileno(), offset, buffer)
                    then(number)

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
