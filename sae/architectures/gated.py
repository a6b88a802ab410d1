"""Gated: one path of the encoder says which latents fire, the other how strongly."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from sae.architectures.jumprelu import JumpReLUSAE
from sae.architectures.linear import LinearSAE
from sae.config import TrainConfig
from sae.ops import Above, SparseLatents, kernels_for
from sae.ops.latents import of_dense
from sae.sae import Moment, SAEConfig, TrainingLoss


class GatedSAE(LinearSAE):
    """u = (x - b_dec) W_enc; f_i = ReLU(exp(r_mag_i) u_i + b_mag_i) where u_i + b_gate_i > 0, else 0; x_hat = f W_dec + b_dec.

    Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders", equations 6 and 7. b_gate, b_mag
    and r_mag are (d_sae,); there is no b_enc.
    """

    architecture: ClassVar[str] = "gated"
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor

    def __init__(self, cfg: SAEConfig) -> None:
        """Create parameters, uninitialised."""
        super().__init__(cfg)
        del self.b_enc
        for name in ("b_gate", "b_mag", "r_mag"):
            self.register_parameter(name, nn.Parameter(torch.empty(cfg.d_sae, dtype=getattr(torch, cfg.dtype))))

    def encode(self, x: Tensor) -> Tensor:
        """Return latents, (..., d_in) -> (..., d_sae), never negative."""
        u = self._input(x) @ self.W_enc
        return torch.where(u + self.b_gate > 0, torch.relu(self.r_mag.exp() * u + self.b_mag), 0)

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseLatents:
        """Return the latents that fire on x (batch, d_in), without a (batch, d_sae) matrix ever being whole."""
        if self.W_enc.dtype != torch.float32:
            return of_dense(self.encode(x), kernels_for(x.device.type))
        return self.as_jumprelu().encode_sparse(x)

    @torch.no_grad()
    def as_jumprelu(self) -> JumpReLUSAE:
        """Return the JumpReLU SAE that is the same function up to rounding (ibid., below equation 7); decoders are shared.

        Where the gate opens, z = exp(r_mag) u + b_mag is above b_mag - exp(r_mag) b_gate, and ReLU asks for z > 0.
        """
        with torch.device("meta"):
            sae = JumpReLUSAE(replace(self.cfg, architecture="jumprelu"))
        scale, own = self.r_mag.exp(), dict(self.state_dict())
        shared: dict[str, Tensor] = {name: own[name] for name in ("W_dec", "b_dec", "W_skip") if name in own}
        threshold = (self.b_mag - scale * self.b_gate).clamp(min=0)
        encoder = {"W_enc": (self.W_enc.T * scale[:, None]).T, "b_enc": own["b_mag"], "threshold": threshold}
        sae.load_state_dict({**shared, **encoder}, assign=True)
        return sae.requires_grad_(False)

    @property
    def bias_of_dead(self) -> Tensor:
        """Dead is a latent whose gate stays shut."""
        return self.b_gate

    def restart(self, config: TrainConfig, latents: Tensor, decoders: Tensor, encoders: Tensor) -> None:
        """See LinearSAE."""
        super().restart(config, latents, decoders, encoders)
        self.b_mag[latents] = 0
        self.r_mag[latents] = 0

    def training_loss(self, x: Tensor, now: Moment) -> TrainingLoss:
        """Return mean_x ||x - x_hat||^2 + coefficient * L1(gate) + ||x - x_gate||^2 (ibid., equation 8).

        The gate's ReLU(u + b_gate) is what the penalty shrinks, and x_gate is what the decoder makes of it; no gradient of
        either reaches the decoder: where its rows are free (in transcoders) their norms only weigh the penalty, for else they
        would shrink, and exp(r_mag) make up for it. Where the gate is shut nothing has a gradient,
        so its open entries are all that is looked at; the magnitudes are taken from them.
        """
        ops = now.ops
        x, target = self.sides(x)
        gate = ops.encode(x, self.W_enc, self.b_gate, Above(), self.shift)
        scale, of = self.r_mag.exp(), gate.of_latent
        magnitude = of(scale) * (gate.values - of(self.b_gate)) + of(self.b_mag)
        f = gate.with_values(torch.relu(torch.where(gate.values > 0, magnitude, 0)))
        rest = self.rest(x, target)
        out = ops.reconstruct(f, self.W_dec, self.b_dec, rest)
        by_gate = ops.reconstruct(gate, self.W_dec, self.b_dec.detach(), rest.detach(), frozen=True)
        mse, aux, l1 = self.mean(out.error), self.mean(by_gate.error), self.mean(gate.dot(self.norms(ops).detach()))
        extra, parts = self.revived(now, x, target, out)
        parts |= {"gate": aux.detach()}
        return TrainingLoss(mse + now.coefficient * l1 + aux + extra, mse, l1, f, out.error.detach(), parts)

    def fold_norms(self, norm: Tensor) -> None:
        """See LinearSAE; exp(r_mag) multiplies what W_enc has scaled already."""
        self.W_enc.mul_(norm)
        self.b_gate.mul_(norm)
        self.b_mag.mul_(norm)
        self.W_dec.div_(norm[:, None])
