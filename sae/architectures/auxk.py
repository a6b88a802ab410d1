"""Losses that revive dead latents: AuxK (Gao et al. 2024, appendix A.2) and ghost gradients (Jermyn & Templeton 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae.ops import Ops
from sae.ops.training import HostCount, Reconstruction, minus


@dataclass(frozen=True)
class Dead:
    """The dead latents: `latents` (members, n) int64, different, of which those count where `mask` (members, n) holds.

    Of one SAE, and not a stack, they may also be (n,).
    """

    latents: Tensor
    mask: Tensor


class IdleTokens:
    """For how many tokens each latent has not fired, (d_sae,) int64; dead is who has not for `window` of them.

    Of a stack, the latents of all `members` stand behind one another.
    """

    def __init__(self, tokens: Tensor, window: int, members: int = 1) -> None:
        """Start from `tokens`, which is kept up to date in place."""
        self.tokens, self.window, self.members = tokens, window, members
        self._count = HostCount(self._most())

    @property
    def dead_counts(self) -> Tensor:
        """How many are dead, (members,)."""
        return (self.tokens >= self.window).view(self.members, -1).sum(1)

    def _most(self) -> Tensor:
        return self.dead_counts.amax()

    @torch.no_grad()
    def update(self, counts: Tensor, rows: int) -> None:
        """Take in a batch of `rows` tokens, on `counts` (d_sae,) of which each latent fired."""
        self.tokens.add_(rows).masked_fill_(counts > 0, 0)
        self._count = HostCount(self._most())

    def dead(self) -> Dead | None:
        """Return who is dead, or None; called when a step's own work is queued already, it keeps no device waiting.

        As many latents as the next power of two are looked at, those idle longest, so that shapes seldom change; of each
        member as many as of the one with the most.
        """
        count = self._count.wait()
        if count == 0:
            return None
        by_member = self.tokens.view(self.members, -1)
        d_each = by_member.shape[1]
        within = by_member.topk(min(d_each, 1 << (count - 1).bit_length()), dim=1).indices
        latents = within + d_each * torch.arange(self.members, device=within.device)[:, None]
        return Dead(latents, self.tokens[latents] >= self.window)


def auxk_loss(
    x: Tensor, target: Tensor, residual: Tensor, dead: Dead, k: int, ops: Ops, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor,
    b_dec: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return each member's squared error, mean over the batch, of modelling the residual by the k largest dead latents of
    each row, (members,).

    x (batch, d_in), residual = x_hat - target (batch, d_out), no gradient passes through the latter; in an SAE the target is
    x. b_dec is not added to the model of the residual. Normalised as the paper's, whose loss is mse / var + alpha * aux / mean
    square of the residual, here times the target's variance.
    Few latents are dead, so this is dense over those few: exact, with the gradient reaching the encoder.
    """
    which, members = dead.latents.flatten(), len(dead.latents) if dead.latents.dim() == 2 else 1

    def blocks(rows: Tensor) -> Tensor:  # those of each member
        return rows.view(members, -1, rows.shape[-1])

    encoder, decoder = blocks(ops.encoder_rows(W_enc, which)), blocks(ops.decoder_rows(W_dec, which))
    z = blocks(minus(x, b_dec)) @ encoder.mT + b_enc[which].view(members, 1, -1)
    f = torch.relu(z).masked_fill(~dead.mask.view(members, 1, -1), 0)
    if f.shape[-1] > k:
        top = f.topk(k, dim=-1)
        f = torch.zeros_like(f).scatter(-1, top.indices, top.values)
    target, residual = blocks(target), blocks(residual)
    error, left = ((t.square().sum(-1).mean(1)) for t in (f @ decoder + residual, residual))
    variance = (target - target.mean(1, keepdim=True)).square().sum(-1).mean(1)
    return error * (variance / torch.maximum(left, 1e-6 * variance).clamp(min=1e-30)).detach()


def ghost_loss(
    x: Tensor, out: Reconstruction, dead: Dead, ops: Ops, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor,
    b_dec: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the ghost gradients' loss (Jermyn & Templeton, "Ghost Grads: An improvement on resampling", January 2024).

    Dead latents, with exp in place of ReLU, model the residual x - x_hat; their output is brought to half the residual's
    norm, row by row, and the squared error to the size of the SAE's own. No gradient passes through either scale, or the
    residual.
    """
    which = dead.latents.flatten()
    z = minus(x, b_dec) @ ops.encoder_rows(W_enc, which).T + b_enc[which]
    # an exponential that is not bounded overflows for a latent whose bias has run away upwards before it died
    f = torch.exp(z.clamp(max=20)).masked_fill(~dead.mask.flatten(), 0)
    ghost = f @ ops.decoder_rows(W_dec, which)
    norm = ghost.detach().norm(dim=-1, keepdim=True)
    ghost = ghost * (out.residual.norm(dim=-1, keepdim=True) / (2 * norm).clamp(min=1e-6))
    error = (ghost + out.residual).square().sum(-1).mean()
    loss: Tensor = error * (out.error.detach().mean() / error.detach().clamp(min=1e-30))
    return loss
