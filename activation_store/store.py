"""The activation store: a Zarr v3 group of tokens and, per hook, one (row, d) array; row = token.

Layout (docs/store.md): `tokens`, `documents` and `offsets` are (sequence, context) int32; `<hook>/activations` is (row, d),
where row i is token i of the flattened `tokens`. One uncompressed chunk is one file, payload then crc32c; any Zarr v3
reader opens the group without this code. Beside the activations lie `norms` (row,), `scales` (row,) for int8, and
`checksums`: the crc32c of every block of `block_rows` rows, so that a small read is verified like a whole chunk.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activation_store.arrays import Array, Table, bytes_of, crc32c, new_table, read_metadata
from activation_store.batches import Batches
from activation_store.dtypes import ON_DISK, TORCH, Rows, decode
from activation_store.errors import InputError
from activation_store.folders import Folder, LocalFolder, folder_at
from activation_store.layout import SCHEMA, array_metadata, group_metadata
from activation_store.shuffle import Ints, Room
from activation_store.statistics import HookStatistics

_RUN_BYTES = 1 << 20  # neighbouring blocks are read in one go up to here: they are verified while still in the cache
IntRows = Sequence[int] | NDArray[np.integer[Any]] | slice
Place = str | os.PathLike[str] | Folder


class ActivationStore:
    """Tokens and, row by row aligned with them, the activations of one or several hooks.

    Open a finished store with `ActivationStore.open(path)`, a folder or an fsspec URL. Attributes: `hooks` (names),
    `tokens`, `documents` and `offsets` ((sequence, context) int32), `attrs` (model, tokenizer, dataset and split facts),
    `context`, `rows`, `block_rows`.
    """

    in_background = True
    norms_known = True

    def __init__(self, path: Place) -> None:
        """Read the metadata under `path`; use `open`, which also refuses an unfinished store."""
        self.folder = folder_at(path)
        if self.folder.size("zarr.json") is None:
            raise InputError(f"{self.folder}: no activation store there (no zarr.json); run `monosem harvest` first")
        self.attrs: dict[str, Any] = read_metadata(self.folder, "zarr.json").get("attributes", {})
        if self.attrs.get("schema") != SCHEMA:
            schema = self.attrs.get("schema")
            newer = isinstance(schema, int) and schema > SCHEMA
            mend = "update monosem" if newer else "harvest again, or name a folder that monosem wrote"
            raise InputError(f"{self.folder}: store schema {schema!r}, this version reads {SCHEMA}; {mend}")
        self.hooks: list[str] = list(self.attrs["hooks"])
        self._sequences = {name: Table(Array.open(self.folder, name)) for name in self.attrs["sequence_arrays"]}
        self._arrays: dict[str, Array] = {}
        self._tables: dict[str, dict[str, Table]] = {}
        for hook in self.hooks:
            array = self._arrays[hook] = Array.open(self.folder, f"{hook}/activations")
            beside = ("norms", "checksums", *(("scales",) if array.attributes["dtype"] == "int8" else ()))
            self._tables[hook] = {name: Table(Array.open(self.folder, f"{hook}/{name}")) for name in beside}

    @classmethod
    def open(cls, path: Place) -> "ActivationStore":
        """Open a finished store. Raises InputError where there is none, or where its harvest has not finished."""
        store = cls(path)
        if not store.attrs.get("complete"):
            raise InputError(f"{path}: the harvest is unfinished; run the same `monosem harvest` again to finish it")
        return store

    @classmethod
    def create(
        cls,
        path: Place,
        tokens: NDArray[np.int32],
        documents: NDArray[np.int32],
        hooks: Mapping[str, int],
        *,
        offsets: NDArray[np.int32] | None = None,
        dtype: str = "bfloat16",
        shard_sequences: int = 128,
        attributes: Mapping[str, Any] | None = None,
    ) -> "ActivationStore":
        """Lay out a new store with its tokens written and its activations still missing.

        tokens, documents, offsets: (sequence, context) int32, equal shapes; document -1 marks padding. hooks: name -> d.
        dtype: float32, float16, bfloat16 or int8. A shard is `shard_sequences` token rows: one chunk file an array, the
        unit of work that `write_shard` commits. `attributes` should hold `special_token_ids` and `train_sequences`
        (rows from there on are held out). The group's own metadata comes last: where it stands, the layout is whole.
        """
        folder = folder_at(path)
        given = {"tokens": tokens, "documents": documents, **({"offsets": offsets} if offsets is not None else {})}
        if tokens.ndim != 2 or not tokens.size or any(values.shape != tokens.shape for values in given.values()):
            shapes = ", ".join(f"{name} {values.shape}" for name, values in given.items())
            raise InputError(f"{shapes}: must be equal (sequence, context) and not empty")
        if dtype not in ON_DISK:
            raise InputError(f"harvest.dtype: {dtype!r} given; allowed: {', '.join(ON_DISK)}")
        ours = folder.size("zarr.json") is not None or folder.beside(".journal").names()
        if not ours and not folder.empty():
            raise InputError(f"{folder}: not empty and no store; a new store would delete what is there: name another folder")
        folder.remove_all()
        sequences, context = tokens.shape
        shard = min(shard_sequences, sequences)
        facts = {"special_token_ids": [], "train_sequences": sequences, **(attributes or {})}
        metadata = group_metadata((sequences, context), list(given), hooks, dtype, shard, facts)
        root = metadata.pop("zarr.json")
        for name, data in metadata.items():
            folder.write(name, data)
        for name, values in given.items():
            array = Array.open(folder, name)
            for chunk in range(array.chunks):
                array.write(chunk, np.ascontiguousarray(values[chunk * shard : (chunk + 1) * shard], np.int32))
            array.sync(0)
        folder.write("zarr.json", root)
        return cls(folder)

    # What is in it

    @property
    def path(self) -> Any:
        """The folder as a Path, or the URL of a remote store."""
        return self.folder.path if isinstance(self.folder, LocalFolder) else str(self.folder)

    @property
    def shape(self) -> tuple[int, int]:
        """(sequences, context)."""
        shape = self._sequences["tokens"].array.shape
        return shape[0], shape[1]

    @property
    def context(self) -> int:
        """Tokens a row of `tokens`."""
        return self.shape[1]

    @property
    def rows(self) -> int:
        """Activation rows a hook: sequences x context, special tokens included."""
        return self.shape[0] * self.shape[1]

    @property
    def block_rows(self) -> int:
        """Rows a block: the unit that is read and verified at once."""
        return int(self.attrs["block_rows"])

    @property
    def train_sequences(self) -> int:
        """Sequences below this index are for training; the rest are held out."""
        return int(self.attrs["train_sequences"])

    def width(self, hook: str) -> int:
        """Return d, the width of a hook's activations."""
        return self._array(hook).shape[1]

    def dtype(self, hook: str) -> str:
        """Return the dtype on disk of a hook's activations."""
        return str(self._array(hook).attributes["dtype"])

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Token ids, (sequence, context)."""
        return self._sequences["tokens"].whole()

    @property
    def documents(self) -> NDArray[np.int32]:
        """Number of the source's record each token comes from, (sequence, context); -1 is padding."""
        return self._sequences["documents"].whole()

    @property
    def offsets(self) -> NDArray[np.int32]:
        """Character of its document at which each token starts, (sequence, context); -1 where the tokenizer cannot say."""
        if "offsets" not in self._sequences:
            raise InputError(f"{self.folder}: was written without offsets; pass them to ActivationStore.create")
        return self._sequences["offsets"].whole()

    @cached_property
    def special(self) -> NDArray[np.bool_]:
        """Mark special tokens and padding, (sequence, context): stored, and left out when batches are drawn."""
        marks = new_table(self.shape, np.dtype(bool))
        for shard in range(self.shards):
            where = self.shard_sequences(shard)
            marks[where] = self.special_of(shard)
        return marks

    def special_of(self, shard: int) -> NDArray[np.bool_]:
        """Mark special tokens and padding of one shard, (sequence, context)."""
        tokens, documents = (self.sequence_array(name, shard) for name in ("tokens", "documents"))
        return np.isin(tokens, self.attrs["special_token_ids"]) | (documents < 0)

    def sequence_array(self, name: str, shard: int) -> NDArray[np.int32]:
        """Return one shard of "tokens", "documents" or "offsets", (sequence, context)."""
        return self._sequences[name].load(np.array([shard]))[self.shard_sequences(shard)]

    def norms(self, hook: str, shard: int | None = None) -> NDArray[np.float32]:
        """Return ||x|| of every row, or of one shard's rows, (row,)."""
        self._array(hook)
        table = self._tables[hook]["norms"]
        if shard is None:
            return table.whole()
        where = self.shard_sequences(shard)
        return table.load(np.array([shard]))[where.start * self.context : where.stop * self.context]

    def loud(self, limits: Mapping[str, float], rows: Ints) -> NDArray[np.bool_]:
        """Mark the rows whose norm is above a hook's limit."""
        found: NDArray[np.bool_] = np.zeros(len(rows), bool)
        for hook, limit in limits.items():
            found |= ~(self.norms(hook)[rows] <= limit)
        return found

    def norm_limit(self, hook: str, multiple: float) -> float:
        """Return `multiple` times the median norm of the hook: what is above it counts as an outlier."""
        return multiple * self.statistics(hook).median_norm

    def statistics(self, hook: str) -> HookStatistics:
        """Return the moments of `hook` that the harvest computed while writing."""
        self._array(hook)
        facts = dict(self.attrs["statistics"][hook])
        covariance = None
        if facts.pop("covariance"):
            covariance = Array.open(self.folder, f"{hook}/covariance").chunk(0)
        facts |= {name: np.array(facts[name]) for name in ("mean", "variance", "norm_histogram")}
        return HookStatistics(**facts, covariance=covariance)

    def _array(self, hook: str) -> Array:
        if hook not in self._arrays:
            raise InputError(f"hook {hook!r} is not in {self.folder}; it holds: {', '.join(self.hooks)}")
        return self._arrays[hook]

    # Reading

    def read(self, hook: str, rows: IntRows) -> Tensor:
        """Return activations of the given rows (slice or integers, any order), (row, d) float32, each block verified.

        Raises InputError for rows outside the store and for damaged chunks.
        """
        total = self._array(hook).shape[0]
        if isinstance(rows, slice):
            index = np.arange(*rows.indices(total))
        else:
            index = np.asarray(rows)
            if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
                raise InputError(f"rows: {index.dtype} of shape {index.shape} given; give a slice or a list of row numbers")
            index = index.astype(np.int64)
            if len(index) and (index.min() < -total or index.max() >= total):
                raise InputError(f"rows {index.min()}..{index.max()} are outside this store's {total} rows")
            index = np.where(index < 0, index + total, index)
        out = np.empty((len(index), self.width(hook)), np.float32)
        for start in range(0, len(index), 1 << 16):  # a piece at a time: blocks of scattered rows take far more than the rows
            part = slice(start, start + (1 << 16))
            blocks, of = np.unique(self.block_of(index[part]), return_inverse=True)
            raw = np.empty((len(blocks) * self.block_rows, out.shape[1]), ON_DISK[self.dtype(hook)])
            scales = np.empty(len(raw), np.float32) if self.dtype(hook) == "int8" else None
            self.fill(blocks, {hook: (raw, scales)})
            at = of * self.block_rows + index[part] - self.block_start(blocks)[of]
            decode(raw[at], self.dtype(hook), scales[at] if scales is not None else None, out[part])
        return torch.from_numpy(out)

    @property
    def shard_rows(self) -> int:
        """Rows of a full shard."""
        return self._sequences["tokens"].array.rows * self.context

    @property
    def shard_blocks(self) -> int:
        """Blocks a shard is cut into; its last one, and blocks past the store's end, may hold fewer rows or none."""
        return -(-self.shard_rows // self.block_rows)

    def block_of(self, rows: Ints) -> Ints:
        """Return the block that each row is in: blocks start anew with each shard."""
        return rows // self.shard_rows * self.shard_blocks + rows % self.shard_rows // self.block_rows

    def block_start(self, blocks: Ints) -> Ints:
        """Return the first row of each block."""
        return blocks // self.shard_blocks * self.shard_rows + blocks % self.shard_blocks * self.block_rows

    def fill(self, blocks: Ints, into: Mapping[str, Room]) -> None:
        """Fill, for each hook, raw (len(blocks) * block_rows, d) with whole blocks, ascending, as they lie on disk.

        An int8 hook's scales (len(blocks) * block_rows,) too. Every block is held against its checksum. Rows past the end
        of a short block are left as they were.
        """
        for hook, (raw, scales) in into.items():
            self._fill(hook, blocks, raw, scales)

    def expect(self, blocks: Ints, hooks: Sequence[str]) -> None:
        """Say that these blocks of these hooks will be read soon: the disk may begin."""
        for hook in hooks:
            starts, _, first, rows = self._runs(hook, blocks)
            step = self._array(hook).row_bytes
            self._array(hook).expect([(int(starts[a]), n * step) for a, n in zip(first, rows, strict=True) if n])

    def _runs(self, hook: str, blocks: Ints) -> tuple[Ints, Ints, list[int], list[int]]:
        """Return the first row and the rows of each block; and of each run of neighbours its first block and its rows.

        Neighbours on disk are neighbours in memory too: one read fetches a run of them.
        """
        starts = self.block_start(blocks)
        ends = np.minimum((starts // self.shard_rows + 1) * self.shard_rows, self._array(hook).shape[0])
        counts: Ints = np.clip(ends - starts, 0, self.block_rows)
        share = max(1, _RUN_BYTES // (self.block_rows * self._array(hook).row_bytes))
        joined = (np.diff(blocks) == 1) & (blocks[1:] % self.shard_blocks != 0) & (np.arange(1, len(blocks)) % share != 0)
        first = np.flatnonzero(np.r_[True, ~joined][: len(blocks)])
        filled = np.r_[0, np.cumsum(counts)]
        rows = filled[np.r_[first[1:], len(blocks)]] - filled[first]
        return starts, counts, first.tolist(), rows.tolist()

    def _fill(self, hook: str, blocks: Ints, raw: NDArray[Any], scales: NDArray[np.float32] | None) -> None:
        array, size = self._array(hook), self.block_rows
        starts, counts, first, rows = self._runs(hook, blocks)
        shards = np.unique(blocks // self.shard_blocks)
        checks = self._tables[hook]["checksums"].load(shards)[blocks].tolist()
        data, step = bytes_of(raw), array.row_bytes
        runs = [run for run in zip(first, [*first[1:], len(blocks)], rows, strict=True) if run[2]]
        lengths, begins = counts.tolist(), starts.tolist()

        def verify(number: int) -> None:
            for k in range(*runs[number][:2]):
                start = k * size * step
                if lengths[k] and crc32c(data[start : start + lengths[k] * step]) != checks[k]:
                    chunk = begins[k] // self.shard_rows
                    raise array.damage(chunk, f"one of the {lengths[k]} rows from {begins[k]} on was changed")

        spans = [(begins[a], data[a * size * step : (a * size + n) * step]) for a, _, n in runs]
        array.read_many(spans, verify)
        if scales is not None:
            at = starts[:, None] + np.arange(size)
            table = self._tables[hook]["scales"].load(shards)
            scales[:] = table[np.minimum(at, array.shape[0] - 1)].reshape(-1)

    def batches(
        self,
        hook: str | Sequence[str],
        batch_size: int = 2048,
        seed: int = 0,
        start: int = 0,
        *,
        epochs: int | None = 1,
        split: str = "train",
        memory_mb: float = 1024,
        max_norm_multiple: float | None = None,
        device: torch.device | str | None = None,
        as_stored: bool = False,
    ) -> Batches:
        """Return shuffled batches of `hook`, special tokens and padding out: an iterable of (batch, d) float32 tensors.

        With several hooks each item is a tuple of such tensors, row by row of the same tokens. The rows of all epochs form
        one endless stream, each epoch a permutation that is a pure function of (seed, epoch), given the store, the hooks
        and `memory_mb`; batch n is rows n*batch_size... of it, whether or not reading started there. `epochs=None` never
        ends; otherwise the last batch may be short. `split` is "train" or "held_out".

        memory_mb bounds what is held for mixing (docs/store.md, "Shuffling"; `Batches.quality` measures it).
        max_norm_multiple leaves out rows whose norm is above that multiple of the hook's median norm (attention sinks).
        Reading runs ahead in the background; `device` says where batches shall be (CUDA: by pinned, asynchronous copies).
        as_stored hands rows out in the dtype on disk instead of float32 (not int8): half the memory traffic for bfloat16.
        """
        hooks = (hook,) if isinstance(hook, str) else tuple(hook)
        for name in hooks:
            self._array(name)
        return Batches(
            self, hooks, isinstance(hook, str), batch_size=batch_size, seed=seed, start=start, epochs=epochs, split=split,
            memory_mb=memory_mb, max_norm_multiple=max_norm_multiple, device=device, as_stored=as_stored,
        )  # fmt: skip

    # Writing, shard by shard

    @property
    def shards(self) -> int:
        """Units of work: one chunk an array each."""
        return self._sequences["tokens"].array.chunks

    def shard_sequences(self, shard: int) -> slice:
        """Return the sequences of one shard."""
        size = self._sequences["tokens"].array.rows
        return slice(shard * size, min((shard + 1) * size, self.shape[0]))

    def shard_arrays(self) -> list[Array]:
        """Return the arrays that `write_shard` writes a chunk of."""
        beside = [table.array for tables in self._tables.values() for table in tables.values()]
        return [*self._arrays.values(), *beside]

    def sequence_arrays(self) -> list[Array]:
        """Return the arrays that `create` writes: tokens, documents, offsets."""
        return [table.array for table in self._sequences.values()]

    def write_shard(self, shard: int, activations: Mapping[str, Tensor | Rows]) -> None:
        """Commit one shard: (row, d) a hook, in the store's dtype (int8: floats, or encoded `Rows`). Durable on return."""
        span = self.shard_sequences(shard)
        for hook, given in activations.items():
            array, dtype = self._array(hook), self.dtype(hook)
            if isinstance(given, Tensor) and given.dtype != TORCH[dtype] and not (dtype == "int8" and given.is_floating_point()):
                raise TypeError(f"{hook}: {given.dtype} given to a {dtype} array")
            shape = given.shape if isinstance(given, Tensor) else given.raw.shape
            expected = ((span.stop - span.start) * self.context, array.shape[1])
            if tuple(shape) != expected:
                raise ValueError(f"{hook}: {tuple(shape)} given for shard {shard}, which is {expected}")
            rows = Rows.of(given, dtype) if isinstance(given, Tensor) else given
            raw = rows.raw.contiguous()
            values = (raw.view(torch.uint16) if dtype == "bfloat16" else raw).numpy()
            beside = {"norms": rows.norms.numpy(), "checksums": self.block_checksums(values)}
            if rows.scales is not None:
                beside["scales"] = rows.scales.numpy()
            array.write(shard, values)
            for name, table in self._tables[hook].items():
                table.array.write(shard, beside[name])
            for written in (array, *(table.array for table in self._tables[hook].values())):
                written.sync(shard)
        self.forget(shard)

    def checksums(self, hook: str, shard: int) -> NDArray[np.uint32]:
        """Return the crc32c written for each block of a shard, (block,)."""
        table = self._tables[hook]["checksums"].load(np.array([shard]))
        return table[shard * self.shard_blocks : (shard + 1) * self.shard_blocks]

    def block_checksums(self, values: NDArray[Any]) -> NDArray[np.uint32]:
        """Return the crc32c of each block of a shard's rows as they lie on disk, (block,)."""
        data = bytes_of(values)
        step = self.block_rows * values.shape[1] * values.itemsize
        found = np.zeros(self.shard_blocks, np.uint32)
        for block, start in enumerate(range(0, len(data), step)):
            found[block] = crc32c(data[start : start + step])
        return found

    def finish(self, statistics: Mapping[str, HookStatistics]) -> None:
        """Mark the store complete and keep the statistics: covariances as arrays, the rest in its attributes."""
        as_json = {}
        for hook, found in statistics.items():
            facts = dict(vars(found))
            if found.covariance is not None:
                side = found.covariance.shape[0]
                self.folder.write(f"{hook}/covariance/zarr.json", array_metadata((side, side), "float32"))
                array = Array.open(self.folder, f"{hook}/covariance")
                array.write(0, found.covariance)
                array.sync(0)
            facts["covariance"] = found.covariance is not None
            as_json[hook] = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in facts.items()}
        self.change_attributes(statistics=as_json, complete=True)

    def forget(self, shard: int) -> None:
        """Read a shard's small arrays anew next time: its files are about to change."""
        for table in (table for tables in self._tables.values() for table in tables.values()):
            table.forget(shard)

    def change_attributes(self, **facts: Any) -> None:
        """Rewrite the group's attributes, atomically."""
        meta = read_metadata(self.folder, "zarr.json")
        meta["attributes"].update(facts)
        text = json.dumps(meta, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        self.folder.write("zarr.json", text.encode())
        self.attrs = meta["attributes"]

