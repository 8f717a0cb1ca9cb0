"""The command line. Bodies are a few lines; whatever is heavy is imported inside."""

import dataclasses
import inspect
import os
import sys
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tokbench.config import parse_value
from tokbench.errors import CellError, InputError, LostPeerError, trace
from tokbench.generation import Generation
from tokbench.records.measurement import Measurement

app = typer.Typer(
    rich_markup_mode=None, pretty_exceptions_enable=False, context_settings={"max_content_width": 120},
    help="Measure image tokenizers under a protocol that is written down.",
)  # fmt: skip

# What every --help ends with; a test reads them.
EXAMPLES = {
    "run": ["--models ssdd,klvae --res 256", "--models models.txt --data kodak --res native --metrics psnr,lpips-alex",
            "--models my_model.py:load@width=64 --data photos --dry-run"],
    "report": ["", "--results runs --columns psnr,lpips-alex --where 'resolution==256' --format latex",
               "--results results --format html --out page"],
    "data info": ["photos.zip --decode"],
    "data fetch": ["kodak"],
    "speed": ["--models ssdd,klvae --res 128,256 --quick", "--models sd-vae-ft-mse --dtype bfloat16 --random-weights"],
    "check": ["runs/new --against baseline --update",
              "runs/new --against baseline --tolerance psnr=0.05,lpips-alex=1%"],
    "train": ["klvae --preset small --data photos --out runs/klvae run.steps=1000", "ssdd --preset small --help"],
    "generate": ["--generator runs/dit --tokenizer klvae --num-images 5000 --reference photos"],
    "score": ["photos reconstructions --metrics psnr,ssim --name mine"],
    "probe": ["--models ssdd,klvae --res 256"],
    "latents": ["--models sd-vae-ft-mse,flux1-vae --data photos"],
    "compare": ["runs/adm/samples-256/ssdd.json runs/adm/samples-256/klvae.json", "runs/old runs/new"],
    "list": ["models --family kl-vae --columns params,licence", "models ssdd", "metrics", "protocols ssdd"],
    "weights fetch": ["", "lpips-alex dinov2"],
    "weights verify": [""],
    "weights export": ["networks"],
    "doctor": [""],
    "card": ["runs/adm/imagenet-256/mine.json --push me/mine"],
    "results add": ["mine.json --into results"],
}  # fmt: skip


def _examples(command: str) -> str:
    """The end of a command's help."""
    return "\n".join(["\b", "Examples:", *(f"  tokbench {command} {line}".rstrip() for line in EXAMPLES[command])])


def _version(asked: bool) -> None:
    if asked:
        import tokbench

        typer.echo(f"tokbench {tokbench.__version__}")
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; also TOKBENCH_DEBUG=1.")] = False,
) -> None:
    """Measure image tokenizers under a protocol that is written down."""
    if debug:
        os.environ["TOKBENCH_DEBUG"] = "1"


def _known_models(begun: str) -> list[str]:
    """What a shell offers for --models: names that go on from the last comma."""
    from tokbench.registry import TOKENIZERS

    before, comma, last = begun.rpartition(",")
    return [before + comma + name for name in TOKENIZERS.all() if name.startswith(last) and "{" not in name]


