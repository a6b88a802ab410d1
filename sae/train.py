"""The training loop. Reads top to bottom; architectures bring their loss, data and checkpoints come from outside."""

import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from activation_store.errors import InputError
from activation_store.progress import Progress
from activation_store.subject import pick_device
from sae.adam import Adam
from sae.architectures import ARCHITECTURES
from sae.architectures.auxk import IdleTokens
from sae.checkpoints import Checkpoint, last_checkpoint, save_checkpoint
from sae.config import TrainConfig
from sae.dense_or_sparse import DenseOrSparse, Step
from sae.metrics import MetricsLog
from sae.ops import kernels_for
from sae.ops.float8 import in_hardware
from sae.sae import SAE


@runtime_checkable
class Seekable(Protocol):
    """Batches that can start anywhere, such as `ActivationStore.batches(...)`."""

    def stream(self, start: int) -> Iterator[Tensor]:
        """Yield batches `start`, `start` + 1, ... without end."""


def train(
    batches: Iterable[Tensor],
    config: TrainConfig,
    *,
    mean: Tensor | None = None,
    mean_norm: float | None = None,
    checkpoints: Path | None = None,
    metrics: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> SAE:
    """Train one SAE on (batch, d_in) tensors of raw activations and return it with all scaling folded in.

    batches: any iterable; one that ends is started over, and `Seekable` ones are drawn from by batch number.
    mean (d_in) and mean_norm = E||x|| of the raw activations set the input scale sqrt(d_in) / E||x|| and the initial
    b_dec; where they are not given, they are taken from the first batch. With `checkpoints` (a folder), training resumes
    from the last one there and ends in the same weights, bit for bit, as if it had never stopped. `metrics` is a
    .jsonl file that gets one object a logged step.

    Raises InputError where config and batches do not fit, where batches run out, or where a checkpoint has another
    config; FloatingPointError, naming the step, when the loss is not finite.
    """
    device = pick_device(config.device)
    kernels = kernels_for(device.type, config.kernels == "reference")
    if config.compute_dtype == "float8" and (not in_hardware(device) or kernels.name == "reference"):
        raise InputError(f"train.compute_dtype: float8 needs a GPU of compute capability 9.0 or more, and Triton; this is "
                         f"{device} with {kernels.name} kernels; use bfloat16")  # fmt: skip
    saved = last_checkpoint(checkpoints, config)
    start = saved.step if saved else 0
    stream = _stream(batches, start, config.steps)
    first = next(stream)
    d_in = int(first.shape[1])
    if config.d_in not in (None, d_in):
        raise InputError(f"train.d_in: {config.d_in} given, but the activations are {d_in} wide")

    if saved is None:
        norm = float(first.norm(dim=1).mean()) if mean_norm is None else mean_norm
        if not math.isfinite(norm) or norm <= 0:
            raise InputError(f"batches: the mean activation norm is {norm}; the activations are empty, zero or not finite")
        scale = math.sqrt(d_in) / norm if config.normalize_inputs else 1.0
        centre = (first.mean(0) if mean is None else mean.float()) * scale
    else:
        scale, centre = saved.scale, torch.zeros(d_in)
    sae = ARCHITECTURES[config.architecture].initialise(config, d_in, centre if config.center_inputs else torch.zeros(d_in))
    if saved is not None:
        sae.load_state_dict(saved.weights)
    sae.to(device)
    optimizer = Adam(
        dict(sae.named_parameters()), sae.encoders(), sae.decoders(), kernels,
        betas=config.adam_betas, max_norm=config.max_grad_norm, unit=config.unit_norm_decoder,
        compute_dtype=config.compute_dtype,
    )  # fmt: skip
    if saved is not None:
        optimizer.restore(saved.adam)
    tokens_idle = torch.zeros(config.d_sae, dtype=torch.int64) if saved is None else saved.tokens_idle
    idle = IdleTokens(tokens_idle.to(device), config.dead_window_tokens)
    way = DenseOrSparse(config, optimizer, saved.dense, saved.density) if saved else DenseOrSparse(config, optimizer)
    log = MetricsLog(metrics, start, start * config.batch_size)

    for step in range(start, config.steps):
        asked = time.perf_counter()
        x = first if step == start else next(stream)
        log.waited += time.perf_counter() - asked
        x = x.to(device, non_blocking=True) * scale
        lr = config.lr * learning_rate_factor(step, config)
        coefficient = config.l1_coefficient * l1_factor(step, config)

        out = way.backward(sae, x, config, coefficient, idle.dead, step)
        optimizer.step(lr)
        sae.after_step(config, out.last)
        idle.update(out.counts, len(x))

        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            facts = {"lr": lr, "l1_coefficient": coefficient, "sparse": float(out.sparse)}
            log.add(step + 1, (step + 1) * config.batch_size, _measure(x, out, idle), facts)
        progress((step + 1) * config.batch_size, config.steps * config.batch_size)
        if checkpoints is not None and (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            log.flush()
            state = Checkpoint(step + 1, scale, way.dense, way.density, sae.state_dict(), optimizer.state(), idle.tokens)
            save_checkpoint(checkpoints, state, config)
        del out  # what it was computed from is not kept while the next step is computed

    log.flush()
    sae = sae.finished()
    sae.fold_scale(scale)
    training = {"steps": config.steps, "tokens": config.steps * config.batch_size, "input_scale": scale, **log.last}
    sae.with_metadata(training=training, train_config=config.model_dump(mode="json"))
    return sae.cpu().eval().requires_grad_(False)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Return the share of config.lr at `step`: linear warm-up from 1/n, flat, linear decay towards 0 at the end.

    >>> c = TrainConfig(d_sae=1, steps=10, lr_warmup_fraction=0.2, lr_decay_fraction=0.2)
    >>> [round(learning_rate_factor(s, c), 2) for s in (0, 1, 2, 7, 8, 9)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]
    """
    warm = max(1, round(config.steps * config.lr_warmup_fraction))
    decay = max(1, round(config.steps * config.lr_decay_fraction))
    return min(1.0, (step + 1) / warm, (config.steps - step) / decay)


def l1_factor(step: int, config: TrainConfig) -> float:
    """Return the share of config.l1_coefficient at `step`: linear warm-up (April 2024 update: over the first 5 %)."""
    return min(1.0, (step + 1) / max(1, round(config.steps * config.l1_warmup_fraction)))


def _stream(batches: Iterable[Tensor], start: int, steps: int) -> Iterator[Tensor]:
    """Yield batches from number `start` on, starting an iterable that ends over again."""
    if isinstance(batches, Seekable):
        yield from batches.stream(start)
        return
    drawn = 0
    while True:
        before = drawn
        for batch in batches:
            if drawn >= start:
                yield batch
            drawn += 1
        if drawn == before:
            raise InputError(f"batches: ended after {drawn} of {steps} steps and cannot be read again; give more of them")


@torch.no_grad()
def _measure(x: Tensor, out: Step, idle: IdleTokens) -> dict[str, Tensor]:
    """Return the step's figures as scalars on the device; explained variance is 1 - sum||x - x_hat||^2 / sum||x - mean||^2."""
    return {
        "loss": out.loss,
        "mse": out.mse,
        "l1": out.l1,
        "l0": out.counts.sum() / max(1, len(x)),
        "explained_variance": 1 - out.error / (x.var(0, correction=0).sum() * len(x)),
        "dead_fraction": (idle.tokens >= idle.window).float().mean(),
        **out.parts,
    }
