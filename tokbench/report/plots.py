"""How figures are drawn: readable at column width, colour-blind-safe, labels that do not overlap."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from tokbench.errors import InputError
from tokbench.records.files import write_whole
from tokbench.report.columns import FACTS, Column, ResultEntry, headline_metric, metric_column, number
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


def label_points(ax: Axes, points: Sequence[Point]) -> None:
    """Write each name beside its point, towards the middle; one that would cover a point or a label is left out.

    Call it last: what overlaps is told in pixels, under the axes' final limits.
    """
    assert isinstance(ax.figure, Figure)
    ax.figure.draw_without_rendering()
    centre, dots = ax.bbox.x0 + ax.bbox.width / 2, [ax.transData.transform((p.x, p.y)) for p in points]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in dots]
    for point, (x, _) in zip(points, dots, strict=True):
        side, shift = ("right", -5) if x > centre else ("left", 5)
        text = ax.annotate(shortened(point.name, 26), (point.x, point.y), (shift, 3), textcoords="offset points",
                           ha=side, fontsize=7.5)  # fmt: skip
        if (box := text.get_window_extent()).count_overlaps(taken):
            text.remove()
        else:
            taken.append(box)


def pareto(points: Sequence[Point], better_x: str, better_y: str) -> list[Point]:
    """The points that no other beats in both directions, in order of x."""
    flip_x, flip_y = (1 if better == "lower" else -1 for better in (better_x, better_y))
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (flip_x * p.x, flip_y * p.y)):
        if not front or flip_y * point.y < flip_y * front[-1].y:
            front.append(point)
    return sorted(front, key=lambda p: p.x)


def axis_label(column: Column) -> str:
    arrow = {"higher": " →", "lower": " ←", "neither": ""}[column.better]
    return column.key + (f" ({column.unit})" if column.unit else "") + arrow


def log_axis(axis: Any, values: Sequence[float]) -> None:
    """A log scale with plain numbers where they span little, powers of ten where they span much."""
    axis.axes.set_xscale("log") if axis.axis_name == "x" else axis.axes.set_yscale("log")
    span, plain = max(values) / min(values), FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(plain if span < 1e5 else LogFormatterSciNotation())
    axis.set_minor_formatter(plain if span < 4 else NullFormatter())
    axis.set_tick_params(which="both", labelsize=8)
    if len(places := sorted(set(values))) <= 8 and all(float(value).is_integer() for value in places):
        axis.set_ticks(places)
        axis.set_minor_locator(NullLocator())


def scatter(
    points: Sequence[Point], x_label: str, better_x: str, y: Column, behind: Sequence[tuple[float, float]] = ()
) -> Figure:
    """Points by family over a log axis, names beside them, a step line along the Pareto front where both axes have a
    direction; hollow and unnamed ones `behind`."""
    fig, ax = figure()
    log_axis(ax.xaxis, [*(p.x for p in points), *(x for x, _ in behind)])
    front = [] if "neither" in (better_x, y.better) else pareto(points, better_x, y.better)
    where: Literal["post", "pre"] = "post" if better_x == "lower" else "pre"
    ax.step([p.x for p in front], [p.y for p in front], where=where, color="0.6", lw=1, zorder=1)
    ax.scatter([x for x, _ in behind], [y for _, y in behind], s=22, facecolors="none", edgecolors="0.5", lw=0.8)
    for family, (colour, marker) in styles(p.family for p in points).items():
        members = [p for p in points if p.family == family]
        ax.scatter([p.x for p in members], [p.y for p in members], s=28, color=colour, marker=marker, zorder=3)
    ax.margins(0.12)
    ax.set_xlabel(x_label, fontsize=9)
    ax.set_ylabel(axis_label(y), fontsize=9)
    label_points(ax, sorted(points, key=lambda p: p not in front))
    return fig


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, path: Path,
    levels: Mapping[str, float] | None = None, log: bool = True, log_y: bool = False, legend: bool = False,
) -> Path | None:  # fmt: skip
    """Lines of points over a log or plain axis, dashed ones at the `levels`; None without two places on it.

    Names stand at the lines' ends, as far as there is room, or in a legend beside them.
    """
    xs = [x for points in lines.values() for x, _ in points]
    if len(set(xs)) < 2:
        return None
    fig, ax = figure()
    if log:
        log_axis(ax.xaxis, xs)
    if log_y:
        log_axis(ax.yaxis, [y for points in lines.values() for _, y in points])
    ends = []
    for (name, points), (colour, marker) in zip(lines.items(), styles(lines).values(), strict=True):
        line = sorted(points)
        ax.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=4.5, lw=1.2, zorder=3,
                label=shortened(name, 26))  # fmt: skip
        ends.append(Point(name, "", *line[-1]))
    for name, level in (levels or {}).items():
        ax.axhline(level, color="0.55", lw=0.8, ls=(0, (4, 3)), zorder=1)
        ends.append(Point(name, "", max(xs), level))
    ax.margins(x=0.2, y=0.1)
    ax.set_xlabel(x_label, fontsize=9)
    ax.set_ylabel(y_label, fontsize=9)
    if legend:
        ax.margins(x=0.05)
        fig.legend(fontsize=7, frameon=False, loc="outside right center")
    else:
        label_points(ax, ends)
    return save(fig, path)


def quality_against(fact: str, metric: str, entries: Sequence[ResultEntry], path: Path) -> Path | None:
    """A metric against a fact of the rows, with the Pareto front. None (nothing written) without two places on it."""
    x, points = FACTS[fact], []
    for entry in entries:
        place, quality = number(entry.result, fact), number(entry.result, metric)
        if entry.result.tokenizer.family not in UNRANKED_FAMILIES and place and quality is not None:
            points.append(Point(entry.name, entry.result.tokenizer.family, place, quality))
    if len({point.x for point in points}) < 2:
        return None
    return save(
        scatter(points, x.description + (f" ({x.unit})" if x.unit else ""), x.better, metric_column(metric)), path
    )


def quality_vs_time(entries: Sequence[ResultEntry], path: Path) -> Path | None:
    """The headline metric against decoding time per image."""
    metric = headline_metric(entries)
    return None if metric is None else quality_against("decode", metric, entries, path)
