"""One line a probe, one column a tokenizer: each probe by its first metric."""

from collections.abc import Sequence

from tokbench.metrics import METRICS, Metric, metrics_of
from tokbench.report.columns import ResultEntry, metric_column
from tokbench.report.leaderboard import Block, blocks, ranking
from tokbench.report.tables import ARROWS, Heading, Table, TableCell, TableRow


def probe_tables(entries: Sequence[ResultEntry], probes: Sequence[str] = ()) -> list[Table]:
    """A table for each set of images; of these probes, or of all that left something in the records."""
    tables = []
    for block in blocks(entries, ["psnr"], group=False):
        own = list(block.entries.values())
        measured = dict.fromkeys(
            METRICS[name].probe for e in own for name in (*e.result.metrics, *e.result.unavailable) if name in METRICS
        )
        rows = [row for probe in probes or sorted(filter(None, measured)) for row in _rows(probe, own)]
        if rows:
            tables.append(_table(block, rows, own))
    return tables


def _rows(probe: str, entries: Sequence[ResultEntry]) -> list[tuple[str, Metric, TableRow]]:
    """The line of a probe, [] if no record knows it."""
    for metric in metrics_of(probe)[:1]:
        column = metric_column(metric.name)
        ranks = ranking(entries, column)
        cells = {}
        for entry in entries:
            value = column.read(entry)
            if value is None or isinstance(value, str) or value.value is None:
                cells[entry.name] = TableCell("–", note="" if value is None or isinstance(value, str) else value.note)
                continue
            error = f"±{value.stderr:.{metric.digits}f}" if value.stderr else ""
            text = f"{value.value:.{metric.digits}f}"
            cells[entry.name] = TableCell(text, error, ranks.get(entry.name, 0), value=value.value)
        label = f"{metric.name} {ARROWS[metric.better]}" + (f" ({metric.unit})" if metric.unit else "")
        return [(probe, metric, TableRow(probe, {"number": TableCell(label), **cells}))]
    return []


def _table(block: Block, rows: Sequence[tuple[str, Metric, TableRow]], entries: Sequence[ResultEntry]) -> Table:
    headings = [Heading(key="number", words=True), *(Heading(key=entry.name) for entry in entries)]
    notes = [*block.notes[:1], *(f"{metric.name}: {metric.description}" for _, metric, _ in rows)]
    reasons: dict[str, list[str]] = {}
    for probe, _, row in rows:
        for name, cell in row.cells.items():
            if cell.note:
                reasons.setdefault(f"{probe}: {cell.note}", []).append(name)
    notes += [f"{', '.join(names)}, {reason}" for reason, names in reasons.items()]
    return Table(
        title=f"probes · {block.title}", names="probe", columns=headings, groups=[("", [row for *_, row in rows])],
        notes=notes,
    )  # fmt: skip
