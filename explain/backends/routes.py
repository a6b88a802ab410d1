"""The ways in which servers give the log-probabilities of a prompt: what each is sent, and how its reply is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from explain.answers import add
from explain.backends.layout import Conversation
from explain.backends.levels import Read

ALTERNATIVES = 20  # as many as vLLM gives unless told otherwise, and chat servers at most

_VLLM = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": ALTERNATIVES, "return_token_ids": True}


class Route(Protocol):
    """One of them. Replies are not trusted: `read` raises ValueError, TypeError or LookupError for what it cannot make out."""

    @property
    def name(self) -> str:
        """Name it, for summaries."""
        ...

    def request(self, model: str, shown: Conversation, ids: Sequence[int], start: int = 0) -> tuple[str, dict[str, Any]]:
        """Return path and body, for a route that can be asked for these tokens alone, `ids`, and from the token `start` on."""
        ...

    def read(self, reply: Any) -> list[Read]:
        """Return the tokens of the prompt; the first has no alternatives, for nothing stands before it."""
        ...


@dataclass(frozen=True)
class VLLMChat:
    """vLLM's `prompt_logprobs` in chat: the server puts the model's own chat template around the turns."""

    name: str = "vLLM chat prompt_logprobs"

    def request(self, model: str, shown: Conversation, ids: Sequence[int], start: int = 0) -> tuple[str, dict[str, Any]]:
        """Return the request; the last answer is given as one to be continued, so that the prompt ends with it."""
        return "/chat/completions", {
            "model": model, "messages": shown.messages, "add_generation_prompt": False, "continue_final_message": True,
            **_VLLM,
        }  # fmt: skip

    def read(self, reply: Any) -> list[Read]:
        """Read the reply."""
        return _of_vllm(reply)


@dataclass(frozen=True)
class VLLMCompletions:
    """The same in completions, for models without a chat template."""

    name: str = "vLLM completions prompt_logprobs"

    def request(self, model: str, shown: Conversation, ids: Sequence[int], start: int = 0) -> tuple[str, dict[str, Any]]:
        """Return the request."""
        return "/completions", {"model": model, "prompt": shown.plain, **_VLLM}

    def read(self, reply: Any) -> list[Read]:
        """Read the reply."""
        return _of_vllm(reply["choices"][0])


def _of_vllm(owner: Any) -> list[Read]:
    """Read a list of {token id: {logprob, rank, decoded_token}}, which holds the prompt's own token and the likeliest."""
    positions, ids = owner["prompt_logprobs"], owner.get("prompt_token_ids")
    if not positions:
        raise ValueError("no prompt_logprobs in the reply")
    if ids is not None and len(ids) != len(positions):
        raise ValueError(f"{len(ids)} tokens, log-probabilities for {len(positions)}")
    found = list[Read]()
    for number, here in enumerate(positions):
        if here is None:
            if number:
                raise ValueError(f"no log-probabilities at token {number}")
            found.append(Read("", {}))  # the first token's text is not told; it is no label's
            continue
        own = next(iter(here)) if ids is None else str(ids[number])  # vLLM puts the prompt's own first; spelling will show
        alternatives: dict[str, float] = {}
        for other in here.values():
            add(alternatives, str(other["decoded_token"]), float(other["logprob"]))
        found.append(Read(str(here[own]["decoded_token"]), alternatives, int(own)))
    return found


@dataclass(frozen=True)
class SGLang:
    """SGLang's own /generate. With the levels' ids it gives the probabilities of just these: no cut-off at the likeliest.

    What stands before `start` it takes from its cache.
    """

    name: str = "SGLang /generate"

    def request(self, model: str, shown: Conversation, ids: Sequence[int], start: int = 0) -> tuple[str, dict[str, Any]]:
        """Return the request."""
        wanted: dict[str, Any] = {"token_ids_logprob": list(ids)} if ids else {"top_logprobs_num": ALTERNATIVES}
        return "//generate", {
            "text": shown.plain, "sampling_params": {"max_new_tokens": 1, "temperature": 0}, "return_logprob": True,
            "logprob_start_len": start, "return_text_in_logprobs": True, **wanted,
        }  # fmt: skip

    def read(self, reply: Any) -> list[Read]:
        """Read lists of [log-probability, token id, text]."""
        meta = reply["meta_info"]
        own = meta["input_token_logprobs"]
        others = meta.get("input_token_ids_logprobs") or meta.get("input_top_logprobs")
        if not own or not others or len(own) != len(others):
            raise ValueError(f"{len(own or ())} tokens, alternatives for {len(others or ())}")
        found = list[Read]()
        for (_, token, text), here in zip(own, others, strict=True):
            alternatives: dict[str, float] = {}
            for logprob, _, other in here or ():
                add(alternatives, str(other), float(logprob))
            found.append(Read(str(text), alternatives, int(token)))
        return found


@dataclass(frozen=True)
class Echo:
    """Legacy completions with echo and no new token, as the paper of 2023 used them; `alternatives` is OpenAI's 5, or more."""

    alternatives: int = ALTERNATIVES

    @property
    def name(self) -> str:
        """Name it."""
        return f"completions echo, {self.alternatives} alternatives"

    def request(self, model: str, shown: Conversation, ids: Sequence[int], start: int = 0) -> tuple[str, dict[str, Any]]:
        """Return the request."""
        return "/completions", {
            "model": model, "prompt": shown.plain, "max_tokens": 0, "temperature": 0, "echo": True,
            "logprobs": self.alternatives,
        }  # fmt: skip

    def read(self, reply: Any) -> list[Read]:
        """Read the parallel lists; llama.cpp's server ignores echo and sends a chat's log-probabilities instead."""
        given = reply["choices"][0]["logprobs"]
        if not given or "tokens" not in given:
            raise ValueError("no log-probabilities of the prompt in the reply: echo is ignored")
        tokens, others = given["tokens"], given["top_logprobs"]
        if not others or len(tokens) != len(others):
            raise ValueError(f"{len(tokens)} tokens, alternatives for {len(others or ())}")
        return [
            Read(str(text), {str(other): float(p) for other, p in (here or {}).items()})
            for text, here in zip(tokens, others, strict=True)
        ]


_BEST_FIRST: tuple[Route, ...] = (VLLMChat(), SGLang(), VLLMCompletions(), Echo(), Echo(5))
ROUTES = {route.name: route for route in _BEST_FIRST}
"""Best first: with the model's own template, then without a cut-off, then the rest."""
