"""The figures of a folder of results: quality against time, rate, size, steps and resolution; generation; training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tokbench.errors import InputError
from tokbench.protocols import sides_of
from tokbench.records.files import read_log
from tokbench.records.result import SpeedResult
from tokbench.report.columns import ResultEntry, headline_metric, metric_column, number, place_of
from tokbench.report.leaderboard import UNRANKED_FAMILIES, blocks
from tokbench.report.plots import (
    Point,
    axis_label,
    curves,
    log_axis,
    quality_against,
    quality_vs_time,
    save,
    scatter,
    styles,
)
from tokbench.report.probes.plots import probe_plots
from tokbench.report.reported import Reported
from tokbench.report.speed import setting
from tokbench.report.tables import shortened

MOST_BLOCKS = 12  # of whose rows figures are drawn: a figure takes a quarter of a second
RATE_METRICS = ("psnr", "lpips-alex", "rfid")
ARENA = "VAE Arena"  # how the source of its rows in reported.csv begins
ARENA_METRICS = ("ifid-val", "imind-val-mobilenet", "latent-viv", "latent-sec", "latent-lnc", "latent-lds", "rfid")
NOT_LOSSES = ("step", "images", "seconds", "rate", "images_per_second", "lr", "time")
Lines = dict[str, list[tuple[float, float]]]


def all_plots(
    entries: Sequence[ResultEntry], speeds: Sequence[SpeedResult], reported: Sequence[Reported], folder: Path,
    kind: str = "png", logs: Sequence[Path] = (),
) -> list[Path]:  # fmt: skip
    """Every figure for which there is something to show, of the MOST_BLOCKS largest blocks; what was written."""
    if kind not in ("png", "svg", "pdf"):
        raise InputError(f"--plot-format {kind!r}: choose png, svg or pdf")
    made: list[Path | None] = []
    for block in sorted(blocks(entries), key=lambda b: -len(b.rows))[:MOST_BLOCKS]:
        members = list(block.entries.values())
        data = members[0].result.dataset
        name = f"{members[0].result.protocol}-{data.name}-{data.resolution}-{data.num_images}".lower()
        place = "".join(c if c.isalnum() and c.isascii() else "-" for c in name) + f".{kind}"
        made.append(quality_vs_time(members, folder / f"quality-time-{place}"))
        for metric in RATE_METRICS:
            made.append(rate_distortion(members, metric, folder / f"rate-{metric}-{place}"))
            made.append(quality_against("ratio", metric, members, folder / f"dimensions-{metric}-{place}"))
        made.append(against_steps(members, folder / f"steps-{place}"))
        made += probe_plots(members, folder, place)
    made.append(against_resolution(entries, folder / f"resolution.{kind}"))
    made.append(rfid_vs_gfid(entries, reported, folder / f"rfid-gfid.{kind}"))
    made.append(latent_spectra(entries, folder / f"spectra.{kind}"))
    made.append(against_arena(entries, reported, folder / f"arena.{kind}"))
    made.append(rate_against_resolution(speeds, folder / f"speed-resolution.{kind}"))
    made.append(training_curves({log.parent.name: read_log(log) for log in logs}, folder / f"training.{kind}"))
    return [path for path in made if path is not None]


def bits_per_pixel(entry: ResultEntry) -> float | None:
    """Measured bits, or log2 K a token for a discrete latent; None for a continuous one, which has no rate."""
    measured = number(entry.result, "bpp")
    size, sides = entry.result.tokenizer.codebook_size, sides_of(entry.result.dataset.resolution)
    if measured is not None or size is None or sides is None:
        return measured
    tokens = number(entry.result, "tokens")
    return None if tokens is None else tokens * math.log2(size) / (sides[0] * sides[1])


def rate_distortion(entries: Sequence[ResultEntry], metric: str, path: Path) -> Path | None:
    """Quality against bits per pixel; a family of codecs is a ladder, a continuous latent a line at its quality."""
    ladders: dict[str, dict[str, tuple[float, float]]] = {}
    levels = {}
    for entry in entries:
        rate, quality = bits_per_pixel(entry), number(entry.result, metric)
        if quality is not None and rate:
            without_setting = entry.name.rstrip("0123456789").rstrip("-q@=") or entry.name
            ladders.setdefault(without_setting, {})[entry.name] = (rate, quality)
        elif quality is not None and entry.result.tokenizer.channels is not None:
            levels[shortened(entry.name, 20)] = quality
    lines = {name if len(rows) > 1 else next(iter(rows)): list(rows.values()) for name, rows in ladders.items()}
    label = "bits per pixel" + (" (dashed: continuous latents, no rate)" if levels else "")
    return curves(lines, label, axis_label(metric_column(metric)), path, levels)


def rate_against_resolution(results: Sequence[SpeedResult], path: Path) -> Path | None:
    """Decoded images/s against resolution."""
    lines: Lines = {}
    several = len({(r.hardware, setting(r)) for r in results}) > 1
    for result in results:
        where = f" ({result.hardware}, {setting(result)})" if several else ""
        if stage := result.stages.get("decode"):
            point = (result.resolution, stage.images_per_second)
            lines.setdefault(result.tokenizer.name + where, []).append(point)
    return curves(lines, "resolution (px)", "decode (img/s)", path)


def against_steps(entries: Sequence[ResultEntry], path: Path) -> Path | None:
    """The headline metric against decode steps, a line per set of weights."""
    lines: Lines = {}
    names: dict[str, str] = {}
    metric = headline_metric(entries) or ""
    for entry in sorted(entries, key=lambda e: len(e.name)):
        info, value = entry.result.tokenizer, number(entry.result, metric)
        if info.decode_steps and info.weights and value is not None:
            name = names.setdefault(info.weights, info.name)
            lines.setdefault(name, []).append((info.decode_steps, value))
    return curves(lines, "decode steps", axis_label(metric_column(metric)), path)


def against_resolution(entries: Sequence[ResultEntry], path: Path) -> Path | None:
    """The headline metric against resolution on the same data and protocol, a line per tokenizer."""
    lines: Lines = {}
    metric = headline_metric(entries) or ""
    entries = [
        e for e in entries if number(e.result, metric) is not None and isinstance(e.result.dataset.resolution, int)
    ]
    places = {place_of(entry) for entry in entries}
    for entry in entries:
        value = number(entry.result, metric)
        if value is not None and entry.result.tokenizer.family not in UNRANKED_FAMILIES:
            where = f" ({', '.join(place_of(entry))})" if len(places) > 1 else ""
            lines.setdefault(entry.name + where, []).append((float(entry.result.dataset.resolution), value))
    return curves(lines, "resolution (px)", axis_label(metric_column(metric)), path)


def rfid_vs_gfid(entries: Sequence[ResultEntry], reported: Sequence[Reported], path: Path) -> Path | None:
    """Reconstruction against generation: measured rows filled and named, rows of papers hollow behind them."""
    rfid = {(e.name, e.result.dataset.resolution): v for e in entries if (v := number(e.result, "rfid"))}
    measured = [
        Point(e.name, e.result.tokenizer.family, rfid[key], gfid)
        for e in entries
        if (gfid := number(e.result, "gfid")) and (key := (e.name, e.result.dataset.resolution)) in rfid
    ]
    papers = [(x, y) for r in reported if (x := r.numbers["rfid"]) and (y := r.numbers["gfid"])]
    if len(measured) + len(papers) < 2:
        return None
    label = "rfid ←" + (" (hollow: reported in papers, generators differ)" if papers else "")
    fig = scatter(measured, label, "neither", metric_column("gfid"), papers)
    log_axis(fig.axes[0].yaxis, [*(p.y for p in measured), *(y for _, y in papers)])
    return save(fig, path)


def latent_spectra(entries: Sequence[ResultEntry], path: Path) -> Path | None:
    """Power of latents against spatial frequency, both logarithmic, a line per tokenizer; a flat one is white noise."""
    lines: Lines = {
        entry.name: list(zip(found["frequency"], found["power"], strict=True))
        for entry in entries
        if (found := entry.result.latents).get("power")
    }
    label = "spatial frequency of the latents (Nyquist rate = 1)"
    return curves(lines, label, "mean power of a coefficient", path, log_y=True, legend=True)


def against_arena(entries: Sequence[ResultEntry], reported: Sequence[Reported], path: Path) -> Path | None:
    """Our numbers against the gFID that VAE Arena measured, a panel a metric, for each tokenizer that both have."""
    arena: dict[str, dict[str, float]] = {}
    for row in reported:
        if row.source.startswith(ARENA) and row.tokenizer and (gfid := row.numbers["gfid"]):
            arena.setdefault(row.model.rpartition(" + ")[2].partition("/")[0], {})[row.tokenizer] = gfid
    panels: dict[str, Lines] = {}
    for metric in ARENA_METRICS:
        for entry in entries:
            for generator, known in arena.items():
                if entry.name in known and (value := number(entry.result, metric)) is not None:
                    panels.setdefault(metric, {}).setdefault(generator, []).append((value, known[entry.name]))
    if not panels:
        return None
    fig = Figure(figsize=(2.4 * len(panels), 2.2), layout="constrained", dpi=200)
    for place, (metric, lines) in enumerate(panels.items(), 1):
        ax = fig.add_subplot(1, len(panels), place)
        for name, (colour, marker) in styles(arena).items():
            points = lines.get(name, [(math.nan, math.nan)])
            ax.scatter(*zip(*points, strict=True), color=colour, marker=marker, label=name)
        ax.set_xlabel(axis_label(metric_column(metric)), fontsize=7)
        ax.set_ylabel("gFID, VAE Arena", fontsize=7)
        ax.tick_params(labelsize=7)
    fig.axes[0].legend(fontsize=6)
    return save(fig, path)


def training_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path | None:
    """Losses and held-out scores against steps, a panel each, a line per run's log. None without a log of two steps."""
    panels: dict[str, Lines] = {}
    for name, records in runs.items():
        steps = [record for record in records if _finite(record.get("step"))]
        for record in steps if len(steps) > 1 else []:
            for key, value in record.items():
                if key not in NOT_LOSSES and _finite(value):
                    panels.setdefault(key, {}).setdefault(name, []).append((record["step"], value))
    if not panels:
        return None
    width = min(3, len(panels))
    fig = Figure(figsize=(2.4 * width, 1.9 * math.ceil(len(panels) / width)), layout="constrained", dpi=200)
    colours = styles(runs)
    for place, (key, lines) in enumerate(panels.items(), 1):
        ax = fig.add_subplot(math.ceil(len(panels) / width), width, place)
        for name, line in lines.items():
            ax.plot(*zip(*line, strict=True), color=colours[name][0], lw=1, label=name)
        ax.set_title(key, fontsize=8)
        ax.set_xlabel("step", fontsize=7)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    named = {line.get_label(): line for ax in fig.axes for line in ax.lines}
    fig.legend(handles=list(named.values()), fontsize=7, frameon=False, loc="outside lower center", ncols=3)
    return save(fig, path)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
