"""Windows -> readable examples, and the choice of which examples propose and which score.

The two never meet: proposals see training windows, scores held-out ones, the splits are made by document, and a test
window whose text stands among the training windows is dropped. `assert_disjoint` proves it for every unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from activation_store.store import ActivationStore
from explain.config import ExplainConfig
from explain.evidence import Evidence
from sae.sae import SAE

SIDES = ("train", "valid", "test")
_PAIRS_AT_ONCE = 4096


@dataclass(frozen=True)
class Example:
    """One window: its number in the store, why it was chosen, its tokens, and the unit's activation on each.

    `kind` says why: top; sampled, uniform among windows in which the unit fires; random, uniform among all; or a hard
    negative, in which the unit is silent: neighbour, where one of the latents nearest by decoder direction fires, and similar,
    near in meaning to windows in which it fires. `quantile`, of sampled ones, is the tenth of the firing windows by strength
    that it is from, 1 the weakest. Special tokens have activation 0.
    """

    window: int
    kind: str
    token_ids: list[int]
    tokens: list[str]
    activations: list[float]
    quantile: int | None = None

    @property
    def text(self) -> str:
        """The text, normalised: equal texts are one example."""
        return " ".join("".join(self.tokens).split()).casefold()

    def as_json(self) -> dict[str, Any]:
        """Return plain values, activations rounded to 5 significant digits."""
        return {**asdict(self), "activations": [float(f"{a:.5g}") for a in self.activations]}


@dataclass(frozen=True)
class Unit:
    """A latent or neuron with the examples that propose (train), select (valid) and score (test) its description.

    It fires in `fired` of the `windows` that are held out: what the test examples are a choice of. `neighbours` are the latents
    nearest by decoder direction, nearest first. `promoted` and `suppressed` are the tokens whose logits its direction raises
    and lowers most, with by how much, strongest first; empty where the hook's way to the logits is not known.
    """

    dictionary: str
    hook: str
    latent: int
    density: float
    max_activation: float
    train: list[Example]
    test: list[Example]
    fired: int = 0
    windows: int = 0
    valid: list[Example] = field(default_factory=list)
    neighbours: list[int] = field(default_factory=list)
    promoted: list[tuple[str, float]] = field(default_factory=list)
    suppressed: list[tuple[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Identify the unit within a run."""
        return f"{self.dictionary}/{self.latent}"

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **{key: value for key, value in vars(self).items() if key not in SIDES},
            **{side: [e.as_json() for e in getattr(self, side)] for side in SIDES},
        }

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> "Unit":
        """Read what `as_json` wrote."""
        return cls(**{**value, **{side: [Example(**e) for e in value[side]] for side in SIDES}})


def assert_disjoint(unit: Unit) -> None:
    """Raise AssertionError if a training and a test example share a window or a text."""
    assert not {e.window for e in unit.train} & {e.window for e in unit.test}, unit.name
    assert not {e.text for e in unit.train} & {e.text for e in unit.test}, unit.name


def population_weights(examples: Sequence[Example], fired: int, windows: int) -> list[float]:
    """Return for how many of the split's windows each of the test examples stands.

    The strongest windows stand for themselves, those drawn from where the unit fires, by either way, for the rest of these,
    silent ones for all in which it is silent. Where a kind has no example, nothing stands for its windows.
    """
    drawn = [bool(max(e.activations, default=0.0) > 0) for e in examples]
    top = sum(e.kind == "top" for e in examples)
    others = sum(fires and e.kind != "top" for e, fires in zip(examples, drawn, strict=True))
    silent = sum(not fires for fires in drawn)
    of_top = 1.0 if others else fired / max(top, 1)
    of_others, of_silent = max(fired - top, 0) / max(others, 1), (windows - fired) / max(silent, 1)
    return [
        of_top if e.kind == "top" else of_others if fires else of_silent for e, fires in zip(examples, drawn, strict=True)
    ]


def token_strings(decode: Callable[[list[int]], str], ids: Sequence[int], cache: dict[int, str]) -> list[str]:
    """Return each token's own text; `cache` is shared between calls."""
    for token in ids:
        if token not in cache:
            cache[token] = decode([token])
    return [cache[token] for token in ids]


