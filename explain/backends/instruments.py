"""The instruments of chat servers: how a server is made to say which activations an explanation leads to expect.

From the exact to the plain: log-probabilities of a prompt in which every activation is unknown, as Bills et al. 2023 read them;
log-probabilities of the integers that a chat model writes, all in one answer or one token a request; the integers alone.
Scores of different instruments are not comparable, so each stands by its name in the summary.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Protocol

from explain.answers import Answer
from explain.backends.ask import ask, json_part
from explain.backends.backend import Explanation, Simulation
from explain.backends.layout import UNKNOWN, Conversation, simulation_text, written
from explain.backends.levels import chances_in_answer, chances_of, expected_level, find_places, tokens_within
from explain.backends.probe import Capabilities, PromptLabels
from explain.backends.routes import ROUTES
from explain.client import ChatClient, UnusableReply, content_key
from explain.prompting import hashed, prompt

LEVELS = 10  # of which an explanation's scale is one


class Instrument(Protocol):
    """Simulates one window."""

    name: str
    says: str
    """The instrument in words."""

    @property
    def prompt(self) -> str:
        """All that its prompts say beside description and window."""
        ...

    async def simulate(self, explanation: Explanation, tokens: Sequence[str]) -> Simulation:
        """Return expected activations. Raises RequestFailed."""
        ...


def make_instrument(name: str, client: ChatClient, capabilities: Capabilities | None) -> Instrument:
    """Return an instrument by its name; all but integers need to know what the server can do."""
    if name == "integers" or capabilities is None:
        return Integers(client)
    if name == "prompt_logprobs" and capabilities.prompt is not None:
        return PromptLogprobs(client, capabilities.prompt)
    top = LEVELS if capabilities.ten else LEVELS - 1
    kind = TokenByToken if name == "token_by_token" else TopLogprobs
    return kind(client, top, capabilities.top_logprobs)


def facts(instrument: Instrument) -> dict[str, str]:
    """Name an instrument and its prompt."""
    return {"instrument": instrument.says, "simulate_prompt": hashed(instrument.prompt)}


def _simulation(chances: Sequence[dict[int, float]], top: int, scale: float) -> Simulation:
    """Return expected activations and masses of tokens. Raises ValueError for a token without any level."""
    expected, masses = list[float](), list[float]()
    for number, own in enumerate(chances):
        try:
            level, mass = expected_level(own)
        except ValueError as error:
            raise ValueError(f"token {number}: {error}") from None
        expected.append(level * LEVELS / top * scale)
        masses.append(mass)
    return Simulation(expected, masses)


class PromptLogprobs:
    """One request a window; nothing is written, so predictions do not depend on each other, and no answer can be unreadable."""

    name = "prompt_logprobs"

    def __init__(self, client: ChatClient, labels: PromptLabels) -> None:
        """Read levels as they were found to stand in this server's prompts."""
        self._client, self._labels, self._route = client, labels, ROUTES[labels.route]
        self._start = 0  # of what differs between windows, in tokens; the first reply will show
        self.says = f"all tokens at once, log-probabilities of the prompt ({labels.route}), levels 0-{labels.top}"

    @property
    def prompt(self) -> str:
        """All that its prompts say beside description and window."""
        return simulation_text(self._labels.top) + self._labels.separator

    async def simulate(self, explanation: Explanation, tokens: Sequence[str]) -> Simulation:
        """Have the server read the window with every activation unknown, and ask what it would have put there."""
        labels = self._labels
        window, offsets = written(tokens, [UNKNOWN] * len(tokens), labels.separator)
        shown = Conversation.of(explanation.text, window, labels.top, labels.separator)
        model = self._client.config.model
        path, body = self._route.request(model, shown, labels.ids, self._start)
        key = content_key([labels.route, self._route.request(model, shown, labels.ids)])

        def read(reply: Any) -> list[list[list[float]]]:
            try:
                found = self._route.read(reply)
                self._start = self._start or tokens_within(found, shown.same)
                places = find_places(found, window.rstrip(), offsets)
                chances = [chances_of(found[place].alternatives, labels.top) for place in places]
                _simulation(chances, labels.top, 1.0)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise UnusableReply(f"prompt log-probabilities: {error or type(error).__name__}") from None
            return [[[level, p] for level, p in own.items()] for own in chances]

        kept = await self._client.post(path, body, key, read)
        return _simulation([{int(level): p for level, p in own} for own in kept], labels.top, explanation.scale)


