"""The one table of tokbench, and its writers: terminal, Markdown, LaTeX, the page's JSON."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from tokbench.errors import InputError
from tokbench.runtime.terminal import stdout_console

WIDTH = 100  # characters of a table that does not go to a terminal
FOLDED = 16  # characters that a column of words needs at least: it folds
ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}
DAGGER = "† the metric's network was part of this model's training loss"
ERRORS = "± standard error over images"
MARKS = "best bold, second underlined, ties by paired 95 % interval"
UNSTYLED_MARKS = "* best, or tied with it by paired 95 % interval"


@dataclass(frozen=True, kw_only=True)
class Heading:
    """What stands above a column."""

    key: str
    unit: str = ""
    better: Literal["higher", "lower", "neither"] = "neither"
    description: str = ""
    words: bool = False  # set left, and folded where there is little room
    minor: bool = False  # says much the same as its neighbour: the first to go where there is no room

    @property
    def label(self) -> str:
        return f"{self.key} {ARROWS[self.better]}".strip()


@dataclass(frozen=True)
class TableCell:
    """`text` and `error` are formatted; rank 1 is best or tied with it, 2 second; `value` is what sorts."""

    text: str
    error: str = ""
    rank: int = 0
    dagger: bool = False
    note: str = ""
    value: float | str | None = None


@dataclass(frozen=True)
class TableRow:
    name: str
    cells: Mapping[str, TableCell]  # by the columns' keys
    style: str = ""  # in a terminal


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    names: str  # what the first column holds: "tokenizer"
    columns: Sequence[Heading]
    groups: Sequence[tuple[str, Sequence[TableRow]]]  # (heading, rows); one group with an empty heading if ungrouped
    notes: Sequence[str] = ()

    @property
    def rows(self) -> list[TableRow]:
        return [row for _, rows in self.groups for row in rows]


def plain(
    title: str, headings: Sequence[Heading], rows: Iterable[Sequence[str]], notes: Sequence[str] = (),
    styles: Sequence[str] = (),
) -> Table:  # fmt: skip
    """A table of texts, unranked; the first of each row is its name."""
    keys = [heading.key for heading in headings[1:]]
    made = [
        TableRow(row[0], dict(zip(keys, map(TableCell, row[1:]), strict=True)), styles[i] if styles else "")
        for i, row in enumerate(rows)
    ]
    return Table(title=title, names=headings[0].key, columns=headings[1:], groups=[("", made)], notes=notes)


def written(rows: Sequence[Mapping[str, Any]], form: str) -> str | None:
    """Rows of one set of keys as markdown, csv or json; as a "table" they are printed. InputError for another form."""
    if form == "json":
        return json.dumps(rows, indent=1)
    texts = [[_plain_text(value) for value in row.values()] for row in rows]
    keys = list(rows[0]) if rows else []
    if form == "csv":
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([keys, *texts])
        return stream.getvalue().rstrip("\n")
    words = [any(isinstance(row[key], str) for row in rows) for key in keys]
    table = plain("", [Heading(key=key, words=is_words) for key, is_words in zip(keys, words, strict=True)], texts)
    if form == "markdown":
        return markdown(table).rstrip("\n")
    if form != "table":
        raise InputError(f'--format "{form}": choose table, markdown, csv or json')
    show([table])
    return None


def _plain_text(value: Any) -> str:
    """Nothing for None, yes or no, at most four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def shortened(name: str, limit: int = 32) -> str:
    """A row's name, shortened in its middle so that what tells rows apart (prefix and settings) stays."""
    return name if len(name) <= limit else f"{name[: limit - 13]}…{name[-12:]}"


def show(tables: Sequence[Table], width: int = WIDTH) -> None:
    """Print to stdout: as wide as the terminal, or `width` characters where there is none."""
    stdout_console(width).print(Printed(tables))


