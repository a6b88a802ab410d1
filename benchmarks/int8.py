"""What int8 rows cost: the demo's SAE trained on bfloat16 rows and on the same rows in int8, evaluated alike.

Needs a finished harvest of the demo (`monosem harvest configs/demo.yaml`). Its store is copied row by row into an int8 one;
both SAEs are trained with the demo's settings and evaluated on the bfloat16 held-out rows and in the model.

    python benchmarks/int8.py [--config configs/demo.yaml] [train.steps=700 ...]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import machine

from activation_store import ActivationStore
from monosem.config import load_config
from monosem.run import Run
from sae import train
from sae.evaluate import evaluate

RESULTS = Path(__file__).parent / "results"
FIGURES = ("l0", "explained_variance", "ce_clean", "ce_spliced", "ce_ablated", "ce_recovered")


def copy_as_int8(store: ActivationStore, path: Path) -> ActivationStore:
    """Write the rows of `store` again, in int8: same tokens, shards and statistics."""
    span = store.shard_sequences(0)
    attributes = {k: v for k, v in store.attrs.items() if k not in ("dtype", "block_rows", "complete", "statistics")}
    copy = ActivationStore.create(
        path, store.tokens, store.documents, {hook: store.width(hook) for hook in store.hooks}, dtype="int8",
        shard_sequences=span.stop - span.start, attributes=attributes,
    )  # fmt: skip
    for shard in range(store.shards):
        where = store.shard_sequences(shard)
        rows = slice(where.start * store.context, where.stop * store.context)
        copy.write_shard(shard, {hook: store.read(hook, rows) for hook in store.hooks})
    copy.finish({hook: store.statistics(hook) for hook in store.hooks})
    return copy


def rounding(store: ActivationStore, copy: ActivationStore, hook: str) -> dict[str, float]:
    """Return the share of the variance that rounding removes, over 65,536 rows, and the largest share in one dimension."""
    kept = torch.from_numpy(~store.special.reshape(-1)[: 1 << 16])
    x, y = (s.read(hook, slice(0, 1 << 16))[kept] for s in (store, copy))
    error, variance = (x - y).square().mean(0), x.var(0)
    return {"of_total_variance": float(error.sum() / variance.sum()), "of_the_worst_dimension": float((error / variance).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    run = Run(load_config(args.config, args.overrides))
    store, config = run.store(), run.config.shared
    result: dict[str, Any] = {"what": "the demo's SAE trained on bfloat16 and on int8 rows, evaluated on bfloat16 rows"}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        copy = copy_as_int8(store, Path(folder) / "int8")
        result["rounding"] = rounding(store, copy, run.config.hook)
        for name, source in (("bfloat16", store), ("int8", copy)):
            statistics = source.statistics(run.config.hook)
            batches = source.batches(run.config.hook, config.batch_size, config.seed, memory_mb=config.shuffle_mb)
            sae = train(batches, config, mean=torch.from_numpy(statistics.mean), mean_norm=statistics.mean_norm)
            sae.with_metadata(hook_name=run.config.hook)
            found = evaluate(sae, store, run.subject.model, run.config.evaluate)
            result[name] = {key: round(found[key], 5) for key in FIGURES}
            print(name, result[name], flush=True)
    result["machine"] = machine("transformers", "numpy")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "int8-cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
