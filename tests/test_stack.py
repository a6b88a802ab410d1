"""Sweeps: SAEs trained in one pass, stacked where their shapes are equal, are what each would have been by itself."""

import json

import pytest
import torch
from test_family import LATENTS, D, config, normal, planted, rows_for

from activation_store.errors import InputError
from sae import TrainConfig, train, train_sweep
from sae.adam import Adam
from sae.dense_or_sparse import DenseOrSparse
from sae.ops import kernels_for
from sae.ops.latents import Above, BatchTopK, DenseLatents, TopK, stacked
from sae.sae import Site
from sae.stack import Member, Stack, stack, stacks_of, unstack
from sae.train import hooks_of

CPU, REFERENCE = kernels_for("cpu"), kernels_for("cpu", reference=True)

# members of one stack, which differ in all that they may differ in
STACKS = {
    "standard": [config(l1_coefficient=0.5), config(l1_coefficient=3.0, seed=1, lr=1e-3), config(l1_coefficient=1.0, seed=2)],
    "standard-target": [config(target_l0=3.0, steps=120), config(target_l0=6.0, seed=1, steps=120)],
    "standard-bfloat16": [config(l1_coefficient=c, compute_dtype="bfloat16") for c in (0.5, 2.0)],
    "topk-bfloat16": [config("topk", k=k, compute_dtype="bfloat16") for k in (2, 4)],
    "unit-norm": [config(sparsity_norm="unit_norm"), config(sparsity_norm="unit_norm", seed=5)],
    "no-shift": [config(apply_b_dec_to_input=False, seed=1), config(apply_b_dec_to_input=False, l1_coefficient=0.3)],
    # with a small p the penalty's slope at small latents makes more of a rounding error in each step
    "p_anneal": [config("p_anneal", p_start_fraction=0.0, p_end=0.8, l1_coefficient=c) for c in (1.0, 0.3)],
    "gated": [config("gated"), config("gated", seed=3, l1_coefficient=0.4)],
    "topk": [config("topk", k=2), config("topk", k=5, seed=1), config("topk", k=3, lr=1e-3)],
    "topk-free": [config("topk", k=k, seed=k, decoder_rows="free") for k in (2, 4)],
    "topk-auxk": [config("topk", k=k, seed=k, dead_window_tokens=300, auxk_coefficient=0.5) for k in (1, 2)],
    "batchtopk": [config("batchtopk", k=2), config("batchtopk", k=5, seed=1)],
    "matryoshka": [config("matryoshka", prefixes=(8, 24, 48), k=k, seed=k) for k in (2, 4)],
    "matryoshka-random": [config("matryoshka", random_prefixes=3, k=k) for k in (2, 4)],
    "jumprelu": [config("jumprelu", pre_act_coefficient=0.3, bandwidth=0.4, l0_coefficient=c) for c in (0.3, 1.0)],
    "jumprelu-step": [config("jumprelu", l0_penalty="step", bandwidth=0.4, l0_coefficient=c) for c in (0.3, 1.0)],
    "standard-auxk": [config(revive="auxk", seed=s, l1_coefficient=6.0, dead_window_tokens=300) for s in (0, 1)],
    "transcoders": [config(hook="a", hook_out="b"), config(hook="b", hook_out="a", l1_coefficient=0.3)],
    "crosscoders": [config("batchtopk", hook=("a", "b"), k=2), config("batchtopk", hook=("a", "b"), k=4, seed=2)],
    "hooks": [config("topk", hook="a"), config("topk", hook="b"), config("topk", hook="a", k=6)],
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def named(configs):
    return {f"m{number}": c for number, c in enumerate(configs)}


def drawn(configs, count=40):
    """Batches of what the configs read: one tensor, or one for each hook, of different scales."""
    several = [planted(count, seed=10 * number) for number in range(max(1, len(hooks_of(configs))))]
    return several[0] if len(several) == 1 else list(zip(*[[x * (1 + i) for x in b] for i, b in enumerate(several)], strict=True))


def alone(c, configs, batches):
    hooks = [*c.hooks, *c.hooks_out]
    every = hooks_of(configs)
    if not hooks or len(every) == 1:
        return train(batches, c)
    taken = [tuple(batch[every.index(hook)] for hook in hooks) for batch in batches]
    return train([batch[0] if len(batch) == 1 else batch for batch in taken], c)


def members_of(configs, batches):
    first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    hooks, found = hooks_of(configs), []
    for name, c in configs.items():
        columns = tuple(hooks.index(hook) for hook in (*c.hooks, *c.hooks_out)) or (0,)
        widths, read = tuple(first[i].shape[1] for i in columns), max(len(c.hooks), 1)
        site = Site(widths[:read], widths[read:])
        found.append(Member(name, c, site, columns, (1.0,) * len(columns), torch.zeros(site.d_out or site.d_in)))
    return found


@pytest.mark.parametrize("kind", STACKS)
def test_a_stack_trains_each_member_as_it_would_train_by_itself(kind):
    configs = named(STACKS[kind])
    batches = drawn(configs)
    assert len(stacks_of(members_of(configs, batches))) == 1
    together = train_sweep(batches, configs)
    assert list(together) == list(configs)
    for name, c in configs.items():
        wanted, found = alone(c, configs, batches), together[name]
        assert type(found) is type(wanted)
        assert {**found.cfg.metadata["training"], "x": 0}.keys() == {**wanted.cfg.metadata["training"], "x": 0}.keys()
        assert found.cfg.metadata["train_config"] == wanted.cfg.metadata["train_config"]
        state = wanted.state_dict()
        for key, value in found.state_dict().items():
            scale = float(state[key].abs().max())
            near = 5e-3 if kind == "p_anneal" else 2e-4  # where f is near 0 the gradient f^(p - 1) makes much of its rounding
            torch.testing.assert_close(value, state[key], rtol=1e-3, atol=near * max(scale, 1e-3))
        x = torch.cat([b if isinstance(b, torch.Tensor) else torch.cat(b, 1) for b in batches[:1]])[:, : found.cfg.d_in]
        same = ((found.encode(x) > 0) == (wanted.encode(x) > 0)).float().mean()
        assert same > 0.999


def gradients(sae, c, x, members, dense, strengths, ks=()):
    """A step's gradients by name, before the optimiser takes them, and what the step found."""
    adam = Adam(
        dict(sae.named_parameters()), sae.encoders(), sae.decoders(), CPU, betas=c.adam_betas, max_norm=1e9,
        unit=c.unit_norm_decoder, compute_dtype="float32", members=members,
    )  # fmt: skip
    out = DenseOrSparse(c, adam, dense=dense, density=0.1).backward(sae, x, c, strengths, lambda: None, 0, ks)
    found = {}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in adam.rows:
                gradient, slots, _ = adam._gradient(name, parameter)
                whole = torch.zeros_like(adam.rows[name].weight)
                places = torch.arange(len(whole)) if slots is None else slots
                whole[places >= 0] = gradient[places[places >= 0]]
                found[name] = whole
            else:
                found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found, out


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("kind", ["standard", "p_anneal", "gated", "topk", "batchtopk", "matryoshka", "jumprelu", "no-shift"])
def test_gradients_of_a_stack_are_those_of_its_members(kind, dense):
    if dense and STACKS[kind][0].k is not None and kind != "topk":
        pytest.skip("with k, steps are sparse but for those that do not fit")
    configs = STACKS[kind]
    saes = [member.fresh() for member in members_of(named(configs), drawn(named(configs)))]
    for number, sae in enumerate(saes):
        with torch.no_grad():
            for at, parameter in enumerate(sae.parameters()):
                parameter.add_(normal(*parameter.shape, seed=7 * number + at) * (0.02 if parameter.dim() == 1 else 0.15))
            sae.bias_of_dead.sub_(0.4)  # so that few fire, and a sparse step is one
    x = rows_for(configs[0], 96)
    strengths = torch.tensor([c.coefficient for c in configs])
    ks = tuple(c.k for c in configs if c.k)
    own = [gradients(sae, c, x, 1, dense, c.coefficient) for sae, c in zip(saes, configs, strict=True)]
    whole = stack(saes)
    found, out = gradients(whole, configs[0], x.repeat(len(saes), 1), len(saes), dense, strengths, ks)
    assert out.sparse is not dense
    assert all(step.sparse is not dense for _, step in own)
    assert out.loss.tolist() == pytest.approx([float(step.loss) for _, step in own], rel=1e-5)
    assert out.counts.tolist() == torch.cat([step.counts for _, step in own]).tolist()
    for name, value in found.items():
        parts = value.view(len(saes), -1)
        for part, (gradient, _) in zip(parts, own, strict=True):
            wanted = gradient[name].flatten()
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=lambda k: k.name)
def test_selection_of_a_stack_is_that_of_its_members(kernels):
    members, batch, d, d_sae = 3, 20, 8, 32
    x, weight, bias = normal(members * batch, d), normal(members * d_sae, d, seed=1), normal(members * d_sae, seed=2)
    ks = (1, 4, 40)
    parts = [t.chunk(members) for t in (x, weight, bias)]
    bars = bias.abs()
    above = kernels.above(x, weight, bias, bars, 10**6, None, members)
    those_above = stacked([kernels.above(*p, b, 10**6) for *p, b in zip(*parts, bars.chunk(members), strict=True)])
    largest = kernels.topk(x, weight, bias, ks, None, members)
    the_largest = stacked([kernels.topk(*p, k) for *p, k in zip(*parts, ks, strict=True)])
    assert above.members == members
    for found, right in ((above, those_above), (largest, the_largest)):
        assert torch.equal(found.starts, right.starts)
        assert torch.equal(found.latents, right.latents)
        assert torch.equal(found.values, right.values)
        of = found.index // d_sae
        assert torch.equal(of, found.rows.long() // batch)
        assert found.dense().shape == (members, batch, d_sae)
        assert torch.equal(found.least(), DenseLatents(found.dense()).least())


def test_one_k_for_all_members_is_each_ones():
    x, weight, bias = normal(12, 8), normal(48, 8, seed=1), torch.zeros(48)
    for kernels in (CPU, REFERENCE):
        one, many = (kernels.topk(x, weight, bias, k, None, 3) for k in (2, (2, 2, 2)))
        assert torch.equal(one.latents, many.latents)
    assert {type(rule) for rule in (Above(), TopK((1, 2)), BatchTopK((1, 2)))} == {Above, TopK, BatchTopK}


def test_unstacking_undoes_stacking():
    saes = [member.fresh() for member in members_of(named(STACKS["batchtopk"]), drawn(named(STACKS["batchtopk"])))]
    before = [{k: v.clone() for k, v in sae.state_dict().items()} for sae in saes]
    whole = stack(saes)
    assert whole.W_enc.shape == (D, 2 * LATENTS)
    assert whole.b_dec.shape == (2, D)
    assert whole.W_enc.T.is_contiguous()
    for sae, wanted in zip(unstack(whole, [sae.cfg for sae in saes]), before, strict=True):
        assert all(torch.equal(v, wanted[k]) for k, v in sae.state_dict().items())


def test_what_cannot_be_stacked_trains_beside_it():
    configs = {
        "wide": config("topk", d_sae=64), "a": config("topk"), "b": config("topk", seed=4), "l1": config(),
        "resample": config(revive="resample"), "resample too": config(revive="resample", seed=1),
        "slow": config(lr_decay_fraction=0.5),
    }  # fmt: skip
    batches = planted()
    assert [len(s) for s in stacks_of(members_of(configs, batches))] == [1, 2, 1, 1, 1, 1]
    together = train_sweep(batches, configs)
    for name in ("wide", "l1", "resample too"):
        wanted = train(batches, configs[name]).state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in together[name].state_dict().items()), name


