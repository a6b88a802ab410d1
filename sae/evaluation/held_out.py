"""The held-out set: which rows of a store an SAE is judged on, and a name that says whether two figures are of the same."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activation_store.errors import InputError
from activation_store.store import ActivationStore
from sae.sae import SAE

SIDES = ("without_special", "with_special")
"""Every figure is taken twice: over the tokens that SAEs are trained on, and over all."""


@dataclass(frozen=True)
class HeldOut:
    """The sequences of `store` that training never drew, read at `hooks` and predicted at `hooks_out` (in an SAE the same).

    Of several hooks, activations of one token stand side by side.
    """

    store: ActivationStore
    hooks: tuple[str, ...]
    hooks_out: tuple[str, ...]

    @classmethod
    def of(cls, sae: SAE, store: ActivationStore) -> "HeldOut":
        """Return the held-out set of an SAE. Raises InputError where the store's hooks or widths are not the SAE's."""
        cfg = sae.cfg
        if len(cfg.widths) > 1 and not cfg.hook_names:
            raise InputError("hook_names: the crosscoder does not say which hooks it reads; train it with train.hook")
        hooks = cfg.hook_names or (cfg.hook_name or store.hooks[0],)
        hooks_out = cfg.hook_names_out or ((cfg.hook_name_out,) if cfg.hook_name_out else hooks)
        for names, field, widths in (
            (hooks, "d_in", cfg.widths or (cfg.d_in,)), (hooks_out, "d_out", cfg.widths_out or cfg.widths or (cfg.width_out,)),
        ):  # fmt: skip
            for name, width in zip(names, widths, strict=True):
                if store.width(name) != width:
                    verb = "takes" if field == "d_in" else "predicts"
                    raise InputError(f"{field}: the SAE {verb} {width}, but {name} of {store.path} is {store.width(name)} wide")
        if store.tokens.shape[0] == store.train_sequences:
            raise InputError(f"{store.path}: no sequence is held out; harvest with data.held_out above 0")
        return cls(store, hooks, hooks_out)

    @property
    def predicts_its_input(self) -> bool:
        """Whether what is predicted is what is read: no transcoder."""
        return self.hooks == self.hooks_out

    @property
    def columns(self) -> dict[str, slice]:
        """Where each of `hooks_out` stands in what is predicted."""
        edges = [0, *np.cumsum([self.store.width(hook) for hook in self.hooks_out]).tolist()]
        return {hook: slice(*pair) for hook, pair in zip(self.hooks_out, pairwise(edges), strict=True)}

    @property
    def mean(self) -> NDArray[np.float32]:
        """The training rows' mean of what is predicted, (d_out,)."""
        return np.concatenate([np.asarray(self.store.statistics(hook).mean) for hook in self.hooks_out])

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return what is read, (token, d_in), and what is to be predicted, (token, d_out), of sequences from start to stop."""
        rows = slice((self.first + start) * self.store.context, (self.first + stop) * self.store.context)
        x = torch.cat([self.store.read(hook, rows) for hook in self.hooks], 1)
        return x, x if self.predicts_its_input else torch.cat([self.store.read(hook, rows) for hook in self.hooks_out], 1)

    @property
    def first(self) -> int:
        """The first held-out sequence."""
        return self.store.train_sequences

    @property
    def sequences(self) -> int:
        """How many there are."""
        return int(self.store.tokens.shape[0]) - self.first

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Their token ids, (sequence, context)."""
        return self.store.tokens[self.first :]

    @property
    def special(self) -> NDArray[np.bool_]:
        """Special tokens and padding among them, (sequence, context)."""
        return self.store.special[self.first :]

    @cached_property
    def hash(self) -> str:
        """The set's name, 16 hex digits: equal names, equal tokens and marks, hooks and model.

        Of the model, its revision (a local one's is a hash of its weights) and the last part of its id, so that a folder may
        move. How activations are stored is no part of it.
        """
        attrs = self.store.attrs
        facts = {
            "hooks": sorted({*self.hooks, *self.hooks_out}), "shape": self.tokens.shape,
            "model": PurePosixPath(str(attrs.get("model"))).name, "revision": attrs.get("model_revision"),
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.tokens, "<i4").tobytes())
        digest.update(np.packbits(self.special).tobytes())
        return digest.hexdigest()[:16]

    def require(self, name: str | None) -> None:
        """Raise InputError where a config asks for a held-out set of another name."""
        if name is not None and name != self.hash:
            where = ", ".join(self.hooks) + ("" if self.predicts_its_input else f" -> {', '.join(self.hooks_out)}")
            raise InputError(
                f"evaluate.held_out_hash: {name!r} given, but the held-out set of {self.store.path} at {where} is {self.hash!r}; "
                "use the store it was taken from, or leave the hash out"
            )
