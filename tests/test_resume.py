"""A harvest that was killed, that filled the disk or that is asked for again: the same bytes, and nothing done twice."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harvests import (
    BATCH,
    BATCHES,
    MLP,
    RESID,
    SHARD,
    SHARDS,
    Killed,
    assert_same_store,
    bytes_of,
    kill,
    kill_at_shard,
    run_harvest,
)
from torch import Tensor

import activation_store.harvest as harvest_module
from activation_store import ActivationStore, InputError, ModelConfig
from activation_store.subject import Subject, load_subject

pytest_plugins = ["harvests"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("count", "half"), [(0, False), (1, True), (4, False), (6, True)], ids=["0 shards", "1 and a half", "4", "6 and a half"]
)
def test_a_resumed_harvest_ends_in_the_same_bytes_and_redoes_no_finished_shard(
    again: Callable[..., ActivationStore],
    captures: list[int],
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: ActivationStore,
    tmp_path: Path,
    count: int,
    half: bool,
) -> None:
    with monkeypatch.context() as patch:
        kill_at_shard(patch, count, after_first_hook=half)
        with pytest.raises(Killed):
            again()
    with pytest.raises(InputError, match="unfinished"):
        ActivationStore.open(tmp_path / "activations")
    captures.clear()
    store = again()
    assert captures == [BATCH] * (12 - 2 * count) + [4]  # the sequences of each pass
    assert_same_store(store.path, undisturbed.path)
    assert os.listdir(tmp_path) == ["activations"]  # no journal left
    assert ActivationStore.open(store.path).attrs == store.attrs


def test_a_resumed_harvest_does_not_read_the_text_again(
    again: Callable[..., ActivationStore], monkeypatch: pytest.MonkeyPatch, undisturbed: ActivationStore
) -> None:
    with monkeypatch.context() as patch:
        kill_at_shard(patch, 5)
        with pytest.raises(Killed):
            again()
    monkeypatch.setattr(harvest_module, "token_rows", None)  # to call it would be a TypeError
    progress: list[int] = []
    assert_same_store(again(progress=lambda done, total: progress.append(done)).path, undisturbed.path)
    assert progress[0] == 5 * SHARD * 16


def test_shards_without_a_journal_entry_are_computed_again_and_no_others(
    again: Callable[..., ActivationStore],
    captures: list[int],
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: ActivationStore,
    tmp_path: Path,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "finish", kill)
        with pytest.raises(Killed):
            again()
    entries = sorted((tmp_path / "activations.journal").glob("shard-*"))
    assert len(entries) == SHARDS
    for shard in (2, 5, 6):
        entries[shard].unlink()
        chunk = tmp_path / "activations" / RESID / "activations" / "c" / str(shard) / "0"
        chunk.write_bytes(b"\x7f" * chunk.stat().st_size)  # whatever a torn write left
    captures.clear()
    assert_same_store(again().path, undisturbed.path)
    assert captures == [8] * 4 + [4]


def test_a_kill_between_the_last_shard_and_the_end_costs_no_forward_pass(
    again: Callable[..., ActivationStore], captures: list[int], monkeypatch: pytest.MonkeyPatch, undisturbed: ActivationStore
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "finish", kill)
        with pytest.raises(Killed):
            again()
    captures.clear()
    assert_same_store(again().path, undisturbed.path)
    assert captures == []


def test_a_kill_while_the_journal_is_removed_costs_no_forward_pass(
    again: Callable[..., ActivationStore],
    captures: list[int],
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: ActivationStore,
    tmp_path: Path,
) -> None:
    """Die at the first deletion after the store is complete, at the second, ... until there are no more."""
    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "finish", kill)
        with pytest.raises(Killed):
            again(tmp_path / "done" / "activations")
    real_finish, passes = ActivationStore.finish, {}
    for count in itertools.count(1):
        path = Path(shutil.copytree(tmp_path / "done", tmp_path / str(count))) / "activations"
        left: list[int] = []

        def finish(*args: Any, left: list[int] = left, count: int = count) -> None:
            real_finish(*args)
            left.append(count)

        def dying(real: Callable[..., None], left: list[int] = left) -> Callable[..., None]:
            def delete(*args: Any, **kwargs: Any) -> None:
                if left:
                    left[0] -= 1
                    if left[0] == 0:
                        raise Killed
                real(*args, **kwargs)

            return delete

        with monkeypatch.context() as patch:
            patch.setattr(ActivationStore, "finish", finish)
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                again(path)
                break
            except Killed:
                pass
        captures.clear()
        assert_same_store(again(path).path, undisturbed.path)
        passes[count] = len(captures)
    assert len(passes) > 1
    assert passes == dict.fromkeys(passes, 0)


def test_a_finished_store_is_not_harvested_again(
    again: Callable[..., ActivationStore], captures: list[int], undisturbed: ActivationStore
) -> None:
    again()
    captures.clear()
    assert_same_store(again().path, undisturbed.path)
    assert captures == []


def test_a_kill_while_the_store_is_laid_out_starts_afresh(
    again: Callable[..., ActivationStore], monkeypatch: pytest.MonkeyPatch, undisturbed: ActivationStore
) -> None:
    real, written = os.replace, [0]

    def replace(source: Any, target: Any) -> None:
        written[0] += 1
        if written[0] == 4:  # some of the tokens are there, and all of the metadata
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            again()
    assert_same_store(again().path, undisturbed.path)


@pytest.fixture(scope="module")
def killed(tiny_model_dir: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose process got SIGKILL between writing a chunk aside and giving it its name."""
    path = tmp_path_factory.mktemp("killed") / "activations"
    program = """
import os, signal, sys
import torch
torch.set_num_threads(2)
from activation_store import DataConfig, HarvestConfig, ModelConfig
from activation_store.harvest import harvest
from activation_store.subject import load_subject
model, text, path, resid, mlp = sys.argv[1:]
real = os.replace
def replace(source, target):
    if str(target).endswith(f"{mlp}/activations/c/3/0"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
harvest(
    load_subject(ModelConfig(id=model, dtype="float32", device="cpu")),
    DataConfig(source=text, context=16, tokens=1600, held_out=0.2),
    HarvestConfig(hooks=(resid, mlp), dtype="float32", batch_size=8, shard_mb=0.07), path,
)
"""
    arguments = [str(tiny_model_dir), str(tiny_text), str(path), RESID, MLP]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return path


