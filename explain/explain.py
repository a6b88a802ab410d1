"""The explanation stage: evidence for all latents, then propose, simulate and score for the chosen units."""

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from activation_store.errors import InputError
from activation_store.files import append_json_line, read_json_lines, write_json, write_json_lines
from activation_store.progress import Progress
from activation_store.store import ActivationStore
from explain.backends import Backend, Explanation, LookupBackend, RequestFailed, Simulation, make_backend
from explain.config import ExplainConfig
from explain.evidence import Evidence, gather_evidence
from explain.examples import Unit, choose_units, population_weights
from explain.judge import KINDS, judged, questions
from explain.scores import correlation_intervals, correlation_scores
from sae.architectures.identity import IdentitySAE
from sae.evaluation.bootstrap import intervals, plain
from sae.sae import SAE, LatentStatistics


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
    evidence_progress: Progress = lambda done, total: None,
    progress: Progress = lambda done, total: None,
) -> ExplainResult:
    """Describe the chosen latents and neurons and score the descriptions; write everything under `folder`.

    units.jsonl holds each unit's examples, scores.jsonl one final line a unit, results.jsonl the journal with every
    predicted activation, summary.json the means with counts. A unit is scored, undefined (no correlation exists: NaN, with
    the reason) or failed (a request failed, with the reason). Means are over scored units only; the counts stand beside.

    Started again after a kill it goes on: no finished unit is redone, no answered request is sent again. Units that
    failed are tried again.
    """
    hook = sae.cfg.hook_name or store.hooks[0]
    backend = make_backend(config, folder)
    sources = [_Source("sae", "latents", sae, hook, config.latents)]
    if config.neurons:
        neuron_hook = config.neuron_hook or hook
        identity = IdentitySAE.of(neuron_hook, store.width(neuron_hook))
        sources.append(_Source("neurons", "neurons", identity, neuron_hook, config.neurons))
    for source in sources:
        source.check()
    units_file, counts_file = folder / "units.jsonl", folder / "evidence.json"
    latents = sae.latents
    if latents is None or not units_file.exists():
        latents = _write_units(sources, store, tokenizer, config, folder, seed, evidence_progress)
    units = [Unit.of_json(line) for line in read_json_lines(units_file)]
    results, failures = asyncio.run(_describe_and_score(units, config, backend, folder / "results.jsonl", seed, progress))
    lines = [_final_line(unit, results.get(unit.name), failures.get(unit.name), config.scores) for unit in units]
    write_json_lines(folder / "scores.jsonl", lines)
    summary = {
        "backend": config.backend,
        **backend.facts(),
        "dictionaries": {
            name: {**counted, **_summary([line for line in lines if line["dictionary"] == name], config.resamples, seed)}
            for name, counted in json.loads(counts_file.read_text()).items()
        },
    }
    write_json(folder / "summary.json", summary)
    return ExplainResult(summary, latents)


@dataclass(frozen=True)
class _Source:
    """One dictionary to explain: its name in results, its config field, the hook it reads, and which units are wanted."""

    dictionary: str
    field: str
    sae: SAE
    hook: str
    choice: int | tuple[int, ...]

    def check(self) -> None:
        """Refuse a list of units that does not exist or names one twice."""
        listed = () if isinstance(self.choice, int) else self.choice
        bad = [n for n in listed if not 0 <= n < self.sae.cfg.d_sae]
        if bad:
            raise InputError(f"explain.{self.field}: {bad} given; allowed: 0 to {self.sae.cfg.d_sae - 1}")
        if len(set(listed)) < len(listed):
            raise InputError(f"explain.{self.field}: {list(listed)} given; each number once")


