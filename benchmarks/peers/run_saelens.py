"""SAELens: its own `SAETrainer.fit` over our batches. Run as `.venv-peers/saelens/bin/python run_saelens.py JOB RESULT`."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from common import Job, Meter, run
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer


class Watched(SAETrainer[Any, Any]):
    """Keeps what a step gave. `fit` holds the same object until the next step returns, so this takes no more memory."""

    last: TrainStepOutput

    def _train_step(self, *args: Any, **kwargs: Any) -> TrainStepOutput:
        self.last = super()._train_step(*args, **kwargs)
        return self.last


def make(job: Job, **topk: bool) -> Any:
    common: dict[str, Any] = {"d_in": job.d_in, "d_sae": job.d_sae, "device": job.device, "dtype": "float32"}
    if job.architecture == "standard":
        return StandardTrainingSAE(StandardTrainingSAEConfig(**common, l1_coefficient=job.l1_coefficient))
    if job.architecture == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=job.k, **topk))
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common, k=job.k, **topk))


def check(job: Job) -> None:
    """SAELens has all three architectures, and autocast to bfloat16 on every device."""


def train(job: Job, meter: Meter) -> tuple[dict[str, Any], float]:
    # Its fastest options, by measurement on a CPU. Sparse activations are "only worthwhile if using float32 and not using
    # autocast" (TopKTrainingSAEConfig), and with rescaling their backward fails (no view of a sparse tensor, torch 2.13);
    # compiling speeds up standard and slows down the others.
    compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    fastest = {"compile_sae": job.architecture == "standard" and compiler}
    if job.architecture != "standard":
        sparse = job.architecture == "topk" and job.dtype == "float32"
        fastest |= {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": False}
    chosen = job.choose(**fastest)
    sae = make(job, **{name: on for name, on in chosen.items() if name != "compile_sae"})
    if chosen["compile_sae"]:  # as LanguageModelSAETrainingRunner does for its option of that name; the first step pays
        sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="inductor")
    config = SAETrainerConfig(
        total_training_samples=job.steps * job.batch_size, train_batch_size_samples=job.batch_size, lr=job.lr, lr_end=job.lr / 10,
        device=job.device, autocast=job.dtype == "bfloat16", logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip

    def l0(batch: torch.Tensor) -> float:
        acts = trainer.last.feature_acts
        return float((acts.coalesce().values() if acts.is_sparse else acts).count_nonzero()) / len(batch)

    steps: Iterator[torch.Tensor] = meter.steps(l0)
    trainer = Watched(cfg=config, sae=sae, data_provider=steps)
    trainer.fit()
    next(steps, None)
    settings = chosen | {
        "trainer": "SAETrainer.fit", "sae": type(sae).__name__, "optimizer": type(trainer.optimizer).__name__,
        "autocast": config.autocast, "dead_feature_window": config.dead_feature_window,
        "decoder_init_norm": sae.cfg.decoder_init_norm, "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
    }  # fmt: skip
    return settings, float(trainer.last.loss)


if __name__ == "__main__":
    run("saelens", ("sae-lens", "transformer-lens"), check, train)