Models = Annotated[
    list[str],
    typer.Option(
        help="Model specs, comma-separated, or a .txt file of them; may be repeated. See `tokbench list models`.",
        autocompletion=_known_models,
    ),
]
Resolutions = Annotated[str, typer.Option("--res", help="Resolutions in pixels, comma-separated.")]
Data = Annotated[
    str, typer.Option(help="samples, kodak, a folder, an archive, a list of paths, imagenet:ROOT or hf:NAME.")
]
Split = Annotated[str | None, typer.Option(help="Split of the data set.")]
Limit = Annotated[int | None, typer.Option(help="Take only N images, chosen by hash of their id.")]
Out = Annotated[Path, typer.Option(help="Folder for results.")]
OwnWeights = Annotated[Path | None, typer.Option("--weights", help="A file of Inception weights instead of FID's.")]
Unverified = Annotated[bool, typer.Option("--unverified", help="Take an unknown --weights, and rename its metrics.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
DataType = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
BatchSize = Annotated[str, typer.Option(help="auto or a number of images; a CPU computes one at a time.")]


def with_options(config: type, *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn the fields of a config that have a help text (with names: only those) into options of a command, which takes
    them as one argument called like the class."""
    fields = [f for f in dataclasses.fields(config) if "help" in f.metadata and (not names or f.name in names)]
    hints, argument = typing.get_type_hints(config), config.__name__.lower()

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def filled(**given: Any) -> None:
            values = {field.name: given.pop(field.name) for field in fields}
            for name, text in values.items():
                if isinstance(text, str):
                    values[name] = parse_value(text, hints[name], f"--{name.replace('_', '-')}")
            given[argument] = config(**values)
            command(**given)

        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command).parameters.values()
            if parameter.name != argument
        ]
        parameters += [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, **_as_option(f)) for f in fields]
        filled.__name__, filled.__doc__ = command.__name__, command.__doc__
        filled.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        filled.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return filled

    return decorate


def _as_option(field: "dataclasses.Field[Any]") -> dict[str, Any]:
    """Annotation and default of a field's option; values are texts that `parse_value` reads, but for flags."""
    option = typer.Option(f"--{field.name.replace('_', '-')}", help=field.metadata["help"])
    if isinstance(field.default, bool):
        return {"annotation": Annotated[bool, option], "default": field.default}
    if field.default is dataclasses.MISSING:
        return {"annotation": Annotated[str, option], "default": inspect.Parameter.empty}
    if field.default is None:
        return {"annotation": Annotated[str, option], "default": "auto"}
    default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return {"annotation": Annotated[str, option], "default": str(default)}


@app.command(epilog=_examples("run"))
@with_options(Measurement)
def run(
    models: Models,
    measurement: Measurement,
    res: Resolutions = "256",
    data: Data = "samples",
    split: Split = None,
    limit: Limit = None,
    out: Out = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what --out holds of these cells.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="An unavailable metric is a failure.")] = False,
    shards: Annotated[str, typer.Option(help="I/N: measure one of N parts, in a job of its own.")] = "",
    merge: Annotated[bool, typer.Option("--merge", help="Write the records of what all shards measured.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, fetched and written.")] = False,
    weights: OwnWeights = None,
    unverified: Unverified = False,
) -> None:
    """Reconstruct images with tokenizers and measure what is lost."""
    from tokbench.evaluation.run import run as run_cells
    from tokbench.metrics.suite import use_weights
    from tokbench.protocols import parse_resolution

    use_weights(weights, unverified)
    resolutions = [parse_resolution(part.strip()) for part in res.split(",") if part.strip()]
    status = run_cells(
        ",".join(models), resolutions, measurement, data=data, split=split, limit=limit, out=out, fresh=fresh,
        strict=strict, shards=shards, merge=merge, dry_run=dry_run,
    )  # fmt: skip
    raise typer.Exit(status)


@app.command(epilog=_examples("report"))
def report(
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of results, or a file; may be repeated. Default: runs, else results."),
    ] = None,
    format: Annotated[str, typer.Option(help="table, markdown, latex, csv, json or html.")] = "table",
    out: Annotated[Path | None, typer.Option(help="File to write instead of stdout; for html a folder too.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots, of the twelve largest blocks.")] = None,
    plot_format: Annotated[str, typer.Option(help="png, svg or pdf.")] = "png",
    columns: Annotated[
        str | None, typer.Option(help="Columns in order: psnr,psnr:p5,psnr:median,psnr:worst,...")
    ] = None,
    where: Annotated[str | None, typer.Option(help='Keep rows by a pandas query: "f==8 and resolution==256".')] = None,
    group: Annotated[bool, typer.Option(help="Gather rows by compression and rank within it.")] = True,
    reference: Annotated[str | None, typer.Option(help="Row to show paired differences to, image by image.")] = None,
    group_by: Annotated[
        str | None, typer.Option(help="Show values by class, or by another column of the data.")
    ] = None,
    reported: Annotated[Path | None, typer.Option(help="Numbers of papers; default RESULTS/reported.csv.")] = None,
    blind: Annotated[
        int | None, typer.Option(help="Write a page of N blind comparisons of saved images below --out.")
    ] = None,
    votes: Annotated[list[Path] | None, typer.Option(help="Votes that blind pages exported; may be repeated.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Other results, a folder or a file: show what changed since.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A file that has to be skipped is a failure.")] = False,
) -> None:
    """Tables, plots and a page from result files alone."""
    from tokbench.report.build import build

    chosen = parse_value(columns, tuple[str, ...], "--columns") if columns else None
    status = build(
        results or [], format=format, out=out, plots=plots, plot_format=plot_format, columns=chosen, where=where,
        group=group, reference=reference, group_by=group_by, reported=reported, strict=strict, blind=blind,
        votes=votes or [], against=against,
    )  # fmt: skip
    raise typer.Exit(status)


