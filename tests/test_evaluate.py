"""Evaluation against plain recomputation, and the limits it must reach."""

import numpy as np
import pytest
import torch
from test_intervene import HOOK, sae_for
from transformers import AutoModelForCausalLM

from activation_store.errors import InputError
from activation_store.hooks import locate_hooks
from sae import EvaluateConfig
from sae.architectures.identity import IdentitySAE
from sae.evaluate import evaluate, next_token_loss
from sae.readout import norm_gain, output_logits
from sae.statistics import latent_statistics


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval().requires_grad_(False)


def held_out(store, hook):
    first = store.train_sequences * store.context
    x = store.read(hook, slice(first, store.rows))
    return x, ~store.special.reshape(-1)[first:]


def test_reconstruction_figures_equal_plain_numpy(tiny_store, model):
    sae = sae_for(32, HOOK)
    result = evaluate(sae, tiny_store, model, EvaluateConfig(ce_sequences=4))
    x, plain = held_out(tiny_store, HOOK)
    for which, keep in (("with_special", np.ones_like(plain)), ("without_special", plain)):
        rows = x[torch.from_numpy(keep)].double()
        f = sae.double().encode(rows)
        error = rows - sae.decode(f)
        sae.float()
        got = result[which]
        assert got["tokens"] == keep.sum()
        assert got["l0"] == pytest.approx(float((f > 0).sum(1).double().mean()), rel=1e-3)
        assert got["mse"] == pytest.approx(float(error.square().sum(1).mean()), rel=1e-4)
        total = (rows - rows.mean(0)).square().sum()
        assert got["explained_variance"] == pytest.approx(1 - float(error.square().sum() / total), rel=1e-4)
        density = (f > 0).double().mean(0)
        assert got["dead_fraction"] == pytest.approx(float((density == 0).double().mean()))
        assert sum(got["density_histogram"]) == int((density > 0).sum())
    assert result["l0"] == result["without_special"]["l0"]


def test_losses_equal_a_plain_spliced_model(tiny_store, model):
    sae = sae_for(32, HOOK)
    result = evaluate(sae, tiny_store, model, EvaluateConfig(ce_sequences=6, batch_size=4))
    tokens = torch.from_numpy(tiny_store.tokens[tiny_store.train_sequences :][:6].copy()).long()
    plain = torch.from_numpy(~tiny_store.special[tiny_store.train_sequences :][:6])
    clean = next_token_loss(model, tokens)

    def with_output(change):
        def hook(_module, _args, out):
            return change(out)

        handle = model.model.layers[1].register_forward_hook(hook)
        try:
            return next_token_loss(model, tokens)
        finally:
            handle.remove()

    assert result["ce_clean"] == pytest.approx(float(clean[plain[:, :-1]].mean()), rel=1e-5)
    spliced = with_output(lambda x: torch.where(plain[..., None], sae(x), x))
    ablated = with_output(lambda x: torch.where(plain[..., None], torch.zeros_like(x), x))
    for key, loss in (("ce_spliced", spliced), ("ce_ablated", ablated)):
        assert result[key] == pytest.approx(float(loss[plain[:, :-1]].mean()), rel=1e-5)
    everywhere = with_output(sae)
    assert result["with_special"]["ce_spliced"] == pytest.approx(float(everywhere.mean()), rel=1e-5)
    recovered = (result["ce_ablated"] - result["ce_spliced"]) / (result["ce_ablated"] - result["ce_clean"])
    if result["ce_ablated"] > result["ce_clean"]:
        assert result["ce_recovered"] == pytest.approx(recovered)
    else:
        assert result["ce_recovered"] is None


def test_a_perfect_dictionary_recovers_everything(tiny_store, model):
    result = evaluate(IdentitySAE.of(HOOK, 32), tiny_store, model, EvaluateConfig(ce_sequences=4))
    assert result["mse"] == 0
    assert result["explained_variance"] == 1
    assert result["ce_spliced"] == result["ce_clean"]
    assert result["ce_recovered"] in (1.0, None)


def test_a_width_that_does_not_fit_is_refused(tiny_store, model):
    with pytest.raises(InputError, match="d_in: the SAE takes 16"):
        evaluate(sae_for(16, HOOK), tiny_store, model, EvaluateConfig())


def test_latent_statistics_equal_brute_force(tiny_store):
    sae = sae_for(32, HOOK)
    got = latent_statistics(sae, tiny_store, batch=100)
    border = tiny_store.train_sequences * tiny_store.context
    keep = torch.from_numpy(~tiny_store.special.reshape(-1)[:border])
    f = sae.encode(tiny_store.read(HOOK, slice(0, border))[keep])
    torch.testing.assert_close(got.max_activation, f.amax(0))
    torch.testing.assert_close(got.density, (f > 0).float().mean(0))
    assert torch.equal(got.histogram.sum(1), (f > 0).sum(0))
    assert got.tokens == int(keep.sum())


def test_norm_gain_finds_gamma_of_any_norm():
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.LayerNorm(16)
    rms = torch.nn.RMSNorm(16, eps=0.0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, generator=g))
        layer.bias.copy_(torch.randn(16, generator=g))
        rms.weight.copy_(torch.randn(16, generator=g))
    torch.testing.assert_close(norm_gain(layer, 16), layer.weight.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm_gain(rms, 16), rms.weight.detach(), atol=1e-5, rtol=1e-5)


def test_readout_is_the_norm_scaled_direction_through_the_unembedding(model):
    sae = sae_for(32, HOOK)
    got = output_logits(sae, model, [3, 8])
    expected = (sae.W_dec[[3, 8]] * model.model.norm.weight) @ model.lm_head.weight.T
    expected = expected - expected.mean(1, keepdim=True)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert "ln_final.hook_out" in locate_hooks(model, ["ln_final.hook_out"])
