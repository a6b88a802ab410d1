"""Kinds of edits, where they apply, and several at once: each against its formula written out."""

import pytest
import torch
from test_intervene import HOOK, at_hook, sae_for, some_ids
from transformers import AutoModelForCausalLM

from activation_store.errors import InputError
from sae.intervene import Ablate, AblateDirection, Add, Clamp, Scale, When, intervene


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval().requires_grad_(False)
    sae = sae_for(32, HOOK)
    sae.W_dec[3] *= 2.0  # rows of length 1 hide what is divided by it
    return model, sae


def steered(model, sae, ids, edits, **options):
    with torch.no_grad(), intervene(model, sae, edits, **options):
        return at_hook(model, sae, ids)


def generate(model, ids, new=4, **options):
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "output_logits": True, "return_dict_in_generate": True}
    fixed |= {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **{**fixed, **options})


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_minimum_only_raises(tiny):
    model, sae = tiny
    ids = some_ids(model)
    x = at_hook(model, sae, ids)
    f = sae.encode(x)[..., 3]
    value = float(f.quantile(0.75))
    assert (f > value).any()
    assert ((f > 0) & (f < value)).any()
    expected = x + (f.clamp(min=value) - f)[..., None] * sae.W_dec[3]
    close(steered(model, sae, ids, [Clamp(3, value=value, minimum=True)]), expected)
    close(steered(model, sae, ids, [Clamp(3, times_max=value / 2.0, minimum=True)]), expected)
    assert torch.equal(steered(model, sae, ids, [Clamp(3, value=0.0, minimum=True)]), x)


def test_unit_directions_and_raw_ones(tiny):
    model, sae = tiny
    ids = some_ids(model)
    x = at_hook(model, sae, ids)
    moved = steered(model, sae, ids, [Add(3, 5.0, unit=True)]) - x
    close(moved.norm(dim=-1), torch.full(ids.shape, 5.0))
    close(steered(model, sae, ids, [Add(3, 5.0)]) - x, 2 * moved)


def test_a_direction_is_taken_out_whole(tiny):
    model, sae = tiny
    ids = some_ids(model)
    x = at_hook(model, sae, ids)
    v = sae.W_dec[3] / sae.W_dec[3].norm()
    out = steered(model, sae, ids, [AblateDirection(3)])
    close(out, x - (x @ v)[..., None] * v)
    assert float((x @ v).abs().min()) > 1e-3
    several = steered(model, sae, ids, [AblateDirection(n) for n in (3, 5, 6)])
    rows = sae.W_dec[[3, 5, 6]]
    basis = torch.linalg.qr(rows.T).Q
    close(several, x - x @ basis @ basis.T)
    assert float((rows[0] @ rows[1]).abs()) > 0.01  # not orthogonal: one by one they would leave something


def test_directions_along_each_other_are_one(tiny):
    model, _ = tiny
    again = sae_for(32, HOOK)
    again.W_dec[5] = -2 * again.W_dec[3]
    ids = some_ids(model)
    close(steered(model, again, ids, [AblateDirection(3), AblateDirection(5)]), steered(model, again, ids, [AblateDirection(3)]))


def test_only_where_another_latent_fires(tiny):
    model, sae = tiny
    ids = some_ids(model, rows=3)
    x = at_hook(model, sae, ids)
    f = sae.encode(x)
    above = float(f[..., 7].median())
    fires = f[..., 7] > above
    assert fires.any()
    assert not fires.all()
    for edit in (Add(2, 3.0), Clamp(2, value=4.0), AblateDirection(3), Add(2, [1.0, 2.0, 3.0])):
        everywhere = steered(model, sae, ids, [edit])
        got = steered(model, sae, ids, [When(7, edit, above=above)])
        close(got, torch.where(fires[..., None], everywhere, x))
        assert torch.equal(got[~fires], x[~fires])
    order = [Scale(7, 0.0), When(7, Add(2, 3.0), above=above)]  # the condition is of the unsteered x
    close(steered(model, sae, ids, order), steered(model, sae, ids, order[::-1]))


