"""What a backend is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from explain.choice import Choice, ChoiceKind, Chosen
from explain.config import ExplainConfig
from explain.examples import Example, Unit
from explain.judge import Judgement, Kind, Question
from explain.propose import Mistakes


@dataclass(frozen=True)
class Explanation:
    """A description in words, and what turns the simulator's answers into activations.

    `scale` is the activation of one level of a simulator that answers in levels 0-10; the lookup baseline carries its
    table instead (token id -> mean activation).
    """

    text: str
    scale: float = 1.0
    table: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Simulation:
    """The activations that an explanation leads to expect on the tokens of a window.

    `mass`, where the instrument has it, is the probability that it gave to the levels at all, a token: where little, the expected
    value says little.
    """

    expected: list[float]
    mass: list[float] | None = None


class Backend(Protocol):
    """Proposes descriptions and simulates activations from them."""

    def __init__(self, config: ExplainConfig, folder: Path) -> None:
        """Take the settings; raise InputError for those that cannot work, before any request."""

    async def propose(self, unit: Unit, sample: int = 0, mistakes: Mistakes | None = None) -> Explanation:
        """Describe a unit from its training examples, and from the mistakes of an earlier description.

        Each `sample` is another draw; 0 is the likeliest. Raises explain.client.RequestFailed.
        """
        ...

    async def write(self, system: str, user: str, sample: int = 0) -> str:
        """Return the description that `system` asks for, of what `user` shows. Raises RequestFailed."""
        ...

    async def simulate(self, explanation: Explanation, examples: Sequence[Example]) -> list[Simulation]:
        """Predict the activation on each token of each of `examples` from the explanation alone. Raises RequestFailed."""
        ...

    async def judge(self, explanation: Explanation, kind: Kind, asked: Sequence[Question]) -> list[Judgement]:
        """Say of each question whether the explanation fits, by the rule of `kind`. Raises RequestFailed."""
        ...

    async def choose(self, explanation: Explanation | None, kind: ChoiceKind, asked: Sequence[Choice]) -> list[Chosen]:
        """Choose one option of each question, by the explanation; of intruders there is none. Raises RequestFailed."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what identifies the instrument: model, prompt hashes, request counts."""
        ...

    async def close(self) -> None:
        """Release connections."""
