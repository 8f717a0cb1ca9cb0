"""One cell of a table: find what an earlier run has measured of it, measure what is missing, write the record.

The frame of `run`, `evaluate` and `score`, which differ in where the fakes come from (`Pairs`).
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tokbench.data import crops, decode
from tokbench.data.sources import Source, group_columns
from tokbench.errors import CellError, InputError
from tokbench.evaluation.pictures import KeptImages, draw, error_map, error_rank, save_pairs
from tokbench.evaluation.reconstruct import (
    SHARED_COLUMNS,
    Columns,
    Fakes,
    Features,
    append_scores,
    images_at_once,
    measure,
    seed_column,
)
from tokbench.evaluation.summary import compute, table
from tokbench.metrics import METRICS, extractors
from tokbench.metrics.suite import MetricSuite
from tokbench.protocols import NATIVE, sides_of, size_text
from tokbench.records import provenance
from tokbench.records.cache import cache_folder
from tokbench.records.files import (
    hold,
    in_turn,
    per_image_path,
    read_per_image,
    result_path,
    writable,
    write_per_image,
    write_whole,
)
from tokbench.records.measurement import Measurement
from tokbench.records.places import placed, spelled
from tokbench.records.result import (
    Dataset,
    EvalResult,
    Provenance,
    Settings,
    TokenizerInfo,
    Value,
    read_result,
    to_json,
)
from tokbench.records.samples import SampleStore
from tokbench.runtime.device import describe_device
from tokbench.runtime.processes import Processes
from tokbench.runtime.terminal import bar, say
from tokbench.tokenizer import checks_deferred

log = logging.getLogger("tokbench")

LIBRARIES = ("torch", "pillow")  # behind every number; those of a model or a metric alone are in its own key


class Pairs(Protocol):
    """Where a cell's images come from: a tokenizer makes the fakes, or they were made elsewhere."""

    def batches(self, indices: Sequence[int]) -> Iterable[tuple[Sequence[str], Tensor, Tensor]]:
        """Ids, real images uint8 [B, 3, H, W] and what `fakes` needs beside them [B, ...], of samples by number."""
        ...

    def fakes(self, ids: Sequence[str], real: Tensor, beside: Tensor) -> tuple[Fakes, Columns, Features]:
        """The fakes of real images on the device, and columns and features that are not measured from them."""
        ...

    def facts(self, processes: Processes) -> dict[str, Any]:
        """Fields of `Provenance` that are known when everything is measured."""
        ...


