"""The metadata of a store: every zarr.json, written by zarr itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from activation_store.dtypes import ON_DISK

SCHEMA = 2
BLOCK_BYTES = 64 << 10
"""A block is at least this long in the widest hook: small enough to mix well, long enough for a disk to read at speed."""


def group_metadata(
    shape: tuple[int, int], sequence_arrays: Sequence[str], hooks: Mapping[str, int], dtype: str, shard_sequences: int,
    attributes: Mapping[str, Any],
) -> dict[str, bytes]:  # fmt: skip
    """Return every zarr.json of a store, by file name.

    shape: (sequences, context). hooks: name -> d. A shard, one chunk of each array, is `shard_sequences` token rows.
    """
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.core.buffer import Buffer
    from zarr.storage import MemoryStore

    sequences, context = shape
    rows, shard_rows = sequences * context, shard_sequences * context
    widest = max(hooks.values(), default=1) * ON_DISK[dtype].itemsize
    block_rows = 1 << (-(-BLOCK_BYTES // widest) - 1).bit_length()  # a power of two, so that blocks begin on disk pages
    shards, blocks = -(-sequences // shard_sequences), -(-shard_rows // block_rows)
    facts = {
        **attributes, "schema": SCHEMA, "complete": False, "hooks": list(hooks), "context": context,
        "sequence_arrays": list(sequence_arrays), "block_rows": block_rows,
    }  # fmt: skip
    files: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=facts)
    codecs = [Crc32cCodec()]
    for name in sequence_arrays:
        group.create_array(name, shape=shape, chunks=(shard_sequences, context), dtype="int32", compressors=codecs)
    for hook, width in hooks.items():
        inner = group.create_group(hook)
        inner.create_array(
            "activations", shape=(rows, width), chunks=(shard_rows, width), dtype=ON_DISK[dtype].name, compressors=codecs,
            attributes={"dtype": dtype},
        )  # fmt: skip
        for name in ("norms", *(("scales",) if dtype == "int8" else ())):
            inner.create_array(name, shape=(rows,), chunks=(shard_rows,), dtype="float32", compressors=codecs)
        inner.create_array("checksums", shape=(shards * blocks,), chunks=(blocks,), dtype="uint32", compressors=codecs)
    return {name: value.to_bytes() for name, value in files.items()}


def array_metadata(shape: tuple[int, ...], dtype: str) -> bytes:
    """Return the zarr.json of one more array, of a single chunk."""
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.core.buffer import Buffer
    from zarr.storage import MemoryStore

    files: dict[str, Buffer] = {}
    zarr.create_array(MemoryStore(files), name="a", shape=shape, chunks=shape, dtype=dtype, compressors=[Crc32cCodec()])
    return files["a/zarr.json"].to_bytes()