class Integers:
    """One answer a window, an integer a token, no probabilities: for servers that give none."""

    name = "integers"
    says = "chat integers 0-10, one answer a window"

    def __init__(self, client: ChatClient, top: int = LEVELS, alternatives: int = 0) -> None:
        """Take how levels end, and how many alternatives of a token to ask for."""
        self._client, self._top, self._alternatives = client, top, alternatives

    @property
    def prompt(self) -> str:
        """All that its prompts say beside description and window."""
        return prompt("simulate").replace("{top}", str(self._top))

    async def simulate(self, explanation: Explanation, tokens: Sequence[str]) -> Simulation:
        """Ask for one integer a token, in order."""
        n, top = len(tokens), self._top
        user = json.dumps({"description": explanation.text, "count": n, "tokens": dict(enumerate(tokens))}, ensure_ascii=False)
        numbers = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": top}, "minItems": n, "maxItems": n}
        schema = {"type": "object", "properties": {"activations": numbers}, "required": ["activations"],
                  "additionalProperties": False}  # fmt: skip

        def read(answer: Any, whole: Answer) -> Simulation:
            values = answer.get("activations") if isinstance(answer, dict) else None
            if not isinstance(values, list) or len(values) != n:
                found = len(values) if isinstance(values, list) else "no list"
                raise ValueError(f'expected {{"activations": [...]}} with exactly {n} integers, got {found}')
            if not all(type(v) is int and 0 <= v <= top for v in values):
                raise ValueError(f"expected integers from 0 to {top}")
            return self._read(values, whole, explanation.scale)

        return await ask(self._client, self.prompt, user, schema, read, self._alternatives)

    def _read(self, values: list[int], whole: Answer, scale: float) -> Simulation:
        return Simulation([v * scale for v in values])


class TopLogprobs(Integers):
    """The same answer, each integer weighed with what might have stood in its place; autoregressive, so earlier ones count."""

    name = "top_logprobs"

    def __init__(self, client: ChatClient, top: int, alternatives: int) -> None:
        """See above."""
        super().__init__(client, top, alternatives)
        self.says = f"chat integers 0-{top}, one answer a window, expected over {alternatives} alternatives a token"

    def _read(self, values: list[int], whole: Answer, scale: float) -> Simulation:
        return _simulation(chances_in_answer(whole, values, json_part(whole.text), self._top), self._top, scale)


class TokenByToken:
    """One request a token, which sees the text up to it alone: near to the paper's independent predictions, and dear."""

    name = "token_by_token"

    def __init__(self, client: ChatClient, top: int, alternatives: int) -> None:
        """Take how levels end, and how many alternatives of a token to ask for."""
        self._client, self._top, self._alternatives = client, top, alternatives
        self.says = f"chat integers 0-{top}, one answer a token, expected over {alternatives} alternatives"

    @property
    def prompt(self) -> str:
        """All that its prompts say beside description and window."""
        return prompt("simulate_one").replace("{top}", str(self._top))

    async def simulate(self, explanation: Explanation, tokens: Sequence[str]) -> Simulation:
        """Ask about all tokens, as many at once as the client lets through."""
        asked = [self._one(explanation, "".join(tokens[: i + 1]), token) for i, token in enumerate(tokens)]
        answers = await asyncio.gather(*asked, return_exceptions=True)  # all are waited for: none is left running
        chances = list[dict[int, float]]()
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            chances.append(answer)
        return _simulation(chances, self._top, explanation.scale)

    async def _one(self, explanation: Explanation, text: str, token: str) -> dict[int, float]:
        user = json.dumps({"description": explanation.text, "text": text, "token": token}, ensure_ascii=False)
        number = {"type": "integer", "minimum": 0, "maximum": self._top}
        schema = {"type": "object", "properties": {"activation": number}, "required": ["activation"],
                  "additionalProperties": False}  # fmt: skip

        def read(answer: Any, whole: Answer) -> dict[int, float]:
            value = answer.get("activation") if isinstance(answer, dict) else None
            if type(value) is not int or not 0 <= value <= self._top:
                raise ValueError(f'expected {{"activation": an integer from 0 to {self._top}}}')
            (chances,) = chances_in_answer(whole, [value], json_part(whole.text), self._top)
            expected_level(chances)
            return chances

        return await ask(self._client, self.prompt, user, schema, read, self._alternatives)
