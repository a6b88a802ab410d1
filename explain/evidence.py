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
from sae.ops import SparseLatents
from sae.sae import SAE, LatentStatistics
from sae.statistics import RunningStatistics

_MISSING = -1
_PEAKS_AT_ONCE = 1 << 25


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

    def update(self, latents: Tensor, keys: Tensor, values: Tensor, windows: Tensor) -> None:
        """Merge candidates, (candidate,) each, at most one a latent and window; of equal keys the earlier stays.

        Only latents that have a candidate better than their last place are touched: after the first windows, few.
        """
        k = self.keys.shape[1]
        better = keys > self.keys[latents, -1]
        latents, keys, values, windows = latents[better], keys[better], values[better], windows[better]
        order = keys.argsort(descending=True, stable=True)
        order = order[latents[order].argsort(stable=True)]  # by latent, strongest first
        touched, row, counts = torch.unique_consecutive(latents[order], return_inverse=True, return_counts=True)
        place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[row]
        order, row, place = order[place < k], row[place < k], place[place < k]

        def merged(mine: Tensor, theirs: Tensor, missing: float) -> Tensor:
            fresh = torch.full((len(touched), k), missing, dtype=mine.dtype)
            fresh[row, place] = theirs[order]
            return torch.cat([mine[touched], fresh], 1)

        all_keys, all_values = merged(self.keys, keys, -1.0), merged(self.values, values, 0.0)
        all_windows = merged(self.windows, windows, _MISSING)
        best = all_keys.sort(dim=1, descending=True, stable=True).indices[:, :k]
        self.keys[touched] = all_keys.gather(1, best)
        self.values[touched] = all_values.gather(1, best)
        self.windows[touched] = all_windows.gather(1, best)


@dataclass
class Evidence:
    """What one pass over one split found. `statistics` leaves special tokens out."""

    top: Ranking
    sample: Ranking
    statistics: LatentStatistics
    windows: tuple[int, int]  # the split's window numbers, from..to
    fired: Tensor  # in how many of these windows each latent fires, (d_sae,) int64

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
    fired = torch.zeros(d_sae, dtype=torch.int64)
    position = first
    if checkpoint is not None and checkpoint.exists():
        state = load_file(checkpoint)
        position, fired = int(state["position"]), state["fired"]
        for name, ranking in rankings.items():
            ranking.keys, ranking.values, ranking.windows = (state[f"{name}.{part}"] for part in ("keys", "values", "windows"))
        running.restore({key: state[key] for key in running.state()})
    # Sampling priority of (window, latent): one random number a window plus one a latent, modulo 1. For any one latent
    # the windows' priorities are independent and uniform, which is all that a uniform sample needs.
    generator = torch.Generator().manual_seed(seed)
    of_latent = torch.rand(d_sae, generator=generator)
    of_window = torch.rand(last - first, generator=generator)
    special = torch.from_numpy(store.special.reshape(-1))
    step = max(1, min(4096 // window, _PEAKS_AT_ONCE // d_sae))
    device = sae.b_dec.device
    saved = time.monotonic()
    while position < last:
        stop = min(position + step, last)
        rows = slice(position * window, stop * window)
        plain = ~special[rows]
        f = sae.encode_sparse(store.read(hook, rows)[plain].to(device))
        running.update(f)
        peaks = _peaks(f, (torch.arange(len(plain)) // window)[plain].to(device), stop - position).cpu()
        place, latents = torch.nonzero(peaks, as_tuple=True)
        fired += torch.bincount(latents, minlength=d_sae)
        strongest, numbers = peaks[place, latents], position + place
        tops.update(latents, strongest, strongest, numbers)
        if sample:
            priority = (of_window[numbers - first] + of_latent[latents]).frac_()
            samples.update(latents, priority, strongest, numbers)
        position = stop
        progress((position - first) * window, (last - first) * window)
        if checkpoint is not None and time.monotonic() - saved > checkpoint_seconds and position < last:
            saved = time.monotonic()
            tensors = {"position": torch.tensor(position), "fired": fired, **running.state()}
            for name, ranking in rankings.items():
                tensors |= {f"{name}.{part}": value.contiguous() for part, value in vars(ranking).items()}
            write_atomic(checkpoint, save(tensors))
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return Evidence(tops, samples, running.result(), (first, last), fired)


def _peaks(f: SparseLatents, window: Tensor, windows: int) -> Tensor:
    """Return each latent's maximum in each window, (windows, d_sae), 0 where it does not fire; `window` is each row's."""
    peaks = torch.zeros(windows * f.d_sae, device=f.values.device)
    if len(f):
        peaks.scatter_reduce_(0, window[f.rows] * f.d_sae + f.index, f.values, "amax")
    return peaks.view(windows, f.d_sae)
