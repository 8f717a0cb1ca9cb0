"""What a notebook or a training loop calls."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from tokbench import registry
from tokbench.data.loader import CropCache, Loader, refuse_unusable
from tokbench.data.open import open_source
from tokbench.data.sources import Source
from tokbench.errors import InputError
from tokbench.evaluation.cell import run_cell
from tokbench.evaluation.kits import Kits
from tokbench.evaluation.plan import Plan, check_size
from tokbench.evaluation.reconstruct import Conditions
from tokbench.metrics import DEFAULT, METRICS
from tokbench.protocols import PROTOCOLS, Protocol, find_protocol
from tokbench.records.result import EvalResult
from tokbench.runtime.device import find_dtype, select_device
from tokbench.tokenizer import Tokenizer

# Where an image cannot be used; training and scoring read images too, but have no such options.
ADVICE = "; --skip-bad leaves such images out, --upscale enlarges small ones"


def open_plan(
    source: Source, resolution: int, protocol: Protocol, *, device: torch.device, dtype: str = "float32",
    seeds: Sequence[int] = (0,), batch_size: int | None = None, workers: int | None = None, upscale: bool = False,
    skip_bad: bool = False, crops: CropCache | None = None,
) -> Plan:  # fmt: skip
    """Everything about a cell but the model and the metrics. InputError for images smaller than the resolution."""
    if not 8 <= resolution <= 8192:
        raise InputError(f"--res {resolution}: must be from 8 to 8192 pixels")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: must be at least 1, or auto")
    if not skip_bad:
        refuse_unusable(source, resolution, upscale=upscale, advice=ADVICE)
    conditions = Conditions(protocol, resolution, device, find_dtype(dtype), tuple(dict.fromkeys(seeds)), batch_size)
    pinned = device.type == "cuda"

    def batches(indices: Sequence[int]) -> Loader:
        return Loader(
            source, resolution, protocol, batch_size=conditions.first_batch_size, indices=indices, workers=workers,
            pin_memory=pinned, upscale=upscale, skip_bad=skip_bad, cache=crops, advice=ADVICE,
        )  # fmt: skip

    upscaled = len(source.small(resolution)) if upscale else None
    return Plan(source, source.fingerprint(), conditions, batches, skip_bad, upscaled)


def evaluate(
    tokenizer: Tokenizer | str,
    data: str | Path | Source = "samples",
    resolution: int = 256,
    metrics: Sequence[str] | None = None,
    *,
    protocol: str = "adm",
    device: str = "auto",
    dtype: str = "float32",
    seeds: Sequence[int] = (0,),
    batch_size: int | None = None,
    workers: int | None = None,
    limit: int | None = None,
    upscale: bool = False,
    skip_bad: bool = False,
    out: Path | None = None,
) -> EvalResult:
    """Measure a tokenizer, or the spec of one, on images at a resolution in pixels.

    Callable from a training loop: networks stay on the device that they are on (`device` "auto"), and get their
    training mode back. Without `out` nothing is written but features of the real images, in the cache, which the next
    call reuses; with it, the result lies where `tokbench run` would put it and is found there again. Raises InputError
    for wrong use or bad images and CellError if the model fails. This process alone measures.
    """
    model = registry.create(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if out is not None and not registry.ROW_NAME.fullmatch(model.info.name):
        raise InputError(f'tokenizer "{model.info.name}": a name that is written may hold only a-z 0-9 . _ -')
    spec = registry.parse(tokenizer).text if isinstance(tokenizer, str) else model.info.name
    modules = [module for network in model.networks.values() for module in network.modules()]
    tensor = next((parameter for module in modules for parameter in module.parameters(recurse=False)), None)
    place = tensor.device if device == "auto" and tensor is not None and tokenizer is model else select_device(device)
    check_size(model, resolution)
    names = tuple(metrics or find_protocol(protocol).metrics or DEFAULT)
    source = data if isinstance(data, Source) else open_source(data, limit=limit)
    plan = open_plan(
        source, resolution, find_protocol(protocol), device=place, dtype=dtype, seeds=seeds, batch_size=batch_size,
        workers=workers, upscale=upscale, skip_bad=skip_bad,
    )  # fmt: skip
    training = [module.training for module in modules]
    try:
        with torch.random.fork_rng(devices=[]):  # building networks and loaders draws from the caller's generator
            return run_cell(model, spec, replace(plan, out=out), kits(names, len(source), place))[0]
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


@cache
def kits(names: tuple[str, ...], num_images: int, device: torch.device) -> Kits:
    """One per process, so that a training loop loads the networks of its metrics once."""
    return Kits(names, num_images, device)


def known(what: str) -> list[tuple[str, str]]:
    """(name, description) of every model, metric or protocol."""
    if what == "models":
        rows = []
        for entry in registry.entries():
            options = [key for key in entry.options if f"{{{key}}}" not in entry.name]
            rows.append((entry.name, entry.summary + (f"  [{', '.join(options)}]" if options else "")))
        return rows
    if what == "metrics":
        return [
            (metric.name, metric.description + (f" [{metric.unit}]" if metric.unit else ""))
            for metric in METRICS.values()
        ]
    if what == "protocols":
        return [(protocol.name, f"v{protocol.version} {protocol.summary}") for protocol in PROTOCOLS.values()]
    raise InputError(f'list "{what}": choose models, metrics or protocols')
