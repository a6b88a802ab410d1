"""The activation store: a Zarr v3 group of tokens and, per hook, one (row, d) array; row = token.

Layout (docs/store.md): `tokens` and `documents` are (sequence, context) int32; `<hook>/activations` is (row, d), where
row i is token i of the flattened `tokens`. One uncompressed chunk is one file, payload then crc32c, so a chunk can be
memory-mapped; any Zarr v3 reader opens the group without this code. bfloat16 is stored as its bit pattern in a uint16
array with the attribute dtype = "bfloat16", because zarr-python has no bfloat16 (docs/decisions/0001).
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activation_store.errors import InputError, first_line
from activation_store.files import sync_folder, write_atomic, write_json

SCHEMA = 1
_DISK_DTYPE = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
_TORCH_DTYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
IntRows = Sequence[int] | NDArray[np.integer[Any]] | slice


@dataclass(frozen=True)
class HookStatistics:
    """Moments of one hook's activations over all rows that are not special tokens.

    `mean` is (d,); `mean_norm` = E||x||; `mean_square_norm` = E||x||^2; `max_norm` = max ||x||; `rows` counts them.
    """

    rows: int
    mean: NDArray[np.float64]
    mean_norm: float
    mean_square_norm: float
    max_norm: float


@dataclass(frozen=True)
class _Array:
    """One raw chunked array on disk: (n, width), chunks of `rows` whole rows, each a file of payload + 4-byte crc32c."""

    folder: Path
    shape: tuple[int, int]
    rows: int
    disk_dtype: np.dtype[Any]
    dtype: str

    @classmethod
    def open(cls, folder: Path) -> "_Array":
        meta = _read_metadata(folder / "zarr.json")
        try:
            codecs = [codec["name"] for codec in meta["codecs"]]
            chunk = meta["chunk_grid"]["configuration"]["chunk_shape"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder}: not an array of a store ({first_line(error)}); harvest again") from error
        if codecs != ["bytes", "crc32c"] or chunk[1] != meta["shape"][1]:
            raise InputError(
                f"{folder}: chunks {chunk} with codecs {codecs} are not this store's layout (whole rows, bytes + crc32c); "
                "rewrite the array with ActivationStore.create"
            )
        disk = np.dtype(meta["data_type"])
        return cls(folder, tuple(meta["shape"]), chunk[0], disk, meta["attributes"].get("dtype", disk.name))

    @property
    def chunks(self) -> int:
        return -(-self.shape[0] // self.rows)

    def path(self, chunk: int) -> Path:
        return self.folder / "c" / str(chunk) / "0"

    def write(self, chunk: int, values: NDArray[Any]) -> None:
        """Commit one chunk: `values` is (rows of this chunk, width); the last chunk is padded with zeros on disk."""
        import google_crc32c

        full = values
        if len(values) < self.rows:
            full = np.zeros((self.rows, self.shape[1]), self.disk_dtype)
            full[: len(values)] = values
        payload = np.ascontiguousarray(full, self.disk_dtype).tobytes()  # google_crc32c takes nothing but bytes
        crc = google_crc32c.value(payload)
        write_atomic(self.path(chunk), payload, crc.to_bytes(4, "little"))

    @cached_property
    def _maps(self) -> dict[int, NDArray[Any]]:
        return {}

    def chunk(self, index: int) -> NDArray[Any]:
        """Return chunk `index` as a read-only memory map of shape (rows, width)."""
        if index not in self._maps:
            expected = self.rows * self.shape[1] * self.disk_dtype.itemsize + 4
            path = self.path(index)
            size = path.stat().st_size if path.exists() else 0
            if size != expected:
                raise InputError(f"{path}: {size} bytes, expected {expected}: the chunk is missing or cut off; harvest again")
            self._maps[index] = np.memmap(path, self.disk_dtype, "r", shape=(self.rows, self.shape[1]))
        return self._maps[index]

    def gather(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the given rows, in the order given, as (len(rows), width) in the on-disk dtype."""
        out = np.empty((len(rows), self.shape[1]), self.disk_dtype)
        order = np.argsort(rows, kind="stable")  # visit each chunk once, each in ascending order
        wanted = rows[order]
        chunk_of = wanted // self.rows
        starts: list[int] = np.flatnonzero(np.r_[True, chunk_of[1:] != chunk_of[:-1]]).tolist() if len(rows) else []
        for begin, end in itertools.pairwise([*starts, len(rows)]):
            index = int(chunk_of[begin])
            out[order[begin:end]] = self.chunk(index)[wanted[begin:end] - index * self.rows]
        return out

    def slice(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows start..stop without an index array: whole stretches of each chunk."""
        parts = []
        for index in range(start // self.rows, -(-stop // self.rows)):
            base = index * self.rows
            parts.append(self.chunk(index)[max(start - base, 0) : min(stop - base, self.rows)])
        return np.concatenate(parts) if parts else np.empty((0, self.shape[1]), self.disk_dtype)


def _read_metadata(file: Path) -> dict[str, Any]:
    try:
        meta = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as Zarr metadata ({first_line(error)}); harvest again") from error
    if not isinstance(meta, dict):
        raise InputError(f"{file}: holds no Zarr metadata; harvest again")
    return meta


class ActivationStore:
    """Tokens and, row by row aligned with them, the activations of one or several hooks.

    Open a finished store with `ActivationStore.open(path)`. Attributes: `hooks` (names), `tokens` and `documents`
    ((sequence, context) int32), `attrs` (model, tokenizer, dataset and split facts), `context`, `rows`.
    """

    def __init__(self, path: Path) -> None:
        """Read the metadata under `path`; use `open`, which also refuses an unfinished store."""
        meta_file = path / "zarr.json"
        if not meta_file.exists():
            raise InputError(f"{path}: no activation store there (no zarr.json); run `monosem harvest` first")
        self.path = path
        self.attrs: dict[str, Any] = _read_metadata(meta_file).get("attributes", {})
        if self.attrs.get("schema") != SCHEMA:
            raise InputError(f"{path}: store schema {self.attrs.get('schema')!r}, this version reads {SCHEMA}")
        self.hooks: list[str] = list(self.attrs["hooks"])
        self._tokens = _Array.open(path / "tokens")
        self._documents = _Array.open(path / "documents")
        self._arrays = {hook: _Array.open(path / hook / "activations") for hook in self.hooks}

    @classmethod
    def open(cls, path: str | Path) -> "ActivationStore":
        """Open a finished store. Raises InputError where there is none, or where its harvest has not finished."""
        store = cls(Path(path))
        if not store.attrs.get("complete"):
            raise InputError(f"{path}: the harvest is unfinished; run the same `monosem harvest` again to finish it")
        return store

    @classmethod
    def create(
        cls,
        path: str | Path,
        tokens: NDArray[np.int32],
        documents: NDArray[np.int32],
        hooks: Mapping[str, int],
        *,
        dtype: str = "bfloat16",
        shard_sequences: int = 128,
        attributes: Mapping[str, Any] | None = None,
    ) -> "ActivationStore":
        """Lay out a new store with its tokens written and its activations still missing.

        tokens, documents: (sequence, context) int32, equal shapes. hooks: name -> d. dtype: float32, float16 or bfloat16.
        A shard is `shard_sequences` token rows: one chunk file a hook, the unit of work that `write_shard` commits.
        `attributes` should hold `special_token_ids` and `train_sequences` (rows from there on are held out).
        """
        import zarr
        from zarr.codecs import Crc32cCodec

        path = Path(path)
        if tokens.shape != documents.shape or tokens.ndim != 2 or not tokens.size:
            raise InputError(f"tokens {tokens.shape} and documents {documents.shape} must be equal (sequence, context)")
        if dtype not in _DISK_DTYPE:
            raise InputError(f"harvest.dtype: {dtype!r} given; allowed: {', '.join(_DISK_DTYPE)}")
        if path.exists() and not (path / "zarr.json").exists() and any(path.iterdir()):
            raise InputError(f"{path}: not empty and no store; a new store would delete what is there: name another folder")
        sequences, context = tokens.shape
        shard = min(shard_sequences, sequences)
        group = zarr.create_group(path, overwrite=True, zarr_format=3)
        codec = Crc32cCodec()
        for name in ("tokens", "documents"):
            group.create_array(name, shape=tokens.shape, chunks=(shard, context), dtype="int32", compressors=[codec])
        for hook, width in hooks.items():
            group.create_group(hook).create_array(
                "activations", shape=(sequences * context, width), chunks=(shard * context, width),
                dtype=_DISK_DTYPE[dtype], compressors=[codec], attributes={"dtype": dtype},
            )  # fmt: skip
        facts = {"special_token_ids": [], "train_sequences": sequences, **(attributes or {})}
        group.attrs.update({**facts, "schema": SCHEMA, "hooks": list(hooks), "context": context, "complete": False})
        store = cls(path)
        for array, values in ((store._tokens, tokens), (store._documents, documents)):
            for chunk in range(array.chunks):
                array.write(chunk, values[chunk * shard : (chunk + 1) * shard])
        sync_folder(path)
        return store

    # What is in it

    @property
    def context(self) -> int:
        """Tokens a row of `tokens`."""
        return self._tokens.shape[1]

    @property
    def rows(self) -> int:
        """Activation rows a hook: sequences x context, special tokens included."""
        return self._tokens.shape[0] * self._tokens.shape[1]

    @property
    def train_sequences(self) -> int:
        """Sequences below this index are for training; the rest are held out."""
        return int(self.attrs["train_sequences"])

    def width(self, hook: str) -> int:
        """Return d, the width of a hook's activations."""
        return self._array(hook).shape[1]

    def dtype(self, hook: str) -> str:
        """Return the dtype on disk of a hook's activations."""
        return self._array(hook).dtype

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """Token ids, (sequence, context)."""
        return self._tokens.slice(0, self._tokens.shape[0])

    @cached_property
    def documents(self) -> NDArray[np.int32]:
        """Index of the document each token comes from, (sequence, context); a change marks a document boundary."""
        return self._documents.slice(0, self._documents.shape[0])

    @cached_property
    def special(self) -> NDArray[np.bool_]:
        """Mark special tokens, (sequence, context): stored, and left out when batches are drawn."""
        return np.isin(self.tokens, self.attrs["special_token_ids"])

    def statistics(self, hook: str) -> HookStatistics:
        """Return the moments of `hook` that the harvest computed while writing."""
        self._array(hook)
        facts = dict(self.attrs["statistics"][hook])
        return HookStatistics(mean=np.array(facts.pop("mean")), **facts)

    def _array(self, hook: str) -> _Array:
        if hook not in self._arrays:
            raise InputError(f"hook {hook!r} is not in {self.path}; it holds: {', '.join(self.hooks)}")
        return self._arrays[hook]

    # Reading

    def read(self, hook: str, rows: IntRows) -> Tensor:
        """Return activations of the given rows (slice or integers, any order), (row, d) float32."""
        array = self._array(hook)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(array.shape[0])
            raw = array.slice(start, stop) if step == 1 else array.gather(np.arange(start, stop, step))
        else:
            index = np.asarray(rows)
            if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
                raise InputError(f"rows: {index.dtype} of shape {index.shape} given; give a slice or a list of row numbers")
            index = index.astype(np.int64)
            if len(index) and (index.min() < -array.shape[0] or index.max() >= array.shape[0]):
                raise InputError(f"rows {index.min()}..{index.max()} are outside this store's {array.shape[0]} rows")
            raw = array.gather(np.where(index < 0, index + array.shape[0], index))
        return torch.from_numpy(raw).view(_TORCH_DTYPE[array.dtype]).float()

    def batches(
        self,
        hook: str,
        batch_size: int = 2048,
        seed: int = 0,
        start: int = 0,
        *,
        epochs: int | None = 1,
        split: str = "train",
    ) -> "Batches":
        """Return shuffled batches of `hook`, special tokens out: an iterable of (batch, d) float32 tensors.

        The rows of all epochs form one endless stream, each epoch a fresh permutation that is a pure function of
        (seed, epoch); batch n is rows n*batch_size... of it, whether or not reading started there. `epochs=None` never
        ends; otherwise the last batch may be short. `split` is "train" or "held_out". Memory: 8 bytes a row.
        """
        if split not in ("train", "held_out"):
            raise InputError(f"split: {split!r} given; allowed: train, held_out")
        limits = (("batch_size", batch_size, 1), ("seed", seed, 0), ("start", start, 0), ("epochs", epochs or 0, 0))
        for name, value, least in limits:
            if value < least:
                raise InputError(f"{name}: {value} given; must be at least {least}")
        border = self.train_sequences * self.context
        kept = np.flatnonzero(~self.special.reshape(-1))
        kept = kept[kept < border] if split == "train" else kept[kept >= border]
        if not len(kept):
            raise InputError(f"{self.path}: no row to draw in split {split!r} (all special tokens, or the split is empty)")
        self._array(hook)
        return Batches(self, hook, kept, batch_size, seed, start, epochs)

    # Writing, shard by shard

    @property
    def shards(self) -> int:
        """Units of work: one chunk a hook each."""
        return self._tokens.chunks

    def shard_sequences(self, shard: int) -> slice:
        """Return the sequences of one shard."""
        size = self._tokens.rows
        return slice(shard * size, min((shard + 1) * size, self._tokens.shape[0]))

    def write_shard(self, shard: int, activations: Mapping[str, Tensor]) -> None:
        """Commit one shard, (row, d) a hook on the CPU in the store's dtype. Written aside, fsynced, renamed."""
        for hook, values in activations.items():
            array = self._array(hook)
            if values.dtype != _TORCH_DTYPE[array.dtype]:
                raise TypeError(f"{hook}: {values.dtype} given to a {array.dtype} array")
            span = self.shard_sequences(shard)
            expected = ((span.stop - span.start) * self.context, array.shape[1])
            if tuple(values.shape) != expected:
                raise ValueError(f"{hook}: {tuple(values.shape)} given for shard {shard}, which is {expected}")
            raw = values.contiguous().view(torch.uint16) if array.dtype == "bfloat16" else values.contiguous()
            array.write(shard, raw.numpy())

    def finish(self, statistics: Mapping[str, HookStatistics]) -> None:
        """Mark the store complete and keep the statistics in its attributes."""
        as_json = {h: {**vars(s), "mean": s.mean.tolist()} for h, s in statistics.items()}
        meta = json.loads((self.path / "zarr.json").read_text())
        meta["attributes"].update(statistics=as_json, complete=True)
        write_json(self.path / "zarr.json", meta)
        self.attrs = meta["attributes"]


class Batches:
    """Shuffled (batch, d) batches with exact seek; iterate it, as often as wanted. Made by `ActivationStore.batches`."""

    def __init__(
        self, store: ActivationStore, hook: str, rows: NDArray[np.int64], batch_size: int, seed: int, start: int,
        epochs: int | None,
    ) -> None:  # fmt: skip
        """Draw from `rows` of `hook`; see `ActivationStore.batches`."""
        self.store, self.hook, self.batch_size, self.seed, self.start, self.epochs = (
            store, hook, batch_size, seed, start, epochs,
        )  # fmt: skip
        self._rows = rows

    def __len__(self) -> int:
        """Count the batches from `start` on; an endless stream has no length."""
        if self.epochs is None:
            raise TypeError("an endless stream of batches has no length; pass epochs=1 for one epoch")
        return max(0, -(-self.epochs * len(self._rows) // self.batch_size) - self.start)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the rows of one epoch in the order they are drawn."""
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self._rows)

    def row_numbers(self) -> Iterator[NDArray[np.int64]]:
        """Yield the store rows of each batch, from batch `start` on."""
        total = None if self.epochs is None else self.epochs * len(self._rows)
        position = self.start * self.batch_size
        epoch, order = -1, self._rows
        while total is None or position < total:
            end = position + self.batch_size if total is None else min(position + self.batch_size, total)
            parts = []
            while position < end:
                if epoch != position // len(self._rows):
                    epoch = position // len(self._rows)
                    order = self.order(epoch)
                offset = position - epoch * len(self._rows)
                parts.append(order[offset : offset + end - position])
                position += len(parts[-1])
            yield parts[0] if len(parts) == 1 else np.concatenate(parts)

    def stream(self, start: int) -> Iterator[Tensor]:
        """Yield batches `start`, `start` + 1, ... without end: what a trainer draws, and where it resumes."""
        return iter(
            Batches(self.store, self.hook, self._rows, self.batch_size, self.seed, start, epochs=None)
        )

    def __iter__(self) -> Iterator[Tensor]:
        """Yield (batch, d) float32 tensors."""
        for rows in self.row_numbers():
            yield self.store.read(self.hook, rows)
