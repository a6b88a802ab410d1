"""Examples, the explanation stage with the lookup backend, and its restarts.

Most of it runs in the toy world of llm_servers.py, where what fires when is known by construction.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from llm_servers import (
    CONTEXT,
    HOOK,
    LATENTS,
    ONLY_IN_TRAINING,
    OTHER_HOOK,
    TRAIN_SEQUENCES,
    WINDOW,
    Words,
    make_store,
    relu_dictionary,
)

import explain.describe as describe
import explain.explain as stage
from activation_store import ActivationStore
from activation_store.errors import InputError
from activation_store.files import read_json_lines
from explain.config import ExplainConfig
from explain.evidence import gather_evidence
from explain.examples import Example, Unit, assert_disjoint, choose_units
from explain.scores import correlation_intervals
from explain.summary import summarise
from sae.architectures.identity import IdentitySAE
from sae.architectures.standard import StandardSAE
from sae.sae import SAE, SAEConfig

TOY = ExplainConfig(
    latents=(*LATENTS["on one word"], LATENTS["training only"], LATENTS["dead"], LATENTS["on a word and by chance"]),
    window=WINDOW, train_top=4, train_sampled=4, test_top=3, test_sampled=3, test_random=4,
)  # fmt: skip
SCORES = ("ev_correlation", "rsquared", "absolute_dev_explained", "lookup_correlation", "shuffled_correlation")


def with_settings(config: ExplainConfig, **settings: Any) -> ExplainConfig:
    return ExplainConfig(**{**config.model_dump(), **settings})


def scores_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["unit"]: line for line in read_json_lines(folder / "scores.jsonl")}


def units_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {f"{line['dictionary']}/{line['latent']}": line for line in read_json_lines(folder / "units.jsonl")}


@pytest.fixture(scope="module")
def done(sae: SAE, store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run in the toy world: six latents, and five neurons of the other hook."""
    folder = tmp_path_factory.mktemp("done") / "explanations"
    config = with_settings(TOY, neurons=5, neuron_hook=OTHER_HOOK)
    stage.explain(sae, store, Words(), config, folder, seed=11)
    return folder


# --- examples


def units_in(
    sae: SAE, store: ActivationStore, latents: list[int], config: ExplainConfig, hook: str = HOOK, seed: int = 0
) -> list[Unit]:
    """What the stage does between the pass and the first proposal."""
    sides = [
        gather_evidence(sae, store, hook, split, window=config.window, top=2 * top, sample=2 * sampled, seed=seed)
        for split, top, sampled in (
            ("train", config.train_top, config.train_sampled),
            ("held_out", config.test_top, config.test_sampled),
        )
    ]
    return choose_units(sae, store, "sae", hook, latents, *sides, config, Words().decode, seed)


@torch.inference_mode()
def activations_by_hand(sae: SAE, store: ActivationStore, hook: str, latent: int, window: int, size: int) -> list[float]:
    rows = np.arange(window * size, (window + 1) * size)
    values = sae.encode(store.read(hook, rows))[:, latent]
    special = np.isin(store.tokens.reshape(-1)[rows], store.attrs["special_token_ids"])
    return torch.where(torch.from_numpy(special), 0.0, values).tolist()


@pytest.mark.parametrize("hook", [HOOK, OTHER_HOOK])
def test_examples_hold_the_tokens_and_activations_of_their_window(store: ActivationStore, hook: str) -> None:
    config = with_settings(TOY, window=4, test_random=20)
    sae = IdentitySAE.of(hook, 8) if hook == OTHER_HOOK else relu_dictionary(8, hook)
    units = units_in(sae, store, list(range(8)), config, hook)
    flat = store.tokens.reshape(-1)
    specials = 0
    for unit in units:
        assert len(unit.test) >= 20  # the random ones at least
        for example in unit.train + unit.test:
            ids = flat[example.window * 4 : example.window * 4 + 4].tolist()
            assert example.token_ids == ids
            assert example.tokens == [Words.words[i] for i in ids]
            assert example.activations == activations_by_hand(sae, store, hook, unit.latent, example.window, 4)
            specials += 0 in ids
    assert specials  # the windows that open a sequence are among them
    assert all(e.activations == [0, 0, 0, 0] for e in units[7].test) or hook == OTHER_HOOK  # it fires on <s> alone


