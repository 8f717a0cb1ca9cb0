"""`tokbench report`: read a folder of results, write tables, plots or the page."""

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tokbench.errors import InputError
from tokbench.records.files import write_whole
from tokbench.records.result import SpeedResult
from tokbench.report import tables
from tokbench.report.collect import frame, gather, where
from tokbench.report.columns import ResultEntry, column
from tokbench.report.leaderboard import blocks
from tokbench.report.reported import (
    COMPARISON_HEADS,
    REPORTED_HEADS,
    Reported,
    compare,
    comparison_cells,
    ordered,
    read_reported,
    reported_cells,
)
from tokbench.report.speed import speed_markdown, speed_table
from tokbench.runtime.terminal import stdout_console

FORMATS = ("table", "markdown", "latex", "csv", "html")


@dataclass(frozen=True)
class ReportOptions:
    """What `tokbench report` was asked for."""

    results: Path
    format: str = "table"
    out: Path | None = None
    plots: Path | None = None
    plot_format: str = "png"
    columns: tuple[str, ...] | None = None
    where: str | None = None
    group: bool = True
    reported: Path | None = None  # default: reported.csv in the results folder, if it is there
    strict: bool = False


@dataclass(frozen=True)
class Report:
    """What every format draws from."""

    entries: list[ResultEntry]
    speeds: list[SpeedResult]
    reported: list[Reported]


def build(options: ReportOptions) -> int:
    """Write what was asked for; 1 with `strict` if a file had to be skipped, else 0. InputError for wrong use."""
    if options.format not in FORMATS:
        raise InputError(f"--format {options.format!r}: choose from {', '.join(FORMATS)}")
    if options.format == "html" and options.out is None:
        raise InputError("--format html writes a folder: say where with --out DIR")
    entries, speeds, warnings = gather(options.results)
    for warning in warnings:
        print(f"tokbench: {warning}", file=sys.stderr)
    if options.where is not None and entries:
        entries = where(entries, options.where)
        speeds = [row for row in speeds if row.tokenizer.name in {entry.name for entry in entries}]
    for key in options.columns or ():
        if key != "tokenizer":
            column(key, entries)
    reported_path = options.reported or options.results / "reported.csv"
    reported = ordered(read_reported(reported_path)) if options.reported or reported_path.exists() else []
    report = Report(entries, speeds, reported)
    if options.plots is not None:
        from tokbench.report.curves import all_plots

        logs = sorted(options.results.rglob("log.jsonl"))
        for path in all_plots(entries, speeds, reported, options.plots, options.plot_format, logs):
            print(f"tokbench: wrote {path}", file=sys.stderr)
    _write(report, options)
    return 1 if options.strict and warnings else 0


def _write(report: Report, options: ReportOptions) -> None:
    if options.format == "html":
        from tokbench.report.html import write_page

        assert options.out is not None
        index = write_page(report.entries, report.speeds, report.reported, options.out, options.columns, options.group)
        print(f"tokbench: wrote {index}", file=sys.stderr)
    elif options.format == "table" and options.out is None:
        console = stdout_console(tables.WIDTH)
        console.print(_leaderboard(report, options))
        if report.speeds:
            console.print(speed_table(report.speeds, entries=report.entries))
        if comparisons := compare(report.reported, report.entries):
            console.print(
                tables.plain_table("paper against ours", COMPARISON_HEADS, map(comparison_cells, comparisons))
            )
    elif options.out is None:
        sys.stdout.write(text(report, options))
    else:
        write_whole(options.out, text(report, options))


def _leaderboard(report: Report, options: ReportOptions) -> tables.Leaderboard:
    return tables.Leaderboard(tuple(blocks(report.entries, options.columns, options.group)))


def text(report: Report, options: ReportOptions) -> str:
    """The report as text in the format asked for: measured blocks, paper against ours, reported numbers."""
    if options.format == "csv":
        table = frame(report.entries)
        kept = ["tokenizer", "protocol", "dataset", "resolution", "num_images", *(options.columns or ())]
        chosen = list(dict.fromkeys(kept)) if options.columns else list(table.columns)
        return table.reindex(columns=chosen).to_csv(index=False, lineterminator="\n")
    if options.format == "table":
        console = Console(width=tables.WIDTH, color_system=None)
        with console.capture() as capture:
            console.print(_leaderboard(report, options))
        return capture.get()
    measured = blocks(report.entries, options.columns, options.group)
    comparisons = [comparison_cells(row) for row in compare(report.reported, report.entries)]
    published = [reported_cells(row) for row in report.reported]
    if options.format == "latex":
        parts = [tables.latex(block) for block in measured]
        if comparisons:
            parts.append(tables.plain_latex("Numbers of papers against ours.", COMPARISON_HEADS, comparisons))
        return f"% needs {tables.LATEX_PACKAGES}\n" + "\n".join(parts)
    parts = ["<!-- written by `tokbench report --format markdown`; edit the results instead -->\n"]
    parts += [tables.markdown(block) for block in measured]
    if report.speeds:
        parts.append(speed_markdown(report.speeds, report.entries))
    if comparisons:
        parts.append(tables.plain_markdown("Paper against ours", COMPARISON_HEADS, comparisons))
    if published:
        note = "Not measured here and not ranked: other protocols, often unstated ones."
        parts.append(tables.plain_markdown("Reported in papers", REPORTED_HEADS, published, note))
    return "\n".join(parts)
