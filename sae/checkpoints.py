"""Checkpoints: everything that decides the rest of a run. The order of the data is a function of the step."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from activation_store.errors import InputError
from activation_store.files import folder_aside
from sae.config import TrainConfig

State = tuple[dict[str, Tensor], dict[str, Any]]
"""What a stack of SAEs in training gives: tensors and facts."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` steps: the scale of each tensor of a batch, and the state of each stack."""

    step: int
    scales: list[list[float]]
    stacks: list[State]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, configs: Mapping[str, TrainConfig]) -> Path:
    """Write it as folder/step-NNNNNNNNN, whole or not at all, remove the ones before, and return where it is."""
    path = folder / f"step-{checkpoint.step:09d}"
    with folder_aside(path) as aside:
        for number, (tensors, _) in enumerate(checkpoint.stacks):
            save_file({name: value.contiguous() for name, value in tensors.items()}, aside / f"stack-{number}.safetensors")
        facts = {"step": checkpoint.step, "scales": checkpoint.scales, "stacks": [facts for _, facts in checkpoint.stacks]}
        settings = {name: config.model_dump(mode="json") for name, config in configs.items()}
        (aside / "state.json").write_text(json.dumps({**facts, "configs": settings}))
    for other in folder.glob("step-*"):
        if other != path:
            shutil.rmtree(other)
    return path


def last_checkpoint(folder: Path | None, configs: Mapping[str, TrainConfig]) -> Checkpoint | None:
    """Return the last one in `folder`, on the CPU. Raises InputError where it was made with other configs."""
    found = sorted(folder.glob("step-*")) if folder is not None and folder.exists() else []
    if not found:
        return None
    path = found[-1]
    facts: dict[str, Any] = json.loads((path / "state.json").read_text())
    changed = _changes({name: config.model_dump(mode="json") for name, config in configs.items()}, facts.get("configs", {}))
    if changed:
        raise InputError(f"train: the checkpoint {path} has other settings ({'; '.join(changed)}); delete it to start anew")
    stacks = [(load_file(path / f"stack-{number}.safetensors"), about) for number, about in enumerate(facts["stacks"])]
    return Checkpoint(facts["step"], facts["scales"], stacks)


def _changes(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> Sequence[str]:
    """Return what differs between a sweep's settings and a checkpoint's."""
    if list(ours) != list(theirs):
        return [f"SAEs {', '.join(theirs) or 'of another format'} -> {', '.join(ours)}"]
    return [
        f"{name}{name and '.'}{key} {theirs[name].get(key)!r} -> {value!r}"
        for name, config in ours.items() for key, value in config.items() if theirs[name].get(key) != value
    ]  # fmt: skip