def test_blocks_of_windows_are_put_together_in_order(tmp_path: Path) -> None:
    # 300 test windows of 32 tokens are more than the 4096 rows that are encoded at once
    chance = np.random.default_rng(5)
    tokens = chance.integers(1, 20, (640, 32)).astype(np.int32)
    x = chance.normal(size=(tokens.size, 2)).astype(np.float32)
    big = make_store(tmp_path / "store", tokens, {HOOK: x}, 320)
    config = with_settings(TOY, window=32, test_random=300)
    for unit in units_in(IdentitySAE.of(HOOK, 2), big, [0, 1], config):
        assert len(unit.test) > 128 * 2
        for example in unit.test:
            rows = slice(example.window * 32, (example.window + 1) * 32)
            assert example.token_ids == tokens.reshape(-1)[rows].tolist()
            assert example.activations == x[rows, unit.latent].tolist()


def test_training_and_test_examples_come_from_their_split_within_the_limits(sae: SAE, store: ActivationStore) -> None:
    border = TRAIN_SEQUENCES * CONTEXT // WINDOW
    for unit in units_in(sae, store, list(LATENTS["on one word"]), TOY):
        assert {e.window < border for e in unit.train} == {True}
        assert {e.window >= border for e in unit.test} == {True}
        for side, places in ((unit.train, 4), (unit.test, 3)):
            found = {kind: [e for e in side if e.kind == kind] for kind in ("top", "sampled", "random")}
            for kind in ("top", "sampled"):
                assert len(found[kind]) == places
                assert all(max(e.activations) > 0 for e in found[kind])
            if side is unit.train:
                assert not found["random"]
            else:
                assert 1 <= len(found["random"]) <= 4  # those that stand among the others already come once
            strengths = [max(e.activations) for e in found["top"]]
            assert strengths == sorted(strengths, reverse=True)
        assert len({e.window for e in unit.test}) == len(unit.test)


def test_random_test_windows_ignore_what_fires(sae: SAE, store: ActivationStore) -> None:
    config = with_settings(TOY, test_random=30)
    unit = units_in(sae, store, [LATENTS["on one word"][0]], config)[0]
    fires = [max(e.activations) > 0 for e in unit.test if e.kind == "random"]
    assert 0 < sum(fires) < len(fires)  # a word comes in a third of the windows


def test_the_choice_of_examples_is_a_function_of_the_seed(store: ActivationStore) -> None:
    neurons = IdentitySAE.of(OTHER_HOOK, 8)
    once, again, other = (units_in(neurons, store, [0, 1], TOY, OTHER_HOOK, seed) for seed in (1, 1, 2))
    assert once == again

    def windows(units: list[Unit], kind: str) -> list[int]:
        return [e.window for u in units for e in u.train + u.test if e.kind == kind]

    assert windows(once, "top") == windows(other, "top")
    assert windows(once, "sampled") != windows(other, "sampled")
    bare = with_settings(TOY, test_sampled=0)  # so that the random ones differ for no other reason
    once, other = (units_in(neurons, store, [0], bare, OTHER_HOOK, seed) for seed in (1, 2))
    assert windows(once, "random") != windows(other, "random")


def test_the_stage_passes_its_seed_on(sae: SAE, store: ActivationStore, done: Path, tmp_path: Path) -> None:
    stage.explain(sae, store, Words(), with_settings(TOY, neurons=5, neuron_hook=OTHER_HOOK), tmp_path, seed=12)
    for latent in LATENTS["on one word"]:
        units = (units_of(folder)[f"sae/{latent}"] for folder in (tmp_path, done))
        here, there = ({e["window"] for e in unit["train"] if e["kind"] == "sampled"} for unit in units)
        assert len(here) == len(there) == 4
        assert here != there


