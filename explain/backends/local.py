"""A Hugging Face or GGUF model in this process: no server, and the exact distribution over activation levels.

Bills et al. 2023 simulate a whole window at once: every activation in the prompt is "unknown", and what a completions server
would write in its place is read from the prompt's own log-probabilities. Here the logits are at hand, so nothing is cut off at
the 15 or 20 likeliest tokens, and no answer has to be read: the softmax is restricted to the levels, and its mass is recorded.
"""

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activation_store.config import ModelConfig
from activation_store.errors import InputError
from activation_store.hooks import on_pass
from activation_store.subject import load_subject
from explain.backends.backend import Explanation, Simulation
from explain.backends.layout import (
    SEPARATORS,
    UNKNOWN,
    escaped,
    few_shot,
    plain_frame,
    simulation_instructions,
    simulation_text,
)  # fmt: skip
from explain.choice import CHOICE_KINDS, Choice, ChoiceKind, Chosen
from explain.client import Journal, RequestFailed, content_key
from explain.config import ExplainConfig
from explain.examples import Example, Unit
from explain.judge import KINDS, Judgement, Kind, Question
from explain.prompting import hashed, prompt
from explain.propose import Mistakes, instructions, proposal, scale_of

_TOKENS_AT_ONCE = 4096  # of prompts in one pass
_DESCRIPTION = '{"description": "'
_HOLE = "\x00{}\x00"


@dataclass(frozen=True)
class Labels:
    """The levels as tokens of the simulating model: `ids` of 0, 1, ... `top`, each read where `separator` ends.

    `top` is 10 where "10" is one token, as in GPT's and Llama 3's vocabularies, and 9 elsewhere.
    """

    separator: tuple[int, ...]
    ids: tuple[int, ...]

    @property
    def top(self) -> int:
        """The highest level."""
        return len(self.ids) - 1

    @classmethod
    def of(cls, encode: Any) -> "Labels":
        """Find a separator after which levels are single tokens. Raises InputError for a vocabulary that has none."""
        for separator in SEPARATORS:
            before = encode(separator)
            ids = []
            for level in range(11):
                found = encode(f"{separator}{level}")
                if found[:-1] != before:
                    break
                ids.append(found[-1])
            if len(ids) >= 10:
                return cls(tuple(before), tuple(ids))
        raise InputError("explain.model: digits are no tokens of its vocabulary, so it cannot simulate; take another model")


@dataclass(frozen=True)
class _Prefix:
    """The tokens that many prompts begin with, and what the model keeps of them."""

    ids: tuple[int, ...]
    cache: Any


