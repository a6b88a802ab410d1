"""Sparse probing: pooling by hand, probes against scikit-learn, planted concepts found, and controls that stay at chance."""

import csv
import gzip
import json

import numpy as np
import pytest
import torch
import zstandard
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from test_evaluate import model  # noqa: F401 - a fixture
from test_intervene import HOOK, sae_for
from transformers import AutoTokenizer

from activation_store.errors import InputError
from activation_store.hooks import capture, locate_hooks
from sae import EvaluateConfig
from sae.config import ProbingConfig
from sae.evaluate import evaluate, evaluate_many
from sae.evaluation.labelled import Labelled, read_labelled
from sae.evaluation.probing import pool, pool_dense, pooled_latents, probe, probe_dataset, random_dictionary
from sae.ops import kernels_for
from sae.ops.latents import of_dense


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def labelled_file(tmp_path_factory):
    """120 texts of two topics, told apart by single words; some lines say nothing."""
    path = tmp_path_factory.mktemp("labelled") / "topics.csv"
    chance = np.random.default_rng(0)
    words = {"sea": ["ship", "wave", "salt", "reef", "foam"], "kitchen": ["cook", "bread", "butter", "soup", "oven"]}
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "target"])
        for i in range(120):
            topic = ("sea", "kitchen")[i % 2]
            writer.writerow([" ".join(chance.choice(words[topic], 6)) + f" {i}", topic])
        writer.writerow(["", "sea"])
        writer.writerow(["no label", ""])
    return path


def settings(path, **changes) -> ProbingConfig:
    return ProbingConfig(datasets=(str(path),), text_column="prompt", label_column="target", **changes)


# Reading


def test_texts_are_read_from_all_kinds_alike(labelled_file, tmp_path):
    plain = read_labelled(str(labelled_file), settings(labelled_file), 0)
    assert (plain.name, plain.classes, plain.dropped, len(plain.texts)) == ("topics", ["kitchen", "sea"], 2, 120)
    data = labelled_file.read_bytes()
    (tmp_path / "topics.csv.gz").write_bytes(gzip.compress(data))
    (tmp_path / "topics.csv.zst").write_bytes(zstandard.compress(data))
    records = list(csv.DictReader(labelled_file.read_text().splitlines()))
    (tmp_path / "topics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("topics.csv.gz", "topics.csv.zst", "topics.jsonl"):
        assert read_labelled(str(tmp_path / name), settings(name), 0) == plain, name


def test_equal_texts_count_once_and_classes_are_drawn_alike(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [{"prompt": f"text {i % 50}", "target": 1} for i in range(100)]
    lines += [{"prompt": f"more {i}", "target": 0} for i in range(400)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_labelled(str(path), settings(path, texts=80), 0)
    assert len(set(found.texts)) == len(found.texts) == 80
    assert (found.labels.count(0), found.labels.count(1), found.classes, found.dropped) == (40, 40, ["0", "1"], 50)
    assert found == read_labelled(str(path), settings(path, texts=80), 0)
    assert found.texts != read_labelled(str(path), settings(path, texts=80), 1).texts


def test_what_cannot_be_read_or_probed_is_said(tmp_path, labelled_file):
    with pytest.raises(InputError, match=r"nothing\.csv cannot be read"):
        read_labelled(str(tmp_path / "nothing.csv"), settings("x"), 0)
    with pytest.raises(InputError, match=r"allowed: \.jsonl and \.csv"):
        read_labelled("texts.parquet", settings("x"), 0)
    with pytest.raises(InputError, match=r"evaluate\.probing\.text_column: 'text' given, but .* has: prompt, target"):
        read_labelled(str(labelled_file), ProbingConfig(datasets=("x",)), 0)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "target": 1}\n{"prompt')
    with pytest.raises(InputError, match=r"broken\.jsonl cannot be read"):
        read_labelled(str(tmp_path / "broken.jsonl"), settings("x"), 0)
    for text in ("", "[1]\n"):
        (tmp_path / "odd.jsonl").write_text(text)
        with pytest.raises(InputError, match="has: nothing"):
            read_labelled(str(tmp_path / "odd.jsonl"), settings("x"), 0)
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"prompt": f"t {i}", "target": "same"}) + "\n" for i in range(50)))
    assert "1 labels of 20 texts or more" in read_labelled(str(tmp_path / "one.jsonl"), settings("x"), 0).reason