def test_a_sweep_that_stopped_goes_on_to_the_same_bits(tmp_path):
    configs = {"a": config(), "b": config(l1_coefficient=2.0)}
    configs |= {f"k{k}": config("batchtopk", k=k, seed=k) for k in (2, 4)}
    batches = planted()
    undisturbed = train_sweep(batches, configs)

    class Stopped(Exception):
        pass

    def stop(done, total):
        if done == 47 * 128:
            raise Stopped

    metrics = {name: tmp_path / f"{name}.jsonl" for name in configs}
    with pytest.raises(Stopped):
        train_sweep(batches, configs, checkpoints=tmp_path / "c", metrics=metrics, progress=stop)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-000000040"]
    resumed = train_sweep(batches, configs, checkpoints=tmp_path / "c", metrics=metrics)
    for name, sae in undisturbed.items():
        assert all(torch.equal(value, resumed[name].state_dict()[key]) for key, value in sae.state_dict().items()), name
        steps = [json.loads(line)["step"] for line in metrics[name].read_text().splitlines()]
        assert steps == list(range(5, 61, 5))
    with pytest.raises(InputError, match=r"other settings \(k2.k 2 -> 3\)"):
        train_sweep(batches, {**configs, "k2": config("batchtopk", k=3, seed=2)}, checkpoints=tmp_path / "c")
    with pytest.raises(InputError, match=r"other settings \(SAEs a, b, k2, k4 -> a\)"):
        train_sweep(batches, {"a": configs["a"]}, checkpoints=tmp_path / "c")


