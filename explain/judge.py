"""Yes-or-no questions about windows: does the description fit the text (detection), or the tokens marked in it (fuzzing)?

Paulo et al. 2024, "Automatically Interpreting Millions of Features in Large Language Models". Cheaper than a simulation: one
answer a window, not one a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from explain.counts import Counts, auc, count_intervals
from explain.examples import Unit, population_weights
from sae.evaluation.bootstrap import plain

Kind = Literal["detection", "fuzzing"]
KINDS: tuple[Kind, ...] = ("detection", "fuzzing")
_MARKED_FROM = 0.3  # of a window's maximum: weaker tokens are not what it is shown for


@dataclass(frozen=True)
class Question:
    """A window as the judge sees it: tokens, which of them are marked (none, in detection), and the right answer."""

    tokens: list[str]
    token_ids: list[int]
    marked: tuple[int, ...]
    truth: bool
    stratum: str
    weight: float
    hard: bool = False

    @property
    def text(self) -> str:
        """The window's text, marked tokens between << and >>."""
        return "".join(f"<<{token}>>" if i in self.marked else token for i, token in enumerate(self.tokens))


@dataclass(frozen=True)
class Judgement:
    """The probability of yes; 0 or 1 of a judge that only answers. `mass` is what yes and no had between them, if known."""

    probability: float
    mass: float | None = None


def questions(unit: Unit, kind: Kind, seed: int, side: Literal["test", "valid"] = "test") -> list[Question]:
    """Return the questions of a unit's test examples, or of its validation examples.

    Detection: does the unit fire in the window at all. Fuzzing: marked are the tokens on which it fires, to at least 0.3 of the
    window's maximum; or, in silent windows, as many as that is on average, drawn at random.
    """
    examples = unit.test if side == "test" else unit.valid
    weights = population_weights(examples, unit.fired, unit.windows)
    chance = np.random.Generator(np.random.PCG64([seed, 4, unit.latent]))
    firing = [_strong(example.activations) for example in examples]
    counts = [len(marked) for marked in firing if marked]
    typical = math.ceil(sum(counts) / len(counts)) if counts else 1
    found = []
    for example, marked, weight in zip(examples, firing, weights, strict=True):
        fires = bool(marked)
        if kind == "detection":
            marked = ()
        elif not fires:
            number = min(typical, len(example.tokens))
            marked = tuple(sorted(chance.choice(len(example.tokens), number, replace=False).tolist()))
        found.append(Question(example.tokens, example.token_ids, marked, fires, example.kind, weight, example.hard))
    return found


def _strong(activations: Sequence[float]) -> tuple[int, ...]:
    top = max(activations, default=0.0)
    return tuple(i for i, a in enumerate(activations) if a > 0 and a >= _MARKED_FROM * top)


def judged(asked: Sequence[Question], answers: Sequence[Judgement], resamples: int, seed: int) -> dict[str, Any]:
    """Return what a judge's answers are worth: counts (says yes x fires), the figures of `Counts.scores`, AUC, intervals.

    At the top level every question counts once, as tests of equal halves do; `population` weighs them by the windows that they
    stand for, so that precision is what a user would meet. `false_alarm_bound`: what so few silent windows rule out. None where
    undefined. Hard negatives count in `hard` alone, which is of them and of the windows in which the unit fires. `always_yes` is
    the F1 of who answers yes to everything.
    """
    pairs = list(zip(asked, answers, strict=True))
    hard = [(question, answer) for question, answer in pairs if question.hard or question.truth]
    has_hard = any(question.hard for question in asked)
    figures = _figures([pair for pair in pairs if not pair[0].hard], resamples, seed)
    return {**figures, "hard": _counted(hard) if has_hard else None}


def _counted(pairs: Sequence[tuple[Question, Judgement]]) -> dict[str, Any]:
    says, fires = [answer.probability > 0.5 for _, answer in pairs], [question.truth for question, _ in pairs]
    counts = Counts.of(says, fires)
    return {"counts": vars(counts), **plain({**counts.scores(), "auc": auc([answer.probability for _, answer in pairs], fires)})}


def _figures(pairs: Sequence[tuple[Question, Judgement]], resamples: int, seed: int) -> dict[str, Any]:
    says, fires = [answer.probability > 0.5 for _, answer in pairs], [question.truth for question, _ in pairs]
    strata = [f"{question.stratum} {question.truth}" for question, _ in pairs]
    weights = [question.weight for question, _ in pairs]
    masses = [answer.mass for _, answer in pairs if answer.mass is not None]
    return {
        **_counted(pairs),
        "false_alarm_bound": plain({"bound": Counts.of(says, fires).false_alarm_bound()})["bound"],
        "intervals": count_intervals(says, fires, strata=strata, resamples=resamples, seed=seed),
        "population": plain(Counts.of(says, fires, weights).scores()),
        "always_yes": plain(Counts.of([True] * len(fires), fires).scores())["f1"],
        "mass": sum(masses) / len(masses) if masses else None,
    }
