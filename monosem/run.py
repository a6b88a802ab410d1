"""A run is a folder; a stage turns some of it into more of it, once, and says what it did."""

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from rich.markup import escape

from activation_store.errors import InputError
from activation_store.files import write_atomic, write_json
from activation_store.store import ActivationStore
from activation_store.subject import Subject, load_subject
from monosem.config import RunConfig, load_config
from monosem.progress import console
from sae.sae import SAE

_PACKAGES = ("monosem", "torch", "transformers", "transformer_lens", "datasets", "zarr", "safetensors", "numpy", "openai")


@dataclass(frozen=True)
class Stage:
    """One step: the config sections it reads, the stages whose results it reads, what it leaves, and its work.

    `intact` says whether a result that the manifest calls done is still whole.
    """

    name: str
    sections: tuple[str, ...]
    after: tuple[str, ...]
    outputs: tuple[str, ...]
    work: Callable[["Run"], dict[str, Any]]
    intact: Callable[["Run"], bool] = lambda run: True


class Run:
    """A run's folder and config. Stages are skipped when done, resumed when begun, and redone when settings changed."""

    def __init__(self, config: RunConfig) -> None:
        """Take the config; touch nothing on disk."""
        self.config = config
        self.folder = config.folder

    @classmethod
    def of_folder(cls, folder: str | Path) -> "Run":
        """Open an existing run by its folder."""
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise InputError(f"{folder}: not a run folder (no config.yaml); give one such as runs/demo")
        config = load_config(folder / "config.yaml", [f"runs_dir={folder.resolve().parent}", f"name={folder.resolve().name}"])
        return cls(config)

    # What the folder holds

    @property
    def activations(self) -> Path:
        """The store."""
        return self.folder / "activations"

    @property
    def explanations(self) -> Path:
        """Examples, descriptions and scores."""
        return self.folder / "explanations"

    @cached_property
    def subject(self) -> Subject:
        """The model, loaded once a process."""
        converted = " (a GGUF is converted once)" if self.config.model.id.endswith(".gguf") else ""
        with console.status(f"loading {self.config.model.id}{converted}"):
            return load_subject(self.config.model)

    def store(self) -> ActivationStore:
        """Open the harvested store."""
        return ActivationStore.open(self.activations)

    def sae_folder(self, name: str | None = None) -> Path:
        """Return where an SAE is: of a sweep the one of that name, or the chosen one."""
        return self.folder / "sae" / (self.config.chosen if name is None else name)

    def metrics(self, name: str | None = None) -> Path:
        """Return where an SAE's training is logged; see `sae_folder`."""
        chosen = self.config.chosen if name is None else name
        return self.folder / "metrics" / f"{chosen}.jsonl" if chosen else self.folder / "metrics.jsonl"

    def sae(self, name: str | None = None) -> SAE:
        """Load a trained SAE; see `sae_folder`."""
        folder = self.sae_folder(name)
        if not folder.exists():
            names = self.config.members
            known = f"; the sweep's are {', '.join(names)}" if name is not None and name not in names else ""
            raise InputError(f"{folder}: no SAE there{known or '; run `monosem train` first'}")
        return SAE.load(folder)

    def compared(self) -> dict[str, Any]:
        """Read how the SAE's latents compare with the other dictionaries that were explained."""
        path = self.explanations / "summary.json"
        found: dict[str, Any] = json.loads(path.read_text())["compared"] if path.exists() else {}
        return found

    # The manifest: versions, facts, and which stage is done with which settings

    def manifest(self) -> dict[str, Any]:
        """Read manifest.json; empty where there is none."""
        path = self.folder / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest."""
        write_json(self.folder / "manifest.json", {**self.manifest(), **facts})

    def begin(self) -> None:
        """Write what identifies this run: the resolved config, versions and command."""
        dump = self.config.model_dump(mode="json", exclude={"runs_dir"})
        write_atomic(self.folder / "config.yaml", yaml.safe_dump(dump, sort_keys=False, allow_unicode=True).encode())
        versions = {"python": platform.python_version()}
        for package in _PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = "not installed"
        self.note(versions=versions, seed=self.config.seed, command=shlex.join(["monosem", *sys.argv[1:]]))

    def key(self, stage: Stage, stages: dict[str, Stage]) -> str:
        """Hash everything that decides a stage's result: its sections and those of the stages before it."""
        sections = {"seed", *stage.sections}
        todo = list(stage.after)
        while todo:
            upstream = stages[todo.pop()]
            sections |= set(upstream.sections)
            todo += upstream.after
        return self.config.key(*sorted(sections))

    def finished(self, stage: Stage, stages: dict[str, Stage], states: tuple[str, ...] = ("done",)) -> bool:
        """Say whether a stage is done with just these settings."""
        state = self.manifest().get("stages", {}).get(stage.name, {})
        return state.get("state") in states and state.get("key") == self.key(stage, stages) and stage.intact(self)

    def do(self, stage: Stage, stages: dict[str, Stage]) -> None:
        """Run one stage unless it is done; results of other settings are moved to previous/, never deleted.

        A stage before it that was made here with other settings is an error; a folder that came from elsewhere is taken
        as it is.
        """
        for name in stage.after:
            before = self.manifest().get("stages", {}).get(name)
            if before is not None and not self.finished(stages[name], stages, ("done", "incomplete")):
                why = "has not finished" if before["key"] == self.key(stages[name], stages) else "was made with other settings"
                raise InputError(f"{stage.name}: {name} in {self.folder} {why}; run `monosem {name}` with this config first")
        key = self.key(stage, stages)
        with self._alone():  # several processes may harvest at once; one of them moves old results away and says so
            state = self.manifest().get("stages", {}).get(stage.name)
            if state is not None and self.finished(stage, stages):
                console.print(f"[green]✓[/] {stage.name:<9} done already, {state['finished']}: {_figures(state['figures'])}")
                return
            if state is not None and state["key"] != key:
                self._set_aside(stage, state["key"])
            self.begin()
            self._mark(stage, {"state": "begun", "key": key})
        start = time.perf_counter()
        figures = stage.work(self)
        seconds = time.perf_counter() - start
        incomplete = figures.pop("incomplete", False)  # parts failed: good enough to go on with, tried again next time
        with self._alone():
            self._mark(stage, {
                "state": "incomplete" if incomplete else "done", "key": key, "seconds": round(seconds, 2), "figures": figures,
                "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            })  # fmt: skip
        sign = "[yellow]![/]" if incomplete else "[green]✓[/]"
        console.print(f"{sign} {stage.name:<9} {seconds:,.0f} s: {_figures(figures)}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes of this run from reading and writing the manifest meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            yield

    def _mark(self, stage: Stage, state: dict[str, Any]) -> None:
        self.note(stages={**self.manifest().get("stages", {}), stage.name: state})

    def _set_aside(self, stage: Stage, key: str) -> None:
        kept = self.folder / "previous" / f"{stage.name}-{key[:8]}"
        moved = [output for output in stage.outputs if (self.folder / output).exists()]
        for output in moved:
            target = kept / output
            number = 0
            while target.exists():  # the same settings were set aside before
                number += 1
                target = kept / f"{output}.{number}"
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / output).rename(target)
        if moved:
            console.print(f"  {stage.name}: settings changed; what was there is now in {kept}")


def _figures(figures: dict[str, Any]) -> str:
    """Return figures as short text."""
    parts = []
    for name, value in figures.items():
        if isinstance(value, float):
            text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
        parts.append(f"{name.replace('_', ' ')} {text}")
    return escape(", ".join(parts))  # paths and names may hold brackets, which rich takes for markup
