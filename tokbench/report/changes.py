"""What changed between two folders of results: the same tokenizers under the same conditions, then and now."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokbench.metrics import METRICS
from tokbench.metrics.statistics import paired
from tokbench.records.result import Value
from tokbench.report.collect import gather
from tokbench.report.columns import Column, ResultEntry, conditions, metric_column, paired_columns
from tokbench.report.leaderboard import blocks
from tokbench.report.tables import Heading, Table, TableCell, TableRow

HEADINGS = [
    Heading(key="metric", words=True),
    Heading(key="then"),
    Heading(key="now"),
    Heading(key="change"),
    Heading(key="verdict", words=True, description="by the paired 95 % interval over images"),
]


def changes_table(entries: Sequence[ResultEntry], against: Path) -> Table:
    """One row per tokenizer and metric whose number is written otherwise than in the folder `against`.

    InputError where that holds no results.
    """
    earlier = {(conditions(entry.result), entry.name): entry for entry in gather(against)[0]}
    groups, notes, same = [], [], 0
    for block in blocks(entries, group=False):
        before = {name: earlier.get((conditions(e.result), name)) for name, e in block.entries.items()}
        rows = [row for name, entry in block.entries.items() if (old := before[name]) for row in _rows(old, entry)]
        if rows:
            groups.append((block.title, rows))
        same += len({name for name, old in before.items() if old} - {row.name for row in rows})
        if new := [name for name, old in before.items() if old is None]:
            notes.append(f"only here, {block.title}: {', '.join(new)}")
        gone = [name for place, name in earlier if place == conditions(next(iter(block.entries.values())).result)
                and name not in block.entries]  # fmt: skip
        if gone:
            notes.append(f"only there, {block.title}: {', '.join(sorted(gone))}")
    caption = "± standard error of the paired difference · verdicts by the paired 95 % interval of each row alone"
    notes = [f"{caption} · unchanged rows: {same}", *notes]
    return Table(title=f"Changed since {against}", names="tokenizer", columns=HEADINGS, groups=groups, notes=notes)


def _rows(old: ResultEntry, new: ResultEntry) -> Iterator[TableRow]:
    for name in [name for name in new.result.metrics if name in old.result.metrics]:
        column = metric_column(name)
        then, now = (f"{v:.{column.digits}f}" if (v := e.result.metrics[name].value) is not None else "–"
                     for e in (old, new))  # fmt: skip
        if then != now:
            cells = {"metric": TableCell(column.label), "then": TableCell(then), "now": TableCell(now)}
            yield TableRow(new.name, cells | _change(old, new, column))


def _change(old: ResultEntry, new: ResultEntry, column: Column) -> dict[str, TableCell]:
    """The difference with its error, and what its paired interval says about it."""
    then, now = column.read(old), column.read(new)
    if not (isinstance(then, Value) and isinstance(now, Value)) or then.value is None or now.value is None:
        return {"change": TableCell("–"), "verdict": TableCell("")}
    change, error, verdict = now.value - then.value, "", "no pairs"
    ours, theirs = paired_columns(new, old, column.per_image or "")
    if len(ours) > 1:
        difference = paired(ours, theirs, share=column.key in METRICS and METRICS[column.key].share)
        low, high = difference.interval()
        if column.per_image == column.key:
            error = f"±{difference.error:.{column.digits}f}"
        gained = (change > 0) == (column.better == "higher")
        verdict = "different" if column.better == "neither" else "better" if gained else "worse"
        verdict = "within error" if low <= 0 <= high else verdict
    return {"change": TableCell(f"{change:+.{column.digits}f}", error), "verdict": TableCell(verdict)}
