"""What every latent does on the corpus: its maximum, its density, in one pass and (d_sae,) memory."""

import math

import torch
from torch import Tensor

from activation_store.progress import Progress
from activation_store.store import ActivationStore
from sae.ops import SparseLatents
from sae.sae import HISTOGRAM_EDGES, SAE, LatentStatistics

_BINS = len(HISTOGRAM_EDGES) - 1


class RunningStatistics:
    """Maximum and activation histogram of each latent, batch by batch. A latent fires where it is above zero."""

    def __init__(self, d_sae: int) -> None:
        """Start with nothing seen."""
        self.maximum = torch.zeros(d_sae)
        self.histogram = torch.zeros(d_sae, _BINS, dtype=torch.int64)
        self.tokens = torch.zeros((), dtype=torch.int64)

    def update(self, f: SparseLatents) -> None:
        """Add the latents of a batch of tokens; special tokens must not be among them."""
        fires = f.values > 0
        latent, values = f.index[fires], f.values[fires]
        self.maximum = torch.maximum(
            self.maximum, torch.zeros(len(self.maximum), device=values.device).scatter_reduce_(0, latent, values, "amax").cpu()
        )
        bins = ((values.log2() - math.log2(HISTOGRAM_EDGES[0])) * 2).floor().clamp_(0, _BINS - 1).long()
        counts = torch.bincount(latent * _BINS + bins, minlength=self.histogram.numel()).view_as(self.histogram)
        self.histogram += counts.cpu()
        self.tokens += len(f)

    def result(self) -> LatentStatistics:
        """Return what was seen so far."""
        tokens = int(self.tokens)
        density = self.histogram.sum(1).float() / max(tokens, 1)
        return LatentStatistics(self.maximum, density, self.histogram, tokens)

    def state(self) -> dict[str, Tensor]:
        """Return the state as tensors, to be saved with a checkpoint."""
        return {"maximum": self.maximum, "histogram": self.histogram, "tokens": self.tokens}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a saved state."""
        self.maximum, self.histogram, self.tokens = state["maximum"], state["histogram"], state["tokens"]


@torch.inference_mode()
def latent_statistics(
    sae: SAE, store: ActivationStore, hook: str | None = None, *, batch: int = 4096,
    progress: Progress = lambda done, total: None,
) -> LatentStatistics:  # fmt: skip
    """Pass once over the training rows of the store, special tokens left out, and return the latents' statistics."""
    names = (hook,) if hook else sae.cfg.hook_names or (sae.cfg.hook_name or store.hooks[0],)
    border = store.train_sequences * store.context
    kept = torch.from_numpy(~store.special.reshape(-1))
    running = RunningStatistics(sae.cfg.d_sae)
    device = sae.b_dec.device
    for start in range(0, border, batch):
        stop = min(start + batch, border)
        x = torch.cat([store.read(name, slice(start, stop)) for name in names], 1)[kept[start:stop]]
        running.update(sae.encode_sparse(x.to(device)))
        progress(stop, border)
    return running.result()
