"""Documents -> token ids with their offsets, in as many processes as there are -> rows of one length, on disk."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.progress import Progress

Ints = NDArray[np.int32]
Texts = list[str | None]
Encoder = Callable[[Texts], dict[str, Ints]]
ARRAYS = ("tokens", "documents", "offsets")  # what is known of each place of a row, one file each
TRAIN, HELD_OUT, EMPTY = range(3)  # where a document goes

# A pool costs 0.3 s to start and two cores tokenise 4 million characters a second, so less than this stays in-process;
# a piece is what the pool gets at once: text, ids and offsets of it, and their copies on the way, are all in memory.
_WORTH_A_POOL = 8_000_000
_PIECE = 16_000_000


def encode(texts: Texts, tokenizer: Any, held_out: Callable[[str], bool]) -> dict[str, Ints]:
    """Tokenise a batch of documents, each closed by EOS if the tokenizer has one.

    Returns ids and starts, (token,), of all documents one after another, and lengths and sides, (document,). A start is
    the character of its document at which a token begins, len(text) for EOS, -1 if the tokenizer does not tell; a side
    is TRAIN, HELD_OUT or, of a document without text, EMPTY.
    """
    kept = [text for text in texts if text and text.strip()]
    known = has_offsets(tokenizer)
    options = {"return_offsets_mapping": True, "return_attention_mask": False} if known else {}
    encoded = tokenizer(kept, add_special_tokens=False, verbose=False, **options) if kept else {"input_ids": []}
    lengths = np.array([len(document) for document in encoded["input_ids"]], np.int32)
    ids = np.fromiter(chain.from_iterable(encoded["input_ids"]), np.int32)
    starts = np.full(len(ids), -1, np.int32)
    if known and kept:  # (start, end), (start, end), ... -> start, start, ...
        starts = np.fromiter(chain.from_iterable(chain.from_iterable(encoded["offset_mapping"])), np.int32)[::2]
    if tokenizer.eos_token_id is not None:
        ends = np.cumsum(lengths)
        ids = np.insert(ids, ends, tokenizer.eos_token_id)
        starts = np.insert(starts, ends, [len(text) if known else -1 for text in kept])
        lengths += 1
    sides = np.array([(HELD_OUT if held_out(text) else TRAIN) if text and text.strip() else EMPTY for text in texts], np.int32)
    all_lengths = np.zeros(len(texts), np.int32)
    all_lengths[sides != EMPTY] = lengths
    return {"ids": ids, "starts": starts, "lengths": all_lengths, "sides": sides}


def has_offsets(tokenizer: Any) -> bool:
    """Say whether a tokenizer tells where in the text a token starts: those in Rust do, those in Python do not."""
    return bool(getattr(tokenizer, "is_fast", False))


class Packer:
    """Joins documents into rows of `context` tokens, each opened by BOS if there is one, until `limit` rows are written.

    Rows are appended to three raw int32 files, `prefix` + each of ARRAYS; what fills no row yet is all that is held.
    """

    def __init__(self, folder: Path, prefix: str, context: int, bos: int | None, limit: int, share: float) -> None:
        """Write below `folder`, which holds no such files yet; `share` is the part of the text that is expected here."""
        self.paths = [folder / (prefix + name) for name in ARRAYS]
        self.context, self.bos, self.limit, self.share = context, bos, limit, share
        self.body = context - (bos is not None)
        self.rows = 0
        self.rest: Ints = np.empty((len(ARRAYS), 0), np.int32)

    def add(self, places: Ints, lengths: Ints) -> int:
        """Pack documents of `lengths`, whose tokens lie one after another in `places`, (3, token): ids, documents, starts.

        Returns how many of them were taken: none that begins after the last row was filled.
        """
        before = np.cumsum(lengths) - lengths
        taken = int((before < self.missing).sum())
        flat = np.concatenate([self.rest, places[:, : lengths[:taken].sum()]], axis=1)
        count = min(flat.shape[1] // self.body, self.limit - self.rows)
        rows = flat[:, : count * self.body].reshape(len(ARRAYS), count, self.body)
        if self.bos is not None:
            rows = np.concatenate([rows[:, :, :1], rows], axis=2)  # BOS stands at the document and offset it comes before
            rows[0, :, 0] = self.bos
        for path, plane in zip(self.paths, rows, strict=True):
            with open(path, "ab") as file:
                file.write(np.ascontiguousarray(plane).data)
        self.rows += count
        self.rest = flat[:, count * self.body :].copy()
        return taken

    @property
    def missing(self) -> int:
        """How many tokens, BOS left out, until the last row is full."""
        return max((self.limit - self.rows) * self.body - int(self.rest.shape[1]), 0)


def pack(
    batches: Iterator[Texts], encoder: Encoder, packers: Sequence[Packer], workers: int, progress: Progress
) -> dict[str, int]:
    """Fill `packers`, that of TRAIN and that of HELD_OUT, in so many processes, and return the counts.

    Documents are numbered as they are read, those without text and those not used too. Stops after the batch that
    filled the last row. `progress` counts the tokens of whole rows.
    """
    counts = {"documents": 0, "empty_documents": 0, "unused_documents": 0, "tokens_left_over": 0}
    number = characters = tokens = 0
    while _missing(packers):
        needed = max(packer.missing / packer.share for packer in packers)
        piece = _take(batches, needed * characters / max(tokens, 1) if workers > 1 else 0)
        if not piece:
            break
        for texts, encoded in zip(piece, _encode_all(piece, encoder, workers), strict=True):
            lengths, sides = encoded["lengths"], encoded["sides"]
            owners = np.repeat(np.arange(number, number + len(texts), dtype=np.int32), lengths)
            places = np.stack([encoded["ids"], owners, encoded["starts"]])
            for side, packer in enumerate(packers):
                mine = sides == side
                taken = packer.add(places[:, np.repeat(mine, lengths)], lengths[mine])
                counts["documents"] += taken
                counts["unused_documents"] += int(mine.sum()) - taken
            counts["empty_documents"] += int((sides == EMPTY).sum())
            number += len(texts)
            characters += count_characters(texts)
            tokens += len(owners)
            progress(sum(packer.rows * packer.context for packer in packers), sum(p.limit * p.context for p in packers))
            if not _missing(packers):
                break
    counts["tokens_left_over"] = sum(packer.rest.shape[1] for packer in packers)
    return counts


def count_characters(texts: Texts) -> int:
    """Count the characters of a batch."""
    return sum(len(text) for text in texts if text)


def _missing(packers: Sequence[Packer]) -> bool:
    return any(packer.missing for packer in packers)


def _take(batches: Iterator[Texts], characters: float) -> list[Texts]:
    """Take batches of about `characters` for a pool, or one batch if that is too little for it; none at the text's end."""
    piece: list[Texts] = []
    size = 0
    for texts in batches:
        piece.append(texts)
        size += count_characters(texts)
        if characters < _WORTH_A_POOL or size >= min(characters, _PIECE):
            break
    return piece


