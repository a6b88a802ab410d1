"""What SAEBench asks of an SAE, and SAEBench itself where it is installed beside us (.venv-peers/saebench)."""

import inspect
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_intervene import sae_for

from activation_store.errors import InputError
from sae import SAE
from sae.architectures.gated import GatedSAE
from sae.architectures.jumprelu import JumpReLUSAE
from sae.architectures.topk import TopKSAE
from sae.sae import SAEConfig
from sae.saebench import BenchSAE, load

ROOT = Path(__file__).resolve().parent.parent
PEER = Path(os.environ.get("MONOSEM_SAEBENCH_PYTHON", ROOT / ".venv-peers/saebench/bin/python"))
HOOK = "blocks.9.hook_resid_post"
KNOWN = {"model_name": "gpt2-small", "context_size": 64}


def jumprelu(**changes) -> JumpReLUSAE:
    g = torch.Generator().manual_seed(1)
    sae = JumpReLUSAE(SAEConfig("jumprelu", 16, 40, HOOK, metadata=dict(KNOWN), **changes)).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g))
    sae.threshold.abs_()
    return sae


def topk() -> TopKSAE:
    g = torch.Generator().manual_seed(2)
    sae = TopKSAE(SAEConfig("topk", 16, 40, HOOK, k=4, metadata=dict(KNOWN))).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g))
    return sae


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Two SAEs, one of them in a run's folder with a checkpoint beside it."""
    jumprelu().save(tmp_path / "wide" / "sae")
    topk().save(tmp_path / "wide" / "checkpoints" / "7")
    topk().save(tmp_path / "narrow")
    return tmp_path


def test_a_folder_gives_names_and_saes_and_checkpoints_are_none(sweep):
    found = load(sweep)
    assert [name for name, _ in found] == ["narrow", "wide_sae"]
    assert [name for name, _ in load(sweep / "narrow")] == ["narrow"]
    assert [name for name, _ in load(sweep / "wide")] == ["sae"]
    with pytest.raises(InputError, match="no SAE folder in it"):
        load(sweep / "wide" / "checkpoints" / "7" / "nothing")


def test_the_interface_is_what_saebench_asks_for(sweep):
    for _, sae in load(sweep):
        assert (sae.W_enc.shape, sae.W_dec.shape, sae.b_enc.shape, sae.b_dec.shape) == ((16, 40), (40, 16), (40,), (16,))
        assert sae.W_dec.data.dtype == sae.dtype == torch.float32
        cfg = sae.cfg
        assert (cfg.model_name, cfg.d_in, cfg.d_sae, cfg.hook_layer, cfg.hook_name) == ("gpt2-small", 16, 40, 9, HOOK)
        assert (cfg.context_size, cfg.dtype) == (64, "float32")
        assert cfg.architecture in ("jumprelu", "topk")
        cfg.hook_head_index = None  # SAEBench writes to it
        cfg.metadata = object()
        json.dumps(cfg.to_dict())
        x = torch.randn(2, 3, 16)
        assert sae.encode(x).shape == (2, 3, 40)
        assert torch.equal(sae(x), sae.decode(sae.encode(x)))
        low = sae.to(device="cpu", dtype=torch.bfloat16)
        assert low is sae
        assert (sae.dtype, sae.device) == (torch.bfloat16, torch.device("cpu"))
        assert sae.encode(x).dtype == sae(x).dtype == torch.bfloat16


