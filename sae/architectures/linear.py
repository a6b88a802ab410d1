"""What most architectures share: one linear encoder, one linear decoder, and a rule that says which latents fire."""

import torch
from torch import Tensor, nn

from sae.config import TrainConfig
from sae.ops import Rule, SparseLatents, TopK, kernels_for
from sae.ops.kernels import Screen
from sae.ops.latents import Above, of_dense
from sae.ops.training import select, thresholds
from sae.sae import SAE, SAEConfig

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
        """Return what the encoder's product is taken of."""
        if self.cfg.normalize_activations == "layer_norm":
            mean, deviation = _row_moments(x)
            x = (x - mean) / deviation
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    def decode(self, f: Tensor) -> Tensor:
        """Return reconstructions, (..., d_sae) -> (..., d_in), without a skip connection, in the scale of a layer norm."""
        return f @ self.W_dec + self.b_dec

    def complete(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """See SAE."""
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
        if self.W_enc.dtype != torch.float32 or x.dtype != torch.float32:
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

    def encoders(self) -> dict[str, Tensor]:
        """See SAE."""
        return {"W_enc": self.W_enc.T}

    def decoders(self) -> dict[str, Tensor]:
        """See SAE."""
        return {"W_dec": self.W_dec}

    @classmethod
    def initialise(cls, config: TrainConfig, d_in: int, mean: Tensor) -> "LinearSAE":
        """Random decoder rows of norm `decoder_init_norm` (1 where rows keep norm 1), encoder its transpose, b_dec = mean."""
        sae = cls(
            SAEConfig(
                cls.architecture, d_in, config.d_sae, config.hook, apply_b_dec_to_input=config.apply_b_dec_to_input, k=config.k
            )
        )
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randn(config.d_sae, d_in, generator=generator)
        norm = 1.0 if config.unit_norm_decoder else config.decoder_init_norm
        with torch.no_grad():
            sae.W_dec.copy_(rows * (norm / rows.norm(dim=1, keepdim=True)))
            sae.W_enc.copy_(sae.W_dec.T)  # a copy: tied at the start only
            sae.b_enc.zero_()
            sae.b_dec.copy_(mean)
        return sae

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Fold the input scale, then the decoder norms: x -> x_hat and the active sets stay, decoder rows get norm 1.

        Scale s: W_enc *= s, W_dec /= s, b_dec /= s. Norms n_i: W_enc column i and b_enc_i times n_i, W_dec row i over n_i.
        Rows of norm zero stay as they are.
        """
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)
        norm = self.W_dec.norm(dim=1)
        self.fold_norms(torch.where(norm > 0, norm, torch.ones_like(norm)))

    def fold_norms(self, norm: Tensor) -> None:
        """Divide decoder rows by `norm` (d_sae,), and make latents so many times larger."""
        self.W_enc.mul_(norm)
        self.b_enc.mul_(norm)
        self.W_dec.div_(norm[:, None])


def _row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation + 1e-5 of each row, (..., 1): OpenAI's layer norm, with the unbiased deviation."""
    return x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-5
