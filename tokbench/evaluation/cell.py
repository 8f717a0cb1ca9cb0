"""One cell of a run: find it finished, or measure what is missing and hand it to `finish`."""

import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from tokbench.data import decode as images
from tokbench.errors import CellError, InputError
from tokbench.evaluation.kits import Kits
from tokbench.evaluation.plan import Plan, cell_key, cell_path, settings, with_facts
from tokbench.evaluation.reconstruct import CODES, LATENT_COLUMNS, Album, Cell, Conditions, Stopwatch, measure, seeded
from tokbench.evaluation.summary import Measured, clear, finish
from tokbench.metrics import METRICS
from tokbench.metrics import extractors as features
from tokbench.metrics.suite import Instruments
from tokbench.records.cache import cache_folder
from tokbench.records.files import hold
from tokbench.records.result import EvalResult, read_result
from tokbench.records.samples import SampleStore
from tokbench.runtime.device import prepare
from tokbench.runtime.terminal import bar, say
from tokbench.tokenizer import Tokenizer

log = logging.getLogger("tokbench")


def finished(path: Path, key: str, plan: Plan, available: Callable[[], Mapping[str, str]]) -> EvalResult | None:
    """The result in a file if it is this cell's. What was unavailable then and is not now makes it unfinished, and so
    do images left out then that may not be left out now.
    """
    if not path.exists():
        return None
    try:
        result = read_result(path)
    except InputError:
        aside = path.with_name(path.name + ".damaged")
        path.replace(aside)
        log.warning("%s: damaged, set aside as %s; the cell is measured again", path, aside.name)
        return None
    if result.provenance.cell != key:
        return None
    if result.unavailable and not set(result.unavailable) <= set(available()):
        return None
    return None if result.settings.skipped and not plan.skip_bad else result


def applies(name: str, tokenizer: Tokenizer) -> bool:
    """Whether a metric means anything for this tokenizer: bits need `bits`, codes a codebook, latents channels."""
    metric = METRICS[name]
    if "bpp" in metric.columns:
        return hasattr(tokenizer, "bits")
    if "latent-mean" in metric.columns:
        return tokenizer.info.channels is not None
    return metric.extractor != CODES or tokenizer.info.codebook_size is not None


def wanted(cell: Cell, metrics: Sequence[str]) -> tuple[set[str], set[tuple[str, str]]]:
    """The columns and features that a sample must have to count as measured."""
    seeds = cell.conditions.seeds if len(cell.conditions.seeds) > 1 else ()
    columns = {column for name in metrics for column in METRICS[name].columns}
    columns |= {seeded(column, seed) for column in columns - LATENT_COLUMNS for seed in seeds}
    features = {("real", name) for name in cell.tools.extractors}
    for name in cell.tools.extractors:
        features |= {("fake", seeded(name, seed)) for seed in seeds} or {("fake", name)}
    return columns, features | ({("fake", CODES)} if cell.codes else set())


def run_cell(tokenizer: Tokenizer, spec: str, plan: Plan, kits: Kits) -> tuple[EvalResult, bool]:
    """Measure one model at one resolution; (result, whether it was found finished).

    Raises CellError if the model fails and InputError if the images or the output folder do; what was measured until
    then stays for the next attempt.
    """
    name, world = tokenizer.info.name, plan.world
    info = with_facts(tokenizer)
    chosen = settings(tokenizer, spec, plan)
    key = cell_key(info, tokenizer, plan, chosen, kits)
    path = cell_path(plan.out, plan, name) if plan.out is not None else None
    found = None
    kept = path is None or not plan.keep_features or path.with_suffix(".features").is_dir()
    if path is not None and key is not None and kept and not plan.fresh and world.rank == 0:
        found = finished(path, key, plan, lambda: kits.load(plan.conditions.resolution).unavailable)
    if (found := world.broadcast(found)) is not None:
        return found, True
    with ExitStack() as stack:
        work = world.broadcast(_working_folder(path, key, plan, stack) if world.rank == 0 else None)
        if isinstance(work, CellError):
            raise work
        conditions = replace(plan.conditions, seeds=tuple(chosen["seeds"]))
        measured = measure_cell(tokenizer, replace(plan, conditions=conditions), work, kits)
        outcome: EvalResult | CellError | InputError | None = None
        if world.rank == 0:
            try:
                outcome = finish(measured, info, chosen, key, plan, path, kits)
            except (CellError, InputError) as error:
                outcome = error
        outcome = world.broadcast(outcome)
    if isinstance(outcome, CellError | InputError):
        raise outcome
    assert outcome is not None
    if path is not None and world.rank == 0:
        clear(path, measured.cell.store, plan.keep_features)
    return outcome, False


