"""The command line. Exit codes: 0 done, 1 a fault of ours, 2 bad input (one line on stderr), 130 interrupted."""

import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from activation_store.errors import InputError

if TYPE_CHECKING:
    from explain.backends.probe import Capabilities

app = typer.Typer(
    name="monosem", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Train sparse autoencoders on a language model, label their features with honest scores, and steer with them.",
)  # fmt: skip
Config = Annotated[Path, typer.Argument(help="the run's YAML file, such as configs/demo.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as wanted", metavar="[KEY=VALUE]...")]

Reference = Annotated[bool, typer.Option("--reference", help="train by plain dense PyTorch: as train.kernels=reference")]


def _do(config: Path, overrides: list[str] | None, stages: list[str], reference: bool = False) -> None:
    from monosem.config import load_config
    from monosem.run import Run

    plain = ["train.kernels=reference"] if reference else []
    loaded = load_config(config, [*(overrides or []), *plain])  # before the heavy imports: a misspelled key costs no waiting
    from monosem.stages import do_stages

    do_stages(Run(loaded), stages)


@app.command()
def run(config: Config, overrides: Overrides = None, reference: Reference = False) -> None:
    """Do the whole road: harvest, train, evaluate, explain, report. Work that is done already is not done again."""
    _do(config, overrides, ["harvest", "train", "evaluate", "explain", "report"], reference)


@app.command()
def harvest(config: Config, overrides: Overrides = None) -> None:
    """Stream activations of the model to disk."""
    _do(config, overrides, ["harvest"])


@app.command()
def train(config: Config, overrides: Overrides = None, reference: Reference = False) -> None:
    """Train the SAE on harvested activations."""
    _do(config, overrides, ["train"], reference)


@app.command()
def evaluate(config: Config, overrides: Overrides = None) -> None:
    """Measure the SAE on held-out text: sparsity, reconstruction, and what it costs the model."""
    _do(config, overrides, ["evaluate"])


@app.command()
def explain(
    config: Config, overrides: Overrides = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="only say what it would ask and cost")] = False,
) -> None:  # fmt: skip
    """Find what makes features and neurons fire, describe them, and score the descriptions."""
    if not estimate:
        return _do(config, overrides, ["explain"])
    from monosem.config import load_config
    from monosem.progress import console
    from monosem.run import Run

    loaded = load_config(config, overrides or [])
    from monosem.stages import estimated

    for name, value in estimated(Run(loaded)).items():
        text = "no price is known" if value is None else f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
        console.print(f"{name.replace('_', ' '):<20} {text}", markup=False, highlight=False)


@app.command()
def compare(config: Config, overrides: Overrides = None) -> None:
    """Compare latents with neurons, components, random directions and an untrained model's latents, all explained alike."""
    from rich.table import Table

    from monosem.config import load_config
    from monosem.progress import console
    from monosem.run import Run

    loaded = load_config(config, overrides or [])
    choice = loaded.explain.latents
    number = choice if isinstance(choice, int) else len(choice)
    missing = {name: number for name in ("neurons", "random", "principal", "untrained") if not getattr(loaded.explain, name)}
    from monosem.stages import do_stages

    run = Run(loaded.model_copy(update={"explain": loaded.explain.model_copy(update=missing)}))
    do_stages(run, ["harvest", "train", "explain"])
    table = Table("dictionary", "score", "SAE", "this", "SAE less this", "95 % interval", "units")
    for other, figures in run.compared().items():
        for name, found in figures.items():
            interval = "-" if found["interval"] is None else "{:.3f} to {:.3f}".format(*found["interval"])
            values = [f"{found[key]:.3f}" for key in ("sae", other, "difference")]
            table.add_row(other, name.replace("_", " "), *values, interval, "{} and {}".format(*found["units"]))
    console.print(table)


@app.command()
def report(config: Config, overrides: Overrides = None) -> None:
    """Write the report: one HTML file that opens with the network off."""
    _do(config, overrides, ["report"])


