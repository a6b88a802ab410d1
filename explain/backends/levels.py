"""From log-probabilities to levels: which tokens of an answer or a prompt hold one, what else they could be, what to expect."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from explain.answers import Answer, Token

_NUMBER = re.compile(rb"\d+")
_GLUED = re.compile(r"([\s,\[]*)(\d+)[\s,\]}]*")


def level_of(text: str, top: int) -> int | None:
    """Return the level that a text is exactly.

    >>> level_of("7", 9), level_of(" 7", 9), level_of("07", 9), level_of("10", 9), level_of("10", 10)
    (7, None, None, None, 10)
    """
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= 2 else -1
    return value if 0 <= value <= top and str(value) == text else None


def expected_level(chances: Mapping[int, float]) -> tuple[float, float]:
    """Return sum_v v q_v and the mass sum_v p_v of levels' probabilities p, q being p made to sum to 1.

    Raises ValueError where there is none: an expectation over nothing is no number.

    >>> expected_level({0: 0.25, 10: 0.25})
    (5.0, 0.5)
    """
    mass = sum(chances.values())
    if not mass > 0 or not math.isfinite(mass):  # NaN is not above 0
        raise ValueError("no level is among the likeliest tokens")
    return sum(level * p for level, p in chances.items()) / mass, mass


def chances_of(alternatives: Mapping[str, float], top: int) -> dict[int, float]:
    """Return the probability of each level among alternatives that are exactly levels; -9999.0, "very unlikely", is 0."""
    found: dict[int, float] = {}
    for text, logprob in alternatives.items():
        level = level_of(text, top)
        if level is not None:
            found[level] = found.get(level, 0.0) + math.exp(logprob)
    return found


# Of answers


def chances_in_answer(answer: Answer, values: Sequence[int], part: str, top: int) -> list[dict[int, float]]:
    """Return the probabilities of the levels where an answer has integers, which are `values`, all within `part` of its text.

    Commas, brackets and spaces may be of one token with an integer. Raises ValueError where the tokens do not spell the answer,
    or one token holds several integers: then its alternatives are of no single one.
    """
    if not answer.tokens:
        raise ValueError("the server sent no log-probabilities")
    spelled, wanted = b"".join(token.spelled for token in answer.tokens), part.encode()
    begin = spelled.rfind(wanted)  # around it may stand fences, thoughts, the end token
    if begin < 0:
        raise ValueError("the tokens that the log-probabilities are of do not spell the answer")
    found = list(_NUMBER.finditer(spelled, begin, begin + len(wanted)))
    if [int(match[0][:9]) for match in found] != list(values):
        raise ValueError("the answer has other numbers than its levels")
    chances, spans = list[dict[int, float]](), _spans(answer.tokens)
    for number, match in enumerate(found):
        own = [i for i, (start, end) in enumerate(spans) if start < match.end() and end > match.start()]
        first = answer.tokens[own[0]]
        if len(_NUMBER.findall(first.spelled)) > 1:
            raise ValueError(f"integers {number} and {number + 1} are one token")
        before = first.spelled[: max(0, match.start() - spans[own[0]][0])].decode(errors="replace").strip()
        here = _glued(first.alternatives, before, top)
        if len(own) > 1:
            here = _in_two(here, [answer.tokens[i] for i in own], match[0], top)
        chances.append(here)
    return chances


def _spans(tokens: Sequence[Token]) -> list[tuple[int, int]]:
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token.spelled))
    return list(pairwise(ends))


def _glued(alternatives: Mapping[str, float], before: str, top: int) -> dict[int, float]:
    """Return the levels among alternatives that bring the same bracket or comma as the token itself did."""
    found: dict[int, float] = {}
    for text, logprob in alternatives.items():
        match = _GLUED.fullmatch(text)
        level = level_of(match[2], top) if match and match[1].strip() == before else None
        if level is not None:
            found[level] = found.get(level, 0.0) + math.exp(logprob)
    return found


def _in_two(first: dict[int, float], tokens: Sequence[Token], number: bytes, top: int) -> dict[int, float]:
    """Divide the chance of "1" into 10 and 1, by that of a "0" after it: a server may spell 10 in two though it has it as one."""
    if number != b"10" or len(tokens) != 2 or top < 10:
        raise ValueError(f"the integer {number.decode()} is of several tokens")
    ten = sum(math.exp(p) for text, p in tokens[1].alternatives.items() if (m := _GLUED.fullmatch(text)) and m[1] + m[2] == "0")
    one = first.get(1, 0.0)
    return {**first, 1: one * max(0.0, 1 - ten), 10: first.get(10, 0.0) + one * min(1.0, ten)}


# Of prompts


@dataclass(frozen=True)
class Read:
    """A token of a prompt as a server read it, and the log-probabilities of what might have stood here, given all before it."""

    text: str
    alternatives: Mapping[str, float]
    id: int | None = None


def skeleton(text: str) -> str:
    r"""Return the ASCII of a text without its spaces.

    What a server says of its tokens is exact in these alone: a token may be half a character (U+FFFD, nothing, or
    `bytes:\xf0`), and some vocabularies lose spaces. Tabs and line breaks stay, so that every line and separator is held.
    """
    if text.startswith("bytes:") and "\\x" in text:
        text = re.sub(r"\\x[0-9a-fA-F]{2}", "", text[len("bytes:") :])
    return "".join(c for c in text if c.isascii() and c != " ")


def find_places(read: Sequence[Read], text: str, offsets: Sequence[int]) -> list[int]:
    """Return which token begins at each of `offsets` of `text`, the last thing in a prompt that a server has read.

    Raises ValueError where that cannot be shown: tokens that spell something else, or none that begins just there.
    """
    parts = [skeleton(token.text) for token in read]
    whole, wanted = "".join(parts), skeleton(text)
    begin = whole.rfind(wanted)
    if begin < 0 or not wanted:
        raise ValueError("the tokens that the server gives do not spell the prompt")
    starts, at = dict[int, int](), 0
    for number, part in enumerate(parts):
        if part:
            starts[at] = number
            at += len(part)
    found = list[int]()
    for offset in offsets:
        here = begin + len(skeleton(text[:offset]))
        if here not in starts or read[starts[here]].text.startswith(" "):
            raise ValueError(f"no token of the model's begins where the prompt has {text[offset : offset + 8]!r}")
        found.append(starts[here])
    return found


def tokens_within(read: Sequence[Read], beginning: str) -> int:
    """Return how many tokens, less a few that what follows may change, a prompt's beginning has; 0 where it begins otherwise."""
    whole, wanted = "".join(skeleton(token.text) for token in read), skeleton(beginning)
    begin, at, count = whole.find(wanted), 0, 0
    for token in read:
        at += len(skeleton(token.text))
        if at > begin + len(wanted):
            break
        count += 1
    return max(0, count - 4) if begin >= 0 else 0
