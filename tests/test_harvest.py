"""Harvest: what stands in the store is what a plain forward pass gives."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harvests import BATCHES, MLP, RESID
from torch import Tensor

import activation_store.harvest as harvest_module
from activation_store import ActivationStore, InputError, ModelConfig
from activation_store.harvest import hook_widths
from activation_store.hooks import locate_hooks
from activation_store.subject import Subject, empty_subject_model, load_subject, tokenizer_hash

pytest_plugins = ["harvests"]


# What stands in it


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path, tiny_store: ActivationStore) -> dict[str, Tensor]:
    """The same activations from a transformers model and forward hooks of our own, 75 sequences at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    mlp = model.model.layers[1].mlp
    given: list[Tensor] = []
    mlp.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    resid, post = [], []
    with torch.no_grad():
        for tokens in torch.from_numpy(tiny_store.tokens).long().split(75):
            out = model(input_ids=tokens, output_hidden_states=True)
            resid.append(out.hidden_states[2].flatten(0, 1))  # [0] is the embedding, [2] what block 1 leaves
            x = given.pop().flatten(0, 1)
            gate = mlp.gate_proj(x)
            post.append(gate * torch.sigmoid(gate) * mlp.up_proj(x))
    return {RESID: torch.cat(resid), MLP: torch.cat(post)}


@pytest.mark.parametrize("hook", [RESID, MLP])
def test_every_row_is_the_activation_of_its_token(
    tiny_store: ActivationStore, plain: dict[str, Tensor], hook: str
) -> None:
    found = tiny_store.read(hook, slice(None))
    assert found.shape == plain[hook].shape == (6000, 32 if hook == RESID else 64)
    torch.testing.assert_close(found, plain[hook], rtol=1e-5, atol=1e-5)
    assert found.std(dim=0).min() > 1e-2  # each coordinate says something


@pytest.mark.parametrize("hook", [RESID, MLP])
def test_statistics_are_those_of_the_rows_that_are_not_special(tiny_store: ActivationStore, hook: str) -> None:
    x = tiny_store.read(hook, slice(None)).numpy().astype(np.float64)
    x = x[~np.isin(tiny_store.tokens.reshape(-1), [0, 1])]
    assert len(x) < 6000
    norm = np.linalg.norm(x, axis=1)
    found = tiny_store.statistics(hook)
    assert found.rows == len(x)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.mean_norm, norm.mean(), rtol=1e-6)
    np.testing.assert_allclose(found.mean_square_norm, (norm**2).mean(), rtol=1e-6)
    np.testing.assert_allclose(found.max_norm, norm.max(), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_hold_the_rounded_values(
    again: Callable[..., ActivationStore], undisturbed: ActivationStore, dtype: str
) -> None:
    store = again(dtype=dtype)
    step = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]  # half a unit in the last place, of values 2 to 4 times it
    for hook in (RESID, MLP):
        found = store.read(hook, slice(None))
        torch.testing.assert_close(found, undisturbed.read(hook, slice(None)), rtol=step, atol=1e-7)
        assert store.dtype(hook) == dtype
        kept = found[~torch.from_numpy(store.special.reshape(-1))].double()
        np.testing.assert_allclose(store.statistics(hook).mean, kept.mean(0), rtol=1e-6, atol=1e-7)


def test_a_bfloat16_model_is_read_as_bfloat16(
    again: Callable[..., ActivationStore], undisturbed: ActivationStore, tiny_model_dir: Path
) -> None:
    low = load_subject(ModelConfig(id=str(tiny_model_dir), device="cpu"))
    assert low.model.dtype == torch.bfloat16
    found = again(subject=low).read(RESID, slice(None))
    expected = undisturbed.read(RESID, slice(None))
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert 1e-4 < error.mean() < 0.02
    assert torch.equal(found.bfloat16().float(), found)


def test_several_hooks_are_aligned(again: Callable[..., ActivationStore]) -> None:
    """Of one row: what block 1 leaves is what block 2 takes, and is what stood in its middle plus what its MLP adds."""
    names = ("blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid", RESID)
    store = again(hooks=names)
    assert set(store.hooks) == set(names)
    after, out, middle, post = (store.read(name, slice(None)) for name in names)
    assert torch.equal(after, post)
    torch.testing.assert_close(middle + out, post, rtol=1e-5, atol=1e-5)
    assert torch.unique(post, dim=0).shape[0] > 1000  # of 1600; the BOS rows are all alike


def test_hooks_keep_the_order_of_the_config(tiny_store: ActivationStore) -> None:
    assert tiny_store.hooks == [RESID, MLP]


