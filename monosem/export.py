"""A run's explanations in other tools' files: what these call what the run's config names."""

import re
from datetime import datetime
from pathlib import Path

from activation_store.errors import InputError
from explain.formats import Explanations, Names, write_explanations
from monosem.run import Run
from sae.formats.beside import load_latents

_SHORT = {"hook_resid_pre": "res-pre", "hook_resid_mid": "res-mid", "hook_resid_post": "res", "hook_mlp_out": "mlp-out",
          "mlp.hook_post": "mlp", "hook_attn_out": "att-out", "attn.hook_z": "att"}  # fmt: skip


def export(
    run: Run, folder: Path, to: str, *, model_id: str | None = None, source_set: str | None = None, layer: int | None = None,
    release: str | None = None, creator_id: str | None = None,
) -> tuple[Explanations, Names]:  # fmt: skip
    """Write a run's explanations into a new folder; return what was written and under which names.

    By default the model is called as on the hub, without its owner; the set of sources after the hook and the run, such as
    res-demo; the layer is the hook's.
    """
    latents = load_latents(run.sae_folder())
    explained = Explanations.read(run.explanations, {} if latents is None else {"sae": latents})
    hooks = [unit.hook for unit in explained.units if unit.dictionary == "sae"] or [unit.hook for unit in explained.units]
    unlayered = [unit.hook for unit in explained.units if _layer(unit.hook) is None]
    if layer is None and unlayered:
        raise InputError(f"--layer: none given, and hook {unlayered[0]} names none; give its number")

    def layer_of(hook: str) -> int:
        found = _layer(hook)
        return layer if layer is not None else found if found is not None else 0

    config = run.config
    model = model_id or slug(Path(config.model.id).name.removesuffix(".gguf"))
    short = _SHORT.get(hook_kind := re.sub(r"^blocks\.\d+\.", "", hooks[0]), slug(hook_kind.replace("hook_", "")))
    chosen = source_set or f"{short}-{slug(config.name)}"
    for option, name in (("--model-id", model), ("--source-set", chosen)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):  # they are folders' names, and parts of addresses
            raise InputError(f"{option}: {name!r} given; allowed: letters, digits, dots, - and _")
    explainer = "token-lookup" if config.explain.backend == "lookup" else Path(config.explain.model).name
    names = Names(
        model, chosen, layer_of, release or chosen, dataset=_public(config.data.source), context=config.explain.window,
        explainer=explainer, created=_finished(run), **({} if creator_id is None else {"creator_id": creator_id}),
    )  # fmt: skip
    write_explanations(explained, folder, names, to)
    return explained, names


def slug(name: str) -> str:
    """Return a name as it may stand in an address.

    >>> slug("SmolLM2 135M (Instruct)")
    'smollm2-135m-instruct'
    """
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-._") or "unnamed"


def _layer(hook: str) -> int | None:
    found = re.match(r"blocks\.(\d+)\.", hook)
    return int(found[1]) if found else None


def _public(source: str) -> str:
    """Return a dataset's id, of a local file its name alone: folders are nobody's business."""
    return source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists() else Path(source).name


def _finished(run: Run) -> str:
    """Return when the run was explained, as an ISO time; the epoch where its manifest does not say."""
    said = run.manifest().get("stages", {}).get("explain", {}).get("finished")
    return datetime.strptime(said.removesuffix(" UTC"), "%Y-%m-%d %H:%M:%S").isoformat() if said else "1970-01-01T00:00:00"
