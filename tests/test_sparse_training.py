"""Training where latents fire: the weights of plain dense training, switches, dead latents, resuming, and memory."""

import json
import logging
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from activation_store.errors import InputError
from sae import SAE, TrainConfig, train
from sae.adam import Adam
from sae.architectures import ARCHITECTURES
from sae.architectures.auxk import Dead, IdleTokens
from sae.architectures.identity import IdentitySAE
from sae.architectures.topk import TopKSAE
from sae.dense_or_sparse import LIMITS, DenseOrSparse, part_rows
from sae.ops import kernels_for
from sae.ops.kernels import DenseTerm
from sae.sae import SAEConfig, Site


@pytest.fixture(autouse=True)
def one_thread():
    """Steps are tiny here: two threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

ENTER, LEAVE = 0.10, 0.14


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Limits that the crafted batches below lie around, wherever measurement has put the true ones."""
    monkeypatch.setitem(LIMITS["cpu"], "float32", (ENTER, LEAVE))



def planted(count=60, batch=64, d=16, n_true=30, seed=0, fires=0.08):
    """Sparse codes of unit-norm atoms; the atoms are the same for every seed."""
    atoms = torch.nn.functional.normalize(torch.randn(n_true, d, generator=torch.Generator().manual_seed(99)), dim=1)
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        codes = (torch.rand(batch, n_true, generator=g) < fires) * (1 + torch.rand(batch, n_true, generator=g))
        batches.append(codes @ atoms + torch.randn(batch, d, generator=g) / 50)
    return batches


def config(architecture="topk", **changes) -> TrainConfig:
    base = {"architecture": architecture, "d_sae": 64, "steps": 60, "batch_size": 64, "lr": 3e-3, "log_every": 1}
    base |= {"l1_coefficient": 2.0, "lr": 2e-2, "d_sae": 256} if architecture == "standard" else {"k": 4}
    return TrainConfig(**{**base, "checkpoint_every": 20, **changes})


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def near(found, wanted, tolerance, what=""):
    difference = float((found - wanted).abs().max())
    assert difference <= tolerance * float(wanted.abs().max()), f"{what}: {difference}"


def same_bits(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


KINDS = {
    "standard": {"architecture": "standard"},
    "unit-norm": {"architecture": "standard", "sparsity_norm": "unit_norm", "l1_coefficient": 4.0},
    "topk": {"architecture": "topk"},
    "batchtopk": {"architecture": "batchtopk"},
    "auxk": {"architecture": "topk", "dead_window_tokens": 300, "k": 2},
    "no-shift": {"architecture": "topk", "apply_b_dec_to_input": False},
}


# --- the weights of plain dense training


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_training_ends_in_the_weights_of_plain_dense_training(tmp_path, kind):
    torch.set_num_threads(1 if kind == "auxk" else 2)
    one = train(planted(), config(**KINDS[kind]), metrics=tmp_path / "one.jsonl")
    other = train(planted(), config(**KINDS[kind], kernels="reference"), metrics=tmp_path / "other.jsonl")
    for name, value in one.state_dict().items():
        wanted = other.state_dict()[name]
        assert (value - wanted).norm() <= 1e-4 * wanted.norm(), name
    lines = read_lines(tmp_path / "one.jsonl"), read_lines(tmp_path / "other.jsonl")
    assert sum(line["sparse"] for line in lines[0]) >= 20
    assert not any(line["sparse"] for line in lines[1])
    for found, wanted in zip(*lines, strict=True):
        for name in ("loss", "mse", "l1", "l0", "explained_variance", "dead_fraction", *(["auxk"] if "auxk" in found else [])):
            assert found[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-4), (name, found["step"])
    assert any("auxk" in line for line in lines[0]) == (kind == "auxk")


@pytest.mark.parametrize("kind", ["unit-norm", "topk", "batchtopk"])
def test_with_a_bfloat16_product_training_ends_close(kind):
    changes = KINDS[kind] | {"steps": 120}
    saes = [train(planted(), config(**changes, **dtype)) for dtype in ({}, {"compute_dtype": "bfloat16"})]
    x = planted(1, 512, seed=5)[0]
    assert not torch.equal(saes[0].W_enc, saes[1].W_enc)
    left = [float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()) for sae in saes]
    assert left[1] == pytest.approx(left[0], rel=0.1)
    assert all(value.dtype == torch.float32 for value in saes[1].state_dict().values())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_batch_that_is_not_finite_is_named_with_its_step(architecture):
    batches = planted()
    batches[7] = batches[7] * float("nan")
    with pytest.raises(FloatingPointError, match="step 8, row 0 of the batch has nan in column 0"):
        train(batches, config(architecture))


