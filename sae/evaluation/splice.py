"""Passes of a model with a hook's activation replaced, in which the layers below the hook run only once."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from activation_store.hooks import HookSite, on_pass

Change = Callable[[Tensor, Tensor], Tensor]


class Passes:
    """The passes over one batch of tokens (sequence, context): a clean one, at once, and any number of changed ones.

    `below` are layers whose output is kept from the clean pass and taken again in the others: see `layers_below`.
    """

    def __init__(
        self, model: nn.Module, source: HookSite, target: HookSite, tokens: Tensor, below: Sequence[nn.Module] = ()
    ) -> None:  # fmt: skip
        """Run the clean pass; `logits` (sequence, context - 1, vocabulary) are its."""
        self.model, self.source, self.target, self.tokens, self.below = model, source, target, tokens, below
        kept: list[Any] = []
        with ExitStack() as stack:
            if below:
                stack.callback(below[-1].register_forward_hook(lambda _module, _args, out: kept.append(out)).remove)
            self.logits = next_logits(model, tokens)
        self._kept = kept[0] if kept else None

    def changed(self, change: Change) -> Tensor:
        """Return the logits of a pass in which `target` passes on change(x, y) for y; x is what passes `source`."""
        with replaced(self.model, self.source, self.target, change), _returning(self.below, self._kept):
            return next_logits(self.model, self.tokens)

    def exact(self) -> bool:
        """Say whether a pass that changes nothing gives the clean one's logits: some models' layers see more than x."""
        return torch.equal(self.changed(lambda x, y: y), self.logits)


def layers_below(model: nn.Module, *sites: HookSite) -> list[nn.Module]:
    """Return the model's layers below the first of the sites, [] where they are not in one list of layers."""
    found = [re.match(r"(.*?)\.(\d+)(\.|$)", site.path) for site in sites]
    lists = {match[1] for match in found if match}
    if None in found or len(lists) != 1:
        return []
    layers = model.get_submodule(lists.pop())
    return list(layers)[: min(int(match[2]) for match in found if match)] if isinstance(layers, nn.ModuleList) else []


@contextmanager
def _returning(layers: Sequence[nn.Module], value: Any) -> Iterator[None]:
    """Within the block, each of the layers gives `value` and computes nothing."""
    try:
        for layer in layers:
            layer.forward = lambda *_args, **_kwargs: value
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


@contextmanager
def replaced(model: nn.Module, source: HookSite, target: HookSite, change: Change) -> Iterator[None]:
    """Within the block, `target` passes on change(x, y): y is what it would have, x is what passes `source`.

    Raises RuntimeError where a pass of the model reaches the target before the source, or never reaches it.
    """
    seen: list[Tensor] = []
    passes = 0

    def act(y: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if source == target:
            return change(y, y)
        if not seen:
            raise RuntimeError(f"{target.path} ({target.side}) is passed before {source.path} ({source.side})")
        return change(seen.pop(), y)

    with ExitStack() as stack:
        if source != target:
            stack.enter_context(on_pass(model.get_submodule(source.path), source.side, seen.append))
        stack.enter_context(on_pass(model.get_submodule(target.path), target.side, act))
        yield
    if not passes:
        raise RuntimeError(f"the model never passed {target.path} ({target.side})")


def next_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits of each next token, (sequence, context - 1, vocabulary), in the model's dtype."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[:, :-1]