@dataclass(frozen=True)
class Cell:
    """One row on one data set under one measurement, while it is being measured."""

    info: TokenizerInfo
    source: Source
    measurement: Measurement  # its metrics and seeds are those that this row has
    settings: Settings
    model: str | None  # what decides the fakes; None: nobody can tell, so nothing is ever taken from an earlier run
    device: torch.device
    out: Path | None  # None: nothing is kept
    processes: Processes = field(default_factory=Processes)
    refused: Mapping[str, str] = field(default_factory=dict)  # metrics that no such row can have, and why

    @cached_property
    def suite(self) -> MetricSuite:
        """What measures it."""
        return suite_for(self.source, self.measurement, self.device)

    @cached_property
    def key(self) -> str | None:
        """Hash of everything that can change its numbers, the code included; None: never to be cached.

        The metrics are not in it: a record keeps those of earlier runs and gains those of later ones.
        """
        protocol, images = self.measurement.rules, self.source.fingerprint()
        parts = [
            protocol.fingerprint(),
            images,
            self.measurement.resolution,
            self.device.type,
            repr(replace(self.settings, spec=spelled(self.settings.spec))),
        ]
        return None if self.model is None else provenance.key(self.model, provenance.versions(LIBRARIES), *parts)

    def record(self, metrics: Mapping[str, Value], num_images: int, made: Provenance) -> EvalResult:
        """Its record, or what will be one."""
        asked, source = self.measurement, self.source
        data = Dataset(source.name, source.split, asked.resolution, num_images, source.fingerprint())
        return EvalResult(
            protocol=asked.rules.name,
            protocol_fingerprint=asked.rules.fingerprint(),
            tokenizer=self.info,
            dataset=data,
            metrics=metrics,
            settings=self.settings,
            measurement=asked,
            provenance=made,
        )

    @property
    def blank(self) -> EvalResult:
        """Its record before anything is measured."""
        return self.record({}, len(self.source), Provenance(device_type=self.device.type))

    @property
    def path(self) -> Path | None:
        """Of its record."""
        return None if self.out is None else result_path(self.out, self.blank)

    def wanted(self) -> tuple[set[str], set[tuple[str, str]]]:
        """The columns and features that a sample must have to count as measured."""
        seeds = self.measurement.seeds if len(self.measurement.seeds) > 1 else ()
        columns = {column for metric in self.suite.available for column in metric.columns}
        columns |= {seed_column(column, seed) for column in columns - SHARED_COLUMNS for seed in seeds}
        features = {("real", name) for name in self.suite.extractors}
        for name in self.suite.extractors:
            features |= {("fake", seed_column(name, seed)) for seed in seeds} or {("fake", name)}
        return columns, features | self.given

    @property
    def given(self) -> set[tuple[str, str]]:
        """Features that `Pairs.fakes` gives: a tokenizer's codes, and what a probe takes of images of its own."""
        needed = {metric.extractor for metric in self.suite.available if metric.extractor is not None}
        return {("fake", name) for name in needed - self.suite.extractors.keys()}

    def real_features(self, rank: int = 0) -> dict[str, SampleStore]:
        """By extractor: where models share features of the real images, in the cache; {} if it cannot be written.

        One folder per images, crop, extractor and code, so that a run with other metrics finds those that it needs.
        """
        if self.processes.job:  # machines that share no cache
            return {}
        rules, size = self.measurement.rules, self.measurement.resolution
        images = [self.source.fingerprint(), size, rules.crop, rules.real_rounding, rules.orientation]
        stores = {}
        for name, extractor in self.suite.extractors.items():
            versions = provenance.versions(LIBRARIES)
            key = provenance.key(*images, self.device.type, extractor.identity, versions, *_code_of_features())
            folder = cache_folder() / "real" / key[:24]
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError:
                return {}
            if not os.access(folder, os.W_OK):
                return {}
            stores[name] = SampleStore(folder, rank=rank)
        return stores


@cache
def _code_of_features() -> list[str]:
    """Hashes of what decides a real image's features besides weights: once, as an edit does not change what runs."""
    return [hashlib.sha256(Path(str(m.__file__)).read_bytes()).hexdigest() for m in (crops, decode, extractors)]


def shorter_side(source: Source, measurement: Measurement) -> int:
    """Of the smallest image that is measured, in pixels."""
    sides = sides_of(measurement.resolution)
    sizes = [sides] if sides else [size for size in source.sizes(measurement.rules) if min(size)]
    return min(map(min, sizes), default=0)


def suite_for(source: Source, measurement: Measurement, device: torch.device) -> MetricSuite:
    """What measures these images."""
    side, one_size = shorter_side(source, measurement), measurement.resolution != NATIVE
    return MetricSuite(measurement.metrics, len(source), side, device, one_size=one_size)


# ---- measuring one ------------------------------------------------------------------------------------------------


def measure_cell(cell: Cell, pairs: Pairs, *, fresh: bool = False) -> tuple[EvalResult, bool]:
    """Measure what no earlier run has measured and write the record; (it, whether nothing was missing).

    A record that is found of the same cell keeps its metrics and gains those that it lacks. `fresh` discards what is
    there. Raises CellError if the model fails and InputError if the images or the output folder do; what was measured
    until then stays for the next attempt.
    """
    processes = cell.processes
    cell = replace(cell, info=processes.by_main(partial(named, cell)))
    path = cell.path
    earlier = processes.by_main(lambda: None if fresh else find_earlier(cell))
    if earlier is not None:
        whole = path is None or not cell.measurement.keep_features or path.with_suffix(".features").is_dir()
        names = [name for name in cell.measurement.metrics if not whole or lacks(earlier, name, cell.suite)]
        if not names:
            return earlier, True
        cell = replace(cell, measurement=replace(cell.measurement, metrics=tuple(names)))
    with ExitStack() as stack:
        work = processes.by_main(partial(_working_folder, cell, fresh, stack))
        num_kept = cell.measurement.save_images if processes.main and path is not None else 0
        images = KeptImages(frozenset(sorted(cell.source.ids)[:num_kept]), num_kept)
        batch_size = fill_store(cell, pairs, work, images)
        facts = {"batch_size": batch_size, **pairs.facts(processes)}
        if processes.job == "shard":
            write_shard_facts(cell, work, facts)
            return cell.blank, False
        if processes.job == "merge":
            facts = merged_facts(work)
        result = processes.by_main(partial(write_record, cell, pairs, work, earlier, images, facts))
    if cell.out is not None and processes.main:  # outside: a folder that is held cannot be removed
        clear_up(result_path(cell.out, result), work, cell.measurement.keep_features, replaces=earlier is None)
    return result, False


