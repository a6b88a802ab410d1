"""Every command and every Python block of README and docs runs, on a small run of the same shape as the demo's."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import demo_fetcher
from llm_servers import ChatServer, Reply, Request, completion
from test_cli import RESID, finished, tiny_config  # noqa: F401 - fixtures

from monosem.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKE_TARGETS = {"setup", "demo", "test", "lint", "bench", "soak"}


def answer(request: Request) -> Reply:
    """A server that describes everything alike and predicts a pattern."""
    asked = request.simulates
    if asked is None:
        return Reply(completion('{"description": "anything"}'))
    return Reply(completion(json.dumps({"activations": [i % 11 for i in range(asked["count"])]})))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


@pytest.fixture
def demo_place(finished, tiny_config, demo_model_dir, tmp_path, monkeypatch):  # noqa: F811
    """A folder in which configs/demo.yaml and runs/demo are those of the tiny run, beside the model that the demo fetches."""
    values = yaml.safe_load(tiny_config.read_text())
    values["name"] = "demo"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(finished, tmp_path / "runs/demo")
    (tmp_path / "demo").symlink_to(demo_fetcher().FOLDER.resolve())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_and_block_runs(page, demo_place, monkeypatch, capsys):
    ran = 0
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if words[0] == "make":
                assert set(words[1:]) <= MAKE_TARGETS, line
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
                continue
            with monkeypatch.context() as scope:
                server = None
                while "=" in words[0]:
                    name, value = words.pop(0).split("=", 1)
                    if name == "OPENAI_BASE_URL":
                        server = ChatServer(answer)
                        value = server.__enter__().base_url
                    scope.setenv(name, value)
                assert words[0] == "monosem", line
                scope.setattr(sys, "argv", words)
                code = 0
                try:
                    main()
                except SystemExit as stop:
                    code = stop.code
                finally:
                    if server is not None:
                        server.__exit__(None, None, None)
                assert code == 0, (line, capsys.readouterr().err)
                ran += 1
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {"__name__": "docs"})
        ran += 1
    if page.name in ("guide.md", "steering.md", "README.md"):
        assert ran >= 2


def test_pages_link_to_files_that_exist():
    for page in [*PAGES, *sorted((ROOT / "docs/decisions").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_no_page_knows_the_machine_it_was_written_on():
    for page in PAGES:
        assert not re.search(r"/(root|home|work|tmp)/", page.read_text()), page
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert RESID.startswith("blocks.")
