"""What a CUDA device must give as the CPU does. Run by `pytest -m gpu`."""

import pytest
import torch

from activation_store import ActivationStore, DataConfig, HarvestConfig, ModelConfig
from activation_store.harvest import harvest
from activation_store.live import stream_activations
from activation_store.subject import load_subject
from sae import TrainConfig, train, train_sweep
from sae.ops.float8 import in_hardware

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float8"])
def test_training_on_cuda_stays_near_the_cpu(compute_dtype):
    if compute_dtype == "float8" and not in_hardware(torch.device("cuda")):
        pytest.skip("no float8 in this GPU")
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(256, 64, generator=generator) + 1 for _ in range(10)]
    dtypes = {"cpu": "float32" if compute_dtype == "float8" else compute_dtype, "cuda": compute_dtype}
    saes = {
        device: train(batches, TrainConfig(d_sae=256, steps=40, batch_size=256, compute_dtype=dtype, device=device))
        for device, dtype in dtypes.items()
    }
    x = batches[0]
    difference = (saes["cpu"](x) - saes["cuda"](x)).norm() / saes["cpu"](x).norm()
    assert float(difference) < {"float32": 1e-3, "bfloat16": 5e-2, "float8": 0.15}[compute_dtype]


HOOKS = ("blocks.1.hook_resid_post", "blocks.1.attn.hook_z")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_batches_on_cuda_are_those_on_the_cpu(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 50, (400, 16), generator=generator).int().numpy()
    store = ActivationStore.create(tmp_path / "store", tokens, tokens // 7, {"h": 24}, dtype=dtype, shard_sequences=50)
    for shard in range(store.shards):
        x = torch.randn((50 * 16, 24), generator=generator)
        store.write_shard(shard, {"h": x if dtype == "int8" else x.to(getattr(torch, dtype))})
    store.change_attributes(complete=True)
    wanted = [x.clone() for x in store.batches("h", 256, seed=1, memory_mb=0.1, epochs=2)]
    kept = []
    for x in store.batches("h", 256, seed=1, memory_mb=0.1, epochs=2, device="cuda"):
        assert x.is_cuda
        torch.matmul(x, x.T)  # work on the consumer's stream beside the copies
        kept.append(x)  # pinned buffers are used again, batches must not change
    assert len(kept) == len(wanted)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(wanted, kept, strict=True))


@pytest.fixture(scope="module")
def subjects(tiny_model_dir):
    return {d: load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device=d)) for d in ("cpu", "cuda")}


def test_a_harvest_on_cuda_stays_near_the_cpu(subjects, tiny_text, tmp_path):
    data = DataConfig(source=str(tiny_text), context=16, tokens=4000)
    config = HarvestConfig(hooks=HOOKS, dtype="float32", shard_mb=0.05)
    stores = {device: harvest(subject, data, config, tmp_path / device) for device, subject in subjects.items()}
    for hook in HOOKS:
        on_cpu, on_cuda = (stores[device].read(hook, slice(None)) for device in ("cpu", "cuda"))
        assert torch.allclose(on_cpu, on_cuda, atol=1e-4)
        ours, theirs = (stores[device].statistics(hook) for device in ("cpu", "cuda"))
        assert abs(ours.mean - theirs.mean).max() < 1e-4
        assert abs(ours.covariance - theirs.covariance).max() < 1e-4
        assert ours.rows == theirs.rows


def test_streaming_on_cuda_gives_the_rows_of_a_harvest(subjects, tiny_text, tmp_path):
    data = DataConfig(source=str(tiny_text), context=16, tokens=4000)
    store = harvest(subjects["cpu"], data, HarvestConfig(hooks=HOOKS, dtype="float32", shard_mb=0.05), tmp_path / "store")
    live = stream_activations(subjects["cuda"], data, HarvestConfig(hooks=HOOKS, dtype="float32", stream=True))
    batches = live.batches(HOOKS, 100, memory_mb=0.2, device="cuda")
    for rows, (x, z) in zip(batches.row_numbers(), batches, strict=True):
        assert torch.allclose(x.cpu(), store.read(HOOKS[0], rows), atol=1e-4)
        assert torch.allclose(z.cpu(), store.read(HOOKS[1], rows), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "own"), [("standard", {"l1_coefficient": 2.0}), ("topk", {"k": 8}), ("batchtopk", {"k": 8})]
)
def test_training_on_cuda_is_worth_what_it_is_on_a_cpu(architecture, own, dtype):
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(128, 64, generator=generator), dim=1)
    batches = [(torch.rand(512, 128, generator=generator) < 0.04).float() @ atoms for _ in range(20)]
    values = {}
    for device in ("cpu", "cuda"):
        config = TrainConfig(
            architecture=architecture, d_sae=256, steps=200, batch_size=512, lr=2e-3, compute_dtype=dtype, device=device, **own
        )
        sae = train(batches, config)
        x = batches[0]
        values[device] = 1 - float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
        again = train(batches, config)
        assert torch.equal(again.W_enc, sae.W_enc), "equal runs end in equal bits"
    assert values["cuda"] == pytest.approx(values["cpu"], abs=0.02)


@pytest.mark.parametrize(
    ("architecture", "own"),
    [("standard", [{"l1_coefficient": c} for c in (0.5, 2.0)]), ("topk", [{"k": k} for k in (4, 8)]),
     ("batchtopk", [{"k": k} for k in (4, 8)]), ("jumprelu", [{"l0_coefficient": c} for c in (0.2, 0.5)])],
)  # fmt: skip
def test_a_stack_on_cuda_trains_each_member_as_it_would_train_by_itself(architecture, own):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(256, 64, generator=generator) + 1 for _ in range(10)]
    common = {"architecture": architecture, "d_sae": 256, "steps": 40, "batch_size": 256, "lr": 1e-3, "device": "cuda"}
    configs = {str(i): TrainConfig(**common, **one, seed=i) for i, one in enumerate(own)}
    together = train_sweep(batches, configs)
    for name, config in configs.items():
        x = batches[0]
        alone = train(batches, config)(x)
        assert float((alone - together[name](x)).norm() / alone.norm()) < 1e-2
