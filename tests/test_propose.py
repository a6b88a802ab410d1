"""What a proposer is shown, which proposal is taken, and that selection never looks at the windows that score."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llm_servers import HOOK, LATENTS, WINDOW, ChatServer, Reply, Request, Words, completion, perfect, relu_dictionary

import explain.explain as stage
from activation_store import ActivationStore
from activation_store.files import read_json_lines
from explain.backends import Explanation
from explain.config import ExplainConfig
from explain.examples import Example, Unit
from explain.propose import Mistakes, Trial, best_proposal, instructions, mistakes_of, proposal, scale_of
from sae.sae import SAE


def example(window: int, text: str, activations: list[float], kind: str = "top") -> Example:
    tokens = [f" {word}" for word in text.split()]
    return Example(window, kind, list(range(len(tokens))), tokens, activations)


UNIT = Unit(
    "sae", HOOK, 3, 0.01, 4.0,
    train=[
        example(1, "the wide river runs", [0.0, 0.0, 4.0, 0.0]), example(2, "a river bank", [0.0, 2.0, 0.3]),
        example(3, "a wide road", [0.0, 0.0, 0.0], "neighbour"), example(4, "her river", [0.0, 1.0], "sampled"),
    ],
    test=[], promoted=[(" flows", 2.0), (" banks", 1.5)],
)  # fmt: skip


def test_a_proposer_sees_the_firing_windows_with_their_levels() -> None:
    told, shown = proposal(UNIT, ExplainConfig())
    assert told == instructions(ExplainConfig())
    assert shown == (
        "Excerpt 1:  the wide<< river>> runs\nLevels: ' river': 10\n\n"
        "Excerpt 2:  a<< river>> bank\nLevels: ' river': 5\n\n"
        "Excerpt 3:  her<< river>>\nLevels: ' river': 2"
    )
    assert scale_of(UNIT) == 0.4  # a tenth of the strongest


def test_outputs_negatives_and_mistakes_are_shown_on_request() -> None:
    config = ExplainConfig(backend="local", show=("outputs", "negatives"), train_negatives=2)
    told, shown = proposal(UNIT, config)
    assert "Strongest on: ' river'\nRight after come: ' runs', ' bank'\nIt makes more likely: ' flows', ' banks'" in shown
    assert "It does not activate in these:\n-  a wide road" in shown
    assert len(told) > len(instructions(ExplainConfig()))
    assert told.endswith(instructions(ExplainConfig()).splitlines()[-1] + "\n")
    mistakes = Mistakes("water", [example(9, "old river", [0.0, 4.0])], [example(10, "salt water", [0.0, 0.0])])
    _, again = proposal(UNIT, config, mistakes)
    assert again.startswith(shown)
    assert "An earlier description: water" in again
    assert "It missed these:\n-  old<< river>>" in again
    assert "It fits these, in which nothing activates:\n-  salt water" in again


def test_mistakes_are_the_windows_that_are_furthest_off() -> None:
    examples = [
        example(1, "a b", [0.0, 8.0]), example(2, "c d", [0.0, 4.0]), example(3, "e f", [0.0, 0.0]),
        example(4, "g h", [0.0, 0.0]), example(5, "i j", [2.0, 0.0]),
    ]  # fmt: skip
    # said, over the strongest said: 1, 0, 0.5, 0, 0.5; true, over the strongest: 1, 0.5, 0, 0, 0.25
    found = mistakes_of("x", examples, [[0.0, 20.0], [0.0, 0.0], [10.0, 0.0], [0.0, 0.0], [0.0, 10.0]])
    assert [e.window for e in found.missed] == [2]
    assert [e.window for e in found.wrong] == [3]


class Proposer:
    """Proposes from lists: first proposals by sample, then those that know mistakes."""

    def __init__(self, first: list[str], again: list[str]) -> None:
        self.first, self.again, self.told = first, again, list[Mistakes]()

    async def propose(self, unit: Unit, sample: int = 0, mistakes: Mistakes | None = None) -> Explanation:
        if mistakes is None:
            return Explanation(self.first[sample])
        self.told.append(mistakes)
        return Explanation(self.again[sample])


def choose(proposer: Proposer, worth: dict[str, float | None], **settings: Any) -> tuple[str, list[dict[str, Any]], list[str]]:
    tried: list[str] = []
    wrong = [example(1, "a", [0.0])]

    async def trial(explanation: Explanation) -> Trial:
        tried.append(explanation.text)
        return Trial(worth[explanation.text], Mistakes(explanation.text, [], [] if worth[explanation.text] == 1 else wrong))

    config = ExplainConfig(backend="local", **settings)
    best, proposals = asyncio.run(best_proposal(proposer, UNIT, config, trial))  # type: ignore[arg-type]
    return best.text, proposals, tried


def test_the_best_on_validation_windows_is_taken() -> None:
    worth = {"a": 0.2, "b": 0.7, "c": None, "d": 0.7}
    best, proposals, tried = choose(Proposer(["a", "b", "c", "b", "d"], []), worth, best_of=5)
    assert best == "b"  # the earlier of equals
    assert tried == ["a", "b", "c", "d"]  # what is said twice is tried once
    assert proposals == [{"text": text, "round": 0, "valid": worth[text]} for text in "abcd"]


def test_refinement_is_told_the_best_ones_mistakes_and_may_be_worse() -> None:
    proposer = Proposer(["a", "b"], ["c", "d", "e"])
    best, proposals, _ = choose(proposer, {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.6, "e": 0.5}, best_of=2, refine=3)
    assert [mistakes.description for mistakes in proposer.told] == ["b", "b", "d"]
    assert best == "d"
    assert [p["round"] for p in proposals] == [0, 0, 1, 2, 3]


def test_a_description_without_mistakes_is_not_refined() -> None:
    proposer = Proposer(["a"], ["never"])
    assert choose(proposer, {"a": 1.0}, refine=4)[0] == "a"
    assert not proposer.told


def test_where_nothing_is_chosen_nothing_is_tried() -> None:
    assert choose(Proposer(["a"], []), {"a": 0.5}) == ("a", [{"text": "a", "round": 0, "valid": None}], [])


# --- through the stage


def settings(**given: Any) -> ExplainConfig:
    return ExplainConfig(**{
        "backend": "openai", "latents": LATENTS["on one word"], "window": WINDOW, "train_top": 4, "train_sampled": 2,
        "test_top": 2, "test_sampled": 2, "test_random": 4, "valid_share": 0.3, "resamples": 0, "instrument": "integers", **given,
    })  # fmt: skip


def misled(request: Request) -> Reply:
    """Says a false word at first, and the right one when drawn again or told of mistakes."""
    if request.simulates is None and request.body["temperature"] == 0 and "earlier description" not in request.user:
        return Reply(completion(json.dumps({"description": "zebra"})))
    return Reply(completion(perfect(request)))


@pytest.mark.parametrize("given", [{"best_of": 2}, {"refine": 1}])
@pytest.mark.usefixtures("api")
def test_the_stage_takes_the_better_proposal_and_says_so(
    sae: SAE, store: ActivationStore, given: dict[str, int], tmp_path: Path
) -> None:
    with ChatServer(misled) as server:
        result = stage.explain(sae, store, Words(), settings(base_url=server.base_url, **given), tmp_path)
    words = {f"sae/{latent}": Words.words[latent + 1].strip() for latent in LATENTS["on one word"]}
    for line in read_json_lines(tmp_path / "scores.jsonl"):
        assert line["state"] == "scored"
        assert line["description"] == words[line["unit"]]
        assert line["ev_correlation"] == pytest.approx(1.0)
        first, second = line["proposals"]
        assert (first["text"], first["valid"]) == ("zebra", None)  # nothing of what it says is there: undefined
        assert (second["text"], second["valid"]) == (words[line["unit"]], pytest.approx(1.0))
    splits = result.summary["splits"]
    assert (splits["shared_windows"], splits["shared_texts"]) == (0, 0)
    assert splits["train"][1] == splits["valid"][0] < splits["valid"][1] == splits["test"][0]
    # no window that scores was seen by who proposes or selects
    units = [Unit.of_json(line) for line in read_json_lines(tmp_path / "units.jsonl")]
    tested = {e.text for unit in units for e in unit.test}
    valid = {e.text for unit in units for e in unit.valid}
    assert tested
    proposals = [request.user for request in server.requests if request.simulates is None]
    assert not any(text in " ".join(shown.replace("<<", "").replace(">>", "").split()) for shown in proposals for text in tested)
    assert valid


@pytest.mark.usefixtures("api")
def test_chosen_descriptions_are_not_chosen_again_after_a_kill(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    with ChatServer(misled) as server:
        config = settings(base_url=server.base_url, best_of=2)
        stage.explain(sae, store, Words(), config, tmp_path)
        first = (tmp_path / "scores.jsonl").read_bytes()
        (tmp_path / "results.jsonl").unlink()
        (tmp_path / "requests.jsonl").unlink()  # all answers are forgotten, the choice is not
        before = len(server.requests)
        stage.explain(sae, store, Words(), config, tmp_path)
        assert all(request.simulates is not None for request in server.requests[before:])
    assert (tmp_path / "scores.jsonl").read_bytes() == first


@pytest.mark.usefixtures("api")
def test_a_unit_with_nothing_to_describe_costs_no_request(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    with ChatServer() as server:
        stage.explain(sae, store, Words(), settings(base_url=server.base_url, latents=(LATENTS["dead"],)), tmp_path)
        assert not server.requests
    (line,) = read_json_lines(tmp_path / "scores.jsonl")
    assert (line["state"], line["reason"]) == ("undefined", "it fires in no training window: nothing to describe")


def by_cluster(request: Request) -> Reply:
    """Puts a cluster's descriptions together; describes units as ever."""
    if request.user.startswith("- "):
        words = sorted(line[2:] for line in request.user.splitlines())
        return Reply(completion(json.dumps({"description": " or ".join(words)})))
    return Reply(completion(perfect(request)))


