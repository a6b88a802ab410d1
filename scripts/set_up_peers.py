"""Set up the packages that ours is measured against, each in an environment of its own.

Their requirements exclude one another and ours (SAELens wants transformer-lens < 4, dictionary_learning wants nnsight < 0.4),
so none of them can stand in `.venv`. The torch is the same everywhere: a benchmark of trainers is not to be one of torches.

    python scripts/set_up_peers.py [--only saelens sparsify dictionary_learning neuron_explainer] [--folder .venv-peers]

pip's own settings apply; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the small torch of a machine without
a GPU. Environments that are current are left alone.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-peers"
STAMP = "installed.json"


class Peer(NamedTuple):
    pins: tuple[str, ...]
    module: str
    """What an environment has to be able to import to be any good."""
    unwanted: tuple[str, ...] = ()


# As a pin, 2.13.0 is also met by a local build such as 2.13.0+cpu, where pip is shown one.
EVERYWHERE = ("torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "safetensors==0.8.0")
PEERS = {
    "saelens": Peer(("sae-lens==6.54.12", "transformer-lens==3.9.0", *EVERYWHERE), "sae_lens.training.sae_trainer"),
    "sparsify": Peer(("eai-sparsify==1.3.3", "schedulefree==1.4.1", *EVERYWHERE), "sparsify.trainer"),
    "dictionary_learning": Peer(
        ("dictionary-learning==0.1.0", "nnsight==0.3.7", *EVERYWHERE),
        "dictionary_learning.trainers",
        # nnsight asks for torchvision and never imports it. transformers imports what it finds, and the torchvision of the
        # package index fails beside a torch that was built for the CPU.
        unwanted=("torchvision",),
    ),
    "neuron_explainer": Peer(("automated-interpretability==0.0.24", "numpy==1.26.4"), "neuron_explainer.explanations.scoring"),
}


def run(command: Sequence[str]) -> str:
    """Run `command` and return its output; if it fails, stop with the end of what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)}\nfailed with exit status {done.returncode}:\n{tail}")
    return done.stdout


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def stamp_of(name: str) -> dict[str, object]:
    """What an environment has to have been made from to be current."""
    peer = PEERS[name]
    return {"pins": list(peer.pins), "without": list(peer.unwanted), "python": platform.python_version()}


def current(name: str, folder: Path) -> bool:
    environment = folder / name
    try:
        stamp = json.loads((environment / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return bool(stamp == stamp_of(name)) and python_of(environment).exists()


def set_up(name: str, folder: Path, run: Callable[[Sequence[str]], str] = run) -> bool:
    """Make the environment of a peer unless it is current; return whether anything was done."""
    peer, environment = PEERS[name], folder / name
    if current(name, folder):
        print(f"{name}: {environment} is current ({', '.join(peer.pins)})")
        return False
    print(f"{name}: installing {', '.join(peer.pins)} into {environment}", flush=True)
    if environment.exists():  # half an installation, or one of other pins, of which pip would keep leftovers
        shutil.rmtree(environment)
    environment.parent.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "venv", str(environment)])
    python = str(python_of(environment))
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", *peer.pins])
    if peer.unwanted:
        run([*pip, "uninstall", "--quiet", "--yes", *peer.unwanted])
    run([python, "-c", f"import {peer.module}"])
    frozen = run([*pip, "list", "--format", "freeze"]).split()
    (environment / STAMP).write_text(json.dumps(stamp_of(name)) + "\n")  # last: a stamp means that all went well
    pinned = {pin.partition("==")[0] for pin in peer.pins}
    found = [package for package in frozen if package.partition("==")[0].lower().replace("_", "-") in pinned]
    print(f"{name}: {len(frozen)} packages, among them {', '.join(found)}", flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    for name in args.only:
        set_up(name, args.folder)


if __name__ == "__main__":
    main()
