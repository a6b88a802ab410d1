"""Harvest: what stands in the store is what a plain forward pass gives, and a kill at any moment changes no byte of it."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import activation_store.harvest as harvest_module
from activation_store import ActivationStore, DataConfig, HarvestConfig, InputError, ModelConfig
from activation_store.harvest import harvest, hook_widths
from activation_store.hooks import locate_hooks
from activation_store.subject import Subject, empty_subject_model, load_subject, model_folder, tokenizer_hash

ROOT = Path(__file__).resolve().parent.parent
GGUF = ROOT / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"
RESID, MLP = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"
SEQUENCES, BATCH, SHARD = 100, 8, 16  # of the stores made here: 7 shards of 2 batches, the last of half a batch
SHARDS, BATCHES = 7, 13


@pytest.fixture(scope="module")
def subject(tiny_model_dir: Path) -> Subject:
    return load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu"))


def run_harvest(subject: Subject, text: Path, path: Path, changes: dict[str, Any]) -> ActivationStore:
    """A harvest of 1600 tokens with any setting changed."""
    data: dict[str, Any] = {"source": str(text), "context": 16, "tokens": SEQUENCES * 16, "held_out": 0.2}
    config: dict[str, Any] = {"hooks": (RESID, MLP), "dtype": "float32", "batch_size": BATCH, "shard_mb": 0.07}
    data |= {key: changes[key] for key in changes if key in data}
    config |= {key: changes[key] for key in changes if key in config}
    rest = {key: changes[key] for key in changes if key not in data and key not in config}
    return harvest(rest.pop("subject", subject), DataConfig(**data), HarvestConfig(**config), path, **rest)


@pytest.fixture(scope="module")
def undisturbed(subject: Subject, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """What a harvest that nothing happened to leaves."""
    store = run_harvest(subject, tiny_text, tmp_path_factory.mktemp("undisturbed") / "activations", {})
    assert [store.shard_sequences(shard) for shard in (0, SHARDS - 1)] == [slice(0, SHARD), slice(96, SEQUENCES)]
    return store


@pytest.fixture
def again(subject: Subject, tiny_text: Path, tmp_path: Path) -> Callable[..., ActivationStore]:
    """The harvest that made `undisturbed`, in a folder of this test's own, with any setting changed."""

    def run(path: Path = tmp_path / "activations", **changes: Any) -> ActivationStore:
        return run_harvest(subject, tiny_text, path, changes)

    return run


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each forward pass that a harvest makes."""
    seen: list[int] = []
    real = harvest_module.capture

    def counting(model: Any, sites: Any, tokens: Tensor) -> dict[str, Tensor]:
        seen.append(len(tokens))
        return real(model, sites, tokens)

    monkeypatch.setattr(harvest_module, "capture", counting)
    return seen


def bytes_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def assert_same_store(found: Path, expected: Path) -> None:
    one, other = bytes_of(found), bytes_of(expected)
    assert set(other) <= set(one)
    different = [name for name in other if one[name] != other[name]]
    assert not different


# What stands in it


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path, tiny_store: ActivationStore) -> dict[str, Tensor]:
    """The same activations from a transformers model and forward hooks of our own, 75 sequences at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    mlp = model.model.layers[1].mlp
    given: list[Tensor] = []
    mlp.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    resid, post = [], []
    with torch.no_grad():
        for tokens in torch.from_numpy(tiny_store.tokens).long().split(75):
            out = model(input_ids=tokens, output_hidden_states=True)
            resid.append(out.hidden_states[2].flatten(0, 1))  # [0] is the embedding, [2] what block 1 leaves
            x = given.pop().flatten(0, 1)
            gate = mlp.gate_proj(x)
            post.append(gate * torch.sigmoid(gate) * mlp.up_proj(x))
    return {RESID: torch.cat(resid), MLP: torch.cat(post)}


@pytest.mark.parametrize("hook", [RESID, MLP])
def test_every_row_is_the_activation_of_its_token(
    tiny_store: ActivationStore, plain: dict[str, Tensor], hook: str
) -> None:
    found = tiny_store.read(hook, slice(None))
    assert found.shape == plain[hook].shape == (6000, 32 if hook == RESID else 64)
    torch.testing.assert_close(found, plain[hook], rtol=1e-5, atol=1e-5)
    assert found.std(dim=0).min() > 1e-2  # each coordinate says something


