"""Encoder products in float8, which a Hopper GPU takes at twice the rate of bfloat16's."""

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(DTYPE).max
_BLOCK_BYTES = 256 * 2**20
MULTIPLE = 16  # what both sides of such a product must be multiples of on CUDA (cuBLASLt)


def in_hardware(device: torch.device) -> bool:
    """Say whether the device takes products scaled by row in float8: compute capability 9.0 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class Float8:
    """A matrix by latent in e4m3 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"), each row scaled to fill its range.

    Products with it round both sides to 4 bits, are summed in float32, and come out in bfloat16.
    """

    dtype = torch.bfloat16  # of products

    def __init__(self, weight: Tensor) -> None:
        """Take (d_sae, d) float32."""
        self.values, self.scales = torch.empty_like(weight, dtype=DTYPE), weight.new_empty(len(weight), 1)
        self.write(weight)

    def __len__(self) -> int:
        """d_sae."""
        return len(self.values)

    def write(self, weight: Tensor) -> None:
        """Take the matrix anew, in place, a block of rows at a time: another float32 copy of it would not always fit."""
        size = max(1, _BLOCK_BYTES // (4 * weight.shape[1]))
        for rows, values, scales in zip(*(torch.split(t, size) for t in (weight, self.values, self.scales)), strict=True):
            found = _scaled(rows)
            values.copy_(found[0])
            scales.copy_(found[1])

    def product(self, x: Tensor) -> Tensor:
        """Return x weight^T, (batch, d_sae) bfloat16, for x (batch, d) float32."""
        from torch.nn.functional import ScalingType, scaled_mm  # young names in torch, and needed here alone

        values, scales = _scaled(x)
        by_row = ScalingType.RowWise
        product: Tensor = scaled_mm(
            values, self.values.T, scales, by_row, self.scales.T.contiguous(), by_row, output_dtype=self.dtype
        )
        return product


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True).clamp(min=1e-30) / _LARGEST
    return (rows / scales).to(DTYPE), scales
