"""Evaluation against plain recomputation, and the limits it must reach."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_intervene import HOOK, sae_for
from transformers import AutoModelForCausalLM

from activation_store import ActivationStore
from activation_store.errors import InputError
from activation_store.hooks import locate_hooks
from sae import EvaluateConfig
from sae.architectures.identity import IdentitySAE
from sae.architectures.standard import StandardSAE
from sae.evaluate import evaluate, evaluate_many, next_token_loss
from sae.evaluation import reconstruction, splice
from sae.readout import norm_gain, output_logits
from sae.sae import SAEConfig
from sae.statistics import latent_statistics

MLP = "blocks.1.mlp.hook_post"


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval().requires_grad_(False)


def transcoder(skip: bool = True) -> StandardSAE:
    """From the neurons of a block, 64 wide, to the residual stream after it, 32 wide."""
    g = torch.Generator().manual_seed(8)
    cfg = SAEConfig("standard", 64, 48, MLP, d_out=32, hook_name_out=HOOK, skip=skip, apply_b_dec_to_input=False)
    sae = StandardSAE(cfg).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    return sae


class Passes:
    """Counts how often the model runs."""

    def __init__(self, model):
        self.model, self.count = model, 0

    def __enter__(self):
        self.handle = self.model.register_forward_pre_hook(lambda *_: setattr(self, "count", self.count + 1))
        return self

    def __exit__(self, *_):
        self.handle.remove()


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
        x_hat = rows - error
        lengths, of_hat = rows.norm(dim=1), x_hat.norm(dim=1)
        assert got["l1"] == pytest.approx(float(f.sum(1).mean()), rel=1e-4)
        assert got["cosine"] == pytest.approx(float(((rows * x_hat).sum(1) / lengths / of_hat).mean()), rel=1e-4)
        assert got["l2_ratio"] == pytest.approx(float((of_hat / lengths).mean()), rel=1e-4)
        gamma = float(of_hat.square().mean() / (rows * x_hat).sum(1).mean())
        assert got["relative_reconstruction_bias"] == pytest.approx(gamma, rel=1e-4)
        centre = torch.from_numpy(tiny_store.statistics(HOOK).mean)
        shares = 1 - error.square().sum(1) / (rows - centre).square().sum(1)
        assert got["explained_variance_by_token"] == pytest.approx(float(shares.mean()), rel=1e-4)
        everywhere = (sae.encode(x) > 0).sum(1).reshape(-1, tiny_store.context).double()
        counted = torch.from_numpy(keep.reshape(-1, tiny_store.context))
        for position, value in enumerate(got["l0_by_position"]):
            own = everywhere[counted[:, position], position]
            assert value == (pytest.approx(float(own.mean()), rel=1e-6) if len(own) else None)
    assert result["without_special"]["l0_by_position"][0] is None  # BOS
    assert result["with_special"]["l0_by_position"][0] > 0
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
    logits = model(tokens).logits[:, :-1].log_softmax(-1)

    def divergence(change, where):
        handle = model.model.layers[1].register_forward_hook(lambda _module, _args, out: change(out))
        try:
            other = model(tokens).logits[:, :-1].log_softmax(-1)
        finally:
            handle.remove()
        kl = torch.nn.functional.kl_div(other, logits, log_target=True, reduction="none").sum(-1)
        return float(kl[where[:, :-1]].mean())

    kl = divergence(lambda x: torch.where(plain[..., None], sae(x), x), plain)
    kl_ablated = divergence(lambda x: torch.where(plain[..., None], torch.zeros_like(x), x), plain)
    assert result["kl"] == pytest.approx(kl, rel=1e-4)
    assert result["kl_ablated"] == pytest.approx(kl_ablated, rel=1e-4)
    assert result["kl_recovered"] == pytest.approx(1 - kl / kl_ablated, rel=1e-4)
    assert result["with_special"]["kl"] == pytest.approx(divergence(sae, torch.ones_like(plain)), rel=1e-4)
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
    assert result["kl"] == 0
    assert result["kl_recovered"] == 1
    assert result["cosine"] == pytest.approx(1)
    assert result["relative_reconstruction_bias"] == 1
    assert result["dark_matter"]["error_vector_r2"] is None  # there is no error


def test_special_tokens_keep_their_own_activation(tiny_store, model):
    """An SAE that is perfect but on special tokens costs nothing where they are left out, and much where they are not."""

    class Spoilt(IdentitySAE):
        def complete(self, x_hat, x):
            special = torch.isclose(x.norm(dim=-1, keepdim=True), bos, rtol=1e-4)
            assert special.any()
            return torch.where(special, 100 * torch.ones_like(x), x_hat)

    row = tiny_store.train_sequences * tiny_store.context
    assert tiny_store.special[tiny_store.train_sequences, 0]
    bos = tiny_store.read(HOOK, slice(row, row + 1)).norm()  # the same in every sequence: nothing stands before it
    sae = Spoilt(IdentitySAE.of(HOOK, 32).cfg)
    result = evaluate(sae, tiny_store, model, EvaluateConfig(ce_sequences=4))
    eos_aside = result["without_special"]
    assert eos_aside["ce_spliced"] == eos_aside["ce_clean"]
    assert eos_aside["kl"] == 0
    assert eos_aside["mse"] == 0
    assert result["with_special"]["kl"] > 0.01
    assert result["with_special"]["mse"] > 100


@pytest.mark.parametrize("skip", [True, False])
def test_a_transcoder_is_judged_by_what_it_predicts(tiny_store, model, skip):
    sae = transcoder(skip)
    result = evaluate(sae, tiny_store, model, EvaluateConfig(ce_sequences=4, batch_size=3))
    (x, plain), (y, _) = held_out(tiny_store, MLP), held_out(tiny_store, HOOK)
    x, y = x[torch.from_numpy(plain)], y[torch.from_numpy(plain)]
    error = (y - sae(x)).double()
    assert result["mse"] == pytest.approx(float(error.square().sum(1).mean()), rel=1e-4)
    total = (y - y.mean(0)).double().square().sum()
    assert result["explained_variance"] == pytest.approx(1 - float(error.square().sum() / total), rel=1e-4)
    assert (result["hook"], result["hook_out"]) == (MLP, HOOK)
    tokens = torch.from_numpy(tiny_store.tokens[tiny_store.train_sequences :][:4].copy()).long()
    kept = torch.from_numpy(~tiny_store.special[tiny_store.train_sequences :][:4])
    neurons = []
    block = model.model.layers[1]
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _module, args: neurons.append(args[0])),
        block.register_forward_hook(lambda _module, _args, out: torch.where(kept[..., None], sae(neurons[-1]), out)),
    ]
    loss = next_token_loss(model, tokens)
    for handle in handles:
        handle.remove()
    assert result["ce_spliced"] == pytest.approx(float(loss[kept[:, :-1]].mean()), rel=1e-5)
    with pytest.raises(InputError, match=f"d_out: the SAE predicts 32, but {MLP}"):
        evaluate(StandardSAE(SAEConfig("standard", 64, 8, MLP, d_out=32)), tiny_store, model, EvaluateConfig())


def test_a_target_that_comes_before_its_source_is_refused(tiny_store, model):
    sae = StandardSAE(SAEConfig("standard", 32, 8, HOOK, d_out=64, hook_name_out=MLP))
    with pytest.raises(RuntimeError, match="is passed before"):
        evaluate(sae, tiny_store, model, EvaluateConfig(ce_sequences=1))


def test_many_saes_have_the_figures_of_each_alone_in_fewer_passes(tiny_store, model, tmp_path):
    saes = {"a": sae_for(32, HOOK), "b": sae_for(32, HOOK, d_sae=48, gain=2.0), "over": transcoder()}
    config = EvaluateConfig(ce_sequences=5, batch_size=2, resamples=50)
    with Passes(model) as together:
        found = evaluate_many(saes, tiny_store, model, config, cache=tmp_path)
    # three batches: clean, two ablated, two an SAE, and one pass to see whether lower layers may be left out; the transcoder's
    assert together.count == 3 * (3 + 2 * 2) + 1 + 3 * (3 + 2) + 1
    assert len(list(tmp_path.glob("baseline-*.json"))) == 2
    for name, sae in saes.items():
        assert evaluate(sae, tiny_store, model, config) == found[name]
        with Passes(model) as alone:
            again = evaluate(sae, tiny_store, model, config, cache=tmp_path)
        assert again == found[name]
        assert alone.count == 3 * (1 + 2) + 1  # the clean pass for the divergence, and the SAE's own
    with Passes(model) as other:
        evaluate(saes["a"], tiny_store, model, EvaluateConfig(ce_sequences=4, batch_size=2), cache=tmp_path)
    assert other.count == 2 * (3 + 2) + 1  # of other sequences nothing is known
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_layers_below_the_hook_run_once_a_batch(tiny_store, model):
    sae, config = sae_for(32, HOOK), EvaluateConfig(ce_sequences=4, batch_size=2, resamples=0, dark_matter=False)
    ran = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append(0))
    found = evaluate(sae, tiny_store, model, config)
    handle.remove()
    assert len(ran) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splice, "layers_below", lambda *_: [])
        assert evaluate(sae, tiny_store, model, config) == found
    assert "forward" not in vars(model.model.layers[0])


def test_layers_run_every_time_where_later_ones_see_more_of_them_than_x(tiny_store, model):
    sae, config = sae_for(32, HOOK), EvaluateConfig(ce_sequences=4, batch_size=2, resamples=0, dark_matter=False)
    plain = evaluate(sae, tiny_store, model, config)
    carried = []  # past the hook, from the first layer to the last
    first, last = model.model.layers[0].mlp, model.model.layers[2]
    handles = [
        first.register_forward_hook(lambda _module, _args, out: carried.append(out)),
        last.register_forward_hook(lambda _module, _args, out: out + carried.pop() if carried else out),
    ]
    found = evaluate(sae, tiny_store, model, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splice, "layers_below", lambda *_: [])
        assert evaluate(sae, tiny_store, model, config) == found
    for handle in handles:
        handle.remove()
    assert found["ce_spliced"] != plain["ce_spliced"]


def test_the_held_out_set_has_a_name_and_another_is_refused(tiny_store, model, tmp_path):
    sae, config = sae_for(32, HOOK), EvaluateConfig(ce_sequences=1, resamples=0, dark_matter=False)
    name = evaluate(sae, tiny_store, model, config)["held_out_hash"]
    shutil.copytree(tiny_store.path, tmp_path / "moved")
    moved = ActivationStore.open(tmp_path / "moved")
    agreed = config.model_copy(update={"held_out_hash": name})
    assert evaluate(sae, moved, model, agreed)["held_out_hash"] == name
    with pytest.raises(InputError, match=f"evaluate.held_out_hash: '0123456789abcdef' given, but .* is '{name}'"):
        evaluate(sae, moved, model, config.model_copy(update={"held_out_hash": "0123456789abcdef"}))
    changes = (
        {"model_revision": "another"}, {"model": "x/y"}, {"train_sequences": tiny_store.train_sequences + 1},
        {"special_token_ids": [0, 1, int(tiny_store.tokens[-1, 5])]},
    )  # fmt: skip
    for change in changes:
        shutil.copytree(tiny_store.path, tmp_path / "other")
        other = ActivationStore.open(tmp_path / "other")
        other.change_attributes(**change)
        with pytest.raises(InputError, match="use the store it was taken from"):
            evaluate(sae, ActivationStore.open(tmp_path / "other"), model, agreed)
        shutil.rmtree(tmp_path / "other")
    with pytest.raises(InputError, match="held_out_hash"):
        evaluate(IdentitySAE.of(MLP, 64), tiny_store, model, agreed)
    with pytest.raises(ValueError, match="held_out_hash"):
        EvaluateConfig(held_out_hash="not a hash")


def test_intervals_hold_the_figures_and_shrink_with_more_sequences(tiny_store, model):
    sae = sae_for(32, HOOK)
    result = evaluate(sae, tiny_store, model, EvaluateConfig(ce_sequences=60, dark_matter=False))
    for name in ("l0", "mse", "explained_variance", "cosine", "ce_clean", "ce_spliced", "ce_ablated", "kl"):
        low, high = result["intervals"][name]
        assert low < result[name] < high, name
    fewer = evaluate(sae, tiny_store, model, EvaluateConfig(ce_sequences=6, dark_matter=False))["intervals"]["ce_clean"]
    more = result["intervals"]["ce_clean"]
    assert fewer[1] - fewer[0] > 1.5 * (more[1] - more[0])
    assert set(evaluate(sae, tiny_store, model, EvaluateConfig(ce_sequences=1, resamples=0))["intervals"].values()) == {None}


def test_neighbours_are_resampled_together_where_there_are_many_sequences(tiny_store, model, monkeypatch):
    sae, config = sae_for(32, HOOK), EvaluateConfig(ce_sequences=1)
    each = evaluate(sae, tiny_store, model, config)
    monkeypatch.setattr(reconstruction, "_CLUSTERS", 9)
    pooled = evaluate(sae, tiny_store, model, config)
    for name in ("tokens", "l0", "mse", "explained_variance", "cosine", "dead_fraction"):
        assert pooled[name] == pytest.approx(each[name]), name
    assert pooled["intervals"]["mse"] != each["intervals"]["mse"]
    assert pooled["intervals"]["mse"] == pytest.approx(each["intervals"]["mse"], rel=0.05)


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
