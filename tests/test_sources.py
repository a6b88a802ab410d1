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
from sae.architectures import ARCHITECTURES
from sae.architectures.directions import DirectionsSAE
from sae.architectures.identity import IdentitySAE
from sae.architectures.standard import StandardSAE
from sae.sae import SAE, SAEConfig

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


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gated", "topk", "directions", "neurons"])
def test_any_encoder_that_is_linear_has_sources(kind: str, tiny_model_dir: Path) -> None:
    model, cfg = model_of("llama", tiny_model_dir), SAEConfig(kind, 32, 20, Z, k=4)
    generator = torch.Generator().manual_seed(1)
    sae: SAE
    if kind == "neurons":
        sae = IdentitySAE.of(Z, 32, [1, -1] * 16)
    elif kind == "directions":
        sae = DirectionsSAE.random(32, 20, torch.randn(32, generator=generator), hook=Z)
    else:
        sae = ARCHITECTURES[kind](cfg)
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    tokens = torch.randint(2, 80, (2, 14), generator=torch.Generator().manual_seed(0))
    x = capture(model, locate_hooks(model, [Z]), tokens)[Z].reshape(28, -1)
    f = sae.encode(x).view(2, 14, -1)
    rows, positions, latents = torch.nonzero(f != 0)[::7].T  # several latents and places of each sequence
    added, constant = source_split(model, sae, tokens, latents, positions, rows=rows)
    assert len(added) > 5
    torch.testing.assert_close(added.sum(1) + constant, f[rows, positions, latents], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "neox"])
def test_models_of_other_designs_add_up_too(family: str) -> None:
    """Windows on every other layer and softcapped scores; one product of queries, keys and values, head by head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

    small: dict[str, Any] = {
        "vocab_size": 90, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "initializer_range": 0.2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if family == "gemma2":
            model: Any = Gemma2ForCausalLM(Gemma2Config(**small, num_key_value_heads=2, head_dim=8, sliding_window=4)).eval()
        else:
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**small)).eval()
    for layer in (0, 1):
        hook = f"blocks.{layer}.attn.hook_z"
        sae = attention_sae(32)
        sae.with_metadata(hook_name=hook)
        tokens = torch.randint(2, 80, (2, 14), generator=torch.Generator().manual_seed(0))
        latents, positions = torch.tensor([0, 3]), torch.tensor([13, 9])
        added, constant = source_split(model, sae, tokens, latents, positions)
        with torch.no_grad():
            z = capture(model, locate_hooks(model, [hook]), tokens)[hook].reshape(2, 14, -1)
            wanted = ((z - sae.b_dec) @ sae.W_enc + sae.b_enc)[torch.arange(2), positions, latents]
        torch.testing.assert_close(added.sum(1) + constant, wanted, atol=1e-4, rtol=1e-4)


def test_what_is_no_sum_over_values_is_refused_and_leaves_no_trace(tiny_model_dir: Path) -> None:
    model, sae, one = model_of("llama", tiny_model_dir), attention_sae(32), torch.tensor([0])
    attention = model.model.layers[1].self_attn

    def gated(_module: Any, args: Any) -> Any:
        return (args[0] * 0.5, *args[1:])

    handle = attention.o_proj.register_forward_pre_hook(gated)  # runs before ours: what the SAE reads is gated, too
    with pytest.raises(InputError, match="reads something else than attention's sum over values"):
        source_split(model, sae, torch.full((1, 3), 7), one, one)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert not attention._forward_hooks
    assert not attention.o_proj._forward_pre_hooks
    unread = attention.register_forward_hook(lambda _module, _args, out: (out[0], None))
    with pytest.raises(InputError, match="shows no pattern and values"):
        source_split(model, sae, torch.ones(1, 3, dtype=torch.long), one, one)
    unread.remove()


def test_other_hooks_are_refused(tiny_model_dir: Path) -> None:
    model, one = model_of("llama", tiny_model_dir), torch.tensor([0])
    sae = StandardSAE(SAEConfig("standard", 32, 20, "blocks.1.hook_resid_post"))
    with pytest.raises(InputError, match=r"sources are of blocks\.N\.attn\.hook_z"):
        source_split(model, sae, torch.ones(1, 3, dtype=torch.long), one, one)
    sae = StandardSAE(SAEConfig("standard", 32, 20, Z, normalize_activations="layer_norm"))
    with pytest.raises(InputError, match="its divisor depends on all sources"):
        source_split(model, sae, torch.ones(1, 3, dtype=torch.long), one, one)


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
