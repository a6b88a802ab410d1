"""The subject model: what can be loaded, from where, and one line for what cannot."""

import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from harvests import kill

from activation_store import DataConfig, HarvestConfig, InputError, ModelConfig
from activation_store.harvest import harvest
from activation_store.subject import Subject, load_subject, model_folder, tokenizer_hash

pytest_plugins = ["harvests"]
ROOT = Path(__file__).resolve().parent.parent
GGUF = ROOT / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def one_line(config: ModelConfig) -> str:
    with pytest.raises(InputError) as error:
        load_subject(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("id_", ["/no/such/folder", "no-such-org/no-such-model", "nosuchmodel", "a/b/c"])
def test_a_model_that_is_not_there(id_: str) -> None:
    message = one_line(ModelConfig(id=id_, device="cpu"))
    assert message.startswith("model.id")
    assert repr(id_) in message


def damage(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "config is no json":
        (folder / "config.json").write_text("{")
    elif kind == "unknown architecture":
        (folder / "config.json").write_text('{"model_type": "quux"}')
    elif kind == "no weights":
        weights.unlink()
    elif kind == "weights cut off":
        os.truncate(weights, weights.stat().st_size // 2)
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    "kind",
    ["empty folder", "no config", "config is no json", "unknown architecture", "no weights", "weights cut off", "no tokenizer"],
)
def test_a_model_folder_that_cannot_be_read(tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    damage(folder, kind)
    message = one_line(ModelConfig(id=str(folder), device="cpu"))
    assert message.startswith("model.id")
    assert str(folder) in message


def test_missing_weights_are_not_made_up(tiny_model_dir: Path, tmp_path: Path) -> None:
    """transformers fills a missing tensor with random numbers and a warning; a harvest of those would be worthless."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.down_proj.weight" in one_line(ModelConfig(id=str(folder), device="cpu"))


@pytest.mark.parametrize("device", ["cuda:77", "abacus"])
def test_a_device_that_is_not_there(tiny_model_dir: Path, device: str) -> None:
    message = one_line(ModelConfig(id=str(tiny_model_dir), device=device))
    assert message.startswith("model.device")
    assert device in message


def test_a_gguf_that_is_not_there_or_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOSEM_CACHE", str(tmp_path / "cache"))
    assert "none.gguf" in one_line(ModelConfig(id=str(tmp_path / "none.gguf"), device="cpu"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    assert str(tmp_path / "x.gguf") in one_line(ModelConfig(id=str(tmp_path / "x.gguf"), device="cpu"))
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_a_revision_is_a_hash_of_the_weights(subject: Subject, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = ModelConfig(id=str(folder), dtype="float32", device="cpu")
    assert load_subject(config).revision == subject.revision
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    changed = load_subject(config)
    assert changed.revision != subject.revision
    assert tokenizer_hash(changed.tokenizer) == tokenizer_hash(subject.tokenizer)


def test_the_model_is_raw_frozen_and_in_eval_mode(subject: Subject) -> None:
    assert subject.facts()["basis"] == "raw"
    assert not subject.model.training
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    assert subject.device.type == "cpu"


# GGUF


@pytest.fixture(scope="module")
def demo_subject(demo_model_dir: Path) -> Subject:
    assert demo_model_dir.is_dir()
    return load_subject(ModelConfig(id=str(GGUF), dtype="float32", device="cpu"))


def test_a_gguf_holds_the_weights_that_the_gguf_package_reads(demo_subject: Subject) -> None:
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(GGUF).tensors}
    weights = dict(demo_subject.model.named_parameters())
    same = {  # query and key weights are stored in another order of rows, so they stand in the next test
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.9.ffn_down.weight": "model.layers.9.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
    }
    for theirs, ours in same.items():
        tensor = reader[theirs]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(weights[ours].numpy(), expected.reshape(weights[ours].shape))


def test_a_gguf_speaks(demo_subject: Subject) -> None:
    tokens = demo_subject.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = demo_subject.model(input_ids=tokens).logits[0, -1].argmax()
    assert demo_subject.tokenizer.decode(best) == " Paris"


def test_a_gguf_is_converted_once_and_says_where_it_came_from(
    demo_subject: Subject, demo_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", kill)
    assert Path(model_folder(ModelConfig(id=str(GGUF)))) == demo_model_dir
    assert demo_subject.facts()["model"] == str(GGUF)


def test_a_gguf_is_harvested(demo_subject: Subject, tiny_text: Path, tmp_path: Path) -> None:
    store = harvest(
        demo_subject,
        DataConfig(source=str(tiny_text), context=16, tokens=128, held_out=0.25),
        HarvestConfig(hooks=("blocks.1.hook_resid_post",), dtype="float32", batch_size=4),
        tmp_path / "activations",
    )
    assert (store.rows, store.width("blocks.1.hook_resid_post")) == (128, 576)
    with torch.no_grad():
        out = demo_subject.model.model(input_ids=torch.from_numpy(store.tokens).long(), output_hidden_states=True)
    expected = out.hidden_states[2].reshape(-1, 576)
    torch.testing.assert_close(store.read("blocks.1.hook_resid_post", slice(None)), expected, rtol=1e-4, atol=1e-4)
