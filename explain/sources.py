"""Of an SAE on attention's output, which source tokens make a latent fire: an exact split, not an attribution.

Before the output projection, a position's z is a sum over source tokens, z_t = sum_s A[t, s] v_s for each head, so a latent's
pre-activation splits over them: sum_s (sum_h A[h, t, s] v[s, h] . W_enc[h]) + constant (Kissane et al. 2024, "Interpreting
Attention Layer Outputs with Sparse Autoencoders").
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from activation_store.errors import InputError
from activation_store.hooks import locate_hooks, on_pass
from activation_store.store import ActivationStore
from explain.examples import Example, Unit, token_strings
from sae.sae import SAE

_SHOWN = 5


def is_attention(hook: str) -> bool:
    """Say whether a hook is of heads' outputs before their projection."""
    return hook.endswith((".attn.hook_z", ".attn.o.hook_in"))


@torch.inference_mode()
def source_split(model: Any, sae: SAE, tokens: Tensor, latents: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much each source token adds to a latent's pre-activation, (batch, position), and the rest of it, (batch,).

    tokens (batch, position) are whole sequences from their beginning; latents and positions (batch,) say whose pre-activation,
    and where. Their sum is the pre-activation (x - b_dec) W_enc + b_enc. float32 sums; attention runs as plain softmax for it,
    whose weights alone can be read. Raises InputError for hooks and models whose heads cannot be told apart.
    """
    hook = sae.cfg.hook_name or ""
    if not is_attention(hook):
        raise InputError(f"hook_name: {hook or None!r} given; sources are of blocks.N.attn.hook_z")
    site = locate_hooks(model, [hook])[hook]
    attention = model.get_submodule(site.path.rpartition(".")[0])
    layer = int(hook.split(".")[1])
    heads = model.config.num_attention_heads
    kept: list[Tensor] = []
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with _values(attention, kept):
            found = model(input_ids=tokens.to(next(model.parameters()).device), output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    pattern = found.attentions[layer].float()  # (batch, head, to, from)
    batch, length = tokens.shape
    v = kept[0].float().view(batch, length, -1, sae.cfg.d_in // heads)
    v = v.repeat_interleave(heads // v.shape[2], 2)  # grouped queries share their values
    rows = torch.arange(batch, device=pattern.device)
    latents, positions = latents.to(pattern.device), positions.to(pattern.device)
    w = sae.W_enc.detach().float().to(pattern.device)[:, latents].T  # (batch, d_in)
    along = torch.einsum("bshd,bhd->bhs", v, w.view(batch, heads, -1))
    added = (pattern[rows, :, positions] * along).sum(1)
    constant = sae.b_enc.detach().float().to(pattern.device)[latents]
    if sae.cfg.apply_b_dec_to_input:
        constant = constant - w @ sae.b_dec.detach().float().to(pattern.device)
    return added.cpu(), constant.cpu()


def _values(attention: nn.Module, kept: list[Tensor]) -> Any:
    """Keep the values of all heads as they leave their projection."""
    own, fused = getattr(attention, "v_proj", None), getattr(attention, "c_attn", None)
    if isinstance(own, nn.Module):
        return on_pass(own, "out", lambda x: kept.append(x.detach()))
    if isinstance(fused, nn.Module):  # queries, keys and values in a row, as GPT-2 has them
        return on_pass(fused, "out", lambda x: kept.append(x.detach().chunk(3, -1)[2]))
    names = ", ".join(name for name, _ in attention.named_children())
    raise InputError(f"model: its attention has no values that can be read ({names}); sources need v_proj or c_attn")


def with_sources(units: Sequence[Unit], sae: SAE, model: Any, store: ActivationStore, window: int, tokenizer: Any) -> list[Unit]:
    """Return the units with, for each of their strongest examples, the tokens that add most to its strongest token."""
    cache: dict[int, str] = {}

    def found(unit: Unit, example: Example) -> Example:
        if example.kind != "top":
            return example
        row, start = divmod(example.window * window, store.context)
        place = start + max(range(window), key=lambda i: example.activations[i])
        ids = torch.from_numpy(store.tokens[row : row + 1, : place + 1].astype("int64"))
        added, _ = source_split(model, sae, ids, torch.tensor([unit.latent]), torch.tensor([place]))
        best = added[0].topk(min(_SHOWN, place + 1))
        strings = token_strings(lambda of: str(tokenizer.decode(of)), ids[0, best.indices].tolist(), cache)
        pairs = zip(best.indices.tolist(), strings, best.values.tolist(), strict=True)
        return replace(example, sources=[(place - at, text, float(f"{value:.5g}")) for at, text, value in pairs])

    return [
        replace(unit, train=[found(unit, e) for e in unit.train], test=[found(unit, e) for e in unit.test]) for unit in units
    ]
