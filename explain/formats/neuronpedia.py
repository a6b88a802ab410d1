"""Neuronpedia's export, version 1: <model>/<layer>-<set>/{features,activations,explanations}/batch-N.jsonl.gz.

Their importer takes a table's columns from the keys of a file's first line, so every line of a file has the same keys. They
export no scores: ours lie beside, in scores/batch-N.jsonl.gz, by the explanation's id.

Their own batches of the three kinds do not hold the same features (some are cut in the order of numbers, some of texts), so the
reader relies on indices alone.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from activation_store.errors import InputError
from explain.examples import SIDES, Example, Unit, assert_disjoint
from explain.formats.described import Described, Explanations, Names, fresh
from explain.formats.lines import Record, as_gzip, as_lines, may, need, put, read_lines, storable
from sae.sae import HISTOGRAM_EDGES, LatentStatistics

BATCH = 1024
_TOP = -1.0  # binMin and binContains of a window that is among the strongest
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_ID_LENGTH = 25
_OURS = re.compile(rf"({'|'.join(SIDES)})/(\w+)/(\d+)(?:/(\d+))?")  # dataIndex: side, kind, window, and quantile


def write_neuronpedia(explained: Explanations, folder: Path, names: Names, batch: int = BATCH) -> None:
    """Write into an empty folder that stands for their `v1/`: a source each dictionary, neurons under "<set>-neurons"."""
    kind, model = _explainer(names)
    put(folder / "config" / "explanation_type.jsonl", as_lines([kind]))
    put(folder / "config" / "explanation_model_type.jsonl", as_lines([model]))
    for dictionary, units in explained.by_dictionary().items():
        source_set = names.source_set if dictionary == "sae" else f"{names.source_set}-{dictionary}"
        source = f"{names.layer(units[0].hook)}-{source_set}"
        where = folder / names.model_id / source
        for name, line in _catalogue(names, source, source_set, units).items():
            put(where / f"{name}.jsonl", as_lines([line]))
        for number, start in enumerate(range(0, len(units), batch)):
            lines: dict[str, list[Record]] = defaultdict(list)
            for unit in units[start : start + batch]:
                statistics = explained.latents.get(dictionary)
                lines["features"].append(_feature(unit, names, source, source_set, statistics))
                lines["activations"] += _activations(unit, names, source, statistics)
                found = explained.scores.get(unit.name, {"state": "not scored", "reason": None, "description": None})
                description = None if found.get("description") is None else storable(found["description"])
                known = None
                if found["state"] == "scored" and description:
                    explanation = _explanation(unit, description, names, source)
                    lines["explanations"].append(explanation)
                    known = explanation["id"]
                lines["scores"].append({
                    "explanationId": known, "modelId": names.model_id, "layer": source, "index": str(unit.latent), **found,
                    "description": description, "instrument": explained.instrument,
                })  # fmt: skip
            for kind_of_line, of_kind in lines.items():
                if of_kind:  # of an empty file the importer would know no columns
                    put(where / kind_of_line / f"batch-{number}.jsonl.gz", as_gzip(_alike(of_kind)))


def _explainer(names: Names) -> tuple[Record, Record]:
    """Return the rows that explanations refer to: how they were made, and by which model."""
    by = storable(names.explainer)
    kind = {
        "name": "monosem", "displayName": "monosem", "description": "Described by monosem from training windows, scored on "
        "held-out ones.", "featured": False, "isAttention": False, "explainerModelSettingsId": None, "settings": None,
        "url": None, "creatorName": names.creator, "creatorId": names.creator_id, "createdAt": names.created,
        "updatedAt": names.created,
    }  # fmt: skip
    model = {
        "name": by, "displayName": by, "description": by, "featured": False, "openRouterModelId": None, "url": None,
        "creatorName": names.creator, "createdAt": names.created, "updatedAt": names.created,
    }  # fmt: skip
    return kind, model


def _catalogue(names: Names, source: str, source_set: str, units: Sequence[Unit]) -> dict[str, Record]:
    """Return the lines of model, release, source set and source; 0 layers, as their converters have it, says unknown."""
    model, created, creator = names.model_id, names.created, names.creator_id
    description = f"{units[0].dictionary} at {units[0].hook}"
    return {
        "model": {
            "id": model, "instruct": re.search(r"(^|[-_.])(it|instruct|chat)([-_.]|$)", model, re.IGNORECASE) is not None,
            "displayName": model, "displayNameShort": model, "creatorId": creator, "tlensId": None, "dimension": None,
            "layers": 0, "neuronsPerLayer": 0, "owner": "", "website": None, "visibility": "PUBLIC", "createdAt": created,
            "updatedAt": created,
        },
        "release": {
            "name": names.release, "description": names.release, "descriptionShort": names.release, "creatorId": creator,
            "creatorName": names.creator, "creatorNameShort": names.creator, "creatorEmail": None, "urls": [],
            "visibility": "PUBLIC", "isNewUi": False, "featured": False, "defaultSourceId": None, "defaultUmapSourceIds": [],
            "createdAt": created,
        },
        "sourceset": {
            "modelId": model, "name": source_set, "type": "", "description": description, "creatorId": creator,
            "creatorName": names.creator, "creatorEmail": None, "urls": [], "releaseName": names.release, "defaultRange": 1,
            "defaultShowBreaks": True, "showDfa": False, "showCorrelated": False, "showHeadAttribution": False,
            "showUmap": False, "hasDashboards": True, "visibility": "PUBLIC", "createdAt": created,
        },
        "source": {
            "id": source, "modelId": model, "setName": source_set, "creatorId": creator, "visibility": "PUBLIC",
            "hasDashboards": True, "inferenceEnabled": False, "saelensConfig": None, "saelensRelease": None,
            "saelensSaeId": None, "hfRepoId": None, "hfFolderId": None, "hasUmap": False, "hasUmapLogSparsity": False,
            "hasUmapClusters": False, "num_prompts": None, "num_tokens_in_prompt": names.context, "dataset": names.dataset,
            "notes": None, "createdAt": created,
        },
    }  # fmt: skip


def _feature(
    unit: Unit, names: Names, source: str, source_set: str, statistics: LatentStatistics | None
) -> Record:  # fmt: skip
    heights, values = _histogram(unit, statistics)
    return {
        "modelId": names.model_id, "layer": source, "index": str(unit.latent), "sourceSetName": source_set,
        "creatorId": names.creator_id, "createdAt": names.created, "maxActApprox": unit.max_activation, "hasVector": False,
        "vector": [], "vectorLabel": None, "vectorDefaultSteerStrength": 10.0, "hookName": unit.hook, "topkCosSimIndices": [],
        "topkCosSimValues": [], "neuron_alignment_indices": [], "neuron_alignment_values": [], "neuron_alignment_l1": [],
        "correlated_neurons_indices": [], "correlated_neurons_pearson": [], "correlated_neurons_l1": [],
        "correlated_features_indices": [], "correlated_features_pearson": [], "correlated_features_l1": [],
        "neg_str": [storable(token) for token, _ in unit.suppressed], "neg_values": [value for _, value in unit.suppressed],
        "pos_str": [storable(token) for token, _ in unit.promoted], "pos_values": [value for _, value in unit.promoted],
        "frac_nonzero": unit.density, "freq_hist_data_bar_heights": heights, "freq_hist_data_bar_values": values,
        "logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": [], "decoder_weights_dist": [],
    }  # fmt: skip


def _histogram(unit: Unit, statistics: LatentStatistics | None) -> tuple[list[float], list[float]]:
    """Return how many tokens fall between powers of two of activation, and the geometric middles of these bins."""
    if statistics is None:
        return [], []
    counts = statistics.histogram[unit.latent].tolist()
    used = [i for i, count in enumerate(counts) if count]
    span = range(used[0], used[-1] + 1) if used else range(0)
    return [float(counts[i]) for i in span], [(HISTOGRAM_EDGES[i] * HISTOGRAM_EDGES[i + 1]) ** 0.5 for i in span]


def _activations(unit: Unit, names: Names, source: str, statistics: LatentStatistics | None) -> list[Record]:
    lines = []
    for side in SIDES:
        for example in getattr(unit, side):
            values, quantile = example.activations, "" if example.quantile is None else f"/{example.quantile}"
            top = max(values, default=0.0)
            low, high, share = _bin(example, unit, statistics)
            line = {
                "modelId": names.model_id, "layer": source, "index": str(unit.latent), "creatorId": names.creator_id,
                "createdAt": names.created, "tokens": [storable(token) for token in example.tokens], "values": values,
                "maxValue": top, "maxValueTokenIndex": values.index(top) if values else 0,
                "minValue": min(values, default=0.0), "dataIndex": f"{side}/{example.kind}/{example.window}{quantile}",
                "dataSource": names.dataset, "dfaValues": [], "dfaTargetIndex": None, "dfaMaxValue": None, "lossValues": [],
                "logitContributions": None, "binMin": low, "binMax": high, "binContains": share,
                "qualifyingTokenIndex": values.index(top) if top > 0 else None,
            }  # fmt: skip
            lines.append({"id": _id(line), **line})
    return lines


def _bin(example: Example, unit: Unit, statistics: LatentStatistics | None) -> tuple[float, float, float | None]:
    """Return binMin, binMax and binContains: what a window was chosen for.

    The strongest have their group. Other firing ones have the interval, between powers of two, of their largest activation, and
    the share of all activations that lie in it, None where there are no statistics. In silent ones it is an empty interval at 0.
    """
    if example.kind == "top":
        return _TOP, unit.max_activation, _TOP
    top = max(example.activations, default=0.0)
    if top <= 0:
        return 0.0, 0.0, 0.0
    bins = len(HISTOGRAM_EDGES) - 1
    at = max(0, sum(edge <= top for edge in HISTOGRAM_EDGES) - 1)
    at = min(at, bins - 1)
    low, high = HISTOGRAM_EDGES[at] if at else 0.0, HISTOGRAM_EDGES[at + 1]
    if statistics is None:
        return low, high, None
    counts = statistics.histogram[unit.latent]
    return low, high, float(counts[at] / counts.sum()) if counts.sum() else None


def _explanation(unit: Unit, description: str, names: Names, source: str) -> Record:
    line = {
        "modelId": names.model_id, "layer": source, "index": str(unit.latent), "description": description,
        "typeName": "monosem", "explanationModelName": storable(names.explainer), "authorId": names.creator_id, "notes": None,
        "createdAt": names.created, "embedding": None, "umap_x": None, "umap_y": None, "umap_cluster": None,
        "umap_log_feature_sparsity": None,
    }  # fmt: skip
    return {"id": _id(line), **line}


def _id(line: Record) -> str:
    """Return what looks like one of their ids, a cuid: c and 24 letters and digits, the same for the same content."""
    number = int.from_bytes(hashlib.sha256(json.dumps(line).encode()).digest())
    digits = ""
    for _ in range(_ID_LENGTH - 1):
        number, digit = divmod(number, len(_DIGITS))
        digits += _DIGITS[digit]
    return f"c{digits}"


def _alike(lines: Sequence[Record]) -> list[Record]:
    """Give every line the same keys in the same order; null where it had none."""
    keys = dict.fromkeys(key for line in lines for key in line)
    return [{key: line.get(key) for key in keys} for line in lines]


# Reading


def read_neuronpedia(folder: Path, indices: Collection[int] | None = None) -> Iterator[Described]:
    """Yield the features of a source with their examples and descriptions; `indices` names those wanted.

    `folder` is a source's, or one above it that holds no other. What monosem wrote has its sides back. Else the strongest
    windows, which are what Neuronpedia's explainers are shown, become training examples and those of intervals test ones; where
    there is but one kind, every second of the strongest becomes a test example. Texts that come twice count once. Token ids are
    not in these files: numbers stand for them, equal for equal tokens of the folder. One batch of activations is held at a time.
    """
    source = _source(folder)
    numbers: dict[str, int] = {}
    features = dict(_features(source, indices))
    descriptions: dict[int, list[str]] = defaultdict(list)
    for where, record in _records(source, "explanations"):
        index = _index(record, where)
        if index in features:
            descriptions[index].append(need(record, "description", "text", where))
    done = set[int]()
    for path in _batches(source, "activations"):
        examples: dict[int, list[tuple[str | None, Example]]] = defaultdict(list)
        for where, record in read_lines(path):
            index = _index(record, where)
            if index in done:
                raise InputError(f"{where}: index: {index} has activations in another batch too; put them in one")
            if index in features:
                examples[index].append(_example(record, where, len(examples[index]), numbers))
        for index, found in examples.items():
            done.add(index)
            yield Described(_unit(features[index], found), descriptions[index])
    for index, feature in features.items():
        if index not in done:
            yield Described(_unit(feature, []), descriptions[index])


def read_scores(folder: Path) -> Iterator[Record]:
    """Yield the lines of the side file that monosem writes; none where somebody else wrote the folder."""
    for _, record in _records(_source(folder), "scores"):
        yield record


def _source(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = [folder] if (folder / "features").is_dir() else sorted(path.parent for path in folder.glob("**/features"))
    if len(found) != 1:
        said = "; ".join(str(path.relative_to(folder)) for path in found[:8]) or "none"
        raise InputError(f"{folder}: {len(found)} sources in it ({said}); name one, a folder that holds features/")
    return found[0]


def _batches(source: Path, kind: str) -> list[Path]:
    """Return the batches of a kind in the order of their numbers. A batch unpacked beside its .gz counts once."""
    found: dict[int, Path] = {}
    for path in sorted((source / kind).glob("batch-*.jsonl*")):
        match = re.fullmatch(r"batch-(\d+)\.jsonl(\.gz)?", path.name)
        if match:
            found.setdefault(int(match[1]), path)
    return [found[number] for number in sorted(found)]


def _records(source: Path, kind: str) -> Iterator[tuple[str, Record]]:
    for path in _batches(source, kind):
        yield from read_lines(path)


def _index(record: Record, where: str) -> int:
    for name in ("modelId", "layer"):
        need(record, name, "text", where)
    index = record.get("index")
    if isinstance(index, int) and not isinstance(index, bool):  # their converters leave it a number
        return index
    if not need(record, "index", "text", where).isdecimal():
        raise InputError(f"{where}: index: {index!r} given; it must be the digits of a whole number")
    return int(record["index"])


def _features(source: Path, indices: Collection[int] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield what a unit needs of each feature, without vectors and histograms."""
    wanted = None if indices is None else set(indices)
    for where, record in _records(source, "features"):
        index = _index(record, where)
        if wanted is None or index in wanted:
            sides = {}
            for side, name in (("promoted", "pos"), ("suppressed", "neg")):
                tokens = may(record, f"{name}_str", "a list of texts", where, [])
                values = may(record, f"{name}_values", "a list of numbers", where, [])
                if len(tokens) != len(values):
                    raise InputError(f"{where}: {name}_values: {len(values)} given for {len(tokens)} of {name}_str")
                sides[side] = list(zip(tokens, map(float, values), strict=True))
            yield index, {
                "dictionary": record["layer"], "hook": may(record, "hookName", "text", where, record["layer"]),
                "latent": index, "density": float(need(record, "frac_nonzero", "a number", where)),
                "max_activation": may(record, "maxActApprox", "a number", where, None), **sides,
            }  # fmt: skip


