"""The Batch API: files up, batches polled, files down; killed meanwhile, expired, refused."""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from llm_servers import KEY, LATENTS, WINDOW, Request, Words, completion, perfect

import explain.explain as stage
from activation_store import ActivationStore
from activation_store.files import read_json_lines
from explain.config import ExplainConfig
from explain.cost import price_of
from sae.sae import SAE


class BatchServer:
    """Takes files and batches as api.openai.com does; `script` turns a line of a batch into a line of its output."""

    def __init__(self, script: Callable[[dict[str, Any]], dict[str, Any] | None], polls: int = 1) -> None:
        self.script, self.polls = script, polls
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.lines: list[dict[str, Any]] = []
        self.status = "completed"
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                """Be quiet."""

            def reply(self, body: Any, status: int = 200) -> None:
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/files":
                    name = f"file-{len(owner.files)}"
                    owner.files[name] = re.search(rb'filename="requests.jsonl".*?\r\n\r\n(.*?)\r\n--', raw, re.S)[1]  # type: ignore[index]
                    self.reply({"id": name, "object": "file", "bytes": 1, "created_at": 0, "filename": "x", "purpose": "batch"})
                else:
                    asked = json.loads(raw)
                    name = f"batch-{len(owner.batches)}"
                    owner.batches[name] = {**asked, "polls": 0}
                    self.reply(owner.facts(name, "validating"))

            def do_GET(self) -> None:
                _, _, kind, name, *rest = self.path.split("/")
                if kind == "files" and rest == ["content"]:
                    self.reply(owner.files[name])
                elif kind == "batches":
                    batch = owner.batches[name]
                    batch["polls"] += 1
                    if batch["polls"] <= owner.polls:
                        return self.reply(owner.facts(name, "in_progress"))
                    if "output" not in batch:
                        owner.work(name)
                    self.reply(owner.facts(name, owner.status))
                else:
                    self.reply({"object": "list", "data": []})

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def facts(self, name: str, status: str) -> dict[str, Any]:
        batch = self.batches[name]
        return {
            "id": name, "object": "batch", "endpoint": batch["endpoint"], "input_file_id": batch["input_file_id"],
            "created_at": 0, "completion_window": "24h", "status": status, "output_file_id": batch.get("output"),
            "error_file_id": batch.get("error"),
            "errors": {"data": [{"message": "took too long"}]} if status == "expired" else None,
        }  # fmt: skip

    def work(self, name: str) -> None:
        done, wrong = [], []
        for line in self.files[self.batches[name]["input_file_id"]].splitlines():
            asked = json.loads(line)
            assert (asked["method"], asked["url"]) == ("POST", "/v1/chat/completions")
            self.lines.append(asked)
            answer = self.script(asked)
            if answer is not None:
                good = answer["response"] is not None and answer["response"]["status_code"] == 200
                (done if good else wrong).append(json.dumps({"id": "x", "custom_id": asked["custom_id"], **answer}))
        for kind, lines in (("output", done), ("error", wrong)):
            self.files[f"{name}-{kind}"] = "\n".join(lines).encode()
            self.batches[name][kind] = f"{name}-{kind}" if lines else None

    def __enter__(self) -> "BatchServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def answered(line: dict[str, Any]) -> dict[str, Any]:
    request = Request(0, "", {}, line["body"], 0.0, 1)
    if '"texts"' in request.user:
        asked = json.loads(request.user)
        words = [text.replace("<<", " ").replace(">>", " ").split() for text in asked["texts"].values()]
        fits = [int(asked["description"] in of_text) for of_text in words]
        content = json.dumps({"answers": fits})
    else:
        content = perfect(request)
    return {"response": {"status_code": 200, "request_id": "r", "body": completion(content)}, "error": None}


def settings(server: BatchServer, **given: Any) -> ExplainConfig:
    return ExplainConfig(**{
        "backend": "openai", "base_url": server.base_url, "latents": LATENTS["on one word"], "window": WINDOW, "train_top": 3,
        "train_sampled": 1, "test_top": 2, "test_sampled": 2, "test_random": 4, "resamples": 0, "instrument": "integers",
        "batch": True, "batch_poll": 0.02, "concurrency": 1, "scores": ("simulation", "detection", "fuzzing"), **given,
    })  # fmt: skip


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, api: None) -> None:
    """Do not wait long for others."""
    import explain.batches as batches

    original = batches.Batches.__init__
    monkeypatch.setattr(batches.Batches, "__init__", lambda self, *a, poll: original(self, *a, quiet=0.15, poll=poll))


