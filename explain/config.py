"""What a run says about explaining its features."""

from typing import Literal

from pydantic import Field, NonNegativeInt

from activation_store.config import Section

DECIDES_NOTHING = {"concurrency", "timeout", "checkpoint_seconds", "prices", "max_cost"}
"""Settings of how a run goes, not of what comes out: changing them does not begin it anew."""


class ExplainConfig(Section):
    """Which units to explain, from how many examples, and who proposes and simulates.

    Of a sweep, `sae` names the SAE (default: the first). `latents` and `neurons` are a number (drawn at random, by seed, from
    those that fire in both splits) or a list.
    `scores` says what a description is put to: simulation of every token's activation, scored by correlation; detection and
    fuzzing, yes or no for each window. The first of them decides whether a unit is scored or undefined.
    Neurons are those of `neuron_hook` (default: the SAE's hook), read through an identity dictionary. Examples are windows
    of `window` tokens: proposals see training windows only, scores come from held-out ones only.
    """

    backend: Literal["lookup", "openai", "local"] = "lookup"
    sae: str | None = None
    latents: NonNegativeInt | tuple[NonNegativeInt, ...] = 50
    neurons: NonNegativeInt | tuple[NonNegativeInt, ...] = 0
    neuron_hook: str | None = None
    window: int = Field(default=32, ge=2)
    train_top: int = Field(default=10, ge=1)
    train_sampled: int = Field(default=10, ge=0)
    test_top: int = Field(default=5, ge=1)
    test_sampled: int = Field(default=5, ge=0)
    test_random: int = Field(default=10, ge=0)
    scores: tuple[Literal["simulation", "detection", "fuzzing"], ...] = Field(default=("simulation",), min_length=1)
    shuffled_control: bool = True
    resamples: int = Field(default=1000, ge=0, description="of the bootstrap behind intervals; 0: no intervals")
    checkpoint_seconds: float = Field(default=30.0, gt=0)
    # The local backend: `model` is a hub id, a folder or a .gguf file, run in this process
    local_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    local_device: str = "auto"
    # The openai backend: any OpenAI-compatible chat server; the key comes from OPENAI_API_KEY alone
    model: str = "gpt-4o-mini"
    base_url: str | None = None
    instrument: Literal["auto", "prompt_logprobs", "top_logprobs", "token_by_token", "integers"] = Field(
        default="auto", description="how the openai backend reads a simulation; auto: the best that the server can do"
    )
    concurrency: int = Field(default=8, ge=1)
    timeout: float = Field(default=60.0, gt=0)
    retries: int = Field(default=4, ge=0, description="of a request that failed, and of an answer that cannot be read")
    prices: str | None = Field(default=None, description="YAML of dollars for a million tokens, before explain/prices.yaml")
    max_cost: float | None = Field(default=None, gt=0, description="dollars that requests of this run may cost in all")
    max_answer_tokens: int = Field(default=1024, ge=16)
    response_format: Literal["json_schema", "json_object", "text"] = "json_schema"
