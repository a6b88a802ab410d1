"""The explanation stage: evidence for all latents, then propose, simulate and score for the chosen units."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from activation_store.errors import InputError
from activation_store.files import append_json_line, iterate_json_lines, read_json_lines, write_json, write_json_lines
from activation_store.progress import Progress
from activation_store.store import ActivationStore
from explain.backends import make_backend
from explain.clusters import label_clusters
from explain.config import ExplainConfig
from explain.describe import Describer
from explain.dictionaries import Dictionary, dictionaries
from explain.embedding import Embedder
from explain.evidence import Evidence, gather_evidence, window_range
from explain.examples import SIDES, Unit, choose_units, shared
from explain.interventions import Continuations, Written, prompts_of
from explain.outputs import with_outputs
from explain.sources import is_attention, with_sources
from explain.summary import compared, final_line, summarise
from sae.sae import SAE, LatentStatistics

_UNITS_AT_ONCE = 1000  # in memory, with all their examples


@dataclass(frozen=True)
class ExplainResult:
    """What the stage did: the summary as written to summary.json, and the SAE's latent statistics."""

    summary: dict[str, Any]
    latents: LatentStatistics


def explain(
    sae: SAE,
    store: ActivationStore,
    tokenizer: Any,
    config: ExplainConfig,
    folder: Path,
    *,
    seed: int = 0,
    others: Sequence[Dictionary] = (),
    model: Any = None,
    evidence_progress: Progress = lambda done, total: None,
    progress: Progress = lambda done, total: None,
) -> ExplainResult:
    """Describe the chosen latents and neurons and score the descriptions; write everything under `folder`.

    units.jsonl holds each unit's examples, scores.jsonl one final line a unit, results.jsonl the journal with every
    predicted activation, summary.json the means with counts. A unit is scored, undefined (no score exists: NaN, with
    the reason) or failed (a request failed, with the reason). Means are over scored units only; the counts stand beside.
    `others` are explained too, such as the SAE of another model on the same tokens. `model`, the subject, tells
    what units do to its output; without it that is left open.

    Started again after a kill it goes on: no finished unit is redone, no answered request is sent again. Units that
    failed are tried again.
    """
    backend = make_backend(config, folder)
    own, sources, latents = prepare(
        sae, store, tokenizer, config, folder, seed=seed, others=others, model=model, progress=evidence_progress
    )
    units_file, counts = folder / "units.jsonl", json.loads((folder / "evidence.json").read_text())
    texts = _continuations(own, model, tokenizer, folder, seed) if "intervention" in config.scores else {}
    describer = Describer(config, backend, folder, seed, texts)
    total = sum(found["chosen"] for found in counts.values())
    clusters = asyncio.run(_take_all(units_file, describer, sources[0], config.clusters, total, progress))
    overlap = np.zeros(2, int)

    def lines() -> Iterator[dict[str, Any]]:
        for unit in _units(units_file):
            overlap[:] += shared(unit)
            yield final_line(unit, describer.done.get(unit.name), describer.failures.get(unit.name), config.scores)

    write_json_lines(folder / "scores.jsonl", lines())
    scores = read_json_lines(folder / "scores.jsonl")
    summary = {
        "backend": config.backend,
        **backend.facts(),
        "splits": {**_splits(store, config), "shared_windows": int(overlap[0]), "shared_texts": int(overlap[1])},
        "dictionaries": {
            name: {**counted, **summarise([line for line in scores if line["dictionary"] == name], config.resamples, seed)}
            for name, counted in counts.items()
        },
        **({"clusters": clusters} if clusters is not None else {}),
        "compared": compared(scores, config.resamples, seed),
    }
    write_json(folder / "summary.json", summary)
    return ExplainResult(summary, latents)


def prepare(
    sae: SAE, store: ActivationStore, tokenizer: Any, config: ExplainConfig, folder: Path, *, seed: int = 0,
    others: Sequence[Dictionary] = (), model: Any = None, progress: Progress = lambda done, total: None,
) -> tuple[list[Dictionary], list[Dictionary], LatentStatistics]:  # fmt: skip
    """Choose the units and write their examples, unless that is done; asks no LLM.

    Returns the SAE's dictionaries, these with the others, and the SAE's statistics.
    """
    embedder = Embedder(config.embedder) if config.embedder is not None and config.test_similar else None
    window_range(store, config.window, "train")  # refuses windows that do not tile
    own = dictionaries(sae, store, config, seed)
    sources = [*own, *others]
    for source in sources:
        source.check()
    latents = sae.latents
    if latents is None or not (folder / "units.jsonl").exists():
        latents = _write_units(sources, own, model, tokenizer, config, folder, seed, embedder, progress)
    return own, sources, latents


def _units(path: Path) -> Iterator[Unit]:
    return (Unit.of_json(line) for line in iterate_json_lines(path))


