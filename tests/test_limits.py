"""How many requests run at once, how long is waited, and which parameters are done without."""

import asyncio
import random
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llm_servers import HOOK, KEY, LATENTS, WINDOW, ChatServer, Reply, Request, Words, completion, error, good, perfect

import explain.explain as stage
from activation_store import ActivationStore
from activation_store.files import read_json_lines
from explain.config import ExplainConfig
from explain.limits import Limit, delay_of
from sae.sae import SAE


def settings(server: ChatServer, **given: Any) -> ExplainConfig:
    return ExplainConfig(**{
        "backend": "openai", "base_url": server.base_url, "latents": LATENTS["on one word"], "window": WINDOW, "train_top": 3,
        "train_sampled": 1, "test_top": 2, "test_sampled": 2, "test_random": 4, "resamples": 0, "instrument": "integers", **given,
    })  # fmt: skip


def run(sae: SAE, store: ActivationStore, config: ExplainConfig, folder: Path) -> dict[str, Any]:
    return stage.explain(sae, store, Words(), config, folder).summary


# --- the limit alone


def test_the_limit_halves_once_for_a_crowd_and_grows_by_one_a_round() -> None:
    limit = Limit(16)
    before = time.monotonic()
    for _ in range(10):  # ten requests that were under way together
        limit.refused(before, 0.0)
    assert int(limit.now) == 8
    limit.refused(time.monotonic(), 0.0)  # one that began after that
    assert int(limit.now) == 4
    assert (limit.refusals, limit.lowest) == (11, 4)
    for _ in range(4):
        limit.succeeded()
    assert 4.5 < limit.now <= 5
    for _ in range(200):
        limit.succeeded()
    assert limit.now == 16  # never above the ceiling
    for _ in range(20):
        limit.refused(time.monotonic(), 0.0)
    assert limit.now == 1  # never below one
    assert limit.alone


def test_no_more_run_than_the_limit_and_all_get_their_turn() -> None:
    async def crowd() -> tuple[int, int]:
        limit, running, most, done = Limit(5), 0, 0, 0

        async def one() -> None:
            nonlocal running, most, done
            async with limit.slot():
                running += 1
                most = max(most, running)
                await asyncio.sleep(random.random() / 500)
                running -= 1
                done += 1

        tasks = [asyncio.create_task(one()) for _ in range(60)]
        await asyncio.sleep(0)
        for task in tasks[20:30]:  # some give up waiting; their turns pass on
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return most, done

    assert asyncio.run(asyncio.wait_for(crowd(), 10)) == (5, 50)


def test_a_pause_is_everybodys() -> None:
    async def pause() -> list[float]:
        limit = Limit(4)
        limit.refused(time.monotonic(), 0.2)
        start, begun = time.monotonic(), list[float]()

        async def one() -> None:
            async with limit.slot():
                begun.append(time.monotonic() - start)

        await asyncio.gather(*(one() for _ in range(3)))
        assert limit.waited == pytest.approx(0.2, abs=0.02)
        return begun

    assert min(asyncio.run(pause())) >= 0.19


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"retry-after": "7"}, 7, 7), ({"retry-after-ms": "1500"}, 1.5, 1.5), ({"retry-after": "x"}, 3, 4), ({}, 3, 4),
        ({"retry-after": "-5"}, 3, 4), ({"retry-after": "999999"}, 3, 4), ({"retry-after": "DATE"}, 8, 11),
    ],
)  # fmt: skip
def test_how_long_is_waited(headers: dict[str, str], least: float, most: float) -> None:
    given = {name: formatdate(time.time() + 10, usegmt=True) if value == "DATE" else value for name, value in headers.items()}
    refusal = SimpleNamespace(response=SimpleNamespace(headers=given))
    assert least <= delay_of(refusal, 3, 0.0) <= most  # 0.5 s doubled three times is 4
    assert least <= delay_of(refusal, 3, 0.999) <= most
    assert delay_of(None, 30, 1.0) == 30


# --- against a server


