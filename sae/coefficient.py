"""How strong the sparsity penalty is: its warm-up, and the controller that finds the strength for a wanted L0."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sae.config import TrainConfig

_SMOOTHING = 0.1  # weight of a batch in the L0 that is looked at
_SLOPE_SMOOTHING = 0.05
_TIME = 0.06  # of the steps: an L0 a factor e off changes the strength by a factor e in so many
_TIME_LIMITS = (20.0, 500.0)
_HORIZON = 1.6  # of that time: so far ahead L0 is looked at, by its slope; what is on its way already needs no more
_GENTLY = 0.2  # of the strength given, to begin with: from above L0 comes down with few deaths, from below it hardly comes up
_BEGIN = 0.1  # of the steps: until then latents find what they are for
_DESCENT = 0.25  # of the steps: so long L0 may take from there; latents that a steeper way silences stay dead


class Coefficient:
    """The penalty's strength at each step, of one SAE or of each of several that are alike but for it and for the target:
    linear warm-up from 0 and, with `target_l0`, times what a controller has found.

    The controller integrates in logarithms: log strength moves by log(L0 / target), as L0 will stand a
    little later if it goes on as it does, so that a penalty that is already at work is not strengthened further (in the
    manner of the L0 tuner of Chanin et al. 2025, "SynthSAEBench"). All on the device: nothing waits for it.

    A quadratic penalty pulls L0 to its centre by itself, if never quite: there the strength stays, and the centre is what is
    moved, by the same controller.
    """

    def __init__(self, configs: Sequence[TrainConfig], device: torch.device, state: Tensor | None = None) -> None:
        """Begin, or go on from `state`."""
        self.config = config = configs[0]
        low, high = _TIME_LIMITS
        self.time = min(max(_TIME * config.steps, low), high)
        # log of the factor found; log L0 smoothed, its slope a step, what it was when the controller began; batches so far
        self.state = torch.zeros(5, len(configs), device=device) if state is None else state.to(device)
        self.horizon = _HORIZON * self.time
        self.wanted = torch.tensor([math.log(c.target_l0 or 1) for c in configs], device=device)
        self.given = torch.tensor([c.coefficient for c in configs], device=device) if len(configs) > 1 else config.coefficient

    def at(self, step: int) -> Tensor | float:
        """Return the strength at `step`: a number, or (members,)."""
        strength = self.given * warmup_factor(step, self.config)
        if self.config.target_l0 is None or self.config.l0_penalty == "quadratic":
            return strength
        return _GENTLY * strength * self.state[0].exp()

    @property
    def aim(self) -> Tensor | None:
        """The L0 that a quadratic penalty is centred on now, (members,)."""
        return (self.wanted - self.state[0]).exp() if self.config.l0_penalty == "quadratic" else None

    @torch.no_grad()
    def update(self, fired: Tensor, rows: int) -> None:
        """Take in how many latents fired, (members,), on a batch of `rows` tokens."""
        if self.config.target_l0 is None or rows == 0:
            return
        factor, level, slope, first, seen = self.state.unbind()
        steps = self.config.steps
        now = (fired / rows).clamp(min=1e-3).log()
        before = level
        level = torch.where(seen == 0, now, level + _SMOOTHING * (now - level))
        slope = torch.where(seen == 0, 0, slope + _SLOPE_SMOOTHING * (level - before - slope))
        begun = seen >= _BEGIN * steps
        first = torch.where(begun, first, level)
        left = (1 - (seen + self.horizon - _BEGIN * steps) / (_DESCENT * steps)).clamp(0, 1)  # of the way
        error = (level + slope * self.horizon - (self.wanted + left * (first - self.wanted))).clamp(-1, 1)
        self.state = torch.stack([factor + torch.where(begun, error / self.time, 0), level, slope, first, seen + 1])


def warmup_factor(step: int, config: TrainConfig) -> float:
    """Return the share of the penalty's strength at `step`: linear warm-up (April 2024 update: over the first 5 %)."""
    return min(1.0, (step + 1) / max(1, round(config.steps * config.l1_warmup_fraction)))
