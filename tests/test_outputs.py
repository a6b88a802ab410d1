"""What units do to the output: promoted tokens, against the model's own logits."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from activation_store import ModelConfig
from activation_store.errors import InputError
from activation_store.hooks import locate_hooks, on_pass
from activation_store.subject import Subject, load_subject
from explain.examples import Unit
from explain.outputs import promoted_tokens, with_outputs
from sae import TrainConfig, train
from sae.architectures.identity import IdentitySAE
from sae.architectures.standard import StandardSAE
from sae.readout import output_logits, residual_directions
from sae.sae import SAEConfig

RESID, MLP, Z = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post", "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def subject(tiny_model_dir: Path) -> Subject:
    return load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(3)
        return GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=4, n_positions=64)).eval()


def sae_at(hook: str, d: int, seed: int = 0) -> StandardSAE:
    sae = StandardSAE(SAEConfig("standard", d, 12, hook))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("hook", [RESID, MLP, Z])
@torch.no_grad()
def test_directions_add_to_the_residual_stream_what_the_model_adds(
    family: str, hook: str, subject: Subject, gpt2: Any
) -> None:
    """Moved along a direction at its hook, the block's output moves by that: measured on the model itself."""
    model = subject.model if family == "llama" else gpt2
    width = {RESID: 32, MLP: 64 if family == "llama" else 128, Z: 32}[hook]
    sae = sae_at(hook, width)
    found = residual_directions(sae, model, [2, 5])
    tokens = torch.arange(2, 12)[None]
    sites = locate_hooks(model, [hook, "blocks.1.hook_resid_mid", RESID])
    after = "blocks.1.hook_resid_mid" if hook == Z else RESID  # before the MLP answers to what attention wrote

    def stream(delta: Tensor | None) -> Tensor:
        kept: list[Tensor] = []
        site, there = sites[hook], sites[after]
        with (
            on_pass(model.get_submodule(site.path), site.side, lambda x: x if delta is None else x + delta),
            on_pass(model.get_submodule(there.path), there.side, lambda x: kept.append(x.clone())),
        ):
            model(tokens)
        return kept[0]

    if hook == RESID:
        assert torch.allclose(found, sae.W_dec[[2, 5]])
        return
    for row, latent in zip(found, (2, 5), strict=True):
        moved = stream(sae.W_dec[latent]) - stream(None)
        assert torch.allclose(moved[0], row.expand_as(moved[0]), atol=1e-4)


def unit_norm(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """gamma of a norm as its model's paper has it, and the scale of x, (..., 1)."""
    layer = isinstance(module, torch.nn.LayerNorm)
    x = x - x.mean(-1, keepdim=True) if layer else x
    scale = x.square().mean(-1, keepdim=True).sqrt()
    return (1 + module.weight if "Gemma" in type(module).__name__ else module.weight), scale


def linear(module: Any, args: Any, _out: Any, *, x: Tensor, out: Tensor, gain: Tensor) -> Tensor:
    """A norm whose scale is that of x, whatever it is given."""
    moved = args[0] - x
    if isinstance(module, torch.nn.LayerNorm):
        moved = moved - moved.mean(-1, keepdim=True)
    return out + gain * moved


@contextmanager
def frozen(model: Any, norms: list[str], branches: list[str], tokens: Tensor) -> Iterator[dict[str, Tensor]]:
    """Hold norms' scales, and what whole branches give, as they are without edits; yield the scales."""
    before: dict[str, tuple[Tensor, Any]] = {}
    scales: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in norms + branches:
            def keep(_module: Any, args: Any, out: Any, path: str = path) -> None:
                before[path] = (args[0] if args else None, out)  # type: ignore[assignment]

            stack.callback(model.get_submodule(path).register_forward_hook(keep).remove)
        model(tokens)
    with ExitStack() as stack:
        for path in norms:
            module, (x, out) = model.get_submodule(path), before[path]
            gamma, scales[path] = unit_norm(module, x)

            stack.callback(module.register_forward_hook(partial(linear, x=x, out=out, gain=gamma / scales[path])).remove)
        for path in branches:
            out = before[path][1]
            stack.callback(model.get_submodule(path).register_forward_hook(lambda *_, out=out: out).remove)
        yield scales


def random_model(family: str) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small: dict[str, Any] = {
        "vocab_size": 90, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "tie_word_embeddings": False,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        if family == "gpt2":
            config = GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
            model: Any = GPT2LMHeadModel(config)
        elif family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**small))
        else:
            model = Gemma2ForCausalLM(Gemma2Config(**small, final_logit_softcapping=None))
        for weight in model.parameters():
            if weight.dim() == 1:  # gains and biases start at 1 or 0, which would hide that they are left out
                with torch.no_grad():
                    weight.add_(0.5 * torch.randn(weight.shape))
    return model.double().eval().requires_grad_(False)


