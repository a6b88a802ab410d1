"""What an SAE has recovered of a synthetic model: scores against the features that are really there.

Definitions are those of SAELens 6 (`sae_lens.synthetic.evals`), so figures compare with SynthSAEBench's: the mean correlation
coefficient (MCC) of Song et al. 2025 (arXiv 2505.20254), and F1 of latents as detectors of features.
"""

from typing import Any

import torch
from torch import Tensor

from activation_store.errors import InputError
from sae.sae import SAE
from sae.synthetic import SyntheticModel

HELD_OUT = 1 << 40  # number of the first batch to score on: training never gets there
FOUND = 0.9  # |cosine| from which a feature counts as found
PAIRED = 0.5  # |cosine| from which a latent counts as a feature's, when absorption is looked for


def cosines(dictionary: Tensor, features: Tensor) -> Tensor:
    """Return |cosine| between dictionary rows (m, d) and features (n, d), (m, n); 0 for rows of norm 0."""
    one, other = (rows.float() / rows.float().norm(dim=1, keepdim=True).clamp(min=1e-8) for rows in (dictionary, features))
    cosine: Tensor = (one @ other.T).abs()
    return cosine


def match(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns, min(m, n) each, of the one-to-one matching with the largest sum of `cosine` (m, n)."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cosine.cpu().numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


def mcc(dictionary: Tensor, features: Tensor) -> float | None:
    """Return the mean |cosine| over the min(m, n) pairs of the best one-to-one matching; None where there is none to match."""
    cosine = cosines(dictionary, features).cpu()
    rows, columns = match(cosine)
    return float(cosine[rows, columns].mean()) if len(rows) else None


class Detection:
    """Counts of which latents fire where which features do, over batches; a latent's feature is that of largest |cosine|."""

    def __init__(self, cosine: Tensor) -> None:
        """Start with nothing counted; `cosine` (d_sae, n)."""
        self.feature = cosine.argmax(1) if cosine.shape[1] else torch.empty(0, dtype=torch.int64)
        self.both, self.fires = (torch.zeros(len(cosine), dtype=torch.int64) for _ in range(2))
        self.present = torch.zeros(cosine.shape[1], dtype=torch.int64)
        self.rows = 0

    def update(self, latents: Tensor, hits: Tensor, features: Tensor, rows: int) -> None:
        """Add a batch of `rows`: its (entry,) latents, whether the latent's feature was there (entry,) bool, its features."""
        self.both += torch.bincount(latents[hits], minlength=len(self.both))
        self.fires += torch.bincount(latents, minlength=len(self.fires))
        self.present += torch.bincount(features, minlength=len(self.present))
        self.rows += rows

    def figures(self) -> dict[str, float | None]:
        """Return means over all latents of precision, recall and F1, as SAELens takes them: 0 for a latent that never fires."""
        if not len(self.both) or not self.rows:
            return {"f1": None, "precision": None, "recall": None}
        both, present = self.both.double(), self.present[self.feature].double()
        precision, recall = both / self.fires.clamp(min=1), both / present.clamp(min=1)
        f1 = 2 * both / (self.fires + present).clamp(min=1)  # 2 P R / (P + R)
        return {"f1": float(f1.mean()), "precision": float(precision.mean()), "recall": float(recall.mean())}


@torch.no_grad()
def recovery(sae: SAE, model: SyntheticModel, *, rows: int = 65_536, first: int = HELD_OUT) -> dict[str, Any]:
    """Return how well `sae`, which takes the model's raw activations, has found the model's features.

    On `rows` rows (whole batches, from number `first` on):

    - mcc: see `mcc`. found: the share of features whose matched |cosine| is above 0.9. mean_max_cosine: over features, of
      the largest |cosine| with any decoder row. uniqueness: different best features of latents, over d_sae.
    - f1, precision, recall: of each latent as a detector of the feature it is most like; see `Detection`.
    - explained_variance = 1 - sum||x - x_hat||^2 / sum||x - mean||^2; l0 and true_l0, latents and features a row;
      shrinkage, the mean of ||x_hat|| / ||x||; dead_latents, that never fired, and dead_fraction.
    - absorption: of the `absorption_cases` in which a child fires, and both it and its parent have a latent (matched, with
      |cosine| above 0.5), the share on which the parent's latent is silent while the child's fires (Chanin et al. 2024, "A is
      for Absorption", stated for features that are known).

    A figure that is undefined is None. Raises InputError where the SAE's width is not the model's, or `rows` is below 1.
    """
    if sae.cfg.d_in != model.features.shape[1] or sae.cfg.width_out != sae.cfg.d_in:
        raise InputError(f"d_in: the SAE takes {sae.cfg.d_in} and gives {sae.cfg.width_out}, but the model's activations are "
                         f"{model.features.shape[1]} wide")  # fmt: skip
    if rows < 1:
        raise InputError(f"rows: {rows} given; at least 1 is needed")
    device, d_sae, n = sae.b_dec.device, sae.cfg.d_sae, len(model.features)
    cosine = cosines(sae.directions(torch.arange(d_sae, device=device)).cpu(), model.features)
    matched, of = match(cosine)
    close = cosine[matched, of]
    latent_of = torch.full((n,), -1)
    latent_of[of[close > PAIRED]] = matched[close > PAIRED]

    detection, error, square, shrinkage, norms, seen = Detection(cosine), 0.0, 0.0, 0.0, 0, 0
    total = torch.zeros(sae.cfg.d_in, dtype=torch.float64)
    cases, absorbed = 0, 0
    for number in range(first, first + -(-rows // model.batch_size)):
        x, truth = model.batch(number)
        f, x_hat = sae.reconstruct_sparse(x.to(device))
        entries = int(f.starts[-1])
        row, latent, x_hat = f.rows[:entries].cpu().long(), f.index[:entries].cpu(), x_hat.float().cpu()
        present, fires = truth.rows.long() * n + truth.index, row * d_sae + latent  # sorted codes of (row, feature or latent)
        detection.update(latent, _among(row * n + detection.feature[latent], present), truth.index, len(x))

        parent = model.parent[truth.index]
        above, below = torch.where(parent >= 0, latent_of[parent], -1), latent_of[truth.index]
        child = (above >= 0) & (below >= 0)
        at = truth.rows.long()[child] * d_sae
        silent = ~_among(at + above[child], fires) & _among(at + below[child], fires)
        cases, absorbed = cases + int(child.sum()), absorbed + int(silent.sum())

        error += float((x - x_hat).double().square().sum())
        square += float(x.double().square().sum())
        total += x.double().sum(0)
        norm = x.norm(dim=1)
        some = norm > 1e-6
        shrinkage, norms = shrinkage + float((x_hat.norm(dim=1)[some] / norm[some]).sum()), norms + int(some.sum())
        seen += len(x)

    variance = square - float(total.square().sum()) / seen
    dead = int((detection.fires == 0).sum())
    return {
        "mcc": float(close.mean()) if len(close) else None,
        "found": float((close > FOUND).sum()) / n,
        "mean_max_cosine": float(cosine.amax(0).mean()) if d_sae else None,
        "uniqueness": int((torch.bincount(detection.feature, minlength=n) > 0).sum()) / d_sae,
        **detection.figures(),
        "explained_variance": 1 - error / variance if variance > 1e-12 * square else None,
        "l0": int(detection.fires.sum()) / seen, "true_l0": int(detection.present.sum()) / seen,
        "shrinkage": shrinkage / norms if norms else None,
        "dead_latents": dead, "dead_fraction": dead / d_sae,
        "absorption": absorbed / cases if cases else None, "absorption_cases": cases,
        "rows": seen,
    }  # fmt: skip


def _among(codes: Tensor, ordered: Tensor) -> Tensor:
    """Say of each code whether it is among the ordered ones."""
    if not len(ordered):
        return torch.zeros(len(codes), dtype=torch.bool)
    place = torch.searchsorted(ordered, codes).clamp(max=len(ordered) - 1)
    return ordered[place] == codes
