"""What monosem puts beside weights in every format, and other readers pass over.

latents.safetensors: maximum, density and histogram of each latent. monosem.json: hooks, metadata and whether it is a transcoder,
for formats whose own config has no place for them.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from activation_store.files import write_atomic, write_json
from sae.formats.content import read_config
from sae.sae import SAE, LatentStatistics

LATENTS, FACTS = "latents.safetensors", "monosem.json"


def save_latents(latents: LatentStatistics, folder: Path) -> None:
    """Put the latents' statistics beside an SAE already saved in `folder`."""
    tensors = {name: torch.as_tensor(value).cpu().contiguous() for name, value in vars(latents).items()}
    write_atomic(folder / LATENTS, save(tensors))


def load_latents(folder: Path) -> LatentStatistics | None:
    """Return the latents' statistics that lie in `folder`, or None."""
    if not (folder / LATENTS).exists():
        return None
    side = load_file(folder / LATENTS)
    tokens = int(side.pop("tokens"))
    return LatentStatistics(**side, tokens=tokens)


def save_facts(sae: SAE, folder: Path) -> None:
    """Put hooks, the width of output and metadata into `folder`."""
    cfg = sae.cfg
    facts = {"hook_name": cfg.hook_name, "hook_name_out": cfg.hook_name_out, "d_out": cfg.d_out, "metadata": cfg.metadata}
    write_json(folder / FACTS, facts)


def load_facts(sae: SAE, folder: Path) -> None:
    """Give `sae` the hooks and metadata that lie in `folder`, if any, before those that its format knew.

    Where input and output are equally wide they say, too, whether it is an SAE or a transcoder, which some formats do not.
    """
    facts, cfg = read_config(folder / FACTS), sae.cfg
    if facts is None:
        return
    given = {name: facts[name] for name in ("hook_name", "hook_name_out") if facts.get(name) is not None}
    if cfg.width_out == cfg.d_in:
        transcoder = facts.get("d_out", facts.get("hook_name_out")) is not None  # d_out was not always written
        given["d_out"] = cfg.d_in if transcoder else None
    sae.cfg = replace(cfg, metadata={**cfg.metadata, **facts.get("metadata", {})}, **given)
