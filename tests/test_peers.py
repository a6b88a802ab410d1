"""The other trainers that ours is measured against: how they are set up, and what their runs share."""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
JOB: dict[str, Any] = {
    "architecture": "topk", "d_in": 16, "d_sae": 64, "batch_size": 32, "steps": 3, "k": 4, "lr": 1e-3, "seed": 0,
    "device": "cpu", "dtype": "float32", "threads": 1, "activations": "x.safetensors",
}  # fmt: skip


def module_of(name: str, path: Path) -> ModuleType:
    """A file of scripts/ or benchmarks/ as a module: neither is a package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return module_of("set_up_peers", ROOT / "scripts" / "set_up_peers.py")


@pytest.fixture(scope="module")
def common() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:  # it sets variables for the peer's process, not for this one
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("HF_HUB_OFFLINE", "1")
        return module_of("peers_common", ROOT / "benchmarks" / "peers" / "common.py")


class Commands:
    """Stands in for pip: makes the environment's python, and remembers."""

    def __init__(self, failing: str = "") -> None:
        self.run: list[list[str]] = []
        self.failing = failing

    def __call__(self, command: Sequence[str]) -> str:
        self.run.append(list(command))
        if self.failing and self.failing in command:
            raise SystemExit("failed")
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        return ""


def test_every_requirement_is_pinned_and_every_peer_has_a_script_and_the_same_torch(script):
    trainers = set(script.PEERS) - {"neuron_explainer"}  # which scores explanations, and has no torch
    assert {path.stem for path in (ROOT / "benchmarks" / "peers").glob("run_*.py")} == {f"run_{name}" for name in trainers}
    for name, peer in script.PEERS.items():
        assert all(pin.count("==") == 1 and "*" not in pin for pin in peer.pins)
        assert [pin for pin in peer.pins if pin.startswith("torch==")] == ["torch==2.13.0"] * (name in trainers)


def test_peers_import_nothing_of_ours():
    for path in (ROOT / "benchmarks" / "peers").glob("*.py"):
        lines = path.read_text().splitlines()
        words = [line.split()[1].split(".")[0] for line in lines if line.lstrip().startswith(("import ", "from "))]
        assert not {"monosem", "sae", "explain", "activation_store"} & set(words), path


@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning"])
def test_set_up_installs_once(script, tmp_path, name, capsys):
    first, second = Commands(), Commands()
    assert script.set_up(name, tmp_path, first)
    installs = [command for command in first.run if "install" in command]
    assert len(installs) == 1
    assert installs[0][0] == str(tmp_path / name / "bin" / "python")
    assert tuple(installs[0][-len(script.PEERS[name].pins) :]) == script.PEERS[name].pins
    assert not script.set_up(name, tmp_path, second)
    assert second.run == []
    assert "is current" in capsys.readouterr().out


def test_set_up_takes_away_the_torchvision_that_breaks_transformers(script, tmp_path):
    commands = Commands()
    script.set_up("dictionary_learning", tmp_path, commands)
    assert [command[-1] for command in commands.run if "uninstall" in command] == ["torchvision"]


def test_set_up_starts_over_where_pins_have_changed_or_the_python_is_gone(script, tmp_path, monkeypatch):
    script.set_up("sparsify", tmp_path, Commands())
    (tmp_path / "sparsify" / "left-over").touch()
    monkeypatch.setitem(script.PEERS, "sparsify", script.PEERS["sparsify"]._replace(pins=("eai-sparsify==1.3.2",)))
    assert script.set_up("sparsify", tmp_path, Commands())
    assert not (tmp_path / "sparsify" / "left-over").exists()
    (tmp_path / "sparsify" / "bin" / "python").unlink()
    assert script.set_up("sparsify", tmp_path, Commands())


@pytest.mark.parametrize("failing", ["install", "-c"])
def test_set_up_that_failed_is_tried_again(script, tmp_path, failing):
    with pytest.raises(SystemExit):
        script.set_up("sparsify", tmp_path, Commands(failing))
    assert not script.current("sparsify", tmp_path)
    assert script.set_up("sparsify", tmp_path, Commands())


def test_a_command_that_fails_says_what_it_said(script):
    with pytest.raises(SystemExit, match=r"(?s)exit status 3.*no such package"):
        script.run([sys.executable, "-c", "import sys; print('no such package', file=sys.stderr); sys.exit(3)"])


def test_batches_go_in_order_and_wrap_around(common):
    batches = common.Batches(torch.arange(12.0).reshape(6, 2), 2)
    assert [batches[i][0, 0].item() for i in range(5)] == [0.0, 4.0, 8.0, 0.0, 4.0]
    assert batches[4].shape == (2, 2)
    assert batches[3].data_ptr() == batches.x.data_ptr()  # a view


@pytest.mark.parametrize("rows", [0, 5])
def test_rows_must_be_a_multiple_of_the_batch_size(common, rows):
    with pytest.raises(SystemExit, match="multiple of the batch size"):
        common.Batches(torch.zeros(rows, 2), 2)