def _example(record: Record, where: str, number: int, numbers: dict[str, int]) -> tuple[str | None, Example]:
    """Return a window with the side it was on, None where somebody else wrote it."""
    tokens = need(record, "tokens", "a list of texts", where)
    values = [float(value) for value in need(record, "values", "a list of numbers", where)]
    if len(tokens) != len(values):
        raise InputError(f"{where}: values: {len(values)} given for {len(tokens)} tokens")
    ids = [numbers.setdefault(token, len(numbers)) for token in tokens]
    ours = _OURS.fullmatch(str(record.get("dataIndex")))
    if ours:
        quantile = None if ours[4] is None else int(ours[4])
        return ours[1], Example(int(ours[3]), ours[2], ids, tokens, values, quantile)
    top = may(record, "binContains", "a number", where, _TOP) == _TOP  # older exports have no intervals
    kind = "random" if max(values, default=0.0) <= 0 else "top" if top else "sampled"
    return None, Example(number, kind, ids, tokens, values)


def _unit(feature: dict[str, Any], found: list[tuple[str | None, Example]]) -> Unit:
    seen = set[str | int]()
    sides = {side: fresh((e for known, e in found if known == side), seen) for side in SIDES}
    others = sorted((e for known, e in found if known is None), key=lambda e: -max(e.activations, default=0.0))
    strongest = fresh((e for e in others if e.kind == "top"), seen)
    weaker = fresh((e for e in others if e.kind != "top"), seen)
    if any(e.kind == "sampled" for e in weaker):
        sides["train"] += strongest
    else:
        sides["train"] += strongest[::2]
        sides["test"] += strongest[1::2]
    sides["test"] += weaker
    top = feature["max_activation"]
    if top is None:  # they may leave it out
        top = max((a for _, e in found for a in e.activations), default=0.0)
    unit = Unit(**{**feature, "max_activation": float(top), **sides})
    assert_disjoint(unit)
    return unit
