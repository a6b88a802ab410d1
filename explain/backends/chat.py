"""Any OpenAI-compatible chat server: proposes descriptions, judges, and simulates with the best instrument that it allows."""

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from explain.backends.ask import ask, ask_each
from explain.backends.backend import Explanation, Simulation
from explain.backends.instruments import Instrument, Integers, make_instrument
from explain.backends.instruments import facts as instrument_facts
from explain.backends.probe import Capabilities, probe
from explain.choice import CHOICE_KINDS, Choice, ChoiceKind, Chosen
from explain.client import ChatClient, RequestFailed
from explain.config import ExplainConfig
from explain.examples import Example, Unit
from explain.judge import KINDS, Judgement, Kind, Question
from explain.prompting import hashed, prompt
from explain.propose import Mistakes, instructions, proposal, scale_of

_TEXTS_AT_ONCE = 5  # Paulo et al. 2024


class ChatBackend:
    """See the module. Answers that cannot be read are asked again, saying what was wrong, then fail with a reason."""

    def __init__(self, config: ExplainConfig, folder: Path, client: ChatClient | None = None) -> None:
        """Open a client whose answers are journalled in `folder`, or take one."""
        self.config = config
        self.client = client or ChatClient(config, folder / "requests.jsonl")
        self._scouts = 0 if config.batch else 1
        self.capabilities: Capabilities | None = None
        self._instrument: Instrument | None = Integers(self.client) if config.instrument == "integers" else None
        self._probing = asyncio.Lock()

    def prepare(self) -> None:
        """Find out, before long work, whether the server can do what is asked of it. Raises InputError if not.

        A fault that says nothing of that, such as a server that is busy, is left to the units.
        """
        if self._instrument is not None or "simulation" not in self.config.scores:
            return

        async def find() -> None:
            try:
                await self.instrument()
            finally:
                await self.client.reopen()

        with suppress(RequestFailed):
            asyncio.run(find())

    async def instrument(self) -> Instrument:
        """Return how windows are simulated, probing the server the first time. Raises RequestFailed; InputError as `prepare`."""
        async with self._probing:
            if self._instrument is None:
                asked = self.config.instrument
                try:
                    self.capabilities = await probe(self.client, prompts=asked in ("auto", "prompt_logprobs"))
                except RequestFailed as error:
                    raise RequestFailed(f"probing the server: {error}") from None
                self._instrument = make_instrument(self.capabilities.choose(self.config), self.client, self.capabilities)
            return self._instrument

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
            return text.strip().encode("utf-8", "replace").decode()  # JSON can spell half a character, files cannot hold it

        text: str = await self._ask(system, user, schema, read, sample)
        return text

    async def simulate(self, explanation: Explanation, examples: Sequence[Example]) -> list[Simulation]:
        """Simulate window by window."""
        instrument = await self.instrument()
        return await ask_each(lambda example: instrument.simulate(explanation, example.tokens), examples, self._scouts)

    async def judge(self, explanation: Explanation, kind: Kind, asked: Sequence[Question]) -> list[Judgement]:
        """Ask about several texts at once, for one 0 or 1 each; in an order drawn by what is asked, for judges mind the order."""
        order = sorted(range(len(asked)), key=lambda i: hashlib.sha256(f"{kind}\n{asked[i].text}".encode()).digest())
        groups = [order[start : start + _TEXTS_AT_ONCE] for start in range(0, len(order), _TEXTS_AT_ONCE)]

        async def several(some: list[int]) -> list[int]:
            return await self._several(explanation, kind, [asked[i].text for i in some])

        answers = await ask_each(several, groups, self._scouts)
        found = {i: answer for some, given in zip(groups, answers, strict=True) for i, answer in zip(some, given, strict=True)}
        return [Judgement(float(found[i])) for i in range(len(asked))]

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

    async def choose(self, explanation: Explanation | None, kind: ChoiceKind, asked: Sequence[Choice]) -> list[Chosen]:
        """Ask for the number of one option, a question a request."""
        return await ask_each(lambda question: self._choose(explanation, kind, question), asked, self._scouts)

    async def _choose(self, explanation: Explanation | None, kind: ChoiceKind, question: Choice) -> Chosen:
        n = len(question.options)
        described = {} if explanation is None else {"description": explanation.text}
        user = json.dumps({**described, "texts": dict(enumerate(question.options, 1))}, ensure_ascii=False)
        number = {"type": "integer", "minimum": 1, "maximum": n}
        schema = {"type": "object", "properties": {"answer": number}, "required": ["answer"], "additionalProperties": False}

        def read(answer: Any) -> int:
            value = answer.get("answer") if isinstance(answer, dict) else None
            if type(value) is not int or not 1 <= value <= n:
                raise ValueError(f'expected {{"answer": a number from 1 to {n}}}')
            return value

        picked = await self._ask(prompt(f"choose_{kind}") + prompt("choose_json"), user, schema, read)
        return Chosen(tuple(float(i == picked) for i in range(1, n + 1)))

    async def _ask(
        self, system: str, user: str, schema: dict[str, Any], read: Callable[[Any], Any], sample: int = 0
    ) -> Any:  # fmt: skip
        return await ask(self.client, system, user, schema, lambda answer, _: read(answer), sample=sample)

    def facts(self) -> dict[str, Any]:
        """Name the instrument, so that scores of different ones are never confused."""
        prompts: dict[str, str] = {"propose": instructions(self.config)}
        prompts |= {kind: prompt(kind) + prompt("judge_many") for kind in KINDS}
        prompts |= {kind: prompt(f"choose_{kind}") + prompt("choose_json") for kind in CHOICE_KINDS}
        instrument = instrument_facts(self._instrument) if self._instrument else {"instrument": "not probed"}
        return {
            **instrument,
            "capabilities": self.capabilities.as_json() if self.capabilities else None,
            "model": self.config.model,
            **{f"{name}_prompt": hashed(text) for name, text in prompts.items()},
            **self.client.usage(),
        }

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()


