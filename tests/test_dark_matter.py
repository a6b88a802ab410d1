"""What is linear in an SAE's error, against scikit-learn's regressions and errors that were made to order."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from test_evaluate import HOOK, model  # noqa: F401 - a fixture
from test_intervene import sae_for

from sae import EvaluateConfig
from sae.evaluate import evaluate
from sae.evaluation.dark_matter import ErrorRegression


def regress(x, y, y_hat, border):
    found = ErrorRegression(x.shape[1], y.shape[1], torch.device("cpu"))
    for start in range(0, len(x), 50):  # in parts, as it streams
        part = slice(start, start + 50)
        low = part.start < border
        found.update(x[part], y[part], y_hat[part], 0 if low else 1)
    return found.figures()


def test_a_linear_error_is_all_linear_and_noise_is_not():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=g) * torch.tensor([1, 2, 3, 4, 5, 6, 7, 50.0]) + 10
    noise = torch.randn(4000, 8, generator=g)
    linear = x @ torch.randn(8, 8, generator=g) + 3
    assert regress(x, linear, torch.zeros_like(x), 2000)["error_vector_r2"] == pytest.approx(1, abs=1e-6)
    assert regress(x, noise, torch.zeros_like(x), 2000)["error_vector_r2"] == pytest.approx(0, abs=0.02)
    spread = linear.var()
    mixed = regress(x, linear + noise * spread.sqrt(), torch.zeros_like(x), 2000)
    share = float(linear.var(0).sum() / (linear.var(0).sum() + 8 * spread))
    assert mixed["error_vector_r2"] == pytest.approx(share, abs=0.05)
    assert mixed["nonlinear_fvu"] == pytest.approx(1 - mixed["error_vector_r2"], abs=1e-3)  # the error is all of y here
    assert mixed["fvu"] > 1  # and its mean counts, which a regression takes away


def test_norms_that_follow_the_input_are_predicted():
    g = torch.Generator().manual_seed(1)
    x = torch.rand(3000, 5, generator=g) + 1
    direction = torch.nn.functional.normalize(torch.randn(3000, 5, generator=g), dim=1)  # of no use to a regression
    size = x.sum(1, keepdim=True)
    found = regress(x, x, x - direction * size, 1500)
    assert found["error_norm_r2"] == pytest.approx(1, abs=1e-6)
    assert 0.9 < found["error_squared_norm_r2"] < 1
    assert abs(found["error_vector_r2"]) < 0.05


def test_figures_are_those_of_scikit_learns_ridge(tiny_store, model):  # noqa: F811
    sae = sae_for(32, HOOK)
    found = evaluate(sae, tiny_store, model, EvaluateConfig(ce_sequences=1))["dark_matter"]
    first, context = tiny_store.train_sequences, tiny_store.context
    keep = ~tiny_store.special[first:].reshape(-1)
    x = tiny_store.read(HOOK, slice(first * context, tiny_store.rows))
    error = (x - sae(x)).double().numpy()
    half = (tiny_store.tokens.shape[0] - first) // 2 * context
    fit, test = keep & (np.arange(len(x)) < half), keep & (np.arange(len(x)) >= half)
    assert (found["train_tokens"], found["test_tokens"]) == (fit.sum(), test.sum())
    x = x.double().numpy()
    norm = np.linalg.norm(error, axis=1)
    scatter = float(np.square(x[fit] - x[fit].mean(0)).sum()) / 32
    for name, target in (("vector", error), ("norm", norm), ("squared_norm", norm**2)):
        scores, losses = [], []
        for strength in np.logspace(-8, 2, 21) * scatter:
            ridge = Ridge(alpha=strength).fit(x[fit], target[fit])
            scores.append(r2_score(test_target := target[test], ridge.predict(x[test]), multioutput="variance_weighted"))
            assert len(test_target) == test.sum()
            values = np.linalg.eigvalsh((x[fit] - x[fit].mean(0)).T @ (x[fit] - x[fit].mean(0)))
            freedom = 1 - ((values / (values + strength)).sum() + 1) / fit.sum()
            losses.append(np.square(target[fit] - ridge.predict(x[fit])).sum() / freedom**2)
        assert found[f"error_{name}_r2"] == pytest.approx(scores[int(np.argmin(losses))], rel=1e-4), name
    spread = np.square(x[test] - x[test].mean(0)).sum()
    assert found["fvu"] == pytest.approx(np.square(error[test]).sum() / spread, rel=1e-5)


def test_too_few_tokens_leave_it_undefined():
    x = torch.randn(3, 4)
    found = regress(x, x, 0.5 * x, 100)
    assert (found["train_tokens"], found["test_tokens"]) == (3, 0)
    assert {found[key] for key in found if key not in ("train_tokens", "test_tokens")} == {None}
