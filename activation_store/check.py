"""Look after a store: what is in it, whether every byte is what was written, and what to do when one is not."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from activation_store.arrays import Array
from activation_store.errors import InputError
from activation_store.harvest import done_shards
from activation_store.progress import Progress
from activation_store.store import ActivationStore, Place

_THREADS = 4


@dataclass(frozen=True)
class Fault:
    """One chunk that cannot be trusted: its array, its number and what is wrong with it."""

    array: str
    chunk: int
    what: str

    def __str__(self) -> str:
        """Return it as a line."""
        return f"{self.array} chunk {self.chunk}: {self.what}"


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: `faults`, and `chunks` and `bytes` read. Of an unfinished store, shards not yet done are no faults."""

    faults: list[Fault]
    chunks: int
    bytes: int
    shards: int
    shards_done: int


def verify(path: Place, progress: Progress = lambda done, total: None) -> Verdict:
    """Read every chunk and hold it against its checksum, and every block of rows against the list of block checksums.

    The two do not come from the same file, so that chunks swapped with one another are found as well. `progress` counts
    chunks. Raises InputError where there is no store to read.
    """
    store = ActivationStore(path)
    done = done_shards(store, store.folder.beside(".journal"))
    missing: set[tuple[str, int]] = set()
    if not store.attrs["complete"]:  # then what is missing is still to come; otherwise each chunk must be there
        missing = {(a.name, chunk) for a in store.sequence_arrays() for chunk in range(a.chunks) if not a.present(chunk)}
        done -= {chunk for _, chunk in missing}
    work = [(a, chunk) for a in store.sequence_arrays() for chunk in range(a.chunks) if (a.name, chunk) not in missing]
    work += [(array, chunk) for array in store.shard_arrays() for chunk in range(array.chunks) if chunk in done]
    if store.attrs["complete"]:  # then each chunk must be there, whatever its size
        work += [(a, 0) for hook in store.hooks if (a := _covariance(store, hook)) is not None]
    faults = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, fault in enumerate(pool.map(lambda item: _fault(store, *item), work), 1):
            if fault is not None:
                faults.append(fault)
            progress(number, len(work))
    size = sum(array.chunk_bytes for array, _ in work)
    return Verdict(faults, len(work), size, store.shards, len(done))


def _fault(store: ActivationStore, array: Array, chunk: int) -> Fault | None:
    rows, what = array.examine(chunk)
    hook, _, kind = array.name.rpartition("/")
    if what is None and kind == "activations":
        try:  # not through the store, whose tables are for one thread
            expected = Array.open(store.folder, f"{hook}/checksums").chunk(chunk)
        except InputError:
            return None  # reported with the checksums themselves
        found = store.block_checksums(rows)
        if not np.array_equal(found, expected):
            what = f"blocks {np.flatnonzero(found != expected).tolist()[:8]} are not those written here"
    return None if what is None else Fault(array.name, chunk, what)


def _covariance(store: ActivationStore, hook: str) -> Array | None:
    return Array.open(store.folder, f"{hook}/covariance") if store.attrs["statistics"][hook]["covariance"] else None


def repair(path: Place, progress: Progress = lambda done, total: None) -> list[Fault]:
    """Take damaged chunks out and mark the store unfinished, so that the same harvest fills in just those.

    Returns what was taken out; nothing is changed where nothing is wrong.
    """
    store = ActivationStore(path)
    faults = verify(path, progress).faults
    if any(fault.array.endswith("/covariance") for fault in faults):
        raise InputError(f"{store.folder}: a covariance is damaged, which only a new harvest can make; delete the store")
    for fault in faults:
        array = Array.open(store.folder, fault.array)
        store.folder.remove(array.file(fault.chunk))
    if faults:
        store.change_attributes(complete=False)
    return faults


def info(path: Place, quality: bool = True) -> dict[str, Any]:
    """Return what a store holds: facts by name, and those of each hook under the name of the hook.

    `quality` measures its shuffle too, which reads tokens but no activations.
    """
    store = ActivationStore(path)
    sequences, context = store.shape
    journal = store.folder.beside(".journal")
    done = done_shards(store, journal)
    size = sum(array.chunk_bytes * array.chunks for array in [*store.sequence_arrays(), *store.shard_arrays()])
    facts: dict[str, Any] = {
        "path": str(store.folder), "schema": store.attrs["schema"], "complete": store.attrs["complete"],
        "model": store.attrs.get("model"), "model_revision": store.attrs.get("model_revision"),
        "text": store.attrs.get("data", {}).get("source"), "sequences": sequences, "context": context, "rows": store.rows,
        "train_sequences": store.train_sequences, "held_out_sequences": sequences - store.train_sequences,
        "shards": store.shards, "shards_done": len(done), "bytes_when_whole": size, "block_rows": store.block_rows,
        **{f"text_{name}": count for name, count in store.attrs.get("text_counts", {}).items()},
    }  # fmt: skip
    facts["claims"] = sum(name.endswith(".claim") for name in journal.names())
    for hook in store.hooks:
        facts[hook] = {"width": store.width(hook), "dtype": store.dtype(hook)}
        if "statistics" in store.attrs:
            found = store.statistics(hook)
            facts[hook] |= {name: getattr(found, name) for name in ("rows", "mean_norm", "median_norm", "max_norm")}
    if quality and store.attrs["complete"]:
        batches = store.batches(store.hooks[0])
        facts |= {f"left_out_{name}": count for name, count in batches.left_out.items()}
        measured = batches.quality()
        facts |= {f"shuffle_{name}": value for name, value in vars(measured).items()}
        facts["shuffle_entropy_share_of_ideal"] = measured.entropy_share
    return facts
