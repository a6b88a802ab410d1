"""The training loop. Reads top to bottom; architectures bring their loss, data and checkpoints come from outside."""

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from activation_store.errors import InputError
from activation_store.files import append_json_line, folder_aside, read_json_lines, write_json_lines
from activation_store.progress import Progress
from activation_store.subject import pick_device
from sae.config import TrainConfig
from sae.sae import SAE, TrainingLoss


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
    saved = _last_checkpoint(checkpoints)
    start = int(saved.name.removeprefix("step-")) if saved else 0
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
        sae = _architecture(config).initialise(config, d_in, centre if config.center_inputs else torch.zeros(d_in))
    else:
        sae, scale = _sae_of_checkpoint(saved, config, d_in)
    sae.to(device)
    parameters = dict(sae.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=config.lr, betas=config.adam_betas, fused=True)
    tokens_idle = torch.zeros(config.d_sae, dtype=torch.int64, device=device)  # tokens since each latent last fired
    if saved is not None:
        _restore(saved, parameters, optimizer, tokens_idle)
    log = _MetricsLog(metrics, start, start * config.batch_size)

    for step in range(start, config.steps):
        asked = time.perf_counter()
        x = first if step == start else next(stream)
        log.waited += time.perf_counter() - asked
        x = x.to(device, non_blocking=True) * scale
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate_factor(step, config)
        coefficient = config.l1_coefficient * l1_factor(step, config)

        with torch.autocast(device.type, torch.bfloat16, enabled=config.compute_dtype == "bfloat16"):
            out = sae.training_loss(x, config, coefficient)
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()  # type: ignore[no-untyped-call]
        sae.before_step(config)
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        optimizer.step()
        sae.after_step(config)

        with torch.no_grad():
            fired = (out.latents > 0).any(0)
            tokens_idle = torch.where(fired, 0, tokens_idle + len(x))
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                log.add(step + 1, (step + 1) * config.batch_size, _measure(x, out, tokens_idle, config), {
                    "lr": optimizer.param_groups[0]["lr"], "l1_coefficient": coefficient,
                })  # fmt: skip
        progress((step + 1) * config.batch_size, config.steps * config.batch_size)
        if checkpoints is not None and (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            log.flush()
            _save_checkpoint(checkpoints, step + 1, scale, config, parameters, optimizer, tokens_idle)

    log.flush()
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


def _architecture(config: TrainConfig) -> type[SAE]:
    from sae.architectures import ARCHITECTURES

    return ARCHITECTURES[config.architecture]


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
def _measure(x: Tensor, out: TrainingLoss, tokens_idle: Tensor, config: TrainConfig) -> dict[str, Tensor]:
    """Return the step's figures as scalars on the device; explained variance is 1 - sum||x - x_hat||^2 / sum||x - mean||^2."""
    error = (x - out.reconstruction.float()).square().sum()
    return {
        "loss": out.loss.detach(),
        "mse": out.mse.detach(),
        "l1": out.l1.detach(),
        "l0": (out.latents > 0).float().sum(-1).mean(),
        "explained_variance": 1 - error / (x - x.mean(0)).square().sum(),
        "dead_fraction": (tokens_idle >= config.dead_window_tokens).float().mean(),
    }


class _MetricsLog:
    """Writes each logged step when the next one comes, so that reading its figures never makes the device wait."""

    def __init__(self, path: Path | None, start: int, tokens: int) -> None:
        self.path, self.last = path, dict[str, float | None]()
        self._pending: tuple[int, int, list[str], Tensor, torch.cuda.Event | None, dict[str, float]] | None = None
        self._clock, self._tokens = time.perf_counter(), tokens
        self.waited = 0.0  # seconds since the last logged step that the loop stood still for want of a batch
        if path is not None:  # drop what was logged after the checkpoint that we resume from
            kept = [line for line in read_json_lines(path) if line["step"] <= start]
            write_json_lines(path, kept)

    def add(self, step: int, tokens: int, figures: dict[str, Tensor], facts: dict[str, float]) -> None:
        self.flush()
        now = time.perf_counter()
        rate, waiting = (tokens - self._tokens) / (now - self._clock), self.waited / (now - self._clock)
        self._clock, self._tokens, self.waited = now, tokens, 0.0
        values = torch.stack([value.float() for value in figures.values()])
        host = torch.empty(len(figures), pin_memory=values.is_cuda)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event() if values.is_cuda else None  # type: ignore[no-untyped-call]
        if arrived is not None:
            arrived.record()
        self._pending = (step, tokens, list(figures), host, arrived, {**facts, "tokens_per_second": rate, "waiting": waiting})

    def flush(self) -> None:
        if self._pending is None:
            return
        step, tokens, names, host, arrived, facts = self._pending
        self._pending = None
        if arrived is not None:
            arrived.synchronize()  # long past: it was recorded a whole log ago
        values = dict(zip(names, host.tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss is {values['loss']} at step {step}; lower train.lr or check the activations")
        # explained variance has no value on a batch that does not vary
        self.last = {name: value if math.isfinite(value) else None for name, value in values.items()}
        if self.path is not None:
            append_json_line(self.path, {"step": step, "tokens": tokens, **self.last, **facts})


# Checkpoints: everything that decides the rest of the run; data order is a function of the step


def _last_checkpoint(folder: Path | None) -> Path | None:
    found = sorted(folder.glob("step-*")) if folder is not None and folder.exists() else []
    return found[-1] if found else None


def _save_checkpoint(
    folder: Path, step: int, scale: float, config: TrainConfig, parameters: dict[str, Any],
    optimizer: torch.optim.Optimizer, tokens_idle: Tensor,
) -> None:  # fmt: skip
    tensors = {"tokens_idle": tokens_idle}
    for name, parameter in parameters.items():
        tensors[f"weights.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"adam.{key}.{name}"] = value
    path = folder / f"step-{step:09d}"
    with folder_aside(path) as aside:
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside / "state.safetensors")
        facts = {"step": step, "scale": scale, "config": config.model_dump(mode="json")}
        (aside / "state.json").write_text(json.dumps(facts))
    for other in folder.glob("step-*"):
        if other != path:
            shutil.rmtree(other)


def _sae_of_checkpoint(path: Path, config: TrainConfig, d_in: int) -> tuple[SAE, float]:
    facts = json.loads((path / "state.json").read_text())
    ours = config.model_dump(mode="json")
    theirs = facts["config"]
    changed = [f"{key} {theirs.get(key)!r} -> {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
    if changed:
        raise InputError(f"train: the checkpoint {path} has other settings ({'; '.join(changed)}); delete it to start anew")
    return _architecture(config).initialise(config, d_in, torch.zeros(d_in)), float(facts["scale"])


def _restore(path: Path, parameters: dict[str, Any], optimizer: torch.optim.Optimizer, tokens_idle: Tensor) -> None:
    tensors = load_file(path / "state.safetensors")
    tokens_idle.copy_(tensors["tokens_idle"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weights.{name}"])
            optimizer.state[parameter] = {
                key: tensors[f"adam.{key}.{name}"].to(parameter.device)  # fused Adam keeps its step there too
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