@app.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """Print tokens, disk, memory, FLOPs and estimated time of each stage; run nothing."""
    from rich.table import Table

    from monosem.config import load_config
    from monosem.plan import free_disk, human_bytes, human_seconds, make_plan
    from monosem.progress import console

    loaded = load_config(config, overrides or [])
    made = make_plan(loaded)
    table = Table("stage")
    for header in ("tokens", "disk", "memory", "FLOPs", "time, about"):
        table.add_column(header, justify="right")
    for stage in made.stages:
        table.add_row(
            stage.name, f"{stage.tokens:,}", human_bytes(stage.disk), human_bytes(stage.memory), f"{stage.flops:.2e}",
            human_seconds(stage.seconds),
        )  # fmt: skip
    total = sum(stage.seconds for stage in made.stages)
    table.add_section()
    table.add_row("all", "", human_bytes(made.disk), human_bytes(max(s.memory for s in made.stages)),
                  f"{sum(s.flops for s in made.stages):.2e}", human_seconds(total))  # fmt: skip
    console.print(table)
    widths = ", ".join(f"{hook} {width}" for hook, width in made.widths.items())
    free = free_disk(loaded.folder)
    items = ", ".join(f"{item} {human_bytes(size)}" for item, size in made.training.items())
    console.print(f"training holds {human_bytes(sum(made.training.values()))}: {items}")
    console.print(f"model {loaded.model.id}: {made.parameters:,} parameters; widths: {widths}")
    rate = f"{made.matmul_rate / 1e9:,.0f} GFLOP/s"
    console.print(f"times at {rate}, this machine's {loaded.model.dtype} matrix product: a floor, not a promise")
    console.print(f"disk: {human_bytes(made.disk)} needed, {human_bytes(free)} free in {loaded.runs_dir}")
    if made.disk > free:
        console.print("[red]`monosem run` would refuse: not enough disk[/]")


@app.command()
def probe(
    model: Annotated[str, typer.Option(help="the model's name at the server")],
    base_url: Annotated[str | None, typer.Option(help="such as http://127.0.0.1:8000/v1; else OPENAI_BASE_URL")] = None,
) -> None:
    """Say what a chat server can do, and how it would be made to simulate. A few tiny requests."""
    import asyncio
    from tempfile import TemporaryDirectory

    from explain.backends.probe import probe as ask_server
    from explain.client import ChatClient, RequestFailed, check_server
    from explain.config import ExplainConfig
    from monosem.progress import console

    config = ExplainConfig(backend="openai", model=model, base_url=base_url)
    check_server(config)

    async def ask(folder: str) -> "Capabilities":
        client = ChatClient(config, Path(folder) / "requests.jsonl")
        try:
            return await ask_server(client)
        finally:
            await client.close()

    with TemporaryDirectory() as folder:
        try:
            found = asyncio.run(ask(folder))
        except RequestFailed as error:
            raise InputError(f"--model: {model} does not answer chats: {error}") from None
    for what, said in found.lines():
        console.print(f"{what:<44} {said}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{'explain.instrument=auto would take':<44} {found.choose(config)}", highlight=False)


