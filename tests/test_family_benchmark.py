"""The benchmark beside SAELens: its search for a coefficient, its pairs at equal L0, and what it says is missing."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_intervene import HOOK, sae_for
from transformers import AutoModelForCausalLM

from sae import EvaluateConfig
from sae.evaluate import evaluate

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def family() -> ModuleType:
    spec = importlib.util.spec_from_file_location("family_benchmark", BENCHMARKS / "family.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # it imports `machine` from beside itself
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def figures(l0: float, ev: float = 0.8, dead: float = 0.0) -> dict[str, float]:
    return {"l0": l0, "explained_variance": ev, "ce_recovered": ev, "dead_fraction": dead}


def put(folder: Path, side: str, architecture: str, sparsity: float, seed: int, **found: float) -> None:
    run = {"side": side, "architecture": architecture, "sparsity": sparsity, "seed": seed, "figures": figures(**found),
           "seconds": 1.0, "settings": {}}  # fmt: skip
    path = folder / "runs" / f"{side}-{architecture}-{sparsity:.4g}-seed{seed}.figures.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(run))


def run(sparsity: float, l0: float) -> dict[str, Any]:
    return {"sparsity": sparsity, "figures": {"l0": l0}}


def test_a_search_starts_where_it_is_told_then_takes_the_usual_slope_then_the_line_through_two(family):
    assert family.next_value([], 32, 5.0) == 5.0
    assert family.next_value([run(5.0, 64)], 32, 1.0) == pytest.approx(20.0)  # L0 goes with the root of the coefficient
    # L0 = 1024 / c^2 has slope -2 in logarithms: 32 at c = sqrt(32)
    assert family.next_value([run(4.0, 64), run(8.0, 16)], 32, 1.0) == pytest.approx(32**0.5, rel=1e-2)


def test_a_search_goes_on_downhill_where_two_runs_say_nothing_of_the_slope(family):
    assert family.next_value([run(4.0, 64), run(5.0, 64)], 32, 1.0) > 5.0


def test_our_target_is_put_right_in_proportion(family):
    assert family.next_target([], 31.6) == 31.6
    assert family.next_target([run(32.0, 40.0), run(64.0, 80.0)], 32) == pytest.approx(25.6)


def test_a_run_that_is_there_is_not_made_again(family, tmp_path):
    put(tmp_path, "saelens", "jumprelu", 0.4, 0, l0=32)
    case = family.Case("jumprelu", 32, 1, {"saelens": 1.0})
    family.do_case(tmp_path, "saelens", case, seed=0, tries=3)  # without rows or SAELens, training would raise
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_ours_is_paired_with_theirs_at_its_l0_and_not_at_the_target(family, tmp_path):
    put(tmp_path, "saelens", "standard", 9.0, 0, l0=40, ev=0.7)
    put(tmp_path, "monosem", "standard", 3.0, 0, l0=39, ev=0.8)
    put(tmp_path, "monosem", "standard", 4.0, 0, l0=32, ev=0.7)
    found = family.compare(tmp_path, family.Case("standard", 32, 1, {"saelens": 1.0}))
    assert found["monosem"]["sparsity"] == 3.0
    assert found["matched"]
    assert found["explained_variance_ahead_by"] == pytest.approx(0.1)
    assert found["missing"] == []


def test_figures_are_means_over_seeds_and_missing_seeds_are_named(family, tmp_path):
    for seed, ev in enumerate((0.7, 0.8)):
        put(tmp_path, "monosem", "topk", 32, seed, l0=32, ev=ev)
    put(tmp_path, "saelens", "topk", 32, 0, l0=30, ev=0.8, dead=0.03)
    found = family.compare(tmp_path, family.Case("topk", 32, 3))
    assert found["monosem"]["mean"]["explained_variance"] == pytest.approx(0.75)
    assert not found["matched"]  # 32 is 6.7 % above 30
    assert found["missing"] == ["monosem seed 2", "saelens seed 1", "saelens seed 2"]


@pytest.mark.parametrize(
    ("ours", "theirs", "holds"), [(0.1, 0.2, True), (0.11, 0.2, False), (0.009, 0.0, True), (0.02, 0.0, False)]
)
def test_dead_latents_are_at_most_half_of_theirs_or_below_one_percent(family, tmp_path, ours, theirs, holds):
    put(tmp_path, "monosem", "topk", 32, 0, l0=32, dead=ours)
    put(tmp_path, "saelens", "topk", 32, 0, l0=32, dead=theirs)
    assert family.compare(tmp_path, family.Case("topk", 32))["dead_halved_or_below_1_percent"] is holds


def test_a_case_of_which_one_side_is_missing_is_not_compared(family, tmp_path):
    put(tmp_path, "monosem", "topk", 32, 0, l0=32)
    found = family.compare(tmp_path, family.Case("topk", 32))
    assert "matched" not in found
    assert "missing" in family.table_row(found)


def test_figures_are_those_of_evaluate_and_the_dead_are_counted_on_the_rows_trained_on(
    family, tiny_store, tiny_model_dir, tmp_path, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval().requires_grad_(False)
    sae = sae_for(32, HOOK)
    (tmp_path / "activations").symlink_to(tiny_store.path)
    trained_on = tiny_store.read(HOOK, range(1, 5))
    monkeypatch.setattr(family, "CE_SEQUENCES", 6)
    monkeypatch.setattr(family, "subject_of", lambda folder: SimpleNamespace(model=model))
    monkeypatch.setattr(family, "rows_of", lambda folder: trained_on)
    found = family.measure(tmp_path, sae)
    expected = evaluate(sae, tiny_store, model, EvaluateConfig(ce_sequences=6))["without_special"]
    for name in ("l0", "explained_variance", "ce_recovered", "ce_spliced"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    assert found["held_out_dead_fraction"] == pytest.approx(expected["dead_fraction"])
    fired = torch.relu((trained_on - sae.b_dec) @ sae.W_enc + sae.b_enc) > 0
    assert found["dead_fraction"] == pytest.approx(float((~fired.any(0)).float().mean()))