@app.command(epilog=_examples("card"))
def card(
    results: Annotated[list[Path], typer.Argument(help="Records of one tokenizer.")],
    out: Annotated[Path, typer.Option(help="Folder for .eval_results/*.yaml and model-index.yml.")] = Path("card"),
    benchmark: Annotated[str | None, typer.Option(help="The data set's name on the hub, OWNER/NAME.")] = None,
    source: Annotated[str | None, typer.Option(help="Address where the records can be read.")] = None,
    push: Annotated[str | None, typer.Option(help="Offer it to the repository OWNER/NAME, by pull request.")] = None,
) -> None:
    """Write results as metadata of a tokenizer's repository."""
    from tokbench.sharing.card import write_card

    typer.echo("\n".join(map(str, write_card(results, out, benchmark, source, push))))


results_app = typer.Typer(no_args_is_help=True, help="Results that somebody else made.")
app.add_typer(results_app, name="results")


@results_app.command(name="add", epilog=_examples("results add"))
def results_add(
    where: Annotated[str, typer.Argument(help="A record, or the address of one; its per-image table lies beside it.")],
    into: Annotated[Path, typer.Option(help="Folder of results that it is copied into.")] = Path("results"),
    replace: Annotated[bool, typer.Option("--replace", help="Take it in place of one that is there.")] = False,
) -> None:
    """Examine a record (schema, protocol, images, plausible values) and copy it beside ours."""
    from tokbench.sharing.add import add

    typer.echo(add(where, into, replace))


data_app = typer.Typer(no_args_is_help=True, help="Data sets: what is in one, and those that are known by name.")
app.add_typer(data_app, name="data")


@data_app.command(name="info", epilog=_examples("data info"))
def data_info(
    data: Annotated[str, typer.Argument(help="samples, a folder, an archive, imagenet:ROOT or hf:NAME.")],
    split: Split = None,
    limit: Limit = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image to its end.")] = False,
) -> None:
    """Show count, sizes, formats, problems and fingerprint of a data set."""
    from tokbench.data.open import describe, open_source

    typer.echo("\n".join(describe(open_source(data, split, limit), decode=decode)))


@data_app.command(name="list")
def data_list() -> None:
    """Show data sets with a name: images, size, licence, where they are or how to get them."""
    from tokbench.data.named import describe_sets

    typer.echo("\n".join(describe_sets()))


@data_app.command(name="fetch", epilog=_examples("data fetch"))
def data_fetch(name: Annotated[str, typer.Argument(help="A name of `tokbench data list`.")]) -> None:
    """Download a data set; its licence is shown first."""
    from tokbench.data.named import fetch_set
    from tokbench.data.open import describe, open_source

    fetch_set(name)
    typer.echo("\n".join(describe(open_source(name))))


@app.command(epilog=_examples("speed"))
def speed(
    models: Models,
    res: Resolutions = "256",
    batch_size: Annotated[str, typer.Option(help="auto, or numbers of images to try, comma-separated.")] = "auto",
    device: Device = "auto",
    dtype: DataType = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the networks.")] = False,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="No checkpoints: speed only.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="3 iterations, batch 1 and 2, no equality check.")] = False,
    reference: Annotated[str | None, typer.Option(help="Row that speed-ups refer to; default: the first.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for records.")] = Path("runs/speed"),
) -> None:
    """Measure throughput, latency, memory and cost, models in turns."""
    from tokbench.config import positive_numbers
    from tokbench.runtime.device import find_dtype, select_device
    from tokbench.speed.measure import measure, show
    from tokbench.speed.timing import QUICK, STANDARD

    results = measure(
        ",".join(models), positive_numbers(res, "--res"),
        batch_sizes=None if batch_size == "auto" else positive_numbers(batch_size, "--batch-size"),
        device=select_device(device), dtype=find_dtype(dtype), compile=compile, random_weights=random_weights,
        budget=QUICK if quick else STANDARD, out=out,
    )  # fmt: skip
    raise typer.Exit(show(results, reference, plots))


