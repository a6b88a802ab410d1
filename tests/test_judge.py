"""Detection and fuzzing: the questions, what answers are worth, and judges of every kind in worlds where the truth is known."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from llm_servers import HOOK, WINDOW, ChatServer, Reply, Request, Words, completion, perfect

import explain.explain as stage
from activation_store import ActivationStore
from activation_store.files import read_json_lines
from explain.backends import Explanation
from explain.backends.local import LocalBackend
from explain.config import ExplainConfig
from explain.evidence import gather_evidence
from explain.examples import Example, Unit, population_weights
from explain.judge import Judgement, Question, judged, questions
from sae.sae import SAE


def example(number: int, kind: str, activations: list[float]) -> Example:
    return Example(number, kind, list(range(len(activations))), [f" w{i}" for i in range(len(activations))], activations)


TEST = [
    example(0, "top", [0.0, 9.0, 2.0, 3.0]), example(1, "sampled", [1.0, 0.0, 0.0, 0.0]),
    example(2, "random", [0.0, 0.0, 0.5, 0.0]), example(3, "random", [0.0] * 4), example(4, "random", [0.0] * 4),
]  # fmt: skip
UNIT = Unit("sae", HOOK, 7, 0.1, 9.0, [], TEST, fired=21, windows=100)


def test_each_example_stands_for_its_share_of_the_windows() -> None:
    """21 of 100 windows fire: the top one is itself, two stand for the other 20, two silent ones for 79."""
    assert population_weights(TEST, 21, 100) == [1, 10, 10, 39.5, 39.5]
    assert population_weights(TEST[:1], 21, 100) == [21]  # the only one that fires stands for all that do
    assert population_weights(TEST[3:], 0, 100) == [50, 50]
    assert population_weights([], 0, 0) == []


def test_detection_asks_about_windows_without_marks() -> None:
    asked = questions(UNIT, "detection", seed=0)
    assert [question.truth for question in asked] == [True, True, True, False, False]
    assert {question.marked for question in asked} == {()}
    assert asked[0].text == " w0 w1 w2 w3"
    assert [question.weight for question in asked] == [1, 10, 10, 39.5, 39.5]


def test_fuzzing_marks_what_fires_strongly_and_as_much_elsewhere() -> None:
    asked = questions(UNIT, "fuzzing", seed=0)
    assert asked[0].marked == (1, 3)  # 2 is below 0.3 * 9
    assert asked[0].text == " w0<< w1>> w2<< w3>>"
    assert [len(question.marked) for question in asked] == [2, 1, 1, 2, 2]  # silent: the mean of 2, 1 and 1, rounded up
    assert questions(UNIT, "fuzzing", seed=0) == asked
    others = [questions(UNIT, "fuzzing", seed) for seed in range(20)]
    assert len({tuple(question.marked for question in one) for one in others}) > 5


def test_what_answers_are_worth() -> None:
    asked = questions(UNIT, "detection", seed=0)
    found = judged(asked, [Judgement(p, 0.5) for p in (0.9, 0.6, 0.2, 0.7, 0.1)], resamples=200, seed=0)
    assert found["counts"] == {"concept_fires": 2, "concept_silent": 1, "other_fires": 1, "other_silent": 1}
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["specificity"] == 0.5
    assert found["auc"] == pytest.approx(4 / 6)  # of 6 pairs: 0.9 is above both silent ones, 0.6 and 0.2 above one
    assert found["population"]["precision"] == pytest.approx(11 / (11 + 39.5))
    assert found["population"]["recall"] == pytest.approx(11 / 21)
    assert found["mass"] == 0.5
    assert json.loads(json.dumps(found, allow_nan=False))
    silent = [question for question in asked if not question.truth]
    assert judged(silent, [Judgement(0.0)] * 2, 100, 0)["balanced_accuracy"] is None


def settings(**changes: Any) -> ExplainConfig:
    values: dict[str, Any] = {
        "latents": (0, 1, 2, 6), "window": WINDOW, "train_top": 5, "train_sampled": 5, "test_top": 3, "test_sampled": 3,
        "test_random": 20, "scores": ("simulation", "detection", "fuzzing"), "timeout": 20.0, "retries": 1,
    }  # fmt: skip
    return ExplainConfig(**{**values, **changes})


def lines_of(folder: Path) -> dict[int, dict[str, Any]]:
    return {line["latent"]: line for line in read_json_lines(folder / "scores.jsonl")}


def test_units_know_in_how_many_windows_they_fire(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    found = gather_evidence(sae, store, HOOK, "held_out", window=WINDOW, top=2, sample=2, seed=0)
    x = store.read(HOOK, slice(store.train_sequences * store.context, store.rows)).clone()
    x[torch.from_numpy(store.special[store.train_sequences :].reshape(-1))] = 0
    assert found.fired.tolist() == (x > 0).view(-1, WINDOW, 8).any(1).sum(0).tolist()
    stage.explain(sae, store, Words(), settings(scores=("detection",)), tmp_path, seed=3)
    for line in read_json_lines(tmp_path / "units.jsonl"):
        assert line["fired"] == int(found.fired[line["latent"]])
        assert line["windows"] == len(x) // WINDOW


def test_a_unit_on_one_word_is_detected_without_fault_by_its_lookup_table(
    sae: SAE, store: ActivationStore, tmp_path: Path
) -> None:
    summary = stage.explain(sae, store, Words(), settings(), tmp_path, seed=3).summary["dictionaries"]["sae"]
    for latent, line in lines_of(tmp_path).items():
        for kind in ("detection", "fuzzing"):
            if latent == 6 and kind == "fuzzing":  # in silent windows words 5 and 6 are not there, so none is wrong either
                continue
            assert line[kind]["balanced_accuracy"] == 1, (latent, kind)
            assert line[kind]["population"]["precision"] == 1
        assert line["shuffled_detection"]["balanced_accuracy"] < 0.9
    assert summary["detection"]["description"]["balanced_accuracy"] == 1
    assert summary["detection"]["shuffled"]["balanced_accuracy"] < 0.8
    assert summary["detection"]["lookup"]["units"] == 4


def test_detection_alone_needs_no_simulation(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    summary = stage.explain(sae, store, Words(), settings(scores=("detection",)), tmp_path, seed=3).summary
    found = summary["dictionaries"]["sae"]
    assert (found["scored"], found["ev_correlation"]["units"]) == (4, 0)
    assert "fuzzing" not in found
    assert all(line["ev_correlation"] is None and line["state"] == "scored" for line in lines_of(tmp_path).values())


def test_a_unit_that_never_fires_is_undefined_by_detection_too(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    stage.explain(sae, store, Words(), settings(scores=("detection",), latents=(0, 5)), tmp_path, seed=3)
    line = lines_of(tmp_path)[5]
    assert (line["state"], line["reason"]) == ("undefined", "detection undefined: it fires in no test example")


def judge(request: Request) -> Reply:
    """Right answers of a chat server: the description is the word."""
    try:
        asked = json.loads(request.user)
    except ValueError:
        asked = {}
    if "texts" not in asked:
        return Reply(completion(perfect(request)))
    word, fuzzing = asked["description"], "<<" in request.body["messages"][0]["content"]
    wanted = f"<< {word}>>" if fuzzing else f" {word}"
    return Reply(completion(json.dumps({"answers": [int(wanted in text) for text in asked["texts"].values()]})))


def test_a_chat_server_judges_five_texts_at_a_time(sae: SAE, store: ActivationStore, tmp_path: Path, api: None) -> None:
    with ChatServer(judge) as server:
        config = settings(backend="openai", base_url=server.base_url, latents=(0, 1, 2), scores=("detection", "fuzzing"))
        summary = stage.explain(sae, store, Words(), config, tmp_path, seed=3).summary
    asked = [json.loads(r.user)["texts"] for r in server.requests if '"texts"' in r.user]
    assert {len(texts) for texts in asked} <= {1, 2, 3, 4, 5}
    assert sum(len(texts) == 5 for texts in asked) > len(asked) / 2
    assert summary["dictionaries"]["sae"]["detection"]["description"]["balanced_accuracy"] == 1
    assert summary["dictionaries"]["sae"]["fuzzing"]["description"]["balanced_accuracy"] == 1
    assert not any(line["state"] == "failed" for line in lines_of(tmp_path).values())
    assert {"detection_prompt", "fuzzing_prompt"} <= set(summary)


@pytest.mark.parametrize("answers", ["[1]", "[1, 0, 2, 0, 1]", "[true, false, true, false, true]", '"yes"', "nonsense"])
def test_answers_that_cannot_be_read_fail_with_a_reason(
    sae: SAE, store: ActivationStore, tmp_path: Path, api: None, answers: str
) -> None:
    def script(request: Request) -> Reply:
        if '"texts"' in request.user and json.loads(request.user)["description"] == "apple":
            return Reply(completion(f'{{"answers": {answers}}}'))
        return judge(request)

    with ChatServer(script) as server:
        config = settings(backend="openai", base_url=server.base_url, latents=(0, 1, 2), scores=("detection",))
        stage.explain(sae, store, Words(), config, tmp_path, seed=3)
    lines = lines_of(tmp_path)
    assert lines[0]["state"] == "failed"
    assert lines[0]["reason"].startswith("detection: unreadable answer after 2 attempts")
    assert [lines[latent]["state"] for latent in (1, 2)] == ["scored", "scored"]


@pytest.fixture(scope="module")
def local(demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    config = ExplainConfig(backend="local", model=str(demo_model_dir), local_dtype="float32", local_device="cpu")
    return LocalBackend(config, tmp_path_factory.mktemp("local"))


def test_a_local_judge_gives_the_probability_of_yes(local: LocalBackend) -> None:
    texts = [
        [" The", " river", " rose"],
        [" She", " bakes", " bread", " and", " more", " bread", " every", " day"],
        [" <|im_end|>"],
    ]
    asked = [Question(tokens, [0] * len(tokens), (), True, "top", 1.0) for tokens in texts]
    found = asyncio.run(local.judge(Explanation("rivers"), "detection", asked))
    system = (Path(stage.__file__).parent / "prompts" / "detection.txt").read_text() + "Answer with one word: yes or no."
    for question, judgement in zip(asked[:2], found, strict=False):
        messages = [{"role": "system", "content": system},
                    {"role": "user", "content": f"Description: rivers\n\nText: {question.text}"}]  # fmt: skip
        ids = local.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.inference_mode():
            p = local.model(torch.tensor([ids])).logits[0, -1].double().softmax(0)
        words = {
            word: [f"{space}{form}" for space in ("", " ") for form in (word, word.title(), word.upper())]
            for word in ("yes", "no")
        }
        yes, no = (
            sum(
                float(p[i]) for i in {local.tokenizer.encode(form)[0] for form in forms if len(local.tokenizer.encode(form)) == 1}
            )
            for forms in words.values()
        )
        assert judgement.probability == pytest.approx(yes / (yes + no), abs=1e-3)
        assert judgement.mass == pytest.approx(yes + no, rel=1e-2)
    assert all(0 <= judgement.probability <= 1 and not math.isnan(judgement.probability) for judgement in found)
