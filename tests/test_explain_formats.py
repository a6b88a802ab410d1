"""Explanations in other tools' files: what is written, by hand and by its readers; what others wrote; how bad files fail."""

import asyncio
import gzip
import json
import math
import string
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import script
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_servers import HOOK, LATENTS, OTHER_HOOK, Words
from safetensors.torch import save_file
from test_cli import finished, monosem_cli, tiny_config  # noqa: F401 - fixtures

import explain.explain as stage
from activation_store import ActivationStore
from activation_store.errors import InputError
from activation_store.files import read_json_lines
from explain.backends import Explanation, Simulation
from explain.backends.lookup import LookupBackend
from explain.config import ExplainConfig
from explain.examples import Example, Unit, assert_disjoint
from explain.formats import Explanations, Names, delphi, read_delphi, read_explanations, score, write_explanations
from explain.formats.lines import storable
from explain.formats.neuronpedia import read_neuronpedia, read_scores, write_neuronpedia
from explain.formats.openai import neuron_record, neuron_result, read_openai, read_results
from explain.judge import Judgement
from explain.scores import correlation_scores
from sae.architectures.standard import StandardSAE
from sae.sae import HISTOGRAM_EDGES, LatentStatistics

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "neuron-records"
NAMES = Names(
    "gpt2-small", "res-toy", lambda hook: int(hook.split(".")[1]), "toy", dataset="some/text", context=3,
    explainer="gpt-4o-mini", created="2026-01-02T03:04:05",
)  # fmt: skip
MODEL = {"modelId": "gpt2-small", "layer": "6-res-jb"}


def example(window: int, kind: str, values: Sequence[float], tokens: Sequence[str] = (), quantile: int | None = None) -> Example:
    shown = [*tokens, *(f" {window}.{i}" for i in range(len(values) - len(tokens)))]
    return Example(window, kind, list(range(len(values))), shown, list(values), quantile)


def toy_unit(latent: int = 5, dictionary: str = "sae") -> Unit:
    return Unit(
        dictionary, "blocks.6.hook_resid_pre", latent, 0.25, 4.0,
        [example(1, "top", [0, 4, 1]), example(2, "sampled", [0.5, 0, 0], quantile=3)],
        [example(7, "top", [0, 0, 3.5]), example(8, "random", [0, 0, 0]), example(9, "sampled", [0, 1.5, 0])],
        30, 100, promoted=[(" sea", 1.5), ("\x00", 1.25)], suppressed=[(" land", -2.0)],
    )  # fmt: skip


def line_of(unit: Unit, state: str = "scored", **more: Any) -> dict[str, Any]:
    description = None if state == "failed" else f"words of {unit.latent}"
    return {"unit": unit.name, "state": state, "reason": None, "description": description, "ev_correlation": 0.5, **more}


def explained(units: list[Unit], states: Sequence[str] = (), **more: Any) -> Explanations:
    lines = {u.name: line_of(u, s) for u, s in zip(units, states or ["scored"] * len(units), strict=True)}
    return Explanations(units, lines, {}, {"backend": "openai", "model": "gpt-4o-mini"}, **more)


def lines_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def statistics(latent: int, bins: dict[int, int]) -> LatentStatistics:
    histogram = torch.zeros(latent + 1, len(HISTOGRAM_EDGES) - 1)
    for at, count in bins.items():
        histogram[latent, at] = count
    return LatentStatistics(torch.zeros(latent + 1), torch.zeros(latent + 1), histogram, 1000)


# --- Neuronpedia, written


def test_a_neuronpedia_source_line_by_line(tmp_path: Path) -> None:
    # 0.5 = 2^-1 opens bin 18 (edges are 2^(i/2) from 2^-10), 1.5 lies in [sqrt 2, 2), bin 21, 4 = 2^2 opens bin 24
    stats = statistics(5, {18: 10, 21: 25, 24: 5})
    write_neuronpedia(explained([toy_unit()], latents={"sae": stats}), tmp_path, NAMES)
    source = tmp_path / "gpt2-small" / "6-res-toy"
    assert sorted(p.name for p in source.iterdir()) == [
        "activations", "explanations", "features", "model.jsonl", "release.jsonl", "scores", "source.jsonl", "sourceset.jsonl",
    ]  # fmt: skip
    (feature,) = lines_in(source / "features" / "batch-0.jsonl.gz")
    assert {key: value for key, value in feature.items() if value not in ([], None, False)} == {
        "modelId": "gpt2-small", "layer": "6-res-toy", "index": "5", "sourceSetName": "res-toy",
        "creatorId": NAMES.creator_id, "createdAt": "2026-01-02T03:04:05", "maxActApprox": 4.0,
        "vectorDefaultSteerStrength": 10.0, "hookName": "blocks.6.hook_resid_pre", "neg_str": [" land"], "neg_values": [-2.0],
        "pos_str": [" sea", "\ufffd"], "pos_values": [1.5, 1.25], "frac_nonzero": 0.25,
        "freq_hist_data_bar_heights": [10, 0, 0, 25, 0, 0, 5],
        "freq_hist_data_bar_values": pytest.approx([2 ** (-1 + 0.25 + i / 2) for i in range(7)]),
    }  # fmt: skip
    rows = lines_in(source / "activations" / "batch-0.jsonl.gz")
    assert [(row["dataIndex"], row["maxValue"], row["maxValueTokenIndex"], row["minValue"]) for row in rows] == [
        ("train/top/1", 4, 1, 0), ("train/sampled/2/3", 0.5, 0, 0), ("test/top/7", 3.5, 2, 0), ("test/random/8", 0, 0, 0),
        ("test/sampled/9", 1.5, 1, 0),
    ]  # fmt: skip
    assert [(row["binMin"], row["binMax"], row["binContains"]) for row in rows] == [
        (-1, 4, -1), (0.5, pytest.approx(math.sqrt(0.5)), 10 / 40), (-1, 4, -1), (0, 0, 0),
        (pytest.approx(math.sqrt(2)), 2, 25 / 40),
    ]  # fmt: skip
    assert [row["qualifyingTokenIndex"] for row in rows] == [1, 0, 2, None, 1]
    assert rows[0]["tokens"] == [" 1.0", " 1.1", " 1.2"]
    assert rows[0]["values"] == [0, 4, 1]
    (explanation,) = lines_in(source / "explanations" / "batch-0.jsonl.gz")
    assert (explanation["description"], explanation["explanationModelName"], explanation["typeName"]) == (
        "words of 5", "gpt-4o-mini", "monosem",
    )  # fmt: skip
    (scored,) = lines_in(source / "scores" / "batch-0.jsonl.gz")
    assert scored["explanationId"] == explanation["id"]
    assert (scored["state"], scored["ev_correlation"], scored["instrument"]["model"]) == ("scored", 0.5, "gpt-4o-mini")
    for name, key in (("explanation_type", "monosem"), ("explanation_model_type", "gpt-4o-mini")):
        assert json.loads((tmp_path / "config" / f"{name}.jsonl").read_text())["name"] == key
    catalogue = {p.stem: json.loads(p.read_text()) for p in source.glob("*.jsonl")}
    assert catalogue["model"]["id"] == catalogue["source"]["modelId"] == catalogue["sourceset"]["modelId"] == "gpt2-small"
    assert catalogue["source"]["id"] == "6-res-toy"
    assert catalogue["source"]["setName"] == catalogue["sourceset"]["name"] == "res-toy"
    assert catalogue["sourceset"]["releaseName"] == catalogue["release"]["name"] == "toy"


