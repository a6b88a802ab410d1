"""The Triton kernels against plain PyTorch: compiled where there is a CUDA device, else through Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA and "triton" not in sys.modules and __name__ != "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it as it is imported, and again as each kernel is defined
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from sae.ops import gpu, triton_kernels  # noqa: E402
from sae.ops.gpu import TritonKernels  # noqa: E402
from sae.ops.kernels import AdamStep, Term, TooDense, kernels_for  # noqa: E402
from sae.ops.latents import BatchTopK, SparseLatents, stacked  # noqa: E402
from sae.ops.reference import ReferenceKernels  # noqa: E402
from sae.ops.training import Rows, SparseOps, select  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
RUNS = CUDA or {type(f).__name__ for f in (gpu._adam, triton_kernels.tl.sum)} == {"InterpretedFunction"}
REFERENCE = ReferenceKernels()
SHAPES = [(9, 20, 37), (3, 7, 1), (5, 16, 17), (4, 33, 130), (0, 8, 12)]  # batch, d, d_sae
LONG = (4, 33, 2100)  # several blocks of latents

here = pytest.mark.skipif(not RUNS, reason="Triton was imported before the interpreter was asked for")
on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]


@pytest.mark.skipif(RUNS, reason="the tests below run in this process")
def test_all_of_this_file_in_a_process_of_its_own():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", "not hopper"]
    subprocess.run(command, env=environment, check=True)


def test_every_kernel_compiles_for_hopper(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    names = "_count_above _write_above _candidates _pick _pack _decode _sample _segment_sum _gradient _adam"
    assert set(done.stdout.split()) == set(names.split())


@pytest.fixture
def ops():
    return TritonKernels()


def drawn(*shape, seed=0, device=DEVICE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def drawn_product(batch, d, d_sae):
    """x, weight and bias whose product is exact in bfloat16, no two pre-activations of a row the same."""
    x, weight = drawn(batch, d).sign(), drawn(d_sae, d, seed=1).sign()
    bias = torch.arange(d_sae, device=DEVICE) / (2 * d_sae) + 0.01 - d**0.5
    return x, weight, bias


def padded(f, kernels, more=13):
    """The same entries in longer arrays, as they come where the length was not known."""
    latents, values = torch.nn.functional.pad(f.latents, (0, more)), torch.nn.functional.pad(f.values, (0, more))
    return SparseLatents(f.starts, latents, values, f.d_sae, kernels)


def drawn_latents(batch, d_sae, keep=0.3, seed=2, kernels=REFERENCE):
    """Random entries, among them an empty row and a full one, a latent that never fires and one that always does."""
    x = drawn(batch, d_sae, seed=seed).abs() + 0.1
    chosen = torch.rand(batch, d_sae, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < keep
    chosen[:, 0] = True
    chosen[1:2], chosen[2:3] = False, True
    chosen[:, -1:] &= d_sae == 1
    rows, latents = torch.nonzero(chosen, as_tuple=True)
    starts = torch.nn.functional.pad(chosen.sum(1).cumsum(0), (1, 0))
    return SparseLatents(starts, latents.int(), x[rows, latents], d_sae, kernels)


def close(a, b, tolerance=1e-5):
    largest = float(b.abs().max()) if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(largest, 1e-3))


def same_entries(found, wanted):
    entries = len(wanted.latents)
    assert torch.equal(found.starts, wanted.starts)
    assert torch.equal(found.latents[:entries], wanted.latents)
    close(found.values[:entries], wanted.values)
    assert not found.latents[entries:].any()
    assert not found.values[entries:].any()
    assert found.latents.dtype == torch.int32


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, LONG])
def test_above(ops, monkeypatch, shape, dtype):
    monkeypatch.setattr(gpu, "Z_BYTES", shape[2] * 16)  # some rows at a time
    x, weight, bias = drawn_product(*shape)
    weight, threshold = weight.to(dtype), drawn(shape[2], seed=3) / 3
    for bounds in (threshold, threshold + 1e9, threshold - 1e9):  # some, none and all
        wanted = REFERENCE.above(x, weight, bias, bounds, 10**9)
        for room in (len(wanted.latents), len(wanted.latents) + 5, 10**9):
            found = ops.above(x, weight, bias, bounds, room)
            same_entries(found, wanted)
            assert len(found.latents) == min(room, shape[0] * shape[2])


@here
def test_above_with_too_little_room_tells_and_writes_nothing_outside(ops, monkeypatch):
    x, weight, bias = drawn_product(9, 20, 37)
    threshold = torch.zeros(37, device=DEVICE)
    wanted = REFERENCE.above(x, weight, bias, threshold, 10**9)
    room, behind = len(wanted.latents) // 2, 64
    memory = {}

    def guarded(size, *, dtype=torch.float32, device=None):
        memory[dtype] = torch.full((size + behind,), 77, dtype=dtype, device=device)
        memory[dtype][:size] = 0
        return memory[dtype][:size]

    monkeypatch.setattr(gpu.torch, "zeros", guarded)
    found = ops.above(x, weight, bias, threshold, room)
    monkeypatch.undo()
    assert int(found.starts[-1]) == len(wanted.latents) > room
    assert torch.equal(found.latents, wanted.latents[:room])
    close(found.values, wanted.values[:room])
    assert all((whole[-behind:] == 77).all() for whole in memory.values())
    assert len(ops.decode(found, drawn(37, 8), drawn(8))) == 9  # what comes next stays within the arrays too
    assert [len(a) for a in ops.reconstruct(found, drawn(37, 8), drawn(8), drawn(9, 8))] == [9, 9, room]
    assert len(ops.sample(found, drawn(9, 8), drawn(37, 8))) == room
    assert len(ops.row_sum(found, found.values)) == 9
    assert int(found.by_latent.starts[-1]) == room
    assert torch.equal(found.by_latent.entries.long().sort().values, torch.arange(room, device=DEVICE))
    assert len(ops.latent_sum(found.by_latent, found.values)) == 37


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, LONG])
def test_topk(ops, monkeypatch, shape, dtype):
    monkeypatch.setattr(gpu, "Z_BYTES", shape[2] * 16)
    x, weight, bias = drawn_product(*shape)
    for k in (1, 5, shape[2] + 3):
        for more in (0.0, -1e9, 1e3):  # some, none and all
            wanted = REFERENCE.topk(x, weight.to(dtype), bias + more, k)
            same_entries(ops.topk(x, weight.to(dtype), bias + more, k), wanted)


@here
@pytest.mark.parametrize("d_sae", [30, 3000])
def test_topk_gives_ties_to_the_lower_latent(ops, d_sae):
    x, weight = torch.ones(3, 4, device=DEVICE), torch.ones(d_sae, 4, device=DEVICE)
    bias = torch.zeros(d_sae, device=DEVICE)
    bias[torch.tensor([3, 20, 25, d_sae - 1])] = torch.tensor([1.0, 2.0, -1.0, 1.0], device=DEVICE)
    for k in (1, 2, 3, 8, 29):  # of 3000 equal ones, more than there are places for candidates
        same_entries(ops.topk(x, weight, bias, k), REFERENCE.topk(x, weight, bias, k))
    few = torch.where(torch.arange(d_sae, device=DEVICE) % 2 == 0, bias, -9.0)
    same_entries(ops.topk(x, weight, few, 40), REFERENCE.topk(x, weight, few, 40))


@here
@pytest.mark.filterwarnings("ignore:invalid value")
def test_topk_of_nan_infinity_and_the_smallest_numbers(ops):
    values = torch.tensor([float("nan"), float("inf"), 1e-44, 1e-45, 0.0, -0.0, -float("inf"), 1.0, -1.0], device=DEVICE)
    found = ops.topk(torch.zeros(1, 2, device=DEVICE), torch.zeros(9, 2, device=DEVICE), values, 5)
    assert found.latents.tolist() == [1, 2, 3, 7, 0]
    assert found.starts.tolist() == [0, 4]


@here
def test_topk_falls_back_where_k_is_large(ops, monkeypatch, caplog):
    monkeypatch.setattr(gpu, "MAX_K", 3)
    gpu._warn.cache_clear()
    x, weight, bias = drawn_product(9, 20, 37)
    for _ in range(2):
        found = ops.topk(x, weight, bias, 4)
        same_entries(found, REFERENCE.topk(x, weight, bias, 4))
        assert found.kernels is ops
    assert len(caplog.records) == 1


@here
@pytest.mark.parametrize("limit", [8192, 4])  # the second: all of it by the fallback
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_reconstruct_and_sample(ops, monkeypatch, shape, limit):
    monkeypatch.setattr(gpu, "MAX_D", limit)
    batch, d, d_sae = shape
    f = drawn_latents(batch, d_sae)
    weight, bias, x = drawn(d_sae, d), drawn(d, seed=3), drawn(batch, d, seed=4)
    for g in (padded(f, ops), padded(f, ops, 0)):
        close(ops.decode(g, weight, bias), REFERENCE.decode(f, weight, bias))
        residual, squares, dots = ops.reconstruct(g, weight, bias, x)
        for found, wanted in zip((residual, squares), REFERENCE.reconstruct(f, weight, bias, x)[:2], strict=True):
            close(found, wanted)
        for found, vector in ((dots, residual), (ops.sample(g, x, weight), x)):
            close(found[: len(f.latents)], REFERENCE.sample(f, vector, weight))
            assert len(found) == len(g.latents)
            assert not found[len(f.latents) :].any()


@here
@pytest.mark.parametrize("shape", SHAPES)
def test_by_latent_and_the_sums(ops, shape):
    f = drawn_latents(shape[0], shape[2])
    g = padded(f, ops)
    by, wanted = ops.by_latent(g), REFERENCE.by_latent(f)
    entries = len(f.latents)
    assert torch.equal(by.starts, wanted.starts)
    assert torch.equal(by.rows[:entries], wanted.rows)
    assert torch.equal(by.entries[:entries], wanted.entries)
    assert by.rows.dtype == by.entries.dtype == torch.int32
    values = drawn(len(g.latents), seed=5)  # not zero behind the last entry: must not count
    close(ops.latent_sum(by, values), REFERENCE.latent_sum(wanted, values[:entries]))
    close(ops.row_sum(g, values), REFERENCE.row_sum(f, values[:entries]))
    assert torch.equal(g.latent_counts(), torch.bincount(f.index, minlength=shape[2]))


@here
def test_padded_latents_keep_and_densify_as_exact_ones(ops):
    f = drawn_latents(9, 37)
    g = padded(f, ops)
    assert torch.equal(f.dense(), g.dense())
    mask = drawn(len(g.latents), seed=6) > 0
    kept, wanted = g.keep(mask), f.keep(mask[: len(f.latents)])
    same_entries(kept, wanted)
    assert torch.equal(kept.dense(), wanted.dense())


@here
def test_gradients_through_padded_latents(ops):
    f = drawn_latents(9, 37)
    gradients = []
    for g in (padded(f, ops), f):
        values, vector = g.values.clone().requires_grad_(), drawn(37, seed=7).requires_grad_()
        g.with_values(values).dot(vector).square().sum().backward()
        gradients.append((values.grad[: len(f.latents)], vector.grad))
    for found, wanted in zip(*gradients, strict=True):
        close(found, wanted)


@here
@pytest.mark.parametrize("limit", [8192, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(ops, monkeypatch, shape, limit):
    monkeypatch.setattr(gpu, "MAX_D", limit)
    batch, d, d_sae = shape
    weight = torch.nn.functional.normalize(drawn(d_sae, d))
    fs = [drawn_latents(batch, d_sae, seed=s) for s in (2, 3)]
    longer = [padded(f, ops) for f in fs]
    terms = [Term(g, drawn(len(g.latents), seed=4), drawn(batch, d, seed=5)) for g in longer]
    exact = [Term(f, t.coefficients[: len(f.latents)], t.dense) for f, t in zip(fs, terms, strict=True)]
    slots = torch.full((d_sae,), -1, device=DEVICE)
    filled = torch.arange(0, d_sae, 2, device=DEVICE)
    slots[filled] = filled.flip(0) // 2
    cases = [(2, True, True, None, False), (1, False, False, None, True)]
    cases += [(2, True, True, slots, True), (0, True, False, slots, False)]
    for number, along, tangent, at, fresh in cases:
        rows = d_sae if at is None else len(filled) + 2
        out, wanted_out = drawn(rows, d, seed=8), drawn(rows, d, seed=8)
        vector = drawn(d_sae, seed=9) if along else None
        squares = ops.gradient(terms[:number], weight, vector, tangent, out, at, fresh)
        wanted = REFERENCE.gradient(exact[:number], weight, vector, tangent, wanted_out, at, fresh)
        close(out, wanted_out)
        close(squares, wanted)
        assert at is None or not squares[at < 0].any()


def stepper(number, clip=0.7):
    clip_of, pace = torch.full((1,), clip, device=DEVICE), torch.ones(1, device=DEVICE)
    return AdamStep(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, step=number, clip=clip_of, pace=pace)


@here
@pytest.mark.parametrize(("shape", "norms"), [((17, 20), True), ((1, 5), True), ((9, 33), False), ((1, 2500), False)])
def test_adam(ops, shape, norms):
    weight = drawn(*shape)
    judge = weight.clone().requires_grad_()
    torch_adam = torch.optim.Adam([judge], lr=1e-2)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    low, norm = torch.zeros_like(weight, dtype=torch.bfloat16), torch.zeros(shape[0], device=DEVICE)
    for number in range(1, 5):
        gradient = drawn(*shape, seed=number)
        judge.grad = gradient * 0.7
        torch_adam.step()
        ops.adam(stepper(number), weight, gradient, None, m, v, low, norm if norms else None, False)
        close(weight, judge.detach(), 1e-6)
    if norms:
        close(norm, weight.norm(dim=1))
    if CUDA:
        assert torch.equal(low, weight.bfloat16())
    else:  # the interpreter cuts where the card rounds to nearest
        torch.testing.assert_close(low.float(), weight, rtol=2**-7, atol=0)


@here
@pytest.mark.parametrize("limit", [8192, 4])
def test_adam_of_unit_rows_and_slots(ops, monkeypatch, limit):
    monkeypatch.setattr(gpu, "MAX_D", limit)
    weight, slots = drawn(6, 20), torch.tensor([2, -1, 0, -1, 1, -1], device=DEVICE)
    state = [weight, drawn(6, 20, seed=1) / 9, drawn(6, 20, seed=2).abs(), torch.zeros(6, device=DEVICE)]
    for number in (1, 2):
        wanted = [a.clone() for a in state]
        gradient = drawn(3, 20, seed=3)
        for kernels, (w, m, v, norms) in ((ops, state), (REFERENCE, wanted)):
            kernels.adam(stepper(number), w, gradient, slots, m, v, None, norms, True)
        for found, other in zip(state, wanted, strict=True):
            close(found, other, 1e-6)
        close(state[3], torch.ones(6, device=DEVICE), 1e-6)


@here
def test_adam_leaves_rows_of_norm_0(ops):
    weight, zeros = torch.zeros(2, 20, device=DEVICE), [torch.zeros(2, 20, device=DEVICE) for _ in range(3)]
    ops.adam(stepper(1), weight, zeros[0], None, zeros[1], zeros[2], None, None, True)
    assert not weight.any()


def all_of_it(ops, x, weight, bias, decoder):
    """One pass through every operation."""
    f = ops.above(x, weight, bias, torch.zeros_like(bias), x.shape[0] * len(bias))
    top = ops.topk(x, weight, bias, 7)
    residual, squares, dots = ops.reconstruct(f, decoder, x.mean(0), x)
    by = f.by_latent
    out = torch.zeros_like(decoder)
    square = ops.gradient([Term(f, dots, x), Term(top, top.values, residual)], decoder, bias, True, out, None, True)
    slots = torch.arange(len(decoder), device=x.device) - 1
    square += ops.gradient([Term(top, top.values, x)], decoder, None, False, out, slots, False)
    m, v, low = torch.zeros_like(out), torch.zeros_like(out), out.bfloat16()
    w, norms = decoder.clone(), bias.clone()
    ops.adam(stepper(3), w, out, slots, m, v, low, norms, True)
    ops.adam(stepper(3), w, out, None, m, v, None, None, False)
    sums = [ops.row_sum(f, dots), ops.latent_sum(by, dots), ops.sample(top, residual, decoder), ops.decode(top, decoder, x[0])]
    return [f.starts, f.latents, f.values, top.starts, top.latents, top.values, residual, squares, dots, by.entries,
            by.rows, square, out, m, v, low, w, norms, *sums]  # fmt: skip


@here
def test_equal_inputs_give_equal_bits(ops):
    x, weight, bias = drawn(9, 20), drawn(37, 20), drawn(37)
    first, second = (all_of_it(ops, x, weight, bias, torch.nn.functional.normalize(weight)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_rows", [3, 20, 1000], ids=["rows of a member", "two members", "all members"])
def test_selection_of_a_stack(ops, monkeypatch, z_rows, dtype):
    members, batch, d, d_sae, ks = 3, 9, 20, 37, (1, 5, 40)
    monkeypatch.setattr(gpu, "Z_BYTES", z_rows * d_sae * dtype.itemsize)
    x, weight, bias = drawn(members * batch, d), drawn(members * d_sae, d, seed=1).to(dtype), drawn(members * d_sae, seed=2)
    x = x.to(dtype).float()
    found = ops.above(x, weight, bias, bias.abs(), 10**6, None, members)
    wanted = REFERENCE.above(x, weight.float(), bias, bias.abs(), 10**6, None, members)
    if dtype == torch.float32:  # in bfloat16 a product that was rounded may lie on the other side
        same_entries(found, wanted)
    parts = zip(*(t.chunk(members) for t in (x, weight, bias)), strict=True)
    one_by_one = [ops.above(*part, part[2].abs(), 10**6) for part in parts]
    same_entries(found, stacked([gpu._exact(f) for f in one_by_one]))
    found = ops.topk(x, weight, bias, ks, None, members)
    parts = zip(*(t.chunk(members) for t in (x, weight, bias)), ks, strict=True)
    same_entries(found, stacked([gpu._exact(ops.topk(*part)) for part in parts]))
    assert found.members == members


@here
def test_batch_topk_of_a_stack_that_looks_at_no_number(ops):
    members, batch, d, d_sae, ks = 3, 16, 8, 24, (1, 3, 5)
    x, bias = drawn(members * batch, d).mul(2).round(), torch.zeros(members * d_sae, device=DEVICE)  # with ties
    weight = drawn(members * d_sae, d, seed=1).sign()
    sparse = SparseOps(ops, {}, members=members)
    for floor in (0.0, 4.0):
        sparse._floors[bias] = torch.full((members,), floor, device=DEVICE)
        found = sparse._batch_topk_unseen(x, Rows(weight), weight, bias, ks)
        wanted = torch.stack(
            [select(own @ w.T, BatchTopK(k)) for own, w, k in zip(x.chunk(members), weight.chunk(members), ks, strict=True)]
        )
        assert torch.equal(found.dense(), wanted)
        assert sparse.entries() >= batch * sum(ks)
        assert (sparse._floors[bias] > 0).all()
    sparse._floors[bias] = torch.full((members,), 1e9, device=DEVICE)  # too high a floor is found out
    sparse._batch_topk_unseen(x, Rows(weight), weight, bias, ks)
    with pytest.raises(TooDense):
        sparse.entries()


@here
def test_adam_of_a_stack(ops):
    shape, clip, pace = (12, 40), torch.tensor([0.5, 1.0, 0.1], device=DEVICE), torch.tensor([1.0, 3.0, 0.0], device=DEVICE)
    step = AdamStep(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, step=3, clip=clip, pace=pace)
    state = [drawn(*shape), drawn(*shape, seed=1) / 9, drawn(*shape, seed=2).abs()]
    wanted = [a.clone() for a in state]
    for kernels, (w, m, v) in ((ops, state), (REFERENCE, wanted)):
        kernels.adam(step, w, drawn(*shape, seed=3), None, m, v, None, None, False)
    for found, other in zip(state, wanted, strict=True):
        close(found, other, 1e-6)
    assert torch.equal(state[0][8:], drawn(*shape)[8:])  # no pace, no step


def at_size(dtype, batch=512, d=2304, d_sae=16384):
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(n, d, generator=generator, device="cuda") for n in (batch, d_sae))
    bias = torch.randn(d_sae, generator=generator, device="cuda")
    return x, (weight / d**0.5).to(dtype), bias - 2, torch.nn.functional.normalize(weight)


class TestAtSize:
    pytestmark = on_cuda

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_selection(self, ops, dtype):
        assert kernels_for("cuda").name == "triton"
        x, weight, bias, _ = at_size(dtype)
        threshold = torch.rand_like(bias)
        for k in (1, 32, 600, 4000):
            same_entries(ops.topk(x, weight, bias, k), REFERENCE.topk(x, weight, bias, k))
        wanted = REFERENCE.above(x, weight, bias, threshold, 10**9)
        same_entries(ops.above(x, weight, bias, threshold, 2 * len(wanted.latents)), wanted)
        assert int(ops.above(x, weight, bias, threshold, 1000).starts[-1]) == len(wanted.latents)
        rounded, flat = x.mul(2).round(), torch.zeros_like(bias)  # many ties; then the lower latent wins
        same_entries(ops.topk(rounded, weight.sign(), flat, 64), REFERENCE.topk(rounded, weight.sign(), flat, 64))
        same_entries(ops.topk(x * 0, weight, flat + 1, 64), REFERENCE.topk(x * 0, weight, flat + 1, 64))

    @pytest.mark.parametrize("d", [2304, 100, 8192])
    def test_sums(self, ops, d):
        x, weight, bias, _ = at_size(torch.float32)
        decoder, y = torch.nn.functional.normalize(drawn(len(weight), d)), drawn(len(x), d, seed=1)
        wanted = REFERENCE.topk(x, weight, bias, 64)
        f, entries = padded(wanted, ops, 999), len(wanted.latents)
        both = ops.reconstruct(f, decoder, y[0], y), REFERENCE.reconstruct(wanted, decoder, y[0], y)
        for found, other in zip(*both, strict=True):
            close(found[: len(other)], other)
        close(ops.decode(f, decoder, y[0]), REFERENCE.decode(wanted, decoder, y[0]))
        close(ops.sample(f, y, decoder)[:entries], REFERENCE.sample(wanted, y, decoder))
        close(ops.row_sum(f, f.values), REFERENCE.row_sum(wanted, wanted.values))
        close(ops.latent_sum(f.by_latent, f.values), REFERENCE.latent_sum(wanted.by_latent, wanted.values))
        out, other = torch.zeros_like(decoder), torch.zeros_like(decoder)
        squares = ops.gradient([Term(f, f.values, y)] * 2, decoder, bias, True, out, None, True)
        close(squares, REFERENCE.gradient([Term(wanted, wanted.values, y)] * 2, decoder, bias, True, other, None, True), 1e-4)
        close(out, other)

    @pytest.mark.parametrize(("shape", "unit"), [((4000, 2304), True), ((1, 3_000_001), False), ((300, 8192), True)])
    def test_adam(self, ops, shape, unit):
        state = [drawn(*shape), drawn(*shape, seed=1) / 9, drawn(*shape, seed=2).abs()]
        state += [torch.zeros_like(state[0], dtype=torch.bfloat16), torch.zeros(shape[0], device="cuda")]
        wanted = [a.clone() for a in state]
        for kernels, (w, m, v, low, norms) in ((ops, state), (REFERENCE, wanted)):
            kernels.adam(stepper(2), w, drawn(*shape, seed=3), None, m, v, low, norms if unit else None, unit)
        assert torch.equal(state[3], state[0].bfloat16())
        for found, other in zip(state[:3] + state[4:], wanted[:3] + wanted[4:], strict=True):
            close(found, other, 1e-6)

    def test_nothing_waits_and_equal_inputs_give_equal_bits(self, ops):
        inputs = at_size(torch.bfloat16)
        first = all_of_it(ops, *inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = all_of_it(ops, *inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def compile_everything():
    """Compile what a pass through every operation launches, as a launch would; return the kernels' names."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
    names = set()

    def launch(kernel, programs, warps, *arguments, **constants):
        signature, attributes, fixed = {}, {}, {}
        for place, name in enumerate(kernel.arg_names):
            value = constants[name] if name in constants else arguments[place]
            if isinstance(value, torch.Tensor):
                signature[name] = types[value.dtype]
            elif name in constants or value == 1:
                signature[name], fixed[(place,)] = "constexpr", value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and name not in constants):
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, fixed, attributes)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        names.add(kernel.fn.__name__)

    gpu._launch = launch
    for d, d_sae, dtype in ((7, 1, torch.float32), (2304, 4096, torch.bfloat16)):
        all_of_it(TritonKernels(), drawn(3, d), drawn(d_sae, d).to(dtype), drawn(d_sae), drawn(d_sae, d))
    return names


if __name__ == "__main__":
    print(*compile_everything())