def test_norms_are_kept(tiny):
    model, sae = tiny
    ids = some_ids(model)
    x = at_hook(model, sae, ids)
    free = steered(model, sae, ids, [Add(3, 20.0)])
    kept = steered(model, sae, ids, [Add(3, 20.0)], keep_norm=True)
    close(kept.norm(dim=-1), x.norm(dim=-1))
    close(torch.nn.functional.cosine_similarity(kept, free, dim=-1), torch.ones(ids.shape))
    assert torch.equal(steered(model, sae, ids, [Scale(3, 1.0)], keep_norm=True), x)
    nothing = sae_for(32, HOOK)
    nothing.W_dec.zero_()
    nothing.b_dec.zero_()
    assert torch.equal(steered(model, nothing, ids, [], keep_norm=True, keep_error=False), torch.zeros_like(x))


def test_the_error_is_dropped_only_when_asked(tiny):
    model, sae = tiny
    ids = some_ids(model)
    x = at_hook(model, sae, ids)
    f = sae.encode(x)
    f[..., 3] = 7.0
    close(steered(model, sae, ids, [Clamp(3, value=7.0)], keep_error=False), sae.decode(f))
    assert torch.equal(steered(model, sae, ids, []), x)
    close(steered(model, sae, ids, [], keep_error=False), sae(x))


def test_positions_by_number(tiny):
    model, sae = tiny
    ids = some_ids(model)
    x, all_of_it = at_hook(model, sae, ids), steered(model, sae, ids, [Add(3, 2.0)])
    for positions, wanted in (([0, 4], [0, 4]), (slice(6, None), [6, 7, 8]), (slice(1, 6, 2), [1, 3, 5]), (range(2), [0, 1])):
        got = steered(model, sae, ids, [Add(3, 2.0)], positions=positions)
        others = [n for n in range(9) if n not in wanted]
        close(got[:, wanted], all_of_it[:, wanted])
        assert torch.equal(got[:, others], x[:, others])


