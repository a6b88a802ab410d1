"""What a backend is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from explain.config import ExplainConfig
from explain.examples import Example, Unit


@dataclass(frozen=True)
class Explanation:
    """A description in words, and what turns the simulator's answers into activations.

    `scale` is the activation of one level of a simulator that answers in levels 0-10; the lookup baseline carries its
    table instead (token id -> mean activation).
    """

    text: str
    scale: float = 1.0
    table: dict[int, float] = field(default_factory=dict)


class Backend(Protocol):
    """Proposes descriptions and simulates activations from them."""

    def __init__(self, config: ExplainConfig, folder: Path) -> None:
        """Take the settings; raise InputError for those that cannot work, before any request."""

    async def propose(self, unit: Unit) -> Explanation:
        """Describe a unit from its training examples. Raises explain.client.RequestFailed."""
        ...

    async def simulate(self, explanation: Explanation, example: Example) -> list[float]:
        """Predict the activation on each token of `example` from the explanation alone. Raises RequestFailed."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what identifies the instrument: model, prompt hashes, request counts."""
        ...

    async def close(self) -> None:
        """Release connections."""
