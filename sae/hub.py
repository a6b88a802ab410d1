"""SAEs on the Hugging Face hub: push with a model card made from what the SAE knows of itself, pull, and load by address."""

import glob
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from activation_store.errors import InputError, first_line
from activation_store.files import folder_aside
from sae.formats.beside import FACTS, LATENTS
from sae.formats.content import CONFIGS, SUFFIXES
from sae.sae import SAE

_CARD, _EVALUATION = "README.md", "evaluation.json"
_FILES = (".jsonl", ".json", ".txt", ".csv", ".parquet", ".gz", ".zst", ".gguf", ".safetensors")
_MARK = "<!-- made by monosem -->"  # a card without it was written by somebody, and stays
_BESIDE = (*CONFIGS, "config.yaml", FACTS, LATENTS, _EVALUATION, _CARD)
_NO_SAE = (LATENTS, "sparsity.safetensors", "activations_store_state.safetensors")
_ADDRESS = re.compile(
    r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<early>[^/@]+))?(?:/(?P<inside>[^@]*?))?/?(?:@(?P<late>[^@]+))?"
)
_FACTS = {  # of the config and the metadata, as the card calls them
    "architecture": "architecture", "d_in": "d_in", "d_out": "d_out", "d_sae": "d_sae", "k": "k", "hook_name": "hook",
    "hook_name_out": "hook predicted", "model_name": "model", "model_revision": "model revision", "model_dtype": "model dtype",
    "basis": "weights of the model", "dataset_path": "text", "context_size": "context", "prepend_bos": "BOS before each text",
    "normalize_activations": "normalisation at run time", "dtype": "dtype",
}  # fmt: skip
_FIGURES = {
    "l0": "L0, latents a token", "explained_variance": "explained variance", "mse": "squared error, summed over d_in",
    "cosine": "cosine of reconstruction and activation", "relative_reconstruction_bias": "relative reconstruction bias",
    "ce_clean": "cross-entropy of the model, nats a token", "ce_spliced": "the same, activations replaced by reconstructions",
    "ce_ablated": "the same, activations replaced by zero", "ce_recovered": "cross-entropy recovered",
    "kl": "KL divergence of the model with reconstructions from the model, nats a token",
    "dead_fraction": "latents that never fired", "tokens": "held-out tokens",
    "held_out_hash": "hash of the held-out set",
}  # fmt: skip


