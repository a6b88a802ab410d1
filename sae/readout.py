"""Which output tokens a latent promotes and suppresses: its decoder row through final norm scale and unembedding.

logits_k = (gamma * d_k) W_U, without the norm's and the unembedding's biases, which are the same for every latent
(nostalgebraist 2020, logit lens; research on decoder rows subtracts exactly that constant term), centred over the vocabulary.
"""

import torch
from torch import Tensor, nn

from activation_store.hooks import locate_hooks
from sae.sae import SAE


def norm_gain(norm: nn.Module, width: int) -> Tensor:
    """Return gamma (width,) of a LayerNorm or RMSNorm, whatever its convention (weight, 1 + weight), by probing it.

    A vector of alternating signs has mean 0 and mean square 1, so (norm(v) - norm(-v)) / 2 = gamma * v, biases gone.
    """
    weight = next(norm.parameters(), None)
    v = torch.ones(width, dtype=torch.float32, device=None if weight is None else weight.device)
    v[1::2] = -1
    v_in = v if weight is None else v.to(weight.dtype)
    gain: Tensor = (norm(v_in[None])[0] - norm(-v_in[None])[0]).float() / 2 * v
    return gain


@torch.no_grad()
def output_logits(sae: SAE, model: nn.Module, latents: list[int]) -> Tensor:
    """Return the direct effect of each latent's direction on the logits, (n, vocabulary) float32, centred.

    Only right for SAEs in the residual stream (d_in = the model's width); layers in between are skipped, as in any logit
    lens.
    """
    site = locate_hooks(model, ["ln_final.hook_out"])["ln_final.hook_out"]
    norm = model.get_submodule(site.path)
    unembed = model.get_output_embeddings().weight  # type: ignore[operator]
    d = sae.directions(torch.tensor(latents, device=sae.b_dec.device)).to(unembed.device).float()
    if isinstance(norm, nn.LayerNorm):
        d = d - d.mean(1, keepdim=True)
    logits: Tensor = (d * norm_gain(norm, d.shape[1])) @ unembed.float().T
    return logits - logits.mean(1, keepdim=True)
