"""A folder in an object store, through fsspec: s3://, gs:// and whatever else has a driver."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

from activation_store.errors import InputError, first_line
from activation_store.files import Payload
from activation_store.folders import Read, Stretch, Then


@dataclass(frozen=True)
class ObjectFolder:
    """A prefix of an object store, through fsspec. An object appears whole when its upload ends: that is all we need.

    Where the store is and who we are comes from what its driver reads: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...,
    FSSPEC_S3_ENDPOINT_URL, ~/.aws, ~/.config/fsspec. So does its patience: AWS_MAX_ATTEMPTS.
    """

    url: str

    PATIENCE = 60.0
    """Seconds in which a server must say how long an object is. Retries alone give up on a mute one after many minutes."""
    CONNECTIONS = 64
    """Requests in flight at once, to S3: its driver's 10 would leave reading to the latency of the network."""
    PIECE = 16 << 20
    """Longer reads are cut into pieces of this many bytes: one connection is far slower than several."""
    AT_ONCE = 64 << 20
    """Bytes asked for at once: what reading takes in memory besides the caller's buffers."""

    def __str__(self) -> str:
        """Return the URL."""
        return self.url

    @property
    def _place(self) -> tuple[Any, str]:
        """Return the file system and the path in it, opened once a process: connections do not outlive a fork."""
        opened: dict[int, tuple[Any, str]] = self._opened
        return opened.get(os.getpid()) or opened.setdefault(os.getpid(), self._open())

    @cached_property
    def _opened(self) -> dict[int, tuple[Any, str]]:
        return {}

    def _open(self) -> tuple[Any, str]:
        import fsspec

        options: dict[str, Any] = {"use_listings_cache": False}  # other processes write too
        if self.url.startswith(("s3://", "s3a://")):
            theirs = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options["config_kwargs"] = {"max_pool_connections": self.CONNECTIONS, **theirs}
        try:
            fs, root = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            what = f"{self.url}: cannot be opened ({first_line(error)})"
            raise InputError(f"{what}; install its driver, such as monosem[s3] or monosem[gcs]") from error
        return fs, root.rstrip("/")

    def _of(self, name: str) -> str:
        return f"{self._place[1]}/{name}" if name else self._place[1]

    @contextlib.contextmanager
    def _faults(self, name: str, writing: bool = False) -> Iterator[None]:
        """Turn what a server refuses into one line; a missing file stays what it is, but a missing bucket does not."""
        try:
            yield
        except (EOFError, InputError):
            raise
        except FileNotFoundError as error:
            if not writing and "bucket does not exist" not in str(error):
                raise
            raise InputError(f"{self.url}/{name}: {first_line(error)}; make the bucket, or name another") from error
        except TimeoutError as error:
            raise InputError(f"{self.url}/{name}: no answer in time ({first_line(error)}); check address and network") from error
        except Exception as error:  # drivers raise their own kinds: connections, credentials, quotas
            raise InputError(f"{self.url}/{name}: {first_line(error)}; check address, credentials and quota") from error

    def beside(self, suffix: str) -> "ObjectFolder":
        """See `Folder`."""
        return ObjectFolder(self.url.rstrip("/") + suffix)

    def write(self, name: str, *parts: Payload, sync: bool = True) -> None:
        """See `Folder`."""
        with self._faults(name, writing=True):
            self._place[0].pipe_file(self._of(name), b"".join(parts))

    def sync(self, name: str) -> None:
        """See `Folder`."""

    def create(self, name: str, data: bytes) -> bool:
        """See `Folder`. One caller wins where the server has conditional writes, as S3 and Google's do.

        Elsewhere there is only a look before: two callers at the same moment may both win. That is good enough for
        claims, which save work and on which nothing rests.
        """
        if self.size(name) is not None:  # also for drivers and servers that overlook the condition
            return False
        fs, path = self._place[0], self._of(name)
        with self._faults(name, writing=True):
            try:
                fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError):
                fs.pipe_file(path, data)
            except OSError as error:
                code = _code(error)
                if code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):  # there, or being written
                    return False
                if code not in ("NotImplemented", "501"):
                    raise
                fs.pipe_file(path, data)
        return True

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        with self._faults(name):
            try:  # a range, though all of it: asked for a whole object, the S3 driver asks for its length first
                found: bytes = self._place[0].cat_file(self._of(name), start=0)
            except OSError:
                if self.size(name) != 0:  # an empty object has no first byte
                    raise
                found = b""
        return found

    def expect(self, places: Sequence[Stretch]) -> None:
        """See `Folder`. Nothing to do: requests go out many at once anyhow."""

    def read_many(self, reads: Sequence[Read], then: Then = lambda number: None) -> None:
        """See `Folder`. Many ranges are asked for at once; the driver keeps as many requests in flight as it may."""
        pieces = [
            (name, offset + start, buffer[start : start + self.PIECE])
            for name, offset, buffer in reads
            for start in range(0, len(buffer), self.PIECE)
        ]
        sizes = accumulate(len(buffer) for _, _, buffer in pieces)
        for _, group in groupby(zip(sizes, pieces, strict=True), key=lambda item: (item[0] - 1) // self.AT_ONCE):
            self._read_at_once([piece for _, piece in group])
        for number in range(len(reads)):
            then(number)

    def _read_at_once(self, reads: Sequence[Read]) -> None:
        paths = [self._of(name) for name, _, _ in reads]
        starts = [offset for _, offset, _ in reads]
        stops = [offset + len(buffer) for _, offset, buffer in reads]
        with self._faults(reads[0][0]):
            answers = self._place[0].cat_ranges(paths, starts, stops)
        for (name, offset, buffer), got in zip(reads, answers, strict=True):
            with self._faults(name):
                if isinstance(got, FileNotFoundError):
                    raise got
                if isinstance(got, Exception):  # servers refuse a range that begins past the end
                    if (self.size(name) or 0) <= offset:
                        raise EOFError(name)
                    raise got
                if len(got) != len(buffer):
                    raise EOFError(name)
                buffer[:] = got

    def size(self, name: str) -> int | None:
        """See `Folder`. The first thing that is asked of a place, and so bounded in time."""
        fs = self._place[0]
        bound = {"timeout": self.PATIENCE} if fs.async_impl else {}
        with contextlib.suppress(FileNotFoundError), self._faults(name):
            facts = fs.info(self._of(name), **bound)
            return int(facts["size"]) if facts["type"] == "file" else None
        return None

    def modified(self, name: str) -> float | None:
        """See `Folder`."""
        with contextlib.suppress(FileNotFoundError), self._faults(name):
            when: datetime = self._place[0].modified(self._of(name))
            return when.timestamp()
        return None

    def names(self, name: str = "") -> list[str]:
        """See `Folder`."""
        path = self._of(name)
        with contextlib.suppress(FileNotFoundError), self._faults(name):
            found = self._place[0].ls(path, detail=True, refresh=True)
            below = [entry["name"] for entry in found if entry["type"] == "file"]
            return sorted(file.rsplit("/", 1)[1] for file in below if file != path and not file.endswith("/"))
        return []

    def empty(self) -> bool:
        """See `Folder`."""
        with self._faults(""), contextlib.suppress(FileNotFoundError):
            return not self._place[0].ls(self._of(""), detail=False, refresh=True)
        return True

    def remove(self, name: str) -> None:
        """See `Folder`."""
        with contextlib.suppress(FileNotFoundError), self._faults(name):
            self._place[0].rm_file(self._of(name))

    def remove_all(self) -> None:
        """See `Folder`."""
        with contextlib.suppress(FileNotFoundError), self._faults(""):
            self._place[0].rm(self._of(""), recursive=True)

    def remove_leftovers(self) -> None:
        """See `Folder`. An upload that was cut off never became an object; a rule of the bucket deletes its parts."""


def _code(error: OSError) -> str:
    """Return the code that an S3 server refused a request with; a driver's own error may not tell it."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
