"""Adam over matrices by latent: torch's own with its clipping, from dense gradients and from what sparse losses leave."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sae.adam import Adam
from sae.architectures.auxk import Dead, auxk_loss
from sae.ops import Above, DenseOps, TopK
from sae.ops.kernels import Screen

LR, BETAS, MAX_NORM = 1e-2, (0.9, 0.99), 1.0
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(d_in=12, d_sae=60, seed=0):
    rows = torch.nn.functional.normalize(normal(d_sae, d_in, seed=seed))
    return SimpleNamespace(
        W_enc=nn.Parameter(rows.clone().T),
        b_enc=nn.Parameter(normal(d_sae, seed=seed + 1) / 9),
        W_dec=nn.Parameter(rows.clone()),
        b_dec=nn.Parameter(normal(d_in, seed=seed + 2) / 9),
    )


def adam_over(p, kernels, unit=False, low=False, max_norm=MAX_NORM):
    return Adam(
        vars(p), {"W_enc": p.W_enc.T}, {"W_dec": p.W_dec}, kernels, betas=BETAS, max_norm=max_norm, unit=unit,
        compute_dtype="bfloat16" if low else "float32",
    )


def random_gradients(p, step):
    """Of norms below and above the clipping."""
    size = (1e-3, 0.1, 10.0)[step % 3]
    for number, parameter in enumerate(vars(p).values()):
        parameter.grad = size * normal(*parameter.shape, seed=100 * step + number)


def near(found, wanted, tolerance, what=""):
    difference = float((found.detach() - wanted.detach()).abs().max())
    assert difference <= tolerance * float(wanted.detach().abs().max()), f"{what}: {difference}"


def same_weights(p, q, tolerance):
    for name in NAMES:
        near(getattr(p, name), getattr(q, name), tolerance, name)


def same_bits(p, q):
    for name in NAMES:
        assert torch.equal(getattr(p, name), getattr(q, name)), name


def project(w):
    """Take away what of the gradient lies along each row."""
    w.grad -= (w.grad * w.detach()).sum(1, keepdim=True) * w.detach()


@pytest.mark.parametrize("unit", [False, True])
def test_it_is_torchs_adam_with_torchs_clipping(kernels, unit):
    """With `unit`, the gradient's radial part is gone before its norm is taken: clipping is as after projection."""
    p, judge = parameters(), parameters()
    adam, torchs = adam_over(p, kernels, unit), torch.optim.Adam(vars(judge).values(), lr=LR, betas=BETAS)
    for step in range(20):
        random_gradients(p, step)
        random_gradients(judge, step)
        if unit:
            project(judge.W_dec)
        torch.nn.utils.clip_grad_norm_(vars(judge).values(), MAX_NORM)
        torchs.step()
        adam.step(LR)
        if unit:
            with torch.no_grad():
                judge.W_dec.div_(judge.W_dec.norm(dim=1, keepdim=True))
            near(p.W_dec.norm(dim=1), torch.ones(60), 1e-6)
        same_weights(p, judge, 1e-6 * (1 + step))
        assert all(parameter.grad is None for parameter in vars(p).values())


def test_a_radial_gradient_does_not_clip_the_others(kernels):
    """Huge, but all along the rows: the rest is not scaled down."""
    p, q = parameters(), parameters()
    for these, radial in ((p, 1e4), (q, 0.0)):
        adam = adam_over(these, kernels, unit=True)
        for step in range(3):
            for number, parameter in enumerate(vars(these).values()):
                parameter.grad = 1e-3 * normal(*parameter.shape, seed=10 * step + number)
            these.W_dec.grad = radial * these.W_dec.detach()
            adam.step(LR)
    for name in ("W_enc", "b_enc", "b_dec"):
        near(getattr(p, name), getattr(q, name), 1e-4, name)


