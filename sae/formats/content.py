"""What lies at a path, as far as formats tell each other apart: tensors by name and shape, and the configs beside them."""

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from activation_store.errors import InputError, first_line

Container = Literal["safetensors", "npz", "torch"]
SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")
CONFIGS = ("cfg.json", "config.json")


@dataclass(frozen=True)
class Content:
    """One file of tensors, and the JSON objects that lie beside it.

    `shapes` are those of the tensors by name; `values` is what a torch file holds beside tensors; `configs` are cfg.json and
    config.json of the same folder, where they exist.
    """

    path: Path
    container: Container
    shapes: dict[str, tuple[int, ...]]
    values: dict[str, Any]
    configs: tuple[dict[str, Any], ...]
    _loaded: dict[str, Tensor]

    def __str__(self) -> str:
        """Return the file's name and what is in it."""
        names = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(self.shapes.items())[:8])
        more = f" and {len(self.shapes) - 8} more" if len(self.shapes) > 8 else ""
        return f"{self.path.name} ({self.container}: {names or 'no tensors'}{more})"

    def config(self, *keys: str) -> dict[str, Any] | None:
        """Return the config that has all `keys`, or None."""
        return next((config for config in self.configs if set(keys) <= config.keys()), None)

    def tensors(self) -> dict[str, Tensor]:
        """Read the tensors."""
        if self.container != "safetensors":
            return dict(self._loaded)
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in self.shapes}


def contents(path: Path) -> tuple[list[Content], list[InputError]]:
    """Return what the file `path`, or each file of tensors directly in the folder `path`, holds, and what could not be read.

    Nothing is unpickled. Raises InputError where there is no such path.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    found, faults = [], []
    for file in files:
        try:
            found.append(_content(file))
        except InputError as fault:
            faults.append(fault)
    return found, faults


def _content(path: Path) -> Content:
    configs = tuple(config for name in CONFIGS if (config := read_config(path.with_name(name))) is not None)
    container = _container(path)
    if container == "safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise InputError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
        return Content(path, container, shapes, {}, configs, {})
    loaded = _read_npz(path) if container == "npz" else _read_torch(path)
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in loaded.items() if not isinstance(value, Tensor)}
    return Content(path, container, {name: tuple(t.shape) for name, t in tensors.items()}, values, configs, tensors)


def read_config(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in `path`, or None where there is no such file. Raises InputError where it is not one."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not readable JSON ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a {type(config).__name__}; a config is a JSON object")
    return config


def _container(path: Path) -> Container:
    """Tell containers apart by their bytes; what is none of them is called after its suffix, whose reader says what is wrong."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # JSON, after its length
        return "safetensors"
    if head[:4] == b"PK\x03\x04" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return "npz" if any(name.endswith(".npy") for name in archive.namelist()) else "torch"
    if head[:1] == b"\x80":  # a pickle, which torch wrote before it wrote zip files
        return "torch"
    return "npz" if path.suffix == ".npz" else "torch" if path.suffix in (".pt", ".pth", ".bin") else "safetensors"


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable .npz file of numbers ({first_line(error)})") from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    """Return the dictionary that was torch.save'd; mapped, so that tensors which no format asks for are not read."""
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the old, unzipped kind cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what unpickling may not do is said in many ways
        raise InputError(f"{path}: not a torch file of tensors and plain values; nothing else is unpickled ({_why(error)})"
                         ) from error  # fmt: skip
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: holds a {type(loaded).__name__}; an SAE is a dictionary of tensors")
    return {str(name): value for name, value in loaded.items()}


def _why(error: Exception) -> str:
    """Say what of a file torch would not unpickle, without what it says beside that: how to unpickle it all the same."""
    refused = re.search(r"unsupported (?:global: )?GLOBAL (\S+)", str(error), re.IGNORECASE)
    return f"it asks for {refused[1]}" if refused else re.split(r" (?:This file can|In PyTorch)", first_line(error))[0]
