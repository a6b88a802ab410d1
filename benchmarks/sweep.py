"""What a sweep costs beside the same SAEs trained one after another: seconds a step of all, over those of each by itself.

Eight members of equal shape, which differ in seed and sparsity, on the same rows in memory: what a pass over a store costs
comes on top, once for the sweep and eight times for the others. The two take turns; steps before the timing begins, in which
things are compiled and an L1 run is dense, do not count.

    python benchmarks/sweep.py [--device cuda] [--rounds 3]
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import machine
from training import planted

from sae import TrainConfig, train_sweep

RESULTS = Path(__file__).parent / "results"
MEMBERS = 8


@dataclass(frozen=True)
class Shape:
    """`settle` steps come before the `timed` ones."""

    d_in: int
    d_sae: int
    batch: int
    settle: int
    timed: int


SHAPES = {
    "cpu": [Shape(576, 1152, 512, 60, 60), Shape(576, 4608, 1024, 40, 10)],
    "cuda": [Shape(576, 4608, 2048, 200, 200), Shape(768, 24576, 4096, 200, 100), Shape(2304, 16384, 4096, 200, 100)],
}
KINDS: dict[str, list[dict[str, Any]]] = {
    "topk": [{"architecture": "topk", "k": 16 * (1 + i % 4), "seed": i // 4} for i in range(MEMBERS)],
    "batchtopk": [{"architecture": "batchtopk", "k": 16 * (1 + i % 4), "seed": i // 4} for i in range(MEMBERS)],
    "standard": [{"architecture": "standard", "l1_coefficient": 4.0 + i, "seed": i} for i in range(MEMBERS)],
    "jumprelu": [{"architecture": "jumprelu", "l0_coefficient": 0.5 + 0.1 * i, "seed": i} for i in range(MEMBERS)],
}


def seconds_a_step(x: torch.Tensor, configs: Mapping[str, TrainConfig], shape: Shape) -> float:
    at: list[float] = []

    def look(done: int, total: int) -> None:
        if done // shape.batch in (shape.settle, shape.settle + shape.timed):
            if x.is_cuda:
                torch.cuda.synchronize()
            at.append(time.perf_counter())

    train_sweep(x.split(shape.batch), configs, progress=look)
    return (at[1] - at[0]) / shape.timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    cases = []
    for shape in SHAPES[args.device]:
        x = planted(32 * shape.batch, shape.d_in, args.device)
        for kind in args.only:
            common = {"d_sae": shape.d_sae, "steps": shape.settle + shape.timed, "batch_size": shape.batch, "lr": 1e-3,
                      "device": args.device, "compute_dtype": args.dtype, "log_every": 50}  # fmt: skip
            configs = {str(i): TrainConfig(**common, **own) for i, own in enumerate(KINDS[kind])}
            alone, together = [], []
            for _ in range(args.rounds):
                together.append(seconds_a_step(x, configs, shape))
                alone.append(sum(seconds_a_step(x, {name: c}, shape) for name, c in configs.items()))
            ratio = statistics.median(t / a for t, a in zip(together, alone, strict=True))
            cases.append({"kind": kind, "shape": vars(shape), "sweep_ms": [1e3 * t for t in together],
                          "one_by_one_ms": [1e3 * a for a in alone], "ratio": ratio})  # fmt: skip
            print(f"{kind} {shape}: {1e3 * statistics.median(together):.1f} ms together, "
                  f"{1e3 * statistics.median(alone):.1f} one by one: {ratio:.2f}", flush=True)  # fmt: skip
    result = {"what": f"a step of {MEMBERS} SAEs of equal shape in one sweep, beside the sum of their steps in runs of their own",
              "dtype": args.dtype, "rounds": args.rounds, "cases": cases, "machine": machine("numpy")}  # fmt: skip
    path = RESULTS / f"sweep-{args.device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
