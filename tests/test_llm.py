"""The openai backend: against a scripted server that fails in every way it can, and against a real llama.cpp server."""

import asyncio
import json
import logging
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llm_servers import (
    CONTEXT,
    HOOK,
    KEY,
    SENTENCES,
    TRAIN_SEQUENCES,
    WINDOW,
    ChatServer,
    Reply,
    Request,
    Spoken,
    Words,
    completion,
    error,
    good,
    perfect,
    relu_dictionary,
    spoken_store,
)

import explain.explain as stage
from activation_store import ActivationStore
from activation_store.errors import InputError
from activation_store.files import read_json_lines
from explain.backends import ChatBackend, Explanation
from explain.client import check_server
from explain.config import ExplainConfig
from explain.examples import Example
from explain.propose import levels
from sae.sae import SAE

ROOT = Path(__file__).resolve().parent.parent
VICTIM = "apple"  # the word of latent 0, whose requests go wrong; latents 1..3 are bread, cloud and dance


pytestmark = pytest.mark.usefixtures("api")


def settings(server: ChatServer | None, **changes: Any) -> ExplainConfig:
    values: dict[str, Any] = {
        "backend": "openai", "base_url": server.base_url if server else None, "latents": (0, 1, 2, 3), "window": WINDOW,
        "train_top": 3, "train_sampled": 1, "test_top": 2, "test_sampled": 0, "test_random": 2, "retries": 1,
        "timeout": 20.0, "shuffled_control": False, "instrument": "integers",
    }  # fmt: skip
    return ExplainConfig(**{**values, **changes})


def run(sae: SAE, store: ActivationStore, config: ExplainConfig, folder: Path, **more: Any) -> dict[str, Any]:
    """Run the stage; return the summary of the SAE's latents."""
    found = stage.explain(sae, store, Words(), config, folder, seed=5, **more).summary
    assert found == json.loads((folder / "summary.json").read_text())
    return {**found, **found["dictionaries"]["sae"]}


def lines_of(folder: Path) -> dict[int, dict[str, Any]]:
    return {line["latent"]: line for line in read_json_lines(folder / "scores.jsonl")}


def key_of(request: Request) -> str:
    return json.dumps(request.body, sort_keys=True)


Script = Callable[[Request], Reply]


def failing(reply: Reply, step: str) -> Script:
    """Give `reply` to every request of one step, proposing or simulating, that is about the victim."""

    def script(request: Request) -> Reply:
        concerned = request.about == VICTIM and (request.simulates is not None) == (step == "simulate")
        return reply if concerned else good(request)

    return script


# --- all is well


def test_good_answers_are_scored(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    with ChatServer() as server:
        summary = run(sae, store, settings(server, shuffled_control=True), tmp_path)
    assert (summary["scored"], summary["undefined"], summary["failed"]) == (4, 0, 0)
    for latent, line in lines_of(tmp_path).items():
        assert line["description"] == Words.words[latent + 1].strip()
        # It fires on one word with one strength, which is its level 10 and so what is predicted there
        for key in ("ev_correlation", "rsquared", "absolute_dev_explained"):
            assert line[key] == pytest.approx(1.0, abs=1e-9)
        assert line["shuffled_correlation"] is None or line["shuffled_correlation"] < 0.5
    for line in read_json_lines(tmp_path / "results.jsonl"):
        assert [len(p) for p in line["predicted"]] == [WINDOW] * len(line["predicted"])
        strength = 2 + int(line["unit"].split("/")[1])
        assert sorted({v for p in line["predicted"] for v in p}) == pytest.approx([0, strength])
    assert summary["requests_sent"] == len(server.requests)
    assert summary["prompt_tokens"] == 100 * len(server.requests)
    assert summary["completion_tokens"] == 20 * len(server.requests)
    assert summary["model"] == "gpt-4o-mini"
    assert summary["instrument"]
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}


def test_levels_are_tenths_of_the_strongest_training_activation(
    sae: SAE, store: ActivationStore, tmp_path: Path
) -> None:
    # Level 5 wherever the unit fires with strength a: p = a / 2. So r = 1, R2 = 1 - (a/2)^2 / a^2 = 3/4, absolute 1/2
    def script(request: Request) -> Reply:
        return Reply(completion(perfect(request).replace("10", "5")))

    with ChatServer(script) as server:
        run(sae, store, settings(server), tmp_path)
    for latent, line in lines_of(tmp_path).items():
        figures = (line["ev_correlation"], line["rsquared"], line["absolute_dev_explained"])
        assert figures == pytest.approx((1.0, 0.75, 0.5)), latent