# --- k


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk", "k": None}, "train.k: missing; topk"),
        ({"architecture": "batchtopk", "k": None}, "train.k: missing; batchtopk"),
        ({"architecture": "topk", "k": 65}, "k: 65 given, but there are only d_sae = 64"),
        ({"architecture": "topk", "k": 0}, "k\n.*greater than or equal to 1"),
        ({"architecture": "standard", "k": 4}, "k: 4 given, but architecture standard has none"),
        ({"architecture": "gated"}, "architecture"),
    ],
)
def test_a_k_that_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_in_a_config_file_the_refusal_names_the_section_too(tmp_path):
    from monosem.config import load_config

    path = Path(__file__).parents[1] / "configs" / "gpt2-small.yaml"
    for overrides, message in (
        (["train.architecture=topk"], r"train\.k: missing"), (["train.k=4"], r"train\.k: 4 given"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_config(path, overrides)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_k_of_all_latents_trains(architecture):
    sae = train(planted(10), config(architecture, d_sae=5, k=5, steps=10))
    assert all(value.isfinite().all() for value in sae.state_dict().values())


# --- dense or sparse


def test_an_l1_run_starts_dense_and_says_when_it_turns_sparse(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "sae"):
        train(planted(), config("standard"), metrics=tmp_path / "metrics.jsonl")
    lines = read_lines(tmp_path / "metrics.jsonl")
    sparse = [line["sparse"] for line in lines]
    turn = sparse.index(1.0)
    assert sparse == [0.0] * turn + [1.0] * (60 - turn)
    assert turn > 1
    density = lines[turn - 1]["l0"] / 256
    assert density <= ENTER < lines[turn - 2]["l0"] / 256
    messages = [record.getMessage() for record in caplog.records if record.name == "sae.dense_or_sparse"]
    assert messages == [f"step {turn}: {100 * density:.1f} % of latents fire; steps are sparse from here on"]


def switchable(**changes):
    """An SAE whose latents are its 100 inputs, and a batch of which a given share fires."""
    c = config("standard", d_sae=100, **changes)
    sae = ARCHITECTURES["standard"](SAEConfig("standard", 100, 100, apply_b_dec_to_input=True))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(100))
        sae.W_dec.copy_(torch.eye(100) / 2)
        sae.b_enc.fill_(-0.5)
        sae.b_dec.zero_()
    adam = adam_of(sae, c)
    return c, sae, adam, DenseOrSparse(c, adam)


def adam_of(sae, c):
    return Adam(
        dict(sae.named_parameters()), sae.encoders(), sae.decoders(), kernels_for("cpu", c.kernels == "reference"),
        betas=c.adam_betas, max_norm=c.max_grad_norm, unit=c.unit_norm_decoder, compute_dtype="float32",
    )  # fmt: skip


def firing(count):
    x = torch.zeros(10, 100)
    for row in x:
        row[torch.randperm(100, generator=torch.Generator().manual_seed(count))[:count]] = 1.0 + torch.arange(count) / count
    return x


def gradients(sae, adam):
    """Every gradient, whichever way it was left."""
    found = {}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name not in adam.rows:
                found[name] = parameter.grad.clone()
                continue
            out, slots, _ = adam._gradient(name, parameter)
            whole = torch.zeros_like(adam.rows[name].weight)
            mask = torch.ones(len(whole), dtype=torch.bool) if slots is None else slots >= 0
            whole[mask] = out if slots is None else out[slots[mask]]
            found[name] = whole
    return found


def test_a_run_turns_sparse_below_enter_and_dense_above_leave(caplog):
    c, sae, adam, way = switchable()
    assert ENTER < 0.12 < LEAVE < 0.15
    turns = [(50, False), (11, False), (9, False), (9, True), (12, True), (13, True), (12, True), (15, False), (13, False),
             (11, False), (9, False), (3, True), (90, False), (3, False), (3, True)]  # fmt: skip
    with caplog.at_level(logging.INFO, "sae"):
        for step, (count, sparse) in enumerate(turns):
            found = way.backward(sae, firing(count), c, 1.0, lambda: None, step)
            assert found.sparse == sparse, (step, count)
            assert found.density == pytest.approx(count / 100)
            assert found.counts.sum() == 10 * count
            adam.clear()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"step {i}" for i in (3, 8, 11, 13, 14)]


