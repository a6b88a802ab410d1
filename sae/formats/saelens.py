"""SAELens folders: cfg.json + sae_weights.safetensors, of version 6 and, for reading, the flat configs before it.

Also monosem's own format: what we add sits under `metadata`. Architectures that SAELens lacks lie the same way under names of
their own, `topk_transcoder` for instance.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from activation_store.errors import InputError
from sae.formats.beside import save_latents as save_latents
from sae.formats.content import Container, Content, read_config
from sae.formats.weights import Loaded, is_transcoder, nonnegative, number, weights_of, with_b_dec_applied
from sae.sae import SAE, SAEConfig

_CONFIG, _WEIGHTS, _SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
# SAELens takes a folder without a version for a pre-6 one, reads its config flat, and loses all of `metadata`.
_FORMAT = "6.0.0"
# expected_average_only_in is folded into the weights of every exported SAE, so at inference it changes nothing.
_NO_RUN_TIME_SCALING = ("none", "expected_average_only_in", None, False, True)
_THEIR_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_OLD_NAMES = {
    "hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index",
    "activation_fn": "activation_fn_str",
}  # fmt: skip
_OWN_FIELDS = {
    "architecture", "d_in", "d_out", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "k", "rescale_acts_by_decoder_norm", "metadata",
}  # fmt: skip
_OURS = [one.name for one in fields(SAEConfig) if one.name not in {*_OWN_FIELDS, "hook_name", "hook_name_out", "skip"}]


class SAELensFormat:
    """See the module."""

    keeps_facts = True
    container: Container = "safetensors"

    def detect(self, found: Content) -> bool:
        """Say whether a config that speaks of d_sae and a hook lies beside W_dec, or beside nothing (an SAE without weights)."""
        config, names = found.config("d_in", "d_sae"), {name.rpartition(".")[2] for name in found.shapes}
        if found.container != "safetensors" or config is None or (names and "W_dec" not in names):
            return False
        return isinstance(config.get("metadata"), dict) or _is_flat(config)

    def load(self, found: Content) -> Loaded:
        """Read weights and config; `metadata` keeps what is not ours to understand."""
        where, config = found.path.parent, found.config("d_in", "d_sae")
        if config is None:
            raise InputError(f"{where}: no cfg.json with d_in and d_sae lies beside {found.path.name}; a SAELens folder has one")
        if not isinstance(config.get("metadata"), dict):
            config = _nested(config, where)
        _refuse_unfolded(where / _SCALER)
        metadata = dict(config["metadata"])
        architecture, transcoder, skip = _parse(str(config.get("architecture")))
        layer_norm = config.get("normalize_activations") == "layer_norm"
        if not layer_norm and config.get("normalize_activations") not in _NO_RUN_TIME_SCALING:
            raise InputError(f"{where}: normalize_activations {config['normalize_activations']!r} at run time is not supported")
        if layer_norm and transcoder:
            raise InputError(f"{where}: normalize_activations 'layer_norm' of a transcoder: SAELens scales its input and not its "
                             "output, which is not supported")  # fmt: skip
        reshape = config.get("reshape_activations", "none")
        if reshape not in ("none", "hook_z"):
            raise InputError(f"{where}: reshape_activations {reshape!r}; allowed: none, hook_z")
        if reshape == "hook_z":  # heads one after another, which is how activations lie here anyway
            metadata["reshape_activations"] = reshape
        several = {name: tuple(metadata.pop(name)) for name in _OURS if name in metadata}  # hooks and widths of a crosscoder
        cfg = SAEConfig(
            architecture=architecture, d_in=number(config, "d_in", where), d_sae=number(config, "d_sae", where),
            hook_name=metadata.get("hook_name"), dtype=str(config.get("dtype", "float32")).removeprefix("torch."),
            apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
            k=number(config, "k", where) if architecture == "topk" else config.get("k"), metadata=metadata,
            d_out=number(config, "d_out", where) if transcoder else None, hook_name_out=metadata.get("hook_name_out"),
            skip=skip, normalize_activations="layer_norm" if layer_norm else "none", **several,
        )  # fmt: skip
        weights = _without_scaling_factor(found.tensors(), config, where)
        if architecture == "jumprelu" and "threshold" in weights:
            weights["threshold"] = nonnegative(weights["threshold"], cfg.d_sae)
        if config.get("rescale_acts_by_decoder_norm") and {"W_enc", "b_enc", "W_dec"} <= weights.keys():
            norm = weights["W_dec"].float().norm(dim=1)  # latents are compared after scaling by decoder norms: fold those
            norm = torch.where(norm > 0, norm, 1)
            weights |= {"W_enc": weights["W_enc"] * norm, "b_enc": weights["b_enc"] * norm,
                        "W_dec": weights["W_dec"] / norm[:, None]}  # fmt: skip
        return Loaded(cfg, weights)

    def lacks(self, sae: SAE) -> str | None:
        """All that an SAE can be has a place here, but for what SAELens would compute otherwise."""
        if sae.cfg.normalize_activations == "layer_norm" and _is_transcoder(sae.cfg):
            return "a layer norm of a transcoder"
        return None

    def save(self, sae: SAE, folder: Path) -> None:
        """Write config and weights."""
        cfg, metadata = sae.cfg, dict(sae.cfg.metadata)
        name = _name(cfg)
        reshape = metadata.pop("reshape_activations", "none")
        weights = weights_of(sae)
        if name in _THEIR_TRANSCODERS:  # which subtract nothing from their input
            weights = with_b_dec_applied(sae, False)
        config = {
            "architecture": name,
            "d_in": cfg.d_in,
            "d_sae": cfg.d_sae,
            "dtype": cfg.dtype,
            "device": "cpu",
            "apply_b_dec_to_input": cfg.apply_b_dec_to_input and name not in _THEIR_TRANSCODERS,
            "normalize_activations": cfg.normalize_activations,
            "reshape_activations": reshape,
            "metadata": {"sae_lens_version": _FORMAT, **metadata, "hook_name": cfg.hook_name},
        }
        if cfg.hook_name_out is not None:
            config["metadata"]["hook_name_out"] = cfg.hook_name_out
        config["metadata"] |= {name: list(getattr(cfg, name)) for name in _OURS if getattr(cfg, name)}
        if cfg.k is not None:
            config |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
        if _is_transcoder(cfg):
            config["d_out"] = cfg.width_out
        save_file(weights, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _is_transcoder(cfg: SAEConfig) -> bool:
    """Say whether its name here ends in "transcoder", as everything's does that has a width of output or a skip connection."""
    return is_transcoder(cfg) or cfg.skip


