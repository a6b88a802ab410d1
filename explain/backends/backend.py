"""What a backend is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from explain.config import ExplainConfig
from explain.examples import Example, Unit


class RequestFailed(Exception):
    """A proposal or simulation could not be had; the message is the reason, kept with the unit."""


@dataclass(frozen=True)
class Explanation:
    """A description in words; the lookup baseline also carries its table (token id -> mean activation)."""

    text: str
    table: dict[int, float] = field(default_factory=dict)


class Backend(Protocol):
    """Proposes descriptions and simulates activations from them."""

    def __init__(self, config: ExplainConfig, folder: Path) -> None:
        """Take the settings; raise InputError for those that cannot work, before any request."""

    async def propose(self, unit: Unit) -> Explanation:
        """Describe a unit from its training examples. Raises RequestFailed."""
        ...

    async def simulate(self, explanation: Explanation, example: Example) -> list[float]:
        """Predict the activation on each token of `example` from the explanation alone. Raises RequestFailed."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what identifies the instrument: model, prompt hashes, request counts."""
        ...

    async def close(self) -> None:
        """Release connections."""
