"""Scores of predicted activations against hand-made arithmetic, numpy and what the definitions imply."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import r2_score

from explain.scores import correlation_intervals, correlation_scores

# Integers make every mean and product well conditioned; a list that varies spreads over at least 1 of at most 2000.
values = st.lists(st.integers(-1000, 1000), min_size=2, max_size=40)
varied = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(-1000, 1000), min_size=n, max_size=n) for _ in range(2)))
).filter(lambda pair: len(set(pair[0])) > 1 and len(set(pair[1])) > 1)  # fmt: skip


def all_nan(scores: object) -> bool:
    return all(math.isnan(value) for value in vars(scores).values())


def test_golden_values() -> None:
    # t = 0 1 2 3, p = 1 1 2 4. Means 1.5 and 2; deviations -1.5 -.5 .5 1.5 and -1 -1 0 2.
    # Pearson: (1.5 + .5 + 0 + 3) / sqrt((2.25 + .25 + .25 + 2.25) (1 + 1 + 0 + 4)) = 5 / sqrt(5 * 6)
    # R2, uncentred: residuals -1 0 0 -1: 1 - (2/4) / ((0 + 1 + 4 + 9)/4) = 1 - 2/14     (centred it were 1 - 2/5)
    # absolute: 1 - (2/4) / ((0 + 1 + 2 + 3)/4) = 1 - 2/6
    scores = correlation_scores([[0, 1], [2, 3]], [[1, 1], [2, 4]])
    assert scores.ev_correlation == pytest.approx(5 / math.sqrt(30), abs=1e-12)
    assert scores.rsquared == pytest.approx(6 / 7, abs=1e-12)
    assert scores.absolute_dev_explained == pytest.approx(2 / 3, abs=1e-12)


def test_negative_activations_count_by_size_and_sign() -> None:
    # t = -2 2 0, p = 2 1 0. Means 0 and 1; Pearson: (-2*1 + 2*0 + 0*-1) / sqrt(8 * 2) = -1/2
    # R2: residuals -4 1 0: 1 - 17/8; absolute: 1 - (4 + 1)/(2 + 2 + 0)
    scores = correlation_scores([[-2, 2, 0]], [[2, 1, 0]])
    assert scores.ev_correlation == pytest.approx(-1 / 2, abs=1e-12)
    assert scores.rsquared == pytest.approx(-9 / 8, abs=1e-12)
    assert scores.absolute_dev_explained == pytest.approx(-1 / 4, abs=1e-12)


def test_pooled_differs_from_the_mean_over_sequences_even_in_sign() -> None:
    true, predicted = [[0, 1], [10, 11]], [[10, 11], [0, 1]]
    # Within each sequence p = t +- 10, a perfect correlation. Pooled, means 5.5 and 5.5, deviations of t -5.5 -4.5 4.5 5.5,
    # of p 4.5 5.5 -5.5 -4.5: r = -4 * 24.75 / (2 * 30.25 + 2 * 20.25) = -99/101
    alone = [correlation_scores([t], [p]).ev_correlation for t, p in zip(true, predicted, strict=True)]
    assert alone == pytest.approx([1.0, 1.0], abs=1e-12)
    assert correlation_scores(true, predicted).ev_correlation == pytest.approx(-99 / 101, abs=1e-12)


@given(varied)
def test_agrees_with_numpy(pair: tuple[list[int], list[int]]) -> None:
    true, predicted = pair
    expected = np.corrcoef(true, predicted)[0, 1]
    assert correlation_scores([true], [predicted]).ev_correlation == pytest.approx(expected, abs=1e-9)


@given(varied, st.integers(-50, 50).filter(bool), st.integers(-1000, 1000))
def test_correlation_is_affine_invariant(pair: tuple[list[int], list[int]], scale: int, shift: int) -> None:
    true, predicted = pair
    plain = correlation_scores([true], [predicted]).ev_correlation
    moved = [scale * p + shift for p in predicted]
    sign = 1 if scale > 0 else -1
    assert correlation_scores([true], [moved]).ev_correlation == pytest.approx(sign * plain, abs=1e-9)
    assert correlation_scores([moved], [true]).ev_correlation == pytest.approx(sign * plain, abs=1e-9)
    assert -1 <= plain <= 1


@given(varied, st.integers(1, 50))
def test_the_other_scores_know_only_the_common_scale(pair: tuple[list[int], list[int]], scale: int) -> None:
    true, predicted = pair
    plain = correlation_scores([true], [predicted])
    scaled = correlation_scores([[scale * t for t in true]], [[scale * p for p in predicted]])
    assert scaled.rsquared == pytest.approx(plain.rsquared, rel=1e-9, abs=1e-9)
    assert scaled.absolute_dev_explained == pytest.approx(plain.absolute_dev_explained, rel=1e-9, abs=1e-9)


def test_predictions_off_by_scale_correlate_but_explain_less() -> None:
    # p = 10 t: r = 1; R2 = 1 - 81; absolute = 1 - 9
    scores = correlation_scores([[0, 1, 2]], [[0, 10, 20]])
    assert (scores.ev_correlation, scores.rsquared, scores.absolute_dev_explained) == pytest.approx((1, -80, -8))


@given(varied, st.data())
def test_where_sequences_are_cut_does_not_matter(pair: tuple[list[int], list[int]], data: st.DataObject) -> None:
    true, predicted = pair
    cuts = sorted(data.draw(st.lists(st.integers(0, len(true)), max_size=5)))  # equal cuts make empty sequences
    edges = list(zip([0, *cuts], [*cuts, len(true)], strict=True))
    parts = correlation_scores([true[a:b] for a, b in edges], [predicted[a:b] for a, b in edges])
    assert parts == correlation_scores([true], [predicted])


@given(values)
def test_a_perfect_prediction_scores_one(true: list[int]) -> None:
    scores = correlation_scores([true], [true])
    assert scores.ev_correlation == pytest.approx(1) if len(set(true)) > 1 else math.isnan(scores.ev_correlation)
    if any(true):
        assert (scores.rsquared, scores.absolute_dev_explained) == (1, 1)
    else:
        assert all_nan(scores)


def test_constant_predictions_have_no_correlation_but_an_error() -> None:
    # t = 0 1, p = 5 5: R2 = 1 - (25 + 16)/1, absolute = 1 - (5 + 4)/1
    scores = correlation_scores([[0, 1]], [[5, 5]])
    assert math.isnan(scores.ev_correlation)
    assert (scores.rsquared, scores.absolute_dev_explained) == (-40, -8)


def test_a_constant_unit_has_no_correlation() -> None:
    # t = 2 2, p = 1 2: R2 = 1 - 1/8, absolute = 1 - 1/4
    scores = correlation_scores([[2], [2]], [[1], [2]])
    assert math.isnan(scores.ev_correlation)
    assert (scores.rsquared, scores.absolute_dev_explained) == (0.875, 0.75)


def test_rounding_noise_is_not_variation() -> None:
    noisy = [0.1 + 0.2, 0.3, 0.3]  # 0.30000000000000004 and twice 0.3
    assert math.isnan(correlation_scores([noisy], [[1, 0, 0]]).ev_correlation)
    assert math.isnan(correlation_scores([[1, 0, 0]], [noisy]).ev_correlation)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the uncentred scores may overflow there
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_sizes_at_which_squares_vanish_or_overflow(scale: float) -> None:
    true, predicted = [0.0, scale, 2 * scale, 3 * scale], [1, 1, 2, 4]
    assert correlation_scores([true], [predicted]).ev_correlation == pytest.approx(5 / math.sqrt(30), abs=1e-12)


def test_an_all_zero_unit_leaves_every_score_undefined() -> None:
    assert all_nan(correlation_scores([[0, 0], [0]], [[1, 2], [3]]))


@pytest.mark.parametrize("empty", [[], [[]], [[], []]])
def test_nothing_to_score_is_undefined(empty: list[list[float]]) -> None:
    assert all_nan(correlation_scores(empty, empty))


def test_a_missing_value_spreads_to_every_score() -> None:
    assert all_nan(correlation_scores([[0, math.nan, 2]], [[1, 2, 3]]))
    assert all_nan(correlation_scores([[0, 1, 2]], [[1, math.nan, 3]]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_infinite_prediction_has_no_finite_score() -> None:
    scores = correlation_scores([[0, 1, 2]], [[0, math.inf, 2]])
    assert not any(math.isfinite(value) for value in vars(scores).values())


def test_different_numbers_of_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="2 true and 1 predicted"):
        correlation_scores([[1], [2]], [[1]])


def test_different_lengths_are_refused_by_sequence_even_if_totals_agree() -> None:
    with pytest.raises(ValueError, match="sequence 1: 1 true and 2 predicted"):
        correlation_scores([[1, 2], [3], [4, 5]], [[1, 2], [3, 4], [5]])


def test_tensors_arrays_and_lists_score_alike() -> None:
    true, predicted = [[0.0, 1.0], [2.0, 3.0]], [[1.0, 1.0], [2.0, 4.0]]
    expected = correlation_scores(true, predicted)
    assert correlation_scores([torch.tensor(t) for t in true], [np.array(p, np.float16) for p in predicted]) == expected


def test_scores_equal_those_of_neuron_explainer() -> None:
    """On its own neurons and puzzles, by its own code: scripts/golden_explain.py."""
    golden = json.loads((Path(__file__).parent / "golden" / "neuron-explainer-scores.json").read_text())
    assert len(golden["cases"]) == 48
    for case in golden["cases"]:
        ours = correlation_scores(case["true"], case["predicted"])
        for name in ("ev_correlation", "rsquared", "absolute_dev_explained"):
            assert getattr(ours, name) == pytest.approx(case[name], abs=1e-9), case["neuron"]


@given(varied)
def test_the_centred_r2_is_scikit_learns(pair: tuple[list[int], list[int]]) -> None:
    true, predicted = pair
    assert correlation_scores([true], [predicted]).rsquared_centred == pytest.approx(r2_score(true, predicted), rel=1e-9)


@given(st.lists(st.tuples(varied, st.integers(0, 4)), min_size=1, max_size=5).filter(lambda many: any(w for _, w in many)))
def test_a_weight_is_as_many_sequences(many: list[tuple[tuple[list[int], list[int]], int]]) -> None:
    true, predicted, weights = [pair[0] for pair, _ in many], [pair[1] for pair, _ in many], [w for _, w in many]
    repeated = [[part for part, w in zip(side, weights, strict=True) for _ in range(w)] for side in (true, predicted)]
    weighted, plain = correlation_scores(true, predicted, weights), correlation_scores(*repeated)
    for name, value in vars(plain).items():
        assert vars(weighted)[name] == pytest.approx(value, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, math.nan]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights: "):
        correlation_scores([[0, 1], [1, 2]], [[0, 1], [1, 2]], weights)


def explained(chance: np.random.Generator, sequences: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """A sparse unit in sequences of 16 tokens that share how strongly it fires, and predictions that miss a third."""
    fires = chance.random((sequences, 16)) < rate
    true = fires * chance.exponential(1.0, (sequences, 1)) * (1 + chance.random((sequences, 16)))
    return true, np.where(chance.random(true.shape) < 0.7, fires, 0) * 1.0


def test_intervals_hold_the_population_as_often_as_they_say() -> None:
    chance = np.random.default_rng(1)
    truth = correlation_scores(*map(list, explained(chance, 40_000, 0.1)))
    held = dict.fromkeys(vars(truth), 0)
    for seed in range(150):
        found = correlation_intervals(*map(list, explained(chance, 60, 0.1)), resamples=300, seed=seed)
        for name, interval in found.items():
            assert interval is not None
            held[name] += interval[0] <= vars(truth)[name] <= interval[1]
    assert all(count >= 0.8 * 150 for count in held.values()), held  # as the docstring says: somewhat less than 95 %
    assert any(count < 150 for count in held.values())


def test_intervals_are_about_the_score_and_shrink() -> None:
    chance = np.random.default_rng(2)
    widths = []
    for sequences in (20, 320):
        true, predicted = map(list, explained(chance, sequences, 0.2))
        scores, found = correlation_scores(true, predicted), correlation_intervals(true, predicted)
        for name, interval in found.items():
            assert interval is not None
            assert interval[0] <= vars(scores)[name] <= interval[1]
        low, high = found["ev_correlation"] or (0.0, 0.0)
        widths.append(high - low)
    assert widths[0] > 2.5 * widths[1]  # sixteen times as many sequences: about four


def test_one_strong_sequence_is_drawn_in_every_resample_of_its_stratum() -> None:
    """Of twenty sequences one fires: without strata a third of the resamples have nothing to correlate with."""
    true = [[0.0, 1.0, 0.0, 2.0], *([0.0] * 4 for _ in range(19))]
    predicted = [[0.0, 1.0, 0.0, 1.0], *([0.0] * 3 + [float(i % 2)] for i in range(19))]
    assert correlation_intervals(true, predicted)["ev_correlation"] is None
    strata = ["top", *["random"] * 19]
    low, high = correlation_intervals(true, predicted, strata=strata)["ev_correlation"] or (0.0, 0.0)
    assert 0 < low < correlation_scores(true, predicted).ev_correlation < high


@pytest.mark.parametrize("scale", [1e-150, 1e-6, 1e6, 1e150])
def test_intervals_do_not_know_the_scale(scale: float) -> None:
    chance = np.random.default_rng(3)
    true, predicted = explained(chance, 30, 0.2)
    plain = correlation_intervals(list(true), list(predicted))
    scaled = correlation_intervals(list(true * scale), list(predicted * scale))
    for name, interval in plain.items():
        assert scaled[name] == pytest.approx(interval, rel=1e-6)


def test_a_single_sequence_or_nothing_has_no_interval() -> None:
    assert set(correlation_intervals([[0, 1, 2]], [[0, 1, 1]]).values()) == {None}
    assert set(correlation_intervals([], []).values()) == {None}
