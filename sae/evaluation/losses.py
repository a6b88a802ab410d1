"""What a reconstruction costs the model: cross-entropy and divergence with it spliced in, against clean and zero-ablated passes.

Clean and ablated figures are the same for all SAEs of a hook: they are taken once, as a `Baseline`, and kept on disk. What
the divergence of an SAE needs beside them, the clean pass's logits, is too much to keep; one clean pass a batch of tokens
serves all SAEs that are evaluated together.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from activation_store.files import write_json
from activation_store.hooks import locate_hooks
from sae.evaluation.bootstrap import Sums
from sae.evaluation.held_out import SIDES, HeldOut
from sae.evaluation.splice import Change, Passes, layers_below, next_logits
from sae.sae import SAE

Array = NDArray[np.float64]
_VERSION = 1  # of what a baseline means: another one is measured anew


@dataclass(frozen=True)
class Baseline:
    """The model without an SAE: sums over the counted tokens of each sequence, (side, sequence), nats.

    `ablated` is the cross-entropy with the hook's output set to zero, `ablated_kl` the divergence from the clean pass.
    """

    tokens: Array
    clean: Array
    ablated: Array
    ablated_kl: Array

    def save(self, path: Path) -> None:
        """Write as JSON, exactly."""
        write_json(path, {field.name: getattr(self, field.name).tolist() for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Baseline":
        """Read what `save` wrote."""
        return cls(**{name: np.array(values) for name, values in json.loads(path.read_text()).items()})


@dataclass(frozen=True)
class Spliced:
    """The model with an SAE's reconstruction spliced in: sums over the counted tokens, (side, sequence), nats."""

    ce: Array
    kl: Array


def loss_sums(baseline: Baseline, spliced: Spliced, side: str) -> dict[str, Array]:
    """Return one side's sums by sequence, of which `loss_figures` makes figures."""
    at = SIDES.index(side)
    of_baseline = {field.name: getattr(baseline, field.name)[at] for field in fields(baseline)}
    return {**of_baseline, "spliced": spliced.ce[at], "kl": spliced.kl[at]}


def loss_figures(s: Sums) -> dict[str, Array]:
    """Return means over tokens, in nats, and the shares of what ablation costs that the reconstruction recovers.

    ce_recovered = (ablated - spliced) / (ablated - clean); kl is KL(clean || spliced), kl_recovered = (kl_ablated - kl) /
    kl_ablated. NaN where ablation costs nothing.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        clean, spliced, ablated, kl, kl_ablated = (
            s[name] / s["tokens"] for name in ("clean", "spliced", "ablated", "kl", "ablated_kl")
        )
        gap = ablated - clean
        return {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "ce_ablated": ablated,
            "ce_recovered": np.where(gap > 0, (ablated - spliced) / gap, np.nan),
            "kl": kl,
            "kl_ablated": kl_ablated,
            "kl_recovered": np.where(kl_ablated > 0, (kl_ablated - kl) / kl_ablated, np.nan),
        }


@torch.inference_mode()
def measure(
    saes: Mapping[str, SAE], held_out: HeldOut, model: nn.Module, sequences: int, batch: int, *,
    cache: Path | None = None, progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[Baseline, dict[str, Spliced]]:  # fmt: skip
    """Run the first `sequences` held-out sequences through the model, clean, ablated, and with each SAE spliced in.

    All SAEs are of the held-out set's hooks. Counted are tokens that have a next one; with special tokens left out they
    keep their own activation in spliced and ablated passes, and are not counted. A baseline that `cache`, a folder, holds is
    not measured again. `progress` is told of tokens as they pass through the model.
    """
    sites = locate_hooks(model, sorted({held_out.hook, held_out.hook_out}))
    source, target = sites[held_out.hook], sites[held_out.hook_out]
    device = next(iter(model.parameters())).device
    path = cache / f"baseline-{_key(held_out, model, sequences, batch)}.json" if cache is not None else None
    known = Baseline.load(path) if path is not None and path.exists() else None
    shape = (len(SIDES), sequences)
    base = known or Baseline(*(np.zeros(shape) for _ in fields(Baseline)))
    spliced = {name: Spliced(np.zeros(shape), np.zeros(shape)) for name in saes}
    below = layers_below(model, source, target)
    for start in range(0, sequences, batch):
        where = slice(start, min(start + batch, sequences))
        tokens = torch.from_numpy(held_out.tokens[where].astype(np.int64)).to(device)
        passes = Passes(model, source, target, tokens, below)
        if start == 0 and below and not passes.exact():
            below = []
            passes = Passes(model, source, target, tokens)
        plain = torch.from_numpy(~held_out.special[where]).to(device)
        progress(plain.numel())
        for side, mask in enumerate((plain, torch.ones_like(plain))):
            if known is None:
                base.tokens[side, where] = mask[:, :-1].sum(1).cpu()
                base.clean[side, where] = _sums(cross_entropy(passes.logits, tokens), mask)
                base.ablated[side, where], base.ablated_kl[side, where] = _cost(passes, mask, _zero)
                progress(plain.numel())
            for name, sae in saes.items():
                spliced[name].ce[side, where], spliced[name].kl[side, where] = _cost(passes, mask, partial(_predict, sae))
                progress(plain.numel())
    if path is not None and known is None:
        base.save(path)
    return base, spliced


def _cost(passes: Passes, mask: Tensor, change: Change) -> tuple[Array, Array]:
    """Return cross-entropy and divergence summed by sequence, with change(x, y) in place of y where `mask` holds."""
    logits = passes.changed(lambda x, y: torch.where(mask[..., None], change(x, y), y))
    return _sums(cross_entropy(logits, passes.tokens), mask), _sums(divergence(passes.logits, logits), mask)


def _zero(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(y)


def _predict(sae: SAE, x: Tensor, y: Tensor) -> Tensor:
    _, y_hat = sae.reconstruct_sparse(x.float().to(sae.b_dec.device).flatten(0, -2))
    return y_hat.view(y.shape).to(y)


def _sums(values: Tensor, mask: Tensor) -> Array:
    """Sum (sequence, context - 1) over the tokens that `mask` (sequence, context) counts."""
    found: Array = torch.where(mask[:, :-1], values, 0).double().sum(1).cpu().numpy()
    return found


def _key(held_out: HeldOut, model: nn.Module, sequences: int, batch: int) -> str:
    """Name all that a baseline's numbers depend on, down to how sums are rounded."""
    parameter = next(iter(model.parameters()))
    facts: list[Any] = [
        _VERSION, held_out.hash, held_out.hook_out, sequences, batch, str(parameter.dtype), parameter.device.type,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of each next token in nats, (sequence, context - 1) float32.

    A sequence at a time, as is `divergence`: a batch's logits in float32 would be the largest thing in memory.
    """
    rows = zip(logits, tokens[:, 1:], strict=True)
    return torch.stack([nn.functional.cross_entropy(row.float(), wanted, reduction="none") for row, wanted in rows])


def divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """Return KL(clean || other) over the next token in nats, (sequence, context - 1) float32."""
    found = []
    for of_clean, of_other in zip(clean, logits, strict=True):
        p, q = of_clean.float().log_softmax(-1), of_other.float().log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.stack(found)


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of each next token in nats, (sequence, context - 1) float32."""
    return cross_entropy(next_logits(model, tokens), tokens)
