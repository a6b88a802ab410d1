"""The held-out set: which rows of a store an SAE is judged on, and a name that says whether two figures are of the same."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from activation_store.errors import InputError
from activation_store.store import ActivationStore
from sae.sae import SAE

SIDES = ("without_special", "with_special")
"""Every figure is taken twice: over the tokens that SAEs are trained on, and over all."""


@dataclass(frozen=True)
class HeldOut:
    """The sequences of `store` that training never drew, read at `hook` and predicted at `hook_out` (in an SAE the same)."""

    store: ActivationStore
    hook: str
    hook_out: str

    @classmethod
    def of(cls, sae: SAE, store: ActivationStore) -> "HeldOut":
        """Return the held-out set of an SAE. Raises InputError where the store's hooks or widths are not the SAE's."""
        if sae.cfg.hook_names:
            raise InputError(f"the SAE reads {len(sae.cfg.hook_names)} hooks at once; only those that read one can be evaluated")
        hook = sae.cfg.hook_name or store.hooks[0]
        hook_out = sae.cfg.hook_name_out or hook
        for name, field, width in ((hook, "d_in", sae.cfg.d_in), (hook_out, "d_out", sae.cfg.width_out)):
            if store.width(name) != width:
                verb = "takes" if field == "d_in" else "predicts"
                raise InputError(f"{field}: the SAE {verb} {width}, but {name} of {store.path} is {store.width(name)} wide")
        if store.tokens.shape[0] == store.train_sequences:
            raise InputError(f"{store.path}: no sequence is held out; harvest with data.held_out above 0")
        return cls(store, hook, hook_out)

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
            "hooks": sorted({self.hook, self.hook_out}), "shape": self.tokens.shape,
            "model": PurePosixPath(str(attrs.get("model"))).name, "revision": attrs.get("model_revision"),
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.tokens, "<i4").tobytes())
        digest.update(np.packbits(self.special).tobytes())
        return digest.hexdigest()[:16]

    def require(self, name: str | None) -> None:
        """Raise InputError where a config asks for a held-out set of another name."""
        if name is not None and name != self.hash:
            where = self.hook if self.hook == self.hook_out else f"{self.hook} -> {self.hook_out}"
            raise InputError(
                f"evaluate.held_out_hash: {name!r} given, but the held-out set of {self.store.path} at {where} is {self.hash!r}; "
                "use the store it was taken from, or leave the hash out"
            )
