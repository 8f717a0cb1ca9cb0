"""The figures of a folder of results: rate and distortion, steps, resolution, distributions, generation, training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from tokbench.errors import InputError
from tokbench.protocols import sides_of
from tokbench.records.files import read_log
from tokbench.records.result import SpeedResult
from tokbench.report import speed
from tokbench.report.columns import (
    ResultEntry,
    elements_ratio,
    headline_metric,
    metric_column,
    number,
    place_of,
    tokens,
)
from tokbench.report.leaderboard import UNRANKED_FAMILIES, Block, blocks
from tokbench.report.plots import (
    Point,
    axis_label,
    figure,
    label_levels,
    label_points,
    log_axis,
    quality_vs_time,
    save,
    scatter,
    styles,
)
from tokbench.report.reported import Reported
from tokbench.report.tables import shortened

MOST_BLOCKS = 12  # of whose rows figures are drawn: a figure takes a quarter of a second
RATE_METRICS = ("psnr", "lpips-alex", "rfid")
Item = TypeVar("Item")
Lines = Mapping[str, Sequence[tuple[float, float]]]


def all_plots(
    entries: Sequence[ResultEntry],
    speeds: Sequence[SpeedResult],
    reported: Sequence[Reported],
    folder: Path,
    kind: str = "png",
    logs: Sequence[Path] = (),
) -> list[Path]:
    """Every figure for which there is something to show, of the MOST_BLOCKS largest blocks; what was written."""
    if kind not in ("png", "svg", "pdf"):
        raise InputError(f"--plot-format {kind!r}: choose png, svg or pdf")
    made: list[Path | None] = []
    measured = blocks(entries)
    for block in sorted(measured, key=lambda b: -len(b.rows))[:MOST_BLOCKS]:
        members = list(block.entries.values())
        name = slug(block)
        made.append(quality_vs_time(members, folder / f"quality-time-{name}.{kind}"))
        for metric in RATE_METRICS:
            made.append(rate_distortion(members, metric, folder / f"rate-{metric}-{name}.{kind}"))
            made.append(dimension_ratio(members, metric, folder / f"dimensions-{metric}-{name}.{kind}"))
        if headline := headline_metric(members):
            made.append(against_steps(members, headline, folder / f"steps-{name}.{kind}"))
            made.append(ecdf(members, headline, folder / f"ecdf-{headline}-{name}.{kind}"))
    if headline := headline_metric(entries):
        made.append(against_resolution(entries, headline, folder / f"resolution.{kind}"))
    made.append(rfid_vs_gfid(entries, reported, folder / f"rfid-gfid.{kind}"))
    made.append(rate_against_resolution(speeds, folder / f"speed-resolution.{kind}"))
    for key, rows in speed.comparable(speeds).items():
        made.append(
            quality_against_rate(rows, entries, folder / f"quality-rate-{_plain(' '.join(map(str, key)))}.{kind}")
        )
    made.append(training_curves({log.parent.name: read_log(log) for log in logs}, folder / f"training.{kind}"))
    return [path for path in made if path is not None]


def slug(block: Block) -> str:
    """A file name for a block's figures."""
    result = next(iter(block.entries.values())).result
    return _plain(f"{result.protocol}-{result.dataset.name}-{result.dataset.resolution}-{result.dataset.num_images}")


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in text.lower()).strip("-")


def bits_per_pixel(entry: ResultEntry) -> float | None:
    """Measured bits, or log2 K a token for a discrete latent; None for a continuous one, which has no rate."""
    measured = number(entry.result, "bpp")
    size, sides = entry.result.tokenizer.codebook_size, sides_of(entry.result.dataset.resolution)
    if measured is not None or size is None or sides is None:
        return measured
    count = tokens(entry.result)
    return None if count is None else count * math.log2(size) / (sides[0] * sides[1])


