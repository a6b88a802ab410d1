"""The token-lookup baseline: a token's predicted activation is its mean activation over the training examples.

Bills et al. 2023 ("Comparing to token-based prediction using lookup tables"): it needs no LLM, and it beats GPT-4's
explanations in early layers. A feature's description is worth something where it scores above this.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from explain.backends.backend import Explanation, Simulation
from explain.choice import Choice, ChoiceKind, Chosen
from explain.client import RequestFailed
from explain.config import ExplainConfig
from explain.examples import Example, Unit
from explain.judge import Judgement, Kind, Question
from explain.propose import Mistakes

_SHOWN_TOKENS = 5


class LookupBackend:
    """See the module. Tokens never seen in training examples are predicted 0."""

    def __init__(self, config: ExplainConfig, folder: Path) -> None:
        """Need nothing."""

    async def propose(self, unit: Unit, sample: int = 0, mistakes: Mistakes | None = None) -> Explanation:
        """Build the table; the text lists the tokens that carry most activation."""
        values: dict[int, list[float]] = defaultdict(list)
        strings: dict[int, str] = {}
        for example in unit.train:
            for token, string, value in zip(example.token_ids, example.tokens, example.activations, strict=True):
                values[token].append(value)
                strings[token] = string
        table = {token: sum(of_token) / len(of_token) for token, of_token in values.items()}
        # Ranked by total, not by mean: a token seen once with a high value says less than one that fires every time.
        total = {token: sum(of_token) for token, of_token in values.items()}
        best = sorted((t for t in total if total[t] > 0), key=lambda t: (-total[t], t))[:_SHOWN_TOKENS]
        names = ", ".join(repr(strings[token]) for token in best)
        return Explanation(f"tokens {names}" if names else "no token fires", table=table)

    async def write(self, system: str, user: str, sample: int = 0) -> str:
        """Have no words."""
        raise RequestFailed("the token lookup writes no text")

    async def simulate(self, explanation: Explanation, examples: Sequence[Example]) -> list[Simulation]:
        """Look every token up."""
        return [Simulation([explanation.table.get(token, 0.0) for token in example.token_ids]) for example in examples]

    async def judge(self, explanation: Explanation, kind: Kind, asked: Sequence[Question]) -> list[Judgement]:
        """Say yes where a token of the table fires: in detection any token, in fuzzing more than half of those marked."""
        found = []
        for question in asked:
            fires = [explanation.table.get(token, 0.0) > 0 for token in question.token_ids]
            marked = [fires[i] for i in question.marked]
            found.append(Judgement(float(any(fires)) if kind == "detection" else sum(marked) / max(len(marked), 1)))
        return found

    async def choose(self, explanation: Explanation | None, kind: ChoiceKind, asked: Sequence[Choice]) -> list[Chosen]:
        """Choose the option whose tokens have the greatest sum in the table; where no tokens are known, all alike."""
        found = []
        for question in asked:
            known = question.ids and all(question.ids)
            ids = question.ids if known else ((),) * len(question.options)
            table = explanation.table if explanation is not None else {}
            sums = [sum(table.get(token, 0.0) for token in of_option) for of_option in ids]
            winners = [value == max(sums) for value in sums]
            found.append(Chosen(tuple(wins / sum(winners) for wins in winners)))
        return found

    def facts(self) -> dict[str, Any]:
        """Name the instrument."""
        return {"instrument": "token lookup table"}

    async def close(self) -> None:
        """Hold nothing."""
