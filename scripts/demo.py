"""The demo: fetch model and text, then `monosem run configs/demo.yaml`."""

import json
import os
import sys
from pathlib import Path

from fetch_demo import main as fetch

ROOT = Path(__file__).resolve().parent.parent


def demo() -> None:
    os.chdir(ROOT)
    fetch()
    from monosem.cli import main

    sys.argv = ["monosem", "run", "configs/demo.yaml", *sys.argv[1:]]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
    scores = [json.loads(line) for line in Path("runs/demo/explanations/scores.jsonl").read_text().splitlines()]
    best = max((s for s in scores if s["dictionary"] == "sae"), key=lambda s: s["ev_correlation"] or -1)
    print(f"""
Everything lies in runs/demo:
  report/index.html           the report; open it in a browser
  sae/                        the SAE (SAELens folder: cfg.json + sae_weights.safetensors)
  activations/                the activation store (Zarr)
  explanations/scores.jsonl   one line a feature; evaluation.json and metrics.jsonl hold the SAE's figures
Steer with one of its features ({best["description"]}):
  {Path(sys.executable).with_name("monosem")} steer runs/demo --feature {best["latent"]} --clamp 0.5x --prompt "I think that" """)


if __name__ == "__main__":
    demo()
