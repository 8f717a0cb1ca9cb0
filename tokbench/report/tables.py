"""Blocks as a terminal table, Markdown, LaTeX and CSV."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from tokbench.records.result import EvalResult
from tokbench.report.columns import Column, ResultEntry, clipped
from tokbench.report.leaderboard import ERRORS, MARKS, SECONDARY, Block, Cell, Row, blocks

WIDTH = 100


@dataclass(frozen=True)
class Leaderboard:
    """Blocks that rich lays out within the console's width, at most 100 columns.

    Where the console shows no styles (a file, a pipe), best values carry a star instead of bold type.
    """

    blocks: tuple[Block, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, styled = min(options.max_width, WIDTH), console.is_terminal
        for block in self.blocks:
            shown, errors, gap = fitting(block, width)
            yield terminal(block, shown, errors, gap, styled)
            hidden = [c.key for c in block.columns if c not in shown]
            caption = block.caption if errors else block.caption.replace(f"{ERRORS} · ", "")
            if not styled:
                caption = caption.replace(MARKS, "* best, or tied with it by paired 95 % interval")
            hidden += ["±"] if not errors and ERRORS in block.caption else []
            notes = [caption]
            notes += [*block.footnotes, *([f"hidden, terminal too narrow: {', '.join(hidden)}"] if hidden else [])]
            yield from (Text(note, style="dim") for note in notes)
            yield Text("")


def leaderboard_table(results: Sequence[EvalResult | ResultEntry]) -> Leaderboard:
    """What `tokbench run` prints: one block per protocol, data set and resolution.

    `ResultEntry(result, path)` says where the per-image rows lie, by which ties are found.
    """
    return Leaderboard(
        tuple(blocks([result if isinstance(result, ResultEntry) else ResultEntry(result) for result in results]))
    )


def terminal(block: Block, columns: Sequence[Column], errors: bool, gap: int = 2, styled: bool = True) -> Table:
    """A block as a rich table with these columns, ± beside the values if `errors`."""
    table = Table(
        title=Text(block.title, style="bold"), title_justify="left", box=None, padding=(0, gap, 0, 0), pad_edge=False
    )
    table.add_column(Text("tokenizer\n"), no_wrap=True)
    for column in columns:
        title = Text(f"{column.heading}\n{column.unit}")
        table.add_column(title, justify="left" if column.key == "latent" else "right", no_wrap=True)
    cells = {c.key: [row.cells[c.key] for row in block.rows] for c in columns}
    marks = {key: max(len(_marks(cell, styled)) for cell in column) for key, column in cells.items()}
    spread = {key: max(len(cell.error) for cell in column) if errors else 0 for key, column in cells.items()}
    for heading, rows in block.groups:
        if heading:
            table.add_row(Text(heading, style="dim"))
        for row in rows:
            texts = (_styled(row.cells[c.key], styled, marks[c.key], spread[c.key]) for c in columns)
            table.add_row(Text(("  " if heading else "") + clipped(row.entry.name)), *texts)
    return table


def fitting(block: Block, width: int) -> tuple[list[Column], bool, int]:
    """The columns that fit into `width` characters, whether ± does, and the blanks between two columns."""
    everything = list(block.columns)
    headline = [c for c in everything if c.key not in SECONDARY]
    for columns, errors, gap in (
        (everything, True, 2),
        (headline, True, 2),
        (headline, True, 1),
        (everything, False, 2),
    ):
        if _width(block, columns, errors, gap) <= width:
            return columns, errors, gap
    while len(headline) > 1 and _width(block, headline, False, 2) > width:
        headline.pop()
    return headline, False, 2


def _width(block: Block, columns: Sequence[Column], errors: bool, gap: int) -> int:
    indent = 2 if len(block.groups) > 1 else 0
    total = max([len("tokenizer"), *(indent + len(clipped(row.entry.name)) for row in block.rows)])
    for c in columns:
        cells = [row.cells[c.key] for row in block.rows]
        room = max(len(_marks(cell, False)) for cell in cells)
        spread = max(len(cell.error) for cell in cells) if errors else 0
        texts = [len(cell.text) + room + (spread + 1 if spread else 0) for cell in cells]
        total += gap + max(len(c.heading), len(c.unit), *texts)
    return total


def _marks(cell: Cell, styled: bool) -> str:
    return ("*" if cell.rank == 1 and not styled else "") + ("†" if cell.dagger else "")


def _styled(cell: Cell, styled: bool, marks: int, spread: int) -> Text:
    """A cell with `marks` and `spread` characters for its marks and its ±, so that a column's numbers stay in line."""
    text = Text(cell.text, style={1: "bold", 2: "underline"}.get(cell.rank, ""))
    text.append(_marks(cell, styled).ljust(marks), style="not bold not underline")
    return text.append(f" {cell.error.rjust(spread)}" if spread else "", style="not bold not underline dim")


