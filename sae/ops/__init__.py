"""Exact sparse training: the few operations a sparse autoencoder is made of, only where latents fire.

Where a ReLU, a threshold or a top-k shuts a latent, its gradient is zero. So after one dense product, x W_enc, everything
else touches only the (row, active latent) pairs, and the result is that of the dense computation.
"""

from sae.ops.kernels import Kernels, TooDense, kernels_for
from sae.ops.latents import Above, BatchTopK, DenseLatents, Latents, Rule, SparseLatents, TopK
from sae.ops.training import DenseOps, DenseTermOps, Ops, Rows, SparseOps

__all__ = [
    "Above", "BatchTopK", "DenseLatents", "DenseOps", "DenseTermOps", "Kernels", "Latents", "Ops", "Rows", "Rule",
    "SparseLatents", "SparseOps",
    "TooDense", "TopK", "kernels_for",
]  # fmt: skip
