"""The command line as a user meets it: the whole road, bad input, and kills at any moment."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from llm_servers import ChatServer, Reply, completion, error

import monosem.plan
from activation_store import ActivationStore
from monosem.cli import main
from sae import SAE

CHAT = ("explain.backend=openai", "explain.instrument=integers", "explain.retries=0", "explain.neurons=0")
RESID, MLP = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"


@pytest.fixture(scope="session")
def tiny_config(tiny_model_dir, tiny_text, tmp_path_factory) -> Path:
    """A whole run in seconds, cut into enough shards, checkpoints and units that a kill can fall between them."""
    values = {
        "name": "tiny",
        "seed": 3,
        "model": {"id": str(tiny_model_dir), "dtype": "float32", "device": "cpu"},
        "data": {"source": str(tiny_text), "context": 16, "tokens": 6000, "held_out": 0.2},
        "harvest": {"hooks": [RESID, MLP], "dtype": "bfloat16", "batch_size": 8, "shard_mb": 0.01},
        "train": {"d_sae": 64, "l1_coefficient": 0.5, "lr": 3e-3, "steps": 300, "batch_size": 128, "log_every": 20,
                  "checkpoint_every": 20, "dead_window_tokens": 5000},
        "evaluate": {"ce_sequences": 6},
        "explain": {"latents": 12, "neurons": 6, "neuron_hook": MLP, "window": 8, "checkpoint_seconds": 0.001},
        "steer": {"features": 2, "prompt": "the cat", "tokens": 6},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def monosem_cli(capsys, monkeypatch, *args) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["monosem", *map(str, args)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_latents_are_compared_with_an_untrained_models(tiny_config, finished, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished, tmp_path / "tiny")
    code, out, err = monosem_cli(
        capsys, monkeypatch, "compare", tiny_config, f"runs_dir={tmp_path}", "explain.latents=6", "explain.random=3"
    )
    assert code == 0, err
    summary = json.loads((tmp_path / "tiny/explanations/summary.json").read_text())
    chosen = {name: found["chosen"] for name, found in summary["dictionaries"].items()}
    assert chosen == {"sae": 6, "neurons": 6, "random": 3, "principal": 6, "untrained": 6}
    manifest = json.loads((tmp_path / "tiny-untrained/manifest.json").read_text())
    assert manifest["model"]["model_revision"].startswith("random-")
    mine, twin = (json.loads((tmp_path / name / "sae/cfg.json").read_text()) for name in ("tiny", "tiny-untrained"))
    assert mine["d_sae"] == twin["d_sae"]
    assert (tmp_path / "tiny/plots/compared.png").read_bytes()[:4] == b"\x89PNG"
    for other in ("neurons", "random", "principal", "untrained"):
        assert other in out
    before = (tmp_path / "tiny-untrained/sae/sae_weights.safetensors").stat().st_mtime_ns
    code, out, err = monosem_cli(
        capsys, monkeypatch, "compare", tiny_config, f"runs_dir={tmp_path}", "explain.latents=6", "explain.random=3"
    )
    assert code == 0, err
    assert "done already" in out  # and is shown again
    assert (tmp_path / "tiny-untrained/sae/sae_weights.safetensors").stat().st_mtime_ns == before


def command(*args) -> list[str]:
    return [sys.executable, "-m", "monosem", *map(str, args)]


@pytest.fixture(scope="session")
def finished(tiny_config, tmp_path_factory) -> Path:
    """An undisturbed run, made by the command line in a process of its own."""
    runs = tmp_path_factory.mktemp("runs")
    done = subprocess.run(command("run", tiny_config, f"runs_dir={runs}"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return runs / "tiny"


def test_a_run_leaves_everything_that_is_promised(finished, tiny_config):
    names = {"config.yaml", "manifest.json", "metrics.jsonl", "evaluation.json", "activations", "sae", "explanations", "report"}
    assert names <= {p.name for p in finished.iterdir()}
    manifest = json.loads((finished / "manifest.json").read_text())
    assert {stage: s["state"] for stage, s in manifest["stages"].items()} == dict.fromkeys(
        ("harvest", "train", "evaluate", "explain", "report"), "done"
    )
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["seed"] == 3
    assert manifest["model"]["basis"] == "raw"
    assert "monosem run" in manifest["command"]
    store, sae = ActivationStore.open(finished / "activations"), SAE.load(finished / "sae")
    assert store.hooks == [RESID, MLP]
    assert sae.cfg.hook_name == RESID
    assert sae.cfg.metadata["special_token_ids"] == store.attrs["special_token_ids"]
    assert sae.latents is not None
    scores = [json.loads(line) for line in (finished / "explanations/scores.jsonl").read_text().splitlines()]
    assert {(s["dictionary"], s["hook"]) for s in scores} == {("sae", RESID), ("neurons", MLP)}
    assert len(scores) == 18
    assert (finished / "report/index.html").read_text().count("<details") >= 18
    evaluation = json.loads((finished / "evaluation.json").read_text())
    for key in ("l0", "mse", "explained_variance", "ce_clean", "ce_spliced", "ce_ablated", "dead_fraction"):
        assert isinstance(evaluation[key], float), key


def test_a_second_run_finds_the_work_done(finished, tiny_config, capsys, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    code, out, _ = monosem_cli(capsys, monkeypatch, "run", tiny_config, f"runs_dir={finished.parent}")
    assert code == 0
    assert out.count("done already") == 5
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_changed_settings_redo_what_depends_on_them_and_lose_nothing(finished, tiny_config, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished, tmp_path / "tiny")
    old = (tmp_path / "tiny/sae/sae_weights.safetensors").read_bytes()
    args = (tiny_config, f"runs_dir={tmp_path}", "train.l1_coefficient=4", "explain.neurons=0")
    code, _, err = monosem_cli(capsys, monkeypatch, "evaluate", *args)
    assert (code, "run `monosem train` with this config first" in err) == (2, True)
    code, out, _ = monosem_cli(capsys, monkeypatch, "run", *args)
    assert code == 0
    assert out.count("done already") == 1  # the harvest alone
    assert (tmp_path / "tiny/sae/sae_weights.safetensors").read_bytes() != old
    kept = list((tmp_path / "tiny/previous").glob("train-*/sae/sae_weights.safetensors"))
    assert [p.read_bytes() for p in kept] == [old]


def test_stages_alone_in_order(tiny_config, tmp_path, capsys, monkeypatch):
    for stage in ("harvest", "train", "evaluate", "explain", "report"):
        code, _, err = monosem_cli(capsys, monkeypatch, stage, tiny_config, f"runs_dir={tmp_path}", "explain.latents=[1,2,3]")
        assert code == 0, err


@pytest.mark.parametrize(
    ("flags", "differs"),
    [
        (["--clamp", "50x"], True),
        (["--clamp", "90"], True),
        (["--scale", "1.0"], False),
        (["--add", "300"], True),
        (["--ablate"], None),
        (["--min-clamp", "50x"], True),
        (["--min-clamp", "0"], False),  # a latent is never below
        (["--ablate-direction"], None),
        (["--add", "300", "--keep-norm"], True),
        (["--add", "300", "--positions", "response"], True),
        (["--add", "300", "--positions", "prompt"], True),
    ],
)
def test_steer(finished, capsys, monkeypatch, flags, differs):
    latent = int(SAE.load(finished / "sae").latents.max_activation.argmax())
    args = ("steer", finished, "--feature", latent, "--prompt", "the cat", "--tokens", 8, *flags)
    code, out, err = monosem_cli(capsys, monkeypatch, *args)
    assert code == 0, err
    baseline, steered = out.split("steered:")
    baseline = baseline.split("baseline:")[1]
    assert baseline.strip().startswith("the cat")
    if differs is not None:
        assert (baseline.strip() != steered.strip()) == differs


def test_plan_prints_every_stage_and_exact_disk(tiny_config, finished, capsys, monkeypatch):
    code, out, _ = monosem_cli(capsys, monkeypatch, "plan", tiny_config)
    assert code == 0
    for word in ("harvest", "train", "evaluate", "explain", "report", "FLOPs", "memory", "free"):
        assert word in out
    from monosem.config import load_config

    plan = monosem.plan.make_plan(load_config(tiny_config))
    store = ActivationStore.open(finished / "activations")
    expected = store.rows * ((32 + 64) * 2 + 2 * 4 + 12)  # two hooks in bfloat16, their norms, three arrays of tokens in int32
    assert plan.stages[0].disk == expected
    written = sum(p.stat().st_size for p in (finished / "activations").rglob("c/**/*") if p.is_file())
    assert expected <= written < expected * 1.2  # the last chunk is padded, each has a checksum
    # 12 d_in d_sae a token, by hand
    assert plan.stages[1].flops == (2 * 32 * 64 + 10 * 32 * 128) * 300 * 128  # the encoder's product, and the active latents
    # the forward pass to block 1: 2 FLOPs a weight and token, plus attention scores and values
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    attention = 2 * 2 * 2 * 16 * 32
    assert plan.stages[0].flops == pytest.approx((2 * weights + attention) * plan.stages[0].tokens, rel=0.01)


@pytest.mark.parametrize("word", ["", "run", "harvest", "train", "evaluate", "explain", "report", "steer", "plan"])
def test_help_everywhere(word, capsys, monkeypatch):
    code, out, _ = monosem_cli(capsys, monkeypatch, *([word] if word else []), "--help")
    assert code == 0
    assert "Usage" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "CONFIG", "train.l1_coeficient=4"], "train.l1_coeficient: 4 given; no such key, did you mean l1_coefficient?"),
        (["run", "CONFIG", "train.steps=many"], "train.steps: 'many' given; allowed: a valid integer"),
        (["run", "CONFIG", "harvest.hooks=[blocks.1.hook_resid_pst,blocks.1.mlp.hook_post]"], "nearest: blocks.1.hook_resid_po"),
        (["run", "CONFIG", "train.d_in=33"], "train.d_in: 33 given"),
        (["run", "CONFIG", "model.id=/nowhere/at/all"], "model.id: cannot"),
        (["run", "CONFIG", "data.column=body"], "data.column: 'body' is not in"),
        (["run", "CONFIG", "data.source=EMPTY"], "data.source"),
        (["run", "CONFIG", "data.source=missing.jsonl"], "data.source: no file matches"),
        (["run", "CONFIG", "explain.window=7"], "explain.window: 7 given; allowed: a divisor of data.context, 16"),
        (["run", "CONFIG", "model.device=cuda:9"], "model.device"),
        (["train", "CONFIG"], "run `monosem harvest` first"),
        (["report", "CONFIG"], "no SAE there"),
        (["run", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["steer", "nowhere", "--feature", "1", "--clamp", "5x", "--prompt", "a"], "not a run folder"),
        (["frobnicate"], "No such command"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny_config, tmp_path, capsys, monkeypatch, args, message):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n{"text": "  "}\n')
    args = [str(tiny_config) if a == "CONFIG" else a.replace("EMPTY", str(empty)) for a in args]
    extra = [f"runs_dir={tmp_path}"] if str(tiny_config) in args else []
    code, _, err = monosem_cli(capsys, monkeypatch, *args, *extra)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
    assert not (tmp_path / "tiny/activations").exists()  # nothing was begun


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_2(tiny_config, tmp_path, capsys, monkeypatch):
    runs = f"runs_dir={tmp_path}"
    assert monosem_cli(capsys, monkeypatch, "harvest", tiny_config, runs)[0] == 0
    code, _, err = monosem_cli(capsys, monkeypatch, "train", tiny_config, runs, "train.lr=1e30", "train.max_grad_norm=1e30")
    assert code == 2
    assert err.startswith("error: the loss is not finite")
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--clamp", "5x", "--ablate"], ["--clamp", "lots"], ["--clamp", "1", "--min-clamp", "1"]])
def test_steer_refuses_unclear_edits(finished, capsys, monkeypatch, flags):
    code, _, err = monosem_cli(capsys, monkeypatch, "steer", finished, "--feature", 1, "--prompt", "a", *flags)
    assert code == 2
    assert "--clamp" in err
    args = ("steer", finished, "--feature", 1, "--prompt", "a", "--ablate", "--positions", "answer")
    code, _, err = monosem_cli(capsys, monkeypatch, *args)
    assert (code, "--positions: 'answer' given; allowed: all, prompt, response" in err) == (2, True)
    code, _, err = monosem_cli(capsys, monkeypatch, "steer", finished, "--feature", 64, "--prompt", "a", "--ablate")
    assert (code, "--feature: 64 given; allowed: 0 to 63" in err) == (2, True)


def test_run_refuses_a_disk_that_cannot_hold_it(tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(monosem.plan, "free_disk", lambda folder: 1000)
    code, _, err = monosem_cli(capsys, monkeypatch, "run", tiny_config, f"runs_dir={tmp_path}")
    assert code == 2
    assert "runs_dir" in err
    assert "free" in err
    assert not (tmp_path / "tiny").exists()


def test_a_disk_that_fills_up_midway_is_bad_input_and_the_work_goes_on(tiny_config, tmp_path, capsys, monkeypatch, finished):
    real, calls = os.fsync, [0]

    def fsync(fd):
        calls[0] += 1
        if calls[0] > 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    code, _, err = monosem_cli(capsys, monkeypatch, "harvest", tiny_config, f"runs_dir={tmp_path}")
    assert code == 2
    assert "disk full while writing" in err
    monkeypatch.setattr(os, "fsync", real)
    code, _, err = monosem_cli(capsys, monkeypatch, "harvest", tiny_config, f"runs_dir={tmp_path}")
    assert code == 0, err
    assert same_bytes(finished / "activations", tmp_path / "tiny/activations") > 10


def test_units_that_failed_are_shown_and_tried_again(finished, tiny_config, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished, tmp_path / "tiny")
    healthy = False

    def script(request):
        asked = request.simulates
        if asked is not None:
            return Reply(completion(json.dumps({"activations": [i % 11 for i in range(asked["count"])]})))
        if not healthy and request.number % 2:
            return Reply(error("overloaded [/bold]"), status=500)
        return Reply(completion('{"description": "anything"}'))

    args = (tiny_config, f"runs_dir={tmp_path}", *CHAT, "explain.latents=4")
    with ChatServer(script) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        code, out, err = monosem_cli(capsys, monkeypatch, "run", *args)
        assert code == 0, err
        assert "HTTP 500" in out
        scores = [json.loads(line) for line in (tmp_path / "tiny/explanations/scores.jsonl").read_text().splitlines()]
        assert {s["state"] for s in scores} >= {"failed"}
        assert all("HTTP 500" in s["reason"] and s["ev_correlation"] is None for s in scores if s["state"] == "failed")
        assert (tmp_path / "tiny/report/index.html").exists()
        healthy = True
        code, out, err = monosem_cli(capsys, monkeypatch, "explain", *args)
        assert code == 0, err
        scores = [json.loads(line) for line in (tmp_path / "tiny/explanations/scores.jsonl").read_text().splitlines()]
        assert not [s for s in scores if s["state"] == "failed"]
        code, out, _ = monosem_cli(capsys, monkeypatch, "explain", *args)
        assert "done already" in out


def test_an_llm_server_that_is_down_or_refuses_is_exit_code_2(finished, tiny_config, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished, tmp_path / "tiny")
    args = (tiny_config, f"runs_dir={tmp_path}", *CHAT, "explain.latents=2")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    code, _, err = monosem_cli(capsys, monkeypatch, "run", *args)  # asked before anything else is done
    assert (code, err.count("error:"), "http://127.0.0.1:9/v1" in err) == (2, 1, True)
    code, _, err = monosem_cli(capsys, monkeypatch, "explain", *args)  # alone: every unit is marked with the reason
    assert (code, err.count("error:"), "all 2 units failed" in err) == (2, 1, True)
    scores = [json.loads(line) for line in (tmp_path / "tiny/explanations/scores.jsonl").read_text().splitlines()]
    assert [s["state"] for s in scores] == ["failed", "failed"]


def same_bytes(one: Path, other: Path) -> int:
    """Assert that two folders hold the same files with the same bytes; return how many."""
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    return len(files)


def assert_same_results(one: Path, other: Path) -> None:
    """Compare what must not depend on interruptions: arrays, weights, scores, figures."""
    same_bytes(one / "activations", other / "activations")
    for file in ("sae/sae_weights.safetensors", "sae/latents.safetensors", "sae/cfg.json", "explanations/scores.jsonl",
                 "explanations/units.jsonl", "evaluation.json", "explanations/summary.json"):  # fmt: skip
        assert (one / file).read_bytes() == (other / file).read_bytes(), file

    def metrics(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "waiting")} for line in lines]

    assert metrics(one) == metrics(other)


def kill_when(process: subprocess.Popen, moment, seconds: float = 120.0) -> bool:
    """SIGKILL the process as soon as `moment()` holds; return whether it was still running then."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if moment():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    process.kill()
    process.wait()
    return False


