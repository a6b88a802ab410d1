"""Text -> fixed-length rows of token ids that lead back to it, with a held-out part set aside by document, made once."""

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from filelock import FileLock

from activation_store.config import DataConfig
from activation_store.errors import InputError, first_line
from activation_store.files import folder_aside, remove_leftovers, write_json
from activation_store.packing import ARRAYS, Ints, Packer, Texts, encode, has_offsets, pack
from activation_store.progress import Progress

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_DOCUMENTS_A_BATCH = 256
_CHARACTERS_A_BATCH = 2_000_000  # a tokenizer needs some 200 bytes for each token of a batch, and books are long
_COMMIT = "[0-9a-f]{40}"
_FORMAT = 1  # of the cached rows: to be raised when the same text would give other bytes


@dataclass(frozen=True)
class TokenRows:
    """Packed text, read-only and mapped from disk; sequences from `train_sequences` on are held out.

    `tokens`, `documents` and `offsets` are (sequence, context) int32: the token, the number of its record in the source
    in reading order, and the character of that record's text at which it begins: `document_text(config, seed,
    documents[s, t])[offsets[s, t]:]` begins with token t. EOS stands at the end of the text it follows, BOS where the
    token after it stands. Offsets are -1 throughout, and facts["offsets"] false, if the tokenizer does not tell them.
    `counts` says what happened to the text: documents used, empty ones, unused ones, tokens left over. `facts` says
    where it came from; facts["rows_hash"] is the same for the same rows.
    """

    tokens: Ints
    documents: Ints
    offsets: Ints
    train_sequences: int
    counts: dict[str, int]
    facts: dict[str, Any]


def source_facts(config: DataConfig) -> dict[str, Any]:
    """Return what identifies the text: source, name, split, revision and, of local files, the sha256 of each.

    The revision is the commit it stands for now, where the hub can tell. Raises InputError for no or empty files.
    """
    files = _local_files(config)
    facts: dict[str, Any] = {"source": config.source, "name": config.name, "split": config.split}
    facts["revision"] = config.revision if files else _commit(config) or config.revision
    if files:
        root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
        facts["sha256"] = {os.path.relpath(file, root): _sha256(Path(file)) for file in files}
    return facts


def _local_files(config: DataConfig) -> list[str]:
    """Return the files that `config.source` names, in order: none if it is something for `datasets` to find."""
    if Path(config.source).suffix not in _BUILDERS:
        return []
    literal = Path(config.source).is_file()
    files = [config.source] if literal else sorted(f for f in glob.glob(config.source, recursive=True) if Path(f).is_file())
    if not files:
        raise InputError(f"data.source: no file matches {config.source!r}")
    if not any(Path(file).stat().st_size for file in files):
        raise InputError(f"data.source: {config.source} is empty")
    return files


def _commit(config: DataConfig) -> str | None:
    """Return the commit of a data set of the hub; None offline, unless the revision is one, and for what is not there."""
    from huggingface_hub import HfApi

    if re.fullmatch(_COMMIT, config.revision or ""):
        return config.revision
    if Path(config.source).exists():
        return None
    try:
        return HfApi().dataset_info(config.source, revision=config.revision, timeout=30).sha
    except Exception:  # offline, or no such data set: reading it will say what is wrong, if anything is
        return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_documents(config: DataConfig, seed: int, revision: str | None = None, start: int = 0) -> Iterator[Texts]:
    """Read the text from record `start` on, in batches of at most 256 documents.

    Local files are streamed whatever `config.streaming` says: nothing is converted that is not read. `revision` goes
    before that of `config`. Raises InputError for a source that cannot be opened or read to its end, and for a column
    that it does not have (listing those it has) or that holds no text.
    """
    import datasets

    files = _local_files(config)
    suffix = Path(config.source).suffix
    try:
        if files:
            options: dict[str, Any] = {"sample_by": config.txt_unit} if suffix == ".txt" else {}
            paths = [glob.escape(file) for file in files]  # datasets would take [ and ] for a pattern again
            data = datasets.load_dataset(_BUILDERS[suffix], data_files=paths, split="train", streaming=True, **options)
        else:
            data = datasets.load_dataset(
                config.source, config.name, split=config.split, revision=revision or config.revision, streaming=config.streaming
            )
        columns = data.column_names or list(next(iter(data), {}))  # a streamed json file learns its columns by reading
    except Exception as error:  # datasets raises a wide family here; each means that this source cannot be read
        raise InputError(f"data.source: cannot read {config.source!r} ({first_line(error)})") from error
    if columns and config.column not in columns:
        raise InputError(f"data.column: {config.column!r} is not in {config.source}; it has: {', '.join(columns)}")
    streamed = isinstance(data, datasets.IterableDataset)
    if config.shuffle_buffer:
        data = data.shuffle(seed=seed, buffer_size=config.shuffle_buffer) if streamed else data.shuffle(seed=seed)
    if start:
        data = data.skip(start) if streamed else data.select(range(start, len(data)) if start < len(data) else [])
    return _batches(config, data)


