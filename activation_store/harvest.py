"""Harvest: token rows -> activations on disk, shard by shard, through a forward pass that stops at the last hook."""

import contextlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activation_store.config import DataConfig, HarvestConfig
from activation_store.errors import InputError
from activation_store.files import write_atomic
from activation_store.hooks import HookSite, capture, locate_hooks
from activation_store.progress import Progress
from activation_store.store import ActivationStore, HookStatistics
from activation_store.subject import Subject
from activation_store.text import token_rows


def hook_widths(model: torch.nn.Module, sites: Mapping[str, HookSite], device: torch.device | str) -> dict[str, int]:
    """Return d of each hook from a forward pass over two tokens (on "meta": without weights)."""
    seen = capture(model, dict(sites), torch.zeros((2, 3), dtype=torch.long, device=device))
    for name in sites:
        if seen[name].shape[:2] != (2, 3):
            raise InputError(f"hook {name!r} has shape {tuple(seen[name].shape)} for 2 sequences of 3 tokens: no row a token")
    return {name: int(seen[name].numel() // 6) for name in sites}  # in the order asked, not the order passed


def harvest(
    subject: Subject,
    data: DataConfig,
    config: HarvestConfig,
    path: str | Path,
    *,
    seed: int = 0,
    text_progress: Progress = lambda done, total: None,
    progress: Progress = lambda done, total: None,
) -> ActivationStore:
    """Write the activations of `config.hooks` on the text of `data` to a new store at `path`, or finish one begun there.

    Every hook name is resolved before the first forward pass. A shard once written is never redone: after a kill at any
    moment the same call ends in the same bytes, given the same device and thread count. `progress` counts tokens.
    Returns the finished store. Raises InputError for hooks, text or disk that cannot serve.
    """
    path = Path(path)
    sites = locate_hooks(subject.model, config.hooks)
    journal = path.with_name(path.name + ".journal")  # statistics a shard; beside the group, which stays pure Zarr
    settings = json.loads(json.dumps([data.model_dump(), config.model_dump(), subject.facts(), seed]))
    begun = journal / "begun"
    store: ActivationStore | None = None
    with contextlib.suppress(InputError):  # nothing there, or a layout that was never finished
        store = ActivationStore(path)
    if store is not None and store.attrs["complete"] and store.attrs.get("settings") == settings:
        shutil.rmtree(journal, ignore_errors=True)  # killed while it was removed
        return store
    if store is not None and begun.exists() and not store.attrs["complete"]:
        if store.attrs.get("settings") != settings:
            raise InputError(f"{path}: begun with other settings; finish it with those, or name another folder")
        for aside in path.rglob(".*.tmp"):  # what a kill left half written
            aside.unlink()
    else:
        shutil.rmtree(journal, ignore_errors=True)
        rows = token_rows(data, subject.tokenizer, seed, text_progress)
        widths = hook_widths(subject.model, sites, subject.device)
        bytes_a_row = max(widths.values()) * (4 if config.dtype == "float32" else 2)
        sequences = round(config.shard_mb * 1e6 / (bytes_a_row * data.context * config.batch_size)) * config.batch_size
        attributes = {
            **subject.facts(),
            "data": rows.facts,
            "text_counts": rows.counts,
            "train_sequences": rows.train_sequences,
            "prepend_bos": data.prepend_bos,
            "seed": seed,
            "settings": settings,
        }
        store = ActivationStore.create(
            path, rows.tokens, rows.documents, widths, dtype=config.dtype,
            shard_sequences=max(sequences, config.batch_size), attributes=attributes,
        )  # fmt: skip
        write_atomic(begun, b"")
    special = store.special
    done = [shard for shard in range(store.shards) if (journal / f"shard-{shard:06d}.json").exists()]
    context = store.context
    tokens_done = sum(_size(store.shard_sequences(shard)) for shard in done) * context
    progress(tokens_done, store.rows)
    # One shard is written while the next is computed: the disk works beside the model, two shards bound the memory.
    with ThreadPoolExecutor(max_workers=1) as writer:
        pending: Future[None] | None = None
        for shard in sorted(set(range(store.shards)) - set(done)):
            where = store.shard_sequences(shard)
            kept: dict[str, Tensor] = {
                hook: torch.empty(_size(where) * context, store.width(hook), dtype=getattr(torch, config.dtype))
                for hook in store.hooks
            }
            for start in range(where.start, where.stop, config.batch_size):
                stop = min(start + config.batch_size, where.stop)
                batch = torch.from_numpy(store.tokens[start:stop]).long().to(subject.device)
                at = slice((start - where.start) * context, (stop - where.start) * context)
                for hook, x in capture(subject.model, sites, batch).items():
                    kept[hook][at] = x.reshape(-1, kept[hook].shape[1])  # casts and copies to the CPU in one go
                tokens_done += (stop - start) * context
                progress(tokens_done, store.rows)
            if pending is not None:
                pending.result()
            pending = writer.submit(_commit, store, journal, shard, kept, ~special[where].reshape(-1))
        if pending is not None:
            pending.result()
    store.finish(_gather_statistics(store, journal))
    shutil.rmtree(journal)
    return store


def _size(span: slice) -> int:
    return int(span.stop - span.start)


def _commit(
    store: ActivationStore, journal: Path, shard: int, activations: dict[str, Tensor], kept: NDArray[np.bool_]
) -> None:
    """Write one shard and then, as the mark that it is done, its statistics."""
    store.write_shard(shard, activations)
    rows = torch.from_numpy(kept)
    sums = {hook: _sums(x[rows]) for hook, x in activations.items()}
    for hook, values in sums.items():
        if not np.isfinite(values["norm"]):
            dtype = store.dtype(hook)
            raise InputError(f"harvest.dtype: {dtype} holds infinite or NaN values of {hook}; try bfloat16 or float32")
    write_atomic(journal / f"shard-{shard:06d}.json", json.dumps(sums).encode())


def _sums(x: Tensor) -> dict[str, Any]:
    """Return the sums that the statistics are made of; x is (row, d)."""
    x = x.float()
    norm = x.norm(dim=1).double()
    return {
        "rows": len(x),
        "sum": x.sum(0, dtype=torch.float64).tolist(),
        "norm": float(norm.sum()),
        "square_norm": float((norm**2).sum()),
        "max_norm": float(norm.max()) if len(x) else 0.0,
    }


def _gather_statistics(store: ActivationStore, journal: Path) -> dict[str, HookStatistics]:
    """Fold the shards' sums, in shard order, so that the result does not depend on when a run was interrupted."""
    shards = [json.loads((journal / f"shard-{shard:06d}.json").read_text()) for shard in range(store.shards)]
    result = {}
    for hook in store.hooks:
        parts = [shard[hook] for shard in shards]
        rows = sum(part["rows"] for part in parts)
        result[hook] = HookStatistics(
            rows=rows,
            mean=np.sum([part["sum"] for part in parts], axis=0) / max(rows, 1),
            mean_norm=sum(part["norm"] for part in parts) / max(rows, 1),
            mean_square_norm=sum(part["square_norm"] for part in parts) / max(rows, 1),
            max_norm=max(part["max_norm"] for part in parts),
        )
    return result
