"""OpenAI's neuron-explainer (Bills et al. 2023): collated-activations/<layer>/<neuron>.json, explanations/<layer>/<neuron>.jsonl.

Objects carry the name of their class, `dataclass_name`. Scores that are undefined are null here and NaN there; both are read.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activation_store.errors import InputError
from explain.examples import SIDES, Example, Unit, assert_disjoint
from explain.formats.described import Described, Explanations, Names, fresh
from explain.formats.lines import Record, as_lines, need, put, read_lines, read_object, storable
from explain.scores import CorrelationScores, correlation_scores

RECORDS, RESULTS = "collated-activations", "explanations"
_SPLITS = 4  # of the strongest records: train, calibration, valid, test in turn
_RANDOM_SPLITS = 3  # of random ones: calibration, valid, test
_SCORES = {
    "ev_correlation": "ev_correlation_score", "rsquared": "rsquared_score",
    "absolute_dev_explained": "absolute_dev_explained_score",
}  # fmt: skip


def write_openai(explained: Explanations, folder: Path, names: Names) -> None:
    """Write into an empty folder: one a dictionary, in it a file of records and, where simulated, one of results each unit."""
    for dictionary, units in explained.by_dictionary().items():
        for unit in units:
            layer, where = names.layer(unit.hook), folder / dictionary
            record = where / RECORDS / str(layer) / f"{unit.latent}.json"
            put(record, as_lines([neuron_record(unit, layer)]))
            line, predicted = explained.scores.get(unit.name, {}), explained.predicted.get(unit.name, [])
            if line.get("state") == "scored" and any(predicted):
                result = neuron_result(unit, layer, line["description"], predicted)
                put(where / RESULTS / str(layer) / f"{unit.latent}.jsonl", as_lines([result]))


def neuron_record(unit: Unit, layer: int) -> Record:
    """Return a NeuronRecord: windows in which the unit fires, strongest first, and those drawn at random from all.

    Their splits are by place in these lists, so which windows an explainer sees there is theirs to say; no text comes twice.
    Moments are unknown: null.
    """
    examples = [example for side in SIDES for example in getattr(unit, side)]
    fires = [e for e in examples if e.kind in ("top", "sampled")]
    fires.sort(key=lambda e: -max(e.activations, default=0.0))
    return {
        "dataclass_name": "NeuronRecord", "neuron_id": _neuron_id(unit, layer),
        "random_sample": [_activations(e) for e in examples if e.kind == "random"], "random_sample_by_quantile": None,
        "quantile_boundaries": None, "mean": None, "variance": None, "skewness": None, "kurtosis": None,
        "most_positive_activation_records": [_activations(e) for e in fires],
    }  # fmt: skip


def neuron_result(unit: Unit, layer: int, description: str, predicted: Sequence[Sequence[float]]) -> Record:
    """Return a NeuronSimulationResults: the description with its simulation of the test windows, those that were simulated."""
    pairs = [(e, list(p)) for e, p in zip(unit.test, predicted, strict=True) if p]
    sequences = [
        {
            "dataclass_name": "ScoredSequenceSimulation", "simulation": _simulation(example, expected),
            "true_activations": example.activations, **_scores([example.activations], [expected]),
        }
        for example, expected in pairs
    ]  # fmt: skip
    simulation = {
        "dataclass_name": "ScoredSimulation", "scored_sequence_simulations": sequences,
        **_scores([e.activations for e, _ in pairs], [p for _, p in pairs]),
    }  # fmt: skip
    explanation = {
        "dataclass_name": "ScoredExplanation", "explanation": storable(description), "scored_simulation": simulation,
    }  # fmt: skip
    return {
        "dataclass_name": "NeuronSimulationResults", "neuron_id": _neuron_id(unit, layer), "scored_explanations": [explanation],
    }  # fmt: skip


def _neuron_id(unit: Unit, layer: int) -> Record:
    return {"dataclass_name": "NeuronId", "layer_index": layer, "neuron_index": unit.latent}


def _activations(example: Example) -> Record:
    tokens = [storable(token) for token in example.tokens]
    return {"dataclass_name": "ActivationRecord", "tokens": tokens, "activations": example.activations}


def _simulation(example: Example, expected: list[float]) -> Record:
    return {
        "dataclass_name": "SequenceSimulation", "tokens": [storable(token) for token in example.tokens],
        "expected_activations": expected, "activation_scale": "neuron_activations", "distribution_values": [],
        "distribution_probabilities": [], "uncalibrated_simulation": None,
    }  # fmt: skip


def _scores(true: Sequence[Sequence[float]], predicted: Sequence[Sequence[float]]) -> Record:
    found = vars(correlation_scores(true, predicted))
    return {theirs: found[ours] if found[ours] == found[ours] else None for ours, theirs in _SCORES.items()}


# Reading


@dataclass(frozen=True)
class ScoredExplanation:
    """A description, and its simulation: true and expected activations, one list a sequence; `stated` are the file's scores."""

    explanation: str
    tokens: list[list[str]]
    true: list[list[float]]
    expected: list[list[float]]
    stated: dict[str, float | None]

    def scores(self) -> CorrelationScores:
        """Compute the scores again from the activations."""
        return correlation_scores(self.true, self.expected)


@dataclass(frozen=True)
class NeuronResults:
    """A line of results: which neuron, and its scored descriptions."""

    layer: int
    neuron: int
    explanations: list[ScoredExplanation]


