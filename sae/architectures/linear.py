"""What most architectures share: one linear encoder, one linear decoder, and a rule that says which latents fire."""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from sae.architectures.auxk import auxk_loss, ghost_loss
from sae.config import TrainConfig
from sae.ops import Latents, Ops, Rule, SparseLatents, TopK, kernels_for
from sae.ops.kernels import Screen
from sae.ops.latents import Above, of_dense
from sae.ops.training import Reconstruction, select, thresholds
from sae.sae import SAE, Fired, Moment, SAEConfig, Site, TrainingLoss, row_mean

Coder = TypeVar("Coder", bound="LinearSAE")
_WORTH_A_SCREEN = 512  # rows: for fewer, making the bfloat16 copy costs more than it saves


class LinearSAE(SAE):
    """z = (x - b_dec) W_enc + b_enc, f = the entries of z that `rule` keeps, x_hat = f W_dec + b_dec.

    With `apply_b_dec_to_input` false, b_dec is not subtracted from the input. A skip transcoder adds x W_skip^T (Paulo et al.
    2025, "Transcoders Beat Sparse Autoencoders for Interpretability"). Both matrices lie in memory by latent: W_enc
    is the transpose of a (d_sae, d_in) array, so that a latent's encoder column is as contiguous as its decoder row.
    """

    def __init__(self, cfg: SAEConfig) -> None:
        """Create parameters, uninitialised."""
        super().__init__(cfg)
        dtype = getattr(torch, cfg.dtype)
        self.W_enc = nn.Parameter(torch.empty(cfg.d_sae, cfg.d_in, dtype=dtype).T)
        self.b_enc = nn.Parameter(torch.empty(cfg.d_sae, dtype=dtype))
        self.W_dec = nn.Parameter(torch.empty(cfg.d_sae, cfg.width_out, dtype=dtype))
        self.b_dec = nn.Parameter(torch.empty(cfg.width_out, dtype=dtype))
        if cfg.skip:
            self.W_skip = nn.Parameter(torch.empty(cfg.width_out, cfg.d_in, dtype=dtype))

    def rule(self) -> Rule:
        """Say which latents fire outside of training."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Return latents, (..., d_in) -> (..., d_sae), never negative."""
        z = self._input(x) @ self.W_enc + self.b_enc
        return select(z.reshape(-1, z.shape[-1]), self.rule()).view_as(z)

    def _input(self, x: Tensor) -> Tensor:
        """Return what the encoder's product is taken of, in the weights' dtype."""
        x = x.to(self.W_enc.dtype)
        if self.cfg.normalize_activations == "layer_norm":
            mean, deviation = _row_moments(x)
            x = (x - mean) / (deviation + 1e-5)
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    def decode(self, f: Tensor) -> Tensor:
        """Return reconstructions, (..., d_sae) -> (..., d_in), without a skip connection, in the scale of a layer norm."""
        return f @ self.W_dec + self.b_dec

    def complete(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """See SAE."""
        x = x.to(x_hat.dtype)
        if self.cfg.skip:
            x_hat = x_hat + x @ self.W_skip.T
        if self.cfg.normalize_activations == "layer_norm":
            mean, deviation = _row_moments(x)
            x_hat = x_hat * deviation + mean
        return x_hat

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseLatents:
        """Return the latents that fire on x (batch, d_in), without a (batch, d_sae) matrix ever being whole."""
        rule, kernels, screen = self.rule(), kernels_for(x.device.type), None
        if self.W_enc.dtype != torch.float32:
            return of_dense(self.encode(x), kernels)
        x = self._input(x)
        weight, bias = self.W_enc.T.detach(), self.b_enc.detach()
        if kernels.screens and len(x) >= _WORTH_A_SCREEN:
            screen = Screen.of(weight)
        if isinstance(rule, TopK):
            return kernels.topk(x, weight, bias, min(rule.k, self.cfg.d_sae), screen)
        assert isinstance(rule, Above)
        bars, most = thresholds(rule, self.cfg.d_sae, x.device), len(x) * self.cfg.d_sae
        if not x.is_cuda:
            return kernels.above(x, weight, bias, bars, most, screen)
        # arrays have the length of the room there: look how many there are, which outside of training may wait
        room = min(most, max(most // 32, 1 << 20))
        f = kernels.above(x, weight, bias, bars, room)
        entries = int(f.starts[-1])
        if entries > room:
            f = kernels.above(x, weight, bias, bars, entries)
        return SparseLatents(f.starts, f.latents[:entries], f.values[:entries], f.d_sae, kernels)

    @torch.no_grad()
    def decode_sparse(self, f: SparseLatents) -> Tensor:
        """Return reconstructions (batch, d_in) of what `encode_sparse` gave."""
        if self.W_dec.dtype != torch.float32:
            return self.decode(f.dense().to(self.W_dec.dtype))
        return f.kernels.decode(f, self.W_dec.detach(), self.b_dec.detach())

    # Training: what the losses of the architectures share

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See SAE."""
        if self.cfg.d_out is None:
            return x, x
        return x[:, : self.cfg.d_in].contiguous(), x[:, self.cfg.d_in :].contiguous()

    @property
    def shift(self) -> Tensor | None:
        """What the encoder's input is taken relative to."""
        return self.b_dec if self.cfg.apply_b_dec_to_input else None

    def encode_with(self, ops: Ops, x: Tensor, rule: Rule) -> Latents:
        """Return the pre-activations that the rule keeps, for a loss."""
        return ops.encode(x, self.W_enc, self.b_enc, rule, self.shift)

    def rest(self, x: Tensor, target: Tensor) -> Tensor:
        """Return what latents are to predict: the target, less what goes past them."""
        return target - x @ self.W_skip.T if self.cfg.skip else target

    def fire(self, x: Tensor, now: Moment) -> Fired:
        """Return what x fires in training, and at what price: what makes an architecture."""
        raise NotImplementedError

    def rowwise(self, config: TrainConfig) -> bool:
        """See SAE; reviving looks at the batch's variance."""
        return config.revives not in ("auxk", "ghost")

    def training_loss(self, x: Tensor, now: Moment) -> TrainingLoss:
        """Return mean_x ||x - x_hat||^2, summed over d_out, + the architecture's penalty + what revives dead latents."""
        x, target = self.sides(x)
        fired = self.fire(x, now)
        out = now.ops.reconstruct(fired.latents, self.W_dec, self.b_dec, self.rest(x, target))
        mse = self.mean(out.error)
        extra, parts = self.revived(now, x, target, out)
        loss = mse + fired.penalty + extra
        return TrainingLoss(loss, mse, fired.l1, fired.latents, out.error.detach(), fired.parts | parts)

    def l1(self, f: Latents, now: Moment) -> Tensor:
        """Return mean_x sum_i f_i, times ||W_dec,i|| where rows are free to have any norm: that a penalty must not pull at."""
        return self.mean(f.row_sum(f.values) if now.config.unit_norm_decoder else f.dot(self.norms(now.ops)))

    def mean(self, values: Tensor) -> Tensor:
        """Return each member's mean of (batch,) values, (members,)."""
        return row_mean(values, self.members)

    def norms(self, ops: Ops) -> Tensor:
        """Return the decoder's norms, (d_sae,), as penalties count them."""
        if self.cfg.widths:  # a crosscoder's latent costs what its decoders at all hooks cost together (Lindsey et al. 2024)
            return ops.block_norms(self.W_dec, self.cfg.widths).sum(1)
        return ops.norms(self.W_dec)

    @property
    def bias_of_dead(self) -> Tensor:
        """The bias by which dead latents are revived."""
        return self.b_enc

    def revived(self, now: Moment, x: Tensor, target: Tensor, out: Reconstruction) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Return what the loss gets for the sake of dead latents, and how it is logged."""
        config = now.config
        dead = now.dead() if config.revives in ("auxk", "ghost") and len(x) else None
        if dead is None:
            return 0.0, {}
        if config.revives == "ghost":
            assert self.members == 1
            ghost = ghost_loss(x, out, dead, now.ops, self.W_enc, self.bias_of_dead, self.W_dec, self.shift)
            return ghost, {"ghost": ghost.detach()}
        k = config.auxk_k or max(1, x.shape[1] // 2)
        aux = auxk_loss(x, target, out.residual, dead, k, now.ops, self.W_enc, self.bias_of_dead, self.W_dec, self.shift)
        return config.auxk_coefficient * aux, {"auxk": aux.detach()}

    def restart(self, config: TrainConfig, latents: Tensor, decoders: Tensor, encoders: Tensor) -> None:
        """Give these latents other rows (n, d_in), and biases of 0."""
        self.W_dec[latents] = decoders
        self.W_enc.T[latents] = encoders
        self.bias_of_dead[latents] = 0

    def finished(self) -> "LinearSAE":
        """See SAE."""
        return self

    def encoders(self) -> dict[str, Tensor]:
        """See SAE."""
        return {"W_enc": self.W_enc.T}

    def decoders(self) -> dict[str, Tensor]:
        """See SAE."""
        return {"W_dec": self.W_dec}

    @classmethod
    def initialise(cls, config: TrainConfig, site: Site, mean: Tensor) -> "LinearSAE":
        """Random decoder rows of norm `decoder_init_norm` (1 where rows keep norm 1), encoder its transpose, b_dec = mean.

        A transcoder's encoder starts as an SAE's would, its decoder and skip connection at 0, so that it begins by predicting
        the mean (Dunefsky et al. 2024, "Transcoders Find Interpretable LLM Feature Circuits").
        """
        hooks, hooks_out, d_in, d_out = config.hooks, config.hooks_out, site.d_in, site.d_out
        many = len(site.widths) > 1
        sae = cls(
            SAEConfig(
                cls.architecture, d_in, config.d_sae, None if many or not hooks else hooks[0],
                apply_b_dec_to_input=config.subtracts_b_dec and d_out is None, k=config.k, d_out=d_out,
                hook_name_out=hooks_out[0] if hooks_out and not many else None, skip=config.skip_connection,
                hook_names=hooks if many else (), widths=site.widths if many else (),
            )
        )  # fmt: skip
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randn(config.d_sae, d_in, generator=generator)
        norm = 1.0 if config.unit_norm_decoder else config.decoder_init_norm
        rows *= norm / rows.norm(dim=1, keepdim=True)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.zero_()
            sae.W_enc.copy_(rows.T)
            if d_out is None:
                sae.W_dec.copy_(rows)  # copies: tied at the start only
            sae.b_dec.copy_(mean)
        return sae

    def become(self, kind: type[Coder], architecture: str) -> Coder:
        """Return an SAE of another kind with the same weights: what a training form leaves behind."""
        sae = kind(replace(self.cfg, architecture=architecture, k=None))
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                if name in self._parameters:
                    parameter.copy_(self.get_parameter(name))
        return sae

    @torch.no_grad()
    def fold_scale(self, scale: float | Tensor, scale_out: float | Tensor | None = None) -> None:
        """Fold the scales, then the decoder norms: x -> x_hat and the active sets stay, decoder rows get norm 1.

        Scale s in, t out (s, in an SAE): W_enc *= s, W_dec /= t, b_dec /= t, W_skip *= s / t. Norms n_i: W_enc column i and
        b_enc_i times n_i, W_dec row i over n_i. Rows of norm zero stay as they are.
        """
        scale = torch.as_tensor(scale, dtype=self.W_enc.dtype)
        out = scale if scale_out is None else torch.as_tensor(scale_out, dtype=self.W_enc.dtype)
        self.W_enc.mul_(scale.view(-1, 1))
        self.W_dec.div_(out)
        self.b_dec.div_(out)
        if self.cfg.skip:
            self.W_skip.mul_(scale).div_(out.view(-1, 1))
        norm = self.W_dec.norm(dim=1)
        self.fold_norms(torch.where(norm > 0, norm, torch.ones_like(norm)))

    def fold_norms(self, norm: Tensor) -> None:
        """Divide decoder rows by `norm` (d_sae,), and make latents so many times larger."""
        self.W_enc.mul_(norm)
        self.b_enc.mul_(norm)
        self.W_dec.div_(norm[:, None])


def _row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation of each row, (..., 1), as OpenAI's layer norm takes them."""
    return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
