"""What a run says about training and evaluating its SAE."""

from typing import Literal

from pydantic import Field, model_validator

from activation_store.config import Section


class TrainConfig(Section):
    """How to train one SAE. The defaults follow Anthropic's April 2024 update ("Training Sparse Autoencoders").

    Steps are optimiser steps; `*_fraction` are shares of `steps`; `dead_window_tokens` counts tokens, never steps.
    `sparsity_norm` chooses the penalty: "decoder_norm" is l1_coefficient * sum_i f_i ||W_dec,i|| (April 2024),
    "unit_norm" is l1_coefficient * sum_i f_i with decoder rows held at norm 1 (Bricken et al. 2023).
    "topk" and "batchtopk" fire `k` latents a token instead (Gao et al. 2024, Bussmann et al. 2024), with decoder rows of norm 1;
    dead latents get the auxiliary loss `auxk_coefficient` * AuxK over `auxk_k` of them (default: half of d_in).
    `compute_dtype` is that of the dense products; weights, moments, losses and everything sparse are float32. With
    float8, for Hopper GPUs, it selects who fires, and other dense products are bfloat16. `kernels` "reference" computes every
    step by plain dense PyTorch. `threshold_lr` is the weight of a batch in BatchTopK's threshold.
    `hook` names the hook of the store to train on (default: its first); `d_in` and `model`-side facts come from there.
    `shuffle_mb` is the memory that rows are mixed in (part of what fixes their order); `max_norm_multiple` leaves out rows
    whose norm is above that multiple of the median norm, such as attention sinks.
    """

    architecture: Literal["standard", "topk", "batchtopk"] = "standard"
    hook: str | None = None
    d_in: int | None = Field(default=None, ge=1)
    d_sae: int = Field(ge=1)
    k: int | None = Field(default=None, ge=1)
    l1_coefficient: float = Field(default=5.0, ge=0)
    sparsity_norm: Literal["decoder_norm", "unit_norm"] = "decoder_norm"
    lr: float = Field(default=5e-5, gt=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    steps: int = Field(ge=1)
    batch_size: int = Field(default=2048, ge=1)
    shuffle_mb: float = Field(default=1024, gt=0)
    max_norm_multiple: float | None = Field(default=None, gt=0)
    lr_warmup_fraction: float = Field(default=0.0, ge=0, le=1)
    lr_decay_fraction: float = Field(default=0.2, ge=0, le=1)
    l1_warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    decoder_init_norm: float = Field(default=0.1, gt=0)
    normalize_inputs: bool = True
    center_inputs: bool = True
    apply_b_dec_to_input: bool = True
    dead_window_tokens: int = Field(default=10_000_000, ge=1)
    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    auxk_k: int | None = Field(default=None, ge=1)
    threshold_lr: float = Field(default=0.01, gt=0, le=1)
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16", "float8"] = "float32"
    kernels: Literal["auto", "reference"] = "auto"
    device: str = "auto"
    log_every: int = Field(default=50, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)

    @model_validator(mode="after")
    def _sparsity(self) -> "TrainConfig":
        """Let each architecture have what sets its sparsity, and nothing that would be ignored."""
        if self.architecture == "standard":
            if self.k is not None:
                raise ValueError(f"train.k: {self.k} given, but architecture standard has none; set l1_coefficient")
        elif self.k is None:
            raise ValueError(f"train.k: missing; {self.architecture} fires k latents a token, so give k, such as k: 32")
        elif self.k > self.d_sae:
            raise ValueError(f"train.k: {self.k} given, but there are only d_sae = {self.d_sae} latents")
        if self.compute_dtype == "float8" and self.kernels == "reference":
            raise ValueError("train.compute_dtype: float8 given, but kernels: reference has no such products; use bfloat16")
        return self

    @property
    def unit_norm_decoder(self) -> bool:
        """Whether decoder rows are held at norm 1."""
        return self.architecture != "standard" or self.sparsity_norm == "unit_norm"


class EvaluateConfig(Section):
    """How to evaluate on the held-out rows: all of them for reconstruction, `ce_sequences` of them through the model."""

    ce_sequences: int = Field(default=64, ge=1)
    batch_size: int = Field(default=8, ge=1, description="token rows a forward pass")


class SteerConfig(Section):
    """The steering samples of the report: the first `features` explained latents, clamped to `times_max` x their maximum."""

    features: int = Field(default=10, ge=0)
    prompt: str = Field(default="I think that", min_length=1)
    times_max: float = 1.0
    tokens: int = Field(default=24, ge=1)