def push(sae: SAE | str | Path, repo: str, *, folder: str = "", private: bool = False, revision: str | None = None) -> str:
    """Upload an SAE to the model repository `repo` in one commit, making it if need be; return the commit's address.

    `sae` is an SAE, an SAE's folder of any format, or a run's folder; evaluation.json is taken along from beside it. `folder`
    says where in the repository it goes. A model card goes with it; the repository's own, at its top, lists its folders, unless
    somebody wrote it by hand: that is left alone. Who may write is the hub's business: log in with `hf auth login`, or set
    HF_TOKEN. Raises InputError where there is no SAE, and where the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with tempfile.TemporaryDirectory() as aside:
        if isinstance(sae, SAE):
            place = Path(aside) / "sae"
            sae.save(place)
        else:
            place = sae_folder(sae)
            sae = SAE.load(place)
        places = [place, place.parent] if place.name == "sae" else [place]  # a run's has it beside
        evaluation = next((folder / _EVALUATION for folder in places if (folder / _EVALUATION).is_file()), None)
        files = {file.name: file for file in sorted(place.iterdir()) if file.is_file() and not file.name.startswith(".")}
        if evaluation is not None:
            files[_EVALUATION] = evaluation
        figures = json.loads(evaluation.read_text()) if evaluation is not None else None
        inside, api = PurePosixPath(folder.strip("/")), HfApi()
        with _hub(repo):
            api.create_repo(repo, private=private, exist_ok=True)
            names = [file.rfilename for file in api.model_info(repo, revision=revision).siblings or ()]
            cards = {str(inside / _CARD): card(sae, repo, folder.strip("/"), figures)}
            if _CARD in names and _MARK not in Path(api.hf_hub_download(repo, _CARD, revision=revision)).read_text():
                cards.pop(_CARD, None)
            elif str(inside) != ".":
                cards[_CARD] = _index(repo, {str(inside), *_folders(names)})
            made = api.create_commit(
                repo,
                [
                    *(CommitOperationAdd(str(inside / name), file) for name, file in files.items() if name != _CARD),
                    *(CommitOperationAdd(name, text.encode()) for name, text in cards.items()),
                ],
                commit_message=f"Upload SAE: {sae.cfg.architecture}, {sae.cfg.d_sae} latents",
                revision=revision,
            )
    return str(made.commit_url)


def pull(address: str, to: str | Path) -> Path:
    """Copy an SAE from the hub into the new folder `to`; `address` is owner/repository[/folder or file][@revision].

    Raises InputError where `to` has something in it already, and as `fetch`.
    """
    to = Path(to)
    if to.exists() and (to.is_file() or any(to.iterdir())):
        raise InputError(f"{to}: exists already; name a new folder")
    found = fetch(address)
    folder = found.parent if found.is_file() else found
    with folder_aside(to) as aside:
        for file in folder.iterdir():
            if file.is_file() and (folder == found or file == found or file.name in _BESIDE):
                shutil.copy(file, aside / file.name)  # the cache holds links
    return to


def fetch(address: str) -> Path:
    """Bring an SAE into the hub's cache on this machine, and return the folder or file there.

    hf://owner/repository[/folder or file][@revision]: of a folder only what lies directly in it is brought, and only what an
    SAE may consist of. Without a network (HF_HUB_OFFLINE=1) the cache has to have it. Raises InputError for what the hub does
    not have, and where several files of weights lie in the folder.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    parsed = _ADDRESS.fullmatch(address)
    if parsed is None:
        raise InputError(f"{address}: not an address on the hub; allowed: hf://owner/repository[/folder or file][@revision]")
    repo, inside, revision = parsed["repo"], parsed["inside"] or "", parsed["early"] or parsed["late"]
    with _hub(address):
        try:
            names = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()]
            patterns = [glob.escape(name) for name in _wanted(names, inside, address)]
            return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns), inside)
        except OfflineModeIsEnabled:
            cached = _cached(repo, revision)
    if cached is None or not (cached / inside).exists():
        raise InputError(f"{address}: not in the cache of this machine, and HF_HUB_OFFLINE forbids to ask the hub for it")
    return cached / inside


def _cached(repo: str, revision: str | None) -> Path | None:
    """Return the folder that holds what the cache has of a repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)  # of a repository that has more than was asked for
        return Path(partial) if partial else None


def card(sae: SAE, repo: str, folder: str = "", figures: dict[str, Any] | None = None) -> str:
    """Return the model card: what the SAE is, how it was measured (`figures`, an evaluation.json), and how to load it."""
    from huggingface_hub import ModelCardData

    facts = {**sae.cfg.metadata, **{name: value for name, value in sae.facts().items() if name != "metadata"}}
    ids = {name: facts[name] if _is_hub_id(facts.get(name)) else None for name in ("model_name", "dataset_path")}
    for name, hub_id in ids.items():
        if facts.get(name) is not None and hub_id is None:  # where it lay on somebody's disk is nobody's business
            facts[name] = Path(str(facts[name])).name
    transcoder = facts["d_out"] is not None or facts["hook_name_out"] is not None
    kind = "transcoder" if transcoder else "sparse autoencoder"
    model = facts.get("model_name")
    header = ModelCardData(
        library_name="monosem", tags=[kind.replace(" ", "-"), "sae", "interpretability", sae.cfg.architecture, "saelens"],
        base_model=ids["model_name"], datasets=ids["dataset_path"],
    )  # fmt: skip
    what = f"A {kind} ({sae.cfg.architecture}) of {sae.cfg.d_sae:,} latents"
    what += f" on `{sae.cfg.hook_name}`" if sae.cfg.hook_name else ""
    what += f" of {model}." if model else "."
    table = {title: facts[name] for name, title in _FACTS.items() if facts.get(name) is not None}
    address = "/".join(["hf:/", repo, *([folder] if folder else [])])
    lines = ["---", header.to_yaml(), "---", _MARK, f"# {PurePosixPath(repo, folder).name}", "", what, "", *_table(table), ""]
    measured = {title: figures[name] for name, title in _FIGURES.items() if name in figures} if figures else {}
    lines += ["## Measured on held-out text", "", *(_table(measured) if measured else ["Not measured."]), ""]
    lines += ["## Loading", "", "```python", "from sae import SAE  # pip install monosem", "", f'sae = SAE.load("{address}")',
              "latents = sae.encode(activations)  # (batch, d_in) -> (batch, d_sae); raw activations of the model",
              "reconstruction = sae(activations)", "```", ""]  # fmt: skip
    return "\n".join(lines)


def sae_folder(path: str | Path) -> Path:
    """Return the SAE's folder: that in a run's folder, or the path itself. Raises InputError where there is none."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: not a folder; give an SAE's folder or a run's")
    folder = path / "sae" if (path / "sae").is_dir() else path
    if folder != path and not (folder / "cfg.json").exists():
        names = ", ".join(sorted(str(inner) for inner in folder.iterdir() if inner.is_dir()))
        raise InputError(f"{path}: a run of several SAEs; give one of {names}")
    return folder


