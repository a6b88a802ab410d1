"""A store in an object store behaves like one in a folder: harvested, killed, read, checked and mended over a connection.

The other end is moto, an S3 server in a process of its own. What it was asked stands in its log, which is how requests
are counted.
"""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import zarr
from harvests import MLP, RESID, SHARDS, Killed, bytes_of, kill_at_shard

from activation_store import ActivationStore, InputError
from activation_store.check import info, repair, verify
from activation_store.folders import Folder, LocalFolder, Read, folder_at
from activation_store.objects import ObjectFolder
from activation_store.subject import Subject

pytest_plugins = ["harvests"]
BUCKET = "bucket"
REQUEST = re.compile(r'"(?:\x1b\[[0-9;]*m)*(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP')


@dataclass
class Server:
    """A running S3 server: where it is, and its log, from which `asked` reads what came since it was last called."""

    endpoint: str
    log: Path
    seen: int = 0

    def asked(self) -> Counter[str]:
        """Requests since the last call, by method."""
        return Counter(method for method, _ in self.requests())

    def requests(self) -> list[tuple[str, str]]:
        time.sleep(0.05)  # the line is written after the answer
        text = self.log.read_text()
        new, self.seen = text[self.seen :], len(text)
        return REQUEST.findall(new)

    def enforce_credentials(self, enforce: bool) -> None:
        count = b"0" if enforce else b"inf"
        headers = {"Content-Type": "text/plain"}  # a form would not be read
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/moto-api/reset-auth", count, headers)).close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("s3fs")
    folder = tmp_path_factory.mktemp("moto")
    server = Server(f"http://127.0.0.1:{free_port()}", folder / "log")
    command = [sys.executable, "-m", "moto.server", "-p", server.endpoint.rpartition(":")[2]]
    with open(server.log, "wb") as log, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": server.endpoint, "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
            "AWS_CONFIG_FILE": str(folder / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
        }.items():  # fmt: skip
            patch.setenv(name, value)
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            for _ in range(200):
                try:
                    socket.create_connection(("127.0.0.1", int(command[-1]))).close()
                    break
                except OSError:
                    assert process.poll() is None, server.log.read_text()
                    time.sleep(0.1)
            fsspec.filesystem("s3").mkdir(BUCKET)
            server.asked()
            yield server
        finally:
            process.terminate()
            process.wait()
            fsspec.get_filesystem_class("s3").clear_instance_cache()


# One contract, whatever a folder is made of


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    name = f"{request.node.name.translate(str.maketrans('[]', '--'))}/run/store"
    if request.param == "local":
        return LocalFolder(tmp_path / "run" / "store")
    if request.param == "s3":
        request.getfixturevalue("server")
    return folder_at(f"memory://{name}" if request.param == "memory" else f"s3://{BUCKET}/{name}")


def test_a_file_is_what_was_written_last(folder: Folder) -> None:
    assert (folder.size("a/b"), folder.modified("a/b"), folder.names(), folder.names("a")) == (None, None, [], [])
    with pytest.raises(FileNotFoundError):
        folder.read("a/b")
    before = time.time()
    folder.write("a/b", b"one", memoryview(b"two"), bytearray(b"three"))
    folder.sync("a")
    assert (folder.read("a/b"), folder.size("a/b")) == (b"onetwothree", 11)
    modified = folder.modified("a/b")
    assert modified is not None
    assert before - 2 < modified < time.time() + 2  # whole seconds, in S3
    folder.write("a/b", b"other", sync=False)
    assert (folder.read("a/b"), folder.size("a/b")) == (b"other", 5)
    folder.write("empty")
    assert (folder.read("empty"), folder.size("empty")) == (b"", 0)


def test_names_are_those_of_files_directly_there(folder: Folder) -> None:
    for name in ("c", "b", "sub/d", "sub/deep/e", "sub-2/f"):
        folder.write(name, b"1")
    assert (folder.names(), folder.names("sub"), folder.names("deep")) == (["b", "c"], ["d"], [])
    assert folder.names("b") == []  # a file, and no folder
    folder.write("a", b"1")
    folder.remove("c")
    folder.remove("c")
    folder.remove("nowhere/c")
    assert (folder.names(), folder.size("c")) == (["a", "b"], None)