@pytest.mark.parametrize("hook", [RESID, MLP])
def test_statistics_are_those_of_the_rows_that_are_not_special(tiny_store: ActivationStore, hook: str) -> None:
    x = tiny_store.read(hook, slice(None)).numpy().astype(np.float64)
    x = x[~np.isin(tiny_store.tokens.reshape(-1), [0, 1])]
    assert len(x) < 6000
    norm = np.linalg.norm(x, axis=1)
    found = tiny_store.statistics(hook)
    assert found.rows == len(x)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.mean_norm, norm.mean(), rtol=1e-6)
    np.testing.assert_allclose(found.mean_square_norm, (norm**2).mean(), rtol=1e-6)
    np.testing.assert_allclose(found.max_norm, norm.max(), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_hold_the_rounded_values(
    again: Callable[..., ActivationStore], undisturbed: ActivationStore, dtype: str
) -> None:
    store = again(dtype=dtype)
    step = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]  # half a unit in the last place, of values 2 to 4 times it
    for hook in (RESID, MLP):
        found = store.read(hook, slice(None))
        torch.testing.assert_close(found, undisturbed.read(hook, slice(None)), rtol=step, atol=1e-7)
        assert store.dtype(hook) == dtype
        kept = found[~torch.from_numpy(store.special.reshape(-1))].double()
        np.testing.assert_allclose(store.statistics(hook).mean, kept.mean(0), rtol=1e-6, atol=1e-7)


def test_a_bfloat16_model_is_read_as_bfloat16(
    again: Callable[..., ActivationStore], undisturbed: ActivationStore, tiny_model_dir: Path
) -> None:
    low = load_subject(ModelConfig(id=str(tiny_model_dir), device="cpu"))
    assert low.model.dtype == torch.bfloat16
    found = again(subject=low).read(RESID, slice(None))
    expected = undisturbed.read(RESID, slice(None))
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert 1e-4 < error.mean() < 0.02
    assert torch.equal(found.bfloat16().float(), found)


def test_several_hooks_are_aligned(again: Callable[..., ActivationStore]) -> None:
    """Of one row: what block 1 leaves is what block 2 takes, and is what stood in its middle plus what its MLP adds."""
    names = ("blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid", RESID)
    store = again(hooks=names)
    assert set(store.hooks) == set(names)
    after, out, middle, post = (store.read(name, slice(None)) for name in names)
    assert torch.equal(after, post)
    torch.testing.assert_close(middle + out, post, rtol=1e-5, atol=1e-5)
    assert torch.unique(post, dim=0).shape[0] > 1000  # of 1600; the BOS rows are all alike


def test_hooks_keep_the_order_of_the_config(tiny_store: ActivationStore) -> None:
    assert tiny_store.hooks == [RESID, MLP]


def test_the_store_says_what_it_is_made_of(tiny_store: ActivationStore, subject: Subject, tiny_text: Path) -> None:
    attrs = tiny_store.attrs
    assert tiny_store.shards == 8
    assert tiny_store.shard_sequences(7) == slice(336, 375)
    assert (tiny_store.train_sequences, tiny_store.context, tiny_store.rows) == (300, 16, 6000)
    assert attrs["model"] == subject.config.id
    assert (attrs["model_dtype"], attrs["basis"], attrs["seed"]) == ("float32", "raw", 0)
    assert attrs["special_token_ids"] == [0, 1]
    assert attrs["tokenizer_hash"] == tokenizer_hash(subject.tokenizer)
    assert attrs["data"]["source"] == str(tiny_text)
    assert (tiny_store.tokens[:, 0] == subject.tokenizer.bos_token_id).all()


def test_the_tokens_are_the_text(tiny_store: ActivationStore, subject: Subject, tiny_text: Path) -> None:
    texts = [json.loads(line)["text"] for line in tiny_text.read_text().splitlines()]
    for rows in (tiny_store.tokens[:300], tiny_store.tokens[300:]):
        pieces = subject.tokenizer.decode(rows[:, 1:].reshape(-1).tolist()).split("</s>")
        assert len(pieces) > 20
        assert set(pieces[:-1]) <= set(texts)


def test_progress_counts_tokens_to_the_end(again: Callable[..., ActivationStore]) -> None:
    seen: list[tuple[int, int]] = []
    again(progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 1600)
    assert seen == sorted(seen)
    assert seen[-1] == (1600, 1600)
    assert len(seen) > BATCHES


# Before anything runs


