"""What a proposer is shown of a unit, and which of several proposals is taken.

Activations on tokens as in Bills et al. 2023. Beside them, on request: what the unit does to the output (promoted tokens and
those that come after the strongest ones, which tell features that say something from those that read something; Gur-Arieh et
al. 2025), silent windows that look alike, and the mistakes of an earlier description.
"""

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from explain.config import ExplainConfig
from explain.examples import Example, Unit
from explain.prompting import prompt

if TYPE_CHECKING:  # backends show what this module says
    from explain.backends.backend import Backend, Explanation

_LEVELS = 10
_SHOWN_TOKENS = 10
_SHOWN_MISTAKES = 4  # of each sort


@dataclass(frozen=True)
class Mistakes:
    """A description, windows in which the unit fires though it does not say so, and the other way about."""

    description: str
    missed: list[Example]
    wrong: list[Example]


@dataclass(frozen=True)
class Trial:
    """What a description is worth on validation windows, None where undefined, and its mistakes there."""

    value: float | None
    mistakes: Mistakes


def levels(activations: list[float], top: float) -> list[int]:
    """Quantise to 0..10 as Bills et al. 2023: floor(10 * max(a, 0) / top), capped at 10.

    >>> levels([0.0, 0.05, 0.5, 1.0, -3.0], 1.0)
    [0, 0, 5, 10, 0]
    """
    return [min(_LEVELS, math.floor(_LEVELS * max(a, 0.0) / top)) if top > 0 else 0 for a in activations]


def proposal(unit: Unit, config: ExplainConfig, mistakes: Mistakes | None = None) -> tuple[str, str]:
    """Return what a proposer is told, and what it is shown."""
    top = _top(unit)
    firing = [e for e in unit.train if max(e.activations, default=0.0) > 0]
    shown = "\n\n".join(_excerpt(i, e, levels(e.activations, top)) for i, e in enumerate(firing, 1))
    if "outputs" in config.show:
        shown += "\n\n" + _outputs(unit)
    negatives = [example for example in unit.train if max(example.activations) <= 0]
    if "negatives" in config.show and negatives:
        shown += "\n\nIt does not activate in these:\n" + "\n".join(f"- {''.join(e.tokens)}" for e in negatives)
    if mistakes is not None:
        shown += f"\n\nAn earlier description: {mistakes.description}"
        for said, wrong in (("It missed these", mistakes.missed), ("It fits these, in which nothing activates", mistakes.wrong)):
            if wrong:
                shown += f"\n{said}:\n" + "\n".join(f"- {_marked(e, levels(e.activations, top))}" for e in wrong)
    return instructions(config, again=mistakes is not None), shown


def instructions(config: ExplainConfig, again: bool = False) -> str:
    """Return what a proposer is told, of what it is going to be shown."""
    parts = ["propose", *(f"propose_{name}" for name in config.show), *(["propose_again"] if again else []), "propose_answer"]
    return "".join(prompt(part) for part in parts)


def scale_of(unit: Unit) -> float:
    """Return the activation of one level: errors of simulations are measured in activations."""
    return _top(unit) / _LEVELS


def _top(unit: Unit) -> float:
    """Return the activation of level 10, the strongest among training examples."""
    return max((a for e in unit.train for a in e.activations if a > 0), default=0.0)


def _excerpt(number: int, example: Example, level: list[int]) -> str:
    """Return an excerpt with its firing tokens marked, then those tokens with their levels."""
    pairs = ", ".join(f"{token!r}: {value}" for token, value in zip(example.tokens, level, strict=True) if value > 0)
    return f"Excerpt {number}: {_marked(example, level)}\nLevels: {pairs or 'none'}"


def _marked(example: Example, level: list[int]) -> str:
    return "".join(f"<<{token}>>" if value > 0 else token for token, value in zip(example.tokens, level, strict=True))


def _outputs(unit: Unit) -> str:
    """Return the strongest tokens, those right after them, and those whose logits the unit raises."""
    strongest, after = list[str](), list[str]()
    for example in unit.train:
        place = max(range(len(example.tokens)), key=lambda i: example.activations[i])
        if example.activations[place] > 0:
            strongest.append(example.tokens[place])
            after += example.tokens[place + 1 : place + 2]
    lists = {"Strongest on": strongest, "Right after come": after, "It makes more likely": [token for token, _ in unit.promoted]}
    shown = {name: ", ".join(map(repr, list(dict.fromkeys(of))[:_SHOWN_TOKENS])) for name, of in lists.items()}
    return "\n".join(f"{name}: {tokens or 'not known'}" for name, tokens in shown.items())


def mistakes_of(description: str, examples: Sequence[Example], expected: Sequence[Sequence[float]]) -> Mistakes:
    """Return the windows of which the strongest expected activation is furthest from the true one, too low and too high."""
    rows = list(zip(examples, (max(e.activations) for e in examples), (max(e) for e in expected), strict=True))
    highest = max((said for _, _, said in rows), default=0.0) or 1.0
    peak = max((true for _, true, _ in rows), default=0.0) or 1.0
    gaps = sorted(((true / peak - said / highest, i) for i, (_, true, said) in enumerate(rows)), reverse=True)
    missed = [rows[i][0] for gap, i in gaps if gap > 0 and rows[i][1] > 0][:_SHOWN_MISTAKES]
    wrong = [rows[i][0] for gap, i in reversed(gaps) if gap < 0 and rows[i][1] <= 0][:_SHOWN_MISTAKES]
    return Mistakes(description, missed, wrong)


async def best_proposal(
    backend: "Backend", unit: Unit, config: ExplainConfig, trial: "Callable[[Explanation], Awaitable[Trial]]"
) -> "tuple[Explanation, list[dict[str, Any]]]":  # fmt: skip
    """Return the description to use and all that were proposed, each with its value on the validation windows.

    Of `best_of` first ones, and then `refine` that know the best one's mistakes, the best is taken; the earlier of equals. An
    undefined value is below all others. Raises RequestFailed.
    """
    first = await backend.propose(unit)
    if not config.chooses:
        return first, [{"text": first.text, "round": 0, "valid": None}]
    proposed = [first] + [await backend.propose(unit, sample=sample) for sample in range(1, config.best_of)]
    tried: dict[str, tuple[Explanation, Trial, int]] = {}
    for explanation in proposed:
        if explanation.text not in tried:
            tried[explanation.text] = explanation, await trial(explanation), 0

    def best() -> "tuple[Explanation, Trial, int]":
        return max(tried.values(), key=lambda entry: -math.inf if entry[1].value is None else entry[1].value)

    for round_ in range(1, config.refine + 1):
        mistakes = best()[1].mistakes
        if not mistakes.missed and not mistakes.wrong:
            break  # nothing to mend
        again = await backend.propose(unit, sample=round_ - 1, mistakes=mistakes)
        if again.text not in tried:
            tried[again.text] = again, await trial(again), round_
    return best()[0], [{"text": text, "round": round_, "valid": found.value} for text, (_, found, round_) in tried.items()]
