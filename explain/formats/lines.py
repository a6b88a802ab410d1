"""JSON lines for and of others: a reader that names file, line and field, and a writer of equal bytes for equal content."""

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from activation_store.errors import InputError, first_line

Record = dict[str, Any]
_GZIP_LEVEL = 5  # Neuronpedia's own


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "a whole number": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "a number": _is_number,
    "an object": lambda value: isinstance(value, dict),
    "a list": lambda value: isinstance(value, list),
    "a list of texts": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "a list of numbers": lambda value: isinstance(value, list) and all(_is_number(one) for one in value),
}


def need(record: Record, name: str, kind: str, where: str) -> Any:
    """Return a field that must be there and of that kind, one of `_KINDS`. Raises InputError naming `where` and the field."""
    if name not in record:
        raise InputError(f"{where}: no field {name!r}; it must be {kind}")
    value = record[name]
    if not _KINDS[kind](value):
        shown = json.dumps(value)
        raise InputError(f"{where}: {name}: {shown[:60] + '…' * (len(shown) > 60)} given; it must be {kind}")
    return value


def may(record: Record, name: str, kind: str, where: str, default: Any) -> Any:
    """Return a field as `need` does, `default` where it is missing or null."""
    return default if record.get(name) is None else need(record, name, kind, where)


def read_lines(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield each line's object with where it stands ("file, line 3"); gzipped or not is told by the content."""
    number = 0
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", _object(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not readable after line {number} ({first_line(error)})") from error


def read_object(path: Path) -> Record:
    """Return the one JSON object in a file."""
    try:
        return _object(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: not readable ({first_line(error)})") from error


def _object(line: bytes, where: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:  # text that is not UTF-8, too
        raise InputError(f"{where}: not readable JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds a {type(value).__name__}; it must be a JSON object")
    return value


def as_lines(records: Sequence[Record]) -> bytes:
    """Return one object a line, ASCII. NaN is refused: no two readers agree on it."""
    return b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)


def put(path: Path, data: bytes) -> None:
    """Write a file of a folder that is made aside: that one appears whole or not at all, and is brought to disk then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def as_gzip(records: Sequence[Record]) -> bytes:
    """Return the lines gzipped, without the time."""
    return gzip.compress(as_lines(records), _GZIP_LEVEL, mtime=0)


def storable(text: str) -> str:
    """Put the replacement character for what databases take in no text: NUL, and halves of surrogate pairs."""
    return re.sub("[\\x00\\ud800-\\udfff]", "\N{REPLACEMENT CHARACTER}", text)
