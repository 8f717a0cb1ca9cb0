"""`tokbench latents`: every model's card, one after the other; a record each, and the table."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokbench import registry
from tokbench.data.open import open_source
from tokbench.data.sources import Source
from tokbench.errors import CellError, InputError
from tokbench.evaluation.cell import find_earlier, lacks, measure_cell
from tokbench.evaluation.evaluate import cell_of, check_images, checked
from tokbench.evaluation.model import check_size
from tokbench.evaluation.reconstruct import Timer
from tokbench.evaluation.run import share_facts
from tokbench.latents.pairs import Encodings, Midpoints
from tokbench.metrics import LATENTS, METRICS, Samples, latents, latents_of
from tokbench.protocols import NATIVE
from tokbench.records.files import result_path, write_whole
from tokbench.records.measurement import Measurement
from tokbench.records.result import EvalResult, Value, to_json
from tokbench.records.samples import SampleStore
from tokbench.report.columns import ResultEntry
from tokbench.report.curves import latent_spectra
from tokbench.report.tables import ERRORS, Heading, Table, TableCell, TableRow, show
from tokbench.runtime.device import release, select_device
from tokbench.runtime.processes import Processes, join
from tokbench.runtime.terminal import say
from tokbench.tokenizer import Tokenizer

FOLDER = "latents"  # below --out: a leaderboard of its own
OF_LATENTS = tuple(n for n, m in METRICS.items() if m.extractor == LATENTS or n in ("latent-mean", "latent-std"))
BETWEEN = ("ifid-val", "ifd-val-mobilenet", "imind-val-inception", "imind-val-mobilenet")
MOST_CHANNELS = 64  # of which the matrix of correlations is kept
SHOWN_CHANNELS = 16


def run_latents(
    models: str,
    measurement: Measurement,
    *,
    data: str = "samples",
    split: str | None = None,
    limit: int | None = None,
    out: Path = Path("runs"),
    fresh: bool = False,
) -> int:
    """Measure every card and print the table; the exit status: 1 if a model failed, 2 if one takes no such images.

    Raises InputError for wrong options or images that cannot be used.
    """
    status = 0
    specs, asked = registry.parse_all(models), measurement.metrics or OF_LATENTS + BETWEEN
    for name in asked:
        if name not in OF_LATENTS and (name not in METRICS or METRICS[name].scope != "interpolation"):
            raise InputError(f"latents --metrics {name}: choose from {', '.join((*OF_LATENTS, *BETWEEN))}")
    measurement = checked(replace(measurement, metrics=("psnr",), save_images=0))
    if measurement.resolution == NATIVE:
        raise InputError("latents --res native: latents are compared at one size")
    results: dict[str, EvalResult] = {}
    with join() as processes:
        device, source = select_device(measurement.device, processes.local_rank), open_source(data, split, limit)
        share_facts(source, out / FOLDER, processes)
        check_images(source, measurement)
        if processes.main:
            say(f"{len(source)} images, encoded once for the card and once more to decode between them")
        for spec in specs:
            try:
                tokenizer = processes.together(partial(registry.create, spec))
                check_size(tokenizer, measurement.resolution)
                own = replace(measurement, metrics=tuple(asked))
                results[spec.row] = card(tokenizer, spec.text, source, own, device, processes, out / FOLDER, fresh)
            except (CellError, InputError) as error:
                say(f"failed: {spec.row}: {error}")
                status = max(status, 2 if isinstance(error, InputError) else 1)
            release(device)
        if processes.main and results:
            show_cards(list(results.values()), out / FOLDER)
    return status


def card(
    tokenizer: Tokenizer,
    spec: str,
    source: Source,
    measurement: Measurement,
    device: torch.device,
    processes: Processes,
    out: Path,
    fresh: bool = False,
) -> EvalResult:
    """The record of one latent space: its statistics from a first pass, what is decoded between from a second.

    CellError for a tokenizer without continuous latents, and for a model that fails.
    """
    if tokenizer.info.channels is None:
        raise CellError("has no continuous latents, which is what a card is of")
    cell = cell_of(tokenizer, spec, source, measurement, device, processes=processes, out=out)
    assert cell.path is not None
    earlier = processes.by_main(lambda: None if fresh else find_earlier(cell))
    if earlier and earlier.latents and not any(lacks(earlier, name, cell.suite) for name in cell.measurement.metrics):
        return earlier
    first, second = (
        replace(cell, measurement=replace(cell.measurement, metrics=names, keep_features=keep))
        for keep, names in (
            (True, tuple({n: 1 for n in ("latent-rank", *cell.measurement.metrics) if n in OF_LATENTS})),
            (measurement.keep_features, tuple(n for n in cell.measurement.metrics if n not in OF_LATENTS)),
        )
    )
    result, _ = measure_cell(first, Encodings(tokenizer, source, first.measurement, Timer(device)), fresh=fresh)
    features = cell.path.with_suffix(".features")
    processes.wait()  # until the features are in their place
    store = SampleStore(features)
    if second.measurement.metrics:
        own = store.features("fake", LATENTS)
        pairs = Midpoints(tokenizer, source, second.measurement, Timer(device), latents=own, ids=store.ids)
        result, _ = measure_cell(second, pairs)
    result = replace(result, latents=vectors(store, tokenizer))

    def write() -> None:
        write_whole(result_path(out, result), to_json(result))
        if not measurement.keep_features:
            shutil.rmtree(features, ignore_errors=True)

    processes.by_main(write)
    return result


def vectors(samples: Samples, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the card says by channel and by frequency, and the scale and shift that would make the latents standard.

    The last in the form of diffusers' configs, of the tokenizer's own latents where it says what it does to them.
    """
    own = latents_of(samples)
    sums = latents.sums_of(own).without(None)
    mean, deviation = latents.mean(sums), latents.deviation(sums)
    shift, scale = (_stated(tokenizer, *one, own.channels) for one in (("shift", 0.0), ("scale", 1.0)))
    raw_mean, raw_deviation = shift + mean / scale, deviation / scale
    whole = float(np.sqrt((raw_deviation**2).mean() + raw_mean.var()))
    found: dict[str, Any] = {
        "shape": [own.channels, *sums.energy.shape],
        "mean": mean,
        "deviation": deviation,
        "kurtosis": latents.kurtosis(sums),
        "eigenvalues": latents.eigenvalues(sums),
        "scaling_factor": 1 / whole if whole else None,
        "shift_factor": float(raw_mean.mean()),
        "latents_mean": raw_mean,
        "latents_std": raw_deviation,
    }
    if own.channels <= MOST_CHANNELS:
        found["correlation"] = latents.correlations(sums)
    if min(sums.energy.shape) > 2:
        found["frequency"], found["power"] = latents.spectrum(sums)
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found.items()}


