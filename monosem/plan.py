"""What a run will cost, before anything runs: tokens, disk, memory, FLOPs and an estimate of the time of each stage."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from activation_store.errors import InputError
from activation_store.harvest import disk_bytes, hook_widths
from activation_store.hooks import capture, locate_hooks
from activation_store.subject import empty_subject_model, pick_device
from monosem.config import RunConfig
from sae.config import TrainConfig
from sae.memory import L1_ENTRIES, matrices, training_memory
from sae.sae import Site

if TYPE_CHECKING:
    from monosem.run import Run

_ITEM = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class StagePlan:
    """One stage: tokens it passes over, bytes it leaves on disk, peak bytes of memory, FLOPs, estimated seconds."""

    name: str
    tokens: int
    disk: int
    memory: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """All stages, with the widths of the hooks and the matmul rate (FLOP/s) that the times come from."""

    stages: tuple[StagePlan, ...]
    widths: dict[str, int]
    matmul_rate: float
    parameters: int
    training: dict[str, int]  # bytes that training holds, by item

    @property
    def disk(self) -> int:
        """Bytes on disk, all stages together."""
        return sum(stage.disk for stage in self.stages)


@dataclass(frozen=True)
class _Trained:
    """What training one SAE of a run takes: numbers it has, FLOPs a token of its encoder's product and of a whole step."""

    config: TrainConfig
    site: Site
    d_sae: int
    parameters: int
    encode_flops: float
    step_flops: float

    @classmethod
    def of(cls, own: TrainConfig, config: RunConfig, widths: dict[str, int]) -> "_Trained":
        """Reckon it; raises InputError for a train.d_in that does not fit."""
        hooks = own.hooks or (config.hook,)
        site = Site(tuple(widths[hook] for hook in hooks), tuple(widths[hook] for hook in own.hooks_out))
        if own.d_in not in (None, site.d_in):
            raise InputError(f"train.d_in: {own.d_in} given, but {', '.join(hooks)} of {config.model.id} is {site.d_in} wide")
        encode, active = 2.0 * site.d_in * own.d_sae, own.k or L1_ENTRIES
        step = 6 * encode if own.kernels == "reference" else encode + 10.0 * site.d_in * active
        return cls(own, site, own.d_sae, sum(matrices(own, site)) + own.d_sae + site.d_in, encode, step)