def rate_distortion(entries: Sequence[ResultEntry], metric: str, path: Path) -> Path | None:
    """Quality against bits per pixel; a family of codecs is a ladder, a continuous latent a line at its quality.

    None unless two rows have a rate.
    """
    column = metric_column(metric)
    rated = [
        (e, rate, q) for e in entries if (rate := bits_per_pixel(e)) and (q := number(e.result, metric)) is not None
    ]
    if len(rated) < 2:
        return None
    fig, ax = figure()
    log_axis(ax.xaxis, [rate for _, rate, _ in rated])
    labels = _ladders(ax, {_ladder(e): [] for e, _, _ in rated}, [(_ladder(e), e.name, r, q) for e, r, q in rated])
    levels = [
        (q, shortened(e.name, 20)) for e in entries if _continuous(e) and (q := number(e.result, metric)) is not None
    ]
    levels = list(_spread(sorted(levels), 6))
    for quality, _ in levels:
        ax.axhline(quality, color="0.55", lw=0.8, ls=(0, (4, 3)), zorder=1)
    ax.margins(0.1)
    ax.set_xlabel("bits per pixel" + (" (dashed: continuous latents, no rate)" if levels else ""), fontsize=9)
    ax.set_ylabel(axis_label(column), fontsize=9)
    label_levels(ax, levels)
    label_points(ax, labels)
    return save(fig, path)


def _continuous(entry: ResultEntry) -> bool:
    return bits_per_pixel(entry) is None and entry.result.tokenizer.channels is not None


def _ladder(entry: ResultEntry) -> str:
    """Rows that differ only in their quality setting: the name without its last number."""
    return entry.name.rstrip("0123456789").rstrip("-q@=") or entry.name


def _ladders(
    ax: Axes, lines: dict[str, list[tuple[float, float]]], rows: Sequence[tuple[str, str, float, float]]
) -> list[Point]:
    """Draw (line's name, row's name, x, y) as marked lines; label a line at its end, a single point by its own name."""
    names: dict[str, str] = {}
    for line, name, x, y in rows:
        lines[line].append((x, y))
        names[line] = name
    labels = []
    for (line, points), (colour, marker) in zip(lines.items(), styles(lines).values(), strict=True):
        xs, ys = zip(*sorted(points), strict=True)
        ax.plot(xs, ys, color=colour, marker=marker, markersize=4.5, lw=1.2, zorder=3)
        labels.append(Point(line if len(points) > 1 else names[line], line, xs[-1], ys[-1]))
    return labels


def dimension_ratio(entries: Sequence[ResultEntry], metric: str, path: Path) -> Path | None:
    """Quality against the size of a continuous latent relative to the image. None without two ratios."""
    points = [
        Point(e.name, e.result.tokenizer.family, ratio, quality)
        for e in entries
        if (ratio := elements_ratio(e.result.tokenizer)) and (quality := number(e.result, metric)) is not None
    ]
    if len({p.x for p in points}) < 2:
        return None
    return save(scatter(points, "latent elements per image element", "neither", metric_column(metric)), path)


def _curves(lines: Lines, x_label: str, y_label: str, path: Path, *, slopes: bool = False) -> Path | None:
    """Named lines over a log axis, those of two points or more; with `slopes` over two, with the fitted powers."""
    lines = {name: sorted(points) for name, points in lines.items() if len({x for x, _ in points}) > 1}
    if not lines:
        return None
    fig, ax = figure()
    xs = sorted({x for points in lines.values() for x, _ in points})
    log_axis(ax.xaxis, xs)
    if len(xs) <= 8:
        ax.set_xticks(xs, [f"{x:g}" for x in xs])
        ax.xaxis.set_minor_locator(NullLocator())
    if slopes:
        log_axis(ax.yaxis, [y for points in lines.values() for _, y in points])
        lines = {f"{name} ({_power(points):.2f})": points for name, points in lines.items()}
    labels = _ladders(
        ax, {name: [] for name in lines}, [(n, n, x, y) for n, points in lines.items() for x, y in points]
    )
    ax.margins(x=0.25, y=0.1)
    ax.set_xlabel(x_label, fontsize=9)
    ax.set_ylabel(y_label, fontsize=9)
    label_points(ax, labels)
    return save(fig, path)