def _encode_all(piece: list[Texts], encoder: Encoder, workers: int) -> Iterator[dict[str, Ints]]:
    """Encode batches in order: in this process, by the tokenizer's own threads, or by the processes of Dataset.map."""
    if workers == 1 or sum(map(count_characters, piece)) < _WORTH_A_POOL:
        yield from map(encoder, piece)
        return
    from datasets import Dataset, Features, List, Value

    whole, ints = Features({"texts": List(Value("large_string"))}), List(Value("int32"))
    with _map_alone():
        encoded = Dataset.from_dict({"texts": piece}, features=whole).map(
            encoder,
            input_columns="texts",
            remove_columns="texts",
            features=Features({name: ints for name in ("ids", "starts", "lengths", "sides")}),
            num_proc=workers,
            keep_in_memory=True,
            new_fingerprint="encoded",  # else it would hash the tokenizer, for a cache that is not used
        )
    yield from encoded.with_format("numpy", dtype=np.int32)


@contextmanager
def _map_alone() -> Iterator[None]:
    """Run Dataset.map without a trace: no progress bar of its own, and the environment as it was.

    Its processes have one tokenizer thread each, for which it sets TOKENIZERS_PARALLELISM; it then puts a copy in the
    place of os.environ and leaves the variable set in the C library's, which the tokenizers here would read.
    """
    import datasets

    name, environ, bars = "TOKENIZERS_PARALLELISM", os.environ, not datasets.are_progress_bars_disabled()
    before = environ.get(name)
    environ[name] = "false"
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        os.environ = environ  # noqa: B003 (it is the very object that was there)
        if before is None:
            del environ[name]
        else:
            environ[name] = before
        if bars:
            datasets.enable_progress_bars()
