"""dictionary_learning folders (saprmarks): ae.pt, a torch.save'd state, and config.json, whose trainer.dict_class tells what.

Read: AutoEncoder, AutoEncoderNew, GatedAutoEncoder, AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE and
JumpReluAutoEncoder; crosscoders are not. nn.Linear keeps matrices transposed: encoder.weight (d_sae, d_in), decoder.weight
(d_in, d_sae).
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activation_store.errors import InputError
from activation_store.files import write_json
from sae.formats.content import Container, Content
from sae.formats.weights import (
    Loaded,
    is_transcoder,
    lack,
    matrix,
    nonnegative,
    number,
    require,
    threshold_of,
    with_b_dec_applied,
)
from sae.sae import SAE, SAEConfig

_WEIGHTS, _CONFIG = "ae.pt", "config.json"
_TOPK = frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"})
_PLAIN = frozenset({"W_enc", "b_enc", "W_dec", "b_dec", "threshold"})
# the tensors of each class, and those that some versions of it lack
_CLASSES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "AutoEncoder": (frozenset({"bias", "encoder.weight", "encoder.bias", "decoder.weight"}), frozenset()),
    "AutoEncoderNew": (frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}), frozenset()),
    "GatedAutoEncoder": (
        frozenset({"decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"}), frozenset()
    ),
    "AutoEncoderTopK": (_TOPK, frozenset({"k", "threshold"})),
    "BatchTopKSAE": (_TOPK | {"threshold"}, frozenset({"k"})),
    "MatryoshkaBatchTopKSAE": (_PLAIN | {"group_sizes"}, frozenset({"k"})),
    "JumpReluAutoEncoder": (_PLAIN, frozenset()),
}  # fmt: skip
_NAMES = {  # theirs -> ours; .weight is transposed
    "encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc", "decoder.bias": "b_dec", "bias": "b_dec",
    "decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag",
}  # fmt: skip
_ARCHITECTURES = {"GatedAutoEncoder": "gated", "AutoEncoderTopK": "topk", "AutoEncoder": "standard", "AutoEncoderNew": "standard"}
_SUBMODULES = (  # what their scripts call a submodule, and the hook
    (r"resid(?:_post)?_layer_(\d+)", "blocks.{}.hook_resid_post"),
    (r"mlp(?:_out)?_layer_(\d+)", "blocks.{}.hook_mlp_out"),
    (r"attn(?:_out)?_layer_(\d+)", "blocks.{}.hook_attn_out"),
)


class DictionaryLearningFormat:
    """See the module."""

    keeps_facts = False
    container: Container = "torch"

    def detect(self, found: Content) -> bool:
        """Say whether a torch file has the tensors of one of the classes."""
        return found.container == "torch" and not found.values and bool(_fitting(found))

    def load(self, found: Content) -> Loaded:
        """Read the class that config.json names, or the only one whose tensors these are."""
        where, config = found.path, found.config("trainer") or {}
        trainer = config.get("trainer", {})
        if not isinstance(trainer, dict):
            raise InputError(f"{where.with_name(_CONFIG)}: trainer is {trainer!r}; an object with dict_class is needed")
        kind = _class_of(found, trainer)
        theirs = {name: value.float() if value.is_floating_point() else value for name, value in found.tensors().items()}
        require(theirs, _CLASSES[kind][0], where, optional=_CLASSES[kind][1])
        weights = {_NAMES.get(name, name): value.T if name.endswith(".weight") else value for name, value in theirs.items()}
        d_in, d_sae = matrix(weights, "W_enc", where)
        k, threshold = weights.pop("k", None), weights.pop("threshold", None)
        metadata = _metadata(config)
        if kind in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            ks = {number(values, "k", where) for values in ({"k": k}, trainer) if values.get("k") is not None}
            if len(ks) != 1:
                raise InputError(f"{where}: k is {sorted(ks) or 'missing'} in the tensors and config.json; one value is needed")
            metadata["k"] = ks.pop()
        if "group_sizes" in weights:
            metadata["group_sizes"] = weights.pop("group_sizes").tolist()
        architecture = _ARCHITECTURES.get(kind, "jumprelu")
        if architecture == "jumprelu":
            assert threshold is not None
            weights["threshold"] = nonnegative(threshold.to(weights["b_enc"].dtype), d_sae)
        scaled = _of_unit_norm(weights) if kind == "AutoEncoder" else weights
        cfg = SAEConfig(
            architecture, d_in, d_sae, _hook(trainer), apply_b_dec_to_input=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
            k=metadata.pop("k") if kind == "AutoEncoderTopK" else None, metadata={"dict_class": kind, **metadata},
            d_out=d_in if (config.get("buffer") or {}).get("io") == "in_and_out" else None,
        )  # fmt: skip
        return Loaded(cfg, scaled, rescaled=scaled is not weights)

    def lacks(self, sae: SAE) -> str | None:
        """Their classes have one width, no skip connection and no layer norm."""
        return lack(sae, ("standard", "topk", "jumprelu", "gated"), skip=False, other_width=False)

    def save(self, sae: SAE, folder: Path) -> None:
        """Write the state and config of the class that is nearest."""
        kind = _class_for(sae)
        weights = with_b_dec_applied(sae, kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"))
        k = sae.cfg.k or sae.cfg.metadata.get("k")
        if kind == "JumpReluAutoEncoder":
            weights["threshold"] = threshold_of(weights)
        if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
            unset = torch.tensor(-1.0)  # their mark of a threshold that was never measured, and that TopK does not use
            weights["threshold"] = weights["threshold"][0].float() if kind == "BatchTopKSAE" else unset
            weights["k"] = torch.tensor(k, dtype=torch.int32)
        names = {ours: theirs for theirs, ours in _NAMES.items() if theirs in _CLASSES[kind][0]}
        state = {names.get(name, name): value.T if names.get(name, "").endswith(".weight") else value
                 for name, value in weights.items()}  # fmt: skip
        torch.save({name: value.contiguous().clone() for name, value in state.items()}, folder / _WEIGHTS)
        write_json(folder / _CONFIG, _config(sae.cfg, kind, k))


def _fitting(found: Content) -> list[str]:
    names = found.shapes.keys()
    return [kind for kind, (needed, optional) in _CLASSES.items() if needed <= names <= needed | optional]


def _class_of(found: Content, trainer: dict[str, Any]) -> str:
    """Return the class that config.json names, or the one that the tensors can be of."""
    named, fitting = trainer.get("dict_class"), _fitting(found)
    if named is not None:
        if named not in _CLASSES:
            raise InputError(f"{found.path}: dict_class {named!r}; known: {', '.join(_CLASSES)}")
        return str(named)
    if len(fitting) != 1:
        said, fit = ", ".join(sorted(found.shapes)), " and ".join(fitting) or "no class"
        raise InputError(f"{found.path}: the tensors {said} fit {fit}; the config.json whose trainer.dict_class tells them apart "
                         "has to lie beside it")  # fmt: skip
    return fitting[0]


def _class_for(sae: SAE) -> str:
    cfg = sae.cfg
    if cfg.architecture == "standard":
        return "AutoEncoder" if cfg.apply_b_dec_to_input else "AutoEncoderNew"
    if cfg.architecture != "jumprelu":
        return {"topk": "AutoEncoderTopK", "gated": "GatedAutoEncoder"}[cfg.architecture]
    threshold = sae.get_parameter("threshold")
    batch = cfg.apply_b_dec_to_input and cfg.metadata.get("k") is not None and bool((threshold == threshold[0]).all())
    return "BatchTopKSAE" if batch else "JumpReluAutoEncoder"


def _of_unit_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Do as their loader does with an AutoEncoder: bring decoder rows to norm 1, unless they are near it, and latents along."""
    norm = weights["W_dec"].norm(dim=1)
    if torch.allclose(norm, torch.ones_like(norm)):
        return weights
    norm = torch.where(norm > 0, norm, 1)
    scaled = {"W_enc": weights["W_enc"] * norm, "b_enc": weights["b_enc"] * norm, "W_dec": weights["W_dec"] / norm[:, None]}
    return {**weights, **scaled}