def test_without_statistics_an_interval_says_no_share(tmp_path: Path) -> None:
    write_neuronpedia(explained([toy_unit()]), tmp_path, NAMES)
    rows = lines_in(tmp_path / "gpt2-small/6-res-toy/activations/batch-0.jsonl.gz")
    assert [row["binContains"] for row in rows] == [-1, None, -1, 0, None]
    assert lines_in(tmp_path / "gpt2-small/6-res-toy/features/batch-0.jsonl.gz")[0]["freq_hist_data_bar_heights"] == []


def test_batches_hold_so_many_features_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    units = [toy_unit(latent) for latent in (100, 3, 20, 4, 1)]
    states = ["scored", "failed", "scored", "undefined", "scored"]
    write_neuronpedia(explained(units, states), tmp_path, NAMES, batch=2)
    source = tmp_path / "gpt2-small" / "6-res-toy"

    def found(kind: str) -> dict[str, list[str]]:
        return {p.name: [line["index"] for line in lines_in(p)] for p in sorted((source / kind).iterdir())}

    three = {"batch-0.jsonl.gz": ["1", "3"], "batch-1.jsonl.gz": ["4", "20"], "batch-2.jsonl.gz": ["100"]}
    assert found("features") == found("scores") == three
    assert {name: sorted(set(of_batch), key=int) for name, of_batch in found("activations").items()} == three
    # What failed or is undefined has no explanation, yet stands with its state
    assert found("explanations") == {"batch-0.jsonl.gz": ["1"], "batch-1.jsonl.gz": ["20"], "batch-2.jsonl.gz": ["100"]}
    scored = {line["index"]: (line["state"], line["explanationId"]) for line in read_scores(source)}
    assert (scored["3"], scored["4"]) == (("failed", None), ("undefined", None))


def test_a_batch_without_explanations_has_no_file(tmp_path: Path) -> None:
    write_neuronpedia(explained([toy_unit()], ["failed"]), tmp_path, NAMES)
    assert not list(tmp_path.glob("**/explanations"))
    assert [one.descriptions for one in read_neuronpedia(tmp_path)] == [[]]


def test_1024_features_a_batch(tmp_path: Path) -> None:
    bare = [Unit("sae", "blocks.0.hook_resid_pre", latent, 0.1, 1.0, [], []) for latent in range(1025)]
    write_neuronpedia(explained(bare), tmp_path, NAMES)
    features = sorted(tmp_path.glob("**/features/*"))
    assert [len(lines_in(path)) for path in features] == [1024, 1]


def test_every_line_of_a_file_has_the_keys_of_the_first(tmp_path: Path) -> None:
    units = [toy_unit(1), toy_unit(2), Unit("sae", "blocks.6.hook_resid_pre", 3, 0.0, 0.0, [], [])]
    lines = explained(units)
    lines.scores["sae/2"] |= {"detection": {"f1": 0.5}}  # only this one was asked
    lines.scores.pop("sae/3")
    write_neuronpedia(lines, tmp_path, NAMES)
    files = list(tmp_path.glob("**/*.gz"))
    assert len(files) == 4
    for path in files:
        assert len({tuple(line) for line in lines_in(path)}) == 1, path
    side = {line["index"]: line for line in read_scores(tmp_path)}
    assert (side["1"]["detection"], side["2"]["detection"]) == (None, {"f1": 0.5})
    assert side["3"]["state"] == "not scored"


def test_equal_runs_give_equal_bytes_and_ids(tmp_path: Path) -> None:
    units = [toy_unit(latent) for latent in range(5)]
    for name in "ab":
        write_explanations(explained(units), tmp_path / name, NAMES, "neuronpedia")
    files = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.jsonl*")} for n in "ab"]
    assert len(files[0]) == 10
    assert files[0] == files[1]
    raw = next(data for path, data in files[0].items() if path.suffix == ".gz")
    assert raw[4:8] == bytes(4)  # no time
    batches = [p for kind in ("activations", "explanations") for p in tmp_path.glob(f"a/**/{kind}/*")]
    ids = [line["id"] for path in batches for line in lines_in(path)]
    assert len(set(ids)) == len(ids) == 5 * 5 + 5
    assert all(len(i) == 25 and i[0] == "c" and set(i) <= set(string.ascii_lowercase + string.digits) for i in ids)


