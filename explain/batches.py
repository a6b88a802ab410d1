"""OpenAI's Batch API as a way to send: slower by hours, half the price. Requests are collected until nothing else can go on.

A batch's id is written down, with the keys of its requests, before anybody waits for it: a run that is killed meanwhile, or days
later, takes the same batch up again instead of sending one more.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from activation_store.errors import first_line
from activation_store.files import append_json_line, read_json_lines

_MOST_REQUESTS, _MOST_BYTES = 50_000, 190_000_000  # of a file; the API takes 200 MB
_OVER = ("completed", "failed", "expired", "cancelled")


class Unanswered(Exception):
    """A request of a batch came back without an answer; the message is the reason."""


class Batches:
    """Sends what is asked in batches. `connection` gives the open client at any time; `quiet` and `poll` are in seconds."""

    def __init__(self, connection: Callable[[], Any], path: Path, quiet: float = 2.0, poll: float = 30.0) -> None:
        """Read which batches were sent, and which of their requests came back without an answer and may be sent again."""
        self._connection, self._path, self._quiet, self._poll = connection, path, quiet, poll
        self._batch_of: dict[str, str] = {}
        for line in read_json_lines(path):
            self._batch_of |= dict.fromkeys(line.get("keys", ()), line["batch"])
            for key in line.get("failed", ()):
                self._batch_of.pop(key, None)
        self._followed: set[str] = set()
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._replies: dict[str, Any] = {}  # to requests of earlier starts that nobody has asked for yet
        self._new: dict[str, bytes] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.sent, self.taken_up = 0, 0

    async def ask(self, key: str, body: dict[str, Any]) -> Any:
        """Return the reply to a request, once a batch with it has come back. Raises Unanswered with the reason."""
        if key in self._replies:
            return self._replies.pop(key)
        if key not in self._waiting:
            self._waiting[key] = asyncio.get_running_loop().create_future()
            batch = self._batch_of.get(key)
            if batch is None:
                line = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
                self._new[key] = json.dumps(line, ensure_ascii=False).encode() + b"\n"
                self._send_when_quiet()
            elif batch not in self._followed:
                self.taken_up += 1
                self._followed.add(batch)
                self._start(self._wait(batch))
        return await asyncio.shield(self._waiting[key])

    def _send_when_quiet(self) -> None:
        """Wait a while longer for others, unless the file is full: they come as long as any coroutine can go on."""
        if self._timer is not None:
            self._timer.cancel()
        full = len(self._new) >= _MOST_REQUESTS or sum(map(len, self._new.values())) >= _MOST_BYTES
        self._timer = asyncio.get_running_loop().call_later(0.0 if full else self._quiet, self._send)

    def _send(self) -> None:
        lines, self._new, self._timer = self._new, {}, None
        self._start(self._submit(lines))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks but weakly
        task.add_done_callback(self._tasks.discard)

    async def _submit(self, lines: dict[str, bytes]) -> None:
        client = self._connection()
        try:
            file = await client.files.create(file=("requests.jsonl", b"".join(lines.values())), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        except Exception as error:  # whatever went wrong, those who wait must hear of it
            self._settle(dict.fromkeys(lines, Unanswered(f"the batch was not taken: {first_line(error)}")))
            return
        append_json_line(self._path, {"batch": batch.id, "keys": list(lines)})
        self.sent += 1
        self._batch_of |= dict.fromkeys(lines, batch.id)
        await self._wait(batch.id)

    async def _wait(self, batch: str) -> None:
        self._followed.add(batch)
        keys = [key for key, of in self._batch_of.items() if of == batch]
        replies: dict[str, Any] = {}
        try:
            while (found := await self._connection().batches.retrieve(batch)).status not in _OVER:
                await asyncio.sleep(self._poll)
            for file in (found.output_file_id, found.error_file_id):
                if file:
                    content = await self._connection().files.content(file)
                    for line in content.text.splitlines():
                        entry = json.loads(line)
                        replies[entry["custom_id"]] = _reply(entry)
        except Exception as error:  # the next who asks follows the batch again
            self._followed.discard(batch)
            self._settle(dict.fromkeys(keys, Unanswered(f"batch {batch}: {first_line(error)}")))
            return
        why = "; ".join(str(fault.message) for fault in (getattr(found.errors, "data", None) or []))
        missing = Unanswered(f"batch {batch} is {found.status}, without an answer{f' ({why})' if why else ''}")
        replies = {key: replies.get(key, missing) for key in keys}
        failed = [key for key, reply in replies.items() if isinstance(reply, Unanswered)]
        if failed:
            append_json_line(self._path, {"batch": batch, "failed": failed})
            for key in failed:
                del self._batch_of[key]
        self._settle(replies)

    def _settle(self, replies: dict[str, Any]) -> None:
        """Hand replies to those who wait; answers that nobody has asked for yet are kept."""
        for key, reply in replies.items():
            future, unanswered = self._waiting.pop(key, None), isinstance(reply, Unanswered)
            if future is None and not unanswered:
                self._replies[key] = reply
            elif future is not None and unanswered:
                future.set_exception(reply)
            elif future is not None:
                future.set_result(reply)


def _reply(entry: dict[str, Any]) -> Any:
    """Return the chat completion of a line of a batch's output, or why there is none."""
    from openai.types.chat import ChatCompletion

    response = entry.get("response") or {}
    body = response.get("body") or {}
    if response.get("status_code") == 200:
        return ChatCompletion.construct(**body)
    said = body.get("error") or entry.get("error") or {}
    return Unanswered(f"HTTP {response.get('status_code')} ({said.get('message') or 'no reason given'})")
