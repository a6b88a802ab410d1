"""The synthetic model and the scores against it: SAELens' own figures, marginals and joint rates, cases made by hand."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from scipy.stats import multivariate_normal

from activation_store.errors import InputError
from sae import SAE, TrainConfig, train
from sae.architectures.standard import StandardSAE
from sae.ops import kernels_for
from sae.ops.latents import of_dense
from sae.recovery import Detection, cosines, match, mcc, recovery
from sae.sae import SAEConfig
from sae.synthetic import PRESETS, SyntheticConfig, SyntheticModel, compensated, spread_out, tree
from sae.train import Seekable

GOLDEN = Path(__file__).parent / "golden"
SCORES = json.loads((GOLDEN / "synthetic-scores.json").read_text())


def model(batch_size=512, **changes) -> SyntheticModel:
    base = {"features": 60, "d_in": 24, "roots": 3, "branching": 3, "depth": 2, "correlation_rank": 4, "min_probability": 0.02}
    return SyntheticModel.of(SyntheticConfig(**{**base, **changes}), batch_size)


def firing(m: SyntheticModel, batches: int) -> torch.Tensor:
    """Which features fire, (rows, n) bool."""
    return torch.cat([m.batch(i)[1].dense() > 0 for i in range(batches)])


def near(found: torch.Tensor, expected: torch.Tensor, rows: int, other_rows: float = float("inf")) -> bool:
    """Whether all rates lie within 5 standard errors of what is expected."""
    error = (expected * (1 - expected) * (1 / rows + 1 / other_rows)).clamp(min=1 / rows**2).sqrt()
    return bool(((found - expected).abs() < 5 * error).all())


# The model


def test_firing_and_magnitudes_are_those_of_saelens_own_sampler():
    """Rates alone and in pairs, magnitudes and mean of a model it saved: 400,000 of its samples against 200,000 of ours."""
    m = SyntheticModel.load(GOLDEN / "synthetic-model", batch_size=4000)
    golden = load_file(GOLDEN / "synthetic-rates.safetensors")
    rows, theirs = 200_000, int(golden["samples"])
    pairs, strength, square, mean = torch.zeros(100, 100), torch.zeros(100), torch.zeros(100), torch.zeros(16)
    for number in range(rows // 4000):
        x, f = m.batch(number)
        a = f.dense()
        on = (a > 0).float()
        pairs, strength, square, mean = pairs + on.T @ on, strength + a.sum(0), square + a.square().sum(0), mean + x.sum(0)
    fires = pairs.diagonal()
    assert near(fires / rows, golden["rate"], rows, theirs)
    assert near(pairs / rows, golden["pairs"], rows, theirs)
    magnitude = strength / fires
    error = (square / fires - magnitude.square()).sqrt() * (1 / fires + 1 / (golden["rate"] * theirs)).sqrt()
    assert ((magnitude - golden["magnitude"]).abs() < 5 * error).all()
    torch.testing.assert_close(mean / rows, golden["mean"], atol=0.02, rtol=0)


def test_a_saelens_model_is_read_whole():
    m, golden = SyntheticModel.load(GOLDEN / "synthetic-model"), load_file(GOLDEN / "synthetic-rates.safetensors")
    weights = load_file(GOLDEN / "synthetic-model" / "synthetic_model.safetensors")
    assert torch.equal(m.features, weights["feature_vectors"])
    torch.testing.assert_close(m.std, golden["std"])  # not in the folder: made again from the config
    torch.testing.assert_close(m.mean, torch.linspace(1.5, 0.8, 100))
    assert torch.equal(m.parent, tree(100, 4, 3, 2))
    assert int(m.exclusive.sum()) == int(0.6 * 16)  # parents: 4 roots and 12 children
    assert m.scales[:16].all()
    torch.testing.assert_close(1 - m.factor.square().sum(1), weights["correlation_diag"], atol=1e-6, rtol=1e-5)


def test_zipf_and_compensation_are_saelens():
    theirs = SyntheticModel.load(GOLDEN / "synthetic-model")
    c = SyntheticConfig(features=100, d_in=16, exponent=0.5, max_probability=0.5, min_probability=0.03, roots=4, compensate=False)
    zipf = SyntheticModel.of(c).probability
    torch.testing.assert_close(compensated(zipf, theirs.parent, theirs.exclusive), theirs.probability)


def test_compensation_by_hand():
    # p = 0.5 with children 0.2 and 0.1: 0.4 and 0.2 alone; exclusive times 1 + 0.1 / 0.5 and 1 + 0.2 / 0.5
    p, parent = torch.tensor([0.5, 0.2, 0.1, 0.3]), torch.tensor([-1, 0, 0, -1])
    none, all_ = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(compensated(p, parent, none), torch.tensor([0.5, 0.4, 0.2, 0.3]))
    torch.testing.assert_close(compensated(p, parent, all_), torch.tensor([0.5, 0.48, 0.28, 0.3]))


def test_trees_by_hand():
    assert tree(9, 2, 2, 2).tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 3]  # the last family is cut off
    assert tree(20, 2, 2, 2).tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, -1, -1, -1, -1, -1, -1]
    assert tree(3, 0, 2, 2).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("rank", [0, 5])
def test_every_marginal_is_exact_under_correlation(rank):
    m = model(4000, roots=0, correlation_rank=rank, correlation_scale=0.3, max_probability=1.0, min_probability=0.01)
    fires = firing(m, 25)
    assert fires[:, 0].all()  # a probability of 1
    assert near(fires.float().mean(0), m.probability, len(fires))


def test_pairs_fire_together_as_the_copula_says():
    m = model(4000, roots=0, correlation_rank=2, correlation_scale=0.6, max_probability=0.3, min_probability=0.1, features=8)
    fires = firing(m, 25).double()
    seen = []
    for i, j in itertools.combinations(range(8), 2):
        r = float(m.factor[i] @ m.factor[j])
        below = [-m._quantile[k].item() for k in (i, j)]  # P(Z > t) = P(Z < -t)
        expected = float(multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf(below))
        assert near((fires[:, i] * fires[:, j]).mean(), torch.tensor(expected), len(fires))
        seen.append(abs(r))
    assert max(seen) > 0.5


def test_children_fire_under_their_parents_alone_and_exclusive_ones_alone():
    m = model(exclusive=0.5, magnitude_std=(2.0, 1.0), mean_magnitude=(2.0, 1.0))
    fires = firing(m, 20)
    child = torch.nonzero(m.parent >= 0).squeeze(1)
    assert len(child) == 9 + 27
    assert fires[:, child].any(0).all()
    assert not (fires[:, child] & ~fires[:, m.parent[child]]).any()
    assert int(m.exclusive.sum()) == 6
    families = {p: torch.nonzero(m.parent == p).squeeze(1) for p in m.parent.unique().tolist() if p >= 0}
    most = {p: int(fires[:, family].sum(1).max()) for p, family in families.items()}
    assert all(most[p] == 1 for p in families if m.exclusive[p])
    assert any(most[p] > 1 for p in families if not m.exclusive[p])


def test_a_child_scales_with_its_parent():
    m = model(exclusive=0, magnitude_std=(0.5, 0.0))
    still = replace(m, std=torch.where(m.parent >= 0, 0.0, 0.5))  # only parents vary
    a = still.batch(0)[1].dense()
    child = int(torch.nonzero(m.parent == 0)[0])
    both = a[:, child] > 0
    expected = m.mean[child] * a[both, 0] / m.mean[0]
    assert len(expected) > 5
    torch.testing.assert_close(a[both, child], expected)


def test_activations_are_sums_of_features():
    m = model(bias=2.0)
    x, f = m.batch(3)
    assert x.shape == (512, 24)
    assert float(m.bias.norm()) == pytest.approx(2)
    torch.testing.assert_close(x, f.dense() @ m.features + m.bias, atol=1e-4, rtol=1e-5)
    noise = replace(m, noise=0.3).batch(3)[0] - x
    assert float(noise.std()) == pytest.approx(0.3, rel=0.05)


def test_a_batch_depends_on_seed_and_number_alone():
    one, two = model(), model()
    list(itertools.islice(one.stream(), 4))
    assert torch.equal(one.batch(7)[0], two.batch(7)[0])
    assert torch.equal(next(one.stream(7)), two.batch(7)[0])
    assert not torch.equal(one.batch(7)[0], one.batch(8)[0])
    assert not torch.equal(one.batch(7)[0], replace(one, seed=1).batch(7)[0])
    assert not torch.equal(one.features, model(seed=1).features)


def test_features_spread_out():
    g = torch.Generator().manual_seed(0)
    few = spread_out(torch.randn(20, 30, generator=g), 1)
    torch.testing.assert_close(few @ few.T, torch.eye(20), atol=1e-5, rtol=0)
    many = spread_out(torch.randn(200, 30, generator=g), 3)
    torch.testing.assert_close(many.norm(dim=1), torch.ones(200))
    assert float((many @ many.T).square().sum()) == pytest.approx(200**2 / 30, rel=1e-4)  # no 200 vectors in 30 have less


def test_the_benchmarks_configuration_has_the_published_figures():
    """16,384 features in 768, 128 trees of 85 nodes, about 34 of them a row: SynthSAEBench-16k's model card."""
    m = SyntheticModel.preset("synthsaebench-16k", orthogonal_steps=0)
    assert m.features.shape == (16384, 768)
    assert int((m.parent >= 0).sum()) == 128 * 84
    assert 32.5 < int(m.batch(0)[1].starts[-1]) / 1024 < 35.5
    assert (m.mean[0], m.mean[-1]) == (5, 4)
    assert float(m.probability[0]) == pytest.approx(0.4)
    assert float(m.probability[-1]) == pytest.approx(5e-4)


