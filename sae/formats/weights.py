"""What all formats do with weights: put them into an SAE, take them out, and say what of an SAE a format has no place for."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from activation_store.errors import InputError
from sae.sae import SAE, SAEConfig


class Loaded(NamedTuple):
    """An SAE as a file has it: its config, and its weights under our names and in our orientation.

    `rescaled` says that latents have another scale than in the file, because the format's own loader gives them that.
    """

    cfg: SAEConfig
    weights: dict[str, Tensor]
    rescaled: bool = False


DTYPES = ("float32", "float16", "bfloat16", "float64")


def assemble(cfg: SAEConfig, weights: dict[str, Tensor], where: Path) -> SAE:
    """Return the SAE of these weights, cast to cfg.dtype.

    Raises InputError where a name or shape is not what `cfg` asks for, where a weight is not finite, and where k is above d_sae.
    """
    from sae.architectures import ARCHITECTURES

    if cfg.architecture not in ARCHITECTURES:
        raise InputError(f"{where}: architecture {cfg.architecture!r}; known: {', '.join(ARCHITECTURES)}")
    if cfg.dtype not in DTYPES:
        raise InputError(f"{where}: dtype {cfg.dtype!r}; allowed: {', '.join(DTYPES)}")
    if cfg.k is not None and cfg.k > cfg.d_sae:
        raise InputError(f"{where}: k is {cfg.k}; there are {cfg.d_sae} latents: at most so many can fire")
    sae = ARCHITECTURES[cfg.architecture](cfg)
    expected = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        raise InputError(f"{where}: tensors {found} do not fit the config, which asks for {expected}")
    sae.load_state_dict(weights)
    for name, value in sae.state_dict().items():
        bad = int((~value.isfinite()).sum())
        if bad:
            cast = bool(weights[name].isfinite().all())
            mend = f"{cfg.dtype} does not reach so far: load it as float32" if cast else "get the file again, whole"
            raise InputError(f"{where}: {name} has {bad} values that are infinite or NaN; {mend}")
    return sae


def weights_of(sae: SAE) -> dict[str, Tensor]:
    """Return an SAE's tensors by name, on the CPU, W_enc (d_in, d_sae) and all others contiguous."""
    return {name: value.detach().cpu().contiguous() for name, value in sae.state_dict().items()}


def with_b_dec_applied(sae: SAE, apply: bool) -> dict[str, Tensor]:
    """Return weights of the same function for a reader that does, or does not, subtract b_dec from its input.

    (x - b_dec) W_enc + b_enc = x W_enc + (b_enc - b_dec W_enc): the encoder's bias takes it up, equal but for rounding. Where
    the SAE does as the reader does, nothing changes at all.
    """
    weights = weights_of(sae)
    if sae.cfg.apply_b_dec_to_input == apply:
        return weights
    shift = (weights["b_dec"].double() @ weights["W_enc"].double()) * (1 if apply else -1)
    scales = {"b_enc": 1.0, "b_gate": 1.0, "b_mag": weights["r_mag"].double().exp() if "r_mag" in weights else 1.0}
    for name, scale in scales.items():
        if name in weights:
            weights[name] = (weights[name].double() + scale * shift).to(weights[name].dtype)
    return weights


def is_transcoder(cfg: SAEConfig) -> bool:
    """Say whether it predicts another hook than the one it reads."""
    return cfg.d_out is not None or cfg.hook_name_out is not None


def lack(sae: SAE, architectures: Collection[str], *, skip: bool, other_width: bool, layer_norm: bool = False) -> str | None:
    """Name what of `sae` a format with these abilities has no place for, or return None."""
    cfg = sae.cfg
    if cfg.architecture not in architectures:
        return f"the architecture {cfg.architecture}"
    if len(cfg.widths) > 1:
        return "several hooks at once"
    if cfg.skip and not skip:
        return "a skip connection"
    if cfg.width_out != cfg.d_in and not other_width:
        return f"an output of another width than the input ({cfg.width_out}, not {cfg.d_in})"
    if cfg.normalize_activations == "layer_norm" and not layer_norm:
        return "a layer norm of the input"
    return None


def number(values: Mapping[str, Any], name: str, where: Path) -> int:
    """Return the positive whole number under `name`, a plain one or a tensor of one. Raises InputError for anything else."""
    value = values.get(name)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = int(value)
    if type(value) is not int or value < 1:
        raise InputError(f"{where}: {name} is {value!r}; a positive whole number is needed")
    return value


def require(found: Mapping[str, Any], names: Collection[str], where: Path, optional: Collection[str] = ()) -> None:
    """Raise InputError unless exactly the tensors `names` are there, and perhaps some `optional` ones."""
    missing, foreign = set(names) - found.keys(), found.keys() - set(names) - set(optional)
    if missing or foreign:
        said = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        said += [f"has {', '.join(sorted(foreign))}, which this format does not know"] if foreign else []
        raise InputError(f"{where}: {' and '.join(said)}")


def matrix(weights: Mapping[str, Tensor], name: str, where: Path) -> tuple[int, int]:
    """Return the shape of the matrix `name`. Raises InputError where it is none."""
    shape = tuple(weights[name].shape)
    if len(shape) != 2:
        raise InputError(f"{where}: {name} has shape {list(shape)}; a matrix is needed")
    return shape[0], shape[1]


def nonnegative(threshold: Tensor, d_sae: int) -> Tensor:
    """Return one threshold a latent, (d_sae,), for ReLU(z) where z > threshold: below zero it lets nothing more through."""
    threshold = threshold.expand(d_sae) if threshold.ndim == 0 else threshold
    return threshold.clamp(min=0)


def threshold_of(weights: dict[str, Tensor]) -> Tensor:
    """Return the thresholds of a JumpReLU SAE, (d_sae,); those of a ReLU are zeros."""
    return weights.get("threshold", torch.zeros_like(weights["b_enc"]))
