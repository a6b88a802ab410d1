"""The SAE: one interface over all architectures. Raw model activations in, raw model activations out."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from activation_store.errors import InputError
from sae.ops import Latents, Ops, SparseLatents, kernels_for
from sae.ops.latents import of_dense

if TYPE_CHECKING:
    from sae.architectures.auxk import Dead
    from sae.config import TrainConfig


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is. Field names are SAELens v6's; `metadata` holds where it comes from and how it was trained.

    `k` is the number of latents a token that TopK fires; None elsewhere. A transcoder reads `hook_name` and predicts
    `hook_name_out`, `d_out` wide (None: d_in, as in an SAE); with `skip` it also has W_skip (d_out, d_in), which goes past
    the latents. `normalize_activations` "layer_norm" brings each token to mean 0 and standard deviation 1 before it is
    encoded, and its reconstruction back (OpenAI's TopK SAEs).
    """

    architecture: str
    d_in: int
    d_sae: int
    hook_name: str | None = None
    dtype: str = "float32"
    apply_b_dec_to_input: bool = True
    k: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    d_out: int | None = None
    hook_name_out: str | None = None
    skip: bool = False
    normalize_activations: Literal["none", "layer_norm"] = "none"

    @property
    def width_out(self) -> int:
        """The width of reconstructions."""
        return self.d_in if self.d_out is None else self.d_out


HISTOGRAM_EDGES: list[float] = [2.0 ** (i / 2) for i in range(-20, 41)]  # 2^-10 to 2^20, two bins an octave


@dataclass(frozen=True)
class LatentStatistics:
    """What each latent does on a corpus, special tokens left out.

    max_activation and density are (d_sae,) float32; histogram (d_sae, bins) counts activations between the powers of two
    in `HISTOGRAM_EDGES` (values outside fall into the outer bins); `tokens` were looked at.
    """

    max_activation: Tensor
    density: Tensor
    histogram: Tensor
    tokens: int


@dataclass(frozen=True)
class TrainingLoss:
    """One step's loss and what it is made of: scalars on the device, but `latents`, and `error`, ||x - x_hat||^2 (batch,).

    `parts` are further scalars worth logging.
    """

    loss: Tensor
    mse: Tensor
    l1: Tensor
    latents: Latents
    error: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def row_mean(values: Tensor) -> Tensor:
    """Return the mean of (batch,) values, 0 where the batch is empty."""
    return values.sum() / max(len(values), 1)


class SAE(nn.Module):
    """A dictionary over model activations: f = encode(x), x_hat = decode(f).

    W_enc (d_in, d_sae), b_enc (d_sae), W_dec (d_sae, d_in), b_dec (d_in). Subclasses, one file each in architectures/,
    say how latents come about, how they are trained, and how scalings fold into the weights. A loaded or trained SAE
    takes raw activations: whatever scaling training used is folded in.
    """

    architecture: ClassVar[str]
    rowwise: ClassVar[bool] = False  # the loss is a mean over rows of what each row alone decides
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def __init__(self, cfg: SAEConfig) -> None:
        """Hold the config; subclasses create their parameters, uninitialised."""
        super().__init__()
        self.cfg = cfg
        self.latents: LatentStatistics | None = None  # the corpus maximum and density, once they have been measured

    def encode(self, x: Tensor) -> Tensor:
        """Return latents: (..., d_in) -> (..., d_sae)."""
        raise NotImplementedError

    def decode(self, f: Tensor) -> Tensor:
        """Return reconstructions: (..., d_sae) -> (..., d_in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of x, (..., d_in); of a transcoder its prediction, (..., d_out)."""
        return self.complete(self.decode(self.encode(x)), x)

    def complete(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Return what `decode` gave with what latents do not carry of x: a skip connection, the scale of a layer norm."""
        return x_hat

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        """Return the latents of x (batch, d_in) that are not zero: what `encode` gives, without the zeros."""
        return of_dense(self.encode(x), kernels_for(x.device.type))

    def decode_sparse(self, f: SparseLatents) -> Tensor:
        """Return reconstructions (batch, d_in) of what `encode_sparse` gave."""
        return self.decode(f.dense())

    def reconstruct_sparse(self, x: Tensor) -> tuple[SparseLatents, Tensor]:
        """Return the latents of x (batch, d_in) and its reconstruction: what `encode` and `forward` give."""
        f = self.encode_sparse(x)
        return f, self.complete(self.decode_sparse(f), x)

    def directions(self, latents: Tensor) -> Tensor:
        """Return decoder rows, (n, d_in), of the given latent numbers."""
        return self.W_dec[latents]

    # Training; only architectures that can be trained have these

    @classmethod
    def initialise(cls, config: "TrainConfig", d_in: int, mean: Tensor) -> "SAE":
        """Return a fresh SAE on the CPU, a pure function of config.seed; `mean` (d_in) is of the scaled inputs."""
        raise NotImplementedError

    def training_loss(
        self, x: Tensor, config: "TrainConfig", coefficient: Tensor | float, ops: Ops | None = None,
        dead: "Callable[[], Dead | None] | None" = None,
    ) -> TrainingLoss:  # fmt: skip
        """Return the loss on scaled inputs x (batch, d_in) with the current sparsity coefficient.

        `ops` computes it, plain dense autograd by default. `dead` tells which latents have not fired for long; it is asked
        last, when the batch's own work is queued.
        """
        raise NotImplementedError

    def after_step(self, config: "TrainConfig", out: TrainingLoss) -> None:
        """Bring up to date what is not learnt by gradients, such as a running threshold."""

    def finished(self) -> "SAE":
        """Return the SAE to use once training is over."""
        return self

    def encoders(self) -> dict[str, Tensor]:
        """Return encoder matrices by parameter name, as views by latent, (d_sae, d_in) contiguous."""
        raise NotImplementedError

    def decoders(self) -> dict[str, Tensor]:
        """Return decoder matrices by parameter name, as views by latent, (d_sae, d_in) contiguous."""
        raise NotImplementedError

    def fold_scale(self, scale: float) -> None:
        """Fold an input scaling into the weights: afterwards the SAE takes x where it was trained on scale * x."""
        raise NotImplementedError

    # Saving and loading

    def save(self, path: str | Path, format: str = "saelens") -> None:
        """Write the SAE as a folder, atomically. Raises InputError for an unknown format."""
        from sae.formats import FORMATS

        if format not in FORMATS:
            raise InputError(f"format: {format!r} given; allowed: {', '.join(FORMATS)}")
        FORMATS[format].save(self, Path(path))

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu") -> "SAE":
        """Load an SAE folder of any known format, detected by content; its weights take no gradient.

        Raises InputError where the folder holds none that is known, or one that is not consistent with itself.
        """
        from sae.formats import FORMATS

        path = Path(path)
        matching = [format for format in FORMATS.values() if format.detect(path)]
        if len(matching) != 1:
            raise InputError(f"{path}: {len(matching)} known SAE formats match; known: {', '.join(FORMATS)}")
        return matching[0].load(path).to(device).eval().requires_grad_(False)

    def with_metadata(self, **facts: Any) -> "SAE":
        """Add facts to the metadata, in place, and return self; `hook_name` goes to its own field."""
        hook = facts.pop("hook_name", self.cfg.hook_name)
        self.cfg = replace(self.cfg, hook_name=hook, metadata={**self.cfg.metadata, **facts})
        return self

    def facts(self) -> dict[str, Any]:
        """Return the config as plain values."""
        return asdict(self.cfg)