@pytest.mark.parametrize("count", [15, 90])
def test_a_step_that_is_too_dense_is_computed_again_and_is_the_references(count):
    c, sae, adam, way = switchable()
    way.backward(sae, firing(5), c, 1.0, lambda: None, 0)
    adam.clear()
    assert not way.dense
    found = way.backward(sae, firing(count), c, 1.0, lambda: None, 1)
    assert not found.sparse
    assert way.dense
    assert all(isinstance(term, DenseTerm) for name in ("W_enc", "W_dec") for term in adam.rows[name].terms)
    reference, other, judge, plain = switchable(kernels="reference")
    wanted = plain.backward(other, firing(count), reference, 1.0, lambda: None, 1)
    for name in ("loss", "mse", "l1", "error", "counts"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    found, wanted = gradients(sae, adam), gradients(other, judge)
    for name in wanted:
        near(found[name], wanted[name], 1e-6, name)
        assert wanted[name].any()


def test_batches_much_larger_than_the_last_do_not_keep_batchtopk_dense():
    """The cut of a batch suggests where to look in the next one; where it misleads, it must be found anew."""
    c = config("batchtopk", d_sae=100, k=5)
    sae = ARCHITECTURES["batchtopk"].initialise(c, Site((16,)), torch.zeros(16))
    adam = adam_of(sae, c)
    way, sparse = DenseOrSparse(c, adam), []
    for step in range(8):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step)) * (1 if step < 4 else 8)
        found = way.backward(sae, x, c, 0.0, lambda: None, step)
        assert found.density == 0.05
        sparse.append(found.sparse)
        adam.clear()
    assert sparse[:4] == [True] * 4
    assert sparse[-2:] == [True] * 2


