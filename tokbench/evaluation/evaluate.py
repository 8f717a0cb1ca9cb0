"""One tokenizer, measured: what `tokbench run` does with each, and what a notebook or a training loop calls."""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokbench import registry
from tokbench.data.loader import CropCache, Loader, refuse_unusable
from tokbench.data.open import open_source
from tokbench.data.sources import Source, class_labels
from tokbench.errors import InputError
from tokbench.evaluation.cell import Cell, measure_cell
from tokbench.evaluation.model import Watch, check_size, lacks, model_key, with_facts
from tokbench.evaluation.reconstruct import (
    Columns,
    Fakes,
    Features,
    Timer,
    autocast_dtype,
    first_batch_size,
    latent_columns,
    round_trip,
    seam_columns,
)
from tokbench.metrics import CODES, DEFAULT, LATENTS, RENAMED, find_metrics
from tokbench.protocols import Resolution, parse_resolution
from tokbench.records.files import per_image_path, read_per_image, result_path
from tokbench.records.measurement import Measurement
from tokbench.records.result import EvalResult, Settings, read_result
from tokbench.runtime.device import find_dtype, prepare, select_device
from tokbench.runtime.processes import Processes
from tokbench.runtime.terminal import say
from tokbench.runtime.tiling import tiling_of
from tokbench.tokenizer import Tokenizer

# What a user can do about an image; training and scoring read images too, but have no such options.
ADVICE = "; --skip-bad leaves such images out, --small skip those that are too small"


def checked(measurement: Measurement) -> Measurement:
    """The measurement with its metrics named. InputError for options that cannot be used, before any image is read."""
    measurement = replace(measurement, resolution=parse_resolution(str(measurement.resolution)))
    for name, least in (("batch_size", 1), ("workers", 0), ("save_images", 0)):
        value = getattr(measurement, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}, or auto")
    if not measurement.seeds:
        raise InputError("--seeds: at least one is needed")
    find_dtype(measurement.dtype)
    names = measurement.metrics or measurement.rules.metrics or DEFAULT
    for metric in find_metrics(names, "reconstruction"):
        if metric.probe:
            raise InputError(f"{metric.name} is a probe's: `tokbench probe {metric.probe}`")
    if measurement.keep_features and RENAMED:
        raise InputError("--keep-features: not with --weights, whose features would lie under the names of Inception's")
    return replace(measurement, metrics=names)


def check_images(source: Source, measurement: Measurement) -> None:
    """InputError for images that cannot be used, unless they may be left out."""
    if not measurement.skip_bad:
        refuse_unusable(source, measurement.resolution, measurement.rules, ADVICE)


def tell_apart(source: Source, out: Path) -> None:
    """Another name for images whose name `out` holds results of other images under: coco/val is not imagenet/val."""
    for path in sorted(out.glob(f"*/{glob.escape(source.name)}-*/*.json")):
        with suppress(InputError):
            other = read_result(path).dataset
            if other.name == source.name and other.fingerprint != source.fingerprint():
                source.name = f"{source.name}.{source.split or len(source)}.{source.fingerprint()[:8]}"
                return