@dataclass(frozen=True)
class Printed:
    """Tables that rich lays out within the console's width.

    Where the console shows no styles (a file, a pipe), best values carry a star instead of bold type.
    """

    tables: Sequence[Table]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        styled = console.is_terminal
        for table in self.tables:
            shown, errors, gap = _fitting(table, options.max_width)
            yield _terminal(table, shown, errors, gap, styled)
            notes = list(table.notes)
            if not errors:
                notes = [note.replace(f"{ERRORS} · ", "") for note in notes]
            if not styled:
                notes = [note.replace(MARKS, UNSTYLED_MARKS) for note in notes]
            hidden = [c.key for c in table.columns if c not in shown]
            hidden += (
                ["±"] if not errors and any(cell.error for row in table.rows for cell in row.cells.values()) else []
            )
            notes += [f"hidden, terminal too narrow: {', '.join(hidden)}"] if hidden else []
            yield from (Text(note, style="dim") for note in notes)
            yield Text("")


def _terminal(table: Table, columns: Sequence[Heading], errors: bool, gap: int, styled: bool) -> RichTable:
    """A rich table with these columns, ± beside the values if `errors`."""
    title = Text(table.title, style="bold")
    made = RichTable(title=title, title_justify="left", box=None, padding=(0, gap, 0, 0), pad_edge=False)
    units = any(c.unit for c in columns)
    made.add_column(Text(table.names + ("\n" if units else "")), no_wrap=True)
    for c in columns:
        label = Text(c.label + (f"\n{c.unit}" if units else ""))
        made.add_column(label, justify="left" if c.words else "right", no_wrap=not c.words, overflow="fold")
    cells = {c.key: [row.cells[c.key] for row in table.rows] for c in columns}
    marks = {key: max((len(_marks(cell, styled)) for cell in column), default=0) for key, column in cells.items()}
    spread = {
        key: max((len(cell.error) for cell in column), default=0) if errors else 0 for key, column in cells.items()
    }
    for heading, rows in table.groups:
        if heading:
            made.add_row(Text(heading, style="dim"))
        for row in rows:
            texts = (_styled(row.cells[c.key], styled, marks[c.key], spread[c.key]) for c in columns)
            made.add_row(Text(("  " if heading else "") + shortened(row.name)), *texts, style=row.style or None)
    return made


def _fitting(table: Table, width: int) -> tuple[list[Heading], bool, int]:
    """The columns that fit into `width` characters, whether ± does, and the blanks between two columns."""
    everything = list(table.columns)
    major = [c for c in everything if not c.minor]
    for columns, errors, gap in ((everything, True, 2), (major, True, 2), (major, True, 1), (everything, False, 2)):
        if _width(table, columns, errors, gap) <= width:
            return columns, errors, gap
    numbers = [c for c in major if not c.words]
    while len(major) > 1 and numbers and _width(table, major, False, 2) > width:
        major.remove(numbers.pop())
    return major, False, 2


def _width(table: Table, columns: Sequence[Heading], errors: bool, gap: int) -> int:
    indent = 2 if len(table.groups) > 1 else 0
    total = max([len(table.names), *(indent + len(shortened(row.name)) for row in table.rows)])
    for c in columns:
        cells = [row.cells[c.key] for row in table.rows]
        room = max((len(_marks(cell, False)) for cell in cells), default=0)
        spread = max((len(cell.error) for cell in cells), default=0) if errors else 0
        needed = max((len(cell.text) + room + (spread + 1 if spread else 0) for cell in cells), default=0)
        total += gap + max(len(c.label), len(c.unit), min(needed, FOLDED) if c.words else needed)
    return total


def _marks(cell: TableCell, styled: bool) -> str:
    return ("*" if cell.rank == 1 and not styled else "") + ("†" if cell.dagger else "")


def _styled(cell: TableCell, styled: bool, marks: int, spread: int) -> Text:
    """A cell with `marks` and `spread` characters for its marks and its ±, so that a column's numbers stay in line."""
    text = Text(cell.text, style={1: "bold", 2: "underline"}.get(cell.rank, ""))
    text.append(_marks(cell, styled).ljust(marks), style="not bold not underline")
    return text.append(f" {cell.error.rjust(spread)}" if spread else "", style="not bold not underline dim")


def _lines(
    table: Table, escape: Callable[[str], str], cell: Callable[[TableCell], str]
) -> list[tuple[str, list[list[str]]]]:
    """Groups of rows of formatted cells, the name first."""
    return [
        (escape(heading), [[escape(row.name), *(cell(row.cells[c.key]) for c in table.columns)] for row in rows])
        for heading, rows in table.groups
    ]


