"""The run's report: one HTML file that opens with the network off.

Tokens, descriptions and completions are untrusted. Markup comes from `tag` alone, which escapes every string that it
did not make itself, and the page's policy forbids every load and every script but our own, named by its hash.
"""

import base64
import hashlib
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from activation_store.files import write_atomic
from explain.choice import CHOICE_KINDS
from explain.judge import KINDS
from explain.summary import OF_UNITS

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_VOID = {"meta", "input", "img"}
_KINDS = {
    "top": "strongest", "sampled": "sampled where it fires, weak to strong", "random": "drawn at random",
    "neighbour": "silent, where a neighbour fires", "similar": "silent, near in meaning",
}  # fmt: skip
_HEADLINES = {
    "l0": ("L0", "latents active a token"),
    "explained_variance": ("Explained variance", "of held-out activations"),
    "ce_recovered": ("CE recovered", "of what zero-ablation costs"),
    "dead_fraction": ("Dead fraction", "latents that never fire"),
}
_FIGURES = {
    **{key: ", ".join(words) for key, words in _HEADLINES.items()}, "mse": "MSE, summed over d_in",
    "ce_clean": "Cross-entropy, clean", "ce_spliced": "Cross-entropy, reconstruction spliced in",
    "ce_ablated": "Cross-entropy, zero-ablated", "tokens": "Tokens", "ce_tokens": "Tokens behind the cross-entropies",
}  # fmt: skip
_CONTROLS = {"ev_correlation": "Score (Pearson)", "lookup_correlation": "Lookup", "shuffled_correlation": "Shuffled"}
_SCORES = {
    **_CONTROLS, "rsquared": "R²", "rsquared_centred": "R², centred", "absolute_dev_explained": "Abs. dev. explained",
    "population_correlation": "Over all windows", "hard_correlation": "Against hard negatives", "label_mass": "Mass on levels",
}  # fmt: skip
_JUDGED = {
    "balanced_accuracy": "Balanced accuracy", "f1": "F1", "auc": "AUC", "population_precision": "Precision at the true rate",
    "hard_balanced_accuracy": "Balanced accuracy, hard negatives",
}  # fmt: skip
_MARGINS = {"shuffled": "Over shuffled", "lookup": "Over lookup"}


@dataclass(frozen=True)
class ReportInputs:
    """What a run has to show; whatever a stage has not written yet is None or empty.

    metrics, evaluation, summary, scores and units are the run's files as read back. Keyed by unit name ("sae/12"):
    predictions, one list of predicted activations a test example; histograms, (n + 1 log-spaced edges of activation, n
    counts). steering: {unit, prompt, edit, baseline, steered}. plots: name -> PNG. sweep: what `sae.sweep.summary` gave, if the
    SAE is one of several.
    """

    title: str
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    summary: dict[str, Any] | None
    scores: list[dict[str, Any]]
    units: list[dict[str, Any]]
    predictions: dict[str, list[list[float]]]
    histograms: dict[str, tuple[list[float], list[int]]]
    steering: list[dict[str, Any]]
    plots: dict[str, bytes]
    sweep: dict[str, Any] | None = None


def write_report(inputs: ReportInputs, path: Path) -> Path:
    """Write the report to `path`, whole or not at all, and return `path`. Equal inputs give equal bytes."""
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=f"{_POLICY}; script-src 'sha256-{digest}'"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", inputs.title),
        tag("style", Html((_HERE / "report.css").read_text(encoding="utf-8"))),
    )
    header = tag("header", tag("h1", inputs.title), _facts("Run", inputs.facts))
    body = tag("body", header, tag("main", _metrics(inputs), _features(inputs)), tag("script", Html(script)))
    page = join(Html("<!doctype html>\n"), tag("html", head, body, lang="en"))
    write_atomic(path, page.encode("utf-8", "backslashreplace"))  # a lone surrogate has no UTF-8
    return path


# Markup