@pytest.mark.parametrize("count", [50, 5])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_rows_are_taken_in_parts(kernels, count, monkeypatch):
    """A dense step's and a sparse one's, against plain autograd over all of them."""
    c, sae, adam, way = switchable()
    way.dense = count == 50
    monkeypatch.setattr("sae.dense_or_sparse.part_rows", lambda *_: 3)  # and the last row with them
    found = way.backward(sae, firing(count), c, 1.0, lambda: None, 0)
    monkeypatch.undo()
    assert found.sparse == (count == 5)
    reference, other, judge, plain = switchable(kernels=kernels)
    wanted = plain.backward(other, firing(count), reference, 1.0, lambda: None, 0)
    assert not wanted.sparse
    for name in ("loss", "mse", "l1", "error", "counts"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
    assert found.density == wanted.density == count / 100
    for (name, mine), theirs in zip(gradients(sae, adam).items(), gradients(other, judge).values(), strict=True):
        near(mine, theirs, 1e-6, name)
        assert theirs.any()


def test_a_part_that_is_too_dense_undoes_those_before_it(monkeypatch):
    """The first rows fire 5 latents, the last ones 90: what the first parts left must not count twice."""
    x = torch.cat([firing(5), firing(90)])
    c, sae, adam, way = switchable()
    way.dense = False
    monkeypatch.setattr("sae.dense_or_sparse.part_rows", lambda *_: 5)
    found = way.backward(sae, x, c, 1.0, lambda: None, 0)
    assert not found.sparse
    reference, other, judge, plain = switchable(kernels="reference")
    plain.backward(other, x, reference, 1.0, lambda: None, 0)
    for (name, mine), theirs in zip(gradients(sae, adam).items(), gradients(other, judge).values(), strict=True):
        near(mine, theirs, 1e-6, name)


@pytest.mark.parametrize("kind", ["standard", "topk", "batchtopk"])
def test_float8_trains_as_well_as_float32(kind, monkeypatch):
    """Where there is no hardware for it, torch computes the same products slowly; monosem then refuses them."""
    changes = KINDS[kind]
    with pytest.raises(InputError, match=r"train\.compute_dtype: float8 needs a GPU of compute capability 9\.0"):
        train(planted(), config(**changes, compute_dtype="float8"))
    monkeypatch.setattr(sys.modules["sae.train"], "in_hardware", lambda device: True)
    errors = []
    for dtype in ("float32", "float8"):
        sae = train(planted(), config(**changes, compute_dtype=dtype))
        errors.append(float(sum((sae(x) - x).square().sum() for x in planted())))
    assert errors[0] * 0.8 < errors[1] < errors[0] * 1.2


def test_float8_has_no_reference():
    with pytest.raises(ValueError, match=r"train\.compute_dtype: float8 given, but kernels: reference"):
        config(compute_dtype="float8", kernels="reference")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_dense_steps_without_autograds_weight_gradients_are_the_references(architecture, dtype):
    """To 1e-6 in float32; in bfloat16 both take the same products, and sums of them differ by their rounding alone."""
    c = config(architecture, compute_dtype=dtype, **({"k": 9} if architecture == "topk" else {}))
    x, found = 1 + torch.randn(64, 16, generator=torch.Generator().manual_seed(3)), []  # around 1: no gradient is near zero
    for kernels in ("auto", "reference"):
        c = c.model_copy(update={"kernels": kernels})
        sae = ARCHITECTURES[architecture].initialise(c, Site((16,)), torch.zeros(16))
        adam = Adam(
            dict(sae.named_parameters()), sae.encoders(), sae.decoders(), kernels_for("cpu", kernels == "reference"),
            betas=c.adam_betas, max_norm=c.max_grad_norm, unit=c.unit_norm_decoder, compute_dtype=dtype,
        )  # fmt: skip
        step = DenseOrSparse(c, adam, dense=True).backward(sae, x, c, 3.0, lambda: None, 0)
        assert not step.sparse
        found.append((step, gradients(sae, adam)))
    (mine, left), (theirs, wanted) = found
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=tolerance, atol=0)
    for name in wanted:
        near(left[name], wanted[name], tolerance, name)


def test_parts_have_few_sizes_and_grow_as_less_fires():
    """oneDNN keeps a compiled product for every number of rows: sizes that follow the density ate memory step by step."""
    sizes = [part_rows(4608, "cpu", density / 1000) for density in range(1, 250)]
    assert sizes == sorted(sizes, reverse=True)
    assert set(sizes) == {256, 512, 1024, 2048, 4096, 8192, 16384}
    assert part_rows(10**6, "cpu", 0.2) == 256
    assert part_rows(4608, "cpu") == part_rows(10**6, "cpu") == 128


# --- resuming


class Killed(Exception):
    pass


def resumed(tmp_path, c, batches, at):
    """A run that dies at batch `at` and is started again."""

    def dying():
        yield from batches[:at]
        raise Killed

    with pytest.raises(Killed):
        train(dying(), c, checkpoints=tmp_path / "checkpoints", metrics=tmp_path / "resumed.jsonl")
    return train(batches, c, checkpoints=tmp_path / "checkpoints", metrics=tmp_path / "resumed.jsonl")


