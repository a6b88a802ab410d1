"""What the cases of golden_cases.py are filled with, and how what a peer computed of them is kept.

Nothing is trained; what matters is that every tensor counts, and that latents fire, but not all.
"""

from pathlib import Path
from typing import Any

D_IN, D_OUT, D_SAE, K = 40, 32, 64, 8


class Draw:
    """Random tensors in the scale of the inputs x, equal for equal seeds."""

    def __init__(self, x: Any, seed: int) -> None:
        import torch

        self.x, self.torch = x, torch
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Any:
        return self.torch.randn(*shape, generator=self.generator)

    def decoder(self, d_sae: int = D_SAE, d_out: int = D_IN, unit: bool = True) -> Any:
        rows = self.normal(d_sae, d_out)
        return rows / rows.norm(dim=1, keepdim=True) * (1 if unit else 0.5 + self.torch.rand(d_sae, 1, generator=self.generator))

    def encoder(self, d_sae: int = D_SAE) -> Any:
        return self.normal(D_IN, d_sae) / D_IN**0.5

    def small(self, *shape: int) -> Any:
        """Biases and thresholds: a third of what a pre-activation varies by."""
        return self.normal(*shape) * float(self.x.std()) / 3

    def mean(self, d_out: int = D_IN) -> Any:
        return self.x.mean(0)[:d_out] + 0.1 * self.small(d_out)

    def skip(self, d_out: int = D_IN) -> Any:
        return self.normal(d_out, D_IN) * 0.05

    def fill(self, module: Any, **values: Any) -> Any:
        with self.torch.no_grad():
            for name, value in values.items():
                parameter = module
                for part in name.split("__"):
                    parameter = getattr(parameter, part)
                assert parameter.shape == value.shape, (name, parameter.shape, value.shape)
                parameter.copy_(value)
        return module


def keep(folder: Path, f: Any, x_hat: Any, **others: Any) -> None:
    """Write what a peer computed; `x` among the others where it was not the common inputs."""
    from safetensors.torch import save_file

    tensors = {"f": f, "x_hat": x_hat.flatten(1), **others}
    save_file({name: value.detach().float().contiguous() for name, value in tensors.items()}, folder / "expected.safetensors")
