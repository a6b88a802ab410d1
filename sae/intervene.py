"""Steering: run a model with x replaced by x + sum_k delta_k d_k at the SAE's hook.

A clamp sets latent k to c and keeps the SAE's error: decode(f with f_k = c) + (x - decode(f)) is exactly
x + (c - f_k(x)) d_k, because decoding is affine ("Scaling Monosemanticity", Templeton et al. 2024, "Feature steering").
Nothing is ever decoded, and all edits read the latents of the unsteered x, so their order does not matter.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from activation_store.errors import InputError
from activation_store.hooks import HookSite, locate_hooks, on_pass
from sae.sae import SAE

Strength = float | Sequence[float] | Tensor


@dataclass(frozen=True)
class Clamp:
    """Set a latent: to `value`, or to `times_max` times its corpus maximum. Give one number, or one a batch row."""

    latent: int
    value: Strength | None = None
    times_max: Strength | None = None


@dataclass(frozen=True)
class Scale:
    """Multiply a latent by `factor`."""

    latent: int
    factor: Strength


@dataclass(frozen=True)
class Add:
    """Add `strength` times the latent's decoder row, whatever the latent's value is."""

    latent: int
    strength: Strength


@dataclass(frozen=True)
class Ablate:
    """Set a latent to zero: takes its contribution out where it fires, changes nothing where it does not."""

    latent: int


Edit = Clamp | Scale | Add | Ablate


@dataclass
class Intervention:
    """What `intervene` yields: how often the model ran and how often the hook changed it."""

    forwards: int = 0
    passes: int = 0


def corpus_max(sae: SAE, latent: int) -> float:
    """Return the latent's maximum over the corpus. Raises InputError where it was never measured or is not positive."""
    if sae.latents is None:
        raise InputError(
            "times_max needs the SAE's corpus maxima, which are not with it; run `monosem explain` or "
            "sae.statistics.latent_statistics first, or give value instead"
        )
    top = float(sae.latents.max_activation[latent])
    if top <= 0:
        raise InputError(f"latent {latent} never fired on the corpus, so no multiple of its maximum exists; give value instead")
    return top


def steerable(sae: SAE) -> bool:
    """Say whether latents are read where their directions are written: not so in transcoders, nor at one hook in crosscoders."""
    cfg = sae.cfg
    return cfg.d_out is None and cfg.hook_name_out in (None, cfg.hook_name) and not cfg.hook_names


def _targets(sae: SAE, edit: Edit) -> tuple[Strength, Literal["set", "scale", "add"]]:
    match edit:
        case Clamp(latent, None, times) if times is not None:
            return torch.as_tensor(times, dtype=torch.float32) * corpus_max(sae, latent), "set"
        case Clamp(_, value, None) if value is not None:
            return value, "set"
        case Clamp():
            raise InputError(f"{edit}: give exactly one of value and times_max")
        case Scale(_, factor):
            return factor, "scale"
        case Add(_, strength):
            return strength, "add"
        case Ablate():
            return 0.0, "set"