def test_the_store_says_what_it_is_made_of(tiny_store: ActivationStore, subject: Subject, tiny_text: Path) -> None:
    attrs = tiny_store.attrs
    assert tiny_store.shards == 8
    assert tiny_store.shard_sequences(7) == slice(336, 375)
    assert (tiny_store.train_sequences, tiny_store.context, tiny_store.rows) == (300, 16, 6000)
    assert attrs["model"] == subject.config.id
    assert (attrs["model_dtype"], attrs["basis"], attrs["seed"]) == ("float32", "raw", 0)
    assert attrs["special_token_ids"] == [0, 1]
    assert attrs["tokenizer_hash"] == tokenizer_hash(subject.tokenizer)
    assert attrs["data"]["source"] == str(tiny_text)
    assert (tiny_store.tokens[:, 0] == subject.tokenizer.bos_token_id).all()


def test_the_tokens_are_the_text(tiny_store: ActivationStore, subject: Subject, tiny_text: Path) -> None:
    texts = [json.loads(line)["text"] for line in tiny_text.read_text().splitlines()]
    for rows in (tiny_store.tokens[:300], tiny_store.tokens[300:]):
        pieces = subject.tokenizer.decode(rows[:, 1:].reshape(-1).tolist()).split("</s>")
        assert len(pieces) > 20
        assert set(pieces[:-1]) <= set(texts)


def test_progress_counts_tokens_to_the_end(again: Callable[..., ActivationStore]) -> None:
    seen: list[tuple[int, int]] = []
    again(progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 1600)
    assert seen == sorted(seen)
    assert seen[-1] == (1600, 1600)
    assert len(seen) > BATCHES


# Before anything runs


def test_a_misspelled_hook_is_refused_before_text_or_model_are_touched(
    again: Callable[..., ActivationStore], subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(subject.model, "forward", fail)
    monkeypatch.setattr(harvest_module, "token_rows", fail)
    with pytest.raises(InputError, match=r"blocks\.1\.hook_resid_pots.*nearest.*blocks\.1\.hook_resid_post"):
        again(hooks=(MLP, "blocks.1.hook_resid_pots"))
    assert os.listdir(tmp_path) == []


def test_text_that_cannot_be_read_is_refused_before_the_model_runs(
    again: Callable[..., ActivationStore], captures: list[int], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"data\.source"):
        again(source=str(tmp_path / "none.jsonl"))
    assert sum(captures) <= 2  # a few tokens tell the hooks' widths
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("hook", ["rotary_emb.hook_out", "hook_pos_embed"])
def test_a_hook_without_a_row_a_token_is_refused(again: Callable[..., ActivationStore], hook: str, tmp_path: Path) -> None:
    """The rotary table is one for all sequences, so row i of it is not token i of the text."""
    with pytest.raises(InputError, match=hook):
        again(hooks=(hook, RESID))
    assert os.listdir(tmp_path) == []


def test_widths_come_from_a_model_without_weights(tiny_model_dir: Path) -> None:
    model = empty_subject_model(ModelConfig(id=str(tiny_model_dir)))
    names = ("blocks.0.hook_resid_post", "blocks.2.mlp.hook_post", "blocks.1.attn.hook_z", "blocks.1.attn.hook_k")
    widths = hook_widths(model, locate_hooks(model, names), "meta")
    assert widths == dict(zip(names, (32, 64, 32, 16), strict=True))


# What cannot be stored


def test_values_beyond_float16_are_bad_input_with_a_mend(
    again: Callable[..., ActivationStore], tiny_model_dir: Path
) -> None:
    """Residual streams do exceed 65504 in large models; infinities in a store are no activations."""
    large = load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu"))
    with torch.no_grad():
        large.model.model.embed_tokens.weight.mul_(1e6)
    with pytest.raises(InputError, match=r"harvest\.dtype: float16 does not hold .*up to .*e\+05; try bfloat16 or float32"):
        again(subject=large, dtype="float16")


def test_values_that_are_not_numbers_are_bad_input(
    again: Callable[..., ActivationStore], tiny_model_dir: Path, tmp_path: Path
) -> None:
    broken = load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu"))
    with torch.no_grad():
        broken.model.model.layers[0].mlp.down_proj.weight[3, 3] = float("nan")
    for dtype in ("float16", "bfloat16", "float32", "int8"):  # none of which is the reason
        with pytest.raises(InputError, match=r"model\.id: .* itself gives nan at .*, in float32; look whether its weights"):
            again(tmp_path / dtype, subject=broken, dtype=dtype)


def test_a_model_that_overflows_in_its_own_dtype_is_told_to_be_wider(
    again: Callable[..., ActivationStore], tiny_model_dir: Path
) -> None:
    """float16's infinities look the same in a store, whichever of the two made them."""
    narrow = load_subject(ModelConfig(id=str(tiny_model_dir), dtype="bfloat16", device="cpu"))
    with torch.no_grad():
        narrow.model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(InputError, match=r"itself gives -?(inf|nan) at .*, in bfloat16; try model\.dtype=float32"):
        again(subject=narrow, dtype="float16")
