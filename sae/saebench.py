"""SAEs as SAEBench takes them: `load(folder)` gives what its `run_eval` functions call `selected_saes`.

    from sae.saebench import load
    sae_bench.evals.core.main.multiple_evals(load("runs/demo"), ...)

SAEBench (0.6) asks of an SAE object: encode, decode and forward on (..., d); W_enc (d_in, d_sae), W_dec (d_sae, d_in) with rows
of norm 1, b_enc, b_dec; device and dtype; and a `cfg` it may write to, with model_name, d_in, d_sae, hook_layer, hook_name,
context_size, dtype, architecture, what SAELens' activation store looks up, and to_dict. It calls decode(encode(x)).
"""

import copy
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from activation_store.errors import InputError
from sae.architectures.gated import GatedSAE
from sae.architectures.linear import LinearSAE
from sae.formats import holds_sae
from sae.formats.content import SUFFIXES
from sae.ops.latents import Above
from sae.sae import SAE

log = logging.getLogger(__name__)

_LAYER = re.compile(r"blocks\.(\d+)\.")


class BenchConfig:
    """The settings SAEBench reads, which it may add to; `to_dict` leaves out what is no plain value."""

    def __init__(self, **values: Any) -> None:
        """Hold the values as attributes."""
        self.__dict__.update(values)

    def to_dict(self) -> dict[str, Any]:
        """Return what can be written as JSON."""
        plain = (str, int, float, bool, type(None), list, dict)
        return {name: value for name, value in vars(self).items() if isinstance(value, plain)}


class BenchSAE(nn.Module):
    """One of our SAEs behind SAEBench's interface. Latents and reconstructions are in the SAE's dtype, whatever x has."""

    def __init__(self, sae: SAE, model_name: str | None = None) -> None:
        """Wrap `sae`; `model_name` is what TransformerLens calls the model, by default what the SAE was trained on.

        Decoder rows are brought to norm 1, in a copy, where that changes no reconstruction. Raises InputError for what SAEBench
        cannot evaluate: transcoders, SAEs that need x to decode, and SAEs that do not know their model or layer.
        """
        super().__init__()
        cfg = sae.cfg
        if cfg.hook_name_out not in (None, cfg.hook_name) or cfg.width_out != cfg.d_in:
            raise InputError("SAEBench evaluates SAEs, which reconstruct what they read; this is a transcoder")
        if cfg.skip or cfg.normalize_activations != "none":
            raise InputError(f"SAEBench decodes without x, which {cfg.normalize_activations} normalisation or a skip needs")
        model = model_name or cfg.metadata.get("model_name")
        layer = _LAYER.search(cfg.hook_name or "")
        if model is None or layer is None:
            field = f"hook_name {cfg.hook_name!r}, which says no layer" if layer is None else "no model_name in its metadata"
            raise InputError(f"the SAE has {field}; SAEBench looks it up (load takes model_name=)")
        if isinstance(sae, GatedSAE):  # which has two biases, where one is looked for
            sae = sae.as_jumprelu()
        norm = sae.W_dec.detach().norm(dim=1)
        off = (norm > 0) & ((norm - 1).abs() > 1e-6)
        if off.any() and isinstance(sae, LinearSAE) and isinstance(sae.rule(), Above):  # the k largest would be others
            sae = copy.deepcopy(sae)
            with torch.no_grad():
                sae.fold_norms(torch.where(off, norm, 1))
        self.sae = sae
        self.cfg = BenchConfig(
            architecture=sae.cfg.architecture, model_name=model, d_in=cfg.d_in, d_sae=cfg.d_sae, hook_name=cfg.hook_name,
            hook_layer=int(layer[1]), hook_head_index=None, context_size=cfg.metadata.get("context_size") or 128,
            dtype=str(sae.W_enc.dtype).removeprefix("torch."), device=str(sae.W_enc.device), k=cfg.k,
            apply_b_dec_to_input=cfg.apply_b_dec_to_input, normalize_activations="none", activation_fn_str="",
            activation_fn_kwargs={}, finetuning_scaling_factor=False, model_from_pretrained_kwargs={},
            prepend_bos=bool(cfg.metadata.get("prepend_bos", True)), dataset_path=str(cfg.metadata.get("dataset_path", "")),
            dataset_trust_remote_code=False, seqpos_slice=(None,), training_tokens=-1, sae_lens_training_version=None,
            neuronpedia_id=None,
        )  # fmt: skip

    @property
    def W_enc(self) -> Tensor:
        """(d_in, d_sae)."""
        return self.sae.W_enc

    @property
    def W_dec(self) -> Tensor:
        """(d_sae, d_in)."""
        return self.sae.W_dec

    @property
    def b_enc(self) -> Tensor:
        """(d_sae)."""
        return self.sae.b_enc

    @property
    def b_dec(self) -> Tensor:
        """(d_in)."""
        return self.sae.b_dec

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.sae.b_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.sae.b_dec.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Return latents: (..., d_in) -> (..., d_sae)."""
        return self.sae.encode(x.to(self.dtype))

    def decode(self, f: Tensor) -> Tensor:
        """Return reconstructions: (..., d_sae) -> (..., d_in)."""
        return self.sae.decode(f.to(self.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of x, (..., d_in)."""
        return self.decode(self.encode(x))


def load(folder: str | Path, device: str | torch.device = "cpu", model_name: str | None = None) -> list[tuple[str, BenchSAE]]:
    """Return [(name, SAE)] of an SAE's folder, of a run, or of everything below a folder; names are paths below it.

    Folders whose files of tensors are no SAE's, such as an optimiser's state, are passed over and logged. Raises InputError where
    there is no SAE, and naming the folder where one is of no use to SAEBench.
    """
    folder = Path(folder)
    found = []
    for path in sorted({file.parent for file in folder.rglob("*") if file.suffix in SUFFIXES}):
        if {"checkpoints", "previous"} & set(path.relative_to(folder).parts):
            continue
        if not holds_sae(path):
            log.warning("%s: passed over; its files of tensors are no SAE's", path)
            continue
        name = "_".join(path.relative_to(folder).parts) or folder.resolve().name
        try:
            found.append((name, BenchSAE(SAE.load(path, device), model_name)))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    if not found:
        raise InputError(f"{folder}: no SAE folder in it")
    return found
