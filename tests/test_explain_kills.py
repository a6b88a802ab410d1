"""SIGKILL at random moments of a run of explanations, again and again, until it ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from llm_servers import KEY, ChatServer, Reply, Request, completion, perfect, toy_store

from activation_store.files import iterate_json_lines

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from llm_servers import HOOK, LATENTS, WINDOW, Words, relu_dictionary
from activation_store import ActivationStore
from explain.config import ExplainConfig
from explain.explain import explain
config = ExplainConfig(
    backend="openai", base_url=sys.argv[2], latents=LATENTS["on one word"], window=WINDOW, train_top=4, train_sampled=2,
    test_top=3, test_sampled=3, test_random=6, scores=("simulation", "detection", "fuzzing"),
    concurrency=int(sys.argv[5]), best_of=2, instrument="integers", resamples=20, checkpoint_seconds=0.001,
)
explain(relu_dictionary(8, HOOK), ActivationStore.open(sys.argv[3]), Words(), config, Path(sys.argv[4]), seed=5)
"""


def answer(request: Request) -> Reply:
    if '"texts"' in request.user:
        asked = json.loads(request.user)
        words = [text.replace("<<", " ").replace(">>", " ").split() for text in asked["texts"].values()]
        fits = [int(asked["description"] in of_text) for of_text in words]
        return Reply(completion(json.dumps({"answers": fits})), delay=0.02)
    return Reply(completion(perfect(request)), delay=0.02)


def asked(request: Request) -> str:
    return json.dumps(request.body, sort_keys=True)


def start(server: ChatServer, store: Path, folder: Path, concurrency: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    given = (Path(__file__).parent, server.base_url, store, folder, concurrency)
    command = [sys.executable, "-c", PROGRAM, *map(str, given)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def killed_until_done(store: Path, folder: Path, concurrency: int, chance: random.Random, kills: int) -> None:
    """Kill `kills` times once requests flow, then let it end; hold what is lost and repeated against the journal."""
    journal = folder / "requests.jsonl"
    done = 0
    with ChatServer(answer) as server:
        while done < kills:
            process = start(server, store, folder, concurrency)
            before, deadline = len(server.requests), time.monotonic() + 60
            while len(server.requests) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(chance.random() * 0.5)
            if process.poll() is not None:
                break  # it ended before the kill
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
        process = start(server, store, folder, concurrency)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()[-2000:]
        counts = Counter(asked(request) for request in server.requests)
    assert done >= 1
    repeated = sum(counts.values()) - len(counts)
    assert repeated <= done * concurrency  # those under way when it was killed, and no answered one
    keys = [line["key"] for line in iterate_json_lines(journal)]
    assert len(keys) == len(set(keys)) == len(counts)  # every answer was written down once


def same_end(folder: Path, undisturbed: Path) -> None:
    for name in ("units.jsonl", "scores.jsonl"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    for name in ("descriptions.jsonl", "results.jsonl"):
        lines = [sorted(iterate_json_lines(of / name), key=lambda line: str(line["unit"])) for of in (folder, undisturbed)]
        assert lines[0] == lines[1], name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    toy_store(folder / "store")
    with ChatServer(answer) as server:
        process = start(server, folder / "store", folder / "explanations", 4)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()[-2000:]
    return folder / "store", folder / "explanations"


@pytest.mark.parametrize("concurrency", [1, 4])
def test_killed_at_random_it_ends_the_same_and_repeats_no_answered_request(
    undisturbed: tuple[Path, Path], concurrency: int, tmp_path: Path
) -> None:
    store, end = undisturbed
    killed_until_done(store, tmp_path / "killed", concurrency, random.Random(concurrency), kills=1)
    same_end(tmp_path / "killed", end)


@pytest.mark.soak
@pytest.mark.parametrize("concurrency", [1, 2, 8])
def test_killed_at_random_many_times(undisturbed: tuple[Path, Path], concurrency: int, tmp_path: Path) -> None:
    store, end = undisturbed
    for round_ in range(5):
        killed_until_done(store, tmp_path / str(round_), concurrency, random.Random(round_), kills=6)
        same_end(tmp_path / str(round_), end)