def same_lines(one, other):
    for lines in (one, other):
        for line in lines:
            del line["tokens_per_second"], line["waiting"]
    assert one == other


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "at"), [("topk", 33), ("batchtopk", 45), ("batchtopk", 21), ("auxk", 47), ("auxk", 59)])
def test_a_killed_training_ends_in_the_same_bits(tmp_path, kind, at, dtype):
    c, batches = config(**KINDS[kind], compute_dtype=dtype), planted()
    whole = train(batches, c, metrics=tmp_path / "whole.jsonl")
    again = resumed(tmp_path, c, batches, at)
    same_bits(whole, again)
    same_lines(read_lines(tmp_path / "whole.jsonl"), read_lines(tmp_path / "resumed.jsonl"))


@pytest.mark.parametrize("distance", [-2, -1, 0, 1, 3])
def test_killed_about_the_turn_to_sparse_it_ends_in_the_same_bits(tmp_path, distance):
    c, batches = config("standard"), planted()
    whole = train(batches, c, metrics=tmp_path / "whole.jsonl")
    turn = [line["sparse"] for line in read_lines(tmp_path / "whole.jsonl")].index(1.0)
    c = c.model_copy(update={"checkpoint_every": turn + distance})
    again = resumed(tmp_path, c, batches, turn + distance + 1)
    same_bits(whole, again)
    same_lines(read_lines(tmp_path / "whole.jsonl"), read_lines(tmp_path / "resumed.jsonl"))


@pytest.mark.parametrize("at", [32, 45])
def test_batchtopk_resumed_after_batches_of_another_scale_ends_in_the_same_bits(tmp_path, at):
    """A resumed run does not know the last cut; which way a step is computed must not depend on it."""
    c = config("batchtopk", d_sae=100, k=5, checkpoint_every=31 if at == 32 else 20)
    batches = [b * (1 if number < 31 else 8) for number, b in enumerate(planted(fires=0.5))]
    whole = train(batches, c)
    same_bits(whole, resumed(tmp_path, c, batches, at))


SIGKILLED = {
    "topk": {},
    "jumprelu": {"k": None, "target_l0": 4.0, "revive": "auxk"},
    "matryoshka": {"random_prefixes": 3},
    "gated": {"k": None, "target_l0": 4.0},
}


def sigkilled_config(kind):
    steps = 600 if kind == "topk" else 200
    common = {"steps": steps, "checkpoint_every": 15, "d_sae": 128, "dead_window_tokens": 2000, "log_every": 50}
    return config(kind, **common, **SIGKILLED[kind])


def run_slowly(folder, kind):
    """What the child process of the next test does."""
    torch.set_num_threads(1)
    train(planted(), sigkilled_config(kind), checkpoints=Path(folder), progress=lambda done, total: time.sleep(0.002))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.soak if kind == "gated" else ()) for kind in SIGKILLED])
def test_killed_by_sigkill_again_and_again_it_ends_in_the_same_bits(tmp_path, kind):
    chance, seen, steps = random.Random(kind), set(), []
    for _ in range(3 if kind == "topk" else 1):
        child = subprocess.Popen([sys.executable, __file__, str(tmp_path), kind])
        end = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < end and {p.name for p in tmp_path.glob("step-*")} <= seen:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3))  # whatever it is doing then, such as writing another one
        assert child.poll() is None, "it ended before it was killed"
        child.send_signal(signal.SIGKILL)
        child.wait()
        names = sorted(p.name for p in tmp_path.glob("step-*"))
        steps.append(int(names[-1].removeprefix("step-")))
        seen |= set(names)
    end = sigkilled_config(kind).steps
    assert sorted({0, *steps, end}) == [0, *steps, end]
    again = train(planted(), sigkilled_config(kind), checkpoints=tmp_path)
    same_bits(again, train(planted(), sigkilled_config(kind)))


# --- dead latents


