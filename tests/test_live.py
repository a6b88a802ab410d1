"""Batches without a store: the same rows as a stored harvest, in an order that any process can take up again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from harvests import MLP, RESID, Killed, kill_at_shard, run_harvest, settings
from torch import Tensor

from activation_store import ActivationStore, InputError, ModelConfig
from activation_store.live import LiveActivations, RecycledStore, stream_activations
from activation_store.subject import Subject, load_subject
from monosem.cli import main

pytest_plugins = ["harvests"]
SHARD_BYTES = 16 * 16 * (32 + 64) * 4 + 2 * 16 * 16 * 4 + 2 * 4 + 6 * 4  # of float32: rows, norms, one block checksum, six crc32c
BUDGET = 3 * SHARD_BYTES / 1e9
WAYS = ["live", "recycled"]


def stream(subject: Subject, text: Path, folder: Path, way: str, **changes: Any) -> LiveActivations | RecycledStore:
    """The source of batches of a streamed run over the text of `run_harvest`."""
    budget = changes.pop("budget", BUDGET) if way == "recycled" else None
    data, config, rest = settings(text, {**changes, "stream": True, "disk_budget_gb": budget})
    return stream_activations(rest.pop("subject", subject), data, config, recycle_in=folder, **rest)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(subject: Subject, tiny_text: Path, tmp_path: Path, way: str) -> LiveActivations | RecycledStore:
    return stream(subject, tiny_text, tmp_path / "recycled", way)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    pools = ("store-read", "zarr_io", "sae-ops")  # that live as long as their folder, or as the process, and wait
    assert [thread.name for thread in threading.enumerate() if thread not in before and not thread.name.startswith(pools)] == []


def numbered(batches: Any) -> tuple[np.ndarray, Tensor]:
    """All rows of an epoch by their number in the store, and what was drawn for each."""
    return np.concatenate(list(batches.row_numbers())), torch.cat(list(batches))


def files_bytes(folder: Path) -> int:
    """What the activations in a recycled store take: all that is there but tokens and metadata."""
    files = [file for hook in (RESID, MLP) for file in (folder / hook).rglob("*") if file.is_file() and file.name != "zarr.json"]
    return sum(file.stat().st_size for file in files)


# The rows


def test_every_row_is_that_of_a_stored_harvest_and_comes_once_an_epoch(
    source: LiveActivations | RecycledStore, undisturbed: ActivationStore
) -> None:
    for hook, split in ((RESID, "train"), (MLP, "held_out")):
        batches = source.batches(hook, 64, seed=1, split=split, memory_mb=0.05)
        rows, found = numbered(batches)
        border = undisturbed.train_sequences * 16
        inside = np.arange(1600) < border if split == "train" else np.arange(1600) >= border
        assert sorted(rows) == np.flatnonzero(inside & ~undisturbed.special.reshape(-1)).tolist()
        assert len(rows) == batches.rows
        torch.testing.assert_close(found, undisturbed.read(hook, rows), rtol=1e-5, atol=1e-5)
        assert not np.array_equal(rows, np.sort(rows))


def test_the_facts_are_those_of_a_stored_harvest(
    source: LiveActivations | RecycledStore, undisturbed: ActivationStore
) -> None:
    for name in ("hooks", "rows", "context", "train_sequences"):
        assert getattr(source, name) == getattr(undisturbed, name)
    assert (source.width(MLP), source.dtype(MLP)) == (64, "float32")
    for name in ("model", "model_revision", "tokenizer_hash", "special_token_ids", "data"):
        assert source.attrs[name] == undisturbed.attrs[name]
    assert np.array_equal(source.tokens, undisturbed.tokens)
    assert np.array_equal(source.documents, undisturbed.documents)


def test_several_hooks_are_drawn_in_step(source: LiveActivations | RecycledStore, undisturbed: ActivationStore) -> None:
    batches = source.batches((RESID, MLP), 50)
    for rows, (resid, mlp) in zip(batches.row_numbers(), batches, strict=True):
        torch.testing.assert_close(resid, undisturbed.read(RESID, rows), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mlp, undisturbed.read(MLP, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rounded_dtypes(
    subject: Subject, tiny_text: Path, tmp_path: Path, way: str, dtype: str
) -> None:
    """A recycled shard is computed in the batches of a stored one: equal bits. A live one is not: a step of rounding."""
    stored = run_harvest(subject, tiny_text, tmp_path / "stored", {"dtype": dtype})
    source = stream(subject, tiny_text, tmp_path / "recycled", way, dtype=dtype)
    rows, found = numbered(source.batches(RESID, 64))
    expected = stored.read(RESID, rows)
    if way == "recycled":
        assert torch.equal(found, expected)
    elif dtype == "bfloat16":
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)  # one unit in the last place
        assert (found == expected).float().mean() > 0.99
    else:
        step = expected.abs().amax(1, keepdim=True) / 127
        assert ((found - expected).abs() <= 1.01 * step).all()
        assert torch.isclose(found, expected, rtol=1e-5, atol=1e-6).float().mean() > 0.99


def test_statistics_are_those_of_the_first_training_sequences(
    source: LiveActivations | RecycledStore, undisturbed: ActivationStore
) -> None:
    kept = ~undisturbed.special.reshape(-1)[: 64 * 16]
    x = undisturbed.read(RESID, slice(0, 64 * 16)).numpy()[kept].astype(np.float64)
    found = source.statistics(RESID)
    assert found.rows == len(x)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.mean_norm, np.linalg.norm(x, axis=1).mean(), rtol=1e-5)


# Seek


@pytest.mark.parametrize("first", [0, 1, 7, 40])
@pytest.mark.parametrize("limit", [None, 1.3])
def test_a_batch_does_not_depend_on_where_reading_began_nor_on_what_was_drawn_before(
    subject: Subject, tiny_text: Path, tmp_path: Path, way: str, first: int, limit: float | None
) -> None:
    """Two sources of equal settings, as two processes would have them; 40 batches of 64 reach into the third epoch."""

    def drawn(start: int, count: int, folder: str) -> list[Tensor]:
        source = stream(subject, tiny_text, tmp_path / folder, way)
        batches = source.batches(RESID, 64, seed=5, memory_mb=0.05, max_norm_multiple=limit).stream(start)
        found = [next(batches) for _ in range(count)]
        batches.close()  # type: ignore[attr-defined]
        return found

    whole = drawn(0, first + 3, "one")
    for one, other in zip(drawn(first, 3, "other"), whole[first:], strict=True):
        assert torch.equal(one, other)


# Filters


def test_rows_above_the_limit_give_their_place_to_others(
    source: LiveActivations | RecycledStore, undisturbed: ActivationStore
) -> None:
    multiple = 1.3
    limit = source.norm_limit(RESID, multiple)
    kept = ~undisturbed.special.reshape(-1)[: undisturbed.train_sequences * 16]
    norms = undisturbed.norms(RESID)[: len(kept)][kept]
    loud = int((norms > limit).sum())
    assert 20 < loud < len(norms) / 2  # or this test shows nothing
    batches = source.batches(RESID, 64, max_norm_multiple=multiple, memory_mb=0.05)
    plain = source.batches(RESID, 64, memory_mb=0.05)
    found = list(batches)
    assert [len(x) for x in found] == [len(x) for x in plain]
    assert max(x.norm(dim=1).max().item() for x in found) <= limit * (1 + 1e-6)
    assert batches.left_out["norm_outliers"] == loud
    assert batches.left_out["special_tokens"] == plain.left_out["special_tokens"] > 0
    unchanged = sum(int((a == b).all(1).sum()) for a, b in zip(found, plain, strict=True))
    assert unchanged == len(norms) - loud  # every other row has the place it would have had


def test_a_limit_that_no_row_keeps_is_refused(source: LiveActivations | RecycledStore) -> None:
    with pytest.raises(InputError, match=r"max_norm_multiple.*above the limit"):
        next(iter(source.batches(RESID, 64, max_norm_multiple=1e-3)))


@pytest.mark.parametrize("what", ["nan", "float16"])
def test_values_that_a_dtype_cannot_hold_are_bad_input(
    tiny_model_dir: Path, tiny_text: Path, tmp_path: Path, way: str, what: str
) -> None:
    broken = load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu"))
    with torch.no_grad():
        if what == "nan":
            broken.model.model.layers[0].mlp.down_proj.weight[3, 3] = float("nan")
        else:
            broken.model.model.embed_tokens.weight.mul_(1e6)
    dtype = "float32" if what == "nan" else "float16"
    said = r"model\.id: .* itself gives nan at" if what == "nan" else r"harvest\.dtype: float16 does not hold"
    source = stream(broken, tiny_text, tmp_path / "recycled", way, dtype=dtype)
    with pytest.raises(InputError, match=said):
        list(source.batches(RESID, 64))


def test_a_hook_that_is_not_harvested_is_refused(source: LiveActivations | RecycledStore) -> None:
    with pytest.raises(InputError, match=r"blocks\.0\.hook_resid_post.*not harvested"):
        source.batches("blocks.0.hook_resid_post")


# What lies on disk


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_the_budget_is_never_exceeded(subject: Subject, tiny_text: Path, tmp_path: Path, shards: int) -> None:
    budget = shards * SHARD_BYTES
    source = stream(subject, tiny_text, tmp_path / "recycled", "recycled", budget=budget / 1e9)
    assert isinstance(source, RecycledStore)
    most = 0
    for _ in source.batches(RESID, 32, epochs=2, memory_mb=0.1):
        most = max(most, files_bytes(tmp_path / "recycled"))
        assert most <= budget
    assert most > budget - SHARD_BYTES  # and it is made use of
    assert source.computed > 5  # of the split's five, some came twice


def test_a_budget_for_everything_computes_each_shard_once(subject: Subject, tiny_text: Path, tmp_path: Path) -> None:
    source = stream(subject, tiny_text, tmp_path / "recycled", "recycled", budget=1.0)
    assert isinstance(source, RecycledStore)
    list(source.batches(RESID, 64, epochs=3))
    held = -(-source.train_sequences // 16)
    assert source.computed == held


@pytest.mark.parametrize("shards", [0.5, 1.9])
def test_a_budget_below_two_shards_is_refused_in_one_line(
    subject: Subject, tiny_text: Path, tmp_path: Path, shards: float
) -> None:
    with pytest.raises(InputError, match=r"harvest\.disk_budget_gb.*at least two shards") as error:
        stream(subject, tiny_text, tmp_path / "recycled", "recycled", budget=shards * SHARD_BYTES / 1e9)
    assert "\n" not in str(error.value)


def test_after_a_restart_shards_are_used_again_and_leftovers_are_gone(
    subject: Subject, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recycled"
    source = stream(subject, tiny_text, folder, "recycled")
    with monkeypatch.context() as patch:
        kill_at_shard(patch, 3, after_first_hook=True)
        with pytest.raises(Killed):
            list(source.batches(RESID, 64))
    (folder / RESID / "activations" / "c" / ".0~elsewhere~1-0.tmp").write_bytes(b"half of it")
    again = stream(subject, tiny_text, folder, "recycled")
    assert isinstance(again, RecycledStore)
    whole = [shard for shard in range(again.shards) if all(array.present(shard) for array in again.shard_arrays())]
    assert len(whole) in (2, 3)  # the third may have made room for the fourth
    assert files_bytes(folder) - 10 <= len(whole) * SHARD_BYTES  # what was half there is not
    list(again.batches(RESID, 64))
    shards = -(-again.train_sequences // 16)
    assert again.computed <= shards - 1
    assert files_bytes(folder) - 10 <= BUDGET * 1e9


def test_a_smaller_budget_after_a_restart_is_kept_from_the_start(subject: Subject, tiny_text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recycled"
    list(stream(subject, tiny_text, folder, "recycled", budget=6 * SHARD_BYTES / 1e9).batches(RESID, 64))
    assert files_bytes(folder) > 2 * SHARD_BYTES
    stream(subject, tiny_text, folder, "recycled", budget=2 * SHARD_BYTES / 1e9)
    assert files_bytes(folder) == 2 * SHARD_BYTES


def test_other_settings_begin_the_recycled_store_anew(subject: Subject, tiny_text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recycled"
    list(stream(subject, tiny_text, folder, "recycled").batches(RESID, 64))
    source = stream(subject, tiny_text, folder, "recycled", seed=1)
    assert files_bytes(folder) == 0
    stored = run_harvest(subject, tiny_text, tmp_path / "stored", {"seed": 1})
    rows, found = numbered(source.batches(RESID, 64))
    assert torch.equal(found, stored.read(RESID, rows))


def test_a_kill_while_the_recycled_store_is_laid_out_starts_afresh(
    subject: Subject, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = os.replace, [0]

    def replace(source: Any, target: Any) -> None:
        written[0] += "recycled" in str(target)
        if written[0] == 8:
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            stream(subject, tiny_text, tmp_path / "recycled", "recycled")
    assert list((tmp_path / "recycled").rglob("*"))
    assert len(list(stream(subject, tiny_text, tmp_path / "recycled", "recycled").batches(RESID, 64))) > 10
    assert [file.name for file in tmp_path.iterdir()] == ["recycled"]


def test_live_activations_write_nothing(subject: Subject, tiny_text: Path, tmp_path: Path) -> None:
    list(stream(subject, tiny_text, tmp_path / "recycled", "live").batches(RESID, 64))
    assert list(tmp_path.iterdir()) == []


def test_a_recycled_store_needs_a_folder(subject: Subject, tiny_text: Path) -> None:
    data, config, _ = settings(tiny_text, {"stream": True, "disk_budget_gb": 1})
    with pytest.raises(InputError, match="recycle_in"):
        stream_activations(subject, data, config)


# Threads


def test_threads_end_with_the_iteration_wherever_it_is_left(source: LiveActivations | RecycledStore) -> None:
    source.in_background = True  # as on a GPU; `no_thread_left` looks afterwards
    batches = source.batches(RESID, 32, memory_mb=0.05)
    plain = torch.cat(list(batches))
    for count in (0, 1, 5):
        drawing = iter(batches)
        found = [next(drawing) for _ in range(count)]
        drawing.close()  # type: ignore[attr-defined]
        assert all(torch.equal(x, plain[i * 32 : (i + 1) * 32]) for i, x in enumerate(found))


def test_an_error_of_the_model_ends_the_threads_and_arrives(
    source: LiveActivations | RecycledStore, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    source.in_background = True
    monkeypatch.setattr(subject.model.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(iter(source.batches(RESID, 32)))


# Whole runs


@pytest.fixture(scope="module")
def streamed_config(tiny_model_dir: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {
        "name": "tiny",
        "seed": 3,
        "model": {"id": str(tiny_model_dir), "dtype": "float32", "device": "cpu"},
        "data": {"source": str(tiny_text), "context": 16, "tokens": 6000, "held_out": 0.2},
        "harvest": {"hooks": [RESID], "dtype": "bfloat16", "batch_size": 8, "shard_mb": 0.02, "stream": True,
                    "stored_tokens": 1600},
        "train": {"d_sae": 64, "l1_coefficient": 0.5, "lr": 3e-3, "steps": 200, "batch_size": 128, "log_every": 20,
                  "checkpoint_every": 20, "dead_window_tokens": 5000, "shuffle_mb": 0.1, "max_norm_multiple": 3},
        "evaluate": {"ce_sequences": 6},
        "explain": {"window": 8},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def done(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Run the command line in this process, which has done the slow imports."""
    monkeypatch.setattr(sys, "argv", ["monosem", *words])
    main()


