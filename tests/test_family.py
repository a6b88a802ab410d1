"""The family: each architecture's loss by hand and by autograd, recovery of planted dictionaries, folding, resuming, refusals."""

import json
import math

import pytest
import torch
from pydantic import ValidationError

from activation_store.errors import InputError
from sae import TrainConfig, train
from sae.adam import Adam
from sae.architectures import ARCHITECTURES
from sae.architectures.auxk import Dead, IdleTokens, ghost_loss
from sae.architectures.cross_layer import CrossLayerTranscoder
from sae.architectures.directions import DirectionsSAE
from sae.architectures.matryoshka import prefixes_of
from sae.architectures.p_anneal import PAnnealSAE
from sae.architectures.resample import resample
from sae.coefficient import Coefficient
from sae.ops import DenseOps, kernels_for
from sae.ops.training import Reconstruction
from sae.sae import Moment, Site

D, LATENTS = 12, 48


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(count=40, batch=128, d=D, n=24, seed=0, fires=0.08):
    """Sparse codes of unit-norm atoms, which are the same for every seed."""
    atoms = torch.nn.functional.normalize(normal(n, d, seed=99), dim=1)
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        codes = (torch.rand(batch, n, generator=g) < fires) * (1 + torch.rand(batch, n, generator=g))
        batches.append(codes @ atoms + torch.randn(batch, d, generator=g) / 50)
    return batches


def config(architecture="standard", **changes):
    base = {"d_sae": LATENTS, "steps": 60, "batch_size": 128, "lr": 3e-3, "log_every": 5, "checkpoint_every": 20}
    own = {"k": 3} if architecture in ("topk", "batchtopk", "matryoshka") else {"l1_coefficient": 1.0}
    if architecture == "jumprelu":
        own = {"l0_coefficient": 0.5}
    return TrainConfig(architecture=architecture, **{**base, **own, **changes})


KINDS = {
    "p_anneal": {"architecture": "p_anneal", "p_start_fraction": 0.0},
    "gated": {"architecture": "gated"},
    "gated-transcoder": {"architecture": "gated", "hook": "a", "hook_out": "b"},
    "jumprelu-tanh": {"architecture": "jumprelu", "pre_act_coefficient": 0.3, "bandwidth": 0.4},
    "jumprelu-step": {"architecture": "jumprelu", "l0_penalty": "step", "bandwidth": 0.4},
    "jumprelu-quadratic": {"architecture": "jumprelu", "l0_penalty": "quadratic", "target_l0": 4.0, "bandwidth": 0.4},
    "matryoshka": {"architecture": "matryoshka", "prefixes": (8, 24, 48)},
    "matryoshka-random": {"architecture": "matryoshka", "random_prefixes": 4},
    "transcoder": {"architecture": "standard", "hook": "a", "hook_out": "b"},
    "topk-free": {"architecture": "topk", "decoder_rows": "free"},
    "batchtopk-free": {"architecture": "batchtopk", "decoder_rows": "free"},
    "skip": {"architecture": "topk", "hook": "a", "hook_out": "b", "skip_connection": True},
    "skip-jumprelu": {"architecture": "jumprelu", "hook": "a", "hook_out": "b", "skip_connection": True, "bandwidth": 0.4},
    "crosscoder": {"architecture": "standard", "hook": ("a", "b")},
    "crosscoder-batchtopk": {"architecture": "batchtopk", "hook": ("a", "b")},
    "crosscoder-topk": {"architecture": "topk", "hook": ("a", "b")},
    "clt": {"architecture": "jumprelu", "hook": ("a", "b"), "hook_out": ("c", "d"), "bandwidth": 0.4},
    "clt-topk": {"architecture": "topk", "hook": ("a", "b"), "hook_out": ("c", "d")},
    "ghost": {"architecture": "standard", "revive": "ghost"},
    "standard-auxk": {"architecture": "standard", "revive": "auxk"},
}


def site_of(c):
    return Site((D,) * max(len(c.hooks), 1), (D,) * len(c.hooks_out))


def rows_for(c, count=64, seed=0):
    return torch.cat([planted(1, count, seed=seed + i)[0] for i in range(len(site_of(c).widths + site_of(c).widths_out))], 1)