def test_other_dictionaries_are_sources_of_their_own(tmp_path: Path) -> None:
    write_neuronpedia(explained([toy_unit(1), toy_unit(1, "neurons")]), tmp_path, NAMES)
    assert {p.name for p in (tmp_path / "gpt2-small").iterdir()} == {"6-res-toy", "6-res-toy-neurons"}
    with pytest.raises(InputError, match=r"2 sources in it \(gpt2-small/6-res-toy; .*name one"):
        list(read_neuronpedia(tmp_path))
    (one,) = read_neuronpedia(tmp_path / "gpt2-small" / "6-res-toy-neurons")
    assert one.unit.name == "6-res-toy-neurons/1"


# --- round trips

NASTY = ("\t", "\n", "\r\n", "😀", "\ufffd", "\x00", '"', "\\n", "\u2028", "\ud83d", " a", "", "é", "<|endoftext|>", "'", "\x1f")
texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=5))
floats = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: float(f"{value:.5g}"))


@st.composite
def units(draw: st.DrawFn) -> Unit:
    window = iter(draw(st.permutations(range(40))))

    def some(kinds: Sequence[str]) -> list[Example]:
        found = []
        for kind in draw(st.lists(st.sampled_from(kinds), max_size=4)):
            own, number = draw(st.lists(texts, min_size=1, max_size=5)), next(window)
            tokens = [*own, f"·{number}"]  # no text comes twice
            values = draw(st.lists(floats, min_size=len(tokens), max_size=len(tokens)))
            quantile = draw(st.none() | st.integers(1, 10)) if kind == "sampled" else None
            found.append(Example(number, kind, list(range(len(tokens))), tokens, values, quantile))
        return found

    logits = st.lists(st.tuples(texts, floats), max_size=3)
    sides = {side: some(("top", "sampled", "random", "neighbour")) for side in ("train", "valid", "test")}
    return Unit(
        "sae", "blocks.3.hook_resid_post", draw(st.integers(0, 10**6)), draw(st.floats(0, 1)), draw(floats), sides["train"],
        sides["test"], valid=sides["valid"], promoted=draw(logits), suppressed=draw(logits),
    )  # fmt: skip


def seen(examples: Sequence[Example]) -> list[tuple[int, str, list[str], list[float], int | None]]:
    return [(e.window, e.kind, [storable(token) for token in e.tokens], e.activations, e.quantile) for e in examples]


@settings(max_examples=60, deadline=None)
@given(units(), texts.filter(bool))
def test_what_is_written_for_neuronpedia_is_read_back(tmp_path_factory: Any, unit: Unit, description: str) -> None:
    folder = tmp_path_factory.mktemp("export")
    scores = {unit.name: line_of(unit) | {"description": description}}
    write_neuronpedia(Explanations([unit], scores, {}, {}), folder, NAMES)
    (back,) = read_neuronpedia(folder)
    for side in ("train", "valid", "test"):
        assert seen(getattr(back.unit, side)) == seen(getattr(unit, side))
    assert back.descriptions == [storable(description)]
    assert (back.unit.latent, back.unit.density, back.unit.max_activation) == (unit.latent, unit.density, unit.max_activation)
    assert (back.unit.hook, back.unit.name) == (unit.hook, f"3-res-toy/{unit.latent}")
    for ours, theirs in ((back.unit.promoted, unit.promoted), (back.unit.suppressed, unit.suppressed)):
        assert ours == [(storable(token), value) for token, value in theirs]
    for path in folder.glob("**/*.gz"):
        assert b"\\u0000" not in gzip.decompress(path.read_bytes())
        assert len({tuple(line) for line in lines_in(path)}) == 1


