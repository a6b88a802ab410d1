"""What training holds in memory, item by item, before it runs."""

from sae.config import TrainConfig
from sae.dense_or_sparse import LIMITS, PART_ENTRIES, part_rows

_ENTRY_BYTES = 64  # of one (row, active latent) pair: both orders, values, gradients, and what torch makes in between
L1_ENTRIES = 128  # active latents a token to reckon with where no k tells: more than L1 runs end with


def training_memory(config: TrainConfig, d_in: int, device_type: str = "cpu") -> dict[str, int]:
    """Return bytes by item for one SAE in training.

    Weights and Adam's two moments are float32; the encoder has a copy in compute_dtype, or to screen float32 by. A step's
    gradient has rows only for latents that fired; an L1 run's first steps, while much fires, are dense and fire all. They
    take a part of the batch at a time, as sparse ones do where the loss allows it. AuxK is dense over the dead latents, and
    counted for one in a hundred of them.
    """
    matrix, batch, d_sae = d_in * config.d_sae, config.batch_size, config.d_sae
    base = {
        "weights": 4 * (2 * matrix + d_sae + d_in),
        "Adam's moments": 8 * (2 * matrix + d_sae + d_in),
        "batch, residual": 16 * d_in * batch,
    }
    wide = 4 * min(part_rows(d_sae, device_type), batch) * d_sae  # a part's (rows, d_sae) float32
    if config.kernels == "reference":  # gradients, and as much again while autograd adds a part's
        return {**base, "dense steps": 16 * matrix + (4 * wide if config.k is None else 24 * batch * d_sae)}
    copy = {"float8": 1, "bfloat16": 2, "float32": 2 if device_type == "cpu" else 0}[config.compute_dtype]  # bytes a weight
    base |= {"encoder's copy": copy * matrix}
    parts = {"pre-activations, a part at a time": min(64 if device_type == "cpu" else 512, 4 * batch * d_sae >> 20) << 20}
    if config.k is None:
        _, leave = LIMITS.get(device_type, LIMITS["cpu"])[config.compute_dtype]
        most = PART_ENTRIES.get(device_type, PART_ENTRIES["cpu"])
        entries = min(batch * min(L1_ENTRIES, d_sae), max(most, int(256 * leave * d_sae)))
        # latents, their gradient twice, that of the penalty, what fires of it; and a product in bfloat16 before it is added
        dense = 5 * wide + (0 if config.compute_dtype == "float32" else 2 * matrix)
        parts |= {"entries": _ENTRY_BYTES * entries}
        return {**base, "gradients": 8 * matrix, **parts, "dense beginning, beyond that": max(0, dense - sum(parts.values()))}
    entries = batch * min(config.k, d_sae) * (4 if config.architecture == "batchtopk" else 1)
    dead = d_sae // 100
    return {
        **base, "gradients": 8 * d_in * min(d_sae, entries), **parts, "entries": _ENTRY_BYTES * entries,
        "AuxK for each 1 % dead": 16 * d_in * dead + 24 * batch * dead,
    }  # fmt: skip
