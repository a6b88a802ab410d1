"""Small harvests for several test files: one of 1600 tokens with any setting changed, and what it must leave.

PYTEST_DONT_REWRITE: it is imported as a module before pytest takes it for a plugin.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import activation_store.harvest as harvest_module
from activation_store import ActivationStore, DataConfig, HarvestConfig, ModelConfig
from activation_store.harvest import harvest
from activation_store.subject import Subject, load_subject

RESID, MLP = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"
SEQUENCES, BATCH, SHARD = 100, 8, 16  # of the stores made here: 7 shards of 2 batches, the last of half a batch
SHARDS, BATCHES = 7, 13


class Killed(BaseException):
    """What stands for a kill: nothing of ours catches it."""


def kill(*_args: Any, **_kwargs: Any) -> None:
    raise Killed


def run_harvest(subject: Subject, text: Path, path: Path, changes: dict[str, Any]) -> ActivationStore:
    data, config, rest = settings(text, changes)
    return harvest(rest.pop("subject", subject), data, config, path, **rest)


def settings(text: Path, changes: dict[str, Any]) -> tuple[DataConfig, HarvestConfig, dict[str, Any]]:
    """What to harvest from where, and the changes that belong to neither."""
    data: dict[str, Any] = {"source": str(text), "context": 16, "tokens": SEQUENCES * 16, "held_out": 0.2}
    config: dict[str, Any] = {"hooks": (RESID, MLP), "dtype": "float32", "batch_size": BATCH, "shard_mb": 0.07}
    rest = {}
    for key, value in changes.items():
        (data if key in DataConfig.model_fields else config if key in HarvestConfig.model_fields else rest)[key] = value
    return DataConfig(**data), HarvestConfig(**config), rest


def bytes_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def assert_same_store(found: Path, expected: Path) -> None:
    one, other = bytes_of(found), bytes_of(expected)
    assert set(one) == set(other)
    assert not [name for name in other if one[name] != other[name]]


@pytest.fixture(scope="module")
def subject(tiny_model_dir: Path) -> Subject:
    return load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def undisturbed(subject: Subject, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """What a harvest that nothing happened to leaves."""
    store = run_harvest(subject, tiny_text, tmp_path_factory.mktemp("undisturbed") / "activations", {})
    assert [store.shard_sequences(shard) for shard in (0, SHARDS - 1)] == [slice(0, SHARD), slice(96, SEQUENCES)]
    return store


@pytest.fixture
def again(subject: Subject, tiny_text: Path, tmp_path: Path) -> Callable[..., ActivationStore]:
    """The harvest that made `undisturbed`, in a folder of this test's own, with any setting changed."""

    def run(path: Path = tmp_path / "activations", **changes: Any) -> ActivationStore:
        return run_harvest(subject, tiny_text, path, changes)

    return run


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each forward pass that a harvest makes."""
    seen: list[int] = []
    real = harvest_module.capture

    def counting(model: Any, sites: Any, tokens: Tensor) -> dict[str, Tensor]:
        seen.append(len(tokens))
        return real(model, sites, tokens)

    monkeypatch.setattr(harvest_module, "capture", counting)
    return seen


def kill_at_shard(patch: pytest.MonkeyPatch, count: int, *, after_first_hook: bool = False) -> None:
    """Let `count` shards be written, then die in the next (with the first of its hooks already on disk)."""
    real, written = ActivationStore.write_shard, [0]

    def write_shard(self: ActivationStore, shard: int, activations: dict[str, Any]) -> None:
        if written[0] == count:
            if after_first_hook:
                real(self, shard, dict([next(iter(activations.items()))]))
            raise Killed
        written[0] += 1
        real(self, shard, activations)

    patch.setattr(ActivationStore, "write_shard", write_shard)
