"""How well and how sparsely an SAE reconstructs the held-out rows of a store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae.evaluation.bootstrap import Sums, intervals, plain, total
from sae.evaluation.dark_matter import ErrorRegression
from sae.evaluation.held_out import SIDES, HeldOut
from sae.sae import SAE

DENSITY_EDGES = [-6.0 + 0.25 * i for i in range(25)]  # log10 of density, 1e-6 to 1
_ROWS = 4096  # a read
_CLUSTERS = 2048  # most that are resampled: with more sequences neighbours go together, and memory stays bounded
_OF_LATENTS = ("tokens", "l0", "l1")
_OF_TARGET = ("error", "square", "dot", "square_hat", "by_token", "cosine", "cosine_tokens", "ratio", "ratio_tokens")


@dataclass
class _Tally:
    """One side's sums: by cluster of what latents and targets give, float64 on the CPU, and counts by latent and by position.

    `targets` has a sum for each of `_OF_TARGET` and for each dimension: of all that is predicted first, then of each hook's part.
    """

    latents: Tensor
    targets: list[tuple[Tensor, Tensor]]
    fired: Tensor
    position_l0: Tensor
    position_tokens: Tensor

    @classmethod
    def empty(cls, clusters: int, sae: SAE, parts: Sequence[slice], context: int, device: torch.device) -> "_Tally":
        zeros = partial(torch.zeros, dtype=torch.float64)
        widths = [len(range(sae.cfg.width_out)[part]) for part in parts]
        targets = [(zeros(clusters, len(_OF_TARGET)), zeros(clusters, width)) for width in widths]
        fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=device)
        return cls(zeros(clusters, len(_OF_LATENTS)), targets, fired, *(zeros(context, device=device) for _ in range(2)))

    def sums(self, part: int = 0) -> dict[str, NDArray[np.float64]]:
        scalars, target = self.targets[part]
        of_latents = dict(zip(_OF_LATENTS, self.latents.T.numpy(), strict=True))
        return {**of_latents, **dict(zip(_OF_TARGET, scalars.T.numpy(), strict=True)), "target": target.numpy()}

    def figures(self) -> dict[str, Any]:
        everything = total(self.sums())
        tokens = int(everything["tokens"])
        density = self.fired.cpu().double() / max(tokens, 1)
        alive = density[density > 0].log10().float()
        by_position = (self.position_l0 / self.position_tokens).tolist()
        return {
            "tokens": tokens,
            **plain(_of_latents(everything)),
            **plain(_of_target(everything)),
            "dead_fraction": float((self.fired == 0).double().mean()),
            "density_histogram": torch.histogram(alive, torch.tensor(DENSITY_EDGES)).hist.long().tolist(),
            "l0_by_position": [value if value == value else None for value in by_position],
        }


def _of_latents(s: Sums) -> dict[str, NDArray[np.float64]]:
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is NaN here, and None in what is reported
        return {"l0": s["l0"] / s["tokens"], "l1": s["l1"] / s["tokens"]}


def _of_target(s: Sums) -> dict[str, NDArray[np.float64]]:
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = s["square"] - np.square(s["target"]).sum(-1) / s["tokens"]
        return {
            "mse": s["error"] / s["tokens"],
            "explained_variance": np.where(variance > 0, 1 - s["error"] / variance, np.nan),
            "explained_variance_by_token": s["by_token"] / s["tokens"],
            "cosine": s["cosine"] / s["cosine_tokens"],
            "l2_ratio": s["ratio"] / s["ratio_tokens"],
            "relative_reconstruction_bias": s["square_hat"] / s["dot"],
        }


def _figures(s: Sums) -> dict[str, NDArray[np.float64]]:
    return {**_of_latents(s), **_of_target(s)}


@dataclass(frozen=True)
class Reconstruction:
    """The figures of each side, the intervals of those without special tokens, and what is linear in the error.

    `by_hook` has, where several hooks are predicted, the figures of each without special tokens.
    """

    sides: dict[str, dict[str, Any]]
    by_hook: dict[str, dict[str, Any]]
    intervals: dict[str, list[float] | None]
    dark_matter: dict[str, Any] | None


@torch.inference_mode()
def reconstruct(
    sae: SAE, held_out: HeldOut, *, resamples: int, dark_matter: bool, seed: int, progress: Callable[[int], None]
) -> Reconstruction:  # fmt: skip
    """Pass once over the held-out rows x, with y what is to be predicted (in an SAE x itself) and y_hat the prediction.

    Figures: l0 and l1, latents above zero and sum_i |f_i| a token; mse, ||y - y_hat||^2 summed over d; explained_variance =
    1 - sum||y - y_hat||^2 / sum||y - mean||^2, a ratio of sums; explained_variance_by_token, the mean of tokens' own ratios,
    about the store's mean (SAELens' figure until 6.45); cosine, the mean of cos(y, y_hat) where neither is zero; l2_ratio,
    the mean of ||y_hat|| / ||y||; relative_reconstruction_bias = E||y_hat||^2 / E[y_hat . y] (Rajamanoharan et al. 2024,
    "Improving Dictionary Learning with Gated Sparse Autoencoders", equation 10; below 1 is shrinkage); dead_fraction;
    a histogram of log10 density; l0_by_position, by place in the sequence. Where several hooks are predicted, y is all of them
    side by side, and each by itself in `by_hook`; there `dark_matter` is not taken.
    """
    context, device = held_out.store.context, sae.b_dec.device
    clusters = min(held_out.sequences, _CLUSTERS)
    hooks = held_out.columns if len(held_out.columns) > 1 else {}
    parts = [slice(None), *hooks.values()]
    tallies = {side: _Tally.empty(clusters, sae, parts, context, device) for side in SIDES}
    centre = torch.from_numpy(held_out.mean).to(device).double()
    linear = ErrorRegression(sae.cfg.d_in, sae.cfg.width_out, device) if dark_matter and not hooks else None
    kept = torch.from_numpy(~held_out.special)
    step = max(1, _ROWS // context)
    for start in range(0, held_out.sequences, step):
        stop = min(start + step, held_out.sequences)
        x, y = held_out.read(start, stop)
        x, y = x.to(device), x.to(device) if y is x else y.to(device)
        f, y_hat = sae.reconstruct_sparse(x)
        target, predicted = y.double(), y_hat.double()
        counts = f.row_sum((f.values > 0).float()).double()
        of_latents = torch.stack([torch.ones_like(counts), counts, f.row_sum(f.values.abs()).double()], 1)
        of_target = [_scalars(target[:, part], predicted[:, part], centre[part]) for part in parts]
        cluster = torch.arange(start, stop) * clusters // held_out.sequences
        plain_rows = kept[start:stop].reshape(-1).to(device)
        for side, tally in tallies.items():
            mask = plain_rows if side == "without_special" else torch.ones_like(plain_rows)
            tally.latents.index_add_(0, cluster, _by_sequence(of_latents, mask, context))
            for part, scalars, (into, dimensions) in zip(parts, of_target, tally.targets, strict=True):
                into.index_add_(0, cluster, _by_sequence(scalars, mask, context))
                dimensions.index_add_(0, cluster, _by_sequence(target[:, part], mask, context))
            tally.fired += (f if side == "with_special" else f.keep(mask[f.rows])).latent_counts()
            tally.position_l0 += torch.where(mask, counts, 0).view(-1, context).sum(0)
            tally.position_tokens += mask.view(-1, context).sum(0)
        if linear is not None:
            half = max(held_out.sequences // 2 - start, 0) * context  # rows below it are regressed on, the others tested on
            for number, part in enumerate((slice(0, half), slice(half, None))):
                rows_of = plain_rows[part]
                linear.update(x[part][rows_of], target[part][rows_of], predicted[part][rows_of], number)
        progress((stop - start) * context)
    own = tallies["without_special"]
    return Reconstruction(
        {side: tally.figures() for side, tally in tallies.items()},
        {hook: plain(_of_target(total(own.sums(part)))) for part, hook in enumerate(hooks, 1)},
        intervals(own.sums(), _figures, resamples, seed),
        linear.figures() if linear is not None else None,
    )


def _scalars(y: Tensor, y_hat: Tensor, centre: Tensor) -> Tensor:
    """Return what each token adds, (token, scalar), in the order of `_OF_TARGET`."""
    error, square, square_hat = (y - y_hat).square().sum(1), y.square().sum(1), y_hat.square().sum(1)
    dot, size = (y * y_hat).sum(1), (square * square_hat).sqrt()
    by_token = 1 - error / (y - centre).square().sum(1)
    both, some = size > 0, square > 0
    columns = (
        error, square, dot, square_hat, by_token,
        torch.where(both, dot / size, 0), both, torch.where(some, (square_hat / square).sqrt(), 0), some,
    )  # fmt: skip
    return torch.stack([column.double() for column in columns], 1)


def _by_sequence(values: Tensor, mask: Tensor, context: int) -> Tensor:
    """Sum the rows of (token, n) that `mask` keeps over each sequence, (sequence, n) on the CPU, which adds in a fixed order."""
    return torch.where(mask[:, None], values, 0).view(-1, context, values.shape[1]).sum(1).cpu()