@torch.no_grad()
def test_positions_count_from_the_first_token_that_is_no_padding(tiny):
    model, sae = tiny
    ids = some_ids(model, rows=1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    for positions in ([0, 10], slice(2, 5), slice(8, 11), "prompt", "response"):
        with intervene(model, sae, [Add(3, 4.0)], positions=positions):
            alone = generate(model, ids)
        with intervene(model, sae, [Add(3, 4.0)], positions=positions):
            beside = generate(model, padded, attention_mask=mask)
        for one, other in zip(alone.logits, beside.logits, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_prompt_and_response_under_a_cache_are_slices_of_a_full_pass(tiny):
    model, sae = tiny
    ids = some_ids(model)
    plain = generate(model, ids).logits
    for name, positions in (("prompt", slice(9)), ("response", slice(9, None)), ([3, 10], [3, 10])):
        with intervene(model, sae, [Clamp(3, value=9.0)], positions=name):
            cached = generate(model, ids)
        with intervene(model, sae, [Clamp(3, value=9.0)], positions=positions):
            full = model(cached.sequences[:, :-1], use_cache=False).logits[:, 8:]
        for step, logits in enumerate(cached.logits):
            torch.testing.assert_close(logits, full[:, step], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(cached.logits[-1], plain[-1], atol=1e-3)
        if name == "response":
            close(cached.logits[0], plain[0])


@torch.no_grad()
def test_a_second_prompt_in_the_same_block_is_a_prompt(tiny):
    model, sae = tiny
    with intervene(model, sae, [Add(3, 4.0)], positions="response"):
        first, second = (generate(model, some_ids(model, rows=n)).logits for n in (1, 2))
    plain = generate(model, some_ids(model, rows=2)).logits
    close(second[0], plain[0])
    assert not torch.allclose(second[1], plain[1], atol=1e-3)
    assert len(first) == 4


@torch.no_grad()
def test_beams_equal_full_recomputation(tiny):
    model, sae = tiny
    ids = some_ids(model)
    strengths = [2.0, 2.0, 5.0, 5.0]  # two rows, two beams each
    with intervene(model, sae, [Add(3, strengths)]):
        found = generate(model, ids, num_beams=2, output_scores=True)
    for row, strength in enumerate((2.0, 5.0)):
        with intervene(model, sae, [Add(3, strength)]):
            alone = generate(model, ids[row : row + 1], num_beams=2, output_scores=True)
        assert torch.equal(alone.sequences[0], found.sequences[row])
        close(alone.sequences_scores[0], found.sequences_scores[row])


def test_several_saes_at_several_layers(tiny):
    model, sae = tiny
    above = sae_for(32, "blocks.2.hook_resid_post", d_sae=48)
    ids = some_ids(model)
    with intervene(model, sae, [Add(3, 5.0)]):
        x = at_hook(model, above, ids)
    expected = x + (6.0 - above.encode(x)[..., 1])[..., None] * above.W_dec[1]
    for first, second in (((sae, Add(3, 5.0)), (above, Clamp(1, value=6.0))), ((above, Clamp(1, value=6.0)), (sae, Add(3, 5.0)))):
        with intervene(model, first[0], [first[1]]), intervene(model, second[0], [second[1]]):
            close(at_hook(model, above, ids), expected)
    twice = sae_for(32, HOOK)
    with intervene(model, sae, [Add(3, 5.0)]), intervene(model, twice, [Ablate(2)]):
        got = at_hook(model, sae, ids)
    x = at_hook(model, sae, ids) + 5.0 * sae.W_dec[3]
    close(got, x - twice.encode(x)[..., 2:3] * twice.W_dec[2])


@torch.no_grad()
def test_a_decorator_steers_every_call_and_nothing_else(tiny):
    model, sae = tiny
    ids = some_ids(model)

    @intervene(model, sae, [Add(3, 5.0)])
    def run():
        return model(ids).logits

    base = model(ids).logits
    first = run()
    assert torch.equal(first, run())
    assert not torch.equal(first, base)
    assert torch.equal(model(ids).logits, base)


REFUSED = [
    ([When(99, Add(1, 1.0))], {}, "latent 99 is outside this SAE's 0..63"),
    ([When(1, Add(64, 1.0))], {}, "latent 64 is outside"),
    ([Clamp(-1, times_max=1.0)], {}, "latent -1 is outside"),
    ([When(1, Clamp(2))], {}, "exactly one of value and times_max"),
    ([When(1, Ablate(2), above=float("nan"))], {}, "has to be finite"),
    ([Add(1, [[1.0]])], {}, r"strengths \(1, 1\) given; one number, or one a batch row"),
    ([When(1, Ablate(2)), Scale(2, 2.0)], {}, r"latents \[2\] are set or scaled by more than one"),
    ([AblateDirection(2), AblateDirection(2)], {}, r"directions \[2, 2\] are ablated more than once"),
    ([AblateDirection(2), When(1, AblateDirection(3))], {}, "none may depend on where"),
    ([Add(1, 1.0)], {"positions": "answer"}, "allowed: all, prompt, response, a slice or a list"),
    ([Add(1, 1.0)], {"positions": [-1]}, "0 and up"),
    ([Add(1, 1.0)], {"positions": []}, "0 and up"),
    ([Add(1, 1.0)], {"positions": slice(4, 4)}, "it holds none"),
    ([Add(1, 1.0)], {"positions": [10**9]}, "the model's context has"),
]


@pytest.mark.parametrize(("edits", "options", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_refused_before_the_model_runs(tiny, edits, options, said):
    model, sae = tiny
    with pytest.raises(InputError, match=said), intervene(model, sae, edits, **options):
        raise AssertionError("the block was entered")
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_positions_that_no_token_had_are_said(tiny):
    model, sae = tiny
    ids = some_ids(model)
    for positions, said in (([2, 9], "9 given; the longest row had 9 tokens"), (slice(9, None), "nothing was steered"),
                            ("response", "nothing was steered")):  # fmt: skip
        with pytest.raises(InputError, match=said), intervene(model, sae, [Add(1, 1.0)], positions=positions):
            model(ids)


def test_an_sae_of_another_width_is_refused(tiny):
    model, _ = tiny
    narrow = sae_for(16, HOOK)
    with pytest.raises(InputError, match="the model is 32 wide there, the SAE 16"), intervene(model, narrow, [Ablate(1)]):
        raise AssertionError("the block was entered")
    inside = sae_for(16, "blocks.1.mlp.hook_post")  # its width is seen when it is passed
    with pytest.raises(InputError, match="the model is 64 wide there, the SAE 16"), intervene(model, inside, [Ablate(1)]):
        model(some_ids(model))


def test_an_sae_of_another_basis_is_refused(tiny_model_dir):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(tiny_model_dir), device="cpu")
    bridge.enable_compatibility_mode()
    with pytest.raises(InputError, match="compatibility mode"), intervene(bridge, sae_for(32, HOOK), [Ablate(1)]):
        raise AssertionError("the block was entered")
