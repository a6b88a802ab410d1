"""What requests cost: prices, the running sum, and a ceiling that no request may break."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from activation_store.errors import InputError, first_line
from explain.config import ExplainConfig

_OURS = Path(__file__).parent / "prices.yaml"


class Price(BaseModel):
    """Of one model, in US dollars for a million tokens; input that the server had in its cache may be cheaper."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cached_input: float | None = Field(default=None, ge=0)
    batch: float = Field(default=1.0, gt=0, description="what of these prices a request in a batch costs")

    def of(self, usage: "Usage") -> float:
        """Return dollars."""
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = usage.prompt_tokens - usage.cached_tokens
        return (fresh * self.input + usage.cached_tokens * cached + usage.completion_tokens * self.output) / 1e6


@dataclass(frozen=True)
class Usage:
    """Tokens as a server counted them; those cached are among the prompt's."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of(cls, reply: Any) -> "Usage":
        """Read the usage of a completion, an object or plain JSON; what a server does not say is 0."""

        def of(owner: Any, name: str) -> Any:
            return owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)

        def count(owner: Any, name: str) -> int:
            found = of(owner, name)
            return found if isinstance(found, int) and found > 0 else 0

        usage = of(reply, "usage") or of(reply, "meta_info")  # SGLang's own route has the latter
        prompt = count(usage, "prompt_tokens")
        cached = min(count(of(usage, "prompt_tokens_details"), "cached_tokens"), prompt)
        return cls(prompt, cached, count(usage, "completion_tokens"))

    def __add__(self, other: "Usage") -> "Usage":
        """Add up."""
        return Usage(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


def price_of(config: ExplainConfig) -> Price | None:
    """Return the price of the configured model: the user's, else ours, else None.

    Ours are of OpenAI's own servers, not of one that base_url or OPENAI_BASE_URL names. Raises InputError for a file that is no
    list of prices, and where there is a ceiling (`explain.max_cost`) but no price to hold it by.
    """
    elsewhere = config.base_url or os.environ.get("OPENAI_BASE_URL")
    prices = {} if elsewhere else _read(_OURS)
    if config.prices is not None:
        prices |= _read(Path(config.prices))
    price = prices.get(config.model)
    if price is None and config.max_cost is not None:
        raise InputError(
            f"explain.max_cost: {config.max_cost:g} given, but {config.model} has no price; name a YAML with "
            f"`{config.model}: {{input: ..., output: ...}}`, dollars for a million tokens, as explain.prices"
        )
    if price is not None and config.batch:
        cached = None if price.cached_input is None else price.cached_input * price.batch
        price = Price(input=price.input * price.batch, output=price.output * price.batch, cached_input=cached)
    return price


def _read(path: Path) -> dict[str, Price]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TypeAdapter(dict[str, Price]).validate_python(found)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"explain.prices: cannot read {str(path)!r} ({first_line(error)})") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise InputError(f"explain.prices: {where or str(path)}: {fault['msg']}; see explain/prices.yaml for the form") from None


@dataclass
class Budget:
    """What was spent, and whether one more request may be sent.

    A request in flight is counted with the most that it can cost, a token for each byte of the prompt and as many as the
    answer may have, so that the ceiling holds whatever the server answers, and however many requests run at once.
    """

    price: Price | None
    ceiling: float | None
    answer_tokens: int
    spent: Usage = field(default_factory=Usage)
    _reserved: float = 0.0

    def reserve(self, prompt_bytes: int) -> float | None:
        """Return the most that a request can cost, put aside; None where that could break the ceiling. Free it by `settle`."""
        if self.price is None:
            return 0.0
        most = self.price.of(Usage(prompt_bytes, 0, self.answer_tokens))
        if self.ceiling is not None and (self.cost or 0.0) + self._reserved + most > self.ceiling:
            return None
        self._reserved += most
        return most

    def settle(self, reserved: float, usage: Usage | None = None) -> None:
        """Take in what a request used; of one that failed nothing is known, and servers do not charge for it."""
        self._reserved -= reserved
        if usage is not None:
            self.spent += usage

    @property
    def cost(self) -> float | None:
        """Dollars spent; None where the price is not known."""
        return None if self.price is None else self.price.of(self.spent)
