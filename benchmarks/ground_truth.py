"""How much of a synthetic model's known features SAEs find, ours and SAELens', from the very same rows.

The model is `SyntheticModel.preset("small")`: superposition, Zipf firing, hierarchy, correlation. Both sides train on the rows of
one file in its order: same warm-up, decay, batch, steps, input scale, dead window. Beyond that each is run with
those of its options that serve it best here, SAELens once with its defaults too, and at that learning rate of
`RATES` which gives it the best MCC on the first seed. Where a coefficient sets L0, SAELens' is searched until L0 is near k,
and ours is given k as its `target_l0`, put right in proportion where that is not near.
Both are read and scored by the same code, on rows that neither has seen. Every run is kept in FOLDER/runs, and none that
is there is made again, but ours with --again.

    python scripts/set_up_peers.py && python benchmarks/ground_truth.py --folder runs/ground-truth [--only topk ...] [--again]
"""

import argparse
import json
import math
import statistics
import subprocess
from dataclasses import dataclass
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from machine import machine
from safetensors.torch import load_file, save_file
from training import python_of

from sae import SAE, TrainConfig, train
from sae.recovery import recovery
from sae.synthetic import PRESETS, SyntheticModel

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "ground-truth-cpu.json"
BATCH, STEPS, BATCHES, SEEDS = 1024, 3000, 500, 2  # rows are gone through STEPS / BATCHES times
WARM, DECAY, WINDOW = STEPS // 20, STEPS // 5, 300
RATES = (1e-3, 3e-3)
WIDTHS = {512: 5}  # d_sae: k. As many latents as features; k is their L0
CLOSE, TRIES = 0.05, 5  # L0 may be so far from k, and be searched for so often
MODEL = SyntheticModel.preset("small", batch_size=BATCH)


@dataclass(frozen=True)
class Kind:
    """An architecture: what each side is told beside what both share, and what its coefficient is called, if it has one.

    `theirs` is what serves SAELens best, `default` what it has by default where that is something else.
    """

    ours: dict[str, Any]
    theirs: dict[str, Any]
    default: dict[str, Any] | None = None
    coefficient: str | None = None
    first: float = 1.0


# The model's features are all above 0, and its mean is made of them: a b_dec that begins there takes the most frequent ones away
NOT_CENTRED = {"center_inputs": False}
FREE = {**NOT_CENTRED, "decoder_rows": "free"}
RESCALED = {"rescale_acts_by_decoder_norm": True}
NOT_RESCALED = {"rescale_acts_by_decoder_norm": False}
KINDS = {
    "standard": Kind(NOT_CENTRED, {"l1_warm_up_steps": WARM, "compile_sae": False}, None, "l1_coefficient", 2.0),
    "topk": Kind(FREE, {**NOT_RESCALED, "use_sparse_activations": False}, {**RESCALED, "use_sparse_activations": False}),
    "batchtopk": Kind(FREE, NOT_RESCALED, RESCALED),
    "jumprelu": Kind({**NOT_CENTRED, "tanh_scale": 1.0}, {"l0_warm_up_steps": WARM}, None, "l0_coefficient", 1.0),
}


@dataclass(frozen=True)
class Case:
    """One SAE to train."""

    architecture: str
    d_sae: int
    seed: int
    lr: float

    @property
    def kind(self) -> Kind:
        return KINDS[self.architecture]

    @property
    def k(self) -> int:
        return WIDTHS[self.d_sae]


@cache
def rows_of(folder: Path) -> torch.Tensor:
    path = folder / "rows.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.cat(list(islice(MODEL.stream(), BATCHES)))}, path)
    return load_file(path)["x"]


