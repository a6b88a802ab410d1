"""Questions of which of several texts is right: the odd window, the unit's among its neighbours', what it makes the model say.

Unlike yes-or-no questions these cannot be answered well by a description that fits everything, and chance is known exactly.
Intruder: Paulo et al. 2025 (no description is shown: it measures the unit). Outputs and intervention: the output side, as in
Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions".
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from explain.examples import Unit
from explain.judge import questions
from sae.evaluation.bootstrap import intervals

ChoiceKind = Literal["intruder", "neighbours", "outputs", "intervention"]
CHOICE_KINDS: tuple[ChoiceKind, ...] = ("intruder", "neighbours", "outputs", "intervention")
_OPTIONS = 5
_QUESTIONS = 5
_FEWEST = 3  # options, or a question is too easy to say anything


@dataclass(frozen=True)
class Choice:
    """Texts, the index of the one sought, the units that they are of, and their token ids, if known."""

    options: tuple[str, ...]
    right: int
    owners: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Chosen:
    """A probability for each option; one-hot of a judge that only answers. `mass` is what all options had, if known."""

    probabilities: tuple[float, ...]
    mass: float | None = None


@dataclass(frozen=True)
class _Option:
    text: str
    owner: str
    ids: tuple[int, ...] = ()


def choices(
    unit: Unit, kind: ChoiceKind, seed: int, others: Sequence[Unit] = (), texts: Mapping[str, Sequence[str]] | None = None
) -> tuple[list[Choice], str | None]:  # fmt: skip
    """Return the questions of a kind that a unit's test examples allow, or none and the reason.

    `others` are units of the same dictionary, whose outputs are the wrong options; `texts`, by unit, what the model writes with
    each of them clamped. Where the right option stands goes round from question to question; the others are in random order.
    """
    chance = np.random.Generator(np.random.PCG64([seed, 7, CHOICE_KINDS.index(kind), unit.latent]))
    if kind == "intruder":
        found, reason = _intruders(unit, seed, chance)
    elif kind == "neighbours":
        found, reason = _among_neighbours(unit, chance)
    elif kind == "outputs":
        lists = {one.name: [_listed(one)] for one in (unit, *others) if one.promoted}
        found, reason = _among_others(unit, lists, chance, "no tokens are known that it promotes")
    else:
        found, reason = _among_others(unit, texts or {}, chance, "no text was written with it clamped")
    start = int(chance.integers(_OPTIONS))
    return [_placed(right, wrong, start + number, chance) for number, (right, wrong) in enumerate(found)], reason


def _placed(right: _Option, wrong: Sequence[_Option], place: int, chance: np.random.Generator) -> Choice:
    options = [wrong[i] for i in chance.permutation(len(wrong))]
    place %= len(options) + 1
    options.insert(place, right)
    return Choice(
        tuple(o.text for o in options), place, tuple(o.owner for o in options), tuple(o.ids for o in options)
    )


Found = tuple[list[tuple[_Option, list[_Option]]], str | None]


def _intruders(unit: Unit, seed: int, chance: np.random.Generator) -> Found:
    """One silent window among windows in which the unit fires; its marked tokens are random ones, theirs those that fire."""
    asked = [question for question in questions(unit, "fuzzing", seed) if not question.hard]
    shown = [question for question in asked if question.truth]
    firing = [_Option(question.text, "") for question in shown]  # all of one unit: nobody is taken for another
    silent = [question for question in asked if not question.truth]
    if len(firing) < _FEWEST - 1 or not silent:
        return [], f"{len(firing)} windows in which it fires and {len(silent)} silent ones: too few"
    found = []
    for question in silent[:_QUESTIONS]:
        order = chance.permutation(len(firing))[: _OPTIONS - 1]
        # as many marks as a firing window drawn at random has: the mean of them would give the intruder away
        number = min(len(shown[chance.integers(len(shown))].marked), len(question.tokens))
        marked = tuple(sorted(chance.choice(len(question.tokens), number, replace=False).tolist()))
        found.append((_Option(replace(question, marked=marked).text, ""), [firing[i] for i in order]))
    return found, None


def _among_neighbours(unit: Unit, chance: np.random.Generator) -> Found:
    """A window in which the unit fires among windows in which its neighbours fire and it is silent."""
    def option(example: Any, owner: str) -> _Option:
        return _Option("".join(example.tokens), owner, tuple(example.token_ids))

    firing = [option(e, unit.name) for e in unit.test if max(e.activations) > 0]
    near = [option(e, f"{unit.dictionary}/{e.neighbour}") for e in unit.test if e.kind == "neighbour"]
    if not firing or len(near) < _FEWEST - 1:
        return [], f"{len(firing)} windows in which it fires and {len(near)} of neighbours in which it is silent: too few"
    found = []
    for right in (firing[i] for i in chance.permutation(len(firing))[:_QUESTIONS]):  # sampled ones as well as the strongest
        order = chance.permutation(len(near))[: _OPTIONS - 1]
        found.append((right, [near[i] for i in order]))
    return found, None


def _among_others(unit: Unit, texts: Mapping[str, Sequence[str]], chance: np.random.Generator, missing: str) -> Found:
    """Texts of the unit among texts of other units, each time of others drawn anew. Questions share what is right."""
    own = texts.get(unit.name, ())
    prompts = [i for i, text in enumerate(own) if text.strip()]
    rivals = [name for name in texts if name != unit.name]
    if not prompts:
        return [], missing
    found = list[tuple[_Option, list[_Option]]]()
    for number in range(_QUESTIONS):
        prompt = prompts[number % len(prompts)]  # all options go on from the same one
        right, wrong = own[prompt], dict[str, _Option]()
        for i in chance.permutation(len(rivals)):
            of_rival = texts[rivals[i]]
            text = of_rival[prompt] if prompt < len(of_rival) else ""
            if text.strip() and text != right and text not in wrong:
                wrong[text] = _Option(text, rivals[i])
            if len(wrong) == _OPTIONS - 1:
                break
        if len(wrong) < _FEWEST - 1:
            return [], f"texts of {len(wrong)} other units: too few"
        found.append((_Option(right, unit.name), list(wrong.values())))
    return found, None


def _listed(unit: Unit) -> str:
    return ", ".join(repr(token) for token, _ in unit.promoted)


def chosen(asked: Sequence[Choice], answers: Sequence[Chosen], reason: str | None, resamples: int, seed: int) -> dict[str, Any]:
    """Return what a judge's choices are worth: accuracy and its 95 % interval over questions, and what chance would give.

    `probability` is the mean given to the right option; `places` how often each place was chosen, which shows a judge that goes
    by place; `confused_with` the units whose texts were taken for this one's. An answer of several equally probable options
    counts for its share. None, with the reason, where there was nothing to ask.
    """
    if not asked:
        return {"accuracy": None, "reason": reason, "questions": 0}
    credit, places, confused = list[float](), [0.0] * _OPTIONS, Counter[str]()
    for question, answer in zip(asked, answers, strict=True):
        best = max(answer.probabilities)
        winners = [i for i, p in enumerate(answer.probabilities) if p == best]
        credit.append((question.right in winners) / len(winners))
        for i in winners:
            places[i] += 1 / len(winners)
        confused.update(owner for i in winners if i != question.right and (owner := question.owners[i]))
    right = np.array(credit)
    chance = float(np.mean([1 / len(question.options) for question in asked]))
    interval = intervals({"right": right, "all": np.ones(len(right))}, _share, resamples, seed)["accuracy"] if resamples else None
    masses = [answer.mass for answer in answers if answer.mass is not None]
    return {
        "accuracy": float(right.mean()), "reason": None, "questions": len(asked), "chance": chance, "interval": interval,
        "probability": float(np.mean([a.probabilities[q.right] for q, a in zip(asked, answers, strict=True)])),
        "places": places, "confused_with": dict(confused.most_common()),
        "mass": float(np.mean(masses)) if masses else None,
    }  # fmt: skip


def _share(sums: Mapping[str, Any]) -> dict[str, Any]:
    return {"accuracy": sums["right"] / sums["all"]}
