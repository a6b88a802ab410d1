"""One streaming pass over a store: for every latent its strongest windows and a uniform sample of those it fires in.

State is (d_sae, k), whatever the corpus size. A window is `window` consecutive tokens of one sequence; windows are
numbered through the store, so a window's tokens and activations are index arithmetic.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from activation_store.errors import InputError
from activation_store.files import write_atomic
from activation_store.progress import Progress
from activation_store.store import ActivationStore
from sae.sae import SAE, LatentStatistics
from sae.statistics import RunningStatistics

_MISSING = -1


@dataclass
class Ranking:
    """The k windows of highest key for each latent: keys and values (d_sae, k) float32, windows (d_sae, k) int64.

    Missing places have window -1. For the top windows, key = value = the latent's maximum in the window; for the sample,
    the key is a random priority, so that the k highest are a uniform draw (reservoir sampling by random keys).
    """

    keys: Tensor
    values: Tensor
    windows: Tensor

    @classmethod
    def empty(cls, d_sae: int, k: int) -> "Ranking":
        """Hold nothing yet."""
        return cls(torch.full((d_sae, k), -1.0), torch.zeros(d_sae, k), torch.full((d_sae, k), _MISSING))

    def update(self, keys: Tensor, values: Tensor, windows: Tensor) -> None:
        """Merge candidates: keys and values (windows, d_sae), window numbers (windows,); keys <= 0 do not count."""
        k = self.keys.shape[1]
        fresh_keys, place = torch.topk(keys.T, min(k, len(windows)), dim=1)
        fresh_values = values.T.gather(1, place)
        fresh_windows = torch.where(fresh_keys > 0, windows[place], _MISSING)
        all_keys = torch.cat([self.keys, torch.where(fresh_keys > 0, fresh_keys, -1.0)], 1)
        self.keys, place = torch.topk(all_keys, k, dim=1)
        self.values = torch.cat([self.values, fresh_values], 1).gather(1, place)
        self.windows = torch.cat([self.windows, fresh_windows], 1).gather(1, place)


@dataclass
class Evidence:
    """What one pass over one split found. `statistics` leaves special tokens out."""

    top: Ranking
    sample: Ranking
    statistics: LatentStatistics
    windows: tuple[int, int]  # the split's window numbers, from..to

    def firing_windows(self) -> Tensor:
        """Return how many windows are known in which each latent fires, (d_sae,), capped by the sample's size."""
        return (self.sample.windows != _MISSING).sum(1)


def window_range(store: ActivationStore, window: int, split: str) -> tuple[int, int]:
    """Return the window numbers from..to of a split. Raises InputError where windows do not tile a sequence."""
    if store.context % window:
        raise InputError(f"explain.window: {window} does not divide the store's context of {store.context} tokens")
    per_sequence = store.context // window
    border = store.train_sequences * per_sequence
    return (0, border) if split == "train" else (border, store.rows // window)


@torch.inference_mode()
def gather_evidence(
    sae: SAE,
    store: ActivationStore,
    hook: str,
    split: str,
    *,
    window: int,
    top: int,
    sample: int,
    seed: int,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    progress: Progress = lambda done, total: None,
) -> Evidence:
    """Pass once over a split and return every latent's `top` strongest and `sample` random firing windows.

    With `checkpoint` (a file), the state is saved every `checkpoint_seconds` and an interrupted pass goes on from there
    to the same result. Special tokens count as not firing.
    """
    if store.width(hook) != sae.cfg.d_in:
        raise InputError(f"d_in: the SAE takes {sae.cfg.d_in}, but {hook} of {store.path} is {store.width(hook)} wide")
    first, last = window_range(store, window, split)
    d_sae = sae.cfg.d_sae
    tops, samples, running = Ranking.empty(d_sae, top), Ranking.empty(d_sae, max(sample, 1)), RunningStatistics(d_sae)
    rankings = {"top": tops, "sample": samples}
    position = first
    if checkpoint is not None and checkpoint.exists():
        state = load_file(checkpoint)
        position = int(state["position"])
        for name, ranking in rankings.items():
            ranking.keys, ranking.values, ranking.windows = (state[f"{name}.{part}"] for part in ("keys", "values", "windows"))
        running.restore({key: state[key] for key in running.state()})
    # Sampling priority of (window, latent): one random number a window plus one a latent, modulo 1. For any one latent
    # the windows' priorities are independent and uniform, which is all that a uniform sample needs.
    generator = torch.Generator().manual_seed(seed)
    of_latent = torch.rand(d_sae, generator=generator)
    of_window = torch.rand(last - first, generator=generator)
    special = torch.from_numpy(store.special.reshape(-1))
    step = max(1, 4096 // window)
    device = sae.b_dec.device
    saved = time.monotonic()
    while position < last:
        stop = min(position + step, last)
        rows = slice(position * window, stop * window)
        f = sae.encode(store.read(hook, rows).to(device)).cpu()
        plain = ~special[rows]
        running.update(f[plain])
        peaks = f.masked_fill_(~plain[:, None], 0.0).view(stop - position, window, d_sae).amax(1)
        numbers = torch.arange(position, stop)
        tops.update(peaks, peaks, numbers)
        if sample:
            priority = (of_window[position - first : stop - first, None] + of_latent).frac_()
            samples.update(priority.masked_fill_(peaks <= 0, -1.0), peaks, numbers)
        position = stop
        progress((position - first) * window, (last - first) * window)
        if checkpoint is not None and time.monotonic() - saved > checkpoint_seconds and position < last:
            saved = time.monotonic()
            tensors = {"position": torch.tensor(position), **running.state()}
            for name, ranking in rankings.items():
                tensors |= {f"{name}.{part}": value.contiguous() for part, value in vars(ranking).items()}
            write_atomic(checkpoint, save(tensors))
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return Evidence(tops, samples, running.result(), (first, last))