def _hook(trainer: dict[str, Any]) -> str | None:
    """Return the hook that trainer.submodule_name means, where it says so; `layer` alone does not tell which of a layer's."""
    for pattern, hook in _SUBMODULES:
        if match := re.fullmatch(pattern, str(trainer.get("submodule_name"))):
            return hook.format(match[1])
    return None


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    trainer, buffer = config.get("trainer", {}), config.get("buffer") or {}
    facts = {
        "model_name": trainer.get("lm_name"), "layer": trainer.get("layer"), "submodule_name": trainer.get("submodule_name"),
        "context_size": buffer.get("ctx_len"),
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value is not None}


def _config(cfg: SAEConfig, kind: str, k: int | None) -> dict[str, Any]:
    """Return what their loaders, and SAELens' of this format, read."""
    layer = re.search(r"blocks\.(\d+)\.", cfg.hook_name or "")
    site = next((name for name in ("resid_post", "mlp_out", "attn_out") if (cfg.hook_name or "").endswith(f"hook_{name}")), None)
    number = int(layer[1]) if layer else None
    trainer = {
        "dict_class": kind, "activation_dim": cfg.d_in, "dict_size": cfg.d_sae, "layer": number,
        "lm_name": cfg.metadata.get("model_name"),
        "submodule_name": f"{site}_layer_{number}" if site and layer else cfg.hook_name,
        **({"k": k} if kind in ("AutoEncoderTopK", "BatchTopKSAE") else {}),
    }  # fmt: skip
    io = "in_and_out" if is_transcoder(cfg) else "out"
    return {"trainer": trainer, "buffer": {"d_submodule": cfg.d_in, "io": io, "ctx_len": cfg.metadata.get("context_size")}}