def _stated(tokenizer: Tokenizer, name: str, otherwise: float, channels: int) -> np.ndarray:
    """What a tokenizer says it does to all channels, or to each; float64 [1] or [C]."""
    value = getattr(tokenizer, name, None)
    if isinstance(value, float | torch.Tensor) and torch.as_tensor(value).numel() in (1, channels):
        return torch.as_tensor(value).double().flatten().cpu().numpy()
    return np.array([otherwise])


# ---- what is printed ----------------------------------------------------------------------------------------------


def show_cards(results: Sequence[EvalResult], out: Path) -> None:
    """The table on stdout, the spectra as a figure beside the records."""
    show([card_table(results), *(channel_table(r) for r in results if len(r.latents["mean"]) <= SHOWN_CHANNELS)], 130)
    for result in results:
        name, scale, shift = (result.tokenizer.name, *(result.latents[f"{k}_factor"] for k in ("scaling", "shift")))
        advice = "latents do not vary" if scale is None else f"scaling_factor {scale:.5g}, shift_factor {shift:.5g}"
        say(f"{name}: {advice} make its latents standard; latents_mean and latents_std are in its record")
    folder = result_path(out, results[0]).parent
    path = latent_spectra([ResultEntry(result) for result in results], folder / "spectra.png")
    say(f"results in {out}/" + (f", spectra in {path}" if path else ""))


def card_table(results: Sequence[EvalResult]) -> Table:
    """A line for each quantity, a column for each model."""
    headings = [Heading(key=result.tokenizer.name) for result in results]
    headings.append(Heading(key="meaning", words=True))
    lines = []
    for name, metric in METRICS.items():
        values = {r.tokenizer.name: r.metrics[name] for r in results if name in r.metrics}
        if values:
            arrow = Heading(key=name, better=metric.better).label
            cells = {key: _cell(values.get(key, Value(None)), metric.digits) for key in (h.key for h in headings)}
            lines.append(TableRow(arrow, cells | {"meaning": TableCell(metric.description)}))
    remarks: dict[tuple[str, str], list[str]] = {}
    for r in results:
        for name, why in [*((n, v.note) for n, v in r.metrics.items() if v.note), *r.unavailable.items()]:
            remarks.setdefault((name, why), []).append(r.tokenizer.name)
    notes = [
        f"{name}{'' if len(who) == len(results) else ' of ' + ', '.join(who)}: {why}"
        for (name, why), who in sorted(remarks.items())
    ]
    data, where = results[0].dataset, results[0].provenance.device
    title = f"latents of {data.name} at {data.resolution} px · protocol {results[0].protocol}"
    shapes = ", ".join(f"{r.tokenizer.name} {'x'.join(map(str, r.latents['shape']))}" for r in results)
    return Table(
        title=title, names="quantity", columns=headings, groups=[("", lines)],
        notes=[f"N = {data.num_images:,} · {where} · {ERRORS}", f"latents: {shapes}", *notes],
    )  # fmt: skip


def channel_table(result: EvalResult) -> Table:
    """Mean, deviation, kurtosis and correlations of each channel."""
    found: Mapping[str, Any] = result.latents
    keys = ("mean", "deviation", "kurtosis", "latents_mean", "latents_std")
    headings = [*(Heading(key=key) for key in keys), Heading(key="correlation", words=True)]
    rows = []
    for channel in range(len(found["mean"])):
        cells = {key: TableCell(f"{found[key][channel]:.4g}") for key in keys}
        others = " ".join(f"{value:+.2f}" for value in found["correlation"][channel])
        rows.append(TableRow(str(channel), cells | {"correlation": TableCell(others)}))
    return Table(title=f"channels of {result.tokenizer.name}", names="channel", columns=headings, groups=[("", rows)])


def _cell(value: Value, digits: int) -> TableCell:
    if value.value is None:
        return TableCell("–", note=value.note)
    error = f"±{value.stderr:.{digits}f}" if value.stderr else ""
    return TableCell(f"{value.value:.{digits}f}", error, note=value.note, value=value.value)
