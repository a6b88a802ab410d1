"""Checkpoints: everything that decides the rest of a run. The order of the data is a function of the step."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from activation_store.errors import InputError
from activation_store.files import folder_aside
from sae.config import TrainConfig


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` steps: the SAE's state, the optimiser's, how long each latent has been idle,
    where the controller of the sparsity penalty stands, and which path it took."""

    step: int
    scales: list[float]
    dense: bool
    density: float
    weights: dict[str, Tensor]
    adam: dict[str, Tensor]
    tokens_idle: Tensor
    coefficient: Tensor


def save_checkpoint(folder: Path, checkpoint: Checkpoint, config: TrainConfig) -> Path:
    """Write it as folder/step-NNNNNNNNN, whole or not at all, remove the ones before, and return where it is."""
    tensors = {"tokens_idle": checkpoint.tokens_idle, "coefficient": checkpoint.coefficient}
    tensors |= {f"weights.{name}": value.detach() for name, value in checkpoint.weights.items()}
    tensors |= {f"adam.{name}": value for name, value in checkpoint.adam.items()}
    path = folder / f"step-{checkpoint.step:09d}"
    with folder_aside(path) as aside:
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside / "state.safetensors")
        facts = {"step": checkpoint.step, "scales": checkpoint.scales, "dense": checkpoint.dense,
                 "density": checkpoint.density}  # fmt: skip
        (aside / "state.json").write_text(json.dumps({**facts, "config": config.model_dump(mode="json")}))
    for other in folder.glob("step-*"):
        if other != path:
            shutil.rmtree(other)
    return path


def last_checkpoint(folder: Path | None, config: TrainConfig) -> Checkpoint | None:
    """Return the last one in `folder`, on the CPU. Raises InputError where it was made with another config."""
    found = sorted(folder.glob("step-*")) if folder is not None and folder.exists() else []
    if not found:
        return None
    path = found[-1]
    facts: dict[str, Any] = json.loads((path / "state.json").read_text())
    ours, theirs = config.model_dump(mode="json"), facts["config"]
    changed = [f"{key} {theirs.get(key)!r} -> {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
    if changed:
        raise InputError(f"train: the checkpoint {path} has other settings ({'; '.join(changed)}); delete it to start anew")
    tensors = load_file(path / "state.safetensors")

    def of(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}

    return Checkpoint(
        facts["step"], facts["scales"], facts["dense"], facts["density"], of("weights."), of("adam."), tensors["tokens_idle"],
        tensors["coefficient"],
    )  # fmt: skip
