"""Hook names mean what TransformerBridge means by them, and capturing them leaves the model as it was."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from activation_store import InputError, ModelConfig
from activation_store.hooks import HookSite, _stub_tokenizer, capture, locate_hooks, on_pass, tensor_of
from activation_store.subject import Subject, empty_subject_model, load_subject

NAMED_IN_EVERY_BLOCK = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_in", "hook_out", "hook_attn_out", "hook_mlp_out",
    "mlp.hook_pre", "mlp.hook_post", "mlp.hook_in", "mlp.hook_out", "attn.hook_q", "attn.hook_k", "attn.hook_v",
    "attn.hook_z", "attn.hook_out", "ln1.hook_in", "ln2.hook_in",
)  # fmt: skip


def config_of(folder: Path) -> ModelConfig:
    return ModelConfig(id=str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def subject(tiny_model_dir: Path) -> Subject:
    return load_subject(config_of(tiny_model_dir))


@pytest.fixture(scope="module")
def places(subject: Subject) -> dict[str, HookSite]:
    """The residual stream before and after each block, located once."""
    return locate_hooks(subject.model, [f"blocks.{layer}.hook_resid_{side}" for layer in range(3) for side in ("pre", "post")])


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bridge_values(tiny_model_dir: Path, tokens: Tensor) -> dict[str, Tensor]:
    """All that TransformerBridge itself caches on the tiny model."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(tiny_model_dir), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    return {name: cache[name] for name in cache}


def all_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# The same values as TransformerBridge


def test_every_block_hook_has_the_values_of_the_bridge(
    subject: Subject, tokens: Tensor, bridge_values: dict[str, Tensor]
) -> None:
    names = ["hook_embed", "ln_final.hook_in", "unembed.hook_out"]
    names += [f"blocks.{layer}.{name}" for layer in range(3) for name in NAMED_IN_EVERY_BLOCK]
    sites = locate_hooks(subject.model, names)
    assert list(sites) == names
    found = capture(subject.model, sites, tokens)  # all in one pass
    assert set(found) == set(names)
    for name in names:
        expected = bridge_values[name]
        assert found[name].shape[:2] == (3, 12)
        assert expected.abs().max() > 1e-2
        got = found[name].reshape(expected.shape)  # attention hooks: (sequence, context, heads x d_head)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5, msg=lambda message, name=name: f"{name}: {message}")


def test_gpt2_whose_modules_have_other_names_has_the_values_of_the_bridge(tokens: Tensor) -> None:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1, initializer_range=0.2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    names = [f"blocks.{layer}.{name}" for layer in range(2) for name in (
        "attn.hook_z", "attn.hook_out", "hook_attn_out", "mlp.hook_post", "hook_mlp_out", "hook_resid_pre", "hook_resid_post"
    )]  # fmt: skip
    sites = locate_hooks(model, names)
    assert sites["blocks.1.attn.hook_z"] == HookSite("transformer.h.1.attn.c_proj", "in")
    found = capture(model, sites, tokens)
    z = found["blocks.1.attn.hook_z"]
    torch.testing.assert_close(model.transformer.h[1].attn.c_proj(z), found["blocks.1.hook_attn_out"])
    with pytest.raises(InputError, match=r"'blocks.0.attn.hook_q' is not the input or output of a module"):
        locate_hooks(model, ["blocks.0.attn.hook_q"])  # q, k and v come out of one product
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=_stub_tokenizer(), device="cpu")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    for name in names:
        expected = cache[name]
        torch.testing.assert_close(found[name].reshape(expected.shape), expected, rtol=0, atol=1e-5)


