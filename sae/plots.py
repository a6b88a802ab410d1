"""Training curves and the density histogram, as PNG bytes."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

_LEGEND = 12  # more lines than that a legend does not tell apart


def figure_of(width: float = 6.0, height: float = 3.2) -> tuple[Any, Any]:
    """Return a figure and its axes, in inches, drawn without a window."""
    import matplotlib

    matplotlib.use("Agg")  # no window, whatever the machine
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), constrained_layout=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)
    return figure, axes


def png_of(figure: Any) -> bytes:
    """Return a figure as PNG bytes, equal for equal figures, and close it."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def training_plots(metrics: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, bytes]:
    """Return loss, l0 and explained_variance against tokens, from the lines of metrics.jsonl, by SAE."""
    plots = {}
    panels = {"loss": ("loss", "mse"), "l0": ("l0",), "explained_variance": ("explained_variance", "dead_fraction")}
    for name, keys in panels.items():
        figure, axes = figure_of()
        keys = keys if len(metrics) == 1 else keys[:1]
        for sae, lines in metrics.items():
            for key in keys:
                values = [math.nan if line[key] is None else line[key] for line in lines]
                axes.plot([line["tokens"] for line in lines], values, label=sae or key.replace("_", " "))
        axes.set_xlabel("tokens")
        axes.set_ylabel(name.replace("_", " "))
        if name in ("loss", "l0"):
            axes.set_yscale("log")
        else:
            axes.set_ylim(-0.02, 1.02)
        if 1 < len(keys) + len(metrics) - 1 <= _LEGEND:
            axes.legend(frameon=False, fontsize=None if len(metrics) == 1 else 6)
        plots[name] = png_of(figure)
    return plots


def density_plot(evaluation: dict[str, Any]) -> bytes:
    """Return the histogram of log10 latent density on the held-out tokens."""
    figure, axes = figure_of()
    edges = evaluation["density_edges_log10"]
    axes.stairs(evaluation["density_histogram"], edges, fill=True, alpha=0.8)
    axes.set_xlabel("log10 of density (share of tokens on which a latent fires)")
    axes.set_ylabel("latents")
    axes.set_title(f"never fired on {evaluation['tokens']:,} tokens: {evaluation['dead_fraction']:.1%}", fontsize=9)
    return png_of(figure)


def pareto_plot(sweep: dict[str, Any]) -> bytes:
    """Return explained variance and CE recovered against L0, of the SAEs in `sae.sweep.summary`, with their 95 % intervals.

    One colour for what differs in seed and sparsity alone; a line joins those that no other is better than.
    """
    sparsity = ("seed", "k", "target_l0", "l1_coefficient", "l0_coefficient")
    kinds = [field for field in sweep["varies"] if field not in sparsity]
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in sweep["saes"]:
        label = ", ".join(str(line[field]) if field == "architecture" else f"{field} {line[field]}" for field in kinds)
        groups.setdefault(label, []).append(line)
    figure, _ = figure_of(width=9.0, height=3.6)
    figure.clear()
    from matplotlib.ticker import LogLocator, ScalarFormatter

    panels = (("explained_variance", "efficient", "explained variance"), ("ce_recovered", "efficient_ce", "CE recovered"))
    for number, (key, mark, title) in enumerate(panels):
        axes = figure.add_subplot(1, 2, number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
        for label, lines in groups.items():
            known = [line for line in lines if line[key] is not None and line["l0"]]
            x, y = [line["l0"] for line in known], [line[key] for line in known]
            sides = [_below_and_above(line, key) for line in known]
            axes.errorbar(x, y, yerr=list(zip(*sides, strict=True)) or None, fmt="o", markersize=4, linewidth=1, label=label)
        for hooks in {tuple(line["hooks"]) for line in sweep["saes"]}:
            own = [line for line in sweep["saes"] if tuple(line["hooks"]) == hooks and line[mark] and line["l0"]]
            best = sorted((line["l0"], line[key]) for line in own if line[key] is not None)
            axes.plot([x for x, _ in best], [y for _, y in best], color="0.6", linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("L0")
        axes.set_ylabel(title)
        if number == 0 and len(groups) > 1:
            axes.legend(frameon=False, fontsize=7)
    return png_of(figure)


def _below_and_above(line: dict[str, Any], key: str) -> tuple[float, float]:
    interval = line["intervals"].get(key)
    return (0.0, 0.0) if interval is None else (max(0.0, line[key] - interval[0]), max(0.0, interval[1] - line[key]))
