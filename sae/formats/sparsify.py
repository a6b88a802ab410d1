"""sparsify folders (EleutherAI): <hookpoint>/sae.safetensors + cfg.json; TopK SAEs and transcoders.

encoder.weight (d_sae, d_in) is transposed, W_dec (d_sae, d_in) is not. b_dec is subtracted from the input unless `transcode`.
"""

import re
from pathlib import Path

from safetensors.torch import save_file

from activation_store.errors import InputError
from activation_store.files import write_json
from sae.formats.content import Container, Content
from sae.formats.weights import Loaded, is_transcoder, lack, matrix, number, require, with_b_dec_applied
from sae.sae import SAE, SAEConfig

_WEIGHTS, _CONFIG = "sae.safetensors", "cfg.json"
_NEEDED, _OPTIONAL = ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), ("W_skip",)


class SparsifyFormat:
    """See the module."""

    keeps_facts = False
    container: Container = "safetensors"

    def detect(self, found: Content) -> bool:
        """Say whether these are their tensors, with encoder.weight beside W_dec, which no other format has."""
        return found.container == "safetensors" and set(_NEEDED) <= found.shapes.keys()

    def load(self, found: Content) -> Loaded:
        """Read weights and config."""
        where, config = found.path.parent, found.config("d_in", "k")
        if config is None:
            raise InputError(f"{where}: no cfg.json with d_in and k lies beside {found.path.name}; a sparsify folder has one")
        if config.get("activation", "topk") != "topk" or config.get("signed"):
            what = "signed latents" if config.get("signed") else f"activation {config['activation']!r}"
            raise InputError(f"{where}: {what} is not supported; topk is")
        theirs = found.tensors()
        require(theirs, _NEEDED, where, _OPTIONAL)
        d_in, transcode = number(config, "d_in", where), bool(config.get("transcode"))
        d_sae = config.get("num_latents") or d_in * number(config, "expansion_factor", where)  # 0 means the other
        if (d_sae, d_in) != matrix(theirs, "encoder.weight", where):
            shape = list(theirs["encoder.weight"].shape)
            raise InputError(f"{where}: encoder.weight {shape} does not fit cfg.json, which asks for {[d_sae, d_in]}")
        hook, hook_out = _hooks(found.path, transcode)
        cfg = SAEConfig(
            "topk", d_in, d_sae, hook, apply_b_dec_to_input=not transcode, k=number(config, "k", where),
            d_out=d_in if transcode else None, hook_name_out=hook_out, skip="W_skip" in theirs,
        )  # fmt: skip
        weights = {"W_enc": theirs.pop("encoder.weight").T, "b_enc": theirs.pop("encoder.bias"), **theirs}
        return Loaded(cfg, weights)

    def lacks(self, sae: SAE) -> str | None:
        """Latents are the k largest of a token, and what goes out is as wide as what comes in."""
        return lack(sae, ("topk",), skip=True, other_width=False)

    def save(self, sae: SAE, folder: Path) -> None:
        """Write weights and config; `folder` should be called after the hook point, as sparsify names them."""
        transcode = is_transcoder(sae.cfg)
        weights = with_b_dec_applied(sae, not transcode)
        weights["encoder.weight"], weights["encoder.bias"] = weights.pop("W_enc").T.contiguous(), weights.pop("b_enc")
        save_file(weights, folder / _WEIGHTS)
        config = {
            "activation": "topk", "expansion_factor": max(1, sae.cfg.d_sae // sae.cfg.d_in), "normalize_decoder": True,
            "num_latents": sae.cfg.d_sae, "k": sae.cfg.k, "multi_topk": False, "skip_connection": sae.cfg.skip,
            "transcode": transcode, "d_in": sae.cfg.d_in,
        }  # fmt: skip
        write_json(folder / _CONFIG, config)


def _hooks(path: Path, transcode: bool) -> tuple[str | None, str | None]:
    """Return the hooks read and predicted, as the folder is called: layers.10 is a block's output, layers.10.mlp its MLP's."""
    parts = [part for part in path.absolute().parent.parts if not re.fullmatch(r"seed\d+", part)]
    name = parts[-1]
    if match := re.fullmatch(r"(?:layers|h)\.(\d+)\.mlp", name):
        block = f"blocks.{match[1]}"
        return (f"{block}.mlp.hook_in", f"{block}.hook_mlp_out") if transcode else (f"{block}.hook_mlp_out", None)
    if transcode:
        return None, None
    if match := re.fullmatch(r"(?:layers|h)\.(\d+)(\.(?:self_attn|attn|attention))?", name):
        return f"blocks.{match[1]}.hook_{'attn_out' if match[2] else 'resid_post'}", None
    return ("hook_embed" if name == "embed_tokens" else None), None