def test_a_hook_that_would_mean_a_whole_layer_is_refused() -> None:
    """OPT's layers hold fc1 and fc2 themselves: there is no MLP to hook, and the bridge that stands for it is round the layer."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    model = OPTForCausalLM(config)
    with pytest.raises(InputError, match=r"'blocks.1.mlp.hook_in' is not the input or output of a module"):
        locate_hooks(model, ["blocks.1.mlp.hook_in"])
    sites = locate_hooks(model, ["blocks.1.hook_in", "blocks.1.hook_out", "blocks.1.mlp.hook_post"])
    layer = "model.decoder.layers.1"
    assert list(sites.values()) == [HookSite(layer, "in"), HookSite(layer, "out"), HookSite(f"{layer}.fc2", "in")]


def test_names_that_mean_one_place_and_names_that_do_not(subject: Subject, tokens: Tensor) -> None:
    names = [f"blocks.{layer}.hook_{name}" for layer in (1, 2) for name in ("resid_pre", "resid_mid", "resid_post", "out")]
    found = capture(subject.model, locate_hooks(subject.model, names), tokens)
    assert torch.equal(found["blocks.1.hook_resid_post"], found["blocks.1.hook_out"])
    assert torch.equal(found["blocks.1.hook_resid_post"], found["blocks.2.hook_resid_pre"])
    different = ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post", "blocks.2.hook_resid_mid"]
    for one in different:
        for other in different:
            assert torch.allclose(found[one], found[other], atol=1e-3) == (one == other)


def test_the_demo_model_has_the_values_of_the_bridge(demo_model_dir: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    hook = "blocks.9.hook_resid_post"
    subject = load_subject(config_of(demo_model_dir))
    text = "The quick brown fox jumps over the lazy dog. def main(): return 1"
    tokens = subject.tokenizer(text, return_tensors="pt")["input_ids"]
    found = capture(subject.model, locate_hooks(subject.model, [hook]), tokens)[hook].clone()
    del subject
    gc.collect()
    bridge = TransformerBridge.boot_transformers(str(demo_model_dir), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, names_filter=[hook], stop_at_layer=10)
    expected = cache[hook]
    assert found.shape == expected.shape == (1, tokens.shape[1], 576)
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 1e-3


# The forward pass stops, and starts from the untouched model


def count_passes(model: Any) -> tuple[dict[str, int], list[Any]]:
    passes: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        passes[name] = 0

        def note(_module: nn.Module, _args: Any, name: str = name) -> None:
            passes[name] += 1

        handles.append(module.register_forward_pre_hook(note))
    return passes, handles


@pytest.mark.parametrize(
    ("names", "run", "not_run"),
    [
        (["blocks.1.hook_resid_post"], ["model.layers.1.mlp.down_proj"], ["model.layers.2", "model.norm", "lm_head"]),
        (["blocks.1.attn.hook_z"], ["model.layers.1.self_attn"], ["model.layers.1.mlp", "model.layers.2"]),
        (["blocks.0.hook_resid_pre"], ["model.embed_tokens"], ["model.layers.0.input_layernorm", "model.layers.1"]),
        (
            ["blocks.2.hook_resid_pre", "blocks.0.mlp.hook_post"],
            ["model.layers.1.mlp.down_proj"],
            ["model.layers.2.self_attn", "lm_head"],
        ),
    ],
    ids=lambda value: value[0] if len(value) < 3 else "",
)
def test_nothing_above_the_last_hook_runs(
    subject: Subject, tokens: Tensor, names: list[str], run: list[str], not_run: list[str]
) -> None:
    sites = locate_hooks(subject.model, names)
    passes, handles = count_passes(subject.model)
    try:
        capture(subject.model, sites, tokens)
    finally:
        for handle in handles:
            handle.remove()
    assert {name: passes[name] for name in run} == dict.fromkeys(run, 1)
    assert {name: passes[name] for name in not_run} == dict.fromkeys(not_run, 0)


def test_capture_and_locate_leave_the_model_as_it_was(subject: Subject, tokens: Tensor) -> None:
    model = subject.model
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
    for _ in range(2):
        capture(model, locate_hooks(model, ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z"]), tokens)
    assert all_hooks(model) == 0
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == modules
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, before)


def test_locating_does_not_turn_the_model_from_sdpa_to_eager_attention(tiny_model_dir: Path) -> None:
    """A bridge sets eager attention in the config that it is given; the model's own must not hear of it."""
    subject = load_subject(config_of(tiny_model_dir))
    before = subject.model.config.to_dict()
    assert subject.model.config._attn_implementation == "sdpa"
    locate_hooks(subject.model, ["blocks.1.hook_resid_post"])
    assert subject.model.config._attn_implementation == "sdpa"
    assert subject.model.config.to_dict() == before


