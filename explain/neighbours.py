"""Which latents a latent is most easily taken for: those nearest by decoder direction."""

from collections.abc import Sequence

import torch

from sae.sae import SAE

_LATENTS_AT_ONCE = 256
_APART = 0.05  # cosine: what is no nearer than this is no neighbour, as of neurons, which are orthogonal


@torch.inference_mode()
def nearest_latents(sae: SAE, latents: Sequence[int], number: int = 10) -> dict[int, list[int]]:
    """Return for each of `latents` at most `number` others by cosine of decoder rows, nearest first."""
    d_sae = sae.cfg.d_sae
    every = torch.nn.functional.normalize(sae.directions(torch.arange(d_sae, device=sae.b_dec.device)).float(), dim=1)
    found: dict[int, list[int]] = {}
    for start in range(0, len(latents), _LATENTS_AT_ONCE):
        some = torch.tensor(latents[start : start + _LATENTS_AT_ONCE], device=every.device)
        cosines = every[some] @ every.T
        cosines[torch.arange(len(some), device=every.device), some] = -1.0
        best = cosines.topk(min(number, d_sae - 1), dim=1)
        for latent, values, others in zip(some.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
            found[latent] = [other for value, other in zip(values, others, strict=True) if value > _APART]
    return found
