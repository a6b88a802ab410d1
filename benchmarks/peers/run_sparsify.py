"""sparsify: its own `Trainer.fit` over our batches. Run as `.venv-peers/sparsify/bin/python run_sparsify.py JOB RESULT`.

That trainer hooks a language model's modules. Here the model is an identity whose output is our batch, so that every line of
the step is theirs (trainer.py of 1.3.3): centring of b_dec at step 0 (410-421), the decoder held at norm 1 (424-425), the
forward with its fused encoder and sparse decoder (454-460), firing counts (463, 569-571), fvu loss and backward (480-485),
the gradient parallel to the decoder rows removed (551-553), optimiser and schedule (555-560). It has no gradient clipping.
"""

from typing import Any

import torch
from common import Job, Meter, run
from sparsify import SparseCoderConfig, TrainConfig, Trainer, sparse_coder, utils
from torch import Tensor, nn


class Activations(nn.Module):
    """As much of a language model as the trainer asks for: one module, whose output is the batch that lies ready."""

    base_model = property(lambda self: self)

    def __init__(self, d_in: int, device: str) -> None:
        super().__init__()
        self.here = nn.Identity()
        self.device = torch.device(device)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self.batch = torch.zeros(1, d_in, device=device)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.here(self.batch[None])


def check(job: Job) -> None:
    if job.architecture != "topk":
        raise SystemExit(f"job.architecture: sparsify trains topk alone, not {job.architecture}")
    if job.save:
        raise SystemExit("job.save: sparsify is timed, and saves nothing here")
    autocasts = job.device == "cuda" and torch.cuda.is_bf16_supported()  # sparse_coder.py, 205-209: no option
    if autocasts != (job.dtype == "bfloat16"):
        raise SystemExit(f"job.dtype: on this device sparsify has {'bfloat16 autocast' if autocasts else 'float32'} alone")


def train(job: Job, meter: Meter) -> tuple[dict[str, Any], float]:
    if job.device == "cpu":  # where there is Triton, its decoder is taken on import, and that has no CPU form
        sparse_coder.decoder_impl = utils.eager_decode
    model = Activations(job.d_in, job.device)
    config = TrainConfig(
        SparseCoderConfig(num_latents=job.d_sae, k=job.k), batch_size=1, optimizer="adam", lr=job.lr, lr_warmup_steps=0,
        hookpoints=["here"], init_seeds=[job.seed], log_to_wandb=False, save_every=job.steps + 2,
        **job.choose(auxk_alpha=0.0, micro_acc_steps=1),
    )  # fmt: skip
    seen: list[tuple[Tensor, Tensor]] = []  # of each forward of a step: its latents' (rows, k) activations and its fvu
    steps = meter.steps(lambda batch: sum(float((acts > 0).sum()) for acts, _ in seen) / len(batch))

    class Rows:
        """The dataset: one item a step, of as many token ids as the batch has rows; drawing it draws the batch."""

        def __len__(self) -> int:
            return job.steps

        def __getitem__(self, item: int) -> dict[str, Tensor]:
            model.batch = next(steps)
            seen.clear()
            return {"input_ids": torch.zeros(job.batch_size, dtype=torch.long)}

    trainer = Trainer(config, Rows(), model)  # type: ignore[arg-type]
    trainer.saes["here"].register_forward_hook(
        lambda module, args, out: seen.append((out.latent_acts.detach(), out.fvu.detach()))
    )
    trainer.save = lambda: next(steps, None)  # type: ignore[assignment]  # where fit would write files, its last step has ended
    trainer.fit()
    settings = {
        "trainer": "Trainer.fit", "optimizer": f"{type(trainer.optimizers[0]).__module__}.{type(trainer.optimizers[0]).__name__}",
        "decoder": sparse_coder.decoder_impl.__name__, "loss_fn": config.loss_fn, "auxk_alpha": config.auxk_alpha,
        "micro_acc_steps": config.micro_acc_steps,
        "activation": config.sae.activation, "normalize_decoder": config.sae.normalize_decoder,
        "float32_matmul_precision": torch.get_float32_matmul_precision(), "autocast": job.dtype == "bfloat16",
    }  # fmt: skip
    return settings, sum(float(fvu) for _, fvu in seen)


if __name__ == "__main__":
    run("sparsify", ("eai-sparsify", "transformers"), check, train)
