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
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
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


# What an architecture's config and SAETrainer have by default, where a job may want something else.
OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {"l1_warm_up_steps": 0},
    "topk": {"aux_loss_coefficient": 1.0},
    "batchtopk": {"aux_loss_coefficient": 1.0, "topk_threshold_lr": 0.01},
    "jumprelu": {
        "l0_coefficient": 1.0, "l0_warm_up_steps": 0, "jumprelu_bandwidth": 0.05, "jumprelu_init_threshold": 0.01,
        "jumprelu_sparsity_loss_mode": "step", "jumprelu_tanh_scale": 4.0, "jumprelu_ste_to_input": False,
        "pre_act_loss_coefficient": None, "target_l0": None,
    },
}  # fmt: skip
TRAINER = {"lr_warm_up_steps": 0, "lr_decay_steps": 0, "dead_feature_window": 1000}


def make(job: Job, **own: Any) -> Any:
    common: dict[str, Any] = {"d_in": job.d_in, "d_sae": job.d_sae, "device": job.device, "dtype": "float32", **own}
    if job.architecture == "standard":
        return StandardTrainingSAE(StandardTrainingSAEConfig(**common, l1_coefficient=job.l1_coefficient))
    if job.architecture == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=job.k))
    if job.architecture == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common, k=job.k))
    return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common))


def check(job: Job) -> None:
    """SAELens has all four architectures, and autocast to bfloat16 on every device."""


def train(job: Job, meter: Meter) -> tuple[dict[str, Any], float]:
    # Its fastest options, by measurement on a CPU. Sparse activations are "only worthwhile if using float32 and not using
    # autocast" (TopKTrainingSAEConfig), and with rescaling their backward fails (no view of a sparse tensor, torch 2.13);
    # compiling speeds up standard and slows down the others.
    compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    chosen: dict[str, Any] = {"compile_sae": job.architecture == "standard" and compiler, "normalize_activations": "none"}
    if "topk" in job.architecture:
        sparse = job.architecture == "topk" and job.dtype == "float32"
        chosen |= {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": False}
    chosen = job.choose(**chosen, **OPTIONS[job.architecture], **TRAINER)
    sae = make(job, **{name: value for name, value in chosen.items() if name not in ("compile_sae", *TRAINER)})
    if chosen["compile_sae"]:  # as LanguageModelSAETrainingRunner does for its option of that name; the first step pays
        sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="inductor")
    config = SAETrainerConfig(
        total_training_samples=job.steps * job.batch_size, train_batch_size_samples=job.batch_size, lr=job.lr, lr_end=job.lr / 10,
        device=job.device, autocast=job.dtype == "bfloat16", logger=LoggingConfig(log_to_wandb=False),
        **{name: chosen[name] for name in TRAINER},
    )  # fmt: skip

    def l0(batch: torch.Tensor) -> float:
        acts = trainer.last.feature_acts
        return float((acts.coalesce().values() if acts.is_sparse else acts).count_nonzero()) / len(batch)

    steps: Iterator[torch.Tensor] = meter.steps(l0)
    trainer = Watched(cfg=config, sae=sae, data_provider=steps)
    if chosen["normalize_activations"] == "expected_average_only_in":  # from all rows, where it would draw batches for it
        trainer.activation_scaler.scaling_factor = float(job.d_in**0.5 / meter.batches.x.norm(dim=1).mean())
    trainer.fit()
    next(steps, None)
    if job.save:
        sae.save_inference_model(job.save)
    settings = chosen | {
        "trainer": "SAETrainer.fit", "sae": type(sae).__name__, "optimizer": type(trainer.optimizer).__name__,
        "autocast": config.autocast, "lr_scheduler": config.lr_scheduler_name,
        "decoder_init_norm": sae.cfg.decoder_init_norm, "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
    }  # fmt: skip
    return settings, float(trainer.last.loss)


if __name__ == "__main__":
    run("saelens", ("sae-lens", "transformer-lens"), check, train)
