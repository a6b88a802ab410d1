"""Requests to an OpenAI-compatible chat server: bounded in number, retried, journalled, never sent twice once answered."""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from activation_store.errors import InputError, first_line
from activation_store.files import append_json_line, full_disk_is_input, read_json_lines
from explain.answers import Answer
from explain.batches import Batches, Unanswered
from explain.config import ExplainConfig
from explain.cost import Budget, Usage, price_of
from explain.limits import CROWDED, Limit, delay_of

_MOST_REFUSALS = 6  # of one request that are laid to others of ours
_OPTIONAL = (
    "temperature", "seed", "reasoning_effort", "top_logprobs", "logprobs", "response_format", "max_completion_tokens",
    "max_tokens",
)  # fmt: skip


class RequestFailed(Exception):
    """A proposal or simulation could not be had; the message is the reason, kept with the unit. `status` is HTTP's, if any."""

    status: int | None = None
    begun: float = 0.0


class Crowded(RequestFailed):
    """The server has no room for the request now."""


class Passing(RequestFailed):
    """A fault of the network or the server, which may heal."""


class UnusableReply(RequestFailed):
    """The server answered, but not with a chat completion; asking again may help."""


def connect(config: ExplainConfig) -> Any:
    """Return an AsyncOpenAI client; the key comes from OPENAI_API_KEY and is kept nowhere.

    Raises InputError where no key is set and the server is not a local one of the user's (base_url or OPENAI_BASE_URL).
    """
    import openai

    base_url = config.base_url or os.environ.get("OPENAI_BASE_URL") or None
    key = os.environ.get("OPENAI_API_KEY") or ("unused" if base_url else None)
    if key is None:
        raise InputError("OPENAI_API_KEY is not set: set it, or point OPENAI_BASE_URL at a server that needs none")
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise InputError("OPENAI_API_KEY holds characters that no HTTP header may hold, such as a line break: set it again")
    try:
        return openai.AsyncOpenAI(api_key=key, base_url=base_url, max_retries=0, timeout=config.timeout)  # we retry: see limits
    except Exception as error:  # httpx has no public base of its URL errors
        raise InputError(f"explain.base_url: {base_url!r} is not a server's address ({first_line(error)})") from None


def check_server(config: ExplainConfig) -> None:
    """Raise InputError if the server cannot be reached or refuses the key. Called before long work, not after it."""
    import openai

    async def ask() -> None:
        client = connect(config)
        try:
            await client.with_options(max_retries=1, timeout=min(config.timeout, 20)).models.list()
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
            where = f"explain.base_url: the LLM server at {client.base_url}"
            raise InputError(f"{where} does not serve us: {reason(error)}") from None
        except openai.APIError:
            pass  # not every server lists its models; it is there, which is what was asked
        finally:
            await client.close()

    asyncio.run(ask())


def reason(error: Exception) -> str:
    """Say in one line why a request failed, with the key taken out should the server have quoted it."""
    status = getattr(error, "status_code", None)
    text = f"HTTP {status} ({first_line(error)})" if status else first_line(error)
    cause = error.__cause__
    text += f", {first_line(cause)}" if cause is not None else ""
    return _masked(text)[:300]


def _masked(text: str) -> str:
    """Take the key out of what a server said, before it is shown or kept; lone surrogates too, which no file can hold."""
    key = os.environ.get("OPENAI_API_KEY")
    text = text.encode("utf-8", "replace").decode()
    return text.replace(key, "[key]") if key else text


def read_completion(reply: Any) -> Answer:
    """Return the text and the tokens of a chat completion. Raises UnusableReply for what is none."""
    try:
        choice = reply.choices[0]
        text = choice.message.content
    except (AttributeError, TypeError, LookupError):  # the openai package does not check what servers send
        text = None
    if not isinstance(text, str):
        raise UnusableReply(f"the server's reply holds no text: {_masked(str(reply))[:120]!r}")
    return Answer.of(_masked(text), choice)


