"""What a run will cost, before it: against what it then asked, and what a real server then counted."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from llm_servers import LATENTS, WINDOW, ChatServer, Reply, Request, Words, completion, perfect

import explain.explain as stage
from activation_store import ActivationStore
from explain.config import ExplainConfig
from explain.estimate import estimate
from explain.explain import prepare
from sae.sae import SAE


class Letters(Words):
    """Counts a token a character."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(c) for c in text]


def settings(**given: Any) -> ExplainConfig:
    return ExplainConfig(**{
        "backend": "openai", "latents": LATENTS["on one word"], "window": WINDOW, "train_top": 4, "train_sampled": 2,
        "test_top": 2, "test_sampled": 2, "test_random": 4, "resamples": 0,
        "scores": ("simulation", "detection", "fuzzing", "intruder"),
        "instrument": "integers", "model": "gpt-4o-mini", **given,
    })  # fmt: skip


def answer(request: Request) -> Reply:
    """Answers of the kinds asked for; descriptions that no two units share, as long as the estimate takes them to be."""
    properties = request.body["response_format"]["json_schema"]["schema"]["properties"]
    name, wanted = next(iter(properties.items()))
    if name == "activations":
        return Reply(completion(perfect(request)))
    if name == "description":
        return Reply(completion(json.dumps({name: f"{request.about}{request.body['seed']}".ljust(92, "x")})))
    value: Any = [0] * wanted["minItems"] if name == "answers" else 1
    return Reply(completion(json.dumps({name: value})))


@pytest.mark.parametrize("given", [{}, {"best_of": 2, "valid_share": 0.3}, {"test_neighbour": 2, "latents": 3}])
@pytest.mark.usefixtures("api")
def test_the_estimate_is_what_the_run_then_asks(sae: SAE, store: ActivationStore, given: dict[str, Any], tmp_path: Path) -> None:
    config = settings(**given)
    prepare(sae, store, Words(), config, tmp_path / "estimate", seed=2)
    before = asyncio.run(estimate(config, tmp_path / "estimate", Letters(), 2))
    assert sorted(file.name for file in (tmp_path / "estimate").iterdir()) == ["evidence.json", "units.jsonl"]  # nothing new
    with ChatServer(answer) as server:
        stage.explain(sae, store, Words(), config.model_copy(update={"base_url": server.base_url}), tmp_path / "run", seed=2)
        asked = server.requests
    assert before["requests"] == len(asked)
    names = [next(iter(r.body["response_format"]["json_schema"]["schema"]["properties"])) for r in asked]
    kinds = {"proposals": "description", "simulations": "activations", "judgements": "answers", "choices": "answer"}
    for kind, name in kinds.items():
        assert before[kind] == names.count(name) > 0
    written = sum(len(message["content"]) for request in asked for message in request.body["messages"])
    messages = sum(len(request.body["messages"]) for request in asked)
    assert before["prompt_tokens"] == pytest.approx(written + 8 * messages, rel=0.01)
    assert before["cost_usd"] == pytest.approx((before["prompt_tokens"] * 0.15 + before["completion_tokens"] * 0.6) / 1e6)


@pytest.mark.usefixtures("api")
def test_what_is_answered_is_not_counted_again(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    with ChatServer(answer) as server:
        config = settings(base_url=server.base_url, model="unknown")
        stage.explain(sae, store, Words(), config, tmp_path)
        after = asyncio.run(estimate(config, tmp_path, Letters(), 0))
        assert after["requests"] == 0
        assert after["cost_usd"] is None
        (tmp_path / "results.jsonl").unlink()
        lines = (tmp_path / "requests.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "requests.jsonl").write_text("".join(lines[:-5]))
        assert asyncio.run(estimate(config, tmp_path, Letters(), 0))["requests"] == 5


@pytest.mark.usefixtures("api")
def test_a_real_servers_count_is_within_a_tenth(
    sae: SAE, store: ActivationStore, live: str, demo_model_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    config = settings(
        base_url=live, model="labeller", latents=(0, 1), timeout=300.0, scores=("detection",), retries=0,
    )  # fmt: skip
    prepare(sae, store, Words(), config, tmp_path, seed=2)
    before = asyncio.run(estimate(config, tmp_path, AutoTokenizer.from_pretrained(demo_model_dir), 2))
    summary = stage.explain(sae, store, Words(), config, tmp_path, seed=2).summary
    assert summary["requests_sent"] == before["requests"]
    assert before["prompt_tokens"] == pytest.approx(summary["prompt_tokens"], rel=0.1)
    counted = summary["prompt_tokens"] + summary["completion_tokens"]
    assert before["prompt_tokens"] + before["completion_tokens"] == pytest.approx(counted, rel=0.1)
