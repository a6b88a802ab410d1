"""The split of an attention SAE's latents over source tokens: it adds up to the pre-activation, on models of two designs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from llm_servers import WINDOW

import explain.explain as stage
from activation_store import DataConfig, HarvestConfig, ModelConfig
from activation_store.errors import InputError
from activation_store.files import read_json_lines
from activation_store.harvest import harvest
from activation_store.hooks import capture, locate_hooks
from activation_store.subject import load_subject
from explain.config import ExplainConfig
from explain.sources import source_split
from sae.architectures.standard import StandardSAE
from sae.sae import SAEConfig

Z = "blocks.1.attn.hook_z"


def attention_sae(d: int, apply_b_dec: bool = True) -> StandardSAE:
    sae = StandardSAE(SAEConfig("standard", d, 20, Z, apply_b_dec_to_input=apply_b_dec))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return sae.requires_grad_(False)


def model_of(family: str, tiny_model_dir: Path) -> Any:
    if family == "llama":
        return load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu")).model
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(3)
        return GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=4, n_positions=64)).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # two of four heads share their values in the first
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_the_sources_add_up_to_the_pre_activation(family: str, apply_b_dec: bool, tiny_model_dir: Path) -> None:
    model, sae = model_of(family, tiny_model_dir), attention_sae(32, apply_b_dec)
    tokens = torch.randint(2, 80, (5, 14), generator=torch.Generator().manual_seed(0))
    latents, positions = torch.tensor([0, 3, 3, 19, 7]), torch.tensor([13, 0, 6, 9, 12])
    added, constant = source_split(model, sae, tokens, latents, positions)
    assert added.shape == tokens.shape
    for row, place in enumerate(positions.tolist()):
        assert (added[row, place + 1 :] == 0).all()  # the future adds nothing
    with torch.no_grad():
        z = capture(model, locate_hooks(model, [Z]), tokens)[Z].reshape(5, 14, -1)
        x = z - sae.b_dec if apply_b_dec else z
        wanted = (x @ sae.W_enc + sae.b_enc)[torch.arange(5), positions, latents]
    assert torch.allclose(added.sum(1) + constant, wanted, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"  # as it was


def test_a_source_that_is_not_looked_at_adds_nothing(tiny_model_dir: Path) -> None:
    """A token changed so far back that the pattern is all that could carry it: its part changes by what its value does."""
    model, sae = model_of("llama", tiny_model_dir), attention_sae(32)
    tokens = torch.randint(2, 80, (1, 10), generator=torch.Generator().manual_seed(2))
    first, _ = source_split(model, sae, tokens[:, :1], torch.tensor([4]), torch.tensor([0]))
    whole, constant = source_split(model, sae, tokens, torch.tensor([4]), torch.tensor([0]))
    assert torch.allclose(first[0, 0], whole[0, 0], atol=1e-5)  # the first position sees itself alone
    assert whole[0, 1:].abs().max() == 0
    assert constant.shape == (1,)


def test_other_hooks_are_refused(tiny_model_dir: Path) -> None:
    sae, one = StandardSAE(SAEConfig("standard", 32, 20, "blocks.1.hook_resid_post")), torch.tensor([0])
    with pytest.raises(InputError, match=r"sources are of blocks\.N\.attn\.hook_z"):
        source_split(model_of("llama", tiny_model_dir), sae, torch.ones(1, 3, dtype=torch.long), one, one)


def test_the_stage_writes_the_sources_of_the_strongest(tiny_model_dir: Path, tiny_text: Path, tmp_path: Path) -> None:
    subject = load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu"))
    store = harvest(
        subject, DataConfig(source=str(tiny_text), context=16, tokens=3000, held_out=0.2),
        HarvestConfig(hooks=(Z,), dtype="float32", batch_size=8), tmp_path / "activations",
    )  # fmt: skip
    sae = attention_sae(32)
    config = ExplainConfig(latents=4, window=WINDOW, train_top=3, train_sampled=2, test_top=2, test_sampled=2, test_random=2)
    stage.explain(sae, store, subject.tokenizer, config, tmp_path / "explanations", model=subject.model)
    seen = 0
    for unit in read_json_lines(tmp_path / "explanations" / "units.jsonl"):
        for shown in unit["train"] + unit["test"]:
            assert bool(shown["sources"]) == (shown["kind"] == "top")
            if shown["sources"]:
                back, text, _ = shown["sources"][0]
                row, start = divmod(shown["window"] * WINDOW, 16)
                place = start + max(range(WINDOW), key=lambda i: shown["activations"][i])
                assert text == subject.tokenizer.decode([int(store.tokens[row, place - back])])
                values = [value for _, _, value in shown["sources"]]
                assert values == sorted(values, reverse=True)
                seen += 1
    assert seen >= 8
