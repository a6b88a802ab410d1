"""What a chat server can do, found by asking it: by name nothing can be known, for routes, models and proxies all differ.

A few tiny requests, journalled like all others, so that a run that goes on asks none again and keeps its instrument.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

from activation_store.errors import InputError
from explain.answers import Answer
from explain.backends.layout import SEPARATORS, UNKNOWN, Conversation, written
from explain.backends.levels import Read, find_places
from explain.backends.routes import ROUTES, Route
from explain.client import ChatClient, RequestFailed, UnusableReply, content_key, read_completion
from explain.config import ExplainConfig

_PASSING = {408, 429, 502, 503, 504}  # faults that say nothing of what a server can do
_LEAST_ALTERNATIVES = 5  # with fewer, an expected level is hardly more than the likeliest one
_LETTERS, _ROUNDS = "QMZKF", 4
_NATS = 1.0  # by which what is said again must be likelier at its own place than one place off


@dataclass(frozen=True)
class PromptLabels:
    """How levels stand in prompts of a server: the route that reads them, and as in `local.Labels` separator, top and ids."""

    route: str
    separator: str
    top: int
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Capabilities:
    """What a server was found to do. `missing` says, for what it cannot, why."""

    json_schema: bool
    top_logprobs: int  # alternatives of a generated token; 0: none
    ten: bool  # "10" is one token of answers
    prompt: PromptLabels | None
    missing: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain values for summary.json."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Say it in words."""
        prompt = f"{self.prompt.route}, levels 0-{self.prompt.top}" if self.prompt else "no"
        return [
            ("chat", "yes"), ("json_schema respected", "yes" if self.json_schema else "no"),
            ("alternatives of a generated token", str(self.top_logprobs) if self.top_logprobs else "no"),
            ('"10" is one token of answers', "yes" if self.ten else "not seen"),
            ("log-probabilities of a prompt", prompt), *((f"  not: {what}", why) for what, why in self.missing.items()),
        ]  # fmt: skip

    def choose(self, config: ExplainConfig) -> str:
        """Return the configured instrument, or the best. Raises InputError, with what is missing, for one there is not."""
        able = {"prompt_logprobs": self.prompt is not None, "top_logprobs": self.top_logprobs > 0, "integers": True}
        if config.instrument == "auto":
            return next(name for name, can in able.items() if can)
        needs = "top_logprobs" if config.instrument == "token_by_token" else config.instrument
        if not able[needs]:
            concerned = {what: why for what, why in self.missing.items() if (what == "logprobs") == (needs == "top_logprobs")}
            why = "; ".join(f"{what}: {reason}" for what, reason in concerned.items())
            best = self.choose(config.model_copy(update={"instrument": "auto"}))
            raise InputError(
                f"explain.instrument: {config.instrument} given, but the server has not what it takes ({why or 'not probed'}); "
                f"the best there: {best}"
            )
        return config.instrument


async def probe(client: ChatClient, prompts: bool = True) -> Capabilities:
    """Ask a server what it can do; `prompts`: also for log-probabilities of prompts.

    Raises RequestFailed where it does not answer chats at all, or a fault leaves a question open.
    """
    answers = await _answers(client)
    missing, found = dict[str, str](), None
    if answers["fault"]:
        missing["logprobs"] = answers["fault"]
    if prompts:
        for route in ROUTES.values():
            kept = await _prompts(client, route)
            if "fault" not in kept:
                found = PromptLabels(route.name, kept["separator"], kept["top"], tuple(kept["ids"]))
                break
            missing[route.name] = kept["fault"]
    return Capabilities(answers["json_schema"], answers["top_logprobs"], answers["ten"], found, missing)


# Answers


async def _answers(client: ChatClient) -> dict[str, Any]:
    """Let it write "10" three times, asking for as much as servers can give and then for less."""
    numbers = {"type": "array", "items": {"type": "integer", "minimum": 10, "maximum": 10}, "minItems": 3, "maxItems": 3}
    schema = {"type": "object", "properties": {"activations": numbers}, "required": ["activations"],
              "additionalProperties": False}  # fmt: skip
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}}
    fault = ""
    for with_form, alternatives in ((True, 20), (True, 5), (False, 20), (True, 0), (False, 0)):
        body = {
            "model": client.config.model, "temperature": 0, "max_completion_tokens": 64,
            "messages": [{"role": "system", "content": "Do as you are asked."},
                         {"role": "user", "content": "Write the number 10, three times."}],
            **(form if with_form else {}), **({"logprobs": True, "top_logprobs": alternatives} if alternatives else {}),
        }  # fmt: skip

        def read(reply: Any, with_form: bool = with_form, alternatives: int = alternatives) -> dict[str, Any]:
            return _read_answers(read_completion(_objects(reply)), with_form, alternatives)

        name = f"chat{' json_schema' * with_form} top_logprobs {alternatives}"
        try:
            kept: dict[str, Any] = await _ask(client, name, "/chat/completions", body, read)
        except UnusableReply as error:  # such as a refusal, or a thought that was cut off
            kept = {"json_schema": False, "top_logprobs": 0, "ten": False, "fault": str(error)}
        if "json_schema" in kept:
            return {**kept, "fault": kept["fault"] or (fault if not alternatives else "")}
        fault = fault or kept["fault"]
    raise RequestFailed(fault)