def test_after_sigkill_another_process_finishes_to_the_same_bytes(
    again: Callable[..., ActivationStore], captures: list[int], killed: Path, undisturbed: ActivationStore, tmp_path: Path
) -> None:
    shutil.copytree(killed.parent, tmp_path, dirs_exist_ok=True)
    assert_same_store(again().path, undisturbed.path)
    assert len(captures) == BATCHES - 3 * 2


def test_after_sigkill_nothing_half_written_stays_behind(
    again: Callable[..., ActivationStore], killed: Path, undisturbed: ActivationStore, tmp_path: Path
) -> None:
    shutil.copytree(killed.parent, tmp_path, dirs_exist_ok=True)
    assert set(bytes_of(tmp_path / "activations")) - set(bytes_of(undisturbed.path))  # there was something
    assert set(bytes_of(again().path)) == set(bytes_of(undisturbed.path))


# Asked for with other settings


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"hooks": ("blocks.0.hook_resid_post",)}, f"harvest.hooks ['{RESID}', '{MLP}'] -> ['blocks.0.hook_resid_post']"),
    ({"tokens": 800}, "data.tokens 1600 -> 800"),
    ({"dtype": "bfloat16"}, "harvest.dtype 'float32' -> 'bfloat16'"),
    ({"batch_size": 4}, "harvest.batch_size 8 -> 4"),
    ({"held_out": 0.3}, "data.held_out 0.2 -> 0.3"),
    ({"seed": 1, "context": 8}, "data.context 16 -> 8; run.seed 0 -> 1"),
]