@app.command()
def steer(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, such as runs/demo")],
    prompt: Annotated[str, typer.Option(help="what to complete")],
    feature: Annotated[int, typer.Option(help="the latent to change")],
    clamp: Annotated[str | None, typer.Option(help="set it: to 5x (five times its corpus maximum) or to a value")] = None,
    scale: Annotated[float | None, typer.Option(help="multiply it")] = None,
    add: Annotated[float | None, typer.Option(help="add this much of its direction")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="set it to zero")] = False,
    min_clamp: Annotated[str | None, typer.Option(help="as --clamp, but only where it is lower")] = None,
    ablate_direction: Annotated[bool, typer.Option("--ablate-direction", help="take out all along its direction")] = False,
    positions: Annotated[str, typer.Option(help="which tokens are steered: all, prompt or response")] = "all",
    keep_norm: Annotated[bool, typer.Option("--keep-norm", help="keep the length of what is steered")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="how many tokens to write")] = 60,
    name: Annotated[str | None, typer.Option("--sae", help="the SAE's name, in a run that trained several")] = None,
) -> None:
    """Complete a prompt with and without one feature changed."""
    from monosem.progress import console, progress_bar
    from monosem.run import Run
    from sae.formats.saelens import save_latents
    from sae.intervene import Ablate, AblateDirection, Add, Clamp, Edit, Positions, Scale
    from sae.statistics import latent_statistics
    from sae.steer import steer as steer_text

    edits: list[Edit] = []
    for option, target in (("--clamp", clamp), ("--min-clamp", min_clamp)):
        if target is None:
            continue
        times = target.lower().endswith("x")
        try:
            value = float(target.lower().removesuffix("x"))
        except ValueError:
            raise InputError(f"{option}: {target!r} given; allowed: a multiple such as 5x, or a value such as 4.0") from None
        by = {"times_max": value} if times else {"value": value}
        edits.append(Clamp(feature, **by, minimum=option == "--min-clamp"))
    if scale is not None:
        edits.append(Scale(feature, scale))
    if add is not None:
        edits.append(Add(feature, add))
    if ablate:
        edits.append(Ablate(feature))
    if ablate_direction:
        edits.append(AblateDirection(feature))
    if len(edits) != 1:
        options = "--clamp, --min-clamp, --scale, --add, --ablate, --ablate-direction"
        raise InputError(f"steer: give exactly one of {options} ({len(edits)} given)")
    if positions not in ("all", "prompt", "response"):
        raise InputError(f"--positions: {positions!r} given; allowed: all, prompt, response")
    if not prompt:
        raise InputError("--prompt: '' given; allowed: some text")
    opened = Run.of_folder(run_folder)
    sae = opened.sae(name)
    if not 0 <= feature < sae.cfg.d_sae:
        raise InputError(f"--feature: {feature} given; allowed: 0 to {sae.cfg.d_sae - 1}")
    if sae.latents is None and any(isinstance(edit, Clamp) and edit.times_max is not None for edit in edits):
        with progress_bar("measuring corpus maxima") as bar:
            sae.latents = latent_statistics(sae, opened.store(), progress=bar)
        save_latents(sae.latents, opened.sae_folder(name))
    subject = opened.subject
    text = steer_text(
        subject.model, subject.tokenizer, sae, edits, prompt, tokens, positions=cast(Positions, positions), keep_norm=keep_norm
    )
    for what, written in (("baseline", text.baseline), ("steered", text.steered)):
        console.print(f"{what}:", style="bold")
        console.print(prompt + written, markup=False)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="an SAE of any known format: a folder, a file, a run or hf://...")],
    to_folder: Annotated[Path, typer.Argument(metavar="DST", help="the new folder to write")],
    to: Annotated[str, typer.Option(help="the format to write, such as saelens, sparsify or gemma_scope")],
    from_format: Annotated[str | None, typer.Option("--from", help="the format of SRC, where its content fits several")] = None,
) -> None:
    """Write an SAE in another format. What that format cannot hold is refused, with those that can."""
    from monosem.progress import console
    from sae import SAE
    from sae.hub import sae_folder

    if to_folder.exists() and (to_folder.is_file() or any(to_folder.iterdir())):
        raise InputError(f"{to_folder}: exists already; name a new folder")
    sae = SAE.load(sae_folder(source) if Path(source).is_dir() else source, format=from_format)
    sae.save(to_folder, format=to)
    names = ", ".join(sorted(file.name for file in to_folder.iterdir()))
    said = f"{sae.cfg.architecture}, d_in {sae.cfg.d_in}, d_sae {sae.cfg.d_sae} -> {to_folder} ({to}): {names}"
    console.print(said, markup=False, highlight=False, soft_wrap=True)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, such as runs/demo")],
    to_folder: Annotated[Path, typer.Argument(metavar="DST", help="the new folder to write")],
    to: Annotated[str, typer.Option(help="the tool to write for: neuronpedia or openai")],
    model_id: Annotated[str | None, typer.Option(help="what the tool calls the model; by default its name on the hub")] = None,
    source_set: Annotated[str | None, typer.Option(help="what to call the SAE there, such as res-demo")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="the layer, where the hook's name has none")] = None,
    release: Annotated[str | None, typer.Option(help="the release it belongs to; by default named as the source set")] = None,
    creator_id: Annotated[str | None, typer.Option(help="the user there whose it shall be")] = None,
) -> None:
    """Write a run's explanations, examples and scores in the files of another tool."""
    from monosem.export import export as export_run
    from monosem.progress import console
    from monosem.run import Run

    explained, names = export_run(
        Run.of_folder(run_folder), to_folder, to, model_id=model_id, source_set=source_set, layer=layer, release=release,
        creator_id=creator_id,
    )  # fmt: skip
    scored = sum(line["state"] == "scored" for line in explained.scores.values())
    said = f"{len(explained.units):,} units, {scored:,} scored -> {to_folder} ({to}): {names.model_id}, {names.source_set}"
    console.print(said, markup=False, highlight=False, soft_wrap=True)


