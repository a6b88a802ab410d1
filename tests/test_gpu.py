"""What a CUDA device must give as the CPU does. Run by `pytest -m gpu`."""

import pytest
import torch

from sae import TrainConfig, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_training_on_cuda_stays_near_the_cpu(compute_dtype):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(256, 64, generator=generator) + 1 for _ in range(10)]
    saes = {
        device: train(batches, TrainConfig(d_sae=256, steps=40, batch_size=256, compute_dtype=compute_dtype, device=device))
        for device in ("cpu", "cuda")
    }
    x = batches[0]
    difference = (saes["cpu"](x) - saes["cuda"](x)).norm() / saes["cpu"](x).norm()
    assert float(difference) < (1e-3 if compute_dtype == "float32" else 5e-2)
