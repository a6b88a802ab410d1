"""What the peers' runs share: the job, the batches, the clock, the memory, the result.

Each peer runs in its own environment and process, from a job file to a result file, so nothing here may import ours. The
batches are cut from a tensor that already lies on the device: what is timed is the peer's training step, not its reading of
data. Its L0 is taken between the timed steps.
"""

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")  # before a peer imports it
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")
L0_EVERY = 10


@dataclass(frozen=True)
class Job:
    """`options` overrides settings that a peer has by default or chooses for speed; `save` is a folder for what was trained."""

    architecture: str
    d_in: int
    d_sae: int
    batch_size: int
    steps: int
    lr: float
    seed: int
    device: str
    dtype: str
    threads: int
    activations: str
    k: int = 0
    l1_coefficient: float = -1.0
    options: dict[str, Any] = field(default_factory=dict)
    save: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("architecture", ARCHITECTURES), ("device", ("cpu", "cuda")), ("dtype", ("float32", "bfloat16", "float8")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise SystemExit(f"job.{name}: {getattr(self, name)!r} is none of {', '.join(allowed)}")
        for name in ("d_in", "d_sae", "batch_size", "steps", "threads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise SystemExit(f"job.{name}: {getattr(self, name)!r} is no positive whole number")
        if self.architecture == "standard":
            if self.l1_coefficient < 0:
                raise SystemExit("job.l1_coefficient: the standard architecture needs one")
        elif self.architecture != "jumprelu" and (not isinstance(self.k, int) or not 1 <= self.k <= self.d_sae):
            raise SystemExit(f"job.k: {self.k!r} is no whole number from 1 to {self.d_sae}, which {self.architecture} needs")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("job.device: there is no CUDA device")

    @classmethod
    def read(cls, path: Path) -> "Job":
        found = json.loads(path.read_text())
        found = {name: value for name, value in found.items() if value is not None}
        known = {f.name for f in fields(cls)}
        if found.keys() - known:
            raise SystemExit(f"job: unknown {', '.join(sorted(found.keys() - known))}")
        missing = [name for name in known - {"k", "l1_coefficient", "options", "save"} if name not in found]
        if missing:
            raise SystemExit(f"job: lacks {', '.join(sorted(missing))}")
        return cls(**found)

    def choose(self, **defaults: Any) -> dict[str, Any]:
        """Return a peer's settings, those that the job overrides replaced."""
        if self.options.keys() - defaults.keys():
            raise SystemExit(f"job.options: {', '.join(sorted(self.options.keys() - defaults.keys()))} cannot be chosen here")
        return defaults | self.options


class Batches:
    """Batch `i` of the activations in order, wrapping around: views, so drawing one costs nothing."""

    def __init__(self, x: torch.Tensor, batch_size: int) -> None:
        if len(x) == 0 or len(x) % batch_size:
            raise SystemExit(f"activations: {len(x)} rows are no multiple of the batch size ({batch_size})")
        self.x, self.batch_size = x, batch_size

    def __getitem__(self, i: int) -> torch.Tensor:
        start = i * self.batch_size % len(self.x)
        return self.x[start : start + self.batch_size]


def load(job: Job) -> torch.Tensor:
    x = load_file(job.activations, device=job.device)["x"]
    if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != job.d_in:
        raise SystemExit(f"activations: {tuple(x.shape)} of {x.dtype}, expected (rows, {job.d_in}) of float32")
    if not torch.isfinite(x.sum()):  # this also reads every page of the mapped file, so that no step waits for the disk
        raise SystemExit("activations: not finite")
    return x


class Meter:
    """Times a trainer from outside: whatever happens between two draws of batches is one step."""

    def __init__(self, job: Job, batches: Batches) -> None:
        self.job, self.batches = job, batches
        self.seconds: list[float] = []
        self.l0: list[float] = []
        self.l0_steps: list[int] = []

    def steps(self, l0: Callable[[torch.Tensor], float]) -> Iterator[torch.Tensor]:
        """Yield the batches; `l0` of the batch just trained on is asked for now and then, while the clock stands still.

        The last step ends with one more draw (`next(steps, None)`), which trainers that count their steps do not make.
        """
        for step in range(self.job.steps):
            batch = self.batches[step]
            self.synchronize()
            start = time.perf_counter()
            yield batch
            self.synchronize()
            self.seconds.append(time.perf_counter() - start)
            if step % L0_EVERY == 0 or step == self.job.steps - 1:
                self.l0.append(l0(batch))
                self.l0_steps.append(step)

    def synchronize(self) -> None:
        if self.job.device == "cuda":
            torch.cuda.synchronize()


def memory(line: str) -> int:
    """Return a line of the kernel's account of this process, in bytes."""
    try:
        found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    # ru_maxrss only where there is no such account: a child inherits it from its parent, however large that was
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def run(
    peer: str,
    packages: tuple[str, ...],
    check: Callable[[Job], None],
    train: Callable[[Job, Meter], tuple[dict[str, Any], float]],
) -> None:
    """Do the job named on the command line: `check` refuses what the peer lacks, `train` returns settings and last loss."""
    rss = memory("VmRSS")
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: {sys.argv[0]} JOB.json RESULT.json")
    job = Job.read(Path(sys.argv[1]))
    check(job)
    torch.set_num_threads(job.threads)
    x = load(job)
    meter = Meter(job, Batches(x, job.batch_size))
    torch.manual_seed(job.seed)
    settings, loss = train(job, meter)
    Path(sys.argv[2]).write_text(json.dumps({
        "peer": peer, "versions": {name: version(name) for name in (*packages, "torch")}, "settings": settings,
        "seconds": meter.seconds, "l0": meter.l0, "l0_steps": meter.l0_steps, "loss": loss,
        "rss_after_imports": rss, "peak_rss": memory("VmHWM"), "activations_bytes": x.nbytes,
        "peak_gpu": torch.cuda.max_memory_allocated() if job.device == "cuda" else None,
    }, indent=2) + "\n")  # fmt: skip
