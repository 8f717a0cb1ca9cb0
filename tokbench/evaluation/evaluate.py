"""What a notebook or a training loop calls: one tokenizer, measured."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokbench import registry
from tokbench.data.loader import refuse_unusable
from tokbench.data.open import open_source
from tokbench.data.sources import Source
from tokbench.errors import InputError
from tokbench.evaluation.cell import ADVICE, check_size, evaluate_cell
from tokbench.metrics import DEFAULT, find_metrics
from tokbench.metrics.suite import MetricSuite
from tokbench.protocols import NATIVE, Resolution, parse_resolution, sides_of
from tokbench.records.measurement import Measurement
from tokbench.records.result import EvalResult
from tokbench.runtime.device import find_dtype, select_device
from tokbench.tokenizer import Tokenizer


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
    protocol = measurement.rules
    names = measurement.metrics or protocol.metrics or DEFAULT
    find_metrics(names, "reconstruction")
    return replace(measurement, metrics=names)


def check_images(source: Source, measurement: Measurement) -> None:
    """InputError for images that cannot be used, unless they may be left out."""
    if not measurement.skip_bad:
        refuse_unusable(source, measurement.resolution, measurement.rules, ADVICE)


def shorter_side(source: Source, measurement: Measurement) -> int:
    """Of the smallest image that is measured, in pixels."""
    sides = sides_of(measurement.resolution)
    sizes = [sides] if sides else [size for size in source.sizes(measurement.rules) if min(size)]
    return min(map(min, sizes), default=0)


def suite_for(source: Source, measurement: Measurement, device: torch.device) -> MetricSuite:
    """What measures these images."""
    side, one_size = shorter_side(source, measurement), measurement.resolution != NATIVE
    return MetricSuite(measurement.metrics, len(source), side, device, one_size=one_size)


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
    try:
        measurement = checked(Measurement(resolution=resolution, metrics=tuple(metrics or ()), **options))
    except TypeError as error:
        raise InputError(f"evaluate: {str(error).partition(') ')[2] or error}") from None
    model = registry.create(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if out is not None and not registry.ROW_NAME.fullmatch(model.info.name):
        raise InputError(f'tokenizer "{model.info.name}": a name that is written may hold only a-z 0-9 . _ -')
    spec = registry.parse(tokenizer).text if isinstance(tokenizer, str) else model.info.name
    check_size(model, measurement.resolution)
    source = data if isinstance(data, Source) else open_source(data, limit=limit)
    check_images(source, measurement)
    modules = [module for network in model.networks.values() for module in network.modules()]
    placed = next((p.device for module in modules for p in module.parameters(recurse=False)), None)
    stays = measurement.device == "auto" and placed is not None and tokenizer is model
    device = placed if stays and placed is not None else select_device(measurement.device)
    suite = suite_for(source, measurement, device)
    training = [module.training for module in modules]
    try:
        with torch.random.fork_rng(devices=[]):  # building networks and loaders draws from the caller's generator
            return evaluate_cell(model, spec, source, measurement, suite, out=None if out is None else Path(out))[0]
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
