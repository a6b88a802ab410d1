"""Make what tests/test_synthetic.py holds ours against, by SAELens' own `sae_lens.synthetic`, in tests/golden/.

synthetic-scores: random dictionaries and activations, with the MCC, uniqueness and classification metrics that it finds.
synthetic-model: a model it saved, with hierarchy, exclusion and correlation; synthetic-rates: how often features fire in
it, alone and in pairs, and how strongly, over many of its samples.

    .venv-peers/saelens/bin/python scripts/golden_synthetic.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    compute_classification_metrics,
    feature_uniqueness,
    mean_correlation_coefficient,
)
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
SAMPLES, AT_A_TIME = 400_000, 20_000


def scores() -> None:
    """Noisy copies of features in another order, as wide as there are features, narrower and wider; some latents are dead."""
    found, tensors = {}, {}
    for name, width in (("equal", 40), ("narrow", 24), ("wide", 56)):
        g = torch.Generator().manual_seed(width)
        features = torch.randn(40, 12, generator=g)
        features /= features.norm(dim=1, keepdim=True)
        from_feature = torch.randint(40, (width,), generator=g)
        dictionary = 3 * features[from_feature] + torch.randn(width, 12, generator=g)
        acts = torch.rand(120, 40, generator=g) * (torch.rand(120, 40, generator=g) < 0.1)
        latents = acts[:, from_feature] + torch.rand(120, width, generator=g) * (torch.rand(120, width, generator=g) < 0.03)
        latents[torch.rand(120, width, generator=g) < 0.2] = 0
        latents[:, :3] = 0
        metrics = compute_classification_metrics(latents, acts, dictionary, features)
        found[name] = {
            "mcc": mean_correlation_coefficient(dictionary, features), "uniqueness": feature_uniqueness(dictionary, features),
            "precision": metrics.precision, "recall": metrics.recall, "f1": metrics.f1_score,
        }  # fmt: skip
        tensors |= {f"{name}.features": features, f"{name}.dictionary": dictionary, f"{name}.acts": acts,
                    f"{name}.latents": latents}  # fmt: skip
    save_file(tensors, GOLDEN / "synthetic-scores.safetensors")
    text = json.dumps({"sae-lens": version("sae-lens"), **found}, indent=2)
    (GOLDEN / "synthetic-scores.json").write_text(text + "\n")


@torch.no_grad()
def rates() -> None:
    torch.manual_seed(0)  # of its samples: it draws them from the global generator
    model = SyntheticModel(SyntheticModelConfig(
        num_features=100, hidden_dim=16, firing_probability=ZipfianFiringProbabilityConfig(0.5, 0.5, 0.03),
        hierarchy=HierarchyConfig(
            total_root_nodes=4, branching_factor=3, max_depth=2, mutually_exclusive_portion=0.6, compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        correlation=LowRankCorrelationConfig(rank=6, correlation_scale=0.25, seed=None),
        mean_firing_magnitudes=LinearMagnitudeConfig(1.5, 0.8), std_firing_magnitudes=FoldedNormalMagnitudeConfig(0.5, 0.5),
        bias=0.5, seed=7,
    ))  # fmt: skip
    model.save(GOLDEN / "synthetic-model")
    fires, strength, pairs, mean = torch.zeros(100), torch.zeros(100), torch.zeros(100, 100), torch.zeros(16)
    for _ in range(SAMPLES // AT_A_TIME):
        x, acts = model.sample_with_features(AT_A_TIME)
        on = (acts > 0).float()
        fires, strength, pairs, mean = fires + on.sum(0), strength + acts.sum(0), pairs + on.T @ on, mean + x.sum(0)
    save_file({
        "rate": fires / SAMPLES, "magnitude": strength / fires, "pairs": pairs / SAMPLES, "mean": mean / SAMPLES,
        "samples": torch.tensor(SAMPLES), "std": model.activation_generator.std_firing_magnitudes.contiguous(),
    }, GOLDEN / "synthetic-rates.safetensors")  # fmt: skip


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    scores()
    rates()