def test_bad_models_are_refused(tmp_path):
    with pytest.raises(InputError, match="preset: 'large' given; known: synthsaebench-16k, small"):
        SyntheticModel.preset("large")
    with pytest.raises(InputError, match="batch_size: 0"):
        model(0)
    for change, said in (({"roots": 61}, "only 60 features"), ({"min_probability": 0.5}, "above max_probability"),
                         ({"mean_magnitude": (1, 0)}, "must be above 0"), ({"zipf": 1}, "zipf")):  # fmt: skip
        with pytest.raises(ValidationError, match=said):
            model(**change)
    with pytest.raises(InputError, match=r"no folder that SAELens' SyntheticModel.save wrote \(FileNotFoundError"):
        SyntheticModel.load(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "synthetic-model", folder)
    config = json.loads((folder / "synthetic_model_config.json").read_text())
    (folder / "synthetic_model_config.json").write_text(json.dumps({**config, "seed": None}))
    with pytest.raises(InputError, match="cannot be made again"):
        SyntheticModel.load(folder)
    (folder / "hierarchy.json").write_text(json.dumps({"roots": [{"feature_index": None, "children": []}]}))
    with pytest.raises(InputError, match="without feature_index"):
        SyntheticModel.load(folder)
    (folder / "synthetic_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="SafetensorError"):
        SyntheticModel.load(folder)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (2.0, [2.0, 2.0, 2.0]), ({"generator_name": "constant", "value": 3.0}, [3.0, 3.0, 3.0]),
        ({"generator_name": "exponential", "start": 1.0, "end": 4.0}, [1.0, 2.0, 4.0]),
        ({"generator_name": "folded_normal", "mean": 0.0, "std": 1.0, "min_value": 0.4, "max_value": 0.4}, [0.4, 0.4, 0.4]),
    ],
)  # fmt: skip
def test_magnitudes_are_made_again(tmp_path, given, expected):
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "synthetic-model", folder)
    path = folder / "synthetic_model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mean_firing_magnitudes": given}))
    mean = SyntheticModel.load(folder).mean
    torch.testing.assert_close(mean[[0, 49, 99]], torch.tensor(expected), atol=0.02, rtol=0)