def test_killed_in_every_stage_it_ends_in_the_same_bytes(tiny_config, finished, tmp_path):
    run = tmp_path / "tiny"
    results = run / "explanations/results.jsonl"
    moments = {
        "harvest": lambda: len(list((run / "activations.journal").glob("shard-*.npz"))) >= 3,
        "train": lambda: any((run / "checkpoints").glob("step-*")),
        "explain": lambda: results.exists() and results.read_bytes().count(b"\n") >= 2,
    }
    for stage, moment in moments.items():
        process = subprocess.Popen(command("run", tiny_config, f"runs_dir={tmp_path}"), stdout=subprocess.DEVNULL)
        assert kill_when(process, moment), f"{stage} finished before the kill"
        manifest = json.loads((run / "manifest.json").read_text())
        assert manifest["stages"][stage]["state"] == "begun"
    done = subprocess.run(command("run", tiny_config, f"runs_dir={tmp_path}"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_results(finished, run)


def test_interrupted_says_how_to_go_on(tiny_config, tmp_path):
    run = tmp_path / "tiny"
    process = subprocess.Popen(
        command("run", tiny_config, f"runs_dir={tmp_path}"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )  # fmt: skip
    while process.poll() is None and not any((run / "checkpoints").glob("step-*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"interrupted; to go on from here: monosem run {tiny_config}" in err


@pytest.mark.soak
def test_killed_at_random_moments_it_ends_in_the_same_bytes(tiny_config, finished, tmp_path):
    """Forty kills at random times, whatever the process is doing, then the same bytes."""
    chance = random.Random(0)
    kills = 0
    for attempt in range(200):
        process = subprocess.Popen(command("run", tiny_config, f"runs_dir={tmp_path}"), stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=chance.uniform(4, 16))
        if process.poll() is None:
            process.kill()
            process.wait()
            kills += 1
        elif process.returncode == 0:
            if kills >= 40:
                break
            assert_same_results(finished, tmp_path / "tiny")
            shutil.rmtree(tmp_path / "tiny")
        else:
            pytest.fail(f"attempt {attempt} exited {process.returncode}")
    assert kills >= 40
    subprocess.run(command("run", tiny_config, f"runs_dir={tmp_path}"), check=True, stdout=subprocess.DEVNULL)
    assert_same_results(finished, tmp_path / "tiny")


def test_transcoders_and_crosscoders_are_trained_from_the_same_config(capsys, monkeypatch, tiny_config, tmp_path):
    runs = f"runs_dir={tmp_path}"
    between = (f"train.hook={RESID}", f"train.hook_out={MLP}", "train.skip_connection=true")
    assert monosem_cli(capsys, monkeypatch, "harvest", tiny_config, runs)[0] == 0
    code, out, err = monosem_cli(capsys, monkeypatch, "train", tiny_config, runs, *between)
    assert code == 0, out + err
    sae = SAE.load(tmp_path / "tiny/sae")
    assert (sae.cfg.hook_name, sae.cfg.hook_name_out, sae.cfg.skip) == (RESID, MLP, True)
    x = torch.randn(5, 32)
    assert sae(x).shape == (5, sae.cfg.d_out)
    both = f"train.hook=[{RESID},{MLP}]"
    code, out, err = monosem_cli(capsys, monkeypatch, "train", tiny_config, runs, both, "name=tiny")
    assert code == 0, out + err
    sae = SAE.load(tmp_path / "tiny/sae")
    assert sae.cfg.hook_names == (RESID, MLP)
    assert sae.cfg.d_in == sum(sae.cfg.widths)
    code, out, err = monosem_cli(capsys, monkeypatch, "evaluate", tiny_config, runs, both)
    assert code == 0, out + err
    found = json.loads((tmp_path / "tiny/evaluation.json").read_text())
    assert set(found["by_hook"]) == set(found["hook"]) == {RESID, MLP}
    code, out, err = monosem_cli(capsys, monkeypatch, "explain", tiny_config, runs, both)
    assert code == 2
    assert "train.hook: 2 hooks given" in err
