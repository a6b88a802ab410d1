"""The inner loops of the evidence pass, compiled (numba): a few operations for each latent that fires, no array of all pairs."""

from typing import Any

from numba import njit

compiled = njit(nogil=True, cache=True, error_model="numpy")


@compiled
def offer(
    keys: Any, values: Any, windows: Any, latent: int, key: float, value: float, window: int
) -> None:  # pragma: no cover - compiled
    """Let a candidate into its latent's row, strongest first, if its key is above the last's; of equal keys the earlier stays."""
    place = keys.shape[1] - 1
    if not key > keys[latent, place]:
        return
    while place > 0 and keys[latent, place - 1] < key:
        keys[latent, place] = keys[latent, place - 1]
        values[latent, place] = values[latent, place - 1]
        windows[latent, place] = windows[latent, place - 1]
        place -= 1
    keys[latent, place], values[latent, place], windows[latent, place] = key, value, window


@compiled
def offer_all(
    keys: Any, values: Any, windows: Any, latents: Any, new_keys: Any, new_values: Any, new_windows: Any
) -> None:  # pragma: no cover - compiled
    """Offer candidates one after another."""
    for i in range(len(latents)):
        offer(keys, values, windows, latents[i], new_keys[i], new_values[i], new_windows[i])


@compiled
def rank_block(
    starts: Any, latents: Any, values: Any, window_of_row: Any, first: int, of_window: Any, of_latent: Any, peak: Any,
    touched: Any, fired: Any, top_keys: Any, top_values: Any, top_windows: Any, sample_keys: Any, sample_values: Any,
    sample_windows: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Rank the windows of a block of rows, whose latents are starts, latents, values as in SparseLatents.

    `window_of_row` counts windows from the block's first one, `first`, in order. `peak` (d_sae) must be zero and is zero again at
    the end; `touched` (d_sae) is scratch. A window's sampling priority is of_window + of_latent, modulo 1.
    """
    row, rows, sampled = 0, len(window_of_row), sample_keys.shape[1] > 0
    while row < rows:
        window, found = window_of_row[row], 0
        while row < rows and window_of_row[row] == window:
            for entry in range(starts[row], starts[row + 1]):
                latent, value = latents[entry], values[entry]
                if value > 0:
                    if peak[latent] == 0:
                        touched[found] = latent
                        found += 1
                    peak[latent] = max(peak[latent], value)
            row += 1
        number = first + window
        for i in range(found):
            latent = touched[i]
            strongest = peak[latent]
            peak[latent] = 0
            fired[latent] += 1
            offer(top_keys, top_values, top_windows, latent, strongest, strongest, number)
            if sampled:
                priority = of_window[window] + of_latent[latent]
                if priority >= 1:
                    priority -= 1
                offer(sample_keys, sample_values, sample_windows, latent, priority, strongest, number)
