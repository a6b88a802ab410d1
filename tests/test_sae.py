"""The SAE's interface: shapes, folding, folders, and what loading refuses."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from activation_store.errors import InputError
from sae import SAE, LatentStatistics, SAEConfig, TrainConfig, train
from sae.architectures import ARCHITECTURES
from sae.architectures.identity import IdentitySAE
from sae.architectures.standard import StandardSAE
from sae.statistics import latent_statistics


def random_sae(d_in=8, d_sae=20, seed=0, apply_b_dec_to_input=True) -> StandardSAE:
    generator = torch.Generator().manual_seed(seed)
    sae = StandardSAE(SAEConfig("standard", d_in, d_sae, "blocks.0.hook_resid_post", apply_b_dec_to_input=apply_b_dec_to_input))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae.requires_grad_(False)


def test_encode_and_decode_by_hand():
    sae = StandardSAE(SAEConfig("standard", 2, 2)).requires_grad_(False)
    sae.W_enc.copy_(torch.tensor([[1.0, -1.0], [0.0, 2.0]]))
    sae.b_enc.copy_(torch.tensor([0.5, 0.0]))
    sae.W_dec.copy_(torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
    sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
    # x - b_dec = (2, 1); pre-activations (2 + 0.5, -2 + 2) = (2.5, 0); x_hat = 2.5 (1, 1) + (1, 1)
    f = sae.encode(torch.tensor([[3.0, 2.0]]))
    assert f.tolist() == [[2.5, 0.0]]
    assert sae.decode(f).tolist() == [[3.5, 3.5]]


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.01, 100), seed=st.integers(0, 1000), apply=st.booleans())
def test_folding_the_scale_keeps_reconstruction_and_active_set(scale, seed, apply):
    trained = random_sae(seed=seed, apply_b_dec_to_input=apply)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed + 1)).double()
    trained = trained.double()
    f, expected = trained.encode(x * scale), trained(x * scale) / scale
    trained.fold_scale(scale)
    torch.testing.assert_close(trained(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(trained.encode(x) > 0, f > 0)
    torch.testing.assert_close(trained.W_dec.norm(dim=1), torch.ones(20).double(), rtol=1e-6, atol=1e-6)


def test_folding_leaves_a_zero_decoder_row_alone():
    sae = random_sae()
    sae.W_dec[3] = 0
    sae.fold_scale(2.0)
    assert torch.isfinite(sae.W_enc).all()
    assert (sae.W_dec[3] == 0).all()


def test_folder_round_trip_and_saelens_layout(tmp_path):
    sae = random_sae().with_metadata(model_name="m", hook_name="blocks.3.hook_resid_pre", l0=3.5)
    sae.latents = LatentStatistics(torch.rand(20), torch.rand(20), torch.randint(0, 9, (20, 60)), 1234)
    sae.save(tmp_path / "sae")
    back = SAE.load(tmp_path / "sae")
    x = torch.randn(5, 8)
    assert torch.equal(back(x), sae(x))
    assert torch.equal(back.latents.histogram, sae.latents.histogram)
    assert back.latents.tokens == 1234
    assert back.cfg.hook_name == "blocks.3.hook_resid_pre"
    assert back.cfg.metadata["l0"] == 3.5
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text())
    # the keys that SAELens 6.54 reads from a v6 folder
    assert {"architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
            "reshape_activations", "metadata"} <= set(cfg)  # fmt: skip
    assert cfg["metadata"]["sae_lens_version"] >= "6.0.0"  # without it SAELens reads the folder as a pre-6 one
    shapes = {name: tuple(v.shape) for name, v in load_file(tmp_path / "sae/sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (8, 20), "b_enc": (20,), "W_dec": (20, 8), "b_dec": (8,)}
    sae.save(tmp_path / "sae")  # over an old one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "temporal"}, "temporal"),
        ({"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
        ({"d_sae": 21}, "do not fit"),
    ],
)
def test_loading_refuses_what_it_would_read_wrongly(tmp_path, change, message):
    random_sae().save(tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text())
    (tmp_path / "sae/cfg.json").write_text(json.dumps({**cfg, **change}))
    with pytest.raises(InputError, match=message):
        SAE.load(tmp_path / "sae")


def test_loading_refuses_garbage(tmp_path):
    with pytest.raises(InputError, match="0 known SAE formats"):
        SAE.load(tmp_path)
    random_sae().save(tmp_path / "sae")
    (tmp_path / "sae/sae_weights.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        SAE.load(tmp_path / "sae")
    random_sae().save(tmp_path / "other")
    weights = load_file(tmp_path / "other/sae_weights.safetensors")
    save_file({**weights, "threshold": torch.zeros(20)}, tmp_path / "other/sae_weights.safetensors")
    with pytest.raises(InputError, match="threshold"):
        SAE.load(tmp_path / "other")
    with pytest.raises(InputError, match="allowed: saelens"):
        random_sae().save(tmp_path / "x", format="pickle")


def test_identity_dictionary_is_the_neurons(tmp_path):
    neurons = IdentitySAE.of("blocks.1.mlp.hook_post", 6)
    x = torch.randn(4, 6)
    assert torch.equal(neurons.encode(x), x)
    assert torch.equal(neurons(x), x)
    assert torch.equal(neurons.W_dec, torch.eye(6))
    assert torch.equal(neurons.directions(torch.tensor([2, 5])), torch.eye(6)[[2, 5]])
    neurons.save(tmp_path / "neurons")
    assert torch.equal(SAE.load(tmp_path / "neurons")(x), x)


def test_sae_imports_without_the_heavy_packages():
    heavy = ("transformers", "transformer_lens", "datasets", "zarr", "openai", "matplotlib", "typer", "rich")
    code = f"import sys, sae, sae.intervene, sae.evaluate; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_unknown_train_key_is_refused():
    with pytest.raises(ValueError, match="l1_coeficient"):
        TrainConfig(d_sae=4, steps=1, l1_coeficient=3)


@pytest.mark.parametrize("kind", ["standard", "topk", "gated"])
def test_an_sae_in_bfloat16_takes_float32_rows(kind, tmp_path):
    own = {"k": 4} if kind == "topk" else {"l1_coefficient": 0.1}
    batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    train(batches, TrainConfig(architecture=kind, d_sae=32, steps=20, lr=1e-3, **own)).save(tmp_path / "sae")
    whole, half = SAE.load(tmp_path / "sae"), SAE.load(tmp_path / "sae", dtype="bfloat16")
    x = batches[0]
    assert half.W_enc.dtype == torch.bfloat16
    for found, wanted in ((half.encode(x), whole.encode(x)), (half(x), whole(x)), (half.reconstruct_sparse(x)[1], whole(x))):
        assert float((found.float() - wanted).norm() / wanted.norm()) < 0.1
    assert torch.equal(half.encode_sparse(x).dense(), half.encode(x).float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "cfg",
    [
        SAEConfig("jumprelu", 8, 16), SAEConfig("batchtopk", 8, 16), SAEConfig("topk", 8, 16, k=3),
        SAEConfig("gated", 8, 16, skip=True, d_out=8), SAEConfig("standard", 8, 16, normalize_activations="layer_norm"),
        SAEConfig("cross_layer_transcoder", 8, 16, apply_b_dec_to_input=False, d_out=8, hook_names=("a", "b"), widths=(4, 4),
                  hook_names_out=("c", "d"), widths_out=(4, 4), metadata={"layers": "topk"}, k=3),
    ],
    ids=lambda cfg: cfg.architecture,
)  # fmt: skip
def test_narrow_dtypes_of_every_kind_take_float32_rows(cfg, dtype):
    sae = ARCHITECTURES[cfg.architecture](replace(cfg, dtype=dtype)).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator).abs())
    x = torch.randn(20, 8, generator=generator)
    f, x_hat = sae.reconstruct_sparse(x)
    assert sae.encode(x).dtype == sae(x).dtype == x_hat.dtype == getattr(torch, dtype)
    assert torch.equal(f.dense(), sae.encode(x).float())
    torch.testing.assert_close(x_hat, sae(x), rtol=0.05, atol=0.05)


def test_statistics_of_latents_in_bfloat16_are_those_in_float32_but_for_rounding(tiny_store):
    sae = random_sae(32, 64)
    half = StandardSAE(replace(sae.cfg, dtype="bfloat16")).requires_grad_(False)
    half.load_state_dict(sae.state_dict())
    hook = "blocks.1.hook_resid_post"
    whole, found = latent_statistics(sae, tiny_store, hook), latent_statistics(half, tiny_store, hook)
    assert found.tokens == whole.tokens > 0
    torch.testing.assert_close(found.max_activation, whole.max_activation, rtol=0.05, atol=0.05)
    torch.testing.assert_close(found.density, whole.density, rtol=0, atol=0.02)
