"""The evidence pass against encoding alone: the same store, SAE and batches, in one run, and the memory that it takes.

The store holds Gaussian rows of a language model's width, the SAE is a ReLU one whose biases make some 50 latents fire a token:
every latent is as dense as every other, which is the most work for rankings. Encoding alone reads the same rows, encodes them,
and throws the latents away. The figure is the ratio of tokens a second, the two taking turns on slices of the store, and the
process's peak resident memory over what it held before the pass.

    python benchmarks/evidence.py [--tokens 10000000] [--latents 16384]
"""

import argparse
import json
import math
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from machine import machine

from activation_store import ActivationStore
from explain.evidence import gather_evidence
from sae.architectures.standard import StandardSAE
from sae.sae import SAEConfig

RESULTS = Path(__file__).parent / "results"
HOOK, CONTEXT = "blocks.9.hook_resid_post", 128


def make_store(folder: Path, tokens: int, width: int) -> ActivationStore:
    """A store of `tokens` rows; one random block stands in every shard, turned by another angle."""
    generator = torch.Generator().manual_seed(0)
    ids = np.random.default_rng(0).integers(1, 49152, (tokens // CONTEXT, CONTEXT)).astype(np.int32)
    store = ActivationStore.create(
        folder, ids, np.zeros_like(ids), {HOOK: width}, dtype="bfloat16", shard_sequences=256,
        attributes={"special_token_ids": [0], "train_sequences": len(ids)},
    )  # fmt: skip
    block = torch.randn(256 * CONTEXT, width, generator=generator)
    for shard in range(store.shards):
        part = store.shard_sequences(shard)
        rows = (part.stop - part.start) * CONTEXT
        store.write_shard(shard, {HOOK: block.roll(shard, 1)[:rows].bfloat16()})
    store.finish({})
    return ActivationStore.open(folder)


def make_sae(width: int, latents: int, l0: float) -> StandardSAE:
    sae = StandardSAE(SAEConfig("standard", width, latents, HOOK))
    share = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - l0 / latents))
    with torch.no_grad():
        directions = torch.randn(width, latents, generator=torch.Generator().manual_seed(1))
        sae.W_enc.copy_(torch.nn.functional.normalize(directions, dim=0))
        sae.W_dec.copy_(sae.W_enc.T)
        sae.b_enc.fill_(-float(share))
        sae.b_dec.zero_()
    return sae.requires_grad_(False)


def resident() -> int:
    """Anonymous memory of this process in bytes: pages of files that the kernel keeps are not ours."""
    with open("/proc/self/status") as file:
        return 1024 * int(next(line.split()[1] for line in file if line.startswith("RssAnon")))


class Peak:
    """The most anonymous memory while it runs."""

    def __enter__(self) -> "Peak":
        self.most, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.most = max(self.most, resident())

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


@torch.inference_mode()
def encode_alone(sae: StandardSAE, store: ActivationStore, first: int, last: int) -> float:
    start = time.perf_counter()
    for at in range(first, last, 4096):
        sae.encode_sparse(store.read(HOOK, slice(at, min(at + 4096, last))))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--latents", type=int, default=16384)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--l0", type=float, default=50.0)
    parser.add_argument("--encode-share", type=float, default=0.1, help="of the store that is encoded alone, in twenty slices")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", args.tokens, args.width)
        sae = make_sae(args.width, args.latents, args.l0)
        encode_alone(sae, store, 0, 32768)
        alone: list[float] = []  # seconds a token, taken between the pass's own blocks so that both meet the same machine
        spent = [0.0]
        slices = 20
        size = int(args.tokens * args.encode_share / slices) // 4096 * 4096
        at = [0]

        def progress(done: int, total: int) -> None:
            if size and done >= (at[0] + 0.5) * total / slices:
                seconds = encode_alone(sae, store, at[0] * size, (at[0] + 1) * size)
                alone.append(seconds / size)
                spent[0] += seconds
                at[0] += 1

        before = resident()
        with Peak() as peak:
            start = time.perf_counter()
            evidence = gather_evidence(
                sae, store, HOOK, "train", window=32, top=20, sample=100, seed=0,
                checkpoint=Path(folder) / "checkpoint", progress=progress,
            )  # fmt: skip
            seconds = time.perf_counter() - start - spent[0]
    rate, encode_rate = store.rows / seconds, 1 / statistics.median(alone)
    result = {
        "what": "evidence of all latents, tokens a second, over encoding the same rows alone",
        "tokens": store.rows, "latents": args.latents, "width": args.width, "window": 32, "top": 20, "sample": 100,
        "l0": float(evidence.statistics.density.sum()),
        "encode_tokens_per_second": round(encode_rate), "evidence_tokens_per_second": round(rate),
        "ratio": round(rate / encode_rate, 3), "seconds": round(seconds, 1),
        "memory_added_gib": round((peak.most - before) / 2**30, 3), "memory_peak_gib": round(peak.most / 2**30, 3),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "machine": machine("zarr"),
    }  # fmt: skip
    assert math.isfinite(result["ratio"])
    path = RESULTS / f"evidence-{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    if args.tokens >= 10_000_000:
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
