"""How many requests run at once: as many as the server takes, found by additive increase and multiplicative decrease.

A refusal for want of room (429, 503) halves the limit, once for all requests that were under way together, and makes everybody
wait as long as the server asks for; each run of successes as long as the limit raises it by one, up to the ceiling.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
CROWDED = (429, 503)


class Limit:
    """Slots for requests. `refusals`, `lowest` and `waited` (seconds for which all had to wait) tell how it went."""

    def __init__(self, ceiling: int) -> None:
        """Begin at the ceiling: most servers take it."""
        self.ceiling, self.now = ceiling, float(ceiling)
        self.refusals, self.lowest, self.waited = 0, ceiling, 0.0
        self._running = 0
        self._closed_until = self._cut_at = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[float]:
        """Wait for a slot, and for the end of any pause; gives the time at which the request begins."""
        while True:
            pause = self._closed_until - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            elif self._running >= int(self.now):
                turn = asyncio.get_running_loop().create_future()
                self._waiting.append(turn)
                try:
                    await turn
                finally:
                    if turn in self._waiting:
                        self._waiting.remove(turn)
            else:
                break
        self._running += 1
        try:
            yield time.monotonic()
        finally:
            self._running -= 1
            self._wake()

    @property
    def alone(self) -> bool:
        """Whether the limit is one: a refusal cannot be laid to other requests of ours."""
        return self.now < 2

    def succeeded(self) -> None:
        """Take a success into account."""
        self.now = min(self.now + 1 / self.now, float(self.ceiling))
        self._wake()

    def refused(self, begun: float, delay: float) -> None:
        """Take a refusal of a request that began at `begun` into account; everybody waits for `delay` seconds."""
        self.refusals += 1
        now = time.monotonic()
        if begun > self._cut_at:  # those that began before the last cut were refused for the same crowd
            self.now, self._cut_at = max(self.now / 2, 1.0), now
            self.lowest = min(self.lowest, int(self.now))
        until = now + delay
        if until > self._closed_until:
            self.waited += until - max(self._closed_until, now)
            self._closed_until = until

    def _wake(self) -> None:
        free = int(self.now) - self._running
        while self._waiting and free > 0:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                free -= 1

    def facts(self) -> dict[str, Any]:
        """Return what the server's refusals came to."""
        return {"refusals": self.refusals, "lowest_concurrency": self.lowest, "seconds_paused": round(self.waited, 3)}


def delay_of(error: Any, attempt: int, jitter: float) -> float:
    """Return how long to wait before asking again: what the server says, else twice as long each time, up to 30 s.

    `jitter` in [0, 1) spreads requests over the last quarter of that; what the server asks for is kept to the full.
    """
    headers = getattr(getattr(error, "response", None), "headers", {})
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        said = headers.get(name)
        if said is None:
            continue
        try:
            seconds = float(said) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(said).timestamp() - time.time()
            except ValueError:
                continue
        if 0 <= seconds <= 3600:
            return seconds
    return float(min(FIRST_DELAY * 2**attempt, LONGEST_DELAY) * (0.75 + 0.25 * jitter))
