"""Quality beside SAELens, architecture by architecture, on the same stored activations of a real model.

Both train on the very rows of one file, in its order, batch by batch: same token visits, learning rate, warm-up and decay,
dead window and input scale. Both are then read by the same code (`SAE.load` reads SAELens' folders): L0 and explained
variance on held-out rows, cross-entropy recovered through the model, and dead latents, those that fire on none of the
rows trained on. Where a coefficient sets L0, SAELens' is searched until L0 is near the target (under autocast, at half the
time, until it is close); ours gets SAELens' L0 as its `target_l0`, put right once where held-out rows are further off than
5 %. Every run is kept in FOLDER/runs, and none that is there is made again: after a change of our trainer, delete
FOLDER/runs/monosem-*.

    python scripts/fetch_demo.py && python scripts/set_up_peers.py --only saelens
    python benchmarks/family.py --folder runs/family [--side saelens|monosem] [--only topk-32 ...] [--report]
"""

import argparse
import json
import math
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from safetensors.torch import load_file, save_file
from torch import Tensor

from activation_store import ActivationStore
from activation_store.files import write_json
from activation_store.hooks import locate_hooks, on_pass
from activation_store.subject import Subject, load_subject
from monosem.config import RunConfig, load_config
from monosem.run import Run
from monosem.stages import do_stages
from sae import SAE, TrainConfig, train
from sae.evaluate import next_token_loss

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "family-cpu.json"
SAELENS = ROOT / ".venv-peers" / "saelens" / "bin" / "python"
OVERRIDES = ["data.tokens=640000", "data.held_out=0.05"]
CE_SEQUENCES = 64
CLOSE = 0.05  # L0s further apart than this are no match
NEAR = 0.12  # SAELens' search is content with an L0 this near to the case's

BATCH, STEPS = 1024, 1000
COMMON: dict[str, Any] = {"d_sae": 4608, "batch_size": BATCH, "steps": STEPS, "lr": 1e-3}
WARM, DECAY, WINDOW = STEPS // 20, STEPS // 5, 200 * BATCH


# SAELens' JumpReLU as its documentation matches Anthropic's: with its defaults (penalty "step", bandwidth 0.05) thresholds move
# so slowly that L0 is 176 after these steps with coefficient 1, and 330 with 30.
ANTHROPIC = {
    "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_tanh_scale": 4.0, "pre_act_loss_coefficient": 3e-6,
    "jumprelu_ste_to_input": True, "jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An architecture at an L0. `first` is the coefficient that SAELens' search starts from; empty where k sets the L0."""

    architecture: str
    l0: int
    seeds: int = 1
    first: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.l0}"


CASES = [
    Case("topk", 32, 3),
    Case("batchtopk", 32),
    Case("standard", 32, 3, {"saelens": 6.2}),
    Case("topk", 64),
    Case("batchtopk", 64),
    Case("standard", 64, 1, {"saelens": 2.2}),
    Case("jumprelu", 32, 1, {"saelens": 1.0}),
    Case("jumprelu", 64, 1, {"saelens": 0.4}),
]


# The rows


def config_of(folder: Path) -> RunConfig:
    return load_config(ROOT / "configs" / "demo.yaml", [f"name={folder.name}", f"runs_dir={folder.parent}", *OVERRIDES])


