"""Training curves and the density histogram, as PNG bytes."""

import io
import math
from typing import Any


def _figure(width: float = 6.0, height: float = 3.2) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")  # no window, whatever the machine
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), constrained_layout=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)
    return figure, axes


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def training_plots(metrics: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return loss, l0 and explained_variance against tokens, from the lines of metrics.jsonl."""
    plots = {}
    panels = {"loss": ("loss", "mse"), "l0": ("l0",), "explained_variance": ("explained_variance", "dead_fraction")}
    for name, keys in panels.items():
        figure, axes = _figure()
        for key in keys:
            values = [math.nan if line[key] is None else line[key] for line in metrics]
            axes.plot([line["tokens"] for line in metrics], values, label=key.replace("_", " "))
        axes.set_xlabel("tokens")
        axes.set_ylabel(name.replace("_", " "))
        if name in ("loss", "l0"):
            axes.set_yscale("log")
        else:
            axes.set_ylim(-0.02, 1.02)
        if len(keys) > 1:
            axes.legend(frameon=False)
        plots[name] = _png(figure)
    return plots


def density_plot(evaluation: dict[str, Any]) -> bytes:
    """Return the histogram of log10 latent density on the held-out tokens."""
    figure, axes = _figure()
    edges = evaluation["density_edges_log10"]
    axes.stairs(evaluation["density_histogram"], edges, fill=True, alpha=0.8)
    axes.set_xlabel("log10 of density (share of tokens on which a latent fires)")
    axes.set_ylabel("latents")
    axes.set_title(f"never fired on {evaluation['tokens']:,} tokens: {evaluation['dead_fraction']:.1%}", fontsize=9)
    return _png(figure)
