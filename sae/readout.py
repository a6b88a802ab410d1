"""Which output tokens a latent promotes and suppresses: its decoder row through final norm scale and unembedding.

logits_k = (gamma * d_k) W_U, without the norm's and the unembedding's biases, which are the same for every latent
(nostalgebraist 2020, logit lens; research on decoder rows subtracts exactly that constant term), centred over the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from activation_store.errors import InputError
from activation_store.hooks import locate_hooks
from sae.sae import SAE

_PROJECTED = (".mlp.hook_post", ".attn.hook_z", ".mlp.out.hook_in", ".attn.o.hook_in")
_ADDED = (".hook_resid_", ".hook_mlp_out", ".hook_attn_out", ".mlp.hook_out", ".attn.hook_out")


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


def residual_directions(sae: SAE, model: nn.Module, latents: Sequence[int]) -> Tensor:
    """Return what each latent's direction adds to the residual stream, (n, model width) float32.

    In the residual stream and at the outputs of attention and MLP that is the decoder row itself; at the input of a block's last
    projection (`mlp.hook_post`, `attn.hook_z`) the row goes through it, without its bias. Raises InputError for other hooks.
    """
    hook = sae.cfg.hook_name_out or sae.cfg.hook_name
    d = sae.directions(torch.tensor(latents, device=sae.b_dec.device)).float()
    unembed = model.get_output_embeddings().weight  # type: ignore[operator]
    d = d.to(unembed.device)
    if hook is None:
        raise InputError("hook_name: the SAE does not say where it reads, so nothing is known of its way to the logits")
    site = locate_hooks(model, [hook])[hook]
    module = model.get_submodule(site.path)
    if site.side == "in" and any(hook.endswith(name) for name in _PROJECTED):
        weight = next(module.parameters())
        projected: Tensor = module(d.to(weight.dtype)) - module(torch.zeros_like(d, dtype=weight.dtype))
        return projected.float()
    if d.shape[1] == unembed.shape[1] and any(name in hook for name in _ADDED):
        return d
    raise InputError(f"hook_name: {hook} is not on the residual stream, nor projected straight into it")


@torch.no_grad()
def output_logits(sae: SAE, model: nn.Module, latents: Sequence[int]) -> Tensor:
    """Return the direct effect of each latent's direction on the logits, (n, vocabulary) float32, centred.

    Layers in between are skipped, as in any logit lens. Raises InputError for hooks that `residual_directions` refuses.
    """
    site = locate_hooks(model, ["ln_final.hook_out"])["ln_final.hook_out"]
    norm = model.get_submodule(site.path)
    unembed = model.get_output_embeddings().weight  # type: ignore[operator]
    d = residual_directions(sae, model, latents)
    if isinstance(norm, nn.LayerNorm):
        d = d - d.mean(1, keepdim=True)
    logits: Tensor = (d * norm_gain(norm, d.shape[1])) @ unembed.float().T
    return logits - logits.mean(1, keepdim=True)