NAMES = {  # final norm, attention, MLP, norms behind these
    "llama": ("model.norm", "model.layers.1.self_attn", "model.layers.1.mlp", None, None),
    "gpt2": ("transformer.ln_f", "transformer.h.1.attn", "transformer.h.1.mlp", None, None),
    "gemma2": ("model.norm", "model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.1.post_attention_layernorm",
               "model.layers.1.post_feedforward_layernorm"),
}  # fmt: skip


@pytest.mark.parametrize("family", list(NAMES))
@pytest.mark.parametrize(
    "place", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_out", "hook_attn_out", "attn.hook_out", "attn.hook_z",
              "hook_mlp_out", "mlp.hook_out", "mlp.hook_post"],
)  # fmt: skip
@torch.no_grad()
def test_readout_is_what_the_models_logits_do_along_the_direct_path(family: str, place: str, monkeypatch: Any) -> None:
    """The model itself, in its last layer, with the scales of its norms and all that answers to the edit held."""
    monkeypatch.setattr("sae.readout._VOCABULARY_AT_ONCE", 40)
    model, hook = random_model(family), f"blocks.1.{place}"
    final, attention, mlp, after_attention, after_mlp = NAMES[family]
    width = {"mlp.hook_post": 128 if family == "gpt2" else 64}.get(place, 32)
    sae, latents = sae_at(hook, width), [2, 5]
    tokens = torch.arange(2, 12)[None]
    norms = [final] + [norm for norm in (after_attention, after_mlp) if norm]
    held = {"mlp": [], "attn": [mlp], "hook": [mlp]}[place.split(".")[0].split("_")[0]]
    held = {"hook_resid_pre": [attention, mlp], "hook_mlp_out": [], "hook_resid_post": [], "hook_out": []}.get(place, held)
    # resid_mid is hooked where the MLP's branch leaves the stream, and an edit there changes that branch alone
    moved = "blocks.1.hook_attn_out" if place == "hook_resid_mid" else hook
    site = locate_hooks(model, [moved])[moved]
    readout = output_logits(sae, model, latents)
    with frozen(model, norms, held, tokens) as scales:
        base = model(tokens).logits
        for row, latent in zip(readout, latents, strict=True):
            with on_pass(model.get_submodule(site.path), site.side, lambda x: x + sae.W_dec[latent].double()):  # noqa: B023
                change = model(tokens).logits - base
            change = change * scales[final]
            inner = after_mlp if place.startswith("mlp.") else after_attention if place.startswith("attn.") else None
            if inner is not None:
                change = change * scales[inner]
            change = (change - change.mean(-1, keepdim=True))[0]
            assert change.abs().max() > 0.05
            torch.testing.assert_close(change.float(), row.expand_as(change), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_neurons_promote_what_they_write() -> None:
    model = random_model("llama").float()
    neurons = IdentitySAE.of("blocks.0.mlp.hook_post", 64, [1, -1] * 32)
    written = model.model.layers[0].mlp.down_proj.weight[:, [6, 7]].T * torch.tensor([[1.0], [-1.0]])
    torch.testing.assert_close(residual_directions(neurons, model, [6, 7]), written)


@torch.no_grad()
def test_several_hooks_add_up_where_they_are_additions_and_the_last_counts_where_they_are_states(subject: Subject) -> None:
    d = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))

    def crosscoder(*hooks: str) -> StandardSAE:
        sae = StandardSAE(SAEConfig("standard", 64, 8, hook_names=hooks, widths=(32, 32)))
        sae.W_dec.copy_(d)
        return sae.requires_grad_(False)

    additions = crosscoder("blocks.0.hook_mlp_out", "blocks.2.hook_attn_out")
    torch.testing.assert_close(residual_directions(additions, subject.model, [3, 1]), (d[:, :32] + d[:, 32:])[[3, 1]])
    states = crosscoder("blocks.2.hook_resid_pre", "blocks.0.hook_out")
    torch.testing.assert_close(residual_directions(states, subject.model, [3, 1]), d[[3, 1], :32])
    with pytest.raises(InputError, match="states of the residual stream and additions to it at once"):
        residual_directions(crosscoder("blocks.0.hook_out", "blocks.1.hook_mlp_out"), subject.model, [0])