def make_plan(config: RunConfig) -> Plan:
    """Work out the plan from the config and the model's architecture; no weights are loaded.

    Disk is exact up to metadata; FLOPs are counted on a forward pass without weights, and for a training token they are the
    encoder's product, 2 d_in d_sae, and 10 d_in for each active latent (sae/ops). Times divide FLOPs by a measured matrix
    product's rate in the stage's dtype, so they are a floor to be taken with a factor of two; a training step's sparse part
    is bound by memory, and takes about as long as the product.
    Raises InputError for hooks that do not exist and for a train.d_in that does not fit.
    """
    model = empty_subject_model(config.model)
    sites = locate_hooks(model, config.harvest.hooks)
    widths = hook_widths(model, sites, "meta")
    shared, members = config.shared, [_Trained.of(own, config, widths) for own in config.members.values()]
    device = pick_device(config.model.device)
    product = "bfloat16" if shared.compute_dtype == "float8" else shared.compute_dtype  # reckoned with caution
    dtypes: set[str] = {config.model.dtype, product, "float32"}
    rates = {dtype: matmul_rate(dtype, device) for dtype in dtypes}
    context = config.data.context
    sequences = max(config.data.tokens // context, 2)
    rows = sequences * context
    parameters = sum(p.numel() for p in model.parameters())
    model_bytes = parameters * _ITEM[config.model.dtype]

    to_hook = _forward_flops(model, context, lambda tokens: capture(model, sites, tokens))
    mask = torch.zeros((1, 1, context, context), device="meta")
    whole = _forward_flops(model, context, lambda tokens: model(input_ids=tokens, attention_mask=mask, use_cache=False))
    stored = min(rows, 2 * config.harvest.stored_tokens) if config.harvest.stream else rows
    budget = int((config.harvest.disk_budget_gb or 0) * 1e9)
    sae_parameters, train_tokens = sum(own.parameters for own in members), shared.steps * shared.batch_size
    held_out = max(1, round(sequences * config.data.held_out))
    ce_tokens = 5 * min(config.evaluate.ce_sequences, held_out) * context
    examples = config.explain.train_top + config.explain.train_sampled
    chosen = members[list(config.members).index(config.chosen)]
    encode, every_encode = chosen.encode_flops, sum(own.encode_flops for own in members)

    streamed = to_hook * train_tokens if config.harvest.stream else 0.0

    def stage(name: str, tokens: int, disk: int, memory: int, flops: float, dtype: str) -> StagePlan:
        return StagePlan(name, tokens, disk, memory, flops, flops / rates[dtype])

    step_flops = sum(own.step_flops for own in members)
    training: dict[str, int] = {}
    for own in members:
        for item, size in training_memory(own.config, own.site, device.type).items():
            training[item] = training.get(item, 0) + size
    stages = (
        stage("harvest", stored, disk_bytes(widths, config.harvest, stored),
              model_bytes + int(2 * config.harvest.shard_mb * 1e6 * len(widths)), to_hook * stored, config.model.dtype),
        stage("train", train_tokens, sae_parameters * 4 * (1 + 2 * 3) + budget,
              sum(training.values()) + int(shared.shuffle_mb * (1 << 20)) + rows // 8,
              step_flops * train_tokens + streamed, product),
        stage("evaluate", held_out * context + ce_tokens, 1 << 16, model_bytes + sae_parameters * 4,
              whole * (3 + 2 * len(members)) / 5 * ce_tokens + 2 * every_encode * held_out * context, config.model.dtype),
        stage("explain", stored, chosen.d_sae * (68 * 8),
              chosen.parameters * 4 + 4096 * chosen.d_sae * 8 + chosen.d_sae * examples * 2 * 16,
              encode * stored, "float32"),
        stage("report", config.steer.features * config.steer.tokens, 4 << 20, model_bytes + chosen.parameters * 4,
              whole * config.steer.features * config.steer.tokens, config.model.dtype),
    )  # fmt: skip
    return Plan(stages, widths, rates[config.model.dtype], parameters, training)


def _forward_flops(model: torch.nn.Module, context: int, run: object) -> float:
    """Return the FLOPs a token of a forward pass over one row, counted without weights."""
    assert callable(run)
    tokens = torch.zeros((1, context), dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(tokens)
    return float(counter.get_total_flops()) / context


def matmul_rate(dtype: str, device: torch.device, seconds: float = 0.3) -> float:
    """Measure FLOP/s of a (2048, 1024) x (1024, 2048) product."""
    a = torch.randn(2048, 1024, device=device).to(getattr(torch, dtype))
    b = torch.randn(1024, 2048, device=device).to(getattr(torch, dtype))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    a @ b
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
        if count % 8 == 0:
            wait()
    wait()
    return count * 2 * 2048 * 1024 * 2048 / (time.perf_counter() - start)


def free_disk(folder: Path) -> int:
    """Return the bytes free where `folder` is, or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_disk(run: "Run", plan: Plan) -> None:
    """Raise InputError if the run's folder cannot hold what is still to be written."""
    present = sum(file.stat().st_size for file in run.activations.rglob("*") if file.is_file()) if run.activations.exists() else 0
    needed = max(0, plan.disk - present)
    free = free_disk(run.folder)
    if needed > free:
        raise InputError(
            f"runs_dir: {run.config.runs_dir} has {free / 1e9:.2f} GB free, but the run needs {needed / 1e9:.2f} GB; free space, "
            "set runs_dir=..., or lower data.tokens (`monosem plan` shows each stage)"
        )


def human_bytes(count: float) -> str:
    """Return bytes as text.

    >>> human_bytes(1152 * 10**6)
    '1.15 GB'
    """
    power = min(4, int(math.log10(count) // 3)) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def human_seconds(seconds: float) -> str:
    """Return a time as text.

    >>> human_seconds(75), human_seconds(7200)
    ('1.2 min', '2.0 h')
    """
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
