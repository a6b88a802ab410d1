"""The training loop. Reads top to bottom; architectures bring their loss, data and checkpoints come from outside."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
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
from sae.architectures.cross_layer import CrossLayerTranscoder
from sae.architectures.linear import LinearSAE
from sae.architectures.resample import due, resample
from sae.checkpoints import Checkpoint, last_checkpoint, save_checkpoint
from sae.coefficient import Coefficient
from sae.config import TrainConfig
from sae.dense_or_sparse import DenseOrSparse, Step
from sae.health import Finite
from sae.metrics import MetricsLog
from sae.ops import kernels_for
from sae.ops.float8 import in_hardware
from sae.sae import SAE, Site

Batch = Tensor | Sequence[Tensor]


@runtime_checkable
class Seekable(Protocol):
    """Batches that can start anywhere, such as `ActivationStore.batches(...)`."""

    def stream(self, start: int) -> Iterator[Batch]:
        """Yield batches `start`, `start` + 1, ... without end."""


def train(
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    mean: Tensor | Sequence[Tensor] | None = None,
    mean_norm: float | Sequence[float] | None = None,
    checkpoints: Path | None = None,
    metrics: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> SAE:
    """Train one SAE on (batch, d_in) tensors of raw activations and return it with all scaling folded in.

    batches: any iterable; one that ends is started over, and `Seekable` ones are drawn from by batch number. Where several
    hooks are read or predicted (see TrainConfig), a batch is a sequence of tensors with equal rows, those read first.
    mean (d_in) and mean_norm = E||x|| of the raw activations, one for each tensor of a batch, set the scale sqrt(d) / E||x|| of
    each and the initial b_dec; where they are not given, they are taken from the first batch. With `checkpoints` (a
    folder), training resumes from the last one there and ends in the same weights, bit for bit, as if it had never
    stopped. `metrics` is a .jsonl file that gets one object a logged step.

    Raises InputError where config and batches do not fit, where batches run out, or where a checkpoint has another
    config; FloatingPointError when a loss is not finite, naming step, row and, of a store, shard of what it comes from: what
    was saved before stays. It is looked for every `log_every` steps and before each checkpoint.
    """
    device = pick_device(config.device)
    kernels = kernels_for(device.type, config.kernels == "reference")
    if config.compute_dtype == "float8" and (not in_hardware(device) or kernels.name == "reference"):
        raise InputError(f"train.compute_dtype: float8 needs a GPU of compute capability 9.0 or more, and Triton; this is "
                         f"{device} with {kernels.name} kernels; use bfloat16")  # fmt: skip
    saved = last_checkpoint(checkpoints, config)
    start = saved.step if saved else 0
    stream = _stream(batches, start, config.steps)
    first = _tensors(next(stream))
    site = _site(first, config)
    if saved is None:
        means, norms = _moments(first, mean, mean_norm)
        scales = [math.sqrt(len(m)) / n if config.normalize_inputs else 1.0 for m, n in zip(means, norms, strict=True)]
        read = len(site.widths) if site.widths_out else 0  # what is predicted stands behind
        centre = torch.cat([m * s for m, s in zip(means[read:], scales[read:], strict=True)])
    else:
        scales, centre = saved.scales, torch.zeros(site.d_out or site.d_in)
    kind = CrossLayerTranscoder if len(site.widths_out) > 1 else ARCHITECTURES[config.architecture]
    sae = kind.initialise(config, site, centre if config.center_inputs else torch.zeros_like(centre))
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
    tokens_idle = torch.zeros(sae.cfg.d_sae, dtype=torch.int64) if saved is None else saved.tokens_idle
    idle = IdleTokens(tokens_idle.to(device), config.dead_window_tokens)
    way = DenseOrSparse(config, optimizer, saved.dense, saved.density) if saved else DenseOrSparse(config, optimizer)
    coefficient = Coefficient(config, device, saved.coefficient if saved else None)
    log = MetricsLog(metrics, start, start * config.batch_size)
    finite, resampled = Finite(start, device), 0
    last = None if saved is None else str(checkpoints)

    for step in range(start, config.steps):
        asked = time.perf_counter()
        tensors = first if step == start else _tensors(next(stream))
        log.waited += time.perf_counter() - asked
        scaled = [t.to(device, non_blocking=True) * s for t, s in zip(tensors, scales, strict=True)]
        x = scaled[0] if len(scaled) == 1 else torch.cat(scaled, dim=1)
        lr = config.lr * learning_rate_factor(step, config)
        strength = coefficient.at(step)

        out = way.backward(sae, x, config, strength, idle.dead, step)
        finite.add(out.loss)
        optimizer.step(lr)
        sae.after_step(config, out)
        idle.update(out.counts, len(x))
        coefficient.update(out.counts.sum(), len(x))
        if due(config, step) and isinstance(sae, LinearSAE):
            error = out.last.error  # of the batch's last part
            resampled += resample(sae, optimizer, idle, x[len(x) - len(error) :], error, config, step)

        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            figures = _measure(sae.sides(x)[1], out, idle) | {"coefficient": torch.as_tensor(strength, device=device)}
            facts = {"lr": lr, "sparse": float(out.sparse), **({"resampled": resampled} if resampled else {})}
            log.add(step + 1, (step + 1) * config.batch_size, figures, facts)
            resampled = 0
            if not log.fine:
                finite.check(step + 1, batches, last)
        progress((step + 1) * config.batch_size, config.steps * config.batch_size)
        if checkpoints is not None and (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            log.flush()
            finite.check(step + 1, batches, last)
            state = Checkpoint(step + 1, scales, way.dense, way.density, sae.state_dict(), optimizer.state(), idle.tokens,
                               coefficient.state)  # fmt: skip
            last = str(save_checkpoint(checkpoints, state, config))
        del out  # what it was computed from is not kept while the next step is computed

    log.flush()
    finite.check(config.steps, batches, last)
    sae = sae.finished()
    if len(scales) == 1:
        sae.fold_scale(scales[0])
    else:
        columns = torch.cat([torch.full((t.shape[1],), s) for t, s in zip(first, scales, strict=True)]).to(device)
        sae.fold_scale(columns[: site.d_in], columns[site.d_in :] if site.d_out else None)
    training = {"steps": config.steps, "tokens": config.steps * config.batch_size,
                "input_scale": scales[0] if len(scales) == 1 else scales, **log.last}  # fmt: skip
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


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)


def _site(tensors: Sequence[Tensor], config: TrainConfig) -> Site:
    """Return what the tensors of a batch are. Raises InputError where they are not what the config reads and predicts."""
    widths = tuple(int(t.shape[1]) for t in tensors)
    wanted = max(len(config.hooks), 1) + len(config.hooks_out)
    if len(widths) != wanted and (config.hooks or len(widths) != 1):
        raise InputError(f"batches: {len(widths)} tensors a batch, but train.hook and train.hook_out name {wanted} hooks")
    read = widths[: len(widths) - len(config.hooks_out)]
    if config.d_in not in (None, sum(read)):
        raise InputError(f"train.d_in: {config.d_in} given, but the activations are {sum(read)} wide")
    return Site(read, widths[len(read) :])


def _moments(
    first: Sequence[Tensor], mean: Tensor | Sequence[Tensor] | None, mean_norm: float | Sequence[float] | None
) -> tuple[list[Tensor], list[float]]:
    """Return mean and mean norm of each tensor of a batch, of the first one where they are not given."""
    means = [t.mean(0) for t in first] if mean is None else [m.float() for m in _tensors(mean)]
    if mean_norm is None:
        norms = [float(t.norm(dim=1).mean()) for t in first]
    else:
        norms = [mean_norm] if isinstance(mean_norm, int | float) else list(mean_norm)
    for norm in norms:
        if not math.isfinite(norm) or norm <= 0:
            raise InputError(f"batches: the mean activation norm is {norm}; the activations are empty, zero or not finite")
    return means, norms


def _stream(batches: Iterable[Batch], start: int, steps: int) -> Iterator[Batch]:
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
