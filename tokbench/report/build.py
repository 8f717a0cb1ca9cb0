"""`tokbench report`: read a folder of results, write tables, plots or the page."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokbench.errors import InputError
from tokbench.records.files import write_whole
from tokbench.records.result import EvalResult, SpeedResult, Value, to_json
from tokbench.report import tables
from tokbench.report.blind.page import write_blind_page
from tokbench.report.blind.votes import votes_table
from tokbench.report.changes import changes_table
from tokbench.report.collect import frame, gather
from tokbench.report.collect import where as keep_where
from tokbench.report.columns import ResultEntry, column
from tokbench.report.leaderboard import Block, blocks, spread_tables
from tokbench.report.probes.table import probe_tables
from tokbench.report.reported import Reported, papers_table, read_reported, reported_table
from tokbench.report.speed import speed_tables
from tokbench.report.tables import Table

FORMATS = ("table", "markdown", "latex", "csv", "json", "html")


@dataclass(frozen=True)
class Report:
    """What every format draws from."""

    entries: Sequence[ResultEntry]
    speeds: Sequence[SpeedResult] = ()
    reported: Sequence[Reported] = ()
    columns: Sequence[str] | None = None
    group: bool = True
    votes: Sequence[Path] = ()
    reference: str | None = None
    group_by: str | None = None
    against: Path | None = None

    def ranked(self) -> list[Block]:
        return blocks(self.entries, self.columns, self.group)

    def changes(self) -> Table | None:
        """What differs from the results in another folder, if one was named."""
        return None if self.against is None else changes_table(self.entries, self.against)

    def more(self, published: bool) -> list[Table]:
        """What is not ranked: how values spread, if asked; speed, papers against ours; with `published` all that papers
        say, hundreds of rows."""
        if self.reference or self.group_by:
            return spread_tables(self.ranked(), self.columns, self.reference, self.group_by)
        probes = probe_tables(self.entries)
        papers = [papers_table(self.reported, self.entries), reported_table(self.reported) if published else None]
        voted = [votes_table(self.votes, self.entries)] if self.votes else []
        return [
            *voted,
            *probes,
            *speed_tables(self.speeds, entries=self.entries),
            *(table for table in papers if table),
        ]

    def tables(self, published: bool) -> list[Table]:
        changes = self.changes()
        return [*self.ranked(), *([changes] if changes else []), *self.more(published)]


def build(
    results: Sequence[Path], *, format: str = "table", out: Path | None = None, plots: Path | None = None,
    plot_format: str = "png", columns: Sequence[str] | None = None, where: str | None = None, group: bool = True,
    reference: str | None = None, group_by: str | None = None, reported: Path | None = None, strict: bool = False,
    blind: int | None = None, votes: Sequence[Path] = (), against: Path | None = None,
) -> int:  # fmt: skip
    """Write what was asked for; 1 with `strict` if a file had to be skipped, else 0. InputError for wrong use.

    `results` are folders or files, by default runs/ if it is there, else results/. `reported` are numbers of papers, by
    default reported.csv in the first folder. `reference` and `group_by` add how the metrics among `columns` spread over
    images: their differences to a row, and by a column of the data. `where` and `columns` ask for measured rows alone.
    `blind` writes a page of so many comparisons below `out` instead; `votes` are what such pages exported.
    `against` is another folder of results: what changed is a table of its own.
    """
    if format not in FORMATS:
        raise InputError(f"--format {format!r}: choose from {', '.join(FORMATS)}")
    if not results:
        results = [Path("runs") if Path("runs").exists() else Path("results")]
        print(f"tokbench: results of {results[0]}/ (others: --results)", file=sys.stderr)
    entries, speeds, warnings = gather(*results)
    for warning in warnings:
        print(f"tokbench: {warning}", file=sys.stderr)
    papers = reported or results[0] / "reported.csv"
    published = read_reported(papers) if reported or papers.exists() else []
    if where is not None or columns is not None:
        entries, speeds, published = keep_where(entries, where) if where else entries, [], []
    for key in columns or ():
        if key != "tokenizer":
            column(key, entries)
    if plots is not None:
        from tokbench.report.curves import all_plots

        logs = sorted(log for folder in results for log in folder.rglob("log.jsonl"))
        for path in all_plots(entries, speeds, published, plots, plot_format, logs):
            print(f"tokbench: wrote {path}", file=sys.stderr)
    if blind is not None:
        if out is None:
            raise InputError("--blind writes a page: say where with --out DIR")
        print(f"tokbench: wrote {write_blind_page(entries, blind, out)}", file=sys.stderr)
        return 1 if strict and warnings else 0
    _write(Report(entries, speeds, published, columns, group, votes, reference, group_by, against), format, out)
    return 1 if strict and warnings else 0


def _write(report: Report, format: str, out: Path | None) -> None:
    if format == "html":
        from tokbench.report.page.html import write_page

        if out is None:
            raise InputError("--format html writes a page: say where with --out DIR or FILE.html")
        index = write_page(report.ranked(), report.more(published=True), out, report.changes())
        print(f"tokbench: wrote {index}", file=sys.stderr)
    elif out is not None:
        write_whole(out, text(report, format))
    elif format == "table":
        tables.show(report.tables(published=False))
    else:
        sys.stdout.write(text(report, format))


def text(report: Report, format: str) -> str:
    """The report as text in the format asked for: measured blocks, speed, paper against ours, reported numbers."""
    if format == "csv":
        table = frame(report.entries)
        for key in (key for key in report.columns or () if ":" in key):
            table[key] = [v.value if isinstance(v := column(key, report.entries).read(e), Value) else None
                          for e in report.entries]  # fmt: skip
        kept = ["tokenizer", "protocol", "dataset", "resolution", "num_images", *(report.columns or ())]
        chosen = list(dict.fromkeys(kept)) if report.columns else list(table.columns)
        return str(table.reindex(columns=chosen).to_csv(index=False, lineterminator="\n"))
    if format == "json":  # as docs/schema says, records of an older schema too
        results = [entry.result for entry in report.entries]
        records: list[EvalResult | SpeedResult] = [*results, *report.speeds]
        return "[\n" + ",\n".join(to_json(record).rstrip() for record in records) + "\n]\n"
    found = report.tables(published=format == "markdown")
    if format == "table":
        return tables.laid_out(found)
    if format == "latex":
        return f"% needs {tables.LATEX_PACKAGES}\n" + "\n".join(map(tables.latex, found))
    head = "<!-- written by `tokbench report --format markdown`; edit the results instead -->\n"
    return "\n".join([head, *map(tables.markdown, found)])