def test_a_store_is_never_laid_out_over_what_is_no_store(folder: Folder) -> None:
    tokens = np.zeros((2, 4), np.int32)
    assert folder.empty()
    folder.write("sub/thesis.txt", b"mine")
    assert not folder.empty()
    with pytest.raises(InputError, match="not empty and no store"):
        ActivationStore.create(folder, tokens, tokens, {"h": 2})
    assert folder.read("sub/thesis.txt") == b"mine"
    folder.remove_all()
    ActivationStore.create(folder, tokens, tokens, {"h": 2})
    assert not folder.empty()


def test_another_writer_is_seen_at_once(folder: Folder) -> None:
    other = pickle.loads(pickle.dumps(folder)) if not isinstance(folder, LocalFolder) else LocalFolder(folder.path)
    for count in range(1, 4):
        assert len(folder.names("sub")) == count - 1
        assert folder.size(f"sub/{count}") is None
        other.write(f"sub/{count}", b"1" * count)
        assert (len(folder.names("sub")), folder.size(f"sub/{count}")) == (count, count)
        other.write(f"sub/{count}", b"2")
        assert (folder.read(f"sub/{count}"), folder.size(f"sub/{count}")) == (b"2", 1)


def test_one_of_several_creates_a_file(folder: Folder) -> None:
    if isinstance(folder, ObjectFolder) and folder.url.startswith("memory"):
        pytest.skip("memory:// is made for one thread")
    assert folder.create("x/0.claim", b"me")
    assert not folder.create("x/0.claim", b"you")
    assert folder.read("x/0.claim") == b"me"
    together = threading.Barrier(4)

    def race(number: int) -> list[bool]:
        won = []
        for claim in range(1, 6):
            together.wait()
            won.append(folder.create(f"x/{claim}.claim", str(number).encode()))
        return won

    with ThreadPoolExecutor(4) as pool:
        won = np.array(list(pool.map(race, range(4))))
    assert won.sum(axis=0).tolist() == [1] * 5
    assert [int(folder.read(f"x/{claim}.claim")) for claim in range(1, 6)] == won.argmax(axis=0).tolist()


def buffers(wanted: list[tuple[str, int, int]]) -> tuple[list[Read], list[bytearray]]:
    room = [bytearray(length) for _, _, length in wanted]
    return [(name, offset, memoryview(b)) for (name, offset, _), b in zip(wanted, room, strict=True)], room


def test_many_ranges_are_read_at_once(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ObjectFolder, "PIECE", 300)  # the longest reads in pieces, several times as much as goes at once
    monkeypatch.setattr(ObjectFolder, "AT_ONCE", 700)
    data = {name: np.random.default_rng(k).bytes(1000) for k, name in enumerate(("a", "sub/b"))}
    for name, value in data.items():
        folder.write(name, value)
    wanted = [(name, start, length) for name in data for start in range(0, 1000, 50) for length in (1, 50)]
    wanted += [("a", 0, 1000), ("sub/b", 1, 999), ("a", 999, 1), ("a", 10, 0), ("a", 1000, 0)]
    reads, room = buffers(wanted)
    folder.read_many(reads)
    assert [bytes(b) for b in room] == [data[name][start : start + length] for name, start, length in wanted]
    folder.read_many([])


@pytest.mark.parametrize("start", [0, 5, 7, 8, 100])
def test_a_read_past_the_end_names_the_file(folder: Folder, start: int) -> None:
    folder.write("whole", b"x" * 200)
    folder.write("short", b"x" * 7)
    with pytest.raises(EOFError, match="short"):
        folder.read_many(buffers([("whole", 0, 8), ("short", start, 8)])[0])


def test_a_read_of_a_missing_file_says_so(folder: Folder) -> None:
    folder.write("whole", b"x" * 200)
    with pytest.raises(FileNotFoundError):
        folder.read_many(buffers([("whole", 0, 8), ("none", 0, 8)])[0])


