"""Which of several texts: how questions are made, what answers are worth, and who answers."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llm_servers import HOOK, LATENTS, WINDOW, ChatServer, Reply, Request, Words, completion, perfect, relu_dictionary

import explain.explain as stage
from activation_store import ActivationStore
from activation_store.files import read_json_lines
from explain.backends import ChatBackend, Explanation, LocalBackend, LookupBackend
from explain.choice import CHOICE_KINDS, Choice, Chosen, choices, chosen
from explain.config import ExplainConfig
from explain.examples import Example, Unit


def example(window: int, word: str, fires: bool, kind: str = "random", neighbour: int | None = None) -> Example:
    tokens = [f" {word}{window}", f" plain{window}", " end"]
    return Example(window, kind, [window, 100 + window, 7], tokens, [2.0 * fires, 0.0, 0.0], None, neighbour)


def unit(latent: int = 1, promoted: tuple[str, ...] = (" go", " went"), firing: int = 6, silent: int = 4, near: int = 5) -> Unit:
    test = [example(i, "hit", True, "top") for i in range(firing)]
    test += [example(20 + i, "miss", False) for i in range(silent)]
    test += [example(40 + i, "near", False, "neighbour", 50 + i) for i in range(near)]
    return Unit("sae", HOOK, latent, 0.1, 2.0, [], test, promoted=[(f"{token}{latent}", 1.0) for token in promoted])


OTHERS = [unit(n) for n in range(2, 9)]
TEXTS = {f"sae/{n}": [f"text {n}", f"more {n}"] for n in range(1, 9)}


@pytest.mark.parametrize("kind", CHOICE_KINDS)
def test_every_question_has_one_right_option_and_places_go_round(kind: Any) -> None:
    asked, reason = choices(unit(), kind, 3, OTHERS, TEXTS)
    assert reason is None
    assert asked == choices(unit(), kind, 3, OTHERS, TEXTS)[0]
    assert asked != choices(unit(), kind, 4, OTHERS, TEXTS)[0]
    for question in asked:
        assert len(question.options) == len(set(question.options)) == 5
    places = [question.right for question in asked]
    assert len(set(places)) == min(len(asked), 5)  # each place is right once before any is twice
    if kind == "intruder":
        assert len(asked) == 4  # as many as there are silent windows
        for question in asked:
            shown = [text.split("<<")[1].split(">>")[0] for text in question.options]
            assert ["hit" in text for text in shown] == [i != question.right for i in range(5)]
            assert "miss" in question.options[question.right]
    if kind == "neighbours":
        for question in asked:
            assert ["hit" in text for text in question.options] == [i == question.right for i in range(5)]
            assert question.owners[question.right] == "sae/1"
            assert not any("<<" in text for text in question.options)
    if kind in ("outputs", "intervention"):
        assert {question.owners[question.right] for question in asked} == {"sae/1"}
        assert len({question.owners for question in asked}) > 1  # others are drawn anew
        right = {question.options[question.right] for question in asked}
        assert right == ({"' go1', ' went1'"} if kind == "outputs" else {"text 1", "more 1"})


@pytest.mark.parametrize(
    ("kind", "of", "reason"),
    [
        ("intruder", unit(firing=1), "1 windows in which it fires and 4 silent ones"),
        ("intruder", unit(silent=0), "0 silent ones"),
        ("neighbours", unit(near=1), "1 of neighbours"),
        ("neighbours", unit(firing=0), "0 windows in which it fires"),
        ("outputs", unit(promoted=()), "no tokens are known"),
        ("intervention", unit(77), "no text was written"),
    ],
)
def test_where_nothing_can_be_asked_the_reason_is_said(kind: Any, of: Unit, reason: str) -> None:
    asked, why = choices(of, kind, 0, OTHERS, TEXTS)
    assert asked == []
    assert reason in str(why)
    found = chosen(asked, [], why, 100, 0)
    assert (found["accuracy"], found["questions"]) == (None, 0)
    assert reason in found["reason"]


def test_an_intruder_has_as_many_marks_as_some_firing_window() -> None:
    """Firing windows of one mark or three: never the mean, two."""
    test = [Example(i, "top", [1, 2, 3, 4], [f" a{i}", " b", " c", " d"], [1.0, *[float(i % 2)] * 2, 0.0]) for i in range(6)]
    test += [Example(20 + i, "random", [1, 2, 3, 4], [f" z{i}", " x", " y", " w"], [0.0] * 4) for i in range(5)]
    marks = set()
    for seed in range(10):
        asked, _ = choices(Unit("sae", HOOK, 0, 0.1, 1.0, [], test), "intruder", seed)
        marks |= {question.options[question.right].count("<<") for question in asked}
        answers = [Chosen(tuple(float(i == (q.right + 1) % 5) for i in range(5))) for q in asked]
        assert chosen(asked, answers, None, 0, 0)["confused_with"] == {}
    assert marks == {1, 3}


def test_neighbours_are_asked_of_all_firing_windows() -> None:
    many = unit(firing=12)
    right = {q.options[q.right] for seed in range(30) for q in choices(many, "neighbours", seed)[0]}
    assert len(right) == 12


def test_texts_under_intervention_go_on_from_one_prompt() -> None:
    texts = {f"sae/{n}": [f"p{prompt} unit{0 if prompt == 0 and n < 4 else n}" for prompt in range(3)] for n in range(1, 9)}
    asked, _ = choices(unit(), "intervention", 0, OTHERS, texts)
    assert len(asked) == 5
    for question in asked:
        assert len({option.split()[0] for option in question.options}) == 1


def test_outputs_of_too_few_others_are_no_question() -> None:
    assert choices(unit(), "outputs", 0, OTHERS[:1])[1] == "texts of 1 other units: too few"
    (first, *_), _ = choices(unit(), "outputs", 0, OTHERS[:2])
    assert len(first.options) == 3


def test_the_figures_by_hand() -> None:
    asked = [Choice(("a", "b", "c"), 0, ("u", "v", "w")), Choice(("a", "b", "c"), 1, ("v", "u", "w")),
             Choice(("a", "b"), 1, ("v", "u"))]  # fmt: skip
    answers = [Chosen((0.7, 0.2, 0.1), 0.9), Chosen((0.5, 0.3, 0.2), 0.5), Chosen((0.5, 0.5), 0.1)]
    found = chosen(asked, answers, None, 0, 0)
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert found["probability"] == pytest.approx((0.7 + 0.3 + 0.5) / 3)
    assert found["places"] == [2.5, 0.5, 0, 0, 0]
    assert found["confused_with"] == {"v": 2}
    assert found["mass"] == pytest.approx(0.5)
    assert found["interval"] is None


@given(st.integers(0, 2**31), st.integers(0, 4))
def test_who_always_takes_one_place_is_as_good_as_chance(seed: int, place: int) -> None:
    asked, _ = choices(unit(), "neighbours", seed, OTHERS)
    answers = [Chosen(tuple(float(i == place) for i in range(5))) for _ in asked]
    found = chosen(asked, answers, None, 50, seed)
    assert len(asked) == 5
    assert found["accuracy"] == pytest.approx(found["chance"]) == pytest.approx(0.2)
    assert found["places"][place] == 5


# --- who answers


def test_the_lookup_takes_the_option_with_most_in_its_table() -> None:
    lookup = LookupBackend(ExplainConfig(), Path())
    asked = [Choice(("a", "b"), 0, ("u", "v"), ((1, 2), (3, 3))), Choice(("c", "d"), 0, ("u", "v"), ((1,), (2,))),
             Choice(("e", "f"), 0, ("u", "v"))]  # fmt: skip
    table = Explanation("", table={1: 2.0, 3: 1.5})
    found = asyncio.run(lookup.choose(table, "neighbours", asked))
    assert [answer.probabilities for answer in found] == [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)]


@pytest.mark.usefixtures("api")
def test_a_chat_server_answers_with_a_number(tmp_path: Path) -> None:
    answers = iter(['{"answer": 2}', '{"answer": 9}', 'It is {"answer": 1}.'])
    asked = [Choice(("a", "b"), 0, ("u", "v")), Choice(("c", "d"), 0, ("u", "v"))]
    with ChatServer(lambda _: Reply(completion(next(answers)))) as server:
        backend = ChatBackend(ExplainConfig(backend="openai", base_url=server.base_url, concurrency=1), tmp_path)

        async def ask() -> list[Chosen]:
            found = await backend.choose(Explanation("letters"), "neighbours", asked)
            await backend.close()
            return found

        found = asyncio.run(ask())
        shown = json.loads(server.requests[0].user)
        assert shown == {"description": "letters", "texts": {"1": "a", "2": "b"}}
    assert [answer.probabilities for answer in found] == [(0.0, 1.0), (1.0, 0.0)]  # 9 is no option: asked again
    assert len(server.requests) == 3


@pytest.mark.parametrize("model", ["tiny_model_dir", "demo_model_dir"])
def test_the_local_model_gives_the_softmax_over_the_numbers(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    config = ExplainConfig(
        backend="local", model=str(request.getfixturevalue(model)), local_dtype="float32", local_device="cpu"
    )
    backend = LocalBackend(config, tmp_path)
    for explanation, kind in ((Explanation("seas"), "outputs"), (None, "intruder")):
        question = Choice(("the deep blue wave", "an onion, cut", "one two three"), 0, ("u", "v", "w"))
        (found,) = asyncio.run(backend.choose(explanation, kind, [question]))  # type: ignore[arg-type]
        prefix, after = backend._judging(f"choose_{kind}", "choose_one")
        described = "Description: seas\n\n" if explanation else ""
        ids = [*prefix.ids, *backend._encode(described + "1: the deep blue wave\n2: an onion, cut\n3: one two three"), *after]
        with torch.inference_mode():
            p = backend.model(torch.tensor([ids])).logits[0, -1].double().softmax(0)
        tokenizer = backend.tokenizer
        of_option = []
        for number in (1, 2, 3):
            forms = {tuple(tokenizer.encode(f"{space}{number}", add_special_tokens=False)) for space in ("", " ")}
            of_option.append(sum(float(p[form[0]]) for form in forms if len(form) == 1))
        assert found.mass == pytest.approx(sum(of_option), rel=1e-4)
        assert found.probabilities == pytest.approx([value / sum(of_option) for value in of_option], abs=1e-5)


# --- through the stage


def chooses(request: Request) -> Reply:
    """Right answers in the toy world; an intruder is the text whose marked word is another than the others'."""
    asked = json.loads(request.user) if request.user.startswith("{") else {}
    texts = asked.get("texts", {})
    if not texts or ("odd one out" not in request.body["messages"][0]["content"] and "description" not in asked):
        return Reply(completion(perfect(request)))
    if "description" in asked:
        right = next((number for number, text in texts.items() if asked["description"] in text.split()), "1")
    else:
        marked = {number: text.split("<<")[1].split(">>")[0] for number, text in texts.items()}
        right = next((n for n, word in marked.items() if list(marked.values()).count(word) == 1), "1")
    return Reply(completion(json.dumps({"answer": int(right)})))