# Pooling


def test_pooling_by_hand():
    f = torch.tensor([[1.0, 0, 0], [3, 0, 2], [0, 0, 0], [0, 5, 0], [0, 1, 0.5]])
    text = torch.tensor([0, 0, 0, 2, 2])  # the second text has no token
    sparse = of_dense(f, kernels_for("cpu"))
    means = csr_array((lambda r, c, v: (v, (r, c)))(*(part.numpy() for part in pool(sparse, text, 3, "mean"))), shape=(3, 3))
    np.testing.assert_allclose(means.toarray(), [[4 / 3, 0, 2 / 3], [0, 0, 0], [0, 3, 0.25]], rtol=1e-6)
    top = csr_array((lambda r, c, v: (v, (r, c)))(*(part.numpy() for part in pool(sparse, text, 3, "max"))), shape=(3, 3))
    np.testing.assert_array_equal(top.toarray(), [[3, 0, 2], [0, 0, 0], [0, 5, 0.5]])
    x = torch.tensor([[1.0, -1], [2, -4], [3, -1], [7, 0], [1, -2]])
    np.testing.assert_allclose(pool_dense(x, text, 3, "mean"), [[2, -2], [0, 0], [4, -1]])
    np.testing.assert_allclose(pool_dense(x, text, 3, "max"), [[3, -1], [0, 0], [7, 0]])


@pytest.mark.parametrize("how", ["mean", "max"])
def test_texts_are_pooled_over_their_own_tokens_alone(tiny_store, model, tokenizer, how):  # noqa: F811
    """Against one text at a time: no padding, BOS in front as in the store, specials left out, long texts cut."""
    sae = sae_for(32, HOOK)
    texts = ["the ship sails", "a", "the cook cuts an onion and warm bread with butter soup salt pan oven spice", "salt </s> pan"]
    config = settings("x", pooling=how, context=12)
    site = locate_hooks(model, [HOOK])
    latents, activations = pooled_latents({"sae": sae}, texts, model, tokenizer, tiny_store, [HOOK], config, 3)
    for i, text in enumerate(texts):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:12]
        x = capture(model, site, torch.tensor([ids]))[HOOK][0]
        x = x[[token not in tiny_store.attrs["special_token_ids"] for token in ids]]
        f = sae.encode(x)
        expected = (x.mean(0), f.mean(0)) if how == "mean" else (x.amax(0), f.amax(0))
        torch.testing.assert_close(torch.from_numpy(activations[i]), expected[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.from_numpy(latents["sae"][[i]].toarray()[0]), expected[1], atol=1e-4, rtol=1e-4)


# Probes


def planted(texts=300, features=30, seed=0):
    """Feature 7 is the label, 11 follows it less, the rest is noise that is sparse; 3 is loud and says nothing."""
    chance = np.random.default_rng(seed)
    y = chance.integers(0, 2, texts)
    x = np.where(chance.random((texts, features)) < 0.2, chance.exponential(size=(texts, features)), 0)
    x[:, 7] = 5 * y
    x[:, 11] = 2 * np.where(chance.random(texts) < 0.9, y, 1 - y)
    x[:, 3] = 100 + chance.normal(size=texts)
    return x.astype(np.float32), y


def test_a_planted_feature_is_found_at_k_1_and_probes_are_scikit_learns():
    x, y = planted()
    train, test = slice(0, 200), slice(200, 300)
    for values in (x, csr_array(x)):
        assert probe(values[train], values[test], y[train], y[test], 1) == (1.0, 1.0, [7])
        assert probe(values[train], values[test], y[train], y[test], 2)[2] == [7, 11]
        assert probe(values[train], values[test], y[train], y[test], None)[0] > 0.95
    narrow = np.delete(x, 7, axis=1)
    accuracy, auc, chosen = probe(narrow[train], narrow[test], y[train], y[test], 1)
    assert chosen == [10]
    column = narrow[:, [10]] / narrow[train, 10].std()
    own = LogisticRegression().fit(column[train], y[train])
    assert accuracy == own.score(column[test], y[test])
    assert auc == roc_auc_score(y[test], own.decision_function(column[test]))
    silent = np.zeros((300, 4), np.float32)
    assert probe(silent[train], silent[test], y[train], y[test], None)[1:] == (0.5, [])


def test_features_are_chosen_on_training_texts_alone():
    x, y = planted()
    train, test = slice(0, 200), slice(200, 300)
    leaking = x.copy()
    leaking[200:, 20] = 1000 * y[200:]  # tells everything, but of test texts only
    assert probe(leaking[train], leaking[test], y[train], y[test], 1)[2] == [7]


def test_shuffled_labels_leave_chance_and_selectivity_is_the_difference():
    x, y = planted(2000)
    data = Labelled("planted", [""] * 2000, y.tolist(), ["no", "yes"], 0)
    task = probe_dataset({"x": csr_array(x)}, data, settings("x", test_fraction=0.4), 0)["yes"]
    assert task["x"]["1"]["accuracy"] == 1
    assert task["x"]["1"]["columns"] == [7]
    bound = 4 * np.sqrt(0.25 / task["test_texts"])  # four standard deviations of a coin
    for found in task["x"].values():
        assert found["control_accuracy"] == pytest.approx(0.5, abs=bound)
        assert found["selectivity"] == found["accuracy"] - found["control_accuracy"]


def test_three_classes_are_three_balanced_tasks():
    chance = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [100, 100, 40])
    x = np.eye(3, 8)[y] + 0.1 * chance.normal(size=(240, 8))
    data = Labelled("three", [""] * 240, y.tolist(), ["a", "b", "c"], 0)
    found = probe_dataset({"x": x.astype(np.float32)}, data, settings("x", k=(1,)), 0)
    assert list(found) == ["a", "b", "c"]
    assert [task["train_texts"] + task["test_texts"] for task in found.values()] == [200, 200, 80]
    assert [task["x"]["1"]["columns"] for task in found.values()] == [[0], [1], [2]]
    assert all(task["x"]["1"]["accuracy"] == 1 for task in found.values())


