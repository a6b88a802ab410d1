"""Pushing to, pulling from and loading from the hub, against a server on this machine that speaks its protocol."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import flask
import pytest
import torch
import yaml
from huggingface_hub import constants
from test_cli import monosem_cli
from test_sae import random_sae
from werkzeug.serving import make_server

from activation_store.errors import InputError
from sae import SAE, LatentStatistics
from sae.hub import card, fetch, pull, push

EVALUATION = {
    "l0": 12.345678, "explained_variance": None, "ce_recovered": 0.9, "kl": 0.125, "cosine": 0.75,
    "relative_reconstruction_bias": 0.9375, "held_out_hash": "0123abcd", "tokens": 2048, "density_histogram": [1, 2],
}  # fmt: skip


class Hub:
    """The part of the hub's protocol that models need: repositories of files, each commit under its own number."""

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.seen: list[tuple[str, str]] = []  # method and path of every request
        self.tokens: set[str | None] = set()

    def sha(self, repo: str, number: int) -> str:
        return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()

    def number(self, repo: str, revision: str) -> int | None:
        """The commit that a branch or sha means."""
        shas = [self.sha(repo, number) for number in range(len(self.repos.get(repo, ())))]
        return len(shas) - 1 if revision == "main" and shas else shas.index(revision) if revision in shas else None

    def app(self) -> flask.Flask:
        app = flask.Flask("hub")

        def missing(code: str) -> flask.Response:
            return flask.Response(json.dumps({"error": code}), 404, {"X-Error-Code": code, "X-Error-Message": code})

        @app.before_request
        def note() -> flask.Response | None:
            self.seen.append((flask.request.method, flask.request.path))
            token = flask.request.headers.get("Authorization")
            self.tokens.add(token)
            if flask.request.method == "POST" and token != "Bearer hf_right":
                return flask.Response(json.dumps({"error": "Invalid username or password."}), 401)
            return None

        @app.post("/api/repos/create")
        def create() -> flask.Response | dict[str, str]:
            asked = flask.request.json
            repo = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            url = f"{flask.request.host_url}{repo}"
            if repo in self.repos:
                return flask.Response(json.dumps({"error": "You already created this model repo", "url": url}), 409)
            self.repos[repo] = [{}]
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(repo)
            return {"url": url, "name": repo, "id": repo}

        @app.post("/api/validate-yaml")
        def validate() -> dict[str, list[str]]:
            yaml.safe_load(flask.request.json["content"].split("---")[1])
            return {"errors": [], "warnings": []}

        @app.get("/api/models/<owner>/<name>")
        @app.get("/api/models/<owner>/<name>/revision/<revision>")
        def info(owner: str, name: str, revision: str = "main") -> flask.Response | dict[str, object]:
            repo = f"{owner}/{name}"
            if repo not in self.repos:
                return missing("RepoNotFound")
            number = self.number(repo, revision)
            if number is None:
                return missing("RevisionNotFound")
            files = [{"rfilename": file} for file in self.repos[repo][number]]
            return {"id": repo, "modelId": repo, "sha": self.sha(repo, number), "siblings": files, "tags": [], "private": False}

        @app.get("/api/models/<owner>/<name>/tree/<revision>")
        def tree(owner: str, name: str, revision: str) -> flask.Response:
            repo = f"{owner}/{name}"
            files = self.repos[repo][self.number(repo, revision)]
            return flask.jsonify(
                [{"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                 for path, body in files.items()]
            )  # fmt: skip

        @app.post("/api/models/<owner>/<name>/preupload/<revision>")
        def preupload(owner: str, name: str, revision: str) -> dict[str, object]:
            files = flask.request.json["files"]
            return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}

        @app.post("/api/models/<owner>/<name>/commit/<revision>")
        def commit(owner: str, name: str, revision: str) -> dict[str, object]:
            repo = f"{owner}/{name}"
            files = dict(self.repos[repo][-1])
            for line in flask.request.data.splitlines():
                said = json.loads(line)
                if said["key"] == "file":
                    files[said["value"]["path"]] = base64.b64decode(said["value"]["content"])
            self.repos[repo].append(files)
            sha = self.sha(repo, len(self.repos[repo]) - 1)
            return {"commitUrl": f"{flask.request.host_url}{repo}/commit/{sha}", "commitOid": sha, "success": True}

        @app.get("/<owner>/<name>/resolve/<revision>/<path:file>")
        def resolve(owner: str, name: str, revision: str, file: str) -> flask.Response:
            repo = f"{owner}/{name}"
            number = self.number(repo, revision)
            if number is None:
                return missing("RevisionNotFound")
            if file not in self.repos[repo][number]:
                return missing("EntryNotFound")
            body = self.repos[repo][number][file]
            headers = {"X-Repo-Commit": self.sha(repo, number), "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
            return flask.Response(body, 200, headers)

        return app


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub of our own, which huggingface_hub takes for the true one; its cache is empty."""
    made = Hub()
    server = make_server("127.0.0.1", 0, made.app(), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield made
    server.shutdown()


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run's folder with an SAE that was evaluated."""
    sae = random_sae().with_metadata(model_name="some/model", dataset_path="/home/somebody/text.jsonl", context_size=128)
    sae.latents = LatentStatistics(torch.rand(20), torch.rand(20), torch.randint(0, 9, (20, 60)), 1234)
    sae.save(tmp_path / "run/sae")
    (tmp_path / "run/evaluation.json").write_text(json.dumps(EVALUATION))
    return tmp_path / "run"


def header_of(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---")[1])


def test_push_then_load_and_pull_give_the_same_sae(hub, saved, tmp_path):
    where = push(saved, "me/an-sae")
    assert where == f"{hub.url}/me/an-sae/commit/{hub.sha('me/an-sae', 1)}"
    assert len(hub.repos["me/an-sae"]) == 2  # the empty first, and one commit
    files = {"README.md", "cfg.json", "sae_weights.safetensors", "latents.safetensors", "evaluation.json"}
    assert set(hub.repos["me/an-sae"][1]) == files
    mine, x = SAE.load(saved / "sae"), torch.randn(4, 8)
    back = SAE.load("hf://me/an-sae")
    assert torch.equal(back(x), mine(x))
    assert torch.equal(back.latents.density, mine.latents.density)
    assert back.cfg == mine.cfg
    pull("me/an-sae", tmp_path / "pulled")
    assert {file.name for file in (tmp_path / "pulled").iterdir()} == files
    assert not any(file.is_symlink() for file in (tmp_path / "pulled").iterdir())
    assert torch.equal(SAE.load(tmp_path / "pulled")(x), mine(x))


def test_the_card_says_what_it_is_and_what_was_measured(saved):
    text = card(SAE.load(saved / "sae"), "me/an-sae", "layer-3", EVALUATION)
    header = header_of(text)
    assert header["library_name"] == "monosem"
    assert header["base_model"] == "some/model"
    assert {"sparse-autoencoder", "standard"} <= set(header["tags"])
    assert "datasets" not in header
    assert "| L0, latents a token | 12.35 |" in text
    assert "| explained variance | undefined |" in text
    assert "| cosine of reconstruction and activation | 0.75 |" in text
    assert "| relative reconstruction bias | 0.9375 |" in text
    assert "| KL divergence of the model with reconstructions from the model, nats a token | 0.125 |" in text
    assert "| hash of the held-out set | 0123abcd |" in text
    assert "| hook | blocks.0.hook_resid_post |" in text
    assert 'SAE.load("hf://me/an-sae/layer-3")' in text
    assert "squared error" not in text  # which was not measured
    assert "somebody" not in text  # of whose disk the text is
    assert "| text | text.jsonl |" in text
    assert "Not measured." in card(SAE.load(saved / "sae"), "me/an-sae")


def test_several_saes_in_one_repository(hub, saved):
    push(saved, "me/many", folder="a")
    push(random_sae(d_sae=30), "me/many", folder="b/c")
    assert SAE.load("hf://me/many/a").cfg.d_sae == 20
    assert SAE.load("hf://me/many@main/a").cfg.d_sae == 20  # as the hub writes it
    assert SAE.load("hf://me/many/b/c").cfg.d_sae == 30
    assert SAE.load("hf://me/many/b/c/sae_weights.safetensors").cfg.d_sae == 30  # with the config beside it
    top = hub.repos["me/many"][-1]["README.md"].decode()
    assert "- `a`\n- `b/c`" in top
    assert "me/many/b/c" in hub.repos["me/many"][-1]["b/c/README.md"].decode()
    with pytest.raises(InputError, match=r"no weights lie there; they do in: a, b/c"):
        fetch("hf://me/many")
    brought = [path for method, path in hub.seen if method == "GET" and "/resolve/" in path and "/a/" in path]
    assert brought  # and nothing of a is brought for b/c
    assert hub.seen.index(("GET", brought[-1])) < max(i for i, (_, path) in enumerate(hub.seen) if "/b/c/" in path)


def test_a_revision_is_what_was_there_then(hub, saved):
    push(saved, "me/an-sae")
    push(random_sae(d_sae=31), "me/an-sae")
    first = hub.sha("me/an-sae", 1)
    assert SAE.load(f"hf://me/an-sae@{first}").cfg.d_sae == 20
    assert SAE.load("hf://me/an-sae").cfg.d_sae == 31
    with pytest.raises(InputError, match="me/an-sae@nowhere"):
        SAE.load("hf://me/an-sae@nowhere")


def test_a_card_written_by_hand_stays(hub, saved):
    push(saved, "me/an-sae")
    hub.repos["me/an-sae"][-1]["README.md"] = b"# My own words\n"
    push(saved, "me/an-sae")
    assert hub.repos["me/an-sae"][-1]["README.md"] == b"# My own words\n"
    push(saved, "me/an-sae", folder="other")
    assert hub.repos["me/an-sae"][-1]["README.md"] == b"# My own words\n"
    assert b"other" in hub.repos["me/an-sae"][-1]["other/README.md"]


def test_a_folder_of_many_files_of_weights_is_not_brought_whole(hub):
    hub.repos["them/set"] = [{f"layer_{i}.safetensors": b"x" for i in range(3)} | {"config.yaml": b""}]
    with pytest.raises(InputError, match=r"3 files of weights lie there; name one of them: layer_0\.safetensors"):
        fetch("hf://them/set")
    assert not [path for _, path in hub.seen if "/resolve/" in path]
    assert fetch("hf://them/set/layer_1.safetensors").name == "layer_1.safetensors"
    assert {path.rsplit("/", 1)[1] for _, path in hub.seen if "/resolve/" in path} == {"config.yaml", "layer_1.safetensors"}


def test_what_was_brought_loads_without_a_network(hub, saved, monkeypatch):
    push(saved, "me/many", folder="a")
    push(saved, "me/many", folder="b")
    SAE.load("hf://me/many/a")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert SAE.load("hf://me/many/a").cfg.d_sae == 20
    for address in ("hf://me/many/b", "hf://me/other"):
        with pytest.raises(InputError, match=address):
            SAE.load(address)


def test_what_the_hub_refuses_is_one_clear_error(hub, saved, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"hf://me/nothing: the Hugging Face hub could not do it.*hf auth login"):
        SAE.load("hf://me/nothing")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match="hf auth login") as refused:
        push(saved, "me/an-sae")
    assert "hf_wrong" not in str(refused.value)
    for address in ("hf://lonely", "hf://a b/c", "hf://"):
        with pytest.raises(InputError, match="not an address"):
            fetch(address)
    with pytest.raises(InputError, match="not a folder"):
        push(tmp_path / "nowhere", "me/an-sae")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(InputError, match="exists already"):
        pull("me/an-sae", tmp_path / "full")


def test_no_network_is_an_input_error(hub, saved, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="could not do it"):
        SAE.load("hf://me/an-sae")


def test_the_command_line_in_a_process_of_its_own(hub, saved, tmp_path, capsys, monkeypatch):
    """HF_ENDPOINT is all that says where the hub is."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_right"
    }  # fmt: skip
    command = [sys.executable, "-m", "monosem", "push", str(saved), "me/by-hand", "--folder", "x", "--private"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/me/by-hand/commit/{hub.sha('me/by-hand', 1)}"
    assert hub.private == {"me/by-hand"}
    assert "hf_right" not in done.stdout + done.stderr
    code, out, _ = monosem_cli(capsys, monkeypatch, "pull", "me/by-hand/x", tmp_path / "got")
    assert code == 0
    assert "cfg.json" in out
    assert SAE.load(tmp_path / "got").cfg.d_sae == 20
    code, out, _ = monosem_cli(capsys, monkeypatch, "convert", "hf://me/by-hand/x", tmp_path / "gemma", "--to", "gemma_scope")
    assert code == 0
    assert SAE.load(tmp_path / "gemma").cfg.architecture == "jumprelu"
