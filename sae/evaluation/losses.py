"""What a reconstruction costs the model: cross-entropy and divergence with it spliced in, against clean and zero-ablated passes.

Clean and ablated figures are the same for all SAEs of a hook: they are taken once, as a `Baseline`, and kept on disk. What
the divergence of an SAE needs beside them, the clean pass's logits, is too much to keep; one clean pass a batch of tokens
serves all SAEs that are evaluated together.

Where several hooks are predicted, one at a time is replaced, by what is predicted from the clean pass. A cross-layer transcoder
is also a replacement of all hooks together (Ameisen et al. 2025, "Circuit Tracing", section 2): each is then predicted from what
reaches it in that very pass.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from activation_store.files import write_json
from activation_store.hooks import HookSite, locate_hooks
from sae.architectures.cross_layer import CrossLayerTranscoder
from sae.evaluation.bootstrap import Sums
from sae.evaluation.held_out import SIDES, HeldOut
from sae.evaluation.splice import Edit, Passes, next_logits
from sae.sae import SAE

Array = NDArray[np.float64]
TOGETHER = "all hooks"
"""Names, beside single hooks, the replacement of all by a cross-layer transcoder."""
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
) -> dict[str, tuple[Baseline, dict[str, Spliced]]]:  # fmt: skip
    """Run the first `sequences` held-out sequences through the model: clean, with each hook ablated, and with it spliced in.

    Returns, by hook that is predicted, the baseline and each SAE's figures, and the same of `TOGETHER` for cross-layer
    transcoders. All SAEs are of the held-out set's hooks. Counted are tokens that have a next one; with special tokens left out
    they keep their own activation in spliced and ablated passes, and are not counted. A baseline that `cache`, a folder, holds is
    not measured again. `progress` is told of tokens as they pass through the model.

    Raises RuntimeError where a transcoder's target is passed before what it reads.
    """
    sites = locate_hooks(model, sorted({*held_out.hooks, *held_out.hooks_out}))
    reads, writes = ([sites[hook] for hook in hooks] for hooks in (held_out.hooks, held_out.hooks_out))
    device = next(iter(model.parameters())).device
    every = {hook: [(site, columns)] for site, (hook, columns) in zip(writes, held_out.columns.items(), strict=True)}
    if together(held_out):
        every[TOGETHER] = [place for places in every.values() for place in places]
    shape = (len(SIDES), sequences)
    paths = {hook: cache / f"baseline-{_key(held_out, hook, model, sequences, batch)}.json" for hook in every} if cache else {}
    known = {hook: Baseline.load(path) for hook, path in paths.items() if path.exists()}
    baselines = {hook: known.get(hook) or Baseline(*(np.zeros(shape) for _ in fields(Baseline))) for hook in every}
    spliced = {hook: {name: Spliced(np.zeros(shape), np.zeros(shape)) for name in saes} for hook in every}
    skip = True
    for start in range(0, sequences, batch):
        where = slice(start, min(start + batch, sequences))
        tokens = torch.from_numpy(held_out.tokens[where].astype(np.int64)).to(device)
        passes = Passes(model, list(sites.values()), tokens, skip)
        if start == 0:
            _require_order(list(passes.seen), reads, writes, held_out)
            if not passes.exact(writes):
                skip = False
                passes = Passes(model, list(sites.values()), tokens, skip)
        plain = torch.from_numpy(~held_out.special[where]).to(device)
        masks = (plain, torch.ones_like(plain))
        progress(plain.numel())
        x = torch.cat([passes.seen[site].float() for site in reads], -1)
        clean = cross_entropy(passes.logits, tokens) if known.keys() != every.keys() else None
        for hook, places in every.items():
            base = baselines[hook]
            for side, mask in enumerate(masks):
                if clean is not None and hook not in known:
                    base.tokens[side, where] = mask[:, :-1].sum(1).cpu()
                    base.clean[side, where] = _sums(clean, mask)
                    zero = {site: _writing(mask, torch.zeros((), device=device)) for site, _ in places}
                    base.ablated[side, where], base.ablated_kl[side, where] = _cost(passes, mask, zero)
                    progress(plain.numel())
        for name, sae in saes.items():
            y_hat = sae.reconstruct_sparse(x.to(sae.b_dec.device).flatten(0, -2))[1].to(device).view(*plain.shape, -1)
            for hook, places in every.items():
                for side, mask in enumerate(masks):
                    if hook == TOGETHER:
                        edits = _replacing(sae, reads, places, mask)
                    else:
                        edits = {site: _writing(mask, y_hat[..., columns]) for site, columns in places}
                    into = spliced[hook][name]
                    into.ce[side, where], into.kl[side, where] = _cost(passes, mask, edits)
                    progress(plain.numel())
    for hook, path in paths.items():
        if hook not in known:
            baselines[hook].save(path)
    return {hook: (baselines[hook], spliced[hook]) for hook in every}


def together(held_out: HeldOut) -> bool:
    """Say whether all hooks are replaced together too: by what reads each before it predicts it."""
    return len(held_out.hooks_out) > 1 and not held_out.predicts_its_input


def _require_order(passed: list[HookSite], reads: list[HookSite], writes: list[HookSite], held_out: HeldOut) -> None:
    """Raise RuntimeError where a target comes before its source: then it cannot be predicted while the model runs."""
    for source, target, hook, hook_out in zip(reads, writes, held_out.hooks, held_out.hooks_out, strict=True):
        if source != target and passed.index(target) < passed.index(source):
            raise RuntimeError(f"{hook_out} is passed before {hook}, from which it is to be predicted")


def _cost(passes: Passes, mask: Tensor, edits: Mapping[HookSite, Edit]) -> tuple[Array, Array]:
    """Return cross-entropy and divergence summed by sequence, in a pass with the edits."""
    logits = passes.changed(edits)
    return _sums(cross_entropy(logits, passes.tokens), mask), _sums(divergence(passes.logits, logits), mask)


def _writing(mask: Tensor, value: Tensor) -> Edit:
    """Return the edit that puts `value` in place of y where `mask` holds."""
    return lambda y: torch.where(mask[..., None], value.to(y), y)


def _replacing(
    sae: SAE, reads: Sequence[HookSite], places: Sequence[tuple[HookSite, slice]], mask: Tensor
) -> dict[HookSite, Edit]:  # fmt: skip
    """Return the edits by which a cross-layer transcoder takes the place of all that it predicts, layer by layer."""
    assert isinstance(sae, CrossLayerTranscoder)
    y_hat: Tensor | None = None

    def read(layer: SAE, written: int) -> Edit:
        def edit(x: Tensor) -> None:
            nonlocal y_hat
            _, part = layer.reconstruct_sparse(x.float().to(layer.b_dec.device).flatten(0, -2))  # the first has all of b_dec
            y_hat = part if written == 0 or y_hat is None else y_hat + nn.functional.pad(part, (written, 0))

        return edit

    def write(columns: slice) -> Edit:
        def edit(y: Tensor) -> Tensor:
            assert y_hat is not None
            return torch.where(mask[..., None], y_hat[:, columns].to(y).view(*mask.shape, -1), y)

        return edit

    edits: dict[HookSite, Edit] = {}
    for site, (layer, _, written), (target, columns) in zip(reads, sae, places, strict=True):
        edits[site], edits[target] = read(layer, written), write(columns)
    return edits


def _sums(values: Tensor, mask: Tensor) -> Array:
    """Sum (sequence, context - 1) over the tokens that `mask` (sequence, context) counts."""
    found: Array = torch.where(mask[:, :-1], values, 0).double().sum(1).cpu().numpy()
    return found


def _key(held_out: HeldOut, hook: str, model: nn.Module, sequences: int, batch: int) -> str:
    """Name all that a baseline's numbers depend on, down to how sums are rounded."""
    parameter = next(iter(model.parameters()))
    facts: list[Any] = [
        _VERSION, held_out.hash, hook, sequences, batch, str(parameter.dtype), parameter.device.type,
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