def _grid(block: Block, name: Callable[[Row], str], cell: Callable[[Cell], str]) -> list[tuple[str, list[list[str]]]]:
    """Groups of rows of formatted cells, the name first."""
    return [
        (heading, [[name(row), *(cell(row.cells[c.key]) for c in block.columns)] for row in rows])
        for heading, rows in block.groups
    ]


def markdown(block: Block, level: int = 2) -> str:
    """A block as GitHub Markdown: bold best, <ins>second</ins>; nothing in a name can open a tag or a cell."""

    def cell(c: Cell) -> str:
        text = markdown_escape(c.text)
        text = {1: f"**{text}**", 2: f"<ins>{text}</ins>"}.get(c.rank, text)
        return text + ("†" if c.dagger else "") + (f" <sub>{c.error}</sub>" if c.error else "")

    heads = [markdown_escape(c.heading + (f" ({c.unit})" if c.unit else "")) for c in block.columns]
    rule = ["---", *(":--" if c.key == "latent" else "--:" for c in block.columns)]
    lines = [f"{'#' * level} {markdown_escape(block.title)}", "", _piped(["tokenizer", *heads]), _piped(rule)]
    for heading, rows in _grid(block, lambda row: markdown_escape(row.entry.name), cell):
        if heading:
            lines.append(_piped([f"*{markdown_escape(heading)}*", *[""] * len(block.columns)]))
        lines += [_piped(row) for row in rows]
    notes = [markdown_escape(note) for note in (block.caption, *block.footnotes)]
    return "\n".join([*lines, "", "<br>\n".join(f"<sub>{note}</sub>" for note in notes), ""])


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


def latex(block: Block) -> str:
    """A block as a booktabs table (LATEX_PACKAGES), shrunk to the line if it is wider; best bold, second underlined."""

    def cell(c: Cell) -> str:
        text = latex_escape(c.text)
        text = {1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(c.rank, text) + latex_escape(_marks(c, True))
        return text + (rf" {{\scriptsize {latex_escape(c.error)}}}" if c.error else "")

    heads = ["tokenizer", *(latex_escape(c.heading) for c in block.columns)]
    units = ["", *(latex_escape(c.unit and f"({c.unit})") for c in block.columns)]
    align = "l" + "".join("l" if c.key == "latent" else "r" for c in block.columns)
    lines = [" & ".join(heads) + r" \\", " & ".join(units) + r" \\", r"\midrule"]
    for number, (heading, rows) in enumerate(_grid(block, lambda row: latex_escape(row.entry.name), cell)):
        lines += [r"\midrule"] if number else []
        lines += [rf"\multicolumn{{{len(align)}}}{{l}}{{\textit{{{latex_escape(heading)}}}}} \\"] if heading else []
        lines += [" & ".join(row) + r" \\" for row in rows]
    return _latex_table(align, lines, ". ".join((block.title, block.caption, *block.footnotes)) + ".")


def _latex_table(align: str, lines: Sequence[str], caption: str) -> str:
    start = [r"\begin{table}[t]", r"\centering\small\setlength{\tabcolsep}{4pt}", LATEX_SHRINK]
    end = [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{latex_escape(caption)}}}", r"\end{table}", ""]
    return "\n".join([*start, rf"\begin{{tabular}}{{{align}}}", r"\toprule", *lines, *end])


def plain_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Unranked text cells for the terminal, wrapped where they are long."""
    table = Table(*heads, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def plain_markdown(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    lines = [f"## {title}", "", *([note, ""] if note else []), _piped(heads), _piped(["---"] * len(heads))]
    return "\n".join([*lines, *(_piped([markdown_escape(cell) for cell in row]) for row in rows), ""])


def plain_latex(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [" & ".join(map(latex_escape, row)) + r" \\" for row in rows]
    return _latex_table("l" * len(heads), [" & ".join(map(latex_escape, heads)) + r" \\", r"\midrule", *body], caption)