class Html(str):
    """Markup that is safe as it stands; every other string is escaped when it becomes part of a page."""


# Control characters would vanish, and those that turn the writing direction would rearrange what stands beside them
_TURNING = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_VISIBLE = {c: f"⟨U+{c:04X}⟩" for c in (*range(0x80, 0xA0), *_TURNING)} | {c: chr(0x2400 + c) for c in range(32)}
_VISIBLE |= {0x0A: "↵", 0x09: "⇥", 0x7F: "␡"}


def _escape(text: str) -> str:
    return html.escape(text.translate(_VISIBLE))


def tag(name: str, /, *children: str, **attributes: str | float | bool | None) -> Html:
    """Return an element. Strings that are not `Html` are escaped; None and False leave an attribute out, True bare.

    >>> tag("a", "1 < 2", tag("b", "&"), class_="x", title='"', hidden=True)
    '<a class="x" title="&quot;" hidden>1 &lt; 2<b>&amp;</b></a>'
    """
    opening = name
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            opening += f" {key}" if value is True else f' {key}="{_escape(str(value))}"'
    return Html(f"<{opening}>" if name in _VOID else f"<{opening}>{join(*children)}</{name}>")


def join(*parts: str) -> Html:
    """Return the parts one after another, escaped where they are not `Html`."""
    return Html("".join(part if isinstance(part, Html) else _escape(part) for part in parts))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: float) -> str:
    """Return three significant digits, more where the number is whole or large.

    >>> [_short(v) for v in (3, 1234567, 0.0123456, 45678.9, 1e-7)]
    ['3', '1,234,567', '0.0123', '45,679', '1e-07']
    """
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _figure(value: Any, why: str = "not recorded", form: str | None = None) -> Html:
    """Return a number, or a dash that says on hover why there is none: a missing figure never looks like a zero."""
    if not _is_number(value):
        return tag("abbr", "–", title=why)
    return join(format(value, form) if form else _short(value))


def _percent(share: Any) -> Html:
    return join(_figure(100 * share, form=".2g"), "\N{NO-BREAK SPACE}%") if _is_number(share) else _figure(None)


def _value(value: Any, why: str = "none") -> Html:
    """Return a fact of any kind: floats to six digits, text and whole numbers as they are."""
    if value is None or isinstance(value, float):
        return _figure(value, why, ".6g")
    return value if isinstance(value, Html) else join(str(value))


def _list(facts: dict[str, Any]) -> Html:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", _value(value))) for name, value in facts.items()))