def test_members_log_their_own_figures(tmp_path):
    configs = {"weak": config(l1_coefficient=0.1), "strong": config(l1_coefficient=5.0, lr=1e-3)}
    metrics = {name: tmp_path / f"{name}.jsonl" for name in configs}
    train_sweep(planted(), configs, metrics=metrics)
    lines = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in metrics.items()}
    assert lines["weak"][-1]["l0"] > 2 * lines["strong"][-1]["l0"]
    assert lines["weak"][3]["lr"] == pytest.approx(3 * lines["strong"][3]["lr"])
    assert (lines["weak"][-1]["coefficient"], lines["strong"][-1]["coefficient"]) == pytest.approx((0.1, 5.0))


def test_each_member_is_clipped_by_itself():
    """One of a sweep whose gradients explode must not slow the others down."""
    calm, wild = config("topk", max_grad_norm=0.01), config("topk", max_grad_norm=0.01, hook="b")
    configs = {"calm": calm.model_copy(update={"hook": "a"}), "wild": wild}
    batches = [(x, 50 * x) for x in planted()]
    assert torch.allclose(train_sweep(batches, configs)["calm"].W_enc, train([x for x, _ in batches], calm).W_enc, atol=1e-5)


def test_what_is_not_finite_is_blamed_on_the_member_whose_loss_it_is():
    batches = [(x, x.clone()) for x in planted()]
    batches[7][1][3, 2] = float("nan")
    configs = {"good": config(hook="a"), "bad": config(hook="b")}
    with pytest.raises(FloatingPointError, match=r"the loss of bad is not finite: step 8, row 3 .* has nan in column 2"):
        train_sweep(batches, configs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 30}, "train.steps: 60 in a, 30 in b; SAEs that train in one pass have it in common"),
        ({"batch_size": 64}, "train.batch_size: 128 in a, 64 in b"),
    ],
)
def test_settings_of_the_pass_must_be_shared(changes, said):
    with pytest.raises(InputError, match=said):
        train_sweep(planted(), {"a": config(), "b": config(**changes)})


def test_a_sweep_over_hooks_needs_every_member_to_name_its_own():
    batches = [(x, x) for x in planted(4)]
    with pytest.raises(InputError, match=r"train.hook: missing in b"):
        train_sweep(batches, {"a": config(hook="x"), "b": config(), "c": config(hook="y")})
    with pytest.raises(InputError, match=r"batches: 2 tensors a batch, but train.hook and train.hook_out name 1 hooks"):
        train_sweep(batches, {"a": config(hook="x"), "b": config(hook="x", seed=1)})


def test_a_stack_of_one_is_the_sae_itself():
    c = config("topk")
    (member,) = members_of({"": c}, planted(1))
    made = Stack([member], CPU, torch.device("cpu"), 0, None, lambda name: None)
    assert made.sae.members == 1
    assert made.sae.b_dec.shape == (D,)
    assert isinstance(c, TrainConfig)