def choose_units(
    sae: SAE,
    store: ActivationStore,
    dictionary: str,
    hook: str,
    latents: Sequence[int],
    train: Evidence,
    held_out: Evidence,
    config: ExplainConfig,
    decode: Callable[[list[int]], str],
    seed: int,
) -> list[Unit]:
    """Read back the examples of the chosen latents: the evidence knows only window numbers."""
    chance = np.random.Generator(np.random.PCG64([seed, 1]))
    first, last = held_out.windows
    random_windows = chance.choice(np.arange(first, last), size=min(config.test_random, last - first), replace=False)
    wanted: dict[str, list[tuple[int, int, str]]] = {"train": [], "test": []}  # (latent, window, kind), best first
    for latent in latents:
        wanted["train"] += _ranked(train, latent)
        wanted["test"] += _ranked(held_out, latent) + [(latent, int(w), "random") for w in sorted(random_windows)]
    cache: dict[int, str] = {}
    found = {side: _read(sae, store, hook, pairs, config.window, decode, cache) for side, pairs in wanted.items()}
    units = []
    for latent in latents:
        sides = {side: [e for number, e in found[side] if number == latent] for side in found}
        picked = _pick(sides["train"], {"top": config.train_top, "sampled": config.train_sampled}, set())
        seen = {e.text for e in picked}
        limits = {"top": config.test_top, "sampled": config.test_sampled, "random": config.test_random}
        unit = Unit(
            dictionary, hook, latent, float(train.statistics.density[latent]),
            float(train.statistics.max_activation[latent]), picked, _pick(sides["test"], limits, seen),
            int(held_out.fired[latent]), last - first,
        )  # fmt: skip
        assert_disjoint(unit)
        units.append(unit)
    return units


def _ranked(evidence: Evidence, latent: int) -> list[tuple[int, int, str]]:
    """Return a latent's known windows: top ones strongest first, then the sample in random order."""
    result = []
    for ranking, kind in ((evidence.top, "top"), (evidence.sample, "sampled")):
        result += [(latent, int(w), kind) for w in ranking.windows[latent].tolist() if w >= 0]
    return result


def _pick(examples: list[Example], limits: dict[str, int], seen: set[str]) -> list[Example]:
    """Take the first `limits[kind]` of each kind whose text and window are new."""
    texts, windows, picked = set(seen), set[int](), []
    left = dict(limits)
    for example in examples:
        if left.get(example.kind, 0) > 0 and example.text not in texts and example.window not in windows:
            left[example.kind] -= 1
            texts.add(example.text)
            windows.add(example.window)
            picked.append(example)
    return picked


@torch.inference_mode()
def _read(
    sae: SAE, store: ActivationStore, hook: str, pairs: list[tuple[int, int, str]], window: int,
    decode: Callable[[list[int]], str], cache: dict[int, str],
) -> list[tuple[int, Example]]:  # fmt: skip
    """Return (latent, example) for each (latent, window, kind), in the order given; each window is encoded once."""
    windows, index = np.unique(np.array([w for _, w, _ in pairs], dtype=np.int64), return_inverse=True)
    latents = torch.tensor([latent for latent, _, _ in pairs])
    values = torch.zeros(len(pairs), window)
    tokens, special = store.tokens.reshape(-1), store.special.reshape(-1)
    at_once = max(1, _PAIRS_AT_ONCE // window)
    for start in range(0, len(windows), at_once):
        block = windows[start : start + at_once]
        rows = (block[:, None] * window + np.arange(window)).reshape(-1)
        f = sae.encode_sparse(store.read(hook, rows).to(sae.b_dec.device))
        here = np.flatnonzero((index >= start) & (index < start + len(block)))
        wanted = (torch.from_numpy(index[here] - start) * window)[:, None] + torch.arange(window)
        found = f.at(wanted.to(f.starts.device), latents[here, None].to(f.starts.device)).cpu()
        values[here] = found.masked_fill(torch.from_numpy(special[rows])[wanted], 0.0)
    result = []
    for i, (latent, number, kind) in enumerate(pairs):
        ids = tokens[number * window : (number + 1) * window].tolist()
        result.append((latent, Example(number, kind, ids, token_strings(decode, ids, cache), values[i].tolist())))
    return result
