"""Dense or sparse: which of two equal ways a training step is computed, by how much fires."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from sae.adam import Adam
from sae.architectures.auxk import Dead
from sae.config import TrainConfig
from sae.ops import DenseOps, TooDense
from sae.sae import SAE, Moment, TrainingLoss

log = logging.getLogger(__name__)

# Shares of (batch, d_sae): below the first a sparse step is the faster one, above the second a dense one; `training.py
# --scaling` in benchmarks/ measures where they cross. The gap keeps a run whose density hovers there from switching to and fro.
# On CUDA a dense product is so much faster than the gathers that sparse work is made of that they cross far lower; those
# limits are reckoned (790 TFLOP/s against 5 TB/s), not measured.
LIMITS = {
    "cpu": {"float32": (0.20, 0.25), "bfloat16": (0.11, 0.15), "float8": (0.11, 0.15)},
    "cuda": {"float32": (0.03, 0.045), "bfloat16": (0.004, 0.006), "float8": (0.004, 0.006)},
}


# What a part of a batch may take: bytes of one of a dense step's (rows, d_sae) matrices, on a CPU so that it stays in a
# cache, and entries of a sparse step, which are some 64 bytes each.
PART_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}
PART_ENTRIES = {"cpu": 2**17, "cuda": 2**26}


def part_rows(d_sae: int, device_type: str, density: float | None = None) -> int:
    """Return how many rows are taken at a time where a loss allows it: dense, or sparse if a density is given.

    Not fewer than 128 or 256, since for each part all of the weights' gradients are gone through, and a power of two: oneDNN
    keeps a compiled product for every number of rows it has met.
    """
    if density is None:
        rows, least = PART_BYTES.get(device_type, PART_BYTES["cpu"]) / (4 * d_sae), 128
    else:
        rows, least = PART_ENTRIES.get(device_type, PART_ENTRIES["cpu"]) / max(density * d_sae, 1), 256
    return max(least, 1 << int(math.log2(max(rows, 1))))


@dataclass(frozen=True)
class Step:
    """What a step found, (members,) each, on the device; but `density`, the share of (batch, d_sae) that fired.

    `counts` (d_sae,) says on how many rows each latent fired; `error` is the batch's summed squared error.
    """

    loss: Tensor
    mse: Tensor
    l1: Tensor
    error: Tensor
    counts: Tensor
    parts: dict[str, Tensor]
    last: TrainingLoss
    sparse: bool
    density: float = 0.0


class DenseOrSparse:
    """Computes steps dense while the density is above `leave`, sparse once it is below `enter`.

    The choice rests on the density of the step before and on no clock: equal runs choose equally. A step that turns out too
    dense for the sparse way is computed again, dense, before anything was changed.
    """

    def __init__(self, config: TrainConfig, optimizer: Adam, dense: bool | None = None, density: float | None = None) -> None:
        """Start as told (a resumed run), else dense where nothing is known of the density, as in an L1 run; k tells it."""
        self._optimizer = optimizer
        self._reference = optimizer.kernels.name == "reference"  # whose sparse operations are slower than its dense ones
        device = next(iter(optimizer.weights.values())).device.type
        # a dense top-k is a sort: with k, steps are always sparse
        self.enter, self.leave = LIMITS.get(device, LIMITS["cpu"])[config.compute_dtype] if config.k is None else (1.0, 1.0)
        self.dense = config.k is None if dense is None else dense
        self.density = self.leave if density is None else density  # of the last step
        plain = DenseOps(getattr(torch, config.compute_dtype)) if self._reference else None
        self._dense_ops = plain or optimizer.dense_ops()
        self._sparse_ops = optimizer.sparse_ops(room=self.leave)

    def backward(
        self, sae: SAE, x: Tensor, config: TrainConfig, coefficient: Tensor | float, dead: Callable[[], Dead | None], step: int,
        k: tuple[int, ...] = (), aim: Tensor | None = None,
    ) -> Step:  # fmt: skip
        """Compute the loss of x and leave its gradients for the optimiser; see Moment for k, aim and a stack's coefficient."""
        found: Step | None = None
        if x.is_cuda:  # arrays have the length there is room for: what the last step needed and half as much again
            self._sparse_ops.room = min(self.leave, 2 ** (math.ceil(4 * math.log2(1.5 * max(self.density, 1e-9))) / 4))
        if not (self.dense or self._reference):
            try:
                found = self._backward(sae, x, Moment(config, coefficient, self._sparse_ops, dead, step, k, aim))
                entries = self._sparse_ops.entries()  # on CUDA this waits for the selection only; what follows it is queued
            except TooDense:
                self._optimizer.clear()
                found = None
        if found is None:
            found = self._backward(sae, x, Moment(config, coefficient, self._dense_ops, dead, step, k, aim))
            entries = self._dense_ops.entries()
        self.density = entries / max(1, len(x) * sae.cfg.d_sae // sae.members)
        found = replace(found, density=self.density)
        if not self._reference:
            self._choose(found.density, step)
        return found

    def _backward(self, sae: SAE, x: Tensor, now: Moment) -> Step:
        """Backpropagate the loss of x, a few rows at a time where the loss allows it."""
        members, batch = sae.members, len(x) // sae.members
        sparse, size = now.ops is self._sparse_ops, max(1, batch)
        if sae.rowwise(now.config):
            # of a stack on a CPU, as many rows as of one SAE: for each part all weights' gradients are gone through, and that
            # counts for more than a cache that the members' blocks share; on a GPU, what fits its memory
            width = now.config.d_sae * (members if x.is_cuda else 1)
            size = part_rows(width, x.device.type, self.density if sparse else None)
        # what is left joins the last part: by itself, a few rows may be too dense in a batch that is not
        cuts = [*range(0, max(1, batch // size) * size, size), batch]
        if members == 1:
            parts = [x[begin:end] for begin, end in pairwise(cuts)]
        else:
            by_member = x.view(members, batch, -1)
            parts = [by_member[:, begin:end].flatten(0, 1) for begin, end in pairwise(cuts)]
        sums: list[Tensor] = []
        counts, names, out = torch.zeros((), dtype=torch.int64, device=x.device), list[str](), None
        for number, part in enumerate(parts):
            if number > 0:
                self._optimizer.absorb()
            del out  # so that no two parts are there at once
            out = sae.training_loss(part, now)
            share = len(part) / max(1, len(x))
            (out.loss * share if share != 1 else out.loss).sum().backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                counts = counts + out.counts()
                names = list(out.parts)
                scalars = [out.loss, out.mse, out.l1, *out.parts.values()]
                error = out.error.view(members, -1).sum(1)
                sums.append(torch.stack([*(share * s.detach().float().view(-1) for s in scalars), error]))
        assert out is not None
        loss, mse, l1, *others, error = torch.stack(sums).sum(0).unbind()
        return Step(loss, mse, l1, error, counts, dict(zip(names, others, strict=True)), out, sparse)

    def _choose(self, density: float, step: int) -> None:
        dense = density > (self.enter if self.dense else self.leave)
        if dense != self.dense:
            log.info("step %d: %.1f %% of latents fire; steps are %s from here on", step + 1, 100 * density,
                     "dense" if dense else "sparse")  # fmt: skip
        self.dense = dense