@app.command(epilog=_examples("check"))
def check(
    new: Annotated[Path, typer.Argument(help="New results: a file or a folder.")],
    against: Annotated[Path, typer.Option(help="Baseline: a file or a folder.")],
    tolerance: Annotated[str | None, typer.Option(help="psnr=0.05,lpips-alex=1%,...; else the table's.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Compare only these, comma-separated.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Fail on any change.")] = False,
    two_sided: Annotated[bool, typer.Option("--two-sided", help="Fail on a gain beyond the tolerance too.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on an inconclusive metric too.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="File for a pull-request comment.")] = None,
    junit: Annotated[Path | None, typer.Option(help="File for JUnit XML.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Make NEW the baseline.")] = False,
    accept: Annotated[bool, typer.Option("--accept", help="With --update: even where it is worse.")] = False,
) -> None:
    """Fail when quality got worse than a baseline."""
    from tokbench.comparison import check as checking
    from tokbench.comparison.differences import Rules
    from tokbench.comparison.verdicts import show_check

    pairs = [part.partition("=") for part in parse_value(tolerance or "", tuple[str, ...], "--tolerance")]
    names = parse_value(metrics or "", tuple[str, ...], "--metrics")
    tolerances = {name.strip(): amount.strip() for name, _, amount in pairs}
    rules = Rules(tolerances=tolerances, metrics=names, exact=exact, two_sided=two_sided, strict=strict)
    if update:
        typer.echo("\n".join(checking.update(new, against, rules, accept=accept)))
        return
    raise typer.Exit(show_check(checking.check(new, against, rules), markdown, junit))


@app.command(context_settings={"help_option_names": []}, epilog=_examples("train"))
def train(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="What to train; --help without it lists the names.")] = None,
    settings: Annotated[list[str] | None, typer.Argument(help="Overrides, key=value ...")] = None,
    data: Annotated[str, typer.Option(help="A folder of photographs, an archive, or hf:NAME.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of this run; the same command goes on from it.")] = Path(),
    stage: Annotated[str | None, typer.Option(help="Stage of the training.")] = None,
    preset: Annotated[str | None, typer.Option(help="Named settings.")] = None,
    start: Annotated[Path | None, typer.Option("--from", help="File of the previous stage.")] = None,
    encoder_from: Annotated[Path | None, typer.Option(help="File whose encoder is taken.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder by name, as f8c4.")] = None,
    decoder: Annotated[str | None, typer.Option(help="Decoder by name, as S.")] = None,
    track: Annotated[str, typer.Option(help="tensorboard, wandb or trackio, beside log.jsonl.")] = "",
    show_help: Annotated[bool, typer.Option("--help", help="Show this, and all settings of MODEL.")] = False,
) -> None:
    """Train a tokenizer, or a generator in its latents. Under torchrun: in several processes."""
    from tokbench.registry import TrainOptions, train_help, train_model

    if show_help or model is None:
        typer.echo(context.get_help() + "\n\n" + train_help(model, stage, preset))
        return
    pairs = (*(settings or ()), *([f"run.track={track}"] if track else ()))
    options = TrainOptions(data, out, stage, preset, start, encoder_from, encoder, decoder, pairs)
    trained = train_model(model, options)
    if os.environ.get("RANK", "0") == "0":  # of several processes one says it
        typer.echo(trained)


@app.command(epilog=_examples("generate"))
@with_options(Measurement, "metrics", "batch_size", "device", "dtype")
@with_options(Generation)
def generate(
    generation: Generation,
    measurement: Measurement,
    out: Out = Path("runs"),
    results: Annotated[Path, typer.Option(help="Where else to look rfid up for the table.")] = Path("results"),
    weights: OwnWeights = None,
    unverified: Unverified = False,
) -> None:
    """Sample a generator and score its images (gFID)."""
    from tokbench.generation.generate import run_generate
    from tokbench.metrics.suite import use_weights

    use_weights(weights, unverified)
    raise typer.Exit(run_generate(generation, measurement, out=out, results=results))


@app.command(epilog=_examples("score"))
@with_options(Measurement, "protocol", "metrics", "device", "workers")
def score(
    real: Annotated[str, typer.Argument(help="Real images: a folder, an archive, samples, ...")],
    fake: Annotated[str, typer.Argument(help="Their reconstructions, squares of one size, under the same names.")],
    measurement: Measurement,
    name: Annotated[str | None, typer.Option(help="Name of the row; default: the folder's.")] = None,
    allow_lossy: Annotated[bool, typer.Option("--allow-lossy", help="Take images compressed with loss.")] = False,
    out: Out = Path("runs"),
    weights: OwnWeights = None,
    unverified: Unverified = False,
) -> None:
    """Measure images made elsewhere, matched by name."""
    from tokbench.evaluation.score import run_score
    from tokbench.metrics.suite import use_weights

    use_weights(weights, unverified)
    raise typer.Exit(run_score(real, fake, measurement, name=name, allow_lossy=allow_lossy, out=out))