def _batches(config: DataConfig, data: Any) -> Iterator[Texts]:
    try:
        for batch in data.iter(batch_size=_DOCUMENTS_A_BATCH):
            yield from _checked(config, batch[config.column])
    except InputError:
        raise
    except Exception as error:  # a later file or block that is broken or has other columns; datasets raises many kinds
        raise InputError(f"data.source: {config.source} cannot be read to its end ({first_line(error)})") from error


def _checked(config: DataConfig, texts: list[Any]) -> Iterator[Texts]:
    """Yield `texts` as they are, or in parts if they are long."""
    part: Texts = []
    size = 0
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise InputError(f"data.column: {config.column!r} of {config.source} holds {type(text).__name__}, not text")
        part.append(text)
        size += len(text or "")
        if size > _CHARACTERS_A_BATCH:
            yield part
            part, size = [], 0
    if part:
        yield part


def document_text(config: DataConfig, seed: int, document: int) -> str:
    """Return the text of a record by its number in `TokenRows.documents`, from the source, as far as it must be read.

    For a data set of the hub that may have moved on, give `config` the revision in `TokenRows.facts`. Raises InputError
    if there is no such record, or no text in it.

    >>> from tempfile import mkdtemp
    >>> path = Path(mkdtemp(), "x.jsonl")
    >>> _ = path.write_text('{"text": "a text"}\\n{"text": "another"}\\n')
    >>> document_text(DataConfig(source=str(path)), 0, 1)
    'another'
    """
    batch = next(read_documents(config, seed, start=document), []) if document >= 0 else []
    if not batch or batch[0] is None:
        raise InputError(f"data.source: {config.source} has no text of number {document}")
    return batch[0]


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Decide by a hash of the text alone, so that equal documents always fall on the same side.

    >>> sum(is_held_out(f"document {i}", 0.25, 0) for i in range(1000)) in range(200, 300)
    True
    """
    digest = hashlib.blake2b(text.strip().encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def token_rows(config: DataConfig, tokenizer: Any, seed: int, progress: Progress = lambda done, total: None) -> TokenRows:
    """Tokenise and pack the text of `config` into rows of `config.context` tokens, or find them where that was done before.

    Documents are joined with EOS between them and cut without padding; each row opens with BOS if `prepend_bos` and the
    tokenizer has one. Stops at `config.tokens` tokens or at the end of the text, whichever comes first: compare
    `TokenRows.tokens.size` with what was asked. Raises InputError where there is no text to speak of.

    Rows lie in `$MONOSEM_CACHE` or ~/.cache/monosem, 12 bytes a token, under a hash of all that decides them; whoever
    wants the same at the same time waits. Where that cannot be known, their files go as soon as the arrays are let go.
    `progress` counts tokens.
    """
    facts = {**source_facts(config), "offsets": has_offsets(tokenizer)}
    key = _key(config, tokenizer, seed, facts)
    cache = Path(os.environ.get("MONOSEM_CACHE", Path.home() / ".cache" / "monosem")) / "rows"
    folder = cache / (key or f"once-{uuid4().hex}")
    try:
        rows = _open_rows(folder, facts) or _make_rows(folder, config, tokenizer, seed, facts, progress)
    finally:
        if key is None:
            shutil.rmtree(folder, ignore_errors=True)  # what is mapped lives on without a name
            _lock_file(folder).unlink(missing_ok=True)
    progress(int(rows.tokens.size), sum(_rows_wanted(config)) * config.context)
    return rows


def _rows_wanted(config: DataConfig) -> tuple[int, int]:
    """Return how many training and how many held-out rows are asked for, at least one of each."""
    wanted = max(config.tokens // config.context, 2)
    held_out = min(max(1, round(wanted * config.held_out)), wanted - 1)
    return wanted - held_out, held_out


def _key(config: DataConfig, tokenizer: Any, seed: int, facts: dict[str, Any]) -> str | None:
    """Hash all that decides the rows; None if some of it cannot be told: a text that may change, an odd tokenizer."""
    text = [Path(config.source).suffix, *facts["sha256"].values()] if "sha256" in facts else [config.source, facts["revision"]]
    pinned = "sha256" in facts or re.fullmatch(_COMMIT, facts["revision"] or "")
    words = _tokenizer_hash(tokenizer) if pinned else None
    if words is None:
        return None
    versions = {package: version(package) for package in ("datasets", "tokenizers", "transformers")}
    settings = config.model_dump(exclude={"source", "revision", "workers"})
    decides = [_FORMAT, versions, text, settings, seed, words, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]


def _tokenizer_hash(tokenizer: Any) -> str | None:
    """Hash a tokenizer whole: how it splits and merges, not only its vocabulary; None for one that cannot be hashed."""
    from datasets.fingerprint import Hasher

    if not has_offsets(tokenizer):
        try:
            return str(Hasher.hash(tokenizer))
        except Exception:  # it pickles the tokenizer, whose code may raise anything
            return None
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    inner["truncation"] = inner["padding"] = None  # set by each call, and off in ours
    return hashlib.sha256(json.dumps([inner, getattr(tokenizer, "split_special_tokens", False)]).encode()).hexdigest()


def _make_rows(
    folder: Path, config: DataConfig, tokenizer: Any, seed: int, facts: dict[str, Any], progress: Progress
) -> TokenRows:
    """Fill `folder` and map it, once no other process does the same. Raises InputError if the cache cannot be written."""
    lock = FileLock(_lock_file(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise InputError(f"MONOSEM_CACHE: cannot write to {folder.parent} ({first_line(error)})") from error
    try:
        rows = _open_rows(folder, facts)  # another may have made them while we waited
        if rows is None:
            remove_leftovers(folder.parent)
            with folder_aside(folder) as aside:
                _write_rows(aside, config, tokenizer, seed, facts["revision"], progress)
            rows = _open_rows(folder, facts)
    finally:
        lock.release()
    if rows is None:
        raise OSError(f"{folder}: the rows just written there do not read back")
    return rows


def _lock_file(folder: Path) -> Path:
    return folder.with_suffix(".lock")


def _write_rows(folder: Path, config: DataConfig, tokenizer: Any, seed: int, revision: str | None, progress: Progress) -> None:
    """Pack the text into `folder`: one raw file for each of ARRAYS, training rows first, and rows.json."""
    bos = tokenizer.bos_token_id if config.prepend_bos else None
    train_rows, held_rows = _rows_wanted(config)
    train = Packer(folder, "", config.context, bos, train_rows, 1 - config.held_out)
    held = Packer(folder, "held-out-", config.context, bos, held_rows, config.held_out)
    side = partial(is_held_out, fraction=config.held_out, seed=seed)
    encoder = partial(encode, tokenizer=tokenizer, held_out=side)
    counts = pack(read_documents(config, seed, revision), encoder, (train, held), config.workers or _cores(), progress)
    for packer, what in ((train, "training"), (held, "held-out")):
        if not packer.rows:
            raise InputError(
                f"data.source: {config.source} gave {counts['documents']} documents with text ({counts['empty_documents']} "
                f"empty), not enough for one {what} row of {config.context} tokens; give more text or a smaller data.context"
            )
    digest = hashlib.sha256()
    for path, rest in zip(train.paths, held.paths, strict=True):
        with open(path, "ab") as whole, open(rest, "rb") as part:
            shutil.copyfileobj(part, whole)
        rest.unlink()
        with open(path, "rb") as whole:
            hashlib.file_digest(whole, lambda: digest)  # goes on with the one digest
    shape = [train.rows + held.rows, config.context]
    about = {"shape": shape, "train_sequences": train.rows, "counts": counts, "rows_hash": digest.hexdigest()[:16]}
    write_json(folder / "rows.json", about)


def _cores() -> int:
    """Return how many processes tokenise: one a core, but no more than outrun any model, since each needs 0.3 GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)


def _open_rows(folder: Path, facts: dict[str, Any]) -> TokenRows | None:
    """Map the rows of `folder`; None if there are none, or not all of them."""
    try:
        about = json.loads((folder / "rows.json").read_text())
        shape = tuple(about["shape"])
        maps = [np.memmap(folder / name, np.int32, "r", shape=shape) for name in ARRAYS]
        whole = all((folder / name).stat().st_size == array.nbytes for name, array in zip(ARRAYS, maps, strict=True))
        facts = {**facts, "rows_hash": about["rows_hash"]}
        rows = TokenRows(maps[0], maps[1], maps[2], about["train_sequences"], about["counts"], facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rows if whole else None
