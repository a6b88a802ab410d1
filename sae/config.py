"""What a run says about training and evaluating its SAE."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from activation_store.config import Section

Architecture = Literal["standard", "p_anneal", "gated", "topk", "batchtopk", "matryoshka", "jumprelu"]
FIRES_K = ("topk", "batchtopk", "matryoshka")
"""Architectures whose sparsity is a number of latents, not the strength of a penalty."""


OWNERS: dict[str, tuple[str, ...]] = {
    "p_end": ("p_anneal",), "p_start_fraction": ("p_anneal",), "prefixes": ("matryoshka",), "random_prefixes": ("matryoshka",),
    "l0_penalty": ("jumprelu",), "l0_coefficient": ("jumprelu",), "bandwidth": ("jumprelu",), "threshold_init": ("jumprelu",),
    "tanh_scale": ("jumprelu",), "pre_act_coefficient": ("jumprelu",), "threshold_lr": ("batchtopk", "matryoshka"),
    "decoder_rows": FIRES_K,
}  # fmt: skip
"""The settings that some architectures alone have."""


class TrainConfig(Section):
    """How to train one SAE. The defaults follow Anthropic's April 2024 update ("Training Sparse Autoencoders").

    Steps are optimiser steps; `*_fraction` are shares of `steps`; `dead_window_tokens` counts tokens, never steps.

    What is read and predicted: one `hook` (default: the store's first), an SAE; with `hook_out` too, a transcoder from the one
    to the other (`skip_connection` adds a linear map past the latents); several hooks, a crosscoder over them; several and as
    many in `hook_out`, a cross-layer transcoder. `d_in` and `model`-side facts come from there.

    What sets the sparsity: "topk", "batchtopk" and "matryoshka" fire `k` latents a token (Gao et al. 2024, Bussmann et al. 2024,
    2025). Elsewhere a penalty does, with strength `l1_coefficient` ("standard", "p_anneal", "gated") or `l0_coefficient`
    ("jumprelu"); with `target_l0`, it starts at a fifth of that, and a controller moves it until so many latents fire.
    `sparsity_norm`: "decoder_norm" is l1_coefficient * sum_i f_i ||W_dec,i|| (April 2024), "unit_norm" is l1_coefficient *
    sum_i f_i with decoder rows held at norm 1 (Bricken et al. 2023). "gated" always has the latter (Rajamanoharan et al. 2024).
    `decoder_rows` "free" lets the rows of "topk", "batchtopk" and "matryoshka" have any norm, from `decoder_init_norm` on; by
    default theirs are "unit" (Gao et al. 2024).
    "p_anneal" takes f^p, p falling from 1 to `p_end`, from `p_start_fraction` of the steps on (Karvonen et al. 2024).
    "jumprelu" has `l0_penalty` "tanh" (Anthropic, January 2025), "step" or "quadratic" (Rajamanoharan et al. 2024; the latter
    l0_coefficient * (L0 / target_l0 - 1)^2), thresholds that start at `threshold_init`, and gradients to them through a
    kernel `bandwidth` wide, both in units of inputs with E||x|| = sqrt(d_in).
    "matryoshka" adds up the losses of the first `prefixes` latents, or of `random_prefixes` drawn anew for each step.

    Dead latents: `revive` "auxk" has `auxk_k` of them (default: half of d_in) model the residual, with weight
    `auxk_coefficient`; "resample" starts them anew every `resample_every_tokens` (Bricken et al. 2023); "ghost" is ghost
    gradients (Jermyn & Templeton 2024). By default "auxk" where k is set (cross-layer transcoders have none), else "none".

    `compute_dtype` is that of the dense products; weights, moments, losses and everything sparse are float32. With
    float8, for Hopper GPUs, it selects who fires, and other dense products are bfloat16. `kernels` "reference" computes every
    step by plain dense PyTorch. `threshold_lr` is the weight of a batch in BatchTopK's threshold.
    `shuffle_mb` is the memory that rows are mixed in (part of what fixes their order); `max_norm_multiple` leaves out rows
    whose norm is above that multiple of the median norm, such as attention sinks.
    """

    architecture: Architecture = "standard"
    hook: str | tuple[str, ...] | None = None
    hook_out: str | tuple[str, ...] | None = None
    skip_connection: bool = False
    d_in: int | None = Field(default=None, ge=1)
    d_sae: int = Field(ge=1)
    k: int | None = Field(default=None, ge=1)
    target_l0: float | None = Field(default=None, gt=0)
    l1_coefficient: float = Field(default=5.0, ge=0)
    l0_coefficient: float = Field(default=1.0, ge=0)
    sparsity_norm: Literal["decoder_norm", "unit_norm"] = "decoder_norm"
    decoder_rows: Literal["unit", "free"] = "unit"
    p_end: float = Field(default=0.2, gt=0, le=1)
    p_start_fraction: float = Field(default=0.2, ge=0, lt=1)
    l0_penalty: Literal["tanh", "step", "quadratic"] = "tanh"
    tanh_scale: float = Field(default=4.0, gt=0)
    pre_act_coefficient: float = Field(default=3e-6, ge=0)
    bandwidth: float = Field(default=1.0, gt=0)
    threshold_init: float = Field(default=0.1, gt=0)
    prefixes: tuple[int, ...] | None = None
    random_prefixes: int | None = Field(default=None, ge=2)
    lr: float = Field(default=5e-5, gt=0)
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
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
    apply_b_dec_to_input: bool | None = None
    dead_window_tokens: int = Field(default=10_000_000, ge=1)
    revive: Literal["auxk", "resample", "ghost", "none"] | None = None
    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    auxk_k: int | None = Field(default=None, ge=1)
    resample_every_tokens: int = Field(default=100_000_000, ge=1)
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
        kind = self.architecture
        if kind not in FIRES_K:
            if self.k is not None:
                coefficient = "l0_coefficient" if kind == "jumprelu" else "l1_coefficient"
                raise ValueError(f"train.k: {self.k} given, but architecture {kind} has none; set {coefficient} or target_l0")
        elif self.k is None:
            raise ValueError(f"train.k: missing; {kind} fires k latents a token, so give k, such as k: 32")
        elif self.k > self.d_sae:
            raise ValueError(f"train.k: {self.k} given, but there are only d_sae = {self.d_sae} latents")
        elif self.target_l0 is not None:
            raise ValueError(f"train.target_l0: {self.target_l0:g} given, but {kind} fires k = {self.k} latents; leave it out")
        if self.target_l0 is not None and self.target_l0 >= self.d_sae:
            raise ValueError(f"train.target_l0: {self.target_l0:g} given; must be below d_sae = {self.d_sae}")
        if kind == "jumprelu" and self.l0_penalty == "quadratic" and self.target_l0 is None:
            raise ValueError("train.target_l0: missing; the quadratic penalty is the distance from it, so give it, such as 50")
        if kind == "jumprelu" and self.l0_penalty == "step" and self.target_l0 is not None:  # which moves thresholds alone
            raise ValueError("train.target_l0: given, but penalty step answers too slowly to be steered; take tanh or quadratic")
        for field, kinds in OWNERS.items():
            if kind not in kinds and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"train.{field}: given, but only {' and '.join(kinds)} have it, and this is {kind}")
        if self.compute_dtype == "float8" and self.kernels == "reference":
            raise ValueError("train.compute_dtype: float8 given, but kernels: reference has no such products; use bfloat16")
        return self

    @model_validator(mode="after")
    def _prefixes(self) -> "TrainConfig":
        if self.prefixes is not None and self.random_prefixes is not None:
            raise ValueError("train.random_prefixes: given beside prefixes; a step has either the ones or the others")
        for low, high in pairwise((0, *(self.prefixes or ()))):
            if not low < high <= self.d_sae:
                raise ValueError(f"train.prefixes: {list(self.prefixes or ())} given; must rise, and end at d_sae = {self.d_sae}")
        if self.prefixes and self.prefixes[-1] != self.d_sae:
            raise ValueError(f"train.prefixes: the last is {self.prefixes[-1]}; it must be d_sae = {self.d_sae}, all latents")
        return self

    @model_validator(mode="after")
    def _hooks(self) -> "TrainConfig":
        ins, outs = self.hooks, self.hooks_out
        for name, hooks in (("hook", ins), ("hook_out", outs)):
            if len(set(hooks)) < len(hooks):
                raise ValueError(f"train.{name}: {', '.join(hooks)} given; name each hook once")
        if isinstance(self.hook, tuple) and len(ins) < 2:
            raise ValueError(f"train.hook: a list of {len(ins)}; a crosscoder reads two hooks or more, an SAE one name")
        if outs and len(outs) != len(ins):
            raise ValueError(f"train.hook_out: {len(outs)} hooks given for {len(ins)} in train.hook; give one for each")
        if self.skip_connection and not (outs and isinstance(self.hook_out, str)):
            raise ValueError("train.skip_connection: true, but only transcoders have one; give hook_out, or leave it out")
        if len(outs) > 1 and (self.architecture in ("gated", "matryoshka", "p_anneal") or self.revives != "none"):
            raise ValueError(
                f"train.architecture: {self.architecture}, revive: {self.revives}; a cross-layer transcoder takes standard, "
                "topk, batchtopk or jumprelu, with revive: none"
            )
        if self.revives == "resample" and outs:
            raise ValueError("train.revive: resample, which makes decoder rows of inputs; for transcoders take auxk or ghost")
        if self.apply_b_dec_to_input and outs:
            raise ValueError("train.apply_b_dec_to_input: true, but b_dec is of what a transcoder predicts; leave it out")
        return self

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks read, as far as they are named."""
        return (self.hook,) if isinstance(self.hook, str) else self.hook or ()

    @property
    def hooks_out(self) -> tuple[str, ...]:
        """The hooks predicted, where they are others than those read."""
        return (self.hook_out,) if isinstance(self.hook_out, str) else self.hook_out or ()

    @property
    def subtracts_b_dec(self) -> bool:
        """Whether inputs are encoded relative to b_dec: yes unless told otherwise, but never in a transcoder."""
        return not self.hooks_out if self.apply_b_dec_to_input is None else self.apply_b_dec_to_input

    @property
    def unit_norm_decoder(self) -> bool:
        """Whether decoder rows are held at norm 1: never in transcoders, whose decoder starts at zero."""
        always = self.architecture == "gated" or (self.architecture in FIRES_K and self.decoder_rows == "unit")
        return not self.hooks_out and (always or self.sparsity_norm == "unit_norm")

    @property
    def revives(self) -> str:
        """How dead latents are revived."""
        many = len(self.hooks_out) > 1
        return self.revive or ("auxk" if self.architecture in FIRES_K and self.auxk_coefficient > 0 and not many else "none")

    def has(self, field: str) -> bool:
        """Say whether a setting means anything beside the others."""
        if field == "l1_coefficient":
            return self.architecture not in (*FIRES_K, "jumprelu")
        if field == "sparsity_norm":
            return self.architecture in ("standard", "p_anneal")
        if field in ("tanh_scale", "pre_act_coefficient") and self.l0_penalty != "tanh":
            return False
        revived_by = {"auxk_k": "auxk", "auxk_coefficient": "auxk", "resample_every_tokens": "resample"}
        if field in revived_by and self.revives != revived_by[field]:
            return field == "auxk_coefficient" and self.revive is None  # 0 is how AuxK is switched off
        return self.architecture in OWNERS.get(field, (self.architecture,))

    def ignored(self) -> list[str]:
        """Return the settings that differ from their defaults and mean nothing beside the others."""
        fields = type(self).model_fields
        return [name for name in fields if getattr(self, name) != fields[name].default and not self.has(name)]

    @property
    def coefficient(self) -> float:
        """The sparsity penalty's strength, or where a controller starts from."""
        return self.l0_coefficient if self.architecture == "jumprelu" else self.l1_coefficient


class ProbingConfig(Section):
    """Sparse probing on labelled texts, each of `datasets` a .jsonl or .csv file (or .gz, .zst of one) with two such columns.

    At most `texts` of each are drawn, `test_fraction` of them to test on; texts are cut to `context` tokens, and a text's
    tokens are pooled. `k` are the numbers of latents that probes see; the probe of all latents is always there.
    """

    datasets: tuple[str, ...] = Field(min_length=1)
    text_column: str = "text"
    label_column: str = "label"
    k: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 5)
    pooling: Literal["mean", "max"] = "mean"
    texts: int = Field(default=1000, ge=40)
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    context: int = Field(default=128, ge=2)


