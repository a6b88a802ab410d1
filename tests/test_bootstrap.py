"""Bootstrap intervals against scipy's and against what is known in closed form."""

import numpy as np
import pytest
from scipy import stats

from sae.evaluation.bootstrap import intervals, plain, total


def mean(s):
    return {"mean": s["sum"] / s["tokens"]}


def test_the_interval_of_a_mean_is_scipys():
    values = np.random.default_rng(0).gamma(2.0, size=80)
    sums = {"sum": values, "tokens": np.ones(80)}
    low, high = intervals(sums, mean, 20_000, seed=1)["mean"]
    other = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    assert (low, high) == (pytest.approx(other.low, rel=0.01), pytest.approx(other.high, rel=0.01))
    error = values.std() / np.sqrt(80)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_whole_sequences_are_drawn_not_tokens():
    """Tokens that are all alike within a sequence are worth one each: 40 sequences of 100 equal tokens."""
    values = np.random.default_rng(3).normal(5, 1, 40)
    low, high = intervals({"sum": 100 * values, "tokens": np.full(40, 100.0)}, mean, 4000, seed=0)["mean"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(40), rel=0.1)


def test_a_ratio_weighs_sequences_by_their_tokens():
    sums = {"sum": np.array([0.0, 30.0]), "tokens": np.array([1.0, 3.0])}
    # two draws of two: both first 0, both second 10, one each 30 / 4
    low, high = intervals(sums, mean, 2000, seed=0)["mean"]
    assert (low, high) == (0, 10)
    assert plain(mean(total(sums))) == {"mean": 7.5}


def test_sums_of_vectors_are_resampled_with_the_rest():
    def spread(s):
        return {"variance": s["square"] / s["n"] - np.square(s["x"] / s["n"][..., None]).sum(-1)}

    x = np.random.default_rng(5).normal(size=(60, 3))
    sums = {"x": x, "square": np.square(x).sum(1), "n": np.ones(60)}
    low, high = intervals(sums, spread, 500, seed=7)["variance"]
    chance = np.random.default_rng(7)
    counts = chance.multinomial(60, np.full(60, 1 / 60), size=500)
    brute = [np.repeat(x, c, axis=0).var(axis=0).sum() for c in counts]
    assert [low, high] == pytest.approx(np.quantile(brute, [0.025, 0.975]))
    assert [low, high] == intervals(sums, spread, 500, seed=7)["variance"]


def test_what_is_undefined_has_no_interval():
    sums = {"sum": np.array([1.0, 2.0]), "tokens": np.array([1.0, 0.0])}
    with np.errstate(all="ignore"):
        assert intervals(sums, mean, 200, seed=0) == {"mean": None}  # both draws may be the sequence without tokens
    one = {"sum": np.array([1.0]), "tokens": np.array([1.0])}
    assert intervals(one, mean, 200, seed=0) == {"mean": None}
    assert plain({"a": np.float64("nan"), "b": np.float64("inf"), "c": np.float64(2)}) == {"a": None, "b": None, "c": 2.0}