# The scores


@pytest.mark.parametrize("name", ["equal", "narrow", "wide"])
def test_scores_are_saelens(name):
    tensors, expected = load_file(GOLDEN / "synthetic-scores.safetensors"), SCORES[name]
    features, dictionary, acts, latents = (tensors[f"{name}.{part}"] for part in ("features", "dictionary", "acts", "latents"))
    assert mcc(dictionary, features) == pytest.approx(expected["mcc"], rel=1e-6)
    detection, kernels = Detection(cosines(dictionary, features)), kernels_for("cpu")
    for rows in (slice(0, 50), slice(50, None)):
        f, truth = of_dense(latents[rows], kernels), of_dense(acts[rows], kernels)
        hits = acts[rows][f.rows.long(), detection.feature[f.index]] > 0
        detection.update(f.index, hits, truth.index, len(latents[rows]))
    for figure, value in detection.figures().items():
        assert value == pytest.approx(expected[figure], rel=1e-6), figure
    assert len(detection.feature.unique()) / len(dictionary) == expected["uniqueness"]


def test_detection_by_hand():
    """5 rows with both, 3 with the latent alone, 2 with the feature alone: P 5/8, R 5/7, F1 2 * 5 / (8 + 7)."""
    detection = Detection(torch.ones(1, 1))
    hits = torch.tensor([True] * 5 + [False] * 3)
    detection.update(torch.zeros(8, dtype=torch.int64), hits, torch.zeros(7, dtype=torch.int64), 20)
    assert detection.figures() == pytest.approx({"f1": 10 / 15, "precision": 5 / 8, "recall": 5 / 7})
    assert Detection(torch.zeros(0, 5)).figures() == {"f1": None, "precision": None, "recall": None}


def test_the_matching_is_one_to_one_and_the_best():
    # greedy takes 0.9 and is left with 0: 0.9; the best is 0.8 + 0.7
    cosine = torch.tensor([[0.9, 0.8], [0.7, 0.0]])
    rows, columns = match(cosine)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (1, 0)]
    assert mcc(torch.zeros(0, 3), torch.ones(2, 3)) is None
    assert mcc(-torch.eye(3), torch.eye(3)[:2]) == pytest.approx(1)  # of cosines the absolute value, over the narrower side


