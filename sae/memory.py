"""What training holds in memory, item by item, before it runs."""

from sae.config import TrainConfig
from sae.dense_or_sparse import part_rows

_ENTRY_BYTES = 64  # of one (row, active latent) pair: both orders, values, gradients, and what torch makes in between
L1_ENTRIES = 128  # active latents a token to reckon with where no k tells: more than L1 runs end with


def training_memory(config: TrainConfig, d_in: int, device_type: str = "cpu") -> dict[str, int]:
    """Return bytes by item for one SAE in training.

    Weights and Adam's two moments are float32; the encoder has a bfloat16 copy. A sparse step's gradient has rows only for
    latents that fired. "dense beginning" is what an L1 run's first steps, while much fires, take instead of it. AuxK is dense
    over the dead latents, and counted for one in a hundred of them.
    """
    matrix, batch = d_in * config.d_sae, config.batch_size
    wide = 4 * min(part_rows(config.d_sae, device_type), batch) * config.d_sae  # a part's (rows, d_sae) float32
    base = {
        "weights": 4 * (2 * matrix + config.d_sae + d_in),
        "Adam's moments": 8 * (2 * matrix + config.d_sae + d_in),
        "batch, residual": 16 * d_in * batch,
    }
    # gradients, and as much again while autograd adds a part's
    dense = 16 * matrix + (4 * wide if config.k is None else 24 * batch * config.d_sae)
    if config.kernels == "reference":
        return {**base, "dense steps": dense}
    entries = batch * min(config.k or L1_ENTRIES, config.d_sae) * (4 if config.architecture == "batchtopk" else 1)
    sparse = {
        "gradient rows": 8 * d_in * min(config.d_sae, entries),
        "entries": _ENTRY_BYTES * entries,
        "pre-activations, a part at a time": 64 * 2**20 if device_type == "cpu" else 512 * 2**20,
    }
    low = {"bfloat16 encoder": 2 * matrix}
    if config.k is None:
        return {**base, **low, **sparse, "dense beginning, beyond that": max(0, dense - sum(sparse.values()))}
    dead = config.d_sae // 100
    return {**base, **low, **sparse, "AuxK for each 1 % dead": 16 * d_in * dead + 24 * batch * dead}
