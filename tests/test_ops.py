"""The sparse operations: equal to dense autograd, the compiled kernels equal to plain PyTorch, in every shape and tie.

Most inputs lie on a grid of sixteenths, so that the encoder product is exact in any order of summation: which latents fire
is then the same everywhere, ties among them included, and what differs is the rounding of later sums alone.
"""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sae.adam import Adam
from sae.architectures.auxk import Dead, auxk_loss
from sae.ops import Above, BatchTopK, DenseOps, SparseLatents, SparseOps, TooDense, TopK, kernels_for
from sae.ops.float8 import Float8
from sae.ops.kernels import AdamStep, Screen, Term
from sae.ops.latents import DenseLatents, of_dense
from sae.ops.reference import ReferenceKernels
from sae.ops.training import select

REFERENCE, CPU = ReferenceKernels(), kernels_for("cpu")
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def grid(*shape, seed=0, most=2.0):
    """Sixteenths within +- most."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-int(16 * most), int(16 * most) + 1, shape, generator=generator) / 16


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn_parameters(d_in=17, d_sae=48, seed=0, bias=0.0):
    return SimpleNamespace(
        W_enc=nn.Parameter(grid(d_sae, d_in, seed=seed).T),
        b_enc=nn.Parameter(grid(d_sae, seed=seed + 1) + bias),
        W_dec=nn.Parameter(normal(d_sae, d_in, seed=seed + 2)),
        b_dec=nn.Parameter(grid(d_in, seed=seed + 3)),
    )


def optimizer(p, kernels, compute_dtype="float32"):
    return Adam(
        vars(p), {"W_enc": p.W_enc.T}, {"W_dec": p.W_dec}, kernels, betas=(0.9, 0.999), max_norm=1.0, unit=False,
        compute_dtype=compute_dtype,
    )


@torch.no_grad()
def matrix_gradient(adam, p, name):
    """The whole gradient of a matrix by latent, in the shape of its parameter."""
    gradient, slots, squares = adam._gradient(name, getattr(p, name))
    if slots is not None:
        whole = torch.zeros(len(slots), gradient.shape[1])
        whole[slots >= 0] = gradient[slots[slots >= 0]]
        gradient = whole
    near(squares.sum(), gradient.square().sum())
    return gradient.T if name == "W_enc" else gradient


def sparse_gradients(loss, p, x, kernels, **changes):
    adam = optimizer(p, kernels, **changes)
    value = loss(adam.sparse_ops(1.0), p, x)
    value.backward()
    assert p.W_enc.grad is None
    assert p.W_dec.grad is None
    found = {name: matrix_gradient(adam, p, name).clone() for name in ("W_enc", "W_dec")}
    return {"loss": value.detach(), **found, **taken(p, x, ("b_enc", "b_dec"))}


def dense_gradients(loss, p, x):
    value = loss(DenseOps(), p, x)
    value.backward()
    return {"loss": value.detach(), **taken(p, x, NAMES)}


def taken(p, x, names):
    """Gradients, which are forgotten."""
    tensors = {**{name: getattr(p, name) for name in names}, "x": x}
    found = {name: torch.zeros_like(t) if t.grad is None else t.grad.clone() for name, t in tensors.items()}
    for tensor in [*vars(p).values(), x]:
        tensor.grad = None
    return found


@torch.no_grad()
def near(found, wanted, tolerance=1e-5, what=""):
    """Equal to `tolerance` of the largest element."""
    assert found.shape == wanted.shape, what
    assert torch.equal(found.isfinite(), wanted.isfinite()), what
    if wanted.numel():
        difference, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
        assert difference <= tolerance * max(largest, 1e-6), f"{what}: {difference} of {largest}"


def same_gradients(loss, p, x, kernels, tolerance=1e-5):
    wanted, found = dense_gradients(loss, p, x), sparse_gradients(loss, p, x, kernels)
    for name in wanted:
        near(found[name], wanted[name], tolerance, name)
    return wanted


def mean(values):
    return values.sum() / max(1, len(values))


# --- gradients are those of dense autograd

RULES = {
    "relu": Above(0.0),
    "thresholds": Above(grid(48, seed=9).abs() * 2),
    "negative-thresholds": Above(-grid(48, seed=9).abs()),
    "topk": TopK(5),
    "batchtopk": BatchTopK(5),
}


def encoded(ops, p, x, rule, shift):
    return ops.encode(x, p.W_enc, p.b_enc, rule, p.b_dec if shift else None)


def mse(ops, p, x, f):
    return mean(ops.reconstruct(f, p.W_dec, p.b_dec, x).error)


def mse_and_l1(ops, p, x, f):
    return mse(ops, p, x, f) + 3 * mean(f.dot(ops.norms(p.W_dec)))


def general(ops, p, x, f):
    """Something that is no squared error."""
    return mean(((ops.decode(f, p.W_dec, p.b_dec) - x).square().sum(-1) + 1).log())


def two_errors(ops, p, x, f):
    """As Matryoshka SAEs have it: the first latents alone must do, too."""
    first = f.with_values(f.values * f.of_latent((torch.arange(48) < 20).float()))
    return mse(ops, p, x, f) + mse(ops, p, x, first)


def two_errors_with_keep(ops, p, x, f):
    inside = torch.arange(48) < 20
    if isinstance(f, SparseLatents):
        return mse(ops, p, x, f) + mse(ops, p, x, f.keep(inside[f.index]))
    return mse(ops, p, x, f) + mse(ops, p, x, DenseLatents(f.values * inside))


def elementwise(ops, p, x, f):
    return mse(ops, p, x, f) + mean(f.row_sum(torch.tanh(f.values * f.of_latent(ops.norms(p.W_dec)) / 9)))


def weighted_rows(ops, p, x, f):
    weights = 1 + x.detach().square().mean(-1)
    return mean(weights * ops.reconstruct(f, p.W_dec, p.b_dec, x).error) + mean(f.row_sum(f.values.square() * f.of_row(weights)))


def revived(ops, p, x, f):
    out = ops.reconstruct(f, p.W_dec, p.b_dec, x)
    dead = Dead(torch.tensor([40, 3, 17, 5, 30, 31, 32, 33]), torch.tensor([True, False, True, True, True, True, True, True]))
    x = x.detach()
    return mean(out.error) + auxk_loss(x, x, out.residual, dead, 2, ops, p.W_enc, p.b_enc, p.W_dec, p.b_dec)


def all_at_once(ops, p, x, f):
    return mse_and_l1(ops, p, x, f) + general(ops, p, x, f) + revived(ops, p, x, f) + mean(f.dot(ops.norms(p.W_dec)))


LOSSES = [mse, mse_and_l1, general, two_errors, two_errors_with_keep, elementwise, weighted_rows, revived, all_at_once]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_those_of_dense_autograd(kernels, rule, loss, shift):
    p, x = drawn_parameters(), grid(40, 17, seed=5).requires_grad_()
    wanted = same_gradients(lambda ops, p, x: loss(ops, p, x, encoded(ops, p, x, RULES[rule], shift)), p, x, kernels)
    assert all(float(wanted[name].abs().max()) > 1e-3 for name in (*NAMES, "x"))


def test_two_encodings_of_one_step_add_up(kernels):
    def loss(ops, p, x):
        return sum(mse(ops, p, part, encoded(ops, p, part, TopK(3), True)) for part in (x[:13], x[13:] / 2))

    same_gradients(loss, drawn_parameters(), grid(40, 17, seed=5).requires_grad_(), kernels)


def test_a_penalty_on_norms_alone_reaches_latents_that_do_not_fire(kernels):
    """Two rows fire four latents; the norms of all 48 count."""

    def loss(ops, p, x):
        return mse(ops, p, x, encoded(ops, p, x, TopK(2), True)) + ops.norms(p.W_dec).square().sum()

    same_gradients(loss, drawn_parameters(), grid(2, 17, seed=5).requires_grad_(), kernels)


class JumpReLU(torch.autograd.Function):
    """z where z > theta; d/d theta = -(theta / eps) K((z - theta) / eps), K a rectangle (Rajamanoharan et al. 2024)."""

    @staticmethod
    def forward(ctx, z, theta, eps):
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return z * (z > theta)

    @staticmethod
    def backward(ctx, gradient):
        z, theta = ctx.saved_tensors
        return gradient * (z > theta), -theta / ctx.eps * window(z, theta, ctx.eps) * gradient, None


class Fires(torch.autograd.Function):
    """1 where z > theta, for an L0 penalty; d/d theta = -(1 / eps) K((z - theta) / eps)."""

    @staticmethod
    def forward(ctx, z, theta, eps):
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return (z > theta).float()

    @staticmethod
    def backward(ctx, gradient):
        z, theta = ctx.saved_tensors
        return torch.zeros_like(z), -window(z, theta, ctx.eps) / ctx.eps * gradient, None


def window(z, theta, eps):
    return (((z - theta) / eps).abs() < 0.5).float()


@pytest.mark.parametrize("eps", [0.5, 4.0])  # the second: windows that reach below zero
def test_jumprelu_and_its_thresholds_learn_as_on_dense_pre_activations(kernels, eps):
    p, x = drawn_parameters(), grid(40, 17, seed=5).requires_grad_()
    theta = (grid(48, seed=7).abs() + 1 / 16).requires_grad_()

    def loss_of(f, ops, x):
        thresholds = f.of_latent(theta).expand_as(f.values)
        fires = f.row_sum(Fires.apply(f.values, thresholds, eps))
        f = f.with_values(JumpReLU.apply(f.values, thresholds, eps))
        return mse(ops, p, x, f) + 5 * mean(fires)

    value = loss_of(DenseLatents((x - p.b_dec) @ p.W_enc + p.b_enc), DenseOps(), x)
    value.backward()
    wanted, wanted_theta, theta.grad = taken(p, x, NAMES), theta.grad, None
    found = sparse_gradients(lambda ops, p, x: loss_of(encoded(ops, p, x, Above(theta - eps / 2), True), ops, x), p, x, kernels)
    near(found["loss"], value.detach())
    for name in (*NAMES, "x"):
        near(found[name], wanted[name], what=name)
    near(theta.grad, wanted_theta)
    assert float(wanted_theta.abs().max()) > 0.1


# --- the encoder product in bfloat16


def test_a_bfloat16_product_is_as_near_as_bfloat16_can_be(kernels):
    """Values above one standard deviation of all pre-activations are within 2 units of bfloat16, relative 2**-7, of float32's.

    Rounding the factors moves a sum by about 2**-9 of its spread, and rounding the sum by up to 2**-9 of itself. Nearer to
    zero, factors of either sign cancel and nothing can be said relative to what is left of them.
    """
    x, weight, bias = normal(64, 48), normal(130, 48, seed=1), normal(130, seed=2)
    z = x @ weight.T + bias
    bar = z.std().expand(130).contiguous()
    f = kernels.above(x, weight.bfloat16(), bias, bar, z.numel())
    assert (f.values / z[f.rows, f.index] - 1).abs().max() < 2**-7
    assert not torch.equal(f.values, z[f.rows, f.index])
    away = (z > bar * 1.05).sum()
    assert away <= len(f.values) <= (z > bar * 0.95).sum()
    assert torch.equal(f.dense() > 0, (x.bfloat16() @ weight.bfloat16().T).float() + bias > bar)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_float32_whatever_dtype_the_product_had(kernels, rule):
    """Given the active set and the values that bfloat16 gave, gradients equal float32 autograd's to 1e-5.

    Selection and values are those of z = (x.bfloat16() @ W.bfloat16()).float() + b, which the reference takes with the
    gradient of the float32 product.
    """

    class Straight(DenseOps):
        def encode(self, x, W_enc, b_enc, rule, b_dec=None):
            exact = (x - b_dec) @ W_enc
            low = ((x - b_dec).bfloat16() @ W_enc.bfloat16()).float()
            return DenseLatents(select(exact + (low - exact).detach() + b_enc, rule))

    def loss(ops, p, x):
        return mse_and_l1(ops, p, x, encoded(ops, p, x, RULES[rule], True))

    p, x = drawn_parameters(), grid(40, 17, seed=5).requires_grad_()
    loss(Straight(), p, x).backward()
    wanted, found = taken(p, x, NAMES), sparse_gradients(loss, p, x, kernels, compute_dtype="bfloat16")
    for name in (*NAMES, "x"):
        near(found[name], wanted[name], what=name)
    assert not torch.equal(found["loss"], loss(DenseOps(), p, x).detach())


def test_float8_selects_and_float32_values_and_gradients_follow(kernels):
    """Who fires differs from float32 by rounding to 4 bits alone; values of those who do, and gradients, are float32's."""
    generator = torch.Generator().manual_seed(0)
    x, rows = (torch.randn(n, 48, generator=generator) for n in (40, 64))
    p = SimpleNamespace(
        W_enc=torch.nn.Parameter(torch.nn.functional.normalize(rows).T), b_enc=torch.nn.Parameter(torch.full((64,), -0.5)),
        W_dec=torch.nn.Parameter(torch.nn.functional.normalize(rows)), b_dec=torch.nn.Parameter(x.mean(0)),
    )  # fmt: skip
    adam = optimizer(p, kernels, compute_dtype="float8")
    copy = adam.rows["W_enc"].low
    assert isinstance(copy, Float8)
    z = (x - p.b_dec) @ p.W_enc + p.b_enc
    rounded = copy.values.float() * copy.scales
    near(rounded, p.W_enc.T.detach(), 2**-4)
    centred = (x - p.b_dec).detach()
    assert (copy.product(centred).float() - centred @ p.W_enc.detach()).abs().max() < 0.1 * centred.norm(dim=1).max()
    for rule, most in ((Above(), 0.12), (TopK(5), 0.35)):
        f = encoded(adam.sparse_ops(1.0), p, x, rule, True)
        wanted = select(z.detach().clone(), rule)
        kept = f.dense().detach()
        differ = ((kept > 0) != (wanted > 0)).sum() / (wanted > 0).sum()
        assert differ < most  # a selection at random differs in nearly all
        near(kept[kept > 0], z.detach()[kept > 0], 1e-5)
        value = mse(adam.sparse_ops(1.0), p, x, f)
        value.backward()
        found = {name: matrix_gradient(adam, p, name).clone() for name in ("W_enc", "W_dec")} | taken(p, x, ("b_enc", "b_dec"))
        adam.clear()
        mask = (kept > 0).float()
        mse(DenseOps(), p, x, DenseLatents(((x - p.b_dec) @ p.W_enc + p.b_enc) * mask)).backward()
        expected = taken(p, x, NAMES)
        for name in NAMES:
            near(found[name], expected[name], 1e-5)
        adam.clear()