def test_captured_rows_are_causal_and_each_sequence_stands_alone(
    subject: Subject, tokens: Tensor, places: dict[str, HookSite]
) -> None:
    hook = "blocks.2.hook_resid_post"
    sites = {hook: places[hook]}
    whole = capture(subject.model, sites, tokens)[hook]
    torch.testing.assert_close(capture(subject.model, sites, tokens[1:2, :5])[hook], whole[1:2, :5], rtol=1e-5, atol=1e-5)


def test_a_model_without_weights_tells_the_same_names_and_shapes(
    subject: Subject, tokens: Tensor, tiny_model_dir: Path
) -> None:
    empty = empty_subject_model(config_of(tiny_model_dir))
    assert all(parameter.is_meta for parameter in empty.parameters())
    names = ["blocks.1.hook_resid_post", "blocks.0.mlp.hook_post", "blocks.2.attn.hook_z"]
    sites = locate_hooks(empty, names)
    assert sites == locate_hooks(subject.model, names)
    shapes = {name: x.shape for name, x in capture(empty, sites, tokens.to("meta")).items()}
    assert shapes == {name: x.shape for name, x in capture(subject.model, sites, tokens).items()}
    assert [shapes[name][-1] for name in names] == [32, 64, 32]


# Names that cannot be had


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"),
        ("block.1.hook_resid_post", "blocks.1.hook_resid_post"),
        ("blocks.1.mlp.hook_psot", "blocks.1.mlp.hook_post"),
        ("blocks.7.hook_resid_post", "blocks.2.hook_resid_post"),
    ],
)
def test_a_misspelled_name_lists_the_nearest(subject: Subject, name: str, nearest: str) -> None:
    with pytest.raises(InputError) as error:
        locate_hooks(subject.model, ["blocks.1.hook_resid_post", name])
    said = str(error.value).replace(repr(name), "")
    assert repr(name) in str(error.value)
    assert nearest in said
    assert "\n" not in said


@pytest.mark.parametrize("name", ["", "zzz", "model.layers.1", "blocks.1"])
def test_a_name_that_is_no_hook(subject: Subject, name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        locate_hooks(subject.model, [name])


@pytest.mark.parametrize("name", ["attn.hook_pattern", "attn.hook_attn_scores", "ln1.hook_scale"])
def test_what_is_inside_a_module_is_refused(subject: Subject, name: str) -> None:
    with pytest.raises(InputError, match="cannot be captured") as error:
        locate_hooks(subject.model, [f"blocks.1.{name}"])
    assert f"'blocks.1.{name}'" in str(error.value)


def test_a_site_that_is_never_passed_is_an_error_not_an_empty_answer(subject: Subject, tokens: Tensor) -> None:
    unused = nn.Module()
    unused.add_module("model", subject.model)
    unused.add_module("spare", nn.Linear(2, 2))
    unused.forward = subject.model.forward  # type: ignore[method-assign]
    sites = {"passed": HookSite("model.model.layers.0", "out"), "spare": HookSite("spare", "out")}
    with pytest.raises(RuntimeError, match="never passed: spare"):
        capture(unused, sites, tokens)
    assert all_hooks(subject.model) == 0


# Other people's hooks


@pytest.fixture
def own_hooks(subject: Subject) -> Iterator[list[str]]:
    """A user's forward hook and pre-hook on the module that is captured, and a list of when they fired."""
    fired: list[str] = []
    layer = subject.model.model.layers[1]
    handles = [
        layer.register_forward_pre_hook(lambda *_: fired.append("before")),
        layer.register_forward_hook(lambda *_: fired.append("after")),
    ]
    yield fired
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("hook", "expected"), [("resid_post", ["before", "after"]), ("resid_pre", ["before"])])
def test_the_hooks_of_others_fire_and_survive(
    subject: Subject, tokens: Tensor, places: dict[str, HookSite], own_hooks: list[str], hook: str, expected: list[str]
) -> None:
    before = all_hooks(subject.model)
    capture(subject.model, {hook: places[f"blocks.1.hook_{hook}"]}, tokens)
    assert own_hooks == expected
    assert all_hooks(subject.model) == before == 2
    own_hooks.clear()
    subject.model(input_ids=tokens)
    assert own_hooks == ["before", "after"]


