"""Foreign formats: what the peers' own packages computed, round trips, what is refused, and what peers make of what we save.

tests/golden/ is made by scripts/golden_formats.py, with the peers' own packages.
"""

import json
import os
import pickle
import shutil
import subprocess
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_cli import monosem_cli

from activation_store.errors import InputError
from sae import SAE, LatentStatistics, SAEConfig
from sae.architectures import ARCHITECTURES
from sae.architectures.gated import GatedSAE
from sae.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
DICTIONARY = "dictionary_learning/AutoEncoder"
RESID = "blocks.9.hook_resid_post"
CASES = sorted(path.parent.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("*/*/expected.safetensors"))
def inputs() -> torch.Tensor:
    return load_file(GOLDEN / "inputs.safetensors")["x"]


def made(seed=0, d_in=6, d_sae=10, architecture="standard", dtype="float32", **options) -> SAE:
    """An SAE whose weights, and whose latents of such inputs, are whole numbers over 4: no product or sum of them is rounded."""
    k = min(3, d_sae) if architecture == "topk" else None
    cfg = SAEConfig(architecture, d_in, d_sae, "blocks.2.hook_resid_post", dtype, k=k, **options)
    sae, generator = ARCHITECTURES[architecture](cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator) / 4)
            if name == "threshold":
                parameter.abs_()
            if name == "r_mag":
                parameter.zero_()
    return sae.requires_grad_(False)


def rows(d_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-8, 9, (12, d_in), generator=torch.Generator().manual_seed(seed)) / 4


def same(a: SAE, b: SAE, x: torch.Tensor) -> bool:
    f = a.encode(x)
    return torch.equal(f, b.encode(x)) and torch.equal(a.decode(f), b.decode(f)) and torch.equal(a(x), b(x))


# What the peers computed


