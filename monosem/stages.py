"""The stages of a run, in order: what each reads, leaves and reports."""

import asyncio
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from activation_store.errors import InputError
from activation_store.files import append_json_line, read_json_lines, write_atomic, write_json
from activation_store.harvest import harvest
from activation_store.live import stream_activations
from activation_store.store import ActivationStore
from activation_store.subject import pick_device
from explain.backends.chat import ChatBackend
from explain.choice import CHOICE_KINDS
from explain.client import check_server
from explain.dictionaries import Dictionary
from explain.estimate import estimate
from explain.explain import explain, prepare
from explain.judge import KINDS
from explain.plots import comparison_plot
from explain.report import ReportInputs, write_report
from monosem.plan import make_plan, require_disk
from monosem.progress import console, progress_bar
from monosem.run import Run, Stage
from sae.evaluate import evaluate_many
from sae.formats.saelens import save_latents
from sae.intervene import steerable
from sae.plots import density_plot, pareto_plot, training_plots
from sae.sae import HISTOGRAM_EDGES, SAE
from sae.steer import complete, steering_sample
from sae.sweep import summary
from sae.train import hooks_of, train_sweep


def _harvest(run: Run) -> dict[str, Any]:
    config = run.config
    with progress_bar("reading text") as text, progress_bar("harvest") as bar:
        start = time.perf_counter()
        store = harvest(
            run.subject, config.data, config.harvest, run.activations, seed=config.seed, text_progress=text, progress=bar
        )
        seconds = time.perf_counter() - start
    run.note(model=run.subject.facts(), data=store.attrs["data"], text_counts=store.attrs["text_counts"])
    figures: dict[str, Any] = {"tokens": store.rows, "tokens_per_second": store.rows / seconds}
    if config.harvest.stream:
        return {**figures, "stored": "a sample; training streams"}
    dropped = store.attrs["text_counts"]["empty_documents"]
    if dropped:
        figures["empty_documents_dropped"] = dropped
    if store.rows < config.data.tokens - config.data.context * 2:
        figures["tokens_asked"] = config.data.tokens
        console.print(f"[yellow]![/] the text ended after {store.rows:,} of {config.data.tokens:,} tokens")
    return figures


def _store_is_whole(run: Run) -> bool:
    """Say whether the harvest needs no work: `monosem store repair` may have taken chunks out. A deleted store stays deleted."""
    return not run.activations.exists() or bool(ActivationStore(run.activations).attrs["complete"])


def _train(run: Run) -> dict[str, Any]:
    config, members, shared = run.config, run.config.members, run.config.shared
    store = run.store()
    drawn = hooks_of(members) or (config.hook,)
    statistics = [store.statistics(hook) for hook in drawn]
    for own in members.values():
        hooks = own.hooks or (config.hook,)
        d_in = sum(store.width(hook) for hook in hooks)
        if own.d_in not in (None, d_in):
            raise InputError(f"train.d_in: {own.d_in} given, but {', '.join(hooks)} of {store.path} is {d_in} wide")
    import torch

    source: Any = store
    if config.harvest.stream:
        with progress_bar("reading text") as text:
            source = stream_activations(
                run.subject, config.data, config.harvest, seed=config.seed, recycle_in=run.folder / "recycled",
                text_progress=text,
            )  # fmt: skip
    outliers = shared.max_norm_multiple
    batches = source.batches(
        drawn if len(drawn) > 1 else drawn[0], shared.batch_size, config.seed if config.is_sweep else shared.seed,
        memory_mb=shared.shuffle_mb, max_norm_multiple=outliers, device=pick_device(shared.device),
    )  # fmt: skip
    with progress_bar("train") as bar:
        start = time.perf_counter()
        saes = train_sweep(  # without outliers, the store's moments are not those of the rows drawn: the first batch's are
            batches, members,
            mean=[torch.from_numpy(s.mean) for s in statistics] if outliers is None else None,
            mean_norm=[s.mean_norm for s in statistics] if outliers is None else None,
            checkpoints=run.folder / "checkpoints", metrics={name: run.metrics(name) for name in members}, progress=bar,
        )  # fmt: skip
        seconds = time.perf_counter() - start
    kept = ("model_revision", "model_dtype", "basis", "tokenizer_hash", "special_token_ids", "prepend_bos")
    facts = {key: store.attrs[key] for key in kept}
    for name, sae in saes.items():
        hooks = members[name].hooks or (config.hook,)
        only = {"hook_name": hooks[0]} if len(hooks) == 1 else {}
        sae.with_metadata(
            **only, model_name=store.attrs["model"], dataset_path=store.attrs["data"]["source"],
            context_size=store.context, config_hash=run.config.key("model", "data", "harvest", "train", "seed"), **facts,
        )  # fmt: skip
        sae.save(run.sae_folder(name))
    metrics = {name: read_json_lines(run.metrics(name)) for name in members}
    for name, png in training_plots(metrics).items():
        write_atomic(run.folder / "plots" / f"{name}.png", png)
    tokens = shared.steps * shared.batch_size
    lines = metrics[config.chosen]
    waiting = sum(line["waiting"] for line in lines) / len(lines)  # share of the time that no batch was ready
    dropped = {f"left_out_{name}": count for name, count in batches.left_out.items() if count}
    several = {"saes": len(saes)} if config.is_sweep else {}
    last = _ranges([lines[-1] for lines in metrics.values()], ("l0", "explained_variance", "dead_fraction"))
    return {**several, "tokens": tokens, "tokens_per_second": tokens / seconds, "waiting": waiting, **dropped, **last}


