"""Scores of dictionaries side by side, as PNG bytes."""

from typing import Any

from sae.plots import figure_of, png_of


def comparison_plot(compared: dict[str, Any]) -> bytes:
    """Return the difference of means with its interval for each other dictionary and figure; right of zero the SAE is ahead."""
    rows = [(f"{figure}, {other}", found) for other, figures in compared.items() for figure, found in figures.items()]
    figure, axes = figure_of(7.0, 1.0 + 0.3 * len(rows))
    for place, (_, found) in enumerate(reversed(rows)):
        low, high = found["interval"] or (found["difference"], found["difference"])
        axes.plot([low, high], [place, place], color="C0", linewidth=2)
        axes.plot([found["difference"]], [place], "o", color="C0")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name, _ in reversed(rows)])
    axes.set_xlabel("mean of the SAE's latents less the other's, 95 % interval over units")
    return png_of(figure)
