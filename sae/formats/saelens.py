"""SAELens v6 folders: cfg.json + sae_weights.safetensors. Also monosem's own format; what we add sits under `metadata`
and in latents.safetensors (maximum, density and histogram of each latent), which SAELens does not read."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from activation_store.errors import InputError, first_line
from activation_store.files import folder_aside, write_atomic
from sae.sae import SAE, LatentStatistics, SAEConfig

_CONFIG, _WEIGHTS, _LATENTS = "cfg.json", "sae_weights.safetensors", "latents.safetensors"
# SAELens takes a folder without a version for a pre-6 one, reads its config flat, and loses all of `metadata`.
_FORMAT = "6.0.0"
# expected_average_only_in is folded into the weights of every exported SAE, so at inference it changes nothing.
_NO_RUN_TIME_SCALING = ("none", "expected_average_only_in", None, False)


class SAELensFormat:
    """See the module."""

    def detect(self, path: Path) -> bool:
        """Say whether both files are there and the config is v6 (nested: hook_name under `metadata`)."""
        if not (path / _CONFIG).is_file() or not (path / _WEIGHTS).is_file():
            return False
        try:
            cfg = json.loads((path / _CONFIG).read_text())
        except ValueError:
            return False
        return isinstance(cfg, dict) and isinstance(cfg.get("metadata"), dict) and "architecture" in cfg

    def load(self, path: Path) -> SAE:
        """Read weights and config; every shape is checked against the config."""
        from sae.architectures import ARCHITECTURES
        from sae.architectures.jumprelu import JumpReLUSAE
        from sae.architectures.linear import LinearSAE

        cfg: dict[str, Any] = json.loads((path / _CONFIG).read_text())
        if cfg["architecture"] not in ARCHITECTURES:
            raise InputError(f"{path}: architecture {cfg['architecture']!r}; known: {', '.join(ARCHITECTURES)}")
        if cfg.get("normalize_activations") not in _NO_RUN_TIME_SCALING:
            raise InputError(f"{path}: normalize_activations {cfg['normalize_activations']!r} at run time is not supported")
        if cfg.get("reshape_activations", "none") != "none":
            raise InputError(f"{path}: reshape_activations {cfg['reshape_activations']!r} is not supported")
        if cfg["architecture"] == "topk" and not isinstance(cfg.get("k"), int):
            raise InputError(f"{path}: k is {cfg.get('k')!r}; a topk SAE needs a whole number")
        metadata = dict(cfg["metadata"])
        sae = ARCHITECTURES[cfg["architecture"]](
            SAEConfig(
                architecture=cfg["architecture"], d_in=cfg["d_in"], d_sae=cfg["d_sae"], hook_name=metadata.get("hook_name"),
                dtype=str(cfg.get("dtype", "float32")).removeprefix("torch."),
                apply_b_dec_to_input=cfg.get("apply_b_dec_to_input", True), k=cfg.get("k"), metadata=metadata,
            )
        )  # fmt: skip
        try:
            weights = load_file(path / _WEIGHTS)
        except SafetensorError as error:
            raise InputError(f"{path / _WEIGHTS}: not a readable safetensors file ({first_line(error)})") from error
        expected = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in weights.items()}
        if expected != found:
            raise InputError(f"{path}: tensors {found} do not fit the config, which asks for {expected}")
        sae.load_state_dict(weights)
        if isinstance(sae, JumpReLUSAE):  # which fires where z is above both its threshold and 0
            with torch.no_grad():
                sae.threshold.clamp_(min=0)
        if cfg.get("rescale_acts_by_decoder_norm") and isinstance(sae, LinearSAE):
            with torch.no_grad():  # latents are compared after scaling by decoder norms: fold those
                norm = sae.W_dec.norm(dim=1)
                sae.fold_norms(torch.where(norm > 0, norm, 1))
        if (path / _LATENTS).exists():
            side = load_file(path / _LATENTS)
            tokens = int(side.pop("tokens"))
            sae.latents = LatentStatistics(**side, tokens=tokens)
        return sae

    def save(self, sae: SAE, path: Path) -> None:
        """Write the folder, whole or not at all."""
        config = {
            "architecture": sae.cfg.architecture,
            "d_in": sae.cfg.d_in,
            "d_sae": sae.cfg.d_sae,
            "dtype": sae.cfg.dtype,
            "device": "cpu",
            "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"sae_lens_version": _FORMAT, **sae.cfg.metadata, "hook_name": sae.cfg.hook_name},
        }
        if sae.cfg.k is not None:
            config |= {"k": sae.cfg.k, "rescale_acts_by_decoder_norm": False}
        with folder_aside(path) as aside:
            weights = {name: value.detach().cpu().contiguous() for name, value in sae.state_dict().items()}
            save_file(weights, aside / _WEIGHTS)
            (aside / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            if sae.latents is not None:
                (aside / _LATENTS).write_bytes(_latents_payload(sae.latents))


def save_latents(latents: LatentStatistics, path: Path) -> None:
    """Put the latents' statistics beside an SAE already saved at `path`."""
    write_atomic(path / _LATENTS, _latents_payload(latents))


def _latents_payload(latents: LatentStatistics) -> bytes:
    tensors = {name: torch.as_tensor(value).cpu().contiguous() for name, value in vars(latents).items()}
    return save(tensors)
