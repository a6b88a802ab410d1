"""Steering: run a model with x replaced by x + sum_k delta_k d_k at the SAE's hook.

Every edit is a coefficient delta_k of a decoder row d_k at each position, so that any of them combine in one product.

A clamp sets latent k to c and keeps the SAE's error: decode(f with f_k = c) + (x - decode(f)) is exactly
x + (c - f_k(x)) d_k, because decoding is affine ("Scaling Monosemanticity", Templeton et al. 2024, "Feature steering").
Nothing is decoded unless the error is to be dropped. All edits read the latents of the unsteered x, so their order does not
matter.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from activation_store.errors import InputError
from activation_store.hooks import HookSite, locate_hooks, on_pass
from sae.sae import SAE

Strength = float | Sequence[float] | Tensor


Positions = Literal["all", "prompt", "response"] | slice | Sequence[int]


@dataclass(frozen=True)
class Clamp:
    """Set a latent: to `value`, or to `times_max` times its corpus maximum. Give one number, or one a batch row.

    With `minimum` the latent is only ever raised, to max(f, c): where it fires more strongly of itself it stays (min-clamp, as in
    AxBench, Wu et al. 2025).
    """

    latent: int
    value: Strength | None = None
    times_max: Strength | None = None
    minimum: bool = False


@dataclass(frozen=True)
class Scale:
    """Multiply a latent by `factor`."""

    latent: int
    factor: Strength


@dataclass(frozen=True)
class Add:
    """Add `strength` times the latent's decoder row, of length 1 where `unit`, whatever the latent's value is."""

    latent: int
    strength: Strength
    unit: bool = False


@dataclass(frozen=True)
class Ablate:
    """Set a latent to zero: takes its contribution out where it fires, changes nothing where it does not."""

    latent: int


@dataclass(frozen=True)
class AblateDirection:
    """Take out all that x has along the latent's decoder row, also what other latents and the error put there.

    x' = x - (x . v) v, v = d / |d| (Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", 2.4).
    Several of them take out the whole space that their rows span.
    """

    latent: int


@dataclass(frozen=True)
class When:
    """Do an edit only at positions where another latent, `fires`, is above a threshold in the unsteered x."""

    fires: int
    edit: "Act"
    above: float = 0.0


Act = Clamp | Scale | Add | Ablate | AblateDirection
Edit = Act | When


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


@dataclass(frozen=True)
class _Change:
    """An edit as numbers: what is done to a latent, by how much, and where else something has to fire for it."""

    latent: int
    kind: Literal["set", "raise", "scale", "add", "project"]
    strength: Strength
    fires: int | None = None
    above: float = 0.0

    @classmethod
    def of(cls, sae: SAE, edit: Edit) -> "_Change":
        match edit:
            case When(fires, act, above):
                return replace(cls.of(sae, act), fires=fires, above=above)
            case Clamp(latent, None, times, minimum) if times is not None:
                value = torch.as_tensor(times, dtype=torch.float32) * corpus_max(sae, latent)
                return cls(latent, "raise" if minimum else "set", value)
            case Clamp(latent, value, None, minimum) if value is not None:
                return cls(latent, "raise" if minimum else "set", value)
            case Clamp():
                raise InputError(f"{edit}: give exactly one of value and times_max")
            case Scale(latent, factor):
                return cls(latent, "scale", factor)
            case Add(latent, strength, unit):
                length = float(sae.directions(torch.tensor([latent], device=sae.b_dec.device)).float().norm()) if unit else 1.0
                return cls(latent, "add", torch.as_tensor(strength, dtype=torch.float32) / length)
            case Ablate(latent):
                return cls(latent, "set", 0.0)
            case AblateDirection(latent):
                return cls(latent, "project", 1.0)

    @property
    def reads(self) -> bool:
        """Whether the latent's own value decides."""
        return self.kind in ("set", "raise", "scale")