def fresh(c, seed=3):
    """An SAE with nothing at its starting value, so that every term has a gradient."""
    site = site_of(c)
    kind = CrossLayerTranscoder if len(site.widths_out) > 1 else ARCHITECTURES[c.architecture]
    sae = kind.initialise(c, site, torch.zeros(site.d_out or site.d_in))
    with torch.no_grad():
        for number, parameter in enumerate(sae.parameters()):
            parameter.add_(normal(*parameter.shape, seed=seed + number) * (0.02 if parameter.dim() == 1 else 0.15))
    return sae


def adam_of(sae, c):
    return Adam(
        dict(sae.named_parameters()), sae.encoders(), sae.decoders(), kernels_for("cpu"), betas=c.adam_betas,
        max_norm=c.max_grad_norm, unit=c.unit_norm_decoder, compute_dtype="float32",
    )  # fmt: skip


def gradients_of(sae, adam):
    """Every gradient by name, matrices by latent, whichever way it was left."""
    found = {}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name not in adam.rows:
                found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
                continue
            out, slots, _ = adam._gradient(name, parameter)
            whole = torch.zeros_like(adam.rows[name].weight)
            mask = torch.ones(len(whole), dtype=torch.bool) if slots is None else slots >= 0
            whole[mask] = out if slots is None else out[slots[mask]]
            found[name] = whole
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_losses_and_gradients_are_those_of_plain_autograd(kind, way):
    c = config(**KINDS[kind])
    x = rows_for(c)
    dead = Dead(torch.tensor([3, 9, 17, 40]), torch.tensor([True, True, False, True]))
    asked = (lambda: dead) if c.revives in ("auxk", "ghost") else (lambda: None)
    found = {}
    for ops in ("reference", way):
        sae = fresh(c)
        adam = adam_of(sae, c)
        used = {"reference": DenseOps, "sparse": lambda a=adam: a.sparse_ops(1.0), "dense": adam.dense_ops}[ops]()
        out = sae.training_loss(x, Moment(c, torch.tensor(0.7), used, asked, step=30))
        out.loss.backward()
        found[ops] = out, gradients_of(sae, adam)
    (plain, wanted), (ours, got) = found["reference"], found[way]
    assert ours.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
    assert torch.equal(ours.counts(), plain.counts())
    assert 0 < int(plain.counts().sum()) < plain.counts().numel() * len(x)
    for name, value in plain.parts.items():
        assert float(ours.parts[name]) == pytest.approx(float(value), rel=1e-4), name
    for name, gradient in wanted.items():
        if not (kind.startswith("clt") and name.endswith("1.b_dec")):  # all of its bias is the first layer's
            assert gradient.any(), name
        difference = float((gradient - got[name]).abs().max())
        assert difference <= 2e-5 * float(gradient.abs().max()), f"{name}: {difference}"


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_down_and_ends_in_an_sae_of_raw_activations(kind, tmp_path):
    c = config(**KINDS[kind])
    many = len(c.hooks) + len(c.hooks_out) > 1
    sources = [planted(seed=seed) for seed in range(len(site_of(c).widths))]
    sources += [[torch.tanh(b @ normal(D, D, seed=50 + i) / 3) for b in sources[i]] for i in range(len(c.hooks_out))]
    batches = [tuple(3.0 * (i + 1) * t for i, t in enumerate(b)) for b in zip(*sources, strict=True)] if many else sources[0]
    sae = train(batches, c, metrics=tmp_path / "m.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines[-1]["mse"] < 0.9 * lines[0]["mse"]
    first = batches[0]
    x = torch.cat(first[: len(site_of(c).widths)], 1) if many else first
    y = torch.cat(first[len(site_of(c).widths) :], 1) if c.hooks_out else x
    error = (sae(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert float(error) < 1.2 * (1 - min(line["explained_variance"] for line in lines[-3:])) + 0.05
    f, x_hat = sae.reconstruct_sparse(x)
    assert torch.allclose(f.dense(), sae.encode(x), atol=1e-5)
    assert torch.allclose(x_hat, sae(x), atol=1e-4)


STOPPED = ["p_anneal", "gated", "jumprelu-tanh", "matryoshka-random", "skip-jumprelu", "crosscoder", "clt"]


@pytest.mark.parametrize("kind", STOPPED)
def test_a_training_that_is_stopped_ends_in_the_same_bits(kind, tmp_path):
    c = config(**KINDS[kind], **({} if "topk" in kind or "matry" in kind else {"target_l0": 5.0}))
    count = len(site_of(c).widths + site_of(c).widths_out)
    sources = [planted(60, seed=seed) for seed in range(count)]
    batches = list(zip(*sources, strict=True)) if count > 1 else sources[0]

    class Stopped(Exception):
        pass

    def stop(done, total):
        if done >= 33 * c.batch_size:
            raise Stopped

    whole = train(batches, c)
    with pytest.raises(Stopped):
        train(batches, c, checkpoints=tmp_path, progress=stop)
    again = train(batches, c, checkpoints=tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize(
    "kind",
    ["gated", "jumprelu-tanh", "matryoshka", "topk-free", "batchtopk-free", "skip", "skip-jumprelu", "crosscoder",
     "crosscoder-topk", "clt", "clt-topk"],
)
def test_folding_keeps_predictions_and_who_fires(kind):
    c = config(**KINDS[kind])
    sae = fresh(c).finished()
    site = site_of(c)
    x = rows_for(c)[:, : site.d_in]
    scale = torch.linspace(0.5, 2, site.d_in)
    scale_out = torch.linspace(0.2, 3, site.d_out) if site.d_out else None
    f, y = sae.encode(x * scale), sae(x * scale) / (scale if scale_out is None else scale_out)
    sae.fold_scale(scale, scale_out)
    assert torch.equal(sae.encode(x) > 0, f > 0)
    assert torch.allclose(sae(x), y, atol=1e-5)


# --- each by hand


def test_gated_loss_by_hand():
    """One latent, d 2: u = 2 x_0, gate opens above 1, magnitude e^0 u + 1; decoder (0.5, 0)."""
    c = config("gated", d_sae=1, apply_b_dec_to_input=False)
    sae = ARCHITECTURES["gated"].initialise(c, Site((2,)), torch.zeros(2))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[2.0], [0.0]]))
        sae.W_dec.copy_(torch.tensor([[0.5, 0.0]]))
        sae.b_gate.fill_(-1.0)
        sae.b_mag.fill_(1.0)
        sae.r_mag.fill_(0.0)
    out = sae.training_loss(torch.tensor([[1.0, 0.0], [0.25, 1.0]]), Moment(c, 10.0))
    # row 0: gate 1, f 3, x_hat 1.5, error 0.25; gate's x_hat 0.5, error 0.25; row 1: shut, error 1/16 + 1, twice
    assert float(out.mse) == pytest.approx((0.25 + 1.0625) / 2)
    assert float(out.l1) == pytest.approx(1 * 0.5 / 2)  # the gate, times its decoder's norm
    assert float(out.loss) == pytest.approx((0.25 + 1.0625) + 10 * 0.25)
    assert out.counts().tolist() == [1]


def test_jumprelu_gradients_are_those_of_the_paper():
    """z = 0.9, 1.05, 2 at threshold 1, bandwidth 0.5: the first two lie in the kernel (eq. 11 and 12)."""
    c = config("jumprelu", d_sae=3, l0_penalty="step", bandwidth=0.5, threshold_init=1.0, apply_b_dec_to_input=False)
    sae = ARCHITECTURES["jumprelu"].initialise(c, Site((3,)), torch.zeros(3))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    x = torch.tensor([[0.9, 1.05, 2.0]])
    out = sae.training_loss(x, Moment(c, 5.0))
    assert out.counts().tolist() == [0, 1, 1]
    assert float(out.loss) == pytest.approx(0.81 + 5 * 2)
    threshold = sae.threshold
    of_threshold = torch.autograd.grad(out.loss, sae.log_threshold)[0] / (threshold * 10)  # d theta = 10 theta d(log / 10)
    # dL/df_0 = 2 (0 - 0.9), f_1 has error 0: -(theta / eps) K dL/df - (lambda / eps) K
    assert of_threshold.tolist() == pytest.approx([1.8 / 0.5 - 5 / 0.5, -5 / 0.5, 0.0])


def test_the_pre_act_loss_equals_the_plain_sum_over_all_latents():
    c = config("jumprelu", pre_act_coefficient=1.0, bandwidth=0.3)
    sae, x = fresh(c), rows_for(c)
    out = sae.training_loss(x, Moment(c, 0.0))
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    wanted = (torch.relu(sae.threshold - z) * sae.W_dec.norm(dim=1)).sum(1).mean()
    assert float(out.parts["pre_act"]) == pytest.approx(float(wanted), rel=1e-5)
    assert float(out.loss) == pytest.approx(float(out.mse + wanted), rel=1e-5)


def test_p_annealing_keeps_the_penalty_of_a_batch_when_p_changes():
    c = config("p_anneal", p_start_fraction=0.0, steps=50)
    sae, x = fresh(c), rows_for(c)
    assert PAnnealSAE.p(0, c) == 1
    assert PAnnealSAE.p(40, c) == pytest.approx(0.2)

    class Found:
        parts = sae.training_loss(x, Moment(c, 1.0, step=20)).parts

    sae.after_step(c, Found())
    after = sae.training_loss(x, Moment(c, 1.0, step=21))
    assert float(sae.scale * after.parts["sparsity"]) == pytest.approx(float(Found.parts["sparsity"]), rel=1e-5)
    f = sae.encode(x) * sae.W_dec.norm(dim=1)
    assert float(after.parts["sparsity"]) == pytest.approx(float((f[f > 0] ** PAnnealSAE.p(21, c)).sum() / len(x)), rel=1e-4)


def test_matryoshka_prefixes_reconstruct_by_themselves():
    c = config("matryoshka", prefixes=(8, 24, 48))
    sae, x = fresh(c), rows_for(c)
    out = sae.training_loss(x, Moment(c))
    f = out.latents.dense()
    errors = [float((f[:, :m] @ sae.W_dec[:m] + sae.b_dec - x).square().sum(1).mean()) for m in (8, 24, 48)]
    assert float(out.loss) == pytest.approx(sum(errors) / 3, rel=1e-5)
    assert float(out.mse) == pytest.approx(errors[-1], rel=1e-5)


def test_random_prefixes_are_drawn_by_step_and_short_ones_most():
    c = config("matryoshka", random_prefixes=6, d_sae=4096)
    drawn = [prefixes_of(c, step) for step in range(400)]
    assert drawn[3] == prefixes_of(c, 3) != drawn[4]
    assert all(p[-1] == 4096 and list(p) == sorted(set(p)) and p[0] >= 1 for p in drawn)
    one = config("matryoshka", random_prefixes=2, d_sae=4096)
    inner = torch.tensor([prefixes_of(one, step)[0] for step in range(2000)]).float()
    # P(m <= 16) of a Pareto of power 1/2 cut at 4096 is (1 - 1/4) / (1 - 1/64), m rounded down from up to 17
    assert float((inner <= 16).float().mean()) == pytest.approx((1 - 17**-0.5) / (1 - 1 / 64), abs=0.03)


def test_a_crosscoder_pays_for_its_decoders_at_all_hooks():
    c = config("standard", hook=("a", "b"))
    sae, x = fresh(c), rows_for(c)
    out = sae.training_loss(x, Moment(c, 1.0))
    norms = sae.W_dec[:, :D].norm(dim=1) + sae.W_dec[:, D:].norm(dim=1)
    assert float(out.l1) == pytest.approx(float((sae.encode(x) @ norms).mean()), rel=1e-5)


def test_a_cross_layer_transcoder_writes_to_its_own_layer_and_later_ones():
    c = config("topk", hook=("a", "b"), hook_out=("c", "d"))
    sae = fresh(c)
    x = rows_for(c)[:, : 2 * D]
    f = sae.encode(x)
    first, second = f.chunk(2, dim=1)
    assert torch.equal(second, sae.layers[1].encode(x[:, D:]))
    y = sae.decode(f)
    wanted = torch.cat([first @ sae.layers[0].W_dec[:, :D], first @ sae.layers[0].W_dec[:, D:] + second @ sae.layers[1].W_dec], 1)
    assert torch.allclose(y, wanted + sae.layers[0].b_dec, atol=1e-5)


def test_ghost_gradients_by_hand():
    """One dead latent along x_1, z = 0: exp 1; the residual (x_hat - x) has norm 2, so the ghost has norm 1."""
    out = Reconstruction(torch.tensor([[0.0, -2.0]]), torch.tensor([4.0]))
    W_enc, W_dec = torch.zeros(2, 1, requires_grad=True), torch.tensor([[0.0, 3.0]], requires_grad=True)
    dead = Dead(torch.tensor([0]), torch.tensor([True]))
    loss = ghost_loss(torch.tensor([[1.0, 1.0]]), out, dead, DenseOps(), W_enc, torch.zeros(1), W_dec, None)
    assert float(loss) == pytest.approx(4.0)  # (1 - 2)^2 = 1, brought to the size of the SAE's own error
    loss.backward()
    assert W_enc.grad[:, 0].tolist() == pytest.approx([4 * -2.0, 4 * -2.0])  # d/dz of 4 (e^z - 2)^2 at 0, times x


# --- what they are for


@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("p_anneal", {"target_l0": 2.0}), ("gated", {"target_l0": 2.0}), ("matryoshka", {"k": 2, "prefixes": (36, 48)}),
        ("jumprelu", {"target_l0": 2.0}),
    ],
)  # fmt: skip
def test_a_planted_dictionary_is_recovered(architecture, own):
    sae = train(planted(100, 256), config(architecture, steps=800, batch_size=256, lr=4e-3, **own))
    atoms = torch.nn.functional.normalize(normal(24, D, seed=99), dim=1)
    best = (atoms @ torch.nn.functional.normalize(sae.W_dec, dim=1).T).max(1).values
    assert float((best > 0.9).float().mean()) > 0.7, sorted(best.tolist())[:8]