@pytest.fixture(scope="module", params=["begun", "finished"])
def made(request: pytest.FixtureRequest, subject: Subject, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was begun, or finished."""
    path = tmp_path_factory.mktemp("made") / "activations"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "begun":
            kill_at_shard(patch, 2)
            with pytest.raises(Killed):
                run_harvest(subject, tiny_text, path, {})
        else:
            run_harvest(subject, tiny_text, path, {})
    return path


def refusal(again: Callable[..., ActivationStore], path: Path, **changes: Any) -> str:
    """What is said to a harvest with other settings, after which everything lies as before."""
    before = bytes_of(path.parent)
    with pytest.raises(InputError) as error:
        again(path, **changes)
    assert bytes_of(path.parent) == before
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("change", "difference"), CHANGES, ids=[difference for _, difference in CHANGES])
def test_other_settings_are_refused_by_name_and_nothing_is_changed(
    again: Callable[..., ActivationStore], made: Path, captures: list[int], change: dict[str, Any], difference: str
) -> None:
    assert f"({difference})" in refusal(again, made, **change)
    assert captures == []


def test_another_text_is_refused(again: Callable[..., ActivationStore], made: Path, tiny_text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "something else"}\n' * 400)
    assert f"(data.source {str(tiny_text)!r} -> {str(other)!r})" in refusal(again, made, source=str(other))


@pytest.mark.parametrize("what", ["weights", "tokenizer", "dtype"])
def test_another_model_is_refused(
    again: Callable[..., ActivationStore], made: Path, tiny_model_dir: Path, subject: Subject, what: str
) -> None:
    """Under the same name: its weights were trained on, or its vocabulary changed."""
    other = load_subject(ModelConfig(id=str(tiny_model_dir), dtype="bfloat16" if what == "dtype" else "float32", device="cpu"))
    if what == "weights":
        other = replace(other, revision="0123456789abcdef")
        expected = f"model.model_revision {subject.revision!r} -> '0123456789abcdef'"
    elif what == "tokenizer":
        other.tokenizer.add_tokens(["sails over"])
        hashes = [subject.facts()["tokenizer_hash"], other.facts()["tokenizer_hash"]]
        expected = f"model.tokenizer_hash {hashes[0]!r} -> {hashes[1]!r}"
    else:
        expected = "model.model_dtype 'float32' -> 'bfloat16'"
    assert f"({expected})" in refusal(again, made, subject=other)


def test_settings_that_do_not_decide_the_bytes_may_change(again: Callable[..., ActivationStore], made: Path) -> None:
    before = made / "zarr.json"
    text = before.read_text()
    if ActivationStore(made).attrs["complete"]:
        again(made, workers=1)
        assert before.read_text() == text


# A full disk


def test_a_full_disk_is_one_line_and_room_made_finishes_the_work(
    again: Callable[..., ActivationStore],
    captures: list[int],
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: ActivationStore,
    tmp_path: Path,
) -> None:
    real = ActivationStore.write_shard

    def write_shard(self: ActivationStore, shard: int, activations: dict[str, Tensor]) -> None:
        if shard == 3:
            patch.setattr(os, "fsync", no_room)
        real(self, shard, activations)

    def no_room(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "write_shard", write_shard)
        with pytest.raises(InputError, match="disk full") as error:
            again()
    assert str(tmp_path / "activations") in str(error.value)
    captures.clear()
    assert_same_store(again().path, undisturbed.path)
    assert len(captures) == BATCHES - 3 * 2
    assert set(bytes_of(tmp_path / "activations")) == set(bytes_of(undisturbed.path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A disk of its own, 4 KB large, and a way to make it larger."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", mount], check=False).returncode:
        pytest.skip("mounting a small disk needs root and the right to mount")

    def resize(kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", mount], check=True)

    try:
        yield mount, resize
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def test_on_a_disk_that_is_really_full_the_same_call_goes_on_each_time_there_is_more_room(
    again: Callable[..., ActivationStore], captures: list[int], undisturbed: ActivationStore,
    small_disk: tuple[Path, Callable[[int], None]],
) -> None:  # fmt: skip
    """Full while the store is laid out, then in the middle of a chunk."""
    mount, resize = small_disk
    path = mount / "activations"
    passes, laid_out = [], []
    for kilobytes in (4, 24, 520, 521, 2000):
        resize(kilobytes)
        captures.clear()
        try:
            again(path)
        except InputError as error:
            message = str(error)
            assert "\n" not in message
            assert message.startswith(f"disk full while writing {mount}")
            assert kilobytes < 2000
        laid_out.append((path / "zarr.json").exists())
        passes.append(len([count for count in captures if count > 2]))  # two sequences tell the hooks' widths
    assert laid_out == [False, False, True, True, True]
    done = passes[2] // 2 - 2  # beside the shard that had no room, the next was computed
    assert done > 1
    assert passes[4] == BATCHES - 2 * done  # what was done before was not done again
    assert_same_store(path, undisturbed.path)
    assert os.listdir(mount) == ["activations"]