@settings(max_examples=60, deadline=None)
@given(units(), texts.filter(bool), st.data())
def test_what_is_written_for_neuron_explainer_is_read_back(
    tmp_path_factory: Any, unit: Unit, description: str, data: st.DataObject
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("export")
    predicted = [data.draw(st.lists(floats, min_size=len(e.tokens), max_size=len(e.tokens))) for e in unit.test]
    scores = {unit.name: line_of(unit) | {"description": description}}
    write_explanations(Explanations([unit], scores, {unit.name: predicted}, {}), folder, NAMES, "openai")
    (back,) = read_openai(folder / "sae")
    assert (back.unit.latent, back.descriptions) == (unit.latent, [storable(description)] if predicted else [])
    every = [e for side in ("train", "valid", "test") for e in getattr(unit, side)]
    fires, random = [e for e in every if e.kind in ("top", "sampled")], [e for e in every if e.kind == "random"]
    texts_of = {tuple(storable(token) for token in e.tokens): e.activations for e in fires + random}
    found = back.unit.train + back.unit.valid + back.unit.test
    assert all(texts_of[tuple(e.tokens)] == e.activations for e in found)
    assert len(back.unit.train) == math.ceil(len(fires) / 4)
    for line in read_results(folder / "sae") if predicted else ():
        (one,) = line.explanations
        assert (one.true, one.expected) == ([e.activations for e in unit.test], predicted)
        again = vars(one.scores())
        for name, stated in one.stated.items():
            assert again[name] == pytest.approx(math.nan if stated is None else stated, abs=1e-9, rel=1e-9, nan_ok=True), name


# --- Neuronpedia, read as others write it


def put(folder: Path, kind: str, *lines: dict[str, Any] | str | bytes, batch: int = 0, zipped: bool = True) -> Path:
    text = b"".join((line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()) + b"\n"
                    for line in lines)  # fmt: skip
    path = folder / kind / f"batch-{batch}.jsonl{'.gz' if zipped else ''}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text) if zipped else text)
    return path


def feature(index: Any = "5", **more: Any) -> dict[str, Any]:
    return {**MODEL, "index": index, "frac_nonzero": 0.01, "maxActApprox": 8.0, "pos_str": [" a"], "pos_values": [1], **more}


def activation(values: list[float], tokens: list[str] | None = None, index: Any = "5", **more: Any) -> dict[str, Any]:
    return {**MODEL, "index": index, "tokens": tokens or [f"t{v}" for v in values], "values": values, **more}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_folder_as_neuronpedia_exports_it(tmp_path: Path, zipped: bool) -> None:
    """Batches of the three kinds cut differently, keys that we do not know, intervals, repeated texts, explanations of others."""
    top, interval = {"binMin": -1, "binMax": 8, "binContains": -1}, {"binMin": 2, "binMax": 4, "binContains": 0.3}
    put(tmp_path, "features", feature("10", umap_x=1), feature(5, hookName="blocks.6.hook_resid_pre"), zipped=zipped)
    put(tmp_path, "features", feature("6"), batch=1, zipped=zipped)
    put(
        tmp_path, "activations", activation([1, 8], **top), activation([3, 0], **interval), activation([7, 2], **top),
        activation([3, 1], **interval), activation([1, 8], **top), activation([0, 0], **interval), zipped=zipped,
    )  # fmt: skip
    put(tmp_path, "activations", activation([2, 2], index="10", **top), batch=1, zipped=zipped)
    texts_of = (("10", "tens"), ("5", "fives"), ("5", "odd ones"))
    described: list[dict[str, Any]] = [{**MODEL, "index": index, "description": text} for index, text in texts_of]
    described[0]["embedding"] = [0.1]
    put(tmp_path, "explanations", *described, zipped=zipped)
    found = {one.unit.latent: one for one in read_explanations(tmp_path, "neuronpedia")}
    assert {latent: one.descriptions for latent, one in found.items()} == {5: ["fives", "odd ones"], 10: ["tens"], 6: []}
    unit = found[5].unit
    assert [e.activations for e in unit.train] == [[1, 8], [7, 2]]  # what their explainers see; a text once
    assert [(e.activations, e.kind) for e in unit.test] == [([3, 0], "sampled"), ([3, 1], "sampled"), ([0, 0], "random")]
    assert (unit.density, unit.max_activation, unit.promoted, unit.windows) == (0.01, 8.0, [(" a", 1.0)], 0)
    assert (unit.hook, found[10].unit.hook) == ("blocks.6.hook_resid_pre", "6-res-jb")
    assert unit.train[0].token_ids != unit.train[1].token_ids
    assert [one.unit.latent for one in read_neuronpedia(tmp_path, indices=[6, 99])] == [6]


def test_of_strongest_windows_alone_every_second_is_held_out(tmp_path: Path) -> None:
    put(tmp_path, "features", feature(maxActApprox=None))
    put(tmp_path, "activations", *(activation([float(v), 0.0], dataIndex=v) for v in (3, 9, 1, 7, 5)))  # older: no bins at all
    (one,) = read_neuronpedia(tmp_path)
    assert one.unit.max_activation == 9
    assert [e.activations[0] for e in one.unit.train] == [9, 5, 1]
    assert [e.activations[0] for e in one.unit.test] == [7, 3]


NP_FAULTS: dict[str, tuple[str, Any, str]] = {
    "no index": ("features", {**MODEL}, "batch-0.jsonl.gz, line 2: no field 'index'"),
    "no model": ("features", {"layer": "a", "index": "1"}, "line 2: no field 'modelId'"),
    "index": ("features", feature("five"), "line 2: index: 'five' given"),
    "logits": ("features", feature("6", pos_values=[1, 2]), "line 2: pos_values: 2 given for 1 of pos_str"),
    "no density": ("features", {**MODEL, "index": "6"}, "line 2: no field 'frac_nonzero'; it must be a number"),
    "no tokens": ("activations", {**MODEL, "index": "5", "values": [1]}, "line 2: no field 'tokens'; it must be a list of texts"),
    "no values": ("activations", {**MODEL, "index": "5", "tokens": ["a"]}, "line 2: no field 'values'"),
    "lengths": ("activations", activation([1], ["a", "b"]), "line 2: values: 1 given for 2 tokens"),
    "kinds": ("activations", activation([1]) | {"tokens": [3]}, r"line 2: tokens: \[3\] given; it must be a list of texts"),
    "nan": ("activations", activation([math.nan]), "line 2: values: .* it must be a list of numbers"),
    "null": ("activations", activation([1]) | {"values": [None]}, r"line 2: values: \[null\] given"),
    "no description": ("explanations", {**MODEL, "index": "5"}, "line 2: no field 'description'"),
    "no json": ("explanations", "{", "line 2: not readable JSON"),
    "no text": ("explanations", b'{"a": "\xff"}', "line 2: not readable JSON"),
    "no object": ("features", "[1]", "line 2: holds a list; it must be a JSON object"),
}


@pytest.mark.parametrize("fault", NP_FAULTS)
def test_faults_of_a_neuronpedia_folder_name_file_line_and_field(tmp_path: Path, fault: str) -> None:
    kind, line, message = NP_FAULTS[fault]
    good = {"features": feature(), "activations": activation([1.0, 2.0])}
    good["explanations"] = {**MODEL, "index": "5", "description": "d"}
    for name, one in good.items():
        put(tmp_path, name, one, *([line] if name == kind else []))
    with pytest.raises(InputError, match=message):
        list(read_neuronpedia(tmp_path))


def test_cut_and_split_batches_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "features", feature())
    path = put(tmp_path, "activations", *(activation([float(i), 1.0]) for i in range(50)))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"batch-0.jsonl.gz: not readable after line"):
        list(read_neuronpedia(tmp_path))
    put(tmp_path, "activations", activation([1.0]))
    put(tmp_path, "activations", activation([2.0]), batch=1)
    with pytest.raises(InputError, match=r"batch-1.jsonl.gz, line 1: index: 5 has activations in another batch too"):
        list(read_neuronpedia(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        list(read_neuronpedia(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"0 sources in it \(none\)"):
        list(read_neuronpedia(tmp_path / "empty"))
    with pytest.raises(InputError, match="'sae_vis' given; allowed: neuronpedia, openai"):
        read_explanations(tmp_path, "sae_vis")


# --- neuron-explainer


def test_a_neuron_explainer_record_and_result_by_hand() -> None:
    unit = toy_unit()
    record = neuron_record(unit, 6)
    assert record["neuron_id"] == {"dataclass_name": "NeuronId", "layer_index": 6, "neuron_index": 5}
    strongest = record["most_positive_activation_records"]
    assert [one["activations"] for one in strongest] == [[0, 4, 1], [0, 0, 3.5], [0, 1.5, 0], [0.5, 0, 0]]
    assert [one["activations"] for one in record["random_sample"]] == [[0, 0, 0]]
    # True 0 0 3.5 | 0 1.5 0, predicted 0 0 2 | 0 1 1 (the silent window was not simulated). Means 5/6 and 4/6; sums of squares
    # 14.5 and 6, of products 8.5: r = (8.5 - 20/6) / sqrt((14.5 - 25/6) (6 - 16/6))
    result = neuron_result(unit, 6, "words", [[0, 0, 2], [], [0, 1, 1]])
    (one,) = result["scored_explanations"]
    pooled = one["scored_simulation"]
    assert pooled["ev_correlation_score"] == pytest.approx((8.5 - 20 / 6) / math.sqrt((14.5 - 25 / 6) * (6 - 16 / 6)))
    assert pooled["rsquared_score"] == pytest.approx(1 - (1.5**2 + 0.5**2 + 1) / 14.5)
    assert pooled["absolute_dev_explained_score"] == pytest.approx(1 - 3 / 5)
    sequences = pooled["scored_sequence_simulations"]
    assert [s["true_activations"] for s in sequences] == [[0, 0, 3.5], [0, 1.5, 0]]
    assert sequences[0]["ev_correlation_score"] == pytest.approx(1.0)
    assert neuron_result(unit, 6, "w", [[0, 0, 0], [], []])["scored_explanations"][0]["scored_simulation"][
        "ev_correlation_score"
    ] is None  # fmt: skip


def without_names(value: Any) -> Any:
    if isinstance(value, list):
        return [without_names(one) for one in value]
    return {k: without_names(v) for k, v in value.items() if k != "dataclass_name"} if isinstance(value, dict) else value


def test_neuron_explainer_reads_our_files_as_we_do(tmp_path: Path) -> None:
    """Its loaders' findings were stored: scripts/golden_neuron_records.py."""
    script("golden_neuron_records").write(tmp_path / "written")
    files = sorted(p.relative_to(GOLDEN / "written") for p in (GOLDEN / "written").rglob("*.json*"))
    assert [(tmp_path / "written" / p).read_bytes() for p in files] == [(GOLDEN / "written" / p).read_bytes() for p in files]
    found = json.loads((GOLDEN / "read.json").read_text())["neurons"]
    ours = {f"7/{one.unit.latent}": one for one in read_openai(GOLDEN / "written" / "sae")}
    results = {f"{one.layer}/{one.neuron}": one for one in read_results(GOLDEN / "written" / "sae")}
    assert found.keys() == ours.keys() == {"7/3", "7/12"}
    for name, theirs in found.items():
        unit = ours[name].unit
        assert unit.max_activation == theirs["max_activation"]
        for side in ("train", "valid", "test"):  # they leave out what is over when the splits are equal
            mine = [e.tokens for e in getattr(unit, side)]
            assert theirs["splits"][side]
            assert all(tokens in mine for tokens in theirs["splits"][side]), (name, side)
        assert ours[name].descriptions == theirs["explanations"]
        if name in results:
            again = [vars(one.scores()) for one in results[name].explanations]
            keys = ("ev_correlation", "rsquared", "absolute_dev_explained")
            assert [[one[key] for key in keys] for one in again] == [pytest.approx(one, abs=1e-6) for one in theirs["scores"]]
            assert [one.stated["ev_correlation"] for one in results[name].explanations] == theirs["stated"]


def test_records_as_neuron_explainer_writes_them_are_read(tmp_path: Path) -> None:
    for name, theirs in json.loads((GOLDEN / "read.json").read_text())["neurons"].items():
        for bare in (False, True):  # the first public files had no dataclass_name
            at = tmp_path / str(bare)
            kinds = {"collated-activations": (theirs["dumped"], "json"), "explanations": (theirs["results"], "jsonl")}
            for kind, (value, suffix) in kinds.items():
                if value is not None:
                    (at / kind / "7").mkdir(parents=True, exist_ok=True)
                    text = json.dumps(without_names(value) if bare else value)
                    (at / kind / f"{name}.{suffix}").write_text(text)
    for bare in (False, True):
        assert list(read_openai(tmp_path / str(bare))) == list(read_openai(GOLDEN / "written" / "sae"))
        assert list(read_results(tmp_path / str(bare))) == list(read_results(GOLDEN / "written" / "sae"))


def test_neuron_explainer_itself_reads_our_files(tmp_path: Path) -> None:
    python = ROOT / ".venv-peers" / "neuron_explainer" / "bin" / "python"
    if not python.exists():
        pytest.skip("neuron_explainer is not set up (scripts/set_up_peers.py)")
    script("golden_neuron_records").write(tmp_path / "written")
    command = [python, ROOT / "scripts/golden_neuron_records.py", "read", "--folder", tmp_path / "written"]
    done = subprocess.run([*command, "--to", tmp_path / "read.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "read.json").read_text()) == json.loads((GOLDEN / "read.json").read_text())


def result_line() -> dict[str, Any]:
    return neuron_result(toy_unit(), 6, "words", [[0, 0, 2], [1, 0, 0], [0, 1, 1]])


def test_scores_of_a_public_result_line_are_computed_again(tmp_path: Path) -> None:
    line = result_line()
    line["scored_explanations"][0]["scored_simulation"]["scored_sequence_simulations"][1]["ev_correlation_score"] = math.nan
    line["unknown"] = {"extra": [1]}
    (tmp_path / "5.jsonl").write_text(json.dumps(line) + "\n")  # NaN, as their own files have it
    (found,) = read_results(tmp_path / "5.jsonl")
    (one,) = found.explanations
    true, predicted = [[0, 0, 3.5], [0, 0, 0], [0, 1.5, 0]], [[0, 0, 2], [1, 0, 0], [0, 1, 1]]
    expected = correlation_scores(true, predicted)
    assert one.scores() == expected
    assert {name: value for name, value in vars(expected).items() if name in one.stated} == pytest.approx(one.stated, abs=1e-6)
    assert (found.layer, found.neuron, one.explanation) == (6, 5, "words")


OA_FAULTS: dict[str, tuple[str, list[Any], str]] = {
    "no id": ("neuron_id", [], "7.jsonl, line 1: no field 'neuron_id'"),
    "no explanations": ("scored_explanations", [], "line 1: no field 'scored_explanations'"),
    "no text": ("explanation", ["scored_explanations", 0], r"scored_explanations\[0\]: no field 'explanation'"),
    "no simulation": ("scored_simulation", ["scored_explanations", 0], "no field 'scored_simulation'"),
    "no expected": (
        "expected_activations",
        ["scored_explanations", 0, "scored_simulation", "scored_sequence_simulations", 1, "simulation"],
        r"scored_sequence_simulations\[1\]: no field 'expected_activations'",
    ),
}


@pytest.mark.parametrize("fault", OA_FAULTS)
def test_faults_of_a_result_line_name_file_line_and_field(tmp_path: Path, fault: str) -> None:
    field, way, message = OA_FAULTS[fault]
    inner = line = result_line()
    for step in way:
        inner = inner[step]
    del inner[field]
    (tmp_path / "7.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=message):
        list(read_results(tmp_path / "7.jsonl"))


def test_faults_of_records(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder collated-activations/ in it"):
        list(read_openai(tmp_path))
    path = tmp_path / "collated-activations" / "6" / "5.json"
    path.parent.mkdir(parents=True)
    for text, message in (
        ("{", "5.json: not readable JSON"),
        ("[]", "5.json: holds a list"),
        (json.dumps({"neuron_id": {"layer_index": 6}}), "neuron_id: no field 'neuron_index'"),
        (json.dumps({"neuron_id": {"layer_index": 6, "neuron_index": 5}}), "no field 'most_positive_activation_records'"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            list(read_openai(tmp_path))
    record = neuron_record(toy_unit(), 6)
    record["most_positive_activation_records"][0]["activations"].append(1.0)
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"5.json, most_positive_activation_records\[0\]: 3 tokens and 4 activations"):
        list(read_openai(tmp_path))
    assert list(read_openai(tmp_path, indices=[4])) == []


# --- Delphi

SEQUENCES, CONTEXT, WIDTH, WINDOW = 60, 16, 10, 8
SETTINGS = ExplainConfig(window=WINDOW, train_top=3, train_sampled=3, test_top=3, test_sampled=2, test_random=4)


class Cache:
    """A cache as Delphi's own writer leaves it, and the dense activations behind it."""

    def __init__(self, folder: Path, *, integers: torch.dtype = torch.uint16, tokens: bool = True) -> None:
        chance = np.random.default_rng(4)
        self.tokens = chance.integers(0, 40, (SEQUENCES, CONTEXT))
        shape = (SEQUENCES, CONTEXT, WIDTH)
        dense = np.where(chance.random(shape) < 0.06, chance.uniform(0.1, 9, shape), 0)
        dense[:, :, 7] = 0  # a dead one
        dense[:, :, 2] *= -1  # below zero only: in the cache, yet it never fires
        self.dense = torch.from_numpy(dense).half().float().numpy()
        self.folder = folder / "layers.9"
        self.folder.mkdir(parents=True)
        (self.folder / "config.json").write_text(json.dumps({"ctx_len": CONTEXT, "model_name": "toy"}))
        for first, last in ((0, 3), (4, 9)):
            places = np.argwhere(np.abs(self.dense[:, :, first : last + 1]) > 1e-5)
            values = self.dense[:, :, first : last + 1][tuple(places.T)]
            locations = torch.from_numpy(places).contiguous().to(integers)
            data = {"locations": locations, "activations": torch.from_numpy(values).half()}
            if tokens:
                data["tokens"] = torch.from_numpy(self.tokens)
            save_file(data, self.folder / f"{first}_{last}.safetensors")

    def units(self, **settings: Any) -> list[Unit]:
        return list(read_delphi(self.folder, lambda ids: f"<{ids[0]}>", config=SETTINGS, **settings))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("delphi"))


def test_delphi_latents_become_units_with_the_true_activations(cache: Cache) -> None:
    found = cache.units()
    assert [unit.latent for unit in found] == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    windows = cache.dense.reshape(-1, WINDOW, WIDTH)
    for unit in found:
        assert_disjoint(unit)
        train, test = ({e.window * WINDOW // CONTEXT for e in side} for side in (unit.train, unit.test))
        assert not train & test  # whole sequences are held out
        for e in unit.train + unit.test:
            assert e.activations == windows[e.window, :, unit.latent].tolist()
            assert e.token_ids == cache.tokens.reshape(-1, WINDOW)[e.window].tolist()
            assert e.tokens == [f"<{i}>" for i in e.token_ids]
            assert e.kind == "random" or max(e.activations) > 0
        for side, limits in ((unit.train, (3, 3, 0)), (unit.test, (3, 2, 4))):
            kinds = [e.kind for e in side]
            if unit.latent != 2:
                assert (kinds.count("top"), kinds.count("sampled")) == limits[:2]
            assert kinds.count("random") <= limits[2]
    silent = found[2]
    assert (silent.train, silent.fired, silent.max_activation) == ([], 0, 0.0)


def test_delphi_counts_and_strongest_by_brute_force(cache: Cache) -> None:
    found = {unit.latent: unit for unit in cache.units(seed=3)}
    apart = np.random.Generator(np.random.PCG64([3, 5])).random(SEQUENCES) < 0.3
    for latent, unit in found.items():
        dense = cache.dense[:, :, latent]
        assert unit.density == pytest.approx((dense[~apart] > 0).mean())
        assert unit.max_activation == max(dense[~apart].max(), 0)
        strongest = dense.reshape(-1, WINDOW).max(1)
        held_out = np.repeat(apart, CONTEXT // WINDOW)
        assert (unit.fired, unit.windows) == (((strongest > 0) & held_out).sum(), held_out.sum())
        for side, mask in ((unit.train, ~held_out), (unit.test, held_out)):
            tops = [max(e.activations) for e in side if e.kind == "top"]
            assert tops == sorted(strongest[mask & (strongest > 0)].tolist(), reverse=True)[: len(tops)]


def test_delphi_reads_only_what_is_asked_for_in_blocks(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = {unit.latent: unit for unit in cache.units()}
    assert cache.units(latents=[8, 1, 7]) == [every[1], every[8]]
    monkeypatch.setattr(delphi, "_ROWS_AT_ONCE", 7)
    assert cache.units() == list(every.values())
    assert Cache(tmp_path / "wide", integers=torch.uint32).units() == list(every.values())
    assert cache.units() == cache.units()  # nothing is drawn anew
    bare = Cache(tmp_path / "bare", tokens=False)
    assert bare.units(tokens=bare.tokens) == list(every.values())
    with pytest.raises(InputError, match=r"0_3.safetensors: no tokens in it; give those of the corpus"):
        bare.units()


def test_delphi_special_tokens_are_silent(cache: Cache) -> None:
    for unit in cache.units(special=[3, 4]):
        for e in unit.train + unit.test:
            assert all(a == 0 for a, token in zip(e.activations, e.token_ids, strict=True) if token in (3, 4))


def test_delphi_texts_never_stand_on_both_sides(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.tokens[:] = cache.tokens[np.arange(SEQUENCES) % 5]  # five texts, again and again
    assert all(unit.train for unit in cache.units(tokens=cache.tokens) if unit.latent != 2)  # the files' tokens are not looked at
    for unit in cache.units(tokens=cache.tokens):
        assert_disjoint(unit)
        assert len({e.text for e in unit.train}) == len(unit.train)


def test_faults_of_a_delphi_folder(cache: Cache, tmp_path: Path) -> None:
    def fails(message: str, folder: Path = tmp_path, **settings: Any) -> None:
        with pytest.raises(InputError, match=message):
            list(read_delphi(folder, str, **{"config": SETTINGS, **settings}))

    fails("no config.json in it; give a hook point's folder: layers.9", cache.folder.parent)
    fails(r"explain.window: 5 given; it must divide the cache's context, 16", cache.folder, config=ExplainConfig(window=5))
    fails("held_out: 1 given", cache.folder, held_out=1)
    (tmp_path / "config.json").write_text("{}")
    fails(r"no <first latent>_<last latent>.safetensors in it")
    path = tmp_path / "0_3.safetensors"
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    locations, activations = torch.zeros(1, 3, dtype=torch.int32), torch.ones(1)
    path.write_bytes(b"nonsense")
    fails("0_3.safetensors: not a readable safetensors file")
    save_file({"tokens": tokens, "locations": locations}, path)
    fails("no activations in it")
    save_file({"tokens": tokens, "locations": locations[:, :2].contiguous(), "activations": activations}, path)
    fails(r"locations: shape \(1, 2\) given")
    for wrong in ([2, 0, 0], [0, 16, 0], [0, 0, 4]):
        save_file({"tokens": tokens, "locations": torch.tensor([wrong]), "activations": activations}, path)
        fails(r"locations: .* given; allowed: up to \[1, 15, 3\]")
    path.rename(tmp_path / "part.safetensors")
    fails("part.safetensors: not called <first latent>_<last latent>.safetensors")


# --- scoring what others described


class Reader:
    """Fires, at the level of the description's scale, on tokens that stand in it; says yes to windows that hold one."""

    async def simulate(self, explanation: Explanation, examples: Sequence[Example]) -> list[Simulation]:
        said = explanation.text.split()
        return [Simulation([10 * explanation.scale * (t.strip() in said) for t in e.tokens]) for e in examples]

    async def judge(self, explanation: Explanation, kind: str, asked: Sequence[Any]) -> list[Judgement]:
        said = explanation.text.split()
        shown = [[q.tokens[i] for i in q.marked] if kind == "fuzzing" else q.tokens for q in asked]
        return [Judgement(float(any(t.strip() in said for t in tokens))) for tokens in shown]


def test_descriptions_of_others_are_scored_by_our_instruments(tmp_path: Path) -> None:
    words = [["a", "sea", "b"], ["sea", "c", "d"], ["e", "f", "sea"], ["g", "sea", "h"], ["i", "j", "k"], ["l", "m", "n"]]
    put(tmp_path, "features", feature())
    bins = [-1.0, -1.0, 0.3, 0.3, 0.3, 0.3]
    put(tmp_path, "activations", *(
        activation([4.0 * (w == "sea") for w in of], of, binContains=share) for of, share in zip(words, bins, strict=True)
    ))  # fmt: skip
    put(tmp_path, "explanations", {**MODEL, "index": "5", "description": "sea"}, {**MODEL, "index": "5", "description": "b d"})
    (one,) = read_neuronpedia(tmp_path)
    right, wrong = (
        asyncio.run(score(one.unit, d, Reader(), ("simulation", "detection", "fuzzing"), resamples=50))  # type: ignore[arg-type]
        for d in one.descriptions
    )
    assert right["ev_correlation"] == pytest.approx(1) == right["rsquared"] == right["lookup_correlation"]
    assert right["detection"]["balanced_accuracy"] == 1 == right["fuzzing"]["balanced_accuracy"]
    assert wrong["ev_correlation"] is None  # it predicts nothing anywhere
    assert wrong["detection"]["balanced_accuracy"] == 0.5
    assert right["detection"]["population"] is None is right["lookup_detection"]["population"]  # nobody says of how many windows
    assert (right["unit"], right["description"]) == ("6-res-jb/5", "sea")
    with pytest.raises(InputError, match="scores: 'recall' given; allowed: simulation, detection, fuzzing"):
        asyncio.run(score(one.unit, "sea", Reader(), ("recall",)))  # type: ignore[arg-type]


def test_scores_agree_with_the_stage(sae: StandardSAE, store: ActivationStore, tmp_path: Path) -> None:
    """The whole way round: explained here, written, read back as if a stranger's, scored again; and the side file's lines."""
    config = ExplainConfig(
        latents=(*LATENTS["on one word"], LATENTS["dead"], LATENTS["on a word and by chance"]), window=8, train_top=4,
        train_sampled=4, test_top=3, test_sampled=3, test_random=4, neurons=3, neuron_hook=OTHER_HOOK, resamples=20,
    )  # fmt: skip
    stage.explain(sae, store, Words(), config, tmp_path / "explanations", seed=1)
    ours = Explanations.read(tmp_path / "explanations")
    stated = {line["unit"]: line for line in read_json_lines(tmp_path / "explanations" / "scores.jsonl")}
    write_explanations(ours, tmp_path / "np", NAMES, "neuronpedia")
    sources = {unit.dictionary: f"0-res-toy{'-neurons' * (unit.dictionary == 'neurons')}" for unit in ours.units}
    checked = 0
    for dictionary, source in sources.items():
        folder = tmp_path / "np" / "gpt2-small" / source
        side = {line["index"]: line for line in read_scores(folder)}
        for one in read_neuronpedia(folder):
            line = stated[f"{dictionary}/{one.unit.latent}"]
            assert line.items() <= side[str(one.unit.latent)].items()
            assert one.descriptions == ([line["description"]] if line["state"] == "scored" else [])
            if line["state"] == "scored":
                lookup = LookupBackend(config, tmp_path)
                again = asyncio.run(score(one.unit, one.descriptions[0], lookup))
                assert again["lookup_correlation"] == pytest.approx(line["lookup_correlation"], abs=1e-9)
                checked += 1
    assert checked >= 6
    write_explanations(ours, tmp_path / "oa", NAMES, "openai")
    for dictionary in sources:
        for result in read_results(tmp_path / "oa" / dictionary):
            line = stated[f"{dictionary}/{result.neuron}"]
            for name, value in vars(result.explanations[0].scores()).items():
                assert value == pytest.approx(line[name], abs=1e-6)
    assert HOOK.startswith("blocks.0.")


# --- the command line


def test_a_run_is_exported_by_the_command_line(finished, tmp_path, capsys, monkeypatch):  # noqa: F811
    code, out, err = monosem_cli(capsys, monkeypatch, "export", finished, tmp_path / "np", "--to", "neuronpedia")
    assert code == 0, err
    assert "18 units" in out
    (model,) = [p for p in (tmp_path / "np").iterdir() if p.name != "config"]
    assert model.name.startswith("tiny-model")
    assert {p.name for p in model.iterdir()} == {"1-res-tiny", "1-res-tiny-neurons"}
    line = lines_in(model / "1-res-tiny" / "features" / "batch-0.jsonl.gz")[0]
    assert sum(line["freq_hist_data_bar_heights"]) > 0  # the SAE's own statistics
    finish = json.loads((finished / "manifest.json").read_text())["stages"]["explain"]["finished"]
    assert line["createdAt"] == finish.removesuffix(" UTC").replace(" ", "T")
    everything = b"".join(gzip.decompress(p.read_bytes()) for p in tmp_path.rglob("*.gz"))
    everything += b"".join(p.read_bytes() for p in tmp_path.rglob("*.jsonl"))
    assert str(finished.parent).encode() not in everything  # nobody learns where it was made
    code, out, err = monosem_cli(
        capsys, monkeypatch, "export", finished, tmp_path / "own", "--to", "neuronpedia", "--model-id", "gpt2-small",
        "--source-set", "res-me", "--layer", 4, "--release", "mine", "--creator-id", "me",
    )  # fmt: skip
    assert (code, err) == (0, "")
    source = json.loads((tmp_path / "own/gpt2-small/4-res-me/source.jsonl").read_text())
    assert (source["setName"], source["creatorId"]) == ("res-me", "me")
    code, out, err = monosem_cli(capsys, monkeypatch, "export", finished, tmp_path / "oa", "--to", "openai")
    assert code == 0, err
    assert len(list(read_openai(tmp_path / "oa" / "sae"))) == 12
    assert list(read_results(tmp_path / "oa" / "sae"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "delphi"], "format: 'delphi' given; allowed: neuronpedia, openai"),
        (["--to", "openai", "--model-id", "a/b"], "--model-id: 'a/b' given; allowed: letters"),
        (["--to", "openai", "--source-set", "../x"], "--source-set: '../x' given"),
        ([], "'--to'"),
    ],
)
def test_bad_options_are_one_line(finished, tmp_path, capsys, monkeypatch, args, message):  # noqa: F811
    code, _, err = monosem_cli(capsys, monkeypatch, "export", finished, tmp_path / "new", *args)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "new").exists()


def test_runs_without_scores_and_folders_with_something_in_them(finished, tmp_path, capsys, monkeypatch):  # noqa: F811
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    code, _, err = monosem_cli(capsys, monkeypatch, "export", finished, tmp_path / "there", "--to", "openai")
    assert (code, "there: exists already; name a new folder" in err) == (2, True)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    code, _, err = monosem_cli(capsys, monkeypatch, "export", bare, tmp_path / "new", "--to", "openai")
    assert (code, "explanations: no scores there; run `monosem explain` first" in err) == (2, True)
