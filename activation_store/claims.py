"""Which process works on which part: claims are small files, and only one process can create a given one.

Claims save work; nothing rests on them. A part that two processes do all the same is committed twice, whole both times,
with the same values. So a claim may be taken over as soon as its owner looks dead: at once where the process was on this
host, after `lease` seconds without a sign of life where it was on another.
"""

import contextlib
import json
import os
import threading
import time
from functools import cached_property
from types import TracebackType

from activation_store.errors import InputError
from activation_store.files import HOST, is_running
from activation_store.folders import Folder

LEASE = 120.0
"""Seconds without a sign of life after which another host's claim lapses. Owners give one every quarter of it."""


class Claims:
    """This process's claims in a folder; a context manager, which gives signs of life and lets go of all at the end."""

    def __init__(self, folder: Folder, lease: float = LEASE) -> None:
        """Work in `folder`; nothing is claimed yet."""
        self._folder, self._lease = folder, lease
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._give_signs, name="claims", daemon=True)
        self._owner = json.dumps({"host": HOST, "pid": os.getpid()}).encode()

    def __enter__(self) -> "Claims":
        """Begin to give signs of life."""
        self._pulse.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let go of everything still held."""
        self._ended.set()
        self._pulse.join()
        for name in sorted(self._held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Claim a part. False where another process, alive as far as one can tell, holds it (or this one does)."""
        with self._lock:
            if name in self._held:
                return False
            if not self._folder.create(self._file(name), self._owner):
                if not self._lapsed(name):
                    return False
                self._folder.remove(self._file(name))
                if not self._folder.create(self._file(name), self._owner):
                    return False  # another process was faster
            self._held.add(name)
            return True

    def release(self, name: str) -> None:
        """Let go of a part."""
        with self._lock:
            self._held.discard(name)
            self._folder.remove(self._file(name))

    def others(self) -> bool:
        """Say whether another process, alive as far as one can tell, has a claim here."""
        claims = [name.removesuffix(".claim") for name in self._folder.names() if name.endswith(".claim")]
        return any(name not in self._held and not self._lapsed(name) for name in claims)

    @staticmethod
    def _file(name: str) -> str:
        return f"{name}.claim"

    def _lapsed(self, name: str) -> bool:
        try:
            owner = json.loads(self._folder.read(self._file(name)))
            if owner["host"] == HOST and not is_running(HOST, int(owner["pid"])):
                return True
        except FileNotFoundError:
            return True
        except (ValueError, TypeError, KeyError, OverflowError):  # cut off by a crash, or not yet written: time will tell
            pass
        written = self._folder.modified(self._file(name))
        return written is None or time.monotonic() + self._ahead - written > self._lease

    @cached_property
    def _ahead(self) -> float:
        """How far the clock of the place is ahead of ours, which only counts seconds: the two need not agree."""
        clock = f"{HOST}-{os.getpid()}.clock"
        self._folder.write(clock, b"", sync=False)
        now = self._folder.modified(clock)
        self._folder.remove(clock)
        return (time.time() if now is None else now) - time.monotonic()

    def _give_signs(self) -> None:
        while not self._ended.wait(self._lease / 4):
            with self._lock, contextlib.suppress(OSError, InputError):  # a sign that is not given costs double work at worst
                for name in self._held:
                    self._folder.write(self._file(name), self._owner, sync=False)