def markdown(table: Table, level: int = 2) -> str:
    """GitHub Markdown: bold best, <ins>second</ins>; nothing in a name can open a tag or a cell."""

    def cell(c: TableCell) -> str:
        text = markdown_escape(c.text)
        text = {1: f"**{text}**", 2: f"<ins>{text}</ins>"}.get(c.rank, text)
        return text + ("†" if c.dagger else "") + (f" <sub>{c.error}</sub>" if c.error else "")

    heads = [markdown_escape(c.label + (f" ({c.unit})" if c.unit else "")) for c in table.columns]
    rule = ["---", *(":--" if c.words else "--:" for c in table.columns)]
    lines = [f"{'#' * level} {markdown_escape(table.title)}", ""] if table.title else []
    lines += [_piped([table.names, *heads]), _piped(rule)]
    for heading, rows in _lines(table, markdown_escape, cell):
        lines += [_piped([f"*{heading}*", *[""] * len(table.columns)])] if heading else []
        lines += [_piped(row) for row in rows]
    notes = "<br>\n".join(f"<sub>{markdown_escape(note)}</sub>" for note in table.notes)
    return "\n".join([*lines, *(["", notes] if notes else []), ""])


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown_escape(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


LATEX_PACKAGES = r"\usepackage[T1]{fontenc}\usepackage[utf8]{inputenc}\usepackage{booktabs}\usepackage{graphicx}"
LATEX_SHRINK = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "†": r"$^\dagger$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "±": r"$\pm$",
    "–": "--",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "…": r"\dots{}",
    '"': "''",
    "|": r"\textbar{}",
    "\n": " ",
}


def latex_escape(text: str) -> str:
    """Text that pdflatex sets as it reads; a character outside Latin-1 that has no command becomes a question mark."""
    return "".join(_LATEX.get(c, c if c.isascii() and c.isprintable() else _accented(c)) for c in text)


def _accented(character: str) -> str:
    return character if character.isprintable() and "\xa1" <= character <= "\xff" and character.isalpha() else "?"


def latex(table: Table) -> str:
    """A booktabs table (LATEX_PACKAGES), shrunk to the line if it is wider; best bold, second underlined."""

    def cell(c: TableCell) -> str:
        text = latex_escape(c.text)
        text = {1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(c.rank, text) + latex_escape(_marks(c, True))
        return text + (rf" {{\scriptsize {latex_escape(c.error)}}}" if c.error else "")

    align = "l" + "".join("l" if c.words else "r" for c in table.columns)
    lines = [[latex_escape(text) for text in (table.names, *(c.label for c in table.columns))]]
    if any(c.unit for c in table.columns):
        lines.append(["", *(latex_escape(c.unit and f"({c.unit})") for c in table.columns)])
    body = [" & ".join(line) + r" \\" for line in lines] + [r"\midrule"]
    for number, (heading, rows) in enumerate(_lines(table, latex_escape, cell)):
        body += [r"\midrule"] if number else []
        body += [rf"\multicolumn{{{len(align)}}}{{l}}{{\textit{{{heading}}}}} \\"] if heading else []
        body += [" & ".join(row) + r" \\" for row in rows]
    start = [r"\begin{table}[t]", r"\centering\small\setlength{\tabcolsep}{4pt}", LATEX_SHRINK]
    start += [rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    caption = latex_escape(". ".join((table.title, *table.notes)) + ".")
    end = [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{caption}}}", r"\end{table}", ""]
    return "\n".join([*start, *body, *end])


def for_page(table: Table) -> dict[str, Any]:
    """What page.js draws, as JSON."""
    return {
        "title": table.title,
        "names": table.names,
        "notes": list(table.notes),
        "columns": [
            {"key": c.key, "unit": c.unit, "better": c.better, "description": c.description} for c in table.columns
        ],
        "rows": [
            {
                "name": row.name,
                "group": heading,
                "cells": [[c.text, c.error, c.rank, int(c.dagger), c.value, c.note] for c in row.cells.values()],
            }
            for heading, rows in table.groups
            for row in rows
        ],
    }