@pytest.mark.usefixtures("api")
def test_a_server_with_little_room_is_asked_for_no_more_than_it_has(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    def crowded(request: Request) -> Reply:
        if request.running > 3:
            return Reply(error("Too many at once."), 429, {"Retry-After": "0.05"}, delay=0.01)
        return Reply(completion(perfect(request)), delay=0.01)

    with ChatServer(crowded) as server:
        summary = run(sae, store, settings(server, concurrency=16, retries=2), tmp_path)
    found = summary["dictionaries"]["sae"]
    assert (found["scored"], found["failed"]) == (4, 0)
    assert found["ev_correlation"]["mean"] == pytest.approx(1.0)
    refused = sum(request.running > 3 for request in server.requests)
    assert summary["refusals"] == refused > 0
    assert summary["lowest_concurrency"] < 16
    assert summary["seconds_paused"] > 0
    later = server.requests[len(server.requests) // 2 :]
    assert sum(request.running > 3 for request in later) < len(later) / 3


@pytest.mark.usefixtures("api")
def test_a_storm_of_refusals_costs_no_unit_its_score(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    """Four in ten requests are refused, or the connection is cut, at random."""
    chance = random.Random(0)

    def stormy(request: Request) -> Reply:
        drawn = chance.random()
        if drawn < 0.3:
            return Reply(error("Slow down."), 429, {"Retry-After": "0"})
        return Reply(b"{", cut=True) if drawn < 0.4 else good(request)

    with ChatServer(stormy) as server:
        summary = run(sae, store, settings(server, concurrency=8, retries=9), tmp_path)
    assert summary["dictionaries"]["sae"]["scored"] == 4
    assert summary["dictionaries"]["sae"]["shuffled_correlation"]["units"] >= 2
    assert summary["refusals"] > 0


@pytest.mark.parametrize(
    ("refuses", "said", "dropped", "instead"),
    [
        ("temperature", "Unsupported value: 'temperature' does not support 0.0 with this model.", ["temperature"], {}),
        ("seed", "Unrecognized request argument supplied: seed", ["seed"], {}),
        ("max_completion_tokens", "Unknown parameter: 'max_completion_tokens'.", ["max_completion_tokens"], {"max_tokens": 1024}),
        ("reasoning_effort", "Unknown parameter: 'reasoning_effort'.", ["reasoning_effort"], {}),
        ("response_format", "'response_format' of type 'json_schema' is not supported", ["response_format"],
         {"response_format": {"type": "json_object"}}),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("api")
def test_a_parameter_that_is_refused_is_done_without(
    sae: SAE, store: ActivationStore, refuses: str, said: str, dropped: list[str], instead: dict[str, Any], tmp_path: Path
) -> None:
    def picky(request: Request) -> Reply:
        refused = refuses in request.body and request.body[refuses] != instead.get(refuses)
        return Reply(error(said), 400) if refused else good(request)

    with ChatServer(picky) as server:
        config = settings(server, reasoning_effort="low", concurrency=2)
        summary = run(sae, store, config, tmp_path)
        assert summary["dictionaries"]["sae"]["scored"] == 4
        assert summary["parameters_dropped"] == dropped
        taken = [request.body for request in server.requests if request in server.answered]
        for name, value in instead.items():
            assert all(body[name] == value for body in taken)
        refusals = len(server.requests) - len(taken)
        assert 1 <= refusals <= 2  # it is learnt once, by those under way
        sent = len(server.requests)
        (tmp_path / "results.jsonl").unlink()
        run(sae, store, config, tmp_path)
        assert len(server.requests) == sent  # answers are known by what was meant to be asked
    assert KEY not in "".join(file.read_text() for file in tmp_path.iterdir())


@pytest.mark.usefixtures("api")
def test_formats_are_given_up_one_after_another(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    def plain(request: Request) -> Reply:
        refused = "response_format" in request.body
        return Reply(error("response_format is not supported"), 400) if refused else good(request)

    with ChatServer(plain) as server:
        summary = run(sae, store, settings(server, concurrency=1), tmp_path)
    assert summary["dictionaries"]["sae"]["scored"] == 4
    assert summary["parameters_dropped"] == ["json_object", "response_format"]


@pytest.mark.usefixtures("api")
def test_another_fault_of_a_request_is_no_lesson(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    with ChatServer(lambda _: Reply(error("This model's maximum context length is 10 tokens."), 400)) as server:
        summary = run(sae, store, settings(server), tmp_path)
    assert summary["dictionaries"]["sae"]["failed"] == 4
    assert "parameters_dropped" not in summary
    assert {line["state"] for line in read_json_lines(tmp_path / "scores.jsonl")} == {"failed"}
    assert len(server.requests) == 4
    assert HOOK in (tmp_path / "scores.jsonl").read_text()
