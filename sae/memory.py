"""What training holds in memory, item by item, before it runs."""

from sae.config import TrainConfig
from sae.dense_or_sparse import LIMITS, PART_ENTRIES, part_rows
from sae.sae import Site

_ENTRY_BYTES = 64  # of one (row, active latent) pair: both orders, values, gradients, and what torch makes in between
L1_ENTRIES = 128  # active latents a token to reckon with where no k tells: more than L1 runs end with


def matrices(config: TrainConfig, site: Site) -> tuple[int, int]:
    """Return how many numbers the encoders and the decoders have."""
    if len(site.widths_out) > 1:  # of a cross-layer transcoder, each layer's decoder writes to all layers from there on
        return site.d_in * config.d_sae, sum(sum(site.widths_out[i:]) for i in range(len(site.widths_out))) * config.d_sae
    return site.d_in * config.d_sae, (site.d_out or site.d_in) * config.d_sae


def training_memory(config: TrainConfig, site: Site, device_type: str = "cpu") -> dict[str, int]:
    """Return bytes by item for one SAE, transcoder or crosscoder in training.

    Weights and Adam's two moments are float32; the encoder has a copy in compute_dtype, or to screen float32 by. A step's
    gradient has rows only for latents that fired; an L1 run's first steps, while much fires, are dense and fire all. They
    take a part of the batch at a time, as sparse ones do where the loss allows it. AuxK is dense over the dead latents, and
    counted for one in a hundred of them.
    """
    (encoder, decoder), batch, d_sae = matrices(config, site), config.batch_size, config.d_sae * max(1, len(site.widths_out))
    width, both = max(site.d_in, site.d_out or 0), encoder + decoder
    base = {
        "weights": 4 * (both + d_sae + width),
        "Adam's moments": 8 * (both + d_sae + width),
        "batch, residual": 16 * width * batch,
    }
    whole = config.k is None and (config.revives in ("auxk", "ghost") or config.l0_penalty == "quadratic")
    wide = 4 * (batch if whole else min(part_rows(d_sae, device_type), batch)) * d_sae  # a part's (rows, d_sae) float32
    if config.kernels == "reference":  # gradients, and as much again while autograd adds a part's
        return {**base, "dense steps": 8 * both + (4 * wide if config.k is None else 24 * batch * d_sae)}
    copy = {"float8": 1, "bfloat16": 2, "float32": 2 if device_type == "cpu" else 0}[config.compute_dtype]  # bytes a weight
    base |= {"encoder's copy": copy * encoder}
    parts = {"pre-activations, a part at a time": min(64 if device_type == "cpu" else 512, 4 * batch * d_sae >> 20) << 20}
    if config.k is None:
        _, leave = LIMITS.get(device_type, LIMITS["cpu"])[config.compute_dtype]
        most = PART_ENTRIES.get(device_type, PART_ENTRIES["cpu"])
        entries = min(batch * min(L1_ENTRIES, d_sae), max(most, int(256 * leave * d_sae)))
        # latents, their gradient twice, that of the penalty, what fires of it; and a product in bfloat16 before it is added
        dense = 5 * wide + (0 if config.compute_dtype == "float32" else both)
        parts |= {"entries": _ENTRY_BYTES * entries}
        return {**base, "gradients": 4 * both, **parts, "dense beginning, beyond that": max(0, dense - sum(parts.values()))}
    entries = batch * min(config.k, d_sae) * (4 if config.architecture in ("batchtopk", "matryoshka") else 1)
    dead = d_sae // 100
    return {
        **base, "gradients": 4 * both * min(d_sae, entries) // d_sae, **parts, "entries": _ENTRY_BYTES * entries,
        "AuxK for each 1 % dead": 16 * width * dead + 24 * batch * dead,
    }  # fmt: skip
