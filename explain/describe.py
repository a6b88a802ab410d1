"""Propose, simulate, judge and score: what happens to each unit, many of them at once."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.files import append_json_line, iterate_json_lines
from explain.backends import Backend, Explanation, LookupBackend, RequestFailed, Simulation
from explain.choice import CHOICE_KINDS, ChoiceKind, choices, chosen
from explain.config import ExplainConfig
from explain.examples import Example, Unit, population_weights
from explain.judge import KINDS, Kind, judged, questions
from explain.propose import Trial, best_proposal, mistakes_of
from explain.scores import correlation_intervals, correlation_scores
from sae.evaluation.bootstrap import plain

Line = dict[str, Any]


@dataclass
class Describer:
    """Takes units through everything that the config asks for, once.

    descriptions.jsonl holds what was proposed, results.jsonl a line for each unit that is done; a start after a kill goes on from
    there, and from the backend's own journal of requests.
    """

    config: ExplainConfig
    backend: Backend
    folder: Path
    seed: int
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by unit, what the model writes with it clamped
    done: dict[str, Line] = field(init=False)
    failures: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Read what is done; predictions stay in the file."""
        self.done = {line["unit"]: _without_predictions(line) for line in iterate_json_lines(self.folder / "results.jsonl")}
        self._lookup = LookupBackend(self.config, self.folder)
        self._together: Sequence[Unit] = ()
        self._in_words = not isinstance(self.backend, LookupBackend)
        self._described = {line["unit"]: line for line in iterate_json_lines(self.folder / "descriptions.jsonl")}

    async def take(self, units: Sequence[Unit], finished: Callable[[], None]) -> None:
        """Describe and score units; `finished` is called after each. A request that fails for good fails its unit alone.

        The shuffled control puts another unit's description, of the same dictionary, to this unit's test examples.
        """
        self._together = units
        together = len(units) if self.config.batch else 2 * self.config.concurrency
        slots = asyncio.Semaphore(max(together, 1))  # of units: requests have a limit of their own
        explanations: dict[str, Explanation] = {}
        other = derangement(units, self.seed)

        async def describe(unit: Unit) -> None:
            async with slots:
                try:
                    explanation = await self._explanation(unit)
                    if explanation is not None:
                        explanations[unit.name] = explanation
                except RequestFailed as error:
                    self.failures[unit.name] = f"propose: {error}"

        async def score(unit: Unit) -> None:
            async with slots:
                try:
                    if unit.name not in self.failures and unit.name not in self.done:
                        if unit.name in explanations:
                            line = await self._scored(unit, explanations[unit.name])
                        else:
                            line = {"unit": unit.name, "undefined": "it fires in no training window: nothing to describe"}
                        stranger = explanations.get(other[unit.name]) if unit.name in other else None
                        if await self._add_control(unit, line, stranger, unit.name in other):
                            append_json_line(self.folder / "results.jsonl", line)
                        self.done[unit.name] = _without_predictions(line)
                except RequestFailed as error:
                    self.failures[unit.name] = str(error)
                finished()

        await asyncio.gather(*(describe(unit) for unit in units))
        await asyncio.gather(*(score(unit) for unit in units))

    async def _explanation(self, unit: Unit) -> Explanation | None:
        """Return the description to use, proposing where there is none yet; None of a unit with nothing to describe."""
        if not self._in_words:
            return await self._lookup.propose(unit)
        if not any(a > 0 for example in unit.train for a in example.activations):
            return None
        if unit.name not in self._described:
            explanation, proposals = await best_proposal(self.backend, unit, self.config, lambda e: self._trial(unit, e))
            line = {"unit": unit.name, "text": explanation.text, "scale": explanation.scale, "proposals": proposals}
            append_json_line(self.folder / "descriptions.jsonl", line)
            self._described[unit.name] = line
        found = self._described[unit.name]
        return Explanation(found["text"], found["scale"])

    async def _trial(self, unit: Unit, explanation: Explanation) -> Trial:
        """Put a proposal to the validation windows, by the first of the scores."""
        kind = self.config.scores[0]
        if kind not in KINDS:  # simulation: see ExplainConfig
            expected = [simulation.expected for simulation in await self.backend.simulate(explanation, unit.valid)]
            value = _number(correlation_scores([e.activations for e in unit.valid], expected).ev_correlation)
        else:
            asked = questions(unit, kind, self.seed, side="valid")
            answers = await self.backend.judge(explanation, kind, asked)
            expected = [[answer.probability] for answer in answers]
            value = judged(asked, answers, 0, self.seed)["balanced_accuracy"]
        return Trial(value, mistakes_of(explanation.text, unit.valid, expected))

    async def _scored(self, unit: Unit, explanation: Explanation) -> Line:
        config, table = self.config, await self._lookup.propose(unit)
        line: Line = {"unit": unit.name, "description": explanation.text}
        if self._in_words:
            line["proposals"] = self._described[unit.name]["proposals"]

        async def simulate() -> None:
            with _said_of("simulate"):
                line.update(await self._simulated(unit, explanation))
            line["lookup_correlation"] = await _correlation(_tested(unit, line), table, self._lookup)

        async def judge(kind: Kind) -> None:
            asked = questions(unit, kind, self.seed)
            with _said_of(kind):
                line[kind] = judged(asked, await self.backend.judge(explanation, kind, asked), config.resamples, self.seed)
            line[f"lookup_{kind}"] = judged(asked, await self._lookup.judge(table, kind, asked), 0, self.seed)

        async def choose(kind: ChoiceKind) -> None:
            by = None if kind == "intruder" else explanation
            with _said_of(kind):
                line[kind] = await self._chosen(unit, by, kind, self.backend, config.resamples)
            if kind == "neighbours":
                line[f"lookup_{kind}"] = await self._chosen(unit, table, kind, self._lookup)

        await self._each_score(simulate, judge, choose)
        return line

    async def _each_score(
        self, simulate: Callable[[], Awaitable[None]], judge: Callable[[Kind], Awaitable[None]],
        choose: Callable[[ChoiceKind], Awaitable[None]],
    ) -> None:  # fmt: skip
        """Do what the config's scores ask for, one after the other, so that a unit that fails sends no more.

        In batches, which take hours, all together.
        """
        scores = self.config.scores
        works: list[Callable[[], Awaitable[None]]] = [simulate] if "simulation" in scores else []
        works += [partial(judge, kind) for kind in KINDS if kind in scores]
        works += [partial(choose, kind) for kind in CHOICE_KINDS if kind in scores]
        if self.config.batch:
            for failure in await asyncio.gather(*(work() for work in works), return_exceptions=True):
                if failure is not None:
                    raise failure
        else:
            for work in works:
                await work()

    async def _chosen(
        self, unit: Unit, explanation: Explanation | None, kind: ChoiceKind, backend: Backend, resamples: int = 0
    ) -> Line:  # fmt: skip
        rivals = [one for one in self._together if one.dictionary == unit.dictionary and one.name != unit.name]
        asked, why = choices(unit, kind, self.seed, rivals, self.texts)
        return chosen(asked, await backend.choose(explanation, kind, asked), why, resamples, self.seed)

    async def _add_control(self, unit: Unit, line: Line, stranger: Explanation | None, wanted: bool) -> bool:
        """Add the shuffled control; return whether nothing is missing. Its failure is not the unit's own.

        Where it is missing the unit is not written down: the next start has only the control to ask for, the rest is answered.
        """
        if not self.config.shuffled_control or not wanted or "undefined" in line:
            return True
        if stranger is None:
            return False

        async def simulate() -> None:
            line["shuffled_correlation"] = await _correlation(_tested(unit, line), stranger, self.backend)

        async def judge(kind: Kind) -> None:
            asked = questions(unit, kind, self.seed)
            line[f"shuffled_{kind}"] = judged(asked, await self.backend.judge(stranger, kind, asked), 0, self.seed)

        async def choose(kind: ChoiceKind) -> None:
            if kind != "intruder":  # no description is shown
                line[f"shuffled_{kind}"] = await self._chosen(unit, stranger, kind, self.backend)

        try:
            await self._each_score(simulate, judge, choose)
        except RequestFailed:
            return False
        return True

    async def _simulated(self, unit: Unit, explanation: Explanation) -> Line:
        """Simulate the unit's test examples from an explanation, and score that.

        `population_correlation` is of all held-out windows rather than of the test's mixture of kinds: its examples count for as
        many as they stand for. `hard_correlation` is of firing windows and hard negatives, which count nowhere else.
        """
        seed, resamples = self.seed, self.config.resamples
        easy, hard = ([e for e in unit.test if e.hard is wanted] for wanted in (False, True))
        tested, simulations = list[Example](), list[Simulation]()
        for some in _rounds(easy) if self.config.stop_width else [easy]:
            tested += some
            simulations += await self.backend.simulate(explanation, some)
            true, own = [e.activations for e in tested], [s.expected for s in simulations]
            kinds = [e.kind for e in tested]  # their numbers were chosen: they stay as they are in resamples
            found = correlation_intervals(true, own, strata=kinds, resamples=resamples, seed=seed)
            interval = found["ev_correlation"]
            if self.config.stop_width and interval is not None and interval[1] - interval[0] <= self.config.stop_width:
                break
        of_hard = await self.backend.simulate(explanation, hard) if hard else []
        predicted = {e.window: s.expected for e, s in zip(tested + hard, simulations + of_hard, strict=True)}
        weights = population_weights(tested, unit.fired, unit.windows)
        mean = float(np.mean([a for e in unit.train for a in e.activations] or [0.0]))
        firing = [e for e in tested if max(e.activations) > 0]
        contrast = correlation_scores([e.activations for e in firing + hard], [predicted[e.window] for e in firing + hard])
        return {
            "predicted": [predicted.get(e.window, []) for e in unit.test],
            "tested_windows": [e.window for e in tested],
            **plain(vars(correlation_scores(true, own))),
            "population_correlation": _number(correlation_scores(true, own, weights).ev_correlation),
            "hard_correlation": _number(contrast.ev_correlation) if hard else None,
            "constant_rsquared": _number(correlation_scores(true, [[mean] * len(t) for t in true]).rsquared),
            "intervals": found,
            "label_mass": _mean_mass(simulations),
        }


