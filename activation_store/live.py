"""Batches without a store: the model runs while rows are drawn, into the same ring, in the same order, with the same filters.

Two ways. `LiveActivations` needs no disk but that of the tokens: a block is a sequence, and reading blocks is a forward
pass. `RecycledStore` keeps as many shards on disk as a budget allows, computes those that are not there, and makes room
by deleting the one that was used longest ago; blocks mix within regions of half the budget.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from activation_store.arrays import new_table
from activation_store.batches import Batches
from activation_store.config import DataConfig, HarvestConfig
from activation_store.errors import InputError
from activation_store.folders import folder_at
from activation_store.harvest import compute_shard, hook_widths, lay_out, not_finite, run, settings_of
from activation_store.hooks import locate_hooks
from activation_store.progress import Progress
from activation_store.shuffle import Ints, Room, Source
from activation_store.statistics import Fold, HookStatistics, Sums
from activation_store.store import ActivationStore, Place
from activation_store.subject import Subject
from activation_store.text import TokenRows, token_rows

SAMPLE_SEQUENCES = 64
"""Sequences from the start of the training text that the statistics of a stream are taken from, before the first batch."""


class _Live:
    """What both ways share: the model, statistics from a sample, and norms that are known once a row has been computed."""

    norms_known = False
    subject: Subject
    config: HarvestConfig
    hooks: list[str]
    context: int
    train_sequences: int
    attrs: dict[str, Any]

    def _prepare(self, subject: Subject, config: HarvestConfig, rows: int) -> None:
        self.subject, self.config = subject, config
        self._sites = locate_hooks(subject.model, config.hooks)
        # On a GPU the model runs beside the trainer; on a CPU two of them would only fight over the cores.
        self.in_background = subject.device.type == "cuda"
        self._norms = {hook: new_table((rows,), np.dtype(np.float32)) for hook in config.hooks}

    def _tokens_of(self, sequences: Ints) -> NDArray[np.int32]:
        raise NotImplementedError

    @cached_property
    def _statistics(self) -> dict[str, HookStatistics]:
        tokens = self._tokens_of(np.arange(min(SAMPLE_SEQUENCES, self.train_sequences)))
        size = self.config.batch_size
        fold = Fold()
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            kept = torch.from_numpy(~np.isin(part, self.attrs["special_token_ids"]).reshape(-1)).to(self.subject.device)
            sums = {}
            for hook, rows, x in run(self.subject, self._sites, part, dict.fromkeys(self.hooks, self.config.dtype)):
                sums[hook] = Sums(x.shape[1], self.subject.device)
                sums[hook].add(x, rows.norms, kept)
            fold.add({hook: part.arrays() for hook, part in sums.items()})
        return fold.statistics()

    def statistics(self, hook: str) -> HookStatistics:
        """Return the moments of `hook` over the first `SAMPLE_SEQUENCES` training sequences."""
        return self._statistics[hook]

    def norm_limit(self, hook: str, multiple: float) -> float:
        """Return `multiple` times the median norm of the sample."""
        return multiple * self.statistics(hook).median_norm

    def expect(self, blocks: Ints, hooks: Sequence[str]) -> None:
        """Do nothing: what is not computed yet cannot be fetched ahead."""

    def loud(self, limits: Mapping[str, float], rows: Ints) -> NDArray[np.bool_]:
        """Mark rows, all computed before, whose norm is above a hook's limit."""
        found: NDArray[np.bool_] = np.zeros(len(rows), bool)
        for hook, limit in limits.items():
            found |= ~(self._norms[hook][rows] <= limit)
        return found

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
        """As `ActivationStore.batches`, and by the same code; only two things differ.

        Norms are known when the rows are there, not before: a row above the limit gives its place to another of the same
        draw, so that batch n stays batch n. And the order is another than a store's of the same text: its blocks differ.
        """
        hooks = (hook,) if isinstance(hook, str) else tuple(hook)
        unknown = [name for name in hooks if name not in self.hooks]
        if unknown:
            raise InputError(f"hook {unknown[0]!r} is not harvested; allowed: {', '.join(self.hooks)}")
        return Batches(
            cast(Source, self), hooks, isinstance(hook, str), batch_size=batch_size, seed=seed, start=start, epochs=epochs,
            split=split, memory_mb=memory_mb, max_norm_multiple=max_norm_multiple, device=device, as_stored=as_stored,
            region_shards=self._region_shards,
        )  # fmt: skip

    _region_shards: int | None = None