@pytest.mark.parametrize("case", CASES)
def test_latents_and_reconstructions_are_the_peers(case):
    expected, sae = load_file(GOLDEN / case / "expected.safetensors"), SAE.load(GOLDEN / case)
    x = expected.get("x", inputs()).to(sae.W_enc.dtype)
    sparse, reconstruction = sae.reconstruct_sparse(x)
    for found, name in ((sae.encode(x), "f"), (sparse.dense(), "f"), (sae(x), "x_hat"), (reconstruction, "x_hat")):
        error = (found.float() - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= 1e-5, (case, name, float(error))
    fires = expected["f"] > 0
    assert 0 < fires.sum() < fires.numel()  # or there would be nothing to compare


def test_every_format_has_golden_files():
    assert {case.split("/")[0] for case in CASES} == set(FORMATS)
    assert len(CASES) >= 45
    assert sum(file.stat().st_size for name in FORMATS for file in (GOLDEN / name).rglob("*")) < 2e6


@pytest.mark.parametrize(
    ("case", "architecture", "hooks", "facts"),
    [
        ("saelens/flat_standard", "standard", (RESID, None), {"model_name": "smollm2-135m", "hook_layer": 9}),
        ("saelens/flat_topk", "topk", (RESID, None), {"prepend_bos": True}),
        ("saelens/skip_transcoder", "standard", ("blocks.9.ln2.hook_normalized", "blocks.9.hook_mlp_out"), {}),
        ("saelens/standard_hook_z", "standard", ("blocks.9.attn.hook_z", None), {"reshape_activations": "hook_z"}),
        ("dictionary_learning/BatchTopKSAE", "jumprelu", (RESID, None), {"k": 8, "context_size": 128}),
        ("dictionary_learning/MatryoshkaBatchTopKSAE", "jumprelu", (RESID, None), {"group_sizes": [16, 24, 24]}),
        ("dictionary_learning/GatedAutoEncoder", "gated", (RESID, None), {"model_name": "smollm2-135m"}),
        ("sparsify/layers.9", "topk", (RESID, None), {}),
        ("sparsify/layers.9.mlp", "topk", ("blocks.9.mlp.hook_in", "blocks.9.hook_mlp_out"), {}),
        ("gemma_scope/sae", "jumprelu", (None, None), {}),
        ("gemma_scope_2/transcoder_affine", "jumprelu", ("blocks.9.mlp.hook_in", "blocks.9.hook_mlp_out"), {"l0": 10}),
        ("openai/topk", "topk", (None, None), {}),
        ("circuit_tracer/relu_skip", "standard", ("blocks.9.mlp.hook_in", "blocks.9.hook_mlp_out"), {"scan": "some/scan"}),
    ],
)
def test_what_a_file_says_of_itself_is_kept(case, architecture, hooks, facts):
    cfg = SAE.load(GOLDEN / case).cfg
    assert (cfg.architecture, cfg.hook_name, cfg.hook_name_out) == (architecture, *hooks)
    assert facts.items() <= cfg.metadata.items()
    assert cfg.k == (8 if architecture == "topk" else None)


@pytest.mark.parametrize("case", CASES)
def test_a_file_alone_is_as_good_as_its_folder(case):
    files = [file for file in (GOLDEN / case).iterdir() if file.suffix in (".safetensors", ".npz", ".pt")]
    (weights,) = [file for file in files if file.name != "expected.safetensors"]
    x, whole = inputs(), SAE.load(GOLDEN / case, dtype="float32")
    assert same(SAE.load(weights, dtype="float32"), whole, x)
    for name in FORMATS:  # and no format takes another's for its own
        if name != case.split("/")[0]:
            with pytest.raises(InputError):
                SAE.load(weights, format=name)


# Round trips


@st.composite
def saes(draw) -> SAE:
    architecture = draw(st.sampled_from(["standard", "topk", "jumprelu", "gated"]))
    d_in, d_sae = draw(st.integers(2, 6)), draw(st.integers(2, 6))
    options = {"apply_b_dec_to_input": draw(st.booleans()), "skip": draw(st.booleans())}
    if draw(st.booleans()):
        options |= {"hook_name_out": "blocks.2.hook_mlp_out", "d_out": draw(st.sampled_from([d_in, d_in + 1]))}
        options["apply_b_dec_to_input"] &= options["d_out"] == d_in  # or b_dec is of another width than the input
    elif draw(st.booleans()) and not options["skip"]:
        options["normalize_activations"] = "layer_norm"
    sae = made(draw(st.integers(0, 99)), d_in, d_sae, architecture, **options)
    if draw(st.booleans()):  # decoder rows of norm 1 that are no approximation
        with torch.no_grad():
            sae.W_dec.copy_(torch.eye(sae.cfg.width_out)[torch.arange(d_sae) % sae.cfg.width_out])
    if architecture == "jumprelu" and draw(st.booleans()):
        with torch.no_grad():
            sae.threshold.fill_(0.75)
        sae.with_metadata(k=2)
    return sae


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sae=saes(), format=st.sampled_from(sorted(FORMATS)))
def test_a_round_trip_changes_nothing(tmp_path, sae, format):
    folder = tmp_path / "sae"
    missing = FORMATS[format].lacks(sae)
    if missing is not None:
        with pytest.raises(InputError, match=f"{format} has no place for {missing[:20]}"):
            sae.save(folder, format=format)
        return
    apply, norm = sae.cfg.apply_b_dec_to_input, sae.cfg.normalize_activations == "layer_norm"
    assume(apply or not norm or format != "openai")  # which folds b_dec, here into what is rounded already
    scaled = format == "dictionary_learning" and sae.cfg.architecture == "standard" and apply
    assume(not scaled or torch.allclose(sae.W_dec.norm(dim=1), torch.ones(1)))
    sae.with_metadata(l0=3.5)
    sae.save(folder, format=format)
    back = SAE.load(folder)
    assert same(back, sae, rows(sae.cfg.d_in))
    assert (back.cfg.hook_name, back.cfg.hook_name_out) == (sae.cfg.hook_name, sae.cfg.hook_name_out)
    assert back.cfg.metadata["l0"] == 3.5
    assert back.cfg.k == sae.cfg.k
    assert back.cfg.d_out == sae.cfg.d_out or format == "saelens"  # where a hook that is predicted makes a transcoder
    if format == "saelens" and not (sae.cfg.skip or sae.cfg.d_out):
        assert replace(back.cfg, metadata={}) == replace(sae.cfg, metadata={})
        assert all(torch.equal(value, back.state_dict()[name]) for name, value in sae.state_dict().items())


def test_some_sae_of_every_architecture_can_go_to_each_format_that_has_it():
    can = {name: [a for a in ("standard", "topk", "jumprelu", "gated") if known.lacks(made(architecture=a)) is None]
           for name, known in FORMATS.items()}  # fmt: skip
    assert can == {
        "saelens": ["standard", "topk", "jumprelu", "gated"],
        "dictionary_learning": ["standard", "topk", "jumprelu", "gated"],
        "sparsify": ["topk"],
        "gemma_scope": ["standard", "jumprelu"],
        "gemma_scope_2": ["standard", "jumprelu"],
        "openai": ["standard"],
        "circuit_tracer": ["standard", "jumprelu"],
    }


