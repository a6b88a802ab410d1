"""Stacks: SAEs of equal shape that train as one, each as it would by itself.

`members` SAEs are one module with all their latents behind one another and a b_dec for each; a batch of theirs is one of
members * batch rows, of which a member's rows meet its own latents alone (see ops/latents.py). So a loss is written once, for
one SAE, and its products, selections and sums are taken for all members in as many calls as for one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae.adam import Adam
from sae.architectures import ARCHITECTURES
from sae.architectures.auxk import IdleTokens
from sae.architectures.cross_layer import CrossLayerTranscoder
from sae.architectures.linear import LinearSAE
from sae.architectures.resample import due, resample
from sae.coefficient import Coefficient
from sae.config import TrainConfig
from sae.dense_or_sparse import DenseOrSparse, Step
from sae.health import Finite
from sae.metrics import MetricsLog
from sae.ops.kernels import Kernels
from sae.sae import SAE, SAEConfig, Site

FREE = ("seed", "hook", "hook_out", "k", "lr", "l1_coefficient", "l0_coefficient", "target_l0")
"""The settings in which members of a stack may differ."""
_OF_MEMBER = ("b_dec", "W_skip")  # what has no rows by latent


@dataclass(frozen=True)
class Member:
    """One SAE to train: its name in the sweep ("" where it is alone), and what it reads and predicts.

    `columns` are the tensors of a batch that it takes, in order, each multiplied by its one of `scales` first; `mean` (d_out)
    is that of what it predicts, scaled.
    """

    name: str
    config: TrainConfig
    site: Site
    columns: tuple[int, ...]
    scales: tuple[float, ...]
    mean: Tensor

    def fresh(self) -> SAE:
        """Return the SAE to begin with."""
        kind = CrossLayerTranscoder if len(self.site.widths_out) > 1 else ARCHITECTURES[self.config.architecture]
        return kind.initialise(self.config, self.site, self.mean if self.config.center_inputs else torch.zeros_like(self.mean))

    def shape(self) -> object:
        """Return what is equal for members of one stack; of what cannot be stacked, something that is equal to nothing else."""
        config = self.config
        alone = config.kernels == "reference" or config.compute_dtype == "float8" or config.revives in ("resample", "ghost")
        if alone or config.skip_connection or len(config.hooks_out) > 1:
            return object()
        settings = config.model_dump(mode="json", exclude=set(FREE))
        kind = (self.site, config.unit_norm_decoder, config.subtracts_b_dec, config.k is None, config.target_l0 is None)
        return str((kind, sorted(settings.items())))


def stacks_of(members: Iterable[Member]) -> list[list[Member]]:
    """Return the members by shape, in the order in which they are given."""
    found: dict[object, list[Member]] = {}
    for member in members:
        found.setdefault(member.shape(), []).append(member)
    return list(found.values())


def stack(saes: Sequence[SAE]) -> SAE:
    """Return SAEs of equal shape as one; a single one as it is."""
    if len(saes) == 1:
        return saes[0]
    whole = type(saes[0])(replace(saes[0].cfg, d_sae=sum(sae.cfg.d_sae for sae in saes)))
    whole.members = len(saes)
    states = [sae.state_dict() for sae in saes]
    for name, value in states[0].items():
        parts = [state[name] for state in states]
        if name == "W_enc":
            joined = torch.cat([part.T for part in parts]).T
        else:
            joined = torch.stack(parts) if name in _OF_MEMBER or value.dim() == 0 else torch.cat(parts)
        if name in dict(whole.named_parameters()):
            whole.register_parameter(name, nn.Parameter(joined))
        else:
            whole.register_buffer(name, joined)
    return whole


@torch.no_grad()
def unstack(whole: SAE, cfgs: Sequence[SAEConfig]) -> list[SAE]:
    """Return the members of a stack, with weights of their own; `cfgs` are what they were before."""
    if len(cfgs) == 1:
        return [whole]
    saes = [type(whole)(cfg) for cfg in cfgs]
    for name, value in whole.state_dict().items():
        by_member = value.T.chunk(len(saes)) if name == "W_enc" else value.chunk(len(saes))
        for sae, part in zip(saes, by_member, strict=True):
            own = sae.state_dict()[name]
            own.copy_(part.T if name == "W_enc" else part.view_as(own))
    return saes


class Stack:
    """The training of a stack: its module, its optimiser, and all else that decides how it goes on."""

    def __init__(
        self, members: Sequence[Member], kernels: Kernels, device: torch.device, start: int,
        saved: tuple[dict[str, Tensor], dict[str, Any]] | None, metrics: Callable[[str], Path | None],
    ) -> None:  # fmt: skip
        """Begin at step `start`, from what `state` gave then, or anew."""
        self.members, self.config, self.device = members, members[0].config, device
        configs, count = [member.config for member in members], len(members)
        fresh = [member.fresh() for member in members]
        self.cfgs, self.sae = [sae.cfg for sae in fresh], stack(fresh)
        del fresh  # which may be as large as all that is trained
        tensors, facts = saved or ({}, {})

        def kept(kind: str) -> dict[str, Tensor]:
            return {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}

        if saved is not None:
            self.sae.load_state_dict(kept("weights."))
        self.sae.to(device)
        rates = torch.tensor([config.lr / self.config.lr for config in configs], device=device)
        self.optimizer = Adam(
            dict(self.sae.named_parameters()), self.sae.encoders(), self.sae.decoders(), kernels,
            betas=self.config.adam_betas, max_norm=self.config.max_grad_norm, unit=self.config.unit_norm_decoder,
            compute_dtype=self.config.compute_dtype, members=count, pace=rates,
        )  # fmt: skip
        if saved is not None:
            self.optimizer.restore(kept("adam."))
        idle = tensors["tokens_idle"] if saved else torch.zeros(self.sae.cfg.d_sae, dtype=torch.int64)
        self.idle = IdleTokens(idle.to(device), self.config.dead_window_tokens, count)
        self.way = DenseOrSparse(self.config, self.optimizer, facts.get("dense"), facts.get("density"))
        self.coefficient = Coefficient(configs, device, tensors.get("coefficient"))
        self.k = tuple(config.k for config in configs if config.k is not None)
        self.finite = Finite(start, device, [member.name for member in members])
        self.logs = [MetricsLog(metrics(member.name), start, start * self.config.batch_size) for member in members]
        self.resampled = 0

    def step(self, tensors: Sequence[Tensor], step: int) -> Step:
        """Take a step on a batch, on the device; nothing here waits for it."""
        config, sae = self.config, self.sae
        x = self._inputs(tensors)
        batch = len(x) // len(self.members)
        strength = self.coefficient.at(step)
        out = self.way.backward(sae, x, config, strength, self.idle.dead, step, self.k, self.coefficient.aim)
        self.finite.add(out.loss)
        self.optimizer.step(config.lr * learning_rate_factor(step, config))
        sae.after_step(config, out)
        self.idle.update(out.counts, batch)
        self.coefficient.update(out.counts.view(len(self.members), -1).sum(1), batch)
        if due(config, step) and isinstance(sae, LinearSAE):
            error = out.last.error  # of the batch's last part
            self.resampled += resample(sae, self.optimizer, self.idle, x[len(x) - len(error) :], error, config, step)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            figures = self._measure(sae.sides(x)[1], out)
            strength = torch.as_tensor(strength, device=self.device).expand(len(self.members))
            self._log(step, figures | {"coefficient": strength}, out)
        return out

    def _inputs(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return what the members read and predict, scaled, each member's rows behind those of the one before."""
        found: dict[tuple[Any, ...], Tensor] = {}
        for member in self.members:
            taken = member.columns, member.scales
            if taken not in found:
                scaled = [tensors[column] * scale for column, scale in zip(*taken, strict=True)]
                found[taken] = scaled[0] if len(scaled) == 1 else torch.cat(scaled, dim=1)
        parts = [found[member.columns, member.scales] for member in self.members]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def _measure(self, x: Tensor, out: Step) -> dict[str, Tensor]:
        """Return a step's figures, (members,) each; explained variance is 1 - sum||x - x_hat||^2 / sum||x - mean||^2."""
        count = len(self.members)
        by_member = x.view(count, -1, x.shape[1])
        batch = by_member.shape[1]
        return {
            "loss": out.loss,
            "mse": out.mse,
            "l1": out.l1,
            "l0": out.counts.view(count, -1).sum(1) / max(1, batch),
            "explained_variance": 1 - out.error / (by_member.var(1, correction=0).sum(1) * batch),
            "dead_fraction": self.idle.dead_counts / (len(self.idle.tokens) // count),
            **out.parts,
        }

    def _log(self, step: int, figures: dict[str, Tensor], out: Step) -> None:
        factor = learning_rate_factor(step, self.config)
        for number, (member, log) in enumerate(zip(self.members, self.logs, strict=True)):
            facts = {"lr": member.config.lr * factor, "sparse": float(out.sparse)}
            facts |= {"resampled": self.resampled} if self.resampled else {}
            own = {name: value[number] for name, value in figures.items()}
            log.add(step + 1, (step + 1) * self.config.batch_size, own, facts)
        self.resampled = 0

    def waited(self, seconds: float) -> None:
        """Take in that the loop stood still for want of a batch."""
        for log in self.logs:
            log.waited += seconds

    def settle(self, step: int, batches: Iterable[Any], checkpoint: str | None) -> None:
        """Write what is to be logged, and raise FloatingPointError if a loss was not finite (see `sae.health.Finite`)."""
        for log in self.logs:
            log.flush()
        self.finite.check(step, batches, checkpoint)

    @property
    def fine(self) -> bool:
        """Whether every loss written so far was finite."""
        return all(log.fine for log in self.logs)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint must hold: tensors and facts."""
        tensors = {"tokens_idle": self.idle.tokens, "coefficient": self.coefficient.state}
        tensors |= {f"weights.{name}": value.detach() for name, value in self.sae.state_dict().items()}
        tensors |= {f"adam.{name}": value for name, value in self.optimizer.state().items()}
        return tensors, {"dense": self.way.dense, "density": self.way.density}

    def finished(self) -> dict[str, SAE]:
        """Return the SAEs to use, by name, with scalings folded in."""
        found, saes = {}, unstack(self.sae.cpu(), self.cfgs)
        for member, log, trained in zip(self.members, self.logs, saes, strict=True):
            sae, scales, site = trained.finished(), member.scales, member.site
            if len(scales) == 1:
                sae.fold_scale(scales[0])
            else:
                widths = (*site.widths, *site.widths_out)
                columns = torch.cat([torch.full((w,), s) for w, s in zip(widths, scales, strict=True)])
                sae.fold_scale(columns[: site.d_in], columns[site.d_in :] if site.d_out else None)
            steps = self.config.steps
            training = {"steps": steps, "tokens": steps * self.config.batch_size,
                        "input_scale": scales[0] if len(scales) == 1 else list(scales), **log.last}  # fmt: skip
            sae.with_metadata(training=training, train_config=member.config.model_dump(mode="json"))
            found[member.name] = sae.eval().requires_grad_(False)
        return found


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Return the share of config.lr at `step`: linear warm-up from 1/n, flat, linear decay towards 0 at the end.

    >>> c = TrainConfig(d_sae=1, steps=10, lr_warmup_fraction=0.2, lr_decay_fraction=0.2)
    >>> [round(learning_rate_factor(s, c), 2) for s in (0, 1, 2, 7, 8, 9)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]
    """
    warm = max(1, round(config.steps * config.lr_warmup_fraction))
    decay = max(1, round(config.steps * config.lr_decay_fraction))
    return min(1.0, (step + 1) / warm, (config.steps - step) / decay)