class LiveActivations(_Live):
    """Activations of a text that are computed when they are drawn and never written."""

    def __init__(self, subject: Subject, rows: TokenRows, config: HarvestConfig) -> None:
        """Draw from `rows`. Raises InputError for hooks that the model does not have, before anything runs."""
        sequences, self.context = rows.tokens.shape
        self.rows = sequences * self.context
        self.train_sequences = rows.train_sequences
        self.hooks = list(config.hooks)
        self.attrs = {**subject.facts(), "data": rows.facts, "text_counts": rows.counts}
        self._prepare(subject, config, self.rows)
        self._widths = hook_widths(subject.model, self._sites, subject.device)
        self._token_rows = rows
        self.block_rows = self.context
        self.shard_blocks = min(sequences, 1024)  # here a shard is only how much is looked at together
        self.shard_rows = self.shard_blocks * self.context

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Token ids, (sequence, context)."""
        return self._token_rows.tokens

    @property
    def documents(self) -> NDArray[np.int32]:
        """Number of the source's record each token comes from, (sequence, context)."""
        return self._token_rows.documents

    def width(self, hook: str) -> int:
        """Return d, the width of a hook's activations."""
        return self._widths[hook]

    def dtype(self, hook: str) -> str:
        """Return the dtype that rows are held in."""
        return self.config.dtype

    def block_of(self, rows: Ints) -> Ints:
        """Return the sequence that each row is in."""
        return rows // self.context

    def block_start(self, blocks: Ints) -> Ints:
        """Return the first row of each sequence."""
        return blocks * self.context

    def sequence_array(self, name: str, shard: int) -> NDArray[np.int32]:
        """Return some of "tokens", "documents" or "offsets", (sequence, context)."""
        found: NDArray[np.int32] = getattr(self._token_rows, name)
        return found[shard * self.shard_blocks : (shard + 1) * self.shard_blocks]

    def special_of(self, shard: int) -> NDArray[np.bool_]:
        """Mark special tokens and padding."""
        special = np.isin(self.sequence_array("tokens", shard), self.attrs["special_token_ids"])
        return special | (self.sequence_array("documents", shard) < 0)

    def norms(self, hook: str, shard: int) -> NDArray[np.float32]:
        """Not known before the rows are: see `loud`."""
        raise NotImplementedError

    def _tokens_of(self, sequences: Ints) -> NDArray[np.int32]:
        return np.asarray(self.tokens[sequences])

    def fill(self, blocks: Ints, into: Mapping[str, Room]) -> None:
        """Run the model over whole sequences, as many at once as `harvest.batch_size` says."""
        sites = {hook: self._sites[hook] for hook in into}
        for start in range(0, len(blocks), self.config.batch_size):
            some = blocks[start : start + self.config.batch_size]
            tokens = self._tokens_of(some)
            kept = torch.from_numpy(~np.isin(tokens, self.attrs["special_token_ids"]).reshape(-1))
            at = slice(start * self.context, (start + len(some)) * self.context)
            rows = (some[:, None] * self.context + np.arange(self.context)).reshape(-1)
            for hook, found, _ in run(self.subject, sites, tokens, dict.fromkeys(into, self.config.dtype)):
                raw, scales = into[hook]
                values = found.raw.view(torch.uint16) if self.config.dtype == "bfloat16" else found.raw
                raw[at] = values.cpu().numpy()
                if scales is not None and found.scales is not None:
                    scales[at] = found.scales.cpu().numpy()
                norms = found.norms.cpu()
                self._norms[hook][rows] = norms.numpy()
                if not bool(norms[kept].isfinite().all()):
                    raise not_finite(hook, self.config.dtype, self.subject, sites[hook], tokens, kept, self.config.batch_size)