@pytest.mark.parametrize(
    ("architecture", "target"),
    [
        ("standard", 3.0), ("standard", 6.0), ("jumprelu", 3.0), ("jumprelu", 5.0), ("gated", 3.0), ("p_anneal", 3.0),
        ("quadratic", 3.0), ("quadratic", 5.0),
    ],
)  # fmt: skip
def test_target_l0_is_met_within_five_percent(architecture, target):
    own = {"l0_penalty": "quadratic"} if architecture == "quadratic" else {}
    architecture = "jumprelu" if own else architecture
    c = config(architecture, target_l0=target, steps=800, batch_size=256, lr=4e-3, **own)
    sae = train(planted(100, 256), c)
    x = torch.cat(planted(8, 256, seed=5))
    assert float((sae.encode(x) > 0).sum(1).float().mean()) == pytest.approx(target, rel=0.05)


def test_the_controller_holds_a_simple_plant_at_its_target():
    """L0 follows coefficient^-1 with a lag of 30 steps: from 30 to 200 and to 5."""
    for target in (200.0, 5.0):
        c = config("standard", d_sae=4096, target_l0=target, steps=2000)
        controller, level = Coefficient([c], torch.device("cpu")), math.log(30.0)
        for step in range(c.steps):
            strength = float(controller.at(step))
            level += (math.log(30.0 / max(strength, 1e-6)) - level) / 30
            controller.update(torch.tensor(math.exp(level) * 64), 64)
        assert math.exp(level) == pytest.approx(target, rel=0.02)