def test_training_and_test_share_no_text_though_the_corpus_repeats_itself(tmp_path: Path) -> None:
    # Every sequence of 16 is one of 12 texts, on both sides of the border, in capitals and spaces of its own
    chance = np.random.default_rng(6)
    texts = chance.integers(1, 11, (12, CONTEXT))
    tokens = texts[chance.integers(0, 12, 200)]
    tokens = (tokens + 10 * chance.integers(0, 2, tokens.shape)).astype(np.int32)  # words 1..10, or the same as 11..20

    class Twice(Words):
        words = ("<s>", *Words.words[1:11], *(f"  {word.strip().upper()}" for word in Words.words[1:11]))

    strength = chance.uniform(1, 2, tokens.size)
    x = np.where(np.isin(tokens.reshape(-1), (3, 13)), strength, 0).astype(np.float32)[:, None]
    repeating = make_store(tmp_path / "store", tokens, {HOOK: x}, 150)
    config = with_settings(TOY, train_top=3, train_sampled=3, test_top=5, test_sampled=5, test_random=25)
    sae = IdentitySAE.of(HOOK, 1)
    sides = [
        gather_evidence(sae, repeating, HOOK, split, window=WINDOW, top=40, sample=40, seed=0) for split in ("train", "held_out")
    ]
    unit = choose_units(sae, repeating, "sae", HOOK, [0], *sides, config, Twice().decode, 0)[0]

    def text(window: int) -> str:
        ids = tokens.reshape(-1)[window * WINDOW : (window + 1) * WINDOW]
        return " ".join(Words.words[(i - 1) % 10 + 1].strip() for i in ids)

    train, test = ([text(e.window) for e in side] for side in (unit.train, unit.test))
    assert len(train) >= 3
    assert len(test) >= 5
    assert len(set(train)) == len(train)  # nor does a text come twice on one side
    assert len(set(test)) == len(test)
    assert not set(train) & set(test)
    held_out = {text(w) for w in range(150 * 2, 200 * 2)}
    assert set(train) & held_out  # the corpus gave occasion to break the rule


def test_duplicates_are_replaced_by_the_next_best(tmp_path: Path) -> None:
    # The two strongest training windows are the same text: the second place goes to the third strongest
    tokens = (np.arange(8)[:, None] + np.arange(8) ** 2 % 12 + 1).astype(np.int32)
    tokens[1] = tokens[0]
    assert len(np.unique(tokens, axis=0)) == 7
    x = np.repeat([9.0, 8, 7, 6, 5, 4, 3, 2], 8).astype(np.float32)[:, None]
    small = make_store(tmp_path / "store", tokens, {HOOK: x}, 6)
    config = with_settings(TOY, latents=(0,), train_top=3, train_sampled=0, test_top=2, test_sampled=0, test_random=0)
    stage.explain(relu_dictionary(1, HOOK), small, Words(), config, tmp_path / "explanations")
    unit = units_of(tmp_path / "explanations")["sae/0"]
    assert [e["window"] for e in unit["train"]] == [0, 2, 3]
    assert [e["window"] for e in unit["test"]] == [6, 7]


def example(window: int, *tokens: str, kind: str = "top") -> Example:
    return Example(window, kind, list(range(len(tokens))), list(tokens), [1.0] * len(tokens))


@pytest.mark.parametrize(
    ("test", "disjoint"),
    [
        (example(7, " other", " words"), True),
        (example(1, " other", " words"), False),  # the same window
        (example(7, " the", " sea"), False),  # the same text
        (example(7, "THE", "  ", " Sea", "\n"), False),  # in other clothes
    ],
)
def test_assert_disjoint_sees_windows_and_texts(test: Example, disjoint: bool) -> None:
    unit = Unit("sae", HOOK, 0, 0.1, 1.0, [example(1, " the", " sea")], [test])
    if disjoint:
        assert_disjoint(unit)
    else:
        with pytest.raises(AssertionError, match="sae/0"):
            assert_disjoint(unit)


def test_units_survive_the_way_through_json(sae: SAE, store: ActivationStore) -> None:
    for unit in units_in(sae, store, [0, LATENTS["on a word and by chance"]], TOY):
        back = Unit.of_json(json.loads(json.dumps(unit.as_json())))
        assert (back.name, back.hook, back.density, back.max_activation) == (
            unit.name, unit.hook, unit.density, unit.max_activation,
        )  # fmt: skip
        for ours, theirs in zip(back.train + back.test, unit.train + unit.test, strict=True):
            assert (ours.window, ours.kind, ours.tokens, ours.token_ids) == (
                theirs.window, theirs.kind, theirs.tokens, theirs.token_ids,
            )  # fmt: skip
            assert ours.activations == pytest.approx(theirs.activations, rel=5e-5)


# --- the stage, by lookup


