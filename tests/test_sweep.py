"""Sweeps from a config to a report: how they are written, what they are called, and what is said of them side by side."""

import json
import math
import subprocess
from dataclasses import replace

import pytest
import torch
import yaml
from test_cli import MLP, RESID, command, kill_when, monosem_cli, tiny_config  # noqa: F401 a fixture
from test_report import inputs

from activation_store.errors import InputError
from explain.report import write_report
from monosem.config import load_config
from monosem.plan import make_plan
from sae import SAE, TrainConfig
from sae.plots import pareto_plot, training_plots
from sae.sweep import expand, named, summary


def config_file(tmp_path, tiny_config, train, **sections):  # noqa: F811
    values = yaml.safe_load(tiny_config.read_text())
    values["train"] = train
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**values, **sections}, sort_keys=False))
    return path


COMMON = {"d_sae": 64, "lr": 3e-3, "steps": 200, "batch_size": 128, "log_every": 20, "checkpoint_every": 50,
          "dead_window_tokens": 5000}  # fmt: skip


def test_a_grid_is_every_combination(tmp_path, tiny_config):  # noqa: F811
    train = {**COMMON, "architecture": "topk", "grid": {"k": [2, 4], "seed": [0, 1, 2]}}
    config = load_config(config_file(tmp_path, tiny_config, train))
    assert config.is_sweep
    assert list(config.members) == [f"k-{k}_seed-{s}" for k in (2, 4) for s in (0, 1, 2)]
    assert [(c.k, c.seed) for c in config.members.values()] == [(k, s) for k in (2, 4) for s in (0, 1, 2)]
    assert {c.hook for c in config.members.values()} == {RESID}  # each names its hook
    assert config.chosen == "k-2_seed-0"


def test_a_list_may_hold_grids_and_takes_the_runs_seed(tmp_path, tiny_config):  # noqa: F811
    train = [{**COMMON, "architecture": "topk", "grid": {"k": [2, 4]}}, {**COMMON, "l1_coefficient": 0.5, "hook": MLP}]
    config = load_config(config_file(tmp_path, tiny_config, train))
    assert [(c.architecture, c.k, c.seed, c.hook) for c in config.members.values()] == [
        ("topk", 2, 3, RESID), ("topk", 4, 3, RESID), ("standard", None, 3, MLP),
    ]  # fmt: skip
    assert len(set(config.members)) == 3


def test_an_override_reaches_every_member(tmp_path, tiny_config):  # noqa: F811
    path = config_file(tmp_path, tiny_config, [{**COMMON}, {**COMMON, "seed": 1}])
    assert {c.steps for c in load_config(path, ["train.steps=7"]).members.values()} == {7}
    one = load_config(config_file(tmp_path, tiny_config, {**COMMON, "grid": {"seed": [0, 1]}}), ["train.grid.seed=[4, 5]"])
    assert [c.seed for c in one.members.values()] == [4, 5]


