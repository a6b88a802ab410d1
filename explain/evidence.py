"""One streaming pass over a store: for every latent its strongest windows and a uniform sample of those it fires in.

State is (d_sae, k), whatever the corpus size; the sample's tenths by strength estimate those of all firing windows. A window
is `window` consecutive tokens of one sequence; windows are numbered through the store, so a window's tokens and activations
are index arithmetic.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from activation_store.errors import InputError
from activation_store.files import write_atomic
from activation_store.progress import Progress
from activation_store.store import ActivationStore
from explain.evidence_loops import offer_all, rank_block
from sae.sae import SAE, LatentStatistics
from sae.statistics import RunningStatistics

_MISSING = -1
_ROWS_AT_ONCE = 4096


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
        """Merge candidates, (candidate,) each, at most one a latent and window; of equal keys the earlier stays."""
        offer_all(*self.arrays(), *(candidates.numpy() for candidates in (latents, keys, values, windows)))

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Return keys, values and windows as numpy arrays of the same memory."""
        return self.keys.numpy(), self.values.numpy(), self.windows.numpy()


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


def window_range(store: ActivationStore, window: int, split: str, reserved: float = 0.0) -> tuple[int, int]:
    """Return the window numbers from..to of a split: train, held_out, or valid.

    Of the training sequences the last `reserved` share is the valid split and no longer train's. Raises InputError where
    windows do not tile a sequence.
    """
    if store.context % window:
        raise InputError(f"explain.window: {window} does not divide the store's context of {store.context} tokens")
    per_sequence = store.context // window
    border = store.train_sequences * per_sequence
    valid = (store.train_sequences - int(store.train_sequences * reserved)) * per_sequence
    return {"train": (0, valid), "valid": (valid, border), "held_out": (border, store.rows // window)}[split]


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
    reserved: float = 0.0,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    progress: Progress = lambda done, total: None,
) -> Evidence:
    """Pass once over a split and return every latent's `top` strongest and `sample` random firing windows.

    With `checkpoint` (a file), the state is saved every `checkpoint_seconds` and an interrupted pass goes on from there
    to the same result. Special tokens count as not firing. `reserved`: see `window_range`.
    """
    if store.width(hook) != sae.cfg.d_in:
        raise InputError(f"d_in: the SAE takes {sae.cfg.d_in}, but {hook} of {store.path} is {store.width(hook)} wide")
    first, last = window_range(store, window, split, reserved)
    d_sae = sae.cfg.d_sae
    tops, samples, running = Ranking.empty(d_sae, top), Ranking.empty(d_sae, sample), RunningStatistics(d_sae)
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
    step = max(1, _ROWS_AT_ONCE // window)
    device = sae.b_dec.device
    peak, scratch = np.zeros(d_sae, np.float32), np.empty(d_sae, np.int64)  # of one window at a time
    saved = time.monotonic()
    while position < last:
        stop = min(position + step, last)
        rows = slice(position * window, stop * window)
        plain = ~special[rows]
        f = sae.encode_sparse(store.read(hook, rows)[plain].to(device))
        running.update(f)
        rank_block(
            f.starts.cpu().numpy(), f.latents.cpu().numpy(), f.values.cpu().numpy(), np.flatnonzero(plain.numpy()) // window,
            position, of_window[position - first : stop - first].numpy(), of_latent.numpy(), peak, scratch, fired.numpy(),
            *tops.arrays(), *samples.arrays(),
        )  # fmt: skip
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