def test_auxk_revives_dead_latents(tmp_path, monkeypatch):
    """All but 12 of 64 latents start too weak to be among the two largest, though 30 atoms are there to be found."""
    original = TopKSAE.initialise.__func__

    def weak(cls, config, site, mean):
        sae = original(cls, config, site, mean)
        with torch.no_grad():
            sae.W_enc[:, 12:] *= 0.05
        return sae

    monkeypatch.setattr(TopKSAE, "initialise", classmethod(weak))
    last = {}
    for coefficient in (0.0, 1 / 32):
        path = tmp_path / f"{coefficient}.jsonl"
        changes = {"k": 2, "steps": 150, "auxk_coefficient": coefficient, "dead_window_tokens": 640, "lr": 1e-2}
        train(planted(), config(**changes), metrics=path)
        last[coefficient] = read_lines(path)[-1]
    assert last[0.0]["dead_fraction"] > 0.7
    assert last[1 / 32]["dead_fraction"] < 0.6
    assert last[1 / 32]["explained_variance"] > last[0.0]["explained_variance"] + 0.05


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_auxk_reaches_the_encoder_columns_of_dead_latents(kernels):
    c = config(k=2, auxk_coefficient=0.5, kernels=kernels)
    x = planted(1)[0]
    sae = ARCHITECTURES["topk"].initialise(c, Site((16,)), x.mean(0))
    with torch.no_grad():
        sae.b_enc[:10] = -0.05  # these ten never are among the largest
        sae.W_enc[:, :10] *= 0.3
    dead = Dead(torch.arange(10).flip(0), torch.arange(10) != 9)  # latent 0 is looked at, but it is not dead
    adam = adam_of(sae, c)
    found = DenseOrSparse(c, adam).backward(sae, x, c, 0.0, lambda: dead, 0)
    assert found.sparse == (kernels == "auto")
    assert not found.counts[:10].any()
    by_latent = gradients(sae, adam)["W_enc"]
    by_latent = by_latent if by_latent.shape[0] == 64 else by_latent.T
    assert (by_latent[1:10].abs().sum(1) > 0).sum() >= 7
    assert not by_latent[0].any()
    assert float(found.parts["auxk"]) > 0


def test_idle_tokens_tell_who_is_dead():
    idle = IdleTokens(torch.zeros(6, dtype=torch.int64), 100)
    assert idle.dead() is None
    idle.update(torch.tensor([1, 0, 0, 0, 5, 0]), 64)
    assert idle.dead() is None
    idle.update(torch.tensor([0, 0, 1, 0, 5, 0]), 64)
    dead = idle.dead()
    assert sorted(dead.latents[dead.mask].tolist()) == [1, 3, 5]
    assert dead.latents.shape == (1, 4)  # the next power of two
    assert len(set(dead.latents[0].tolist())) == 4
    assert idle.tokens.tolist() == [64, 128, 0, 128, 0, 128]
    idle.update(torch.zeros(6), 64)
    dead = idle.dead()
    assert sorted(dead.latents[dead.mask].tolist()) == [0, 1, 3, 5]
    for _ in range(2):
        idle.update(torch.zeros(6), 64)
    assert sorted(idle.dead().latents[0].tolist()) == list(range(6))  # of eight there are six


# --- what training returns


def test_batchtopk_becomes_jumprelu_with_one_threshold(tmp_path):
    sae = train(planted(), config("batchtopk", steps=400, threshold_lr=0.05))
    assert sae.cfg.architecture == sae.architecture == "jumprelu"
    assert "batches" not in sae.state_dict()
    assert (sae.threshold > 0).all()
    near(sae.threshold, sae.threshold.mean().expand(64), 1e-5)
    held_out = planted(8, 256, seed=77)
    assert torch.stack([(sae.encode(x) > 0).sum(1).float().mean() for x in held_out]).mean() == pytest.approx(4, rel=0.15)
    sae.save(tmp_path / "sae")
    back = SAE.load(tmp_path / "sae")
    assert torch.equal(back.encode(held_out[0]), sae.encode(held_out[0]))


