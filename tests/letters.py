"""What the tests of text need: tokenizers of one token a letter, texts, files of them, and rows of those."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from activation_store import DataConfig
from activation_store.text import TokenRows, token_rows

EOS, BOS = 1, 2


def letters(text: str) -> list[int]:
    return [10 + ord(c) - ord("a") if "a" <= c <= "z" else 9 for c in text]


class Letters:
    """A tokenizer in Python, of one id a character: a = 10, b = 11, ..., space and the rest = 9."""

    is_fast = False
    eos_token_id: int | None = EOS
    bos_token_id: int | None = BOS

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [letters(text) for text in texts]}


class NoSpecials(Letters):
    eos_token_id = None
    bos_token_id = None


class FastLetters(Letters):
    """The same as if it were in Rust: it tells where each token lies, and what it is."""

    is_fast = True

    def __call__(self, texts: Sequence[str], *, return_offsets_mapping: bool = False, **options: Any) -> dict[str, Any]:
        options.pop("return_attention_mask", None)
        found = super().__call__(texts, **options)
        if return_offsets_mapping:
            found["offset_mapping"] = [[(i, i + 1) for i in range(len(text))] for text in texts]
        return found

    @property
    def backend_tokenizer(self) -> "FastLetters":
        return self

    def to_str(self) -> str:
        return json.dumps({"model": "letters", "truncation": None, "padding": None})


def write_jsonl(path: Path, texts: Sequence[Any], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def many(count: int = 60) -> list[str]:
    """Texts of 3 to 7 words, no two alike."""
    words = ("red", "green", "blue", "one", "two", "three", "stone", "river", "cloud", "grass")
    return [" ".join(words[(i * k) % 10] for k in range(1, 4 + i % 5)) + f" number {i}" for i in range(count)]


def rows_of(source: Path | str, tokenizer: Any = None, seed: int = 0, **settings: Any) -> TokenRows:
    settings = {"context": 8, "tokens": 800, "held_out": 0.3, **settings}
    return token_rows(DataConfig(source=str(source), **settings), tokenizer or Letters(), seed)