def test_what_is_asked(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    """Proposals show training windows only; simulations show a description and one test window, and no activation."""
    with ChatServer() as server:
        run(sae, store, settings(server, model="some-model"), tmp_path)
    units = {unit["latent"]: unit for unit in read_json_lines(tmp_path / "units.jsonl")}
    texts = {latent: ["".join(e["tokens"]) for e in unit["test"]] for latent, unit in units.items()}
    simulated: dict[str, list[list[str]]] = {}
    for request in server.requests:
        assert request.body["model"] == "some-model"
        assert request.body["temperature"] == 0
        assert [message["role"] for message in request.body["messages"]] == ["system", "user"]
        asked = request.simulates
        if asked is None:
            shown = request.user.replace("<<", "").replace(">>", "")
            latent = next(i for i in units if Words.words[i + 1].strip() == request.about)
            for kind in units[latent]["train"]:
                assert "".join(kind["tokens"]) in shown
            for tests in texts.values():
                assert not any(text in shown for text in tests)
            # On one word with one strength: each firing token is marked and at level 10, no other token is marked
            word = Words.words[latent + 1]
            fires = sum(e["tokens"].count(word) for e in units[latent]["train"])
            assert request.user.count("<<") == request.user.count(f"<<{word}>>") == fires
            assert request.user.count(f"{word!r}: 10") == fires
        else:
            assert set(asked) == {"description", "count", "tokens"}
            assert list(asked["tokens"]) == [str(i) for i in range(WINDOW)]
            simulated.setdefault(asked["description"], []).append(list(asked["tokens"].values()))
            array = request.body["response_format"]["json_schema"]["schema"]["properties"]["activations"]
            assert (array["minItems"], array["maxItems"], asked["count"]) == (WINDOW, WINDOW, WINDOW)
    for latent, unit in units.items():
        asked_for = simulated[Words.words[latent + 1].strip()]
        assert sorted(asked_for) == sorted(e["tokens"] for e in unit["test"])


@pytest.mark.parametrize("form", ["json_schema", "json_object", "text"])
def test_the_form_of_the_answer_is_asked_for(sae: SAE, store: ActivationStore, form: str, tmp_path: Path) -> None:
    with ChatServer() as server:
        summary = run(sae, store, settings(server, response_format=form, latents=(0,)), tmp_path)
    assert summary["scored"] == 1
    for request in server.requests:
        given = request.body.get("response_format")
        assert (given is None) if form == "text" else (given["type"] == form)
        if form == "json_schema":
            schema = given["json_schema"]["schema"]
            assert given["json_schema"]["strict"] is True
            assert schema["required"] == list(schema["properties"])
            assert schema["additionalProperties"] is False


def test_levels_are_floors_of_tenths() -> None:
    # floor(10 a / 4): 0.39 -> 0.975, 0.4 -> 1, 3.99 -> 9.975, 4 -> 10, above the top 10, below zero 0
    assert levels([0.0, 0.39, 0.4, 2.0, 3.99, 4.0, 9.0, -1.0], 4.0) == [0, 0, 1, 5, 9, 10, 10, 0]
    assert levels([0.0, 1.0, -1.0], 0.0) == [0, 0, 0]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_run_than_allowed(
    sae: SAE, store: ActivationStore, concurrency: int, tmp_path: Path
) -> None:
    def script(request: Request) -> Reply:
        return replace(good(request), delay=0.25 if request.number < 4 else 0.0)  # the four proposals

    with ChatServer(script) as server:
        run(sae, store, settings(server, concurrency=concurrency), tmp_path)
    assert max(request.running for request in server.requests) == concurrency


@pytest.mark.parametrize(
    "wrapping",
    [
        "Certainly! Here you are:\n{}\nI hope that this helps.",
        "```json\n{}\n```",
        "\n\n  {}  \n",
    ],
)
def test_prose_around_the_json_is_no_fault(sae: SAE, store: ActivationStore, wrapping: str, tmp_path: Path) -> None:
    with ChatServer(lambda request: Reply(completion(wrapping.replace("{}", perfect(request))))) as server:
        summary = run(sae, store, settings(server, retries=0), tmp_path)
    assert summary["scored"] == 4
    assert len(server.requests) == len({key_of(request) for request in server.requests})  # nothing was asked twice


def test_no_answer_may_go_on_without_end(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    """Small models repeat themselves until the context is full, which costs minutes or money: the request sets the bound."""
    with ChatServer() as server:
        run(sae, store, settings(server, latents=(0,)), tmp_path)
    for request in server.requests:
        assert {"max_tokens", "max_completion_tokens"} & set(request.body)


# --- one unit's requests go wrong

# What the server says, how often it should be asked with retries = 1, and what the reason must name. A refusal for want of
# room is not held against a request while another runs.
FAULTS = {
    "401": (Reply(error("Incorrect API key provided."), 401), 1, "401"),
    "403": (Reply(error("Country not supported."), 403), 1, "403"),
    "404": (Reply(error("The model does not exist."), 404), 1, "404"),
    "400": (Reply(error("The prompt is too long."), 400), 1, "400"),
    "429": (Reply(error("Rate limit reached."), 429, {"Retry-After": "0"}), (2, 8), "429"),
    "500": (Reply(error("The server had an error."), 500), 2, "500"),
    "503 in HTML": (Reply("<html>Service Unavailable</html>", 503), (2, 8), "503"),
    "closed midway": (Reply(b'{"id": "chatcmpl-1", "cho', cut=True), 2, "onnection"),
    "silence": (Reply(completion("late"), delay=3.0), 2, "timed out"),
    "body not JSON": (Reply(b'{"id": "chatcmpl-1", "cho'), None, "not an API answer"),
    "body is a page": (Reply("<html>Welcome to the hotel's network</html>"), None, "no text"),
    "body is a list": (Reply([]), None, "no text"),
    "no choices": (Reply({**completion("x"), "choices": []}), None, "no text"),
    "choices missing": (Reply({"id": "chatcmpl-1"}), None, "no text"),
    "an error with status 200": (Reply(error("Provider returned an error")), None, "no text"),
    "no content": (Reply(completion(None, refusal="I cannot help with that.")), None, "no text"),
    "no message": (Reply({**completion("x"), "choices": [{"index": 0, "finish_reason": "stop"}]}), None, ""),
    "choices of another kind": (Reply({**completion("x"), "choices": ["hello"]}), None, ""),
}


AT_BOTH_STEPS = ("401", "429", "500", "closed midway", "silence", "no choices", "no message")


@pytest.mark.parametrize(
    ("step", "fault"), [("propose", fault) for fault in FAULTS] + [("simulate", fault) for fault in AT_BOTH_STEPS]
)
def test_a_fault_of_the_server_costs_one_unit_only(
    sae: SAE, store: ActivationStore, fault: str, step: str, tmp_path: Path
) -> None:
    reply, attempts, named = FAULTS[fault]
    timeout = 1.0 if fault == "silence" else 20.0
    with ChatServer(failing(reply, step)) as server:
        summary = run(sae, store, settings(server, timeout=timeout, concurrency=2), tmp_path)
    lines = lines_of(tmp_path)
    assert lines[0]["state"] == "failed"
    assert lines[0]["reason"].startswith(f"{step}: ")
    assert named in lines[0]["reason"]
    assert len(lines[0]["reason"]) > len(step) + 10
    assert "\n" not in lines[0]["reason"]
    for key in ("ev_correlation", "rsquared", "absolute_dev_explained", "lookup_correlation", "shuffled_correlation"):
        assert lines[0][key] is None
    assert [lines[i]["state"] for i in (1, 2, 3)] == ["scored"] * 3
    assert (summary["scored"], summary["undefined"], summary["failed"]) == (3, 0, 1)
    assert summary["ev_correlation"] == {"mean": pytest.approx(1.0), "standard_error": pytest.approx(0.0), "units": 3}
    assert summary["failure_reasons"] == [lines[0]["reason"]]
    bad = [r for r in server.requests if r.about == VICTIM and (r.simulates is not None) == (step == "simulate")]
    least, most = attempts if isinstance(attempts, tuple) else (attempts, attempts) if attempts else (1, 2)
    assert least <= len(bad) <= most
    assert "sae/0" not in {line["unit"] for line in read_json_lines(tmp_path / "results.jsonl")}


def reading(values: Any) -> str:
    return json.dumps({"activations": values})


UNREADABLE = {
    "one integer too few": (reading([0] * (WINDOW - 1)), f"exactly {WINDOW} integers, got {WINDOW - 1}"),
    "one integer too many": (reading([0] * (WINDOW + 1)), f"exactly {WINDOW} integers, got {WINDOW + 1}"),
    "none": (reading([]), "got 0"),
    "no list": (reading("0 0 0 0 0 0 0 0"), "no list"),
    "another key": (json.dumps({"values": [0] * WINDOW}), "no list"),
    "above the scale": (reading([11] * WINDOW), "from 0 to 10"),
    "below the scale": (reading([-1] * WINDOW), "from 0 to 10"),
    "fractions": (reading([0.5] * WINDOW), "from 0 to 10"),
    "strings": (reading(["0"] * WINDOW), "from 0 to 10"),
    "truth values": (reading([True] + [False] * (WINDOW - 1)), "from 0 to 10"),
    "missing values": (reading([None] * WINDOW), "from 0 to 10"),
    "prose": ("I am sorry, but I cannot say.", ""),
    "nothing": ("", ""),
    "cut off": ('{"activations": [0, 0, 0', ""),
    "a runaway of brackets": ('{"activations": ' + "[" * 20_000, ""),
    "a list": (json.dumps([0] * WINDOW), ""),
}


@pytest.mark.parametrize("fault", UNREADABLE)
def test_an_unreadable_simulation_is_asked_again_and_then_fails_alone(
    sae: SAE, store: ActivationStore, fault: str, tmp_path: Path
) -> None:
    content, named = UNREADABLE[fault]
    with ChatServer(failing(Reply(completion(content)), "simulate")) as server:
        summary = run(sae, store, settings(server, retries=2), tmp_path)
    lines = lines_of(tmp_path)
    assert lines[0]["state"] == "failed"
    assert lines[0]["reason"].startswith("simulate: unreadable answer after 3 attempts")
    assert named in lines[0]["reason"]
    assert (summary["scored"], summary["failed"], summary["ev_correlation"]["units"]) == (3, 1, 3)
    asked = [r.body["messages"] for r in server.requests if r.about == VICTIM and r.simulates is not None]
    assert len(asked) == 3
    # The first time plainly; then with the answer and what was wrong with it
    assert [len(messages) for messages in asked] == [2, 4, 4]
    assert all(messages[:2] == asked[0] for messages in asked)
    assert named in asked[1][3]["content"]


@pytest.mark.parametrize("content", ["", "apples", "{}", '{"description": ""}', '{"description": "  "}', '{"description": 3}'])
def test_an_unreadable_proposal_fails_alone(sae: SAE, store: ActivationStore, content: str, tmp_path: Path) -> None:
    with ChatServer(failing(Reply(completion(content)), "propose")) as server:
        summary = run(sae, store, settings(server), tmp_path)
    line = lines_of(tmp_path)[0]
    assert line["state"] == "failed"
    assert line["reason"].startswith("propose: unreadable answer after 2 attempts")
    assert (summary["scored"], summary["failed"]) == (3, 1)
    assert not [r for r in server.requests if r.about == VICTIM and r.simulates is not None]  # nothing was simulated


def test_an_answer_that_comes_right_the_second_time_is_taken(
    sae: SAE, store: ActivationStore, tmp_path: Path
) -> None:
    def script(request: Request) -> Reply:
        again = len(request.body["messages"]) > 2
        return good(request) if again else Reply(completion("Let me think."))

    with ChatServer(script) as server:
        summary = run(sae, store, settings(server), tmp_path)
    assert (summary["scored"], summary["ev_correlation"]["mean"]) == (4, pytest.approx(1.0))
    assert {r.body["temperature"] for r in server.requests if len(r.body["messages"]) > 2} == {0.5}


def test_a_control_that_fails_costs_no_other_unit_its_score(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    """Some unit's shuffled control is the victim's description; its own predictions are all there."""
    with ChatServer(failing(Reply(error("content filter"), 400), "simulate")) as server:
        summary = run(sae, store, settings(server, shuffled_control=True), tmp_path)
    assert {latent: line["state"] for latent, line in lines_of(tmp_path).items()} == {
        0: "failed", 1: "scored", 2: "scored", 3: "scored",
    }  # fmt: skip
    assert summary["ev_correlation"]["units"] == 3
    assert summary["shuffled_correlation"]["units"] <= 2


@pytest.mark.parametrize("step", ["propose", "simulate"])
def test_a_fault_that_heals_leaves_no_trace_in_the_scores(
    sae: SAE, store: ActivationStore, step: str, tmp_path: Path
) -> None:
    with ChatServer() as server:
        config = settings(server, shuffled_control=True)
        run(sae, store, config, tmp_path / "undisturbed")
        server.script = failing(Reply(error("overloaded"), 500), step)
        assert run(sae, store, config, tmp_path / "healed")["failed"] >= 1
        server.script = good
        assert run(sae, store, config, tmp_path / "healed")["failed"] == 0
    undisturbed, healed = (lines_of(tmp_path / name) for name in ("undisturbed", "healed"))
    assert any(line["shuffled_correlation"] is not None for line in undisturbed.values())
    assert healed == undisturbed


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None, "completion_tokens": None}, {"prompt_tokens": "9"}])
def test_a_server_that_does_not_count_tokens_will_do(
    sae: SAE, store: ActivationStore, usage: Any, tmp_path: Path
) -> None:
    def script(request: Request) -> Reply:
        return Reply({**completion(perfect(request)), "usage": usage})

    with ChatServer(script) as server:
        assert run(sae, store, settings(server), tmp_path)["scored"] == 4