@dataclass
class Reconstructions:
    """The `Pairs` of images and of what a tokenizer makes of them."""

    tokenizer: Tokenizer
    source: Source
    measurement: Measurement
    timer: Timer
    crops: CropCache | None = None
    loaders: list[Loader] = field(default_factory=list)
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.tokenizer)

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[Sequence[str], Tensor, Tensor]]:
        """Ids, images uint8 [B, 3, H, W] and their seeds int64 [B, S]."""
        asked, device = self.measurement, self.timer.device
        prepare(self.tokenizer, device)
        loader = Loader(
            self.source,
            asked.resolution,
            asked.rules,
            batch_size=first_batch_size(asked, device),
            indices=indices,
            workers=asked.workers,
            pin_memory=device.type == "cuda",
            skip_bad=asked.skip_bad,
            cache=self.crops,
            advice=ADVICE,
        )
        self.loaders.append(loader)
        yield from loader.seeded(asked.seeds)

    def fakes(self, ids: Sequence[str], real: Tensor, beside: Tensor) -> tuple[Fakes, Columns, Features]:
        """The reconstructions by seed, the columns of latents and tiles, and the latents."""
        fakes, latents = round_trip(self.tokenizer, (ids, real, beside), self.measurement, self.timer)
        with torch.inference_mode():
            self.watch.see(real, latents, next(iter(fakes.values()))[1])
            columns = self.columns(ids, latents, (real.shape[2], real.shape[3]))
            return fakes, columns | seam_columns(self.tokenizer, real, fakes), self.features(latents)

    def columns(self, ids: Sequence[str], latents: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Columns [B] of the latents of images of this size, and the images' classes where there are several."""
        columns = latent_columns(self.tokenizer, latents, size)
        if self.labels:
            columns["label"] = torch.tensor([float(self.labels[sample]) for sample in ids])
        return columns

    def features(self, latents: Tensor) -> Features:
        """The latents as metrics may want them: codes, or numbers."""
        if self.tokenizer.info.codebook_size is not None:
            return {("fake", CODES): latents}
        return {("fake", LATENTS): latents.float()} if self.tokenizer.info.channels is not None else {}

    @cached_property
    def labels(self) -> dict[str, int]:
        """The class of every sample; {} where all are of one."""
        labels, names = class_labels(self.source)
        return dict(zip(self.source.ids, labels, strict=True)) if len(names) > 1 else {}

    def facts(self, processes: Processes) -> dict[str, Any]:
        """Seconds an image, and what was done to images; those left out are named."""
        for reason in (reason for loader in self.loaders for reason in loader.skipped.values()):
            say(f"left out: {reason}")
        warnings = tuple(dict.fromkeys(text for own in processes.all_gather(self.watch.found()) for text in own))
        for text in warnings if processes.main else ():
            say(f"warning: {self.tokenizer.info.name}: {text}")
        rates = [rate for rate in processes.all_gather(self.timer.per_image()) if rate]
        seconds = {part: float(np.mean([rate[part] for rate in rates])) for part in (rates[0] if rates else {})}
        notes = processes.all_gather([loader.notes for loader in self.loaders])
        counts = dict(sum((own for part in notes for own in part), Counter()))
        return {"seconds": seconds, "image_notes": counts, "warnings": "; ".join(warnings)}


def settings_of(tokenizer: Tokenizer, spec: str, source: Source, measurement: Measurement) -> Settings:
    """The choices that can change a number, as they take effect. One seed is enough where nothing is drawn."""
    protocol = measurement.rules
    drawn = not tokenizer.info.deterministic or protocol.posterior == "sample"
    seeds = tuple(dict.fromkeys(measurement.seeds))
    return Settings(
        spec=spec,
        tiling=str(tiling_of(tokenizer) or ""),
        dtype=str(autocast_dtype(measurement)).removeprefix("torch."),
        seeds=seeds if drawn else seeds[:1],
        upscaled=len(source.below(measurement.resolution, protocol)) or None if protocol.small == "enlarge" else None,
    )


def cell_of(
    tokenizer: Tokenizer,
    spec: str,
    source: Source,
    measurement: Measurement,
    device: torch.device,
    *,
    processes: Processes | None = None,
    out: Path | None = None,
) -> Cell:
    """A tokenizer's row with those of the metrics asked for that it and the data can have."""
    info, settings = with_facts(tokenizer), settings_of(tokenizer, spec, source, measurement)
    asked, unlabelled = find_metrics(measurement.metrics), len(class_labels(source)[1]) < 2
    refused = {m.name: why for m in asked if (why := lacks(tokenizer, m))}
    names = tuple(metric.name for metric in asked if metric.name not in refused)
    if measurement.metrics in (DEFAULT, measurement.rules.metrics):  # nobody asked for these
        refused = {}
    unclassed = {m.name: "needs classes: folders or labels" for m in asked if unlabelled and "label" in m.columns}
    refused, names = refused | unclassed, tuple(name for name in names if name not in unclassed)
    own = replace(measurement, metrics=names, seeds=settings.seeds)
    model = model_key(info, tokenizer)
    return Cell(info, source, own, settings, model, device, out, processes or Processes(), refused)


def evaluate_cell(
    tokenizer: Tokenizer, cell: Cell, *, fresh: bool = False, crops: CropCache | None = None
) -> tuple[EvalResult, bool]:
    """Measure the row that `cell_of` made of a tokenizer; the result and the errors of `measure_cell`."""
    pairs = Reconstructions(tokenizer, cell.source, cell.measurement, Timer(cell.device), crops)
    return measure_cell(cell, pairs, fresh=fresh)


def evaluate(
    tokenizer: Tokenizer | str,
    data: str | Path | Source = "samples",
    resolution: Resolution = 256,
    metrics: Sequence[str] = (),
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> EvalResult:
    """Measure a tokenizer, or the spec of one, on images at a resolution in pixels.

    `options` are the other fields of `Measurement`: protocol, seeds, dtype, device, batch_size, ... Callable from a
    training loop: networks stay on the device that they are on (`device` "auto"), and get their training mode back.
    Without `out` nothing is written but features of the real images, in the cache, which the next call reuses; with it,
    the result lies where `tokbench run` would put it and is found there again. Raises InputError for wrong use or bad
    images and CellError if the model fails. This process alone measures.
    """
    names = metrics.split(",") if isinstance(metrics, str) else metrics
    if not isinstance(data, str | Path | Source):
        raise InputError(f"evaluate: data is a {type(data).__name__}; give a folder, an archive, a name or a tb.Source")
    if not isinstance(tokenizer, str) and (lacking := [n for n in registry.NEEDED if not hasattr(tokenizer, n)]):
        raise InputError(f"evaluate: {type(tokenizer).__name__} is no tokenizer, it lacks {', '.join(lacking)}")
    try:
        measurement = checked(Measurement(resolution=resolution, metrics=tuple(names or ()), **options))
    except TypeError as error:
        raise InputError(f"evaluate: {str(error).partition(') ')[2] or error}") from None
    model = registry.create(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if out is not None and not registry.ROW_NAME.fullmatch(model.info.name):
        raise InputError(f'tokenizer "{model.info.name}": a name that is written may hold only a-z 0-9 . _ -')
    spec = registry.parse(tokenizer).text if isinstance(tokenizer, str) else model.info.name
    check_size(model, measurement.resolution)
    source = data if isinstance(data, Source) else open_source(data, limit=limit)
    check_images(source, measurement)
    if out is not None:
        tell_apart(source, Path(out))
    modules = [module for network in model.networks.values() for module in network.modules()]
    placed = next((p.device for module in modules for p in module.parameters(recurse=False)), None)
    stays = measurement.device == "auto" and placed is not None and tokenizer is model
    device = placed if stays and placed is not None else select_device(measurement.device)
    training = [module.training for module in modules]
    try:
        with torch.random.fork_rng(devices=[]):  # building networks and loaders draws from the caller's generator
            folder = None if out is None else Path(out)
            result, _ = evaluate_cell(model, cell_of(model, spec, source, measurement, device, out=folder))
            if folder is None or result.rows is not None:
                return result
            ids, columns = read_per_image(per_image_path(result_path(folder, result)))
            return replace(result, rows={"id": ids, **columns})
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
