"""What a run says about its subject model, its text and its harvest."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DtypeName = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Base of every config section: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(Section):
    """The subject model: any Hugging Face causal language model.

    `id` is a hub id, a local folder, or a local .gguf file; `gguf_file` names a GGUF inside a hub repository or folder.
    """

    id: str = Field(min_length=1)
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "auto"


class DataConfig(Section):
    """The text: a `datasets` id or a local .jsonl, .parquet or .txt file (or glob), packed into rows of `context` tokens.

    `tokens` counts every token of the store, special tokens and held-out rows included. A document is held out of
    training when a hash of its text falls under `held_out`, so equal texts never stand on both sides.
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


class HarvestConfig(Section):
    """Which activations to keep, and how. `shard_mb` is the target size of a chunk file of the widest hook."""

    hooks: tuple[str, ...] = Field(min_length=1)
    dtype: DtypeName = "bfloat16"
    batch_size: int = Field(default=16, ge=1, description="token rows a forward pass")
    shard_mb: float = Field(default=32.0, gt=0)
