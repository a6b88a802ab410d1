"""Any OpenAI-compatible chat server: proposes a description, then simulates a window in one answer of integers 0-10."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from explain.backends.backend import Explanation, Simulation
from explain.client import ChatClient, RequestFailed, UnusableReply
from explain.config import ExplainConfig
from explain.examples import Example, Unit
from explain.judge import KINDS, Judgement, Kind, Question
from explain.prompting import hashed, prompt
from explain.propose import Mistakes, instructions, proposal, scale_of

_LEVELS = 10
_TEXTS_AT_ONCE = 5  # Paulo et al. 2024


class ChatBackend:
    """See the module. Answers that cannot be read are asked again, saying what was wrong, then fail with a reason."""

    def __init__(self, config: ExplainConfig, folder: Path) -> None:
        """Open a client whose answers are journalled in `folder`."""
        self.config = config
        self.client = ChatClient(config, folder / "requests.jsonl")
        self._simulate = prompt("simulate")

    async def propose(self, unit: Unit, sample: int = 0, mistakes: Mistakes | None = None) -> Explanation:
        """Show the training examples with their levels and take the description from the answer's JSON."""
        system, shown = proposal(unit, self.config, mistakes)
        return Explanation(await self.write(system, shown, sample), scale=scale_of(unit))

    async def write(self, system: str, user: str, sample: int = 0) -> str:
        """Ask for JSON with a description. Samples above 0 are drawn at a temperature."""
        schema = {"type": "object", "properties": {"description": {"type": "string"}}, "required": ["description"],
                  "additionalProperties": False}  # fmt: skip

        def read(answer: Any) -> str:
            text = answer.get("description") if isinstance(answer, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise ValueError('expected {"description": "..."} with a non-empty string')
            return text.strip()

        text: str = await self._ask(system, user, schema, read, sample)
        return text

    async def simulate(self, explanation: Explanation, examples: Sequence[Example]) -> list[Simulation]:
        """Ask for one integer 0-10 a token, in order, a window a request."""
        return [await self._window(explanation, example) for example in examples]

    async def _window(self, explanation: Explanation, example: Example) -> Simulation:
        n = len(example.tokens)
        user = json.dumps(
            {"description": explanation.text, "count": n, "tokens": dict(enumerate(example.tokens))}, ensure_ascii=False
        )
        numbers = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": _LEVELS}, "minItems": n, "maxItems": n}
        schema = {"type": "object", "properties": {"activations": numbers}, "required": ["activations"],
                  "additionalProperties": False}  # fmt: skip

        def read(answer: Any) -> list[float]:
            values = answer.get("activations") if isinstance(answer, dict) else None
            if not isinstance(values, list) or len(values) != n:
                found = len(values) if isinstance(values, list) else "no list"
                raise ValueError(f'expected {{"activations": [...]}} with exactly {n} integers, got {found}')
            if not all(type(v) is int and 0 <= v <= _LEVELS for v in values):
                raise ValueError(f"expected integers from 0 to {_LEVELS}")
            return [v * explanation.scale for v in values]

        return Simulation(await self._ask(self._simulate, user, schema, read))

    async def judge(self, explanation: Explanation, kind: Kind, asked: Sequence[Question]) -> list[Judgement]:
        """Ask about several texts at once, for one 0 or 1 each; in an order drawn by what is asked, for judges mind the order."""
        order = sorted(range(len(asked)), key=lambda i: hashlib.sha256(f"{kind}\n{asked[i].text}".encode()).digest())
        found: dict[int, Judgement] = {}
        for start in range(0, len(order), _TEXTS_AT_ONCE):
            some = order[start : start + _TEXTS_AT_ONCE]
            for i, answer in zip(some, await self._several(explanation, kind, [asked[i].text for i in some]), strict=True):
                found[i] = Judgement(float(answer))
        return [found[i] for i in range(len(asked))]

    async def _several(self, explanation: Explanation, kind: Kind, texts: list[str]) -> list[int]:
        n = len(texts)
        user = json.dumps({"description": explanation.text, "texts": dict(enumerate(texts, 1))}, ensure_ascii=False)
        numbers = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 1}, "minItems": n, "maxItems": n}
        schema = {"type": "object", "properties": {"answers": numbers}, "required": ["answers"], "additionalProperties": False}

        def read(answer: Any) -> list[int]:
            values = answer.get("answers") if isinstance(answer, dict) else None
            if not isinstance(values, list) or len(values) != n:
                found = len(values) if isinstance(values, list) else "no list"
                raise ValueError(f'expected {{"answers": [...]}} with exactly {n} numbers, got {found}')
            if not all(type(v) is int and v in (0, 1) for v in values):
                raise ValueError("expected numbers 0 or 1")
            return values

        answers: list[int] = await self._ask(prompt(kind) + prompt("judge_many"), user, schema, read)
        return answers

    async def _ask(self, system: str, user: str, schema: dict[str, Any], read: Any, sample: int = 0) -> Any:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        fault = ""
        for attempt in range(self.config.retries + 1):
            try:
                answer = await self.client.complete(messages, schema, sample * (self.config.retries + 1) + attempt)
            except UnusableReply as error:
                fault = str(error)
                continue
            try:
                return read(json.loads(_json_part(answer)))
            except (ValueError, RecursionError) as error:  # json's own errors: bad syntax, or nested without end
                fault = str(error)
                messages = [
                    *messages[:2],
                    {"role": "assistant", "content": answer[:500]},
                    {"role": "user", "content": f"That answer could not be read: {fault}. Answer again, with the JSON alone."},
                ]
        raise RequestFailed(f"unreadable answer after {self.config.retries + 1} attempts: {fault}")

    def facts(self) -> dict[str, Any]:
        """Name the instrument, so that scores of different ones are never confused."""
        prompts = {"propose": instructions(self.config), "simulate": self._simulate}
        prompts |= {kind: prompt(kind) + prompt("judge_many") for kind in KINDS}
        return {
            "instrument": "chat integers 0-10, one answer a window",
            "model": self.config.model,
            **{f"{name}_prompt": hashed(text) for name, text in prompts.items()},
            **self.client.usage(),
        }

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()


def _json_part(answer: str) -> str:
    """Return what stands between the first and the last brace: models like to wrap JSON in words or fences."""
    start, end = answer.find("{"), answer.rfind("}")
    return answer[start : end + 1] if 0 <= start < end else answer
