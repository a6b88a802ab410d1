"""Training: the loss by hand, gradients, recovery of a planted dictionary, resume bit for bit, metrics."""

import json

import pytest
import torch

from activation_store.errors import InputError
from sae import TrainConfig, train
from sae.adam import Adam
from sae.architectures.standard import StandardSAE
from sae.ops import kernels_for
from sae.sae import Moment, SAEConfig, Site
from sae.stack import learning_rate_factor


def planted(n_true=40, d=32, count=40, batch=512, seed=0):
    """Sparse non-negative codes of unit-norm atoms: what an SAE should find."""
    g = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(n_true, d, generator=g), dim=1)
    batches = []
    for _ in range(count):
        codes = (torch.rand(batch, n_true, generator=g) < 0.08) * (1 + torch.rand(batch, n_true, generator=g))
        batches.append(codes @ atoms)
    return atoms, batches


def config(**changes) -> TrainConfig:
    base = {"d_sae": 32, "steps": 60, "batch_size": 64, "l1_coefficient": 1.0, "lr": 3e-3}
    return TrainConfig(**{**base, "log_every": 10, "checkpoint_every": 20, **changes})


def small_batches(count=30, batch=64, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, d, generator=g) + 3 for _ in range(count)]


def hand_sae() -> StandardSAE:
    sae = StandardSAE(SAEConfig("standard", 2, 2, apply_b_dec_to_input=False))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.b_enc.zero_()
        sae.W_dec.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))  # norms 5 and 0.5
        sae.b_dec.zero_()
    return sae


@torch.no_grad()
def test_the_loss_by_hand():
    # x = (1, 2): f = (1, 2); x_hat = (3, 4) + (0, 1) = (3, 5); error (2, 3), squared 13
    x = torch.tensor([[1.0, 2.0]])
    out = hand_sae().training_loss(x, Moment(config(), 0.5))
    assert float(out.mse) == 13.0
    assert float(out.l1) == pytest.approx(1 * 5 + 2 * 0.5)
    assert float(out.loss) == pytest.approx(13 + 0.5 * 6)
    out = hand_sae().training_loss(x, Moment(config(sparsity_norm="unit_norm"), 0.5))
    assert float(out.l1) == 3.0


@torch.no_grad()
def test_the_loss_cannot_be_gamed_by_scale():
    x = torch.tensor([[1.0, 2.0]])
    sae, gamed = hand_sae(), hand_sae()
    gamed.W_enc.div_(7)  # f / 7 and 7 d: the same reconstruction
    gamed.W_dec.mul_(7)
    found, wanted = (float(kind.training_loss(x, Moment(config(), 1.0)).loss) for kind in (gamed, sae))
    assert found == pytest.approx(wanted)


def test_unit_norm_keeps_rows_through_training():
    batches = small_batches()
    sae = StandardSAE.initialise(config(sparsity_norm="unit_norm"), Site((8,)), torch.zeros(8))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    adam = Adam(
        dict(sae.named_parameters()), sae.encoders(), sae.decoders(), kernels_for("cpu"), betas=(0.9, 0.999), max_norm=1.0,
        unit=True, compute_dtype="float32",
    )  # fmt: skip
    for x in batches[:5]:
        sae.training_loss(x, Moment(config(sparsity_norm="unit_norm"), 1.0)).loss.backward()
        adam.step(1e-2)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))


@pytest.mark.parametrize("norm", ["decoder_norm", "unit_norm"])
def test_a_planted_dictionary_is_recovered(norm):
    atoms, batches = planted()
    sae = train(batches, config(d_sae=64, steps=900, batch_size=512, l1_coefficient=0.3, lr=3e-3, sparsity_norm=norm))
    best = (atoms @ torch.nn.functional.normalize(sae.W_dec, dim=1).T).amax(1)
    assert float((best > 0.95).float().mean()) > 0.9
    x = batches[0]
    assert float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()) < 0.1


def test_the_returned_sae_takes_raw_activations():
    batches = [100 * b for b in small_batches()]
    sae = train(batches, config(l1_coefficient=0.01, steps=400))
    x = batches[0]
    assert float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()) < 0.2
    scale = sae.cfg.metadata["training"]["input_scale"]
    assert scale == pytest.approx(8**0.5 / float(x.norm(dim=1).mean()))


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    one, two = (train(small_batches(), config(steps=20)) for _ in range(2))
    other = train(small_batches(), config(steps=20, seed=1))
    assert torch.equal(one.W_enc, two.W_enc)
    assert not torch.equal(one.W_enc, other.W_enc)


def test_bfloat16_compute_keeps_float32_masters_and_stays_near():
    one = train(small_batches(), config(steps=50))
    two = train(small_batches(), config(steps=50, compute_dtype="bfloat16"))
    assert two.W_enc.dtype == torch.float32
    assert not torch.equal(one.W_enc, two.W_enc)
    x = small_batches()[0]
    assert float((one(x) - two(x)).norm() / one(x).norm()) < 0.05


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [5, 20, 33, 59])
def test_a_killed_training_ends_in_the_same_bits(tmp_path, at):
    whole = train(small_batches(), config(), metrics=tmp_path / "whole.jsonl")

    def dying():
        for number, batch in enumerate(small_batches() * 2):
            if number == at:
                raise Killed
            yield batch

    with pytest.raises(Killed):
        train(dying(), config(), checkpoints=tmp_path / "checkpoints", metrics=tmp_path / "resumed.jsonl")
    again = train(small_batches(), config(), checkpoints=tmp_path / "checkpoints", metrics=tmp_path / "resumed.jsonl")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(whole, name), getattr(again, name)), name
    lines = [[json.loads(line) for line in (tmp_path / f).read_text().splitlines()] for f in ("whole.jsonl", "resumed.jsonl")]
    for a, b in zip(*lines, strict=True):
        for line in (a, b):
            del line["tokens_per_second"], line["waiting"]
        assert a == b


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    def dying():
        yield from small_batches()
        raise Killed

    with pytest.raises(Killed):
        train(dying(), config(), checkpoints=tmp_path)
    with pytest.raises(InputError, match=r"l1_coefficient 1.0 -> 2.0"):
        train(small_batches(), config(l1_coefficient=2.0), checkpoints=tmp_path)