def _ranges(lines: Sequence[dict[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """Return figures, of several SAEs from the least to the most."""
    found: dict[str, Any] = {}
    for name in names:
        known = [line[name] for line in lines if line[name] is not None]
        found[name] = lines[0][name] if len(lines) == 1 else f"{min(known):.4g} to {max(known):.4g}" if known else None
    return found


def _evaluate(run: Run) -> dict[str, Any]:
    store, config = run.store(), run.config
    with progress_bar("evaluate") as bar:
        start = time.perf_counter()
        saes = {name: run.sae(name) for name in config.members}
        results = evaluate_many(
            saes, store, run.subject.model, config.evaluate, tokenizer=run.subject.tokenizer,
            cache=run.folder / "baselines", seed=config.seed, progress=bar,
        )  # fmt: skip
        seconds = time.perf_counter() - start
    result = results[config.chosen]
    write_atomic(run.folder / "plots" / "density.png", density_plot(result))
    if config.is_sweep:
        found = summary(config.members, results, saes)
        write_json(run.folder / "evaluation.json", {"sweep": found, "saes": results})
        write_atomic(run.folder / "plots" / "pareto.png", pareto_plot(found))
        names = ("l0", "explained_variance", "ce_recovered", "dead_fraction")
        efficient = sum(line["efficient"] for line in found["saes"])
        return {"saes": len(saes), **_ranges(list(results.values()), names), "efficient": efficient,
                "held_out_hash": result["held_out_hash"]}  # fmt: skip
    write_json(run.folder / "evaluation.json", result)
    passes = result["tokens"] + 5 * result["ce_sequences"] * store.context
    keys = (
        "l0", "mse", "explained_variance", "cosine", "relative_reconstruction_bias", "ce_clean", "ce_spliced", "ce_ablated",
        "ce_recovered", "kl", "dead_fraction",
    )  # fmt: skip
    figures = {key: result[key] for key in keys}
    if result["dark_matter"] is not None:
        figures["error_vector_r2"] = result["dark_matter"]["error_vector_r2"]
    if result["decoder"] is not None:
        figures["clustered_fraction"] = result["decoder"]["clustered_fraction"]
    for hook, found in result.get("by_hook", {}).items():
        figures |= {f"{key} at {hook}": found[key] for key in ("explained_variance", "ce_recovered")}
    if "replacement" in result:
        figures |= {f"{key} of the replacement": result["replacement"][key] for key in ("ce_recovered", "kl")}
    for kind, means in result.get("probing", {}).get("mean", {}).items():
        figures |= {f"probing_{kind}_{k}": found["accuracy"] for k, found in means.items()}
    for name, found in result.get("probing", {}).get("datasets", {}).items():
        if found["state"] != "probed":
            console.print(f"[yellow]![/] probing: {escape(name)}: {escape(found['reason'])}")
    if "absorption" in result:
        if result["absorption"]["state"] == "measured":
            figures |= {key: result["absorption"][key] for key in ("mean_full_absorption", "mean_absorption_fraction")}
        else:
            console.print(f"[yellow]![/] absorption: {escape(result['absorption']['reason'])}")
    figures["held_out_hash"] = result["held_out_hash"]
    if not {"probing", "absorption"} & set(result):  # whose texts are no part of these tokens
        figures["tokens_per_second"] = passes / seconds
    return figures


def _untrained(run: Run) -> list[Dictionary]:
    """Return the SAE of the model with random weights, harvesting and training where that is not done, if it is asked for."""
    number = run.config.explain.untrained
    if not number:
        return []
    twin = Run(run.config.untrained)
    do_stages(twin, ["harvest", "train"])
    sae, store = twin.sae(), twin.store()
    return [Dictionary("untrained", "untrained", sae, store, sae.cfg.hook_name or store.hooks[0], number)]


def _explain(run: Run) -> dict[str, Any]:
    sae, store = run.sae(), run.store()
    others = _untrained(run)
    start = time.perf_counter()
    with progress_bar("reading evidence") as evidence, progress_bar("explain", "unit") as bar:
        result = explain(
            sae, store, run.subject.tokenizer, run.config.explain, run.explanations, seed=run.config.seed, others=others,
            model=run.subject.model,
            evidence_progress=evidence, progress=bar,
        )  # fmt: skip
    save_latents(result.latents, run.sae_folder())
    if result.summary["compared"]:
        write_atomic(run.folder / "plots" / "compared.png", comparison_plot(result.summary["compared"]))
    figures: dict[str, Any] = {"backend": result.summary["backend"]}
    if run.config.is_sweep:
        figures["sae"] = run.config.chosen
    figures["tokens_per_second"] = store.rows / (time.perf_counter() - start)
    failed = 0
    for name, found in result.summary["dictionaries"].items():
        prefix = "" if name == "sae" else f"{name}_"
        figures[f"{prefix}scored"] = found["scored"]
        for state in ("undefined", "failed"):
            if found[state]:
                figures[f"{prefix}{state}"] = found[state]
        for key in ("ev_correlation", "shuffled_correlation", "lookup_correlation"):
            if found[key]["mean"] is not None:
                figures[f"{prefix}{key}"] = found[key]["mean"]
        for kind in KINDS:
            for by in ("description", "lookup", "shuffled"):
                accuracy = found.get(kind, {}).get(by, {}).get("balanced_accuracy")
                if accuracy is not None:
                    figures[f"{prefix}{kind}_{by}"] = accuracy
        for choice in CHOICE_KINDS:
            if choice in found and found[choice]["accuracy"]["description"] is not None:
                figures[f"{prefix}{choice}"] = found[choice]["accuracy"]["description"]
                figures[f"{prefix}{choice}_chance"] = found[choice]["accuracy"]["chance"]
        for control, margin in found["margins"].items():
            if margin["interval"] is not None:
                low, high = margin["interval"]
                figures[f"{prefix}margin_over_{control}"] = f"{margin['mean']:.3f} ({low:.3f} to {high:.3f})"
        failed += found["failed"]
        for reason in found["failure_reasons"]:
            console.print(f"[yellow]![/] {name}: failed: {escape(reason)}")
    total = sum(found["chosen"] for found in result.summary["dictionaries"].values())
    if failed and failed == total:
        reason = next(r for found in result.summary["dictionaries"].values() for r in found["failure_reasons"])
        raise InputError(f"explain: all {failed} units failed, first reason: {reason}; run the same command to try again")
    if failed:
        figures["incomplete"] = True  # so that the same command tries the failed ones again
    return figures


def estimated(run: Run) -> dict[str, Any]:
    """Return what `explain` would still ask of its chat server, and what that costs; sends nothing (see explain.estimate)."""
    config = run.config.explain
    if config.backend != "openai":
        raise InputError(f"--estimate: explain.backend is {config.backend}, which costs nothing but time; openai has a price")
    state = run.manifest().get("stages", {}).get("explain", {})
    begun = state.get("key") == run.key(STAGES["explain"], STAGES)
    folder = run.explanations if begun else run.folder / "estimate"
    try:
        with progress_bar("reading evidence") as bar:
            prepare(
                run.sae(), run.store(), run.subject.tokenizer, config, folder, seed=run.config.seed, others=_untrained(run),
                model=run.subject.model, progress=bar,
            )  # fmt: skip
        return asyncio.run(estimate(config, folder, run.subject.tokenizer, run.config.seed))
    finally:
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)


def _steering(run: Run, sae: SAE) -> list[dict[str, Any]]:
    """Return the report's steering samples, making those that are missing."""
    if not steerable(sae):
        return []
    path = run.explanations / "steering.jsonl"
    config = run.config.steer
    settings = config.model_dump(mode="json", exclude={"features"})
    done = {line["unit"]: line for line in read_json_lines(path) if line["settings"] == settings}
    scores = read_json_lines(run.explanations / "scores.jsonl")
    wanted = [line for line in scores if line["dictionary"] == "sae" and line["max_activation"] > 0]
    ranked = sorted(wanted, key=lambda line: -(line["ev_correlation"] or -1))[: config.features]
    missing = [line for line in ranked if line["unit"] not in done]
    if missing:
        model, tokenizer = run.subject.model, run.subject.tokenizer
        bos = bool(sae.cfg.metadata.get("prepend_bos", False))
        with progress_bar("steering samples", "sample") as bar:
            baseline = complete(model, tokenizer, config.prompt, config.tokens, prepend_bos=bos)
            for number, line in enumerate(missing):
                bar(number, len(missing))
                text = steering_sample(model, tokenizer, sae, line["latent"], config, baseline)
                edit = f"clamp {config.times_max:g}x max"
                done[line["unit"]] = {"unit": line["unit"], "edit": edit, "settings": settings, **vars(text)}
                append_json_line(path, done[line["unit"]])
    return [done[line["unit"]] for line in ranked]


def _report(run: Run) -> dict[str, Any]:
    sae = run.sae()
    scores = read_json_lines(run.explanations / "scores.jsonl")
    if not scores:
        raise InputError(f"{run.explanations}: no scores there; run `monosem explain` first")
    steering = _steering(run, sae)
    units = read_json_lines(run.explanations / "units.jsonl")
    manifest, evaluation = run.manifest(), _read_json(run.folder / "evaluation.json")
    sweep = evaluation["sweep"] if run.config.is_sweep and evaluation is not None else None
    if sweep is not None and evaluation is not None:
        evaluation = evaluation["saes"][run.config.chosen]
    path = write_report(
        ReportInputs(
            title=run.config.report.title or f"monosem: {run.config.name}",
            facts=_facts(run, sae, manifest),
            metrics=read_json_lines(run.metrics()),
            evaluation=evaluation,
            summary=_read_json(run.explanations / "summary.json"),
            scores=scores,
            units=units,
            predictions={
                line["unit"]: line.get("predicted", []) for line in read_json_lines(run.explanations / "results.jsonl")
            },
            histograms=_histograms(sae, scores),
            steering=steering,
            plots={file.stem: file.read_bytes() for file in sorted((run.folder / "plots").glob("*.png"))},
            sweep=sweep,
        ),
        run.folder / "report" / "index.html",
    )
    return {"features": len(scores), "steering_samples": len(steering), "path": str(path)}


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _facts(run: Run, sae: SAE, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the run's facts, flat."""
    store = run.store()
    facts: dict[str, Any] = {
        "model": store.attrs["model"], "model revision": store.attrs["model_revision"], "model dtype": store.attrs["model_dtype"],
        "basis": store.attrs["basis"], "hook": sae.cfg.hook_name, "text": store.attrs["data"]["source"],
        "tokens harvested": store.rows, "context": store.context,
        "held-out sequences": store.tokens.shape[0] - store.train_sequences,
        "architecture": sae.cfg.architecture, "d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae,
    }  # fmt: skip
    if run.config.is_sweep:
        facts["SAE shown, of the sweep"] = run.config.chosen
    own = run.config.members[run.config.chosen]
    facts |= {f"train {key}": value for key, value in own.model_dump(mode="json").items() if value is not None}
    facts |= {f"explain {key}": value for key, value in run.config.explain.model_dump(mode="json").items() if value is not None}
    facts["seed"] = run.config.seed
    facts |= {f"version {name}": value for name, value in manifest.get("versions", {}).items()}
    for name, state in manifest.get("stages", {}).items():
        facts[f"{name} seconds"] = state.get("seconds", "not finished")
    return facts


def _histograms(sae: SAE, scores: list[dict[str, Any]]) -> dict[str, tuple[list[float], list[int]]]:
    """Return each latent's activation histogram, cut to the bins that hold anything."""
    found = {}
    for line in scores:
        if line["dictionary"] != "sae" or sae.latents is None:
            continue
        counts = sae.latents.histogram[line["latent"]].tolist()
        filled = [i for i, count in enumerate(counts) if count]
        if filled:
            first, last = filled[0], filled[-1] + 1
            found[line["unit"]] = (HISTOGRAM_EDGES[first : last + 1], counts[first:last])
    return found


STAGES = {
    stage.name: stage
    for stage in (
        Stage("harvest", ("model", "data", "harvest"), (), ("activations", "activations.journal"), _harvest, _store_is_whole),
        Stage("train", ("train",), ("harvest",), ("sae", "checkpoints", "metrics.jsonl", "metrics", "plots", "recycled"), _train),
        Stage("evaluate", ("evaluate",), ("train",), ("evaluation.json",), _evaluate),
        Stage("explain", ("explain",), ("train",), ("explanations",), _explain),
        Stage("report", ("report", "steer"), ("evaluate", "explain"), ("report",), _report),
    )
}


def do_stages(run: Run, names: list[str]) -> None:
    """Run stages in order; everything that can be known to fail is found before the first one starts."""
    several = next((config.hooks for config in run.config.members.values() if len(config.hooks) > 1), ())
    if several and {"explain", "report"} & set(names):
        raise InputError(
            f"train.hook: {len(several)} hooks given; explain and report read one; `monosem train` and `evaluate` take all"
        )
    todo = [name for name in names if not run.finished(STAGES[name], STAGES)]
    if "harvest" in todo:
        require_disk(run, make_plan(run.config))
    if len(names) > 1 and "explain" in todo and run.config.explain.backend == "openai":
        server = ChatBackend(run.config.explain, run.explanations)
        check_server(run.config.explain)
        server.prepare()
    for name in names:
        run.do(STAGES[name], STAGES)