def test_a_folder_goes_with_all_in_it_and_nothing_else(folder: Folder) -> None:
    journal = folder.beside(".journal")
    assert str(journal) == f"{folder}.journal"
    for name in ("a", "sub/b", "sub/deep/c"):
        folder.write(name, b"1")
        journal.write(name, b"2")
    folder.remove_leftovers()
    folder.remove_all()
    folder.remove_all()
    assert (folder.names(), folder.names("sub"), folder.size("sub/deep/c")) == ([], [], None)
    assert (journal.names(), journal.names("sub"), journal.read("sub/deep/c")) == (["a"], ["b"], b"2")
    folder.write("a", b"3")
    assert folder.read("a") == b"3"


def test_what_a_name_means(tmp_path: Path) -> None:
    assert folder_at(tmp_path) == folder_at(str(tmp_path)) == folder_at(f"file://{tmp_path}") == LocalFolder(tmp_path)
    assert folder_at("s3://bucket/run/store/") == ObjectFolder("s3://bucket/run/store")
    assert folder_at(ObjectFolder("gs://b/x")) == ObjectFolder("gs://b/x")
    for bare in ("s3://bucket", "s3://bucket/"):
        with pytest.raises(InputError, match=r"^s3://bucket: a whole bucket.*s3://bucket/activations$"):
            folder_at(bare)
    with pytest.raises(InputError, match=r"(?i)nosuch://.*nosuch.*driver"):
        folder_at("nosuch://bucket/store").size("zarr.json")


# Servers and drivers without exclusive creation


class Refusing:
    """A file system that refuses conditional writes in one way or another."""

    async_impl = False

    def __init__(self, error: Exception) -> None:
        self.error, self.files = error, dict[str, bytes]()

    def info(self, path: str) -> dict[str, Any]:
        if path not in self.files:
            raise FileNotFoundError(path)
        return {"type": "file", "size": len(self.files[path])}

    def pipe_file(self, path: str, data: bytes, **options: str) -> None:
        if options:
            raise self.error
        self.files[path] = data


def refused(code: str) -> OSError:
    """What s3fs makes of a server's answer."""
    error = OSError(5, "refused")
    error.__cause__ = RuntimeError()
    error.__cause__.response = {"Error": {"Code": code}}  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("error", [NotImplementedError(), TypeError("mode"), refused("NotImplemented"), refused("501")])
def test_without_exclusive_creation_there_is_a_look_before(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = Refusing(error)
    monkeypatch.setattr(ObjectFolder, "_open", lambda self: (fs, "bucket/store"))
    folder = ObjectFolder("s3://bucket/store")
    assert folder.create("a", b"one")
    assert not folder.create("a", b"two")
    assert fs.files == {"bucket/store/a": b"one"}


@pytest.mark.parametrize("code", ["PreconditionFailed", "412", "ConditionalRequestConflict"])
def test_losing_the_race_is_no_error_however_it_is_told(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ObjectFolder, "_open", lambda self: (Refusing(refused(code)), "bucket/store"))
    assert not ObjectFolder("s3://bucket/store").create("a", b"one")


def test_a_refused_claim_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ObjectFolder, "_open", lambda self: (Refusing(refused("AccessDenied")), "bucket/store"))
    with pytest.raises(InputError, match=r"s3://bucket/store/a: OSError: .*refused; check address"):
        ObjectFolder("s3://bucket/store").create("a", b"one")


# What cannot be reached


@pytest.fixture
def anew(server: Server) -> Iterator[None]:
    """Connections made by this test alone, out of the environment as it leaves it."""
    fs = fsspec.get_filesystem_class("s3")
    fs.clear_instance_cache()
    yield
    fs.clear_instance_cache()


def one_line(error: BaseException, *parts: str) -> None:
    assert isinstance(error, InputError)
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