class LocalBackend:
    """See the module. Prompts are built of token ids piece by piece, so that no token of a window can be taken for another's."""

    def __init__(self, config: ExplainConfig, folder: Path) -> None:
        """Load the model that `explain.model` names. Raises InputError for one that cannot be loaded or has no digits."""
        self.config = config
        try:
            subject = load_subject(ModelConfig(id=config.model, dtype=config.local_dtype, device=config.local_device))
        except InputError as error:
            said = str(error).replace("model.id", "explain.model").replace("model.device", "explain.local_device")
            raise InputError(said) from None
        self.model, self.tokenizer, self.revision = subject.model, subject.tokenizer, subject.revision
        self.labels = Labels.of(self._encode)
        self._journal = Journal(folder / "requests.jsonl")
        self._instructions = simulation_instructions(self.labels.top)
        self._judges: dict[str, tuple[_Prefix, list[int]]] = {}
        self._asked, self._mass, self._labels_read = 0, 0.0, 0

    # Proposing

    async def propose(self, unit: Unit, sample: int = 0, mistakes: Mistakes | None = None) -> Explanation:
        """Let the model finish the JSON of a description. Raises RequestFailed where it says nothing."""
        system, shown = proposal(unit, self.config, mistakes)
        return Explanation(await self.write(system, shown, sample), scale=scale_of(unit))

    async def write(self, system: str, user: str, sample: int = 0) -> str:
        """Let the model finish the JSON of a description, greedily or, above sample 0, at a temperature of 0.7."""
        key = content_key(["propose", self.revision, self.config.max_answer_tokens, system, user, *([sample] if sample else [])])
        if key not in self._journal:
            said = self._complete(system, user, sample)
            if not said:
                raise RequestFailed("the model's description is empty")
            self._journal.add(key, said)
        return self._journal[key]

    @torch.inference_mode()
    def _complete(self, system: str, user: str, sample: int) -> str:
        self._asked += 1
        before, after = self._frame(system, 1)
        ids = before + self._encode(user) + after + self._encode(_DESCRIPTION)
        device = self.model.device
        given = torch.tensor([ids], device=device)
        stop = self.tokenizer.eos_token_id
        drawn = {"do_sample": True, "temperature": 0.7} if sample else {"do_sample": False, "temperature": None}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(sample)
            out = self.model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=min(self.config.max_answer_tokens, 128), **drawn,
                top_p=None, top_k=None, pad_token_id=stop if stop is not None else 0,
                tokenizer=self.tokenizer, stop_strings=['"}', '"\n', '" }'],
            )  # fmt: skip
        text = self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        return quoted(text)

    # Simulating

    async def simulate(self, explanation: Explanation, examples: Sequence[Example]) -> list[Simulation]:
        """Return expected activations sum_v v q_v, q the softmax over the levels alone, for all tokens of all windows.

        Every activation of the window stands as unknown, so predictions do not depend on each other.
        """
        windows = [self.window(example.tokens) for example in examples]
        found = list[Simulation]()
        length = max((len(ids) for ids, _ in windows), default=1)
        step = max(1, _TOKENS_AT_ONCE // (length + len(self._simulating[0].ids)))
        for start in range(0, len(windows), step):
            part = windows[start : start + step]
            logits = self.label_logits(explanation.text, [ids for ids, _ in part], [places for _, places in part])
            for own in logits:
                levels, mass = expected_levels(own, self.labels.ids)
                self._mass += float(mass.sum())
                self._labels_read += len(mass)
                expected = levels * (10 / self.labels.top) * explanation.scale
                found.append(Simulation(expected.tolist(), mass.tolist()))
        return found

    def window(self, tokens: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return a window's part of the prompt, and where in it each token's label is predicted."""
        return self._lines(tokens, [UNKNOWN] * len(tokens))

    def label_logits(self, description: str, windows: Sequence[list[int]], places: Sequence[list[int]]) -> list[Tensor]:
        """Return the logits (token, vocabulary) float32 at the places of each window, the windows under one description."""
        prefix, after = self._simulating
        own = self._encode(description) + after
        shifted = [[len(own) + place for place in wanted] for wanted in places]
        return self._logits(prefix, [own + ids for ids in windows], shifted)

    @torch.inference_mode()
    def _logits(self, prefix: "_Prefix", tails: Sequence[list[int]], places: Sequence[list[int]]) -> list[Tensor]:
        """Return the logits (place, vocabulary) float32 at the places of each of `tails`, ids that go on from the prefix."""
        device, longest = self.model.device, max(len(ids) for ids in tails)
        rows = torch.zeros(len(tails), longest, dtype=torch.long)
        mask = torch.zeros(len(tails), len(prefix.ids) + longest, dtype=torch.long)
        row, column = list[int](), list[int]()
        for number, (ids, wanted) in enumerate(zip(tails, places, strict=True)):
            rows[number, : len(ids)] = torch.tensor(ids)
            mask[number, : len(prefix.ids) + len(ids)] = 1  # padded on the right, where nothing that counts looks
            row += [number] * len(wanted)
            column += wanted
        cache = copy.deepcopy(prefix.cache)
        cache.batch_repeat_interleave(len(tails))
        at = torch.tensor(row, device=device), torch.tensor(column, device=device)
        # the unembedding is the largest product there is: it is made for these rows alone
        with on_pass(self.model.get_output_embeddings(), "in", lambda hidden: hidden[at][None]):
            logits = self.model(rows.to(device), attention_mask=mask.to(device), past_key_values=cache, use_cache=True).logits[0]
        return list(logits.float().cpu().split([len(wanted) for wanted in places]))

    @cached_property
    def _simulating(self) -> tuple["_Prefix", list[int]]:
        """Instructions and invented examples up to where the description goes, and what follows it: the same in every prompt."""
        examples = list(few_shot(self.labels.top))
        *parts, after = self._frame(self._instructions, 1 + len(examples))
        ids, fillings = list[int](), list[list[int]]()
        for description, sequences in examples:
            answer = list[int]()
            for tokens, shown in sequences:
                answer += self._lines(tokens, shown)[0] + self._encode("\n")
            fillings += [self._encode(description), answer]
        for part, filling in zip(parts, [*fillings, []], strict=True):
            ids += part + filling
        return self._run(ids), after

    def _run(self, ids: list[int]) -> "_Prefix":
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            self.model(torch.tensor([ids], device=self.model.device), past_key_values=cache, use_cache=True)
        return _Prefix(tuple(ids), cache)

    # Judging

    async def judge(self, explanation: Explanation, kind: Kind, asked: Sequence[Question]) -> list[Judgement]:
        """Return P(yes) / (P(yes) + P(no)) of the answer's first token, for each text by itself."""
        prefix, after = self._judging(kind)
        tails = [
            self._encode(f"Description: {explanation.text}\n\nText: {question.text}") + after for question in asked
        ]
        found = list[Judgement]()
        step = max(1, _TOKENS_AT_ONCE // (len(prefix.ids) + max((len(ids) for ids in tails), default=1)))
        for start in range(0, len(tails), step):
            part = tails[start : start + step]
            for logits in self._logits(prefix, part, [[len(ids) - 1] for ids in part]):
                p = logits[0].double().softmax(0)
                yes, no = (float(p[list(ids)].sum()) for ids in self._answers)
                found.append(Judgement(yes / (yes + no), yes + no))
        return found

    def _judging(self, name: str, answer: str = "judge_one") -> tuple["_Prefix", list[int]]:
        if name not in self._judges:
            before, after = self._frame((prompt(name) + prompt(answer)).strip(), 1)
            self._judges[name] = self._run(before), after
        return self._judges[name]

    @cached_property
    def _answers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that an answer of yes, and one of no, can begin with."""
        forms = [[space + form for space in ("", " ") for form in (word, word.title(), word.upper())] for word in ("yes", "no")]
        yes, no = (tuple({ids[0] for form in of if len(ids := self._encode(form)) == 1}) for of in forms)
        if not yes or not no:
            raise InputError("explain.model: yes and no are no tokens of its vocabulary, so it cannot judge; take another model")
        return yes, no

    # Choosing

    async def choose(self, explanation: Explanation | None, kind: ChoiceKind, asked: Sequence[Choice]) -> list[Chosen]:
        """Return the probabilities of the options' numbers as the answer's first token, by a softmax over these alone."""
        prefix, after = self._judging(f"choose_{kind}", "choose_one")
        found = list[Chosen]()
        for question in asked:
            described = "" if explanation is None else f"Description: {explanation.text}\n\n"
            shown = "\n".join(f"{number}: {text}" for number, text in enumerate(question.options, 1))
            tail = self._encode(described + shown) + after
            (logits,) = self._logits(prefix, [tail], [[len(tail) - 1]])
            p = logits[0].double().softmax(0)
            of_option = [float(p[list(self._number(n))].sum()) for n in range(1, len(question.options) + 1)]
            mass = sum(of_option)
            found.append(Chosen(tuple(value / mass for value in of_option), mass))
        return found

    def _number(self, number: int) -> tuple[int, ...]:
        """Return the tokens that a number can be written as."""
        forms = {ids[0] for space in ("", " ") if len(ids := self._encode(f"{space}{number}")) == 1}
        if not forms:
            raise InputError("explain.model: digits are no tokens of its vocabulary, so it cannot choose; take another model")
        return tuple(forms)

    # Prompts as token ids

    def _encode(self, text: str) -> list[int]:
        """Return the ids of text as text: what looks like a special token in it is none."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _lines(self, tokens: Sequence[str], shown: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return lines of a token, the separator and what is shown of its activation, and where each separator ends."""
        ids, places = list[int](), list[int]()
        separator, end = list(self.labels.separator), self._encode("\n")
        for token, value in zip(tokens, shown, strict=True):
            ids += self._encode(escaped(token)) + separator
            places.append(len(ids) - 1)
            ids += self._value(value) + end
        return ids, places

    def _value(self, value: str) -> list[int]:
        return [self.labels.ids[int(value)]] if value.isdigit() else self._encode(value)

    def _frame(self, system: str, turns: int) -> list[list[int]]:
        """Return the ids of a conversation around its holes, one for what the user says in each turn and one for each answer.

        The last answer has none: it is what comes after. A model without a chat template gets the same as plain text.
        """
        names = [_HOLE.format(number) for number in range(2 * turns - 1)]
        if self.tokenizer.chat_template:
            roles = ("user", "assistant")
            text = self._template(system, [{"role": roles[i % 2], "content": name} for i, name in enumerate(names)])
        else:
            text = plain_frame(system, names)
        parts = list[str]()
        for name in names:
            part, text = text.split(name)
            parts.append(part)
        found = [list(self.tokenizer.encode(part, add_special_tokens=False)) for part in (*parts, text)]
        if not self.tokenizer.chat_template and self.tokenizer.bos_token_id is not None:
            found[0] = [self.tokenizer.bos_token_id, *found[0]]
        return found

    def _template(self, system: str, messages: list[dict[str, str]]) -> str:
        """Render the chat template; where there is no system role (Gemma), the first message begins with it."""
        from jinja2.exceptions import TemplateError

        options = {"tokenize": False, "add_generation_prompt": True}
        try:
            return str(self.tokenizer.apply_chat_template([{"role": "system", "content": system}, *messages], **options))
        except TemplateError:
            first, *rest = messages
            merged = [{"role": "user", "content": f"{system}\n\n{first['content']}"}, *rest]
            return str(self.tokenizer.apply_chat_template(merged, **options))

    def facts(self) -> dict[str, Any]:
        """Name the instrument; `label_mass` is the mean probability that the model gave to the levels at all."""
        hashes = {"propose_prompt": instructions(self.config), "simulate_prompt": simulation_text(self.labels.top)}
        hashes |= {f"{kind}_prompt": prompt(kind) + prompt("judge_one") for kind in KINDS}
        hashes |= {f"{kind}_prompt": prompt(f"choose_{kind}") + prompt("choose_one") for kind in CHOICE_KINDS}
        return {
            "instrument": f"all tokens at once, softmax restricted to the levels 0-{self.labels.top}, in process",
            "model": self.config.model,
            "model_revision": self.revision,
            **{name: hashed(text) for name, text in hashes.items()},
            "proposals_made": self._asked,
            "label_mass": self._mass / self._labels_read if self._labels_read else None,
        }

    async def close(self) -> None:
        """Let the model go."""
        del self.model


def quoted(text: str) -> str:
    r"""Return what stands before the closing quotation mark of a JSON string, as it is meant; a line's end closes it too.

    >>> quoted('the word \\"river\\""} and more')
    'the word "river"'
    """
    said = re.match(r'(?:[^"\\\n]|\\.)*', text)
    inside = said[0] if said else ""
    try:
        return str(json.loads(f'"{inside}"', strict=False)).strip()
    except ValueError:  # an escape that JSON does not know, or half of one
        return inside.strip()


def expected_levels(logits: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return sum_v v q_v and the mass sum_v p_v of logits (token, vocabulary): p is the softmax over all tokens, q over `ids`."""
    of_levels = logits[:, list(ids)].double()
    levels = torch.arange(len(ids), dtype=torch.float64)
    mass = (of_levels.logsumexp(1) - logits.double().logsumexp(1)).exp()
    return of_levels.softmax(1) @ levels, mass
