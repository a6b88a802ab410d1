"""Adam over matrices by latent: gradient, clipping, step, norms and bfloat16 copy, each weight read and written once."""

import logging

import torch
from torch import Tensor, nn

from sae.ops import DenseTermOps, Kernels, Rows, SparseOps
from sae.ops.float8 import MULTIPLE, Float8
from sae.ops.kernels import AdamStep, DenseTerm, Screen, Term

log = logging.getLogger(__name__)

_EPS = 1e-8


class Adam:
    """Adam (Kingma & Ba 2015) with the gradients clipped to a global norm, as torch.optim.Adam and clip_grad_norm_ do it.

    encoders and decoders: parameters by name with their view by latent, (d_sae, d) contiguous. All other parameters are
    vectors. A parameter's gradient is its `.grad`, or what sparse operations left on its `Rows`. With `unit`, decoder rows
    keep norm 1: the gradient's part along them is dropped, and they are brought back after the step. Below float32,
    encoders have a copy in `compute_dtype`, in which their product is taken. Of a stack (see ops/latents.py), each of the
    `members` has its gradients clipped by itself, and its learning rate is `pace` (members,) times the step's.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], encoders: dict[str, Tensor], decoders: dict[str, Tensor], kernels: Kernels,
        *, betas: tuple[float, float], max_norm: float, unit: bool, compute_dtype: str, members: int = 1,
        pace: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Start with moments of zero; copies and norms are taken from the weights as they are."""
        self.kernels, self.betas, self.max_norm, self.unit, self.compute_dtype = kernels, betas, max_norm, unit, compute_dtype
        self.parameters, self.steps, self.members = parameters, 0, members
        self.encoders, self.decoders = list(encoders), list(decoders)
        self.rows = {name: Rows(view.detach()) for name, view in {**encoders, **decoders}.items()}
        vectors = {name: p.detach().view(members, -1) for name, p in parameters.items() if name not in self.rows}
        self.weights = {**{name: rows.weight for name, rows in self.rows.items()}, **vectors}
        self.pace = torch.ones(members, device=next(iter(self.weights.values())).device) if pace is None else pace
        self.m = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.v = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self._buffers: dict[str, Tensor] = {}
        self._absorbed: set[str] = set()  # whose buffers hold a part of the gradient
        self.refresh()

    def refresh(self) -> None:
        """Take copies and norms anew, after the weights were changed from outside."""
        for name in self.decoders:
            self.rows[name].norms = self.rows[name].weight.norm(dim=1)
        for rows in (self.rows[name] for name in self.encoders):
            if self.compute_dtype != "float32":
                rows.low = Float8(rows.weight) if self._float8(rows.weight) else rows.weight.bfloat16()
            elif self.kernels.screens:
                rows.screen = Screen.of(rows.weight)

    def _float8(self, weight: Tensor) -> bool:
        if self.compute_dtype == "float8" and any(size % MULTIPLE for size in weight.shape):
            log.warning("an encoder of %s is no multiple of %d: its product is taken in bfloat16", tuple(weight.shape), MULTIPLE)
            return False
        return self.compute_dtype == "float8"

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None
        for rows in self.rows.values():
            rows.clear()
        self._absorbed.clear()

    @torch.no_grad()
    def forget(self, latents: Tensor) -> None:
        """Set the moments of these latents' weights to 0, after the weights were changed from outside, and `refresh`."""
        d_sae = len(next(iter(self.rows.values())).weight)
        for name in self.weights:
            for moment in (self.m[name], self.v[name]):
                if name in self.rows:
                    moment[latents] = 0
                elif moment.shape[1] == d_sae and self.parameters[name].dim() == 1:
                    moment[0, latents] = 0
        self.refresh()

    @torch.no_grad()
    def absorb(self) -> None:
        """Evaluate the terms that operations have left so far, so that what they are made of may go.

        For a batch that is taken in parts, before the next part.
        """
        for name, rows in self.rows.items():
            if rows.terms or rows.subsets:
                self._add_up(name, False, self._buffer(name, len(rows.weight), rows.weight), None)
                rows.terms, rows.subsets = [], []
                self._absorbed.add(name)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one step and forget the gradients; nothing here waits for the device."""
        self.steps += 1
        gradients: dict[str, tuple[Tensor, Tensor | None]] = {}
        squares: list[Tensor] = []
        for name, parameter in self.parameters.items():
            if name in self.rows:
                gradient, slots, square = self._gradient(name, parameter)
            else:
                gradient, slots = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, None
                gradient, square = gradient.view(self.members, -1), gradient.square()
            gradients[name] = gradient, slots
            squares.append(square.view(self.members, -1).sum(1))
        norm = torch.stack(squares).sum(0).sqrt()
        clip = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        step = AdamStep(lr, *self.betas, _EPS, self.steps, clip, self.pace)
        for name, weight in self.weights.items():
            rows = self.rows.get(name)
            low, norms, rounding = (None, None, None) if rows is None else (rows.low, rows.norms, None)
            copy, low = (low, None) if isinstance(low, Float8) else (None, low)
            if rows is not None and rows.screen is not None:
                low, norms, rounding = rows.screen.low, rows.screen.norms, rows.screen.rounding
            unit = self.unit and name in self.decoders
            self.kernels.adam(step, weight, *gradients[name], self.m[name], self.v[name], low, norms, unit, rounding)
            if copy is not None:
                copy.write(weight)
        self.clear()

    def _gradient(self, name: str, parameter: nn.Parameter) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the gradient, the place of each latent's row in it, and the rows' squared norms."""
        if parameter.grad is not None:  # plain autograd's
            out, slots = (parameter.grad if name in self.decoders else parameter.grad.T).contiguous(), None
            if name in self._absorbed:
                out = self._buffers[name].add_(out)
            self._absorbed.add(name)
        else:
            slots, places = self._slots(name)
            out = self._buffer(name, places, self.rows[name].weight)
        return out, slots, self._add_up(name, True, out, slots)

    def _add_up(self, name: str, last: bool, out: Tensor, slots: Tensor | None) -> Tensor:
        """Evaluate what there is of a gradient, and return the squared norms of its rows.

        What lies along the rows of the weight is dealt with when the `last` is added.
        """
        rows, fresh = self.rows[name], name not in self._absorbed
        sparse = [term for term in rows.terms if isinstance(term, Term)]
        if fresh and rows.subsets:
            out.zero_()
            fresh = False
        for which, gradient in rows.subsets:
            out.index_add_(0, which if slots is None else slots[which], gradient)
        for term in rows.terms:
            if isinstance(term, DenseTerm):
                term.add_to(out, fresh)
                fresh = False
        if not (last or sparse or fresh):
            return out.new_zeros(())
        along, tangent = (rows.along, self.unit and name in self.decoders) if last else (None, False)
        return self.kernels.gradient(sparse, rows.weight, along, tangent, out, slots, fresh)

    def _slots(self, name: str) -> tuple[Tensor | None, int]:
        """Give places only to latents with a gradient, where that saves memory: fewer entries than latents."""
        rows = self.rows[name]
        d_sae, terms = len(rows.weight), [term for term in rows.terms if isinstance(term, Term)]
        most = sum(len(t.coefficients) for t in terms) + sum(len(which) for which, _ in rows.subsets)
        # a gradient along rows may be anywhere: how many they are is known at once on a CPU alone
        anywhere = name in self._absorbed or len(terms) < len(rows.terms) or (rows.along is not None and rows.weight.is_cuda)
        if most >= d_sae or not terms or anywhere:
            return None, d_sae
        filled = torch.stack([t.latents.by_latent.counts > 0 for t in terms]).any(0)
        for which, _ in rows.subsets:
            filled[which] = True
        if rows.along is not None:
            filled |= rows.along != 0
            most = int(filled.sum())
        return torch.where(filled, filled.cumsum(0) - 1, -1), most

    def _buffer(self, name: str, places: int, like: Tensor) -> Tensor:
        held = self._buffers.get(name)
        if held is None or len(held) < places:
            self._buffers.pop(name, None)
            held = self._buffers[name] = like.new_empty(places, like.shape[1])
        return held[:places]

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold."""
        tensors = {f"{kind}.{name}": value for kind in ("m", "v") for name, value in getattr(self, kind).items()}
        for name, rows in self.rows.items():  # taken anew they would be another sum, in other bits
            if rows.norms is not None:
                tensors[f"norms.{name}"] = rows.norms
            if rows.screen is not None:
                tensors |= {f"norms.{name}": rows.screen.norms, f"rounding.{name}": rows.screen.rounding}
        return {**tensors, "steps": torch.tensor(self.steps)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave, after the weights were restored."""
        self.refresh()
        self.steps = int(state["steps"])
        for name, value in self.state().items():
            if name in state:  # what screens need is not there where the checkpoint's machine had none: it was taken anew
                value.copy_(state[name])

    def sparse_ops(self, room: float) -> SparseOps:
        """Return sparse operations whose gradients end up here."""
        return SparseOps(self.kernels, {self.parameters[name]: rows for name, rows in self.rows.items()}, room, self.members)

    def dense_ops(self) -> DenseTermOps:
        """Return dense ones."""
        return DenseTermOps(
            self.kernels, {self.parameters[name]: rows for name, rows in self.rows.items()}, members=self.members
        )
