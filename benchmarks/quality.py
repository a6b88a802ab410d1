"""The fast way against the plain one: the same seeds, batches and steps, and what comes out, on real or planted activations.

Sparse and dense steps round differently, and training amplifies that, so weights drift apart; what must not differ is
what the SAEs are worth. For each architecture three seeds are trained both ways and measured on held-out rows. The
difference between the ways is set beside the spread between seeds.

    python benchmarks/quality.py [--store runs/demo/activations] [--steps 300] [--d-sae 1152]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from machine import machine
from training import planted

from activation_store import ActivationStore
from sae import SAE, TrainConfig, train

RESULTS = Path(__file__).parent / "results"
CASES: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 4.0},
    "topk": {"k": 32},
    "batchtopk": {"k": 32},
}


def rows_of(store: Path | None, count: int) -> torch.Tensor:
    """Return shuffled rows of the store's training split, or planted ones."""
    if store is None:
        return planted(count, 576, "cpu")
    opened = ActivationStore.open(str(store))
    batches = opened.batches(opened.hooks[0], batch_size=1024, seed=0).stream(0)
    return torch.cat([next(batches) for _ in range(count // 1024)])


@torch.no_grad()
def worth(sae: SAE, x: torch.Tensor) -> dict[str, float]:
    f = sae.encode(x)
    error = (x - sae.decode(f)).square().sum()
    fires = f > 0
    return {
        "l0": float(fires.sum(1).float().mean()),
        "explained_variance": 1 - float(error / (x - x.mean(0)).square().sum()),
        "never_fired": float((~fires.any(0)).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--d-sae", type=int, default=1152)
    args = parser.parse_args()
    rows = rows_of(args.store, 66 * 1024)
    held_out, batches = rows[: 4 * 1024], list(rows[4 * 1024 :].split(1024))
    cases = []
    for architecture, own in CASES.items():
        found: dict[str, list[dict[str, float]]] = {"auto": [], "reference": []}
        for seed in range(3):
            for kernels, results in found.items():
                config = TrainConfig(
                    architecture=architecture, d_sae=args.d_sae, steps=args.steps, batch_size=1024, lr=1e-3, seed=seed,
                    lr_warmup_fraction=0.05, kernels=kernels, **own,
                )  # fmt: skip
                results.append(worth(train(batches, config), held_out))
        case: dict[str, Any] = {"architecture": architecture, **own, **found, "figures": {}}
        for figure in ("l0", "explained_variance", "never_fired"):
            ways = {kernels: [r[figure] for r in results] for kernels, results in found.items()}
            case["figures"][figure] = {
                "auto": statistics.mean(ways["auto"]), "reference": statistics.mean(ways["reference"]),
                "largest_difference_at_equal_seed": max(abs(a - b) for a, b in zip(*ways.values(), strict=True)),
                "spread_between_seeds": max(ways["reference"]) - min(ways["reference"]),
            }  # fmt: skip
        cases.append(case)
        print(architecture, json.dumps(case["figures"], indent=1), flush=True)
    result = {
        "what": "SAEs trained sparse and dense from equal seeds, on held-out rows",
        "rows": "planted" if args.store is None else "of a store", "d_sae": args.d_sae, "steps": args.steps, "cases": cases,
        "machine": machine("numpy"),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality-cpu.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