@pytest.mark.parametrize("rule", RULES)
def test_dense_steps_under_float8_are_bfloat16s(kernels, rule):
    found = []
    for dtype in ("float8", "bfloat16"):
        p = drawn_parameters(d_in=32, d_sae=48)
        adam = optimizer(p, kernels, compute_dtype=dtype)
        f = encoded(adam.dense_ops(), p, grid(40, 32, seed=5), RULES[rule], True)
        found.append(f.values)
    assert torch.equal(*found)


def test_float8_takes_the_cut_of_a_batch_between_float32_values(kernels):
    """Entries that float8 misjudges would set BatchTopK's threshold, their least, far below the cut."""
    x, p = normal(200, 64), drawn_parameters(d_in=64, d_sae=128)
    adam = optimizer(p, kernels, compute_dtype="float8")
    f = encoded(adam.sparse_ops(1.0), p, x, BatchTopK(4), True)
    z = ((x - p.b_dec) @ p.W_enc + p.b_enc).detach()
    cut = z.flatten().sort(descending=True).values[4 * len(x) - 1]
    assert len(f.values) == 4 * len(x)
    near(f.values.min(), cut, 0.02)


def test_the_float8_copy_follows_the_weights(kernels):
    p = drawn_parameters(d_in=32, d_sae=48)
    adam = optimizer(p, kernels, compute_dtype="float8")
    for parameter in vars(p).values():
        parameter.grad = torch.ones_like(parameter)
    adam.step(0.1)
    fresh, held = Float8(p.W_enc.detach().T), adam.rows["W_enc"].low
    assert torch.equal(held.values.view(torch.uint8), fresh.values.view(torch.uint8))
    assert torch.equal(held.scales, fresh.scales)


