"""SAE or neuron: other dictionaries go the same way as the SAE's latents, and the differences have intervals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llm_servers import HOOK, OTHER_HOOK, TRAIN_SEQUENCES, WINDOW, Words

import explain.explain as stage
from activation_store import ActivationStore, ModelConfig
from activation_store.files import read_json_lines
from activation_store.subject import load_subject
from explain.config import ExplainConfig
from explain.dictionaries import Dictionary, dictionaries, sample_rows, stronger_tails
from explain.summary import compared
from sae.architectures.identity import IdentitySAE
from sae.sae import SAE


def test_a_direction_is_turned_to_its_stronger_tail() -> None:
    values = torch.tensor([[1.0, -5.0, 0.0, -2.0], [3.0, 4.0, 0.0, -1.0]])
    assert stronger_tails(values) == [1, -1, 1, -1]


def test_turned_neurons_are_kept_with_the_config(tmp_path: Path) -> None:
    sae = IdentitySAE.of(HOOK, 3, [1, -1, 1])
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert sae.encode(x).tolist() == [[1.0, -2.0, 3.0]]
    assert torch.equal(sae(x), x)
    assert sae.directions(torch.tensor([1])).tolist() == [[0.0, -1.0, 0.0]]
    assert torch.equal(x @ sae.W_enc, sae.encode(x))
    sae.save(tmp_path / "sae")
    assert torch.equal(SAE.load(tmp_path / "sae").encode(x), sae.encode(x))
    assert "signs" not in IdentitySAE.of(HOOK, 3, [1, 1, 1]).cfg.metadata


def test_sampled_rows_are_training_rows_without_special_tokens(store: ActivationStore) -> None:
    rows = sample_rows(store, HOOK)
    border = TRAIN_SEQUENCES * store.context
    plain = ~store.special.reshape(-1)[:border]
    assert torch.equal(rows, store.read(HOOK, slice(0, border))[torch.from_numpy(plain)])  # so few are all of them


def test_components_and_random_directions_are_projections_turned_up(sae: SAE, store: ActivationStore) -> None:
    found = {d.name: d for d in dictionaries(sae, store, ExplainConfig(latents=0, random=5, principal=3), seed=4)}
    assert list(found) == ["sae", "random", "principal"]
    rows = sample_rows(store, HOOK)
    for name in ("random", "principal"):
        directions = found[name].sae
        assert directions.W_dec.norm(dim=1).tolist() == pytest.approx([1.0] * directions.cfg.d_sae, abs=1e-5)
        projected = (rows - directions.b_dec) @ directions.W_dec.T
        assert torch.allclose(directions.encode(rows), projected, atol=1e-4)
        values = directions.encode(rows)
        assert (values.amax(0) >= -values.amin(0)).all()
        assert min(found[name].signs or [1]) in (1, -1)
    assert found["random"].sae.cfg.d_sae == 5
    centred = rows.double() - rows.double().mean(0)
    variances = torch.linalg.eigvalsh(centred.T @ centred).flip(0)
    of_components = found["principal"].sae.encode(rows).double().pow(2).sum(0)
    assert of_components[:3].tolist() == pytest.approx(variances[:3].tolist(), rel=1e-3)


def test_every_dictionary_goes_the_same_way(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    config = ExplainConfig(latents=5, neurons=4, neuron_hook=OTHER_HOOK, random=4, principal=3, window=WINDOW, resamples=300)
    twin = Dictionary("untrained", "untrained", IdentitySAE.of(OTHER_HOOK, 8), store, OTHER_HOOK, 6)
    summary = stage.explain(sae, store, Words(), config, tmp_path, others=[twin]).summary
    lines = read_json_lines(tmp_path / "scores.jsonl")
    wanted = {"sae": 5, "neurons": 4, "random": 4, "principal": 3, "untrained": 6}
    assert {name: sum(line["dictionary"] == name for line in lines) for name in wanted} == wanted
    for name, figures in summary["compared"].items():
        found = figures["ev_correlation"]
        values = {
            of: [line["ev_correlation"] for line in lines if line["dictionary"] == of and line["state"] == "scored"]
            for of in ("sae", name)
        }
        assert found["units"] == [len(values["sae"]), len(values[name])]
        assert found["difference"] == pytest.approx(np.mean(values["sae"]) - np.mean(values[name]))
        assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    assert set(summary["compared"]) == {"neurons", "random", "principal", "untrained"}


def test_the_interval_of_a_difference_is_that_of_two_means() -> None:
    """By the textbook: the difference of means of 200 and 150 draws with deviations 1 and 2 has standard error 0.178."""
    chance = np.random.default_rng(0)

    def lines(name: str, values: np.ndarray) -> list[dict[str, Any]]:
        return [{"dictionary": name, "state": "scored", "ev_correlation": float(value)} for value in values]

    a, b = chance.normal(1.0, 1.0, 200), chance.normal(0.2, 2.0, 150)
    undefined = [{"dictionary": "b", "state": "undefined", "ev_correlation": None}]
    found = compared(lines("sae", a) + lines("b", b) + undefined, 4000, 0)["b"]["ev_correlation"]
    error = np.sqrt(a.var() / 200 + b.var() / 150)
    low, high = found["interval"]
    assert found["units"] == [200, 150]
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08)
    assert (high + low) / 2 == pytest.approx(a.mean() - b.mean(), abs=0.2 * error)
    assert compared(lines("sae", a), 10, 0) == {}
    assert compared(lines("sae", a) + undefined, 10, 0) == {"b": {}}


def test_random_weights_are_the_models_own_and_a_function_of_the_seed(tiny_model_dir: Path) -> None:
    def weights(**given: Any) -> dict[str, torch.Tensor]:
        config = ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu", **given)
        return dict(load_subject(config).model.state_dict())

    trained, once, again, other = weights(), weights(random_weights=1), weights(random_weights=1), weights(random_weights=2)
    assert {name: value.shape for name, value in once.items()} == {name: value.shape for name, value in trained.items()}
    matrix = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once[matrix], other[matrix])
    assert not torch.equal(once[matrix], trained[matrix])
    config = ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu", random_weights=1)
    facts = load_subject(config).facts()
    assert facts["model_revision"] == "random-1"  # no store of it is taken for the trained model's
    json.dumps(facts)
