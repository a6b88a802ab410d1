"""Training speed and memory beside the peers' own trainers: the same tensors, shapes and batches, in one run, taking turns.

Ours and each peer run in a process and an environment of their own, from a job file to a result file (benchmarks/peers).
Timed is the training step: forward, backward, clipping, optimiser, bookkeeping; batches lie ready. The first steps, in
which things are compiled, do not count; L1 is timed once the SAE is as sparse as it will be used, which for a dense trainer
makes no difference. A dense trainer's limit is what its six products of 2 d_in d_sae a token would take at the rate of
the best product measured in the same run, in float32 or bfloat16.

    python scripts/set_up_peers.py && python benchmarks/training.py [--device cuda] [--rounds 3] [--only NAME ...]
    python benchmarks/training.py --first-steps        # every step of the first 1,000 from init, ours and SAELens
    python benchmarks/training.py --scaling            # ours over d_sae, L0, batch, and where dense and sparse steps cross
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
from machine import machine
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PEERS = {"standard": ("saelens", "dictionary_learning"),
         "topk": ("saelens", "saelens defaults", "sparsify", "dictionary_learning"),
         "batchtopk": ("saelens", "dictionary_learning")}  # fmt: skip
# What a peer has unless it is told otherwise; without this it runs with what was found to be fastest.
DEFAULTS = {"saelens defaults": {"use_sparse_activations": False, "rescale_acts_by_decoder_norm": True}}


@dataclass(frozen=True)
class Shape:
    """`l1` is chosen so that L0 is about 50 after `settle` steps on the planted activations."""

    d_in: int
    d_sae: int
    batch: int
    l1: float
    settle: int
    k: dict[str, int]


SHAPES = {
    "cpu": Shape(576, 4608, 2048, 6.0, 320, {"topk": 32, "batchtopk": 32}),
    "cuda": Shape(2304, 65536, 8192, 2.5, 600, {"topk": 64, "batchtopk": 64}),
}
CASES = {device: [(a, dtype) for a in ("standard", "topk", "batchtopk") for dtype in dtypes]
         for device, dtypes in (("cpu", ("float32", "bfloat16")), ("cuda", ("float32", "bfloat16", "float8")))}


def planted(rows: int, d_in: int, device: str, seed: int = 0) -> torch.Tensor:
    """Return activations of 4 d_in known features that fire by Zipf's law, with noise and a mean, E||x|| = sqrt(d_in)."""
    g = torch.Generator(device).manual_seed(seed)
    features = 4 * d_in
    atoms = torch.nn.functional.normalize(torch.randn(features, d_in, generator=g, device=device), dim=1)
    rate = 1 / torch.arange(1, features + 1, device=device)
    rate = (rate * 30 / rate.sum()).clamp(max=0.5)
    parts = []
    for _ in range(0, rows, 2048):
        fires, strength = torch.rand(2, 2048, features, generator=g, device=device)
        codes = (fires < rate) * strength
        parts.append(codes @ atoms + 0.02 * torch.randn(2048, d_in, generator=g, device=device))
    x = torch.cat(parts)[:rows] + 0.5 * atoms[0]
    return x * (d_in**0.5 / x.norm(dim=1).mean())


def python_of(peer: str, given: str | None) -> str | None:
    if peer == "monosem":
        return sys.executable
    if given:
        return given
    path = HERE.parent / ".venv-peers" / peer / "bin" / "python"
    return str(path) if path.exists() else None


def run(peer: str, job: dict[str, Any], folder: Path, interpreter: str) -> dict[str, Any]:
    source, target = folder / "job.json", folder / "result.json"
    source.write_text(json.dumps(job))
    target.unlink(missing_ok=True)
    # OpenMP's idle threads must not spin on the cores that other threads of the same process work on: for ours the command
    # line sets this (monosem/__init__.py); the peers have no other threads, and run as they come
    env, script = dict(os.environ), HERE / "peers" / f"run_{peer}.py"
    if peer == "monosem":
        script = HERE / "run_monosem.py"
        env |= {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE / "peers")])}
    done = subprocess.run(
        [interpreter, str(script), str(source), str(target)], env=env, capture_output=True, text=True
    )
    if done.returncode or not target.exists():
        return {"failed": (done.stderr or done.stdout).strip().splitlines()[-1:]}
    return json.loads(target.read_text())


