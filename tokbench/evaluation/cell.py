"""One cell of a run: find what an earlier run has measured of it, measure what is missing, write the record."""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokbench import registry
from tokbench.data import crops, decode
from tokbench.data.loader import CropCache, Loader
from tokbench.data.pixels import quantise
from tokbench.data.sources import Source
from tokbench.errors import CellError, InputError
from tokbench.evaluation.pictures import KeptImages, draw, error_rank, save_pairs
from tokbench.evaluation.reconstruct import (
    CODES,
    LATENT_COLUMNS,
    Timer,
    append_scores,
    autocast_dtype,
    first_batch_size,
    images_at_once,
    latent_columns,
    measure,
    reconstruct,
    round_trip,
    seed_column,
)
from tokbench.evaluation.summary import compute, table
from tokbench.metrics import METRICS, Metric, extractors
from tokbench.metrics.suite import MetricSuite
from tokbench.protocols import Resolution, sides_of, size_text
from tokbench.records import provenance
from tokbench.records.cache import cache_folder
from tokbench.records.files import (
    cell_path,
    hold,
    per_image_path,
    read_per_image,
    writable,
    write_per_image,
    write_whole,
)
from tokbench.records.measurement import Measurement
from tokbench.records.result import Dataset, EvalResult, Settings, TokenizerInfo, read_result, to_json
from tokbench.records.samples import SampleStore
from tokbench.runtime.device import count_parameters, describe_device, hash_state, prepare
from tokbench.runtime.processes import Processes
from tokbench.runtime.terminal import bar, say
from tokbench.tokenizer import Tokenizer

log = logging.getLogger("tokbench")

# What a user can do about an image; training and scoring read images too, but have no such options.
ADVICE = "; --skip-bad leaves such images out, --small skip those that are too small"


# ---- what a cell is -----------------------------------------------------------------------------------------------


def with_facts(tokenizer: Tokenizer) -> TokenizerInfo:
    """The tokenizer's info with what the harness itself finds out: parameters and the hash of the state."""
    return replace(
        tokenizer.info,
        encoder_params=count_parameters(tokenizer.networks.get("encoder")),
        decoder_params=count_parameters(tokenizer.networks.get("decoder")),
        weights=hash_state(tokenizer),
    )


