"""Several processes fill one store: what they leave is what one leaves alone, whoever of them is killed and when."""

import multiprocessing
import os
import random
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from harvests import Killed, assert_same_store, kill, run_harvest, settings

import activation_store.harvest as harvest_module
from activation_store import ActivationStore, InputError, ModelConfig
from activation_store.claims import Claims
from activation_store.harvest import harvest
from activation_store.subject import Subject, load_subject

pytest_plugins = ["harvests"]
SHARDS = 16
SMALL = {"tokens": 250 * 16, "shard_mb": 0.0656}  # 15 shards of 16 sequences, and one of 10


def write(model: Path, text: Path, path: Path, log: Path, nap: float, claims: str) -> None:
    """One of several processes: says in `log` which shard it begins to compute, and which it has committed."""
    import torch

    torch.set_num_threads(1)  # the same in all of them: sums differ in their last bits by thread count
    subject = load_subject(ModelConfig(id=str(model), dtype="float32", device="cpu"))
    subject.model.register_forward_pre_hook(lambda *_: time.sleep(nap))
    compute, commit = harvest_module.compute_shard, harvest_module._commit

    def tell(*words: Any) -> None:
        file = os.open(log, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        os.write(file, (" ".join(map(str, words)) + "\n").encode())
        os.close(file)

    def telling_compute(store: Any, shard: int, *rest: Any) -> Any:
        tell("begin", shard, os.getpid())
        return compute(store, shard, *rest)

    def telling_commit(store: Any, journal: Any, claims: Any, shard: int, *rest: Any) -> None:
        commit(store, journal, claims, shard, *rest)
        tell("end", shard, os.getpid())

    harvest_module.compute_shard, harvest_module._commit = telling_compute, telling_commit
    harvest_module._POLL = 0.05
    if claims == "all granted":
        Claims.take = lambda self, name: True
    elif claims == "all lapsed":
        Claims._lapsed = lambda self, name: True
    data, config, _ = settings(text, SMALL)
    harvest(subject, data, config, path)


class Writers:
    """Starts such processes. They are forked off one that has done the slow imports: a start costs no seconds."""

    def __init__(self, model: Path, text: Path) -> None:
        self.model, self.text = model, text
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["activation_store.harvest", "activation_store.subject", "datasets", "pytest", "transformer_lens.model_bridge",
             "transformers.models.llama.modeling_llama"]
        )

    def start(self, path: Path, nap: float = 0.01, claims: str = "") -> BaseProcess:
        arguments = (self.model, self.text, path, self.log(path), nap, claims)
        process = self.context.Process(target=write, args=arguments, daemon=True)
        process.start()
        return process

    def log(self, path: Path) -> Path:
        return path.with_name("log.txt")

    def lines(self, path: Path) -> list[tuple[str, int, int]]:
        words = [line.split() for line in self.log(path).read_text().splitlines()] if self.log(path).exists() else []
        return [(what, int(shard), int(pid)) for what, shard, pid in words]


@pytest.fixture(scope="module")
def writers(tiny_model_dir: Path, tiny_text: Path) -> Writers:
    return Writers(tiny_model_dir, tiny_text)


