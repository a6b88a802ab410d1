"""monosem: its own `train` over the peers' batches. training.py runs it, with peers/ on the path.

By hand: `PYTHONPATH=.:benchmarks/peers python benchmarks/run_monosem.py JOB RESULT`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import Job, Meter, run

from sae import TrainConfig, train
from sae.ops import kernels_for

# The compiled loops are code, as the packages are that peers import: they are there before memory and time are counted.
kernels_for("cuda" if torch.cuda.is_available() else "cpu")
L0_EVERY = 10


def check(job: Job) -> None:
    """Ours has all architectures in all precisions; what it cannot train, its config refuses."""


def train_ours(job: Job, meter: Meter) -> tuple[dict[str, Any], float]:
    chosen = job.choose(kernels="auto", dead_window_tokens=10_000_000)
    config = TrainConfig(
        architecture=job.architecture, d_sae=job.d_sae, k=job.k or None, l1_coefficient=max(job.l1_coefficient, 0.0), lr=job.lr,
        steps=job.steps, batch_size=job.batch_size, compute_dtype=job.dtype, seed=job.seed, device=job.device, log_every=L0_EVERY,
        normalize_inputs=False, l1_warmup_fraction=0.05, **chosen,
    )  # fmt: skip
    metrics = Path(sys.argv[2]).with_suffix(".jsonl")
    metrics.unlink(missing_ok=True)
    batches: Iterator[torch.Tensor] = meter.steps(lambda batch: 0.0)
    sae = train(batches, config, metrics=metrics)
    next(batches, None)
    if job.save:
        sae.save(job.save)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    meter.l0, meter.l0_steps = [line["l0"] for line in lines], [line["step"] - 1 for line in lines]
    facts = sae.cfg.metadata["training"]
    return {"kernels": kernels_for(job.device).name, "sparse": [line["sparse"] for line in lines], **chosen}, facts["loss"]


if __name__ == "__main__":
    run("monosem", ("numpy",), check, train_ours)
