"""`tokbench run`: every model at every resolution, one cell after the other; table, plot and summary at the end."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tokbench import registry, weights
from tokbench.data.loader import CropCache
from tokbench.data.open import open_source
from tokbench.data.sources import Source
from tokbench.errors import CellError, InputError
from tokbench.evaluation.cell import run_cell
from tokbench.evaluation.evaluate import open_plan
from tokbench.evaluation.kits import Kits
from tokbench.evaluation.plan import Plan, check_size
from tokbench.metrics import DEFAULT
from tokbench.protocols import find_protocol
from tokbench.records.files import hold, result_path, write_whole
from tokbench.records.result import EvalResult
from tokbench.runtime.device import describe_device, release, select_device
from tokbench.runtime.processes import Processes, join
from tokbench.runtime.terminal import say
from tokbench.tokenizer import Tokenizer


@dataclass(frozen=True)
class RunOptions:
    """What `tokbench run` was asked for; see its --help."""

    models: str
    resolutions: str = "256"
    data: str = "samples"
    split: str | None = None
    limit: int | None = None
    protocol: str = "adm"
    metrics: str | None = None
    batch_size: str = "auto"
    workers: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    seeds: str = "0"
    out: Path = Path("runs")
    fresh: bool = False
    strict: bool = False
    skip_bad: bool = False
    upscale: bool = False
    keep_features: bool = False
    save_images: int = 4


@dataclass
class Outcome:
    """What became of the cells."""

    results: list[tuple[Path, EvalResult]] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    status: int = 0

    def fail(self, cell: str, error: CellError | InputError) -> None:
        self.failed.append(f"{cell}: {error}")
        self.status = max(self.status, 2 if isinstance(error, InputError) else 1)


def run(options: RunOptions) -> int:
    """Measure all cells; the exit status. Raises InputError before anything runs if the options are wrong."""
    with join() as world:
        return _run(options, world)


def _run(options: RunOptions, world: Processes) -> int:
    specs = registry.parse_all(options.models)
    resolutions = list(dict.fromkeys(numbers(options.resolutions, "--res")))
    device = select_device(options.device, world.local_rank)
    chosen = [name.strip() for name in (options.metrics or "").split(",") if name.strip()]
    names = chosen or find_protocol(options.protocol).metrics or DEFAULT
    source = open_source(options.data, options.split, options.limit)
    kits = Kits(names, len(source), device)
    outcome = Outcome()
    with ExitStack() as stack:
        failure = None
        if world.rank == 0:
            try:
                check_writable(options.out)
                source.facts()  # reads every file: once, not in every process
            except InputError as error:
                failure = error
        world.raise_first_error(failure)
        source.adopt(world.broadcast(source.facts() if world.rank == 0 else None))
        crops = stack.enter_context(crop_folder(options.out, world)) if len(specs) > 1 else None
        plans = [make_plan(options, source, resolution, device, world, crops) for resolution in resolutions]
        if world.rank == 0:
            announce(source, resolutions, len(specs), kits, options.out)
        try:
            for spec in specs:
                run_model(spec, plans, kits, outcome)
        finally:
            if world.rank == 0:
                report(outcome, options.out)
    if options.strict and any(result.unavailable for _, result in outcome.results):
        outcome.status = max(outcome.status, 1)
    return outcome.status


def make_plan(
    options: RunOptions, source: Source, resolution: int, device: torch.device, world: Processes, crops: Path | None
) -> Plan:
    """The plan of one resolution."""
    protocol = find_protocol(options.protocol)
    batch_size = None if options.batch_size == "auto" else numbers(options.batch_size, "--batch-size")[0]
    kept = None
    if crops is not None and CropCache.fits(crops, len(source), resolution):
        kept = CropCache(crops, source, resolution, protocol)
    plan = open_plan(
        source, resolution, protocol, device=device, dtype=options.dtype, seeds=numbers(options.seeds, "--seeds"),
        batch_size=batch_size, workers=options.workers, upscale=options.upscale, skip_bad=options.skip_bad, crops=kept,
    )  # fmt: skip
    return replace(
        plan, world=world, out=options.out, fresh=options.fresh, keep_features=options.keep_features,
        save_images=options.save_images,
    )  # fmt: skip


def run_model(spec: registry.Spec, plans: Sequence[Plan], kits: Kits, outcome: Outcome) -> None:
    """All resolutions of one model, loaded once. What is wrong with the model costs its cells and no other's."""
    world = plans[0].world
    failure: CellError | InputError | None = None
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = registry.create(spec)
    except (CellError, InputError) as error:
        failure = error
    try:
        world.raise_first_error(failure)
    except (CellError, InputError) as error:
        for plan in plans:
            outcome.fail(f"{spec.row} at {plan.conditions.resolution} px", error)
        return
    assert tokenizer is not None
    for plan in plans:
        cell = f"{spec.row} at {plan.conditions.resolution} px"
        try:
            check_size(tokenizer, plan.conditions.resolution)
        except InputError as error:
            outcome.fail(cell, error)
            continue
        try:
            result, cached = run_cell(tokenizer, spec.text, plan, kits)
        except CellError as error:
            outcome.fail(cell, error)
            continue
        assert plan.out is not None
        outcome.results.append((result_path(plan.out, result), result))
        outcome.cached += [cell] if cached else []
    release(plans[0].conditions.device)


