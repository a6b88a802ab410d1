"""Steering identities, on a tiny model, on TransformerBridge and on the real demo model."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from activation_store.errors import InputError
from activation_store.hooks import capture, locate_hooks
from sae import LatentStatistics, TrainConfig, train
from sae.architectures.standard import StandardSAE
from sae.intervene import Ablate, Add, Clamp, Scale, intervene, steerable
from sae.sae import SAEConfig
from sae.steer import steer

HOOK = "blocks.1.hook_resid_post"


def sae_for(d_in: int, hook: str, d_sae: int = 64, gain: float = 1.0) -> StandardSAE:
    g = torch.Generator().manual_seed(3)
    sae = StandardSAE(SAEConfig("standard", d_in, d_sae, hook)).requires_grad_(False)
    sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=1))
    sae.W_enc.copy_(sae.W_dec.T * gain)
    sae.b_enc.zero_()
    sae.b_dec.copy_(0.1 * torch.randn(d_in, generator=g))
    sae.latents = LatentStatistics(torch.full((d_sae,), 2.0), torch.full((d_sae,), 0.1), torch.zeros(d_sae, 60), 100)
    return sae


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(tiny_model_dir), sae_for(32, HOOK)


@pytest.fixture(scope="module")
def real(demo_model_dir):
    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32).eval().requires_grad_(False)
    hook = "blocks.9.hook_resid_post"
    return model, AutoTokenizer.from_pretrained(demo_model_dir), sae_for(576, hook)


@pytest.fixture(params=["tiny", "real"])
def steered(request):
    """(model, tokenizer, sae), on a random model and on the demo model."""
    return request.getfixturevalue(request.param)


def some_ids(model, rows=2, length=9):
    return torch.randint(5, 200, (rows, length), generator=torch.Generator().manual_seed(1))


def at_hook(model, sae, ids):
    """Read what the layers above see: registered last, this runs after any steering hook of the same place."""
    site = locate_hooks(model, [sae.cfg.hook_name])
    return capture(model, site, ids)[sae.cfg.hook_name]


@torch.no_grad()
def test_clamping_to_its_own_value_changes_nothing_bit_for_bit(steered):
    model, _, sae = steered
    ids = some_ids(model, rows=1, length=1)  # one position, so that one number is the latent's value everywhere
    x = at_hook(model, sae, ids)
    latent = int(sae.encode(x)[0, 0].argmax())
    base = model(ids).logits
    own = float(sae.encode(x)[0, 0, latent])
    for edits in ([Clamp(latent, value=own)], [Scale(latent, 1.0)], [Add(latent, 0.0)]):
        with intervene(model, sae, edits) as state:
            out = model(ids).logits
        assert torch.equal(out, base), edits
        assert state.passes == 1
    with intervene(model, sae, [Clamp(latent, value=own + 1)]):  # the same test can fail
        assert not torch.equal(model(ids).logits, base)


@torch.no_grad()
def test_the_delta_form_is_encode_edit_decode_with_the_error_kept(tiny):
    model, _, sae = tiny
    ids = some_ids(model)
    x = at_hook(model, sae, ids)
    f = sae.encode(x)
    error = x - sae.decode(f)
    edited = f.clone()
    edited[..., 3] = 7.0
    edited[..., 5] = 0.0
    edited[..., 6] *= 2.5
    expected = sae.decode(edited) + error + 1.5 * sae.W_dec[9]
    edits = [Clamp(3, value=7.0), Ablate(5), Scale(6, 2.5), Add(9, 1.5)]
    for order in (edits, edits[::-1]):
        with intervene(model, sae, order):
            got = at_hook(model, sae, ids)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_times_max_is_the_formula_of_the_corpus_maximum(tiny):
    model, _, sae = tiny
    ids = some_ids(model)
    x = at_hook(model, sae, ids)
    with intervene(model, sae, [Clamp(4, times_max=5.0)]):
        got = at_hook(model, sae, ids)
    expected = x + (5.0 * 2.0 - sae.encode(x)[..., 4])[..., None] * sae.W_dec[4]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generation_with_a_kv_cache_equals_full_recomputation(steered):
    model, _, sae = steered
    ids = some_ids(model)
    edits = [Clamp(4, times_max=3.0), Scale(7, 2.0)]
    with intervene(model, sae, edits) as state:
        cached = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False,
                                output_logits=True, return_dict_in_generate=True, pad_token_id=0)  # fmt: skip
    assert state.passes == state.forwards == 4
    grown = ids
    with intervene(model, sae, edits):
        for step in range(4):
            logits = model(grown, use_cache=False).logits[:, -1]
            torch.testing.assert_close(cached.logits[step], logits, atol=2e-3, rtol=1e-4)
            grown = torch.cat([grown, cached.sequences[:, grown.shape[1] : grown.shape[1] + 1]], 1)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False,
                           output_logits=True, return_dict_in_generate=True, pad_token_id=0)  # fmt: skip
    assert not torch.allclose(plain.logits[0], cached.logits[0], atol=1e-2)


@torch.no_grad()
def test_a_batch_of_mixed_strengths_equals_single_runs(steered):
    model, _, sae = steered
    ids = some_ids(model, rows=3)
    strengths = [0.0, 2.0, 6.0]
    with intervene(model, sae, [Clamp(4, times_max=strengths), Add(2, strengths)]):
        together = model(ids).logits
    for row, strength in enumerate(strengths):
        with intervene(model, sae, [Clamp(4, times_max=strength), Add(2, strength)]):
            alone = model(ids[row : row + 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone, atol=2e-3, rtol=1e-4)
    two = intervene(model, sae, [Add(2, [1.0, 2.0])])
    with two, pytest.raises(InputError, match="2 strengths given for a batch of 3 rows"):
        model(ids)


@torch.no_grad()
def test_special_tokens_stay_as_they_are(tiny):
    model, _, _ = tiny
    sae = sae_for(32, HOOK).with_metadata(special_token_ids=[0, 1])
    ids = some_ids(model)
    ids[:, 0] = 1
    x = at_hook(model, sae, ids)
    with intervene(model, sae, [Add(2, 1.0)]):
        got = at_hook(model, sae, ids)
    assert torch.equal(got[:, 0], x[:, 0])
    torch.testing.assert_close(got[:, 1:], x[:, 1:] + sae.W_dec[2], atol=1e-5, rtol=1e-5)
    with intervene(model, sae, [Add(2, 1.0)], special_tokens=True):
        assert not torch.equal(at_hook(model, sae, ids)[:, 0], x[:, 0])


@torch.no_grad()
def test_hooks_leave_nothing_behind_and_spare_the_users(tiny):
    model, _, sae = tiny
    ids = some_ids(model)
    base = model(ids).logits
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))

    def fails_inside():
        with intervene(model, sae, [Add(1, 50.0)]):
            model(ids)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_inside()
    assert torch.equal(model(ids).logits, base)
    assert len(seen) == 2
    handle.remove()
    assert not model.model.layers[1]._forward_hooks
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_a_bridge_steers_like_the_plain_model(tiny_model_dir, tiny):
    from transformer_lens.model_bridge import TransformerBridge

    model, _, sae = tiny
    bridge = TransformerBridge.boot_transformers(str(tiny_model_dir), device="cpu")
    ids = some_ids(model)
    edits = [Clamp(4, times_max=3.0)]
    with intervene(model, sae, edits):
        expected = torch.log_softmax(model(ids).logits, -1)
    with intervene(bridge, sae, edits) as state:
        got = torch.log_softmax(bridge(ids), -1)
    assert state.passes == 1
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    with intervene(bridge, sae, edits, hook="blocks.1.hook_out"):  # the canonical name of the same place
        torch.testing.assert_close(torch.log_softmax(bridge(ids), -1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_other_sites_and_bfloat16(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).eval()
    ids = some_ids(model)
    for hook, width in (("blocks.1.mlp.hook_post", 64), ("blocks.1.hook_resid_mid", 32), ("blocks.2.hook_resid_pre", 32)):
        sae = sae_for(width, hook)
        base = model(ids).logits
        with intervene(model, sae, [Scale(3, 1.0)]):
            assert torch.equal(model(ids).logits, base)
        with intervene(model, sae, [Clamp(3, value=40.0)]):
            out = model(ids).logits
        assert out.dtype == torch.bfloat16
        assert not torch.equal(out, base)


def test_finding_a_hook_leaves_the_model_as_it_is(tiny):
    """Booting a bridge forces eager attention in the config it is given; that must not be the steered model's."""
    model, _, _ = tiny
    before = model.config.to_dict(), model.config._attn_implementation
    locate_hooks(model, [HOOK])
    assert (model.config.to_dict(), model.config._attn_implementation) == before == (before[0], "sdpa")