@pytest.mark.parametrize(
    ("sae", "format", "said"),
    [
        (made(architecture="gated"), "gemma_scope", "place for the architecture gated; formats that do: saelens, dictionary"),
        (made(architecture="jumprelu"), "sparsify", "the architecture jumprelu; formats that do: saelens, dictionary"),
        (made(skip=True), "gemma_scope", "a skip connection; formats that do: saelens, gemma_scope_2, circuit_tracer"),
        (made(architecture="topk"), "openai", "a topk without a layer norm of the input"),
        (made(d_out=7, apply_b_dec_to_input=False), "circuit_tracer", r"another width than the input \(7, not 6\)"),
        (made(architecture="topk", normalize_activations="layer_norm"), "sparsify", "of the input; formats that do: saelens, op"),
        (made(normalize_activations="layer_norm", d_out=6), "saelens", "a layer norm of a transcoder; formats that do: none"),
        (made(hook_names=("a", "b"), widths=(2, 4)), "gemma_scope", "several hooks at once; formats that do: saelens"),
        (made(), "pickle", "'pickle' given; allowed: saelens, dictionary_learning"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path, sae, format, said):
    with pytest.raises(InputError, match=said):
        sae.save(tmp_path / "sae", format=format)
    assert list(tmp_path.iterdir()) == []


def test_latents_and_facts_go_along_into_every_format(tmp_path):
    sae = made(architecture="jumprelu", apply_b_dec_to_input=False).with_metadata(model_name="m", prepend_bos=True)
    sae.latents = LatentStatistics(torch.rand(10), torch.rand(10), torch.randint(0, 9, (10, 60)), 1234)
    for name, known in FORMATS.items():
        if known.lacks(sae) is None:
            sae.save(tmp_path / name, format=name)
            back = SAE.load(tmp_path / name)
            assert torch.equal(back.latents.histogram, sae.latents.histogram)
            assert sae.cfg.metadata.items() <= back.cfg.metadata.items()


def test_dictionary_learning_brings_an_autoencoders_decoder_to_norm_1_as_its_loader_does(tmp_path):
    sae, x = made(), rows(6)
    sae.latents = LatentStatistics(torch.rand(10), torch.rand(10), torch.randint(0, 9, (10, 60)), 1234)
    sae.save(tmp_path / "sae", format="dictionary_learning")
    back = SAE.load(tmp_path / "sae")
    torch.testing.assert_close(back.encode(x), sae.encode(x) * sae.W_dec.norm(dim=1))
    torch.testing.assert_close(back(x), sae(x))
    assert back.latents is None  # they are of latents of another scale


@pytest.mark.parametrize("format", ["circuit_tracer", "gemma_scope_2", "sparsify", "dictionary_learning"])
def test_an_sae_stays_an_sae_in_formats_of_transcoders(tmp_path, format):
    kind = "topk" if format == "sparsify" else "jumprelu"
    for transcoder in (False, True):
        own = {"d_out": 6, "hook_name_out": "blocks.2.hook_mlp_out"} if transcoder else {}
        sae, folder = made(architecture=kind, apply_b_dec_to_input=False, **own), tmp_path / str(transcoder)
        sae.save(folder, format=format)
        assert SAE.load(folder).cfg.d_out == sae.cfg.d_out
        facts = json.loads((folder / "monosem.json").read_text())
        del facts["d_out"]  # as it was written before
        (folder / "monosem.json").write_text(json.dumps(facts))
        assert SAE.load(folder).cfg.d_out == sae.cfg.d_out


def test_batchtopk_goes_back_to_dictionary_learning_as_what_it_was(tmp_path):
    for case in ("BatchTopKSAE", "AutoEncoderTopK", "JumpReluAutoEncoder", "GatedAutoEncoder", "AutoEncoderNew", "AutoEncoder"):
        SAE.load(GOLDEN / "dictionary_learning" / case).save(tmp_path / case, format="dictionary_learning")
        assert json.loads((tmp_path / case / "config.json").read_text())["trainer"]["dict_class"] == case
        theirs = torch.load(GOLDEN / "dictionary_learning" / case / "ae.pt", weights_only=True)
        ours = torch.load(tmp_path / case / "ae.pt", weights_only=True)
        assert {name: (value.shape, value.dtype) for name, value in theirs.items()} == {
            name: (value.shape, value.dtype) for name, value in ours.items()
        }


# Detection


def test_orientation_of_square_matrices_is_the_formats(tmp_path):
    sae, x = made(d_in=6, d_sae=6, architecture="jumprelu", apply_b_dec_to_input=False), rows(6)
    assert not torch.equal(sae.W_enc, sae.W_enc.T)
    for name, known in FORMATS.items():
        if known.lacks(sae) is None:
            sae.save(tmp_path / name, format=name)
            assert same(SAE.load(tmp_path / name), sae, x), name


def test_square_tensors_that_may_be_either_way_round_are_refused_until_the_format_is_named(tmp_path):
    sae, x = made(d_in=6, d_sae=6, apply_b_dec_to_input=False), rows(6)
    sae.save(tmp_path / "sae", format="circuit_tracer")
    (tmp_path / "sae/config.yaml").unlink()
    with pytest.raises(InputError, match=r"0 known SAE formats match. Found: layer_2.safetensors \(safetensors: W_dec \[6, 6\]"):
        SAE.load(tmp_path / "sae")
    assert same(SAE.load(tmp_path / "sae", format="circuit_tracer"), sae, x)


def test_two_saes_in_one_folder_are_refused_until_one_is_named(tmp_path):
    topk, standard, x = made(architecture="topk"), made(), rows(6)
    standard.save(tmp_path / "sae")
    topk.save(tmp_path / "other", format="dictionary_learning")
    for file in (tmp_path / "other").iterdir():
        shutil.copy(file, tmp_path / "sae" / file.name)
    with pytest.raises(InputError, match=r"2 known .* match \(dictionary_learning: ae.pt; saelens: sae_weights.safetensors\)"):
        SAE.load(tmp_path / "sae")
    assert same(SAE.load(tmp_path / "sae", format="saelens"), standard, x)
    assert same(SAE.load(tmp_path / "sae" / "ae.pt"), topk, x)
    with pytest.raises(InputError, match="'onnx' given; allowed"):
        SAE.load(tmp_path / "sae", format="onnx")


def test_a_set_of_layers_is_refused_until_a_layer_is_named(tmp_path):
    case = GOLDEN / "circuit_tracer/relu"
    for layer in (0, 1):
        shutil.copy(case / "layer_9.safetensors", tmp_path / f"layer_{layer}.safetensors")
    with pytest.raises(InputError, match="2 known SAE formats match"):
        SAE.load(tmp_path)
    with pytest.raises(InputError, match="2 known SAE formats match"):
        SAE.load(tmp_path, format="circuit_tracer")
    assert same(SAE.load(tmp_path / "layer_1.safetensors"), SAE.load(case), inputs())


def test_names_of_files_do_not_matter(tmp_path):
    for case in ("openai/topk/9.pt", "gemma_scope/sae/params.npz", "circuit_tracer/jumprelu/layer_9.safetensors"):
        shutil.copy(GOLDEN / case, tmp_path / "weights")
        assert same(SAE.load(tmp_path / "weights"), SAE.load(GOLDEN / case), inputs())


def test_the_folder_above_says_what_is_below(tmp_path):
    shutil.copytree(GOLDEN / "sparsify", tmp_path / "run")
    with pytest.raises(InputError, match=r"no .safetensors, .npz or .pt file. .*Folders in it: layers.6, layers.7, .*meant"):
        SAE.load(tmp_path / "run")
    with pytest.raises(InputError, match="no such file or folder"):
        SAE.load(tmp_path / "nowhere")


def test_topk_and_batchtopk_of_dictionary_learning_need_the_config(tmp_path):
    for kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        shutil.copy(GOLDEN / "dictionary_learning" / kind / "ae.pt", tmp_path / "ae.pt")
        with pytest.raises(InputError, match=r"fit AutoEncoderTopK and BatchTopKSAE; the config\.json"):
            SAE.load(tmp_path)
    shutil.copy(GOLDEN / "dictionary_learning/JumpReluAutoEncoder/ae.pt", tmp_path / "ae.pt")  # only one class has these
    assert SAE.load(tmp_path).cfg.metadata["dict_class"] == "JumpReluAutoEncoder"


class Trap:
    """What runs a command where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (self.where,)


def test_nothing_is_unpickled(tmp_path):
    trap = Trap()
    trap.where = str(tmp_path / "ran")
    state = torch.load(GOLDEN / "dictionary_learning/AutoEncoder/ae.pt", weights_only=True)
    torch.save({**state, "trap": trap}, tmp_path / "zip.pt")
    torch.save({**state, "trap": trap}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"trap": trap}, protocol=2))
    np.savez(tmp_path / "objects.npz", W_enc=np.array([trap], dtype=object))
    for name in ("zip.pt", "old.pt", "bare.pt", "objects.npz"):
        with pytest.raises(InputError, match=name) as refused:
            SAE.load(tmp_path / name)
        assert "weights_only" not in str(refused.value)  # torch says how to unpickle it all the same
        assert name == "objects.npz" or str(refused.value).endswith("nothing else is unpickled (it asks for posix.mkdir)")
    torch.save({**state, "number": np.float64(1)}, tmp_path / "number.pt")
    with pytest.raises(InputError, match=r"\(it asks for numpy\S+scalar\)$"):
        SAE.load(tmp_path / "number.pt")
    assert not (tmp_path / "ran").exists()


def test_torch_files_of_before_zip_are_read(tmp_path):
    state = torch.load(GOLDEN / "dictionary_learning/AutoEncoderNew/ae.pt", weights_only=True)
    torch.save(OrderedDict(state), tmp_path / "ae.pt", _use_new_zipfile_serialization=False)
    assert same(SAE.load(tmp_path / "ae.pt"), SAE.load(GOLDEN / "dictionary_learning/AutoEncoderNew"), inputs())


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "a.pt"])
@pytest.mark.parametrize("body", [b"", b"not at all", b"PK\x03\x04 torn", b"\x80\x02torn", b"\xff" * 64])
def test_garbage_is_named(tmp_path, name, body):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(InputError, match=name):
        SAE.load(tmp_path)


# What would be read wrongly


def edited(tmp_path: Path, case: str, name: str = "cfg.json", **change: object) -> Path:
    """A copy of a golden case with a changed config; a change to None takes the key out."""
    folder = Path(shutil.copytree(GOLDEN / case, tmp_path / Path(case).name))
    config = json.loads((folder / name).read_text()) | change
    (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("case", "name", "change", "said"),
    [
        ("saelens/standard", "cfg.json", {"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
        ("saelens/transcoder", "cfg.json", {"normalize_activations": "layer_norm"}, "layer_norm' of a transcoder"),
        ("saelens/standard", "cfg.json", {"reshape_activations": "other"}, "allowed: none, hook_z"),
        ("saelens/transcoder", "cfg.json", {"d_out": None}, "d_out is None"),
        ("saelens/topk", "cfg.json", {"k": None}, "k is None; a positive whole number"),
        ("saelens/standard", "cfg.json", {"architecture": "matching_pursuit"}, "matching_pursuit'; known: standard"),
        ("saelens/standard", "cfg.json", {"dtype": "int8"}, "dtype 'int8'; allowed: float32"),
        ("saelens/standard", "cfg.json", {"d_sae": 63}, "do not fit the config"),
        ("saelens/topk", "cfg.json", {"k": 65}, "k is 65; there are 64 latents"),
        ("sparsify/layers.9", "cfg.json", {"k": 65}, "k is 65; there are 64 latents"),
        ("saelens/flat_topk", "cfg.json", {"activation_fn_str": "tanh-relu"}, "tanh-relu"),
        ("saelens/flat_topk", "cfg.json", {"activation_fn_kwargs": None}, "k is None"),
        ("sparsify/layers.9", "cfg.json", {"activation": "groupmax"}, "groupmax"),
        ("sparsify/layers.9", "cfg.json", {"signed": True}, "signed latents"),
        ("sparsify/layers.9", "cfg.json", {"num_latents": 63}, r"\[64, 40\] does not fit cfg.json, which asks for \[63, 40\]"),
        ("sparsify/layers.9", "cfg.json", {"k": None}, "no cfg.json with d_in and k"),
        ("gemma_scope_2/sae", "config.json", {"architecture": "crosscoder"}, "crosscoder"),
        (DICTIONARY, "config.json", {"trainer": {"dict_class": "CrossCoder"}}, "CrossCoder'; known: Auto"),
        (DICTIONARY, "config.json", {"trainer": {"dict_class": "AutoEncoderNew"}}, "lacks decoder.bias and has bias"),
        (f"{DICTIONARY}TopK", "config.json", {"trainer": {"dict_class": "AutoEncoderTopK", "k": 9}}, r"k is \[8, 9\]"),
        (DICTIONARY, "config.json", {"trainer": "?"}, "an object with dict_class is needed"),
    ],
)  # fmt: skip
def test_a_config_that_asks_for_something_else_is_refused(tmp_path, case, name, change, said):
    with pytest.raises(InputError, match=said):
        SAE.load(edited(tmp_path, case, name, **change))


def test_files_that_are_more_than_one_sae_or_not_what_we_compute_are_refused(tmp_path):
    tensors = load_file(GOLDEN / "gemma_scope_2/sae/params.safetensors")
    save_file(tensors | {"w_dec": tensors["w_dec"][:, None].contiguous()}, tmp_path / "layers.safetensors")
    with pytest.raises(InputError, match=r"w_dec \[64, 1, 40\] writes to several layers"):
        SAE.load(tmp_path / "layers.safetensors")
    tensors = load_file(GOLDEN / "circuit_tracer/jumprelu/layer_9.safetensors")
    save_file(tensors | {"activation_function.threshold": torch.full((64,), -1.0)}, tmp_path / "below.safetensors")
    with pytest.raises(InputError, match="below 0 let negative latents through"):
        SAE.load(tmp_path / "below.safetensors")
    state = torch.load(GOLDEN / "openai/topk/9.pt", weights_only=True)
    for change, said in (
        ({"activation_state_dict": {"k": 8, "postact_fn": "Identity"}}, "Identity' lets negative"),
        ({"activation": "Softmax"}, "ReLU and TopK are supported"),
        ({"activation_state_dict": {}}, "k is None"),
    ):
        torch.save(state | change, tmp_path / "other.pt")
        with pytest.raises(InputError, match=said):
            SAE.load(tmp_path / "other.pt")
    (tmp_path / "list.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="holds a list; an SAE is a dictionary of tensors"):
        SAE.load(tmp_path / "list.pt")
    folder = edited(tmp_path, "saelens/standard")
    (folder / "cfg.json").write_text("{torn")
    with pytest.raises(InputError, match=r"cfg.json: not readable JSON"):
        SAE.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    folder = edited(tmp_path, "saelens/standard")
    weights = load_file(folder / "sae_weights.safetensors")
    weights["W_dec"][3, :2] = value
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(InputError, match=r"standard: W_dec has 2 values that are infinite or NaN; get the file again"):
        SAE.load(folder)
    weights["W_dec"][3, :2] = 1e6  # which float16 does not hold
    save_file(weights, folder / "sae_weights.safetensors")
    assert SAE.load(folder).W_dec.max() == 1e6
    with pytest.raises(InputError, match=r"W_dec has 2 values .* float16 does not reach so far: load it as float32"):
        SAE.load(folder, dtype="float16")


def test_old_saelens_configs_come_back_as_version_6(tmp_path):
    old = SAE.load(edited(tmp_path, "saelens/flat_topk", sae_lens_version="3.5.0", expansion_factor=2))
    old.save(tmp_path / "new")
    config = json.loads((tmp_path / "new/cfg.json").read_text())
    assert config["metadata"]["sae_lens_version"] >= "6"  # of which SAELens would otherwise lose all metadata
    assert (config["architecture"], config["k"], config["metadata"]["expansion_factor"]) == ("topk", 8, 2)
    assert same(SAE.load(tmp_path / "new"), old, inputs())


def test_a_finetuning_factor_is_taken_before_decoding(tmp_path):
    factor = torch.rand(64) + 0.5
    plain, x = SAE.load(GOLDEN / "saelens/flat_standard"), inputs()
    folder = edited(tmp_path, "saelens/flat_standard", finetuning_scaling_factor=True)
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {"scaling_factor": factor}, folder / "sae_weights.safetensors")
    sae = SAE.load(folder)
    assert torch.equal(sae.encode(x), plain.encode(x))
    torch.testing.assert_close(sae(x), plain.decode(plain.encode(x) * factor))
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"finetuning_scaling_factor": False}))
    with pytest.raises(InputError, match="scaling_factor is not 1, but finetuning_scaling_factor is False"):
        SAE.load(folder)
    save_file(weights | {"scaling_factor": torch.ones(64)}, folder / "sae_weights.safetensors")
    assert same(SAE.load(folder), plain, x)


def test_hook_z_comes_back_as_hook_z(tmp_path):
    SAE.load(GOLDEN / "saelens/standard_hook_z").save(tmp_path / "sae")
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    assert config["reshape_activations"] == "hook_z"
    assert "reshape_activations" not in config["metadata"]


def test_transcoders_that_saelens_knows_have_its_names_and_subtract_nothing(tmp_path):
    for architecture, skip, name in (
        ("standard", False, "transcoder"), ("standard", True, "skip_transcoder"), ("jumprelu", False, "jumprelu_transcoder"),
        ("jumprelu", True, "jumprelu_skip_transcoder"), ("topk", False, "topk_transcoder"),
        ("gated", True, "gated_skip_transcoder"),
    ):  # fmt: skip
        sae = made(architecture=architecture, skip=skip, d_out=6, apply_b_dec_to_input=True)
        sae.save(tmp_path / name)
        config = json.loads((tmp_path / name / "cfg.json").read_text())
        assert (config["architecture"], config["d_out"]) == (name, 6)
        assert config["apply_b_dec_to_input"] == (architecture in ("topk", "gated"))  # which are ours alone
        assert same(SAE.load(tmp_path / name), sae, rows(6))


def test_crosscoders_keep_their_hooks(tmp_path):
    sae = made(hook_names=("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"), widths=(2, 4))
    sae.save(tmp_path / "sae")
    back = SAE.load(tmp_path / "sae")
    assert (back.cfg.hook_names, back.cfg.widths) == (sae.cfg.hook_names, sae.cfg.widths)
    assert "widths" not in back.cfg.metadata
    assert same(back, sae, rows(6))


# dtypes


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_the_dtype_is_the_configs_or_float32_or_what_is_asked_for(tmp_path, stored):
    folder = Path(shutil.copytree(GOLDEN / "sparsify/layers.9", tmp_path / "layers.9"))
    weights = {name: value.to(stored) for name, value in load_file(folder / "sae.safetensors").items()}
    save_file(weights, folder / "sae.safetensors")
    sae = SAE.load(folder)
    assert (sae.cfg.dtype, sae.W_dec.dtype) == ("float32", torch.float32)
    assert torch.equal(sae.W_dec, weights["W_dec"].float())
    name = str(stored).removeprefix("torch.")
    low = SAE.load(folder, dtype=name)
    low.save(tmp_path / "saelens")  # whose config names a dtype
    back = SAE.load(tmp_path / "saelens")
    assert (back.cfg.dtype, back.W_dec.dtype) == (name, stored)
    assert torch.equal(SAE.load(tmp_path / "saelens", dtype="float32").W_enc, sae.W_enc)
    low.save(tmp_path / "sparsify", format="sparsify")
    assert load_file(tmp_path / "sparsify/sae.safetensors")["W_dec"].dtype == stored
    with pytest.raises(InputError, match="dtype 'int4'; allowed"):
        SAE.load(folder, dtype="int4")


def test_a_bfloat16_sae_becomes_float32_where_numpy_has_no_bfloat16(tmp_path):
    sae = made(architecture="jumprelu", dtype="bfloat16", apply_b_dec_to_input=False)
    sae.save(tmp_path / "sae", format="gemma_scope")
    assert torch.equal(SAE.load(tmp_path / "sae").W_dec, sae.W_dec.float())


# The gated SAE


def test_gated_by_hand():
    sae = GatedSAE(SAEConfig("gated", 2, 3)).requires_grad_(False)
    sae.W_enc.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    sae.b_gate.copy_(torch.tensor([0.0, -5.0, 0.0]))
    sae.b_mag.copy_(torch.tensor([0.5, 0.5, -9.0]))
    sae.r_mag.copy_(torch.tensor([2.0, 2.0, 2.0]).log())
    sae.W_dec.copy_(torch.tensor([[1.0, 1.0], [0.0, 3.0], [1.0, 0.0]]))
    sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
    # x - b_dec = (2, 1) = u: gates 2 > 0, 2 - 5 < 0, 1 > 0; magnitudes 2 * 2 + 0.5, -, 2 * 1 - 9 < 0
    x = torch.tensor([[3.0, 2.0]])
    torch.testing.assert_close(sae.encode(x), torch.tensor([[4.5, 0.0, 0.0]]))
    torch.testing.assert_close(sae(x), torch.tensor([[5.5, 5.5]]))
    assert len(sae.encode_sparse(x).values) == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), apply=st.booleans(), skip=st.booleans(), scale=st.floats(0.01, 100))
def test_gated_sparse_latents_and_folding(seed, apply, skip, scale):
    cfg = SAEConfig("gated", 8, 20, apply_b_dec_to_input=apply, skip=skip)
    sae, generator = GatedSAE(cfg).requires_grad_(False), torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(64, 8, generator=generator)
    f, x_hat = sae.reconstruct_sparse(x)
    torch.testing.assert_close(f.dense(), sae.encode(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x_hat, sae(x), rtol=1e-5, atol=1e-4)
    assert (f.values > 0).all()
    if not skip:
        wide = sae.double()
        expected, fires = wide(x.double() * scale) / scale, wide.encode(x.double() * scale) > 0
        wide.fold_scale(scale)
        torch.testing.assert_close(wide(x.double()), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
        assert torch.equal(wide.encode(x.double()) > 0, fires)


# The command line


def test_convert(tmp_path, capsys, monkeypatch):
    case = GOLDEN / "sparsify/layers.9"
    code, out, _ = monosem_cli(capsys, monkeypatch, "convert", case, tmp_path / "dl", "--to", "dictionary_learning")
    assert code == 0
    assert "topk, d_in 40, d_sae 64" in out
    assert "ae.pt, config.json, monosem.json" in out
    assert same(SAE.load(tmp_path / "dl"), SAE.load(case), inputs())
    for arguments, said in (
        ((case, tmp_path / "dl", "--to", "saelens"), "exists already; name a new folder"),
        ((case, tmp_path / "x", "--to", "gemma_scope"), "no place for the architecture topk; formats that do: saelens"),
        ((case, tmp_path / "x", "--to", "safetensor"), "'safetensor' given; allowed: saelens"),
        ((tmp_path / "nowhere", tmp_path / "x", "--to", "saelens"), "no such file or folder"),
        ((case, tmp_path / "x", "--to", "saelens", "--from", "openai"), "0 known SAE formats match"),
        ((case, tmp_path / "x", "--to", "saelens", "--from", "gemma_scope_2"), "0 known SAE formats match"),
        ((case / "sae.safetensors", tmp_path / "x", "--to", "saelens", "--from", "gemma_scope_2"), "lacks W_enc"),
    ):
        code, _, error = monosem_cli(capsys, monkeypatch, "convert", *arguments)
        assert code == 2
        assert said in error
        assert len(error.strip().splitlines()) == 1
        assert not (tmp_path / "x").exists()


def test_convert_takes_a_runs_sae(tmp_path, capsys, monkeypatch):
    made().save(tmp_path / "run/sae")
    code, _, error = monosem_cli(capsys, monkeypatch, "convert", tmp_path / "run", tmp_path / "out", "--to", "openai")
    assert code == 0, error
    assert same(SAE.load(tmp_path / "out"), made(), rows(6))


# What the peers make of what we save: in their own environments, a few seconds each


def peers_can_read(peer: str, folders: list[Path], x: torch.Tensor) -> None:
    python = ROOT / ".venv-peers" / peer / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{peer} is not set up (scripts/set_up_peers.py, and scripts/golden_formats.py --set-up)")
    save_file({"x": x}, folders[0].parent / "x.safetensors")
    command = [python, ROOT / "scripts/golden_cases.py", peer, "--inputs", folders[0].parent / "x.safetensors"]
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    done = subprocess.run([*command, "--read", *folders], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for folder in folders:
        ours, theirs = SAE.load(folder), load_file(folder / "expected.safetensors")
        for found, name in ((ours.encode(x), "f"), (ours(x), "x_hat")):
            assert (found - theirs[name]).abs().max() <= 1e-5 * theirs[name].abs().max(), (folder.name, name)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("peer", "format"),
    [("saelens", "saelens"), ("dictionary_learning", "dictionary_learning"), ("sparsify", "sparsify"),
     ("circuit_tracer", "circuit_tracer"), ("circuit_tracer", "gemma_scope"), ("circuit_tracer", "gemma_scope_2")],
)  # fmt: skip
def test_peers_load_what_we_save(tmp_path, peer, format):
    """Every golden SAE of any format that this one can hold, and that its package has a class for."""
    folders = []
    for case in CASES:
        sae = SAE.load(GOLDEN / case, dtype="float32")
        transcoder, theirs = sae.cfg.skip or sae.cfg.d_out is not None, ("standard", "jumprelu")
        no_class = peer == "saelens" and transcoder and sae.cfg.architecture not in theirs
        no_class |= peer == "circuit_tracer" and sae.cfg.width_out != sae.cfg.d_in
        if FORMATS[format].lacks(sae) is None and not no_class and not case.endswith(("hook_z", "small")):
            folders.append(tmp_path / case.replace("/", "-"))
            sae.save(folders[-1], format=format)
    assert len(folders) >= 8
    peers_can_read(peer, folders, inputs())


def test_a_training_checkpoint_of_saelens_is_refused_by_its_scaler(tmp_path):
    folder = edited(tmp_path, "saelens/standard")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": null}')
    SAE.load(folder)  # it was trained without a scale
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    with pytest.raises(InputError, match=r"activation_scaler.json: a training checkpoint of SAELens, whose input scale is not"):
        SAE.load(folder)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": null, "has_whitening": false}')
    SAE.load(folder)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": null, "has_whitening": true}')
    with pytest.raises(InputError, match=r"activation_scaler.json: a training checkpoint .* input whitening is not folded"):
        SAE.load(folder)
    (folder / "activation_scaler.json").write_text("{torn")
    with pytest.raises(InputError, match=r"activation_scaler.json: not readable JSON"):
        SAE.load(folder)