def test_latents_on_one_word_are_looked_up_without_fault(done: Path) -> None:
    lines = scores_of(done)
    for latent in LATENTS["on one word"]:
        line = lines[f"sae/{latent}"]
        assert line["state"] == "scored"
        assert line["reason"] is None
        assert line["description"] == f"tokens {Words.words[latent + 1]!r}"
        assert line["max_activation"] == 2 + latent
        for key in ("ev_correlation", "rsquared", "absolute_dev_explained", "lookup_correlation"):
            assert line[key] == pytest.approx(1.0, abs=1e-9), key
        # Whose description it got is another word's, or of a unit with none: never a good one
        assert line["shuffled_correlation"] is None or line["shuffled_correlation"] < 0.5
    shuffled = [lines[f"sae/{i}"]["shuffled_correlation"] for i in LATENTS["on one word"]]
    assert any(value is not None for value in shuffled)


def pearson(a: list[float], b: list[float]) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def test_scores_can_be_computed_again_from_the_files(done: Path) -> None:
    """units.jsonl and results.jsonl are enough to get every figure of scores.jsonl, by a lookup of our own."""
    units, lines = units_of(done), scores_of(done)
    results = {line["unit"]: line for line in read_json_lines(done / "results.jsonl")}
    scored = [name for name, line in lines.items() if line["state"] == "scored"]
    assert len(scored) >= 9
    tables = {}
    for name, unit in units.items():
        values: dict[int, list[float]] = {}
        for shown in unit["train"]:
            for token, value in zip(shown["token_ids"], shown["activations"], strict=True):
                values.setdefault(token, []).append(value)
        tables[name] = {token: float(np.mean(of_token)) for token, of_token in values.items()}
    perfect = 0
    for name in scored:
        test = units[name]["test"]
        true = [a for e in test for a in e["activations"]]
        looked_up = [tables[name].get(t, 0.0) for e in test for t in e["token_ids"]]
        assert [p for sequence in results[name]["predicted"] for p in sequence] == pytest.approx(looked_up)
        t, p = np.array(true), np.array(looked_up)
        assert lines[name]["ev_correlation"] == pytest.approx(pearson(true, looked_up), abs=1e-9)
        assert lines[name]["rsquared"] == pytest.approx(1 - ((t - p) ** 2).sum() / (t**2).sum(), abs=1e-9)
        assert lines[name]["absolute_dev_explained"] == pytest.approx(1 - abs(t - p).sum() / abs(t).sum(), abs=1e-9)
        assert lines[name]["lookup_correlation"] == lines[name]["ev_correlation"]  # here they are one
        # The control is the table of some other unit of the dictionary, the same one for all examples
        dictionary = name.split("/")[0]
        others = []
        for other in units:
            strange = [tables[other].get(t, 0.0) for e in test for t in e["token_ids"]]
            if other != name and other.startswith(f"{dictionary}/") and len(set(strange)) > 1:
                others.append(pearson(true, strange))
        shuffled = lines[name]["shuffled_correlation"]
        assert shuffled is None or min(abs(shuffled - other) for other in others) < 1e-9
        perfect += lines[name]["ev_correlation"] > 0.999
    assert perfect < len(scored)  # some units are not lookups, so the figures above were not all 1


def test_a_unit_that_does_not_vary_is_undefined_and_in_no_mean(done: Path) -> None:
    lines = scores_of(done)
    summary = json.loads((done / "summary.json").read_text())["dictionaries"]["sae"]
    for latent in (LATENTS["training only"], LATENTS["dead"]):
        line = lines[f"sae/{latent}"]
        assert line["state"] == "undefined"
        assert "does not vary on its test examples" in line["reason"]
        assert line["ev_correlation"] is None
    assert lines[f"sae/{LATENTS['training only']}"]["max_activation"] == 1.0
    assert lines[f"sae/{LATENTS['training only']}"]["description"] == f"tokens {Words.words[ONLY_IN_TRAINING]!r}"
    assert lines[f"sae/{LATENTS['dead']}"]["train_windows"] == []
    assert summary["undefined"] == 2
    assert summary["ev_correlation"]["units"] == 5