def train_ours(case: Case, value: float | None, folder: Path, at: Path) -> dict[str, Any]:
    x = rows_of(folder)
    own = {"k": case.k} if value is None else {"target_l0": value}
    config = TrainConfig(
        architecture=case.architecture, d_sae=case.d_sae, lr=case.lr, steps=STEPS, batch_size=BATCH, seed=case.seed, device="cpu",
        lr_warmup_fraction=WARM / STEPS, lr_decay_fraction=DECAY / STEPS, l1_warmup_fraction=WARM / STEPS,
        dead_window_tokens=WINDOW * BATCH, **{**own, **case.kind.ours},
    )  # fmt: skip
    train(x.split(BATCH), config, mean=x.mean(0), mean_norm=float(x.norm(dim=1).mean())).save(at)
    return config.model_dump(mode="json")


def train_theirs(case: Case, value: float | None, folder: Path, at: Path, own: dict[str, Any]) -> dict[str, Any]:
    options = {
        "normalize_activations": "expected_average_only_in", "lr_warm_up_steps": WARM, "lr_decay_steps": DECAY,
        "dead_feature_window": WINDOW, **own,
    }  # fmt: skip
    job: dict[str, Any] = {
        "architecture": case.architecture, "d_in": rows_of(folder).shape[1], "d_sae": case.d_sae, "lr": case.lr, "steps": STEPS,
        "batch_size": BATCH, "seed": case.seed, "device": "cpu", "dtype": "float32", "threads": torch.get_num_threads(),
        "activations": str(folder / "rows.safetensors"), "save": str(at),
    }  # fmt: skip
    if value is None:
        job["k"] = case.k
    elif case.kind.coefficient == "l1_coefficient":
        job["l1_coefficient"] = value
    else:
        options[case.kind.coefficient] = value
    source, target = at.with_name(f"{at.name}.job.json"), at.with_name(f"{at.name}.result.json")
    source.write_text(json.dumps({**job, "options": options}))
    interpreter = python_of("saelens", None)
    if interpreter is None:
        raise SystemExit("SAELens is not set up: python scripts/set_up_peers.py --only saelens")
    done = subprocess.run([interpreter, str(HERE / "peers" / "run_saelens.py"), str(source), str(target)],
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{at.name}: SAELens failed\n{done.stderr[-2000:]}")
    result = json.loads(target.read_text())
    return {**result["settings"], "versions": result["versions"]}


def score(side: str, case: Case, value: float | None, folder: Path) -> dict[str, Any]:
    """Train and score, or take what is there."""
    parts = (side.replace(" ", "-"), case.architecture, case.d_sae, case.seed, f"{case.lr:g}", value and f"{value:.5g}")
    name = "-".join(str(part) for part in parts if part is not None)
    at = folder / "runs" / name
    kept = at.with_name(f"{name}.score.json")
    if not kept.exists():
        at.parent.mkdir(parents=True, exist_ok=True)
        if side == "monosem":
            settings = train_ours(case, value, folder, at)
        else:
            settings = train_theirs(case, value, folder, at, case.kind.theirs if side == "saelens" else case.kind.default or {})
        figures = recovery(SAE.load(at), MODEL)
        kept.write_text(json.dumps({**figures, "coefficient": value, "settings": settings}, indent=2) + "\n")
        print(name, {n: round(figures[n], 4) for n in ("mcc", "f1", "explained_variance", "l0", "dead_latents")}, flush=True)
    return json.loads(kept.read_text())


def near_k(side: str, case: Case, folder: Path, first: float | None = None) -> dict[str, Any]:
    """Score with the coefficient at which L0 is within CLOSE of k, or the nearest of TRIES: log L0 is near linear in its log."""
    if case.kind.coefficient is None:
        return score(side, case, None, folder)
    if side == "monosem":
        results, target = list[dict[str, Any]](), float(case.k)
        for _ in range(2):
            results.append(score(side, case, target, folder))
            if abs(results[-1]["l0"] / case.k - 1) < CLOSE:
                break
            target *= case.k / max(results[-1]["l0"], 1e-3)
        return min(results, key=lambda result: abs(result["l0"] / case.k - 1))
    value, found = first or case.kind.first, list[tuple[float, float, dict[str, Any]]]()
    for _ in range(TRIES):
        result = score(side, case, value, folder)
        found.append((math.log(value), math.log(max(result["l0"], 1e-3) / case.k), result))
        if abs(math.expm1(found[-1][1])) < CLOSE:
            break
        found.sort(key=lambda f: abs(f[1]))
        slope = -0.6
        if len(found) > 1 and found[0][0] != found[1][0]:
            slope = min(-0.1, (found[0][1] - found[1][1]) / (found[0][0] - found[1][0]))
        value = math.exp(found[0][0] - found[0][1] / slope)
    return min(found, key=lambda f: abs(f[1]))[2]


FIGURES = ("mcc", "f1", "precision", "recall", "explained_variance", "l0", "dead_latents", "found", "uniqueness", "absorption",
           "shrinkage", "mean_max_cosine")  # fmt: skip


def several(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean and all values of each figure over seeds, and the settings of the first."""
    values = {name: [r[name] for r in results] for name in FIGURES}
    return {
        **{name: {"mean": statistics.mean(v), "seeds": v} for name, v in values.items() if None not in v},
        "coefficient": results[0]["coefficient"], "settings": results[0]["settings"],
    }  # fmt: skip


def compare(architecture: str, folder: Path) -> list[dict[str, Any]]:
    """Choose each side's rate by its MCC at the full width, then train at each width and seed."""
    both = ("monosem", "saelens")
    tried = {side: {lr: near_k(side, Case(architecture, max(WIDTHS), 0, lr), folder) for lr in RATES} for side in both}
    best = {side: max(RATES, key=lambda lr: tried[side][lr]["mcc"]) for side in both}
    cases = []
    for d_sae in WIDTHS:
        sides = {}
        for side, lr in best.items():
            first = near_k(side, Case(architecture, d_sae, 0, lr), folder)
            rest = [score(side, Case(architecture, d_sae, seed, lr), first["coefficient"], folder) for seed in range(1, SEEDS)]
            sides[side] = {"lr": lr, **several([first, *rest])}
        if KINDS[architecture].default is not None:
            sides["saelens defaults"] = several(
                [score("saelens defaults", Case(architecture, d_sae, 0, best["saelens"]), None, folder)]
            )
        cases.append({"architecture": architecture, "d_sae": d_sae, "k": WIDTHS[d_sae], "true_l0": first["true_l0"],
                      **sides})  # fmt: skip
    cases[0]["rates_tried"] = [
        {"lr": lr, **{side: {n: tried[side][lr][n] for n in ("mcc", "f1", "explained_variance", "l0")} for side in both}}
        for lr in RATES
    ]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/ground-truth"))
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--again", action="store_true", help="train ours again, for instance after a change to the trainer")
    args = parser.parse_args()
    for architecture in args.only if args.again else ():
        for kept in (args.folder / "runs").glob(f"monosem-{architecture}-*.score.json"):
            kept.unlink()
    cases = [case for architecture in args.only for case in compare(architecture, args.folder.resolve())]
    for case, figure in product(cases, ("mcc", "f1", "explained_variance", "l0", "dead_latents")):
        print(case["architecture"], case["d_sae"], figure, *(round(case[s][figure]["mean"], 4) for s in ("monosem", "saelens")))
    result = {
        "what": "features of a synthetic model found by SAEs, ours and SAELens', trained on the same rows; means over seeds",
        "model": {"preset": "small", **PRESETS["small"].model_dump(mode="json")},
        "batch": BATCH, "steps": STEPS, "rows": BATCH * BATCHES, "seeds": SEEDS, "cases": cases,
        "machine": machine("numpy", "scipy"),
    }  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    if RESULT.exists() and set(args.only) != set(KINDS):  # each case is a comparison of its own: those not run again stay
        kept = [case for case in json.loads(RESULT.read_text())["cases"] if case["architecture"] not in args.only]
        result["cases"] = sorted(kept + cases, key=lambda case: list(KINDS).index(case["architecture"]))
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(RESULT)


if __name__ == "__main__":
    main()
