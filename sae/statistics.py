"""What every latent does on the corpus: its maximum, its density, in one pass and (d_sae,) memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from activation_store.store import ActivationStore
from sae.sae import SAE, LatentStatistics

Progress = Callable[[int, int], None]


class RunningStatistics:
    """Maximum and firing count of each latent, batch by batch. A latent fires where it is above zero."""

    def __init__(self, d_sae: int) -> None:
        """Start with nothing seen."""
        self.maximum = torch.zeros(d_sae)
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        self.tokens = torch.zeros((), dtype=torch.int64)

    def update(self, f: Tensor) -> None:
        """Add latents (token, d_sae); special tokens must not be among them."""
        if len(f):
            self.maximum = torch.maximum(self.maximum, f.amax(0).cpu())
            self.fired += (f > 0).sum(0).cpu()
            self.tokens += len(f)

    def result(self) -> LatentStatistics:
        """Return what was seen so far."""
        tokens = int(self.tokens)
        return LatentStatistics(self.maximum, self.fired.float() / max(tokens, 1), tokens)

    def state(self) -> dict[str, Tensor]:
        """Return the state as tensors, to be saved with a checkpoint."""
        return {"maximum": self.maximum, "fired": self.fired, "tokens": self.tokens}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a saved state."""
        self.maximum, self.fired, self.tokens = state["maximum"], state["fired"], state["tokens"]


@torch.inference_mode()
def latent_statistics(
    sae: SAE, store: ActivationStore, hook: str | None = None, *, batch: int = 4096,
    progress: Progress = lambda done, total: None,
) -> LatentStatistics:  # fmt: skip
    """Pass once over the training rows of the store, special tokens left out, and return the latents' statistics."""
    name = hook or sae.cfg.hook_name or store.hooks[0]
    border = store.train_sequences * store.context
    kept = torch.from_numpy(~store.special.reshape(-1))
    running = RunningStatistics(sae.cfg.d_sae)
    device = sae.b_dec.device
    for start in range(0, border, batch):
        stop = min(start + batch, border)
        x = store.read(name, slice(start, stop))[kept[start:stop]]
        running.update(sae.encode(x.to(device)))
        progress(stop, border)
    return running.result()
