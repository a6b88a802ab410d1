"""Harvest: token rows -> activations on disk, shard by shard, through a forward pass that stops at the last hook.

Any number of processes may run the same harvest at once, with nothing between them but the file system: each takes
whatever shard is neither done nor claimed, and all return when the store is whole.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activation_store.arrays import read_metadata
from activation_store.claims import Claims
from activation_store.config import DataConfig, HarvestConfig
from activation_store.dtypes import ON_DISK, TORCH, Rows, bytes_a_row
from activation_store.errors import InputError
from activation_store.folders import Folder, folder_at
from activation_store.hooks import HookSite, capture, locate_hooks
from activation_store.layout import SCHEMA
from activation_store.progress import Progress
from activation_store.statistics import Fold, HookStatistics, Sums, from_bytes, to_bytes
from activation_store.store import ActivationStore, Place
from activation_store.subject import Subject
from activation_store.text import TokenRows, token_rows

_POLL = 1.0  # seconds between looks at what other processes have done
_OURS = "layout.begun"  # in the journal: what lies in the folder without a zarr.json is a layout that was cut short


def hook_widths(model: torch.nn.Module, sites: Mapping[str, HookSite], device: torch.device | str) -> dict[str, int]:
    """Return d of each hook from a forward pass over two tokens (on "meta": without weights)."""
    seen = capture(model, dict(sites), torch.zeros((2, 3), dtype=torch.long, device=device))
    for name in sites:
        if seen[name].shape[:2] != (2, 3):
            raise InputError(f"hook {name!r} has shape {tuple(seen[name].shape)} for 2 sequences of 3 tokens: no row a token")
    return {name: int(seen[name].numel() // 6) for name in sites}  # in the order asked, not the order passed


def disk_bytes(widths: Mapping[str, int], config: HarvestConfig, rows: int) -> int:
    """Return what `rows` rows take on disk: activations, norms and scales, and tokens, documents and offsets."""
    return rows * (sum(bytes_a_row(width, config.dtype) for width in widths.values()) + 12)


def harvest(
    subject: Subject,
    data: DataConfig,
    config: HarvestConfig,
    path: Place,
    *,
    seed: int = 0,
    text_progress: Progress = lambda done, total: None,
    progress: Progress = lambda done, total: None,
) -> ActivationStore:
    """Write the activations of `config.hooks` on the text of `data` to a new store at `path`, or finish one begun there.

    Every hook name is resolved before the first forward pass. A shard once written is never redone: after a kill at any
    moment the same call ends in the same bytes, given the same device and thread count. Several processes may make the
    same call at once, on as many hosts as share the folder or the bucket. `progress` counts tokens, those of other
    processes too. Returns the finished store. Raises InputError for hooks, text or disk that cannot serve.
    """
    folder = folder_at(path)
    sites = locate_hooks(subject.model, config.hooks)
    journal = folder.beside(".journal")  # claims, and the sums of each shard: beside the group, which stays pure Zarr
    settings = settings_of(subject, data, config, seed)
    claims = Claims(journal)
    try:
        with claims:
            store = _layout(folder, settings)
            while store is None:
                if claims.take("layout"):
                    store = _layout(folder, settings)
                    if store is None:
                        store = lay_out(folder, subject, data, config, sites, settings, seed, text_progress)
                    claims.release("layout")
                else:
                    time.sleep(_POLL)
                    store = _layout(folder, settings)
            if not store.attrs["complete"]:
                _restore_tokens(store, subject, data, config, seed, text_progress)
                _fill(store, journal, claims, subject, config, sites, progress)
            while not (store := ActivationStore(folder)).attrs["complete"]:
                if not claims.take("finish"):
                    time.sleep(_POLL)
                elif not _finish(store, journal):
                    claims.release("finish")
                    _fill(store, journal, claims, subject, config, sites, progress)
    finally:
        if not _begun(folder) and not claims.others():  # the last one out
            journal.remove_all()
    progress(store.rows, store.rows)
    return store


def _begun(folder: Folder) -> bool:
    """Say whether a store is being laid out or filled, so that its journal is needed."""
    if folder.size("zarr.json") is None:
        return folder.beside(".journal").size(_OURS) is not None
    return not read_metadata(folder, "zarr.json").get("attributes", {}).get("complete")


def settings_of(subject: Subject, data: DataConfig, config: HarvestConfig, seed: int) -> Any:
    """Return what decides a store's bytes, as JSON would give it back: two harvests with equal settings are the same."""
    sections = {
        "data": data.model_dump(exclude={"workers"}), "harvest": config.model_dump(exclude={"disk_budget_gb"}),
        "model": subject.facts(), "run": {"seed": seed},
    }  # fmt: skip
    return json.loads(json.dumps(sections))


