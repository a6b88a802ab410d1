"""What OpenAI's neuron-explainer reads in files of ours, for tests/test_explain_formats.py: in tests/golden/neuron-records/.

`written/` is what monosem writes of made-up units; read.json is what the package's own loaders find there: splits, scores, and
records as it writes them itself.

    python scripts/set_up_peers.py --only neuron_explainer
    PYTHONPATH=. python scripts/golden_neuron_records.py write
    .venv-peers/neuron_explainer/bin/python scripts/golden_neuron_records.py read
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "neuron-records"
TOKENS = ("the", "\t", " river", "\n", "🜁", '"quoted"', "\ufffd", " ", "<|endoftext|>", "\\n", "é", "\u2028")


def write(folder: Path) -> None:
    """Write two units by monosem: one scored, one failed."""
    from explain.examples import Example, Unit
    from explain.formats import Explanations, Names, write_explanations

    def example(number: int, kind: str) -> Example:
        tokens = [TOKENS[(number * 5 + i * (1 + number % 3)) % len(TOKENS)] for i in range(4)] + [f" {number}"]
        strength = 0.0 if kind == "random" and number % 2 else 1 + number / 4
        values = [0.0, strength, 0.0, strength / 2, 0.25 * (strength > 0)]
        return Example(number, kind, list(range(5)), tokens, values)

    units, scores, predicted = [], {}, {}
    for latent in (3, 12):
        train = [example(100 * latent + i, "top" if i < 3 else "sampled") for i in range(6)]
        test = [example(100 * latent + 50 + i, ("top", "sampled", "random", "random")[i % 4]) for i in range(10)]
        unit = Unit("sae", "blocks.7.hook_resid_post", latent, 0.125, 9.5, train, test, 40, 200)
        units.append(unit)
        state = "scored" if latent == 3 else "failed"
        scores[unit.name] = {"unit": unit.name, "state": state, "description": "rivers\tand \"é\" 🜁"}
        predicted[unit.name] = [[0.5 + (i * j) % 4 for j in range(5)] for i in range(10)] if latent == 3 else []
    names = Names(
        "made-up", "res-toy", lambda hook: int(hook.split(".")[1]), "toy", dataset="none", context=5, explainer="nobody",
        created="2026-01-01T00:00:00",
    )  # fmt: skip
    write_explanations(Explanations(units, scores, predicted, {}), folder, names, "openai")


def read(folder: Path) -> dict[str, Any]:
    """Read a folder by the package's own loaders."""
    from importlib.metadata import version

    from neuron_explainer.activations.activations import ActivationRecordSliceParams, load_neuron
    from neuron_explainer.explanations.explanations import load_neuron_explanations
    from neuron_explainer.explanations.scoring import aggregate_scored_sequence_simulations
    from neuron_explainer.fast_dataclasses import dumps

    every = ActivationRecordSliceParams(n_examples_per_split=None)
    found = {}
    for path in sorted((folder / "sae" / "collated-activations").glob("*/*.json")):
        layer, neuron = path.parent.name, path.stem
        record = load_neuron(layer, neuron, dataset_path=path.parents[1].resolve().as_uri())
        results = load_neuron_explanations(str(folder / "sae" / "explanations"), layer, neuron)
        scored = [] if results is None else results.scored_explanations
        pooled = [aggregate_scored_sequence_simulations(one.scored_simulation.scored_sequence_simulations) for one in scored]
        found[f"{layer}/{neuron}"] = {
            "max_activation": record.max_activation,
            "splits": {
                split: [one.tokens for one in getattr(record, f"{split}_activation_records")(every)]
                for split in ("train", "valid", "test")
            },
            "dumped": json.loads(dumps(record)),
            "explanations": [one.explanation for one in scored],
            "stated": [one.get_preferred_score() for one in scored],
            "scores": [
                [float(one.ev_correlation_score), one.rsquared_score, one.absolute_dev_explained_score] for one in pooled
            ],
            "results": None if results is None else json.loads(dumps(results)),
        }
    return {"made_by": {"automated-interpretability": version("automated-interpretability")}, "neurons": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("do", choices=("write", "read"))
    parser.add_argument("--folder", type=Path, default=GOLDEN / "written")
    parser.add_argument("--to", type=Path, default=GOLDEN / "read.json")
    given = parser.parse_args()
    if given.do == "write":
        shutil.rmtree(given.folder, ignore_errors=True)
        write(given.folder)
    else:
        given.to.write_text(json.dumps(read(given.folder), indent=1) + "\n")


if __name__ == "__main__":
    main()
