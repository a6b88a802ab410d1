"""Servers of every kind that gives log-probabilities, around a model that can be followed by hand or a real one.

What vLLM, SGLang, legacy completions, llama.cpp, llama-cpp-python and api.openai.com reply, field by field; each can be made to
go wrong.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from llm_servers import Reply, Request, completion, error


class Model(Protocol):
    """A language model as a server sees it."""

    def encode(self, text: str) -> list[int]: ...

    def say(self, token: int) -> str: ...

    def predict(self, ids: Sequence[int]) -> list[dict[int, float]]:
        """Log-probabilities of what might stand at each place, given all before it; none at the first."""
        ...


class CopyModel:
    """Says again what followed the last two tokens before; after a tab it gives levels by what the line's token is.

    Characters outside of ASCII are one token a byte, each shown as U+FFFD, as byte-level vocabularies do.
    """

    def __init__(self, ten: bool = True) -> None:
        self._pieces = re.compile(rf"<\|\w+\|>|{'10|' * ten}\d| ?[A-Za-z]+|\t|\n| +|[^\x00-\x7f]|.", re.S)
        self.top = 10 if ten else 9
        self._ids: dict[str, int] = {}

    def id(self, piece: str) -> int:
        return self._ids.setdefault(piece, len(self._ids))

    def encode(self, text: str) -> list[int]:
        found = [self.id("<s>")]
        for piece in self._pieces.findall(text):
            found += [self.id(piece)] if piece.isascii() else [self.id(f"byte {byte:02x}") for byte in piece.encode()]
        return found

    def say(self, token: int) -> str:
        piece = list(self._ids)[token]
        return "\ufffd" if piece.startswith("byte ") else piece

    def chances(self, token: str) -> dict[str, float]:
        """Of the levels: 0.9 in all, most of it at the number of letters of the token as the prompt has it."""
        likely = min(sum(c.isalpha() for c in token), self.top)
        return {"0": 0.3, str(likely): 0.6} if likely else {"0": 0.9}

    def expected(self, token: str) -> float:
        """In levels of ten."""
        chances = self.chances(token)
        return sum(int(level) * p for level, p in chances.items()) / sum(chances.values()) * 10 / self.top

    def predict(self, ids: Sequence[int]) -> list[dict[int, float]]:
        texts, line, after = [self.say(i) for i in ids], "", dict[tuple[int, int], int]()
        found = list[dict[int, float]]()
        for i, token in enumerate(ids):
            if i == 0:
                found.append({})
                continue
            if texts[i - 1] == "\t":
                here = {self.id(level): math.log(p) for level, p in self.chances(line.removesuffix("\t")).items()}
                here[self.id("unknown")] = math.log(0.05)
            else:
                here = {self.id(filler): -9.0 for filler in ("the", "a", ",")}
                if i > 1 and (ids[i - 2], ids[i - 1]) in after:
                    here[after[ids[i - 2], ids[i - 1]]] = math.log(0.9)
            found.append({token: -12.0, **here})
            line = "" if texts[i] == "\n" else line + texts[i]
            if i > 1:
                after[ids[i - 2], ids[i - 1]] = token
        return found


@dataclass(frozen=True)
class Kind:
    """What a server can do: how many alternatives in each way, 0 for not at all."""

    chat_prompt: int = 0  # vLLM's prompt_logprobs
    completions_prompt: int = 0
    generate: int = 0  # SGLang
    echo: int = 0
    answers: int = 0  # of generated tokens
    schema: bool = True
    strict: bool = False  # refuses fields that it does not know
    chat_style: bool = False  # llama.cpp on /completions
    shift: int = 0  # off by one
    status: int = 400
    fault: str = ""

    def but(self, **changes: Any) -> "Kind":
        return replace(self, **changes)


SERVERS = {
    "vLLM": Kind(chat_prompt=20, completions_prompt=20, echo=20, answers=20),
    "vLLM without a chat template": Kind(completions_prompt=20, echo=20, answers=20),
    "SGLang": Kind(generate=20, echo=20, answers=20),
    "legacy": Kind(echo=20, answers=20),
    "legacy of 5": Kind(echo=5, answers=5, strict=True),
    "llama-cpp-python": Kind(echo=20, answers=20, shift=1),
    "llama-cpp-python the other way": Kind(echo=20, answers=20, shift=-1),
    "llama.cpp": Kind(answers=20, chat_style=True),
    "OpenAI": Kind(answers=20, strict=True),
    "a reasoning model": Kind(strict=True),
    "an old server": Kind(schema=False, strict=True),
}


def vllm_position(model: Model, own: int, here: dict[int, float], limit: int) -> dict[str, Any] | None:
    """The prompt's token first, then the likeliest."""
    if not here:
        return None
    best = sorted(here, key=lambda i: -here[i])[:limit]
    return {
        str(i): {"logprob": here[i], "rank": 1 + sum(p > here[i] for p in here.values()), "decoded_token": model.say(i)}
        for i in dict.fromkeys([own, *best])
    }  # fmt: skip


