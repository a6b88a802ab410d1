"""Scores of yes-or-no judgements: does an explanation's concept stand in a window, and does the unit fire there?

Four counts say everything; what is called precision, recall, Type I and Type II differs between papers, so the counts are what
is stored, and names are given on the way out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sae.evaluation.bootstrap import MOSTLY, Sums, intervals

_FIELDS = ("concept_fires", "concept_silent", "other_fires", "other_silent")


@dataclass(frozen=True)
class Counts:
    """How many windows have the concept or not, and in how many of these the unit fires or is silent; sums of weights, if any."""

    concept_fires: float
    concept_silent: float
    other_fires: float
    other_silent: float

    @classmethod
    def of(cls, concept: ArrayLike, fires: ArrayLike, weights: ArrayLike | None = None) -> "Counts":
        """Count windows: `concept` is the judge's answer, `fires` the truth, (window,) each."""
        return cls(*(float(values.sum()) for values in _by_window(concept, fires, weights).values()))

    def scores(self) -> dict[str, float]:
        """Return the figures that follow, NaN where undefined.

        The explanation as a detector of firing (detection scoring, Paulo et al. 2024): precision = P(fires | concept), recall =
        P(concept | fires), f1, specificity = P(no concept | silent), balanced_accuracy, accuracy. The unit as a detector of the
        concept (Huang et al. 2023, "Rigorously Assessing Natural Language Explanations of Neurons"): type_1, the share of
        windows with the concept where the unit is silent, and type_2, that of its firings without it. F1 is the same.
        """
        counts = {name: np.float64(getattr(self, name)) for name in _FIELDS}
        return {name: float(value) for name, value in _figures(counts).items()}

    def precision_at(self, rate: float) -> float:
        """Return the precision where the unit fires in a share `rate` of all windows: TPR b / (TPR b + FPR (1 - b)).

        Balanced test sets flatter: a recall of 0.8 with 0.2 false alarms is a precision of 0.004 for a unit that fires in one
        window of a thousand. NaN where nothing fires or nothing is silent.
        """
        scores = self.scores()
        hits, alarms = scores["recall"] * rate, (1 - scores["specificity"]) * (1 - rate)
        return hits / (hits + alarms) if hits + alarms > 0 else math.nan

    def false_alarm_bound(self) -> float:
        """Return what the false-alarm rate is below, with 95 % confidence: with none in n windows, 3 / n (Clopper-Pearson).

        Of unweighted counts. NaN where no window is silent.
        """
        from scipy.stats import beta

        silent = self.concept_silent + self.other_silent
        if silent == 0:
            return math.nan
        return float(beta.ppf(0.95, self.concept_silent + 1, self.other_silent)) if self.other_silent > 0 else 1.0


def count_intervals(
    concept: ArrayLike, fires: ArrayLike, weights: ArrayLike | None = None, *, strata: Sequence[str] | None = None,
    resamples: int = 1000, seed: int = 0,
) -> dict[str, list[float] | None]:  # fmt: skip
    """Return 95 % bootstrap intervals of `Counts.scores`, over windows, within `strata` whose sizes were chosen."""
    return intervals(_by_window(concept, fires, weights), _figures, resamples, seed, strata=strata, defined=MOSTLY)


def auc(probability: ArrayLike, fires: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Return the probability that a window that fires is rated above one that is silent, ties counting half; NaN without both."""
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(fires, dtype=bool)
    w = np.ones(len(p)) if weights is None else np.asarray(weights, dtype=np.float64)
    if not np.isfinite(p).all() or not w[y].sum() or not w[~y].sum():
        return math.nan
    _, place = np.unique(p, return_inverse=True)
    positive, negative = (np.bincount(place, weights=w * side, minlength=place.max() + 1) for side in (y, ~y))
    below = negative.cumsum() - negative
    return float(positive @ (below + negative / 2) / (positive.sum() * negative.sum()))


def _by_window(concept: ArrayLike, fires: ArrayLike, weights: ArrayLike | None) -> dict[str, NDArray[np.float64]]:
    c, f = np.asarray(concept, dtype=bool).reshape(-1), np.asarray(fires, dtype=bool).reshape(-1)
    w = np.ones(len(c)) if weights is None else np.asarray(weights, dtype=np.float64).reshape(-1)
    if not len(c) == len(f) == len(w):
        raise ValueError(f"{len(c)} answers, {len(f)} truths and {len(w)} weights: give one of each a window")
    if not np.isfinite(w).all() or (w < 0).any():
        raise ValueError("weights: must be finite and not below 0")
    return dict(zip(_FIELDS, (w * (c & f), w * (c & ~f), w * (~c & f), w * (~c & ~f)), strict=True))


def _figures(s: Sums | Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    cf, cs, of, os = (np.asarray(s[name], dtype=np.float64) for name in _FIELDS)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall, specificity = cf / (cf + cs), cf / (cf + of), os / (os + cs)
        return {
            "precision": precision, "recall": recall, "specificity": specificity, "f1": 2 * cf / (2 * cf + cs + of),
            "balanced_accuracy": (recall + specificity) / 2, "accuracy": (cf + os) / (cf + cs + of + os),
            "type_1": cs / (cf + cs), "type_2": of / (cf + of),
        }  # fmt: skip
