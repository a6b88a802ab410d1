"""One array of a store: raw whole-row chunks, one a file, payload then crc32c. Zarr v3 readers see an ordinary array."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.errors import InputError, first_line
from activation_store.folders import Folder, Read, Then


def crc32c(data: Any, value: int = 0) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720) of a contiguous buffer, continuing from `value`."""
    import crc32c as package  # takes any buffer, where zarr's own choice takes `bytes` only, which costs a copy

    # Mode 0 keeps the GIL: giving it up for the few microseconds that a block takes costs more than the sum itself.
    found: int = package.crc32c(data, value, 0 if len(data) < 1 << 20 else 1)
    return found


def bytes_of(values: NDArray[Any]) -> memoryview:
    """Return an array's bytes without copying; a strided one is made contiguous first."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1).data


@dataclass(frozen=True)
class Array:
    """(n, ...) in chunks of `rows` along the first axis: chunk i is the file c/i (c/i/0 when there are two axes)."""

    folder: Folder
    name: str
    shape: tuple[int, ...]
    rows: int
    disk: np.dtype[Any]
    attributes: dict[str, Any]

    @classmethod
    def open(cls, folder: Folder, name: str) -> "Array":
        """Read an array's metadata. Raises InputError for what is no array of a store."""
        meta = read_metadata(folder, f"{name}/zarr.json")
        try:
            codecs = [codec["name"] for codec in meta["codecs"]]
            chunk, shape = meta["chunk_grid"]["configuration"]["chunk_shape"], meta["shape"]
            disk = np.dtype(meta["data_type"]).newbyteorder("<")
            attributes = dict(meta["attributes"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder}/{name}: not an array of a store ({first_line(error)}); harvest again") from error
        if codecs != ["bytes", "crc32c"] or list(chunk[1:]) != list(shape[1:]):
            raise InputError(
                f"{folder}/{name}: chunks {chunk} with codecs {codecs} are not this store's layout (whole rows, bytes + crc32c); "
                "rewrite the array with ActivationStore.create"
            )
        return cls(folder, name, tuple(shape), chunk[0], disk, attributes)

    @property
    def chunks(self) -> int:
        """Count the chunks."""
        return -(-self.shape[0] // self.rows)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.disk.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk file: every chunk is whole on disk, also the last, and ends in its crc32c."""
        return self.rows * self.row_bytes + 4

    def file(self, chunk: int) -> str:
        """Return the name of a chunk's file."""
        return f"{self.name}/c/{chunk}" + "/0" * (len(self.shape) - 1)

    def length(self, chunk: int) -> int:
        """Return how many rows of a chunk are inside the array; the rest of the last chunk is padding."""
        return min(self.rows, self.shape[0] - chunk * self.rows)

    def write(self, chunk: int, values: NDArray[Any]) -> None:
        """Commit one chunk: its rows, padded with zeros on disk where it is the last. Durable after `sync`."""
        if values.shape != (self.length(chunk), *self.shape[1:]) or values.dtype.itemsize != self.disk.itemsize:
            raise ValueError(f"{self.name}: {values.dtype} {values.shape} given for chunk {chunk} of {self.disk} {self.shape}")
        payload = bytes_of(values)
        padding = bytes(self.chunk_bytes - 4 - len(payload))
        checksum = crc32c(padding, crc32c(payload))
        self.folder.write(self.file(chunk), payload, padding, checksum.to_bytes(4, "little"), sync=False)

    def sync(self, chunk: int) -> None:
        """Make a chunk's name durable: its bytes are already."""
        self.folder.sync(self.file(chunk).rpartition("/")[0])

    def present(self, chunk: int) -> bool:
        """Say whether a chunk's file is there at its full length."""
        return self.folder.size(self.file(chunk)) == self.chunk_bytes

    def examine(self, chunk: int) -> tuple[NDArray[Any], str | None]:
        """Read a whole chunk file; return its rows, and what is wrong with them: None where its checksum holds."""
        try:
            data = memoryview(self.folder.read(self.file(chunk)))
        except FileNotFoundError:
            return np.empty((0, *self.shape[1:]), self.disk), "missing"
        if len(data) != self.chunk_bytes:
            return np.empty((0, *self.shape[1:]), self.disk), f"{len(data)} bytes, expected {self.chunk_bytes}"
        whole = np.frombuffer(data[:-4], self.disk).reshape(self.rows, *self.shape[1:])
        holds = crc32c(data[:-4]) == int.from_bytes(data[-4:], "little")
        return whole[: self.length(chunk)], None if holds else "checksum does not match"

    def fault(self, chunk: int) -> str | None:
        """Say what is wrong with a chunk; None where its checksum holds."""
        return self.examine(chunk)[1]

    def chunk(self, index: int) -> NDArray[Any]:
        """Return the rows of one chunk, its checksum verified. Meant for the small arrays; see `read_many` for the rest."""
        rows, fault = self.examine(index)
        if fault:
            raise self.damage(index, fault)
        return rows

    def slice(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows start..stop from verified chunks."""
        parts = []
        for index in range(start // self.rows, -(-stop // self.rows)):
            base = index * self.rows
            parts.append(self.chunk(index)[max(start - base, 0) : min(stop - base, self.rows)])
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self.disk)

    def damage(self, chunk: int, what: str) -> InputError:
        """Return the error for a chunk that cannot be trusted."""
        return InputError(
            f"{self.folder}/{self.file(chunk)}: {what}; `monosem store repair` takes the damaged shards out, "
            "and the same harvest run again fills them in"
        )

    def expect(self, spans: Sequence[tuple[int, int]]) -> None:
        """Say that `length` bytes from row `start` on will be read soon: (start, length), each within one chunk."""
        files = {chunk: self.file(chunk) for chunk in {start // self.rows for start, _ in spans}}
        self.folder.expect([(files[start // self.rows], start % self.rows * self.row_bytes, n) for start, n in spans])

    def read_many(self, spans: Sequence[tuple[int, memoryview]], then: Then) -> None:
        """Fill each buffer with the rows from `start` on: (start, buffer), each within one chunk. `then` may verify it."""
        files = {chunk: self.file(chunk) for chunk in {start // self.rows for start, _ in spans}}
        reads: list[Read] = [(files[start // self.rows], start % self.rows * self.row_bytes, to) for start, to in spans]
        try:
            self.folder.read_many(reads, then)
        except (FileNotFoundError, EOFError):
            for chunk in sorted({start // self.rows for start, _ in spans}):
                size = self.folder.size(self.file(chunk))
                if size != self.chunk_bytes:
                    what = "missing" if size is None else f"{size} bytes, expected {self.chunk_bytes}"
                    raise self.damage(chunk, what) from None
            raise


class Table:
    """A small array held whole, its chunks read (all wanted ones at once) and verified when they are first asked for.

    Small means 4 bytes a token or less. Past `IN_MEMORY` bytes it lies in a nameless temporary file that the kernel pages
    in and out, so that a store of any size can be read in bounded memory.
    """

    IN_MEMORY = 256 << 20

    def __init__(self, array: Array) -> None:
        """Hold `array`; read nothing yet."""
        self.array = array
        self._loaded = np.zeros(array.chunks, bool)
        self._held: list[NDArray[Any]] = []

    @property
    def _values(self) -> NDArray[Any]:
        if not self._held:  # two threads may both come here: the first one's table is everyone's
            self._held.append(new_table(self.array.shape, self.array.disk))
        return self._held[0]

    def load(self, chunks: NDArray[np.int64]) -> NDArray[Any]:
        """Return the whole table, in which (at least) these chunks have been read and verified."""
        array = self.array
        missing = np.unique(chunks[~self._loaded[chunks]])
        for some in np.array_split(missing, -(-len(missing) // 256)) if len(missing) else []:
            buffers = np.empty((len(some), array.chunk_bytes), np.uint8)
            try:
                array.folder.read_many([(array.file(int(c)), 0, b.data) for c, b in zip(some, buffers, strict=True)])
            except (FileNotFoundError, EOFError):
                for chunk in some:
                    array.chunk(int(chunk))  # says which one, and what is wrong with it
                raise
            for chunk, data in zip(some.tolist(), buffers, strict=True):
                if crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
                    raise array.damage(chunk, "checksum does not match")
                start = chunk * array.rows
                rows = data[:-4].view(array.disk).reshape(array.rows, *array.shape[1:])
                self._values[start : start + array.rows] = rows[: array.length(chunk)]
            self._loaded[some] = True
        view = self._values.view()
        view.flags.writeable = False  # what one reader changed, all would see
        return view

    def forget(self, chunk: int) -> None:
        """Read a chunk anew next time."""
        self._loaded[chunk] = False

    def whole(self) -> NDArray[Any]:
        """Return the table with every chunk read."""
        return self.load(np.flatnonzero(~self._loaded))


def new_table(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return zeros, in memory or, where that would be much, in a nameless temporary file."""
    if int(np.prod(shape, dtype=np.int64)) * dtype.itemsize <= Table.IN_MEMORY:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=shape)


def read_metadata(folder: Folder, name: str) -> dict[str, Any]:
    """Read a zarr.json. Raises InputError for one that is missing or no metadata."""
    try:
        meta = json.loads(folder.read(name))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/{name}: cannot be read as Zarr metadata ({first_line(error)}); harvest again") from error
    if not isinstance(meta, dict):
        raise InputError(f"{folder}/{name}: holds no Zarr metadata; harvest again")
    return meta