def test_one_sae_is_no_sweep(tiny_config):  # noqa: F811
    config = load_config(tiny_config)
    assert not config.is_sweep
    assert config.members == {"": config.train}
    assert config.chosen == ""


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({**COMMON, "grid": {"k": 16}}, r"train.grid: .* allowed: fields of train, each with a list of values"),
        ({**COMMON, "grid": {"seed": []}}, r"train.grid: "),
        ({**COMMON, "grid": {"d_sae": [8, 16]}}, r"train.grid: d_sae given in the grid and beside it; give it once"),
        ([], r"train: an empty list"),
        ([COMMON, COMMON], r"train: two SAEs of the sweep are equal, sae"),
        ([COMMON, {**COMMON, "lr": -1}], r"train.1.lr: -1 given; allowed: greater than 0"),
        ([COMMON, {**COMMON, "stepz": 1}], r"train.1.stepz: 1 given; no such key, did you mean steps\?"),
        ({**COMMON, "architecture": "topk", "grid": {"k": [4, 400]}}, r"train.k: 400 given, but there are only d_sae = 64"),
        ([COMMON, {**COMMON, "hook": "nowhere", "seed": 1}], r"train.hook: 'nowhere' given; allowed: one of harvest.hooks"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said_before_anything_loads(tmp_path, tiny_config, train, said):  # noqa: F811
    with pytest.raises(InputError, match=said):
        load_config(config_file(tmp_path, tiny_config, train))


def test_settings_of_the_pass_must_be_shared_and_the_chosen_be_there(tmp_path, tiny_config, capsys, monkeypatch):  # noqa: F811
    path = config_file(tmp_path, tiny_config, [COMMON, {**COMMON, "steps": 100}])
    with pytest.raises(InputError, match=r"train.steps: 200 in steps-200, 100 in steps-100; SAEs that train in one pass"):
        load_config(path)
    path = config_file(tmp_path, tiny_config, {**COMMON, "grid": {"seed": [0, 1]}})
    with pytest.raises(InputError, match=r"explain.sae: 'seed-7' given; allowed: one of seed-0, seed-1"):
        load_config(path, ["explain.sae=seed-7"])
    with pytest.raises(InputError, match=r"explain.sae: 'x' given; allowed: none, for this run trains one SAE"):
        load_config(tiny_config, ["explain.sae=x"])


def test_expand_and_names():
    assert expand({"d_sae": 8}) == [{"d_sae": 8}]
    configs = [TrainConfig(d_sae=8, steps=1, hook=hook, lr=lr) for hook in ("blocks.1", ("a", "b")) for lr in (1e-3, 1e-4)]
    assert list(named(configs)) == ["blocks.1_lr-0.001", "blocks.1_lr-0.0001", "a+b_lr-0.001", "a+b_lr-0.0001"]
    prefixes = [TrainConfig(architecture="matryoshka", d_sae=8, k=1, steps=1, prefixes=p) for p in ((2, 8), (4, 8))]
    assert list(named(prefixes)) == ["prefixes-2+8", "prefixes-4+8"]


# Side by side


def evaluated(l0, ev, ce, dead=0.0):
    return {"l0": l0, "explained_variance": ev, "ce_recovered": ce, "dead_fraction": dead,
            "intervals": {"explained_variance": [ev - 0.1, ev + 0.1], "l0": [l0, l0]}}  # fmt: skip


class Fake:
    def __init__(self, rows):
        self.W_dec = torch.tensor(rows)


def side_by_side():
    base = {"d_sae": 2, "steps": 1, "architecture": "topk"}
    configs = named([TrainConfig(**base, k=k, seed=s, hook="h") for k in (1, 2) for s in (0, 1)])
    figures = [(1, 0.5, 0.6), (1, 0.4, 0.7), (2, 0.45, 0.9), (2, 0.8, None)]
    results = {name: evaluated(*own) for name, own in zip(configs, figures, strict=True)}
    rows = [[[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.3], [-1.0, 0.0]], [[1.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]]
    return summary(configs, results, {name: Fake(row) for name, row in zip(configs, rows, strict=True)})


def test_summary_by_hand():
    found = side_by_side()
    assert found["varies"] == ["k", "seed"]
    lines = {line["name"]: line for line in found["saes"]}
    assert [lines[n]["efficient"] for n in lines] == [True, False, False, True]  # (1, .4) and (2, .45) are beaten
    assert [lines[n]["efficient_ce"] for n in lines] == [False, True, True, False]  # what is undefined beats nothing
    one, two = found["reseed"]
    assert one["k"] == 1
    assert one["saes"] == ["k-1_seed-0", "k-1_seed-1"]
    assert one["explained_variance"] == pytest.approx({"mean": 0.45, "sd": math.sqrt(0.005), "least": 0.4, "most": 0.5})
    assert two["ce_recovered"] is None  # of one value there is no spread
    # cosines of seeds 0 and 1: row 0 near row 0 and no other; -1 is no cosine above 0.7; k = 2: (1, 1) / sqrt(2) by (0, 1)
    assert one["shared_latents"] == pytest.approx(0.5)
    assert two["shared_latents"] == pytest.approx(0.5)


def test_saes_of_other_hooks_do_not_beat_each_other():
    configs = named([TrainConfig(d_sae=2, steps=1, hook=hook) for hook in ("a", "b")])
    results = dict(zip(configs, [evaluated(1, 0.5, 0.6), evaluated(2, 0.4, 0.5)], strict=True))
    found = summary(configs, results, {})
    assert [line["efficient"] for line in found["saes"]] == [True, True]
    assert found["reseed"] == []


def test_plots_are_drawn(tmp_path):
    sweep = side_by_side()
    assert pareto_plot(sweep).startswith(b"\x89PNG")
    line = {"tokens": 1, "loss": 1.0, "mse": 1.0, "l0": 2.0, "explained_variance": None, "dead_fraction": 0.0}
    for saes in (1, 3, 20):
        assert set(training_plots({f"s{i}": [line] for i in range(saes)})) == {"loss", "l0", "explained_variance"}


def test_the_report_shows_the_sweep(tmp_path):
    sweep = side_by_side()
    sweep["saes"][0]["name"] = "<b>k</b>"
    page = write_report(replace(inputs(), sweep=sweep), tmp_path / "index.html").read_text()
    assert "The sweep, with 95 % intervals" in page
    assert "&lt;b&gt;k&lt;/b&gt;" in page
    assert "2 seeds of topk" in page
    assert "The sweep" not in write_report(inputs(), tmp_path / "one.html").read_text()


# The whole road


@pytest.fixture(scope="module")
def swept(tmp_path_factory, tiny_config):  # noqa: F811
    folder = tmp_path_factory.mktemp("swept")
    train = [{**COMMON, "architecture": "topk", "grid": {"k": [2, 6], "seed": [0, 1]}},
             {**COMMON, "l1_coefficient": 0.5, "hook": MLP, "seed": 0}]  # fmt: skip
    path = config_file(folder, tiny_config, train, runs_dir=str(folder / "runs"))
    return path, folder / "runs" / "tiny"


def test_a_sweep_runs_the_whole_road(swept, capsys, monkeypatch):
    path, folder = swept
    code, out, err = monosem_cli(capsys, monkeypatch, "run", path)
    assert code == 0, err
    assert "saes 5" in out
    names = [f"topk_{RESID}_k-{k}_seed-{s}" for k in (2, 6) for s in (0, 1)] + [f"standard_{MLP}_seed-0"]
    assert sorted(p.name for p in (folder / "sae").iterdir()) == sorted(names)
    assert sorted(p.stem for p in (folder / "metrics").iterdir()) == sorted(names)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert list(evaluation["saes"]) == names
    assert [line["name"] for line in evaluation["sweep"]["saes"]] == names
    assert [len(line["saes"]) for line in evaluation["sweep"]["reseed"]] == [2, 2]
    assert 0 <= evaluation["sweep"]["reseed"][0]["shared_latents"] <= 1
    assert evaluation["saes"][names[0]]["l0"] == pytest.approx(2, abs=0.01)
    assert (folder / "plots" / "pareto.png").exists()
    assert len(list((folder / "baselines").iterdir())) == 2  # clean and ablated: once for each hook, not for each SAE
    assert SAE.load(folder / "sae" / names[4]).cfg.hook_name == MLP
    assert SAE.load(folder / "sae" / names[1]).cfg.metadata["train_config"]["seed"] == 1
    page = (folder / "report" / "index.html").read_text()
    assert "Another seed alone" in page
    saved = load_config(folder / "config.yaml", ["runs_dir=" + str(folder.parent)])
    assert list(saved.members) == names  # the resolved config says the same


def test_after_a_sweep_one_sae_is_explained_steered_with_and_given_away(swept, capsys, monkeypatch, tmp_path):
    path, folder = swept
    name = f"topk_{RESID}_k-6_seed-1"
    code, out, err = monosem_cli(capsys, monkeypatch, "explain", path, f"explain.sae={name}")
    assert code == 0, err
    assert f"sae {name}" in out
    assert (folder / "sae" / name / "latents.safetensors").exists()
    args = ("steer", folder, "--feature", 1, "--prompt", "the cat", "--tokens", 2)
    assert monosem_cli(capsys, monkeypatch, *args, "--clamp", "2x", "--sae", name)[0] == 0
    code, _, err = monosem_cli(capsys, monkeypatch, *args, "--ablate", "--sae", "nobody")
    assert (code, "the sweep's are topk_" in err) == (2, True)
    code, _, err = monosem_cli(capsys, monkeypatch, "convert", folder, tmp_path / "out", "--to", "sparsify")
    assert (code, "a run of several SAEs; give one of" in err) == (2, True)
    assert monosem_cli(capsys, monkeypatch, "convert", folder / "sae" / name, tmp_path / "out", "--to", "sparsify")[0] == 0


def test_a_killed_sweep_ends_in_the_same_bytes(swept, tmp_path):
    path, folder = swept
    again = tmp_path / "tiny"
    settings = (path, f"runs_dir={tmp_path}", "train.checkpoint_every=50")
    subprocess.run(command("harvest", *settings), check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(command("train", *settings), stdout=subprocess.DEVNULL)
    assert kill_when(process, lambda: any((again / "checkpoints").glob("step-*"))), "training finished before the kill"
    assert not (again / "sae").exists()
    subprocess.run(command("train", *settings), check=True, stdout=subprocess.DEVNULL)
    assert len(list((folder / "sae").iterdir())) == 5
    for weights in (folder / "sae").glob("*/sae_weights.safetensors"):
        assert (again / weights.relative_to(folder)).read_bytes() == weights.read_bytes()


def test_the_plan_adds_the_members_up(swept, tmp_path, tiny_config):  # noqa: F811
    path, _ = swept
    whole = make_plan(load_config(path))
    one = make_plan(load_config(config_file(tmp_path, tiny_config, {**COMMON, "architecture": "topk", "k": 2})))
    by_stage = {stage.name: stage for stage in whole.stages}
    alone = {stage.name: stage for stage in one.stages}
    assert by_stage["train"].disk > 4 * alone["train"].disk
    assert by_stage["train"].flops > 4 * alone["train"].flops
    assert whole.training["weights"] > 4 * one.training["weights"]
    assert by_stage["explain"].flops == pytest.approx(alone["explain"].flops)
