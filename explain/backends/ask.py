"""Asking a chat server until its answer can be read."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from explain.answers import Answer
from explain.client import ChatClient, RequestFailed, UnusableReply

T = TypeVar("T")
Item = TypeVar("Item")


async def ask(
    client: ChatClient, system: str, user: str, schema: dict[str, Any], read: Callable[[Any, Answer], T],
    top_logprobs: int = 0, sample: int = 0,
) -> T:  # fmt: skip
    """Return what `read` makes of an answer's JSON and of the answer itself; where it raises ValueError, ask again, saying why.

    Each `sample` is another draw. Raises RequestFailed with the last fault once `explain.retries` are used up.
    """
    first = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    messages, fault = first, ""
    attempts = client.config.retries + 1
    for attempt in range(sample * attempts, (sample + 1) * attempts):
        try:
            answer = await client.answer(messages, schema, attempt, top_logprobs)
        except UnusableReply as error:
            fault = str(error)
            continue
        try:
            return read(json.loads(json_part(answer.text)), answer)
        except (ValueError, RecursionError) as error:  # json's own errors: bad syntax, or nested without end
            fault = str(error)
            messages = [
                *first,
                {"role": "assistant", "content": answer.text[:500]},
                {"role": "user", "content": f"That answer could not be read: {fault}. Answer again, with the JSON alone."},
            ]
    raise RequestFailed(f"unreadable answer after {attempts} attempts: {fault}")


async def ask_each(call: Callable[[Item], Awaitable[T]], items: Sequence[Item], scouts: int = 1) -> list[T]:
    """Return what `call` gives for each item: the first alone, then the others at once, as far as the limit on requests allows.

    Without a scout (in batches, which take hours each) all at once.
    Where the first fails nothing more is sent; of the others all are heard out, so that no answer is lost, before a failure is
    raised.
    """
    found = [await call(item) for item in items[:scouts]]
    others = await asyncio.gather(*(call(item) for item in items[scouts:]), return_exceptions=True)
    for other in others:
        if isinstance(other, BaseException):
            raise other
        found.append(other)
    return found


def json_part(answer: str) -> str:
    """Return what stands between the first and the last brace: models like to wrap JSON in words or fences."""
    start, end = answer.find("{"), answer.rfind("}")
    return answer[start : end + 1] if 0 <= start < end else answer