def check_size(tokenizer: Tokenizer, resolution: Resolution) -> None:
    """InputError if the model cannot take images of this size; native ones are padded."""
    multiple, sides = tokenizer.info.size_multiple, sides_of(resolution) or ()
    if any(side % multiple for side in sides):
        nearest = "x".join(str(max(1, side // multiple) * multiple) for side in dict.fromkeys(sides))
        raise InputError(
            f"{tokenizer.info.name}: needs sizes divisible by {multiple}, got --res {resolution}; try {nearest}"
        )


def applies(metric: Metric, tokenizer: Tokenizer) -> bool:
    """bpp needs `tokenizer.bits`, code metrics a codebook, latent metrics continuous channels."""
    if "bpp" in metric.columns:
        return hasattr(tokenizer, "bits")
    if "latent-mean" in metric.columns:
        return tokenizer.info.channels is not None
    return metric.extractor != CODES or tokenizer.info.codebook_size is not None


def settings_of(tokenizer: Tokenizer, spec: str, source: Source, measurement: Measurement) -> Settings:
    """The choices that can change a number, as they take effect. One seed is enough where nothing is drawn."""
    protocol = measurement.rules
    drawn = not tokenizer.info.deterministic or protocol.posterior == "sample"
    seeds = tuple(dict.fromkeys(measurement.seeds))
    return Settings(
        spec=spec,
        dtype=str(autocast_dtype(measurement)).removeprefix("torch."),
        seeds=seeds if drawn else seeds[:1],
        upscaled=len(source.below(measurement.resolution, protocol)) or None if protocol.small == "enlarge" else None,
    )


def cell_key(
    info: TokenizerInfo, tokenizer: Tokenizer, source: Source, measurement: Measurement, settings: Settings, device: str
) -> str | None:
    """sha256 over everything that can change the cell's numbers, the code included; None: never to be cached.

    The metrics are not in it: a record keeps those of earlier runs and gains those of later ones.
    """
    model = model_key(info, tokenizer)
    if model is None:
        return None
    record = {
        "model": model,
        "protocol": measurement.rules.fingerprint(),
        "dataset": source.fingerprint(),
        "resolution": measurement.resolution,
        "device": device,
        "settings": repr(settings),
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def model_key(info: TokenizerInfo, tokenizer: Tokenizer) -> str | None:
    """What decides a model's output: its state, its attributes, and all code behind it; None where nobody can tell."""
    parts = [tokenizer, getattr(tokenizer, "encoding", None), getattr(tokenizer, "decoding", None)]
    parts = [part for part in parts if part is not None]
    modules = [m for name in sorted(tokenizer.networks) for m in tokenizer.networks[name].modules()]
    known = registry.packages()
    inside = {type(m).__module__ for m in modules}
    own = [m for m in inside if m.partition(".")[0] in known or not provenance.installed(m)]
    source = provenance.source_hash([type(part).__module__ for part in parts] + sorted(own))
    if info.weights is None or source is None:
        return None
    record = [info.weights, source, [attributes(part) for part in (*parts, *modules)]]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def attributes(owner: object) -> list[str]:
    """What a part of a model holds besides tensors and other parts: two objects may differ in nothing else."""
    kinds = (bool, int, float, str, tuple, torch.dtype)
    found = [f"{k}={v!r}" for k, v in getattr(owner, "__dict__", {}).items() if isinstance(v, kinds) or is_dataclass(v)]
    return sorted(text for text in found if " at 0x" not in text and not text.startswith(("training=", "_")))


def batches(
    source: Source, measurement: Measurement, device: torch.device, indices: Sequence[int], kept: CropCache | None
) -> Loader:
    """The crops of these samples."""
    return Loader(
        source,
        measurement.resolution,
        measurement.rules,
        batch_size=first_batch_size(measurement, device),
        indices=indices,
        workers=measurement.workers,
        pin_memory=device.type == "cuda",
        skip_bad=measurement.skip_bad,
        cache=kept,
        advice=ADVICE,
    )


# ---- measuring one ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One tokenizer on one data set under one measurement, while it is being measured."""

    tokenizer: Tokenizer
    info: TokenizerInfo
    source: Source
    measurement: Measurement  # its metrics and seeds are those that this tokenizer has
    settings: Settings
    suite: MetricSuite
    key: str | None
    path: Path | None  # of the record; None: nothing is kept
    processes: Processes
    crops: CropCache | None


def evaluate_cell(
    tokenizer: Tokenizer,
    spec: str,
    source: Source,
    measurement: Measurement,
    suite: MetricSuite,
    *,
    processes: Processes | None = None,
    out: Path | None = None,
    fresh: bool = False,
    kept_crops: CropCache | None = None,
) -> tuple[EvalResult, bool]:
    """Measure a tokenizer at one resolution; (result, whether an earlier run had measured all of it).

    A record that is found of the same cell keeps its metrics and gains those that it lacks. Raises CellError if the
    model fails and InputError if the images or the output folder do; what was measured until then stays for the next
    attempt.
    """
    processes = processes or Processes()
    info, settings = with_facts(tokenizer), settings_of(tokenizer, spec, source, measurement)
    key = cell_key(info, tokenizer, source, measurement, settings, suite.device.type)
    path = (
        None if out is None else cell_path(out, measurement.rules.name, source.name, measurement.resolution, info.name)
    )
    names = [metric.name for metric in suite.metrics if applies(metric, tokenizer)]
    earlier = None
    if path is not None and key is not None and not fresh and processes.main:
        earlier = find_earlier(path, key, measurement)
    if (earlier := processes.broadcast(earlier)) is not None:
        kept = path is None or not measurement.keep_features or path.with_suffix(".features").is_dir()
        names = [name for name in names if not kept or lacks(earlier, name, suite)]
        if not names:
            return earlier, True
    suite = MetricSuite(names, suite.num_images, suite.side, suite.device, one_size=suite.one_size)
    measurement = replace(measurement, metrics=tuple(names), seeds=settings.seeds)
    cell = Cell(tokenizer, info, source, measurement, settings, suite, key, path, processes, kept_crops)
    with ExitStack() as stack:
        work = processes.broadcast(_working_folder(cell, fresh, stack) if processes.main else None)
        if isinstance(work, CellError):
            raise work
        result = measure_cell(cell, work, earlier)
    if path is not None and processes.main:  # outside: a folder that is held cannot be removed
        clear_up(path, work, measurement.keep_features, replaces=earlier is None)
    return result, False


def find_earlier(path: Path, key: str, measurement: Measurement) -> EvalResult | None:
    """The record in a file if it is this cell's, and leaves out no image that may not be left out now."""
    if not path.exists():
        return None
    try:
        result = read_result(path)
    except InputError:
        aside = path.with_name(path.name + ".damaged")
        path.replace(aside)
        log.warning("%s: damaged, set aside as %s; the cell is measured again", path, aside.name)
        return None
    may_lack = measurement.skip_bad or measurement.rules.small == "skip"
    usable = result.provenance.cell == key and (may_lack or not result.settings.skipped)
    return result if usable else None


def lacks(earlier: EvalResult, name: str, suite: MetricSuite) -> bool:
    """Whether a record has no such metric, or one of other weights, or could not have it then and can now."""
    if name in earlier.unavailable:
        return name not in suite.unavailable
    if name not in earlier.metrics:
        return True
    then, now = earlier.provenance.extractors, suite.networks
    return any(network in now and then.get(network) != now[network] for network in METRICS[name].networks)


def _working_folder(cell: Cell, fresh: bool, stack: ExitStack) -> Path | CellError:
    """Where the cell's rows and features gather, held against other runs."""
    if cell.path is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokbench-")))
    work = cell.path.with_name(f".{cell.path.stem}-{(cell.key or secrets.token_hex(6))[:12]}")
    try:
        if fresh and work.exists():
            with hold(work):
                shutil.rmtree(work)
        stack.enter_context(hold(work))
    except InputError as error:
        return CellError(str(error))
    return work


def measure_cell(cell: Cell, work: Path, earlier: EvalResult | None) -> EvalResult:
    """Measure this rank's share of what no earlier attempt has measured, and write the record (rank 0)."""
    measurement, suite, processes = cell.measurement, cell.suite, cell.processes
    timer, loaders = Timer(suite.device), list[Loader]()
    num_kept = measurement.save_images if processes.main and cell.path is not None else 0
    images = KeptImages(frozenset(sorted(cell.source.ids)[:num_kept]), num_kept)

    def load(mine: list[int]) -> Iterator[tuple[Sequence[str], Tensor, Tensor]]:
        prepare(cell.tokenizer, suite.device)
        loaders.append(batches(cell.source, measurement, suite.device, mine, cell.crops))
        yield from loaders[0].seeded(measurement.seeds)

    step = partial(_measure_batch, cell, timer, images)
    batch_size = fill_store(work, cell.info.name, cell.source, measurement, suite, processes, wanted(cell), load, step)
    for loader in loaders:
        for reason in loader.skipped.values():
            say(f"left out: {reason}")
    rates = [rate for rate in processes.all_gather(timer.per_image()) if rate]
    seconds = {part: float(np.mean([rate[part] for rate in rates])) for part in (rates[0] if rates else {})}
    notes: Counter[str] = sum(processes.all_gather(sum((loader.notes for loader in loaders), Counter())), Counter())
    result: EvalResult | CellError | InputError | None = None
    if processes.main:
        try:
            result = finish(
                cell, work, earlier, images, {"seconds": seconds, "batch_size": batch_size, "image_notes": dict(notes)}
            )
        except (CellError, InputError) as error:
            result = error
    result = processes.broadcast(result)
    if isinstance(result, CellError | InputError):
        raise result
    assert result is not None
    return result


def fill_store(
    work: Path,
    name: str,
    source: Source,
    measurement: Measurement,
    suite: MetricSuite,
    processes: Processes,
    wanted: tuple[Iterable[str], Iterable[tuple[str, str]]],
    load: Callable[[list[int]], Iterable[tuple[Sequence[str], *tuple[Tensor, ...]]]],
    step: Callable[..., None],
) -> int:
    """Measure this rank's share of the samples that lack a column or feature of `wanted`; the batch size in the end.

    `load` gives the batches of samples by number; `step(store, known, ids, ...)` stores one, `known` being, by
    extractor, the ids whose real features an earlier model has left. Any rank's error is raised on all.
    """
    real = shared_stores(source, measurement, suite, processes.rank)
    store = SampleStore(work, rank=processes.rank, real=real)
    known = {name: shared.done([], [("real", name)]) for name, shared in real.items()}
    done = processes.broadcast(store.done(*wanted))
    mine = [index for index, sample in enumerate(source.ids) if sample not in done][processes.rank :: processes.size]
    failure: CellError | InputError | None = None
    limit = images_at_once(measurement, suite.device)
    where = f"{name} at {size_text(measurement.resolution)}"
    try:
        with store, bar(where, len(mine)) as progress:
            limit = measure(
                partial(step, store, known),
                load(mine),
                name=where,
                device=suite.device,
                limit=limit,
                batch_size=measurement.batch_size,
                progress=progress,
            )
    except (CellError, InputError) as error:
        failure = error
    processes.raise_first_error(failure)
    return limit


def wanted(cell: Cell) -> tuple[set[str], set[tuple[str, str]]]:
    """The columns and features that a sample must have to count as measured."""
    seeds = cell.measurement.seeds if len(cell.measurement.seeds) > 1 else ()
    columns = {column for metric in cell.suite.available for column in metric.columns}
    columns |= {seed_column(column, seed) for column in columns - LATENT_COLUMNS for seed in seeds}
    features = {("real", name) for name in cell.suite.extractors}
    for name in cell.suite.extractors:
        features |= {("fake", seed_column(name, seed)) for seed in seeds} or {("fake", name)}
    return columns, features | ({("fake", CODES)} if _keeps_codes(cell) else set())


def _keeps_codes(cell: Cell) -> bool:
    return any(metric.extractor == CODES for metric in cell.suite.available)


def _measure_batch(
    cell: Cell,
    timer: Timer,
    images: KeptImages,
    store: SampleStore,
    known: Mapping[str, set[str]],
    ids: Sequence[str],
    real: Tensor,
    seeds: Tensor,
) -> None:
    """Reconstruct, measure and store uint8 [B, 3, H, W]; `seeds` are int64 [B, S]."""
    real = real.to(cell.suite.device, non_blocking=True)
    fakes, latents = round_trip(cell.tokenizer, (ids, real, seeds), cell.measurement, timer)
    with torch.inference_mode():
        columns = latent_columns(cell.tokenizer, latents, real.shape[2] * real.shape[3])
        features = {("fake", CODES): latents.reshape(len(ids), -1)} if _keeps_codes(cell) else {}
    rows = append_scores(store, cell.suite, ids, real, fakes, known, columns, features)
    images.add(ids, error_rank(rows, len(ids)).tolist(), real, next(iter(fakes.values()))[0])


def shared_stores(
    source: Source, measurement: Measurement, suite: MetricSuite, rank: int = 0
) -> dict[str, SampleStore]:
    """By extractor: where models share features of the real images, in the cache; {} if it cannot be written.

    One folder per images, crop, extractor and code, so that a run with other metrics finds those that it needs.
    """
    protocol = measurement.rules
    code = [_file_hash(module.__file__) for module in (crops, decode, extractors)]
    stores = {}
    for name, extractor in suite.extractors.items():
        images = [
            source.fingerprint(),
            measurement.resolution,
            protocol.crop,
            protocol.real_rounding,
            protocol.orientation,
        ]
        text = json.dumps([*images, suite.device.type, extractor.identity, *code])
        folder = cache_folder() / "real" / hashlib.sha256(text.encode()).hexdigest()[:24]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return {}
        if not os.access(folder, os.W_OK):
            return {}
        stores[name] = SampleStore(folder, rank=rank)
    return stores


def _file_hash(file: str | None) -> str:
    return hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()


# ---- its record ---------------------------------------------------------------------------------------------------


def finish(
    cell: Cell, work: Path, earlier: EvalResult | None, images: KeptImages, facts: Mapping[str, Any]
) -> EvalResult:
    """Compute every metric from the store and write the record, its rows and its picture; the JSON comes last.

    `facts` are fields of `Provenance`.
    """
    measurement, source, suite = cell.measurement, cell.source, cell.suite
    store = SampleStore(work, real=shared_stores(source, measurement, suite))
    if not store.ids:
        raise InputError(f"{source.name}: none of its {len(source.ids)} images can be used")
    skipped = sorted(set(source.ids) - set(store.ids))
    settings = replace(cell.settings, skipped=len(skipped), skipped_ids=tuple(skipped[:100]))
    result = new_record(
        store,
        source,
        measurement,
        suite,
        cell.processes,
        tokenizer=cell.info,
        settings=settings,
        cell=cell.key,
        **facts,
    )
    columns = table(list(result.metrics), store, measurement.seeds)
    if earlier is not None:
        result = joined(earlier, result)
    if cell.path is not None:
        write_rows(cell.path, store, columns, keep=earlier is not None)
        if measurement.save_images:
            write_whole(cell.path.with_suffix(".png"), draw_cell(cell, store, images))
        if measurement.keep_features:  # of both sides, so that `compare` can pair them
            with writable(work):
                for shard in (file for shared in store.real.values() for file in shared.folder.glob("*.npz")):
                    shutil.copyfile(shard, work / shard.name)
        write_whole(cell.path, to_json(result))
    return result


def write_rows(path: Path, store: SampleStore, columns: Mapping[str, np.ndarray], *, keep: bool) -> None:
    """The per-image table beside a record; `keep`: with the columns that only the earlier one has."""
    rows = per_image_path(path)
    if keep and rows.exists():
        ids, before = read_per_image(rows)
        columns = {**(before if ids == store.ids else {}), **columns}
    write_per_image(rows, store.ids, columns)


def new_record(
    store: SampleStore,
    source: Source,
    measurement: Measurement,
    suite: MetricSuite,
    processes: Processes,
    *,
    tokenizer: TokenizerInfo,
    settings: Settings,
    **facts: Any,
) -> EvalResult:
    """The record of everything in a store; `facts` are fields of `Provenance`."""
    protocol = measurement.rules
    names = [metric.name for metric in suite.metrics if metric.name not in suite.unavailable]
    return EvalResult(
        protocol=protocol.name,
        protocol_fingerprint=protocol.fingerprint(),
        tokenizer=tokenizer,
        dataset=Dataset(source.name, source.split, measurement.resolution, len(store.ids), source.fingerprint()),
        metrics={name: compute(name, store, measurement.seeds) for name in names},
        unavailable=suite.unavailable,
        settings=settings,
        measurement=measurement,
        provenance=provenance.collect(
            describe_device(suite.device), suite.device.type, processes.size, extractors=suite.networks, **facts
        ),
    )


def joined(earlier: EvalResult, new: EvalResult) -> EvalResult:
    """The new record with what only the earlier one of the same cell has, in the order of the metrics' table."""
    metrics = {**earlier.metrics, **new.metrics}
    missing = {name: why for name, why in {**earlier.unavailable, **new.unavailable}.items() if name not in metrics}
    networks = {**earlier.provenance.extractors, **new.provenance.extractors}
    assert new.measurement is not None
    before = earlier.measurement.metrics if earlier.measurement is not None else tuple(earlier.metrics)
    return replace(
        new,
        metrics={name: metrics[name] for name in sorted(metrics, key=lambda name: [*METRICS, name].index(name))},
        unavailable=missing,
        measurement=replace(new.measurement, metrics=tuple(dict.fromkeys((*before, *new.measurement.metrics)))),
        provenance=replace(new.provenance, extractors=networks),
    )


def draw_cell(cell: Cell, store: SampleStore, images: KeptImages) -> bytes:
    """The picture of the first and the worst images, also saved one by one; those measured earlier are made again."""
    assert cell.path is not None
    measurement, device, pairs = cell.measurement, cell.suite.device, images.pairs
    columns = {name: store.column(name) for name in store.columns}
    order = np.argsort(-error_rank(columns, len(store.ids)), kind="stable")[: measurement.save_images]
    first = store.ids[: measurement.save_images]
    worst = [store.ids[i] for i in order if store.ids[i] not in first]
    protocol, dtype = measurement.rules, autocast_dtype(measurement)
    missing = [index for index, sample in enumerate(cell.source.ids) if sample in {*first, *worst} - pairs.keys()]
    loader = batches(cell.source, measurement, device, missing, cell.crops)
    for ids, batch, seeds in loader.seeded(measurement.seeds[:1]) if missing else ():
        for sample, real, own in zip(ids, batch, seeds, strict=True):  # one by one: memory may not hold the batch
            one = ([sample], real[None].to(device), own[None])
            decoded, _ = reconstruct(cell.tokenizer, one, protocol, dtype, Timer(device))
            pairs[sample] = real, quantise(decoded[0], protocol.fake_rounding)[0].cpu()
    save_pairs(cell.path, {sample: pairs[sample] for sample in (*first, *worst) if sample in pairs})
    psnr = dict(zip(store.ids, columns["psnr"], strict=True)) if "psnr" in columns else {}
    labels = {sample: f"{sample} {psnr[sample]:.2f} dB" if psnr else sample for sample in (*first, *worst)}
    rows = [(labels[sample], *pairs[sample]) for sample in first if sample in pairs]
    return draw(rows + [("worst: " + labels[sample], *pairs[sample]) for sample in worst if sample in pairs])


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
    for folder in path.parent.glob(f".{path.stem}-*"):
        if re.fullmatch(re.escape(f".{path.stem}-") + "[0-9a-f]{12}", folder.name):
            with suppress(InputError), hold(folder):
                shutil.rmtree(folder, ignore_errors=True)
