"""Windows -> readable examples, and the choice of which propose, which select among proposals, and which score.

The three never meet: proposals see training windows, selections validation windows, scores held-out ones; held-out documents are
apart from the others, and a window whose text stands on an earlier side is dropped. `assert_disjoint` proves it for every unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from activation_store.store import ActivationStore
from explain.config import ExplainConfig
from explain.embedding import Embedder
from explain.evidence import Evidence, Ranking
from explain.neighbours import nearest_latents
from sae.sae import SAE

SIDES = ("train", "valid", "test")
HARD = ("neighbour", "similar")
_TENTHS = 10
_WINDOWS_EACH = 3  # of a neighbour's strongest ones, to look for one in which the unit is silent
_PAIRS_AT_ONCE = 4096


@dataclass(frozen=True)
class Example:
    """One window: its number in the store, why it was chosen, its tokens, and the unit's activation on each.

    `kind` says why: top; sampled, uniform among windows in which the unit fires; random, uniform among all; or a hard
    negative, in which the unit is silent: neighbour, where one of the latents nearest by decoder direction fires, and similar,
    near in meaning to windows in which it fires. `quantile`, of sampled ones, is the tenth of the firing windows by strength
    that it is from, 1 the weakest; `neighbour` the latent that fires there. Special tokens have activation 0. `sources`, of
    strongest examples of SAEs on attention's output, are the tokens that add most to the strongest token's pre-activation: how
    far back, text, and how much.
    """

    window: int
    kind: str
    token_ids: list[int]
    tokens: list[str]
    activations: list[float]
    quantile: int | None = None
    neighbour: int | None = None
    sources: list[tuple[int, str, float]] = field(default_factory=list)

    @property
    def hard(self) -> bool:
        """Whether it is a hard negative, chosen because it is easily taken for a window in which the unit fires."""
        return self.kind in HARD

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
    and lowers most, with by how much, strongest first; empty where the hook's way to the logits is not known. `sign` is -1 for a
    direction of which the negative tail is the stronger, and which was turned about.
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
    sign: int = 1

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


def shared(unit: Unit) -> tuple[int, int]:
    """Return how many windows, and how many texts, stand on two sides of a unit's examples."""
    pairs = [(getattr(unit, a), getattr(unit, b)) for a, b in combinations(SIDES, 2)]
    windows = sum(len({e.window for e in a} & {e.window for e in b}) for a, b in pairs)
    return windows, sum(len({e.text for e in a} & {e.text for e in b}) for a, b in pairs)


def assert_disjoint(unit: Unit) -> None:
    """Raise AssertionError if examples of two sides share a window or a text."""
    assert shared(unit) == (0, 0), unit.name


def population_weights(examples: Sequence[Example], fired: int, windows: int) -> list[float]:
    """Return for how many of the split's windows each of the test examples stands.

    The strongest windows stand for themselves, those drawn from where the unit fires, by either way, for the rest of these,
    silent ones for all in which it is silent. Where a kind has no example, nothing stands for its windows; hard negatives, which
    were not drawn at random, stand for none.
    """
    drawn = [bool(max(e.activations, default=0.0) > 0) for e in examples]
    top = sum(e.kind == "top" for e in examples)
    others = sum(fires and e.kind != "top" for e, fires in zip(examples, drawn, strict=True))
    silent = sum(not fires and not e.hard for e, fires in zip(examples, drawn, strict=True))
    of_top = 1.0 if others else fired / max(top, 1)
    of_others, of_silent = max(fired - top, 0) / max(others, 1), (windows - fired) / max(silent, 1)
    return [
        0.0 if e.hard else of_top if e.kind == "top" else of_others if fires else of_silent
        for e, fires in zip(examples, drawn, strict=True)
    ]


def token_strings(decode: Callable[[list[int]], str], ids: Sequence[int], cache: dict[int, str]) -> list[str]:
    """Return each token's own text; `cache` is shared between calls."""
    for token in ids:
        if token not in cache:
            cache[token] = decode([token])
    return [cache[token] for token in ids]


@dataclass(frozen=True)
class _Wanted:
    """A window to read back for a latent, and what its example will say of it."""

    latent: int
    window: int
    kind: str
    quantile: int | None = None
    neighbour: int | None = None


@dataclass(frozen=True)
class _Limit:
    """How many examples of some kinds a side has; hard negatives must be silent, as must all that a proposer sees as such."""

    kinds: tuple[str, ...]
    most: int
    silent: bool = False