@pytest.mark.parametrize("depth", [1, 2])
def test_half_a_character_in_an_answer_is_no_crash(
    sae: SAE, store: ActivationStore, depth: int, tmp_path: Path
) -> None:
    """Servers cut byte-level tokens: JSON may hold a lone surrogate, which no file in UTF-8 can.

    It stands in the answer's text itself, or (depth 2) in the JSON that the text is.
    """
    half = "\\ud83d" if depth == 2 else "\ud83d"
    body = json.dumps(completion(f'{{"description": "apple {half}"}}')).encode()
    assert body.count(b"\\") == {1: 5, 2: 6}[depth]
    with ChatServer(failing(Reply(body), "propose")) as server:
        summary = run(sae, store, settings(server), tmp_path)
    assert summary["scored"] + summary["undefined"] + summary["failed"] == 4
    assert [line["state"] for latent, line in lines_of(tmp_path).items() if latent > 0] == ["scored"] * 3


# --- retries


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_two_refusals_and_then_an_answer_are_an_answer(
    sae: SAE, store: ActivationStore, status: int, tmp_path: Path
) -> None:
    refusals: Counter[str] = Counter()

    def script(request: Request) -> Reply:
        refusals[key_of(request)] += 1
        if refusals[key_of(request)] <= 2:
            return Reply(error("Not now."), status, {"Retry-After": "0"})
        return good(request)

    with ChatServer(script) as server:
        summary = run(sae, store, settings(server, retries=2, latents=(0, 1)), tmp_path)
    assert (summary["scored"], summary["failed"], summary["ev_correlation"]["mean"]) == (2, 0, pytest.approx(1.0))
    assert set(refusals.values()) == {3}
    assert len(server.answered) == len(refusals)