@torch.no_grad()
def test_a_cross_layer_transcoders_direction_is_what_its_latent_adds() -> None:
    batches = [tuple(torch.randn(32, 6) for _ in range(4)) for _ in range(2)]
    hooks, hooks_out = ("a", "b"), ("c", "d")
    with torch.enable_grad():
        sae = train(batches, TrainConfig(d_sae=8, steps=2, hook=hooks, hook_out=hooks_out, batch_size=32))
    one_hot = torch.eye(sae.cfg.d_sae)
    expected = sae.decode(one_hot) - sae.decode(torch.zeros(1, sae.cfg.d_sae))
    torch.testing.assert_close(sae.directions(torch.arange(sae.cfg.d_sae)), expected, atol=1e-6, rtol=1e-5)


def test_hooks_with_no_straight_way_to_the_logits_are_refused(subject: Subject) -> None:
    with pytest.raises(InputError, match=r"hook_name: blocks\.1\.attn\.hook_q is not on the residual stream"):
        residual_directions(sae_at("blocks.1.attn.hook_q", 32), subject.model, [0])
    unit = Unit("sae", "blocks.1.attn.hook_q", 0, 0.1, 1.0, [], [])
    sae = sae_at("blocks.1.attn.hook_q", 32)
    assert with_outputs([unit], sae, subject.model, subject.tokenizer) == [unit]
    (found,) = promoted_tokens(subject.model, subject.tokenizer, sae, [0])
    assert (found.promoted, found.suppressed) == ([], [])
    assert "not on the residual stream" in str(found.reason)
    with pytest.raises(InputError, match=r"d_in: 31 at blocks.1.hook_out, but the model's residual stream is 32 wide"):
        residual_directions(sae_at("blocks.1.hook_out", 31), subject.model, [0])
    with pytest.raises(InputError, match=r"latents \[12\] are outside this SAE's 0..11"):
        promoted_tokens(subject.model, subject.tokenizer, sae_at(RESID, 32), [3, 12])


def test_units_carry_the_ends_of_the_ranking(subject: Subject) -> None:
    sae = sae_at(RESID, 32)
    units = [Unit("sae", RESID, latent, 0.1, 1.0, [], []) for latent in (4, 7)]
    found = with_outputs(units, sae, subject.model, subject.tokenizer, 3)
    logits = output_logits(sae, subject.model, [4, 7])
    for unit, row in zip(found, logits, strict=True):
        order = row.argsort(descending=True).tolist()
        assert unit.promoted == [(subject.tokenizer.decode([i]), pytest.approx(float(row[i]), rel=1e-4)) for i in order[:3]]
        ends = order[::-1][:3]
        assert unit.suppressed == [(subject.tokenizer.decode([i]), pytest.approx(float(row[i]), rel=1e-4)) for i in ends]




def test_padding_of_the_unembedding_is_no_token_and_parts_of_the_latents_give_what_all_give(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, latents = sae_at(RESID, 32), list(range(12))
    whole = promoted_tokens(subject.model, subject.tokenizer, sae, latents, 5)
    monkeypatch.setattr("explain.outputs._LOGITS_AT_ONCE", 5 * 300)
    assert promoted_tokens(subject.model, subject.tokenizer, sae, latents, 5) == whole

    class Shorter:
        def __len__(self) -> int:
            return 50

        def decode(self, ids: list[int]) -> str:
            assert ids[0] < 50
            return str(ids[0])

    short = promoted_tokens(subject.model, Shorter(), sae, latents, 60)
    assert all(len(one.promoted) == len(one.suppressed) == 50 and one.reason is None for one in short)
    assert promoted_tokens(subject.model, subject.tokenizer, sae, []) == []