def test_predictions_that_do_not_vary_are_told_from_units_that_do_not(tmp_path: Path) -> None:
    # The unit fires on word 1 in training and on word 2 in the held-out part: the table knows nothing that is asked
    tokens = np.full((20, CONTEXT), 3, np.int32)
    tokens[:10] += np.arange(10)[:, None].astype(np.int32)
    tokens[10:] += np.arange(10)[:, None].astype(np.int32)
    tokens[:10, 5], tokens[10:, 6] = 1, 2
    flat = tokens.reshape(-1)
    x = np.isin(flat, (1, 2)).astype(np.float32)[:, None]
    turned = make_store(tmp_path / "store", tokens, {HOOK: x}, 10)
    folder = tmp_path / "explanations"
    summary = stage.explain(relu_dictionary(1, HOOK), turned, Words(), with_settings(TOY, latents=(0,)), folder).summary
    line = scores_of(folder)["sae/0"]
    assert (line["state"], line["reason"]) == ("undefined", "correlation undefined: the predictions do not vary")
    assert line["rsquared"] == 0  # 1 - mean(t^2) / mean(t^2): this one exists, yet the unit is in no mean
    assert summary["dictionaries"]["sae"]["rsquared"] == {"mean": None, "standard_error": None, "units": 0}


def test_the_summary_adds_up(done: Path) -> None:
    lines = list(scores_of(done).values())
    summary = json.loads((done / "summary.json").read_text())
    assert summary["backend"] == "lookup"
    assert set(summary["dictionaries"]) == {"sae", "neurons"}
    for name, found in summary["dictionaries"].items():
        mine = [line for line in lines if line["dictionary"] == name]
        assert found["chosen"] == len(mine) == found["scored"] + found["undefined"] + found["failed"]
        assert found["latents"] == 8
        for state in ("scored", "undefined", "failed"):
            assert found[state] == sum(line["state"] == state for line in mine)
        for key in SCORES:
            values = [line[key] for line in mine if line["state"] == "scored" and line[key] is not None]
            assert found[key]["units"] == len(values)
            assert found[key]["mean"] == pytest.approx(np.mean(values))
            assert found[key]["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)))
    # Of the eight latents one never fires, one fires on <s> alone, one only in training
    assert summary["dictionaries"]["sae"]["eligible"] == 5
    assert summary["dictionaries"]["neurons"]["eligible"] == 8


def test_the_shuffled_control_scores_far_below(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    config = with_settings(TOY, latents=LATENTS["on one word"])
    summary = stage.explain(sae, store, Words(), config, tmp_path, seed=0).summary["dictionaries"]["sae"]
    assert summary["ev_correlation"] == {"mean": pytest.approx(1.0), "standard_error": pytest.approx(0.0), "units": 4}
    assert summary["shuffled_correlation"]["units"] >= 3  # where a stranger's word is in none of the windows there is none
    assert summary["shuffled_correlation"]["mean"] < 0.1


@pytest.mark.parametrize("settings", [{"shuffled_control": False}, {"latents": (0,)}])
def test_without_a_control_there_is_no_figure_for_it(
    sae: SAE, store: ActivationStore, settings: dict[str, Any], tmp_path: Path
) -> None:
    summary = stage.explain(sae, store, Words(), with_settings(TOY, **settings), tmp_path).summary["dictionaries"]["sae"]
    assert summary["shuffled_correlation"] == {"mean": None, "standard_error": None, "units": 0}
    assert summary["scored"] >= 1


def test_every_file_is_strict_json(done: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    names = {file.name for file in done.iterdir()}
    assert names == {"units.jsonl", "evidence.json", "results.jsonl", "scores.jsonl", "summary.json"}
    for name in names:
        text = (done / name).read_text(encoding="utf-8")
        for part in text.splitlines() if name.endswith("jsonl") else [text]:
            json.loads(part, parse_constant=refuse)


def test_drawn_units_fire_on_both_sides(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    stage.explain(sae, store, Words(), with_settings(TOY, latents=50), tmp_path)
    assert [line["latent"] for line in scores_of(tmp_path).values()] == [0, 1, 2, 3, 6]  # all there are
    assert json.loads((tmp_path / "summary.json").read_text())["dictionaries"]["sae"]["chosen"] == 5
    drawn = {}
    for seed in range(6):
        folder = tmp_path / str(seed)
        stage.explain(sae, store, Words(), with_settings(TOY, latents=2), folder, seed=seed)
        drawn[seed] = frozenset(line["latent"] for line in scores_of(folder).values())
        assert len(drawn[seed]) == 2
    assert set().union(*drawn.values()) <= {0, 1, 2, 3, 6}
    assert len(set(drawn.values())) > 1


def test_no_latents_and_some_neurons(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    stage.explain(sae, store, Words(), with_settings(TOY, latents=0, neurons=(1, 2), neuron_hook=OTHER_HOOK), tmp_path)
    assert list(scores_of(tmp_path)) == ["neurons/1", "neurons/2"]
    summary = json.loads((tmp_path / "summary.json").read_text())["dictionaries"]
    assert (summary["sae"]["chosen"], summary["sae"]["ev_correlation"]["mean"]) == (0, None)
    assert summary["neurons"]["scored"] == 2


def test_the_result_carries_the_training_statistics(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    latents = stage.explain(sae, store, Words(), TOY, tmp_path).latents
    flat = store.tokens[:TRAIN_SEQUENCES].reshape(-1)
    counted = (flat == 1).sum() / (flat != 0).sum()
    assert latents.density[0].item() == pytest.approx(counted)
    assert latents.max_activation.tolist() == pytest.approx([2, 3, 4, 5, 1, 0, latents.max_activation[6].item(), 0])


# --- a real (if tiny) model: neurons of both hooks


@pytest.mark.parametrize("neuron_hook", [None, "blocks.1.mlp.hook_post"])
def test_neurons_of_a_model_go_the_same_way(
    tiny_store: ActivationStore, tiny_model_dir: Path, neuron_hook: str | None, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    hook = "blocks.1.hook_resid_post"
    torch.manual_seed(0)
    sae = StandardSAE(SAEConfig("standard", 32, 48, hook))
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    config = with_settings(TOY, latents=6, neurons=7, neuron_hook=neuron_hook)
    summary = stage.explain(sae.requires_grad_(False), tiny_store, tokenizer, config, tmp_path).summary["dictionaries"]
    assert summary["sae"]["chosen"] == 6
    assert summary["neurons"]["chosen"] == 7
    assert summary["neurons"]["latents"] == {None: 32, "blocks.1.mlp.hook_post": 64}[neuron_hook]
    assert summary["neurons"]["scored"] == 7  # dense units vary on their test examples
    units = units_of(tmp_path)
    assert sum(unit["hook"] == (neuron_hook or hook) for unit in units.values() if unit["dictionary"] == "neurons") == 7
    flat, special = tiny_store.tokens.reshape(-1), tiny_store.special.reshape(-1)
    looked_at = 0
    assert {unit["sign"] for unit in units.values()} == {1, -1}  # some neurons are stronger below zero
    for unit in units.values():
        source = sae if unit["dictionary"] == "sae" else IdentitySAE.of(unit["hook"], tiny_store.width(unit["hook"]))
        for shown in unit["train"] + unit["test"]:
            rows = slice(shown["window"] * WINDOW, (shown["window"] + 1) * WINDOW)
            values = unit["sign"] * source.encode(tiny_store.read(unit["hook"], rows))[:, unit["latent"]]
            values = torch.where(torch.from_numpy(special[rows]), 0.0, values)
            assert shown["activations"] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-5)
            assert shown["token_ids"] == flat[rows].tolist()
            assert shown["tokens"] == [tokenizer.decode([i]) for i in flat[rows].tolist()]
            looked_at += 1
    assert looked_at > 13 * 10


# --- killed and started again


class Killed(Exception):
    """The kill of these tests."""


def start_again(sae: SAE, store: ActivationStore, folder: Path) -> None:
    config = with_settings(TOY, neurons=5, neuron_hook=OTHER_HOOK)
    stage.explain(sae, store, Words(), config, folder, seed=11)


def assert_same_end(folder: Path, done: Path) -> None:
    for name in ("units.jsonl", "scores.jsonl", "summary.json"):
        assert (folder / name).read_bytes() == (done / name).read_bytes(), name
    units = [line["unit"] for line in read_json_lines(folder / "results.jsonl")]
    assert len(units) == len(set(units)) == len(scores_of(done))  # each was done once
    assert not list(folder.glob("evidence-*"))


@pytest.mark.parametrize("after", [0, 1, 5, 10])
@pytest.mark.parametrize("torn", [False, True])
def test_killed_between_units_it_ends_the_same(
    sae: SAE, store: ActivationStore, done: Path, after: int, torn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = describe.append_json_line
    written: list[str] = []

    def append(path: Path, value: dict[str, Any]) -> None:
        if len(written) == after:
            if torn:  # the machine went down while the line was being written
                with open(path, "ab") as file:
                    file.write(json.dumps(value).encode()[:50])
            raise Killed
        original(path, value)
        written.append(value["unit"])

    with monkeypatch.context() as patch:
        patch.setattr(describe, "append_json_line", append)
        with pytest.raises(Killed):
            start_again(sae, store, tmp_path)
    assert not (tmp_path / "scores.jsonl").exists()
    if after or torn:
        kept = (tmp_path / "results.jsonl").read_bytes()
    again: list[str] = []

    def count(path: Path, value: dict[str, Any]) -> None:
        again.append(value["unit"])
        original(path, value)

    monkeypatch.setattr(describe, "append_json_line", count)
    start_again(sae, store, tmp_path)
    assert_same_end(tmp_path, done)
    assert not set(written) & set(again)  # no finished unit was redone
    if after:
        finished = kept[: kept.rfind(b"\n") + 1]
        assert (tmp_path / "results.jsonl").read_bytes().startswith(finished)


@pytest.mark.parametrize("where", [1, 2, 3, 4])
def test_killed_in_the_pass_it_ends_the_same(
    sae: SAE, store: ActivationStore, done: Path, where: int, tmp_path: Path
) -> None:
    """Four passes: two dictionaries, two splits."""
    calls = 0

    def progress(finished: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == where:
            raise Killed

    config = with_settings(TOY, neurons=5, neuron_hook=OTHER_HOOK)
    with pytest.raises(Killed):
        stage.explain(sae, store, Words(), config, tmp_path, seed=11, evidence_progress=progress)
    assert not (tmp_path / "units.jsonl").exists()
    start_again(sae, store, tmp_path)
    assert_same_end(tmp_path, done)


def test_a_second_start_makes_no_pass_once_statistics_are_with_the_sae(
    sae: SAE, store: ActivationStore, done: Path, tmp_path: Path
) -> None:
    config = with_settings(TOY, neurons=5, neuron_hook=OTHER_HOOK)
    first = stage.explain(sae, store, Words(), config, tmp_path, seed=11)
    measured = relu_dictionary(8, HOOK)
    measured.latents = first.latents  # as the run folder's SAE has them

    def forbidden(finished: int, total: int) -> None:
        raise AssertionError("the evidence was there")

    second = stage.explain(measured, store, Words(), config, tmp_path, seed=11, evidence_progress=forbidden)
    assert second.summary == first.summary
    assert_same_end(tmp_path, done)


def test_two_runs_of_one_seed_are_equal_to_the_byte(
    sae: SAE, store: ActivationStore, done: Path, tmp_path: Path
) -> None:
    start_again(sae, store, tmp_path)
    assert_same_end(tmp_path, done)
    assert (tmp_path / "results.jsonl").read_bytes() == (done / "results.jsonl").read_bytes()


# --- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents": (0, 8)}, r"explain\.latents: \[8\] given; allowed: 0 to 7"),
        ({"neurons": (9,)}, r"explain\.neurons: \[9\] given; allowed: 0 to 7"),
        ({"neurons": 1, "neuron_hook": "blocks.9.hook_resid_post"}, r"blocks\.9\.hook_resid_post"),
        ({"window": 5}, r"explain\.window: 5 does not divide"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    sae: SAE, store: ActivationStore, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        stage.explain(sae, store, Words(), with_settings(TOY, **settings), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [
        {"latents": -1}, {"latents": (0, -1)}, {"neurons": -2}, {"window": 1}, {"train_top": 0}, {"test_random": -1},
        {"concurrency": 0}, {"retries": -1}, {"timeout": 0}, {"checkpoint_seconds": 0}, {"backend": "oracle"}, {"windows": 8},
    ],
)
def test_impossible_settings_are_refused_as_input(
    sae: SAE, store: ActivationStore, settings: dict[str, Any], tmp_path: Path
) -> None:
    name = next(iter(settings))
    with pytest.raises((pydantic.ValidationError, InputError), match=name):
        stage.explain(sae, store, Words(), with_settings(TOY, **settings), tmp_path)


def test_a_unit_named_twice_is_one_unit_or_an_error(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    refused = ""
    try:
        stage.explain(sae, store, Words(), with_settings(TOY, latents=(1, 1, 2)), tmp_path)
    except (pydantic.ValidationError, InputError) as error:
        refused = str(error)
    names = [line["unit"] for line in read_json_lines(tmp_path / "scores.jsonl")]
    assert "latents" in refused if refused else names == ["sae/1", "sae/2"]


def test_a_dictionary_of_another_width_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="d_in: the SAE takes 9"):
        stage.explain(relu_dictionary(9, HOOK), store, Words(), with_settings(TOY, latents=1), tmp_path)


MODULES = sorted(
    re.sub(r"(\.__init__)?\.py$", "", str(path.relative_to(Path(stage.__file__).parent.parent)).replace("/", "."))
    for path in Path(stage.__file__).parent.rglob("*.py")
)


def test_each_module_can_be_imported_first() -> None:
    """A caller may begin with any of them, e.g. `from explain.client import check_server`."""
    assert "explain.client" in MODULES
    program = (
        "import importlib, sys\n"
        "failed = []\n"
        f"for name in {MODULES!r}:\n"
        "    for loaded in [m for m in sys.modules if m == 'explain' or m.startswith('explain.')]:\n"
        "        del sys.modules[loaded]\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        failed.append(f'{name}: {error}')\n"
        "sys.exit('; '.join(failed) or 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_intervals_and_margins_can_be_computed_again(done: Path) -> None:
    lines = [line for line in read_json_lines(done / "scores.jsonl") if line["state"] == "scored"]
    results = {line["unit"]: line for line in read_json_lines(done / "results.jsonl")}
    units = {unit.name: unit for unit in (Unit.of_json(line) for line in read_json_lines(done / "units.jsonl"))}
    assert lines
    for line in lines:
        test = units[line["unit"]].test
        true, kinds = [example.activations for example in test], [example.kind for example in test]
        again = correlation_intervals(true, results[line["unit"]]["predicted"], strata=kinds, seed=11)
        for name, interval in line["intervals"].items():
            assert interval == pytest.approx(again[name], abs=1e-4)  # activations are rounded in the file
            if interval is not None:
                assert interval[0] <= line[name] + 1e-9
                assert line[name] <= interval[1] + 1e-9
    summary = json.loads((done / "summary.json").read_text())["dictionaries"]
    for name, found in summary.items():
        own = [line for line in lines if line["dictionary"] == name]
        for control in ("shuffled", "lookup"):
            both = [line for line in own if line[f"{control}_correlation"] is not None]
            margins = [line["ev_correlation"] - line[f"{control}_correlation"] for line in both]
            margin = found["margins"][control]
            assert margin["units"] == len(margins)
            assert margin["mean"] == pytest.approx(np.mean(margins)) if margins else margin["mean"] is None
            if margin["interval"]:
                assert margin["interval"][0] <= margin["mean"] <= margin["interval"][1]


def test_a_margin_is_of_pairs() -> None:
    """Scores 0.9 and 0.5, controls 0.1 and 0.3: margins 0.8 and 0.2. A unit without its control is in none."""
    others = ("rsquared", "absolute_dev_explained", "rsquared_centred", "population_correlation", "label_mass")
    line: dict[str, Any] = {"state": "scored", "reason": None, **dict.fromkeys(others)}
    lines = [
        {**line, "ev_correlation": 0.9, "shuffled_correlation": 0.1, "lookup_correlation": None},
        {**line, "ev_correlation": 0.5, "shuffled_correlation": 0.3, "lookup_correlation": None},
        {**line, "ev_correlation": -1.0, "shuffled_correlation": None, "lookup_correlation": None},
        {**line, "state": "failed", "ev_correlation": None, "shuffled_correlation": 0.7, "lookup_correlation": None},
    ]
    margins = summarise(lines, 500, 0)["margins"]
    assert margins["shuffled"]["mean"] == pytest.approx(0.5)
    assert margins["shuffled"]["interval"] == pytest.approx([0.2, 0.8])  # a quarter of the resamples have one unit twice
    assert margins["shuffled"]["units"] == 2
    assert margins["lookup"] == {"mean": None, "interval": None, "units": 0}
