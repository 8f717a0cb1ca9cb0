"""`tokbench run`: every model at every resolution, one cell after the other; table, plot and summary at the end."""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from tokbench import registry, weights
from tokbench.data.loader import CropCache
from tokbench.data.open import open_source
from tokbench.data.sources import Facts, Source
from tokbench.errors import CellError, InputError, trace
from tokbench.evaluation.cell import suite_for
from tokbench.evaluation.evaluate import cell_of, check_images, checked, evaluate_cell, tell_apart
from tokbench.evaluation.model import check_size
from tokbench.evaluation.plan import plan
from tokbench.evaluation.reconstruct import autocast_dtype
from tokbench.protocols import Resolution, size_text
from tokbench.records.files import hold, result_path, write_whole
from tokbench.records.measurement import Measurement
from tokbench.records.result import EvalResult
from tokbench.runtime.device import describe_device, release, select_device, warn_of_emulation
from tokbench.runtime.processes import Processes, join
from tokbench.runtime.terminal import say


@dataclass
class RunSummary:
    """Results, cache hits and failures of a run."""

    results: list[tuple[Path, EvalResult]] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    status: int = 0

    def fail(self, cell: str, error: CellError | InputError) -> None:
        trace(error)
        self.failed.append(f"{cell}: {error}")
        self.status = max(self.status, 2 if isinstance(error, InputError) else 1)


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
    shards: str = "",
    merge: bool = False,
    dry_run: bool = False,
) -> int:
    """Measure all cells; the exit status. Raises InputError before anything runs if the options are wrong.

    `fresh` discards what `out` holds of these cells; `strict` makes an unavailable metric a failure. `shards` "2/8":
    the second of eight parts of the images, and no record; `merge`: the records of what all shards have measured.
    `dry_run` says what would be done.
    """
    specs = registry.parse_all(models)
    measurements = [checked(replace(measurement, resolution=side)) for side in dict.fromkeys(resolutions)]
    with join() as processes:
        if shards or merge:
            processes = job_of(shards, merge, fresh, processes)
        device = select_device(measurement.device, processes.local_rank)
        warn_of_emulation(autocast_dtype(measurement), device)
        source = open_source(data, split, limit)
        if dry_run:
            return show_plan(specs, source, measurements, device, out)
        share_facts(source, out, processes)
        summary = RunSummary()
        with crop_folder(out, processes) if len(specs) > 1 else ExitStack() as folder:
            for measurement in measurements:
                check_images(source, measurement)
            crops = keep_crops(folder, source, measurements) if isinstance(folder, Path) else {}
            if processes.main:
                announce(source, measurements, device, len(specs), out)
            try:
                for spec in specs:
                    run_model(spec, source, measurements, device, crops, summary, processes, out, fresh)
            finally:
                if processes.main:
                    report(summary, out) if processes.job != "shard" else report_shard(summary, shards)
    if strict and any(result.unavailable for _, result in summary.results):
        return max(summary.status, 1)
    return summary.status


def job_of(shards: str, merge: bool, fresh: bool, processes: Processes) -> Processes:
    """This process as one of independent jobs. InputError for no such shard or options that contradict."""
    if fresh or processes.size > 1 or (shards and merge):
        raise InputError("--shards and --merge go with neither --fresh nor torchrun nor each other")
    if merge:
        return replace(processes, job="merge")
    found = re.fullmatch(r"(\d+)/(\d+)", shards)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"--shards {shards}: I/N, for example 1/8 to 8/8")
    return Processes(rank=int(found[1]) - 1, size=int(found[2]), job="shard")


def report_shard(summary: RunSummary, shards: str) -> None:
    for line in summary.failed:
        say(f"failed: {line}")
    done = f"{len(summary.results)} done, {len(summary.failed)} failed"
    say(f"shard {shards}: {done}; after all shards the same command with --merge writes the records")


def show_plan(
    specs: Sequence[registry.Spec], source: Source, measurements: Sequence[Measurement], device: torch.device, out: Path
) -> int:
    """Print what `run` would do; nothing is written or loaded."""
    from tokbench.report.tables import show

    tell_apart(source, out)
    for one in measurements:
        check_images(source, one)
    table, lines = plan(specs, source, measurements, device, out)
    show([table])
    for line in lines:
        say(line)
    return 0


def share_facts(source: Source, out: Path, processes: Processes) -> None:
    """Rank 0 alone tries `out` and reads every file; its facts, or its InputError, are everybody's.

    It says what was left out of the source.
    """

    def read() -> list[Facts]:
        check_writable(out)
        for problem in source.problems:
            say(f"note: {source.name}: {problem}")
        return source.facts()

    source.adopt(processes.by_main(read))
    if processes.main:
        tell_apart(source, out)
    source.name = processes.broadcast(source.name)


def keep_crops(folder: Path, source: Source, measurements: Sequence[Measurement]) -> dict[Resolution, CropCache]:
    """By resolution: room for the crops that the next model will want again, where the disk has it."""
    return {
        one.resolution: CropCache(folder, source, one.resolution, one.rules)
        for one in measurements
        if CropCache.fits(folder, source, one.resolution, one.rules)
    }


def run_model(
    spec: registry.Spec,
    source: Source,
    measurements: Sequence[Measurement],
    device: torch.device,
    crops: Mapping[Resolution, CropCache],
    summary: RunSummary,
    processes: Processes,
    out: Path,
    fresh: bool,
) -> None:
    """All resolutions of one model, loaded once. A model that fails to load fails its own cells only."""
    try:
        tokenizer = processes.together(partial(registry.create, spec))
    except (CellError, InputError) as error:
        for one in measurements:
            summary.fail(f"{spec.row} at {size_text(one.resolution)}", error)
        return
    for one in measurements:
        cell = f"{tokenizer.info.name} at {size_text(one.resolution)}"
        try:
            check_size(tokenizer, one.resolution)
        except InputError as error:
            summary.fail(cell, error)
            continue
        try:
            row = cell_of(tokenizer, spec.text, source, one, device, processes=processes, out=out)
            result, cached = evaluate_cell(tokenizer, row, fresh=fresh, crops=crops.get(one.resolution))
        except CellError as error:
            summary.fail(cell, error)
            continue
        if not result.metrics and result.unavailable:
            why = "; ".join(f"no {name} ({reason})" for name, reason in result.unavailable.items())
            summary.fail(cell, CellError(f"nothing could be measured: {why}"))
            continue
        summary.results.append((result_path(out, result), result))
        if cached:
            summary.cached.append(cell)
    release(device)


def announce(
    source: Source, measurements: Sequence[Measurement], device: torch.device, num_models: int, out: Path
) -> None:
    """Before a run: how many images, and what will be downloaded."""
    images = f"{len(source)} images of {source.name}"
    resolutions = ", ".join(size_text(one.resolution) for one in measurements)
    models = f"{num_models} model{'s' if num_models > 1 else ''}"
    say(f"{images} at {resolutions}, {models}, on {describe_device(device)}; results in {out}/")
    for line in weights.downloads(suite_for(source, measurements[0], device).networks):
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
    probe.unlink(missing_ok=True)  # another shard may have been faster


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