def test_decoder_rows_get_norm_one_where_nothing_else_changes():
    sae = jumprelu()
    x = torch.randn(50, 16)
    before, fires = sae(x), sae.encode(x) > 0
    bench = BenchSAE(sae)
    torch.testing.assert_close(bench.W_dec.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(bench(x), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(bench.encode(x) > 0, fires)
    assert fires.any()
    other = topk()  # the k largest would be others, so they stay
    bias = other.W_dec.clone()
    assert torch.equal(BenchSAE(other).W_dec, bias)


def test_a_gated_sae_comes_as_the_jumprelu_that_it_is():
    g = torch.Generator().manual_seed(5)
    sae = GatedSAE(SAEConfig("gated", 16, 40, HOOK, metadata=dict(KNOWN))).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g))
    x = torch.randn(50, 16)
    before = sae(x)
    bench = BenchSAE(sae)
    torch.testing.assert_close(bench(x), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(sae(x), before)
    assert (bench.cfg.architecture, bench.b_enc.shape) == ("jumprelu", (40,))


def test_what_saebench_cannot_evaluate_is_refused(tmp_path):
    with pytest.raises(InputError, match="this is a transcoder"):
        BenchSAE(jumprelu(d_out=8))
    with pytest.raises(InputError, match="decodes without x, which layer_norm"):
        BenchSAE(jumprelu(normalize_activations="layer_norm"))
    sae_for(16, HOOK).save(tmp_path / "nameless")
    with pytest.raises(InputError, match="nameless: the SAE has no model_name"):
        load(tmp_path)
    assert load(tmp_path, model_name="gpt2-small")[0][1].cfg.model_name == "gpt2-small"
    with pytest.raises(InputError, match="says no layer"):
        BenchSAE(sae_for(16, "embed.hook_out"), "gpt2-small")


def peer(folder) -> None:
    """Run in SAEBench's environment: its core evaluation of all SAEs in a folder, on a small random model."""
    import sys

    import torch
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.sae_bench_utils import general_utils
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from sae.saebench import load

    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(n_layers=10, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu", device="cpu")
    )

    class Store:
        store_batch_size_prompts, context_size = 2, 8

        def get_batch_tokens(self, count):
            return torch.randint(0, 50, (count, 8))

        def reset_input_dataset(self):
            pass

    config = CoreEvalConfig(
        batch_size_prompts=2, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1, compute_kl=True,
        compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    for name, given in load(folder):
        number, sae, _ = general_utils.load_and_format_sae(name, given, "cpu")
        sae = sae.to(device="cpu", dtype=torch.float32)
        metrics, features = core.run_evals(sae, Store(), model, config)
        metrics["misc_metrics"] = core.calculate_misc_metrics(features)
        result = core.replace_nans_with_negative_one(
            {"metrics": metrics, "eval_cfg": config, "feature_metrics": features, "sae_set": name, "sae_id": number}
        )
        core.save_single_eval_result(result, "id", "version", "commit", f"{sys.argv[1]}/{name}.json", sae)


@pytest.mark.skipif(not PEER.exists(), reason="sae-bench is not installed there; MONOSEM_SAEBENCH_PYTHON names another")
def test_saebench_itself_evaluates_a_folder(sweep):
    code = f"{inspect.getsource(peer)}\nfrom pathlib import Path\nimport sys\npeer(Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([PEER, "-c", code, sweep], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((sweep / "narrow.json").read_text())
    assert found["eval_result_metrics"]["sparsity"]["l0"] == pytest.approx(4, abs=0.5)  # ReLU may leave fewer than k
    assert found["sae_cfg_dict"]["hook_name"] == HOOK
    assert len(json.loads((sweep / "wide_sae.json").read_text())["eval_result_details"]) == 40
    assert isinstance(SAE.load(sweep / "narrow"), TopKSAE)


def test_formats_of_torch_files_are_found_and_what_is_no_sae_is_passed_over(tmp_path, caplog):
    golden = Path(__file__).parent / "golden" / "dictionary_learning"
    shutil.copytree(golden, tmp_path / "saes")
    (tmp_path / "saes" / "state").mkdir()
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "saes" / "state" / "optimizer.pt")
    found = load(tmp_path / "saes", model_name="gpt2-small")
    assert [name for name, _ in found] == sorted(folder.name for folder in golden.iterdir())
    assert f"{tmp_path}/saes/state: passed over" in caplog.text
    x = load_file(golden.parent / "inputs.safetensors")["x"]
    for name, sae in found:
        torch.testing.assert_close(sae(x), SAE.load(golden / name)(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="state: no SAE folder in it"):
        load(tmp_path / "saes" / "state")
    (tmp_path / "saes" / "GatedAutoEncoder" / "ae.pt").write_bytes(b"torn")  # is not passed over
    with pytest.raises(InputError, match="GatedAutoEncoder"):
        load(tmp_path / "saes", model_name="gpt2-small")