def _limits(config: ExplainConfig) -> dict[str, list[_Limit]]:
    scoring = [
        _Limit(("top",), config.test_top), _Limit(("sampled",), config.test_sampled), _Limit(("random",), config.test_random),
        _Limit(("neighbour",), config.test_neighbour, silent=True), _Limit(("similar",), config.test_similar, silent=True),
    ]  # fmt: skip
    proposing = [
        _Limit(("top",), config.train_top), _Limit(("sampled",), config.train_sampled),
        _Limit(("neighbour", "random"), config.train_negatives, silent=True),
    ]  # fmt: skip
    return {"train": proposing, "valid": scoring, "test": scoring}


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
    valid: Evidence | None = None,
    embedder: Embedder | None = None,
    signs: Sequence[int] | None = None,
) -> list[Unit]:
    """Read back the examples of the chosen latents: the evidence knows only window numbers."""
    evidence = {"train": train, "test": held_out, **({"valid": valid} if valid is not None else {})}
    limits, neighbours = _limits(config), nearest_latents(sae, latents)
    cache: dict[int, str] = {}

    def texts(windows: Sequence[int]) -> list[str]:
        return ["".join(token_strings(decode, _tokens(store, window, config.window).tolist(), cache)) for window in windows]

    found: dict[str, list[list[Example]]] = {}
    for number, (side, of_side) in enumerate(evidence.items()):
        chance = np.random.Generator(np.random.PCG64([seed, 1] if side == "test" else [seed, 1, number]))
        counts = {kind: limit.most for limit in limits[side] for kind in limit.kinds}
        wanted = _known(of_side, latents, neighbours, counts, chance)
        if counts.get("similar") and embedder is not None:
            wanted += _similar(of_side, latents, counts["similar"], config.similar_among, texts, embedder, chance)
        wanted.sort(key=lambda w: w.latent)  # stable: each latent's stay in their order
        examples = _read(sae, store, hook, wanted, config.window, decode, cache)
        of_latent: dict[int, list[Example]] = {latent: [] for latent in latents}
        for want, example in zip(wanted, examples, strict=True):
            of_latent[want.latent].append(example)
        found[side] = [of_latent[latent] for latent in latents]
    units = []
    first, last = held_out.windows
    for i, latent in enumerate(latents):
        picked: dict[str, list[Example]] = {}
        seen = set[str]()
        for side in SIDES:
            picked[side] = _pick(found[side][i], limits[side], seen) if side in found else []
            seen |= {e.text for e in picked[side]}
        unit = Unit(
            dictionary, hook, latent, float(train.statistics.density[latent]),
            float(train.statistics.max_activation[latent]), picked["train"], picked["test"],
            int(held_out.fired[latent]), last - first, picked["valid"], neighbours[latent],
            sign=1 if signs is None else signs[latent],
        )  # fmt: skip
        assert_disjoint(unit)
        units.append(unit)
    return units


def _known(
    evidence: Evidence, latents: Sequence[int], neighbours: dict[int, list[int]], counts: dict[str, int],
    chance: np.random.Generator,
) -> list[_Wanted]:  # fmt: skip
    """Return what the evidence and chance can give, best first for each kind; more than is shown, as some will be dropped."""
    first, last = evidence.windows
    asked = counts["random"]
    if asked and "similar" not in counts:  # of the training side, where those that fire are passed over
        asked = 4 * asked + 8
    number = min(asked, last - first)
    random = sorted(chance.choice(np.arange(first, last), size=number, replace=False).tolist())
    wanted = []
    for latent in latents:
        strongest = [int(w) for w in evidence.top.windows[latent].tolist() if w >= 0]
        wanted += [_Wanted(latent, w, "top") for w in strongest]
        for window, tenth in _spread(evidence.sample, latent, counts["sampled"], chance):
            wanted.append(_Wanted(latent, window, "sampled", tenth))
        if counts.get("neighbour"):
            ranks = range(_WINDOWS_EACH)
            near = [(int(evidence.top.windows[other, rank]), other) for rank in ranks if rank < evidence.top.windows.shape[1]
                    for other in neighbours[latent]]  # fmt: skip
            wanted += [_Wanted(latent, window, "neighbour", neighbour=other) for window, other in near if window >= 0]
        wanted += [_Wanted(latent, w, "random") for w in random]
    return wanted


