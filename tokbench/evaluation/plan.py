"""`tokbench run --dry-run`: what a run would measure, fetch and keep, and for how long, without loading a model."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tokbench import registry, weights
from tokbench.data.loader import CropCache
from tokbench.data.sources import Source
from tokbench.evaluation.cell import suite_for
from tokbench.metrics import METRICS
from tokbench.metrics.extractors import kinds
from tokbench.protocols import sides_of, size_text
from tokbench.records.files import cell_path, read_results
from tokbench.records.measurement import Measurement
from tokbench.records.result import EvalResult
from tokbench.report.tables import Heading, Table, plain
from tokbench.runtime.device import describe_device
from tokbench.runtime.terminal import duration
from tokbench.weights.transfer import megabytes

TYPICAL_PIXELS = 1024 * 1024  # of a native image


def plan(
    specs: Sequence[registry.Spec], source: Source, measurements: Sequence[Measurement], device: torch.device, out: Path
) -> tuple[Table, list[str]]:
    """A row for every cell, and lines on what is fetched and how much of the disk is needed.

    Times are those of earlier records of the same row, below `out` or results/, by pixels: encoding and decoding alone.
    """
    folders = [folder for folder in (out, Path("results")) if folder.exists()]
    known = {result.tokenizer.name: result for folder in folders for _, result in read_results(folder)[0]}
    rows, total, told = [], 0.0, True
    for spec in specs:
        for one in measurements:
            there = cell_path(out, one.rules.name, source.name, one.resolution, spec.row).exists()
            seconds = _seconds(known.get(spec.row), one, len(source))
            total, told = total + (seconds or 0.0), told and seconds is not None
            rows.append([
                f"{spec.row} at {size_text(one.resolution)}", f"{len(source):,}",
                "there; answers unless model, images or code have changed" if there else "to be measured",
                "unknown" if seconds is None else f"about {duration(seconds)}",
            ])  # fmt: skip
    headings = [Heading(key="cell"), Heading(key="images"), Heading(key="record", words=True), Heading(key="time")]
    least = "" if told else "at least "
    notes = [f"{least}{duration(total)} of encoding and decoding, as earlier records took"] if total else []
    title = f"{len(rows)} cells on {describe_device(device)}, results in {out}/"
    return plain(title, headings, rows, notes), [*_downloads(specs, source, measurements, device),
                                                 *_disk(source, measurements, len(specs), out)]  # fmt: skip


def _seconds(earlier: EvalResult | None, asked: Measurement, num_images: int) -> float | None:
    """Seconds of encoding and decoding so many images, from a record of the same row; None without one."""
    if earlier is None or not earlier.provenance.seconds:
        return None
    parts: Mapping[str, float] = earlier.provenance.seconds
    pixels = [_pixels(earlier.dataset.resolution), _pixels(asked.resolution)]
    seeds = 1 if earlier.tokenizer.deterministic else len(asked.seeds)
    return num_images * pixels[1] / pixels[0] * (parts.get("encode", 0.0) + seeds * parts.get("decode", 0.0))


def _pixels(resolution: int | str) -> int:
    width, height = sides_of(resolution) or (1, TYPICAL_PIXELS)
    return width * height


def _downloads(
    specs: Sequence[registry.Spec], source: Source, measurements: Sequence[Measurement], device: torch.device
) -> list[str]:
    """Networks of metrics that are not here, and models that come from elsewhere with their size in float32."""
    lines = weights.downloads(suite_for(source, measurements[0], device).networks)
    for part in (part for spec in specs for part in spec.parts):
        facts = part.entry.facts
        if "source" in facts and "file" not in part.options:
            size = megabytes(int(float(facts.get("params") or 0) * 4e6))
            lines.append(f"{part.text}: from {facts['source']}, about {size} unless it is in the cache")
    return lines


def _disk(source: Source, measurements: Sequence[Measurement], num_models: int, out: Path) -> list[str]:
    """What the run will write at most at one time, and what is free."""
    count, needed = len(source), 0
    for one in measurements:
        names = {METRICS[name].extractor for name in one.metrics if count >= METRICS[name].minimum}
        dims = sum(kind.dim for name, kind in kinds().items() if name in names)
        needed = max(needed, 4 * count * dims * (1 + len(one.seeds)))
        if num_models > 1 and CropCache.fits(out, source, one.resolution, one.rules):
            needed += 3 * count * _pixels(one.resolution)
    place = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    return [f"disk: about {megabytes(max(needed, 1000))} of features and crops while it runs, {megabytes(free)} free"]