@pytest.mark.usefixtures("api")
def test_clusters_get_a_label_of_what_their_members_share(store: ActivationStore, tmp_path: Path) -> None:
    sae = relu_dictionary(8, HOOK)
    with torch.no_grad():
        sae.W_dec[1, :2] = torch.tensor([0.9, 0.4])  # latents 0 and 1 point nearly the same way
    with ChatServer(by_cluster) as server:
        config = settings(base_url=server.base_url, clusters=3)
        summary = stage.explain(sae, store, Words(), config, tmp_path).summary
        lines = read_json_lines(tmp_path / "clusters.jsonl")
        assert [line["latents"] for line in lines] == [[0, 1], [2], [3]]
        assert [line["label"] for line in lines] == ["apple or bread", "cloud", "dance"]
        assert summary["clusters"] == {"labelled": 3, "failed": 0}
        before = len(server.requests)
        (tmp_path / "requests.jsonl").unlink()
        stage.explain(sae, store, Words(), config, tmp_path)
        assert not [request for request in server.requests[before:] if request.user.startswith("- ")]


@pytest.mark.usefixtures("api")
def test_a_cluster_without_an_answer_fails_with_a_reason(store: ActivationStore, tmp_path: Path) -> None:
    def refuses(request: Request) -> Reply:
        broken = request.user.startswith("- ")
        return Reply({"error": {"message": "no"}}, status=400) if broken else Reply(completion(perfect(request)))

    sae = relu_dictionary(8, HOOK)
    with torch.no_grad():
        sae.W_dec[1, :2] = torch.tensor([0.9, 0.4])
    with ChatServer(refuses) as server:
        summary = stage.explain(sae, store, Words(), settings(base_url=server.base_url, clusters=3), tmp_path).summary
    assert summary["clusters"] == {"labelled": 2, "failed": 1}
    line = read_json_lines(tmp_path / "clusters.jsonl")[0]
    assert (line["state"], line["label"]) == ("failed", None)
    assert "400" in line["reason"]