def _power(points: Sequence[tuple[float, float]]) -> float:
    """The p of y = c x^p that fits best."""
    x, y = np.log(points).T
    return float(np.polyfit(x, y, 1)[0])


def rate_against_resolution(results: Sequence[SpeedResult], path: Path) -> Path | None:
    """Decoded images/s against resolution, the fitted power beside each name (-2: linear in pixels)."""
    lines: dict[str, list[tuple[float, float]]] = {}
    several = len({(r.hardware, speed.setting(r)) for r in results}) > 1
    for result in results:
        where = f" ({result.hardware}, {speed.setting(result)})" if several else ""
        if stage := result.stages.get("decode"):
            point = (result.resolution, stage.images_per_second)
            lines.setdefault(result.tokenizer.name + where, []).append(point)
    return _curves(lines, "resolution (px)", "decode (img/s)", path, slopes=True)


def quality_against_rate(results: Sequence[SpeedResult], entries: Sequence[ResultEntry], path: Path) -> Path | None:
    """Quality against decoded images/s with the Pareto front (the paper's first figure), for tokenizers that have both.

    Quality comes from evaluation records of the same name and resolution. None without two such tokenizers.
    """
    entries = speed.of_one_place(entries)
    metric = headline_metric(entries)
    quality = {(e.name, e.result.dataset.resolution): number(e.result, metric or "") for e in entries}
    points = []
    for result in results:
        value = quality.get((result.tokenizer.name, result.resolution))
        if value is not None and (stage := result.stages.get("decode")):
            points.append(Point(result.tokenizer.name, result.tokenizer.family, stage.images_per_second, value))
    if metric is None or len(points) < 2:
        return None
    return save(scatter(points, "decode (img/s)", "higher", metric_column(metric)), path)


def against_steps(entries: Sequence[ResultEntry], metric: str, path: Path) -> Path | None:
    """A metric against decode steps, a line per set of weights. None unless some ran with two numbers of steps."""
    lines: dict[str, list[tuple[float, float]]] = {}
    names: dict[str, str] = {}
    for entry in sorted(entries, key=lambda e: len(e.name)):
        info, value = entry.result.tokenizer, number(entry.result, metric)
        if info.decode_steps and info.weights and value is not None:
            name = names.setdefault(info.weights, info.name)
            lines.setdefault(name, []).append((info.decode_steps, value))
    return _curves(lines, "decode steps", axis_label(metric_column(metric)), path)


def against_resolution(entries: Sequence[ResultEntry], metric: str, path: Path) -> Path | None:
    """A metric against resolution on the same data and protocol, a line per tokenizer. None without two resolutions."""
    lines: dict[str, list[tuple[float, float]]] = {}
    entries = [entry for entry in entries if number(entry.result, metric) is not None]
    places = {place_of(entry) for entry in entries}
    for entry in entries:
        data, value = entry.result.dataset, number(entry.result, metric)
        square = isinstance(data.resolution, int)
        if square and value is not None and entry.result.tokenizer.family not in UNRANKED_FAMILIES:
            where = f" ({', '.join(place_of(entry))})" if len(places) > 1 else ""
            lines.setdefault(entry.name + where, []).append((float(data.resolution), value))
    return _curves(lines, "resolution (px)", axis_label(metric_column(metric)), path)