def _facts(title: str, facts: dict[str, Any]) -> Html:
    """Return name/value pairs that can be folded away, and are at first where they are many."""
    folded = tag("details", tag("summary", title), _list(facts), class_="facts", open=len(facts) <= 24)
    return folded if facts else Html("")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> Html:
    """Return a table whose first column names the rows."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", table, class_="scroll")


# Figures of the run


def _metrics(inputs: ReportInputs) -> Html:
    heading = tag("h2", "Metrics", tag("small", " on held-out tokens, special tokens left out unless named"))
    parts = [heading, tag("div", *_tiles(inputs.evaluation, inputs.summary), class_="tiles")]
    if inputs.sweep is not None:
        parts += _sweep(inputs.sweep)
    if inputs.evaluation is not None:
        parts.append(_evaluation(inputs.evaluation))
    if inputs.summary is not None:
        parts += _score_means(inputs.summary)
    last = inputs.metrics[-1] if inputs.metrics else {}
    parts.append(_facts(f"Training, last of {len(inputs.metrics):,} logged steps", last))
    images = []
    for name, png in inputs.plots.items():
        image = tag("img", src="data:image/png;base64," + base64.b64encode(png).decode(), alt=f"Plot: {name}")
        images.append(tag("figure", image, tag("figcaption", name)))
    return tag("section", *parts, tag("div", *images, class_="plots"), id="metrics")


def _tiles(evaluation: dict[str, Any] | None, summary: dict[str, Any] | None) -> list[Html]:
    def tile(label: str, value: Html, *notes: str) -> Html:
        small = [tag("small", note) for note in notes]
        return tag("div", tag("span", label), tag("strong", value), *small, class_="tile")

    figures, why = ({}, "this run has no evaluation") if evaluation is None else (evaluation, "undefined here")
    tiles = [tile(label, _figure(figures.get(key), why), note) for key, (label, note) in _HEADLINES.items()]
    if summary is None:
        return [*tiles, tile("Mean score", _figure(None, "this run has no explanations"))]
    for name, means in summary["dictionaries"].items():
        own, lookup, shuffled = (_figure(means[key]["mean"], "no scored unit has it", "z.2f") for key in _CONTROLS)
        counts = (f"{means[state]:,}\N{NO-BREAK SPACE}{state}" for state in ("scored", "undefined", "failed"))
        controls = join("lookup ", lookup, " · shuffled ", shuffled)
        tiles.append(tile(f"Mean score, {name}", own, controls, " · ".join(counts)))
    return tiles


def _sweep(sweep: dict[str, Any]) -> list[Html]:
    """Return the tables of a sweep: its SAEs side by side, and what another seed alone changes."""

    def figure(line: dict[str, Any], name: str) -> Html:
        interval = line["intervals"].get(name)
        small = f" {_short(interval[0])} to {_short(interval[1])}" if interval else ""
        return join(_figure(line[name], "undefined"), tag("small", small))

    shown = [field for field in sweep["varies"] if field != "architecture"]
    rows = [
        [line["name"], line["architecture"], *(_value(line[field]) for field in shown),
         *(figure(line, name) for name in _HEADLINES), "yes" if line["efficient"] else "", "yes" if line["efficient_ce"] else ""]
        for line in sweep["saes"]
    ]  # fmt: skip
    titles = [label for label, _ in _HEADLINES.values()]
    marks = ["best explained variance at its L0", "best CE at its L0"]
    caption = "The sweep, with 95 % intervals; best: no other has at most its L0 and at least this figure"
    parts = [_table(["", "architecture", *shown, *titles, *marks], rows, caption)]

    def spread(found: dict[str, float] | None) -> Html:
        if found is None:
            return _figure(None, "undefined")
        return join(_figure(found["mean"]), tag("small", f" ± {_short(found['sd'])}"))

    own = [field for field in shown if field != "seed"]
    noise = [
        [f"{len(line['saes'])} seeds of {line['architecture']}", *(_value(line[field]) for field in own),
         *(spread(line[name]) for name in _HEADLINES), _percent(line["shared_latents"])]
        for line in sweep["reseed"]
    ]  # fmt: skip
    if noise:
        caption = "Another seed alone: mean ± standard deviation, and the share of latents that another seed has too"
        parts.append(_table(["", *own, *titles, "shared latents"], noise, caption))
    return parts


def _evaluation(evaluation: dict[str, Any]) -> Html:
    sides = [evaluation[which] for which in ("without_special", "with_special")]
    names = [name for name in dict.fromkeys([*_FIGURES, *sides[0]]) if not isinstance(sides[0].get(name, []), list)]
    rows = [[_FIGURES.get(name, name), *(_value(side.get(name), "undefined") for side in sides)] for name in names]
    caption = f"Evaluation at {evaluation['hook']} on {evaluation['held_out_sequences']:,} held-out sequences"
    return _table(["", "without special tokens", "with special tokens"], rows, caption)


def _span(interval: list[float] | None) -> str:
    """Return an interval in words, nothing where there is none."""
    return f" {interval[0]:z.2f} to {interval[1]:z.2f}" if interval else ""


def _score_means(summary: dict[str, Any]) -> list[Html]:
    """Return the table of means, each with its standard error and count, and what the instrument was."""

    def mean(cell: dict[str, Any]) -> Html:
        error = f" ± {cell['standard_error']:.2f}" if _is_number(cell["standard_error"]) else ""
        value = _figure(cell["mean"], "no scored unit has it", "z.2f")
        return join(value, tag("small", f"{error} n = {cell['units']}"))

    def margin(cell: dict[str, Any]) -> Html:
        value = _figure(cell["mean"], "no unit has both", "z.2f")
        return join(value, tag("small", f"{_span(cell['interval'])} n = {cell['units']}"))

    rows, reasons = [], []
    counts = ("scored", "undefined", "failed", "chosen", "eligible")
    for name, means in summary["dictionaries"].items():
        margins = (margin(means["margins"][key]) for key in _MARGINS)
        cells = (*(mean(means[key]) for key in _SCORES), *margins, *(_figure(means.get(count)) for count in counts))
        rows.append([name, *cells])
        reasons += [tag("li", f"{name}: {reason}") for reason in means["failure_reasons"]]
    caption = "Mean scores ± standard error over scored units; margins over controls with 95 % intervals over units"
    def figures(found: dict[str, Any]) -> list[Html]:
        return [*(_figure(found[figure], "undefined for all", "z.2f") for figure in _JUDGED), _figure(found["units"])]

    def over(by: str, found: dict[str, Any]) -> list[Html]:
        return [margin(found["margins"][key]) if by == "description" else Html("") for key in _MARGINS]

    judged = [
        [name, kind, by, *figures(means[kind][by]), *over(by, means[kind])]
        for name, means in summary["dictionaries"].items()
        for kind in KINDS
        if kind in means
        for by in ("description", "lookup", "shuffled")
    ]
    parts = [_table(["", *_SCORES.values(), *_MARGINS.values(), *counts], rows, caption)]
    if judged:
        caption = "Yes-or-no judgements: means over units, of descriptions, the token lookup and other units' descriptions"
        parts.append(_table(["", "test", "judged by", *_JUDGED.values(), "units", *_MARGINS.values()], judged, caption))
    by_whom = ("description", "lookup", "shuffled", "chance")
    picked = [
        [name, kind, *(_figure(found["accuracy"][by], "not asked", "z.2f") for by in by_whom),
         *(margin(found["margins"][control]) for control in ("chance", "shuffled")), _figure(found["units"])]
        for name, means in summary["dictionaries"].items()
        for kind in CHOICE_KINDS
        if (found := means.get(kind)) is not None
    ]  # fmt: skip
    if picked:
        caption = "Which of several texts is right: mean accuracies over units, and margins with 95 % intervals"
        heads = ["", "question", "description", "lookup", "shuffled", "chance", "Over chance", "Over shuffled", "units"]
        parts.append(_table(heads, picked, caption))
    compared = [
        [other, figure.replace("_", " "), *(_figure(found[key], form="z.2f") for key in ("sae", other)), margin(
            {"mean": found["difference"], "interval": found["interval"], "units": " and ".join(map(str, found["units"]))}
        )]
        for other, of_other in summary.get("compared", {}).items()
        for figure, found in of_other.items()
    ]  # fmt: skip
    if compared:
        caption = "The SAE's latents beside other dictionaries: means over scored units, differences with 95 % intervals"
        parts.append(_table(["", "score", "SAE", "this", "SAE less this"], compared, caption))
    if reasons:
        parts.append(tag("div", tag("p", "Why units failed"), tag("ul", *reasons), class_="reason"))
    return [*parts, _facts("Instrument", {name: value for name, value in summary.items() if name not in OF_UNITS})]


# Features


def _features(inputs: ReportInputs) -> Html:
    units = {f"{unit['dictionary']}/{unit['latent']}": unit for unit in inputs.units}
    scores = {line["unit"]: line for line in inputs.scores}
    unscored = {"state": "not scored", "reason": "this run has not scored the unit yet"}
    lines = {name: {**unscored, **units.get(name, {}), **scores.get(name, {})} for name in [*units, *scores]}
    if not lines:
        return tag("section", tag("h2", "Features"), tag("p", "This run has explained no unit.", class_="note"))
    rows = [_feature(name, line, inputs) for name, line in lines.items()]
    choices = {key: list(dict.fromkeys(line[key] for line in lines.values())) for key in ("dictionary", "state")}
    parts = [tag("h2", "Features"), _legend(), _toolbar(choices), tag("div", *rows, id="features")]
    return tag("section", *parts, id="explained")


def _legend() -> Html:
    scale = join("−max", tag("span", class_="scale"), "max")
    token = tag("span", tag("i", " token ", style="--a:.7;--p:.3"), class_="text strips")
    dots = _dots({"ev_correlation": 0.8, "lookup_correlation": 0.35, "shuffled_correlation": 0.0})
    words = {
        scale: "Fill: activation over the unit's maximum on the training split, linear, cut off there.",
        token: "Strip under held-out tokens: predicted activation over the unit's largest prediction.",
        dots: "Correlation with the truth, −1 to 1: ● description, ○ token lookup, × another unit's description.",
    }
    return tag("div", *(tag("p", tag("span", key), tag("span", text)) for key, text in words.items()), class_="legend")


def _toolbar(choices: dict[str, list[str]]) -> Html:
    """Return the filters and the sortable column heads; hidden until the script that serves them runs."""
    label = "Filter by description or token"
    filters = [tag("input", type="search", id="filter-text", placeholder=label, aria_label=label, autocomplete="off")]
    for name, values in choices.items():
        options = [tag("option", f"any {name}", value=""), *(tag("option", value, value=value) for value in values)]
        filters.append(tag("select", *options, id=f"filter-{name}", aria_label=name))
    filters.append(tag("output", id="count", aria_live="polite"))
    filters.append(tag("label", tag("input", type="checkbox", id="swap"), "swap fill and strip"))
    keys = ("unit", "score", "density", "max")
    heads = [tag("button", key, type="button", data_key=key, aria_pressed="false") for key in keys]
    columns = tag("div", *heads, tag("span", "description"), class_="columns")
    return tag("div", tag("div", *filters, class_="filters"), columns, id="toolbar", hidden=True)


def _dots(line: dict[str, Any]) -> Html:
    """Return the score between its controls on one axis from -1 to 1; what is undefined has no mark."""
    marks = [tag("path", d="M2 8H82M42 4V12", class_="axis")]
    for key, shape in (("shuffled_correlation", "cross"), ("lookup_correlation", "ring"), ("ev_correlation", "dot")):
        if _is_number(line.get(key)):
            x = round(42 + 40 * line[key], 1)
            cross = tag("path", d=f"M{x - 3:.1f} 5l6 6m0 -6l-6 6", class_="cross")
            marks.append(cross if shape == "cross" else tag("circle", cx=x, cy=8, r=3.5, class_=shape))
    return tag("svg", *marks, viewBox="0 0 84 16", class_="dots", aria_hidden="true")


def _feature(name: str, line: dict[str, Any], inputs: ReportInputs) -> Html:
    reason = line["reason"] or ("" if line["state"] == "scored" else f"{line['state']}, no reason recorded")
    score, density, top = (line.get(key) for key in ("ev_correlation", "density", "max_activation"))
    description = line.get("description") or ""
    told = [tag("span", reason, class_="reason"), " · " if description else ""] if reason else []
    row = tag(
        "summary",
        tag("span", name, class_="name"),
        tag("span", _figure(score, reason or "not recorded", "z.2f"), _dots(line), class_="score"),
        *(tag("span", figure, class_="number") for figure in (_percent(density), _figure(top))),
        tag("span", *told, description, class_="description searched"),
    )
    data = {"id": name.replace("/", "-"), "data_dictionary": line["dictionary"], "data_state": line["state"]}
    data |= {"data_score": score, "data_density": density, "data_max": top}
    return tag("details", row, _page(name, line, reason, inputs), class_="feature", **data)


def _page(name: str, line: dict[str, Any], reason: str, inputs: ReportInputs) -> Html:
    link = "#" + name.replace("/", "-")
    lead = tag("p", tag("a", link, href=link), " ", line.get("description") or "No description.", class_="lead")
    why = tag("p", f"{line['state'].capitalize()}: {reason}", class_="reason") if reason else Html("")
    facts = {"hook": line.get("hook"), "density": _percent(line.get("density"))}
    facts |= {"maximum on training": _figure(line.get("max_activation")), "held-out tokens": line.get("test_tokens")}
    intervals = line.get("intervals") or {}
    scores = {
        label: join(_figure(line.get(key), reason or "undefined or not run", "z.2f"), tag("small", _span(intervals.get(key))))
        for key, label in _SCORES.items()
    }
    for kind in KINDS:
        if line.get(kind):
            found = line[kind]
            value = _figure(found["balanced_accuracy"], "undefined", "z.2f")
            scores[f"{kind.capitalize()}, balanced accuracy"] = join(
                value, tag("small", _span(found["intervals"]["balanced_accuracy"]))
            )
            counts = found["counts"]
            says, not_says = (f"{counts[f'{c}_fires']:g} + {counts[f'{c}_silent']:g}" for c in ("concept", "other"))
            scores[f"{kind.capitalize()}, fires + silent"] = join(f"yes {says}, no {not_says}")
    for choice in CHOICE_KINDS:
        if line.get(choice):
            found = line[choice]
            value = _figure(found["accuracy"], found["reason"] or "undefined", "z.2f")
            scores[f"{choice.capitalize()}, accuracy"] = join(value, tag("small", _span(found.get("interval"))))
    left = [_list(facts), tag("h3", "Description against held-out truth"), _list(scores)]
    left.append(_histogram(inputs.histograms.get(name), line.get("density")))
    left.append(_output_tokens(line))
    right = (*_examples(name, line, inputs), *_steering(name, inputs.steering))
    sides = (tag("div", *left, class_="left"), tag("div", *right, class_="right"))
    return tag("article", lead, why, tag("div", *sides, class_="page"))


def _histogram(histogram: tuple[list[float], list[int]] | None, density: Any) -> Html:
    """Return the counts of activations as bars over a logarithmic axis, empty outer bins cut off."""
    title = tag("h3", "Activations above 0", tag("small", ", density ", _percent(density)))
    if histogram is None or not any(histogram[1]):
        return join(title, tag("p", "Not recorded." if histogram is None else "The unit never fired.", class_="note"))
    edges, counts = histogram
    used = [i for i, count in enumerate(counts) if count]
    low, high = math.log10(edges[used[0]]), math.log10(edges[used[-1] + 1])

    def place(activation: float) -> float:
        return round(40 + 250 * (math.log10(activation) - low) / (high - low), 1)

    marks = [tag("path", d="M40 10V90H290M36 10H40M36 90H40", class_="axis")]
    for i in used:
        x, height = place(edges[i]), round(max(80 * counts[i] / max(counts), 0.8), 1)  # a rare one stays visible
        note = tag("title", f"{_short(edges[i])} to {_short(edges[i + 1])}: {counts[i]:,} tokens")
        width = max(round(place(edges[i + 1]) - x - 0.6, 1), 0.4)
        marks.append(tag("rect", note, x=x, y=90 - height, width=width, height=height))
    decades = [10.0**k for k in range(math.ceil(low), math.floor(high) + 1)]
    labels = [(place(tick), 104, f"{tick:.2g}") for tick in (decades if len(decades) > 1 else [10**low, 10**high])]
    marks += [tag("path", d=f"M{x} 90v4", class_="axis") for x, _, _ in labels]
    labels += [(165, 119, "activation, log scale"), (18, 14, _short(max(counts))), (18, 93, "0")]
    marks += [tag("text", text, x=x, y=y) for x, y, text in labels]
    svg = tag("svg", *marks, viewBox="0 0 300 124", class_="histogram", role="img", aria_label="histogram")
    return join(title, svg)


def _output_tokens(unit: dict[str, Any]) -> Html:
    if not unit.get("promoted"):
        return tag("p", "No output tokens: from its hook no straight way to the logits is known.", class_="note")
    tables = []
    for side in ("promoted", "suppressed"):
        pairs = unit[side]
        rows = [(tag("code", token, class_="searched"), _figure(logit, form="+.2f")) for token, logit in pairs]
        tables.append(_table(["token", "logit"], rows, side.capitalize()))
    return tag("div", *tables, class_="output")


def _examples(name: str, line: dict[str, Any], inputs: ReportInputs) -> list[Html]:
    sides = {"test": line.get("test", []), "train": line.get("train", [])}
    found = [abs(a) for examples in sides.values() for e in examples for a in e["activations"] if _is_number(a)]
    if not found:
        return [tag("p", "No examples recorded.", class_="note")]
    maximum = line.get("max_activation")
    top = maximum if _is_number(maximum) and maximum > 0 else max(found)
    predictions = inputs.predictions.get(name, [])
    # The score is a correlation, and some backends predict levels: predictions are drawn on a scale of their own
    predicted_top = max((abs(p) for values in predictions for p in values if _is_number(p)), default=0.0)
    scale = f"activation {_short(top)}" + (f", prediction {_short(predicted_top)}" if predicted_top else "")
    blocks = [tag("p", f"Full colour: {scale}. Left of each window: its highest activation.", class_="note")]
    for side, title in (("test", "Held-out windows"), ("train", "Training windows")):
        groups: dict[str, list[Html]] = {}
        for i, example in enumerate(sides[side]):
            predicted = predictions[i] if side == "test" and i < len(predictions) else []
            groups.setdefault(example["kind"], []).append(_example(example, top, predicted, predicted_top))
        for kind, group in groups.items():
            heading = tag("h3", title, tag("small", f", {_KINDS.get(kind, kind)}"))
            blocks.append(tag("div", heading, tag("ol", *group), class_="strips" if side == "test" else None))
    return blocks


def _example(example: dict[str, Any], top: float, predicted: Sequence[float], predicted_top: float) -> Html:
    """Return a window; a token carries its shares of the full colours, --a true, --p predicted, n and m if negative."""
    tokens, activations = [], example["activations"]
    paired = predicted if len(predicted) == len(activations) else [None] * len(activations)
    for token, number, *values in zip(example["tokens"], example["token_ids"], activations, paired, strict=True):
        shares, marks = [], ""
        for value, full, name, negative in zip(values, (top, predicted_top), "ap", "nm", strict=True):
            if _is_number(value) and full > 0 and abs(value) / full >= 0.005:
                shares.append(f"--{name}:{min(abs(value) / full, 1):.2f}")
                marks += negative if value < 0 else ""
        told = _short(values[0]) if _is_number(values[0]) else "not a number"
        told += f", predicted {_short(values[1])}" if _is_number(values[1]) else ""
        styled = {"class_": " ".join(marks) or None, "style": ";".join(shares) or None}
        tokens.append(tag("i", token, **styled, title=f"‘{token}’ ({number}): {told}"))
    peak = max((a for a in activations if _is_number(a)), default=None)
    gutter = tag("span", _figure(peak, "no activation recorded"), class_="peak", title=f"window {example['window']}")
    return tag("li", gutter, tag("span", *tokens, class_="text searched"))


def _steering(name: str, samples: list[dict[str, Any]]) -> list[Html]:
    blocks = []
    for sample in (sample for sample in samples if sample["unit"] == name):
        prompt = tag("span", sample["prompt"], class_="prompt")
        texts = {"as it is": join(prompt, sample["baseline"]), sample["edit"]: join(prompt, sample["steered"])}
        blocks.append(tag("div", tag("h3", "Steering"), _list(texts), class_="steering"))
    return blocks
