"""How well predicted activations agree with true ones, and how far that figure can be trusted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sae.evaluation.bootstrap import MOSTLY, Sums, intervals

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CorrelationScores:
    """Scores over all tokens pooled; NaN where undefined, never zero.

    `ev_correlation` is Pearson's r; `rsquared` = 1 - mean((t - p)^2) / mean(t^2), not centred; `absolute_dev_explained`
    = 1 - mean|t - p| / mean|t|; `rsquared_centred` = 1 - mean((t - p)^2) / mean((t - mean(t))^2), the textbook's.
    """

    ev_correlation: float
    rsquared: float
    absolute_dev_explained: float
    rsquared_centred: float


def correlation_scores(
    true: Sequence[ArrayLike], predicted: Sequence[ArrayLike], weights: Sequence[float] | None = None
) -> CorrelationScores:
    """Score predictions as in Bills et al. 2023, "Language models can explain neurons in language models" (scoring).

    true, predicted: one array of activations a sequence, equal lengths; the sequences are concatenated first, for the mean
    of per-sequence correlations is another thing and can even differ in sign. `weights`, one a sequence, says how many
    sequences of the population each stands for: all means become weighted ones, and the scores those of the population
    (where top and random windows are mixed half and half, it is far from that). Raises ValueError where lengths differ.

    >>> correlation_scores([[0, 1], [2, 3]], [[0, 2], [4, 6]]).ev_correlation
    1.0
    >>> correlation_scores([[0.0, 1.0]], [[5.0, 5.0]]).ev_correlation
    nan
    """
    t_parts, p_parts = _aligned(true, predicted)
    of_sequence = _weights(weights, len(t_parts))
    t = np.concatenate(t_parts) if t_parts else np.empty(0)
    p = np.concatenate(p_parts) if p_parts else np.empty(0)
    w = np.repeat(of_sequence, [len(part) for part in t_parts])
    t, p, w = t[w > 0], p[w > 0], w[w > 0]
    if not len(t):
        return CorrelationScores(math.nan, math.nan, math.nan, math.nan)
    w = w / w.sum()
    error, centred = w @ (t - p) ** 2, t - w @ t
    varies = np.isfinite(t).all() and np.abs(centred).max() > 1e-12 * np.abs(t).max()
    return CorrelationScores(
        pearson(t, p, w), _one_minus(error, w @ t**2), _one_minus(w @ abs(t - p), w @ abs(t)),
        _one_minus(error, w @ centred**2) if varies else math.nan,
    )  # fmt: skip


def correlation_intervals(
    true: Sequence[ArrayLike], predicted: Sequence[ArrayLike], weights: Sequence[float] | None = None, *,
    strata: Sequence[str] | None = None, resamples: int = 1000, seed: int = 0,
) -> dict[str, list[float] | None]:  # fmt: skip
    """Return the 95 % bootstrap interval of each of the `correlation_scores`, by name, over whole sequences.

    Tokens of a sequence are not independent, so sequences are drawn; from each of `strata` (one name a sequence, such as top
    and random) as many as there are, for their numbers were chosen, not found. None where a score is undefined in more than
    one resample of twenty, or there is but one sequence. Percentile intervals of few sequences are somewhat too narrow: those
    of a heavy-tailed unit's scores on 60 sequences hold the truth in 85 to 90 of 100 cases.
    """
    t_parts, p_parts = _aligned(true, predicted)
    scales = [max((np.abs(part).max(initial=0.0) for part in parts), default=0.0) or 1.0 for parts in (t_parts, p_parts)]
    of_sequence = _weights(weights, len(t_parts))
    everything = np.concatenate(t_parts) if t_parts else np.empty(0), np.concatenate(p_parts) if p_parts else np.empty(0)
    centre = [float(part.mean()) if len(part) else 0.0 for part in everything]
    sums = {name: np.zeros(len(t_parts)) for name in ("n", "t", "p", "tt", "pp", "tp", "square", "error", "size", "off")}
    for i, (t, p, weight) in enumerate(zip(t_parts, p_parts, of_sequence, strict=True)):
        x, y = (t - centre[0]) / scales[0], (p - centre[1]) / scales[1]  # so that little is lost where sums are subtracted
        raw, error = t / scales[0], (t - p) / scales[0]
        parts = {
            "n": len(t), "t": x.sum(), "p": y.sum(), "tt": x @ x, "pp": y @ y, "tp": x @ y, "square": raw @ raw,
            "error": error @ error, "size": np.abs(raw).sum(), "off": np.abs(error).sum(),
        }  # fmt: skip
        for name, value in parts.items():
            sums[name][i] = weight * value
    return intervals(sums, _of_sums, resamples, seed, strata=strata, defined=MOSTLY)


def _of_sums(s: Sums) -> dict[str, Floats]:
    with np.errstate(divide="ignore", invalid="ignore"):
        of_t, of_p = s["tt"] - s["t"] ** 2 / s["n"], s["pp"] - s["p"] ** 2 / s["n"]
        varies = (of_t > 1e-12 * s["n"]) & (of_p > 1e-12 * s["n"])  # of values of at most about 1
        correlation = (s["tp"] - s["t"] * s["p"] / s["n"]) / np.sqrt(of_t * of_p)
        return {
            "ev_correlation": np.where(varies, np.clip(correlation, -1, 1), np.nan),
            "rsquared": np.where(s["square"] > 0, 1 - s["error"] / s["square"], np.nan),
            "absolute_dev_explained": np.where(s["size"] > 0, 1 - s["off"] / s["size"], np.nan),
            "rsquared_centred": np.where(of_t > 1e-12 * s["n"], 1 - s["error"] / of_t, np.nan),
        }


def pearson(a: Floats, b: Floats, weights: Floats | None = None) -> float:
    """Return Pearson's r, NaN where either side is constant or not finite; `weights` sum to 1.

    A spread within rounding of the values themselves counts as none: float noise is not agreement.
    """
    w = np.full(len(a), 1 / len(a)) if weights is None else weights
    x, y = a - w @ a, b - w @ b
    for centred, raw in ((x, a), (y, b)):
        if not np.isfinite(raw).all() or np.abs(centred).max() <= 1e-12 * np.abs(raw).max():
            return math.nan
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # so that squares neither overflow nor vanish
    return float(np.clip((w * x @ y) / math.sqrt(float(w * x @ x) * float(w * y @ y)), -1.0, 1.0))


def _aligned(true: Sequence[ArrayLike], predicted: Sequence[ArrayLike]) -> tuple[list[Floats], list[Floats]]:
    """Return both sides as float64 arrays. Raises ValueError where numbers or lengths of sequences differ."""
    if len(true) != len(predicted):
        raise ValueError(f"{len(true)} true and {len(predicted)} predicted sequences")
    t_parts, p_parts = ([np.asarray(a, dtype=np.float64).reshape(-1) for a in side] for side in (true, predicted))
    for i, (a, b) in enumerate(zip(t_parts, p_parts, strict=True)):
        if len(a) != len(b):
            raise ValueError(f"sequence {i}: {len(a)} true and {len(b)} predicted activations")
    return t_parts, p_parts


def _weights(weights: Sequence[float] | None, sequences: int) -> Floats:
    if weights is None:
        return np.ones(sequences)
    found = np.asarray(weights, dtype=np.float64)
    if found.shape != (sequences,) or not np.isfinite(found).all() or (found < 0).any():
        raise ValueError(f"weights: {len(found)} given for {sequences} sequences; give one a sequence, none below 0")
    return found


def _one_minus(numerator: np.floating[Any], denominator: np.floating[Any]) -> float:
    return float(1 - numerator / denominator) if denominator > 0 else math.nan
