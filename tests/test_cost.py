"""Prices, what was spent, and a ceiling that holds."""

import json
from pathlib import Path
from typing import Any

import pytest
from llm_servers import WINDOW, ChatServer, Reply, Request, Words, completion, perfect

import explain.explain as stage
from activation_store import ActivationStore, InputError
from activation_store.files import read_json_lines
from explain.config import ExplainConfig
from explain.cost import Budget, Price, Usage, price_of
from sae.sae import SAE

pytestmark = pytest.mark.usefixtures("api")


def priced(path: Path, **prices: float) -> str:
    path.write_text(f"gpt-4o-mini: {json.dumps(prices)}")
    return str(path)


def settings(server: ChatServer, **changes: Any) -> ExplainConfig:
    values: dict[str, Any] = {
        "backend": "openai", "base_url": server.base_url, "latents": (0, 1, 2, 3), "window": WINDOW, "train_top": 3,
        "instrument": "integers",
        "train_sampled": 1, "test_top": 2, "test_sampled": 0, "test_random": 2, "retries": 0, "timeout": 20.0,
        "shuffled_control": False, "max_answer_tokens": 64,
    }  # fmt: skip
    return ExplainConfig(**{**values, **changes})


def run(sae: SAE, store: ActivationStore, config: ExplainConfig, folder: Path) -> dict[str, Any]:
    return stage.explain(sae, store, Words(), config, folder, seed=5).summary


def billed(server: ChatServer, price: Price) -> float:
    """What the scripted server's answers cost: 100 tokens in, 20 out, each."""
    return len(server.answered) * (100 * price.input + 20 * price.output) / 1e6


def test_a_price_by_hand() -> None:
    """2 dollars in, half a dollar cached, 8 out: 600 fresh, 400 cached, 100 out are 0.0012 + 0.0002 + 0.0008."""
    assert Price(input=2, cached_input=0.5, output=8).of(Usage(1000, 400, 100)) == pytest.approx(0.0022)
    assert Price(input=2, output=8).of(Usage(1000, 400, 100)) == pytest.approx(0.0028)


def test_ours_are_of_openai_alone_and_the_users_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = price_of(ExplainConfig(backend="openai"))
    assert ours is not None
    assert ours.output > ours.input > 0
    assert price_of(ExplainConfig(backend="openai", base_url="http://127.0.0.1:1/v1")) is None
    assert price_of(ExplainConfig(backend="openai", model="my-own")) is None
    own = priced(tmp_path / "prices.yaml", input=7, output=9)
    for url in (None, "http://127.0.0.1:1/v1"):
        assert price_of(ExplainConfig(backend="openai", base_url=url, prices=own)) == Price(input=7, output=9)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert price_of(ExplainConfig(backend="openai")) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpt-4o-mini: {input: 1}", r"gpt-4o-mini\.output"), ("gpt-4o-mini: {input: -1, output: 1}", r"gpt-4o-mini\.input"),
        ("gpt-4o-mini: {input: 1, output: 1, per: day}", r"gpt-4o-mini\.per"), ("{", "cannot read"), ("- 1", "prices"),
    ],
)  # fmt: skip
def test_a_list_that_is_none_is_bad_input(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"explain\.prices: .*{said}"):
        price_of(ExplainConfig(backend="openai", prices=str(tmp_path / "prices.yaml")))
    with pytest.raises(InputError, match=r"explain\.prices: cannot read"):
        price_of(ExplainConfig(backend="openai", prices=str(tmp_path / "none.yaml")))


def test_a_ceiling_needs_a_price() -> None:
    with pytest.raises(InputError, match=r"explain\.max_cost: 2 given, but my-own has no price; name a YAML"):
        price_of(ExplainConfig(backend="openai", model="my-own", max_cost=2))


def test_requests_in_flight_are_counted_with_the_most_they_can_cost() -> None:
    """A dollar a token in, two out, five tokens an answer: a prompt of 10 bytes may cost 20."""
    budget = Budget(Price(input=1e6, output=2e6), 45.0, 5)
    first, second = budget.reserve(10), budget.reserve(10)
    assert first == second == 20
    assert budget.reserve(10) is None
    assert budget.reserve(0) is None  # even an empty one may cost 10
    budget.settle(20, Usage(3, 0, 1))
    assert budget.cost == 5
    assert budget.reserve(10) == 20
    budget.settle(20)
    assert budget.cost == 5  # one that failed costs nothing
    assert Budget(None, None, 5).reserve(10**9) == 0


def test_the_cost_of_a_run_is_what_was_billed_and_goes_on_after_a_restart(
    sae: SAE, store: ActivationStore, tmp_path: Path
) -> None:
    price = Price(input=1000.0, output=5000.0)
    prices = priced(tmp_path / "prices.yaml", input=1000.0, output=5000.0)
    with ChatServer() as server:
        config = settings(server, prices=prices)
        summary = run(sae, store, config, tmp_path / "run")
        assert summary["cost_usd"] == pytest.approx(billed(server, price))
        assert (summary["prompt_tokens"], summary["completion_tokens"]) == (100 * len(server.requests), 20 * len(server.requests))
        (tmp_path / "run" / "results.jsonl").unlink()
        again = run(sae, store, config, tmp_path / "run")
        assert (again["requests_sent"], again["prompt_tokens"]) == (0, 0)
        assert again["cost_usd"] == summary["cost_usd"]


def test_without_a_price_there_is_no_cost_and_it_is_not_zero(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    with ChatServer() as server:
        assert run(sae, store, settings(server), tmp_path)["cost_usd"] is None


def test_an_unusable_reply_was_paid_for(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    prices = priced(tmp_path / "prices.yaml", input=1.0, output=1.0)

    def script(request: Request) -> Reply:
        return Reply(completion(None)) if request.number == 0 else Reply(completion(perfect(request)))

    with ChatServer(script) as server:
        summary = run(sae, store, settings(server, prices=prices, latents=(0,)), tmp_path / "run")
    assert summary["dictionaries"]["sae"]["failed"] == 1
    assert summary["cost_usd"] == pytest.approx(120e-6)
    assert [line["answer"] for line in read_json_lines(tmp_path / "run" / "requests.jsonl")] == [None]


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_ceiling_holds_and_a_higher_one_goes_on(
    sae: SAE, store: ActivationStore, tmp_path: Path, concurrency: int
) -> None:
    price = Price(input=1000.0, output=5000.0)
    prices = priced(tmp_path / "prices.yaml", input=1000.0, output=5000.0)
    with ChatServer() as server:
        config = settings(server, prices=prices, concurrency=concurrency)
        folder = tmp_path / "run"
        ceiling = 3.5  # a request may cost some 3 dollars, and is billed 0.2
        summary = run(sae, store, config.model_copy(update={"max_cost": ceiling}), folder)
        assert 0 < summary["cost_usd"] == pytest.approx(billed(server, price))
        assert summary["cost_usd"] <= ceiling
        found = summary["dictionaries"]["sae"]
        assert found["failed"] > 0
        assert "explain.max_cost: $3.5 would not be kept" in found["failure_reasons"][0]
        sent = len(server.requests)
        summary = run(sae, store, config.model_copy(update={"max_cost": 1000.0}), folder)
        assert summary["dictionaries"]["sae"]["scored"] == 4
        assert len({json.dumps(request.body, sort_keys=True) for request in server.requests}) == len(server.requests) > sent
        assert summary["cost_usd"] == pytest.approx(billed(server, price))
