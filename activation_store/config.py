"""What a run says about its subject model, its text and its harvest."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DtypeName = Literal["float32", "bfloat16", "float16", "int8"]


class Section(BaseModel):
    """Base of every config section: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(Section):
    """The subject model: any Hugging Face causal language model.

    `id` is a hub id, a local folder, or a local .gguf file; `gguf_file` names a GGUF inside a hub repository or folder.
    `random_weights`, a seed, takes the model's shape and tokenizer and draws its weights anew, as before any training: what is
    found in such a model was not learnt.
    """

    id: str = Field(min_length=1)
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "auto"
    random_weights: int | None = Field(default=None, ge=0)


class DataConfig(Section):
    """The text: a `datasets` id or a local .jsonl, .parquet or .txt file (or glob), packed into rows of `context` tokens.

    `tokens` counts every token of the store, special tokens and held-out rows included. A document is held out of
    training when a hash of its text falls under `held_out`, so equal texts never stand on both sides. `workers` is how
    many processes tokenise (None: one a core, 4 at most); it changes the time that takes, never the rows.
    """

    source: str = Field(min_length=1)
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"
    streaming: bool = True
    shuffle_buffer: int = Field(default=0, ge=0)
    txt_unit: Literal["line", "paragraph", "document"] = "paragraph"
    context: int = Field(default=128, ge=2)
    tokens: int = Field(default=1_000_000, ge=1)
    held_out: float = Field(default=0.05, gt=0, lt=1)
    prepend_bos: bool = True
    workers: int | None = Field(default=None, ge=1)


class HarvestConfig(Section):
    """Which activations to keep, and how. `shard_mb` is the target size of a chunk file of the widest hook.

    `stream` is for those without the disk: training then draws from the running model, and only a sample is stored,
    `stored_tokens` of the training text and at most as many held-out ones, for evaluation and explanations. With
    `disk_budget_gb` a streamed run keeps that much of its activations on disk and recycles the oldest shards.
    """

    hooks: tuple[str, ...] = Field(min_length=1)
    dtype: DtypeName = "bfloat16"
    batch_size: int = Field(default=16, ge=1, description="token rows a forward pass")
    shard_mb: float = Field(default=32.0, gt=0)
    stream: bool = False
    stored_tokens: int = Field(default=1_000_000, ge=1)
    disk_budget_gb: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _budget_of_a_stream(self) -> "HarvestConfig":
        if self.disk_budget_gb is not None and not self.stream:
            raise ValueError(f"harvest.disk_budget_gb: {self.disk_budget_gb} given; allowed: only with harvest.stream=true")
        return self