def test_topk_fires_k_and_has_unit_rows(tmp_path):
    sae = train(planted(), config())
    x = planted(1, 256, seed=77)[0]
    assert ((sae.encode(x) > 0).sum(1) <= 4).all()
    assert (sae.encode(x) > 0).sum(1).float().mean() > 3
    near(sae.W_dec.norm(dim=1), torch.ones(64), 1e-5)


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "standard"])
def test_folding_keeps_reconstructions_and_active_sets(architecture, apply):
    sae = random_sae(architecture, apply).double()
    if architecture == "batchtopk":
        sae.threshold.fill_(0.7)
        sae = sae.finished().double()
    x, scale = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)).double(), 3.7
    if architecture == "topk":  # rows of one norm, as training leaves them: only so the largest stay the largest
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    f, expected = sae.encode(x * scale), sae(x * scale) / scale
    sae.fold_scale(scale)
    torch.testing.assert_close(sae(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(sae.encode(x) > 0, f > 0)
    assert f.any()
    near(sae.W_dec.norm(dim=1), torch.ones(20), 1e-6)


def random_sae(architecture, apply=True, k=3):
    """Weights on a grid, so that products are exact."""
    if architecture == "identity":
        return IdentitySAE.of("blocks.0.mlp.hook_post", 8)
    k = k if "topk" in architecture else None
    sae = ARCHITECTURES[architecture](SAEConfig(architecture, 8, 20, apply_b_dec_to_input=apply, k=k))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            values = torch.randint(-32, 33, parameter.shape, generator=generator) / 16
            parameter.copy_(values.abs() if name == "threshold" else values)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("batch", [0, 1, 7, 2100])
@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk", "jumprelu", "identity"])
def test_encode_sparse_is_encode(architecture, batch):
    sae = random_sae(architecture)
    if architecture == "batchtopk":
        sae.threshold.fill_(0.75)
    x = torch.randint(-32, 33, (batch, 8), generator=torch.Generator().manual_seed(3)) / 16
    f = sae.encode_sparse(x)
    assert torch.equal(f.dense(), sae.encode(x))
    assert len(f) == batch
    torch.testing.assert_close(sae.decode_sparse(f), sae(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_encode_sparse_of_other_dtypes_is_encode(architecture):
    sae = random_sae(architecture).bfloat16()
    x = (torch.randint(-4, 5, (7, 8), generator=torch.Generator().manual_seed(3)) / 4).bfloat16()
    f = sae.encode_sparse(x)
    assert torch.equal(f.dense(), sae.encode(x).float())
    torch.testing.assert_close(sae.decode_sparse(f), sae(x))


def test_encode_sparse_asks_for_no_gradient():
    sae = random_sae("standard").requires_grad_(True)
    f = sae.encode_sparse(torch.ones(3, 8, requires_grad=True))
    assert not f.values.requires_grad
    assert not sae.decode_sparse(f).requires_grad


# --- memory


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which an operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk"])
def test_a_sparse_step_never_has_a_matrix_of_batch_by_latents(architecture):
    """Eight chunks of rows: one chunk's pre-activations are the largest thing there ever is."""
    batch, d_sae, chunk = 8192, 256, 1024
    c = config(architecture, d_sae=d_sae, batch_size=batch)
    x = torch.randn(batch, 8, generator=torch.Generator().manual_seed(0))
    sae = ARCHITECTURES[architecture].initialise(c, Site((8,)), torch.zeros(8))
    with torch.no_grad():
        sae.b_enc.fill_(-0.2 if architecture == "standard" else 0.0)
    adam = adam_of(sae, c)
    way = DenseOrSparse(c, adam, dense=False)
    for step in range(2):
        with Largest() as largest:
            found = way.backward(sae, x, c, 1.0, lambda: None, step)
            adam.step(1e-3)
            sae.after_step(c, found)
        assert found.sparse
        assert 0 < found.density < 0.14
        if architecture != "batchtopk" or step:  # whose first batch may look at all to find the cut
            assert largest.elements <= chunk * d_sae
    with Largest() as largest:
        sae.encode_sparse(x)
    assert largest.elements <= chunk * d_sae


def test_the_memory_test_would_notice():
    c, sae, _, way = switchable()
    with Largest() as largest:
        way.backward(sae, firing(9).repeat(100, 1), c, 1.0, lambda: None, 0)
    assert largest.elements >= 1000 * 100


if __name__ == "__main__":
    run_slowly(*sys.argv[1:])
