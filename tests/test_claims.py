"""Claims: one holder at a time, and none for longer than it shows signs of life."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from activation_store.claims import LEASE, Claims
from activation_store.files import HOST
from activation_store.folders import LocalFolder


@pytest.fixture
def place(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "claims")


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(place: LocalFolder, text: str | bytes, *, name: str = "part", age: float = 0.0) -> Path:
    """A claim as another process would have left it, last signed `age` seconds ago."""
    place.path.mkdir(exist_ok=True)
    path = place.path / f"{name}.claim"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def owner(host: str = HOST, pid: int | None = None) -> str:
    return json.dumps({"host": host, "pid": os.getpid() if pid is None else pid})


def test_of_two_only_the_first_gets_a_part_until_it_lets_go(place: LocalFolder) -> None:
    one, other = Claims(place), Claims(place)
    assert one.take("part")
    assert not other.take("part")
    assert not one.take("part")  # nor twice
    assert other.take("another part")
    one.release("part")
    assert other.take("part")


def test_of_many_processes_exactly_one_gets_each_part(place: LocalFolder) -> None:
    program = """
import random, sys, time
from pathlib import Path
from activation_store.claims import Claims
from activation_store.folders import LocalFolder
claims = Claims(LocalFolder(Path(sys.argv[1])))
print("ready", flush=True)
sys.stdin.readline()
taken = []
for n in random.sample(range(300), 300):
    time.sleep(0.001)
    taken += [n] if claims.take(str(n)) else []
print(*taken, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(place)]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    pipes = [(process.stdin, process.stdout) for process in started if process.stdin and process.stdout]
    assert [out.readline() for _, out in pipes] == ["ready\n"] * 3
    for to, _ in pipes:
        to.write("go\n")
        to.flush()
    taken = [out.readline().split() for _, out in pipes]
    for process in started:  # alive until all have tried
        process.communicate("")
    assert sorted(int(n) for part in taken for n in part) == list(range(300))
    assert sum(map(bool, taken)) > 1


def test_the_end_lets_go_of_everything_and_ends_the_thread(place: LocalFolder) -> None:
    with Claims(place) as claims:
        assert claims.take("a")
        assert claims.take("b")
        assert place.names() == ["a.claim", "b.claim"]
        pulse = claims._pulse
    assert place.names() == []
    assert not pulse.is_alive()


def test_an_error_lets_go_as_well(place: LocalFolder) -> None:
    claims = Claims(place)
    with pytest.raises(ZeroDivisionError), claims:
        1 / claims.take("a") / 0
    assert place.names() == []


def test_what_a_dead_process_of_this_host_held_is_free_at_once(place: LocalFolder, dead: int) -> None:
    leave(place, owner(pid=dead))
    assert Claims(place, lease=3600).take("part")


def test_what_a_live_process_of_this_host_holds_is_not(place: LocalFolder) -> None:
    leave(place, owner(pid=os.getppid()), age=LEASE - 30)
    assert not Claims(place).take("part")


@pytest.mark.parametrize("pid", [1, 999_999_999])  # its process ids say nothing here
@pytest.mark.parametrize(("age", "free"), [(0, False), (50, False), (70, True)])
def test_what_another_host_holds_is_free_after_the_lease_and_not_before(
    place: LocalFolder, pid: int, age: float, free: bool
) -> None:
    leave(place, owner("elsewhere", pid), age=age)
    assert Claims(place, lease=60).take("part") is free


def test_signs_of_life_keep_a_claim(place: LocalFolder) -> None:
    with Claims(place, lease=0.4) as claims:
        claims.take("part")
        leave(place, owner("elsewhere"), name="silent")
        for _ in range(10):
            time.sleep(0.1)
            assert not Claims(place, lease=0.4).take("part")
        assert Claims(place, lease=0.4).take("silent")  # 1 s old, and nobody signed it


def test_signs_of_life_bring_back_a_claim_that_was_deleted(place: LocalFolder) -> None:
    with Claims(place, lease=0.2) as claims:
        claims.take("part")
        place.remove("part.claim")
        time.sleep(0.3)
        assert place.names() == ["part.claim"]
    assert place.names() == []


def test_no_sign_is_given_for_what_was_let_go_of(place: LocalFolder) -> None:
    with Claims(place, lease=0.1) as claims:
        claims.take("part")
        claims.release("part")
        time.sleep(0.3)
        assert place.names() == []


def test_a_sign_that_cannot_be_given_ends_nothing(place: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        calls.append(1)
        raise OSError(28, "No space left on device")

    calls: list[int] = []
    with Claims(place, lease=0.1) as claims:
        claims.take("part")
        with monkeypatch.context() as patch:
            patch.setattr(LocalFolder, "write", full)
            time.sleep(0.2)
        signed = place.modified("part.claim")
        time.sleep(0.2)
        assert calls
        assert place.modified("part.claim") != signed


@pytest.mark.parametrize("ahead", [-7200, 7200], ids=["two hours behind", "two hours ahead"])
def test_only_the_clock_of_the_place_counts(place: LocalFolder, monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    """A file server's clock need not be ours: here every file that is written gets its time."""
    real = LocalFolder.write

    def write(self: LocalFolder, name: str, *parts: bytes, sync: bool = True) -> None:
        real(self, name, *parts, sync=sync)
        then = time.time() + ahead
        os.utime(self.path / name, (then, then))

    monkeypatch.setattr(LocalFolder, "write", write)
    leave(place, owner("elsewhere"), age=50 - ahead)
    assert not Claims(place, lease=60).take("part")
    leave(place, owner("elsewhere"), age=70 - ahead)
    assert Claims(place, lease=60).take("part")


def test_our_own_clock_may_be_set_meanwhile(place: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(place, owner("elsewhere"))
    claims = Claims(place, lease=60)
    assert not claims.take("part")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert not claims.take("part")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert claims.take("part")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b"7", b"{}", b'{"host": "HOST"}', b'{"host": "HOST", "pid": "x"}',
     b'{"host": "HOST", "pid": null}', b'{"host": "HOST", "pid": 1e400}', b'{"host": "HOST", "pid": 99999999999999999999}'],
)  # fmt: skip
def test_a_claim_that_says_nothing_lapses_like_one_of_another_host(place: LocalFolder, text: bytes) -> None:
    text = text.replace(b"HOST", HOST.encode())
    leave(place, text, age=50)
    assert not Claims(place, lease=60).take("part")
    leave(place, text, age=70)
    assert Claims(place, lease=60).take("part")


def test_others_are_those_alive_with_a_claim_here(place: LocalFolder, dead: int) -> None:
    mine = Claims(place, lease=60)
    assert not mine.others()
    mine.take("mine")
    leave(place, owner(pid=dead), name="dead")
    leave(place, owner("elsewhere"), name="silent", age=70)
    (place.path / "shard-000000.npz").touch()
    assert not mine.others()
    claim = leave(place, owner("elsewhere"), name="alive")
    assert mine.others()
    claim.unlink()
    leave(place, owner(pid=os.getppid()), name="here")
    assert mine.others()


def test_looking_leaves_nothing_behind(place: LocalFolder, dead: int) -> None:
    leave(place, owner("elsewhere"))
    leave(place, owner(pid=dead), name="dead")
    claims = Claims(place)
    claims.take("part")
    claims.others()
    assert sorted(os.listdir(place.path)) == ["dead.claim", "part.claim"]
