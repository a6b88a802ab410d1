"""The training loop. Reads top to bottom; architectures bring their loss, data and checkpoints come from outside."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from activation_store.errors import InputError
from activation_store.progress import Progress
from activation_store.subject import pick_device
from sae.checkpoints import Checkpoint, last_checkpoint, save_checkpoint
from sae.config import TrainConfig
from sae.health import bad_row
from sae.ops import kernels_for
from sae.ops.float8 import in_hardware
from sae.sae import SAE, Site
from sae.stack import Member, Stack, stacks_of
from sae.sweep import require_shared

log = logging.getLogger(__name__)

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
    found = train_sweep(
        batches, {"": config}, mean=mean, mean_norm=mean_norm, checkpoints=checkpoints,
        metrics={} if metrics is None else {"": metrics}, progress=progress,
    )  # fmt: skip
    return found[""]


def train_sweep(
    batches: Iterable[Batch],
    configs: Mapping[str, TrainConfig],
    *,
    mean: Tensor | Sequence[Tensor] | None = None,
    mean_norm: float | Sequence[float] | None = None,
    checkpoints: Path | None = None,
    metrics: Mapping[str, Path] | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, SAE]:
    """Train several SAEs by name in one pass over the batches, each as `train` would by itself on these very batches.

    A batch is a tensor, or one tensor for each of `hooks_of(configs)`. SAEs of equal shape, which differ in no more than
    `sae.stack.FREE`, train as one: their products are batched, and all else takes as many calls as for one. Settings in
    `sae.sweep.SHARED` must be equal. A `seed` decides an SAE's initial weights; the order of the data is that of the batches,
    and the same for all. `metrics` are .jsonl files by name. For all else, and what is raised, see `train`.
    """
    config = next(iter(configs.values()))
    require_shared(configs)
    for name, c in configs.items():
        if c.ignored():
            whose = name or f"{c.architecture} here"
            log.warning("train.%s: given, and of no meaning to %s", ", train.".join(c.ignored()), whose)
    device = pick_device(config.device)
    kernels = kernels_for(device.type, config.kernels == "reference")
    if any(c.compute_dtype == "float8" for c in configs.values()) and (not in_hardware(device) or kernels.name == "reference"):
        raise InputError(f"train.compute_dtype: float8 needs a GPU of compute capability 9.0 or more, and Triton; this is "
                         f"{device} with {kernels.name} kernels; use bfloat16")  # fmt: skip
    saved = last_checkpoint(checkpoints, configs)
    start = saved.step if saved else 0
    stream = _stream(batches, start, config.steps)
    first = _tensors(next(stream))
    found = bad_row(first, batches, start) if mean is None or mean_norm is None else None
    if found is not None:  # it would spoil the scale; later ones are found in the loss
        raise FloatingPointError(f"the activations are not finite: {found}")
    means, norms = _moments(first, mean, mean_norm, drawn=saved is None)
    members = _members(first, configs, means, norms, saved.scales if saved else None)
    stacks = [
        Stack(alike, kernels, device, start, saved.stacks[number] if saved else None, (metrics or {}).get)
        for number, alike in enumerate(stacks_of(members))
    ]
    last = None if saved is None else str(checkpoints)

    for step in range(start, config.steps):
        asked = time.perf_counter()
        tensors = first if step == start else _tensors(next(stream))
        waited = time.perf_counter() - asked
        here = [t.to(device, torch.float32, non_blocking=True) for t in tensors]
        for stack in stacks:
            stack.waited(waited)
            stack.step(here, step)
            if not stack.fine:
                stack.finite.check(step + 1, batches, last)
        progress((step + 1) * config.batch_size, config.steps * config.batch_size)
        if checkpoints is not None and (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            for stack in stacks:
                stack.settle(step + 1, batches, last)
            state = Checkpoint(step + 1, [list(m.scales) for m in members], [stack.state() for stack in stacks])
            last = str(save_checkpoint(checkpoints, state, configs))

    for stack in stacks:
        stack.settle(config.steps, batches, last)
    trained = {name: sae for stack in stacks for name, sae in stack.finished().items()}
    return {name: trained[name] for name in configs}


def hooks_of(configs: Mapping[str, TrainConfig]) -> tuple[str, ...]:
    """Return the hooks that SAEs read and predict, each once: the tensors of a batch of theirs, in order.

    >>> hooks_of({"a": TrainConfig(d_sae=1, steps=1, hook="x", hook_out="y"), "b": TrainConfig(d_sae=1, steps=1, hook="y")})
    ('x', 'y')
    """
    return tuple(dict.fromkeys(hook for c in configs.values() for hook in (*c.hooks, *c.hooks_out)))


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)


def _members(
    first: Sequence[Tensor], configs: Mapping[str, TrainConfig], means: Sequence[Tensor], norms: Sequence[float],
    scales: Sequence[Sequence[float]] | None,
) -> list[Member]:  # fmt: skip
    """Return what each SAE takes of a batch. Raises InputError where the tensors are not what its config reads and predicts."""
    hooks, found = hooks_of(configs), list[Member]()
    for tensor, mean in zip(first, means, strict=False):
        if tensor.dim() != 2 or not tensor.is_floating_point() or len(tensor) != len(first[0]):
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in first)
            raise InputError(f"batches: {shapes} given; give (batch, d_in) of floating-point numbers, equal rows for every hook")
        if mean.shape != tensor.shape[1:]:
            raise InputError(f"mean: {tuple(mean.shape)} given for activations {tensor.shape[1]} wide; give one number a column")
    if len(first) != max(len(hooks), 1):
        raise InputError(f"batches: {len(first)} tensors a batch, but train.hook and train.hook_out name {len(hooks)} hooks")
    for number, (name, config) in enumerate(configs.items()):
        if not config.hooks and len(first) > 1:
            raise InputError(f"train.hook: missing in {name}, and a batch has several hooks; give one of {', '.join(hooks)}")
        columns = tuple(hooks.index(hook) for hook in (*config.hooks, *config.hooks_out)) or (0,)
        widths = tuple(int(first[column].shape[1]) for column in columns)
        read = widths[: len(widths) - len(config.hooks_out)]
        if config.d_in not in (None, sum(read)):
            raise InputError(f"train.d_in: {config.d_in} given, but the activations are {sum(read)} wide")
        site = Site(read, widths[len(read) :])
        if scales is not None:
            own = tuple(scales[number])
        else:
            own = tuple(math.sqrt(len(means[c])) / norms[c] if config.normalize_inputs else 1.0 for c in columns)
        predicted = slice(len(read), None) if site.widths_out else slice(None)  # what is predicted stands behind
        mean = torch.cat([means[c] * s for c, s in zip(columns[predicted], own[predicted], strict=True)])
        found.append(Member(name, config, site, columns, own, mean))
    return found


def _moments(
    first: Sequence[Tensor], mean: Tensor | Sequence[Tensor] | None, mean_norm: float | Sequence[float] | None, drawn: bool
) -> tuple[list[Tensor], list[float]]:
    """Return mean and mean norm of each tensor of a batch, of the first one where they are not given.

    They are looked at closely where they have been `drawn` for the first time: a resumed run has its scales.
    """
    means = [t.float().mean(0) for t in first] if mean is None else [m.float() for m in _tensors(mean)]
    if mean_norm is None:
        norms = [float(t.float().norm(dim=-1).mean()) for t in first]
    else:
        norms = [mean_norm] if isinstance(mean_norm, int | float) else list(mean_norm)
    for norm in norms if drawn else ():
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
