"""Evaluation of what reads or predicts several hooks: crosscoders and cross-layer transcoders, against plain recomputation."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from activation_store import DataConfig, HarvestConfig, InputError, ModelConfig
from activation_store.harvest import harvest
from activation_store.subject import load_subject
from sae import EvaluateConfig
from sae.architectures.cross_layer import CrossLayerTranscoder
from sae.architectures.standard import StandardSAE
from sae.config import ProbingConfig
from sae.evaluate import evaluate, evaluate_many, next_token_loss
from sae.evaluation.held_out import HeldOut
from sae.sae import SAEConfig
from sae.statistics import latent_statistics

STREAMS = tuple(f"blocks.{layer}.hook_resid_post" for layer in (0, 1))
INS = tuple(f"blocks.{layer}.mlp.hook_in" for layer in (0, 1, 2))
OUTS = tuple(f"blocks.{layer}.hook_mlp_out" for layer in (0, 1, 2))
CONFIG = EvaluateConfig(ce_sequences=4, batch_size=3, resamples=50)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def store(tiny_model_dir, tiny_text, tmp_path_factory):
    return harvest(
        load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu")),
        DataConfig(source=str(tiny_text), context=16, tokens=2000, held_out=0.2),
        HarvestConfig(hooks=(*STREAMS, *INS, *OUTS), dtype="float32", batch_size=8, shard_mb=0.2),
        tmp_path_factory.mktemp("hooks") / "activations",
    )


def filled(sae, seed=4):
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.requires_grad_(False).copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return sae


def crosscoder(hooks=STREAMS, seed=4):
    return filled(StandardSAE(SAEConfig("standard", 32 * len(hooks), 48, hook_names=hooks, widths=(32,) * len(hooks))), seed)


def cross_layer():
    cfg = SAEConfig(
        "cross_layer_transcoder", 96, 120, apply_b_dec_to_input=False, d_out=96, hook_names=INS, hook_names_out=OUTS,
        widths=(32, 32, 32), widths_out=(32, 32, 32), metadata={"layers": "standard"},
    )  # fmt: skip
    sae = filled(CrossLayerTranscoder(cfg))
    for layer, _, written in sae:
        if written:
            layer.b_dec.zero_()
    return sae


def rows(store, hooks):
    x = torch.cat([store.read(hook, slice(store.train_sequences * store.context, store.rows)) for hook in hooks], 1)
    return x, torch.from_numpy(~store.special.reshape(-1)[store.train_sequences * store.context :])


def first_tokens(store, sequences=4):
    tokens = torch.from_numpy(store.tokens[store.train_sequences :][:sequences].copy()).long()
    return tokens, torch.from_numpy(~store.special[store.train_sequences :][:sequences])


def outputs(model, tokens, modules):
    found = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, name=name: found.__setitem__(name, out))
        for name, module in modules.items()
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    return [found[name] for name in modules]


@pytest.mark.parametrize("make", [crosscoder, cross_layer])
def test_reconstruction_is_of_all_hooks_and_of_each(store, model, make):
    sae = make()
    result = evaluate(sae, store, model, CONFIG)
    hooks, hooks_out = sae.cfg.hook_names, sae.cfg.hook_names_out or sae.cfg.hook_names
    (x, plain), (y, _) = rows(store, hooks), rows(store, hooks_out)
    x, y = x[plain], y[plain]
    error = (y - sae(x)).double()
    assert result["hook"] == list(hooks)
    assert result["hook_out"] == list(hooks_out)
    assert result["l0"] == pytest.approx(float((sae.encode(x) > 0).sum(1).double().mean()), rel=1e-4)
    parts = {None: slice(None)} | {hook: slice(32 * i, 32 * i + 32) for i, hook in enumerate(hooks_out)}
    for hook, part in parts.items():
        got = result if hook is None else result["by_hook"][hook]
        assert got["mse"] == pytest.approx(float(error[:, part].square().sum(1).mean()), rel=1e-4)
        about = (y[:, part] - y[:, part].mean(0)).double().square().sum()
        assert got["explained_variance"] == pytest.approx(1 - float(error[:, part].square().sum() / about), rel=1e-4)
    assert set(result["by_hook"]) == set(hooks_out)
    assert result["dark_matter"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    low, high = result["intervals"]["ce_spliced"]
    assert low <= result["ce_spliced"] <= high


def test_a_crosscoder_is_spliced_in_at_one_hook_at_a_time(store, model):
    sae = crosscoder()
    result = evaluate(sae, store, model, CONFIG)
    tokens, plain = first_tokens(store)
    layers = [model.model.layers[i] for i in (0, 1)]
    x = torch.cat(outputs(model, tokens, dict(enumerate(layers))), -1)
    y_hat = sae(x)
    clean = next_token_loss(model, tokens)[plain[:, :-1]].mean()
    losses = {"spliced": [], "ablated": []}
    for number, (hook, layer) in enumerate(zip(STREAMS, layers, strict=True)):
        for kind, value in (("spliced", y_hat[..., 32 * number : 32 * number + 32]), ("ablated", torch.zeros_like(x[..., :32]))):
            handle = layer.register_forward_hook(lambda _m, _a, out, v=value: torch.where(plain[..., None], v, out))
            losses[kind].append(float(next_token_loss(model, tokens)[plain[:, :-1]].mean()))
            handle.remove()
            assert result["by_hook"][hook][f"ce_{kind}"] == pytest.approx(losses[kind][-1], rel=1e-5)
    for kind, found in losses.items():  # all have as many tokens
        assert result[f"ce_{kind}"] == pytest.approx(sum(found) / 2, rel=1e-5)
    assert result["ce_clean"] == pytest.approx(float(clean), rel=1e-5)
    assert result["ce_tokens"] == int(plain[:, :-1].sum())
    gap = sum(losses["ablated"]) / 2 - float(clean)
    if gap > 0:
        assert result["ce_recovered"] == pytest.approx((sum(losses["ablated"]) - sum(losses["spliced"])) / 2 / gap, rel=1e-3)
    assert "replacement" not in result
    shares = [result["by_hook"][hook]["decoder_share"]["mean"] for hook in STREAMS]
    assert sum(shares) == pytest.approx(1, abs=1e-6)


def test_a_cross_layer_transcoder_takes_the_place_of_all_layers_at_once(store, model):
    sae = cross_layer()
    result = evaluate(sae, store, model, CONFIG)
    tokens, plain = first_tokens(store)
    clean_x = torch.cat(outputs_in(model, tokens), -1)
    y_hat = sae(clean_x)
    for number, hook in enumerate(OUTS):
        value = y_hat[..., 32 * number : 32 * number + 32]
        handle = model.model.layers[number].mlp.register_forward_hook(
            lambda _m, _a, out, v=value: torch.where(plain[..., None], v, out)
        )
        loss = next_token_loss(model, tokens)[plain[:, :-1]].mean()
        handle.remove()
        assert result["by_hook"][hook]["ce_spliced"] == pytest.approx(float(loss), rel=1e-5)
        assert result["by_hook"][hook]["decoder"]["nearest_cosine_mean"] > 0
    # all at once: of what later layers read nothing is known yet, and predictions of a layer do not look at it
    seen, handles = [], []
    for number in range(3):

        def replace(_module, args, out, number=number):
            seen.append(args[0])
            x = torch.cat([*seen, *(torch.zeros_like(seen[0]),) * (2 - number)], -1)
            return torch.where(plain[..., None], sae(x)[..., 32 * number : 32 * number + 32], out)

        handles.append(model.model.layers[number].mlp.register_forward_hook(replace))
    loss = next_token_loss(model, tokens)[plain[:, :-1]].mean()
    for handle in handles:
        handle.remove()
    assert result["replacement"]["ce_spliced"] == pytest.approx(float(loss), rel=1e-5)
    assert result["replacement"]["ce_spliced"] != pytest.approx(result["ce_spliced"], rel=1e-3)


def outputs_in(model, tokens):
    found = []
    handles = [layer.mlp.register_forward_pre_hook(lambda _m, args: found.append(args[0])) for layer in model.model.layers[:3]]
    model(tokens)
    for handle in handles:
        handle.remove()
    return found


def test_many_are_as_each_alone_and_baselines_are_kept_by_hook(store, model, tmp_path):
    saes = {"a": crosscoder(), "b": crosscoder(seed=5), "clt": cross_layer()}
    found = evaluate_many(saes, store, model, CONFIG, cache=tmp_path)
    assert len(list(tmp_path.glob("baseline-*.json"))) == 2 + 3 + 1
    for name, sae in saes.items():
        assert evaluate(sae, store, model, CONFIG, cache=tmp_path) == found[name]


def test_progress_ends_where_it_should(store, model):
    for sae in (crosscoder(), cross_layer()):
        told = []
        evaluate(sae, store, model, CONFIG, progress=lambda done, total, told=told: told.append((done, total)))
        assert told[-1][0] == told[-1][1]
        assert told[-2][0] < told[-2][1]


def test_hooks_that_do_not_fit_are_refused(store, model):
    with pytest.raises(InputError, match=r"d_in: the SAE takes 16, but blocks\.0"):
        HeldOut.of(StandardSAE(SAEConfig("standard", 32, 8, hook_names=STREAMS, widths=(16, 16))), store)
    with pytest.raises(InputError, match="hook_names: the crosscoder does not say which hooks"):
        HeldOut.of(StandardSAE(SAEConfig("standard", 64, 8, widths=(32, 32))), store)
    swapped = cross_layer()
    swapped.cfg = SAEConfig(**{**swapped.facts(), "hook_names": INS[::-1]})
    with pytest.raises(RuntimeError, match="is passed before"):
        evaluate(swapped, store, model, CONFIG)


def test_what_one_hook_alone_has_is_said_to_be_undefined(store, model, tiny_model_dir, monkeypatch):
    import sae.evaluate as module

    monkeypatch.setattr(module, "vocabulary_words", lambda tokenizer: None)
    result = evaluate(crosscoder(), store, model, EvaluateConfig(ce_sequences=2, absorption=True), tokenizer=object())
    assert result["absorption"] == {"state": "undefined", "reason": "2 hooks are read at once, and a probe is of one"}


def test_probes_see_the_activations_of_all_hooks(store, model, tiny_model_dir, tmp_path):
    from transformers import AutoTokenizer

    words = [f"{'warm' if i % 2 else 'cold'} words number {i}" for i in range(60)]
    path = tmp_path / "texts.csv"
    path.write_text("text,label\n" + "".join(f"{text},{'a' if i % 2 else 'b'}\n" for i, text in enumerate(words)))
    config = EvaluateConfig(ce_sequences=2, probing=ProbingConfig(datasets=(str(path),), k=(1, 2)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    result = evaluate(crosscoder(), store, model, config, tokenizer=tokenizer)
    assert result["probing"]["tasks"] == 1
    assert set(result["probing"]["mean"]["activations"]) == {"1", "2", "all"}


def test_statistics_of_a_crosscoders_latents(store):
    sae = crosscoder()
    found = latent_statistics(sae, store, batch=100)
    border = store.train_sequences * store.context
    x = torch.cat([store.read(hook, slice(0, border)) for hook in STREAMS], 1)
    f = sae.encode(x[torch.from_numpy(~store.special.reshape(-1)[:border])])
    torch.testing.assert_close(found.max_activation, f.amax(0))
    torch.testing.assert_close(found.density, (f > 0).float().mean(0))
