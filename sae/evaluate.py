"""Evaluation on held-out rows that training never drew: reconstruction, sparsity, and the cross-entropy it costs."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from activation_store.errors import InputError
from activation_store.hooks import locate_hooks, on_pass
from activation_store.progress import Progress
from activation_store.store import ActivationStore
from sae.config import EvaluateConfig
from sae.sae import SAE

DENSITY_EDGES = [-6.0 + 0.25 * i for i in range(25)]  # log10 of density, 1e-6 to 1


@torch.inference_mode()
def evaluate(
    sae: SAE, store: ActivationStore, model: nn.Module, config: EvaluateConfig, *,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Return the final figures of an SAE on the held-out rows of `store`, read through `model` for the losses.

    The top level and `without_special` leave special tokens out (the SAE never saw them: in the spliced and ablated
    passes they keep their own activation); `with_special` takes every position. Figures: l0; mse (summed over d_in, mean
    over tokens); explained_variance = 1 - sum||x - x_hat||^2 / sum||x - mean||^2; ce_clean, ce_spliced (x replaced by
    x_hat), ce_ablated (x replaced by 0), all in nats a token; ce_recovered = (ablated - spliced) / (ablated - clean);
    dead_fraction, latents that never fired on `tokens` held-out tokens; density_histogram over log10 of density.
    A figure that is undefined is None.
    """
    hook = sae.cfg.hook_name or store.hooks[0]
    if store.width(hook) != sae.cfg.d_in:
        raise InputError(f"d_in: the SAE takes {sae.cfg.d_in}, but {hook} of {store.path} is {store.width(hook)} wide")
    held_out = store.tokens.shape[0] - store.train_sequences
    sequences = min(config.ce_sequences, held_out)
    total = held_out * store.context + 5 * sequences * store.context
    reconstruction = _reconstruction(sae, store, hook, lambda done: progress(done, total))
    losses = _losses(
        sae, store, model, hook, sequences, config.batch_size, lambda done: progress(held_out * store.context + done, total)
    )
    result: dict[str, Any] = {}
    for which in ("without_special", "with_special"):
        result[which] = {**reconstruction[which], **losses[which]}
    return {
        **result["without_special"],
        **result,
        "hook": hook,
        "held_out_sequences": held_out,
        "ce_sequences": sequences,
        "density_edges_log10": DENSITY_EDGES,
    }


class _Moments:
    """Sums over tokens from which the reconstruction figures follow; float64, for they are differences of large sums."""

    def __init__(self, d_sae: int, d_in: int) -> None:
        self.tokens, self.error, self.square, self.l0 = 0, 0.0, 0.0, 0.0
        self.sum = torch.zeros(d_in, dtype=torch.float64)
        self.fired = torch.zeros(d_sae, dtype=torch.int64)

    def update(self, x: Tensor, reconstruction: Tensor, counts: Tensor) -> None:
        self.tokens += len(x)
        self.error += float((x - reconstruction).double().square().sum())
        self.square += float(x.double().square().sum())
        self.sum += x.double().sum(0).cpu()
        self.l0 += float(counts.sum())
        self.fired += counts.cpu()

    def figures(self) -> dict[str, Any]:
        n = max(self.tokens, 1)
        variance = self.square - float(self.sum.square().sum()) / n
        density = self.fired.double() / n
        alive = density[density > 0].log10().float()
        return {
            "tokens": self.tokens,
            "l0": self.l0 / n,
            "mse": self.error / n,
            "explained_variance": 1 - self.error / variance if variance > 0 else None,
            "dead_fraction": float((self.fired == 0).double().mean()),
            "density_histogram": torch.histogram(alive, torch.tensor(DENSITY_EDGES)).hist.long().tolist(),
        }


def _reconstruction(sae: SAE, store: ActivationStore, hook: str, progress: Callable[[int], None]) -> dict[str, Any]:
    first = store.train_sequences * store.context
    kept = torch.from_numpy(~store.special.reshape(-1))
    all_tokens, plain = (_Moments(sae.cfg.d_sae, sae.cfg.d_in) for _ in range(2))
    device = sae.b_dec.device
    for start in range(first, store.rows, 4096):
        stop = min(start + 4096, store.rows)
        x = store.read(hook, slice(start, stop)).to(device)
        f, reconstruction = sae.reconstruct_sparse(x)
        rows = kept[start:stop].to(device)
        all_tokens.update(x, reconstruction, f.latent_counts())
        plain.update(x[rows], reconstruction[rows], f.keep(rows[f.rows]).latent_counts())
        progress(stop - first)
    return {"with_special": all_tokens.figures(), "without_special": plain.figures()}


def _losses(
    sae: SAE, store: ActivationStore, model: nn.Module, hook: str, sequences: int, batch: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:  # fmt: skip
    """Return clean, spliced and zero-ablated cross-entropy, over all positions and over those of no special token."""
    site = locate_hooks(model, [hook])[hook]
    module = model.get_submodule(site.path)
    device = next(iter(model.parameters())).device
    sae_device = sae.b_dec.device
    sums: dict[str, float] = {}
    counts = {"with_special": 0, "without_special": 0}
    done = 0
    first = store.train_sequences
    for start in range(first, first + sequences, batch):
        stop = min(start + batch, first + sequences)
        tokens = torch.from_numpy(store.tokens[start:stop].astype(np.int64)).to(device)
        plain = torch.from_numpy(~store.special[start:stop]).to(device)
        everywhere = torch.ones_like(plain)

        def spliced(x: Tensor) -> Tensor:
            reconstruction: Tensor = sae(x.float().to(sae_device))
            return reconstruction.to(x)

        replacements = {"clean": None, "spliced": spliced, "ablated": torch.zeros_like}
        for kind, replace in replacements.items():
            for which, where in (("with_special", everywhere), ("without_special", plain)):
                if kind == "clean" and which == "without_special":
                    continue  # one clean pass serves both

                def act(x: Tensor, replace: Any = replace, where: Tensor = where) -> Tensor | None:
                    return None if replace is None else torch.where(where[..., None], replace(x), x)

                with on_pass(module, site.side, act):
                    loss = next_token_loss(model, tokens)
                masks = {"with_special": everywhere, "without_special": plain}
                for name in masks if kind == "clean" else (which,):
                    key = f"{name} {kind}"
                    sums[key] = sums.get(key, 0.0) + float(loss[masks[name][:, :-1]].double().sum())
                done += tokens.numel()
                progress(done)
        for name, mask in (("with_special", everywhere), ("without_special", plain)):
            counts[name] += int(mask[:, :-1].sum())
    result = {}
    for name, count in counts.items():
        clean, spliced_ce, ablated = (sums[f"{name} {kind}"] / max(count, 1) for kind in ("clean", "spliced", "ablated"))
        gap = ablated - clean
        result[name] = {
            "ce_tokens": count,
            "ce_clean": clean,
            "ce_spliced": spliced_ce,
            "ce_ablated": ablated,
            "ce_recovered": (ablated - spliced_ce) / gap if math.isfinite(gap) and gap > 0 else None,
        }
    return result


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of each next token in nats, (sequence, context - 1) float32."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none").view(
        len(tokens), -1
    )
