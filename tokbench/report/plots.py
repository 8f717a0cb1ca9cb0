"""Figures from result records: readable at column width, colour-blind-safe, labels that do not overlap."""

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, NullFormatter

from tokbench.errors import InputError
from tokbench.records.files import write_whole
from tokbench.report.columns import Column, ResultEntry, headline_metric, metric_column, milliseconds, number
from tokbench.report.leaderboard import UNRANKED_FAMILIES
from tokbench.report.tables import shortened

# Okabe and Ito (2008): told apart with any common colour blindness; yellow left out, too light on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH, HEIGHT = 4.6, 3.2  # inches: a column of a two-column paper is 3.3, of a page 5 to 6


@dataclass(frozen=True)
class Point:
    name: str
    family: str
    x: float
    y: float


def figure() -> tuple[Figure, Axes]:
    fig = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", dpi=200)
    ax = fig.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)
    return fig, ax


def save(fig: Figure, path: Path) -> Path:
    """Write png, svg or pdf by the suffix, the same bytes for the same data. InputError where it cannot be written."""
    kind = path.suffix.lstrip(".")
    stamp = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}
    if kind not in stamp:
        raise InputError(f"{path}: plots are written as png, svg or pdf")
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "tokbench"}):
        fig.savefig(buffer, format=kind, metadata=stamp[kind])
    write_whole(path, buffer.getvalue())
    return path


def styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{name: (colour, marker)} in order of first appearance; past seven the marker changes with the colour."""
    return {name: (PALETTE[i % 7], MARKERS[(i + i // 7) % 7]) for i, name in enumerate(dict.fromkeys(names))}


def label_points(
    ax: Axes, points: Sequence[Point], size: float = 7.5, colours: Mapping[str, str] | None = None
) -> None:
    """Write each name beside its point, in the first place around it that no point and no earlier label takes.

    Call it last: places are found in pixels, under the axes' final limits. A label that finds no free place is left out
    rather than set over another.
    """
    fig = ax.figure
    assert isinstance(fig, Figure)
    fig.draw_without_rendering()
    fig.set_layout_engine("none")  # what follows stays inside the axes: keep the layout just found
    dots = ax.transData.transform([(p.x, p.y) for p in points]) if points else np.empty((0, 2))
    scale = fig.dpi / 72
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in dots]
    frame = ax.get_window_extent()
    for point, (x, y) in zip(points, dots, strict=True):
        name = shortened(point.name, 26)
        wide, high = len(name) * size * 0.6 * scale, size * 1.15 * scale
        for distance, (dx, dy) in itertools.product((6, 14, 24, 36), _AROUND):
            left = x + dx * distance * scale - (wide if dx < 0 else wide / 2 if dx == 0 else 0)
            low = y + dy * distance * scale - high / 2
            box = (left, low, left + wide, low + high)
            inside = box[0] >= frame.x0 and box[2] <= frame.x1 and box[1] >= frame.y0 and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                place = ((left - x) / scale, (low + high / 2 - y) / scale)
                line = {"arrowstyle": "-", "color": "0.6", "lw": 0.5} if distance > 6 else None
                ax.annotate(
                    name, (point.x, point.y), place, textcoords="offset points", fontsize=size, va="center",
                    bbox=_BEHIND, arrowprops=line, color=(colours or {}).get(point.name, "black"),
                )  # fmt: skip
                taken.append(box)
                break


def label_levels(ax: Axes, levels: Sequence[tuple[float, str]], size: float = 7) -> None:
    """Names of horizontal lines (y, name), beside the right edge, pushed apart where they would touch."""
    fig = ax.figure
    assert isinstance(fig, Figure)
    fig.draw_without_rendering()
    gap, last = size * 1.3 * fig.dpi / 72, -np.inf
    frame = ax.get_window_extent()
    for y, name in sorted(levels):
        pixel = float(ax.transData.transform((1, y))[1])
        last = max(pixel, last + gap)
        line = {"arrowstyle": "-", "color": "0.6", "lw": 0.5, "shrinkA": 0, "shrinkB": 0}
        place = (1.03, (last - frame.y0) / frame.height)
        ax.annotate(
            name, (1, (pixel - frame.y0) / frame.height), place, "axes fraction", fontsize=size, va="center",
            arrowprops=line, annotation_clip=False,
        )  # fmt: skip


_BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.3}
_AROUND = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def pareto(points: Sequence[Point], better_x: str, better_y: str) -> list[Point]:
    """The points that no other beats in both directions, in order of x."""
    flip_x, flip_y = (1 if better == "lower" else -1 for better in (better_x, better_y))
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (flip_x * p.x, flip_y * p.y)):
        if not front or flip_y * point.y < flip_y * front[-1].y:
            front.append(point)
    return sorted(front, key=lambda p: p.x)


def axis_label(column: Column) -> str:
    return (
        column.key
        + (f" ({column.unit})" if column.unit else "")
        + {"higher": " →", "lower": " ←", "neither": ""}[column.better]
    )


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def log_axis(axis: Any, values: Sequence[float]) -> None:
    """A log scale with plain numbers where they span little, powers of ten where they span much."""
    axis.axes.set_xscale("log") if axis.axis_name == "x" else axis.axes.set_yscale("log")
    span = max(values) / min(values) if values else 1
    axis.set_major_formatter(FuncFormatter(_plain) if span < 1e5 else LogFormatterSciNotation())
    axis.set_minor_formatter(FuncFormatter(_plain) if span < 8 else NullFormatter())
    axis.set_tick_params(which="both", labelsize=8)


def quality_vs_time(entries: Sequence[ResultEntry], path: Path) -> Path | None:
    """Quality against decoding time per image, with the Pareto front. None (nothing written) without two such rows."""
    metric = headline_metric(entries)
    points = []
    for entry in entries:
        time, quality = milliseconds(entry.result, "decode"), number(entry.result, metric or "")
        ranked = entry.result.tokenizer.family not in UNRANKED_FAMILIES
        if ranked and time is not None and time.value and quality is not None:
            points.append(Point(entry.name, entry.result.tokenizer.family, time.value, quality))
    if metric is None or len(points) < 2:
        return None
    return save(scatter(points, "decode (ms/img)", "lower", metric_column(metric)), path)


def scatter(points: Sequence[Point], x_label: str, better_x: str, y: Column) -> Figure:
    """Points by family over a log axis, a direct label at each, and the Pareto front as a step line where both axes
    have a direction."""
    fig, ax = figure()
    log_axis(ax.xaxis, [p.x for p in points])
    front = [] if "neither" in (better_x, y.better) else pareto(points, better_x, y.better)
    if front:
        where: Literal["post", "pre"] = "post" if better_x == "lower" else "pre"
        ax.step([p.x for p in front], [p.y for p in front], where=where, color="0.6", lw=1, zorder=1)
    for family, (colour, marker) in styles(p.family for p in points).items():
        members = [p for p in points if p.family == family]
        ax.scatter([p.x for p in members], [p.y for p in members], s=28, color=colour, marker=marker, zorder=3)
    ax.margins(0.12)
    ax.set_xlabel(x_label, fontsize=9)
    ax.set_ylabel(axis_label(y), fontsize=9)
    label_points(ax, sorted(points, key=lambda p: p not in front))
    return fig
