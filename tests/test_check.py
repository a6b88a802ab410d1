"""Looking after a store: every kind of damage is found where it is, taken out alone, and filled in again alone."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from harvests import BATCHES, MLP, RESID, SHARDS, Killed, assert_same_store, bytes_of, kill, kill_at_shard

from activation_store import ActivationStore, InputError
from activation_store.check import info, repair, verify
from monosem.cli import main

pytest_plugins = ["harvests"]
KINDS = ("activations", "norms", "checksums")
ARRAYS = ["tokens", "documents", "offsets", *(f"{hook}/{kind}" for hook in (RESID, MLP) for kind in KINDS)]


@pytest.fixture
def store(undisturbed: ActivationStore, tmp_path: Path) -> Path:
    """A finished store that a test may damage."""
    return Path(shutil.copytree(undisturbed.path, tmp_path / "activations"))


def chunk(store: Path, array: str, number: int) -> Path:
    flat = array.endswith(("/norms", "/checksums", "/scales"))
    return store / array / "c" / str(number) / ("" if flat else "0")


def flip(file: Path, at: int = 5) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 3)


def found_by(store: Path) -> list[tuple[str, int]]:
    return [(fault.array, fault.chunk) for fault in verify(store).faults]


DAMAGE: dict[str, Callable[[Path], None]] = {
    "first byte": lambda file: flip(file, 0), "last byte": lambda file: flip(file, -1), "cut off": cut,
    "emptied": lambda file: os.truncate(file, 0), "missing": os.unlink,
}  # fmt: skip


def test_a_whole_store_is_whole(undisturbed: ActivationStore) -> None:
    seen: list[tuple[int, int]] = []
    verdict = verify(undisturbed.path, lambda done, total: seen.append((done, total)))
    chunks = len(ARRAYS) * SHARDS + 2  # and two covariances
    files = [file for file in undisturbed.path.rglob("c/*") if file.is_file()]
    files += [file for file in undisturbed.path.rglob("c/*/*") if file.is_file()]
    assert verdict.faults == []
    assert (verdict.chunks, verdict.shards, verdict.shards_done) == (chunks, SHARDS, SHARDS) == (len(files), SHARDS, SHARDS)
    assert verdict.bytes == sum(file.stat().st_size for file in files)
    assert seen == [(n + 1, chunks) for n in range(chunks)]
    before = bytes_of(undisturbed.path)
    assert repair(undisturbed.path) == []
    assert bytes_of(undisturbed.path) == before


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("array", [f"{RESID}/activations", f"{MLP}/checksums", f"{MLP}/norms", "tokens", "documents", "offsets"])
def test_damage_is_found_and_only_the_damaged_chunk_is_taken_out(store: Path, array: str, damage: str) -> None:
    file = chunk(store, array, 3)
    DAMAGE[damage](file)
    assert found_by(store) == [(array, 3)]
    others = {name: data for name, data in bytes_of(store).items() if name not in (str(file.relative_to(store)), "zarr.json")}
    assert [(fault.array, fault.chunk) for fault in repair(store)] == [(array, 3)]
    left = bytes_of(store)
    root = json.loads(left.pop("zarr.json"))
    assert left == others
    assert root["attributes"]["complete"] is False
    with pytest.raises(InputError, match="unfinished"):
        ActivationStore.open(store)
    verdict = verify(store)  # what was taken out is to come, and no fault
    assert verdict.faults == []
    assert (verdict.shards, verdict.shards_done) == (SHARDS, SHARDS - 1)
    assert repair(store) == []


@pytest.mark.parametrize(
    ("damaged", "passes"),
    [
        ([(f"{RESID}/activations", 2)], 2),
        ([(f"{MLP}/checksums", SHARDS - 1)], 1),
        ([(f"{RESID}/norms", 0), (f"{MLP}/activations", 4)], 4),
        ([("tokens", 1)], 0),
        ([("documents", 0), ("offsets", 6), (f"{MLP}/norms", 5)], 2),
        ([(array, 3) for array in ARRAYS], 2),
    ],
    ids=["activations", "checksums of the last", "two shards", "tokens", "documents, offsets, norms", "all of a shard"],
)
def test_the_same_harvest_computes_the_damaged_shards_again_and_no_others(
    store: Path, again: Callable[..., ActivationStore], undisturbed: ActivationStore, captures: list[int],
    damaged: list[tuple[str, int]], passes: int,
) -> None:  # fmt: skip
    for number, (array, at) in enumerate(damaged):
        list(DAMAGE.values())[number % len(DAMAGE)](chunk(store, array, at))
    assert sorted(found_by(store)) == sorted(damaged)
    repair(store)
    captures.clear()
    again()
    assert len(captures) == passes
    assert_same_store(store, undisturbed.path)
    assert sorted(os.listdir(store.parent)) == ["activations"]


def test_chunks_swapped_with_one_another_are_found(
    store: Path, again: Callable[..., ActivationStore], undisturbed: ActivationStore, captures: list[int]
) -> None:
    """Each is whole in itself: only the list of block checksums knows where it belongs."""
    one, other = chunk(store, f"{RESID}/activations", 1), chunk(store, f"{RESID}/activations", 5)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    assert found_by(store) == [(f"{RESID}/activations", 1), (f"{RESID}/activations", 5)]
    assert "not those written here" in str(verify(store).faults[0])
    with pytest.raises(InputError, match="store repair"):
        ActivationStore.open(store).read(RESID, [16 * 16])
    repair(store)
    captures.clear()
    again()
    assert captures == [8] * 4
    assert_same_store(store, undisturbed.path)


def test_a_chunk_written_anew_with_other_values_is_found(store: Path) -> None:
    """Its own checksum is right, as a bug or a hand would leave it."""
    from activation_store.arrays import Array
    from activation_store.folders import LocalFolder

    array = Array.open(LocalFolder(store), f"{MLP}/activations")
    array.write(2, array.chunk(2) + np.float32(1))
    assert found_by(store) == [(f"{MLP}/activations", 2)]


def test_a_damaged_covariance_is_found_and_nothing_is_taken_out(store: Path) -> None:
    flip(store / RESID / "covariance" / "c" / "0" / "0")
    flip(chunk(store, "tokens", 3))
    before = bytes_of(store)
    assert found_by(store) == [("tokens", 3), (f"{RESID}/covariance", 0)]
    with pytest.raises(InputError, match="covariance"):
        repair(store)
    assert bytes_of(store) == before


def test_int8_scales_are_verified_too(again: Callable[..., ActivationStore]) -> None:
    store = again(dtype="int8").path
    before = bytes_of(store)
    flip(chunk(store, f"{RESID}/scales", 1))
    assert found_by(store) == [(f"{RESID}/scales", 1)]
    repair(store)
    again(dtype="int8")
    assert bytes_of(store) == before


# Unfinished stores


@pytest.fixture
def unfinished(again: Callable[..., ActivationStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Killed in its fourth shard, of which the activations of one hook are there."""
    with monkeypatch.context() as patch:
        kill_at_shard(patch, 3, after_first_hook=True)
        with pytest.raises(Killed):
            again()
    return tmp_path / "activations"


