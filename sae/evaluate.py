"""Evaluation on held-out rows that training never drew: reconstruction, sparsity, what it costs the model, what latents are."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from activation_store.errors import InputError
from activation_store.progress import Progress
from activation_store.store import ActivationStore
from sae.architectures.cross_layer import CrossLayerTranscoder
from sae.config import AbsorptionConfig, EvaluateConfig
from sae.evaluation.absorption import absorption, letter_probes
from sae.evaluation.bootstrap import Sums, intervals, plain, total
from sae.evaluation.geometry import decoder_clusters, decoder_shares
from sae.evaluation.held_out import SIDES, HeldOut
from sae.evaluation.labelled import read_labelled
from sae.evaluation.losses import TOGETHER, loss_figures, loss_sums, measure, next_token_loss, together
from sae.evaluation.probing import sparse_probing
from sae.evaluation.reconstruction import DENSITY_EDGES, reconstruct
from sae.evaluation.spelling import read_words, vocabulary_words
from sae.sae import SAE

__all__ = ["DENSITY_EDGES", "evaluate", "evaluate_many", "next_token_loss"]


def evaluate(
    sae: SAE, store: ActivationStore, model: nn.Module, config: EvaluateConfig, *, tokenizer: Any = None,
    cache: Path | None = None, seed: int = 0, progress: Progress = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Return the final figures of one SAE: see `evaluate_many`."""
    found = evaluate_many({"sae": sae}, store, model, config, tokenizer=tokenizer, cache=cache, seed=seed, progress=progress)
    return found["sae"]


