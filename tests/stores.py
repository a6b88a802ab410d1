"""What the tests of the store need: small stores of known numbers, in any geometry, and other people's readers."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import torch
import zarr
from numpy.typing import NDArray

from activation_store import ActivationStore, HookStatistics, layout

RESID, MLP = "blocks.0.hook_resid_post", "blocks.0.mlp.hook_post"
NUMPY_DTYPE = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.float32}
DTYPES = list(NUMPY_DTYPE)
EXACT = [dtype for dtype in DTYPES if dtype != "int8"]
NO_STATISTICS = HookStatistics(rows=1, mean=np.zeros(1), mean_norm=1.0, mean_square_norm=1.0, max_norm=1.0)
MEND = "monosem store repair"


@dataclass(frozen=True)
class Made:
    """A store, and what was put in: in the dtype on disk, or (int8) in float32."""

    store: ActivationStore
    tokens: NDArray[np.int32]
    documents: NDArray[np.int32]
    offsets: NDArray[np.int32]
    values: dict[str, NDArray[Any]]


def to_torch(values: NDArray[Any]) -> torch.Tensor:
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def create(path: Path, *arguments: Any, block_bytes: int | None = None, **options: Any) -> ActivationStore:
    """ActivationStore.create with blocks of another length, so that a small store has many of them."""
    with pytest.MonkeyPatch.context() as patch:
        if block_bytes is not None:
            patch.setattr(layout, "BLOCK_BYTES", block_bytes)
        return ActivationStore.create(path, *arguments, **options)


def write_all(store: ActivationStore, values: Mapping[str, NDArray[Any]]) -> None:
    for shard in range(store.shards):
        where = store.shard_sequences(shard)
        rows = slice(where.start * store.context, where.stop * store.context)
        store.write_shard(shard, {hook: to_torch(x[rows]) for hook, x in values.items()})


def make(
    path: Path,
    dtype: str = "float32",
    *,
    sequences: int = 7,
    context: int = 5,
    shard: int = 3,
    widths: Mapping[str, int] | None = None,
    train: int | None = None,
    block_bytes: int | None = None,
    seed: int = 0,
) -> Made:
    """A finished store of random numbers with the awkward ones among them; tokens 0 and 1 are special."""
    widths = {RESID: 3, MLP: 6} if widths is None else widths
    chance = np.random.default_rng(seed)
    tokens = chance.integers(0, 9, (sequences, context), dtype=np.int32)
    documents = np.sort(chance.integers(0, 4, (sequences, context), dtype=np.int32), axis=None).reshape(tokens.shape)
    offsets = chance.integers(-1, 999, (sequences, context), dtype=np.int32)
    awkward = [0.0, -0.0, 1.0, -1.0, 1e-7, 65504.0, -3.140625]
    awkward += [] if dtype == "int8" else [float("inf"), -float("inf")]
    values = {}
    for hook, width in widths.items():
        x = chance.normal(size=(sequences * context, width)).astype(np.float32)
        flat = x.reshape(-1)
        flat[: len(awkward)] = awkward[: len(flat)]
        chance.shuffle(flat)
        values[hook] = x.astype(NUMPY_DTYPE[dtype])
    facts = {"special_token_ids": [0, 1], "train_sequences": sequences if train is None else train}
    store = create(
        path, tokens, documents, widths, offsets=offsets, dtype=dtype, shard_sequences=shard, attributes=facts,
        block_bytes=block_bytes,
    )  # fmt: skip
    write_all(store, values)
    store.finish(dict.fromkeys(widths, NO_STATISTICS))
    return Made(ActivationStore.open(path), tokens, documents, offsets, values)


def numbered(
    path: Path,
    *,
    sequences: int = 53,
    context: int = 7,
    shard: int = 11,
    train: int | None = None,
    dtype: str = "float32",
    block_bytes: int | None = None,
    tokens: NDArray[np.int32] | None = None,
    documents: NDArray[np.int32] | None = None,
    statistics: HookStatistics = NO_STATISTICS,
) -> Made:
    """A store whose column 0 is the row's own number, so that a batch says which rows it is made of; 0 and 1 are special."""
    chance = np.random.default_rng(5)
    tokens = chance.integers(0, 9, (sequences, context), dtype=np.int32) if tokens is None else tokens
    documents = np.zeros_like(tokens) if documents is None else documents
    number = np.arange(sequences * context, dtype=np.float32)
    values = {"h": np.stack([number, -number], 1), "other": np.stack([number] * 3, 1)}
    store = create(
        path, tokens, documents, {"h": 2, "other": 3}, dtype=dtype, shard_sequences=shard, block_bytes=block_bytes,
        attributes={"special_token_ids": [0, 1], "train_sequences": sequences if train is None else train},
    )  # fmt: skip
    write_all(store, values)
    store.finish({"h": statistics, "other": statistics})
    return Made(ActivationStore.open(path), tokens, documents, tokens, values)


def drawable(made: Made, first: int, last: int) -> list[int]:
    """The rows of sequences first..last that may be drawn, one by one."""
    context = made.tokens.shape[1]
    rows = [(i, j) for i in range(first, last) for j in range(context)]
    return [i * context + j for i, j in rows if made.tokens[i, j] not in (0, 1) and made.documents[i, j] >= 0]


def numbers(batches: Any) -> list[list[int]]:
    return [[int(n) for n in batch[:, 0]] for batch in batches]


def joined(batches: Any) -> list[int]:
    return [n for batch in numbers(batches) for n in batch]


@contextlib.contextmanager
def flipped(file: Path, at: int, bit: int = 0) -> Iterator[None]:
    """One bit of a file is another for a while."""
    good = file.read_bytes()
    bad = bytearray(good)
    bad[at] ^= 1 << bit
    file.write_bytes(bad)
    try:
        yield
    finally:
        file.write_bytes(good)


def reading_threads() -> list[threading.Thread]:
    """The threads that batches are being read by."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches-")]


# Other people's readers


def read_by_zarr(path: Path, array: str) -> NDArray[Any]:
    group = zarr.open(path, mode="r")
    return np.asarray(group[array][:])


def read_by_tensorstore(path: Path, array: str) -> NDArray[Any]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / array)}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


READERS: dict[str, Callable[[Path, str], NDArray[Any]]] = {"zarr": read_by_zarr, "tensorstore": read_by_tensorstore}