def test_what_cannot_be_done_is_refused(tiny):
    model, _, sae = tiny
    cases = [
        ([Clamp(64, value=1.0)], "latent 64 is outside this SAE's 0..63"),
        ([Clamp(1)], "exactly one of value and times_max"),
        ([Clamp(1, value=1.0, times_max=2.0)], "exactly one of value and times_max"),
        ([Clamp(1, value=1.0), Ablate(1)], r"latents \[1\] are set or scaled by more than one edit"),
    ]
    for edits, message in cases:
        with pytest.raises(InputError, match=message), intervene(model, sae, edits):
            pass
    misspelled = intervene(model, sae, [Ablate(1)], hook="blocks.1.hook_resid_pst")
    with pytest.raises(InputError, match=r"nearest: blocks\.1\.hook_resid_post"), misspelled:
        pass
    unmeasured = sae_for(32, HOOK)
    unmeasured.latents = None
    with pytest.raises(InputError, match="corpus maxima"), intervene(model, unmeasured, [Clamp(1, times_max=5.0)]):
        pass
    silent = sae_for(32, HOOK)
    silent.latents.max_activation[1] = 0
    with pytest.raises(InputError, match="latent 1 never fired"), intervene(model, silent, [Clamp(1, times_max=5.0)]):
        pass