def evaluate_many(
    saes: Mapping[str, SAE], store: ActivationStore, model: nn.Module, config: EvaluateConfig, *, tokenizer: Any = None,
    cache: Path | None = None, seed: int = 0, progress: Progress = lambda done, total: None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return the final figures of SAEs on the held-out rows of `store`, by name: the same as one by one, in less time.

    What does not depend on the SAE is done once for all of the same hooks: clean and ablated passes (and kept in the folder
    `cache`, so that the next SAE needs neither), texts for probing, words for absorption.

    The top level and `without_special` leave special tokens out (the SAE never saw them: in the spliced and ablated passes they
    keep their own activation); `with_special` takes every position. Figures: those of `reconstruct` (l0, mse,
    explained_variance, cosine, ...) on all held-out rows, those of `loss_figures` (ce_clean, ce_spliced, ce_recovered, kl, ...)
    on `ce_sequences` of them. `intervals` holds 95 % bootstrap intervals over sequences for the top level's figures,
    `decoder` how near decoder rows are to each other, `dark_matter` what of the error is linear in x; `probing` and
    `absorption` are there where the config asks for them, which takes the model's `tokenizer`. `held_out_hash` names the
    tokens, marks, hooks and model. A transcoder is judged by what it predicts. What is undefined is None.

    Where several hooks are predicted, `by_hook` has the figures of each, and losses at the top are of one hook replaced at a time
    by what is predicted from the clean pass, all hooks pooled; of a crosscoder, `decoder_share` there says how much of its
    latents lies at that hook. Of a cross-layer transcoder, `replacement` has the losses with all hooks replaced at once.

    Raises InputError, before any long work, for an SAE that does not fit the store, a held-out set other than the config's,
    and texts that cannot be read.
    """
    held = {name: HeldOut.of(sae, store) for name, sae in saes.items()}
    for held_out in held.values():
        held_out.require(config.held_out_hash)
    if tokenizer is None and (config.probing is not None or config.absorption):
        raise InputError("evaluate.probing and evaluate.absorption need the model's tokenizer; pass tokenizer=")
    if config.absorption:
        vocabulary_words(tokenizer)  # is there enough of it
    datasets = [read_labelled(path, config.probing, seed) for path in config.probing.datasets] if config.probing else []
    groups = {key: [name for name in saes if held[name] == key] for key in dict.fromkeys(held.values())}
    rows = {key: key.sequences * store.context for key in groups}
    passed = {key: min(config.ce_sequences, key.sequences) * store.context for key in groups}
    work = 0
    for key, names in groups.items():
        replaced = len(key.hooks_out) + together(key)
        work += rows[key] * len(names) + passed[key] * (1 + replaced * (2 + 2 * len(names)))
    done = 0

    def step(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(min(done, work), work)

    results: dict[str, dict[str, Any]] = {}
    for held_out, names in groups.items():
        own = {name: saes[name] for name in names}
        for name, result in _on_held_out(own, held_out, model, config, cache, seed, step).items():
            results[name] = {
                **result,
                "hook": _one_or_all(held_out.hooks),
                "hook_out": _one_or_all(held_out.hooks_out),
                "held_out_sequences": held_out.sequences,
                "held_out_hash": held_out.hash,
                "density_edges_log10": DENSITY_EDGES,
            }
            _add_geometry(results[name], saes[name], held_out, config.cluster_cosine)
        if config.probing is not None:
            l0 = {name: results[name]["l0"] or 1.0 for name in names}
            probed = sparse_probing(
                own, l0, datasets, model, tokenizer, store, held_out.hooks, config.probing, config.batch_size, seed
            )
            for name in names:
                results[name]["probing"] = probed[name]
        if config.absorption:
            for name, found in _absorption(own, held_out, model, tokenizer, config, seed).items():
                results[name]["absorption"] = found
    return {name: results[name] for name in saes}


def _on_held_out(
    saes: Mapping[str, SAE], held_out: HeldOut, model: nn.Module, config: EvaluateConfig, cache: Path | None, seed: int,
    progress: Callable[[int], None],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    sequences = min(config.ce_sequences, held_out.sequences)
    measured = measure(saes, held_out, model, sequences, config.batch_size, cache=cache, progress=progress)
    single = [measured[hook] for hook in held_out.hooks_out]
    results = {}
    for name, sae in saes.items():
        found = reconstruct(
            sae, held_out, resamples=config.resamples, dark_matter=config.dark_matter, seed=seed, progress=progress
        )
        sides = {}
        for side in SIDES:
            losses = _pooled(total(loss_sums(baseline, spliced[name], side)) for baseline, spliced in single)
            tokens = int(losses["tokens"]) // len(single)
            sides[side] = {**found.sides[side], "ce_tokens": tokens, **plain(loss_figures(losses))}
        by_sequence = _pooled(loss_sums(baseline, spliced[name], SIDES[0]) for baseline, spliced in single)
        of_losses = intervals(by_sequence, loss_figures, config.resamples, seed)
        results[name] = {
            **sides["without_special"], **sides, "intervals": {**found.intervals, **of_losses}, "ce_sequences": sequences,
            "dark_matter": found.dark_matter,
        }  # fmt: skip
        of_hook = {
            hook: plain(loss_figures(total(loss_sums(baseline, spliced[name], SIDES[0]))))
            for hook, (baseline, spliced) in measured.items()
        }
        if found.by_hook:
            results[name]["by_hook"] = {hook: {**found.by_hook[hook], **of_hook[hook]} for hook in held_out.hooks_out}
        if together(held_out):
            results[name]["replacement"] = of_hook[TOGETHER]
    return results


def _pooled(parts: Iterable[Sums]) -> Sums:
    """Add up the sums of several hooks."""
    first, *others = parts
    return {name: sum((other[name] for other in others), start=values) for name, values in first.items()}


def _one_or_all(hooks: tuple[str, ...]) -> str | list[str]:
    return hooks[0] if len(hooks) == 1 else list(hooks)


def _add_geometry(result: dict[str, Any], sae: SAE, held_out: HeldOut, cosine: float) -> None:
    """Add how decoder rows lie: of a cross-layer transcoder those of each layer, of a crosscoder also at which hook they are."""
    if isinstance(sae, CrossLayerTranscoder):
        result["decoder"] = None
        for (layer, _, _), of_hook in zip(sae, result["by_hook"].values(), strict=True):
            of_hook["decoder"] = decoder_clusters(layer.W_dec, cosine)
        return
    result["decoder"] = decoder_clusters(sae.W_dec, cosine)
    if len(held_out.columns) > 1:
        for hook, share in decoder_shares(sae.W_dec, held_out.columns).items():
            result["by_hook"][hook]["decoder_share"] = share


def _absorption(
    saes: Mapping[str, SAE], held_out: HeldOut, model: nn.Module, tokenizer: Any, config: EvaluateConfig, seed: int
) -> dict[str, dict[str, Any]]:  # fmt: skip
    if len(held_out.hooks) > 1:
        reason = f"{len(held_out.hooks)} hooks are read at once, and a probe is of one"
        return {name: {"state": "undefined", "reason": reason} for name in saes}
    if not held_out.predicts_its_input:
        reason = "a transcoder's decoder does not write where its input is read, and a probe of the one says nothing of the other"
        return {name: {"state": "undefined", "reason": reason} for name in saes}
    settings = config.absorption if isinstance(config.absorption, AbsorptionConfig) else AbsorptionConfig()
    bos = bool(held_out.store.attrs.get("prepend_bos"))
    words = read_words(model, tokenizer, held_out.hooks[0], settings.words, bos, seed)
    probes = letter_probes(words)
    return {name: absorption(sae, words, probes, settings.k) for name, sae in saes.items()}
