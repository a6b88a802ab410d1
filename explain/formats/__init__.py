"""Explanations in other tools' files: what monosem explained, written; what they did, read, to be scored by ours.

A format is one file here and one line in a table. Delphi's cache holds latents without descriptions, and needs a tokenizer: see
`explain.formats.delphi.read_delphi`.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from activation_store.errors import InputError
from activation_store.files import folder_aside
from explain.formats.delphi import read_delphi as read_delphi
from explain.formats.described import Described as Described
from explain.formats.described import Explanations as Explanations
from explain.formats.described import Names as Names
from explain.formats.described import score as score
from explain.formats.neuronpedia import read_neuronpedia, write_neuronpedia
from explain.formats.openai import read_openai, write_openai

WRITERS: dict[str, Callable[[Explanations, Path, Names], None]] = {
    "neuronpedia": write_neuronpedia,
    "openai": write_openai,
}
READERS: dict[str, Callable[[Path, Collection[int] | None], Iterator[Described]]] = {
    "neuronpedia": read_neuronpedia,
    "openai": read_openai,
}


def write_explanations(explained: Explanations, folder: Path, names: Names, format: str) -> None:
    """Write explanations as a new folder, whole or not at all."""
    if format not in WRITERS:
        raise InputError(f"format: {format!r} given; allowed: {', '.join(WRITERS)}")
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already; name a new folder")
    with folder_aside(folder) as aside:
        WRITERS[format](explained, aside, names)


def read_explanations(folder: Path, format: str, indices: Collection[int] | None = None) -> Iterator[Described]:
    """Yield units with their descriptions from a folder that another tool, or `write_explanations`, wrote."""
    if format not in READERS:
        raise InputError(f"format: {format!r} given; allowed: {', '.join(READERS)}")
    return READERS[format](Path(folder), indices)