def serve(model: Model, kind: Kind, render: Callable[[list[dict[str, str]]], str] | None = None,
          answer: Callable[[Request], Any] | None = None) -> Callable[[Request], Reply]:  # fmt: skip
    """A script for ChatServer. `render` is the chat template; `answer` returns an answer's (text, alternatives), or a Reply."""

    def template(messages: list[dict[str, str]]) -> str:
        return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages).removesuffix("<|im_end|>\n")

    def tokens_of(text: str) -> tuple[list[int], list[dict[int, float]]]:
        ids = model.encode(text)
        found = model.predict(ids)
        if kind.shift:
            found = [{}, *found[2:], {}] if kind.shift < 0 else [{}, {}, *found[1:-1]]
        if kind.fault == "truncated":
            ids, found = ids[:-9], found[:-9]
        if kind.fault == "a token lost":
            ids = [*ids[:-7], *ids[-6:], ids[-1]]
        if kind.fault == "no levels" and len(ids) > 400:
            levels = set(map(str, range(11)))
            found = [{i: p for i, p in here.items() if model.say(i) not in levels} for here in found]
        if kind.fault == "unlikely levels" and len(ids) > 400:
            levels = set(map(str, range(11)))
            found = [{i: -9999.0 if model.say(i) in levels else p for i, p in here.items()} for here in found]
        return ids, found

    def vllm(ids: list[int], found: list[dict[int, float]], limit: int) -> list[Any]:
        complete = [{own: -12.0, **here} if here else {} for own, here in zip(ids, found, strict=True)]
        positions = [vllm_position(model, own, here, limit) for own, here in zip(ids, complete, strict=True)]
        return positions[:-3] if kind.fault == "lengths differ" else positions

    def chat(request: Request) -> Reply:
        body = request.body
        if body.get("logprobs") and not kind.answers and kind.strict:
            return Reply(error("logprobs are not supported with this model."), kind.status)
        if body.get("top_logprobs", 0) > kind.answers and kind.strict:
            return Reply(error(f"top_logprobs must be at most {kind.answers}"), kind.status)
        if "response_format" in body and not kind.schema:
            return Reply(error("Unknown parameter: response_format"), kind.status)
        if "prompt_logprobs" in body:
            if not kind.chat_prompt:
                return Reply(error("Unknown parameter: prompt_logprobs"), kind.status) if kind.strict else Reply(completion("x"))
            ids, found = tokens_of((render or template)(body["messages"]))
            return Reply({**completion("x"), "prompt_logprobs": vllm(ids, found, kind.chat_prompt), "prompt_token_ids": ids})
        said = (answer or well_behaved(getattr(model, "top", 9) == 10))(request)
        return said if isinstance(said, Reply) else Reply(spoken(said, kind.answers if body.get("logprobs") else 0))

    def completions(request: Request) -> Reply:
        body = request.body
        if kind.chat_style:
            entry = {"token": "\n", "bytes": [10], "logprob": -1.0, "top_logprobs": []}
            return Reply({"choices": [{"text": "\n", "index": 0, "logprobs": {"content": [entry]}, "finish_reason": "length"}]})
        if "prompt_logprobs" in body and kind.completions_prompt:
            ids, found = tokens_of(body["prompt"])
            choice = {"index": 0, "text": "x", "logprobs": None, "prompt_logprobs": vllm(ids, found, kind.completions_prompt)}
            return Reply({"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": 1}})
        if not kind.echo or not body.get("echo"):
            return Reply(error("This is a chat model and not supported in the v1/completions endpoint."), 404)
        if body["logprobs"] > kind.echo:
            return Reply(error(f"logprobs must be at most {kind.echo}"), kind.status)
        ids, found = tokens_of(body["prompt"])
        texts = [model.say(i) for i in ids]
        best = [sorted(here, key=lambda i: -here[i])[: kind.echo] for here in found]
        top = [{model.say(i): here[i] for i in likely} or None for here, likely in zip(found, best, strict=True)]
        given = {"tokens": texts, "token_logprobs": [h.get(i) for i, h in zip(ids, found, strict=True)], "top_logprobs": top,
                 "text_offset": [len("".join(texts[:i])) for i in range(len(texts))]}  # fmt: skip
        if kind.fault == "lengths differ":
            given["top_logprobs"] = top[:-1]
        return Reply({"choices": [{"index": 0, "text": body["prompt"], "logprobs": given, "finish_reason": "length"}]})

    def generate(request: Request) -> Reply:
        body = request.body
        ids, found = tokens_of(body["text"])
        wanted = body.get("token_ids_logprob")

        def listed(here: dict[int, float]) -> list[Any] | None:
            if not here:
                return None
            chosen = wanted or sorted(here, key=lambda i: -here[i])[: kind.generate]
            return [[here.get(i, -30.0), i, model.say(i)] for i in chosen]

        start = body["logprob_start_len"]
        own = [[here.get(i), i, model.say(i)] for i, here in zip(ids, found, strict=True)][start:]
        others = list(map(listed, found))[start:]
        meta = {"input_token_logprobs": own, "prompt_tokens": len(ids), "completion_tokens": 1,
                f"input_{'token_ids' if wanted else 'top'}_logprobs": others[kind.fault == "lengths differ" :]}  # fmt: skip
        return Reply({"text": "x", "meta_info": meta})

    def script(request: Request) -> Reply:
        if request.path == "/v1/chat/completions":
            return chat(request)
        if request.path == "/v1/completions":
            return completions(request)
        if request.path == "/generate" and kind.generate:
            return generate(request)
        return Reply(error("Not Found"), 404)

    return script