def named(cell: Cell) -> TokenizerInfo:
    """The cell's tokenizer under a name whose file holds no record of another cell."""
    info = cell.info if cell.out is None else placed(cell.out, cell.blank).tokenizer
    if info.name != cell.info.name:
        say(f"{cell.out}/ holds another measurement of {cell.info.name}: this one is {info.name}")
    return info


def find_earlier(cell: Cell) -> EvalResult | None:
    """The record in the cell's file if it is of the same cell, and leaves out no image that may not be left out now."""
    if cell.path is None or cell.key is None or not cell.path.exists():
        return None
    try:
        result = read_result(cell.path)
    except InputError:
        aside = cell.path.with_name(cell.path.name + ".damaged")
        cell.path.replace(aside)
        log.warning("%s: damaged, set aside as %s; the cell is measured again", cell.path, aside.name)
        return None
    may_lack = cell.measurement.skip_bad or cell.measurement.rules.small == "skip"
    if result.provenance.cell == cell.key and (may_lack or not result.settings.skipped):
        return result
    if gone := sorted(set(result.metrics) - set(cell.measurement.metrics)):
        log.warning("%s: of other code or weights, measured anew without %s", cell.path, ", ".join(gone))
    return None


def lacks(earlier: EvalResult, name: str, suite: MetricSuite) -> bool:
    """Whether a record has no such metric, or one of other weights or code, or could not have it then and can now."""
    if name in earlier.unavailable:
        return name not in suite.unavailable
    if name not in earlier.metrics:
        return True
    key = suite.keys.get(name, "")
    return key is None or earlier.provenance.metrics.get(name, "") != key


def _working_folder(cell: Cell, fresh: bool, stack: ExitStack) -> Path:
    """Where the cell's rows and features gather, held against other runs; CellError if another holds it."""
    if cell.path is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokbench-")))
    if cell.processes.job and cell.key is None:
        raise CellError(f"{cell.info.name}: its weights cannot be hashed, so that jobs cannot find each other's rows")
    key = secrets.token_hex(6) if cell.key is None else provenance.key(cell.key, cell.suite.keys)
    work = cell.path.with_name(f".{cell.path.stem}-{key[:12]}")
    try:
        if fresh and work.exists():
            with hold(work):
                shutil.rmtree(work)
        stack.enter_context(hold(work, shared=cell.processes.job == "shard"))
    except InputError as error:
        raise CellError(str(error)) from error
    return work


def fill_store(cell: Cell, pairs: Pairs, work: Path, images: KeptImages) -> int:
    """Measure this rank's share of the samples that lack something; how many went through the networks in the end.

    Any rank's error is raised on all.
    """
    processes, source, device = cell.processes, cell.source, cell.device
    real = cell.real_features(processes.rank)
    store = SampleStore(work, rank=processes.rank, real=real)
    known = {name: shared.done([], [("real", name)]) for name, shared in real.items()}
    done = processes.broadcast(store.done(*cell.wanted()))
    mine = share(source.ids, done, work, processes)
    where = f"{cell.info.name} at {size_text(cell.measurement.resolution)}"

    def step(ids: Sequence[str], real: Tensor, beside: Tensor) -> Callable[[], None]:
        real = real.to(device, non_blocking=True)
        with checks_deferred() as checks:
            fakes, columns, found = pairs.fakes(ids, real, beside)
        features = {key: found[key].reshape(len(ids), -1) for key in cell.given}
        append = append_scores(store, cell.suite, cell.info.name, ids, real, fakes, known, columns, features, checks)
        shown = next(iter(fakes.values()))[0]
        return lambda: images.add(ids, error_rank(append(), len(ids)).tolist(), real, shown)

    def fill() -> int:
        with store, bar(where, len(mine)) as progress:
            return measure(
                step,
                pairs.batches(mine),
                name=where,
                device=device,
                limit=images_at_once(cell.measurement, device),
                batch_size=cell.measurement.batch_size,
                progress=progress,
            )

    return processes.together(fill)


