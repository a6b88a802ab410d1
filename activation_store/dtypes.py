"""How a row of activations lies on disk, and how it becomes float32 again.

float32 and float16 are themselves. bfloat16 is its bit pattern in uint16 (docs/decisions/0001). int8 is symmetric with
one float32 scale a row, x ~ q * scale with scale = max|x| / 127: the error of an entry is at most scale / 2.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ON_DISK: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2"), "int8": np.dtype("i1"),
}  # fmt: skip
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def bytes_a_row(width: int, dtype: str) -> int:
    """Return what one row takes on disk, its norm and scale included."""
    return width * ON_DISK[dtype].itemsize + (8 if dtype == "int8" else 4)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (row, d) as int8 (row, d) and float32 scales (row,); a row of zeros has scale 0.

    So has a row of nothing above 1.5e-36: its scale would be subnormal, which is too coarse to divide by, and no GPU keeps it.

    >>> quantise(torch.tensor([[1.0, -2.54], [0.0, 0.0]]))
    (tensor([[  50, -127],
            [   0,    0]], dtype=torch.int8), tensor([0.0200, 0.0000]))
    """
    x = x.float()
    scales = x.abs().amax(dim=1) / 127
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)
    steps = torch.where(scales > 0, 1 / scales, 0.0)
    return (x * steps[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


@dataclass(frozen=True)
class Rows:
    """Rows of one hook as they go to disk: `raw` (row, d) in the store's dtype, `norms` (row,), `scales` (row,) for int8."""

    raw: Tensor
    norms: Tensor
    scales: Tensor | None

    @classmethod
    def of(cls, x: Tensor, dtype: str) -> "Rows":
        """Encode x (row, d) where it is, on whatever device. The norms are those of the values as stored; int8: of x."""
        if dtype == "int8":
            raw, scales = quantise(x)
            return cls(raw, torch.linalg.vector_norm(x, dim=1, dtype=torch.float32), scales)
        raw = x.to(TORCH[dtype])
        return cls(raw, torch.linalg.vector_norm(raw, dim=1, dtype=torch.float32), None)


def decode(raw: NDArray[Any], dtype: str, scales: NDArray[np.float32] | None, out: NDArray[np.float32]) -> None:
    """Write rows as they lie on disk, (row, d), into `out`, float32 of the same shape.

    NumPy throughout: it works in the calling thread alone, where torch would wake its whole pool for a few rows.
    """
    if dtype == "bfloat16":
        bits = out.view(np.uint32)
        np.copyto(bits, raw)  # widening and shifting in one call would go through NumPy's small cast buffer
        np.left_shift(bits, 16, out=bits)
    elif dtype == "int8":
        assert scales is not None
        np.multiply(raw, scales[:, None], out=out)
    else:
        np.copyto(out, raw)
