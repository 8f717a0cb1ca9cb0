"""The one table of tokbench, and its writers: terminal, Markdown, LaTeX, the page's JSON."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from tokbench.errors import InputError
from tokbench.runtime.terminal import stdout_console

WIDTH = 100  # characters of a table that does not go to a terminal
SHORTEST = 20  # characters of a name that are left at least
FOLDED = 16  # characters that a column of words needs at least: it folds
ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}
STYLES = {1: "bold", 2: "underline"}  # by rank, in a terminal
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
    title: str, headings: Sequence[Heading], rows: Iterable[Sequence[str | TableCell]], notes: Sequence[str] = (),
    styles: Sequence[str] = (),
) -> Table:  # fmt: skip
    """An unranked table of texts or cells; the first of each row is its name."""
    keys = [heading.key for heading in headings[1:]]
    made = []
    for i, (name, *texts) in enumerate(rows):
        cells = [text if isinstance(text, TableCell) else TableCell(text) for text in texts]
        made.append(TableRow(str(name), dict(zip(keys, cells, strict=True)), styles[i] if styles else ""))
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


def shortened(name: str, limit: int) -> str:
    """A row's name, shortened in its middle so that what tells rows apart (prefix and settings) stays."""
    return name if len(name) <= limit else f"{name[: limit - 13]}…{name[-12:]}"


def show(tables: Sequence[Table], width: int = WIDTH) -> None:
    """Print to stdout: as wide as the terminal, or `width` characters where there is none."""
    print_tables(stdout_console(width), tables)


def laid_out(tables: Sequence[Table], width: int = WIDTH) -> str:
    """What `show` prints, as text without styles."""
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        print_tables(console, tables)
    return capture.get()


def print_tables(console: Console, tables: Sequence[Table]) -> None:
    """Print within the console's width; where it shows no styles (a file, a pipe), a star marks best values."""
    styled = console.is_terminal
    for table in tables:
        shown, errors, limit = _fitting(table, console.width)
        hidden = [c.key for c in table.columns if c not in shown]
        hidden += ["±"] if not errors and any(c.error for row in table.rows for c in row.cells.values()) else []
        rest = f"hidden, {console.width} characters are too few (COLUMNS, report --columns): {', '.join(hidden)}"
        notes = [*table.notes, *([rest] if hidden else [])]
        if not errors:
            notes = [note.replace(f"{ERRORS} · ", "") for note in notes]
        if not styled:
            notes = [note.replace(MARKS, UNSTYLED_MARKS) for note in notes]
        console.print(
            _terminal(table, shown, errors, styled, limit), *(Text(note, style="dim") for note in notes), "", sep="\n"
        )


def _terminal(table: Table, columns: Sequence[Heading], errors: bool, styled: bool, limit: int) -> RichTable:
    """A rich table with these columns, ± beside the values if `errors`, names of at most `limit` characters."""
    made = RichTable(title=Text(table.title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0),
                     pad_edge=False)  # fmt: skip
    units = any(c.unit for c in columns)
    made.add_column(Text(table.names + ("\n" if units else "")), no_wrap=True)
    for c in columns:
        label = Text(c.label + (f"\n{c.unit}" if units else ""))
        made.add_column(label, justify="left" if c.words else "right", no_wrap=not c.words, overflow="fold")
    lines = zip(*(_aligned(table, c, errors, styled) for c in columns), strict=True)
    for heading, rows in table.groups:
        if heading:
            made.add_row(Text(heading, style="dim"))
        for row in rows:
            texts = [
                Text(value, STYLES.get(row.cells[c.key].rank, "")).append(rest, "not bold not underline dim")
                for c, (value, rest) in zip(columns, next(lines), strict=True)
            ]
            made.add_row(Text(("  " if heading else "") + shortened(row.name, limit)), *texts, style=row.style or None)
    return made


def _fitting(table: Table, width: int) -> tuple[list[Heading], bool, int]:
    """The columns that fit into `width` characters, whether ± does, and how long names may be: cut at the very last."""
    longest = max((len(row.name) for row in table.rows), default=0)
    everything = list(table.columns)
    major = [c for c in everything if not c.minor]
    for columns, errors in ((everything, True), (major, True), (everything, False)):
        if _width(table, columns, errors) <= width:
            return columns, errors, longest
    numbers = [c for c in major if not c.words]
    while len(major) > 1 and numbers and _width(table, major, False) > width:
        major.remove(numbers.pop())
    return major, False, max(SHORTEST, longest - max(0, _width(table, major, False) - width))