def content_key(request: Any) -> str:
    """Return the hash of all that decides an answer."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _jitter(key: str, attempt: int) -> float:
    """Return a number in [0, 1) of a request and attempt: spread over requests, the same in every run."""
    return int(hashlib.sha256(f"{key}{attempt}".encode()).hexdigest()[:8], 16) / 16**8


class Journal:
    """Answers by the key of what was asked, one line each in a file: what was answered once is not asked again."""

    def __init__(self, path: Path) -> None:
        """Read what was answered before."""
        self._path, self._file, self._synced = path, -1, 0.0
        lines = read_json_lines(path)
        self._answers = {line["key"]: str(line["answer"]) for line in lines if line["answer"] is not None}
        self.used = sum((Usage(**line["usage"]) for line in lines if line.get("usage")), start=Usage())

    def __contains__(self, key: str) -> bool:
        """Say whether there is an answer."""
        return key in self._answers

    def __getitem__(self, key: str) -> str:
        """Return the answer."""
        return self._answers[key]

    def add(self, key: str, answer: str | None, usage: Usage | None = None) -> None:
        """Write an answer down, at once, with what it used; None for a reply that was paid for and is of no use.

        A line is with the system when this returns, so that killing the process loses none; it is on the disk a second later at
        most, for a power cut may cost a second's answers, but waiting for the disk after each would cost every request's time.
        """
        line = {"key": key, "answer": answer, "usage": vars(usage) if usage else None}
        if self._file < 0:  # the first one mends what a crash has torn
            append_json_line(self._path, line)
            self._file, self._synced = os.open(self._path, os.O_WRONLY | os.O_APPEND), time.monotonic()
        else:
            with full_disk_is_input(self._path):
                os.write(self._file, (json.dumps(line, ensure_ascii=False) + "\n").encode())
                if time.monotonic() - self._synced > 1:
                    self.sync()
        if answer is not None:
            self._answers[key] = answer

    def sync(self) -> None:
        """Bring all lines to the disk."""
        if self._file >= 0:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def __del__(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)


class ChatClient:
    """Chat completions with a journal: one line a request, keyed by a hash of all that decides the answer."""

    def __init__(self, config: ExplainConfig, journal: Path) -> None:
        """Read what was answered before; open no connection yet."""
        self.config = config
        self._journal = Journal(journal)
        self._client = connect(config)
        self._limit = Limit(config.concurrency)
        self._dropped: dict[str, str] = {}  # parameters that the server refused, and what it said
        self._counts = {"requests_sent": 0, "requests_from_journal": 0}
        self._used = Usage()  # by this start
        self._batches: Batches | None = None
        if config.batch:
            self._batches = Batches(lambda: self._client, journal.with_name("batches.jsonl"), poll=config.batch_poll)
        self._budget = Budget(price_of(config), config.max_cost, config.max_answer_tokens, self._journal.used)

    async def answer(
        self, messages: list[dict[str, str]], schema: dict[str, Any], attempt: int, top_logprobs: int = 0
    ) -> Answer:  # fmt: skip
        """Return an answer, with its tokens and the likeliest `top_logprobs` in the place of each.

        `attempt` above 0 asks afresh for one that could not be read.

        Transport faults and statuses 408, 409, 429 and 5xx are retried, `explain.retries` times, after as long as Retry-After
        says. A parameter that the server says it does not take is left out from then on.
        Raises RequestFailed with the reason once that is exhausted, UnusableReply for a reply that is no chat completion.
        """
        import openai
        from openai.types.chat import ChatCompletion

        request: dict[str, Any] = {
            "model": self.config.model, "messages": messages, "temperature": 0.0 if attempt == 0 else 0.5, "seed": attempt,
            "max_completion_tokens": self.config.max_answer_tokens,  # a small model at temperature 0 may never stop
        }  # fmt: skip
        if self.config.response_format == "json_schema":
            request["response_format"] = {
                "type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema},
            }  # fmt: skip
        elif self.config.response_format == "json_object":
            request["response_format"] = {"type": "json_object"}
        if top_logprobs:
            request |= {"logprobs": True, "top_logprobs": top_logprobs}

        def read(reply: Any) -> str:
            answer = read_completion(reply)
            return answer.as_json() if top_logprobs else answer.text

        if self.config.reasoning_effort is not None:
            request["reasoning_effort"] = self.config.reasoning_effort

        async def send() -> Any:
            while True:
                allowed = self._allowed(request)
                try:
                    # as chat.completions.create does, less its walk through the whole body, which costs more than all else here
                    return await self._client.post("/chat/completions", cast_to=ChatCompletion, body=allowed)
                except openai.BadRequestError as error:
                    if not self._learns(error, allowed):
                        raise

        key = content_key(request)
        if self._batches is not None:
            batches = self._batches
            kept = await self._once(key, request, lambda: batches.ask(key, self._allowed(request)), read, crowd=False)
        else:
            kept = await self._once(key, request, send, read)
        return Answer.of_json(kept) if top_logprobs else Answer(kept)

    async def post(
        self, path: str, body: dict[str, Any], key: str, read: Callable[[Any], Any], retries: int | None = None
    ) -> Any:  # fmt: skip
        """Ask any route of the server, in its own words; what `read` takes from the JSON it replies is journalled under `key`.

        A path that begins with // is at the server's root, outside of the API's own. Raises as `answer`.
        """
        url = self.base_url.rstrip("/").removesuffix("/v1") + path[1:] if path.startswith("//") else path
        kept = await self._once(
            key, body, lambda: self._client.post(url, cast_to=object, body=body), lambda reply: json.dumps(read(reply)), retries
        )  # fmt: skip
        return json.loads(kept)

    @property
    def base_url(self) -> str:
        """Where the server is."""
        return str(self._client.base_url)

    def remember(self, key: str, found: Any) -> None:
        """Journal what a request that failed has taught, so that it is not sent again."""
        self._journal.add(key, json.dumps(found))

    async def _once(
        self, key: str, request: dict[str, Any], send: Callable[[], Awaitable[Any]], read: Callable[[Any], str],
        retries: int | None = None, crowd: bool = True,
    ) -> str:  # fmt: skip
        """Return what was read of a reply, from the journal if it was answered before; where no `crowd`, no slot is needed."""
        if key in self._journal:
            self._counts["requests_from_journal"] += 1
            return self._journal[key]
        left, attempt = self.config.retries if retries is None else retries, 0
        while True:
            try:
                return await self._tried(key, request, send, read, crowd)
            except Crowded as refused:
                # a refusal for want of room is held against the request only where it was alone: else it is the crowd's fault
                left -= self._limit.alone or attempt >= _MOST_REFUSALS
                if left < 0:
                    raise
                self._limit.refused(refused.begun, delay_of(refused.__cause__, attempt, _jitter(key, attempt)))
            except Passing as fault:
                left -= 1
                if left < 0:
                    raise
                await asyncio.sleep(delay_of(fault.__cause__, attempt, _jitter(key, attempt)))
            attempt += 1

    async def _tried(
        self, key: str, request: dict[str, Any], send: Callable[[], Awaitable[Any]], read: Callable[[Any], str], crowd: bool
    ) -> str:  # fmt: skip
        """Send a request once, in a slot, within the budget. Raises Crowded or Passing for what may heal."""
        import openai

        async with self._limit.slot() if crowd else nullcontext(time.monotonic()) as begun:
            reserved = self._budget.reserve(len(json.dumps(request).encode()))
            if reserved is None:
                raise RequestFailed(
                    f"explain.max_cost: ${self.config.max_cost:g} would not be kept, ${self._budget.cost:.4g} are spent; "
                    "raise it, and the same command goes on"
                )
            self._counts["requests_sent"] += 1
            usage = None
            try:
                reply = await send()
                usage = Usage.of(reply)
                self._used += usage
                self._limit.succeeded()
            except openai.APIError as error:
                status = getattr(error, "status_code", None)
                passing = isinstance(error, openai.APIConnectionError) or status in (408, 409) or (status or 0) >= 500
                failed = (Crowded if status in CROWDED else Passing if passing else RequestFailed)(reason(error))
                failed.status, failed.begun = status, begun
                raise failed from error  # its headers say when to ask again
            except Unanswered as error:
                raise RequestFailed(_masked(str(error))) from None
            except ValueError as error:  # a body that is not JSON
                raise UnusableReply(f"the server's reply is not an API answer: {_masked(first_line(error))}") from None
            finally:
                self._budget.settle(reserved, usage)
        try:
            text = read(reply)
        except UnusableReply:
            self._journal.add(key, None, usage)
            raise
        self._journal.add(key, text, usage)
        return text

    async def reopen(self) -> None:
        """Close the connections and get ready for new ones: those of one event loop are of no use in another."""
        await self._client.close()
        self._client = connect(self.config)

    def usage(self) -> dict[str, Any]:
        """Return how many requests were sent, the tokens they used, and what all of this folder's have cost, in dollars."""
        batches = {"batches_sent": self._batches.sent, "batches_taken_up": self._batches.taken_up} if self._batches else {}
        dropped = {"parameters_dropped": sorted(self._dropped)} if self._dropped else {}
        return {**self._counts, **vars(self._used), "cost_usd": self._budget.cost, **self._limit.facts(), **batches, **dropped}

    def _allowed(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return a request without what the server has refused, in the words that it does take."""
        allowed = {name: value for name, value in request.items() if name not in self._dropped}
        if "max_completion_tokens" in self._dropped and "max_tokens" not in self._dropped:
            allowed["max_tokens"] = request["max_completion_tokens"]
        if "response_format" in self._dropped and "json_object" not in self._dropped and "response_format" in request:
            allowed["response_format"] = {"type": "json_object"}
        return allowed

    def _learns(self, error: Any, sent: dict[str, Any]) -> bool:
        """Say whether a refusal names a parameter that can be done without, and do without it from now on.

        Reasoning models refuse temperatures and log-probabilities, older servers what is new; which ones is not known by name.
        """
        said = f"{getattr(error, 'param', None) or ''} {error}".lower()
        for name in _OPTIONAL:
            if name in sent and name in said:
                plainer = name == "response_format" and sent[name]["type"] == "json_object"  # the next that is tried
                self._dropped |= {name: reason(error), **({"json_object": reason(error)} if plainer else {})}
                if name == "logprobs":
                    self._dropped["top_logprobs"] = reason(error)
                return True
        return False

    async def close(self) -> None:
        """Close the connections, and see the journal to the disk."""
        await self._client.close()
        self._journal.sync()