def peak(shape: Shape, dtype: torch.dtype, device: str) -> float:
    """Return the FLOP/s of the encoder's product at its best, median of 9 after a warm-up."""
    a = torch.randn(shape.batch, shape.d_in, device=device).to(dtype)
    b = torch.randn(shape.d_sae, shape.d_in, device=device).to(dtype)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b.T
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * shape.batch * shape.d_in * shape.d_sae / statistics.median(seconds[3:])


def summary(result: dict[str, Any], shape: Shape, counted: int, peaks: dict[str, float], dtype: str) -> dict[str, Any]:
    if "failed" in result:
        return result
    seconds = statistics.median(result["seconds"][-counted:])
    rate = shape.batch / seconds
    memory = (result["peak_gpu"] or result["peak_rss"] - result["rss_after_imports"]) - result["activations_bytes"]
    share = rate * 12 * shape.d_in * shape.d_sae / peaks["bfloat16" if dtype == "float8" else dtype]
    return {
        "milliseconds": round(1e3 * seconds, 2), "tokens_per_second": round(rate),
        "dense_share_of_peak": round(share, 3), "l0": round(result["l0"][-1], 1),
        "memory_mib": round(memory / 2**20), "peak_rss_mib": round(result["peak_rss"] / 2**20),
        "settings": result["settings"], "versions": result["versions"],
    }  # fmt: skip


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the round whose speed is the median (of two, the faster), with all speeds."""
    failed = [r for r in rounds if "failed" in r]
    if failed:
        return failed[0]
    ordered = sorted(rounds, key=lambda r: float(r["tokens_per_second"]))
    return {**ordered[len(ordered) // 2], "rounds_tokens_per_second": [r["tokens_per_second"] for r in rounds]}


def compare(device: str, rounds: int, only: list[str], peer_python: str | None, folder: Path) -> dict[str, Any]:
    shape, cases = SHAPES[device], []
    activations = folder / "x.safetensors"
    save_file({"x": planted(8 * shape.batch, shape.d_in, device).cpu()}, activations)
    common = {"d_in": shape.d_in, "d_sae": shape.d_sae, "batch_size": shape.batch, "lr": 1e-3, "seed": 0, "device": device,
              "threads": torch.get_num_threads(), "activations": str(activations)}  # fmt: skip
    for architecture, dtype in CASES[device]:
        name = f"{architecture} {dtype}"
        if only and name not in only and architecture not in only:
            continue
        own: dict[str, Any] = {"l1_coefficient": shape.l1} if architecture == "standard" else {"k": shape.k[architecture]}
        runners: dict[str, list[dict[str, Any]]] = {}
        peaks: dict[str, float] = {}
        for _ in range(rounds):
            peaks = {d: max(peaks.get(d, 0.0), peak(shape, getattr(torch, d), device)) for d in ("float32", "bfloat16")}
            for peer in ("monosem", *PEERS[architecture]):
                interpreter = python_of(peer.split()[0], peer_python)
                if interpreter is None:
                    runners.setdefault(peer, []).append({"failed": ["not set up: python scripts/set_up_peers.py"]})
                    continue
                settle = shape.settle if peer == "monosem" and architecture == "standard" else 6
                counted = 30 if peer == "monosem" else 10
                # a peer without float8, or without bfloat16 on this device, is measured as it is
                lower = "bfloat16" if dtype == "float8" and peer != "monosem" else dtype
                for precision in dict.fromkeys((lower, "float32")):
                    job = {**common, **own, "architecture": architecture, "dtype": precision, "steps": settle + counted,
                           "options": DEFAULTS.get(peer, {})}  # fmt: skip
                    result = run(peer.split()[0], job, folder, interpreter)
                    if "failed" not in result:
                        break
                runners.setdefault(peer, []).append({**summary(result, shape, counted, peaks, precision), "dtype": precision})
        results = {peer: middle(found) for peer, found in runners.items()}
        ours = results["monosem"]
        against = {p: r for p, r in results.items() if p != "monosem" and "failed" not in {**r, **ours}}
        ratios = {p: round(ours["tokens_per_second"] / r["tokens_per_second"], 2) for p, r in against.items()}
        memory = {p: round(ours["memory_mib"] / r["memory_mib"], 2) for p, r in against.items()}
        limit = {d: round(value / (12 * shape.d_in * shape.d_sae)) for d, value in peaks.items()}
        cases.append({"case": name, **own, "speed_ratio": ratios, "memory_ratio": memory, "dense_limit_tokens_per_second": limit,
                      "matmul_peak_flops": peaks, "results": results})  # fmt: skip
        print(f"{name}: {ours.get('tokens_per_second')} tok/s, L0 {ours.get('l0')}; speed {ratios}, memory {memory}", flush=True)
    return {
        "what": "tokens a second of a training step, ours and the peers' own trainers; memory above code and activations",
        "shape": {"d_in": shape.d_in, "d_sae": shape.d_sae, "batch": shape.batch}, "rounds": rounds, "cases": cases,
    }  # fmt: skip


def first_steps(device: str, steps: int, peer_python: str | None, folder: Path) -> dict[str, Any]:
    """Time every step from init on: ours must not be behind at any of them, its dense beginning included.

    Ours has its loops compiled, as a machine has after its first run; loading them, under a second, is not counted.
    """
    shape = SHAPES[device]
    activations = folder / "x.safetensors"
    save_file({"x": planted(8 * shape.batch, shape.d_in, device).cpu()}, activations)
    job = {"architecture": "standard", "dtype": "float32", "d_in": shape.d_in, "d_sae": shape.d_sae, "batch_size": shape.batch,
           "lr": 1e-3, "seed": 0, "device": device, "threads": torch.get_num_threads(), "activations": str(activations),
           "l1_coefficient": shape.l1, "steps": steps}  # fmt: skip
    found, result = {}, {}
    for peer in ("monosem", "saelens"):
        interpreter = python_of(peer, peer_python)
        assert interpreter, f"{peer} is not set up"
        found[peer] = run(peer, job, folder, interpreter)
        if "failed" in found[peer]:
            return found[peer]
        elapsed = list(accumulate(found[peer]["seconds"]))
        at = sorted({1, 10, 50, 100, 200, steps // 2, steps})
        result[peer] = {"seconds_after_step": {n: round(elapsed[n - 1], 2) for n in at if n <= steps},
                        "slowest_step_after_the_first": round(max(found[peer]["seconds"][1:]), 3)}  # fmt: skip
    ours, theirs = (list(accumulate(found[p]["seconds"])) for p in ("monosem", "saelens"))
    behind = [i + 1 for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a > b]
    dense = sum(not s for s in found["monosem"]["settings"]["sparse"]) * 10
    result |= {"steps": steps, "ours_behind_after_steps": behind[:20], "dense_steps_of_ours": f"about {dense}",
               "last_l0": found["monosem"]["l0"][-1]}  # fmt: skip
    return result


def scaling(device: str, folder: Path) -> dict[str, Any]:
    """Ours alone, TopK, one dimension at a time around the shape; and L1 steps by density, dense and sparse."""
    shape, lines = SHAPES[device], []
    interpreter = sys.executable

    def measure(d_sae: int, k: int, batch: int, dtype: str) -> None:
        activations = folder / f"x{batch}.safetensors"
        if not activations.exists():
            save_file({"x": planted(4 * batch, shape.d_in, device).cpu()}, activations)
        job = {"architecture": "topk", "dtype": dtype, "d_in": shape.d_in, "d_sae": d_sae, "batch_size": batch, "lr": 1e-4,
               "seed": 0, "device": device, "threads": torch.get_num_threads(), "activations": str(activations), "k": k,
               "steps": 14}  # fmt: skip
        result = run("monosem", job, folder, interpreter)
        seconds = statistics.median(result["seconds"][-10:])
        memory = result["peak_gpu"] or result["peak_rss"] - result["rss_after_imports"] - result["activations_bytes"]
        lines.append({"d_sae": d_sae, "k": k, "batch": batch, "dtype": dtype, "tokens_per_second": round(batch / seconds),
                      "milliseconds": round(1e3 * seconds, 1), "memory_mib": round(memory / 2**20)})  # fmt: skip
        print(lines[-1], flush=True)

    k = shape.k["topk"]
    for factor in (0.25, 0.5, 1, 2, 4):
        measure(int(shape.d_sae * factor), k, shape.batch, "float32")
    for other in (k // 4, k // 2, 2 * k, 4 * k, 8 * k):
        measure(shape.d_sae, other, shape.batch, "float32")
    for batch in (shape.batch // 4, shape.batch // 2, 2 * shape.batch):
        measure(shape.d_sae, k, batch, "float32")
    return {"shape": {"d_in": shape.d_in}, "topk": lines, "dense_or_sparse": crossing(shape, device)}


def crossing(shape: Shape, device: str) -> list[dict[str, Any]]:
    """Time a dense and a sparse L1 step at several densities, set by the encoder's bias: where LIMITS come from."""
    sys.path.insert(0, str(HERE.parent))
    from sae import TrainConfig
    from sae.adam import Adam
    from sae.architectures.standard import StandardSAE
    from sae.dense_or_sparse import DenseOrSparse
    from sae.ops import kernels_for
    from sae.sae import Site

    x = planted(shape.batch, shape.d_in, device)
    lines = []
    for dtype, density in product(("float32", "bfloat16"), (0.001, 0.005, 0.01, 0.02, 0.05, 0.08, 0.12, 0.16, 0.2, 0.3)):
        config = TrainConfig(d_sae=shape.d_sae, steps=10, lr=1e-9, l1_coefficient=shape.l1, compute_dtype=dtype)
        sae = StandardSAE.initialise(config, Site((shape.d_in,)), x.mean(0).cpu()).to(device)
        with torch.no_grad():
            z = (x[:256] - sae.b_dec) @ sae.W_enc
            sae.b_enc.fill_(-float(z.flatten().float().sort().values[int((1 - density) * z.numel())]))
        line: dict[str, Any] = {"dtype": dtype, "density": density}
        for name, dense in (("dense", True), ("sparse", False)):
            adam = Adam(dict(sae.named_parameters()), sae.encoders(), sae.decoders(), kernels_for(device), betas=(0.9, 0.999),
                        max_norm=1.0, unit=False, compute_dtype=dtype)  # fmt: skip
            seconds = []
            for step in range(7):
                way = DenseOrSparse(config, adam, dense)
                way.leave = way._sparse_ops.room = 1.0
                way.density = density
                start = time.perf_counter()
                found = way.backward(sae, x, config, shape.l1, lambda: None, step)
                assert found.sparse is not dense
                adam.step(1e-9)
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            line[f"{name}_milliseconds"] = round(1e3 * statistics.median(seconds[2:]), 1)
        lines.append(line)
        print(line, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="cases such as 'topk float32', or architectures")
    parser.add_argument("--first-steps", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--steps", type=int, default=1000, help="of --first-steps")
    parser.add_argument("--peer-python", help="an interpreter that has the peers, in place of .venv-peers/NAME")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.first_steps:
            kind, result = "first-steps", first_steps(args.device, args.steps, args.peer_python, folder)
        elif args.scaling:
            kind, result = "scaling", scaling(args.device, folder)
        else:
            kind, result = "training", compare(args.device, args.rounds, args.only, args.peer_python, folder)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{kind}-{args.device}.json"
    result["machine"] = machine("numpy", "safetensors")
    if args.only and path.exists():  # each case is a comparison of its own: those not run again stay
        fresh, result = result, json.loads(path.read_text())
        again = {case["case"]: {**case, "date": fresh["machine"]["date"]} for case in fresh["cases"]}
        result["cases"] = [again.get(case["case"], case) for case in result["cases"]]
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