def share(ids: Sequence[str], done: set[str], work: Path, processes: Processes) -> list[int]:
    """The numbers of the samples that this process is to measure. Shards, which begin at any time, take of all samples
    alike. CellError for a merge of shards that something is missing of."""
    if processes.job == "shard":
        return [i for i in range(processes.rank, len(ids), processes.size) if ids[i] not in done]
    missing = [i for i, sample in enumerate(ids) if sample not in done]
    if processes.job != "merge":
        return missing[processes.rank :: processes.size]
    left_out = {sample for facts in shard_facts(work) for sample in facts["left_out"]}
    if missing := [i for i in missing if ids[i] not in left_out]:
        raise CellError(f"{len(missing)} of {len(ids)} images are not measured yet: run their shards")
    return []


def write_shard_facts(cell: Cell, work: Path, facts: Mapping[str, Any]) -> None:
    """What a merge cannot know of a shard: `facts` of its Provenance, and the images that it left out."""
    processes, ids = cell.processes, cell.source.ids
    left_out = sorted(set(ids[processes.rank :: processes.size]) - set(SampleStore(work).ids))
    write_whole(work / f"shard-{processes.rank}.json", json.dumps({**facts, "left_out": left_out}))


def shard_facts(work: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(work.glob("shard-*.json"))]


def merged_facts(work: Path) -> dict[str, Any]:
    """Fields of `Provenance` of all shards together; seconds are of those that measured something."""
    shards = shard_facts(work)
    timed = [facts["seconds"] for facts in shards if facts["seconds"]]
    seconds = {part: float(np.mean([one[part] for one in timed])) for part in (timed[0] if timed else {})}
    notes: Counter[str] = sum((Counter(facts["image_notes"]) for facts in shards), Counter())
    return {"batch_size": max((facts["batch_size"] for facts in shards), default=None), "seconds": seconds,
            "image_notes": dict(notes),
            "warnings": "; ".join(filter(None, dict.fromkeys(facts["warnings"] for facts in shards)))}  # fmt: skip


# ---- its record ---------------------------------------------------------------------------------------------------


def write_record(
    cell: Cell, pairs: Pairs, work: Path, earlier: EvalResult | None, images: KeptImages, facts: Mapping[str, Any]
) -> EvalResult:
    """Compute every metric from the store and write the record, its rows and its picture; the JSON comes last.

    `facts` are fields of `Provenance`.
    """
    measurement, source = cell.measurement, cell.source
    store = SampleStore(work, real=cell.real_features())
    if not store.ids:
        raise InputError(f"{source.name}: none of its {len(source.ids)} images can be used")
    result = new_record(cell, store, facts)
    columns = table(list(result.metrics), store, measurement.seeds)
    if earlier is not None:
        result = joined(earlier, result)
    if (out := cell.out) is not None:
        with in_turn(result_path(out, result).parent):
            cell = replace(cell, info=named(cell))  # of jobs that began at once another may be done
            result = replace(result, tokenizer=cell.info)
            path = result_path(out, result)
            write_rows(path, store, columns, source, keep=earlier is not None)
            if measurement.save_images:
                write_whole(path.with_suffix(".png"), draw_cell(cell, pairs, store, images))
            if measurement.keep_features:  # of both sides, so that `compare` can pair them
                with writable(work):
                    for shard in (file for shared in store.real.values() for file in shared.folder.glob("*.npz")):
                        shutil.copyfile(shard, work / shard.name)
            write_whole(path, to_json(result))
    return replace(result, rows={"id": store.ids, **columns})


def write_rows(
    path: Path, store: SampleStore, columns: Mapping[str, np.ndarray], source: Source, *, keep: bool
) -> None:
    """The per-image table beside a record; `keep`: with the columns that only the earlier one has."""
    rows = per_image_path(path)
    if keep and rows.exists():
        ids, before = read_per_image(rows)
        columns = {**(before if ids == store.ids else {}), **columns}
    place = {sample: i for i, sample in enumerate(source.ids)}
    groups = {n: [texts[place[sample]] for sample in store.ids] for n, texts in group_columns(source).items()}
    write_per_image(rows, store.ids, columns, groups)


