"""Sweeps: several SAEs that train in one pass: what they are called, and what comes of them side by side."""

import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from activation_store.errors import InputError
from sae.config import TrainConfig
from sae.sae import SAE

_VALUE_ALONE = ("architecture", "hook", "hook_out")  # that need no name beside them
_SHARED = 0.7  # cosine from which two seeds' decoder rows are one latent
SHARED = ("steps", "batch_size", "device", "kernels", "log_every", "checkpoint_every", "shuffle_mb", "max_norm_multiple")
"""The settings that SAEs trained in one pass have in common."""
FIGURES = ("l0", "explained_variance", "ce_recovered", "dead_fraction")


def expand(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of every member of a grid, the last field running fastest; of one without `grid`, themselves.

    >>> expand({"d_sae": 8, "grid": {"k": [1, 2], "seed": [0, 1]}})[1]
    {'d_sae': 8, 'k': 1, 'seed': 1}
    """
    grid = settings.get("grid")
    if grid is None:
        return [dict(settings)]
    if not isinstance(grid, Mapping) or not grid or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"train.grid: {grid!r} given; allowed: fields of train, each with a list of values, such as k: [16, 32]")
    common = {name: value for name, value in settings.items() if name != "grid"}
    twice = sorted(set(common) & set(grid))
    if twice:
        raise ValueError(f"train.grid: {', '.join(twice)} given in the grid and beside it; give it once")
    return [{**common, **dict(zip(grid, values, strict=True))} for values in product(*grid.values())]


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return a config as plain values, None for what means nothing to its architecture."""
    return {name: value if config.has(name) else None for name, value in config.model_dump(mode="json").items()}


def varies(configs: Sequence[TrainConfig]) -> list[str]:
    """Return the fields in which configs differ, of those that each gives a meaning."""
    found = []
    for name in type(configs[0]).model_fields:
        values = [getattr(config, name) for config in configs if config.has(name)]
        if any(value != values[0] for value in values):
            found.append(name)
    return found


def require_shared(configs: Mapping[str, TrainConfig]) -> None:
    """Raise InputError where SAEs that are to train in one pass differ in what is the pass's."""
    for field in SHARED:
        values = {name: getattr(config, field) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            given = ", ".join(f"{value} in {name}" for name, value in values.items())
            raise InputError(f"train.{field}: {given}; SAEs that train in one pass have it in common")


def named(configs: Sequence[TrainConfig]) -> dict[str, TrainConfig]:
    """Return configs by name, which is made of what they differ in. Raises InputError where two are equal.

    >>> list(named([TrainConfig(architecture="topk", d_sae=8, steps=1, k=k, seed=s) for k in (1, 2) for s in (0, 1)]))
    ['k-1_seed-0', 'k-1_seed-1', 'k-2_seed-0', 'k-2_seed-1']
    """
    fields, found = varies(configs), dict[str, TrainConfig]()
    for config in configs:
        parts = []
        for field in fields:
            value = settings_of(config)[field]
            if value is not None:
                values = value if isinstance(value, list) else [value]
                text = "+".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
                parts.append(text if field in _VALUE_ALONE else f"{field}-{text}")
        name = re.sub(r"[^A-Za-z0-9.+_-]+", "-", "_".join(parts)) or "sae"
        if name in found:
            raise InputError(f"train: two SAEs of the sweep are equal, {name}; give each settings of its own, such as a seed")
        found[name] = config
    return found


def summary(configs: Mapping[str, TrainConfig], results: Mapping[str, dict[str, Any]], saes: Mapping[str, SAE]) -> dict[str, Any]:
    """Return a sweep's figures side by side, from what `evaluate_many` gave.

    - varies: the fields in which the members differ.
    - saes: for each, those fields, l0, explained_variance, ce_recovered and dead_fraction with their intervals, and whether it is
      `efficient`: whether no other of the same hooks has at most its L0 and at least its explained variance, or
      `efficient_ce`, CE recovered.
    - reseed: for each setting with several seeds, mean, standard deviation and range of each figure over them, which is what a
      difference between settings has to be held against; and `shared_latents`, the mean share of one seed's decoder rows that
      have a cosine above 0.7 with one of another's.
    """
    fields = varies(list(configs.values()))
    lines = []
    for name, config in configs.items():
        found = results[name]
        settings = {field: settings_of(config)[field] for field in fields}
        intervals = {figure: found["intervals"].get(figure) for figure in FIGURES}
        lines.append({"name": name, **settings, "architecture": config.architecture, "hooks": [*config.hooks, *config.hooks_out],
                      **{f: found[f] for f in FIGURES}, "intervals": intervals})  # fmt: skip
    for line in lines:
        others = [other for other in lines if other["hooks"] == line["hooks"]]
        for mark, figure in (("efficient", "explained_variance"), ("efficient_ce", "ce_recovered")):
            line[mark] = not any(_better(other, line, figure) for other in others)
    groups: dict[str, list[str]] = {}
    for name, config in configs.items():
        groups.setdefault(str(config.model_dump(mode="json", exclude={"seed"})), []).append(name)
    reseed = []
    for names in (names for names in groups.values() if len(names) > 1):
        own = [line for line in lines if line["name"] in names]
        pairs = [_shared(saes[one], saes[other]) for one, other in combinations(names, 2)]
        settings = {field: own[0][field] for field in fields if field != "seed"}
        spread = {figure: _spread([line[figure] for line in own]) for figure in FIGURES}
        reseed.append({"saes": names, **settings, "architecture": own[0]["architecture"], **spread,
                       "shared_latents": statistics.mean(pairs)})  # fmt: skip
    return {"varies": fields, "saes": lines, "reseed": reseed}


def _better(other: dict[str, Any], line: dict[str, Any], figure: str) -> bool:
    """Say whether `other` is at least as good in L0 and the figure, and better in one; an undefined figure beats nothing."""
    if None in (other["l0"], other[figure], line["l0"], line[figure]):
        return line[figure] is None and other[figure] is not None
    no_worse = other["l0"] <= line["l0"] and other[figure] >= line[figure]
    return bool(no_worse and (other["l0"] < line["l0"] or other[figure] > line[figure]))


def _spread(values: list[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    return {"mean": statistics.mean(known), "sd": statistics.stdev(known), "least": min(known), "most": max(known)}


@torch.no_grad()
def _shared(one: SAE, other: SAE) -> float:
    """Return the share of decoder rows, of both, that have a cosine above `_SHARED` with one of the other."""
    a, b = (torch.nn.functional.normalize(sae.W_dec.float(), dim=1) for sae in (one, other))
    shares = [_nearest(x, y).gt(_SHARED).float().mean() for x, y in ((a, b), (b, a))]
    return float(sum(shares) / 2)


def _nearest(x: Tensor, y: Tensor) -> Tensor:
    """Return each row's largest inner product with a row of y, in parts: the whole matrix need not fit."""
    return torch.cat([(part @ y.T).amax(1) for part in torch.split(x, max(1, (1 << 24) // len(y)))])
