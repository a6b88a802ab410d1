"""Make what tests/test_scores.py holds ours against: the three scores of OpenAI's neuron-explainer, in tests/golden/.

True activations are those of the package's own few-shot neurons and puzzles; predictions are these under noise, by a fixed seed.
No text is written, only numbers.

    python scripts/set_up_peers.py --only neuron_explainer
    .venv-peers/neuron_explainer/bin/python scripts/golden_explain.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from neuron_explainer.explanations.explanations import ScoredSequenceSimulation, SequenceSimulation
from neuron_explainer.explanations.few_shot_examples import FewShotExampleSet
from neuron_explainer.explanations.puzzles import PUZZLES_BY_NAME
from neuron_explainer.explanations.scoring import aggregate_scored_sequence_simulations

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "neuron-explainer-scores.json"


def scored(tokens: list[str], true: list[float], predicted: list[float]) -> ScoredSequenceSimulation:
    simulation = SequenceSimulation(
        tokens=tokens, expected_activations=predicted, activation_scale=None, distribution_values=[],
        distribution_probabilities=[],
    )  # fmt: skip
    return ScoredSequenceSimulation(
        simulation=simulation, true_activations=true, ev_correlation_score=0.0, rsquared_score=0.0,
        absolute_dev_explained_score=0.0,
    )  # fmt: skip


def main() -> None:
    neurons = {
        f"{name.value} {number}": example.activation_records
        for name in (FewShotExampleSet.ORIGINAL, FewShotExampleSet.NEWER)
        for number, example in enumerate(name.get_examples())
    } | {f"puzzle {name}": puzzle.activation_records for name, puzzle in PUZZLES_BY_NAME.items()}
    cases = []
    chance = np.random.default_rng(0)
    for name, records in neurons.items():
        true = [[float(value) for value in record.activations] for record in records]
        top = max(max(values) for values in true)
        for noise in (0.1, 1.0):
            predicted = [
                [round(max(0.0, value + noise * top * float(chance.normal())), 6) for value in values] for values in true
            ]
            found = aggregate_scored_sequence_simulations(
                [scored(record.tokens, t, p) for record, t, p in zip(records, true, predicted, strict=True)]
            )
            cases.append({
                "neuron": name, "true": true, "predicted": predicted, "ev_correlation": float(found.ev_correlation_score),
                "rsquared": found.rsquared_score, "absolute_dev_explained": found.absolute_dev_explained_score,
            })  # fmt: skip
    made_by = {"automated-interpretability": version("automated-interpretability"), "numpy": version("numpy")}
    GOLDEN.write_text(json.dumps({"made_by": made_by, "cases": cases}) + "\n")
    print(GOLDEN, len(cases))


if __name__ == "__main__":
    main()