def test_parameters_without_a_gradient_move_by_their_moments_alone(kernels):
    p, judge = parameters(), parameters()
    adam, torchs = adam_over(p, kernels), torch.optim.Adam(vars(judge).values(), lr=LR, betas=BETAS)
    random_gradients(p, 0)
    random_gradients(judge, 0)
    for step in range(3):
        torchs.step()
        adam.step(LR)
        same_weights(p, judge, 1e-6 * (1 + step))
        for parameter in vars(judge).values():
            parameter.grad = torch.zeros_like(parameter)


def loss(ops, p, x, rule=None, auxk=False, norms=False):
    f = ops.encode(x, p.W_enc, p.b_enc, rule or Above(), p.b_dec)
    out = ops.reconstruct(f, p.W_dec, p.b_dec, x)
    total = out.error.mean()
    if norms:
        total = total + f.dot(ops.norms(p.W_dec)).mean()
    if auxk:
        dead = Dead(torch.tensor([50, 3, 17, 5]), torch.tensor([True, True, False, True]))
        total = total + auxk_loss(x, x, out.residual, dead, 2, ops, p.W_enc, p.b_enc, p.W_dec, p.b_dec)
    return total


CASES = {  # rows, and what the loss is made of; with few rows there are fewer entries than the 60 latents
    "relu": (64, {"norms": True}),
    "topk": (64, {"rule": TopK(3)}),
    "auxk": (64, {"rule": TopK(3), "auxk": True}),
    "few": (5, {"rule": TopK(3)}),
    "few-auxk": (5, {"rule": TopK(3), "auxk": True}),
    "few-norms": (5, {"rule": TopK(3), "norms": True}),
    "one": (1, {"rule": TopK(1)}),
    "none": (3, {"rule": Above(100.0)}),
    "none-auxk": (3, {"rule": Above(100.0), "auxk": True}),
}


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_sparse_terms_and_dense_gradients_end_in_the_same_weights(kernels, case, unit):
    rows, options = CASES[case]
    p, q = parameters(), parameters()
    sparse, dense = adam_over(p, kernels, unit), adam_over(q, kernels, unit)
    ops = sparse.sparse_ops(1.0)
    for step in range(20):
        x = normal(rows, 12, seed=1000 + step)
        loss(ops, p, x, **options).backward()
        loss(DenseOps(), q, x, **options).backward()
        assert p.W_enc.grad is None
        assert q.W_enc.grad is not None
        sparse.step(LR)
        dense.step(LR)
        assert not sparse.rows["W_enc"].terms + sparse.rows["W_dec"].terms + sparse.rows["W_enc"].subsets
        assert sparse.rows["W_dec"].along is None
    same_weights(p, q, 3e-5)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("case", ["few", "few-auxk", "few-norms", "one"])
def test_places_for_latents_with_a_gradient_alone_change_no_bit(kernels, monkeypatch, case, unit):
    rows, options = CASES[case]
    p, q = parameters(), parameters()
    some, all_of_them = adam_over(p, kernels, unit), adam_over(q, kernels, unit)
    places = []
    monkeypatch.setattr(all_of_them, "_slots", lambda name: (None, len(all_of_them.rows[name].weight)))
    monkeypatch.setattr(some, "_slots", lambda name: places.append(Adam._slots(some, name)) or places[-1])
    for step in range(6):
        x = normal(rows, 12, seed=1000 + step)
        for adam, these in ((some, p), (all_of_them, q)):
            loss(adam.sparse_ops(1.0), these, x, **options).backward()
            adam.step(LR)
        same_bits(p, q)
    assert len(places) == 12
    assert all(slots is not None and count < 60 for slots, count in places)
    for slots, count in places:
        taken = slots[slots >= 0]
        assert torch.equal(taken, torch.arange(len(taken)))
        assert len(taken) <= count


