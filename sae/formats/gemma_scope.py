"""Gemma Scope (Lieberum et al. 2024): JumpReLU SAEs and transcoders, whose b_dec is not subtracted from the input.

`gemma_scope` is params.npz: W_enc (d_in, d_sae), W_dec (d_sae, d_out), b_enc, b_dec, threshold, float32. `gemma_scope_2`, for
Gemma 3, is params.safetensors with the same in lower case, perhaps affine_skip_connection (d_in, d_out), and config.json.
Cross-layer ones, whose w_dec has three axes, are refused.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from activation_store.errors import InputError
from activation_store.files import write_json
from sae.formats.content import Container, Content
from sae.formats.weights import Loaded, is_transcoder, lack, matrix, nonnegative, require, threshold_of, with_b_dec_applied
from sae.sae import SAE, SAEConfig

_NEEDED = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_SKIP = "affine_skip_connection"
_SITES = {  # of repositories such as gemma-scope-2b-pt-res
    "res": ("blocks.{}.hook_resid_post", None), "mlp": ("blocks.{}.hook_mlp_out", None), "att": ("blocks.{}.attn.hook_z", None),
    "transcoders": ("blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out"),
}  # fmt: skip
_MODULES = {  # of hf_hook_point_in and _out: model.layers.<n>.<this>
    "output": "hook_resid_post", "self_attn.o_proj.input": "attn.hook_z", "post_feedforward_layernorm.output": "hook_mlp_out",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
}  # fmt: skip


class GemmaScopeFormat:
    """See the module; the arrays of the first release, in an .npz file."""

    keeps_facts = False
    container: Container = "npz"

    def detect(self, found: Content) -> bool:
        """Say whether an .npz file has their arrays; W_enc is written with a capital or without."""
        return found.container == "npz" and set(_NEEDED) <= {_capital(name) for name in found.shapes}

    def load(self, found: Content) -> Loaded:
        """Read the arrays; hooks are known where the path holds the repository's name and the layer."""
        theirs = {_capital(name): value for name, value in found.tensors().items()}
        require(theirs, _NEEDED, found.path)
        site = re.search(r"gemma-scope-\w+-\w+-(res|mlp|att|transcoders)\b", str(found.path))
        layer = re.search(r"/layer_(\d+)/", str(found.path))
        hook, hook_out = _SITES[site[1]] if site and layer else (None, None)
        number = layer[1] if layer else ""
        return _jumprelu(theirs, found.path, hook and hook.format(number), hook_out and hook_out.format(number), {}, False)

    def lacks(self, sae: SAE) -> str | None:
        """JumpReLU, of which ReLU is the one with thresholds of zero."""
        return lack(sae, ("jumprelu", "standard"), skip=False, other_width=True)

    def save(self, sae: SAE, folder: Path) -> None:
        """Write params.npz."""
        arrays: dict[str, Any] = {name: value.float().numpy() for name, value in _theirs(sae).items()}
        np.savez(folder / "params.npz", **arrays)


class GemmaScope2Format:
    """See the module; the tensors of the second release, in a .safetensors file."""

    keeps_facts = False
    container: Container = "safetensors"

    def detect(self, found: Content) -> bool:
        """Say whether a .safetensors file has their lower-case tensors."""
        return found.container == "safetensors" and {_lower(name) for name in _NEEDED} <= found.shapes.keys()

    def load(self, found: Content) -> Loaded:
        """Read tensors, and what config.json says of hooks and model."""
        where, config = found.path, found.config("architecture") or {}
        if config.get("architecture", "jump_relu") != "jump_relu":
            raise InputError(f"{where}: architecture {config['architecture']!r} in config.json; this format has jump_relu only")
        theirs = {_capital(name): value for name, value in found.tensors().items()}
        require(theirs, _NEEDED, where, (_SKIP,))
        if theirs["W_dec"].ndim == 3:
            raise InputError(f"{where}: w_dec {list(theirs['W_dec'].shape)} writes to several layers; cross-layer transcoders "
                             "and crosscoders are not supported")  # fmt: skip
        names = {"hf_hook_point_in": "hf_hook_name", "hf_hook_point_out": "hf_hook_name_out"}
        known = ("model_name", "l0", *names)
        metadata = {names.get(name, name): config[name] for name in known if config.get(name) is not None}
        hook_out = config.get("hf_hook_point_out")
        return _jumprelu(theirs, where, _hook(config.get("hf_hook_point_in")), _hook(hook_out), metadata, hook_out is not None)

    def lacks(self, sae: SAE) -> str | None:
        """As the first release, and skip connections."""
        return lack(sae, ("jumprelu", "standard"), skip=True, other_width=True)

    def save(self, sae: SAE, folder: Path) -> None:
        """Write params.safetensors and config.json."""
        tensors = {_lower(name): value for name, value in _theirs(sae).items()}
        if "W_skip" in tensors:
            tensors[_SKIP] = tensors.pop("W_skip").T.contiguous()
        save_file(tensors, folder / "params.safetensors")
        metadata = sae.cfg.metadata
        config = {
            "architecture": "jump_relu", "model_name": metadata.get("model_name"), "width": sae.cfg.d_sae,
            "l0": metadata.get("l0"), "hf_hook_point_in": metadata.get("hf_hook_name"), "affine_connection": sae.cfg.skip,
        }  # fmt: skip
        if is_transcoder(sae.cfg):
            config["hf_hook_point_out"] = metadata.get("hf_hook_name_out") or "unknown"
        write_json(folder / "config.json", {name: value for name, value in config.items() if value is not None})


def _capital(name: str) -> str:
    return "W_" + name[2:] if name.startswith("w_") else name


def _lower(name: str) -> str:
    return "w_" + name[2:] if name in ("W_enc", "W_dec") else name


def _hook(point: str | None) -> str | None:
    """Return our name of a Hugging Face module's input or output, where it is known."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", point or "")
    return f"blocks.{match[1]}.{_MODULES[match[2]]}" if match and match[2] in _MODULES else None


def _jumprelu(
    theirs: dict[str, Tensor], where: Path, hook: str | None, hook_out: str | None, metadata: dict[str, Any], transcoder: bool
) -> Loaded:
    (d_in, d_sae), (_, d_out) = matrix(theirs, "W_enc", where), matrix(theirs, "W_dec", where)
    weights = {**theirs, "threshold": nonnegative(theirs["threshold"], d_sae)}
    if _SKIP in weights:
        weights["W_skip"] = weights.pop(_SKIP).T
    transcoder = transcoder or hook_out is not None or d_out != d_in or "W_skip" in weights
    cfg = SAEConfig(
        "jumprelu", d_in, d_sae, hook, apply_b_dec_to_input=False, metadata=metadata, d_out=d_out if transcoder else None,
        hook_name_out=hook_out, skip="W_skip" in weights,
    )  # fmt: skip
    return Loaded(cfg, weights)


def _theirs(sae: SAE) -> dict[str, Tensor]:
    weights = with_b_dec_applied(sae, False)
    return {**weights, "threshold": threshold_of(weights)}
