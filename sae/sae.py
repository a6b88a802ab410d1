"""The SAE: one interface over all architectures. Raw model activations in, raw model activations out."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sae.ops import DenseOps, Latents, Ops, SparseLatents, kernels_for
from sae.ops.latents import of_dense

if TYPE_CHECKING:
    from sae.architectures.auxk import Dead
    from sae.config import TrainConfig
    from sae.dense_or_sparse import Step


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is. Field names are SAELens v6's; `metadata` holds where it comes from and how it was trained.

    `k` is the number of latents a token that TopK fires; None elsewhere. A transcoder reads `hook_name` and predicts
    `hook_name_out`, `d_out` wide (None: d_in, as in an SAE); with `skip` it also has W_skip (d_out, d_in), which goes past
    the latents. `normalize_activations` "layer_norm" brings each token to mean 0 and standard deviation 1 before it is
    encoded, and its reconstruction back (OpenAI's TopK SAEs). A crosscoder reads several hooks, `hook_names`, whose
    activations stand side by side in x, `widths` wide; `widths_out` are those of what a cross-layer transcoder predicts.
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
    hook_names: tuple[str, ...] = ()
    hook_names_out: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    widths_out: tuple[int, ...] = ()

    @property
    def width_out(self) -> int:
        """The width of reconstructions."""
        return self.d_in if self.d_out is None else self.d_out


@dataclass(frozen=True)
class Site:
    """What is read and predicted: widths of one hook or of several, and, of transcoders, those of what they predict."""

    widths: tuple[int, ...]
    widths_out: tuple[int, ...] = ()

    @property
    def d_in(self) -> int:
        """The width of all that is read."""
        return sum(self.widths)

    @property
    def d_out(self) -> int | None:
        """The width of all that is predicted, where that is something else."""
        return sum(self.widths_out) or None


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
class Moment:
    """Where training stands, and what its loss is computed with.

    `coefficient` is the sparsity penalty's now. `ops` computes, plain dense autograd by default. `dead` tells which latents
    have not fired for long; it is asked last, when the batch's own work is queued. `aim` is the L0 that a quadratic penalty is
    centred on (None: the config's target). Of a stack of SAEs (see `sae.stack`), `coefficient` and `aim` (members,) and `k` hold
    every member's; what else the config says holds for all of them.
    """

    config: "TrainConfig"
    coefficient: Tensor | float = 0.0
    ops: Ops = field(default_factory=DenseOps)
    dead: "Callable[[], Dead | None]" = lambda: None
    step: int = 0
    k: tuple[int, ...] = ()
    aim: Tensor | None = None


@dataclass(frozen=True)
class TrainingLoss:
    """One step's loss and what it is made of: (members,) on the device, but `latents`, and `error`, ||x - x_hat||^2 (batch,).

    `members` is 1 but in a stack. `parts` are further figures worth logging. Where several encoders read several hooks,
    `latents` are the first's and `others` those of the rest.
    """

    loss: Tensor
    mse: Tensor
    l1: Tensor
    latents: Latents
    error: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    others: tuple[Latents, ...] = ()

    def counts(self) -> Tensor:
        """Return on how many rows each latent fired, (d_sae,) int64."""
        return torch.cat([f.latent_counts() for f in (self.latents, *self.others)])


@dataclass(frozen=True)
class Fired:
    """What a batch fires, and what a training loss gets for it besides the error of its reconstruction.

    `penalty` has its coefficient in it; `l1` is the mean over the batch of the latents' sum, for the log; `parts` as in
    TrainingLoss. All are (members,).
    """

    latents: Latents
    penalty: Tensor | float
    l1: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def row_mean(values: Tensor, members: int = 1) -> Tensor:
    """Return the mean of (batch,) values, 0 where the batch is empty: (members,), each of its own rows."""
    return values.view(members, -1).sum(1) / max(len(values) // members, 1)


class SAE(nn.Module):
    """A dictionary over model activations: f = encode(x), x_hat = decode(f).

    W_enc (d_in, d_sae), b_enc (d_sae), W_dec (d_sae, d_in), b_dec (d_in). Subclasses, one file each in architectures/,
    say how latents come about, how they are trained, and how scalings fold into the weights. A loaded or trained SAE
    takes raw activations: whatever scaling training used is folded in.

    In training, an SAE may stand for a stack of `members` of equal shape, see `sae.stack`.
    """

    members: int = 1
    architecture: ClassVar[str]
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
        return self.decode(f.dense().to(self.b_dec.dtype))

    def reconstruct_sparse(self, x: Tensor) -> tuple[SparseLatents, Tensor]:
        """Return the latents of x (batch, d_in) and its reconstruction: what `encode` and `forward` give."""
        f = self.encode_sparse(x)
        return f, self.complete(self.decode_sparse(f), x)

    def directions(self, latents: Tensor) -> Tensor:
        """Return decoder rows, (n, d_in), of the given latent numbers."""
        return self.W_dec[latents]

    # Training; only architectures that can be trained have these

    @classmethod
    def initialise(cls, config: "TrainConfig", site: "Site", mean: Tensor) -> "SAE":
        """Return a fresh SAE on the CPU, a pure function of config.seed; `mean` (d_out) is of what it is to predict, scaled."""
        raise NotImplementedError

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is encoded and what is to be predicted, of a training batch."""
        return x, x

    def training_loss(self, x: Tensor, now: Moment) -> TrainingLoss:
        """Return the loss on scaled inputs x (batch, d_in); of a transcoder x is (batch, d_in + d_out), input and target."""
        raise NotImplementedError

    def rowwise(self, config: "TrainConfig") -> bool:
        """Say whether the loss is a mean over rows of what each row alone decides: then a batch may be taken in parts."""
        return False

    def after_step(self, config: "TrainConfig", found: "Step") -> None:
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

    def fold_scale(self, scale: float | Tensor, scale_out: float | Tensor | None = None) -> None:
        """Fold scalings into the weights: afterwards the SAE takes x where it was trained on scale * x.

        A number, or (d_in,) of one a column; a transcoder was trained to predict scale_out * y.
        """
        raise NotImplementedError

    # Saving and loading

    def save(self, path: str | Path, format: str = "saelens") -> None:
        """Write the SAE as a folder of one of `sae.formats.FORMATS`, atomically, over what lies there.

        Raises InputError for an unknown format, and for one that has no place for something this SAE has, naming it.
        """
        from sae.formats import save_sae

        save_sae(self, Path(path), format)

    @staticmethod
    def load(
        path: str | Path, device: str | torch.device = "cpu", format: str | None = None, dtype: str | None = None
    ) -> "SAE":
        """Load an SAE of any known format, detected by content; its weights take no gradient.

        `path` is a folder, a file of tensors, or hf://owner/repository[/folder or file][@revision]. `format` settles what
        content leaves open. Weights have the dtype that the SAE's config names and float32 where it names none, whatever the
        file holds; `dtype` asks for another. Nothing is unpickled. Raises InputError where no known format, or more than one,
        matches, and where an SAE is not consistent with itself or would be read wrongly.
        """
        from sae.formats import load_sae

        if str(path).startswith("hf://"):
            from sae.hub import fetch

            path = fetch(str(path))
        return load_sae(Path(path), format, dtype).to(device).eval().requires_grad_(False)

    def with_metadata(self, **facts: Any) -> "SAE":
        """Add facts to the metadata, in place, and return self; `hook_name` goes to its own field."""
        hook = facts.pop("hook_name", self.cfg.hook_name)
        self.cfg = replace(self.cfg, hook_name=hook, metadata={**self.cfg.metadata, **facts})
        return self

    def facts(self) -> dict[str, Any]:
        """Return the config as plain values."""
        return asdict(self.cfg)