def test_a_job_is_read(common, tmp_path):
    (tmp_path / "job.json").write_text(json.dumps(JOB | {"l1_coefficient": None}))
    job = common.Job.read(tmp_path / "job.json")
    assert (job.k, job.options) == (4, {})
    assert job.choose(a=1, b=2) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "gated"}, "job.architecture: 'gated'"),
        ({"architecture": "standard"}, "job.l1_coefficient"),
        ({"k": None}, "job.k"),
        ({"k": 65}, "job.k"),
        ({"steps": 0}, "job.steps"),
        ({"batch_size": 1.5}, "job.batch_size"),
        ({"dtype": "float16"}, "job.dtype"),
        ({"device": "tpu"}, "job.device"),
        ({"seed": None}, "lacks seed"),
        ({"sead": 1}, "unknown sead"),
    ],
)
def test_a_wrong_job_is_refused_by_name(common, tmp_path, change, said):
    (tmp_path / "job.json").write_text(json.dumps(JOB | change))
    with pytest.raises(SystemExit, match=said):
        common.Job.read(tmp_path / "job.json")


def test_options_replace_choices_and_unknown_ones_are_refused(common):
    job = common.Job(**JOB, options={"a": 3})
    assert job.choose(a=1, b=2) == {"a": 3, "b": 2}
    with pytest.raises(SystemExit, match=r"job\.options: a"):
        job.choose(b=2)


def test_activations_of_the_wrong_shape_or_not_finite_are_refused(common, tmp_path):
    path = tmp_path / "x.safetensors"
    job = common.Job(**JOB | {"activations": str(path)})
    for x, said in ((torch.zeros(4, 15), "expected"), (torch.full((4, 16), math.nan), "not finite")):
        save_file({"x": x}, path)
        with pytest.raises(SystemExit, match=said):
            common.load(job)


def test_the_meter_times_steps_but_not_what_it_measures_between_them(common, monkeypatch):
    now = 0.0
    monkeypatch.setattr(common.time, "perf_counter", lambda: now)
    meter = common.Meter(common.Job(**JOB | {"steps": 12}), common.Batches(torch.zeros(64, 16), 32))

    def l0(batch: torch.Tensor) -> float:
        nonlocal now
        now += 100
        return float(len(batch))

    for step, _ in enumerate(meter.steps(l0)):
        now += step + 1
    assert meter.seconds == list(range(1, 13))
    assert (meter.l0, meter.l0_steps) == ([32.0] * 3, [0, 10, 11])


def test_a_trainer_that_counts_its_steps_ends_the_last_one_with_one_more_draw(common):
    meter = common.Meter(common.Job(**JOB), common.Batches(torch.zeros(64, 16), 32))
    steps = meter.steps(lambda batch: 0.0)
    for _ in range(3):
        next(steps)
    assert len(meter.seconds) == 2
    next(steps, None)
    assert len(meter.seconds) == 3


def test_memory_is_this_process_own(common):
    assert 2**20 < common.memory("VmRSS") <= common.memory("VmHWM")


def run_peer(name: str, folder: Path, **change: Any) -> tuple[int, str, dict[str, Any]]:
    python = ROOT / ".venv-peers" / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{name} is not set up (scripts/set_up_peers.py)")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    save_file({"x": x * 4 / x.norm(dim=1).mean()}, folder / "x.safetensors")
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps(JOB | {"activations": str(folder / "x.safetensors")} | change))
    path = ROOT / "benchmarks" / "peers" / f"run_{name}.py"
    done = subprocess.run([python, path, job, result], capture_output=True, text=True, cwd=folder, check=False)
    return done.returncode, done.stderr, json.loads(result.read_text()) if result.exists() else {}


ARCHITECTURES = ("standard", "topk", "batchtopk")
CASES = [
    *(("saelens", architecture, dtype) for architecture in ARCHITECTURES for dtype in ("float32", "bfloat16")),
    *(("dictionary_learning", architecture, "float32") for architecture in ARCHITECTURES),
    ("sparsify", "topk", "float32"),
]


@pytest.mark.soak
@pytest.mark.parametrize(("name", "architecture", "dtype"), CASES)
def test_a_peer_trains_and_reports(script, tmp_path, name, architecture, dtype):
    rc, said, result = run_peer(name, tmp_path, architecture=architecture, dtype=dtype, l1_coefficient=1.0)
    assert rc == 0, said
    assert result.keys() == {
        "peer", "versions", "settings", "seconds", "l0", "l0_steps", "loss", "rss_after_imports", "peak_rss",
        "activations_bytes", "peak_gpu",
    }  # fmt: skip
    assert len(result["seconds"]) == 3
    assert all(seconds > 0 for seconds in result["seconds"])
    assert math.isfinite(result["loss"])
    assert result["l0"] == [4.0, 4.0] if architecture == "topk" else all(0 < l0 <= 64 for l0 in result["l0"])
    assert 0 < result["rss_after_imports"] < result["peak_rss"]
    assert result["settings"]["autocast"] == (dtype == "bfloat16")
    pins = dict(pin.split("==") for pin in script.PEERS[name].pins)
    for package, version in result["versions"].items():
        assert version.partition("+")[0] == pins[package]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("sparsify", {"architecture": "batchtopk"}, "sparsify trains topk alone"),
        ("sparsify", {"dtype": "bfloat16"}, "float32 alone"),
        ("dictionary_learning", {"dtype": "bfloat16"}, "autocasts on CUDA alone"),
    ],
)
def test_a_peer_refuses_what_it_does_not_have(tmp_path, name, change, said):
    rc, stderr, result = run_peer(name, tmp_path, **change)
    assert rc != 0
    assert said in stderr
    assert result == {}
