"""Moments of activations, summed on the device while they are harvested and folded shard by shard."""

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FULL_COVARIANCE = 1024
"""Hooks up to this width get their whole covariance, wider ones its diagonal: d^2 sums a shard would outgrow the rows."""
NORM_EDGES = tuple(float(2.0 ** (k / 8)) for k in range(-80, 161))
"""Edges of the norm histogram: eight bins an octave from 2^-10 to 2^20, smaller and larger norms in the outer bins."""


@dataclass(frozen=True)
class HookStatistics:
    """Moments of one hook's activations x over all rows that are neither special tokens nor padding.

    `rows` counts them; `mean` and `variance` are (d,); `covariance` is (d, d), or None past `FULL_COVARIANCE`;
    `mean_norm` = E||x||, `mean_square_norm` = E||x||^2, `max_norm` = max ||x||; `norm_histogram` counts ||x|| between
    `NORM_EDGES`. Moments are of the population (divided by `rows`), of the values as stored (int8: before they are rounded).
    """

    rows: int
    mean: NDArray[np.float64]
    mean_norm: float
    mean_square_norm: float
    max_norm: float
    variance: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    norm_histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(NORM_EDGES) - 1, np.int64))
    covariance: NDArray[np.float32] | None = None

    @property
    def median_norm(self) -> float:
        """Median of ||x||, read off the histogram: right to 2 % (bins are 9 % wide, interpolated within)."""
        total = np.cumsum(self.norm_histogram)
        if not len(total) or not total[-1]:
            return float("nan")
        half = total[-1] / 2
        index = int(np.searchsorted(total, half))
        share = (half - (total[index] - self.norm_histogram[index])) / self.norm_histogram[index]
        return float(NORM_EDGES[index] * (NORM_EDGES[index + 1] / NORM_EDGES[index]) ** share)


class Sums:
    """What the statistics of one hook in one shard are made of. Lives on the device: adding never waits for it."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        """Start from nothing, for activations (row, width)."""
        precise = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.values: dict[str, Tensor] = {
            "rows": torch.zeros((), dtype=torch.int64, device=device),
            "sum": torch.zeros(width, dtype=precise, device=device),
            "square": torch.zeros(width, dtype=precise, device=device),
            "norm": torch.zeros((), dtype=precise, device=device),
            "square_norm": torch.zeros((), dtype=precise, device=device),
            "max_norm": torch.zeros((), dtype=precise, device=device),
            "histogram": torch.zeros(len(NORM_EDGES) - 1, dtype=torch.int64, device=device),
        }
        if width <= FULL_COVARIANCE:
            self.values["cross"] = torch.zeros((width, width), dtype=precise, device=device)
        self._edges = torch.tensor(NORM_EDGES[1:-1], device=device)

    def add(self, x: Tensor, norms: Tensor, kept: Tensor) -> None:
        """Add the rows of x (row, d) float32 that `kept` (row,) marks; `norms` (row,) are their lengths."""
        x = torch.where(kept[:, None], x, 0.0)  # not x * kept: a sink's row may be infinite in float16, and inf * 0 is NaN
        norms = torch.where(kept, norms, 0.0)
        total = self.values
        total["rows"] += kept.sum()
        total["sum"] += x.sum(0, dtype=total["sum"].dtype)
        total["norm"] += norms.sum(dtype=total["norm"].dtype)
        total["square_norm"] += norms.to(total["norm"].dtype).square().sum()
        total["max_norm"] = torch.maximum(total["max_norm"], norms.max().to(total["norm"].dtype))
        total["histogram"].scatter_add_(0, torch.bucketize(norms, self._edges, right=True), kept.to(torch.int64))
        if "cross" in total:
            cross = x.T @ x
            total["cross"] += cross
            total["square"] += cross.diagonal()
        else:
            total["square"] += x.square().sum(0, dtype=total["square"].dtype)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the sums on the CPU; waits for the device. `cross` is its upper triangle in float32."""
        found = {name: value.cpu().numpy() for name, value in self.values.items()}
        if "cross" in found:
            found["cross"] = found["cross"][np.triu_indices(len(found["sum"]))].astype(np.float32)
        return found


def to_bytes(sums: dict[str, dict[str, NDArray[Any]]]) -> bytes:
    """Return the sums of all hooks as one .npz file."""
    file = io.BytesIO()
    np.savez(file, **{f"{hook}:{name}": value for hook, found in sums.items() for name, value in found.items()})  # type: ignore[arg-type]
    return file.getvalue()


def from_bytes(data: bytes) -> dict[str, dict[str, NDArray[Any]]]:
    """Read what `to_bytes` wrote. Raises ValueError for anything else, such as a file that a power cut emptied."""
    sums: dict[str, dict[str, NDArray[Any]]] = {}
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            for key in file.files:
                hook, _, name = key.rpartition(":")
                sums.setdefault(hook, {})[name] = file[key]
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise ValueError("no sums of a shard") from error
    return sums


class Fold:
    """Adds shards' sums up, one at a time and in shard order, so that the result does not depend on who wrote them."""

    def __init__(self) -> None:
        """Start from nothing."""
        self._totals: dict[str, dict[str, NDArray[Any]]] = {}

    def add(self, sums: dict[str, dict[str, NDArray[Any]]]) -> None:
        """Add one shard."""
        for hook, found in sums.items():
            if hook not in self._totals:
                self._totals[hook] = {n: v.astype(np.float64) if v.dtype == np.float32 else v.copy() for n, v in found.items()}
                continue
            totals = self._totals[hook]
            for name, value in found.items():
                totals[name] = np.maximum(totals[name], value) if name == "max_norm" else totals[name] + value

    def statistics(self) -> dict[str, HookStatistics]:
        """Return the moments of each hook."""
        result = {}
        for hook, total in self._totals.items():
            rows = max(int(total["rows"]), 1)
            mean = total["sum"] / rows
            covariance = None
            if "cross" in total:
                width = len(mean)
                second = np.zeros((width, width))
                second[np.triu_indices(width)] = total["cross"] / rows
                second = np.triu(second) + np.triu(second, 1).T
                covariance = (second - np.outer(mean, mean)).astype(np.float32)
            result[hook] = HookStatistics(
                rows=int(total["rows"]), mean=mean, mean_norm=float(total["norm"]) / rows,
                mean_square_norm=float(total["square_norm"]) / rows, max_norm=float(total["max_norm"]),
                variance=np.maximum(total["square"] / rows - mean**2, 0.0), norm_histogram=total["histogram"].astype(np.int64),
                covariance=covariance,
            )  # fmt: skip
        return result