def _working_folder(path: Path | None, key: str | None, plan: Plan, stack: ExitStack) -> Path | CellError:
    """Where the cell's rows and features gather, held against other runs."""
    if path is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokbench-")))
    work = path.with_name(f".{path.stem}-{(key or secrets.token_hex(6))[:12]}")
    try:
        if plan.fresh and work.exists():
            with hold(work):
                shutil.rmtree(work)
        stack.enter_context(hold(work))
    except InputError as error:
        return CellError(str(error))
    return work


def measure_cell(tokenizer: Tokenizer, plan: Plan, work: Path, kits: Kits) -> Measured:
    """Measure this rank's share of the images that no earlier attempt has measured."""
    conditions, world, source = plan.conditions, plan.world, plan.source
    tools = kits.load(conditions.resolution)
    applicable = [metric.name for metric in kits.metrics if applies(metric.name, tokenizer)]
    metrics = [name for name in applicable if name not in tools.unavailable]
    enough = [name for name in metrics if METRICS[name].minimum <= len(source)]
    real = shared_stores(plan.fingerprint, conditions, tools, world.rank)
    store = SampleStore(work, rank=world.rank, real=real)
    known = {name: shared.done([], [("real", name)]) for name, shared in real.items()}
    codes = any(METRICS[name].extractor == CODES for name in enough)
    drawn = plan.save_images if world.rank == 0 else 0
    album = Album(frozenset(sorted(source.ids)[:drawn]), drawn)
    cell = Cell(tokenizer, conditions, tools, store, album, Stopwatch(conditions.device), known, codes)
    done = world.broadcast(store.done(*wanted(cell, enough)))
    pending = [index for index, sample in enumerate(source.ids) if sample not in done]
    mine = pending[world.rank :: world.size]
    loader = plan.batches(mine)
    failure: CellError | InputError | None = None
    batch_size = conditions.images_at_once
    try:
        prepare(tokenizer, conditions.device)
        with ExitStack() as stack:
            for opened in (store, *real.values()):
                stack.enter_context(opened)
            progress = stack.enter_context(bar(f"{tokenizer.info.name} {conditions.resolution} px", len(mine)))
            batch_size = measure(cell, loader.seeded(conditions.seeds), progress)
    except (CellError, InputError) as error:
        failure = error
    world.raise_first_error(failure)
    for reason in loader.skipped.values():
        say(f"left out: {reason}")
    rates = [rate for rate in world.all_gather(cell.watch.per_image()) if rate]
    seconds = {part: float(np.mean([rate[part] for rate in rates])) for part in (rates[0] if rates else {})}
    notes: Counter[str] = sum(world.all_gather(loader.notes), Counter())
    unavailable = {name: tools.unavailable[name] for name in applicable if name in tools.unavailable}
    return Measured(cell, metrics, unavailable, seconds, batch_size, dict(notes))


def shared_stores(
    fingerprint: str, conditions: Conditions, tools: Instruments, rank: int = 0
) -> dict[str, SampleStore]:
    """By extractor: where models share features of the real images, in the cache; {} if it cannot be written.

    One folder per images, crop, extractor and code, so that a run with other metrics finds those that it needs.
    """
    protocol = conditions.protocol
    code = [hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in (images, features)]
    stores = {}
    for name, extractor in tools.extractors.items():
        record = [fingerprint, conditions.resolution, protocol.crop, protocol.real_rounding, conditions.device.type]
        text = json.dumps([*record, extractor.identity, *code])
        folder = cache_folder() / "real" / hashlib.sha256(text.encode()).hexdigest()[:24]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return {}
        if not os.access(folder, os.W_OK):
            return {}
        stores[name] = SampleStore(folder, rank=rank)
    return stores