@pytest.fixture(scope="module")
def alone(writers: Writers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves."""
    path = tmp_path_factory.mktemp("alone") / "activations"
    finish([writers.start(path, nap=0)])
    assert ActivationStore.open(path).shards == SHARDS
    return path


def finish(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def assert_nothing_else(path: Path) -> None:
    assert sorted(os.listdir(path.parent)) == ["activations", "log.txt"]  # the journal is gone


def test_three_processes_leave_the_bytes_of_one_and_compute_no_shard_twice(
    writers: Writers, alone: Path, tmp_path: Path
) -> None:
    path = tmp_path / "activations"
    finish([writers.start(path) for _ in range(3)])
    assert_same_store(path, alone)
    assert_nothing_else(path)
    lines = writers.lines(path)
    assert Counter(shard for what, shard, _ in lines if what == "begin") == Counter(range(SHARDS))
    shares = Counter(pid for what, _, pid in lines if what == "end")
    assert len(shares) == 3
    assert min(shares.values()) >= 2  # they did share the work


def disturbed_round(writers: Writers, path: Path, chance: random.Random, kills: int) -> Counter[str]:
    """Let three processes work, kill one of them `kills` times at random moments and start another in its place."""
    path.parent.mkdir()
    processes = [writers.start(path) for _ in range(3)]
    begun = time.monotonic()
    found: Counter[str] = Counter()
    for _ in range(kills):
        if chance.random() < 0.75:  # as soon as so many shards are begun or ended
            target = chance.randint(min(len(writers.lines(path)), 2 * SHARDS), 2 * SHARDS)
            while len(writers.lines(path)) < target and any(process.is_alive() for process in processes):
                time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        victim = chance.randrange(3)
        if processes[victim].is_alive():
            there = (path / "zarr.json").exists()
            complete = there and ActivationStore(path).attrs["complete"]
            found["after the end" if complete else "while filling" if there else "before the layout was whole"] += 1
            processes[victim].kill()
        processes[victim].join(10)
        processes[victim] = writers.start(path)
    finish(processes)
    ends = [shard for what, shard, _ in writers.lines(path) if what == "end"]
    done: set[int] = set()
    for what, shard, _ in writers.lines(path):
        assert what == "end" or shard not in done, f"shard {shard} was done, and begun again"
        if what == "end":
            done.add(shard)
    found["shards begun twice"] = sum(what == "begin" for what, _, _ in writers.lines(path)) - SHARDS
    found["shards committed twice"] = len(ends) - len(set(ends))
    found["ms"] = int(1000 * (time.monotonic() - begun))
    return found


def test_whoever_is_killed_and_started_again_the_bytes_are_the_same_and_no_finished_shard_is_redone(
    writers: Writers, alone: Path, tmp_path: Path
) -> None:
    chance = random.Random(1)
    for number in range(2):
        path = tmp_path / str(number) / "activations"
        disturbed_round(writers, path, chance, kills=2)
        assert_same_store(path, alone)
        assert_nothing_else(path)


@pytest.mark.soak
def test_twenty_rounds_of_kills_end_in_the_same_bytes(writers: Writers, alone: Path, tmp_path: Path) -> None:
    chance = random.Random(int(os.environ.get("MONOSEM_SOAK_SEED", "0")))
    total: Counter[str] = Counter()
    for number in range(20):
        path = tmp_path / str(number) / "activations"
        total += disturbed_round(writers, path, chance, kills=3)
        assert_same_store(path, alone)
        assert_nothing_else(path)
    print(dict(total))  # pytest -s shows it


# Given the same parts all the same


@pytest.mark.parametrize("claims", ["all granted", "all lapsed"])
def test_two_that_are_given_the_same_parts_still_leave_the_right_bytes(
    writers: Writers, alone: Path, subject: Subject, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claims: str
) -> None:
    path = tmp_path / "activations"
    with monkeypatch.context() as patch:  # laid out, and nothing more: two layouts at once are another matter
        patch.setattr(harvest_module, "_fill", kill)
        with pytest.raises(Killed):
            run_harvest(subject, tiny_text, path, SMALL)
    finish([writers.start(path, claims=claims) for _ in range(2)])
    begun = Counter(shard for what, shard, _ in writers.lines(path) if what == "begin")
    assert set(begun) == set(range(SHARDS))
    assert sum(begun.values()) >= SHARDS + 4  # some were computed twice, or this test shows nothing
    assert_same_store(path, alone)


# Folders that hold something else, and layouts cut short


def test_a_folder_that_is_no_store_is_left_as_it_is(again: Any, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("years of work")
    for _ in range(2):
        with pytest.raises(InputError, match="not empty and no store"):
            again(folder)
    assert (folder / "chapter1.tex").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["thesis"]


def test_a_store_of_a_newer_version_is_not_replaced(again: Any, undisturbed: ActivationStore, tmp_path: Path) -> None:
    again()
    root = tmp_path / "activations" / "zarr.json"
    root.write_text(root.read_text().replace('"schema": 2', '"schema": 3'))
    with pytest.raises(InputError, match="update monosem"):
        again()
    root.write_text(root.read_text().replace('"schema": 3', '"schema": 2'))
    assert_same_store(tmp_path / "activations", undisturbed.path)


def test_a_store_that_cannot_be_read_just_now_is_not_replaced(
    again: Any, undisturbed: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that fails for a moment looks like this."""
    again()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(OSError("no route to host")))
        with pytest.raises(InputError, match="no route to host"):
            again()
    assert_same_store(tmp_path / "activations", undisturbed.path)


def test_sums_that_a_power_cut_emptied_are_made_again_and_no_others(
    again: Any, undisturbed: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, captures: list[int]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "finish", kill)
        with pytest.raises(Killed):
            again()
    (tmp_path / "activations.journal" / "shard-000002.npz").write_bytes(b"")
    captures.clear()
    again()
    assert captures == [8, 8]
    assert_same_store(tmp_path / "activations", undisturbed.path)
