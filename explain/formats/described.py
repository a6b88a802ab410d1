"""What the formats share: our explanations to be written for other tools, and others' to be scored by ours."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from activation_store.errors import InputError
from activation_store.files import read_json_lines
from explain.backends.backend import Backend, Explanation
from explain.backends.lookup import LookupBackend
from explain.config import ExplainConfig
from explain.examples import Example, Unit
from explain.formats.lines import Record
from explain.judge import judged, questions
from explain.scores import correlation_intervals, correlation_scores
from explain.summary import OF_UNITS
from sae.evaluation.bootstrap import plain
from sae.sae import LatentStatistics

Score = Literal["simulation", "detection", "fuzzing"]
_LEVELS = 10


@dataclass(frozen=True)
class Names:
    """What other tools call what a run holds: the model, its layer (of each hook), the set of sources, who made it and when.

    `created` is an ISO time; it is the run's, not the export's, so that the same run gives the same bytes.
    """

    model_id: str
    source_set: str
    layer: Callable[[str], int]
    release: str
    dataset: str
    context: int
    explainer: str
    created: str
    creator: str = "monosem"
    creator_id: str = "clkht01d40000jv08hvalcvly"  # whom Neuronpedia's own converters name: it exists where data are imported


@dataclass(frozen=True)
class Explanations:
    """A folder of explanations: units, and by unit name the line of scores.jsonl and the predicted activations.

    `instrument` is what summary.json says of who explained and scored; `latents` the statistics of dictionaries, where known.
    """

    units: list[Unit]
    scores: dict[str, Record]
    predicted: dict[str, list[list[float]]]
    instrument: Record
    latents: Mapping[str, LatentStatistics] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, latents: Mapping[str, LatentStatistics] | None = None) -> "Explanations":
        """Read what the explanation stage wrote. Raises InputError where it has not finished."""
        scores = {line["unit"]: line for line in read_json_lines(folder / "scores.jsonl")}
        if not scores or not (folder / "units.jsonl").exists():
            raise InputError(f"{folder}: no scores there; run `monosem explain` first")
        units = [Unit.of_json(line) for line in read_json_lines(folder / "units.jsonl")]
        predicted = {line["unit"]: line.get("predicted") or [] for line in read_json_lines(folder / "results.jsonl")}
        summary_file = folder / "summary.json"
        summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.exists() else {}
        instrument = {name: value for name, value in summary.items() if name not in OF_UNITS}
        return cls(units, scores, predicted, instrument, latents or {})

    def by_dictionary(self) -> dict[str, list[Unit]]:
        """Return the units of each dictionary in the order of their numbers."""
        names = dict.fromkeys(unit.dictionary for unit in self.units)
        return {
            name: sorted((unit for unit in self.units if unit.dictionary == name), key=lambda unit: unit.latent)
            for name in names
        }


@dataclass(frozen=True)
class Described:
    """A unit as another tool recorded it, and the descriptions it has there."""

    unit: Unit
    descriptions: list[str]


def fresh(examples: Iterable[Example], seen: set[str | int], limits: Mapping[str, int] | None = None) -> list[Example]:
    """Take examples whose text and window are not in `seen`, at most `limits[kind]` of each kind, and put these there."""
    taken: list[Example] = []
    left = dict(limits) if limits is not None else None
    for example in examples:
        if {example.text, example.window} & seen or (left is not None and left.get(example.kind, 0) <= 0):
            continue
        if left is not None:
            left[example.kind] -= 1
        seen |= {example.text, example.window}
        taken.append(example)
    return taken


async def score(
    unit: Unit, description: str, backend: Backend, scores: Sequence[Score] = ("simulation",), *,
    resamples: int = 1000, seed: int = 0,
) -> Record:  # fmt: skip
    """Score a description by a unit's test examples, with the token lookup beside it, as the explanation stage does.

    `scores`: simulation, detection, fuzzing. Where it is not known how many windows the examples stand for, there are no
    figures of the population (None). Raises explain.client.RequestFailed.
    """
    top = max((a for e in unit.train or unit.test for a in e.activations), default=0.0)
    explanation = Explanation(description, scale=top / _LEVELS)
    lookup = LookupBackend(ExplainConfig(), Path())
    table = await lookup.propose(unit)
    true, kinds = [e.activations for e in unit.test], [e.kind for e in unit.test]
    found: Record = {"unit": unit.name, "description": description}
    for kind in scores:
        if kind == "simulation":
            own, looked_up = [
                [s.expected for s in await by.simulate(told, unit.test)] for by, told in ((backend, explanation), (lookup, table))
            ]
            found |= {
                **plain(vars(correlation_scores(true, own))),
                "intervals": correlation_intervals(true, own, strata=kinds, resamples=resamples, seed=seed),
                "lookup_correlation": plain(vars(correlation_scores(true, looked_up)))["ev_correlation"],
            }
        elif kind in ("detection", "fuzzing"):
            asked = questions(unit, kind, seed)
            found[kind] = judged(asked, await backend.judge(explanation, kind, asked), resamples, seed)
            found[f"lookup_{kind}"] = judged(asked, await lookup.judge(table, kind, asked), 0, seed)
            if not unit.windows:
                found[kind]["population"] = found[f"lookup_{kind}"]["population"] = None
        else:
            raise InputError(f"scores: {kind!r} given; allowed: simulation, detection, fuzzing")
    return found
