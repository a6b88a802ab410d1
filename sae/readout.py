"""Which output tokens a latent promotes and suppresses: its decoder row through final norm scale and unembedding.

logits_k = (gamma * d_k) W_U, without the norm's and the unembedding's biases, which are the same for every latent
(nostalgebraist 2020, logit lens; research on decoder rows subtracts exactly that constant term), centred over the vocabulary.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from activation_store.errors import InputError
from activation_store.hooks import HookSite, locate_hooks
from sae.sae import SAE

_STREAM = ("hook_resid_pre", "hook_in", "hook_resid_mid", "hook_resid_post", "hook_out")  # in a block's order
_ATTENTION = ("attn.hook_out", "attn.o.hook_out", "hook_attn_out", "ln1_post.hook_out")
_MLP = ("mlp.hook_out", "mlp.out.hook_out", "hook_mlp_out", "ln2_post.hook_out")
_PROJECTED = ("attn.hook_z", "attn.o.hook_in", "mlp.hook_post", "mlp.out.hook_in")
_VOCABULARY_AT_ONCE = 1 << 14  # rows of an unembedding in half precision that are wide at a time


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


def through_norm(norm: nn.Module, d: Tensor) -> Tensor:
    """Return what a norm makes of directions (n, width) float32, its scale held fixed: centred if it centres, times gamma.

    That scale, one positive number a token, is left out. Whether it centres is probed, since some models' LayerNorm is no
    torch one.
    """
    weight = next(norm.parameters(), None)
    flat = torch.ones(1, d.shape[1], dtype=d.dtype if weight is None else weight.dtype, device=d.device)
    if torch.equal(norm(flat), norm(-flat)):  # 1, 1, 1, ... less its mean is 0
        d = d - d.mean(1, keepdim=True)
    return d * norm_gain(norm, d.shape[1]).to(d.device)


def _parts(sae: SAE, latents: Sequence[int]) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """Return the hooks that the SAE writes to, and what each latent writes there, (n, width) float32 each."""
    bad = [latent for latent in latents if not 0 <= latent < sae.cfg.d_sae]
    if bad:
        raise InputError(f"latents {bad} are outside this SAE's 0..{sae.cfg.d_sae - 1}")
    d = sae.directions(torch.tensor(latents, dtype=torch.long, device=sae.b_dec.device)).detach().float()
    hooks = sae.cfg.hook_names_out or sae.cfg.hook_names
    if hooks:
        return tuple(hooks), torch.split(d, list(sae.cfg.widths_out or sae.cfg.widths), 1)
    hook = sae.cfg.hook_name_out or sae.cfg.hook_name
    if hook is None:
        raise InputError("hook_name: the SAE does not say where it reads, so nothing is known of its way to the logits")
    return (hook,), (d,)


def _point(hook: str) -> tuple[int, str]:
    """Return a hook's block and its place there."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if match is None or match[2] not in (*_STREAM, *_ATTENTION, *_MLP, *_PROJECTED):
        raise InputError(f"hook_name: {hook} is not on the residual stream, nor projected straight into it")
    return int(match[1]), match[2]


def _added(model: nn.Module, hook: str, sites: dict[str, HookSite], d: Tensor) -> Tensor:
    """Return what directions at a hook add to the residual stream, (n, model width)."""
    layer, point = _point(hook)
    if point in _STREAM:
        return d
    if point in _PROJECTED:
        module = model.get_submodule(sites[hook].path)
        weight = next(module.parameters())
        d = d.to(weight.device, weight.dtype)
        d = (module(d) - module(torch.zeros_like(d))).float()
    kind = "attn" if point.startswith("attn") else "mlp"
    given, inside = (sites.get(f"blocks.{layer}.{name}") for name in _ends(kind))
    if point.startswith(("attn.", "mlp.")) and given is not None and inside is not None and given != inside:
        last = model.get_submodule(given.path)  # Gemma 2 and others normalise what attention or MLP adds
        if all(weight.dim() <= 1 for weight in last.parameters()):
            d = through_norm(last, d)
    return d


def _ends(kind: str) -> tuple[str, str]:
    """Return the names of what "attn" or "mlp" adds to the residual stream, and of what its own module gives."""
    return f"hook_{kind}_out", f"{kind}.hook_out"


def residual_directions(sae: SAE, model: nn.Module, latents: Sequence[int]) -> Tensor:
    """Return what each latent's direction adds to the residual stream, (n, model width) float32.

    In the residual stream and at the outputs of attention and MLP that is the decoder row itself; at the input of a block's last
    projection (`mlp.hook_post`, `attn.hook_z`) the row goes through it, without its bias, and through the norm that some models
    have behind it (see `through_norm`). A transcoder's is at the hook that it predicts. Of several hooks (crosscoders),
    contributions add up; of states of the residual stream, each of which holds the earlier ones, the last counts.

    Raises InputError for other hooks, and for latents that the SAE lacks.
    """
    return _residual(sae, model, latents, ())[0]


def _residual(sae: SAE, model: nn.Module, latents: Sequence[int], also: tuple[str, ...]) -> tuple[Tensor, dict[str, HookSite]]:
    """Return `residual_directions`, and the sites of the hooks that they pass and of those in `also`."""
    hooks, parts = _parts(sae, latents)
    places = [_point(hook) for hook in hooks]
    in_stream = [place in _STREAM for _, place in places]
    if any(in_stream) and not all(in_stream):
        raise InputError(f"hook_names: {', '.join(hooks)} are states of the residual stream and additions to it at once")
    if in_stream[0]:
        last = max(range(len(hooks)), key=lambda i: (places[i][0], _STREAM.index(places[i][1])))
        hooks, parts, places = hooks[last : last + 1], parts[last : last + 1], places[last : last + 1]
    layers = {layer for layer, _ in places if not in_stream[0]}
    ends = [f"blocks.{layer}.{name}" for layer in sorted(layers) for kind in ("attn", "mlp") for name in _ends(kind)]
    sites = locate_hooks(model, [*hooks, *also], optional=ends)
    unembed = model.get_output_embeddings().weight  # type: ignore[operator]
    added = [_added(model, hook, sites, d.to(unembed.device)).to(unembed.device) for hook, d in zip(hooks, parts, strict=True)]
    for hook, d in zip(hooks, added, strict=True):
        if d.shape[1] != unembed.shape[1]:
            raise InputError(f"d_in: {d.shape[1]} at {hook}, but the model's residual stream is {unembed.shape[1]} wide")
    return torch.stack(added).sum(0), sites


@torch.no_grad()
def output_logits(sae: SAE, model: nn.Module, latents: Sequence[int]) -> Tensor:
    """Return the direct effect of each latent's direction on the logits, (n, vocabulary) float32, centred.

    Layers in between are skipped, as in any logit lens, and the norms' scales held fixed. One product for all latents; beside
    the result, a part of the unembedding at a time is wide. Raises InputError for hooks that `residual_directions` refuses.
    """
    final = "ln_final.hook_out"
    d, sites = _residual(sae, model, latents, (final,))
    unembed = model.get_output_embeddings().weight  # type: ignore[operator]
    d = through_norm(model.get_submodule(sites[final].path), d)
    logits = torch.empty(len(d), len(unembed), device=d.device)
    size = len(unembed) if unembed.dtype == torch.float32 else _VOCABULARY_AT_ONCE
    for start in range(0, len(unembed), size):
        logits[:, start : start + size] = d @ unembed[start : start + size].float().T
    return logits.sub_(logits.mean(1, keepdim=True))