def test_metrics_have_every_promised_field(tmp_path):
    train(small_batches(), config(dead_window_tokens=100), metrics=tmp_path / "metrics.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert [line["tokens"] for line in lines] == [640 * i for i in range(1, 7)]
    fields = {"step", "tokens", "loss", "mse", "l1", "l0", "explained_variance", "dead_fraction", "tokens_per_second", "waiting"}
    assert all(fields <= set(line) for line in lines)
    assert all(line["tokens_per_second"] > 0 for line in lines)
    last = lines[-1]
    assert last["loss"] == pytest.approx(last["mse"] + last["coefficient"] * last["l1"], rel=1e-5)


def test_dead_latents_are_counted_in_tokens(tmp_path):
    """A latent that cannot fire is dead once 128 tokens have passed: after 2 batches of 64, and not after 1."""
    batches = [torch.zeros(64, 4) + torch.tensor([1.0, 0, 0, 0])] * 3
    for steps, expected in ((1, 0.0), (2, 1.0)):
        path = tmp_path / f"{steps}.jsonl"
        # one constant input, centred to zero: every pre-activation is b_enc = 0, so nothing ever fires
        train(batches, config(d_sae=8, steps=steps, log_every=1, dead_window_tokens=128, lr=1e-9), metrics=path)
        assert json.loads(path.read_text().splitlines()[-1])["dead_fraction"] == expected


def test_bad_batches_and_configs_are_refused():
    with pytest.raises(InputError, match=r"train.d_in: 9 given, but the activations are 8 wide"):
        train(small_batches(), config(d_in=9))
    with pytest.raises(InputError, match="ended after 5 of 60 steps"):
        train(iter(small_batches(5)), config())
    with pytest.raises(InputError, match="mean activation norm"):
        train([torch.zeros(4, 8)], config())
    broken = small_batches()
    broken[7] = broken[7] * float("nan")
    with pytest.raises(FloatingPointError, match="step 8, row 0 of the batch has nan"):
        train(broken, config())


def test_schedules():
    c = config(steps=100, lr_warmup_fraction=0.1, lr_decay_fraction=0.2)
    factors = [learning_rate_factor(step, c) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:81] == [1.0] * 72
    assert factors[-1] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.ones(4, 3, 2), r"batches: \(4, 3, 2\) torch.float32 given; give \(batch, d_in\)"),
        (torch.ones(4, 3, dtype=torch.int64), r"batches: \(4, 3\) torch.int64 given"),
    ],
)
def test_batches_of_another_shape_or_kind_are_refused(batch, said):
    with pytest.raises(InputError, match=said):
        train([batch], TrainConfig(d_sae=8, steps=2))


def test_a_mean_of_another_width_is_refused():
    with pytest.raises(InputError, match=r"mean: \(5,\) given for activations 3 wide"):
        train([torch.randn(4, 3)], TrainConfig(d_sae=8, steps=2), mean=torch.zeros(5), mean_norm=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batches_of_other_precision_are_taken_as_float32(dtype):
    batches = [torch.randn(64, 6, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    config = TrainConfig(d_sae=16, steps=5, lr=1e-3)
    assert torch.equal(train(batches, config).W_enc, train([b.float() for b in batches], config).W_enc)


def test_settings_that_mean_nothing_are_said(caplog):
    c = TrainConfig(architecture="topk", k=2, d_sae=8, steps=1, l1_coefficient=3.0, resample_every_tokens=5)
    assert c.ignored() == ["l1_coefficient", "resample_every_tokens"]
    train([torch.randn(8, 4)], c)
    assert "train.l1_coefficient, train.resample_every_tokens: given, and of no meaning to topk here" in caplog.text
    assert TrainConfig(architecture="topk", k=2, d_sae=8, steps=1, auxk_coefficient=0).ignored() == []
    assert TrainConfig(d_sae=8, steps=1, l1_coefficient=3.0).ignored() == []
    with pytest.raises(ValueError, match="less than 1"):
        TrainConfig(d_sae=8, steps=1, adam_betas=(0.9, 1.5))


def test_a_first_batch_that_is_not_finite_is_named_by_row():
    batch = torch.randn(8, 4)
    batch[3, 1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"activations are not finite: step 1, row 3 of the batch has inf in column 1"):
        train([batch], TrainConfig(d_sae=8, steps=2))


def test_of_a_generator_no_row_is_named_and_none_cleared():
    def batches():
        for number in range(100):
            x = torch.randn(16, 4)
            x[2, 2] = float("nan") if number == 7 else 0.0
            yield x

    with pytest.raises(FloatingPointError, match="cannot be looked up, for the batches cannot be read twice"):
        train(batches(), TrainConfig(d_sae=8, steps=50, log_every=5))