def export(folder: Path) -> Path:
    """Harvest, and write the training rows as the store's batches draw them in its first epoch, whole batches alone."""
    path = folder / "rows.safetensors"
    if path.exists():
        return path
    do_stages(Run(config_of(folder)), ["harvest"])
    store = ActivationStore.open(folder / "activations")
    batches = store.batches(store.hooks[0], batch_size=BATCH, seed=0, epochs=1)
    x = torch.cat([batch for batch in batches if len(batch) == BATCH])
    some = next(batches.row_numbers())
    assert torch.equal(x[:BATCH], store.read(store.hooks[0], some))
    assert not store.special.reshape(-1)[some].any()
    save_file({"x": x}, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return path


@cache
def rows_of(folder: Path) -> Tensor:
    return load_file(export(folder))["x"]


# Training


def train_ours(case: Case, seed: int, value: float, folder: Path, at: Path) -> dict[str, Any]:
    x = rows_of(folder)
    own = {"target_l0": value} if case.first else {"k": case.l0}
    config = TrainConfig(
        **COMMON, architecture=case.architecture, seed=seed, lr_warmup_fraction=WARM / STEPS, lr_decay_fraction=DECAY / STEPS,
        l1_warmup_fraction=WARM / STEPS, dead_window_tokens=WINDOW, device="cpu", **own,
    )  # fmt: skip
    sae = train(x.split(BATCH), config, mean=x.mean(0), mean_norm=float(x.norm(dim=1).mean()))
    sae.save(at)
    return {"settings": config.model_dump(mode="json"), "training": sae.cfg.metadata["training"]}


def train_theirs(case: Case, seed: int, value: float, folder: Path, at: Path, dtype: str = "float32") -> dict[str, Any]:
    """Its defaults, but for what both sides share; autocast off unless told; as it is documented, not as it is fastest."""
    options: dict[str, Any] = {
        "normalize_activations": "expected_average_only_in", "lr_warm_up_steps": WARM, "lr_decay_steps": DECAY,
        "dead_feature_window": WINDOW // BATCH,
    }  # fmt: skip
    if case.architecture == "standard":
        options |= {"l1_warm_up_steps": WARM}
    elif case.architecture == "jumprelu":
        options |= {"l0_warm_up_steps": WARM, "l0_coefficient": value, **ANTHROPIC}
    else:
        options |= {"rescale_acts_by_decoder_norm": True}
        options |= {"use_sparse_activations": False} if case.architecture == "topk" else {}
    job = {
        **COMMON, "architecture": case.architecture, "d_in": rows_of(folder).shape[1], "seed": seed, "device": "cpu",
        "dtype": dtype, "threads": torch.get_num_threads(), "activations": str(export(folder)), "options": options,
        "k": None if case.first else case.l0, "l1_coefficient": value if case.architecture == "standard" else None,
        "save": str(at),
    }  # fmt: skip
    source, target = (at.with_name(f"{at.name}.{what}.json") for what in ("job", "result"))
    source.write_text(json.dumps(job))
    script = ROOT / "benchmarks" / "peers" / "run_saelens.py"
    if not target.exists():  # it is written last
        done = subprocess.run([str(SAELENS), str(script), str(source), str(target)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{at.name}: SAELens failed\n{done.stderr[-2000:]}")
    result = json.loads(target.read_text())
    return {"settings": {**COMMON, "seed": seed, **result["settings"]}, "versions": result["versions"],
            "training": {"loss": result["loss"], "l0": result["l0"][-1]}}  # fmt: skip


# Measuring, the same for both


@cache
def subject_of(folder: Path) -> Subject:
    return load_subject(config_of(folder).model)


@torch.inference_mode()
def cross_entropy(folder: Path, sae: SAE | None, ablate: bool = False) -> float:
    """Return nats a token on the first held-out sequences, x replaced by its reconstruction, or by 0, at plain tokens."""
    store = ActivationStore.open(folder / "activations")
    model = subject_of(folder).model
    site = locate_hooks(model, [store.hooks[0]])[store.hooks[0]]
    total, count = 0.0, 0
    last = store.train_sequences + CE_SEQUENCES
    for start in range(store.train_sequences, last, 8):
        which = slice(start, min(start + 8, last))
        tokens, plain = torch.from_numpy(store.tokens[which].astype(np.int64)), torch.from_numpy(~store.special[which])

        def act(x: Tensor, plain: Tensor = plain) -> Tensor | None:
            if sae is None and not ablate:
                return None
            other = torch.zeros_like(x) if sae is None else sae(x.float()).to(x)
            return torch.where(plain[..., None], other, x)

        with on_pass(model.get_submodule(site.path), site.side, act):
            loss = next_token_loss(model, tokens)
        total += float(loss[plain[:, :-1]].double().sum())
        count += int(plain[:, :-1].sum())
    return total / count


def losses_without(folder: Path) -> dict[str, float]:
    path = folder / "cross_entropy.json"
    if not path.exists():
        write_json(path, {"clean": cross_entropy(folder, None), "ablated": cross_entropy(folder, None, ablate=True)})
    found: dict[str, float] = json.loads(path.read_text())
    return found


@torch.inference_mode()
def measure(folder: Path, sae: SAE) -> dict[str, float]:
    """Return the figures; `sae.evaluate.evaluate` defines them, but for dead_fraction, which is on the training rows."""
    store = ActivationStore.open(folder / "activations")
    held_out = slice(store.train_sequences * store.context, None)
    x = store.read(store.hooks[0], held_out)[torch.from_numpy(~store.special.reshape(-1)[held_out])]
    f, reconstruction = sae.reconstruct_sparse(x)
    error = float((x - reconstruction).double().square().sum())
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
    for part in rows_of(folder).split(8192):
        fired += sae.encode_sparse(part).latent_counts()
    losses = losses_without(folder)
    spliced = cross_entropy(folder, sae)
    return {
        "l0": len(f.values) / len(x), "explained_variance": 1 - error / float((x - x.mean(0)).double().square().sum()),
        "ce_recovered": (losses["ablated"] - spliced) / (losses["ablated"] - losses["clean"]), "ce_spliced": spliced,
        "dead_fraction": float((fired == 0).double().mean()),
        "held_out_dead_fraction": float((f.latent_counts() == 0).double().mean()),
    }  # fmt: skip


# The runs


def runs_of(folder: Path, side: str, architecture: str, seed: int | None = None) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob(f"{side}-{architecture}-*.figures.json"))]
    return [run for run in found if seed is None or run["seed"] == seed]


def run_one(folder: Path, side: str, case: Case, seed: int, value: float) -> dict[str, Any]:
    at = folder / "runs" / f"{side}-{case.architecture}-{value:.4g}-seed{seed}"
    path = at.with_name(at.name + ".figures.json")
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    at.parent.mkdir(exist_ok=True)
    print(f"{at.name} ...", flush=True)
    begun = time.perf_counter()
    about = (train_ours if side == "monosem" else train_theirs)(case, seed, value, folder, at)
    about["seconds"] = round(time.perf_counter() - begun, 1)
    result = {"side": side, "architecture": case.architecture, "seed": seed, "sparsity": value,
              "figures": measure(folder, SAE.load(at)), **about}  # fmt: skip
    write_json(path, result)
    print(f"{at.name}: {result['figures']}", flush=True)
    return result


def roughly(folder: Path, case: Case, value: float) -> dict[str, Any]:
    """Return the L0 that SAELens comes to under autocast: half the time, near enough to search with. No figure is taken of it."""
    at = folder / "runs" / f"rough-{case.architecture}-{value:.4g}"
    path = at.with_name(at.name + ".l0.json")
    if not path.exists():
        at.parent.mkdir(exist_ok=True)
        print(f"{at.name} ...", flush=True)
        train_theirs(case, 0, value, folder, at, "bfloat16")
        store = ActivationStore.open(folder / "activations")
        held_out = slice(store.train_sequences * store.context, None)
        x = store.read(store.hooks[0], held_out)[torch.from_numpy(~store.special.reshape(-1)[held_out])]
        found = len(SAE.load(at).encode_sparse(x).values) / len(x)
        write_json(path, {"sparsity": value, "figures": {"l0": found}})
        print(f"{at.name}: L0 {found:.1f}", flush=True)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def close(run: dict[str, Any], l0: float, to: float = CLOSE) -> bool:
    return abs(run["figures"]["l0"] / l0 - 1) <= to


def next_target(known: list[dict[str, Any]], l0: float) -> float:
    """Return the `target_l0` that should give `l0` on held-out rows: in proportion to what the nearest run gave."""
    nearest = best(known, l0)
    return float(f"{l0 if nearest is None else nearest['sparsity'] * l0 / nearest['figures']['l0']:.3g}")


def next_value(known: list[dict[str, Any]], l0: float, first: float) -> float:
    """Return the coefficient that should give `l0`: on the line, in logarithms, through the two nearest runs; of one, at -1/2."""
    near = sorted(known, key=lambda run: abs(math.log(run["figures"]["l0"] / l0)))[:2]
    if not near:
        return first
    (v, found), slope = (math.log(near[0]["sparsity"]), math.log(near[0]["figures"]["l0"])), -0.5
    if len(near) == 2:
        across = math.log(near[1]["sparsity"]) - v
        slope = min(-0.2, (math.log(near[1]["figures"]["l0"]) - found) / across)
    return float(f"{math.exp(v + (math.log(l0) - found) / slope):.3g}")


def do_case(folder: Path, side: str, case: Case, seed: int, tries: int) -> None:
    """Make a run of a case; where a coefficient sets the L0, seed 0 searches it and the other seeds take what it found."""
    value = float(case.l0)
    if case.first:
        target = target_of(folder, side, case)
        for _ in range(tries if seed == 0 else 0):
            known = runs_of(folder, side, case.architecture, 0)
            if any(close(run, target, CLOSE if side == "monosem" else NEAR) for run in known):
                break
            if side == "saelens" and not any(close(run, target, 0.5) for run in known):
                rough = [json.loads(path.read_text()) for path in (folder / "runs").glob(f"rough-{case.architecture}-*.l0.json")]
                while len(rough) < 2 * tries and not any(close(run, target, 0.05) for run in rough):
                    rough.append(roughly(folder, case, next_value(rough, target, case.first[side])))
                run_one(folder, side, case, 0, (best(rough, target) or {"sparsity": case.first[side]})["sparsity"])
                continue
            value = next_target(known, target) if side == "monosem" else next_value(known, target, case.first[side])
            run_one(folder, side, case, 0, value)
        chosen = best(runs_of(folder, side, case.architecture, 0), target)
        if chosen is None:
            return
        value = chosen["sparsity"]
    run_one(folder, side, case, seed, value)


def target_of(folder: Path, side: str, case: Case) -> float:
    """Return the L0 to come near: of theirs the case's, of ours that of theirs once it is known."""
    theirs = best(runs_of(folder, "saelens", case.architecture, 0), case.l0) if side == "monosem" and case.first else None
    return theirs["figures"]["l0"] if theirs else float(case.l0)


def best(runs: list[dict[str, Any]], l0: float) -> dict[str, Any] | None:
    """Return the run whose L0 is nearest, in logarithms."""
    return min(runs, key=lambda run: abs(math.log(run["figures"]["l0"] / l0)), default=None)


# The result


def chosen_runs(folder: Path, side: str, case: Case) -> list[dict[str, Any]]:
    """Return a case's runs, by seed: of k, or of the coefficient whose seed 0 came nearest to the target."""
    known = runs_of(folder, side, case.architecture)
    if case.first:
        nearest = best([run for run in known if run["seed"] == 0], target_of(folder, side, case))
        value = nearest["sparsity"] if nearest else None
    else:
        value = float(case.l0)
    return sorted((run for run in known if run["sparsity"] == value and run["seed"] < case.seeds), key=lambda run: run["seed"])


def compare(folder: Path, case: Case) -> dict[str, Any]:
    """Set the two sides of a case side by side: means over seeds, and what the comparison says."""
    sides = {side: chosen_runs(folder, side, case) for side in ("monosem", "saelens")}
    wanted = {f"{side} seed {seed}" for side in sides for seed in range(case.seeds)}
    there = {f"{side} seed {run['seed']}" for side, runs in sides.items() for run in runs}
    result: dict[str, Any] = {"case": case.name, "missing": sorted(wanted - there)}
    for side, runs in sides.items():
        means = {name: statistics.mean(run["figures"][name] for run in runs) for name in (runs[0]["figures"] if runs else ())}
        seeds = [{"seed": run["seed"], **run["figures"], "seconds": run["seconds"]} for run in runs]
        result[side] = {"sparsity": runs[0]["sparsity"] if runs else None, "mean": means, "seeds": seeds,
                        "settings": runs[0]["settings"] if runs else None}  # fmt: skip
    ours, theirs = (result[side]["mean"] for side in sides)
    if ours and theirs:
        result |= {
            "l0_ratio": ours["l0"] / theirs["l0"], "matched": abs(ours["l0"] / theirs["l0"] - 1) <= CLOSE,
            "explained_variance_ahead_by": ours["explained_variance"] - theirs["explained_variance"],
            "ce_recovered_ahead_by": ours["ce_recovered"] - theirs["ce_recovered"],
            "dead_halved_or_below_1_percent": ours["dead_fraction"] <= max(theirs["dead_fraction"] / 2, 0.01),
        }  # fmt: skip
    return result


def report(folder: Path) -> None:
    cases = [compare(folder, case) for case in CASES]
    every = [run for side in ("monosem", "saelens") for case in dict.fromkeys(c.architecture for c in CASES)
             for run in runs_of(folder, side, case)]  # fmt: skip
    config, store = config_of(folder), ActivationStore.open(folder / "activations")
    x = rows_of(folder)
    write_json(RESULT, {
        "what": "ours and SAELens trained on the same stored activations, in the same order, and measured by the same code",
        "rows": {
            "model": config.model.id, "hook": store.hooks[0], "text": config.data.source, "context": store.context,
            "trained_on": len(x), "visits": BATCH * STEPS, "mean_norm": float(x.norm(dim=1).mean()),
            "held_out": int((~store.special[store.train_sequences :]).sum()), "ce_sequences": CE_SEQUENCES,
            "ce": losses_without(folder),
        },
        "definitions": {
            "dead_fraction": f"latents that fire on none of the {len(x)} rows trained on, by the finished SAE",
            "ce_recovered": "(ablated - spliced) / (ablated - clean), special tokens keep their own activation",
            "matched": f"L0s on held-out rows differ by {CLOSE:.0%} at most; nothing is interpolated",
        },
        "common": {**COMMON, "lr_warm_up_steps": WARM, "lr_decay_steps": DECAY, "dead_window_tokens": WINDOW},
        "cases": cases,
        "every_run": [{name: run[name] for name in ("side", "architecture", "sparsity", "seed", "figures")} for run in every],
        "versions": next((run["versions"] for run in every if "versions" in run), None),
        "machine": machine("numpy", "transformers"),
    })  # fmt: skip
    for case in cases:
        print("\n" + table_row(case))
    print(RESULT)


def table_row(case: dict[str, Any]) -> str:
    """Return a line of the table in docs/quality.md: ours / theirs."""
    ours, theirs = (case[side]["mean"] for side in ("monosem", "saelens"))
    if not ours or not theirs:
        return f"| {case['case']} | missing: {', '.join(case['missing'])} |"
    pairs = (f"{ours[name]:.{digits}f} / {theirs[name]:.{digits}f}" for name, digits in
             (("l0", 1), ("explained_variance", 4), ("ce_recovered", 4), ("dead_fraction", 4)))  # fmt: skip
    return f"| {case['case']} | {len(case['monosem']['seeds'])} / {len(case['saelens']['seeds'])} | {' | '.join(pairs)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/family"))
    parser.add_argument("--side", nargs="*", default=["saelens", "monosem"], choices=("saelens", "monosem"))
    parser.add_argument("--only", nargs="*", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--tries", type=int, default=4, help="runs that a coefficient's search may take")
    parser.add_argument("--seeds", type=int, default=max(case.seeds for case in CASES), help="at most as many of a case")
    parser.add_argument("--report", action="store_true", help="write the result of the runs that are there, make none")
    args = parser.parse_args()
    folder = args.folder.resolve()
    cases = [case for case in CASES if args.only is None or case.name in args.only]
    for seed in [] if args.report else range(args.seeds):  # one seed of everything comes first
        for case, side in product(cases, args.side):
            if seed < case.seeds:
                do_case(folder, side, case, seed, args.tries)
    if args.report or len(args.side) == 2:
        report(folder)


if __name__ == "__main__":
    main()
