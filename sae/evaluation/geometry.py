"""How close decoder rows lie to each other: latents that say nearly the same."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 24  # cosines held at once
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_LISTED = 10


@torch.inference_mode()
def decoder_clusters(W_dec: Tensor, threshold: float) -> dict[str, Any]:
    """Return the cosine of each decoder row (d_sae, d) to its nearest other, summarised, and clusters of those above `threshold`.

    A cluster is a connected component of two latents or more. `sizes` counts clusters by size, `largest` lists members of the
    largest ones. Cosines are computed a block of rows at a time; of a block only its own links are kept, and by whom each
    latent is already linked.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rows = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
    latents = len(rows)
    nearest = torch.empty(latents)
    cluster = np.arange(latents)
    step = max(1, _BLOCK // latents)
    for start in range(0, latents, step):
        stop = min(start + step, latents)
        cosines = rows[start:stop] @ rows.T
        own = torch.arange(stop - start, device=rows.device)
        cosines[own, own + start] = -torch.inf
        nearest[start:stop] = cosines.amax(1).cpu()
        left, right = (cosines > threshold).nonzero(as_tuple=True)
        if len(left):
            ends = cluster[left.cpu().numpy() + start], cluster[right.cpu().numpy()]
            links = coo_matrix((np.ones(len(left), bool), ends), shape=(latents, latents))
            cluster = connected_components(links, directed=False)[1][cluster]
    known = nearest[torch.isfinite(nearest)]  # a dictionary of one latent has no nearest other
    sizes = np.bincount(cluster)
    joined = np.flatnonzero(sizes > 1)
    largest = joined[np.argsort(-sizes[joined], kind="stable")][:_LISTED]
    return {
        "nearest_cosine_mean": _figure(known.mean()),
        "nearest_cosine_max": _figure(known.amax()) if len(known) else None,
        "nearest_cosine_quantiles": {str(q): _figure(known.quantile(q)) if len(known) else None for q in _QUANTILES},
        "cluster_cosine": threshold,
        "clusters": len(joined),
        "clustered_fraction": float(sizes[joined].sum() / latents),
        "sizes": {str(size): int(count) for size, count in zip(*np.unique(sizes[joined], return_counts=True), strict=True)},
        "largest": [np.flatnonzero(cluster == number)[:50].tolist() for number in largest],
    }


@torch.inference_mode()
def decoder_shares(W_dec: Tensor, columns: Mapping[str, slice]) -> dict[str, dict[str, Any]]:
    """Return which share of latents' decoder norms lies at each hook of a crosscoder, ||W_dec,i^h|| / sum_h ||W_dec,i^h||.

    Latents near 1 are of that hook alone, those at 1 / hooks of all alike (the relative decoder norm of Lindsey et al. 2024,
    "Sparse Crosscoders for Cross-Layer Features and Model Diffing"). A mean, quantiles, and counts of ten equal bins from 0 to 1,
    over latents whose decoder is not zero.
    """
    norms = torch.stack([W_dec[:, part].detach().float().norm(dim=1) for part in columns.values()], 1)
    norms = norms[norms.sum(1) > 0]
    shares = norms / norms.sum(1, keepdim=True)
    return {
        hook: {
            "mean": _figure(share.mean()),
            "quantiles": {str(q): _figure(share.quantile(q)) if len(share) else None for q in _QUANTILES},
            "histogram": torch.histogram(share.cpu(), 10, range=(0.0, 1.0)).hist.long().tolist(),
        }
        for hook, share in zip(columns, shares.T, strict=True)
    }


def _figure(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None