def test_a_misspelled_hook_is_refused_before_text_or_model_are_touched(
    again: Callable[..., ActivationStore], subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(subject.model, "forward", fail)
    monkeypatch.setattr(harvest_module, "token_rows", fail)
    with pytest.raises(InputError, match=r"blocks\.1\.hook_resid_pots.*nearest.*blocks\.1\.hook_resid_post"):
        again(hooks=(MLP, "blocks.1.hook_resid_pots"))
    assert os.listdir(tmp_path) == []


def test_text_that_cannot_be_read_is_refused_before_the_model_runs(
    again: Callable[..., ActivationStore], captures: list[int], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"data\.source"):
        again(source=str(tmp_path / "none.jsonl"))
    assert sum(captures) <= 2  # a few tokens tell the hooks' widths
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("hook", ["rotary_emb.hook_out", "hook_pos_embed"])
def test_a_hook_without_a_row_a_token_is_refused(again: Callable[..., ActivationStore], hook: str, tmp_path: Path) -> None:
    """The rotary table is one for all sequences, so row i of it is not token i of the text."""
    with pytest.raises(InputError, match=hook):
        again(hooks=(hook, RESID))
    assert os.listdir(tmp_path) == []


def test_widths_come_from_a_model_without_weights(tiny_model_dir: Path) -> None:
    model = empty_subject_model(ModelConfig(id=str(tiny_model_dir)))
    names = ("blocks.0.hook_resid_post", "blocks.2.mlp.hook_post", "blocks.1.attn.hook_z", "blocks.1.attn.hook_k")
    widths = hook_widths(model, locate_hooks(model, names), "meta")
    assert widths == dict(zip(names, (32, 64, 32, 16), strict=True))


# Killed and resumed


class Killed(BaseException):
    """What stands for a kill: nothing of ours catches it."""


def kill_at_shard(monkeypatch: pytest.MonkeyPatch, count: int, *, after_first_hook: bool = False) -> None:
    """Let `count` shards be written, then die in the next (with the first of its hooks already on disk)."""
    real, written = ActivationStore.write_shard, [0]

    def write_shard(self: ActivationStore, shard: int, activations: dict[str, Tensor]) -> None:
        if written[0] == count:
            if after_first_hook:
                real(self, shard, dict([next(iter(activations.items()))]))
            raise Killed
        written[0] += 1
        real(self, shard, activations)

    monkeypatch.setattr(ActivationStore, "write_shard", write_shard)


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


def kill(*_args: Any, **_kwargs: Any) -> None:
    raise Killed


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


@pytest.mark.parametrize(
    "change", [{"hooks": ("blocks.0.hook_resid_post",)}, {"tokens": 800}, {"dtype": "bfloat16"}, {"seed": 1}], ids=str
)
def test_what_was_begun_with_other_settings_is_not_passed_off_as_these(
    again: Callable[..., ActivationStore], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        kill_at_shard(patch, 2)
        with pytest.raises(Killed):
            again()
    try:
        store = again(**change)
    except InputError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017 (to refuse is right, to start afresh would be too)
        return
    assert_same_store(store.path, again(tmp_path / "fresh", **change).path)


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


# What cannot be stored


def test_values_beyond_float16_are_bad_input_with_a_mend(
    again: Callable[..., ActivationStore], tiny_model_dir: Path
) -> None:
    """Residual streams do exceed 65504 in large models; infinities in a store are no activations."""
    large = load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu"))
    with torch.no_grad():
        large.model.model.embed_tokens.weight.mul_(1e6)
    with pytest.raises(InputError, match=r"harvest\.dtype.*float16"):
        again(subject=large, dtype="float16")


def test_values_that_are_not_numbers_are_bad_input(again: Callable[..., ActivationStore], tiny_model_dir: Path) -> None:
    broken = load_subject(ModelConfig(id=str(tiny_model_dir), dtype="float32", device="cpu"))
    with torch.no_grad():
        broken.model.model.layers[0].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(InputError, match=r"(?i)nan|not finite|infinite"):
        again(subject=broken)


# The subject model


def one_line(config: ModelConfig) -> str:
    with pytest.raises(InputError) as error:
        load_subject(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("id_", ["/no/such/folder", "no-such-org/no-such-model", "nosuchmodel", "a/b/c"])
def test_a_model_that_is_not_there(id_: str) -> None:
    message = one_line(ModelConfig(id=id_, device="cpu"))
    assert message.startswith("model.id")
    assert repr(id_) in message


def damage(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "config is no json":
        (folder / "config.json").write_text("{")
    elif kind == "unknown architecture":
        (folder / "config.json").write_text('{"model_type": "quux"}')
    elif kind == "no weights":
        weights.unlink()
    elif kind == "weights cut off":
        os.truncate(weights, weights.stat().st_size // 2)
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    "kind",
    ["empty folder", "no config", "config is no json", "unknown architecture", "no weights", "weights cut off", "no tokenizer"],
)
def test_a_model_folder_that_cannot_be_read(tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    damage(folder, kind)
    message = one_line(ModelConfig(id=str(folder), device="cpu"))
    assert message.startswith("model.id")
    assert str(folder) in message


def test_missing_weights_are_not_made_up(tiny_model_dir: Path, tmp_path: Path) -> None:
    """transformers fills a missing tensor with random numbers and a warning; a harvest of those would be worthless."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.down_proj.weight" in one_line(ModelConfig(id=str(folder), device="cpu"))


@pytest.mark.parametrize("device", ["cuda:77", "abacus"])
def test_a_device_that_is_not_there(tiny_model_dir: Path, device: str) -> None:
    message = one_line(ModelConfig(id=str(tiny_model_dir), device=device))
    assert message.startswith("model.device")
    assert device in message


def test_a_gguf_that_is_not_there_or_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOSEM_CACHE", str(tmp_path / "cache"))
    assert "none.gguf" in one_line(ModelConfig(id=str(tmp_path / "none.gguf"), device="cpu"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    assert str(tmp_path / "x.gguf") in one_line(ModelConfig(id=str(tmp_path / "x.gguf"), device="cpu"))
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_a_revision_is_a_hash_of_the_weights(subject: Subject, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = ModelConfig(id=str(folder), dtype="float32", device="cpu")
    assert load_subject(config).revision == subject.revision
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    changed = load_subject(config)
    assert changed.revision != subject.revision
    assert tokenizer_hash(changed.tokenizer) == tokenizer_hash(subject.tokenizer)


def test_the_model_is_raw_frozen_and_in_eval_mode(subject: Subject) -> None:
    assert subject.facts()["basis"] == "raw"
    assert not subject.model.training
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    assert subject.device.type == "cpu"


# GGUF


@pytest.fixture(scope="module")
def demo_subject(demo_model_dir: Path) -> Subject:
    assert demo_model_dir.is_dir()
    return load_subject(ModelConfig(id=str(GGUF), dtype="float32", device="cpu"))


def test_a_gguf_holds_the_weights_that_the_gguf_package_reads(demo_subject: Subject) -> None:
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(GGUF).tensors}
    weights = dict(demo_subject.model.named_parameters())
    same = {  # query and key weights are stored in another order of rows, so they stand in the next test
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.9.ffn_down.weight": "model.layers.9.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
    }
    for theirs, ours in same.items():
        tensor = reader[theirs]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(weights[ours].numpy(), expected.reshape(weights[ours].shape))


def test_a_gguf_speaks(demo_subject: Subject) -> None:
    tokens = demo_subject.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = demo_subject.model(input_ids=tokens).logits[0, -1].argmax()
    assert demo_subject.tokenizer.decode(best) == " Paris"


def test_a_gguf_is_converted_once_and_says_where_it_came_from(
    demo_subject: Subject, demo_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", kill)
    assert Path(model_folder(ModelConfig(id=str(GGUF)))) == demo_model_dir
    assert demo_subject.facts()["model"] == str(GGUF)


def test_a_gguf_is_harvested(demo_subject: Subject, tiny_text: Path, tmp_path: Path) -> None:
    store = harvest(
        demo_subject,
        DataConfig(source=str(tiny_text), context=16, tokens=128, held_out=0.25),
        HarvestConfig(hooks=("blocks.1.hook_resid_post",), dtype="float32", batch_size=4),
        tmp_path / "activations",
    )
    assert (store.rows, store.width("blocks.1.hook_resid_post")) == (128, 576)
    with torch.no_grad():
        out = demo_subject.model.model(input_ids=torch.from_numpy(store.tokens).long(), output_hidden_states=True)
    expected = out.hidden_states[2].reshape(-1, 576)
    torch.testing.assert_close(store.read("blocks.1.hook_resid_post", slice(None)), expected, rtol=1e-4, atol=1e-4)
