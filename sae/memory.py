"""What training holds in memory, item by item, before it runs."""

from sae.config import TrainConfig
from sae.dense_or_sparse import part_bytes

_ENTRY_BYTES = 64  # of one (row, active latent) pair: both orders, values, gradients, and what torch makes in between
_L1_ENTRIES = 128  # active latents a token to reckon with where no k tells: more than L1 runs end with


def training_memory(config: TrainConfig, d_in: int, device_type: str = "cpu") -> dict[str, int]:
    """Return bytes by item for one SAE in training; nothing here is (batch, d_sae) whole.

    Weights and Adam's two moments are float32; the encoder has a bfloat16 copy. A sparse step's gradient has rows only for
    latents that fired. "dense beginning" is what an L1 run's first steps, while much fires, take instead of it: gradients
    of all rows, and four float32 matrices of a part of the batch's rows.
    """
    matrix = d_in * config.d_sae
    k = config.k or _L1_ENTRIES
    entries = config.batch_size * min(k, config.d_sae)
    rows = min(config.d_sae, entries)
    sparse = {
        "gradient rows": 2 * 4 * d_in * rows,
        "entries": _ENTRY_BYTES * entries,
        "pre-activations, a part at a time": part_bytes(device_type) * 2,
    }
    dense = 2 * 4 * matrix + 4 * max(part_bytes(device_type), 4 * config.d_sae)
    more = {"dense beginning, beyond that": max(0, dense - sum(sparse.values()))} if config.k is None else {}
    return {
        "weights": 4 * (2 * matrix + config.d_sae + d_in),
        "Adam's moments": 8 * (2 * matrix + config.d_sae + d_in),
        "bfloat16 encoder": 2 * matrix,
        **sparse,
        **more,
        "batch, residual": 4 * 4 * d_in * config.batch_size,
    }