class RecycledStore(_Live, ActivationStore):
    """A store of which only `budget_gb` lie on disk at any time; the rest is computed when it is drawn, and again if need be."""

    def __init__(self, path: Place, subject: Subject, config: HarvestConfig, budget_gb: float) -> None:
        """Work in a store that `lay_out` began. Raises InputError for a budget that two shards do not fit in."""
        ActivationStore.__init__(self, path)
        self._prepare(subject, config, self.rows)
        shard_bytes = sum(array.chunk_bytes for array in self.shard_arrays())
        self._budget = int(budget_gb * 1e9 / shard_bytes)
        if self._budget < 2:
            raise InputError(
                f"harvest.disk_budget_gb: {budget_gb} given; at least two shards, {2 * shard_bytes / 1e9:.3g} GB, must fit; "
                "allow more, or lower harvest.shard_mb"
            )
        self._region_shards = max(1, self._budget // 2)
        self._present: OrderedDict[int, None] = OrderedDict()  # the one used longest ago first
        self.folder.remove_leftovers()
        for shard in range(self.shards):  # what an earlier run left, in so far as it is whole and still in the budget
            there = [array.present(shard) for array in self.shard_arrays()]
            if all(there) and len(self._present) < self._budget:
                self._present[shard] = None
            elif any(there):
                self._remove(shard)
        self.computed = 0

    def _tokens_of(self, sequences: Ints) -> NDArray[np.int32]:
        return self.tokens[sequences]

    def fill(self, blocks: Ints, into: Mapping[str, Room]) -> None:
        """Compute the shards that are not there, recycle the oldest, and read."""
        wanted = [shard for shard in np.unique(blocks // self.shard_blocks).tolist() if shard < self.shards]
        for shard in wanted:
            if shard in self._present:
                self._present.move_to_end(shard)
        for shard in wanted:
            if shard not in self._present:
                self._make_room(set(wanted))
                rows, _ = compute_shard(self, shard, self.subject, self.config.batch_size, self._sites)
                self.write_shard(shard, rows)
                self._present[shard] = None
                self.computed += 1
            where = self.shard_sequences(shard)
            for hook in into:
                self._norms[hook][where.start * self.context : where.stop * self.context] = self.norms(hook, shard)
        ActivationStore.fill(self, blocks, into)

    def _make_room(self, wanted: set[int]) -> None:
        while len(self._present) >= self._budget:
            oldest = next(shard for shard in self._present if shard not in wanted)  # a turn needs two regions at most: they fit
            del self._present[oldest]
            self._remove(oldest)

    def _remove(self, shard: int) -> None:
        for array in self.shard_arrays():
            self.folder.remove(array.file(shard))
        self.forget(shard)


def stream_activations(
    subject: Subject,
    data: DataConfig,
    config: HarvestConfig,
    *,
    seed: int = 0,
    recycle_in: Place | None = None,
    text_progress: Progress = lambda done, total: None,
) -> LiveActivations | RecycledStore:
    """Return a source of batches that harvests while it is drawn from.

    With `config.disk_budget_gb` it recycles shards in the folder `recycle_in`; what is there from an earlier call with the
    same settings is used again. Raises InputError for hooks, text or a budget that cannot serve.
    """
    if config.disk_budget_gb is None:
        return LiveActivations(subject, token_rows(data, subject.tokenizer, seed, text_progress), config)
    if recycle_in is None:
        raise InputError("recycle_in: None given; harvest.disk_budget_gb needs a folder to recycle shards in")
    folder = folder_at(recycle_in)
    settings = settings_of(subject, data, config, seed)
    begun = folder.size("zarr.json") is not None and ActivationStore(folder).attrs.get("settings") == settings
    if not begun:
        sites = locate_hooks(subject.model, config.hooks)
        lay_out(folder, subject, data, config, sites, settings, seed, text_progress, whole=True)
        folder.beside(".journal").remove_all()
    return RecycledStore(folder, subject, config, config.disk_budget_gb)

