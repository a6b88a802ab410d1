"""The first-letter task: what a model knows of how words are spelt, at the word's own token.

Prompts are SAEBench's: ten solved examples, then the word, whose activation is taken; what stands behind it cannot be seen
from there. A number of words share one set of examples, which passes through the model once.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from activation_store.errors import InputError
from activation_store.hooks import locate_hooks, on_pass

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_EXAMPLES, _TOGETHER = 10, 64


@dataclass(frozen=True)
class Words:
    """Vocabulary words: activations x (word, d_in), the number of each one's first letter, and which are tested on."""

    words: list[str]
    x: Tensor
    letters: NDArray[np.int64]
    test: NDArray[np.bool_]


def vocabulary_words(tokenizer: Any) -> dict[str, int]:
    """Return the words that are one token: ASCII letters only, a space may lead; word -> token id.

    Raises InputError where there are too few for the task.
    """
    found: dict[str, int] = {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = tokenizer.convert_tokens_to_string([token])
        if token.startswith("▁") and not word.startswith(" "):  # some tokenizers drop the space of a lone token
            word = " " + word
        bare = word.removeprefix(" ")
        if bare.isascii() and bare.isalpha():
            found.setdefault(word, number)
    if _border(len(found)) < _TOGETHER + _EXAMPLES:
        raise InputError(f"evaluate.absorption: the vocabulary holds {len(found)} words of letters; too few to train and test on")
    return found


def _border(words: int) -> int:
    """Return how many of the words are trained on."""
    return int(0.8 * words)


def example(word: str) -> str:
    """Return a solved line of the task."""
    return f"\n{word} has the first letter: {word.strip()[0].upper()}"


class _Read(Exception):
    """The hook has been passed: nothing above it need run."""


@torch.inference_mode()
def read_words(
    model: nn.Module, tokenizer: Any, hook: str, most: int, prepend_bos: bool, seed: int,
    progress: Callable[[int], None] = lambda words: None,
) -> Words:  # fmt: skip
    """Draw at most `most` words, a fifth of them to test on, and read their activations at `hook`.

    Examples are drawn anew for every 64 words, from the words trained on and never those asked about.
    """
    from transformers import DynamicCache

    vocabulary = vocabulary_words(tokenizer)
    chance = np.random.default_rng(seed)
    words = chance.permutation(list(vocabulary))[:most].tolist()
    border = _border(len(words))
    site = locate_hooks(model, [hook])[hook]
    device = next(iter(model.parameters())).device
    bos = [tokenizer.bos_token_id] if prepend_bos and tokenizer.bos_token_id is not None else []
    module = model.get_submodule(site.path)
    found: list[Tensor] = []

    def keep(x: Tensor) -> None:
        found.append(x[:, -1].float().cpu())
        raise _Read

    def read(ids: Tensor, cache: Any) -> Tensor:
        """Run the model as far as the hook, and return what its last tokens are there."""
        with suppress(_Read), on_pass(module, site.side, keep):
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        return found.pop()

    rows: list[Tensor] = []
    for low, high in ((0, border), (border, len(words))):
        for start in range(low, high, _TOGETHER):
            asked = words[start : min(start + _TOGETHER, high)]
            others = np.setdiff1d(np.arange(border), np.arange(start, start + len(asked)))
            shown = [words[i] for i in chance.choice(others, _EXAMPLES, replace=False)]
            prefix = bos + tokenizer("".join(map(example, shown)) + "\n", add_special_tokens=False)["input_ids"]
            cache = DynamicCache(config=model.config)
            examples = torch.tensor([prefix], device=device)
            read(examples, cache)
            if cache.get_seq_length() < len(prefix):  # the hook is below the first attention, whose cache counts positions
                model(input_ids=examples, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(asked))
            rows.append(read(torch.tensor([[vocabulary[word]] for word in asked], device=device), cache))
            progress(len(asked))
    letters = np.array([LETTERS.index(word.strip()[0].lower()) for word in words])
    return Words(words, torch.cat(rows), letters, np.arange(len(words)) >= border)