@contextmanager
def intervene(
    model: nn.Module,
    sae: SAE,
    edits: Sequence[Edit],
    *,
    hook: str | HookSite | None = None,
    special_tokens: bool = False,
) -> Iterator[Intervention]:
    """Steer `model` (transformers model or TransformerBridge) within the block; right under generate with a KV cache.

    hook: where, by default the SAE's own hook name; the site that `locate_hooks` found for it spares a transformers model being
    searched each time. Strengths may be given a batch row (length = batch). Positions that hold special tokens (the ids in the
    SAE's metadata; BOS and padding are among them) stay as they are unless `special_tokens`: the SAE never saw them. Computed in
    float32 and cast back to the model's dtype.

    Raises InputError for a latent or hook that does not exist, for a strength that is not finite, and for a transcoder or
    crosscoder, and RuntimeError if the model ran inside the block and the hook was never passed.

        with intervene(model, sae, [Clamp(123, times_max=5.0)]):
            model.generate(**inputs)
    """
    if not steerable(sae):
        raise InputError(f"{sae.cfg.architecture}: it reads {sae.cfg.hook_names or sae.cfg.hook_name} and writes elsewhere or to "
                         "several hooks; steering takes an SAE, which reads and writes one")  # fmt: skip
    plan = [(edit.latent, *_targets(sae, edit)) for edit in edits]
    numbers = [latent for latent, _, _ in plan]
    for latent in numbers:
        if not 0 <= latent < sae.cfg.d_sae:
            raise InputError(f"latent {latent} is outside this SAE's 0..{sae.cfg.d_sae - 1}")
    for latent, strength, _ in plan:
        if not torch.as_tensor(strength).isfinite().all():
            raise InputError(f"latent {latent}: strength {strength} given; it has to be finite")
    set_twice = {n for n, _, kind in plan if kind != "add" and [m for m, _, k in plan if k != "add"].count(n) > 1}
    if set_twice:
        raise InputError(f"latents {sorted(set_twice)} are set or scaled by more than one edit")
    module, side, inner = _hook_module(model, sae, hook)
    device = next(iter(inner.parameters())).device
    sae.to(device)
    directions = sae.directions(torch.tensor(numbers, device=device)).float()
    strengths = [torch.as_tensor(s, dtype=torch.float32, device=device) for _, s, _ in plan]
    special = torch.tensor(sae.cfg.metadata.get("special_token_ids", []), device=device)
    state = Intervention()
    tokens: list[Tensor | None] = [None]

    def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state.forwards += 1
        found = args[0] if args else kwargs.get("input_ids")
        tokens[0] = found if isinstance(found, Tensor) and not found.is_floating_point() else None

    def act(x: Tensor) -> Tensor:
        state.passes += 1
        wide = x.float()
        f = sae.encode(wide)[..., numbers].float() if any(kind != "add" for _, _, kind in plan) else None
        deltas = []
        for i, (latent, _, kind) in enumerate(plan):
            s = strengths[i]
            if s.dim() == 1:
                if len(s) != len(x):
                    raise InputError(f"latent {latent}: {len(s)} strengths given for a batch of {len(x)} rows")
                s = s[:, None]  # one a batch row, all positions alike
            if kind == "add" or f is None:
                deltas.append(s.expand(x.shape[:-1]))
            else:
                deltas.append((s if kind == "set" else s * f[..., i]) - f[..., i])
        delta = torch.stack(deltas, -1)
        if not special_tokens and len(special) and tokens[0] is not None and tokens[0].shape == x.shape[:-1]:
            delta = delta.masked_fill(torch.isin(tokens[0], special)[..., None], 0.0)
        return (wide + delta @ directions).to(x.dtype)

    with ExitStack() as stack:
        handle = inner.register_forward_pre_hook(before_forward, with_kwargs=True)
        stack.callback(handle.remove)
        stack.enter_context(on_pass(module, side, act))
        yield state
    if state.forwards and not state.passes:
        raise RuntimeError(f"the model ran {state.forwards} times and never passed the steering hook")


def _hook_module(
    model: nn.Module, sae: SAE, hook: str | HookSite | None
) -> tuple[nn.Module, Literal["in", "out"], nn.Module]:  # fmt: skip
    """Return (module to hook, its side, the transformers model inside) for a plain model or a TransformerBridge."""
    if isinstance(hook, HookSite):
        return model.get_submodule(hook.path), hook.side, model
    name = hook or sae.cfg.hook_name
    if name is None:
        raise InputError("the SAE does not say which hook it belongs to; pass hook=")
    points = getattr(model, "hook_dict", None)
    if points is None:
        site = locate_hooks(model, [name])[name]
        return model.get_submodule(site.path), site.side, model
    if name not in points:
        raise InputError(f"hook {name!r} does not exist in this model")
    inner = model.original_model
    assert isinstance(inner, nn.Module)
    return points[name], "out", inner