def _write_units(
    sources: list[_Source], store: ActivationStore, tokenizer: Any, config: ExplainConfig, folder: Path, seed: int,
    progress: Progress,
) -> LatentStatistics:  # fmt: skip
    """Pass over the store, choose the units, write their examples (units.jsonl) and counts (evidence.json).

    Returns the statistics of the first source, the SAE, on the training split.
    """
    splits = {"train": (config.train_top, config.train_sampled), "held_out": (config.test_top, config.test_sampled)}
    units: list[Unit] = []
    counts: dict[str, Any] = {}
    statistics: list[LatentStatistics] = []
    for source in sources:
        evidence = {
            split: gather_evidence(
                source.sae, store, source.hook, split, window=config.window, seed=seed,
                top=2 * top, sample=2 * sampled,  # twice what is shown: some will be dropped as repeated texts
                checkpoint=folder / f"evidence-{source.dictionary}-{split}.safetensors",
                checkpoint_seconds=config.checkpoint_seconds, progress=progress,
            )
            for split, (top, sampled) in splits.items()
        }  # fmt: skip
        chosen, eligible = _choose(source.choice, evidence["train"], evidence["held_out"], seed)
        counts[source.dictionary] = {"latents": source.sae.cfg.d_sae, "eligible": eligible, "chosen": len(chosen)}
        units += choose_units(
            source.sae, store, source.dictionary, source.hook, chosen, evidence["train"], evidence["held_out"], config,
            lambda ids: str(tokenizer.decode(ids)), seed,
        )  # fmt: skip
        statistics.append(evidence["train"].statistics)
    write_json(folder / "evidence.json", counts)
    write_json_lines(folder / "units.jsonl", (unit.as_json() for unit in units))
    return statistics[0]


def _choose(choice: int | tuple[int, ...], train: Evidence, held_out: Evidence, seed: int) -> tuple[list[int], int]:
    """Return the latents to explain, and how many of all latents could be drawn: those that fire in both splits."""
    fires: Tensor = (train.statistics.max_activation > 0) & (held_out.statistics.max_activation > 0)
    eligible = np.flatnonzero(fires.numpy())
    if not isinstance(choice, int):
        return list(choice), len(eligible)
    generator = np.random.Generator(np.random.PCG64([seed, 2]))
    return sorted(generator.choice(eligible, size=min(choice, len(eligible)), replace=False).tolist()), len(eligible)