def test_a_server_that_is_not_there(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        ActivationStore.open(f"s3://{BUCKET}/store")
    one_line(caught.value, f"s3://{BUCKET}/store", "Could not connect", "check address")
    assert time.monotonic() - began < 5


def test_a_server_that_never_answers(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        monkeypatch.setattr(ObjectFolder, "PATIENCE", 1.0)
        began = time.monotonic()
        with pytest.raises(InputError) as caught:
            ActivationStore.open(f"s3://{BUCKET}/store")
        one_line(caught.value, f"s3://{BUCKET}/store", "no answer in time", "check address")
        assert time.monotonic() - began < 5


def test_wrong_credentials(server: Server, anew: None) -> None:
    server.enforce_credentials(True)
    try:
        for act in (
            lambda f: f.size("a"),
            lambda f: f.read("a"),
            lambda f: f.write("a", b""),
            lambda f: f.names(),
            lambda f: f.create("a", b""),
            lambda f: f.remove_all(),
            lambda f: f.read_many(buffers([("a", 0, 1)])[0]),
        ):
            with pytest.raises(InputError) as caught:
                act(ObjectFolder(f"s3://{BUCKET}/store"))
            one_line(caught.value, f"s3://{BUCKET}/store", "credentials")
    finally:
        server.enforce_credentials(False)


def test_no_credentials(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(InputError) as caught:
        ActivationStore.open(f"s3://{BUCKET}/store")
    one_line(caught.value, f"s3://{BUCKET}/store", "Unable to locate credentials")


def test_a_missing_bucket(server: Server, again: Callable[..., ActivationStore]) -> None:
    for act in (ActivationStore.open, lambda url: again(url)):
        with pytest.raises(InputError) as caught:
            act("s3://no-such-bucket/store")
        one_line(caught.value, "s3://no-such-bucket/store", "bucket does not exist", "make the bucket")


# A store over a connection


@pytest.fixture(scope="module")
def url(server: Server, subject: Subject, tiny_text: Path) -> str:
    """A store harvested straight into the bucket, which no test may change."""
    from harvests import run_harvest

    url = f"s3://{BUCKET}/whole/activations"
    assert str(run_harvest(subject, tiny_text, url, {}).path) == url  # type: ignore[arg-type]
    return url


@pytest.fixture
def copy(url: str) -> Iterator[str]:
    """A store that a test may change."""
    fs = fsspec.filesystem("s3")
    fs.copy(f"{url}/", f"s3://{BUCKET}/copy/activations/", recursive=True)
    yield f"s3://{BUCKET}/copy/activations"
    fs.rm(f"{BUCKET}/copy", recursive=True)


def objects(url: str) -> dict[str, bytes]:
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    root = url.removeprefix("s3://") + "/"
    return {name.removeprefix(root): fs.cat_file(name) for name in fs.find(root)}


def assert_same_objects(url: str, local: ActivationStore) -> None:
    found, expected = objects(url), bytes_of(local.path)
    assert set(found) == set(expected)
    assert not [name for name in expected if found[name] != expected[name]]


def test_a_harvest_leaves_the_same_bytes_as_in_a_folder(url: str, undisturbed: ActivationStore) -> None:
    assert_same_objects(url, undisturbed)
    assert fsspec.filesystem("s3", use_listings_cache=False).ls(f"{BUCKET}/whole") == [f"{BUCKET}/whole/activations"]


def test_it_reads_as_from_a_folder(url: str, undisturbed: ActivationStore) -> None:
    store = ActivationStore.open(url)
    assert (store.path, store.hooks, store.attrs) == (url, undisturbed.hooks, undisturbed.attrs)
    for name in ("tokens", "documents", "offsets", "special"):
        assert np.array_equal(getattr(store, name), getattr(undisturbed, name))
    for hook in store.hooks:
        for rows in (slice(None), [3, -1, 700, 3, 0]):
            assert torch.equal(store.read(hook, rows), undisturbed.read(hook, rows))
        found, expected = store.statistics(hook), undisturbed.statistics(hook)
        assert found.rows == expected.rows
        for name in ("mean", "variance", "covariance"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))


def test_batches_are_those_of_a_folder(url: str, undisturbed: ActivationStore) -> None:
    """Blocks are read by a thread in the background, in fsspec's own event loop; two iterations at once share it."""
    store = ActivationStore.open(url)
    for hook in (RESID, (RESID, MLP)):
        ours, theirs = (s.batches(hook, 64, seed=3, memory_mb=0.2, epochs=2) for s in (store, undisturbed))
        for one, two, expected in zip(ours, ours, theirs, strict=True):
            for x, y, z in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (one, two, expected)), strict=True):
                assert torch.equal(x, z)
                assert torch.equal(y, z)