def announce(source: Source, resolutions: Sequence[int], num_models: int, kits: Kits, out: Path) -> None:
    """Before a run: how many images, and what will be downloaded."""
    images = f"{len(source)} images of {source.name}"
    sizes = ", ".join(map(str, resolutions))
    models = f"{num_models} model{'s' if num_models > 1 else ''}"
    say(f"{images} at {sizes} px, {models}, on {describe_device(kits.device)}; results in {out}/")
    for problem in source.problems:
        say(f"note: {problem}")
    for line in weights.downloads(kits.networks):
        say(line)


def report(outcome: Outcome, out: Path) -> None:
    """The table on stdout, a plot per data set and resolution, the summary on stderr."""
    from tokbench.report.columns import ResultEntry
    from tokbench.report.leaderboard import blocks
    from tokbench.report.plots import quality_vs_time
    from tokbench.report.tables import show

    entries = [ResultEntry(result, path) for path, result in outcome.results]
    if entries:
        show(blocks(entries))
    for folder in dict.fromkeys(path.parent for path, _ in outcome.results):
        own = [entry for entry in entries if entry.path is not None and entry.path.parent == folder]
        quality_vs_time(own, folder / "quality-vs-time.png")
    for cell in outcome.cached:
        say(f"cached: {cell}, answered from {out}/ (--fresh measures it again)")
    for line in outcome.failed:
        say(f"failed: {line}")
    cached, failed = len(outcome.cached), len(outcome.failed)
    if outcome.results or failed:
        say(f"{len(outcome.results) - cached} done, {cached} cached, {failed} failed; results in {out}/")


def check_writable(out: Path) -> None:
    """InputError if nothing can be written below this folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, not a folder; choose another --out")
    probe = out / ".writable"
    write_whole(probe, "")
    probe.unlink()


@contextmanager
def crop_folder(out: Path, world: Processes) -> Iterator[Path]:
    """Where the crops of this run are kept for its next model; folders that killed runs left behind are removed."""
    with ExitStack() as stack:
        folder = None
        if world.rank == 0:
            for old in out.glob(".crops-*"):
                with suppress(InputError), hold(old):
                    shutil.rmtree(old, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=".crops-", dir=out))
            stack.enter_context(hold(folder))
        shared = world.broadcast(folder)
        try:
            yield shared
        finally:
            if world.rank == 0:
                shutil.rmtree(shared, ignore_errors=True)


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers of a comma-separated list; InputError naming the option."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise InputError(f'{option} "{text}": must be whole numbers, comma-separated')
    return found