def test_what_the_hooks_of_others_change_is_what_is_captured(
    subject: Subject, tokens: Tensor, places: dict[str, HookSite]
) -> None:
    sites = {"x": places["blocks.1.hook_resid_post"]}
    plain = capture(subject.model, sites, tokens)["x"]
    handle = subject.model.model.layers[1].register_forward_hook(lambda _m, _a, out: tensor_of(out) + 1.0)
    try:
        torch.testing.assert_close(capture(subject.model, sites, tokens)["x"], plain + 1.0)
    finally:
        handle.remove()


@pytest.mark.parametrize("side", ["in", "out"])
def test_our_hooks_are_removed_after_an_exception(subject: Subject, tokens: Tensor, side: Any) -> None:
    layer = subject.model.model.layers[1]

    def fail(_x: Tensor) -> None:
        raise ZeroDivisionError

    def use() -> None:
        with on_pass(layer, side, fail):
            subject.model(input_ids=tokens)

    with pytest.raises(ZeroDivisionError):
        use()
    assert all_hooks(subject.model) == 0
    subject.model(input_ids=tokens)


def test_capture_is_clean_after_a_fault_inside_the_model(subject: Subject, places: dict[str, HookSite]) -> None:
    with pytest.raises(IndexError):
        capture(subject.model, places, torch.tensor([[10_000]]))  # no such token
    assert all_hooks(subject.model) == 0


# on_pass


class Takes(nn.Module):
    """A module that takes and gives what transformers' modules do: a tensor or a tuple, by position or by name."""

    def __init__(self, gives_tuple: bool) -> None:
        super().__init__()
        self.gives_tuple = gives_tuple

    def forward(self, hidden_states: Tensor, extra: str = "extra") -> Any:
        return (hidden_states * 2, extra) if self.gives_tuple else hidden_states * 2


@pytest.mark.parametrize("gives_tuple", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(("side", "seen", "result"), [("in", 3.0, 26.0), ("out", 6.0, 16.0)])
def test_on_pass_sees_and_replaces_either_side(
    gives_tuple: bool, by_name: bool, side: Any, seen: float, result: float
) -> None:
    """x = 3 through x -> 2x; the replacement adds 10: before, 2(3 + 10) = 26; after, 2*3 + 10 = 16."""
    module = Takes(gives_tuple)
    x = torch.tensor(3.0)

    def run() -> Any:
        return module(hidden_states=x, extra="kept") if by_name else module(x, extra="kept")

    given: list[float] = []

    def look(x: Tensor) -> None:
        given.append(float(x))

    with on_pass(module, side, look):
        looked = run()
    with on_pass(module, side, lambda x: x + 10.0):
        changed = run()
    after = run()
    assert given == [seen]
    for output, expected in ((looked, 6.0), (changed, result), (after, 6.0)):
        assert float(tensor_of(output)) == expected
        assert isinstance(output, tuple) == gives_tuple
        if gives_tuple:
            assert output[1] == "kept"