def _table(values: dict[str, Any]) -> list[str]:
    def shown(value: Any) -> str:
        text = "undefined" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")

    return ["| | |", "|---|---|", *(f"| {name} | {shown(value)} |" for name, value in values.items())]


def _is_hub_id(name: object) -> bool:
    """Say whether a model or data set is named as the hub names them, which a path on somebody's disk is not."""
    if not isinstance(name, str) or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is None:
        return False
    return Path(name).suffix not in _FILES and not Path(name).exists()


def _index(repo: str, folders: set[str]) -> str:
    """Return the card of a repository whose folders each hold an SAE and its card."""
    from huggingface_hub import ModelCardData

    header = ModelCardData(library_name="monosem", tags=["sparse-autoencoder", "sae", "interpretability", "saelens"])
    lines = ["---", header.to_yaml(), "---", _MARK, f"# {repo.split('/')[-1]}", "", "One SAE a folder:", ""]
    lines += [f"- `{folder}`" for folder in sorted(folders)]
    address = f"hf://{repo}/{min(folders)}"
    lines += ["", "```python", "from sae import SAE  # pip install monosem", "", f'sae = SAE.load("{address}")', "```", ""]
    return "\n".join(lines)


def _folders(names: list[str]) -> list[str]:
    """Return the folders that hold files of weights, sorted; the top of the repository is none."""
    return sorted({str(PurePosixPath(name).parent) for name in names if name.endswith(SUFFIXES) and "/" in name})


def _wanted(names: list[str], inside: str, address: str) -> list[str]:
    """Return the files that make up the SAE at `inside`, a folder or a file of weights."""
    folder = str(PurePosixPath(inside).parent) if inside in names else inside or "."
    here = [name for name in names if str(PurePosixPath(name).parent) == folder]
    beside = [name for name in here if PurePosixPath(name).name in _BESIDE]
    weights = [name for name in here if name.endswith(SUFFIXES) and PurePosixPath(name).name not in _NO_SAE]
    if inside in names:
        weights = [inside]
    if not weights:
        folders = _folders(names)
        said = ", ".join(folders[:8]) + (" and others" if len(folders) > 8 else "")
        raise InputError(f"{address}: no weights lie there; they do in: {said or 'no folder of this repository'}")
    if len(weights) > 1:
        said = ", ".join(weights[:8]) + (" and others" if len(weights) > 8 else "")
        raise InputError(f"{address}: {len(weights)} files of weights lie there; name one of them: {said}")
    return [*weights, *beside]


@contextmanager
def _hub(what: str) -> Iterator[None]:
    """Turn what the hub and the network say into one clear InputError."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except InputError:
        raise
    except (OSError, HFValidationError) as error:  # the hub's refusals and being offline are OSErrors
        raise InputError(_said(what, error)) from error
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # the network's have no public base
            raise
        raise InputError(_said(what, error)) from error


def _said(what: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    mend = "; log in with `hf auth login` or set HF_TOKEN, and see that the name is right" if status in (401, 403, 404) else ""
    return f"{what}: the Hugging Face hub could not do it ({first_line(error)}){mend}"
