"""Golden files of foreign SAE formats: small SAEs that the peers' own packages made, saved and ran on real activations.

    python scripts/golden_formats.py --store runs/demo/activations [--out tests/golden]

tests/golden/<format>/<case>/ gets the peer's files, and expected.safetensors: the latents `f` and the reconstructions `x_hat`
that the peer's own code computes of the rows in tests/golden/inputs.safetensors, the first 40 channels of activations of a store.
Packages exclude one another, so each runs in an environment of its own in .venv-peers (scripts/set_up_peers.py makes three; the
fourth, circuit_tracer, is made by --set-up). What runs there is golden_cases.py, which imports nothing of ours.

Nobody packages OpenAI's code: its dictionary and its formulas (Gao et al. 2024, and the `LN` and `TopK` of their model.py) are
written out by hand. No package writes Gemma Scope's files: they are written by hand, and read and run by SAELens' and
circuit-tracer's own loaders. tests/test_formats.py also has peers load what we saved.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-peers"
ORDER = ("openai", "saelens", "dictionary_learning", "sparsify", "circuit_tracer")  # Gemma Scope's files: SAELens' run makes them
CIRCUIT_TRACER = ("circuit-tracer==0.5.0", "transformers==4.57.3", "torch==2.13.0", "numpy==2.4.6", "safetensors==0.8.0")
ROWS, CHANNELS = 16, 40


def inputs_of(store: Path, hook: str | None) -> Any:
    """Rows of real activations, spread over the store, float32 (ROWS, CHANNELS); the first of each sequence is left out."""
    import torch

    from activation_store import ActivationStore

    opened = ActivationStore.open(store)
    context, sequences = opened.context, opened.tokens.shape[0]
    rows = [(i * sequences // ROWS) * context + 1 + i * (context - 2) // ROWS for i in range(ROWS)]
    return torch.stack([opened.read(hook or opened.hooks[0], slice(row, row + 1))[0, :CHANNELS] for row in rows]).contiguous()


def python_of(peer: str) -> Path:
    return PEERS / peer / "bin" / "python"


def in_environment(peer: str, *arguments: str) -> None:
    """Run golden_cases.py with a peer's python."""
    python = Path(sys.executable) if peer == "openai" else python_of(peer)
    if not python.exists():
        make = "--set-up" if peer == "circuit_tracer" else f"scripts/set_up_peers.py --only {peer}"
        raise SystemExit(f"{peer} is not set up ({make})")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), str(ROOT / "scripts" / "golden_cases.py"), peer, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{peer}: failed with exit status {done.returncode}:\n{done.stderr[-3000:]}")


def set_up_circuit_tracer() -> None:
    if not python_of("circuit_tracer").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS / "circuit_tracer")], check=True)
    subprocess.run([str(python_of("circuit_tracer")), "-m", "pip", "install", "--quiet", *CIRCUIT_TRACER], check=True)


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; what was made in it replaces the folders of the same names in `folder`."""
    with tempfile.TemporaryDirectory() as aside:
        yield Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        for made in Path(aside).iterdir():
            shutil.rmtree(folder / made.name, ignore_errors=True)
            shutil.copytree(made, folder / made.name) if made.is_dir() else shutil.copy(made, folder / made.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="an activation store, whose first hook is read")
    parser.add_argument("--hook", help="another hook of it")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden")
    parser.add_argument("--set-up", action="store_true", help="make .venv-peers/circuit_tracer first")
    args = parser.parse_args()
    from safetensors.torch import save_file

    if args.set_up:
        set_up_circuit_tracer()
    with replaced(args.out) as aside:
        inputs = aside / "inputs.safetensors"
        save_file({"x": inputs_of(args.store, args.hook)}, inputs)
        for peer in ORDER:
            (aside / peer).mkdir(exist_ok=True)
            in_environment(peer, "--inputs", str(inputs), "--out", str(aside))
            print(f"{peer}: {len(list((aside / peer).iterdir()))} cases", flush=True)


if __name__ == "__main__":
    main()