def test_an_encoder_that_float8_products_do_not_cover_takes_bfloat16s(kernels, caplog):
    p = drawn_parameters()
    assert any(size % 16 for size in p.W_enc.shape)
    assert optimizer(p, kernels, compute_dtype="float8").rows["W_enc"].low.dtype == torch.bfloat16
    assert not isinstance(optimizer(p, kernels, compute_dtype="float8").rows["W_enc"].low, Float8)
    assert "is no multiple of 16: its product is taken in bfloat16" in caplog.text


# --- shapes


@pytest.mark.parametrize("d_in", [1, 3, 17, 48])
def test_shapes(kernels, d_in):
    """Every width with batches of 0, 1 and 5 rows in which nothing, something and everything fires."""
    turn = 0
    for d_sae in [*range(1, 18), 130]:
        for batch in (0, 1, 5):
            for bias in (-1000.0, 0.0, 1000.0):
                turn += 1
                k = (1, d_sae, (d_sae + 1) // 2)[turn % 3]
                rule = (Above(), TopK(k), BatchTopK(k), Above(grid(d_sae, seed=turn).abs()))[turn // 3 % 4]
                p, x = drawn_parameters(d_in, d_sae, turn, bias), grid(batch, d_in, seed=turn + 4).requires_grad_()
                f = encoded(SparseOps(kernels, {p.W_enc: optimizer(p, kernels).rows["W_enc"]}), p, x, rule, True)
                assert len(f) == batch
                if bias:
                    most = d_sae if isinstance(rule, Above) else k
                    assert len(f.values) == (batch * most if bias > 0 else 0)
                same_gradients(
                    lambda ops, p, x, rule=rule: mse_and_l1(ops, p, x, encoded(ops, p, x, rule, True)), p, x, kernels, 3e-5
                )


def test_several_chunks_of_rows_are_one_batch():
    """Rows of very different norms, and of none: what a row's top k suggests for the next one may be far off."""
    x, weight, bias = grid(2500, 3), grid(40, 3, seed=1), grid(40, seed=2)
    x[::2] *= 2.0 ** (torch.arange(1250)[:, None] % 9 - 4)
    x[::7] = 0
    for dtype in (torch.float32, torch.bfloat16):
        arguments = x, weight.to(dtype), bias
        for screen in (None, Screen.of(weight)) if dtype == torch.float32 else (None,):
            same_entries(CPU.topk(*arguments, 4, screen), REFERENCE.topk(*arguments, 4))
        wanted = REFERENCE.above(*arguments, bias.abs(), 100_000)
        same_entries(CPU.above(*arguments, bias.abs(), len(wanted.values)), wanted)


# --- the compiled kernels against plain PyTorch


def same_entries(found, wanted):
    assert torch.equal(found.starts, wanted.starts)
    assert torch.equal(found.latents, wanted.latents)
    assert torch.equal(found.values, wanted.values)
    assert (found.starts.dtype, found.latents.dtype, found.values.dtype) == (torch.int64, torch.int32, torch.float32)
    assert found.d_sae == wanted.d_sae


def some_latents(batch, d_sae, density, seed):
    """The same entries for both kernels."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(batch, d_sae, generator=generator) + 0.01
    f = of_dense(torch.where(torch.rand(batch, d_sae, generator=generator) < density, z, 0), REFERENCE)
    return f, SparseLatents(f.starts, f.latents, f.values, d_sae, CPU)


shapes = {
    "batch": st.integers(0, 9), "d": st.integers(1, 20), "d_sae": st.integers(1, 40), "seed": st.integers(0, 10**6),
}  # fmt: skip
densities = st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])


def test_the_cpu_gets_compiled_kernels():
    assert (REFERENCE.name, CPU.name) == ("reference", "cpu")


@settings(max_examples=60, deadline=None)
@given(**shapes, k=st.integers(1, 45), bias=st.sampled_from([-100.0, -2.0, 0.0, 2.0, 100.0]),
       product=st.sampled_from(["float32", "bfloat16", "screened"]))  # fmt: skip
def test_selection_equals_the_reference(batch, d, d_sae, seed, k, bias, product):
    x, weight = grid(batch, d, seed=seed), grid(d_sae, d, seed=seed + 1)
    bias, weight = grid(d_sae, seed=seed + 2) + bias, weight.bfloat16() if product == "bfloat16" else weight
    screen = Screen.of(weight) if product == "screened" else None
    threshold = grid(d_sae, seed=seed + 3)
    wanted = REFERENCE.above(x, weight, bias, threshold, batch * d_sae)
    same_entries(CPU.above(x, weight, bias, threshold, len(wanted.values), screen), wanted)
    if len(wanted.values):
        for kernels in (CPU, REFERENCE):
            with pytest.raises(TooDense):
                kernels.above(x, weight, bias, threshold, len(wanted.values) - 1, screen)
    same_entries(CPU.topk(x, weight, bias, k, screen), REFERENCE.topk(x, weight, bias, k))


@pytest.mark.parametrize("size", [2.0**-30, 1.0, 2.0**30])
@pytest.mark.parametrize("sign", [False, True])
def test_a_screen_loses_nothing_that_bfloat16_rounds_away(sign, size):
    """Factors that bfloat16 rounds all one way, by all it can, and bars that lie exactly on pre-activations or just below.

    Factors are 1 + n / 512 with either sign, so that sums of 17 products are exact in float32.
    """
    generator = torch.Generator().manual_seed(0)
    steps = torch.tensor([1, 3, 5, 6, 7, 9, 11, 15, 23, 31, 63, 99])

    def factors(*shape):
        values = 1 + steps[torch.randint(len(steps), shape, generator=generator)] / 512
        return values * (torch.randint(2, shape, generator=generator) * 2 - 1) if sign else values

    x, weight, bias = factors(300, 17) * size, factors(60, 17), grid(60) * size
    z = x @ weight.T + bias
    for rank in (3, 30, 270):
        at = z.sort(dim=0).values[rank].contiguous()
        for bars in (at, torch.nextafter(at, torch.tensor(-torch.inf))):
            wanted = REFERENCE.above(x, weight, bias, bars, z.numel())
            same_entries(CPU.above(x, weight, bias, bars, z.numel(), Screen.of(weight)), wanted)
    for k in (1, 7, 59):
        same_entries(CPU.topk(x, weight, bias, k, Screen.of(weight)), REFERENCE.topk(x, weight, bias, k))


def test_a_screen_of_ordinary_numbers_selects_as_float32_does():
    """Up to entries that the rounding of a float32 sum decides; values are float32's, not bfloat16's."""
    x, weight, bias = normal(1500, 48), normal(130, 48, seed=1), normal(130, seed=2)
    for found, wanted in (
        (CPU.above(x, weight, bias, bias.abs(), 10**9, Screen.of(weight)), REFERENCE.above(x, weight, bias, bias.abs(), 10**9)),
        (CPU.topk(x, weight, bias, 9, Screen.of(weight)), REFERENCE.topk(x, weight, bias, 9)),
    ):
        found, wanted = found.dense(), wanted.dense()
        both = (found != 0) & (wanted != 0)
        assert ((found != 0) ^ (wanted != 0)).sum() <= 4
        near(found[both], wanted[both], 1e-6)


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["row", "weight", "bias"])
def test_what_is_not_finite_spoils_a_screen_no_further_than_it_goes(where, what):
    """One row of x, or one latent: all others come out as without it."""
    x, weight, bias = normal(60, 48), normal(130, 48, seed=1), normal(130, seed=2)
    clean = CPU.topk(x, weight, bias, 9, Screen.of(weight)), CPU.above(x, weight, bias, bias.abs(), 10**9, Screen.of(weight))
    {"row": x, "weight": weight, "bias": bias}[where][7] = what
    found = CPU.topk(x, weight, bias, 9, Screen.of(weight)), CPU.above(x, weight, bias, bias.abs(), 10**9, Screen.of(weight))
    for mine, theirs in zip(found, clean, strict=True):
        mine, theirs = mine.dense(), theirs.dense()
        if where == "row":
            mine[7] = theirs[7] = 0
            assert torch.equal(mine, theirs)
            continue
        mine[:, 7] = theirs[:, 7] = 0
        # where latent 7 is, or was, among the k largest, another is not
        assert ((mine != theirs).sum(1) <= 1).all()
        assert (mine != 0).sum() >= (theirs != 0).sum() - len(x)


def few_reach_the_bar_of_the_row_before(scale, bias):
    """A row with enough positive latents, then one with fewer than k: with the screen's bounds all underflown to 0."""
    weight = torch.eye(8, 16) * scale
    x = torch.zeros(4, 16)
    x[0, :8], x[1, :2], x[3] = 3.0, 1.0, 2.0
    return x, weight, torch.full((8,), bias)


SEARCHES = {
    "bounds that underflow": few_reach_the_bar_of_the_row_before(1e-30, 0.0),
    "fewer than k": few_reach_the_bar_of_the_row_before(1.0, 0.0),
    "a bar that overflows": (torch.tensor([[1e-38], [100.0], [1.0]]), torch.ones(3, 1), torch.ones(3)),
    "a small row before large ones": (
        torch.cat([torch.full((1, 16), 1e-4), normal(50, 16) * 5]), normal(40, 16), torch.full((40,), 0.5),
    ),
    "squares that overflow": (normal(6, 16) * 1e20, normal(40, 16), normal(40)),
    "an infinite latent": (normal(6, 16), torch.cat([normal(9, 16), torch.full((1, 16), torch.inf)]), normal(10)),
    "infinite latents of both signs": (
        normal(6, 16).abs(), torch.full((2, 16), torch.inf) * torch.tensor([[1.0], [-1.0]]), normal(2),
    ),
    "an infinite bias": (normal(6, 16), normal(9, 16), torch.cat([normal(8), torch.tensor([torch.inf])])),
}


@pytest.mark.parametrize("case", SEARCHES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_search_under_a_screen_ends_and_finds_the_largest(case, k):
    x, weight, bias = SEARCHES[case]
    z = (x @ weight.T + bias).nan_to_num(nan=-1.0, posinf=torch.inf)
    wanted = z.clamp(min=0).topk(min(k, z.shape[1]), dim=1).values
    found = CPU.topk(x, weight, bias, k, Screen.of(weight)).dense()
    torch.testing.assert_close(found.topk(min(k, z.shape[1]), dim=1).values, wanted, rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(**shapes, density=densities)
def test_sums_equal_the_reference(batch, d, d_sae, seed, density):
    f, g = some_latents(batch, d_sae, density, seed)
    weight, bias, x = normal(d_sae, d, seed=seed), normal(d, seed=seed + 1), normal(batch, d, seed=seed + 2)
    values = normal(len(f.values), seed=seed + 3)
    near(CPU.decode(g, weight, bias), REFERENCE.decode(f, weight, bias))
    for found, wanted in zip(CPU.reconstruct(g, weight, bias, x), REFERENCE.reconstruct(f, weight, bias, x), strict=True):
        near(found, wanted)
    near(CPU.sample(g, x, weight), REFERENCE.sample(f, x, weight))
    near(CPU.row_sum(g, values), REFERENCE.row_sum(f, values))
    by, wanted = CPU.by_latent(g), REFERENCE.by_latent(f)
    for name in ("starts", "rows", "entries"):
        assert torch.equal(getattr(by, name), getattr(wanted, name))
        assert getattr(by, name).dtype == getattr(wanted, name).dtype
    near(CPU.latent_sum(by, values), REFERENCE.latent_sum(wanted, values))
    assert torch.equal(by.counts, torch.bincount(f.index, minlength=d_sae))


@settings(max_examples=80, deadline=None)
@given(**shapes, density=densities, terms=st.integers(0, 3), with_along=st.booleans(), tangent=st.booleans(),
       with_slots=st.booleans(), fresh=st.booleans())  # fmt: skip
def test_gradient_equals_the_reference(batch, d, d_sae, seed, density, terms, with_along, tangent, with_slots, fresh):
    pairs = [some_latents(batch, d_sae, density, seed + i) for i in range(terms)]
    parts = [(normal(len(f.values), seed=seed + i), normal(batch, d, seed=seed - i)) for i, (f, _) in enumerate(pairs)]
    weight = torch.nn.functional.normalize(normal(d_sae, d, seed=seed))
    along = normal(d_sae, seed=seed + 9) if with_along else None
    slots, places = None, d_sae
    if with_slots:  # some latents have a place, in any order, and there are places that none has
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(d_sae, generator=generator)[: (d_sae + 1) // 2]
        slots, places = torch.full((d_sae,), -1), len(chosen) + 2
        slots[chosen] = torch.randperm(len(chosen), generator=generator)
    outs, squares = [], []
    for number, kernels in enumerate((REFERENCE, CPU)):
        out = normal(places, d, seed=seed + 8)
        work = [Term(pair[number], *part) for pair, part in zip(pairs, parts, strict=True)]
        squares.append(kernels.gradient(work, weight, along, tangent, out, slots, fresh))
        outs.append(out)
    # a gradient of which the tangent takes nearly all away keeps the rounding of what it was
    size = max(1.0, float(sum(c.abs().sum() for c, _ in parts)))
    assert (outs[1] - outs[0]).abs().max() < 1e-5 * size
    assert (squares[1] - squares[0]).abs().max() < 1e-5 * size**2
    if slots is not None:
        assert not squares[1][slots < 0].any()
        assert torch.equal(outs[1][-1], normal(places, d, seed=seed + 8)[-1])
        near(squares[1].sum(), outs[1][: len(chosen)].square().sum())


@settings(max_examples=60, deadline=None)
@given(d=shapes["d"], d_sae=shapes["d_sae"], seed=shapes["seed"], with_low=st.booleans(), with_norms=st.booleans(),
       unit=st.booleans(), with_slots=st.booleans(), number=st.sampled_from([1, 2, 1000]))  # fmt: skip
def test_adam_equals_the_reference(d, d_sae, seed, with_low, with_norms, unit, with_slots, number):
    step = AdamStep(1e-2, 0.9, 0.999, 1e-8, number, torch.full((1,), 0.7), torch.ones(1))
    slots = torch.arange(d_sae).flip(0) - d_sae // 2 if with_slots else None
    slots = None if slots is None else slots.clamp(min=-1)
    gradient = normal(d_sae, d, seed=seed + 3)
    states = []
    for kernels in (REFERENCE, CPU):
        w = torch.nn.functional.normalize(normal(d_sae, d, seed=seed)) * 2
        m, v = normal(d_sae, d, seed=seed + 1) / 9, normal(d_sae, d, seed=seed + 2).square()
        low, norms, rounding = torch.zeros(d_sae, d, dtype=torch.bfloat16), torch.zeros(d_sae), torch.zeros(d_sae)
        copies = low if with_low else None, norms if with_norms else None
        kernels.adam(step, w, gradient, slots, m, v, *copies, unit, rounding if with_low and with_norms else None)
        near(rounding, (w - low).norm(dim=1) if with_low and with_norms else torch.zeros_like(rounding), 1e-5)
        assert torch.equal(low, w.bfloat16() if with_low else torch.zeros_like(low))
        near(norms, w.norm(dim=1) if with_norms else torch.zeros_like(norms), 1e-6)
        states.append((w, m, v))
    for found, wanted in zip(states[1], states[0], strict=True):
        # numbers of about 1 may cancel; where a second moment happens to be near 0, a weight takes a step of hundreds
        assert ((found - wanted).abs() <= 2e-6 * wanted.abs().clamp(min=1)).all()
    if unit:
        near(states[1][0].norm(dim=1), torch.ones(d_sae), 1e-6)


def test_adam_leaves_unit_rows_of_norm_0(kernels):
    weight, gradient, m, v = (torch.zeros(2, 20) for _ in range(4))
    norms = torch.ones(2)
    step = AdamStep(1e-2, 0.9, 0.999, 1e-8, 1, torch.ones(1), torch.ones(1))
    kernels.adam(step, weight, gradient, None, m, v, None, norms, True)
    assert not weight.any()
    assert not norms.any()


def test_infinite_inputs_come_to_an_end():
    """Rows with an infinity, then an ordinary one. A loop without end holds the interpreter: a process of its own."""
    code = """if True:
        import torch
        from sae.ops import kernels_for
        x = torch.ones(40, 3)
        x[:-1, 0] = torch.inf
        f = kernels_for("cpu").topk(x, torch.ones(40, 3) + torch.arange(40)[:, None], torch.zeros(40), 2)
        print(len(f.latents), f.latents.tolist()[-2:])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.strip() == "80 [38, 39]"


@pytest.mark.parametrize("rule", [Above(), TopK(2), BatchTopK(2)])
def test_a_row_that_is_not_finite_makes_the_loss_not_finite(kernels, rule):
    p, x = drawn_parameters(), grid(4, 17)
    x[2] = torch.nan
    ops = optimizer(p, kernels).sparse_ops(1.0)
    assert not mse(ops, p, x, encoded(ops, p, x, rule, True)).isfinite()


# --- ties, and BatchTopK


def test_topk_gives_ties_to_the_lower_latents(kernels):
    weight = torch.zeros(70, 2)
    bias = torch.full((70,), 1.0)
    bias[torch.tensor([3, 40, 41])] = torch.tensor([2.0, 3.0, -1.0])
    x = torch.zeros(3, 2)
    for k, wanted in ((1, [40]), (2, [3, 40]), (4, [0, 1, 3, 40]), (69, [i for i in range(70) if i != 41])):
        f = kernels.topk(x, weight, bias, k)
        assert f.latents.tolist() == wanted * 3
        assert f.starts.tolist() == [i * len(wanted) for i in range(4)]
    assert kernels.topk(x, weight, bias, 70).latents.tolist() == [i for i in range(70) if i != 41] * 3


def batch_topk(ops, p, x, k):
    f = ops.encode(x, p.W_enc, p.b_enc, BatchTopK(k))
    return f.dense().detach(), f


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(0, 9), d_sae=st.integers(1, 30), k=st.integers(1, 30), seed=st.integers(0, 10**6),
       bias=st.sampled_from([-4.0, -1.0, 0.0, 100.0]), reference=st.booleans())  # fmt: skip
def test_batchtopk_keeps_as_many_as_there_may_be_and_ties_in_the_order_of_entries(batch, d_sae, k, seed, bias, reference):
    p = drawn_parameters(2, d_sae, seed, bias)
    x = grid(batch, 2, seed=seed + 7, most=0.25)  # a coarse grid: ties everywhere
    ops = optimizer(p, kernels_for("cpu", reference)).sparse_ops(1.0)
    dense, f = batch_topk(ops, p, x, k)
    z = (x @ p.W_enc + p.b_enc).detach()
    assert len(f.values) == min(batch * min(k, d_sae), int((z > 0).sum())) == ops.entries()
    entries = sorted(((-float(v), i) for i, v in enumerate(z.flatten()) if v > 0))[: len(f.values)]
    wanted = torch.zeros(z.numel())
    for value, i in entries:
        wanted[i] = -value
    assert torch.equal(dense, wanted.view_as(z))
    assert torch.equal(dense, batch_topk(DenseOps(), p, x, k)[0])


def test_batchtopk_is_exact_whatever_the_last_batch_was_like(kernels):
    p = drawn_parameters(bias=-0.5)
    ops = optimizer(p, kernels).sparse_ops(1.0)
    sizes = [1, 1, 64, 64, 2**-6, 2**-6, 0, 1, -1, 2**10, 1, 0, 0, 2**-8, 1]
    for turn, size in enumerate(sizes):
        x = grid(30, 17, seed=turn) * size
        found, wanted = batch_topk(ops, p, x, 3)[0], batch_topk(DenseOps(), p, x, 3)[0]
        assert torch.equal(found, wanted), f"batch {turn}, {size} times as large"
        assert ops.entries() == int((wanted > 0).sum())
    with torch.no_grad():
        p.b_enc.sub_(10_000)
    assert not batch_topk(ops, p, x, 3)[0].any()


def test_batchtopk_of_a_larger_k_than_latents_is_relu(kernels):
    p, x = drawn_parameters(), grid(6, 17)
    found, _ = batch_topk(optimizer(p, kernels).sparse_ops(1.0), p, x, 48)
    assert torch.equal(found, torch.relu(x @ p.W_enc + p.b_enc).detach())


# --- too dense


def test_more_entries_than_room_are_too_dense(kernels):
    p, x = drawn_parameters(), grid(40, 17, seed=5)
    entries = int(((x - p.b_dec) @ p.W_enc + p.b_enc > 0).sum())
    ops = optimizer(p, kernels).sparse_ops((entries - 0.5) / (40 * 48))
    with pytest.raises(TooDense):
        encoded(ops, p, x, Above(), True)
    ops = optimizer(p, kernels).sparse_ops((entries + 0.5) / (40 * 48))
    encoded(ops, p, x, Above(), True)
    assert ops.entries() == entries
    assert ops.entries() == 0


def test_a_step_that_was_too_dense_leaves_nothing_to_be_counted(kernels):
    p, x = drawn_parameters(), grid(40, 17, seed=5)
    ops = optimizer(p, kernels).sparse_ops(0.2)
    encoded(ops, p, x, TopK(2), True)
    with pytest.raises(TooDense):
        encoded(ops, p, x, Above(), True)
    encoded(ops, p, x, TopK(2), True)
    assert ops.entries() == 80


# --- latents


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(0, 9), d_sae=st.integers(1, 40), density=densities, seed=st.integers(0, 10**6))
def test_latents_keep_count_and_densify(batch, d_sae, density, seed):
    for f in some_latents(batch, d_sae, density, seed):
        dense = f.dense()
        assert dense.shape == (batch, d_sae)
        same_entries(of_dense(dense, f.kernels), f)
        assert torch.equal(f.latent_counts(), (dense > 0).sum(0))
        assert f.latent_counts().dtype == torch.int64
        assert torch.equal(DenseLatents(dense).latent_counts(), f.latent_counts())
        mask = normal(len(f.values), seed=seed) > 0
        kept = f.keep(mask)
        assert torch.equal(kept.dense(), f.with_values(f.values * mask).dense())
        assert len(kept.values) == int(mask.sum())
        assert len(kept) == batch
        vector = normal(d_sae, seed=seed)
        near(f.dot(vector), dense @ vector, 1e-5)
        assert torch.equal(f.rows, torch.nonzero(dense)[:, 0])
        negative = f.with_values(-f.values)  # the identity dictionary's may be
        assert torch.equal(negative.dense(), -dense)
        assert not negative.latent_counts().any()


def test_of_dense_keeps_negative_values(kernels):
    x = grid(5, 7)
    f = of_dense(x, kernels)
    assert torch.equal(f.dense(), x)
    assert len(f.values) == int((x != 0).sum())


# --- equal bits


def a_pass_through_everything(kernels):
    x, weight, bias, decoder = normal(300, 20), normal(130, 20, seed=1), normal(130, seed=2), normal(130, 20, seed=3)
    unit = torch.nn.functional.normalize(decoder)
    f = kernels.above(x, weight, bias, bias.abs(), 300 * 130)
    top = kernels.topk(x, weight.bfloat16(), bias, 7)
    residual, squares, dots = kernels.reconstruct(f, decoder, x[0], x)
    out, m, v, low = (torch.zeros_like(decoder) for _ in range(4))
    low, norms = low.bfloat16(), bias.clone()
    square = kernels.gradient([Term(f, dots, x), Term(top, top.values, residual)], unit, bias, True, out, None, True)
    w = decoder.clone()
    kernels.adam(AdamStep(1e-2, 0.9, 0.999, 1e-8, 3, torch.full((1,), 0.7), torch.ones(1)), w, out, None, m, v, low, norms, True)
    sums = [kernels.row_sum(f, dots), kernels.latent_sum(f.by_latent, dots), kernels.sample(top, residual, decoder)]
    return [f.starts, f.latents, f.values, top.starts, top.latents, top.values, residual, squares, dots, f.by_latent.rows,
            f.by_latent.entries, square, out, w, m, v, low, norms, kernels.decode(top, decoder, x[0]), *sums]  # fmt: skip


def test_the_number_of_threads_and_of_calls_changes_no_bit(kernels, threads):
    runs = []
    for count in (1, 2, 2, 1):
        threads(count)
        runs.append(a_pass_through_everything(kernels))
        p, x = drawn_parameters(), grid(40, 17, seed=5).requires_grad_()
        runs[-1] += sparse_gradients(
            lambda ops, p, x: all_at_once(ops, p, x, encoded(ops, p, x, BatchTopK(5), True)), p, x, kernels
        ).values()
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


# --- who computes


@pytest.fixture
def no_kernels_known():
    kernels_for.cache_clear()
    yield
    kernels_for.cache_clear()


@pytest.mark.usefixtures("no_kernels_known")
def test_without_numba_plain_pytorch_computes_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("sae.ops.cpu", "sae.ops.cpu_loops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with caplog.at_level(logging.INFO, "sae"):
        assert [kernels_for("cpu").name for _ in range(3)] == ["reference"] * 3
    assert len(caplog.records) == 1
    assert "numba" in caplog.text
    assert "plain PyTorch" in caplog.text


@pytest.mark.usefixtures("no_kernels_known")
def test_an_unknown_device_gets_plain_pytorch_and_one_line_says_so(caplog):
    with caplog.at_level(logging.INFO, "sae"):
        assert [kernels_for("mps").name for _ in range(3)] == ["reference"] * 3
    assert len(caplog.records) == 1
    assert "no sparse kernels for mps" in caplog.text


@pytest.mark.usefixtures("no_kernels_known")
def test_asked_for_the_reference_nothing_is_logged(caplog):
    with caplog.at_level(logging.INFO, "sae"):
        assert kernels_for("cpu", reference=True).name == "reference"
        assert kernels_for("cpu").name == "cpu"
    assert not caplog.records
