"""What a chat server answered: the text, and the tokens it is made of with what might have stood in their place."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Token:
    """A token of an answer as bytes, for it may be half a character; `alternatives` are log-probabilities by text.

    Only alternatives with a digit are kept, the token itself among them: no other can be a level. `offered` counts all.
    """

    spelled: bytes
    alternatives: dict[str, float]
    offered: int


@dataclass(frozen=True)
class Answer:
    """The text, and its tokens where they were asked for; `tokens` is empty where the server sent none."""

    text: str
    tokens: tuple[Token, ...] = ()

    @classmethod
    def of(cls, text: str, choice: Any) -> "Answer":
        """Read the `logprobs` of a choice of a chat completion, as far as the server sent what the API promises."""
        content = getattr(getattr(choice, "logprobs", None), "content", None)
        try:
            return cls(text, tuple(_token(entry) for entry in content or ()))
        except (AttributeError, TypeError, ValueError):  # the openai package does not check what servers send
            return cls(text)

    def as_json(self) -> str:
        """Return one string for a journal."""
        tokens = [[token.spelled.hex(), token.alternatives, token.offered] for token in self.tokens]
        return json.dumps({"text": self.text, "tokens": tokens})

    @classmethod
    def of_json(cls, line: str) -> "Answer":
        """Read it back."""
        kept = json.loads(line)
        return cls(kept["text"], tuple(Token(bytes.fromhex(spelled), *rest) for spelled, *rest in kept["tokens"]))


def _token(entry: Any) -> Token:
    found: dict[str, float] = {}
    others = getattr(entry, "top_logprobs", None) or ()
    for one in others:
        add(found, one.token, one.logprob)
    found.setdefault(entry.token, float(entry.logprob))
    raw = getattr(entry, "bytes", None)
    spelled = bytes(raw) if raw is not None else entry.token.encode()
    return Token(spelled, {text: p for text, p in found.items() if any(c.isdigit() for c in text)}, len(others))


def add(found: dict[str, float], text: str, logprob: float) -> None:
    """Note an alternative; tokens that read the same are one, with their probabilities added."""
    found[text] = float(np.logaddexp(found.get(text, -np.inf), logprob))
