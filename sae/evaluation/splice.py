"""Passes of a model with a hook's activation replaced, in which the layers below the hook run only once."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from activation_store.hooks import HookSite, on_pass

Edit = Callable[[Tensor], Tensor | None]
"""What happens to an activation as it passes: None leaves it, a tensor replaces it."""


class Passes:
    """The passes over one batch of tokens (sequence, context): a clean one, at once, and any number of changed ones.

    In changed passes the layers below the first change give what they gave in the clean one, unless `skip` is false.
    """

    def __init__(self, model: nn.Module, sites: Sequence[HookSite], tokens: Tensor, skip: bool = True) -> None:
        """Run the clean pass: `logits` (sequence, context - 1, vocabulary), and `seen` at the sites, in the order of passing.

        Raises RuntimeError where the model never passes a site.
        """
        self.model, self.tokens, self.skip = model, tokens, skip
        self.seen: dict[HookSite, Tensor] = {}
        self._kept: dict[nn.Module, Any] = {}
        tops = {layers[-1] for site in sites if (layers := self._below([site]))}
        with ExitStack() as stack:
            for layer in tops:
                stack.callback(layer.register_forward_hook(self._keep).remove)
            for site in sites:
                look = partial(self.seen.__setitem__, site)
                stack.enter_context(on_pass(model.get_submodule(site.path), site.side, look))
            self.logits = next_logits(model, tokens)
        missed = [f"{site.path} ({site.side})" for site in sites if site not in self.seen]
        if missed:
            raise RuntimeError(f"the model never passed {', '.join(missed)}")

    def changed(self, edits: Mapping[HookSite, Edit]) -> Tensor:
        """Return the logits of a pass with the edits, each at its site; the lowest must be one of the clean pass's sites."""
        below = self._below(list(edits))
        with ExitStack() as stack:
            for site, edit in edits.items():
                stack.enter_context(on_pass(self.model.get_submodule(site.path), site.side, edit))
            stack.enter_context(_returning(below, self._kept[below[-1]] if below else None))
            return next_logits(self.model, self.tokens)

    def exact(self, sites: Sequence[HookSite]) -> bool:
        """Say whether passes that change nothing give the clean one's logits: some models' layers see more than x."""
        return all(torch.equal(self.changed({site: lambda x: x}), self.logits) for site in sites)

    def _below(self, sites: Sequence[HookSite]) -> list[nn.Module]:
        return layers_below(self.model, *sites) if self.skip else []

    def _keep(self, layer: nn.Module, _args: Any, out: Any) -> None:
        self._kept[layer] = out


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


def next_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits of each next token, (sequence, context - 1, vocabulary), in the model's dtype."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[:, :-1]
