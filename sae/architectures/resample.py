"""Resampling: dead latents start anew from inputs that are modelled badly (Bricken et al. 2023, "Neuron Resampling")."""

import torch
from torch import Tensor

from sae.adam import Adam
from sae.architectures.auxk import IdleTokens
from sae.architectures.linear import LinearSAE
from sae.config import TrainConfig

_ENCODER_SHARE = 0.2  # of the mean norm of live latents' encoder columns: gently, so as not to upset the others
_UNTIL = 0.8  # of the steps: what starts later has no time to learn


def due(config: TrainConfig, step: int) -> bool:
    """Say whether dead latents start anew after `step`."""
    every = max(1, config.resample_every_tokens // config.batch_size)
    return config.revives == "resample" and (step + 1) % every == 0 and step + 1 <= _UNTIL * config.steps


@torch.no_grad()
def resample(sae: LinearSAE, optimizer: Adam, idle: IdleTokens, x: Tensor, error: Tensor, config: TrainConfig, step: int) -> int:
    """Start dead latents anew, and return how many there were.

    Each takes a row of x (batch, d_in) of its own, drawn with probability in proportion to its squared loss, error (batch,)
    squared: relative to b_dec and at norm 1, as its decoder row; at a fifth of the live latents' mean norm, as its encoder
    column. Two with one row would stay equal for ever: where there are more dead latents than rows, those idle for longest
    begin, and the others at a later turn. Biases and Adam's moments are 0 again. The draw is a function of (seed, step).
    """
    chances = error.double().square().cpu()
    most = min(int((idle.tokens >= idle.window).sum()), int((chances > 0).sum()))
    if most == 0:
        return 0
    dead = idle.tokens.topk(most).indices.sort().values
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    rows = torch.multinomial(chances, most, replacement=False, generator=generator).to(x.device)
    chosen = x[rows] if sae.shift is None else x[rows] - sae.shift
    directions = torch.nn.functional.normalize(chosen, dim=1)
    alive = idle.tokens < idle.window
    live = alive if bool(alive.any()) else ~alive
    decoder_norm = sae.W_dec.norm(dim=1)[live].mean()
    encoder_norm = sae.W_enc.norm(dim=0)[live].mean() * _ENCODER_SHARE
    sae.restart(config, dead, directions * decoder_norm, directions * encoder_norm)
    optimizer.forget(dead)
    idle.tokens[dead] = 0
    return len(dead)