def _layout(folder: Folder, settings: Any) -> ActivationStore | None:
    """Return the store if it is laid out; one of an older version counts as not there, and is replaced.

    Raises InputError for one made with other settings, and for what cannot be read: nothing is deleted on a suspicion.
    """
    if folder.size("zarr.json") is None:
        return None
    schema = read_metadata(folder, "zarr.json").get("attributes", {}).get("schema")
    if isinstance(schema, int) and schema < SCHEMA:
        return None
    store = ActivationStore(folder)
    theirs = store.attrs.get("settings")
    if theirs == settings:
        return store
    changed = differences(theirs, settings)
    if store.attrs["complete"]:
        raise InputError(f"{folder}: holds another harvest ({changed}); name another folder, or delete it")
    raise InputError(f"{folder}: begun with other settings ({changed}); finish it with those, or name another folder")


def differences(theirs: Any, ours: Any) -> str:
    """Return what differs between the settings of two harvests, as `section.key theirs -> ours`."""
    if not isinstance(theirs, dict):
        return "of another origin"
    flat = [{f"{section}.{key}": v for section, values in x.items() for key, v in values.items()} for x in (theirs, ours)]
    pairs = {key: (flat[0].get(key), flat[1].get(key)) for key in dict.fromkeys([*flat[0], *flat[1]])}
    return "; ".join(f"{key} {before!r} -> {now!r}" for key, (before, now) in pairs.items() if before != now)