def test_the_random_dictionary_has_the_width_and_the_l0_asked_for():
    sae = sae_for(32, HOOK)
    random = random_dictionary(sae, 12.4, torch.ones(32), seed=3)
    x = 5 * torch.randn(200, 32) + 1
    assert (random.encode(x) > 0).sum(1).float().mean() == 12
    assert random.cfg.d_sae == sae.cfg.d_sae
    torch.testing.assert_close(random.W_dec.norm(dim=1), torch.ones(64))
    assert torch.equal(random.b_dec, torch.ones(32))


# The whole


def test_probing_is_part_of_an_evaluation(tiny_store, model, tokenizer, labelled_file):  # noqa: F811
    (labelled_file.parent / "one.csv").write_text("prompt,target\na,b\n")
    paths = (str(labelled_file), str(labelled_file.parent / "one.csv"))
    probing = ProbingConfig(datasets=paths, text_column="prompt", label_column="target", k=(1, 5))
    config = EvaluateConfig(ce_sequences=1, probing=probing, resamples=0, dark_matter=False)
    saes = {"a": sae_for(32, HOOK), "b": sae_for(32, HOOK, gain=2.0)}
    many = evaluate_many(saes, tiny_store, model, config, tokenizer=tokenizer, seed=5)
    found = many["a"]["probing"]
    assert found["datasets"]["one"]["state"] == "undefined"
    task = found["datasets"]["topics"]["tasks"]["sea"]
    assert set(task) == {"train_texts", "test_texts", "sae", "activations", "random"}
    assert set(task["sae"]) == {"1", "5", "all"}
    assert found["mean"]["activations"]["all"]["accuracy"] > 0.9  # a word of the text is enough
    assert found["tasks"] == 1
    assert found["mean"]["sae"]["5"]["auc"] == task["sae"]["5"]["auc"]
    assert evaluate(saes["b"], tiny_store, model, config, tokenizer=tokenizer, seed=5) == many["b"]
    assert json.loads(json.dumps(many, allow_nan=False)) == many
    with pytest.raises(InputError, match="need the model's tokenizer"):
        evaluate(saes["a"], tiny_store, model, config)
