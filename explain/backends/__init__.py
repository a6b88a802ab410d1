"""Who proposes and simulates. Adding a backend is a file here and a line below."""

from pathlib import Path

from explain.backends.backend import Backend, Explanation, Simulation
from explain.backends.chat import ChatBackend
from explain.backends.local import LocalBackend
from explain.backends.lookup import LookupBackend
from explain.client import RequestFailed
from explain.config import ExplainConfig

__all__ = [
    "BACKENDS", "Backend", "ChatBackend", "Explanation", "LocalBackend", "LookupBackend", "RequestFailed", "Simulation",
    "make_backend",
]  # fmt: skip

BACKENDS: dict[str, type[Backend]] = {"lookup": LookupBackend, "openai": ChatBackend, "local": LocalBackend}


def make_backend(config: ExplainConfig, folder: Path) -> Backend:
    """Return the configured backend; `folder` is where it may keep a journal of its requests.

    A chat server is asked what it can do. Raises InputError where that is not what the settings ask for.
    """
    backend = BACKENDS[config.backend](config, folder)
    if isinstance(backend, ChatBackend):
        backend.prepare()
    return backend
