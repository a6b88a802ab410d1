"""Four counts and what follows from them, against hand-made tables and scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, precision_score, recall_score, roc_auc_score

from explain.counts import Counts, auc, count_intervals

windows = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


def test_a_hand_made_table():
    """5 windows with the concept that fire, 3 with it that do not, 2 without it that fire, 10 without either."""
    counts = Counts(5, 3, 2, 10)
    scores = counts.scores()
    assert scores["precision"] == pytest.approx(0.625)
    assert scores["recall"] == pytest.approx(5 / 7)
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["type_1"] == pytest.approx(0.375)
    assert scores["type_2"] == pytest.approx(2 / 7)
    assert scores["specificity"] == pytest.approx(10 / 13)
    assert scores["balanced_accuracy"] == pytest.approx((5 / 7 + 10 / 13) / 2)
    assert scores["accuracy"] == pytest.approx(0.75)


@given(windows)
def test_agrees_with_scikit_learn(pairs):
    concept, fires = (np.array(side) for side in zip(*pairs, strict=True))
    scores = Counts.of(concept, fires).scores()
    assert scores["accuracy"] == pytest.approx(accuracy_score(fires, concept))
    if concept.any():
        assert scores["precision"] == pytest.approx(precision_score(fires, concept, zero_division=0))
    else:
        assert math.isnan(scores["precision"])
    if fires.any():
        assert scores["recall"] == pytest.approx(recall_score(fires, concept, zero_division=0))
    if fires.any() or concept.any():
        assert scores["f1"] == pytest.approx(f1_score(fires, concept, zero_division=0))
    if fires.any() and not fires.all():
        assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(fires, concept))


def test_weights_are_as_many_windows():
    concept, fires, weights = [True, True, False, False], [True, False, True, False], [3, 1, 2, 5]
    repeated = [np.repeat(side, weights) for side in (concept, fires)]
    assert Counts.of(concept, fires, weights) == Counts.of(*repeated)


def test_precision_at_the_true_rate():
    """Recall 0.8 and 0.2 false alarms: at one window of a thousand 0.8 * 0.001 / (0.8 * 0.001 + 0.2 * 0.999)."""
    counts = Counts(40, 10, 10, 40)
    assert counts.precision_at(1e-3) == pytest.approx(0.0008 / (0.0008 + 0.1998))
    assert counts.precision_at(0.5) == pytest.approx(counts.scores()["precision"])
    assert math.isnan(Counts(0, 0, 3, 0).precision_at(0.1))


def test_few_negatives_bound_little():
    assert Counts(5, 0, 0, 300).false_alarm_bound() == pytest.approx(0.00994, abs=1e-5)  # 1 - 0.05^(1/300)
    assert Counts(5, 0, 0, 10).false_alarm_bound() == pytest.approx(1 - 0.05**0.1)
    assert Counts(5, 4, 0, 0).false_alarm_bound() == 1
    assert math.isnan(Counts(5, 0, 0, 0).false_alarm_bound())


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auc_agrees_with_scikit_learn(pairs):
    probability, fires = (np.array(side) for side in zip(*pairs, strict=True))
    if fires.all() or not fires.any():
        assert math.isnan(auc(probability, fires))
    else:
        assert auc(probability, fires) == pytest.approx(roc_auc_score(fires, probability))
        weights = np.arange(1, len(fires) + 1)
        assert auc(probability, fires, weights) == pytest.approx(roc_auc_score(fires, probability, sample_weight=weights))


def test_what_has_no_denominator_is_undefined():
    scores = Counts(0, 0, 0, 4).scores()
    assert all(math.isnan(scores[name]) for name in ("precision", "recall", "f1", "balanced_accuracy", "type_1", "type_2"))
    assert scores["specificity"] == scores["accuracy"] == 1


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Recall 0.7 and specificity 0.9, 60 windows of each kind: of 200 experiments about 95 % hold them."""
    chance = np.random.default_rng(0)
    held = {"recall": 0, "specificity": 0}
    fires = np.repeat([True, False], 60)
    for seed in range(200):
        concept = chance.random(120) < np.where(fires, 0.7, 0.1)
        found = count_intervals(concept, fires, strata=["fires"] * 60 + ["silent"] * 60, resamples=300, seed=seed)
        for name, truth in (("recall", 0.7), ("specificity", 0.9)):
            low, high = found[name]
            held[name] += low <= truth <= high
    assert all(0.88 <= count / 200 <= 0.99 for count in held.values())


def test_strata_keep_their_sizes():
    """One firing window of twenty: drawn without strata, it is in none of a third of the resamples; so recall is undefined."""
    concept, fires = [True] * 20, [True] + [False] * 19
    assert count_intervals(concept, fires, resamples=200)["recall"] is None
    assert count_intervals(concept, fires, strata=["fires"] + ["silent"] * 19, resamples=200)["recall"] == [1.0, 1.0]


@pytest.mark.parametrize(("weights", "said"), [([1.0], "2 answers, 2 truths and 1 weights"), ([1.0, -1.0], "not below 0")])
def test_what_does_not_fit_is_refused(weights, said):
    with pytest.raises(ValueError, match=said):
        Counts.of([True, False], [True, False], weights)
