"""The store against the disk, and against three other ways to write and read the same Zarr chunks.

In one run, for d = 576 and d = 4096 in bfloat16: a plain sequential write of the bytes (one file, fsync included) and a
plain read of whole chunk files, beside our writing of shards (checksums and fsync included) and one shuffled, verified
epoch of batches, as stored against plain bytes, as float32 against plain chunks made float32; then the same chunks by
zarr-python, by zarr-python with the zarrs codec pipeline, and by tensorstore. Reads are from the disk, not from memory:
files are put out of the page cache first. Ways take turns; medians over rounds.
Then the share of the time that the trainer waits for batches, and the memory that reading a large store takes.

    python benchmarks/store.py [--gigabytes 2] [--rounds 5] [--folder DIR] [--peers] [--memory-gigabytes 12]
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from activation_store import ActivationStore
from activation_store.arrays import Array, crc32c
from activation_store.dtypes import Rows
from activation_store.statistics import HookStatistics

RESULTS = Path(__file__).parent / "results"
CONTEXT, HOOK = 128, "blocks.9.hook_resid_post"
WRITERS = 3  # shards being written at once: while one waits for the disk, the next is summed


def seconds_of(work: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def evict(folder: Path) -> None:
    """Put every file below `folder` out of the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def lay_out(path: Path, width: int, gigabytes: float, dtype: str = "bfloat16") -> ActivationStore:
    item = {"bfloat16": 2, "int8": 1}[dtype]
    shard = round(32e6 / (width * item * CONTEXT))
    sequences = max(2, round(gigabytes * 1e9 / (width * item * CONTEXT * shard))) * shard
    tokens = np.random.default_rng(0).integers(5, 1000, (sequences, CONTEXT)).astype(np.int32)
    tokens[:, 0] = 1
    lengths = np.random.default_rng(1).geometric(1 / 500, sequences * CONTEXT // 100)  # documents of 500 tokens on average
    documents = np.repeat(np.arange(len(lengths)), lengths)[: tokens.size].astype(np.int32).reshape(tokens.shape)
    attributes = {"special_token_ids": [1], "train_sequences": sequences}
    return ActivationStore.create(
        path, tokens, documents, {HOOK: width}, dtype=dtype, shard_sequences=shard, attributes=attributes
    )


def write_ours(path: Path, width: int, gigabytes: float, values: torch.Tensor) -> tuple[float, ActivationStore]:
    store = lay_out(path, width, gigabytes)
    rows = Rows.of(values[: store.shard_rows], "bfloat16")
    with ThreadPoolExecutor(WRITERS) as pool:
        seconds = seconds_of(lambda: list(pool.map(lambda shard: store.write_shard(shard, {HOOK: rows}), range(store.shards))))
    store.finish({HOOK: HookStatistics(rows=1, mean=np.zeros(width), mean_norm=1.0, mean_square_norm=1.0, max_norm=1.0)})
    return seconds, store


def write_plain(path: Path, chunk: memoryview, chunks: int) -> None:
    with open(path, "wb", buffering=0) as file:
        for _ in range(chunks):
            file.write(chunk)
        os.fsync(file.fileno())


def read_plain(array: Array) -> None:
    buffer = bytearray(array.chunk_bytes)
    for chunk in range(array.chunks):
        with open(Path(str(array.folder)) / array.file(chunk), "rb", buffering=0) as file:
            file.readinto(buffer)


def drain(batches: Any) -> None:
    for _ in batches:
        pass


def zarr_array(path: Path, array: Array, *, create: bool) -> Any:
    import zarr
    from zarr.codecs import Crc32cCodec

    if not create:
        return zarr.open_array(path, mode="r")
    chunks = (array.rows, *array.shape[1:])
    return zarr.create_array(path, shape=array.shape, chunks=chunks, dtype="uint16", compressors=[Crc32cCodec()], overwrite=True)


def tensorstore_array(path: Path, array: Array, *, create: bool) -> Any:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    if not create:
        return tensorstore.open(spec, read=True, context=tensorstore.Context({"cache_pool": {}})).result()
    spec["metadata"] = {
        "shape": list(array.shape), "data_type": "uint16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [array.rows, *array.shape[1:]]}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }  # fmt: skip
    return tensorstore.open(spec, create=True, delete_existing=True).result()


def peers(folder: Path, array: Array, values: np.ndarray) -> dict[str, dict[str, float]]:
    """Write every chunk, make it durable, evict, read every chunk in a random order: GB/s of each way, once."""
    import zarr

    order = np.random.default_rng(0).permutation(array.chunks).tolist()
    size = array.shape[0] * array.row_bytes / 1e9
    found = {}
    ways: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
        "zarr": (zarr_array, {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}),
        "zarrs": (zarr_array, {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}),
        "tensorstore": (tensorstore_array, {}),
    }
    for name, (make, config) in ways.items():
        if name == "zarrs":
            try:
                import zarrs  # noqa: F401
            except ImportError:
                continue
        path = folder / name
        with zarr.config.set(config):

            def write(make=make, path=path) -> None:
                out = make(path, array, create=True)
                waiting: list[Any] = []
                for chunk in range(array.chunks):
                    where = slice(chunk * array.rows, (chunk + 1) * array.rows)
                    if hasattr(out, "with_transaction"):
                        waiting.append(out[where].write(values))
                        if len(waiting) >= WRITERS:
                            waiting.pop(0).result()
                    else:
                        out[where] = values
                for left in waiting:
                    left.result()
                for file in path.rglob("*"):  # what our own writing promises for every chunk
                    if file.is_file():
                        with open(file, "rb") as handle:
                            os.fsync(handle.fileno())

            def read(make=make, path=path) -> None:
                source = make(path, array, create=False)
                for chunk in order:
                    got = source[chunk * array.rows : (chunk + 1) * array.rows]
                    _ = got.read().result() if hasattr(got, "read") else got

            writing = seconds_of(write)
            evict(path)
            found[name] = {"write": size / writing, "read": size / seconds_of(read)}
        shutil.rmtree(path)
    return found


def read_as_float32(array: Array) -> None:
    """What it takes to have whole chunks as float32 with nothing but NumPy and torch: no shuffling, no verification."""
    buffer = bytearray(array.chunk_bytes)
    for chunk in range(array.chunks):
        with open(Path(str(array.folder)) / array.file(chunk), "rb", buffering=0) as file:
            file.readinto(buffer)
        torch.frombuffer(buffer, dtype=torch.bfloat16, count=(len(buffer) - 4) // 2).float()


def speeds(root: Path, width: int, gigabytes: float, rounds: int, with_peers: bool) -> dict[str, Any]:
    shard = round(32e6 / (width * 2 * CONTEXT))
    values = torch.randn((shard * CONTEXT, width)).to(torch.bfloat16)
    raw = values.view(torch.uint16).numpy()
    names = ("plain_write", "write", "plain_read", "plain_read_float32", "read_as_stored", "read_float32")
    runs: dict[str, list[float]] = {name: [] for name in names}
    others: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(dir=root) as name:
        folder = Path(name)
        for number in range(rounds):
            shutil.rmtree(folder / "store", ignore_errors=True)
            os.sync()
            plain = (write_plain, folder / "plain", raw.reshape(-1).view(np.uint8).data, round(gigabytes * 1e9 / values.nbytes))
            amount = plain[3] * values.nbytes / 1e9
            if number % 2:  # a disk may slow down after much writing: neither way shall always be the second
                runs["plain_write"].append(amount / seconds_of(*plain))
            seconds, store = write_ours(folder / "store", width, gigabytes, values)
            array = store._arrays[HOOK]
            size = array.shape[0] * array.row_bytes / 1e9
            runs["write"].append(size / seconds)
            if not number % 2:
                os.sync()
                runs["plain_write"].append(amount / seconds_of(*plain))
            (folder / "plain").unlink()
        if with_peers:
            others = [peers(folder, array, raw) for _ in range(rounds)]
        for way, as_stored in (("read_as_stored", True), ("read_float32", False)):
            batches = store.batches(HOOK, 2048, epochs=None, as_stored=as_stored)
            epoch, steps = iter(batches), batches.rows // batches.batch_size
            drain(itertools.islice(epoch, steps))  # the first epoch, from memory: the ring is there from now on
            for _ in range(rounds):
                base = "plain_read" if as_stored else "plain_read_float32"
                evict(folder)
                runs[base].append(size / seconds_of(read_plain if as_stored else read_as_float32, array))
                evict(folder)
                rows = steps * batches.batch_size * array.row_bytes / 1e9
                runs[way].append(rows / seconds_of(drain, itertools.islice(epoch, steps)))
            epoch.close()
        quality = {size: store.batches(HOOK, size).quality() for size in (2048, 4096)}
    result: dict[str, Any] = {"d": width, "gigabytes": round(size, 3), "rounds": rounds, "block_rows": store.block_rows}
    for name, rates in runs.items():
        result[f"{name}_gb_per_second"] = round(statistics.median(rates), 3)
    for what, base in (
        ("write", "plain_write"), ("read_as_stored", "plain_read"), ("read_float32", "plain_read_float32"),
    ):  # fmt: skip
        ratios = [a / b for a, b in zip(runs[what], runs[base], strict=True)]
        result[f"{what}_to_{base}"] = round(statistics.median(ratios), 3)
        result[f"{what}_to_{base}_rounds"] = [round(r, 3) for r in ratios]
    for name, what in itertools.product(others[0] if others else (), ("write", "read")):
        result[f"{name}_{what}_gb_per_second"] = round(statistics.median(run[name][what] for run in others), 3)
    result["shuffle_entropy_share_of_ideal"] = {str(n): round(found.entropy_share, 4) for n, found in quality.items()}
    result["shuffle_adjacency"] = {str(n): [found.adjacency, found.ideal_adjacency] for n, found in quality.items()}
    return result


def waiting(root: Path, gigabytes: float) -> dict[str, Any]:
    """Train for a while, cold, and say which share of the time the loop stood still for want of a batch."""
    from sae import TrainConfig, train

    with tempfile.TemporaryDirectory(dir=root) as name:
        store = write_ours(Path(name) / "store", 576, gigabytes, torch.randn((60_000, 576)).to(torch.bfloat16))[1]
        evict(Path(name))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        steps = 200 if device == "cpu" else 2000
        config = TrainConfig(d_sae=2304, steps=steps, batch_size=2048, compute_dtype="bfloat16", log_every=20, device=device)
        metrics = Path(name) / "metrics.jsonl"
        train(store.batches(HOOK, 2048, device=device), config, metrics=metrics)
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines]
    return {
        "device": device, "d_in": 576, "d_sae": 2304, "tokens_per_second": round(statistics.median(rates)),
        "waiting": round(sum(line["waiting"] for line in lines) / len(lines), 4),
    }  # fmt: skip


def sparse_store(path: Path, gigabytes: float) -> ActivationStore:
    """A store of zeros that takes no disk: chunk files with holes, and the checksums that zeros have."""
    store = lay_out(path, 576, gigabytes)
    (array,) = store._arrays.values()
    tables = {table.array.name: table.array for table in store._tables[HOOK].values()}
    zeros = np.zeros((store.block_rows, 576), np.uint16)
    block, trailer = crc32c(zeros), crc32c(bytes(array.chunk_bytes - 4)).to_bytes(4, "little")
    for chunk in range(array.chunks):
        for name, other in tables.items():
            fill = block if name.endswith("checksums") else 0
            other.write(chunk, np.full((other.length(chunk), *other.shape[1:]), fill, other.disk))
        file = path / array.file(chunk)
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as handle:
            handle.truncate(array.chunk_bytes - 4)
            handle.seek(0, os.SEEK_END)
            handle.write(trailer)
    store.finish({HOOK: HookStatistics(rows=1, mean=np.zeros(576), mean_norm=1.0, mean_square_norm=1.0, max_norm=1.0)})
    return store


READ_ALL = r"""
import re, sys
from activation_store import ActivationStore
def peak():  # not ru_maxrss, which a child inherits from its parent
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
store = ActivationStore.open(sys.argv[1])
before = peak()
rows = sum(len(x) for x in store.batches(store.hooks[0], 2048))
print(rows, before, peak())
"""


def memory(root: Path, gigabytes: float) -> dict[str, Any]:
    """Read one shuffled epoch of a sparse store in a process of its own, and say what that process took at its peak."""
    with tempfile.TemporaryDirectory(dir=root) as name:
        store = sparse_store(Path(name) / "store", gigabytes)
        done = subprocess.run([sys.executable, "-c", READ_ALL, str(store.path)], capture_output=True, text=True, check=True)
        rows, before, peak = map(int, done.stdout.split())
        quality = store.batches(HOOK, 2048).quality()
    return {
        "store_gigabytes": round(rows * 1152 / 1e9, 2), "peak_gib": round(peak / 2**30, 3),
        "above_imports_gib": round((peak - before) / 2**30, 3),
        "shuffle": {k: round(v, 5) for k, v in vars(quality).items()} | {"entropy_share": round(quality.entropy_share, 4)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to be measured")
    parser.add_argument("--peers", action="store_true", help="also zarr, zarrs and tensorstore")
    parser.add_argument("--memory-gigabytes", type=float, default=12.0)
    args = parser.parse_args()
    cases = [speeds(args.folder, width, args.gigabytes, args.rounds, args.peers) for width in (576, 4096)]
    result = {
        "what": "activation store against plain files on the same disk, GB/s of bfloat16 rows, reads cold",
        "cases": cases, "trainer": waiting(args.folder, args.gigabytes), "memory": memory(args.folder, args.memory_gigabytes),
        "machine": machine("numpy", "zarr", "crc32c"),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"store-{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