@pytest.mark.usefixtures("api")
def test_the_stage_asks_scores_and_compares(store: ActivationStore, tmp_path: Path) -> None:
    sae = relu_dictionary(8, HOOK)
    with torch.no_grad():
        sae.W_dec[1, :2] = torch.tensor([0.8, 0.6])
        sae.W_dec[0, 2] = 0.4
    with ChatServer(chooses) as server:
        config = ExplainConfig(
            backend="openai", base_url=server.base_url, latents=LATENTS["on one word"], window=WINDOW, test_neighbour=4,
            scores=("neighbours", "intruder", "outputs"), resamples=100,
        )  # fmt: skip
        summary = stage.explain(sae, store, Words(), config, tmp_path).summary
    lines = {line["unit"]: line for line in read_json_lines(tmp_path / "scores.jsonl")}
    with_neighbours = [line for line in lines.values() if line["state"] == "scored"]
    assert len(with_neighbours) >= 2
    for line in lines.values():
        if line["state"] == "undefined":
            assert "of neighbours in which it is silent: too few" in line["reason"]
    for line in with_neighbours:
        assert line["neighbours"]["accuracy"] == 1.0
        assert line["lookup_neighbours"]["accuracy"] == 1.0  # words are all there is
        assert line["shuffled_intruder"] is None
        assert line["outputs"]["accuracy"] is None  # there is no model that says what is promoted
        assert "no tokens are known" in line["outputs"]["reason"]
    found = summary["dictionaries"]["sae"]
    assert found["neighbours"]["accuracy"]["description"] == 1.0
    assert 0.2 <= found["neighbours"]["accuracy"]["chance"] <= 1 / 3
    margin = found["neighbours"]["margins"]["chance"]
    assert margin["mean"] == pytest.approx(1 - found["neighbours"]["accuracy"]["chance"])
    assert found["intruder"]["accuracy"]["shuffled"] is None
    assert found["outputs"]["accuracy"]["description"] is None