async def _describe_and_score(
    units: list[Unit], config: ExplainConfig, backend: Backend, journal: Path, seed: int, progress: Progress
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Run all units, `concurrency` at a time; return finished results by unit, and reasons of those that failed.

    The shuffled control scores another unit's explanation (of the same dictionary) on this unit's test examples.
    """
    done = {line["unit"]: line for line in read_json_lines(journal)}
    failures: dict[str, str] = {}
    lookup = LookupBackend(config, journal.parent)
    slots = asyncio.Semaphore(config.concurrency)
    other = _derangement(units, seed)
    explanations: dict[str, Explanation] = {}
    finished = 0

    async def describe(unit: Unit) -> None:
        async with slots:
            try:
                explanations[unit.name] = await backend.propose(unit)
            except RequestFailed as error:
                failures[unit.name] = f"propose: {error}"

    async def score(unit: Unit) -> None:
        nonlocal finished
        async with slots:
            try:
                if unit.name not in failures and unit.name not in done:
                    line = await score_unit(unit)
                    complete = await add_control(unit, line)
                    if complete:  # else the next start has only the control to ask for: the rest is answered
                        append_json_line(journal, line)
                    done[unit.name] = line
            except RequestFailed as error:
                failures[unit.name] = str(error)
            finished += 1
            progress(finished, len(units))

    async def score_unit(unit: Unit) -> dict[str, Any]:
        explanation, table = explanations[unit.name], await lookup.propose(unit)
        line: dict[str, Any] = {"unit": unit.name, "description": explanation.text}
        if "simulation" in config.scores:
            with _said_of("simulate"):
                line |= await _simulated(unit, explanation, backend, config, seed)
            line["lookup_correlation"] = await _correlation(unit, table, lookup)
        for kind in KINDS:
            if kind in config.scores:
                asked = questions(unit, kind, seed)
                with _said_of(kind):
                    line[kind] = judged(asked, await backend.judge(explanation, kind, asked), config.resamples, seed)
                line[f"lookup_{kind}"] = judged(asked, await lookup.judge(table, kind, asked), 0, seed)
        return line

    async def add_control(unit: Unit, line: dict[str, Any]) -> bool:
        """Add the shuffled control; return whether nothing is missing. Its failure is not the unit's own."""
        if not config.shuffled_control or unit.name not in other:
            return True
        stranger = explanations.get(other[unit.name])
        if stranger is None:
            return False
        try:
            if "simulation" in config.scores:
                line["shuffled_correlation"] = await _correlation(unit, stranger, backend)
            for kind in KINDS:
                if kind in config.scores:
                    asked = questions(unit, kind, seed)
                    line[f"shuffled_{kind}"] = judged(asked, await backend.judge(stranger, kind, asked), 0, seed)
        except RequestFailed:
            return False
        return True

    progress(0, len(units))
    await asyncio.gather(*(describe(unit) for unit in units))
    await asyncio.gather(*(score(unit) for unit in units))
    await backend.close()
    return done, failures


@contextmanager
def _said_of(step: str) -> Iterator[None]:
    """Let a request that fails within the block say at which step."""
    try:
        yield
    except RequestFailed as error:
        raise RequestFailed(f"{step}: {error}") from None


async def _simulated(
    unit: Unit, explanation: Explanation, backend: Backend, config: ExplainConfig, seed: int
) -> dict[str, Any]:  # fmt: skip
    """Simulate the unit's test examples from an explanation, and score that.

    `population_correlation` is of all held-out windows rather than of the test's mixture of kinds: its examples count for as many
    as they stand for.
    """
    simulations = await backend.simulate(explanation, unit.test)
    true, own = [example.activations for example in unit.test], [simulation.expected for simulation in simulations]
    kinds = [example.kind for example in unit.test]  # their numbers were chosen: they stay as they are in resamples
    weights = population_weights(unit.test, unit.fired, unit.windows)
    return {
        "predicted": own,
        **plain(vars(correlation_scores(true, own))),
        "population_correlation": _number(correlation_scores(true, own, weights).ev_correlation),
        "intervals": correlation_intervals(true, own, strata=kinds, resamples=config.resamples, seed=seed),
        "label_mass": _mean_mass(simulations),
    }


async def _correlation(unit: Unit, explanation: Explanation, backend: Backend) -> float | None:
    """Return the correlation alone, as a control needs it."""
    predicted = [simulation.expected for simulation in await backend.simulate(explanation, unit.test)]
    return _number(correlation_scores([example.activations for example in unit.test], predicted).ev_correlation)


def _derangement(units: list[Unit], seed: int) -> dict[str, str]:
    """Give each unit another one of its dictionary: a random cyclic order, so nobody gets itself."""
    result = {}
    for dictionary in sorted({unit.dictionary for unit in units}):
        names = [unit.name for unit in units if unit.dictionary == dictionary]
        order = np.random.Generator(np.random.PCG64([seed, 3])).permutation(len(names))
        if len(names) > 1:
            for i, at in enumerate(order):
                result[names[at]] = names[order[(i + 1) % len(order)]]
    return result


def _mean_mass(simulations: list[Simulation]) -> float | None:
    """Return the mean probability given to levels, None of an instrument that does not say."""
    masses = [mass for simulation in simulations for mass in simulation.mass or ()]
    return sum(masses) / len(masses) if masses else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _final_line(
    unit: Unit, result: dict[str, Any] | None, failure: str | None, scores: Sequence[str]
) -> dict[str, Any]:  # fmt: skip
    """Return a unit's line of scores.jsonl: state, reason, description, scores, and the windows behind them."""
    line: dict[str, Any] = {
        "unit": unit.name, "dictionary": unit.dictionary, "hook": unit.hook, "latent": unit.latent,
        "density": unit.density, "max_activation": unit.max_activation, "state": "scored", "reason": None,
        "description": None, "ev_correlation": None, "rsquared": None, "absolute_dev_explained": None,
        "rsquared_centred": None, "population_correlation": None, "intervals": None, "label_mass": None,
        "lookup_correlation": None, "shuffled_correlation": None,
        **{f"{prefix}{kind}": None for kind in KINDS for prefix in ("", "lookup_", "shuffled_")},
        "train_windows": [e.window for e in unit.train], "test_windows": [e.window for e in unit.test],
        "test_tokens": sum(len(e.tokens) for e in unit.test),
    }  # fmt: skip
    if result is None:
        return {**line, "state": "failed", "reason": failure or "not reached"}
    line |= {key: value for key, value in result.items() if key in line}
    first = scores[0]
    if first == "simulation" and line["ev_correlation"] is None:
        true = [a for e in unit.test for a in e.activations]
        constant = not true or max(true) == min(true)
        why = "the unit does not vary on its test examples" if constant else "the predictions do not vary"
        line |= {"state": "undefined", "reason": f"correlation undefined: {why}"}
    elif first != "simulation" and line[first]["balanced_accuracy"] is None:
        fires = any(a > 0 for e in unit.test for a in e.activations)
        why = "it fires in every test example" if fires else "it fires in no test example"
        line |= {"state": "undefined", "reason": f"{first} undefined: {why}"}
    return line


def _summary(lines: list[dict[str, Any]], resamples: int, seed: int) -> dict[str, Any]:
    """Return counts by state, means over scored units, each with over how many, and margins over the controls.

    A margin is the mean, over units that have both, of a unit's score less its control's, with a 95 % bootstrap interval over
    units: where that holds 0, descriptions are not shown to be worth more than the control.
    """
    scored = [line for line in lines if line["state"] == "scored"]

    def mean(key: str) -> dict[str, Any]:
        values = [line[key] for line in scored if line[key] is not None]
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        return {"mean": float(np.mean(values)) if values else None, "standard_error": error, "units": len(values)}

    def margin(control: str) -> dict[str, Any]:
        pairs = [(line["ev_correlation"], line[control]) for line in scored]
        own = np.array([score - of_control for score, of_control in pairs if None not in (score, of_control)])
        sums = {"units": np.ones(len(own)), "margin": own}
        if not len(own):
            return {"mean": None, "interval": None, "units": 0}
        interval = intervals(sums, lambda s: {"margin": s["margin"] / s["units"]}, resamples, seed)["margin"]
        return {"mean": float(own.mean()), "interval": interval, "units": len(own)}

    states = {state: sum(line["state"] == state for line in lines) for state in ("scored", "undefined", "failed")}
    scores = ("ev_correlation", "rsquared", "absolute_dev_explained", "rsquared_centred", "population_correlation")
    keys = (*scores, "lookup_correlation", "shuffled_correlation", "label_mass")
    margins = {name: margin(f"{name}_correlation") for name in ("shuffled", "lookup")}
    reasons = sorted({line["reason"] for line in lines if line["state"] == "failed"})
    asked = [kind for kind in KINDS if any(line.get(kind) is not None for line in scored)]
    judged_by: dict[str, Any] = {kind: _judged_means(scored, kind) for kind in asked}
    return {**states, **{key: mean(key) for key in keys}, "margins": margins, **judged_by, "failure_reasons": reasons[:5]}


def _judged_means(scored: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Return means over units of what judges' answers are worth, by whose answers they are; None where no unit has the figure."""
    found: dict[str, Any] = {}
    for name, key in (("description", kind), ("lookup", f"lookup_{kind}"), ("shuffled", f"shuffled_{kind}")):
        own = [line[key] for line in scored if line[key] is not None]
        figures = {figure: [of[figure] for of in own if of[figure] is not None] for figure in ("balanced_accuracy", "f1", "auc")}
        figures["population_precision"] = [p for of in own if (p := of["population"]["precision"]) is not None]
        found[name] = {figure: float(np.mean(values)) if values else None for figure, values in figures.items()}
        found[name]["units"] = len(own)
    return found
