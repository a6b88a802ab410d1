"""circuit-tracer's transcoders of one layer: a .safetensors file a layer, and config.yaml for all of them.

W_enc (d_sae, d_in) is transposed, W_dec (d_sae, d_out) is not; b_enc, b_dec, perhaps W_skip (d_out, d_in), and
activation_function.threshold (JumpReLU), or k (TopK), or neither (ReLU). Nothing is subtracted from the input. Their own writer
leaves k out, so that what was TopK there reads as ReLU, here as there. Cross-layer transcoders are another format.
"""

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from activation_store.errors import InputError
from sae.formats.content import Container, Content
from sae.formats.weights import Loaded, lack, matrix, number, require, with_b_dec_applied
from sae.sae import SAE, SAEConfig

_NEEDED = ("W_enc", "W_dec", "b_enc", "b_dec")
_THRESHOLD = "activation_function.threshold"


class CircuitTracerFormat:
    """See the module."""

    keeps_facts = False
    container: Container = "safetensors"

    def detect(self, found: Content) -> bool:
        """Say whether W_enc lies transposed, by its shape or, where it is square, by what only this format has."""
        if found.container != "safetensors" or not set(_NEEDED) <= found.shapes.keys() or found.config("d_sae") is not None:
            return False
        d_sae = found.shapes["b_enc"]
        transposed = found.shapes["W_enc"][:1] == d_sae
        square = found.shapes["W_enc"][-1:] == d_sae
        return transposed and (not square or _THRESHOLD in found.shapes or _set_config(found.path) is not None)

    def load(self, found: Content) -> Loaded:
        """Read the tensors; hooks are known where config.yaml and a file called layer_<n> say them."""
        where, weights = found.path, found.tensors()
        if found.config("d_sae") is not None:
            raise InputError(f"{where}: the config beside it speaks of d_sae, as SAELens' does, where W_enc is not transposed")
        require(weights, _NEEDED, where, ("W_skip", "k", _THRESHOLD))
        (d_sae, d_in), (_, d_out) = matrix(weights, "W_enc", where), matrix(weights, "W_dec", where)
        weights["W_enc"] = weights["W_enc"].T
        k = number({"k": weights.pop("k")}, "k", where) if "k" in weights else None
        if _THRESHOLD in weights:
            if k is not None:
                raise InputError(f"{where}: has both k and {_THRESHOLD}; one of them says which latents fire")
            weights["threshold"] = weights.pop(_THRESHOLD).expand(d_sae)
            if bool((weights["threshold"] < 0).any()):
                raise InputError(f"{where}: thresholds below 0 let negative latents through there, which is not supported here")
        config, layer = _set_config(where) or {}, re.search(r"layer_(\d+)", where.stem)
        hooks = [config.get(name) for name in ("feature_input_hook", "feature_output_hook")]
        hook, hook_out = [f"blocks.{layer[1]}.{hook}" if layer and hook else None for hook in hooks]
        known = {"model_name": config.get("model_name"), "scan": config.get("scan")}
        cfg = SAEConfig(
            "jumprelu" if "threshold" in weights else "standard" if k is None else "topk", d_in, d_sae, hook, k=k,
            apply_b_dec_to_input=False, metadata={name: value for name, value in known.items() if value is not None}, d_out=d_out,
            hook_name_out=hook_out, skip="W_skip" in weights,
        )  # fmt: skip
        return Loaded(cfg, weights)

    def lacks(self, sae: SAE) -> str | None:
        """Their loader makes ReLU and JumpReLU; it has one width."""
        return lack(sae, ("standard", "jumprelu"), skip=True, other_width=False)

    def save(self, sae: SAE, folder: Path) -> None:
        """Write layer_<n>.safetensors, n being the layer of the hook, and the config.yaml that a set of them has."""
        import yaml

        weights = with_b_dec_applied(sae, False)
        weights["W_enc"] = weights["W_enc"].T.contiguous()
        if "threshold" in weights:
            weights[_THRESHOLD] = weights.pop("threshold")
        layer = re.search(r"blocks\.(\d+)\.", sae.cfg.hook_name or "")
        save_file(weights, folder / (f"layer_{layer[1]}.safetensors" if layer else "transcoder.safetensors"))
        hooks = [re.sub(r"^blocks\.\d+\.", "", hook) if hook else None for hook in (sae.cfg.hook_name, sae.cfg.hook_name_out)]
        config = {
            "model_name": sae.cfg.metadata.get("model_name"), "model_kind": "transcoder_set", "feature_input_hook": hooks[0],
            "feature_output_hook": hooks[1], "scan": sae.cfg.metadata.get("scan"),
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))


def _set_config(path: Path) -> dict[str, Any] | None:
    """Return config.yaml beside the file, where it is that of a set of transcoders."""
    file = path.with_name("config.yaml")
    if not file.is_file():
        return None
    import yaml

    try:
        config = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not readable YAML ({type(error).__name__})") from error
    return config if isinstance(config, dict) and "feature_input_hook" in config else None