def test_a_bare_zarr_opens_it(url: str, server: Server, undisturbed: ActivationStore) -> None:
    group = zarr.open(url, mode="r", storage_options={"endpoint_url": server.endpoint})
    assert group.attrs["hooks"] == [RESID, MLP]
    assert np.array_equal(group["tokens"][:], undisturbed.tokens)
    assert np.array_equal(group[f"{RESID}/activations"][:], undisturbed.read(RESID, slice(None)).numpy())


def test_few_requests(url: str, server: Server) -> None:
    server.asked()
    store = ActivationStore.open(url)
    opening = server.asked()
    assert opening.total() <= 2 + 3 + 3 * len(store.hooks)  # each array's metadata, and the group's
    store.read(RESID, slice(0, 16))
    assert server.asked() == {"GET": 2}  # checksums and rows
    store.read(RESID, slice(None))
    assert server.asked() == {"GET": 2 * SHARDS - 1}  # neighbouring blocks are one request
    batches = store.batches(RESID, 64)
    server.asked()
    assert sum(len(batch) for batch in batches) == batches.rows
    assert server.asked() == {"GET": 5}  # an epoch: the shards that training text is in, each whole in one request


def test_a_killed_harvest_goes_on(
    server: Server, again: Callable[..., ActivationStore], captures: list[int], undisturbed: ActivationStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    place: Any = f"s3://{BUCKET}/killed/activations"
    with monkeypatch.context() as patch:
        kill_at_shard(patch, 3, after_first_hook=True)
        with pytest.raises(Killed):
            again(place)
    with pytest.raises(InputError, match="unfinished"):
        ActivationStore.open(place)
    assert (info(place)["complete"], info(place)["shards_done"], info(place)["claims"]) == (False, 3, 0)
    captures.clear()
    again(place)
    assert captures == [8] * (12 - 2 * 3) + [4]
    assert_same_objects(place, undisturbed)
    captures.clear()
    again(place)
    assert captures == []
    assert folder_at(f"{place}.journal").names() == []


def test_a_flipped_byte_is_found_taken_out_and_filled_in(
    copy: Any, again: Callable[..., ActivationStore], captures: list[int], undisturbed: ActivationStore
) -> None:
    assert verify(copy).faults == []
    facts, local = info(copy), info(undisturbed.path)
    assert {k: v for k, v in facts.items() if k != "path"} == {k: v for k, v in local.items() if k != "path"}
    fs, name = fsspec.filesystem("s3"), f"{copy}/{MLP}/activations/c/2/0"
    data = bytearray(fs.cat_file(name))
    data[77] ^= 4
    fs.pipe_file(name, bytes(data))
    with pytest.raises(InputError, match=f"{re.escape(name)}.*monosem store repair"):
        ActivationStore.open(copy).read(MLP, slice(None))
    taken = [(fault.array, fault.chunk) for fault in repair(copy)]
    assert taken == [(f"{MLP}/activations", 2)]
    assert folder_at(copy).size(f"{MLP}/activations/c/2/0") is None
    captures.clear()
    again(copy)
    assert captures == [8, 8]
    assert_same_objects(copy, undisturbed)


def test_the_command_line_takes_a_url(url: str, server: Server) -> None:
    """And finds the server through fsspec's own settings as well."""
    environment = {**os.environ, "FSSPEC_S3_ENDPOINT_URL": server.endpoint}
    del environment["AWS_ENDPOINT_URL"]
    command = [sys.executable, "-m", "monosem", "store", "verify"]
    whole = subprocess.run([*command, url], env=environment, capture_output=True, text=True)
    assert (whole.returncode, "all as written" in whole.stdout) == (0, True), whole.stderr


FORKED = """
import json, os, sys
from activation_store.folders import folder_at
folder = folder_at(sys.argv[1])
before = folder.read("zarr.json")
child = os.fork()
if child == 0:
    os._exit(0 if folder.read("zarr.json") == before and folder.size("zarr.json") == len(before) else 7)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), folder.read("zarr.json") == before]))
"""


def test_a_forked_process_makes_its_own_connections(url: str) -> None:
    found = subprocess.run([sys.executable, "-c", FORKED, url], capture_output=True, text=True, timeout=60)
    assert found.stdout, found.stderr
    assert json.loads(found.stdout) == [0, True]
