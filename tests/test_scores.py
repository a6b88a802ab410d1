"""Scores of predicted activations against hand-made arithmetic, numpy and what the definitions imply."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from explain.scores import correlation_scores

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