async def _take_all(
    path: Path, describer: Describer, source: Dictionary, clusters: int, total: int, progress: Progress
) -> dict[str, int] | None:  # fmt: skip
    """Take all units through, some at a time, so that memory does not grow with their number; then label clusters."""
    finished = 0

    def count() -> None:
        nonlocal finished
        finished += 1
        progress(finished, total)

    progress(0, total)
    units = _units(path)
    while some := list(islice(units, _UNITS_AT_ONCE)):
        await describer.take(some, count)
    labelled = None
    if clusters:
        texts = {name: line["description"] for name, line in describer.done.items() if line.get("description")}
        chosen = {int(name.split("/")[1]): text for name, text in texts.items() if name.startswith(f"{source.name}/")}
        path = describer.folder / "clusters.jsonl"
        labelled = await label_clusters(source.sae, source.name, chosen, clusters, describer.backend, path)
    await describer.backend.close()
    return labelled


def _continuations(sources: Sequence[Dictionary], model: Any, tokenizer: Any, folder: Path, seed: int) -> dict[str, list[str]]:
    """Return what the model writes with each unit clamped, writing continuations.jsonl; units that are there already are done."""
    if model is None:
        raise InputError("explain.scores: intervention needs the model; give explain() model=")
    path = folder / "continuations.jsonl"
    done = {line["unit"]: line for line in iterate_json_lines(path)}
    by_name = {source.name: source for source in sources}
    makers: dict[str, Continuations | str] = {}  # one a dictionary, or why it cannot be steered
    for unit in _units(folder / "units.jsonl"):
        source = by_name.get(unit.dictionary)
        if unit.name in done or source is None:  # others may be of other models
            continue
        if source.name not in makers:
            try:
                makers[source.name] = Continuations(model, tokenizer, source.sae, prompts_of(source.store, seed))
            except InputError as error:
                makers[source.name] = str(error)
        maker = makers[source.name]
        line = vars(Written(unit.name, None, None, False, [], maker) if isinstance(maker, str) else maker.of(unit))
        append_json_line(path, line)
        done[unit.name] = line
    return {name: line["texts"] for name, line in done.items() if line["texts"]}


def _splits(store: ActivationStore, config: ExplainConfig) -> dict[str, Any]:
    """Return the windows of each side, from..to."""
    names = {"train": "train", "valid": "valid", "test": "held_out"}
    return {side: list(window_range(store, config.window, names[side], config.reserved)) for side in SIDES}


def _write_units(
    sources: Sequence[Dictionary], own: Sequence[Dictionary], model: Any, tokenizer: Any, config: ExplainConfig, folder: Path,
    seed: int, embedder: Embedder | None, progress: Progress,
) -> LatentStatistics:  # fmt: skip
    """Pass over the stores, choose the units, write their examples (units.jsonl) and counts (evidence.json).

    Returns the statistics of the first dictionary, the SAE, on the training split.
    """
    splits = {"train": (config.train_top, config.train_sampled), "held_out": (config.test_top, config.test_sampled)}
    if config.chooses:
        splits["valid"] = splits["held_out"]
    found: list[tuple[Dictionary, dict[str, Evidence], list[int]]] = []
    counts: dict[str, Any] = {}
    for source in sources:
        evidence = {
            split: gather_evidence(
                source.sae, source.store, source.hook, split, window=config.window, seed=seed, reserved=config.reserved,
                top=2 * top, sample=max(2 * sampled, config.reservoir) if sampled else 0,  # some are dropped as repeated texts
                checkpoint=folder / f"evidence-{source.name}-{split}.safetensors",
                checkpoint_seconds=config.checkpoint_seconds, progress=progress,
            )
            for split, (top, sampled) in splits.items()
        }  # fmt: skip
        chosen, eligible = _choose(source.choice, evidence["train"], evidence["held_out"], seed)
        turned = {"turned": sum(source.signs[unit] < 0 for unit in chosen)} if source.signs is not None else {}
        counts[source.name] = {"latents": source.sae.cfg.d_sae, "eligible": eligible, "chosen": len(chosen), **turned}
        found.append((source, evidence, chosen))

    def units() -> Iterator[Unit]:
        for source, evidence, chosen in found:
            for start in range(0, len(chosen), _UNITS_AT_ONCE):
                some = choose_units(
                    source.sae, source.store, source.name, source.hook, chosen[start : start + _UNITS_AT_ONCE],
                    evidence["train"], evidence["held_out"], config, lambda ids: str(tokenizer.decode(ids)), seed,
                    evidence.get("valid"), embedder, source.signs,
                )  # fmt: skip
                known = model is not None and source in own  # others may be of other models
                if known:
                    some = with_outputs(some, source.sae, model, tokenizer)
                if known and source.name == "sae" and is_attention(source.hook):
                    some = with_sources(some, source.sae, model, source.store, config.window, tokenizer)
                yield from some

    write_json(folder / "evidence.json", counts)
    write_json_lines(folder / "units.jsonl", (unit.as_json() for unit in units()))
    return found[0][1]["train"].statistics


def _choose(choice: int | tuple[int, ...], train: Evidence, held_out: Evidence, seed: int) -> tuple[list[int], int]:
    """Return the latents to explain, and how many of all latents could be drawn: those that fire in both splits."""
    fires: Tensor = (train.statistics.max_activation > 0) & (held_out.statistics.max_activation > 0)
    eligible = np.flatnonzero(fires.numpy())
    if not isinstance(choice, int):
        return list(choice), len(eligible)
    generator = np.random.Generator(np.random.PCG64([seed, 2]))
    return sorted(generator.choice(eligible, size=min(choice, len(eligible)), replace=False).tolist()), len(eligible)
