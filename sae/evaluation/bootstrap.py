"""Bootstrap intervals by resampling sequences, whose tokens are not independent of each other (Cameron et al. 2008)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOSTLY = 0.95
"""Of the resamples that a figure may be undefined in few of: an interval of fewer would be of another quantity."""
Sums = Mapping[str, NDArray[np.float64]]
"""Named sums over tokens: (cluster, ...), or summed over clusters (...), or resampled (resample, ...)."""
Figures = Callable[[Sums], dict[str, NDArray[np.float64]]]
"""How figures follow from sums: the same for one sample and, along the first axis, for many."""


def intervals(
    sums: Sums, figures: Figures, resamples: int, seed: int, level: float = 0.95, *,
    strata: Sequence[str] | None = None, defined: float = 1.0,
) -> dict[str, list[float] | None]:  # fmt: skip
    """Return the percentile interval of each figure; None where nothing can be resampled, or it is undefined too often.

    `sums` are (cluster, ...) each; a resample draws as many clusters as there are, with replacement, from each of `strata` (a
    name for each cluster) as many as it has: those whose numbers were fixed beforehand. One product with a (resample, cluster)
    matrix of counts does all. A share of `defined` of the resamples must have the figure; the interval is of these.
    """
    clusters = len(next(iter(sums.values())))
    if clusters < 2 or resamples < 1:
        return dict.fromkeys(figures(total(sums)))
    chance, counts = np.random.default_rng(seed), np.zeros((resamples, clusters))
    names = np.zeros(clusters) if strata is None else np.asarray(strata)
    for stratum in np.unique(names):
        members = np.flatnonzero(names == stratum)
        counts[:, members] = chance.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    drawn = {name: (counts @ values.reshape(clusters, -1)).reshape(-1, *values.shape[1:]) for name, values in sums.items()}
    tail = (1 - level) / 2
    found: dict[str, list[float] | None] = {}
    for name, values in figures(drawn).items():
        known = values[np.isfinite(values)]
        enough = len(known) >= max(defined * len(values), 1)
        found[name] = np.quantile(known, [tail, 1 - tail]).tolist() if enough else None
    return found


def total(sums: Sums) -> Sums:
    """Sum over clusters."""
    return {name: values.sum(0) for name, values in sums.items()}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures as Python floats; None where undefined."""
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}
