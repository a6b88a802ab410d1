"""dictionary_learning: its trainers' own `update`, called as its `trainSAE` calls it.

Run as `.venv-peers/dictionary_learning/bin/python run_dictionary_learning.py JOB RESULT`. For "standard" the trainer is
`StandardTrainerAprilUpdate`: its loss (decoder norms in the penalty, no constraint on them) is the one we train.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from common import Job, Meter, run
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer

TRAINERS = {"standard": StandardTrainerAprilUpdate, "topk": TopKTrainer, "batchtopk": BatchTopKTrainer}


def check(job: Job) -> None:
    if job.architecture not in TRAINERS:
        raise SystemExit(f"job.architecture: {job.architecture!r} is not timed here; {', '.join(TRAINERS)} are")
    if job.save:
        raise SystemExit("job.save: dictionary_learning is timed, and saves nothing here")
    if job.dtype == "bfloat16" and job.device == "cpu":  # training.py, 141: `nullcontext() if device_type == "cpu"`
        raise SystemExit("job.dtype: dictionary_learning autocasts on CUDA alone")


def train(job: Job, meter: Meter) -> tuple[dict[str, Any], float]:
    # Without warm-ups, which must be shorter than the run; the cost of a step does not depend on them. Thresholds are tracked
    # from step 1000 on by default, dead latents revived after ten million tokens: a short run is spared both.
    chosen: dict[str, Any] = {"warmup_steps": 0}
    if job.architecture == "standard":
        chosen |= {"l1_penalty": job.l1_coefficient, "sparsity_warmup_steps": 0} | job.choose()
    else:
        chosen |= {"k": job.k} | job.choose(threshold_start_step=1000, auxk_alpha=1 / 32)
    trainer = TRAINERS[job.architecture](
        steps=job.steps, activation_dim=job.d_in, dict_size=job.d_sae, layer=0, lm_name="", lr=job.lr, seed=job.seed,
        device=job.device, **chosen,
    )  # fmt: skip
    whole_loss, last = trainer.loss, torch.tensor(float("nan"))

    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal last
        found: torch.Tensor = whole_loss(*args, **kwargs)
        last = found.detach()
        return found

    trainer.loss = loss

    @torch.no_grad()
    def l0(batch: torch.Tensor) -> float:
        """Encode once more: `update` keeps no latents, and holding on to them would add to the peak memory."""
        ways = {} if job.architecture == "standard" else {"use_threshold": False}
        return float(trainer.ae.encode(batch, **ways).count_nonzero()) / len(batch)

    dtype = getattr(torch, job.dtype)
    autocast: AbstractContextManager[Any] = torch.autocast("cuda", dtype) if job.dtype == "bfloat16" else nullcontext()
    for step, x in enumerate(meter.steps(l0)):
        x = x.to(dtype=dtype)  # training.py, 200
        with autocast:  # training.py, 236-238
            trainer.update(step, x)
    settings = chosen | {
        "trainer": f"{type(trainer).__name__}.update", "optimizer": type(trainer.optimizer).__name__,
        "autocast": job.dtype == "bfloat16",
        "dead_feature_threshold": getattr(trainer, "dead_feature_threshold", None),
    }  # fmt: skip
    return settings, float(last)


if __name__ == "__main__":
    run("dictionary_learning", ("dictionary-learning", "nnsight"), check, train)
