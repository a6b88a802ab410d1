"""Hook names -> places in a plain transformers model, and the capture of what passes there.

Names are TransformerLens' (`blocks.9.hook_resid_post`, canonical `blocks.9.hook_out`, aliases). TransformerBridge knows
which module of each architecture they mean; it is asked once, on a model without weights, because a bridge rewires the
model that it wraps and forces eager attention. The forward pass itself then runs on the untouched model.
"""

import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from activation_store.errors import InputError


@dataclass(frozen=True)
class HookSite:
    """One place: the input or the output of the module at `path`."""

    path: str
    side: Literal["in", "out"]


def locate_hooks(model: nn.Module, names: Sequence[str], *, optional: Sequence[str] = ()) -> dict[str, HookSite]:
    """Return where in the transformers model `model` each hook name points; of the `optional` ones, those that it has.

    Raises InputError for a name that the model does not have, listing the nearest ones, and for one that names no
    module's input or output (attention patterns and the like), before anything runs.
    """
    bridge, paths = _bridge_without_weights(model)
    points: dict[str, Any] = dict(bridge.hook_dict)
    sites: dict[int, HookSite] = {}
    seen: set[nn.Module] = set()
    for module in bridge.original_model.modules():
        wrapped = _wrapped(module)
        path = paths.get(wrapped[-1])
        if path is None or (wrapped[-1] in seen and module not in seen):  # OPT's "mlp" is a second bridge round a whole layer
            continue
        seen.update(wrapped)
        for side in ("in", "out"):
            point = getattr(module, f"hook_{side}", None)
            if isinstance(point, nn.Module):
                sites.setdefault(id(point), HookSite(path, side))
    found = {name: site for name in optional if name in points and (site := sites.get(id(points[name]))) is not None}
    for name in names:
        if name not in points:
            close = difflib.get_close_matches(name, list(points), n=4, cutoff=0.5)
            raise InputError(f"hook {name!r} does not exist in this model; nearest: {', '.join(close) or 'none'}")
        site = sites.get(id(points[name]))
        if site is None:
            raise InputError(f"hook {name!r} is not the input or output of a module, so it cannot be captured or steered")
        found[name] = site
    return found


def _wrapped(module: nn.Module) -> list[nn.Module]:
    """Return what a bridge put round one of the model's own modules, from the outside in; the model's own is the last."""
    found = [module]
    while isinstance(inside := getattr(found[-1], "_original_component", None), nn.Module):
        found.append(inside)
    return found


def _bridge_without_weights(model: nn.Module) -> tuple[Any, dict[nn.Module, str]]:
    """Wrap a weightless twin of `model` in TransformerBridge; return it, and the path in `model` of each of the twin's modules.

    A bridge moves modules to where it calls them otherwise (GPT-2's `attn.c_proj` to `attn.o`), and makes some that the model
    does not have (q, k and v out of GPT-2's one product).
    """
    from transformer_lens.model_bridge import TransformerBridge

    config: Any = copy.deepcopy(model.config)  # booting sets eager attention in the config, which must not reach ours
    if not config.architectures:
        config.architectures = [type(model).__name__]
    with torch.device("meta"):
        kind: Any = type(model)
        twin = kind._from_config(config, dtype=torch.bfloat16)
    paths = {module: path for path, module in twin.named_modules()}
    name = config._name_or_path or "local"
    try:
        return TransformerBridge.boot_transformers(name, hf_model=twin, tokenizer=_stub_tokenizer(), device="meta"), paths
    except NotImplementedError:  # fused weights (GPT-2's QKV) are split by copying, which meta tensors cannot do
        twin = twin.to_empty(device="cpu")  # memory that is reserved, and never touched but for those weights
        return TransformerBridge.boot_transformers(name, hf_model=twin, tokenizer=_stub_tokenizer(), device="cpu"), paths


def _stub_tokenizer() -> Any:
    """Booting a bridge wants a tokenizer; names and shapes need none. Without BOS, nothing is looked up for it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def tensor_of(value: Any) -> Tensor:
    """Return the hidden states out of what a module takes or gives: the tensor itself, or the first of a tuple."""
    found: Tensor = value[0] if isinstance(value, tuple) else value
    return found


@contextmanager
def on_pass(module: nn.Module, side: Literal["in", "out"], act: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within the block, call `act(x)` on the input or output of `module` at every pass; None leaves x, a tensor replaces it.

    Hooks of others stay, and ours is removed whatever happens inside.
    """

    def replace(value: Any) -> Any:
        new = act(tensor_of(value))
        if new is None:
            return None
        return (new, *value[1:]) if isinstance(value, tuple) else new

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = replace(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = replace(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    if side == "in":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(lambda _module, _args, out: replace(out))
    try:
        yield
    finally:
        handle.remove()


class _AllCaptured(Exception):
    """Every wanted activation has arrived: nothing above them need run."""


@torch.inference_mode()
def capture(model: nn.Module, sites: dict[str, HookSite], tokens: Tensor) -> dict[str, Tensor]:
    """Run `model` on tokens (sequence, context) just as far as the sites reach; return name -> (sequence, context, d).

    Raises RuntimeError if the whole model ran and a site was never passed.
    """
    got: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def act(x: Tensor) -> None:
            got[name] = x
            if len(got) == len(sites):
                raise _AllCaptured

        return act

    with ExitStack() as stack:
        for name, site in sites.items():
            stack.enter_context(on_pass(model.get_submodule(site.path), site.side, keep(name)))
        # A ready 4-D mask keeps transformers from looking at values, which a model without weights does not have.
        on_meta = tokens.device.type == "meta"
        mask = torch.zeros((len(tokens), 1, tokens.shape[1], tokens.shape[1]), device="meta") if on_meta else None
        try:
            model(input_ids=tokens, attention_mask=mask, use_cache=False)
        except _AllCaptured:
            return got
    raise RuntimeError(f"hooks never passed: {', '.join(sorted(set(sites) - set(got)))}")
