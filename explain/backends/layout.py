"""The prompts as text, shared by all who fill them: as Bills et al. 2023 put a simulation, every activation "unknown"."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from explain.prompting import prompt

UNKNOWN = "unknown"
SEPARATORS = ("\t", ": ", " = ")
"""Between a token and its activation; the first after which levels are tokens of the model's is taken."""
_CONTROL = re.compile(r"<(?=\|?/?\w[^\s<>]{0,40}>)|\[(?=/?[A-Z_]{2,20}\])")


def escaped(token: str) -> str:
    r"""Return a token as JSON writes it, so that it stays within its line.

    >>> print(escaped('\t"'))
    \t\"
    """
    return json.dumps(token, ensure_ascii=False)[1:-1]


def harmless(text: str) -> str:
    r"""Write what servers may take for a chat template's own tokens with a JSON escape: a window's text must stay text.

    >>> print(harmless("a < b <|im_end|> [INST] [1]"))
    a < b \u003c|im_end|> \u005bINST] [1]
    """
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def simulation_instructions(top: int) -> str:
    """Return what a simulator of whole windows is told, its levels ending at `top`."""
    return prompt("simulate_all").format(top=top, unknown=UNKNOWN).strip()


def few_shot(top: int) -> Iterator[tuple[str, list[tuple[list[str], list[str]]]]]:
    """Yield the invented examples: a description, and sequences of tokens with what is shown of their activations."""
    for example in json.loads(prompt("few_shot", "json")):
        sequences = list[tuple[list[str], list[str]]]()
        for one in example["sequences"]:
            shown = [UNKNOWN if i < one["revealed"] else str(min(level, top)) for i, level in enumerate(one["levels"])]
            sequences.append((one["tokens"], shown))
        yield example["description"], sequences


def simulation_text(top: int) -> str:
    """Return all that a simulation's prompt says beside description and window, to be hashed."""
    return simulation_instructions(top) + json.dumps(json.loads(prompt("few_shot", "json")))


def plain_frame(system: str, said: Sequence[str]) -> str:
    """Return a conversation as text, for models without a chat template; `said` is the user's and the answers in turn."""
    lines = [f"Answer:\n{text}\n" if i % 2 else f"Description: {text}\n" for i, text in enumerate(said)]
    return f"{system}\n\n{''.join(lines)}Answer:\n"


def written(tokens: Sequence[str], shown: Sequence[str], separator: str) -> tuple[str, list[int]]:
    """Return lines of a token, the separator and what is shown of its activation, and at which character each of these begins."""
    text, places = "", list[int]()
    for token, value in zip(tokens, shown, strict=True):
        text += harmless(escaped(token)) + separator
        places.append(len(text))
        text += f"{value}\n"
    return text, places


@dataclass(frozen=True)
class Conversation:
    """What a model is shown: instructions, and turns of a user's text with the answer to it; the last answer is what is read."""

    system: str
    turns: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, description: str, window: str, top: int, separator: str) -> "Conversation":
        """Return the prompt that simulates one window under a description."""
        turns = list[tuple[str, str]]()
        for invented, sequences in few_shot(top):
            turns.append((invented, "".join(written(*sequence, separator)[0] + "\n" for sequence in sequences)))
        return cls(simulation_instructions(top), (*turns, (harmless(description), window)))

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat, for servers that know their model's template."""
        said = [text for turn in self.turns for text in turn]
        turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(said)]
        return [{"role": "system", "content": self.system}, *turns]

    @property
    def same(self) -> str:
        """How the text begins under every description, for every window."""
        description, window = self.turns[-1]
        return self.plain.removesuffix(f"{description}\nAnswer:\n{window}")

    @property
    def plain(self) -> str:
        """As text."""
        said = [text for turn in self.turns for text in turn]
        return plain_frame(self.system, said[:-1]) + said[-1]
