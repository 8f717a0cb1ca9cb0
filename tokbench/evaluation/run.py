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
from tokbench.evaluation.cell import check_size, evaluate_cell
from tokbench.evaluation.evaluate import check_images, checked, suite_for
from tokbench.metrics.suite import MetricSuite
from tokbench.protocols import Resolution, size_text
from tokbench.records.files import hold, result_path, write_whole
from tokbench.records.measurement import Measurement
from tokbench.records.result import EvalResult
from tokbench.runtime.device import describe_device, release, select_device
from tokbench.runtime.processes import Processes, join
from tokbench.runtime.terminal import say
from tokbench.tokenizer import Tokenizer


@dataclass
class RunSummary:
    """Results, cache hits and failures of a run."""

    results: list[tuple[Path, EvalResult]] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    status: int = 0

    def fail(self, cell: str, error: CellError | InputError) -> None:
        self.failed.append(f"{cell}: {error}")
        self.status = max(self.status, 2 if isinstance(error, InputError) else 1)


@dataclass(frozen=True)
class SharedParts:
    """What the cells of one resolution share."""

    measurement: Measurement
    suite: MetricSuite
    crops: CropCache | None


def run(
    models: str,
    resolutions: Sequence[Resolution],
    measurement: Measurement,
    *,
    data: str = "samples",
    split: str | None = None,
    limit: int | None = None,
    out: Path = Path("runs"),
    fresh: bool = False,
    strict: bool = False,
) -> int:
    """Measure all cells; the exit status. Raises InputError before anything runs if the options are wrong.

    `fresh` discards what `out` holds of these cells; `strict` makes an unavailable metric a failure.
    """
    specs = registry.parse_all(models)
    measurements = [checked(replace(measurement, resolution=side)) for side in dict.fromkeys(resolutions)]
    with join() as processes:
        device = select_device(measurement.device, processes.local_rank)
        source = open_source(data, split, limit)
        share_facts(source, out, processes)
        summary = RunSummary()
        with crop_folder(out, processes) if len(specs) > 1 else ExitStack() as folder:
            sizes = [prepare_resolution(one, source, device, folder) for one in measurements]
            if processes.main:
                announce(source, sizes, len(specs), out)
            try:
                for spec in specs:
                    run_model(spec, source, sizes, summary, processes, out, fresh)
            finally:
                if processes.main:
                    report(summary, out)
    if strict and any(result.unavailable for _, result in summary.results):
        return max(summary.status, 1)
    return summary.status


def share_facts(source: Source, out: Path, processes: Processes) -> None:
    """Rank 0 alone tries `out` and reads every file; its facts, or its InputError, are everybody's."""
    failure = None
    if processes.main:
        try:
            check_writable(out)
            source.facts()
        except InputError as error:
            failure = error
    processes.raise_first_error(failure)
    source.adopt(processes.broadcast(source.facts() if processes.main else None))


def prepare_resolution(
    measurement: Measurement, source: Source, device: torch.device, folder: Path | ExitStack
) -> SharedParts:
    """A resolution's suite, and room for the crops that the next model will want again."""
    check_images(source, measurement)
    kept = None
    if isinstance(folder, Path) and CropCache.fits(folder, source, measurement.resolution, measurement.rules):
        kept = CropCache(folder, source, measurement.resolution, measurement.rules)
    suite = suite_for(source, measurement, device)
    return SharedParts(measurement, suite, kept)


def run_model(
    spec: registry.Spec,
    source: Source,
    sizes: Sequence[SharedParts],
    summary: RunSummary,
    processes: Processes,
    out: Path,
    fresh: bool,
) -> None:
    """All resolutions of one model, loaded once. A model that fails to load fails its own cells only."""
    cells = [f"{spec.row} at {size_text(size.measurement.resolution)}" for size in sizes]
    failure: CellError | InputError | None = None
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = registry.create(spec)
    except (CellError, InputError) as error:
        failure = error
    try:
        processes.raise_first_error(failure)
    except (CellError, InputError) as error:
        for cell in cells:
            summary.fail(cell, error)
        return
    assert tokenizer is not None
    for cell, size in zip(cells, sizes, strict=True):
        try:
            check_size(tokenizer, size.measurement.resolution)
        except InputError as error:
            summary.fail(cell, error)
            continue
        try:
            result, cached = evaluate_cell(
                tokenizer,
                spec.text,
                source,
                size.measurement,
                size.suite,
                processes=processes,
                out=out,
                fresh=fresh,
                kept_crops=size.crops,
            )
        except CellError as error:
            summary.fail(cell, error)
            continue
        summary.results.append((result_path(out, result), result))
        if cached:
            summary.cached.append(cell)
    release(sizes[0].suite.device)


def announce(source: Source, sizes: Sequence[SharedParts], num_models: int, out: Path) -> None:
    """Before a run: how many images, and what will be downloaded."""
    images = f"{len(source)} images of {source.name}"
    resolutions = ", ".join(size_text(size.measurement.resolution) for size in sizes)
    models = f"{num_models} model{'s' if num_models > 1 else ''}"
    device = describe_device(sizes[0].suite.device)
    say(f"{images} at {resolutions}, {models}, on {device}; results in {out}/")
    for problem in source.problems:
        say(f"note: {problem}")
    for line in weights.downloads(sizes[0].suite.networks):
        say(line)


def report(summary: RunSummary, out: Path) -> None:
    """The table on stdout, a plot per data set and resolution, the summary on stderr."""
    from tokbench.report.columns import ResultEntry
    from tokbench.report.leaderboard import blocks
    from tokbench.report.plots import quality_vs_time
    from tokbench.report.tables import show

    entries = [ResultEntry(result, path) for path, result in summary.results]
    if entries:
        show(blocks(entries))
    for folder in dict.fromkeys(path.parent for path, _ in summary.results):
        own = [entry for entry in entries if entry.path is not None and entry.path.parent == folder]
        quality_vs_time(own, folder / "quality-vs-time.png")
    for cell in summary.cached:
        say(f"cached: {cell}, answered from {out}/ (--fresh measures it again)")
    for line in summary.failed:
        say(f"failed: {line}")
    cached, failed = len(summary.cached), len(summary.failed)
    if summary.results or failed:
        say(f"{len(summary.results) - cached} done, {cached} cached, {failed} failed; results in {out}/")


def check_writable(out: Path) -> None:
    """InputError if nothing can be written below this folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, not a folder; choose another --out")
    probe = out / ".writable"
    write_whole(probe, "")
    probe.unlink()


@contextmanager
def crop_folder(out: Path, processes: Processes) -> Iterator[Path]:
    """Where the crops of this run are kept for its next model; folders that killed runs left behind are removed."""
    with ExitStack() as stack:
        folder = None
        if processes.main:
            for old in out.glob(".crops-*"):
                with suppress(InputError), hold(old):
                    shutil.rmtree(old, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=".crops-", dir=out))
            stack.enter_context(hold(folder))
        shared = processes.broadcast(folder)
        try:
            yield shared
        finally:
            if processes.main:
                shutil.rmtree(shared, ignore_errors=True)
