"""A synthetic model with known features: superposition, Zipf firing, hierarchy, correlation. `sae.recovery` scores SAEs on it.

The generative model is that of SynthSAEBench (Chanin & Garriga-Alonso 2026, arXiv 2602.14687, section 3): activations are
x = sum_i a_i g_i + bias with more features g_i than dimensions. `PRESETS` has its 16k configuration and a small one;
`SyntheticModel.load` reads a model that SAELens saved, such as the published one.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from activation_store.config import Section
from activation_store.errors import InputError, first_line
from sae.ops import SparseLatents, kernels_for

_REACH = 2.0  # see _heads_that_fire: deviations of the shared part up to which throws cover a feature's probability
_MOST_THROWN = 0.9  # and the largest probability that is thrown for
_CONFIG, _WEIGHTS, _HIERARCHY = "synthetic_model_config.json", "synthetic_model.safetensors", "hierarchy.json"  # SAELens'


class SyntheticConfig(Section):
    """What a synthetic model is made of. Features are numbered by rank: the first fires most often.

    `features` unit vectors in `d_in` dimensions, spread by `orthogonal_steps` (see `spread_out`). Feature i would fire with
    probability p_i = Zipf's i^-exponent, shifted and scaled to run from `max_probability` to `min_probability`. The
    first `roots` features head trees: each node above depth `depth` has `branching` children, numbered level by level; a
    child fires only where its parent does. A share `exclusive` of parents, chosen by chance, let one child fire at a time.
    With `compensate` a child's probability is raised for what hierarchy and exclusion take from it (`compensated`); with
    `scale_children` its magnitude is multiplied by its parent's over the parent's mean.
    Firing is correlated by a Gaussian copula: feature i fires where N(0, F F^T + diag) is above p_i's quantile, F
    (features, `correlation_rank`) with entries from N(0, `correlation_scale`^2); every p_i is exact for features without parent.
    Magnitudes are max(0, N(mean_i, std_i)): means run from `mean_magnitude`[0] of the first feature to [1] of the last, and
    std_i = |N(`magnitude_std`[0], `magnitude_std`[1]^2)|. `bias` is the norm of a fixed offset; `noise` the standard deviation
    of Gaussian noise in each dimension.
    """

    features: int = Field(ge=2)
    d_in: int = Field(ge=1)
    exponent: float = Field(default=0.5, gt=0)
    max_probability: float = Field(default=0.4, gt=0, le=1)
    min_probability: float = Field(default=5e-4, gt=0, le=1)
    roots: int = Field(default=0, ge=0)
    branching: int = Field(default=4, ge=1)
    depth: int = Field(default=3, ge=1)
    exclusive: float = Field(default=1.0, ge=0, le=1)
    compensate: bool = True
    scale_children: bool = True
    correlation_rank: int = Field(default=0, ge=0)
    correlation_scale: float = Field(default=0.1, ge=0)
    mean_magnitude: tuple[float, float] = (5.0, 4.0)
    magnitude_std: tuple[float, float] = (0.5, 0.5)
    orthogonal_steps: int = Field(default=3, ge=0)
    bias: float = Field(default=0.5, ge=0)
    noise: float = Field(default=0.0, ge=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "SyntheticConfig":
        """Refuse what contradicts itself."""
        if self.min_probability > self.max_probability:
            raise ValueError(f"min_probability: {self.min_probability} is above max_probability, {self.max_probability}")
        if min(self.mean_magnitude) <= 0:
            raise ValueError(f"mean_magnitude: {self.mean_magnitude} given; both ends must be above 0")
        if self.roots > self.features:
            raise ValueError(f"roots: {self.roots} given, but there are only {self.features} features")
        return self


_SYNTHSAEBENCH = SyntheticConfig(
    features=16_384, d_in=768, roots=128, correlation_rank=25, max_probability=0.4, min_probability=5e-4, seed=42
)
PRESETS: dict[str, SyntheticConfig] = {
    "synthsaebench-16k": _SYNTHSAEBENCH,
    # the same kind of problem for two CPU cores: 8 features a dimension, of which 5.4 fire on a row
    "small": _SYNTHSAEBENCH.model_copy(
        update={"features": 512, "d_in": 64, "roots": 4, "correlation_rank": 8, "min_probability": 4e-3}
    ),
}


@dataclass(frozen=True, eq=False)
class SyntheticModel:
    """Features and how they fire; `Seekable`, so that `train(model, config)` draws its batches.

    features (n, d_in), rows of norm 1; bias (d_in,); probability (n,), with which a feature fires where its parent does; mean
    and std (n,) of magnitudes; parent (n,) int64, -1 for none; exclusive and scales (n,) bool: its children exclude each
    other, or scale with it; factor (n, rank), the shared part of the copula. Batch `number` depends on (seed, batch_size,
    number) alone. Sampling takes time in proportion to what fires, and one pass over a (batch_size, n) product of rank `rank`.
    """

    features: Tensor
    bias: Tensor
    probability: Tensor
    mean: Tensor
    std: Tensor
    parent: Tensor
    exclusive: Tensor
    scales: Tensor
    factor: Tensor
    noise: float = 0.0
    seed: int = 0
    batch_size: int = 1024

    def __post_init__(self) -> None:
        """Refuse a batch size that is none."""
        if self.batch_size < 1:
            raise InputError(f"batch_size: {self.batch_size} given; it must be 1 or more")

    @classmethod
    def of(cls, config: SyntheticConfig, batch_size: int = 1024) -> "SyntheticModel":
        """Make the model that `config` describes, a pure function of it."""
        c, chance = config, np.random.default_rng(config.seed)
        features = spread_out(_normal(chance, c.features, c.d_in), c.orthogonal_steps)
        bias = torch.nn.functional.normalize(_normal(chance, c.d_in), dim=0) * c.bias
        std = (c.magnitude_std[0] + c.magnitude_std[1] * _normal(chance, c.features)).abs()
        factor = c.correlation_scale * _normal(chance, c.features, c.correlation_rank)
        # no feature may be the shared factors' alone: at least 1 % of its variance is its own
        factor *= (0.99**0.5 / factor.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        parent = tree(c.features, c.roots, c.branching, c.depth)
        families = torch.nonzero(_counts(parent) >= 2).squeeze(1).numpy()
        exclusive = torch.zeros(c.features, dtype=torch.bool)
        exclusive[torch.from_numpy(chance.choice(families, int(c.exclusive * len(families)), replace=False))] = True
        weight = torch.arange(1, c.features + 1, dtype=torch.float64) ** -c.exponent
        share = (weight - weight[-1]) / (weight[0] - weight[-1])
        probability = (c.min_probability + (c.max_probability - c.min_probability) * share).float()
        return cls(
            features, bias, compensated(probability, parent, exclusive) if c.compensate else probability,
            torch.linspace(*c.mean_magnitude, c.features), std, parent, exclusive,
            torch.full((c.features,), c.scale_children), factor, c.noise, c.seed, batch_size,
        )  # fmt: skip

    @classmethod
    def preset(cls, name: str, batch_size: int = 1024, **changes: Any) -> "SyntheticModel":
        """Make the model of a configuration in `PRESETS`, with fields of it changed. Raises InputError for an unknown name."""
        if name not in PRESETS:
            raise InputError(f"preset: {name!r} given; known: {', '.join(PRESETS)}")
        return cls.of(SyntheticConfig(**{**PRESETS[name].model_dump(), **changes}), batch_size)

    @classmethod
    def load(cls, path: str | Path, batch_size: int = 1024, seed: int = 0) -> "SyntheticModel":
        """Read a `SyntheticModel` that SAELens 6 saved, such as a download of decoderesearch/synth-sae-bench-16k-v1.

        `seed` is of the batches. Magnitudes are not in the folder; they are made again from its config, as SAELens does.
        Raises InputError for a folder that is none, or magnitudes that cannot be made again.
        """
        path, nodes = Path(path), []
        try:
            config, weights = json.loads((path / _CONFIG).read_text()), load_file(path / _WEIGHTS)
            features, bias, probability = (weights[name].float() for name in ("feature_vectors", "bias", "firing_probabilities"))
            if (path / _HIERARCHY).is_file():
                nodes = json.loads((path / _HIERARCHY).read_text())["roots"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"{path}: no folder that SAELens' SyntheticModel.save wrote ({first_line(error)})") from error
        n = len(features)
        parent, exclusive, scales = torch.full((n,), -1), torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
        while nodes:
            node = nodes.pop()
            index = node["feature_index"]
            if index is None:
                raise InputError(f"{path / _HIERARCHY}: a node without feature_index is not supported; give it a feature")
            exclusive[index], scales[index] = node["mutually_exclusive_children"], node["scale_children_by_parent"]
            parent[[child["feature_index"] for child in node["children"]]] = index
            nodes += node["children"]
        seed_of = {name: None if config["seed"] is None else config["seed"] + i for i, name in enumerate(("std", "mean"), 1)}
        mean, std = (_magnitudes(config[f"{name}_firing_magnitudes"], n, seed_of[name], path) for name in ("mean", "std"))
        return cls(
            features, bias, probability, mean, std, parent, exclusive, scales,
            weights.get("correlation_factor", torch.zeros(n, 0)).float(), seed=seed, batch_size=batch_size,
        )  # fmt: skip

    def stream(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the activations (batch_size, d_in) of batches `start`, `start` + 1, ... without end."""
        while True:
            yield self.batch(start)[0]
            start += 1

    def batch(self, number: int) -> tuple[Tensor, SparseLatents]:
        """Return batch `number`: activations (batch_size, d_in) and the coefficients they are made of, (batch_size, n) sparse.

        `coefficients.dense()` gives the plain matrix. Rows of x are sum_i a_i g_i + bias, plus noise if there is any.
        """
        chance = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(number,)))
        shared = _normal(chance, self.batch_size, self.factor.shape[1])
        rows, which = self._heads_that_fire(chance, shared)
        values = self._magnitudes(chance, which)
        rows, which, values = rows[values > 0], which[values > 0], values[values > 0]
        found = [(rows, which, values)]
        while len(which):
            rows, which, values = self._children_that_fire(chance, shared, rows, which, values)
            found.append((rows, which, values))
        rows, which, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = (rows * len(self.features) + which).argsort()
        starts = torch.nn.functional.pad(torch.bincount(rows, minlength=self.batch_size).cumsum(0), (1, 0))
        coefficients = SparseLatents(starts, which[order].int(), values[order], len(self.features), kernels_for("cpu"))
        x = coefficients.decode(self.features, self.bias)
        return x + self.noise * _normal(chance, *x.shape) if self.noise else x, coefficients

    @cached_property
    def _quantile(self) -> Tensor:
        """Where N(0, 1) is above with each feature's probability."""
        above: Tensor = -torch.special.ndtri(self.probability.double())
        return above.float()

    @cached_property
    def _own(self) -> Tensor:
        """The standard deviation of what the copula does not share."""
        return (1 - self.factor.square().sum(1)).clamp(min=0).sqrt()

    @cached_property
    def _heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """The features without parent; the probability they are drawn with; the shared part up to which that is enough."""
        heads = torch.nonzero(self.parent < 0).squeeze(1)
        quantile, own = self._quantile[heads], self._own[heads]
        chance = torch.special.ndtr((_REACH * self.factor[heads].norm(dim=1) - quantile) / own).clamp(max=_MOST_THROWN)
        return heads, chance, quantile + own * torch.special.ndtri(chance)

    @cached_property
    def _children(self) -> tuple[Tensor, Tensor, Tensor]:
        """All children ordered by parent; how many each feature has; where its own begin."""
        counts = _counts(self.parent)
        order = self.parent.argsort(stable=True)
        return order[len(self.parent) - int(counts.sum()) :], counts, counts.cumsum(0) - counts

    def _heads_that_fire(self, chance: np.random.Generator, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Return (entry,) rows and features, of those without parent, that fire.

        Given the shared part s = F_i . shared, feature i fires with probability P = Phi((s - quantile) / own), one independent
        of the other. Few do, so candidates are thrown at (row, feature) cells with a probability q >= P that is the feature's
        alone, by a Poisson number of throws of which equal ones count once, and kept with probability P / q. Where s is so
        large that P > q, cells are tried with P itself.
        """
        heads, q, limit = self._heads
        drive = shared @ self.factor[heads].T
        beyond = drive > limit
        throws = torch.from_numpy(chance.poisson((-torch.log1p(-q.double()) * self.batch_size).numpy()))
        columns = torch.repeat_interleave(throws)
        tried = beyond.clone()
        tried[torch.from_numpy(chance.integers(0, self.batch_size, len(columns))), columns] = True
        rows, columns = torch.nonzero(tried, as_tuple=True)
        which = heads[columns]
        p = torch.special.ndtr((drive[rows, columns] - self._quantile[which]) / self._own[which])
        bar = torch.where(beyond[rows, columns], p, p / q[columns])
        fires = _uniform(chance, len(bar)) < bar
        return rows[fires], which[fires]

    def _children_that_fire(
        self, chance: np.random.Generator, shared: Tensor, rows: Tensor, which: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows, features and magnitudes of the children that fire under these features."""
        children, counts, starts = self._children
        entry = torch.repeat_interleave(counts[which])
        first = counts[which].cumsum(0) - counts[which]
        child = children[starts[which[entry]] + torch.arange(len(entry)) - first[entry]]
        drive = (shared[rows[entry]] * self.factor[child]).sum(1)
        p = torch.special.ndtr((drive - self._quantile[child]) / self._own[child])
        fires = _uniform(chance, len(p)) < p
        entry, child = entry[fires], child[fires]
        scale = torch.where(self.scales[which[entry]], values[entry] / self.mean[which[entry]], 1)
        magnitude = self._magnitudes(chance, child) * scale
        # of exclusive siblings that would fire, one does: the one with the largest lot
        lot = torch.where(magnitude > 0, _uniform(chance, len(child)), -1)
        largest = torch.full((len(which),), -1.0, dtype=lot.dtype).scatter_reduce_(0, entry, lot, "amax")
        stays = (magnitude > 0) & (~self.exclusive[which[entry]] | (lot == largest[entry]))
        return rows[entry[stays]], child[stays], magnitude[stays]

    def _magnitudes(self, chance: np.random.Generator, which: Tensor) -> Tensor:
        return (self.mean[which] + self.std[which] * _normal(chance, len(which))).clamp_(min=0)


def tree(features: int, roots: int, branching: int, depth: int) -> Tensor:
    """Return each feature's parent (features,) int64, -1 for none: `roots` trees of `branching` children a node, by level."""
    parent = torch.full((features,), -1)
    inside = min(features, roots * sum(branching**level for level in range(depth + 1)))
    parent[roots:inside] = torch.arange(max(inside - roots, 0)) // branching
    return parent


def compensated(probability: Tensor, parent: Tensor, exclusive: Tensor) -> Tensor:
    """Return the probabilities (n,) with which features must fire where their parent does, to fire with `probability` (n,).

    p_i / p_parent, and for exclusive siblings times 1 + the expected number of others, sum_j p_j / p_parent (SynthSAEBench,
    `compute_probability_correction_factors`). The latter is an approximation, and siblings whose p_i together exceed their
    parent's cannot reach them; what would exceed 1 is 1.
    """
    child = torch.nonzero(parent >= 0).squeeze(1)
    of = parent[child]
    siblings = torch.zeros_like(probability).index_add_(0, of, probability[child])
    others = (siblings[of] - probability[child]).clamp(min=0) / probability[of]
    result = probability.clone()
    result[child] = (probability[child] / probability[of] * (1 + torch.where(exclusive[of], others, 0))).clamp(max=1)
    return result


def spread_out(vectors: Tensor, steps: int) -> Tensor:
    """Return vectors (n, d), at unit norm, as orthogonal to each other as `steps` of alternating projection make them.

    A step goes to the nearest tight frame, G (G^T G)^-1/2, and back to rows of norm 1, which lowers sum_ij (g_i . g_j)^2
    (Tropp et al. 2005, "Designing structured tight frames via alternating projection"); for n <= d one makes them orthogonal.
    """
    for _ in range(steps):
        wide = len(vectors) <= vectors.shape[1]
        gram = vectors @ vectors.T if wide else vectors.T @ vectors
        values, basis = torch.linalg.eigh(gram.double())
        root = ((basis / values.clamp(min=1e-12).sqrt()) @ basis.T).float()
        vectors = torch.nn.functional.normalize(root @ vectors if wide else vectors @ root, dim=1)
    return torch.nn.functional.normalize(vectors, dim=1)


def _counts(parent: Tensor) -> Tensor:
    """How many children each feature has, (n,) int64."""
    return torch.bincount(parent + 1, minlength=len(parent) + 1)[1:]


def _magnitudes(given: Any, n: int, seed: int | None, path: Path) -> Tensor:
    """Make (n,) means or deviations as SAELens' config names them: a number, or a generator and what it takes."""
    made = dict(given) if isinstance(given, dict) else {"generator_name": "constant", "value": given}
    name, ramp = made.pop("generator_name", None), torch.linspace(0, 1, n)
    if name == "constant":
        return torch.full((n,), float(made["value"]))
    if name == "linear":
        return torch.linspace(made["start"], made["end"], n)
    if name == "exponential":
        return torch.as_tensor(made["start"] * (made["end"] / made["start"]) ** ramp)
    if name != "folded_normal" or seed is None:
        raise InputError(f"{path / _CONFIG}: magnitudes {given!r} with seed {seed} cannot be made again; known: constant, "
                         "linear, exponential, and folded_normal with a seed")  # fmt: skip
    drawn: Tensor = (made["mean"] + made["std"] * torch.randn(n, generator=torch.Generator().manual_seed(seed))).abs()
    return drawn.clamp(made["min_value"] or 0, math.inf if made["max_value"] is None else made["max_value"])


def _normal(chance: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(chance.standard_normal(shape, dtype=np.float32))


def _uniform(chance: np.random.Generator, count: int) -> Tensor:
    return torch.from_numpy(chance.random(count))