def test_of_an_unfinished_store_what_is_to_come_is_counted_and_no_fault(unfinished: Path) -> None:
    verdict = verify(unfinished)
    assert verdict.faults == []
    assert (verdict.shards, verdict.shards_done) == (SHARDS, 3)
    assert verdict.chunks == 3 * SHARDS + 3 * 6


def test_damage_in_an_unfinished_store_is_found_taken_out_and_made_good(
    unfinished: Path, again: Callable[..., ActivationStore], undisturbed: ActivationStore, captures: list[int]
) -> None:
    flip(chunk(unfinished, f"{MLP}/activations", 1))
    flip(chunk(unfinished, "tokens", 5))
    flip(chunk(unfinished, f"{RESID}/activations", 3))  # of the shard that is still to come: written over anyway
    assert found_by(unfinished) == [("tokens", 5), (f"{MLP}/activations", 1)]
    repair(unfinished)
    captures.clear()
    again()
    assert len(captures) == BATCHES - 2 * 2
    assert_same_store(unfinished, undisturbed.path)


def test_a_store_all_shards_of_which_are_done_but_not_finished(
    again: Callable[..., ActivationStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ActivationStore, "finish", kill)
    with pytest.raises(Killed):
        again()
    verdict = verify(tmp_path / "activations")
    assert (verdict.faults, verdict.shards_done) == ([], SHARDS)


# What is no store of ours


@pytest.mark.parametrize("act", [verify, repair, info])
def test_a_store_of_a_newer_version_is_refused_and_left_as_it_is(store: Path, act: Callable[[Path], object]) -> None:
    root = store / "zarr.json"
    root.write_text(root.read_text().replace('"schema": 2', '"schema": 3'))
    flip(chunk(store, "tokens", 0))
    before = bytes_of(store)
    with pytest.raises(InputError, match="schema 3, this version reads 2; update monosem"):
        act(store)
    assert bytes_of(store) == before


@pytest.mark.parametrize("act", [verify, repair, info])
def test_no_store_there(tmp_path: Path, act: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match="no activation store there"):
        act(tmp_path / "none")


def test_a_text_that_has_changed_cannot_restore_tokens(
    store: Path, again: Callable[..., ActivationStore], tiny_text: Path, tmp_path: Path
) -> None:
    flip(chunk(store, "tokens", 2))
    repair(store)
    before = bytes_of(store)
    lines = tiny_text.read_text()
    try:
        tiny_text.write_text(lines.replace("the", "teh"))
        with pytest.raises(InputError, match=r"data\.source.*no longer the text"):
            again()
    finally:
        tiny_text.write_text(lines)
    assert bytes_of(store) == before
    again()


# Facts


def test_info_tells_what_a_store_holds(undisturbed: ActivationStore) -> None:
    facts = info(undisturbed.path)
    wanted = {
        "path": str(undisturbed.path), "schema": 2, "complete": True, "sequences": 100, "context": 16, "rows": 1600,
        "shards": SHARDS, "shards_done": SHARDS, "claims": 0,
    }  # fmt: skip
    assert {name: facts[name] for name in wanted} == wanted
    for hook, width in ((RESID, 32), (MLP, 64)):
        found = undisturbed.statistics(hook)
        assert facts[hook] == {
            "width": width, "dtype": "float32", "rows": found.rows, "mean_norm": found.mean_norm,
            "median_norm": found.median_norm, "max_norm": found.max_norm,
        }  # fmt: skip
    assert facts["train_sequences"] + facts["held_out_sequences"] == 100
    assert facts["left_out_special_tokens"] > 0
    assert 0.9 < facts["shuffle_entropy_share_of_ideal"] <= 1.1
    size = sum(file.stat().st_size for file in undisturbed.path.rglob("c/**/*") if file.is_file())
    covariances = sum(side * side * 4 + 4 for side in (32, 64))
    assert facts["bytes_when_whole"] == size - covariances


def test_info_of_an_unfinished_store_says_how_far_it_is(unfinished: Path) -> None:
    (unfinished.with_name("activations.journal") / "shard-000003.claim").write_text("{}")
    facts = info(unfinished)
    assert (facts["complete"], facts["shards_done"], facts["claims"]) == (False, 3, 1)
    assert not [name for name in facts if name.startswith("shuffle")]


# The command line


def monosem(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[object, str, str]:
    monkeypatch.setattr(sys, "argv", ["monosem", *map(str, words)])
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error:")]


def test_verify_and_repair_on_the_command_line(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = monosem(capsys, monkeypatch, "store", "verify", store)
    assert (code, "all as written" in out, "unfinished" in out) == (0, True, False)
    code, out, _ = monosem(capsys, monkeypatch, "store", "repair", store)
    assert (code, "nothing to repair" in out) == (0, True)
    flip(chunk(store, f"{RESID}/norms", 4))
    cut(chunk(store, f"{MLP}/activations", 6))
    code, out, err = monosem(capsys, monkeypatch, "store", "verify", store)
    assert code == 2
    assert f"{RESID}/norms chunk 4: checksum does not match" in out
    assert f"{MLP}/activations chunk 6: " in out
    assert errors(err) == [f"error: {store}: 2 damaged chunks; `monosem store repair {store}` takes them out"]
    assert "Traceback" not in err
    code, out, _ = monosem(capsys, monkeypatch, "store", "repair", store)
    assert (code, "2 chunks taken out" in out) == (0, True)
    code, out, _ = monosem(capsys, monkeypatch, "store", "verify", store)
    assert (code, "unfinished, 2 shards are still to come" in out) == (0, True)


def test_info_on_the_command_line(store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = monosem(capsys, monkeypatch, "store", "info", store)
    assert code == 0
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("rows ")] == ["1,600"]


@pytest.mark.parametrize("verb", ["verify", "repair", "info"])
@pytest.mark.parametrize("what", ["nothing there", "a newer version", "no metadata"])
def test_bad_input_is_one_line_and_exit_code_2(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str, what: str
) -> None:
    root = store / "zarr.json"
    if what == "nothing there":
        shutil.rmtree(store)
    elif what == "a newer version":
        root.write_text(root.read_text().replace('"schema": 2', '"schema": 3'))
    else:
        root.write_text("{")
    code, _, err = monosem(capsys, monkeypatch, "store", verb, store)
    assert (code, len(errors(err)), str(store) in err, "Traceback" in err) == (2, 1, True, False)


def test_after_repair_in_a_run_folder_the_harvest_fills_in_though_it_was_done(
    tiny_model_dir: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({
        "name": "tiny",
        "model": {"id": str(tiny_model_dir), "dtype": "float32", "device": "cpu"},
        "data": {"source": str(tiny_text), "context": 16, "tokens": 1600, "held_out": 0.2},
        "harvest": {"hooks": [RESID], "dtype": "bfloat16", "batch_size": 8, "shard_mb": 0.01},
        "train": {"d_sae": 64, "steps": 10},
        "explain": {"window": 8},
    }))  # fmt: skip
    words = ("harvest", config, f"runs_dir={tmp_path}")
    code, _, err = monosem(capsys, monkeypatch, *words)
    assert code == 0, err
    activations = tmp_path / "tiny" / "activations"
    before = bytes_of(activations)
    code, out, _ = monosem(capsys, monkeypatch, *words)
    assert (code, "done already" in out) == (0, True)
    flip(chunk(activations, f"{RESID}/activations", 1))
    flip(chunk(activations, "offsets", 0))
    code, out, _ = monosem(capsys, monkeypatch, "store", "repair", activations)
    assert (code, "2 chunks taken out" in out) == (0, True)
    code, _, err = monosem(capsys, monkeypatch, "train", config, f"runs_dir={tmp_path}")
    assert (code, "run `monosem harvest` with this config first" in err) == (2, True)
    code, out, err = monosem(capsys, monkeypatch, *words)
    assert (code, "done already" in out) == (0, False), err
    assert bytes_of(activations) == before
    assert not (tmp_path / "tiny" / "activations.journal").exists()
    code, out, _ = monosem(capsys, monkeypatch, *words)
    assert (code, "done already" in out) == (0, True)
