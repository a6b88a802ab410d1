"""What of an SAE's error is a linear function of its input (Engels et al. 2024, "Decomposing the Dark Matter of SAEs").

Ridge regressions of the error vector, of its norm and of its squared norm, fitted on one half of the held-out sequences and
judged on the other. Nothing but moments is kept: everything follows from them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

_STRENGTHS = torch.logspace(-8, 2, 21, dtype=torch.float64)  # of ridges, times the mean eigenvalue of the input's scatter


@dataclass
class _Moments:
    """Sums over tokens of x and t = (error, its norm, its squared norm), float64."""

    tokens: int
    x: Tensor
    t: Tensor
    xx: Tensor
    xt: Tensor
    tt: Tensor
    y: Tensor
    yy: Tensor

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scatter of x, of x with t, and of each t alone, about the means."""
        n = self.tokens
        return (
            self.xx - torch.outer(self.x, self.x) / n, self.xt - torch.outer(self.x, self.t) / n, self.tt - self.t.square() / n,
        )  # fmt: skip


class ErrorRegression:
    """Takes inputs, targets and predictions of each half, token by token, and says at the end what is linear in their error."""

    def __init__(self, d_in: int, d_out: int, device: torch.device) -> None:
        """Start with nothing seen."""
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        t = d_out + 2
        self.halves = [
            _Moments(0, zeros(d_in), zeros(t), zeros(d_in, d_in), zeros(d_in, t), zeros(t), zeros(d_out), zeros(()))
            for _ in range(2)
        ]

    def update(self, x: Tensor, y: Tensor, y_hat: Tensor, half: int) -> None:
        """Add tokens of one half: x (token, d_in), y and y_hat (token, d_out)."""
        into = self.halves[half]
        x, y, error = x.double(), y.double(), (y - y_hat).double()
        square = error.square().sum(1, keepdim=True)
        t = torch.cat([error, square.sqrt(), square], 1)
        into.tokens += len(x)
        for total, values in ((into.x, x), (into.t, t), (into.tt, t.square()), (into.y, y)):
            total += values.sum(0)
        into.yy += y.square().sum()
        into.xx += x.T @ x
        into.xt += x.T @ t

    def figures(self) -> dict[str, Any]:
        """Return shares of variance on the second half, R^2 = 1 - sum(t - t_hat)^2 / sum(t - mean)^2; None where undefined.

        error_vector_r2 pools all d_out components; error_norm_r2 and error_squared_norm_r2 are of ||e|| and ||e||^2. fvu =
        sum||e||^2 / sum||y - mean||^2 on these tokens, and nonlinear_fvu is what is left of it when the linear prediction of
        the error is added to the reconstruction.
        """
        fit, test = self.halves
        result: dict[str, Any] = {"train_tokens": fit.tokens, "test_tokens": test.tokens}
        names = ("error_vector_r2", "error_norm_r2", "error_squared_norm_r2", "fvu", "nonlinear_fvu")
        if min(fit.tokens, test.tokens) < 2:
            return {**result, **dict.fromkeys(names)}
        d = fit.y.shape[0]
        xx, xt, tt = fit.centred()
        values, vectors = torch.linalg.eigh(xx)
        values, rotated = values.clamp(min=0), vectors.T @ xt
        targets = (slice(0, d), slice(d, d + 1), slice(d + 1, d + 2))
        weights = torch.cat([_ridge(values, vectors, rotated[:, of], tt[of], fit.tokens) for of in targets], 1)
        bias = (fit.t - fit.x @ weights) / fit.tokens
        # sum (t - xW - b)^2 over the second half, by its moments
        left = (
            test.tt - 2 * (weights * test.xt).sum(0) - 2 * bias * test.t + (weights * (test.xx @ weights)).sum(0)
            + 2 * bias * (test.x @ weights) + test.tokens * bias.square()
        )  # fmt: skip
        spread = test.tt - test.t.square() / test.tokens
        variance = float(test.yy - test.y.square().sum() / test.tokens)
        result["error_vector_r2"] = _share(left[:d].sum(), spread[:d].sum())
        result["error_norm_r2"], result["error_squared_norm_r2"] = _share(left[d], spread[d]), _share(left[d + 1], spread[d + 1])
        result["fvu"] = float(test.tt[:d].sum()) / variance if variance > 0 else None
        result["nonlinear_fvu"] = float(left[:d].sum()) / variance if variance > 0 else None
        return result


def _share(left: Tensor, spread: Tensor) -> float | None:
    return float(1 - left / spread) if spread > 0 else None


def _ridge(values: Tensor, vectors: Tensor, rotated: Tensor, tt: Tensor, tokens: int) -> Tensor:
    """Return ridge weights (d_in, n), of the strength that generalised cross-validation likes best (Golub et al. 1979).

    values (d_in) and vectors of the inputs' scatter, `rotated` (d_in, n) its product with the targets in that basis.
    """
    best = (torch.inf, torch.zeros_like(rotated))
    power = rotated.square().sum(1)
    for strength in (_STRENGTHS.to(values.device) * values.mean()).tolist():
        if strength <= 0:
            break
        shrunk = 1 / (values + strength)
        left = tt.sum() - (power * (2 * shrunk - values * shrunk.square())).sum()
        freedom = 1 - float((values * shrunk).sum() + 1) / tokens
        if freedom > 0 and (score := float(left) / freedom**2) < best[0]:
            best = (score, shrunk[:, None] * rotated)
    return vectors @ best[1]
