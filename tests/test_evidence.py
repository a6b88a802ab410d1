"""The streaming pass over a store against brute force: everything encoded at once, everything sorted.

Activations and weights are multiples of 1/64 and small, so float32 sums are exact in any order and results must be equal to
the bit, whatever the block sizes.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_servers import make_store
from torch import Tensor

from activation_store import ActivationStore
from activation_store.errors import InputError
from explain.evidence import Evidence, Ranking, gather_evidence, window_range
from sae.architectures.identity import IdentitySAE
from sae.architectures.standard import StandardSAE
from sae.sae import HISTOGRAM_EDGES, SAE, SAEConfig
from sae.statistics import latent_statistics

HOOK = "blocks.0.hook_resid_post"
D_IN, D_SAE, CONTEXT, SEQUENCES, TRAIN_SEQUENCES = 8, 24, 16, 1100, 600
SPECIAL = (0, 3)
DEAD, ONLY_ON_SPECIAL, RARE = 0, 1, 2
BLOCK = 4096  # rows that the pass reads at once: both splits here are longer


def grid(chance: np.random.Generator, limit: int, *shape: int) -> np.ndarray:
    return (chance.integers(-limit, limit + 1, shape) / 64).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """1100 sequences of 16; every row opens with special token 0, and one token in twenty is special token 3.

    Special tokens have activations far above all others, as attention sinks do in real models.
    """
    chance = np.random.default_rng(1)
    tokens = chance.integers(4, 40, (SEQUENCES, CONTEXT)).astype(np.int32)
    tokens[chance.random(tokens.shape) < 0.05] = 3
    tokens[:, 0] = 0
    x = grid(chance, 255, tokens.size, D_IN)
    x[np.isin(tokens.reshape(-1), SPECIAL)] *= 32
    folder = tmp_path_factory.mktemp("evidence") / "store"
    return make_store(folder, tokens, {HOOK: x}, TRAIN_SEQUENCES, SPECIAL, shard_sequences=7)


@pytest.fixture(scope="module")
def sae() -> StandardSAE:
    """Random weights. Latent 0 never fires, latent 1 only as high as special tokens reach, latent 2 rarely."""
    chance = np.random.default_rng(2)
    sae = StandardSAE(SAEConfig("standard", D_IN, D_SAE, HOOK))
    with torch.no_grad():
        sae.W_enc.copy_(torch.from_numpy(grid(chance, 63, D_IN, D_SAE)))
        sae.W_dec.copy_(sae.W_enc.T)
        sae.b_enc.copy_(torch.from_numpy(grid(chance, 255, D_SAE)))
        sae.b_dec.copy_(torch.from_numpy(grid(chance, 63, D_IN)))
        sae.b_enc[DEAD] = -10_000
        sae.b_enc[ONLY_ON_SPECIAL] = -33  # |x - b_dec| <= 5, |W| < 1: without special tokens never above 8 * 5
        sae.W_enc[:, ONLY_ON_SPECIAL].clamp_(-0.5, 0.5)
        sae.W_enc[:, RARE] = 0.75
        sae.b_enc[RARE] = -15
    return sae.requires_grad_(False)


@torch.inference_mode()
def brute(sae: SAE, store: ActivationStore, split: str) -> tuple[Tensor, Tensor]:
    """All latents of a split at once, (row, d_sae), and which rows are not special."""
    border = TRAIN_SEQUENCES * CONTEXT
    rows = slice(0, border) if split == "train" else slice(border, store.rows)
    plain = torch.from_numpy(~np.isin(store.tokens.reshape(-1), SPECIAL))[rows]
    return sae.encode(store.read(HOOK, rows)), plain


def peaks(sae: SAE, store: ActivationStore, split: str, window: int) -> tuple[Tensor, int]:
    """Each window's maximum, (window, d_sae), and the number of the split's first window."""
    f, plain = brute(sae, store, split)
    first = 0 if split == "train" else TRAIN_SEQUENCES * CONTEXT // window
    return torch.where(plain[:, None], f, 0.0).view(-1, window, f.shape[1]).amax(1), first


def gather(sae: SAE, store: ActivationStore, split: str = "train", **settings: object) -> Evidence:
    return gather_evidence(sae, store, HOOK, split, **{"window": 8, "top": 6, "sample": 5, "seed": 0, **settings})


def assert_equal(a: Evidence, b: Evidence) -> None:
    for name in ("top", "sample"):
        for part in ("keys", "values", "windows"):
            assert torch.equal(getattr(getattr(a, name), part), getattr(getattr(b, name), part)), (name, part)
    for part in ("max_activation", "density", "histogram"):
        assert torch.equal(getattr(a.statistics, part), getattr(b.statistics, part)), part
    assert (a.statistics.tokens, a.windows) == (b.statistics.tokens, b.windows)


# --- rankings


@settings(deadline=None)  # the first example compiles the loops
@given(
    st.permutations(range(1, 31)), st.integers(1, 12), st.lists(st.integers(0, 30), max_size=6), st.integers(0, 30)
)
def test_ranking_keeps_the_best_however_candidates_arrive(order: list[int], k: int, cuts: list[int], idle: int) -> None:
    keys = torch.tensor([float(key - idle) for key in order])  # `idle` of them are not above zero and must not count
    ranking = Ranking.empty(2, k)
    edges = sorted({0, len(order), *cuts})
    for start, stop in pairwise(edges):
        part = torch.cat([keys[start:stop], -keys[start:stop]])  # a second latent with the order turned about
        latents = torch.arange(2).repeat_interleave(stop - start)
        fires = part > 0
        ranking.update(latents[fires], part[fires], 100 * part[fires], torch.arange(1000 + start, 1000 + stop).repeat(2)[fires])
    for latent, column in enumerate((keys, -keys)):
        best = [i for i in sorted(range(len(order)), key=lambda i: -float(column[i])) if column[i] > 0][:k]
        missing = k - len(best)
        assert ranking.windows[latent].tolist() == [1000 + i for i in best] + [-1] * missing
        assert ranking.keys[latent].tolist()[: len(best)] == [float(column[i]) for i in best]
        assert ranking.values[latent].tolist()[: len(best)] == [100 * float(column[i]) for i in best]


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("window", [2, 8, 16])
def test_top_windows_equal_a_full_sort(sae: SAE, store: ActivationStore, split: str, window: int) -> None:
    k = 12
    found = gather(sae, store, split, window=window, top=k).top
    peak, first = peaks(sae, store, split, window)
    assert len(peak) * window > BLOCK  # else no two blocks were merged
    shown = 0
    for latent in range(D_SAE):
        order = torch.argsort(peak[:, latent], descending=True)
        firing = int((peak[:, latent] > 0).sum())
        best = peak[order, latent][: min(k, firing)]
        missing = k - len(best)
        assert found.values[latent, : len(best)].tolist() == best.tolist()
        assert found.windows[latent].tolist()[len(best) :] == [-1] * missing
        numbers = found.windows[latent, : len(best)]
        assert len(set(numbers.tolist())) == len(best)
        assert peak[numbers - first, latent].tolist() == best.tolist()
        if len(set(peak[order, latent][: k + 1].tolist())) == k + 1 and firing > k:  # no ties: the windows are determined
            assert (numbers - first).tolist() == order[:k].tolist()
            shown += 1
    assert shown >= D_SAE // 2
    assert (found.windows[DEAD] == -1).all()


def test_more_places_than_windows_stay_empty(sae: SAE, store: ActivationStore) -> None:
    count = TRAIN_SEQUENCES * CONTEXT // 16
    found = gather(sae, store, window=16, top=count + 50, sample=count + 50)
    peak, _ = peaks(sae, store, "train", 16)
    for ranking in (found.top, found.sample):
        assert (ranking.windows >= 0).sum(1).tolist() == (peak > 0).sum(0).tolist()


# --- the sample


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_sample_is_distinct_firing_windows(sae: SAE, store: ActivationStore, split: str) -> None:
    k = 9
    evidence = gather(sae, store, split, sample=k, seed=4)
    peak, first = peaks(sae, store, split, 8)
    firing = (peak > 0).sum(0)
    assert 0 < firing[RARE] < k  # the case of fewer firing windows than places is among them
    assert evidence.firing_windows().tolist() == firing.clamp(max=k).tolist()
    for latent in range(D_SAE):
        windows = [w for w in evidence.sample.windows[latent].tolist() if w >= 0]
        assert len(set(windows)) == len(windows) == min(k, int(firing[latent]))
        values = [float(peak[w - first, latent]) for w in windows]
        assert all(value > 0 for value in values)
        assert evidence.sample.values[latent].tolist()[: len(values)] == values


def test_the_sample_is_a_function_of_the_seed(sae: SAE, store: ActivationStore) -> None:
    once, again, other = (gather(sae, store, seed=seed) for seed in (7, 7, 8))
    assert_equal(once, again)
    often = (peaks(sae, store, "train", 8)[0] > 0).sum(0) > 100
    assert not (once.sample.windows == other.sample.windows).all(1)[often].any()
    assert torch.equal(once.top.windows, other.top.windows)


def test_every_firing_window_is_drawn_equally_often(tmp_path: Path) -> None:
    # 32 windows of 4 tokens. Neuron 0 fires in all, ever more strongly; neuron 1 in every second one, ever less strongly.
    strength = np.repeat(np.arange(1, 33), 4).astype(np.float32)
    x = np.stack([strength, np.where(np.repeat(np.arange(32), 4) % 2, 100 - strength, 0)], 1).astype(np.float32)
    tokens = np.ones((8, CONTEXT), np.int32)
    small = make_store(tmp_path / "store", tokens, {HOOK: x}, 8)
    seeds, k = 400, 8
    counts = torch.zeros(2, 32)
    together = 0
    for seed in range(seeds):
        sample = gather_evidence(
            IdentitySAE.of(HOOK, 2), small, HOOK, "train", window=4, top=1, sample=k, seed=seed
        ).sample
        for neuron in range(2):
            counts[neuron, sample.windows[neuron]] += 1
        together += {1, 3} <= set(sample.windows[1].tolist())
    assert counts[1, ::2].sum() == 0
    for drawn, windows, bound in ((counts[0], 32, 85.0), (counts[1, 1::2], 16, 56.0)):
        expected = seeds * k / windows
        # Drawn without replacement, sum (n - e)^2 / e times (N - 1)/(N - k) is near chi-square with N - 1 degrees of freedom;
        # the bounds are its quantiles at 1 - 1e-6. Sampling the first, the strongest or by strength gives thousands.
        chi_square = float(((drawn - expected) ** 2 / expected).sum()) * (windows - 1) / (windows - k)
        assert chi_square < bound
        assert chi_square > 1  # nor evener than chance, as a fixed rota would be
    # Two given windows of the 16 come together with probability (8 * 7)/(16 * 15) = 0.233: 93.3 of 400, deviation 8.5
    assert abs(together - 93.3) < 42


def test_latents_draw_different_samples(tmp_path: Path) -> None:
    x = np.ones((64 * CONTEXT, 6), np.float32)  # all neurons fire everywhere
    wide = make_store(tmp_path / "store", np.ones((64, CONTEXT), np.int32), {HOOK: x}, 64)
    sample = gather(IdentitySAE.of(HOOK, 6), wide, sample=8).sample.windows
    assert len({frozenset(row) for row in sample.tolist()}) == 6


def test_no_sample_wanted_gives_none(sae: SAE, store: ActivationStore) -> None:
    evidence = gather(sae, store, sample=0)
    assert evidence.firing_windows().tolist() == [0] * D_SAE
    assert torch.equal(evidence.top.windows, gather(sae, store, sample=5).top.windows)


# --- special tokens and statistics


def test_special_tokens_never_fire(sae: SAE, store: ActivationStore) -> None:
    f, plain = brute(sae, store, "train")
    assert (f[~plain, ONLY_ON_SPECIAL] > 0).sum() > 100  # it would fire there,
    assert (f[plain, ONLY_ON_SPECIAL] <= 0).all()  # and nowhere else
    evidence = gather(sae, store)
    assert (evidence.top.windows[ONLY_ON_SPECIAL] == -1).all()
    assert (evidence.sample.windows[ONLY_ON_SPECIAL] == -1).all()
    assert evidence.statistics.max_activation[ONLY_ON_SPECIAL] == 0
    assert evidence.statistics.density[ONLY_ON_SPECIAL] == 0
    for latent in range(D_SAE):
        assert f[~plain, latent].max() > evidence.top.values[latent, 0] or latent in (DEAD, ONLY_ON_SPECIAL)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_statistics_equal_brute_force(sae: SAE, store: ActivationStore, split: str) -> None:
    found = gather(sae, store, split).statistics
    f, plain = brute(sae, store, split)
    f = f[plain]
    assert found.tokens == len(f)
    assert found.max_activation.tolist() == f.amax(0).tolist()
    fires = (f > 0).sum(0)
    assert found.histogram.sum(1).tolist() == fires.tolist()
    assert found.density.tolist() == (fires.float() / len(f)).tolist()
    for latent in range(D_SAE):
        values = f[:, latent][f[:, latent] > 0].double().clamp(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]).numpy()
        assert found.histogram[latent].tolist() == np.histogram(values, HISTOGRAM_EDGES)[0].tolist()


def test_statistics_equal_the_pass_that_makes_nothing_else(sae: SAE, store: ActivationStore) -> None:
    ours, theirs = gather(sae, store).statistics, latent_statistics(sae, store, HOOK)
    assert torch.equal(ours.max_activation, theirs.max_activation)
    assert torch.equal(ours.density, theirs.density)
    assert torch.equal(ours.histogram, theirs.histogram)
    assert ours.tokens == theirs.tokens


def test_negative_neurons_do_not_fire(tmp_path: Path) -> None:
    x = np.full((4 * CONTEXT, 2), -1.0, np.float32)
    x[5, 1] = 2.0
    small = make_store(tmp_path / "store", np.ones((4, CONTEXT), np.int32), {HOOK: x}, 4)
    evidence = gather(IdentitySAE.of(HOOK, 2), small)
    assert evidence.top.windows.tolist() == [[-1] * 6, [0] + [-1] * 5]
    assert evidence.sample.windows.tolist() == [[-1] * 5, [0] + [-1] * 4]
    assert evidence.statistics.density.tolist() == [0.0, 1 / (4 * CONTEXT)]


# --- interruption


class Interrupted(Exception):
    """The kill of these tests."""


def interrupt_at(call: int) -> Callable[[int, int], None]:
    """A progress callback that raises at its `call`-th call, before that block could be saved."""
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Interrupted

    return progress


@pytest.mark.parametrize(
    ("split", "kills"), [("train", (3,)), ("train", (2, 2)), ("train", (1, 2)), ("held_out", (2,))]
)
def test_an_interrupted_pass_goes_on_to_the_same_result(
    sae: SAE, store: ActivationStore, split: str, kills: tuple[int, ...], tmp_path: Path
) -> None:
    rows = {"train": TRAIN_SEQUENCES * CONTEXT, "held_out": (SEQUENCES - TRAIN_SEQUENCES) * CONTEXT}[split]
    checkpoint = tmp_path / "evidence.safetensors"
    undisturbed = gather(sae, store, split, seed=3)
    saved = 0
    for kill in kills:
        with pytest.raises(Interrupted):
            gather(
                sae, store, split, seed=3, checkpoint=checkpoint, checkpoint_seconds=1e-9, progress=interrupt_at(kill)
            )
        saved += kill - 1  # the block at which it was killed is lost, those before are not
        assert checkpoint.exists() == (saved > 0)
    seen: list[tuple[int, int]] = []
    resumed = gather(
        sae, store, split, seed=3, checkpoint=checkpoint, checkpoint_seconds=1e-9,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[0] == (min((saved + 1) * BLOCK, rows), rows)  # it went on from the checkpoint
    assert seen[-1] == (rows, rows)
    assert_equal(resumed, undisturbed)
    assert not checkpoint.exists()


def test_a_resumed_pass_reads_no_finished_row_again(
    sae: SAE, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "evidence.safetensors"
    with pytest.raises(Interrupted):
        gather(sae, store, checkpoint=checkpoint, checkpoint_seconds=1e-9, progress=interrupt_at(2))
    read: list[slice] = []
    original = ActivationStore.read

    def spy(self: ActivationStore, hook: str, rows: slice) -> Tensor:
        read.append(rows)
        return original(self, hook, rows)

    monkeypatch.setattr(ActivationStore, "read", spy)
    gather(sae, store, checkpoint=checkpoint, checkpoint_seconds=1e-9)
    assert read[0].start == BLOCK
    assert read[-1].stop == TRAIN_SEQUENCES * CONTEXT


def test_no_checkpoint_is_written_before_its_time(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    checkpoint = tmp_path / "evidence.safetensors"
    with pytest.raises(Interrupted):
        gather(sae, store, checkpoint=checkpoint, checkpoint_seconds=3600, progress=interrupt_at(3))
    assert not checkpoint.exists()


# --- bad input


@pytest.mark.parametrize("window", [3, 5, 7, 12, 32])
def test_a_window_that_does_not_tile_the_context_is_refused(sae: SAE, store: ActivationStore, window: int) -> None:
    with pytest.raises(InputError, match=rf"explain\.window: {window} does not divide .* 16 tokens"):
        gather(sae, store, window=window)


def test_splits_share_no_window(store: ActivationStore) -> None:
    assert window_range(store, 8, "train") == (0, 1200)
    assert window_range(store, 8, "held_out") == (1200, 2200)


def test_a_dictionary_of_another_width_is_refused(store: ActivationStore) -> None:
    with pytest.raises(InputError, match=rf"d_in: the SAE takes 9, but {HOOK} .* is 8 wide"):
        gather(IdentitySAE.of(HOOK, 9), store)


def test_an_unknown_hook_is_refused_with_those_there_are(sae: SAE, store: ActivationStore) -> None:
    with pytest.raises(InputError, match=rf"'blocks\.7\.nowhere' is not in .*{HOOK}"):
        gather_evidence(sae, store, "blocks.7.nowhere", "train", window=8, top=1, sample=1, seed=0)