@pytest.mark.usefixtures("api")
def test_simulation_stops_where_the_interval_is_tight(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    def asked(folder: Path, **given: Any) -> tuple[int, dict[str, Any]]:
        with ChatServer() as server:
            config = settings(base_url=server.base_url, latents=(1,), test_random=12, resamples=200, **given)
            stage.explain(sae, store, Words(), config, folder)
            return len(server.requests), read_json_lines(folder / "scores.jsonl")[0]

    every, whole = asked(tmp_path / "all")
    some, stopped = asked(tmp_path / "some", stop_width=0.1)
    assert some < every  # perfect answers: the first interval is a point
    assert whole["tested_windows"] == whole["test_windows"]
    assert set(stopped["tested_windows"]) < set(stopped["test_windows"])
    assert stopped["ev_correlation"] == pytest.approx(1.0)
    low, high = stopped["intervals"]["ev_correlation"]
    assert high - low <= 0.1
    unit = Unit.of_json(read_json_lines(tmp_path / "some" / "units.jsonl")[0])
    (line,) = read_json_lines(tmp_path / "some" / "results.jsonl")
    for shown, predicted in zip(unit.test, line["predicted"], strict=True):
        assert len(predicted) == (len(shown.tokens) if shown.window in stopped["tested_windows"] else 0)