def read_results(path: Path) -> Iterator[NeuronResults]:
    """Yield the lines of a file of results, or of all files in a folder, in the order of layers and neurons."""
    for file in _files(path, RESULTS, ".jsonl"):
        for where, record in read_lines(file):
            layer, neuron = _read_id(record, where)
            found = []
            for i, one in enumerate(_objects(record, "scored_explanations", where)):
                inside = f"{where}, scored_explanations[{i}]"
                found.append(_scored(one, inside))
            yield NeuronResults(layer, neuron, found)


def _scored(record: Record, where: str) -> ScoredExplanation:
    simulation = need(record, "scored_simulation", "an object", where)
    tokens, true, expected = [], [], []
    for j, sequence in enumerate(_objects(simulation, "scored_sequence_simulations", where)):
        inside = f"{where}, scored_sequence_simulations[{j}]"
        own = need(sequence, "simulation", "an object", inside)
        tokens.append(need(own, "tokens", "a list of texts", inside))
        expected.append(_floats(own, "expected_activations", inside))
        true.append(_floats(sequence, "true_activations", inside))
        if not len(tokens[-1]) == len(expected[-1]) == len(true[-1]):
            raise InputError(f"{inside}: {len(tokens[-1])} tokens, {len(true[-1])} true_activations and "
                             f"{len(expected[-1])} expected_activations")  # fmt: skip
    stated = {ours: simulation.get(theirs) for ours, theirs in _SCORES.items()}
    stated = {name: None if value is None or value != value else float(value) for name, value in stated.items()}
    return ScoredExplanation(need(record, "explanation", "text", where), tokens, true, expected, stated)


def read_openai(folder: Path, indices: Collection[int] | None = None) -> Iterator[Described]:
    """Yield the neurons of a folder that holds collated-activations/, with their descriptions where explanations/ has them.

    Of the strongest windows the first of every four are training examples, the third ones are validation's, the fourth test's;
    of random ones the second of every three and the third: as their explainer and scorer take them. Texts that come twice count
    once. Token ids are not in these files: numbers stand for them, equal for equal tokens of a neuron. The density is
    that in random windows, NaN where there are none.
    """
    for file in _files(folder, RECORDS, ".json"):
        if indices is not None and (not file.stem.isdecimal() or int(file.stem) not in indices):
            continue
        unit = _unit(read_object(file), str(file))
        results = file.parent.parent.parent / RESULTS / file.parent.name / f"{file.stem}.jsonl"
        found = read_results(results) if results.exists() else iter(())
        yield Described(unit, [one.explanation for line in found for one in line.explanations])


def _unit(record: Record, where: str) -> Unit:
    layer, neuron = _read_id(record, where)
    numbers: dict[str, int] = {}

    def examples(name: str, kind: str) -> list[Example]:
        found = []
        for i, one in enumerate(_objects(record, name, where)):
            inside = f"{where}, {name}[{i}]"
            tokens, values = need(one, "tokens", "a list of texts", inside), _floats(one, "activations", inside)
            if len(tokens) != len(values):
                raise InputError(f"{inside}: {len(tokens)} tokens and {len(values)} activations")
            ids = [numbers.setdefault(token, len(numbers)) for token in tokens]
            found.append(Example(i if kind == "top" else -1 - i, kind, ids, tokens, values))
        return found

    strongest = examples("most_positive_activation_records", "top")
    random = examples("random_sample", "random") if "random_sample" in record else []
    seen = set[str | int]()
    train = fresh(strongest[0::_SPLITS], seen)
    valid = fresh(strongest[2::_SPLITS] + random[1::_RANDOM_SPLITS], seen)
    test = fresh(strongest[3::_SPLITS] + random[2::_RANDOM_SPLITS], seen)
    every = [a for e in random for a in e.activations]
    density = sum(a > 0 for a in every) / len(every) if every else math.nan
    top = max((a for e in strongest for a in e.activations), default=0.0)
    unit = Unit(str(layer), f"blocks.{layer}.mlp.hook_post", neuron, density, top, train, test, valid=valid)
    assert_disjoint(unit)
    return unit


def _read_id(record: Record, where: str) -> tuple[int, int]:
    own = need(record, "neuron_id", "an object", where)
    layer, neuron = (need(own, name, "a whole number", f"{where}, neuron_id") for name in ("layer_index", "neuron_index"))
    return layer, neuron


def _objects(record: Record, name: str, where: str) -> list[Any]:
    found: list[Any] = need(record, name, "a list", where)
    for i, one in enumerate(found):
        if not isinstance(one, dict):
            raise InputError(f"{where}: {name}[{i}]: a {type(one).__name__} given; it must be an object")
    return found


def _floats(record: Record, name: str, where: str) -> list[float]:
    return [float(value) for value in need(record, name, "a list of numbers", where)]


def _files(path: Path, kind: str, suffix: str) -> list[Path]:
    """Return `path` itself, or the files <layer>/<neuron> of a kind below it, in the order of numbers."""
    if path.is_file():
        return [path]
    below = path if path.name == kind else path / kind
    if not below.is_dir():
        raise InputError(f"{path}: no folder {kind}/ in it; give one that holds {kind}/<layer>/<neuron>{suffix}")
    found = [file for file in below.glob(f"*/*{suffix}") if file.stem.isdecimal() and file.parent.name.isdecimal()]
    return sorted(found, key=lambda file: (int(file.parent.name), int(file.stem)))