def _plan(sae: SAE, edits: Sequence[Edit]) -> list[_Change]:
    """Return what is to be done. Raises InputError for what cannot be, before the model runs."""
    for edit in edits:  # numbers first: a corpus maximum is looked up by them
        for latent in (edit.edit.latent, edit.fires) if isinstance(edit, When) else (edit.latent,):
            if not 0 <= latent < sae.cfg.d_sae:
                raise InputError(f"latent {latent} is outside this SAE's 0..{sae.cfg.d_sae - 1}")
    plan = [_Change.of(sae, edit) for edit in edits]
    for change in plan:
        strength = torch.as_tensor(change.strength)
        if not strength.isfinite().all() or not math.isfinite(change.above):
            raise InputError(f"latent {change.latent}: strength {change.strength} given; it has to be finite")
        if strength.dim() > 1:
            raise InputError(f"latent {change.latent}: strengths {tuple(strength.shape)} given; one number, or one a batch row")
    own = Counter(change.latent for change in plan if change.reads)
    if twice := sorted(n for n, times in own.items() if times > 1):
        raise InputError(f"latents {twice} are set or scaled by more than one edit")
    projected = [change for change in plan if change.kind == "project"]
    if len(projected) > 1 and any(change.fires is not None for change in projected):
        raise InputError("When around one of several AblateDirection: they are taken out together, so none may depend on where")
    if len({change.latent for change in projected}) < len(projected):
        raise InputError(f"directions {sorted(c.latent for c in projected)} are ablated more than once")
    return plan


class _Places:
    """Which positions of a pass are steered, found from what the model was called with."""

    def __init__(self, positions: Positions, special: Tensor, context: int | None) -> None:
        self.positions, self.special = positions, special
        self._chosen: Tensor | None = None
        self._known, self._begun, self.columns = False, False, 0
        self._met = torch.zeros((), dtype=torch.bool, device=special.device)
        if isinstance(positions, str):
            if positions not in ("all", "prompt", "response"):
                raise InputError(f"positions: {positions!r} given; allowed: all, prompt, response, a slice or a list of numbers")
            return
        given = [positions.start, positions.stop, positions.step] if isinstance(positions, slice) else list(positions)
        if any(n is not None and n < 0 for n in given) or not given:
            raise InputError(f"positions: {positions} given; they count from a row's first token, 0 and up")
        if isinstance(positions, slice):
            if positions.step == 0 or (positions.stop is not None and positions.stop <= (positions.start or 0)):
                raise InputError(f"positions: {positions} given; it holds none")
            given = [positions.start or 0]
        if context is not None and max(given) >= context:
            raise InputError(f"positions: {max(given)} given; the model's context has {context}, 0 to {context - 1}")

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a pass is of."""
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = tokens if isinstance(tokens, Tensor) and not tokens.is_floating_point() else None
        chosen = None if tokens is None or not len(self.special) else ~torch.isin(tokens, self.special)
        self._known = self.positions == "all"
        embedded = tokens if tokens is not None else kwargs.get("inputs_embeds")
        if not self._known and embedded is not None:
            at = self._at(embedded, kwargs)
            chosen = at if chosen is None else at & chosen
            self._met |= chosen.any()
            self._known = True
        self._chosen = chosen

    def _at(self, embedded: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return which positions (batch, position) are asked for; they count from a row's first token that is no padding."""
        rows, width = embedded.shape[:2]
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        start = int(cache.get_seq_length()) if cache is not None else 0
        prompt = start == 0 or not self._begun  # what a cache is begun with
        self._begun, self.columns = True, max(self.columns, start + width)
        if isinstance(self.positions, str):
            return torch.full((rows, width), prompt == (self.positions == "prompt"), device=embedded.device)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= start + width:
            real = mask[:, : start + width].long()
            index = (real.cumsum(1) * real - 1)[:, start:]
        elif isinstance(kwargs.get("position_ids"), Tensor):
            index = kwargs["position_ids"].expand(rows, width)
        else:
            index = torch.arange(start, start + width, device=embedded.device).expand(rows, width)
        if not isinstance(self.positions, slice):
            return torch.isin(index, torch.tensor(list(self.positions), device=index.device))
        first, stop, step = self.positions.start or 0, self.positions.stop, self.positions.step or 1
        found = (index >= first) & ((index - first) % step == 0)
        return found if stop is None else found & (index < stop)

    def of(self, x: Tensor) -> Tensor | None:
        """Return which positions of x (batch, position, d) are steered; None: all are."""
        fits = self._chosen is not None and self._chosen.shape == x.shape[:-1]
        if not self._known or (self.positions != "all" and not fits):
            raise InputError(f"positions: {self.positions} given, but at the hook {tuple(x.shape[:-1])} rows and positions "
                             "go by, which are not the model's tokens")  # fmt: skip
        return self._chosen if fits else None

    def check(self) -> None:
        """Raise InputError where positions were asked for that no pass had."""
        if self.positions == "all":
            return
        if not isinstance(self.positions, str | slice) and max(self.positions) >= self.columns:
            raise InputError(f"positions: {max(self.positions)} given; the longest row had {self.columns} tokens")
        if not bool(self._met):
            raise InputError(f"positions: {self.positions} given; no tokens or only special ones were there: nothing was steered")


