"""How well predicted activations agree with true ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class CorrelationScores:
    """Scores over all tokens pooled; NaN where undefined, never zero.

    `ev_correlation` is Pearson's r; `rsquared` = 1 - mean((t - p)^2) / mean(t^2), not centred; `absolute_dev_explained`
    = 1 - mean|t - p| / mean|t|.
    """

    ev_correlation: float
    rsquared: float
    absolute_dev_explained: float


def correlation_scores(true: Sequence[ArrayLike], predicted: Sequence[ArrayLike]) -> CorrelationScores:
    """Score predictions as in Bills et al. 2023, "Language models can explain neurons in language models" (scoring).

    true, predicted: one array of activations a sequence, equal lengths; the sequences are concatenated first, for the mean
    of per-sequence correlations is another thing and can even differ in sign. Raises ValueError where lengths differ.

    >>> correlation_scores([[0, 1], [2, 3]], [[0, 2], [4, 6]]).ev_correlation
    1.0
    >>> correlation_scores([[0.0, 1.0]], [[5.0, 5.0]]).ev_correlation
    nan
    """
    if len(true) != len(predicted):
        raise ValueError(f"{len(true)} true and {len(predicted)} predicted sequences")
    t_parts, p_parts = ([np.asarray(a, dtype=np.float64).reshape(-1) for a in side] for side in (true, predicted))
    for i, (a, b) in enumerate(zip(t_parts, p_parts, strict=True)):
        if len(a) != len(b):
            raise ValueError(f"sequence {i}: {len(a)} true and {len(b)} predicted activations")
    t = np.concatenate(t_parts) if t_parts else np.empty(0)
    p = np.concatenate(p_parts) if p_parts else np.empty(0)
    if not len(t):
        return CorrelationScores(math.nan, math.nan, math.nan)
    return CorrelationScores(
        pearson(t, p), _one_minus(np.mean((t - p) ** 2), np.mean(t**2)), _one_minus(np.mean(abs(t - p)), np.mean(abs(t)))
    )


def pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return Pearson's r, NaN where either side is constant or not finite.

    A spread within rounding of the values themselves counts as none: float noise is not agreement.
    """
    x, y = a - a.mean(), b - b.mean()
    for centred, raw in ((x, a), (y, b)):
        if not np.isfinite(raw).all() or np.abs(centred).max() <= 1e-12 * np.abs(raw).max():
            return math.nan
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # so that squares neither overflow nor vanish
    return float(np.clip((x @ y) / math.sqrt(float(x @ x) * float(y @ y)), -1.0, 1.0))


def _one_minus(numerator: np.floating[Any], denominator: np.floating[Any]) -> float:
    return float(1 - numerator / denominator) if denominator > 0 else math.nan