@pytest.mark.parametrize("budget", [None, 5e-5], ids=["live", "recycled"])
def test_a_streamed_run_trains_evaluates_and_after_sigkill_goes_on_bit_for_bit(
    streamed_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: float | None
) -> None:
    def words(stage: str, run: Path) -> list[str]:
        changes = [] if budget is None else [f"harvest.disk_budget_gb={budget}"]
        return [stage, str(streamed_config), f"runs_dir={run.parent}", *changes]

    whole, cut = tmp_path / "whole" / "tiny", tmp_path / "cut" / "tiny"
    done(monkeypatch, words("harvest", whole))
    shutil.copytree(whole, cut)
    process = subprocess.Popen(
        [sys.executable, "-m", "monosem", *words("train", cut)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    while process.poll() is None and not any((cut / "checkpoints").glob("step-*")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it had ended before the kill"
    for run in (whole, cut):
        done(monkeypatch, words("train", run))
    for name in ("sae_weights.safetensors", "cfg.json"):
        assert (cut / "sae" / name).read_bytes() == (whole / "sae" / name).read_bytes()

    assert ActivationStore.open(whole / "activations").train_sequences == 100  # a sample, of 300
    assert (whole / "recycled").exists() == (budget is not None)
    if budget is not None:
        assert 0 < files_bytes(whole / "recycled") <= budget * 1e9
        assert not (whole / "recycled.journal").exists()
    done(monkeypatch, words("evaluate", cut))
    assert json.loads((cut / "evaluation.json").read_text())["explained_variance"] > 0.3