def test_steer_gives_baseline_and_steered_text(tiny):
    model, tokenizer, sae = tiny
    text = steer(model, tokenizer, sae, [Add(4, 200.0)], "the cat", 6)
    assert text.baseline != text.steered
    assert steer(model, tokenizer, sae, [Scale(4, 1.0)], "the cat", 6).steered == text.baseline


def test_what_writes_elsewhere_than_it_reads_is_refused():
    batches = [(torch.randn(32, 6), torch.randn(32, 6)) for _ in range(2)]
    kinds = ({"hook": "a", "hook_out": "b"}, "it reads a and writes elsewhere"), ({"hook": ("a", "b")}, r"it reads \('a', 'b'\)")
    for own, said in kinds:
        sae = train(batches, TrainConfig(d_sae=8, steps=2, **own))
        assert not steerable(sae)
        with pytest.raises(InputError, match=said), intervene(torch.nn.Linear(1, 1), sae, [Ablate(0)]):
            pass
    sae = StandardSAE(SAEConfig("standard", 6, 8, "blocks.0.mlp.hook_in", hook_name_out="blocks.0.hook_mlp_out"))
    assert not steerable(sae)  # as wide out as in, which d_out need not say
    assert steerable(StandardSAE(SAEConfig("standard", 6, 8, "blocks.0.hook_out", hook_name_out="blocks.0.hook_out")))


@torch.no_grad()
@pytest.mark.parametrize("edit", [Clamp(4, value=3.0), Scale(4, 2.0), Add(4, 2.0), Ablate(4)])
def test_an_sae_in_bfloat16_steers_as_the_one_in_float32_but_for_rounding(tiny, edit):
    model, _, sae = tiny
    half = StandardSAE(replace(sae.cfg, dtype="bfloat16")).requires_grad_(False)
    half.load_state_dict(sae.state_dict())
    ids, base = some_ids(model), model(some_ids(model)).logits
    logits = []
    for one in (sae, half):
        with intervene(model, one, [edit]):
            logits.append(model(ids).logits)
    assert (logits[0] - base).norm() > 0.01
    assert (logits[1] - logits[0]).norm() < 0.05 * (logits[0] - base).norm()
