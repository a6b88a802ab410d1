"""The subject model: a Hugging Face causal language model with its raw weights, and its tokenizer."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from activation_store.config import ModelConfig
from activation_store.errors import InputError, first_line
from activation_store.files import folder_aside


@dataclass(frozen=True)
class Subject:
    """A loaded model. `model` is a plain transformers model (sdpa attention, raw weights, eval mode)."""

    model: Any
    tokenizer: Any
    config: ModelConfig
    revision: str

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    def facts(self) -> dict[str, Any]:
        """Return what a store or an SAE must record to be read rightly later."""
        return {
            "model": self.config.id,
            "model_revision": self.revision,
            "model_dtype": self.config.dtype,
            "basis": "raw",  # no folded layer norms, no centred weights: TransformerBridge without compatibility mode
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
            "special_token_ids": sorted(int(i) for i in self.tokenizer.all_special_ids),
        }


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a short hash of the vocabulary: equal hashes, equal token ids."""
    items = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(items).encode()).hexdigest()[:16]


def pick_device(name: str) -> torch.device:
    """Resolve "auto" to CUDA where there is one (torchrun's LOCAL_RANK says which); InputError for one that does not exist."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = os.environ.get("LOCAL_RANK", "")
        return torch.device("cuda", int(rank) % torch.cuda.device_count()) if rank.isdigit() else torch.device("cuda")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"model.device: {name!r} is not usable here ({first_line(error)}); try auto or cpu") from error


def model_folder(config: ModelConfig) -> str:
    """Return what transformers should load: a hub id or folder as given, a GGUF as the folder it was converted to.

    A GGUF is dequantised once (12 s for 135M parameters, against 0.1 s for the folder) and kept in the cache,
    `$MONOSEM_CACHE` or ~/.cache/monosem, under the hash of the file.
    """
    if not config.id.endswith(".gguf") and config.gguf_file is None:
        return config.id
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path = Path(config.id)
    if config.gguf_file is None:
        if not path.is_file():
            raise InputError(f"model.id: no file {config.id!r}; for the demo model run `make demo` once")
        with open(path, "rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()
        source, name = str(path.parent), path.name
    else:
        key = hashlib.sha256(f"{config.id}@{config.revision}/{config.gguf_file}".encode()).hexdigest()
        source, name = config.id, config.gguf_file
    cache = Path(os.environ.get("MONOSEM_CACHE", Path.home() / ".cache" / "monosem"))
    folder = cache / "gguf" / key[:16]
    if not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name, revision=config.revision)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, revision=config.revision, dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
        if not model.config.architectures:  # a GGUF names none, and TransformerBridge looks there
            model.config.architectures = [type(model).__name__]
        with folder_aside(folder) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    return str(folder)


def load_subject(config: ModelConfig) -> Subject:
    """Load model and tokenizer. Raises InputError, in one line, for what cannot be found or read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = pick_device(config.device)
    dtype = getattr(torch, config.dtype)
    try:
        source = model_folder(config)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision)
        if config.random_weights is not None:
            model = _untrained(source, config.revision, config.random_weights).to(dtype)
            return Subject(model.to(device).eval().requires_grad_(False), tokenizer, config, f"random-{config.random_weights}")
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, revision=config.revision, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        if loading["missing_keys"]:
            names = ", ".join(sorted(loading["missing_keys"])[:3])
            raise InputError(f"model.id: {config.id!r} lacks weights: {names}")
    except InputError:
        raise
    except Exception as error:  # transformers, safetensors and the hub raise many kinds; all mean: cannot load this model
        raise InputError(f"model.id: cannot load {config.id!r} ({first_line(error)})") from error
    model = model.to(device).eval().requires_grad_(False)
    return Subject(model, tokenizer, config, _revision(config, source, model))


def _untrained(source: str, revision: str | None, seed: int) -> Any:
    """Return the model with the weights that its own initialisation draws, float32: equal seeds, equal weights on any device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(source, revision=revision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="sdpa")


def empty_subject_model(config: ModelConfig) -> Any:
    """Build the model without weights (meta device), for hook names, shapes and FLOP counts of models of any size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        source = model_folder(config)
        settings = AutoConfig.from_pretrained(source, revision=config.revision)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, config.dtype)).eval()
    except InputError:
        raise
    except Exception as error:  # as in load_subject
        raise InputError(f"model.id: cannot read the config of {config.id!r} ({first_line(error)})") from error


def _revision(config: ModelConfig, source: str, model: Any) -> str:
    """Return the commit of a hub model, or a hash of the weight files of a local one."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)
    digest = hashlib.sha256()
    for file in sorted(Path(source).glob("*.safetensors")):
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]