def _name(cfg: SAEConfig) -> str:
    """Return the architecture's name, such as jumprelu_skip_transcoder; SAELens leaves a ReLU's "standard" away."""
    if not _is_transcoder(cfg) or cfg.architecture.endswith("transcoder"):
        return cfg.architecture
    base = [] if cfg.architecture == "standard" else [cfg.architecture]
    return "_".join([*base, *(["skip"] if cfg.skip else []), "transcoder"])


def _parse(name: str) -> tuple[str, bool, bool]:
    """Return architecture, whether it is a transcoder, and whether it has a skip connection: `_name` the other way."""
    from sae.architectures import ARCHITECTURES

    base = name.removesuffix("transcoder")
    if base == name or name in ARCHITECTURES:
        return name, base != name, False
    words = base.strip("_").split("_") if base.strip("_") else []
    skip = words[-1:] == ["skip"]
    return "_".join(words[:-1] if skip else words) or "standard", True, skip


def _is_flat(config: dict[str, Any]) -> bool:
    """Say whether a config is one of before version 6, with the hook's name at its top level."""
    return "metadata" not in config and any(key in config for key in ("hook_name", "hook_point", "architecture"))


def _nested(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """Return a flat config as one of version 6."""
    flat = {_OLD_NAMES.get(key, key): value for key, value in config.items()}
    activation, architecture = flat.pop("activation_fn_str", "relu"), flat.get("architecture", "standard")
    options = flat.pop("activation_fn_kwargs", None) or {}
    if activation not in ("relu", "topk") or (activation == "topk" and architecture not in ("standard", "topk")):
        raise InputError(f"{where}: activation_fn_str {activation!r} of a {architecture} SAE is not supported; relu and topk are")
    if activation == "topk" or architecture == "topk":  # it used to be a standard SAE with another activation
        flat |= {"architecture": "topk", "k": flat.get("k", options.get("k"))}
    else:
        flat["architecture"] = architecture
    hook = str(flat.get("hook_name", ""))
    flat.setdefault("reshape_activations", "hook_z" if "hook_z" in hook else "none")
    # a version below 6 would make SAELens read what we save of it as a flat config again
    metadata = {key: value for key, value in flat.items() if key not in _OWN_FIELDS and key != "sae_lens_version"}
    metadata.setdefault("prepend_bos", True)  # as their loader has it
    return {**{key: value for key, value in flat.items() if key in _OWN_FIELDS}, "metadata": metadata}


def _refuse_unfolded(scaler: Path) -> None:
    """Raise InputError for a training checkpoint, whose weights are still without the input scale or whitening in `scaler`."""
    kept = read_config(scaler) or {}
    unfolded = "scale" if kept.get("scaling_factor") is not None else "whitening" if kept.get("has_whitening") else None
    if unfolded is not None:
        raise InputError(f"{scaler}: a training checkpoint of SAELens, whose input {unfolded} is not folded into its weights; "
                         "give the folder that save_inference_model wrote")  # fmt: skip


def _without_scaling_factor(weights: dict[str, Tensor], config: dict[str, Any], where: Path) -> dict[str, Tensor]:
    """Fold the factor that finetuning once left on each latent, (d_sae,), which was taken before decoding only."""
    factor = weights.pop("scaling_factor", None)
    if factor is None or bool((factor == 1).all()):
        return weights
    finetuned = config.get("finetuning_scaling_factor", config["metadata"].get("finetuning_scaling_factor"))
    if not finetuned or "W_dec" not in weights:
        raise InputError(f"{where}: scaling_factor is not 1, but finetuning_scaling_factor is {finetuned!r} in cfg.json; set "
                         "that to true if the factor is to be used")  # fmt: skip
    return {**weights, "W_dec": weights["W_dec"] * factor[:, None]}
