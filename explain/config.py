"""What a run says about explaining its features."""

from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from activation_store.config import Section

Score = Literal["simulation", "detection", "fuzzing", "intruder", "neighbours", "outputs", "intervention"]
DECIDES_NOTHING = {"concurrency", "timeout", "checkpoint_seconds", "prices", "max_cost", "batch", "batch_poll"}
"""Settings of how a run goes, not of what comes out: changing them does not begin it anew."""


class ExplainConfig(Section):
    """Which units to explain, from how many examples, and who proposes and simulates.

    Of a sweep, `sae` names the SAE (default: the first). `latents` and `neurons` are a number (drawn at random, by seed, from
    those that fire in both splits) or a list.
    `scores` says what a description is put to: simulation of every token's activation, scored by correlation; detection and
    fuzzing, yes or no for each window; intruder, neighbours, outputs and intervention, the right one of several texts. The first
    of them decides whether a unit is scored or undefined, and which of several proposals is taken. Neurons are those of
    `neuron_hook` (default: the SAE's hook); `random` directions and `principal` components, of the SAE's hook, are controls, and
    so are latents of an SAE trained alike on the `untrained` model, with random weights. Examples are windows of `window` tokens:
    proposals see training windows only, choices between proposals validation ones, and scores come from held-out ones only.
    Sampled windows are spread over the strengths at which a unit fires. Hard negatives are silent windows in which a neighbour
    fires, or which are similar in meaning (by `embedder`, a sentence-transformers folder) to those in which the unit does.
    """

    backend: Literal["lookup", "openai", "local"] = "lookup"
    sae: str | None = None
    latents: NonNegativeInt | tuple[NonNegativeInt, ...] = 50
    neurons: NonNegativeInt | tuple[NonNegativeInt, ...] = 0
    neuron_hook: str | None = None
    random: NonNegativeInt = 0
    principal: NonNegativeInt = 0
    untrained: NonNegativeInt = 0
    window: int = Field(default=32, ge=2)
    train_top: int = Field(default=10, ge=1)
    train_sampled: int = Field(default=10, ge=0)
    test_top: int = Field(default=5, ge=1)
    test_sampled: int = Field(default=5, ge=0)
    test_random: int = Field(default=10, ge=0)
    train_negatives: int = Field(default=0, ge=0, description="silent windows that the proposer is shown too, the hardest known")
    test_neighbour: int = Field(default=0, ge=0, description="silent windows in which a neighbour by decoder direction fires")
    test_similar: int = Field(default=0, ge=0, description="silent windows near in meaning to those in which it fires")
    embedder: str | None = None
    similar_among: int = Field(default=2000, ge=1, description="random windows, of which the nearest in meaning are taken")
    reservoir: int = Field(default=100, ge=1, description="firing windows kept a latent, from which the sampled ones are taken")
    # Proposing
    show: tuple[Literal["outputs", "negatives"], ...] = Field(default=(), description="to the proposer, beside activations")
    best_of: int = Field(default=1, ge=1, description="proposals, of which the best on validation windows is taken")
    refine: int = Field(default=0, ge=0, description="rounds in which the proposer is shown what its best description got wrong")
    valid_share: float = Field(default=0.1, gt=0, lt=1, description="of training sequences, held back where proposals are chosen")
    clusters: NonNegativeInt = Field(default=0, description="groups of the explained latents, by direction, that get a label too")
    # Scoring
    scores: tuple[Score, ...] = Field(default=("simulation",), min_length=1)
    shuffled_control: bool = True
    resamples: int = Field(default=1000, ge=0, description="of the bootstrap behind intervals; 0: no intervals")
    stop_width: float | None = Field(default=None, gt=0, description="stop simulating where the interval is narrower than this")
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
    batch: bool = Field(default=False, description="send through OpenAI's Batch API: half the price, within a day")
    batch_poll: float = Field(default=30.0, gt=0, description="seconds between questions of whether a batch is done")
    reasoning_effort: str | None = Field(default=None, description="passed on to servers that take it")
    response_format: Literal["json_schema", "json_object", "text"] = "json_schema"

    @property
    def chooses(self) -> bool:
        """Whether proposals are chosen between, for which a part of the training split is held back."""
        return self.best_of > 1 or self.refine > 0

    @property
    def reserved(self) -> float:
        """The share of training sequences that is the valid split."""
        return self.valid_share if self.chooses else 0.0

    @model_validator(mode="after")
    def _fields_agree(self) -> "ExplainConfig":
        if self.test_similar and self.embedder is None:
            raise ValueError("explain.test_similar: needs explain.embedder, the folder of a sentence-transformers model")
        if "negatives" in self.show and not self.train_negatives:
            raise ValueError("explain.show: negatives given, but explain.train_negatives is 0; say how many")
        if self.chooses and self.scores[0] not in ("simulation", "detection", "fuzzing"):
            raise ValueError(
                f"explain.scores: {self.scores[0]} given first; with best_of or refine, simulation, detection or fuzzing must be"
            )
        if "neighbours" in self.scores and self.test_neighbour < 2:
            raise ValueError("explain.scores: neighbours given, but explain.test_neighbour is under 2; say how many")
        if self.backend == "lookup":
            given = [name for name in ("show", "clusters") if getattr(self, name)] + ["best_of / refine"] * self.chooses
            if given:
                raise ValueError(f"explain.{given[0]}: means nothing to explain.backend lookup; take openai or local")
        return self
