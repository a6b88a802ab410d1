"""Harvest against the plain forward pass: the same model, tokens, batch and dtype, in one run, taking turns.

The peer is transformers' own model with its layers cut off after the hooked one (sdpa attention, inference mode), its
activations thrown away. Ours captures them, computes their statistics, and writes them to a store on disk, checksum and
fsync included. The figure is the ratio of tokens a second, median over rounds.

    python benchmarks/harvest.py [--model demo/SmolLM2-135M-Instruct.Q4_1.gguf] [--layer 9] [--rounds 5]
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import machine

import activation_store.harvest as harvesting
from activation_store.config import DataConfig, HarvestConfig, ModelConfig
from activation_store.subject import Subject, load_subject
from activation_store.text import TokenRows

RESULTS = Path(__file__).parent / "results"


def measure(subject: Subject, layer: int, context: int, tokens: int, batch_tokens: int, rounds: int) -> dict[str, object]:
    hook = f"blocks.{layer}.hook_resid_post"
    sequences, batch = tokens // context, max(1, batch_tokens // context)
    ids = np.random.default_rng(0).integers(5, subject.model.config.vocab_size, (sequences, context), dtype=np.int32)
    rows = TokenRows(ids, np.zeros_like(ids), np.zeros_like(ids), sequences - 1, {}, {})
    harvesting.token_rows = lambda *_: rows  # both sides start from token rows: reading text is not what is compared
    truncated = copy.copy(subject.model.model)
    truncated._modules = dict(subject.model.model._modules)
    truncated.layers = torch.nn.ModuleList(subject.model.model.layers[: layer + 1])

    @torch.inference_mode()
    def plain() -> float:
        start = time.perf_counter()
        for at in range(0, sequences, batch):
            truncated(input_ids=torch.from_numpy(ids[at : at + batch]).long(), use_cache=False)
        return sequences * context / (time.perf_counter() - start)

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            data = DataConfig(source="benchmark", context=context, tokens=tokens)
            begun: list[float] = []

            def progress(done: int, total: int) -> None:  # the first call comes when the model starts to run
                begun.append(time.perf_counter())

            config = HarvestConfig(hooks=(hook,), dtype="bfloat16", batch_size=batch, shard_mb=4)
            harvesting.harvest(subject, data, config, Path(folder) / "store", progress=progress)
            return sequences * context / (time.perf_counter() - begun[0])

    plain(), ours()  # warm up
    rates = {"plain": [], "ours": []}
    for _ in range(rounds):
        rates["plain"].append(plain())
        rates["ours"].append(ours())
    ratios = [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)]
    return {
        "context": context, "batch": batch, "tokens": sequences * context, "rounds": rounds,
        "plain_tokens_per_second": round(statistics.median(rates["plain"])),
        "ours_tokens_per_second": round(statistics.median(rates["ours"])),
        "ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    subject = load_subject(ModelConfig(id=args.model, dtype="bfloat16"))
    cases = [measure(subject, args.layer, context, 32768, 2048, args.rounds) for context in (128, 1024)]
    result = {
        "what": "harvest to disk / plain truncated transformers forward, tokens per second",
        "model": Path(args.model).name, "dtype": "bfloat16", "hook": f"blocks.{args.layer}.hook_resid_post",
        "cases": cases, "machine": machine("transformers", "zarr", "transformer_lens"),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"harvest-{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
