"""Bootstrap intervals by resampling sequences, whose tokens are not independent of each other (Cameron et al. 2008)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Sums = Mapping[str, NDArray[np.float64]]
"""Named sums over tokens: (cluster, ...), or summed over clusters (...), or resampled (resample, ...)."""
Figures = Callable[[Sums], dict[str, NDArray[np.float64]]]
"""How figures follow from sums: the same for one sample and, along the first axis, for many."""


def intervals(
    sums: Sums, figures: Figures, resamples: int, seed: int, level: float = 0.95
) -> dict[str, list[float] | None]:  # fmt: skip
    """Return the percentile interval of each figure; None where it is undefined in a resample, or nothing can be resampled.

    `sums` are (cluster, ...) each; a resample draws as many clusters as there are, with replacement. One product with a
    (resample, cluster) matrix of counts does all.
    """
    clusters = len(next(iter(sums.values())))
    if clusters < 2 or resamples < 1:
        return dict.fromkeys(figures(total(sums)))
    counts = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(float)
    drawn = {name: (counts @ values.reshape(clusters, -1)).reshape(-1, *values.shape[1:]) for name, values in sums.items()}
    tail = (1 - level) / 2
    found: dict[str, list[float] | None] = {}
    for name, values in figures(drawn).items():
        found[name] = np.quantile(values, [tail, 1 - tail]).tolist() if np.isfinite(values).all() else None
    return found


def total(sums: Sums) -> Sums:
    """Sum over clusters."""
    return {name: values.sum(0) for name, values in sums.items()}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures as Python floats; None where undefined."""
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}