@contextmanager
def intervene(
    model: nn.Module,
    sae: SAE,
    edits: Sequence[Edit],
    *,
    hook: str | HookSite | None = None,
    special_tokens: bool = False,
    positions: Positions = "all",
    keep_norm: bool = False,
    keep_error: bool = True,
) -> Iterator[Intervention]:
    """Steer `model` (transformers model or TransformerBridge) within the block; right under generate with a KV cache.

    Several SAEs at several hooks are blocks within each other; each reads x as those below it, or begun before it at the same
    hook, left it. `@intervene(...)` over a function steers what runs inside.

    hook: where, by default the SAE's own hook name; the site that `locate_hooks` found for it spares a transformers model being
    searched each time. Strengths may be given a batch row (length = batch; under beam search every beam is a row).
    special_tokens: positions that hold special tokens (the ids in the SAE's metadata; BOS and padding are among them) stay as
    they are unless this is given: the SAE never saw them.
    positions: "prompt" is what the first pass of a cache is given, "response" what comes after; a slice or a list counts from
    each row's first token that is no padding. Without a cache nothing tells prompt from response: give a slice.
    keep_norm: scale the steered x to the length it had. keep_error=False puts the SAE's reconstruction in the place of x, so that
    what the SAE does not explain is lost too. Computed in float32 and cast back to the model's dtype.

    Raises InputError for a latent or hook that does not exist, a strength that is not finite or not one a row, an SAE of another
    width or basis than the model's, positions outside the context or never met, and for a transcoder or crosscoder; RuntimeError
    if the model ran inside the block and the hook was never passed.

        with intervene(model, sae, [Clamp(123, times_max=5.0)]):
            model.generate(**inputs)
    """
    if not steerable(sae):
        raise InputError(f"{sae.cfg.architecture}: it reads {sae.cfg.hook_names or sae.cfg.hook_name} and writes elsewhere or to "
                         "several hooks; steering takes an SAE, which reads and writes one")  # fmt: skip
    plan = _plan(sae, edits)
    module, side, inner = _hook_module(model, sae, hook)
    _check_fit(model, inner, sae)
    device = next(iter(inner.parameters())).device
    sae.to(device)
    spared = [] if special_tokens else sae.cfg.metadata.get("special_token_ids", [])
    special = torch.tensor(spared, dtype=torch.long, device=device)
    places = _Places(positions, special, getattr(getattr(inner, "config", None), "max_position_embeddings", None))
    deltas = _Deltas(sae, plan, device)
    state = Intervention()

    def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state.forwards += 1
        places.before(args, kwargs)

    def act(x: Tensor) -> Tensor:
        state.passes += 1
        if x.shape[-1] != sae.cfg.d_in:
            raise InputError(f"hook {sae.cfg.hook_name}: the model is {x.shape[-1]} wide there, the SAE {sae.cfg.d_in}; "
                             "it was trained on another model or hook")  # fmt: skip
        wide, chosen = x.float(), places.of(x)
        steered = (wide if keep_error else sae(wide).float()) + deltas(wide)
        if keep_norm:
            before, after = wide.norm(dim=-1, keepdim=True), steered.norm(dim=-1, keepdim=True)
            steered = steered * torch.where(after > 0, before / after, 1.0)
        return steered.to(x.dtype) if chosen is None else torch.where(chosen[..., None], steered.to(x.dtype), x)

    with ExitStack() as stack:
        handle = inner.register_forward_pre_hook(before_forward, with_kwargs=True)
        stack.callback(handle.remove)
        stack.enter_context(on_pass(module, side, act))
        yield state
    if state.forwards and not state.passes:
        raise RuntimeError(f"the model ran {state.forwards} times and never passed the steering hook")
    if state.passes:
        places.check()