def _width(table: Table, columns: Sequence[Heading], errors: bool) -> int:
    indent = 2 if len(table.groups) > 1 else 0
    total = max([len(table.names), *(indent + len(row.name) for row in table.rows)])
    for c in columns:
        needed = max((len(value + rest) for value, rest in _aligned(table, c, errors, False)), default=0)
        total += 2 + max(len(c.label), len(c.unit), min(needed, FOLDED) if c.words else needed)
    return total


def _aligned(table: Table, column: Heading, errors: bool, styled: bool) -> list[tuple[str, str]]:
    """Of each row the value, and its marks and ± in as much room as those of the others take."""
    cells = [row.cells[column.key] for row in table.rows]
    marks = [("*" if cell.rank == 1 and not styled else "") + ("†" if cell.dagger else "") for cell in cells]
    room, spread = (max(map(len, texts), default=0) for texts in (marks, [cell.error for cell in cells]))
    behind = [f" {cell.error:>{spread}}" if errors and spread else "" for cell in cells]
    return [(cell.text, mark.ljust(room) + error) for cell, mark, error in zip(cells, marks, behind, strict=True)]


@dataclass(frozen=True)
class Markup:
    """How a markup language writes the parts of a table's row."""

    escape: Callable[[str], str]
    best: str
    second: str
    error: str
    heading: str  # of a group
    between: str
    row: str

    def line(self, texts: Iterable[str]) -> str:
        return self.row % self.between.join(texts)

    def cell(self, cell: TableCell) -> str:
        text = {1: self.best, 2: self.second}.get(cell.rank, "%s") % self.escape(cell.text)
        error = cell.error.replace("±", self.escape("±"))  # the rest are numbers
        return text + (self.escape("†") if cell.dagger else "") + (self.error % error if error else "")

    def body(self, table: Table) -> Iterator[str]:
        """The lines of all rows, each group's below its heading."""
        for heading, rows in table.groups:
            if heading:
                yield self.line([self.heading % self.escape(heading), *[""] * len(table.columns)])
            for row in rows:
                yield self.line([self.escape(row.name), *(self.cell(row.cells[c.key]) for c in table.columns)])


def markdown(table: Table, level: int = 2) -> str:
    """GitHub Markdown: bold best, <ins>second</ins>; nothing in a name can open a tag or a cell."""
    heads = [markdown_escape(c.label + (f" ({c.unit})" if c.unit else "")) for c in table.columns]
    lines = [f"{'#' * level} {markdown_escape(table.title)}", ""] if table.title else []
    lines += [MARKDOWN.line([table.names, *heads])]
    lines += [MARKDOWN.line(["---", *(":--" if c.words else "--:" for c in table.columns)]), *MARKDOWN.body(table)]
    notes = "<br>\n".join(f"<sub>{markdown_escape(note)}</sub>" for note in table.notes)
    return "\n".join([*lines, *(["", notes] if notes else []), ""])


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


MARKDOWN = Markup(markdown_escape, "**%s**", "<ins>%s</ins>", " <sub>%s</sub>", "*%s*", " | ", "| %s |")
LATEX = Markup(
    latex_escape, r"\textbf{%s}", r"\underline{%s}", r" {\scriptsize %s}", r"\addlinespace\textit{%s}", " & ", r"%s \\"
)


def latex(table: Table) -> str:
    """A booktabs table (LATEX_PACKAGES), shrunk to the line if it is wider; best bold, second underlined."""
    align = "l" + "".join("l" if c.words else "r" for c in table.columns)
    head = [LATEX.line(map(latex_escape, (table.names, *(c.label for c in table.columns))))]
    if any(c.unit for c in table.columns):
        head.append(LATEX.line(["", *(latex_escape(c.unit and f"({c.unit})") for c in table.columns)]))
    caption = latex_escape(". ".join((table.title, *table.notes)) + ".")
    start = [r"\begin{table}[t]", r"\centering\small\setlength{\tabcolsep}{4pt}", LATEX_SHRINK]
    start += [rf"\begin{{tabular}}{{{align}}}", r"\toprule", *head, r"\midrule"]
    end = [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{caption}}}", r"\end{table}", ""]
    return "\n".join([*start, *LATEX.body(table), *end])


def for_page(table: Table) -> dict[str, Any]:
    """What page.js draws, as JSON."""
    rows = []
    for heading, members in table.groups:
        for row in members:
            cells = [[c.text, c.error, c.rank, int(c.dagger), c.value, c.note] for c in row.cells.values()]
            rows.append({"name": row.name, "group": heading, "cells": cells})
    columns = [{name: getattr(c, name) for name in ("key", "unit", "better", "description")} for c in table.columns]
    return {"title": table.title, "names": table.names, "notes": list(table.notes), "columns": columns, "rows": rows}