@app.command()
def push(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_SAE", help="a run's folder, or an SAE's")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="the model repository, owner/name; it is made if need be")],
    folder: Annotated[str, typer.Option(help="where in the repository; a repository may hold many SAEs")] = "",
    private: Annotated[bool, typer.Option("--private", help="make the repository private, if it is made")] = False,
    revision: Annotated[str | None, typer.Option(help="a branch, instead of main")] = None,
) -> None:
    """Upload an SAE to the Hugging Face hub, with a model card. Log in with `hf auth login` first, or set HF_TOKEN."""
    from monosem.progress import console
    from sae.hub import push as push_sae

    where = push_sae(source, repo, folder=folder, private=private, revision=revision)
    console.print(where, markup=False, highlight=False, soft_wrap=True)


@app.command()
def pull(
    address: Annotated[str, typer.Argument(metavar="REPO", help="owner/name[/folder or file][@revision]")],
    to_folder: Annotated[Path, typer.Argument(metavar="DST", help="the new folder to write")],
) -> None:
    """Copy an SAE from the Hugging Face hub into a folder, in whatever format it has there."""
    from monosem.progress import console
    from sae.hub import pull as pull_sae

    pull_sae(address, to_folder)
    names = ", ".join(sorted(file.name for file in to_folder.iterdir()))
    console.print(f"{to_folder}: {names}", markup=False, highlight=False, soft_wrap=True)


store_app = typer.Typer(no_args_is_help=True, help="Look after an activation store: a folder, or an fsspec URL.")
app.add_typer(store_app, name="store")
StorePath = Annotated[str, typer.Argument(metavar="PATH", help="the store, such as runs/demo/activations or s3://bucket/store")]


@store_app.command()
def info(path: StorePath) -> None:
    """Show what a store holds, how far it is, and how well its batches are mixed."""
    from activation_store.check import info as store_info
    from monosem.progress import console

    def show(name: str, value: object) -> None:
        text = f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
        console.print(f"{name.replace('_', ' '):<32} {text}", markup=False, highlight=False)

    for name, value in store_info(path).items():
        if isinstance(value, dict):  # a hook
            console.print(name, markup=False, highlight=False, style="bold")
            for inner, fact in value.items():
                show(f"  {inner}", fact)
        else:
            show(name, value)


@store_app.command()
def verify(path: StorePath) -> None:
    """Hold every chunk and every block against its checksum. Exit code 2 where one does not match."""
    from activation_store.check import verify as verify_store
    from monosem.plan import human_bytes
    from monosem.progress import console, progress_bar

    with progress_bar("verify", "chunk") as bar:
        found = verify_store(path, bar)
    for fault in found.faults:
        console.print(str(fault), markup=False, highlight=False, soft_wrap=True)
    if found.faults:
        raise InputError(f"{path}: {len(found.faults)} damaged chunks; `monosem store repair {path}` takes them out")
    missing = found.shards - found.shards_done
    part = f"; unfinished, {missing} shards are still to come" if missing else ""
    console.print(f"[green]✓[/] {found.chunks:,} chunks, {human_bytes(found.bytes)}: all as written{part}")


@store_app.command()
def repair(path: StorePath) -> None:
    """Take damaged chunks out, so that the same `monosem harvest` fills them in again, and them only."""
    from activation_store.check import repair as repair_store
    from monosem.progress import console, progress_bar

    with progress_bar("verify", "chunk") as bar:
        taken = repair_store(path, bar)
    for fault in taken:
        console.print(str(fault), markup=False, highlight=False, soft_wrap=True)
    if taken:
        console.print(f"{len(taken)} chunks taken out; run the same `monosem harvest` again: it fills in these, and no others")
    else:
        console.print("[green]✓[/] nothing to repair")


def main() -> None:
    """Run the command line and turn errors into exit codes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if app(standalone_mode=False) == 130:  # typer turns an interrupt into this return value
            raise KeyboardInterrupt
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:  # what was trained on, or how, not a fault of ours
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print(f"interrupted; to go on from here: {shlex.join(['monosem', *sys.argv[1:]])}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # typer brings its own copy of click, whose usage errors have no public base to name
        if hasattr(error, "format_message"):  # a usage error: unknown command, missing option
            print(f"error: {error.format_message()}", file=sys.stderr)
            sys.exit(2)
        raise