def orthogonal(**changes) -> SyntheticModel:
    """A model without superposition, in which magnitudes stay far from 0."""
    return model(features=12, d_in=16, roots=2, branching=2, depth=1, magnitude_std=(0.1, 0), min_probability=0.1, **changes)


def standard(m: SyntheticModel, decoder: torch.Tensor, encoder: torch.Tensor) -> SAE:
    sae = StandardSAE(SAEConfig("standard", m.features.shape[1], len(decoder)))
    with torch.no_grad():
        sae.W_dec.copy_(decoder)
        sae.W_enc.copy_(encoder.T)
        sae.b_enc.fill_(-1e-3)  # above what rounding leaves of features that do not fire
        sae.b_dec.copy_(m.bias)
    return sae.requires_grad_(False)


def test_the_features_themselves_in_another_order_score_1():
    m = orthogonal()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found = recovery(standard(m, m.features[order], m.features[order]), m, rows=2000)
    for figure in ("mcc", "mean_max_cosine", "found", "uniqueness", "f1", "precision", "recall", "explained_variance"):
        assert found[figure] == pytest.approx(1, abs=1e-5), figure
    assert found["l0"] == found["true_l0"] > 1
    assert found["shrinkage"] == pytest.approx(1, abs=1e-3)
    assert (found["dead_latents"], found["dead_fraction"], found["absorption"], found["rows"]) == (0, 0, 0, 2048)
    assert found["absorption_cases"] > 100


def test_half_the_features_and_dead_latents():
    m = orthogonal()
    none = torch.zeros(2, 16)
    found = recovery(standard(m, torch.cat([m.features[:6], none]), torch.cat([m.features[:6], none])), m, rows=512)
    assert found["found"] == pytest.approx(0.5)
    assert found["mcc"] == pytest.approx(6 / 8)  # over the 8 pairs there are; the dead ones' cosines are 0
    assert found["mean_max_cosine"] == pytest.approx(0.5, abs=1e-6)
    assert (found["dead_latents"], found["dead_fraction"]) == (2, 0.25)
    assert found["f1"] == pytest.approx(6 / 8)
    assert found["explained_variance"] < 0.9


def test_absorption_by_hand():
    """Latent 0 has the parent's direction, but its encoder shuts it where the child fires, whose latent holds both."""
    m = orthogonal()
    child = int(torch.nonzero(m.parent == 0)[0])
    decoder, encoder = m.features.clone(), m.features.clone()
    decoder[child] = m.features[child] + m.features[0]
    encoder[0] -= 9 * m.features[child]
    found = recovery(standard(m, decoder, encoder), m, rows=4096)
    numbers = range(1 << 40, (1 << 40) + 8)
    under = torch.cat([m.batch(number)[1].dense() > 0 for number in numbers]).sum(0)[m.parent >= 0]
    first = int(under[child - 2])  # parents 0 and 1, then their children
    assert found["absorption_cases"] == int(under.sum())
    assert found["absorption"] == pytest.approx(first / int(under.sum()))
    assert found["explained_variance"] == pytest.approx(1, abs=0.05)  # reconstruction does not tell


def test_what_is_undefined_is_none():
    m = orthogonal()
    silent = replace(m, probability=torch.full((12,), 1e-30), parent=torch.full((12,), -1))
    found = recovery(standard(m, m.features, m.features), silent, rows=10)
    assert found["explained_variance"] is None
    assert found["absorption"] is None
    assert (found["true_l0"], found["l0"], found["f1"]) == (0, 0, 0)


def test_scores_of_the_wrong_width_are_refused():
    sae = standard(orthogonal(), torch.eye(16), torch.eye(16))
    with pytest.raises(InputError, match="d_in: the SAE takes 16 and gives 16, but the model's activations are 24 wide"):
        recovery(sae, model())
    with pytest.raises(InputError, match="rows: 0"):
        recovery(sae, orthogonal(), rows=0)


def test_training_draws_from_the_model_and_finds_its_features():
    m = model(256, features=32, roots=0, correlation_rank=0, max_probability=0.2, min_probability=0.05)
    assert isinstance(m, Seekable)
    first, last = (TrainConfig(architecture="topk", d_sae=32, k=3, steps=steps, batch_size=256, lr=3e-3) for steps in (1, 400))
    before, after = (recovery(train(m, config), m, rows=2048) for config in (first, last))
    assert before["mcc"] < 0.6
    assert after["mcc"] > 0.85
    assert after["f1"] > 0.6
    assert after["l0"] == pytest.approx(3, abs=0.1)


def test_presets_are_whole_configurations():
    for config in PRESETS.values():
        assert SyntheticConfig(**config.model_dump()) == config
