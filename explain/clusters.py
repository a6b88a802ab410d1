"""One label for latents that point the same way: what their descriptions have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from activation_store.files import read_json_lines, write_json_lines
from explain.backends import Backend, RequestFailed
from explain.prompting import prompt
from sae.sae import SAE

_SHOWN = 30  # descriptions of a cluster's members


def grouped(sae: SAE, latents: Sequence[int], number: int) -> list[list[int]]:
    """Part latents into `number` groups by direction: average linkage on the cosine distance of decoder rows, largest first."""
    from sklearn.cluster import AgglomerativeClustering

    if len(latents) < 2 or number >= len(latents):
        return [[latent] for latent in latents]
    rows = sae.directions(torch.tensor(latents, device=sae.b_dec.device)).float().cpu().numpy()
    labels = AgglomerativeClustering(n_clusters=number, metric="cosine", linkage="average").fit_predict(rows)
    groups = [[latent for latent, label in zip(latents, labels, strict=True) if label == one] for one in range(number)]
    return sorted((group for group in groups if group), key=lambda group: (-len(group), group))


async def label_clusters(
    sae: SAE, dictionary: str, descriptions: dict[int, str], number: int, backend: Backend, path: Path
) -> dict[str, int]:  # fmt: skip
    """Group the described latents and write one line a cluster: its latents, state, label, and the reason where there is none.

    A group of one has its member's description. Labelled clusters are not asked for again. Returns counts by state.
    """
    known = {tuple(line["latents"]): line for line in read_json_lines(path) if line["state"] == "labelled"}
    lines = list[dict[str, Any]]()
    for group in grouped(sae, sorted(descriptions), number):
        line = known.get(tuple(group))
        if line is None:
            line = {"dictionary": dictionary, "latents": group, "state": "labelled", "label": None, "reason": None}
            said = list(dict.fromkeys(descriptions[latent] for latent in group))
            try:
                shown = "\n".join(f"- {text}" for text in said[:_SHOWN])
                line["label"] = said[0] if len(said) == 1 else await backend.write(prompt("cluster"), shown)
            except RequestFailed as error:
                line |= {"state": "failed", "reason": str(error)}
        lines.append(line)
    write_json_lines(path, lines)
    return {state: sum(line["state"] == state for line in lines) for state in ("labelled", "failed")}