def lay_out(
    folder: Folder, subject: Subject, data: DataConfig, config: HarvestConfig, sites: dict[str, HookSite], settings: Any,
    seed: int, progress: Progress, whole: bool = False,
) -> ActivationStore:  # fmt: skip
    """Tokenise the text and write everything of a store but its activations: of the whole text, or of a streamed run's sample."""
    journal = folder.beside(".journal")
    ours = folder.size("zarr.json") is not None or journal.size(_OURS) is not None
    if not ours and not folder.empty():
        raise InputError(f"{folder}: not empty and no store; a new store would delete what is there: name another folder")
    widths = hook_widths(subject.model, sites, subject.device)  # first: a hook that cannot serve costs no tokenising
    rows = token_rows(data, subject.tokenizer, seed, progress)
    if config.stream and not whole:
        rows = _sample(rows, config.stored_tokens // data.context)
    row_bytes = max(widths.values()) * ON_DISK[config.dtype].itemsize
    sequences = round(config.shard_mb * 1e6 / (row_bytes * data.context * config.batch_size)) * config.batch_size
    for name in journal.names():  # sums of a store that was here before
        if name.endswith(".npz"):
            journal.remove(name)
    journal.write(_OURS, b"")
    return ActivationStore.create(
        folder, rows.tokens, rows.documents, widths, offsets=rows.offsets, dtype=config.dtype,
        shard_sequences=max(sequences, config.batch_size),
        attributes={
            **subject.facts(),
            "data": rows.facts,
            "text_counts": rows.counts,
            "train_sequences": rows.train_sequences,
            "prepend_bos": data.prepend_bos,
            "seed": seed,
            "settings": settings,
        },
    )  # fmt: skip


def _sample(rows: TokenRows, sequences: int) -> TokenRows:
    """Return the first `sequences` rows of the training text, and as many held-out ones."""
    train = max(1, min(sequences, rows.train_sequences))
    held_out = slice(rows.train_sequences, rows.train_sequences + max(1, sequences))
    tokens, documents, offsets = (np.concatenate([x[:train], x[held_out]]) for x in (rows.tokens, rows.documents, rows.offsets))
    return replace(rows, tokens=tokens, documents=documents, offsets=offsets, train_sequences=train)


def _restore_tokens(
    store: ActivationStore, subject: Subject, data: DataConfig, config: HarvestConfig, seed: int, progress: Progress
) -> None:
    """Write token chunks that `monosem store repair` took out again, out of the same text."""
    missing = [(a, chunk) for a in store.sequence_arrays() for chunk in range(a.chunks) if not a.present(chunk)]
    if not missing:
        return
    rows = token_rows(data, subject.tokenizer, seed, progress)
    if config.stream:
        rows = _sample(rows, config.stored_tokens // data.context)
    if rows.facts["rows_hash"] != store.attrs["data"]["rows_hash"]:
        raise InputError(f"data.source: {data.source} is no longer the text that {store.folder} was made of; name another folder")
    for array, chunk in missing:
        values = getattr(rows, array.name)[store.shard_sequences(chunk)]
        array.write(chunk, np.ascontiguousarray(values))
        array.sync(chunk)


def done_shards(store: ActivationStore, journal: Folder, among: Iterable[int] | None = None) -> set[int]:
    """Return the shards (of `among`, or of all) that need no work: every chunk is there, and its share of the statistics."""
    if not _begun(store.folder):
        return set(range(store.shards))
    shards = range(store.shards) if among is None else among
    if "statistics" not in store.attrs:  # otherwise it was whole once, and only chunks can be missing
        summed = set(journal.names())
        shards = [shard for shard in shards if f"{_name(shard)}.npz" in summed]
    return {shard for shard in shards if all(array.present(shard) for array in store.shard_arrays())}


def _name(shard: int) -> str:
    return f"shard-{shard:06d}"


def _first_shard(shards: int) -> int:
    """Return where this process begins to look for work: apart from the others, if torchrun or SLURM numbered them."""
    slurm = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), ("SLURM_PROCID", "SLURM_NTASKS")
    for names in (("RANK", "WORLD_SIZE"), *slurm):
        rank, world = (os.environ.get(name, "") for name in names)
        if rank.isdigit() and world.isdigit():
            return shards * (int(rank) % int(world)) // int(world)
    return 0


def _fill(
    store: ActivationStore, journal: Folder, claims: Claims, subject: Subject, config: HarvestConfig,
    sites: dict[str, HookSite], progress: Progress,
) -> None:  # fmt: skip
    """Compute every shard that is neither done nor claimed, until all are done, by whomever."""
    done = done_shards(store, journal)
    computing: dict[int, int] = {}  # shard -> sequences of it that are computed, those being written included
    first = _first_shard(store.shards)
    order = [*range(first, store.shards), *range(first)]

    def tell() -> None:
        sequences = sum(_size(store.shard_sequences(shard)) for shard in done) + sum(computing.values())
        progress(sequences * store.context, store.rows)

    tell()
    # One shard is written while the next is computed: the disk works beside the model, two shards bound the memory.
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing: tuple[int, Future[None]] | None = None

        def settle() -> None:
            nonlocal writing
            if writing is not None:
                writing[1].result()
                done.add(writing[0])
                del computing[writing[0]]
                writing = None

        while len(done) < store.shards:
            took = False
            for shard in order:
                if shard in done or not claims.take(_name(shard)):
                    continue
                if done_shards(store, journal, [shard]):  # by another process, since the last look
                    done.add(shard)
                    claims.release(_name(shard))
                    continue
                took = True

                def count(sequences: int, shard: int = shard) -> None:
                    computing[shard] = sequences
                    tell()

                rows, sums = compute_shard(store, shard, subject, config.batch_size, sites, count)
                settle()
                writing = shard, writer.submit(_commit, store, journal, claims, shard, rows, sums)
            settle()
            done |= done_shards(store, journal, sorted(set(order) - done))
            tell()
            if not took and len(done) < store.shards:
                time.sleep(_POLL)  # the rest is claimed: wait for it, or for its owner to lapse


def _size(span: slice) -> int:
    return int(span.stop - span.start)


def compute_shard(
    store: ActivationStore, shard: int, subject: Subject, batch_size: int, sites: dict[str, HookSite],
    progress: Callable[[int], None] = lambda sequences: None,
) -> tuple[dict[str, Rows], dict[str, Sums]]:
    """Run the model over one shard; return its rows, encoded, on the CPU, and the sums for the statistics.

    Raises InputError where a row that is no special token's is not finite, as it would be stored.
    """
    where = store.shard_sequences(shard)
    tokens, kept = store.sequence_array("tokens", shard), torch.from_numpy(~store.special_of(shard))
    count = _size(where) * store.context
    rows = {hook: _empty(count, store.width(hook), store.dtype(hook), subject.device) for hook in store.hooks}
    sums = {hook: Sums(store.width(hook), subject.device) for hook in store.hooks}
    for start in range(0, _size(where), batch_size):
        stop = min(start + batch_size, _size(where))
        at = slice(start * store.context, stop * store.context)
        marks = kept[start:stop].reshape(-1).to(subject.device, non_blocking=True)
        for hook, encoded, x in run(subject, sites, tokens[start:stop], {hook: store.dtype(hook) for hook in store.hooks}):
            for into, part in zip(_parts(rows[hook]), _parts(encoded), strict=True):
                into[at].copy_(part, non_blocking=True)
            sums[hook].add(x, encoded.norms, marks)
        progress(stop)
    if subject.device.type == "cuda":
        torch.cuda.current_stream(subject.device).synchronize()  # once a shard: the copies have arrived
    for hook, found in sums.items():
        if not bool(found.values["norm"].isfinite()):
            raise not_finite(hook, store.dtype(hook), subject, sites[hook], tokens, kept, batch_size)
    return rows, sums


def run(
    subject: Subject, sites: dict[str, HookSite], tokens: NDArray[np.int32], dtypes: Mapping[str, str]
) -> Iterator[tuple[str, Rows, Tensor]]:
    """Run the model over tokens (sequence, context); yield each hook's rows as stored, and as float32, on its device."""
    batch = torch.from_numpy(tokens.astype(np.int64)).to(subject.device)
    for hook, found in capture(subject.model, sites, batch).items():
        x = found.reshape(batch.numel(), -1)
        encoded = Rows.of(x, dtypes[hook])
        yield hook, encoded, (x if dtypes[hook] == "int8" else encoded.raw).float()


def _parts(rows: Rows) -> list[Tensor]:
    return [rows.raw, rows.norms, *([rows.scales] if rows.scales is not None else [])]


def _empty(count: int, width: int, dtype: str, device: torch.device) -> Rows:
    """Return room for `count` rows on the CPU, pinned where a GPU will copy into it."""
    pinned = device.type == "cuda"
    raw = torch.empty((count, width), dtype=TORCH[dtype], pin_memory=pinned)
    norms, scales = torch.empty((2, count), dtype=torch.float32, pin_memory=pinned)
    return Rows(raw, norms, scales if dtype == "int8" else None)


def _commit(
    store: ActivationStore, journal: Folder, claims: Claims, shard: int, rows: dict[str, Rows], sums: dict[str, Sums]
) -> None:
    """Write one shard and then, as the mark that it is done, its sums."""
    store.write_shard(shard, rows)
    journal.write(f"{_name(shard)}.npz", to_bytes({hook: part.arrays() for hook, part in sums.items()}), sync=False)
    claims.release(_name(shard))


def not_finite(
    hook: str, dtype: str, subject: Subject, site: HookSite, tokens: NDArray[np.int32], kept: Tensor, batch_size: int
) -> InputError:  # fmt: skip
    """Return the error for activations that are infinite or NaN, as stored in `dtype`, where `kept` marks tokens as not special.

    The model runs over `tokens` (sequence, context) again: what is stored does not tell whether it was finite before.
    """
    largest = 0.0
    for start in range(0, len(tokens), batch_size):
        batch = torch.from_numpy(tokens[start : start + batch_size].astype(np.int64)).to(subject.device)
        marks = kept.reshape(tokens.shape)[start : start + batch_size].reshape(-1).to(subject.device)
        x = capture(subject.model, {hook: site}, batch)[hook].reshape(batch.numel(), -1)[marks]
        if not bool(x.isfinite().all()):
            value, own = float(x[~x.isfinite()][0]), str(x.dtype).removeprefix("torch.")
            mend = "look whether its weights are whole" if own == "float32" else "try model.dtype=float32"
            return InputError(f"model.id: {subject.config.id} itself gives {value} at {hook}, in {own}; {mend}")
        largest = max(largest, float(x.abs().amax()) if len(x) else 0.0)
    mend = "try bfloat16 or float32" if dtype == "float16" else "their norms are too large for float32: harvest another hook"
    return InputError(f"harvest.dtype: {dtype} does not hold what the model gives at {hook}, up to {largest:.3g}; {mend}")


def _finish(store: ActivationStore, journal: Folder) -> bool:
    """Fold the statistics, unless the store had them before a repair, and mark the store complete.

    Return False where a shard's sums cannot be read: they are taken out, and the shard is to be computed again.
    """
    if ActivationStore(store.folder).attrs["complete"]:
        return True
    statistics: dict[str, HookStatistics] = {}
    if "statistics" in store.attrs:
        statistics = {hook: store.statistics(hook) for hook in store.hooks}
    else:
        fold = Fold()
        for shard in range(store.shards):
            try:
                fold.add(from_bytes(journal.read(f"{_name(shard)}.npz")))
            except (FileNotFoundError, ValueError):  # another process was faster, or a power cut emptied the file
                journal.remove(f"{_name(shard)}.npz")
                return False
        statistics = fold.statistics()
    store.folder.remove_leftovers()
    store.finish(statistics)
    return True
