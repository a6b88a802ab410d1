"""What a run of explanations comes to: one line a unit, means with their counts, margins over controls, and comparisons."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from explain.choice import CHOICE_KINDS
from explain.examples import Unit
from explain.judge import KINDS
from sae.evaluation.bootstrap import intervals

Line = dict[str, Any]
_MEANS = (
    "ev_correlation", "rsquared", "absolute_dev_explained", "rsquared_centred", "population_correlation", "hard_correlation",
)  # fmt: skip
OF_UNITS = ("dictionaries", "compared", "splits", "clusters")
"""What a summary says of the units; the rest is of who explained and scored them."""
_OF_JUDGES = ("balanced_accuracy", "f1", "auc")


def final_line(unit: Unit, result: Line | None, failure: str | None, scores: Sequence[str]) -> Line:
    """Return a unit's line of scores.jsonl: state, reason, description, scores, and the windows behind them."""
    line: Line = {
        "unit": unit.name, "dictionary": unit.dictionary, "hook": unit.hook, "latent": unit.latent, "sign": unit.sign,
        "density": unit.density, "max_activation": unit.max_activation, "state": "scored", "reason": None,
        "description": None, "proposals": None, **dict.fromkeys(_MEANS), "intervals": None, "label_mass": None,
        "lookup_correlation": None, "shuffled_correlation": None, "constant_rsquared": None,
        **{f"{prefix}{kind}": None for kind in (*KINDS, *CHOICE_KINDS) for prefix in ("", "lookup_", "shuffled_")},
        **{f"{side}_windows": [e.window for e in getattr(unit, side)] for side in ("train", "valid", "test")},
        "tested_windows": None, "test_tokens": sum(len(e.tokens) for e in unit.test),
    }  # fmt: skip
    if result is None:
        return {**line, "state": "failed", "reason": failure or "not reached"}
    line |= {key: value for key, value in result.items() if key in line}
    first = scores[0]
    if "undefined" in result:
        line |= {"state": "undefined", "reason": result["undefined"]}
    elif first == "simulation" and line["ev_correlation"] is None:
        true = [a for e in unit.test if not e.hard for a in e.activations]
        constant = not true or max(true) == min(true)
        why = "the unit does not vary on its test examples" if constant else "the predictions do not vary"
        line |= {"state": "undefined", "reason": f"correlation undefined: {why}"}
    elif first in KINDS and line[first]["balanced_accuracy"] is None:
        fires = any(a > 0 for e in unit.test for a in e.activations)
        why = "it fires in every test example" if fires else "it fires in no test example"
        line |= {"state": "undefined", "reason": f"{first} undefined: {why}"}
    elif first in CHOICE_KINDS and line[first]["accuracy"] is None:
        line |= {"state": "undefined", "reason": f"{first} undefined: {line[first]['reason']}"}
    return line


def summarise(lines: Sequence[Line], resamples: int, seed: int) -> Line:
    """Return counts by state, means over scored units, each with over how many, and margins over the controls.

    A margin is the mean, over units that have both, of a unit's score less its control's, with a 95 % bootstrap interval over
    units: where that holds 0, descriptions are not shown to be worth more than the control.
    """
    scored = [line for line in lines if line["state"] == "scored"]

    def mean(key: str) -> Line:
        values = [line[key] for line in scored if line.get(key) is not None]
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        return {"mean": _mean(values), "standard_error": error, "units": len(values)}

    states = {state: sum(line["state"] == state for line in lines) for state in ("scored", "undefined", "failed")}
    keys = (*_MEANS, "lookup_correlation", "shuffled_correlation", "constant_rsquared", "label_mass")
    margins = {
        control: _margin([(line["ev_correlation"], line[f"{control}_correlation"]) for line in scored], resamples, seed)
        for control in ("shuffled", "lookup")
    }
    reasons = sorted({line["reason"] for line in lines if line["state"] == "failed"})
    asked = [kind for kind in KINDS if any(line.get(kind) is not None for line in scored)]
    judged_by: Line = {kind: _judged_means(scored, kind, resamples, seed) for kind in asked}
    judged_by |= {kind: found for kind in CHOICE_KINDS if (found := _choice_means(scored, kind, resamples, seed)) is not None}
    return {**states, **{key: mean(key) for key in keys}, "margins": margins, **judged_by, "failure_reasons": reasons[:5]}


def _margin(pairs: Sequence[tuple[float | None, float | None]], resamples: int, seed: int) -> Line:
    own = np.array([score - control for score, control in pairs if score is not None and control is not None])
    if not len(own):
        return {"mean": None, "interval": None, "units": 0}
    sums = {"units": np.ones(len(own)), "margin": own}
    interval = intervals(sums, lambda s: {"margin": s["margin"] / s["units"]}, resamples, seed)["margin"]
    return {"mean": float(own.mean()), "interval": interval, "units": len(own)}