Spoken = Sequence[tuple[str, dict[str, float]]]


def spoken(tokens: Spoken | str, limit: int, content: str | None = None) -> dict[str, Any]:
    """A chat completion of these tokens, each with the probabilities of what might have stood there."""
    if isinstance(tokens, str):
        tokens = [(tokens, {})]
    reply = completion("".join(text for text, _ in tokens) if content is None else content)
    if limit:
        reply["choices"][0]["logprobs"] = {"content": [entry_of(text, others, limit) for text, others in tokens], "refusal": None}
    return reply


def entry_of(text: str, others: dict[str, float], limit: int) -> dict[str, Any]:
    best = sorted(({text: 0.5} | others).items(), key=lambda item: -item[1])[:limit]
    padded = [*best, *((f"filler {i}", 1e-9) for i in range(limit - len(best)))]
    own = (others | {text: others.get(text, 0.5)})[text]

    def one(said: str, p: float) -> dict[str, Any]:
        return {"token": said, "logprob": math.log(p) if p > 0 else -9999.0, "bytes": list(said.encode())}

    return {**one(text, own), "top_logprobs": [one(said, p) for said, p in padded]}


def well_behaved(ten: bool) -> Callable[[Request], Spoken]:
    """Answers that keep to what is asked: a level is the number of letters of the token, at 0.6 against 0.3 for 0."""

    def answer(request: Request) -> Spoken:
        try:
            asked = json.loads(request.user)
        except ValueError:
            asked = {}
        if "number 10" in request.user:
            numbers = [[("10", {})] if ten else [("1", {}), ("0", {})]] * 3
        elif "count" in asked:
            numbers = [[level(asked["tokens"][str(i)], ten)] for i in range(asked["count"])]
        elif "token" in asked:
            return [('{"activation": ', {}), level(asked["token"], ten), ("}", {})]
        else:
            return [(json.dumps({"description": request.about}), {})]
        tokens: list[tuple[str, dict[str, float]]] = [('{"activations":', {}), (" [", {})]
        for i, number in enumerate(numbers):
            tokens += [(",", {})] * (i > 0) + number
        return [*tokens, ("]}", {})]

    return answer


def level(token: str, ten: bool) -> tuple[str, dict[str, float]]:
    likely = str(min(sum(c.isalpha() for c in token), 9 + ten))
    return likely, {likely: 0.6, "0": 0.3} if likely != "0" else {"0": 0.9}