def _spread(sample: Ranking, latent: int, number: int, chance: np.random.Generator) -> list[tuple[int, int]]:
    """Return twice `number` windows of a latent's sample, each with its tenth by strength; every start of the list is spread.

    The sample is cut by strength into `number` parts, ten at most, as even as can be; one is taken at random of each part in
    turn, and parts have their turns in random order.
    """
    windows, values = sample.windows[latent].numpy(), sample.values[latent].numpy()
    windows, values = windows[windows >= 0], values[windows >= 0]  # by priority, which is a random order
    order = values.argsort(kind="stable")
    tenths = {int(windows[place]): 1 + rank * _TENTHS // len(order) for rank, place in enumerate(order)}
    parts = [sorted(part.tolist()) for part in np.array_split(order, min(max(number, 1), _TENTHS)) if len(part)]
    turns = chance.permutation(len(parts))
    longest = max((len(part) for part in parts), default=0)
    spread = [int(windows[parts[turn][round_]]) for round_ in range(longest) for turn in turns if round_ < len(parts[turn])]
    return [(window, tenths[window]) for window in spread[: 2 * number]]


def _similar(
    evidence: Evidence, latents: Sequence[int], number: int, among: int, texts: Callable[[Sequence[int]], list[str]],
    embedder: Embedder, chance: np.random.Generator,
) -> list[_Wanted]:  # fmt: skip
    """Return, of `among` random windows, those nearest in meaning to one of each latent's strongest windows, nearest first."""
    first, last = evidence.windows
    pool = np.sort(chance.choice(np.arange(first, last), size=min(among, last - first), replace=False))
    strongest = [[int(w) for w in evidence.top.windows[latent].tolist() if w >= 0] for latent in latents]
    asked = sorted({window for of_latent in strongest for window in of_latent})
    of_pool, of_asked = embedder.encode(texts(pool.tolist())), dict(zip(asked, embedder.encode(texts(asked)), strict=True))
    wanted = []
    for latent, own in zip(latents, strongest, strict=True):
        if own:
            nearness = (np.stack([of_asked[window] for window in own]) @ of_pool.T).max(0)
            nearest = (-nearness).argsort(kind="stable")[: 8 * number + 16]  # many of them will fire
            wanted += [_Wanted(latent, int(pool[i]), "similar") for i in nearest]
    return wanted


def _pick(examples: list[Example], limits: Sequence[_Limit], seen: set[str]) -> list[Example]:
    """Take the first examples of each kind, as many as its limit allows, whose text and window are new."""
    texts, windows, picked = set(seen), set[int](), list[Example]()
    of_kind = {kind: limit for limit in limits for kind in limit.kinds}
    taken = dict.fromkeys(limits, 0)
    for example in examples:
        limit = of_kind[example.kind]
        if taken[limit] >= limit.most or example.text in texts or example.window in windows:
            continue
        if limit.silent and max(example.activations) > 0:
            continue
        taken[limit] += 1
        texts.add(example.text)
        windows.add(example.window)
        picked.append(example)
    return picked


def _tokens(store: ActivationStore, window: int, size: int) -> NDArray[Any]:
    return store.tokens.reshape(-1)[window * size : (window + 1) * size]


@torch.inference_mode()
def _read(
    sae: SAE, store: ActivationStore, hook: str, wanted: Sequence[_Wanted], window: int, decode: Callable[[list[int]], str],
    cache: dict[int, str],
) -> list[Example]:  # fmt: skip
    """Return the examples asked for, in that order; each window is encoded once."""
    windows, index = np.unique(np.array([w.window for w in wanted], dtype=np.int64), return_inverse=True)
    latents = torch.tensor([w.latent for w in wanted])
    values = torch.zeros(len(wanted), window)
    special = store.special.reshape(-1)
    at_once = max(1, _PAIRS_AT_ONCE // window)
    for start in range(0, len(windows), at_once):
        block = windows[start : start + at_once]
        rows = (block[:, None] * window + np.arange(window)).reshape(-1)
        f = sae.encode_sparse(store.read(hook, rows).to(sae.b_dec.device))
        here = np.flatnonzero((index >= start) & (index < start + len(block)))
        places = (torch.from_numpy(index[here] - start) * window)[:, None] + torch.arange(window)
        found = f.at(places.to(f.starts.device), latents[here, None].to(f.starts.device)).cpu()
        values[here] = found.masked_fill(torch.from_numpy(special[rows])[places], 0.0)
    result = []
    for want, activations in zip(wanted, values, strict=True):
        ids = _tokens(store, want.window, window).tolist()
        strings = token_strings(decode, ids, cache)
        result.append(Example(want.window, want.kind, ids, strings, activations.tolist(), want.quantile, want.neighbour))
    return result