@app.command(epilog=_examples("probe"))
@with_options(Measurement, "protocol", "seeds", "dtype", "device", "batch_size", "workers", "small", "skip_bad")
def probe(
    models: Models,
    measurement: Measurement,
    names: Annotated[
        str | None, typer.Argument(help="Probes, comma-separated; see `tokbench list probes`. Default: all but boxes.")
    ] = None,
    res: Annotated[str, typer.Option(help="Resolution in pixels: 256, 768x512 or native.")] = "256",
    data: Data = "samples",
    split: Split = None,
    limit: Limit = None,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("runs/probes"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what --out holds of these cells.")] = False,
) -> None:
    """Look at what a metric's one number hides.

    Robustness, drift, seeds, spectra, equivariance, legibility.
    """
    from tokbench.evaluation.probes.run import run_probes
    from tokbench.protocols import parse_resolution

    asked = dataclasses.replace(measurement, resolution=parse_resolution(res))
    raise typer.Exit(
        run_probes(names, ",".join(models), asked, data=data, split=split, limit=limit, out=out, fresh=fresh)
    )


@app.command(epilog=_examples("latents"))
@with_options(
    Measurement, "protocol", "metrics", "dtype", "device", "batch_size", "workers", "small", "skip_bad", "keep_features"
)
def latents(
    models: Models,
    measurement: Measurement,
    res: Annotated[str, typer.Option(help="Resolution in pixels: 256 or 768x512.")] = "256",
    data: Data = "samples",
    split: Split = None,
    limit: Limit = None,
    out: Out = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what --out holds of these cards.")] = False,
) -> None:
    """Describe latent spaces without training a generator.

    Channels, spectra, classes, what lies between latents.
    """
    from tokbench.latents.card import run_latents
    from tokbench.protocols import parse_resolution

    asked = dataclasses.replace(measurement, resolution=parse_resolution(res))
    raise typer.Exit(run_latents(",".join(models), asked, data=data, split=split, limit=limit, out=out, fresh=fresh))


@app.command(epilog=_examples("compare"))
def compare(
    a: Annotated[Path, typer.Argument(help="A result (JSON), or a folder of them.")],
    b: Annotated[Path, typer.Argument(help="Another on the same images; of folders, their common cells.")],
) -> None:
    """Say of every metric whether B is better than A."""
    from tokbench.comparison.verdicts import show_comparison

    show_comparison(a, b)


weights_app = typer.Typer(no_args_is_help=True, help="The networks that metrics need.")
app.add_typer(weights_app, name="weights")
WeightsDir = Annotated[Path | None, typer.Option(help="Folder of weights; also TOKBENCH_WEIGHTS.")]
Networks = Annotated[list[str] | None, typer.Argument(help="Networks; default: all.")]


@weights_app.command(name="list")
def weights_list(weights_dir: WeightsDir = None) -> None:
    """Show every network: used by, size, licence, where it is or why it is missing."""
    from tokbench import weights
    from tokbench.metrics import users_of_networks

    weights.use_folder(weights_dir)
    typer.echo("\n".join(weights.describe(users_of_networks())))


@weights_app.command(name="fetch", epilog=_examples("weights fetch"))
def weights_fetch(names: Networks = None, weights_dir: WeightsDir = None) -> None:
    """Download what is not on this machine."""
    from tokbench import weights

    weights.use_folder(weights_dir)
    raise typer.Exit(weights.fetch_all(names or []))


@weights_app.command(name="verify", epilog=_examples("weights verify"))
def weights_verify(weights_dir: WeightsDir = None) -> None:
    """Check the sha256 of every network that is here."""
    from tokbench import weights

    weights.use_folder(weights_dir)
    raise typer.Exit(weights.verify())


@weights_app.command(name="export", epilog=_examples("weights export"))
def weights_export(
    folder: Annotated[Path, typer.Argument(help="Folder to carry to a machine without internet.")],
    names: Networks = None,
    weights_dir: WeightsDir = None,
) -> None:
    """Copy networks into a folder that TOKBENCH_WEIGHTS can name elsewhere."""
    from tokbench import weights

    weights.use_folder(weights_dir)
    typer.echo("\n".join(f"{path}" for path in weights.export(folder, names or [])))


def _said_of(metric: Any) -> str:
    """A line on a metric: which way is better, whether it is measured unless asked otherwise, its network."""
    from tokbench.metrics import DEFAULT
    from tokbench.report.tables import ARROWS

    head = f"{ARROWS[metric.better] or ' '} {'*' if metric.name in DEFAULT else ' '} {metric.description}"
    network = f" (network: {', '.join(metric.networks)})" if metric.networks else ""
    return head + (f" [{metric.unit}]" if metric.unit else "") + network


@app.command(name="list", epilog=_examples("list"))
def list_known(
    what: Annotated[str, typer.Argument(help="models, metrics, protocols or probes")] = "models",
    name: Annotated[
        str | None, typer.Argument(help="A model: its facts and options. A protocol: its choices and notes.")
    ] = None,
    family: Annotated[str, typer.Option(help="Models of one family.")] = "",
    columns: Annotated[str, typer.Option(help="Columns of the table of models, comma-separated.")] = "",
    sort: Annotated[str, typer.Option(help="The column that models are sorted by.")] = "",
    form: Annotated[str, typer.Option("--format", help="Of models: table, markdown, csv or json.")] = "table",
) -> None:
    """Show models, metrics, protocols or probes by name."""
    from tokbench import registry
    from tokbench.metrics import METRICS, metrics_of
    from tokbench.protocols import PROTOCOLS, find_protocol
    from tokbench.report.tables import written

    if what == "models" and name is not None:
        typer.echo("\n".join(registry.describe_model(name)))
        return
    if what == "models":
        chosen = [name.strip() for name in columns.split(",") if name.strip()]
        if text := written(registry.catalogue(family, chosen, sort), form):
            typer.echo(text)
        return
    if what == "protocols" and name is not None:
        protocol = dataclasses.asdict(find_protocol(name))
        lines = [f"{key:<14} {value}" for key, value in protocol.items() if not isinstance(value, tuple)]
        typer.echo("\n".join([*lines, *(f"- {note}" for note in protocol["notes"])]))
        return
    if what == "probes":  # whose own ones need torch
        import tokbench.evaluation.probes  # noqa: F401
    known = {
        "metrics": {name: _said_of(metric) for name, metric in METRICS.items() if not metric.probe},
        "protocols": {name: f"v{protocol.version} {protocol.summary}" for name, protocol in PROTOCOLS.items()},
        "probes": {
            name: f"{probe.summary}: {', '.join(metric.name for metric in metrics_of(name))}"
            for name, probe in registry.PROBES.all().items()
        },
    }
    if what not in known:
        raise InputError(f'list "{what}": choose one of models, {", ".join(known)}')
    for name, text in known[what].items():
        typer.echo(f"{name:<28} {text}")
    if what == "metrics":
        typer.echo("* measured by default; `tokbench weights list` and `doctor` say which networks are here")


@app.command(epilog=_examples("doctor"))
def doctor() -> None:
    """Show what this machine has and what metrics lack."""
    from tokbench.evaluation.doctor import show

    show()


def main() -> None:
    """Run the command line: status 2 for wrong use or bad input, 1 for a failure, 130 for Ctrl-C; one line each."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the loader's processes
    usage_error: Any = typer.BadParameter.__mro__[2]  # ClickException, wherever this version of typer keeps it
    try:
        given = sys.argv[1:] or ["--help"]
        if "--debug" in given:  # wherever it stands
            given = ["--debug", *(one for one in given if one != "--debug")]
        status = app(given, standalone_mode=False)
    except InputError as error:
        trace(error)
        status = fail(str(error), 2)
    except (CellError, LostPeerError) as error:
        trace(error)
        status = fail(str(error), 1)
    except usage_error as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a group of commands without a command
            print(message, file=sys.stderr)
            sys.exit(2)
        status = fail(message, 2)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:  # `tokbench list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    if status == 130:  # some versions of typer catch Ctrl-C themselves
        fail("interrupted; the same command goes on from what is done", 130)
    sys.exit(status if isinstance(status, int) else 0)


def fail(message: str, status: int) -> int:
    """Say on stderr, in one line, what went wrong."""
    print(f"tokbench: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