def test_retry_after_is_waited_for(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    def script(request: Request) -> Reply:
        return Reply(error("Slow down."), 429, {"Retry-After": "0.4"}) if request.number == 0 else good(request)

    with ChatServer(script) as server:
        summary = run(sae, store, settings(server, latents=(0,)), tmp_path)
    assert summary["scored"] == 1
    assert server.requests[1].at - server.requests[0].at >= 0.39


# --- the server is not there


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


def test_with_no_server_all_units_fail_and_are_counted(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    summary = run(sae, store, settings(None, base_url=closed_port()), tmp_path)
    assert (summary["scored"], summary["undefined"], summary["failed"], summary["chosen"]) == (0, 0, 4, 4)
    assert summary["ev_correlation"] == {"mean": None, "standard_error": None, "units": 0}
    for line in lines_of(tmp_path).values():
        assert line["state"] == "failed"
        assert "onnect" in line["reason"]
    assert summary["failure_reasons"]


def test_units_that_failed_are_tried_again(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    down = settings(None, base_url=closed_port())
    assert run(sae, store, down, tmp_path / "a")["failed"] == 4
    with ChatServer() as server:
        summary = run(sae, store, settings(server), tmp_path / "a")
        undisturbed = run(sae, store, settings(server), tmp_path / "b")
    assert (summary["scored"], summary["failed"], summary["failure_reasons"]) == (4, 0, [])
    assert undisturbed["scored"] == 4
    assert (tmp_path / "a" / "scores.jsonl").read_bytes() == (tmp_path / "b" / "scores.jsonl").read_bytes()


def test_check_server_takes_one_that_answers() -> None:
    with ChatServer() as server:
        check_server(settings(server))
    with ChatServer(models=Reply(error("no such route"), 404)) as server:  # not every server lists its models
        check_server(settings(server))


@pytest.mark.parametrize("status", [401, 403])
def test_check_server_names_a_refused_key(status: int) -> None:
    with (
        ChatServer(models=Reply(error("Incorrect API key provided."), status)) as server,
        pytest.raises(InputError, match=rf"explain\.base_url.*{status}.*Incorrect API key"),
    ):
        check_server(settings(server))


def test_check_server_names_a_closed_port() -> None:
    url = closed_port()
    with pytest.raises(InputError, match=rf"{url}.*(?i:connect)"):
        check_server(settings(None, base_url=url))


@pytest.mark.parametrize("url", ["127.0.0.1:8080/v1", "http://127.0.0.1:eighty/v1", "http://[::1", "nowhere"])
def test_an_address_that_is_none_is_bad_input(url: str) -> None:
    with pytest.raises(InputError, match=r"explain\.base_url"):
        check_server(settings(None, base_url=url))


# --- keys


def test_no_key_and_no_server_of_ones_own_is_bad_input(
    sae: SAE, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")

    def started(done: int, total: int) -> None:
        raise AssertionError("long work began before the input was checked")

    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        run(sae, store, settings(None), tmp_path, evidence_progress=started)
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        check_server(settings(None))


@pytest.mark.parametrize("where", ["config", "environment"])
def test_a_server_of_ones_own_needs_no_key(
    sae: SAE, store: ActivationStore, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with ChatServer() as server:
        config = settings(server, latents=(0,))
        if where == "environment":
            monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
            config = settings(None, latents=(0,))
        assert run(sae, store, config, tmp_path)["scored"] == 1


def test_the_config_has_no_place_for_a_key() -> None:
    with pytest.raises(ValueError, match="api_key"):
        ExplainConfig(**{"api_key": KEY})


def echo(content: Any) -> Script:
    """Say to the victim what its request's header was: careless servers do."""

    def script(request: Request) -> Reply:
        assert request.headers["authorization"] == f"Bearer {KEY}"  # it does travel; it must not stay
        return content(request) if request.about == VICTIM else good(request)

    return script


ECHOES: dict[str, Callable[[Request], Reply]] = {
    "401": lambda r: Reply(error(f"Incorrect API key provided: {KEY}. You can find yours at ..."), 401),
    "401 in text": lambda r: Reply(f"denied: {r.headers['authorization']}", 401),
    "500": lambda r: Reply(error(f"upstream said no to {KEY}"), 500),
    "far out in a long message": lambda r: Reply(error("x" * 200 + KEY + "x" * 200), 400),
    "at the cut of a long message": lambda r: Reply(error("x" * 230 + KEY), 400),
    "200 in text": lambda r: Reply(f"denied: {r.headers['authorization']}"),
    "200 as an error": lambda r: Reply(error(f"denied: {KEY}")),
    "200 with no choices": lambda r: Reply({"id": KEY, "choices": []}),
    "not JSON": lambda r: Reply(f'{{"key": {KEY}'.encode()),
    "in an unreadable answer": lambda r: Reply(completion(f"your key is {KEY}")),
    "in a description": lambda r: Reply(completion(json.dumps({"description": f"apple {KEY}"}))),
}


@pytest.mark.parametrize("name", ECHOES)
def test_the_key_stays_nowhere_even_if_the_server_repeats_it(
    sae: SAE, store: ActivationStore, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    with ChatServer(echo(ECHOES[name])) as server:
        summary = run(sae, store, settings(server), tmp_path)
    assert summary["scored"] >= 3
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"requests.jsonl", "scores.jsonl", "summary.json", "units.jsonl"} <= {file.name for file in files}
    for file in files:
        assert KEY[:16] not in file.read_text(encoding="utf-8"), file.name
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err + caplog.text


@pytest.mark.parametrize("key", [KEY, f"{KEY}\n", f"{KEY}\r\n", f" {KEY}", f"{KEY}ä"])
def test_the_key_is_in_no_message_of_check_server(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key read from a file often ends in a line break, which no header may: that is said without the key."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    message = ""
    with ChatServer(models=Reply(error(f"Incorrect API key provided: {KEY}"), 401)) as server:
        try:
            check_server(settings(server))
        except InputError as fault:
            message = str(fault)
    assert message
    assert KEY not in message


# --- the journal


def test_with_its_journal_a_run_is_repeated_without_one_request(
    sae: SAE, store: ActivationStore, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with ChatServer() as server:
        run(sae, store, settings(server, shuffled_control=True), first)
        sent = len(server.requests)
        second.mkdir()
        (second / "requests.jsonl").write_bytes((first / "requests.jsonl").read_bytes())
        summary = run(sae, store, settings(server, shuffled_control=True), second)
        assert len(server.requests) == sent > 20
    assert summary["requests_sent"] == 0
    assert summary["requests_from_journal"] >= len({key_of(request) for request in server.requests})
    assert (second / "scores.jsonl").read_bytes() == (first / "scores.jsonl").read_bytes()
    results = ({line["unit"]: line for line in read_json_lines(f / "results.jsonl")} for f in (first, second))
    assert next(results) == next(results)


def test_without_its_results_a_run_goes_on_from_its_journal(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    with ChatServer() as server:
        run(sae, store, settings(server), tmp_path)
        scores = (tmp_path / "scores.jsonl").read_bytes()
        for name in ("results.jsonl", "scores.jsonl", "summary.json"):
            (tmp_path / name).unlink()
        server.requests.clear()
        run(sae, store, settings(server), tmp_path)
        assert server.requests == []
    assert (tmp_path / "scores.jsonl").read_bytes() == scores


@pytest.mark.parametrize("changed", [{"model": "another"}, {"response_format": "json_object"}])
def test_a_question_put_otherwise_is_asked_anew(
    sae: SAE, store: ActivationStore, changed: dict[str, Any], tmp_path: Path
) -> None:
    with ChatServer() as server:
        run(sae, store, settings(server, latents=(0,)), tmp_path)
        sent = len(server.requests)
        for name in ("results", "descriptions"):  # as where settings changed
            (tmp_path / f"{name}.jsonl").unlink()
        run(sae, store, settings(server, latents=(0,), **changed), tmp_path)
        assert len(server.requests) == 2 * sent


@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_server_that_breaks_down_is_asked_nothing_twice(
    sae: SAE, store: ActivationStore, after: int, tmp_path: Path
) -> None:
    broken = True

    def script(request: Request) -> Reply:
        return Reply(error("out of memory"), 500) if broken and request.number >= after else good(request)

    with ChatServer(script) as server:
        config = settings(server, retries=0, concurrency=1)
        summary = run(sae, store, config, tmp_path / "broken")
        assert summary["failed"] > 0
        assert len(server.answered) == after
        broken = False
        summary = run(sae, store, config, tmp_path / "broken")
        answered = Counter(key_of(request) for request in server.answered)
        undisturbed = run(sae, store, config, tmp_path / "undisturbed")
    assert summary["failed"] == 0
    assert undisturbed["scored"] == 4
    assert set(answered.values()) == {1}
    for name in ("units.jsonl", "scores.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


class Killed(Exception):
    """The kill of these tests."""


@pytest.mark.parametrize("torn", [False, True])
def test_killed_midway_it_sends_no_answered_request_again(
    sae: SAE, store: ActivationStore, torn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import explain.client as client

    original = client.Journal.add
    journalled = 0

    def add(self: client.Journal, key: str, answer: str | None, usage: Any = None) -> None:
        nonlocal journalled
        if journalled == 7:
            if torn:
                with open(self._path, "ab") as file:
                    file.write(json.dumps({"key": key, "answer": answer}).encode()[:40])
            raise Killed
        original(self, key, answer, usage)
        journalled += 1

    # A server a run: a request that the killed run still had in flight may reach its server after the kill.
    with ChatServer() as server, monkeypatch.context() as patch:
        patch.setattr(client.Journal, "add", add)
        with pytest.raises(Killed):
            run(sae, store, settings(server, concurrency=1), tmp_path / "killed")
    assert len(read_json_lines(tmp_path / "killed" / "requests.jsonl")) == journalled == 7
    with ChatServer() as server:
        run(sae, store, settings(server, concurrency=1), tmp_path / "killed")
        sent = [key_of(request) for request in server.requests]
    with ChatServer() as server:
        run(sae, store, settings(server, concurrency=1), tmp_path / "undisturbed")
        wanted = {key_of(request) for request in server.requests}
    assert len(sent) == len(set(sent)) == len(wanted) - 7
    assert set(sent) < wanted
    assert (tmp_path / "killed" / "scores.jsonl").read_bytes() == (tmp_path / "undisturbed" / "scores.jsonl").read_bytes()


# --- a real server


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return spoken_store(tmp_path_factory.mktemp("spoken") / "store")


def live_settings(base_url: str, **changes: Any) -> ExplainConfig:
    return settings(
        None, base_url=base_url, model="labeller", latents=(0, 1), timeout=60.0, concurrency=2, **{"retries": 2, **changes}
    )


def test_a_real_server_proposes_and_simulates(
    spoken: ActivationStore, live: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way over a real connection. What SmolLM2 says is of no worth; that it is taken up rightly is tested."""
    monkeypatch.delenv("OPENAI_API_KEY")
    config = live_settings(live)
    check_server(config)
    dictionary = relu_dictionary(2, HOOK)
    result = stage.explain(dictionary, spoken, Spoken(), config, tmp_path, seed=5).summary
    summary = result["dictionaries"]["sae"]
    lines = lines_of(tmp_path)
    assert set(lines) == {0, 1}
    assert summary["scored"] + summary["undefined"] + summary["failed"] == 2
    for line in lines.values():
        assert line["state"] == "scored" or line["reason"]
    results = read_json_lines(tmp_path / "results.jsonl")
    units = {f"sae/{unit['latent']}": unit for unit in read_json_lines(tmp_path / "units.jsonl")}
    assert results, summary["failure_reasons"]  # at least one unit came through
    for found in results:
        unit = units[found["unit"]]
        assert found["description"].strip()
        assert lines[unit["latent"]]["description"] == found["description"]
        assert len(found["predicted"]) == len(unit["test"]) >= 3
        for predicted in found["predicted"]:
            assert len(predicted) == WINDOW
            levels_given = [value / 0.2 for value in predicted]  # it fires with strength 2: a level is 0.2
            assert levels_given == pytest.approx([round(level) for level in levels_given])
            assert all(-1e-9 <= level <= 10 + 1e-9 for level in levels_given)
    assert result["requests_sent"] >= 2 + 3
    assert result["prompt_tokens"] > 100
    assert result["completion_tokens"] > 50
    # The same again: every answer is in the journal
    (tmp_path / "results.jsonl").unlink()
    again = stage.explain(dictionary, spoken, Spoken(), config, tmp_path, seed=5).summary
    assert again["requests_sent"] == 0
    assert lines_of(tmp_path) == lines


def test_a_real_server_keeps_to_the_length_and_range_of_the_array(live: str, tmp_path: Path) -> None:
    """With json_schema the grammar binds count and range, so that no simulation need be asked for twice."""
    backend = ChatBackend(live_settings(live, retries=0), tmp_path)

    async def simulate() -> list[list[float]]:
        try:
            found = []
            for i, (description, n) in enumerate([("the word river", 8), ("anything at all", 12), ("the end", 3)]):
                example = Example(i, "top", list(range(n)), [f" {w}" for w in words[:n]], [0.0] * n)
                found += await backend.simulate(Explanation(description), [example])
            return [simulation.expected for simulation in found]
        finally:
            await backend.close()

    words = " ".join(SENTENCES[:2]).split()
    answers = asyncio.run(simulate())
    assert [len(answer) for answer in answers] == [8, 12, 3]
    assert {value for answer in answers for value in answer} <= set(range(11))
    assert backend.facts()["requests_sent"] == 3


def test_the_toy_world_is_what_these_tests_take_it_for(store: ActivationStore) -> None:
    border = TRAIN_SEQUENCES * CONTEXT
    x = store.read(HOOK, slice(None))
    for latent in range(4):
        fires = store.tokens.reshape(-1) == latent + 1
        assert fires[:border].sum() > 40
        assert fires[border:].sum() > 10
        assert (x[:, latent].numpy() == fires * (2.0 + latent)).all()