def new_record(cell: Cell, store: SampleStore, facts: Mapping[str, Any]) -> EvalResult:
    """The record of everything in a store; `facts` are fields of `Provenance`."""
    measurement, suite, skipped = cell.measurement, cell.suite, sorted(set(cell.source.ids) - set(store.ids))
    names = [metric.name for metric in suite.metrics if metric.name not in suite.unavailable]
    made = provenance.collect(
        describe_device(cell.device), cell.device.type, cell.processes.size, extractors=suite.networks,
        metrics={name: key for name, key in suite.keys.items() if key is not None and name in names},
        cell=cell.key, **facts,
    )  # fmt: skip
    metrics = {name: compute(name, store, measurement.seeds) for name in names}
    return replace(
        cell.record(metrics, len(store.ids), made),
        unavailable={**suite.unavailable, **cell.refused},
        settings=replace(cell.settings, skipped=len(skipped), skipped_ids=tuple(skipped[:100])),
    )


def joined(earlier: EvalResult, new: EvalResult) -> EvalResult:
    """The new record with what only the earlier one of the same cell has, in the order of the metrics' table."""
    metrics = {**earlier.metrics, **new.metrics}
    missing = {name: why for name, why in {**earlier.unavailable, **new.unavailable}.items() if name not in metrics}
    then, now = earlier.provenance, new.provenance
    extractors, keys = {**then.extractors, **now.extractors}, {**then.metrics, **now.metrics}
    assert new.measurement is not None
    before = earlier.measurement.metrics if earlier.measurement is not None else tuple(earlier.metrics)
    return replace(
        new,
        metrics={name: metrics[name] for name in (*METRICS, *metrics) if name in metrics},
        unavailable=missing,
        latents=new.latents or earlier.latents,
        measurement=replace(new.measurement, metrics=tuple(dict.fromkeys((*before, *new.measurement.metrics)))),
        provenance=replace(now, extractors=extractors, metrics=keys, warnings=then.warnings or now.warnings),
    )


def draw_cell(cell: Cell, pairs: Pairs, store: SampleStore, images: KeptImages) -> bytes:
    """The picture of the first and the worst images, also saved one by one; those measured earlier are made again."""
    assert cell.path is not None
    kept, count = images.pairs, cell.measurement.save_images
    columns = {name: store.column(name) for name in store.columns}
    order = np.argsort(-error_rank(columns, len(store.ids)), kind="stable")[:count]
    first = store.ids[:count]
    worst = [store.ids[i] for i in order if store.ids[i] not in first]
    missing = [index for index, sample in enumerate(cell.source.ids) if sample in {*first, *worst} - kept.keys()]
    for ids, real, beside in pairs.batches(missing) if missing else ():
        for i, sample in enumerate(ids):  # one by one: memory may not hold the batch
            fakes, *_ = pairs.fakes([sample], real[i : i + 1].to(cell.device), beside[i : i + 1])
            kept[sample] = real[i], next(iter(fakes.values()))[0][0].cpu()
    save_pairs(cell.path, {sample: kept[sample] for sample in (*first, *worst) if sample in kept})
    psnr = dict(zip(store.ids, columns["psnr"], strict=True)) if "psnr" in columns else {}
    labels = {sample: f"{sample} {psnr[sample]:.2f} dB" if psnr else sample for sample in (*first, *worst)}
    titles = [(labels[sample], sample) for sample in first] + [("worst: " + labels[sample], sample) for sample in worst]
    return draw([(title, *kept[sample], error_map(*kept[sample])) for title, sample in titles if sample in kept])


def clear_up(path: Path, work: Path, keep_features: bool, *, replaces: bool) -> None:
    """Keep or drop the finished cell's features, and remove folders that older code or other settings left unfinished.

    `replaces`: the record is a new one, so features beside it are another's.
    """
    kept = path.with_suffix(".features")
    with writable(kept):
        if replaces:
            shutil.rmtree(kept, ignore_errors=True)
        if keep_features:
            kept.mkdir(exist_ok=True)
            for shard in work.glob("*.npz"):
                shard.replace(kept / shard.name)
    for folder in {work, *path.parent.glob(f".{path.stem}-*")}:
        if folder == work or re.fullmatch(re.escape(f".{path.stem}-") + "[0-9a-f]{12}", folder.name):
            with suppress(InputError), hold(folder):
                shutil.rmtree(folder, ignore_errors=True)
