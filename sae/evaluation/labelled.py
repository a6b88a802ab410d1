"""Labelled texts for probing: read from .jsonl or .csv, plain or compressed."""

import csv
import gzip
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.errors import InputError, first_line
from sae.config import ProbingConfig

MOST_CLASSES = 20
LEAST_TEXTS = 20
"""Texts that a class must have."""


@dataclass(frozen=True)
class Labelled:
    """One data set: texts, and the number of each one's class in `classes`; `dropped` had no text or no label, or stood twice.

    Where it cannot be probed, `reason` says why.
    """

    name: str
    texts: list[str]
    labels: list[int]
    classes: list[str]
    dropped: int
    reason: str | None = None


def read_labelled(path: str, config: ProbingConfig, seed: int) -> Labelled:
    """Read a data set and draw `config.texts` of its texts, as many of each class as there are, else equally many.

    Equal texts count once, so that none stands on both sides of a split. Raises InputError for a file that cannot be read or
    has no such columns.
    """
    pairs: dict[str, str] = {}
    lines = 0
    for text, label in _pairs(Path(path), config.text_column, config.label_column):
        lines += 1
        if text.strip() and label:
            pairs.setdefault(text.strip(), label)
    name = Path(path).name.split(".")[0]
    counts = Counter(pairs.values())
    dropped = lines - len(pairs)
    classes = sorted(label for label, count in counts.items() if count >= LEAST_TEXTS)
    if not 2 <= len(classes) <= MOST_CLASSES:
        reason = f"{len(classes)} labels of {LEAST_TEXTS} texts or more; probing takes 2 to {MOST_CLASSES}"
        return Labelled(name, [], [], [], dropped, reason)
    chance = np.random.default_rng(seed)
    texts, labels = [], []
    for number, label in enumerate(classes):
        own = [text for text, given in pairs.items() if given == label]
        kept = np.sort(chance.permutation(len(own))[: max(LEAST_TEXTS, config.texts // len(classes))])
        texts += [own[i] for i in kept]
        labels += [number] * len(kept)
    return Labelled(name, texts, labels, classes, dropped)


def _pairs(path: Path, text: str, label: str) -> Iterator[tuple[str, str]]:
    """Yield (text, label) of each record, "" for what it lacks."""
    field = "evaluate.probing.datasets"
    kind = next((suffix for suffix in reversed(path.suffixes) if suffix not in (".gz", ".zst")), None)
    if kind not in (".jsonl", ".csv"):
        raise InputError(f"{field}: {str(path)!r} given; allowed: .jsonl and .csv files, plain or .gz or .zst")
    try:
        with _open(path) as file:
            if kind == ".csv":
                csv.field_size_limit(sys.maxsize)
                reader = csv.DictReader(file)
                names = list(reader.fieldnames or ())
                records: Iterator[dict[str, Any]] = iter(reader)
            else:
                lines = (line for line in file if line.strip())
                first = json.loads(next(lines, "{}"))
                names = list(first) if isinstance(first, dict) else []
                records = chain([first], map(json.loads, lines))
            for key, column in (("text_column", text), ("label_column", label)):
                if column not in names:
                    raise InputError(f"evaluate.probing.{key}: {column!r} given, but {path} has: {', '.join(names) or 'nothing'}")
            for record in records:
                found = (record.get(text), record.get(label))
                yield ("" if found[0] is None else str(found[0])), ("" if found[1] is None else str(found[1]))
    except InputError:
        raise
    except (OSError, ValueError, csv.Error, EOFError) as error:
        raise InputError(f"{field}: {path} cannot be read ({first_line(error)})") from error


def _open(path: Path) -> io.TextIOWrapper:
    if path.suffix == ".zst":
        import zstandard

        binary: Any = zstandard.open(path, "rb")
    else:
        binary = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115
    return io.TextIOWrapper(binary, encoding="utf-8", newline="")
