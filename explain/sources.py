"""Of an SAE on attention's output, which source tokens make a latent fire: an exact split, not an attribution.

Before the output projection, a position's z is a sum over source tokens, z_t = sum_s A[t, s] v_s for each head, so a latent's
pre-activation splits over them: sum_s (sum_h A[h, t, s] v[s, h] . W_enc[h]) + constant (Kissane et al. 2024, "Interpreting
Attention Layer Outputs with Sparse Autoencoders").
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from activation_store.errors import InputError
from activation_store.hooks import HookSite, locate_hooks, on_pass
from activation_store.store import ActivationStore
from explain.examples import Example, Unit, token_strings
from sae.architectures.gated import GatedSAE
from sae.sae import SAE

_SHOWN = 5
_ROUNDING = 0.02  # of z's norm: in bfloat16 a sum over sources is good to 0.004; what is wired otherwise is not near


def is_attention(hook: str) -> bool:
    """Say whether a hook is of heads' outputs before their projection."""
    return hook.endswith((".attn.hook_z", ".attn.o.hook_in"))


def _site(model: Any, sae: SAE) -> HookSite:
    """Return where the SAE reads. Raises InputError for what has no sources."""
    hook = sae.cfg.hook_name or ""
    if not is_attention(hook):
        raise InputError(f"hook_name: {hook or None!r} given; sources are of blocks.N.attn.hook_z")
    if sae.cfg.normalize_activations != "none":
        raise InputError(f"normalize_activations: {sae.cfg.normalize_activations} given; its divisor depends on all sources")
    return locate_hooks(model, [hook])[hook]


@torch.inference_mode()
def source_split(
    model: Any, sae: SAE, tokens: Tensor, latents: Tensor, positions: Tensor, *, rows: Tensor | None = None,
    site: HookSite | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return how much each source token adds to a latent's pre-activation, (n, position), and the rest of it, (n,).

    tokens (batch, position) are whole sequences from their beginning; `latents` and `positions` (n,) say whose pre-activation,
    and where; `rows` (n,) in which sequence, by default one in each. Their sum is the pre-activation
    (x - b_dec) W_enc + b_enc, a gated SAE's that of its magnitude. float32 sums. One pass, to the hook's layer and no further;
    attention runs as plain softmax for it, whose weights alone can be read. `site` spares a second search for the hook.

    Raises InputError for other hooks, and for models whose z is not such a sum of what their cache keeps as values.
    """
    site = site or _site(model, sae)
    pattern, v, z = _attention(model, site, tokens)
    heads, batch = pattern.shape[1], len(tokens)
    rows = torch.arange(batch) if rows is None else rows
    rows, latents, positions = (index.to(z.device) for index in (rows, latents, positions))
    weights = pattern[rows, :, positions].float()  # (n, head, source)
    v = v.float().repeat_interleave(heads // v.shape[1], 1)[rows]  # grouped queries share their values
    own = z[rows, positions].float()
    rebuilt = torch.einsum("nhs,nhsd->nhd", weights, v).flatten(1)
    if rebuilt.shape != own.shape or bool(((rebuilt - own).norm(dim=1) > _ROUNDING * own.norm(dim=1) + 1e-6).any()):
        raise InputError(f"model: {site.path} of {type(model).__name__} reads something else than attention's sum over values")
    linear: SAE = sae.as_jumprelu() if isinstance(sae, GatedSAE) else sae
    w = linear.W_enc.detach()[:, latents.to(linear.b_dec.device)].T.float().to(z.device)
    along = torch.einsum("nhsd,nhd->nhs", v, w.view(len(w), heads, -1))
    added = (weights * along).sum(1)
    constant = linear.b_enc.detach()[latents.to(linear.b_dec.device)].float().to(z.device)
    if linear.cfg.apply_b_dec_to_input:
        constant = constant - w @ linear.b_dec.detach().float().to(z.device)
    return added.cpu(), constant.cpu()


class _Passed(Exception):
    """The layer's attention has run: nothing above it need."""


def _attention(model: Any, site: HookSite, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a layer's pattern (batch, head, to, from), values (batch, head or fewer, from, d_head) and z (batch, to, d_in).

    Values are those that the model's cache keeps, whatever projection they came out of.
    """
    from transformers import DynamicCache

    path = site.path.rpartition(".")[0]
    attention, z, cache, before = model.get_submodule(path), list[Tensor](), DynamicCache(), model.config._attn_implementation
    pattern: list[Any] = []

    def passed(_module: Any, _args: Any, out: Any) -> None:
        pattern.append(out[1] if isinstance(out, tuple) and len(out) > 1 else None)
        raise _Passed

    handle = attention.register_forward_hook(passed)
    try:
        model.set_attn_implementation("eager")
        with on_pass(model.get_submodule(site.path), site.side, z.append):
            model(input_ids=tokens.to(next(model.parameters()).device), past_key_values=cache, use_cache=True)
    except _Passed:
        pass
    finally:
        handle.remove()
        model.set_attn_implementation(before)
    layer = getattr(attention, "layer_idx", None)
    readable = isinstance(layer, int) and layer < len(cache.layers) and bool(z)
    v = cache.layers[layer].values if readable else None
    if not pattern or not isinstance(pattern[0], Tensor) or not isinstance(v, Tensor) or pattern[0].dim() != 4:
        raise InputError(f"model: {path} of {type(model).__name__} shows no pattern and values, so sources are unknown")
    return pattern[0], v, z[0]


def with_sources(units: Sequence[Unit], sae: SAE, model: Any, store: ActivationStore, window: int, tokenizer: Any) -> list[Unit]:
    """Return the units with, for each of their strongest examples, the tokens that add most to its strongest token."""
    cache: dict[int, str] = {}
    site = _site(model, sae)

    def found(unit: Unit, side: Sequence[Example]) -> list[Example]:
        """All strongest examples of a side in one pass."""
        top = [(i, *divmod(e.window * window, store.context)) for i, e in enumerate(side) if e.kind == "top"]
        result = list(side)
        if not top:
            return result
        places = [start + max(range(window), key=lambda at: side[i].activations[at]) for i, _, start in top]
        ids = torch.from_numpy(store.tokens[[row for _, row, _ in top], : max(places) + 1].astype("int64"))
        latents = torch.full((len(top),), unit.latent)
        added, _ = source_split(model, sae, ids, latents, torch.tensor(places), site=site)
        for (i, _, _), place, own, tokens in zip(top, places, added, ids, strict=True):
            best = own[: place + 1].topk(min(_SHOWN, place + 1))
            strings = token_strings(lambda of: str(tokenizer.decode(of)), tokens[best.indices].tolist(), cache)
            pairs = zip(best.indices.tolist(), strings, best.values.tolist(), strict=True)
            result[i] = replace(side[i], sources=[(place - at, text, float(f"{value:.5g}")) for at, text, value in pairs])
        return result

    return [replace(unit, train=found(unit, unit.train), test=found(unit, unit.test)) for unit in units]
