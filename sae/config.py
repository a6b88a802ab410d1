"""What a run says about training and evaluating its SAE."""

from typing import Literal

from pydantic import Field

from activation_store.config import Section


class TrainConfig(Section):
    """How to train one SAE. The defaults follow Anthropic's April 2024 update ("Training Sparse Autoencoders").

    Steps are optimiser steps; `*_fraction` are shares of `steps`; `dead_window_tokens` counts tokens, never steps.
    `sparsity_norm` chooses the penalty: "decoder_norm" is l1_coefficient * sum_i f_i ||W_dec,i|| (April 2024),
    "unit_norm" is l1_coefficient * sum_i f_i with decoder rows held at norm 1 (Bricken et al. 2023).
    `hook` names the hook of the store to train on (default: its first); `d_in` and `model`-side facts come from there.
    `shuffle_mb` is the memory that rows are mixed in (part of what fixes their order); `max_norm_multiple` leaves out rows
    whose norm is above that multiple of the median norm, such as attention sinks.
    """

    architecture: Literal["standard"] = "standard"
    hook: str | None = None
    d_in: int | None = Field(default=None, ge=1)
    d_sae: int = Field(ge=1)
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
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    log_every: int = Field(default=50, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)


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
