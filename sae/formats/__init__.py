"""On-disk formats. Adding one is a file here and a line below."""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from activation_store.errors import InputError
from activation_store.files import folder_aside
from sae.formats.beside import load_facts, load_latents, save_facts, save_latents
from sae.formats.circuit_tracer import CircuitTracerFormat
from sae.formats.content import Container, Content, contents
from sae.formats.dictionary_learning import DictionaryLearningFormat
from sae.formats.gemma_scope import GemmaScope2Format, GemmaScopeFormat
from sae.formats.openai import OpenAIFormat
from sae.formats.saelens import SAELensFormat
from sae.formats.sparsify import SparsifyFormat
from sae.formats.weights import Loaded, assemble
from sae.sae import SAE


class Format(Protocol):
    """How one family of SAE files is recognised, read and written.

    `keeps_facts` says that its own config holds hooks and all of the metadata; for others they are put beside. `container` is
    the kind of file that its tensors lie in.
    """

    keeps_facts: bool
    container: Container

    def detect(self, found: Content) -> bool:
        """Say whether this is the format of `found`, by content alone."""

    def load(self, found: Content) -> Loaded:
        """Read `found`. Raises InputError where it is not this format, or something that we would not compute alike."""

    def lacks(self, sae: SAE) -> str | None:
        """Name what of `sae` this format has no place for, or return None."""

    def save(self, sae: SAE, folder: Path) -> None:
        """Write `sae`, which lacks nothing, into an empty folder."""


FORMATS: dict[str, Format] = {
    "saelens": SAELensFormat(),
    "dictionary_learning": DictionaryLearningFormat(),
    "sparsify": SparsifyFormat(),
    "gemma_scope": GemmaScopeFormat(),
    "gemma_scope_2": GemmaScope2Format(),
    "openai": OpenAIFormat(),
    "circuit_tracer": CircuitTracerFormat(),
}


def load_sae(path: Path, format: str | None = None, dtype: str | None = None) -> SAE:
    """Return the SAE at `path`, a file or a folder; see `SAE.load`."""
    found, faults = contents(path)
    if format is not None:
        _known(format)
    names = FORMATS if format is None else (format,)
    matches = [(name, one) for one in found for name in names if FORMATS[name].detect(one)]
    if format is not None and not matches:  # it says better itself what it misses, if there is but one file that it may be
        likely = [(format, one) for one in found if one.container == FORMATS[format].container]
        matches = likely if len(likely) == 1 else []
    if len(matches) != 1:
        if not matches and faults:
            raise faults[0]
        raise InputError(_not_one(path, found, matches))
    name, one = matches[0]
    cfg, weights, rescaled = FORMATS[name].load(one)
    sae = assemble(cfg if dtype is None else replace(cfg, dtype=dtype), weights, one.path.parent if path.is_dir() else path)
    if not FORMATS[name].keeps_facts:
        load_facts(sae, one.path.parent)
    sae.latents = None if rescaled else load_latents(one.path.parent)
    return sae


def holds_sae(path: Path) -> bool:
    """Say whether a file in the folder `path` is an SAE's, or cannot be read: `load_sae` says why."""
    found, faults = contents(path)
    return bool(faults) or any(known.detect(one) for one in found for known in FORMATS.values())


def save_sae(sae: SAE, path: Path, format: str) -> None:
    """Write `sae` as a folder, whole or not at all; see `SAE.save`."""
    _known(format)
    missing = FORMATS[format].lacks(sae)
    if missing is not None:
        able = [name for name, known in FORMATS.items() if known.lacks(sae) is None]
        raise InputError(f"format: {format} has no place for {missing}; formats that do: {', '.join(able) or 'none'}")
    with folder_aside(path) as aside:
        FORMATS[format].save(sae, aside)
        if sae.latents is not None:
            save_latents(sae.latents, aside)
        if not FORMATS[format].keeps_facts:
            save_facts(sae, aside)


def _known(format: str) -> None:
    if format not in FORMATS:
        raise InputError(f"format: {format!r} given; allowed: {', '.join(FORMATS)}")


def _not_one(path: Path, found: list[Content], matches: list[tuple[str, Content]]) -> str:
    """Say why `path` is not one SAE, and what to do."""
    if matches:
        said = "; ".join(f"{name}: {one.path.name}" for name, one in matches)
        return f"{path}: {len(matches)} known SAE formats match ({said}); name the file or the format: SAE.load(path, format=...)"
    inside = sorted(folder.name for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []
    said = "; ".join(str(one) for one in found) or "no .safetensors, .npz or .pt file"
    below = f" Folders in it: {', '.join(inside[:8])}; is one of them meant?" if inside else ""
    return f"{path}: 0 known SAE formats match. Found: {said}. Known: {', '.join(FORMATS)}.{below}"