def ecdf(entries: Sequence[ResultEntry], metric: str, path: Path, most: int = 7) -> Path | None:
    """Share of images at or below each value, for up to `most` rows. None without two that have per-image values."""
    column = metric_column(metric)
    name = column.per_image or ""
    ranked = [entry for entry in entries if entry.result.tokenizer.family not in UNRANKED_FAMILIES]
    values = {e.name: e.rows[1][name] for e in _spread(ranked, most) if name in e.rows[1]}
    if len(values) < 2:
        return None
    fig, ax = figure()
    ax.set_ylim(0, 1)
    labels = []
    for index, ((name, x), (colour, _)) in enumerate(zip(values.items(), styles(values).values(), strict=True)):
        ax.ecdf(x, color=colour, lw=1.4)
        share = 0.2 + 0.6 * index / max(1, len(values) - 1)  # labels at different heights, where the curves part
        labels.append(Point(name, name, float(np.quantile(x, share)), share))
    ax.set_xlabel(axis_label(column).rstrip(" ←→") + {"higher": " →", "lower": " ←"}.get(column.better, ""), fontsize=9)
    ax.set_ylabel("share of images", fontsize=9)
    label_points(ax, labels, colours={name: colour for name, (colour, _) in styles(values).items()})
    return save(fig, path)


def _spread(entries: Sequence[Item], most: int) -> Sequence[Item]:
    """At most so many, evenly over the list."""
    if len(entries) <= most:
        return entries
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]


def rfid_vs_gfid(entries: Sequence[ResultEntry], reported: Sequence[Reported], path: Path) -> Path | None:
    """Reconstruction against generation: measured rows filled and named, rows of papers hollow behind them."""
    rfid = {(e.name, e.result.dataset.resolution): v for e in entries if (v := number(e.result, "rfid")) is not None}
    measured = [
        Point(e.name, e.result.tokenizer.family, rfid[key], g)
        for e in entries
        if (g := number(e.result, "gfid")) is not None and (key := (e.name, e.result.dataset.resolution)) in rfid
    ]
    papers = [(r.metrics["rfid"], r.metrics["gfid"]) for r in reported if r.metrics["rfid"] and r.metrics["gfid"]]
    if len(measured) + len(papers) < 2:
        return None
    fig, ax = figure()
    log_axis(ax.xaxis, [p.x for p in measured] + [float(x) for x, _ in papers if x])
    log_axis(ax.yaxis, [p.y for p in measured] + [float(y) for _, y in papers if y])
    xs, ys = [x for x, _ in papers], [y for _, y in papers]
    ax.scatter(xs, ys, s=22, facecolors="none", edgecolors="0.5", linewidths=0.8, zorder=2)
    for point, (colour, marker) in zip(measured, styles(p.name for p in measured).values(), strict=False):
        ax.scatter([point.x], [point.y], s=30, color=colour, marker=marker, zorder=3)
    if papers:
        mark = Line2D([], [], ls="", marker="o", mfc="none", mec="0.5", label="reported in papers, generators differ")
        ax.legend(handles=[mark], fontsize=7.5, frameon=False, loc="best")
    ax.set_xlabel("rfid ←", fontsize=9)
    ax.set_ylabel("gfid ←", fontsize=9)
    label_points(ax, measured)
    return save(fig, path)


NOT_LOSSES = ("step", "images", "seconds", "rate", "images_per_second", "lr", "time")


def training_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path | None:
    """Losses and held-out scores against steps, a panel each, a line per run's log. None without a log of two steps."""
    logs = {name: [r for r in records if _finite(r.get("step"))] for name, records in runs.items()}
    logs = {name: records for name, records in logs.items() if len(records) > 1}
    values = {key: None for records in logs.values() for record in records for key, v in record.items() if _finite(v)}
    keys = [key for key in values if key not in NOT_LOSSES]
    if not keys:
        return None
    width = min(3, len(keys))
    fig = Figure(figsize=(2.4 * width, 1.9 * math.ceil(len(keys) / width)), layout="constrained", dpi=200)
    for place, key in enumerate(keys, 1):
        ax = fig.add_subplot(math.ceil(len(keys) / width), width, place)
        for name, (colour, _) in styles(logs).items():
            line = [(record["step"], record[key]) for record in logs[name] if _finite(record.get(key))]
            ax.plot([s for s, _ in line], [v for _, v in line], color=colour, lw=1, label=name)
        ax.set_title(key, fontsize=8)
        ax.set_xlabel("step", fontsize=7)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    fig.legend(*fig.axes[0].get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside lower center", ncols=3)
    return save(fig, path)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
