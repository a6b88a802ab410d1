"""Cross-layer transcoder: each layer's latents help to predict the outputs of their own layer and of all later ones."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from sae.architectures.linear import LinearSAE
from sae.config import TrainConfig
from sae.sae import SAE, Moment, SAEConfig, Site, TrainingLoss, row_mean

if TYPE_CHECKING:
    from sae.dense_or_sparse import Step


class CrossLayerTranscoder(SAE):
    """a^l = the latents of layer l's encoder on x^l, y_hat^l = sum_{s <= l} a^s W_dec^{s -> l} + b_dec^l (Ameisen et al. 2025,
    "Circuit Tracing", section 2).

    x^1, x^2, ... stand side by side in x (batch, d_in), as y_hat^l do in the prediction (batch, d_out) and a^l among the latents:
    latent l * d_layer + i is number i of layer l. `layers` are transcoders of any one architecture; the one of layer l
    predicts what is left of all outputs from l on, and its decoder row i is W_dec^{l -> l}_i, W_dec^{l -> l + 1}_i, ...
    """

    architecture: ClassVar[str] = "cross_layer_transcoder"

    def __init__(self, cfg: SAEConfig, layers: Sequence[LinearSAE] = ()) -> None:
        """Take `layers`, or create those that metadata["layers"] names, uninitialised."""
        super().__init__(cfg)
        if not layers:
            from sae.architectures import ARCHITECTURES

            kind = ARCHITECTURES[cfg.metadata["layers"]]
            latents = cfg.d_sae // len(cfg.widths)
            each = SAEConfig(kind.architecture, 0, latents, dtype=cfg.dtype, apply_b_dec_to_input=False, k=cfg.k)
            made = [kind(replace(each, d_in=width, d_out=sum(cfg.widths_out[i:]))) for i, width in enumerate(cfg.widths)]
            layers = [layer for layer in made if isinstance(layer, LinearSAE)]
        self.layers = nn.ModuleList(layers)

    def __iter__(self) -> Iterator[tuple[LinearSAE, int, int]]:
        """Yield each layer, with where its input and its outputs begin."""
        read, written = 0, 0
        for layer, width, width_out in zip(self.layers, self.cfg.widths, self.cfg.widths_out, strict=True):
            assert isinstance(layer, LinearSAE)
            yield layer, read, written
            read, written = read + width, written + width_out

    def encode(self, x: Tensor) -> Tensor:
        """Return latents, (..., d_in) -> (..., d_sae)."""
        return torch.cat([layer.encode(x[..., read : read + layer.cfg.d_in]) for layer, read, _ in self], dim=-1)

    def decode(self, f: Tensor) -> Tensor:
        """Return predictions, (..., d_sae) -> (..., d_out)."""
        y = self.b_dec.expand(*f.shape[:-1], -1).clone()
        for (layer, _, written), part in zip(self, f.chunk(len(self.layers), dim=-1), strict=True):
            y[..., written:] += part @ layer.W_dec
        return y

    def directions(self, latents: Tensor) -> Tensor:
        """Return what each latent adds to all predictions, (n, d_out): 0 in those of layers before its own."""
        rows = self.b_dec.new_zeros(len(latents), self.cfg.width_out)
        size = self.cfg.d_sae // len(self.layers)
        for number, (layer, _, written) in enumerate(self):
            own = latents // size == number
            rows[own, written:] = layer.W_dec[latents[own] % size]
        return rows

    @property
    def b_dec(self) -> Tensor:  # type: ignore[override]
        """The first layer's, which is of all outputs; the others' stay 0."""
        layer, _, _ = next(iter(self))
        return layer.b_dec

    # Training

    @classmethod
    def initialise(cls, config: TrainConfig, site: Site, mean: Tensor) -> "CrossLayerTranscoder":
        """Each layer as a transcoder by itself, `d_sae` latents wide."""
        from sae.architectures import ARCHITECTURES

        layers, written = list[LinearSAE](), 0
        for number, (width, width_out) in enumerate(zip(site.widths, site.widths_out, strict=True)):
            one = config.model_copy(update={"hook": None, "seed": config.seed + number})
            bias = mean if number == 0 else torch.zeros(sum(site.widths_out[number:]))
            layer = ARCHITECTURES[config.architecture].initialise(one, Site((width,), site.widths_out[number:]), bias)
            assert isinstance(layer, LinearSAE)
            layers.append(layer)
            written += width_out
        cfg = SAEConfig(
            cls.architecture, site.d_in, config.d_sae * len(layers), apply_b_dec_to_input=False, k=config.k, d_out=site.d_out,
            hook_names=config.hooks, hook_names_out=config.hooks_out, widths=site.widths, widths_out=site.widths_out,
            metadata={"layers": config.architecture},
        )  # fmt: skip
        return cls(cfg, layers)

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See SAE."""
        return x[:, : self.cfg.d_in], x[:, self.cfg.d_in :]

    def rowwise(self, config: TrainConfig) -> bool:
        """See SAE."""
        return all(layer.rowwise(config) for layer, _, _ in self)

    def training_loss(self, x: Tensor, now: Moment) -> TrainingLoss:
        """Return mean_x sum_l ||y^l - y_hat^l||^2 + the layers' penalties."""
        x, target = self.sides(x)
        zero, fired = torch.zeros_like(self.b_dec), []
        residual = self.b_dec - target
        for layer, read, written in self:
            fired.append(layer.fire(x[:, read : read + layer.cfg.d_in].contiguous(), now))
            part = now.ops.decode(fired[-1].latents, layer.W_dec, zero[written:])
            residual = residual + nn.functional.pad(part, (written, 0))
        error = residual.square().sum(-1)
        mse, l1 = row_mean(error), torch.stack([f.l1 for f in fired]).sum(0)
        loss = mse + sum(f.penalty for f in fired)
        parts = {name: torch.stack([f.parts[name] for f in fired]).sum(0) for name in fired[0].parts}
        first, *others = [f.latents for f in fired]
        return TrainingLoss(loss, mse, l1, first, error.detach(), parts, tuple(others))

    def after_step(self, config: TrainConfig, found: "Step") -> None:
        """See SAE."""
        for (layer, _, _), f in zip(self, (found.last.latents, *found.last.others), strict=True):
            layer.after_step(config, replace(found, last=replace(found.last, latents=f)))

    def finished(self) -> "CrossLayerTranscoder":
        """Return the transcoder to use."""
        layers = [layer.finished() for layer, _, _ in self]
        cfg = replace(self.cfg, k=layers[0].cfg.k, metadata={**self.cfg.metadata, "layers": layers[0].architecture})
        return CrossLayerTranscoder(cfg, layers)

    def encoders(self) -> dict[str, Tensor]:
        """See SAE."""
        return {f"layers.{number}.W_enc": layer.W_enc.T for number, (layer, _, _) in enumerate(self)}

    def decoders(self) -> dict[str, Tensor]:
        """See SAE."""
        return {f"layers.{number}.W_dec": layer.W_dec for number, (layer, _, _) in enumerate(self)}

    def fold_scale(self, scale: float | Tensor, scale_out: float | Tensor | None = None) -> None:
        """See SAE."""
        scale = torch.as_tensor(scale).expand(self.cfg.d_in)
        out = scale if scale_out is None else torch.as_tensor(scale_out).expand(self.cfg.width_out)
        for layer, read, written in self:
            layer.fold_scale(scale[read : read + layer.cfg.d_in], out[written:])
