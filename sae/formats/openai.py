"""OpenAI's autoencoders (Gao et al. 2024, `sparse_autoencoder`): a torch.save'd dictionary, ReLU or TopK.

pre_bias (d_in) is b_dec, latent_bias (d_sae), encoder.weight (d_sae, d_in) and decoder.weight (d_in, d_sae) are transposed.
TopK implies a layer norm of each token, ReLU implies none.
"""

from pathlib import Path
from typing import Any

import torch

from activation_store.errors import InputError
from sae.formats.content import Container, Content
from sae.formats.weights import Loaded, lack, matrix, number, require, with_b_dec_applied
from sae.sae import SAE, SAEConfig

_NEEDED = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


class OpenAIFormat:
    """See the module."""

    keeps_facts = False
    container: Container = "torch"

    def detect(self, found: Content) -> bool:
        """Say whether a torch file has pre_bias and latent_bias beside the two matrices."""
        return found.container == "torch" and set(_NEEDED) <= found.shapes.keys()

    def load(self, found: Content) -> Loaded:
        """Read weights, and the activation that lies among them; without one it is ReLU, as in their loader."""
        where, theirs = found.path, found.tensors()
        require(theirs, _NEEDED, where, _STATISTICS)
        activation, state = found.values.get("activation", "ReLU"), found.values.get("activation_state_dict", {})
        if activation not in ("ReLU", "TopK"):
            raise InputError(f"{where}: activation {activation!r}; ReLU and TopK are supported")
        topk = activation == "TopK"
        if topk and state.get("postact_fn", "ReLU") != "ReLU":
            raise InputError(f"{where}: postact_fn {state['postact_fn']!r} lets negative latents through, which is not supported")
        d_sae, d_in = matrix(theirs, "encoder.weight", where)
        cfg = SAEConfig(
            "topk" if topk else "standard", d_in, d_sae, k=number(state, "k", where) if topk else None,
            normalize_activations="layer_norm" if topk else "none",
        )  # fmt: skip
        weights = {"W_enc": theirs["encoder.weight"].T, "b_enc": theirs["latent_bias"], "W_dec": theirs["decoder.weight"].T,
                   "b_dec": theirs["pre_bias"]}  # fmt: skip
        return Loaded(cfg, weights)

    def lacks(self, sae: SAE) -> str | None:
        """ReLU without, and TopK with, a layer norm."""
        missing = lack(sae, ("standard", "topk"), skip=False, other_width=False, layer_norm=sae.cfg.architecture == "topk")
        if missing is None and sae.cfg.architecture == "topk" and sae.cfg.normalize_activations == "none":
            return "a topk without a layer norm of the input"
        return missing

    def save(self, sae: SAE, folder: Path) -> None:
        """Write autoencoder.pt; statistics that were never measured are those of a new autoencoder of theirs."""
        weights, d_sae = with_b_dec_applied(sae, True), sae.cfg.d_sae
        density = torch.ones(d_sae) if sae.latents is None else sae.latents.density.cpu().float()
        state: dict[str, Any] = {
            "pre_bias": weights["b_dec"], "latent_bias": weights["b_enc"],
            "encoder.weight": weights["W_enc"].T, "decoder.weight": weights["W_dec"].T,
            "stats_last_nonzero": torch.zeros(d_sae, dtype=torch.int64),
            "latents_activation_frequency": density, "latents_mean_square": torch.zeros(d_sae),
        }  # fmt: skip
        state = {name: value.contiguous().clone() for name, value in state.items()}
        if sae.cfg.architecture == "topk":
            state |= {"activation": "TopK", "activation_state_dict": {"k": sae.cfg.k, "postact_fn": "ReLU"}}
        else:
            state |= {"activation": "ReLU", "activation_state_dict": {}}
        torch.save(state, folder / "autoencoder.pt")