def _judged_means(scored: Sequence[Line], kind: str, resamples: int, seed: int) -> Line:
    """Return means over units of what judges' answers are worth, by whose answers they are, and margins; None where undefined."""
    accuracy = partial(_value, name="balanced_accuracy")
    found: Line = {}
    for name, key in (("description", kind), ("lookup", f"lookup_{kind}"), ("shuffled", f"shuffled_{kind}")):
        own = [line[key] for line in scored if line.get(key) is not None]
        figures = {figure: [of[figure] for of in own] for figure in _OF_JUDGES}
        figures["population_precision"] = [of["population"]["precision"] for of in own]
        figures["hard_balanced_accuracy"] = [_value(of, "hard", "balanced_accuracy") for of in own]
        found[name] = {figure: _mean(values) for figure, values in figures.items()}
        found[name]["units"] = len(own)
    found["margins"] = {
        control: _margin([(accuracy(line, kind), accuracy(line, f"{control}_{kind}")) for line in scored], resamples, seed)
        for control in ("shuffled", "lookup")
    }
    return found


def _choice_means(scored: Sequence[Line], kind: str, resamples: int, seed: int) -> Line | None:
    """Return mean accuracies over units by whose choices they are, what chance gives, and margins; None if nobody was asked."""
    own = [line for line in scored if _value(line, kind, "accuracy") is not None]
    if not any(line.get(kind) is not None for line in scored):
        return None

    prefixes = {"description": "", "lookup": "lookup_", "shuffled": "shuffled_"}
    by = {name: [_value(line, f"{prefix}{kind}", "accuracy") for line in own] for name, prefix in prefixes.items()}
    by["chance"] = [line[kind]["chance"] for line in own]
    pairs = {control: list(zip(by["description"], by[control], strict=True)) for control in ("chance", "shuffled", "lookup")}
    return {
        "accuracy": {name: _mean(values) for name, values in by.items()}, "units": len(own),
        "margins": {control: _margin(of, resamples, seed) for control, of in pairs.items()},
        "places": np.sum([line[kind]["places"] for line in own], axis=0).tolist() if own else None,
    }  # fmt: skip


def _value(line: Line, key: str, name: str) -> float | None:
    """Return one figure of several that a line has under `key`; None where it has none."""
    value: float | None = (line.get(key) or {}).get(name)
    return value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def figures_of(line: Line) -> dict[str, float | None]:
    """Return the figures of a line that units of different dictionaries are compared by."""
    judged = {f"{kind} {name}": _value(line, kind, name) for kind in KINDS for name in ("balanced_accuracy", "auc")}
    picked = {f"{kind} accuracy": _value(line, kind, "accuracy") for kind in CHOICE_KINDS}
    simulated = {key: line.get(key) for key in ("ev_correlation", "population_correlation", "hard_correlation")}
    return {**simulated, **judged, **picked}


def compared(lines: Sequence[Line], resamples: int, seed: int, reference: str = "sae") -> Line:
    """Return, for each dictionary but the reference, the reference's mean less its own, with a 95 % interval, for each figure.

    Units are drawn anew within each dictionary. Only scored units count; how many there are of each stands beside.
    """
    scored = [line for line in lines if line["state"] == "scored"]
    found: Line = {}
    for other in dict.fromkeys(line["dictionary"] for line in lines if line["dictionary"] != reference):
        found[other] = {}
        for figure in figures_of({}):
            values = {
                name: [v for line in scored if line["dictionary"] == name and (v := figures_of(line)[figure]) is not None]
                for name in (reference, other)
            }
            a, b = np.array(values[reference], float), np.array(values[other], float)
            if not len(a) or not len(b):
                continue
            ours = np.concatenate([np.ones(len(a)), np.zeros(len(b))])
            every = np.concatenate([a, b])
            sums = {"a": every * ours, "b": every * (1 - ours), "of_a": ours, "of_b": 1 - ours}
            strata = [reference] * len(a) + [other] * len(b)
            interval = intervals(
                sums, lambda s: {"difference": s["a"] / s["of_a"] - s["b"] / s["of_b"]}, resamples, seed, strata=strata
            )["difference"]
            found[other][figure] = {
                reference: float(a.mean()), other: float(b.mean()), "difference": float(a.mean() - b.mean()),
                "interval": interval, "units": [len(a), len(b)],
            }  # fmt: skip
    return found