def run(sae: SAE, store: ActivationStore, server: BatchServer, folder: Path, **given: Any) -> dict[str, Any]:
    return stage.explain(sae, store, Words(), settings(server, **given), folder).summary


def test_everything_goes_in_few_batches(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    with BatchServer(answered) as server:
        summary = run(sae, store, server, tmp_path)
        found = summary["dictionaries"]["sae"]
        assert found["scored"] == 4
        assert found["ev_correlation"]["mean"] == pytest.approx(1.0)
        assert found["detection"]["description"]["balanced_accuracy"] == 1.0
        keys = [line["custom_id"] for line in server.lines]
        assert len(keys) == len(set(keys)) == summary["requests_sent"] > 30
        assert summary["batches_sent"] == len(server.batches) <= 3  # proposals; scores; controls
        sent = len(server.lines)
        (tmp_path / "results.jsonl").unlink()
        again = run(sae, store, server, tmp_path)
        assert len(server.lines) == sent
        assert again["batches_sent"] == 0
    assert KEY not in "".join(file.read_text() for file in tmp_path.iterdir())


class Killed(Exception):
    """The kill of these tests."""


def test_a_batch_is_taken_up_again_after_a_kill(
    sae: SAE, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BatchServer(answered, polls=10_000) as server:
        def killed(*_: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr("explain.describe.append_json_line", killed)
            patch.setattr("explain.client.Journal.add", killed)
            server.polls = 1
            with pytest.raises(Killed):  # the batch is back, and nothing of it was written down
                run(sae, store, server, tmp_path)
        assert len(server.batches) == 1
        summary = run(sae, store, server, tmp_path)
        assert summary["dictionaries"]["sae"]["scored"] == 4
        assert summary["batches_taken_up"] == 1
        keys = [line["custom_id"] for line in server.lines]
        assert len(keys) == len(set(keys))  # nothing was sent again


def test_a_line_that_fails_costs_its_unit_alone_and_is_sent_again(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    broken = [True]

    def script(line: dict[str, Any]) -> dict[str, Any] | None:
        request = Request(0, "", {}, line["body"], 0.0, 1)
        if broken[0] and request.simulates is None and '"texts"' not in request.user and request.about == "apple":
            return {"response": {"status_code": 500, "body": {"error": {"message": "The model broke down."}}}, "error": None}
        return answered(line)

    with BatchServer(script) as server:
        found = run(sae, store, server, tmp_path)["dictionaries"]["sae"]
        assert (found["scored"], found["failed"]) == (3, 1)
        assert found["failure_reasons"] == ["propose: HTTP 500 (The model broke down.)"]
        broken[0] = False
        assert run(sae, store, server, tmp_path)["dictionaries"]["sae"]["scored"] == 4


def test_what_an_expired_batch_did_not_answer_fails_with_the_reason(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    def half(line: dict[str, Any]) -> dict[str, Any] | None:
        return answered(line) if Request(0, "", {}, line["body"], 0.0, 1).about != "bread" else None

    with BatchServer(half) as server:
        server.status = "expired"
        found = run(sae, store, server, tmp_path)["dictionaries"]["sae"]
        assert (found["scored"], found["failed"]) == (3, 1)
        assert "is expired, without an answer (took too long)" in found["failure_reasons"][0]
        server.script, server.status = answered, "completed"
        assert run(sae, store, server, tmp_path)["dictionaries"]["sae"]["failed"] == 0
    lines = read_json_lines(tmp_path / "batches.jsonl")
    assert sum(len(line.get("failed", ())) for line in lines) == 1


def test_a_batch_that_is_not_taken_fails_all_with_the_reason(sae: SAE, store: ActivationStore, tmp_path: Path) -> None:
    with BatchServer(answered) as server:
        config = {"base_url": server.base_url.replace("/v1", "/v9/none")}
        found = run(sae, store, server, tmp_path, **config)["dictionaries"]["sae"]
    assert found["failed"] == 4
    assert "the batch was not taken" in found["failure_reasons"][0]


def test_a_batch_costs_half() -> None:
    whole, half = (price_of(ExplainConfig(backend="openai", model="gpt-4o-mini", batch=batch)) for batch in (False, True))
    assert whole is not None
    assert half is not None
    assert (half.input, half.output, half.cached_input) == (whole.input / 2, whole.output / 2, 0.0375)