class _Deltas:
    """What a plan adds to x (batch, position, d_in) float32."""

    def __init__(self, sae: SAE, plan: Sequence[_Change], device: torch.device) -> None:
        self.sae, self.plan = sae, plan
        self.directions = sae.directions(torch.tensor([c.latent for c in plan], dtype=torch.long, device=device)).float()
        self.strengths = [torch.as_tensor(change.strength, dtype=torch.float32, device=device) for change in plan]
        self.projected = [i for i, change in enumerate(plan) if change.kind == "project"]
        rows = self.directions[self.projected]
        # coefficients of the part of x within the span of rows: D x solved by D D^T, which rows along each other leave singular
        self.inverse = torch.linalg.pinv(rows @ rows.T, hermitian=True) if self.projected else None
        self.encodes = any(change.reads or change.fires is not None for change in plan)

    def __call__(self, x: Tensor) -> Tensor:
        f = self.sae.encode(x) if self.encodes else None
        within = (x @ self.directions[self.projected].T) @ self.inverse if self.inverse is not None else None
        deltas = list[Tensor]()
        for i, change in enumerate(self.plan):
            s = self.strengths[i]
            if s.dim() == 1:
                if len(s) != len(x):
                    raise InputError(f"latent {change.latent}: {len(s)} strengths given for a batch of {len(x)} rows")
                s = s[:, None]  # one a batch row, all positions alike
            if within is not None and change.kind == "project":
                delta = -within[..., self.projected.index(i)]
            elif f is None or not change.reads:
                delta = s.expand(x.shape[:-1])
            else:
                own = f[..., change.latent].float()
                delta = (s * own if change.kind == "scale" else s) - own
                delta = delta.clamp(min=0) if change.kind == "raise" else delta
            if f is not None and change.fires is not None:
                delta = torch.where(f[..., change.fires].float() > change.above, delta, 0.0)
            deltas.append(delta)
        return torch.stack(deltas, -1) @ self.directions if deltas else torch.zeros_like(x)


def _check_fit(model: nn.Module, inner: nn.Module, sae: SAE) -> None:
    """Raise InputError for an SAE that is not of this model, as far as can be told before it runs."""
    width, hook = getattr(getattr(inner, "config", None), "hidden_size", None), sae.cfg.hook_name or ""
    if "resid" in hook and width is not None and width != sae.cfg.d_in:
        raise InputError(f"hook {hook}: the model is {width} wide there, the SAE {sae.cfg.d_in}; it was trained on another model")
    if sae.cfg.metadata.get("basis", "raw") == "raw" and getattr(model, "compatibility_mode", False):
        raise InputError("the bridge is in compatibility mode, its weights folded and centred, but the SAE was trained on raw "
                         "activations; boot it without enable_compatibility_mode()")  # fmt: skip


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
