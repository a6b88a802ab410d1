"""Text -> fixed-length rows of token ids, with document boundaries marked and a held-out part set aside by document."""

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.config import DataConfig
from activation_store.errors import InputError, first_line
from activation_store.progress import Progress

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_DOCUMENTS_A_CALL = 256


@dataclass(frozen=True)
class TokenRows:
    """Packed text: tokens and documents are (sequence, context) int32; sequences from `train_sequences` on are held out.

    `counts` says what happened to the text: documents read, empty ones dropped, tokens left over.
    """

    tokens: NDArray[np.int32]
    documents: NDArray[np.int32]
    train_sequences: int
    counts: dict[str, int]
    facts: dict[str, Any]


def read_documents(config: DataConfig, seed: int) -> tuple[Iterator[list[Any]], dict[str, Any]]:
    """Open the text and return batches of documents and what identifies them (fingerprint, revision, split).

    Raises InputError for a source that cannot be opened, or a column that it does not have (listing those it has).
    """
    import datasets

    literal = Path(config.source).is_file()
    files = [config.source] if literal else sorted(f for f in glob.glob(config.source, recursive=True) if Path(f).is_file())
    suffix = Path(config.source).suffix
    try:
        if files and not any(Path(file).stat().st_size for file in files):
            raise InputError(f"data.source: {config.source} is empty")
        if files and suffix in _BUILDERS:
            options: dict[str, Any] = {"sample_by": config.txt_unit} if suffix == ".txt" else {}
            paths = [glob.escape(file) for file in files]  # datasets would take [ and ] for a pattern again
            data = datasets.load_dataset(_BUILDERS[suffix], data_files=paths, split="train", streaming=True, **options)
        elif suffix in _BUILDERS:
            raise InputError(f"data.source: no file matches {config.source!r}")
        else:
            data = datasets.load_dataset(
                config.source, config.name, split=config.split, revision=config.revision, streaming=config.streaming
            )
        columns = data.column_names or list(next(iter(data), {}))  # a streamed json file learns its columns by reading
    except InputError:
        raise
    except Exception as error:  # datasets raises a wide family here; each means that this source cannot be read
        raise InputError(f"data.source: cannot read {config.source!r} ({first_line(error)})") from error
    if columns and config.column not in columns:
        raise InputError(f"data.column: {config.column!r} is not in {config.source}; it has: {', '.join(columns)}")
    if config.shuffle_buffer:
        data = data.shuffle(seed=seed, buffer_size=config.shuffle_buffer) if config.streaming else data.shuffle(seed=seed)
    facts: dict[str, Any] = {"source": config.source, "name": config.name, "split": config.split}
    facts["revision"] = config.revision
    if files:
        facts["sha256"] = {Path(file).name: _sha256(Path(file)) for file in files}
    return _batches(config, data), facts


def _batches(config: DataConfig, data: Any) -> Iterator[list[Any]]:
    try:
        for batch in data.iter(batch_size=_DOCUMENTS_A_CALL):
            yield batch[config.column]
    except Exception as error:  # a later file or block that is broken or has other columns; datasets raises many kinds
        raise InputError(f"data.source: {config.source} cannot be read to its end ({first_line(error)})") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Decide by a hash of the text alone, so that equal documents always fall on the same side.

    >>> sum(is_held_out(f"document {i}", 0.25, 0) for i in range(1000)) in range(200, 300)
    True
    """
    digest = hashlib.blake2b(text.strip().encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


@dataclass
class _Packer:
    """Joins documents into rows of `context` tokens, each opened by BOS if there is one, until `limit` rows stand."""

    context: int
    bos: int | None
    limit: int
    rows: list[NDArray[np.int32]] = field(default_factory=list)
    owners: list[NDArray[np.int32]] = field(default_factory=list)
    pending: list[tuple[list[int], int]] = field(default_factory=list)
    held: int = 0

    def add(self, ids: list[int], document: int) -> None:
        self.pending.append((ids, document))
        self.held += len(ids)
        body = self.context - (self.bos is not None)
        if self.held < body:
            return
        flat = np.concatenate([np.asarray(ids, np.int32) for ids, _ in self.pending])
        owner = np.concatenate([np.full(len(ids), document, np.int32) for ids, document in self.pending])
        count = min(len(flat) // body, self.limit - len(self.rows))
        for row in range(count):
            part = slice(row * body, (row + 1) * body)
            bos = [] if self.bos is None else [self.bos]
            self.rows.append(np.concatenate([np.array(bos, np.int32), flat[part]]))
            self.owners.append(np.concatenate([owner[part][: len(bos)], owner[part]]))
        rest = flat[count * body :].tolist()
        self.pending, self.held = [(rest, document)] if rest else [], len(rest)

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.limit


def token_rows(config: DataConfig, tokenizer: Any, seed: int, progress: Progress = lambda done, total: None) -> TokenRows:
    """Tokenise and pack the text of `config` into rows of `config.context` tokens.

    Documents are joined with EOS between them and cut without padding; each row opens with BOS if `prepend_bos` and the
    tokenizer has one. Stops at `config.tokens` tokens or at the end of the text, whichever comes first: compare
    `TokenRows.tokens.size` with what was asked. Raises InputError where there is no text to speak of.
    """
    documents, facts = read_documents(config, seed)
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    bos = tokenizer.bos_token_id if config.prepend_bos else None
    wanted = max(config.tokens // config.context, 2)
    held_rows = min(max(1, round(wanted * config.held_out)), wanted - 1)
    train = _Packer(config.context, bos, wanted - held_rows)
    held = _Packer(config.context, bos, held_rows)
    counts = {"documents": 0, "empty_documents": 0, "unused_documents": 0, "tokens_left_over": 0}
    for texts in documents:
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise InputError(f"data.column: {config.column!r} of {config.source} holds {type(text).__name__}, not text")
        kept = [text for text in texts if text and text.strip()]
        counts["empty_documents"] += len(texts) - len(kept)
        encoded = tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"] if kept else []
        for text, ids in zip(kept, encoded, strict=True):
            packer = held if is_held_out(text, config.held_out, seed) else train
            if packer.full:
                counts["unused_documents"] += 1
            else:
                packer.add([*ids, *eos], counts["documents"])
                counts["documents"] += 1
        progress(min(len(train.rows) + len(held.rows), wanted) * config.context, wanted * config.context)
        if train.full and held.full:
            break
    counts["tokens_left_over"] = train.held + held.held
    for packer, what in ((train, "training"), (held, "held-out")):
        if not packer.rows:
            raise InputError(
                f"data.source: {config.source} gave {counts['documents']} documents with text ({counts['empty_documents']} "
                f"empty), not enough for one {what} row of {config.context} tokens; give more text or a smaller data.context"
            )
    return TokenRows(
        np.stack(train.rows + held.rows), np.stack(train.owners + held.owners), len(train.rows), counts, facts
    )