def test_no_two_latents_start_anew_from_the_same_input():
    """They would stay equal for ever. Five rows are left for 24 dead latents: the rest wait for another turn."""
    c = config("standard", revive="resample")
    sae, x = fresh(c), rows_for(c)
    idle = IdleTokens(torch.where(torch.arange(LATENTS) % 2 == 0, c.dead_window_tokens + torch.arange(LATENTS), 0),
                      c.dead_window_tokens)  # fmt: skip
    error = torch.zeros(len(x))
    error[[2, 5, 8, 11, 30]] = torch.tensor([1.0, 1.0, 1.0, 50.0, 1.0])
    before = sae.W_dec.detach().clone()
    assert resample(sae, adam_of(sae, c), idle, x, error, c, step=7) == 5
    changed = (sae.W_dec != before).any(1).nonzero().squeeze(1)
    assert changed.tolist() == [38, 40, 42, 44, 46]  # those idle for longest
    assert len(torch.unique(sae.W_dec[changed], dim=0)) == 5


def test_resampling_starts_dead_latents_anew_from_what_is_modelled_badly():
    c = config("standard", revive="resample")
    sae, x = fresh(c), rows_for(c)
    adam = adam_of(sae, c)
    for moment in (*adam.m.values(), *adam.v.values()):
        moment.fill_(1.0)
    idle = IdleTokens(torch.where(torch.arange(LATENTS) % 4 == 1, c.dead_window_tokens, 0), c.dead_window_tokens)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    error = torch.zeros(len(x))
    bad = torch.arange(5, 5 + LATENTS // 4)
    error[bad] = 1.0
    assert resample(sae, adam, idle, x, error, c, step=7) == LATENTS // 4
    dead = torch.arange(LATENTS) % 4 == 1
    directions = torch.nn.functional.normalize(x[bad] - sae.b_dec, dim=1)
    cosine = torch.nn.functional.normalize(sae.W_dec[dead], dim=1) @ directions.T
    assert torch.allclose(cosine.max(1).values, torch.ones(LATENTS // 4), atol=1e-5)
    assert torch.allclose(sae.W_dec[dead].norm(dim=1), before["W_dec"][~dead].norm(dim=1).mean().expand(LATENTS // 4))
    assert torch.allclose(sae.W_enc[:, dead].norm(dim=0), 0.2 * before["W_enc"][:, ~dead].norm(dim=0).mean().expand(LATENTS // 4))
    assert not sae.b_enc[dead].any()
    for name in ("W_enc", "W_dec", "b_enc"):
        rows = adam.m[name] if name != "b_enc" else adam.m[name].T
        assert not rows[dead].any()
        assert rows[~dead].all()
    assert torch.equal(sae.W_dec[~dead], before["W_dec"][~dead])
    assert torch.equal(sae.W_enc[:, ~dead], before["W_enc"][:, ~dead])
    assert not idle.tokens.any()


def test_resampling_happens_in_training_and_is_counted(tmp_path):
    """A bias of -5 kills all latents but a few: with resampling they come back."""
    changes = {"l1_coefficient": 8.0, "lr": 2e-2, "steps": 200, "dead_window_tokens": 20 * 128, "log_every": 1}
    last = {}
    for revive in ("none", "resample"):
        path = tmp_path / revive
        train(planted(), config("standard", **changes, revive=revive, resample_every_tokens=40 * 128), metrics=path)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        last[revive] = lines[-1], sum(line.get("resampled", 0) for line in lines)
    assert last["none"][1] == 0
    assert last["resample"][1] > 0


# --- what is wrong is said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "jumprelu", "k": 4}, "train.k: 4 given, but architecture jumprelu has none; set l0_coefficient"),
        ({"architecture": "topk", "k": 4, "target_l0": 5}, "train.target_l0: 5 given, but topk fires k = 4"),
        ({"target_l0": 48}, "train.target_l0: 48 given; must be below d_sae = 48"),
        ({"architecture": "jumprelu", "l0_penalty": "quadratic"}, "train.target_l0: missing"),
        ({"architecture": "jumprelu", "l0_penalty": "step", "target_l0": 4}, "penalty step answers too slowly"),
        ({"bandwidth": 0.1}, "train.bandwidth: given, but only jumprelu"),
        ({"architecture": "topk", "k": 49}, "train.k: 49 given, but there are only d_sae = 48"),
        ({"architecture": "matryoshka", "k": 2, "prefixes": (8, 64)}, r"train.prefixes: \[8, 64\] given; must rise, and end at"),
        ({"architecture": "matryoshka", "k": 2, "prefixes": (8, 24)}, "the last is 24; it must be d_sae = 48"),
        ({"architecture": "matryoshka", "k": 2, "prefixes": (48,), "random_prefixes": 3}, "train.random_prefixes: given beside"),
        ({"hook": ("a",)}, "a list of 1"),
        ({"hook": ("a", "a")}, "name each hook once"),
        ({"hook": ("a", "b"), "hook_out": "c"}, "train.hook_out: 1 hooks given for 2"),
        ({"skip_connection": True}, "only transcoders have one"),
        ({"hook": "a", "hook_out": "b", "apply_b_dec_to_input": True}, "b_dec is of what a transcoder predicts"),
        ({"hook": "a", "hook_out": "b", "revive": "resample"}, "for transcoders take auxk or ghost"),
        ({"architecture": "gated", "hook": ("a", "b"), "hook_out": ("c", "d")}, "a cross-layer transcoder takes standard"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_training(changes, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**{"d_sae": 48, "steps": 1, **changes})


def test_a_batch_of_the_wrong_number_of_hooks_is_refused():
    with pytest.raises(InputError, match=r"1 tensors a batch, but train.hook and train.hook_out name 2 hooks"):
        train(planted(), config(hook="a", hook_out="b"))


def test_a_row_that_is_not_finite_is_named_and_the_checkpoint_kept(tmp_path):
    batches = planted(60)
    batches[44][17, 3] = float("inf")
    message = r"step 45, row 17 of the batch has inf in column 3; the checkpoint .*step-000000040"
    with pytest.raises(FloatingPointError, match=message):
        train(batches, config("standard"), checkpoints=tmp_path)
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == ["step-000000040"]
    batches[44][17, 3] = 0.0
    train(batches, config("standard"), checkpoints=tmp_path)


def test_a_collapse_and_a_spike_are_said_while_they_happen(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    train(planted(), config("standard", l1_coefficient=3000.0, lr=0.1, l1_warmup_fraction=0.01), metrics=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    said = [line["warning"] for line in lines if "warning" in line]
    assert len(said) == 1
    assert "no latent fires (L0 = 0)" in said[0]
    assert "no latent fires" in caplog.text
    batches = planted(60)
    for batch in batches[34:36]:
        batch *= 5
    train(batches, config("standard", log_every=1), metrics=path.with_name("spike.jsonl"))
    lines = [json.loads(line) for line in path.with_name("spike.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "warning" in line] == [35]
    assert "the loss jumped" in lines[34]["warning"]


# --- baselines


def test_principal_components_are_those_of_scikit_learn(tmp_path):
    from sklearn.decomposition import PCA

    from sae import SAE

    x = torch.cat(planted(4)) + 2.0
    sae = DirectionsSAE.pca(x, 5, hook="blocks.0.hook_resid_post")
    theirs = PCA(5).fit(x.double().numpy())
    coordinates = torch.from_numpy(theirs.transform(x.double().numpy())).float()
    signs = torch.sign((sae.encode(x) * coordinates).sum(0))
    assert torch.allclose(sae.encode(x) * signs, coordinates, atol=1e-4)
    assert torch.allclose(sae(x), torch.from_numpy(theirs.inverse_transform(coordinates.double().numpy())).float(), atol=1e-4)
    sae.save(tmp_path / "pca")
    assert torch.equal(SAE.load(tmp_path / "pca")(x), sae(x))
    with pytest.raises(InputError, match="d_sae: 13 given; 512 rows of 12 have 12 principal components"):
        DirectionsSAE.pca(x, 13)


def test_random_directions_project():
    x = normal(50, D)
    few, many = DirectionsSAE.random(D, 5, seed=1), DirectionsSAE.random(D, 40, seed=1)
    assert torch.allclose(few.W_dec.norm(dim=1), torch.ones(5))
    residual = x - few(x)
    assert float((residual @ few.W_dec.T).abs().max()) < 1e-4  # what is left is orthogonal to all of them
    assert torch.allclose(many(x), x, atol=1e-4)
    assert not torch.equal(few.W_dec, DirectionsSAE.random(D, 5, seed=2).W_dec)