def _read_answers(answer: Answer, with_form: bool, alternatives: int) -> dict[str, Any]:
    try:
        respected = with_form and json.loads(answer.text) == {"activations": [10, 10, 10]}
    except (ValueError, RecursionError):
        respected = False
    offered, fault = max((token.offered for token in answer.tokens), default=0), ""
    if alternatives and offered < _LEAST_ALTERNATIVES:
        offered, fault = 0, f"{offered} alternatives came back where {alternatives} were asked for"
    elif offered and answer.text.encode() not in b"".join(token.spelled for token in answer.tokens):
        offered, fault = 0, "the tokens that the log-probabilities are of do not spell the answer"
    seen = [token.spelled for token in answer.tokens] + [a.encode() for token in answer.tokens for a in token.alternatives]
    ten = any(text.strip(b" ,[]\n\t") == b"10" for text in seen)
    return {"json_schema": respected, "top_logprobs": min(offered, 20), "ten": ten, "fault": fault}


def _objects(reply: Any) -> Any:
    return json.loads(json.dumps(reply), object_hook=lambda found: SimpleNamespace(**found))


# Prompts


def _self_test() -> tuple[str, dict[str, list[int]], list[list[int]]]:
    """Return a text with every level and "unknown" after every separator, then letters again and again, and where these stand."""
    text, labels, shown = "", dict[str, list[int]](), [*map(str, range(11)), UNKNOWN]
    for separator in SEPARATORS:
        # it begins with a space, which some chat templates cut off: a window may begin with one, too
        part, places = written([" ", *(f" {letter}" for letter in "bcdefghijkl")], shown, separator)
        labels[separator] = [len(text) + place for place in places]
        text += part
    rounds = list[list[int]]()
    for _ in range(_ROUNDS):
        rounds.append([len(text) + 2 * i for i in range(len(_LETTERS))])
        text += "".join(f"{letter}\n" for letter in _LETTERS)
    return text.rstrip(), labels, rounds


async def _prompts(client: ChatClient, route: Route) -> dict[str, Any]:
    text, labels, rounds = _self_test()
    path, body = route.request(client.config.model, Conversation("Repeat.", (("Letters.", text),)), ())

    def read(reply: Any) -> dict[str, Any]:
        try:
            return _read_prompts(route.read(reply), text, labels, rounds)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            return {"fault": f"{error}" if isinstance(error, ValueError) else "no log-probabilities of the prompt in the reply"}

    found: dict[str, Any] = await _ask(client, route.name, path, body, read)
    return found


def _read_prompts(
    read: Sequence[Read], text: str, labels: dict[str, list[int]], rounds: list[list[int]]
) -> dict[str, Any]:  # fmt: skip
    """Return separator, top and ids. Raises ValueError where tokens, or their log-probabilities, are not where they should be."""
    _refuse_shifted(read, [place for offsets in rounds[2:] for place in find_places(read, text, offsets)])
    fault = ""
    for separator, offsets in labels.items():
        try:
            own = [read[place] for place in find_places(read, text, offsets)]
        except ValueError as error:
            fault = fault or str(error)
            continue
        top = next((level for level, token in enumerate(own[:11]) if token.text != str(level)), 11) - 1
        if top >= 9:
            ids = [token.id for token in own[: top + 1] if token.id is not None]
            return {"separator": separator, "top": top, "ids": ids if len(ids) == top + 1 else []}
        fault = fault or f"the level {top + 1} is no token of the model's"
    raise ValueError(fault)


def _refuse_shifted(read: Sequence[Read], places: Sequence[int]) -> None:
    """Raise ValueError unless letters that were said before are likely where they stand, and not a token earlier or later.

    llama-cpp-python's echo is off by one for models without a token that begins all texts.
    """

    def likely(shift: int) -> float:
        where = [(read[place].text, place + shift) for place in places]
        return sum(read[at].alternatives.get(text, -20.0) if at < len(read) else -20.0 for text, at in where) / len(where)

    here = likely(0)
    for shift in (-1, 1):
        if here < likely(shift) + _NATS:
            raise ValueError(f"its log-probabilities stand {'before' if shift < 0 else 'after'} their tokens, or mean nothing")


async def _ask(client: ChatClient, name: str, path: str, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
    """Ask one question; a server's refusal is an answer as well, {"fault": why}. Raises RequestFailed for faults that may pass.

    Where a chat goes through, a connection that is cut on another route is a refusal too: so some servers meet what they do not
    know. Of a chat, which every server has, all may pass save that it does not take what it was asked with.
    """
    refusals = {400, 422} if name.startswith("chat ") else None
    key = content_key(["probe", client.base_url, client.config.model, name])
    try:
        return await client.post(path, body, key, read, retries=min(client.config.retries, 2))
    except UnusableReply:
        raise
    except RequestFailed as error:
        if error.status in _PASSING or (refusals is not None and error.status not in refusals):
            raise
        client.remember(key, {"fault": str(error)})
        return {"fault": str(error)}
