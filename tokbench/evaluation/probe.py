"""`tokbench probe`: what one number per metric hides. A probe measures a tokenizer in its own way and fills a row."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokbench import registry
from tokbench.data.open import open_source
from tokbench.data.sources import Source
from tokbench.errors import CellError
from tokbench.evaluation.cell import suite_for
from tokbench.evaluation.evaluate import Reconstructions, check_images, checked
from tokbench.evaluation.model import check_size
from tokbench.evaluation.reconstruct import Timer, images_at_once, measure
from tokbench.metrics import METRICS, Metric
from tokbench.metrics.statistics import mean_and_error
from tokbench.protocols import size_text
from tokbench.records.measurement import Measurement
from tokbench.records.result import Value
from tokbench.report.tables import ERRORS, Heading, Table, TableCell, TableRow, show
from tokbench.runtime.device import describe_device, prepare, select_device
from tokbench.runtime.seeding import image_seeds
from tokbench.runtime.terminal import bar, say
from tokbench.tokenizer import Tokenizer

ROUND_TRIPS = (1, 2, 5, 10)


def drift(tokenizer: Tokenizer, source: Source, measurement: Measurement, device: torch.device) -> dict[str, Value]:
    """PSNR and LPIPS of images against what is left of them after several round trips, each rounded to 8 bits.

    Every trip is as `run` would do it with the saved image of the trip before, noise included.
    """
    suite = suite_for(source, replace(measurement, metrics=("psnr", "lpips-alex")), device)
    seed, names = measurement.seeds[0], [metric.name for metric in suite.available]
    pairs = Reconstructions(tokenizer, source, replace(measurement, seeds=(seed,)), Timer(device))
    columns: dict[str, list[Tensor]] = {f"{name} x{trip}": [] for trip in ROUND_TRIPS for name in names}

    def step(ids: Sequence[str], real: Tensor, seeds: Tensor) -> None:
        fake = real = real.to(device)
        found = {}
        for trip in range(1, max(ROUND_TRIPS) + 1):
            fake = pairs.fakes(ids, fake, seeds)[0][seed][0]
            seeds = image_seeds(fake.cpu(), seed)[:, None]
            if trip in ROUND_TRIPS:
                scores = suite.score(real, fake)
                found.update({f"{name} x{trip}": scores[name] for name in names})
        for column, values in found.items():  # at the end: a step that runs out of memory is made again
            columns[column].append(values.cpu())

    with bar(f"drift of {tokenizer.info.name}", len(source)) as progress:
        measure(
            step,
            pairs.batches(range(len(source))),
            name=tokenizer.info.name,
            device=device,
            limit=images_at_once(measurement, device),
            batch_size=measurement.batch_size,
            progress=progress,
        )
    values = {name: mean_and_error(torch.cat(parts).numpy()) for name, parts in columns.items() if parts}
    return values | {name: Value(None, note=reason) for name, reason in suite.unavailable.items()}


registry.register_probe("drift", drift, summary="psnr and lpips-alex after 1, 2, 5 and 10 round trips")


def run_probe(
    name: str,
    models: str,
    measurement: Measurement,
    *,
    data: str = "samples",
    split: str | None = None,
    limit: int | None = None,
) -> int:
    """Probe every model and print the table; the exit status, 1 if a model failed.

    Raises InputError for an unknown probe or model, options that are wrong or images that cannot be used.
    """
    probe, specs, measurement = registry.PROBES.find(name), registry.parse_all(models), checked(measurement)
    source, device = open_source(data, split, limit), select_device(measurement.device)
    check_images(source, measurement)
    rows: dict[str, dict[str, Value]] = {}
    for spec in specs:
        try:
            tokenizer = registry.create(spec)
            check_size(tokenizer, measurement.resolution)
            prepare(tokenizer, device)
            rows[spec.row] = dict(probe.measure(tokenizer, source, measurement, device))
        except CellError as error:
            say(f"failed: {spec.row}: {error}")
    title = f"{name} · {source.name} · {size_text(measurement.resolution)} · {measurement.rules.name}"
    note = f"N = {len(source)} · {describe_device(device)} · {ERRORS}"
    if rows:
        show([table_of(title, rows, [probe.summary, note])], 130)
    return int(len(rows) < len(specs))


def table_of(title: str, rows: Mapping[str, Mapping[str, Value]], notes: Sequence[str]) -> Table:
    """Values by row and column; a column that is named "METRIC ..." is shown as the metric is."""
    keys = list(dict.fromkeys(key for values in rows.values() for key in values))
    metrics = {key: METRICS.get(key.split()[0], Metric(key, "neither", "")) for key in keys}
    headings = [Heading(key=key, unit=metric.unit, better=metric.better) for key, metric in metrics.items()]
    lines = [
        TableRow(row, {key: _cell(values.get(key, Value(None)), metrics[key].digits) for key in keys})
        for row, values in rows.items()
    ]
    reasons = {f"{key}: {v.note}" for values in rows.values() for key, v in values.items() if v.note}
    notes = [*notes, *sorted(reasons)]
    return Table(title=title, names="tokenizer", columns=headings, groups=[("", lines)], notes=notes)


def _cell(value: Value, digits: int) -> TableCell:
    if value.value is None:
        return TableCell("–", note=value.note)
    error = f"±{value.stderr:.{digits}f}" if value.stderr else ""
    return TableCell(f"{value.value:.{digits}f}", error, note=value.note, value=value.value)
