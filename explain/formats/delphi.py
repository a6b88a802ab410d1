"""Delphi's cached latents: a folder a hook point with {first}_{last}.safetensors, each a range of latents, and config.json.

`locations` (n, 3) are sequence, position and latent, counted from the file's first; `activations` (n,) what was above 1e-5 in
size; `tokens` (sequence, context) the same in each file, or left out. A file's locations are read in blocks, of which the wanted
latents are kept: never a dense array, and never all files at once.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from activation_store.errors import InputError, first_line
from explain.config import ExplainConfig
from explain.examples import Example, Unit, assert_disjoint, token_strings
from explain.formats.described import fresh
from explain.formats.lines import read_object

_ROWS_AT_ONCE = 1 << 22
_SPARE = 4  # times what is shown are looked at: some texts come twice


@dataclass(frozen=True)
class _Corpus:
    """The tokens, (sequence, context), cut into windows, and which windows are held out: whole sequences are."""

    tokens: NDArray[np.int64]
    window: int
    held_out: NDArray[np.bool_]
    special: NDArray[np.int64]

    def ids(self, window: int) -> list[int]:
        found: list[int] = self.tokens.reshape(-1)[window * self.window : (window + 1) * self.window].tolist()
        return found


@dataclass(frozen=True)
class _Firing:
    """Where latents fire, sorted by latent: flat positions in the corpus and activations."""

    latents: NDArray[np.int64]
    places: NDArray[np.int64]
    activations: NDArray[np.float32]


def read_delphi(
    folder: Path,
    decode: Callable[[list[int]], str],
    latents: Collection[int] | None = None,
    config: ExplainConfig | None = None,
    *,
    tokens: NDArray[Any] | None = None,
    special: Collection[int] = (),
    held_out: float = 0.3,
    seed: int = 0,
) -> Iterator[Unit]:
    """Yield the cached latents of a hook point's folder as units, in the order of their numbers; `latents` names those wanted.

    A share of the sequences is held out: training examples come from the others, test ones from these, and no text is on both
    sides, as many of each kind as `config` says. `decode` gives a token's text; `special` tokens count as silent. `tokens` are
    those of the corpus where the files have none. Latents that never fire are in no file, and yield nothing.
    """
    config = config or ExplainConfig()
    files = _files(folder)
    corpus = _corpus(files[0][2], tokens, config.window, special, held_out, seed)
    sequences = np.flatnonzero(corpus.held_out)
    chance = np.random.Generator(np.random.PCG64([seed, 1]))
    random = np.sort(chance.choice(sequences, size=min(config.test_random, len(sequences)), replace=False)).tolist()
    cache: dict[int, str] = {}
    wanted = None if latents is None else np.unique(np.array(list(latents), np.int64))
    for first, last, path in files:
        if wanted is not None and not ((wanted >= first) & (wanted <= last)).any():
            continue
        firing = _firing(path, first, last, corpus, wanted)
        numbers, starts = np.unique(firing.latents, return_index=True)
        for latent, start, end in zip(numbers.tolist(), starts, [*starts[1:], len(firing.latents)], strict=True):
            here = slice(start, end)
            yield _unit(folder.name, latent, firing.places[here], firing.activations[here], corpus, config, random, decode,
                        cache, seed)  # fmt: skip


def _files(folder: Path) -> list[tuple[int, int, Path]]:
    """Return first latent, last latent and path of each file, in order."""
    if not (folder / "config.json").is_file():
        below = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise InputError(f"{folder}: no config.json in it; give a hook point's folder"
                         + (f": {', '.join(below[:8])}" if below else ", such as latents/layers.9"))  # fmt: skip
    read_object(folder / "config.json")
    found = []
    for path in folder.glob("*.safetensors"):
        match = re.fullmatch(r"(\d+)_(\d+)\.safetensors", path.name)
        if match is None:
            raise InputError(f"{path}: not called <first latent>_<last latent>.safetensors")
        found.append((int(match[1]), int(match[2]), path))
    if not found:
        raise InputError(f"{folder}: no <first latent>_<last latent>.safetensors in it")
    return sorted(found)


def _corpus(
    path: Path, tokens: NDArray[Any] | None, window: int, special: Collection[int], held_out: float, seed: int
) -> _Corpus:  # fmt: skip
    if tokens is None:
        with _opened(path) as file:
            if "tokens" not in file.keys():  # noqa: SIM118 - no mapping
                raise InputError(f"{path}: no tokens in it; give those of the corpus: tokens=, (sequence, context)")
            tokens = file.get_tensor("tokens").to(torch.int64).numpy()
    if tokens.ndim != 2:
        raise InputError(f"{path}: tokens: shape {tokens.shape} given; it must be (sequence, context)")
    if tokens.shape[1] % window:
        raise InputError(f"explain.window: {window} given; it must divide the cache's context, {tokens.shape[1]}")
    if not 0 < held_out < 1:
        raise InputError(f"held_out: {held_out} given; allowed: more than 0 and less than 1")
    chance = np.random.Generator(np.random.PCG64([seed, 5]))
    apart = chance.random(len(tokens)) < held_out
    return _Corpus(
        tokens.astype(np.int64), window, np.repeat(apart, tokens.shape[1] // window), np.array(sorted(special), np.int64)
    )


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


def _firing(path: Path, first: int, last: int, corpus: _Corpus, wanted: NDArray[np.int64] | None) -> _Firing:
    """Read a file's wanted latents, special tokens left out, and sort them by latent and place."""
    sequences, context = corpus.tokens.shape
    flat = corpus.tokens.reshape(-1)
    kept: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    with _opened(path) as file:
        missing = {"locations", "activations"} - set(file.keys())
        if missing:
            raise InputError(f"{path}: no {', '.join(sorted(missing))} in it")
        locations, activations = file.get_slice("locations"), file.get_slice("activations")
        shape, size = tuple(locations.get_shape()), tuple(activations.get_shape())
        if len(shape) != 2 or shape[1] != 3 or size != shape[:1]:
            raise InputError(f"{path}: locations: shape {shape} given for activations of {size}; it must be (n, 3) and (n,)")
        for start in range(0, shape[0], _ROWS_AT_ONCE):
            rows = locations[start : start + _ROWS_AT_ONCE].to(torch.int64).numpy()
            values = activations[start : start + _ROWS_AT_ONCE].float().numpy()
            largest = (sequences - 1, context - 1, last - first)
            if (rows < 0).any() or (rows > largest).any():
                raise InputError(f"{path}: locations: {rows.max(0).tolist()} given; allowed: up to {list(largest)}, sequence, "
                                 "position and latent from the file's first")  # fmt: skip
            places, numbers = rows[:, 0] * context + rows[:, 1], rows[:, 2] + first
            keep = ~np.isin(flat[places], corpus.special)
            if wanted is not None:
                keep &= np.isin(numbers, wanted)
            kept.append((numbers[keep], places[keep], values[keep]))
    if not kept:
        return _Firing(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    latents, where, strengths = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    order = np.lexsort((where, latents))
    return _Firing(latents[order], where[order], strengths[order])


def _unit(
    hook: str, latent: int, places: NDArray[np.int64], activations: NDArray[np.float32], corpus: _Corpus,
    config: ExplainConfig, random: list[int], decode: Callable[[list[int]], str], cache: dict[int, str], seed: int,
) -> Unit:  # fmt: skip
    windows, starts = np.unique(places // corpus.window, return_index=True)
    strongest = np.maximum.reduceat(activations, starts)
    ends = dict(zip(windows.tolist(), zip(starts, [*starts[1:], len(places)], strict=True), strict=True))
    fires, apart = strongest > 0, corpus.held_out[windows]
    chance = np.random.Generator(np.random.PCG64([seed, 6, latent]))

    def example(window: int, kind: str) -> Example:
        start, end = ends.get(window, (0, 0))
        values = np.zeros(corpus.window, np.float32)
        values[places[start:end] % corpus.window] = activations[start:end]
        ids = corpus.ids(window)
        return Example(window, kind, ids, token_strings(decode, ids, cache), values.tolist())

    def examples(side: NDArray[np.bool_], top: int, sampled: int) -> Iterator[Example]:
        own = windows[fires & side]
        ranked = own[np.argsort(-strongest[fires & side], kind="stable")]
        for window in ranked[: _SPARE * top].tolist():
            yield example(window, "top")
        for window in chance.permutation(own)[: _SPARE * (top + sampled)].tolist():
            yield example(window, "sampled")

    seen = set[str | int]()
    limits = {"top": config.train_top, "sampled": config.train_sampled}
    train = fresh(examples(~apart, config.train_top, config.train_sampled), seen, limits)
    limits = {"top": config.test_top, "sampled": config.test_sampled, "random": config.test_random}
    test = fresh(examples(apart, config.test_top, config.test_sampled), seen, limits)
    test += fresh((example(window, "random") for window in random), seen, limits)
    trained = activations[~corpus.held_out[places // corpus.window]]
    tokens = (~corpus.held_out).sum() * corpus.window
    unit = Unit(
        "delphi", hook, latent, float((trained > 0).sum() / max(tokens, 1)), float(trained.max(initial=0.0)), train, test,
        int((fires & apart).sum()), int(corpus.held_out.sum()),
    )  # fmt: skip
    assert_disjoint(unit)
    return unit