def _rounds(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Deal examples out, each time one of every kind that has any left."""
    of_kind: dict[str, list[Example]] = {}
    for example in examples:
        of_kind.setdefault(example.kind, []).append(example)
    for round_ in range(max(map(len, of_kind.values()), default=0)):
        yield [of[round_] for of in of_kind.values() if round_ < len(of)]


def _tested(unit: Unit, line: Line) -> list[Example]:
    """Return the windows that the description was simulated on: controls are put to the same."""
    windows = set(line["tested_windows"])
    return [example for example in unit.test if example.window in windows]


@contextmanager
def _said_of(step: str) -> Iterator[None]:
    """Let a request that fails within the block say at which step."""
    try:
        yield
    except RequestFailed as error:
        raise RequestFailed(f"{step}: {error}") from None


async def _correlation(examples: Sequence[Example], explanation: Explanation, backend: Backend) -> float | None:
    """Return the correlation alone, as a control needs it."""
    predicted = [simulation.expected for simulation in await backend.simulate(explanation, examples)]
    return _number(correlation_scores([example.activations for example in examples], predicted).ev_correlation)


def derangement(units: Sequence[Unit], seed: int) -> dict[str, str]:
    """Give each unit another one of its dictionary: a random cyclic order, so nobody gets itself."""
    result = {}
    for dictionary in sorted({unit.dictionary for unit in units}):
        names = [unit.name for unit in units if unit.dictionary == dictionary]
        order = np.random.Generator(np.random.PCG64([seed, 3])).permutation(len(names))
        if len(names) > 1:
            for i, at in enumerate(order):
                result[names[at]] = names[order[(i + 1) % len(order)]]
    return result


def _mean_mass(simulations: Sequence[Simulation]) -> float | None:
    """Return the mean probability given to levels, None of an instrument that does not say."""
    masses = [mass for simulation in simulations for mass in simulation.mass or ()]
    return sum(masses) / len(masses) if masses else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _without_predictions(line: Line) -> Line:
    return {key: value for key, value in line.items() if key != "predicted"}