def test_steps_of_all_sizes_follow_each_other(kernels):
    """Few latents, then all, then none: what one step wrote down must not be found by the next."""
    p, q = parameters(), parameters()
    sparse, dense = adam_over(p, kernels), adam_over(q, kernels)
    ops = sparse.sparse_ops(1.0)
    turns = ("few", "relu", "none", "few-auxk", "topk", "one", "auxk", "none-auxk", "few")
    for step, case in enumerate(turns):
        rows, options = CASES[case]
        x = normal(rows, 12, seed=1000 + step)
        loss(ops, p, x, **options).backward()
        loss(DenseOps(), q, x, **options).backward()
        sparse.step(LR)
        dense.step(LR)
        same_weights(p, q, 3e-5)


def test_cleared_gradients_are_gone(kernels):
    p, q = parameters(), parameters()
    for these, disturbed in ((p, True), (q, False)):
        adam = adam_over(these, kernels)
        ops = adam.sparse_ops(1.0)
        for step in range(2):
            if disturbed:
                loss(ops, these, normal(9, 12, seed=step), auxk=True, norms=True).backward()
                random_gradients(these, 2)
                adam.clear()
            loss(ops, these, normal(64, 12, seed=50 + step), norms=True).backward()
            adam.step(LR)
    same_bits(p, q)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_norms_and_bfloat16_copies_are_those_of_the_weights_after_each_step(kernels, sparse, unit, low):
    p = parameters()
    adam = adam_over(p, kernels, unit, low)
    ops = adam.sparse_ops(1.0) if sparse else DenseOps()
    for step in range(6):
        screen, wanted = adam.rows["W_enc"].screen, Screen.of(p.W_enc.detach().T)
        assert (adam.rows["W_enc"].low is not None, screen is not None) == (low, kernels.screens and not low)
        if low:
            assert torch.equal(adam.rows["W_enc"].low, wanted.low)
        if screen is not None:
            assert torch.equal(screen.low, wanted.low)
            near(screen.norms, wanted.norms, 1e-6)
            near(screen.rounding, wanted.rounding, 1e-5)
        near(adam.rows["W_dec"].norms, p.W_dec.norm(dim=1), 1e-6)
        assert adam.rows["W_enc"].weight.data_ptr() == p.W_enc.data_ptr()
        loss(ops, p, normal(5 if step % 2 else 64, 12, seed=step), rule=TopK(3), norms=not unit).backward()
        adam.step(LR)


def test_weights_changed_from_outside_are_taken_anew(kernels):
    p = parameters()
    adam = adam_over(p, kernels, low=True)
    with torch.no_grad():
        p.W_enc.mul_(3)
        p.W_dec.mul_(5)
    adam.refresh()
    assert torch.equal(adam.rows["W_enc"].low, p.W_enc.detach().T.bfloat16())
    near(adam.rows["W_dec"].norms, torch.full((60,), 5.0), 1e-6)


@pytest.mark.parametrize("unit", [False, True])
def test_restored_it_goes_on_in_the_same_bits(kernels, unit):
    def go_on(adam, p, steps):
        ops = adam.sparse_ops(1.0)
        for step in steps:
            loss(ops, p, normal(5 if step % 2 else 64, 12, seed=step), rule=TopK(3), auxk=True, norms=not unit).backward()
            adam.step(LR)

    p, again = parameters(), parameters(seed=50)
    adam = adam_over(p, kernels, unit, low=True)
    go_on(adam, p, range(5))
    state = {name: value.clone() for name, value in adam.state().items()}
    weights = {name: value.detach().clone() for name, value in vars(p).items()}
    go_on(adam, p, range(5, 11))

    other = adam_over(again, kernels, unit, low=True)
    go_on(other, again, range(20, 23))  # a past of its own, which must go
    with torch.no_grad():
        for name, value in weights.items():
            getattr(again, name).copy_(value)
    other.restore(state)
    assert other.steps == 5
    go_on(other, again, range(5, 11))
    same_bits(p, again)
    assert adam.state().keys() == other.state().keys()
    assert all(torch.equal(value, other.state()[name]) for name, value in adam.state().items())
    assert torch.equal(adam.rows["W_enc"].low, other.rows["W_enc"].low)
