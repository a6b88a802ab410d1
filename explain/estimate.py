"""What a run of explanations will cost, before a request is sent: its own prompts, put to a server that only counts."""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from activation_store.files import iterate_json_lines
from explain.answers import Answer
from explain.backends import ChatBackend
from explain.client import ChatClient
from explain.config import ExplainConfig
from explain.cost import Usage, price_of
from explain.describe import Describer
from explain.examples import Unit

_JOURNALS = ("requests.jsonl", "descriptions.jsonl", "results.jsonl")
_NOWHERE = "http://127.0.0.1:9/v1"  # nothing is sent, and no key is needed
_FRAME_TOKENS = 8  # that a chat template puts round each message, about
_DESCRIPTION = "mentions of rivers, lakes and seas, most of all where somebody crosses one of them by boat"
_KINDS = {"description": "proposals", "activations": "simulations", "answers": "judgements", "answer": "choices"}


class _Counting(ChatClient):
    """A client that answers itself, in the shape that is asked for, and counts what the server would have charged."""

    def __init__(self, config: ExplainConfig, journal: Path, tokens: Callable[[str], int]) -> None:
        """Answer from the journal what was answered before: that is paid for."""
        super().__init__(config, journal)
        self.tokens, self.kinds, self.counted = tokens, Counter[str](), Usage()
        self._made = 0

    async def answer(
        self, messages: list[dict[str, str]], schema: dict[str, Any], attempt: int, top_logprobs: int = 0
    ) -> Answer:  # fmt: skip
        """Note the shape of the answer, which not every form of request holds, for `_once` to fill."""
        self._schema = schema
        return await super().answer(messages, schema, attempt, top_logprobs)

    async def _once(
        self, key: str, request: dict[str, Any], send: Callable[[], Awaitable[Any]], read: Callable[[Any], str],
        retries: int | None = None, crowd: bool = True,
    ) -> str:  # fmt: skip
        if key in self._journal:
            return self._journal[key]
        name, wanted = next(iter(self._schema["properties"].items()))
        self._made += 1
        value: Any = 0 if wanted["type"] == "integer" else [0] * wanted.get("minItems", 0)
        if wanted["type"] == "string":
            value = f"{_DESCRIPTION} {self._made}"  # no two units' are the same
        text = json.dumps({name: max(value, wanted.get("minimum", 0)) if wanted["type"] == "integer" else value})
        prompt = sum(self.tokens(message["content"]) + _FRAME_TOKENS for message in request["messages"])
        self.counted += Usage(prompt, 0, self.tokens(text) + 1)
        self.kinds[_KINDS.get(name, name)] += 1
        self._journal.add(key, text)  # as a run would: what is asked twice is sent once
        return text


async def estimate(config: ExplainConfig, folder: Path, tokenizer: Any, seed: int) -> dict[str, Any]:
    """Return requests by kind, tokens and dollars that the units in `folder` still need of a chat server; sends nothing.

    Prompts are the run's own, counted with the given tokenizer (the subject's; others differ by some percent); answers are taken
    for as long as such answers are. Retries are not foreseen, refinement is taken to go all its rounds, the token-by-token and
    log-probability instruments are counted as one request a window, and nothing is known of what the server has cached, which
    makes it cheaper.
    """

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    somewhere = config.base_url or os.environ.get("OPENAI_BASE_URL") or _NOWHERE
    offline = config.model_copy(update={"instrument": "integers", "max_cost": None, "base_url": somewhere})
    with tempfile.TemporaryDirectory() as scratch:
        for name in _JOURNALS:
            if (folder / name).exists():
                shutil.copy(folder / name, scratch)
        client = _Counting(offline, Path(scratch) / "requests.jsonl", tokens)
        backend = ChatBackend(offline, Path(scratch), client)
        describer = Describer(offline, backend, Path(scratch), seed)
        units = [Unit.of_json(line) for line in iterate_json_lines(folder / "units.jsonl")]
        await describer.take(units, lambda: None)
        await backend.close()
    price = price_of(config.model_copy(update={"max_cost": None}))
    return {
        "units": len(units), "requests": sum(client.kinds.values()), **dict(client.kinds), **vars(client.counted),
        "cost_usd": None if price is None else price.of(client.counted),
    }  # fmt: skip
