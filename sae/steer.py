"""Steered generation: the same prompt with and without edits."""

from dataclasses import dataclass
from typing import Any

import torch

from sae.config import SteerConfig
from sae.intervene import Clamp, Edit, Positions, intervene
from sae.sae import SAE


@dataclass(frozen=True)
class SteeredText:
    """What the model wrote after `prompt`, greedily, without and with the edits."""

    prompt: str
    baseline: str
    steered: str


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompt: str, tokens: int, *, prepend_bos: bool) -> str:
    """Return the greedy continuation of `prompt`, `tokens` tokens at most, special tokens left out of the text."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if prepend_bos and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    batch = torch.tensor([ids], device=next(iter(model.parameters())).device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=tokens, do_sample=False, pad_token_id=pad
    )
    return str(tokenizer.decode(out[0, batch.shape[1] :], skip_special_tokens=True))


def steer(
    model: Any, tokenizer: Any, sae: SAE, edits: list[Edit], prompt: str, tokens: int, *, baseline: str | None = None,
    positions: Positions = "all", keep_norm: bool = False,
) -> SteeredText:  # fmt: skip
    """Generate with and without `edits`, as `intervene` makes them; a baseline already at hand is not generated again."""
    bos = bool(sae.cfg.metadata.get("prepend_bos", False))
    if baseline is None:
        baseline = complete(model, tokenizer, prompt, tokens, prepend_bos=bos)
    with intervene(model, sae, edits, positions=positions, keep_norm=keep_norm):
        steered = complete(model, tokenizer, prompt, tokens, prepend_bos=bos)
    return SteeredText(prompt, baseline, steered)


def steering_sample(model: Any, tokenizer: Any, sae: SAE, latent: int, config: SteerConfig, baseline: str) -> SteeredText:
    """Clamp one latent as `config` says and complete its prompt: the sample that a report shows."""
    edits: list[Edit] = [Clamp(latent, times_max=config.times_max)]
    return steer(model, tokenizer, sae, edits, config.prompt, config.tokens, baseline=baseline)