class AbsorptionConfig(Section):
    """Feature absorption: at most `words` of the vocabulary's words, latents of the largest `k` weights as the main ones."""

    words: int = Field(default=10_000, ge=260)
    k: int = Field(default=10, ge=1)


class EvaluateConfig(Section):
    """How to evaluate on the held-out rows: all of them for reconstruction, `ce_sequences` of them through the model.

    `held_out_hash` names the held-out set that the figures are to be of: another one is refused. Intervals are of `resamples`
    bootstrap samples (0: none). `cluster_cosine` joins latents whose decoder rows are that close; `dark_matter` regresses
    the error on the input, which takes four (d_in, d_in) matrices in float64. `probing` and `absorption` are off by default.
    """

    ce_sequences: int = Field(default=64, ge=1)
    batch_size: int = Field(default=8, ge=1, description="token rows a forward pass")
    held_out_hash: str | None = Field(default=None, pattern="^[0-9a-f]{16}$")
    resamples: int = Field(default=1000, ge=0)
    cluster_cosine: float = Field(default=0.7, gt=0, lt=1)
    dark_matter: bool = True
    probing: ProbingConfig | None = None
    absorption: AbsorptionConfig | bool = False


class SteerConfig(Section):
    """The steering samples of the report: the first `features` explained latents, clamped to `times_max` x their maximum."""

    features: int = Field(default=10, ge=0)
    prompt: str = Field(default="I think that", min_length=1)
    times_max: float = 1.0
    tokens: int = Field(default=24, ge=1)
