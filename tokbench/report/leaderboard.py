"""From result records to ranked, formatted blocks: what every table, the page and the plots are drawn from.

Beside the blocks: how a metric spreads over images, as percentiles of each row, or of its paired differences to a row,
group by group.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokbench.errors import InputError
from tokbench.metrics import METRICS
from tokbench.metrics.statistics import mean_and_error, paired
from tokbench.protocols import sides_of, size_text
from tokbench.records.result import EvalResult, TokenizerInfo, Value
from tokbench.registry import suggest
from tokbench.report.columns import (
    HEADLINE,
    RATES,
    TIMES,
    Column,
    Conditions,
    ResultEntry,
    column,
    compression,
    conditions,
    default_columns,
    device,
    is_training_loss,
    paired_columns,
    quantile,
    worst,
)
from tokbench.report.tables import DAGGER, ERRORS, MARKS, Heading, Table, TableCell, TableRow

UNRANKED_FAMILIES = ("identity",)  # it wins every column and says nothing
BEST_GUIDANCE_BY = ("gfid", "fd-dinov2", "fd-mobilenet", "kid")  # the first that all of a sweep have


@dataclass(frozen=True, kw_only=True)
class Block(Table):
    """Rows that may be compared: one protocol, set of images, resolution."""

    entries: Mapping[str, ResultEntry]  # by the rows' names, in their order


def blocks(
    entries: Iterable[ResultEntry], columns: Sequence[str] | None = None, group: bool = True,
    known: Sequence[ResultEntry] = (),
) -> list[Block]:  # fmt: skip
    """Split entries into comparable blocks and rank each.

    `columns` are keys in the order wanted (default: everything measured); with `group`, rows are gathered by
    compression (f, c) and ranked within it. `known` are results besides, of which generated rows show the rfid.
    Raises InputError for an unknown column.
    """
    entries = list(entries)
    chosen = None if columns is None else [column(key, entries) for key in columns if key != "tokenizer"]
    gathered: dict[Conditions, list[ResultEntry]] = {}
    for entry in sorted(entries, key=_place):
        gathered.setdefault(conditions(entry.result), []).append(entry)
    titles = [_title(members[0].result) for members in gathered.values()]
    sweep = _best_guidance(entries)
    found = []
    for (key, members), title in zip(gathered.items(), titles, strict=True):
        if titles.count(title) > 1:
            title += f" {key.protocol_fingerprint[:8]} · data {key.images[:8]}, N = {key.num_images:,}"
        found.append(_block(members, chosen, group, title, [*known, *entries], sweep))
    return found


def _place(entry: ResultEntry) -> tuple[Any, ...]:
    data = entry.result.dataset
    sides = sides_of(data.resolution) or (0, 0)
    return entry.result.protocol, data.name, data.split or "", sides, data.num_images, data.fingerprint


def _title(result: EvalResult) -> str:
    data = result.dataset
    where = f"{data.name} ({data.split})" if data.split else data.name
    against = "generated, against " if result.settings.generation else ""
    return f"{against}{where} at {size_text(data.resolution)} · protocol {result.protocol}"


def _best_guidance(entries: Sequence[ResultEntry]) -> dict[int, str]:
    """A remark, by the entry's identity, on each with the lowest distance of its tokenizer's guidance scales."""
    sweeps: dict[tuple[Any, ...], list[ResultEntry]] = {}
    for entry in entries:
        if run := entry.result.settings.generation:
            key = (entry.name, run["generator"].get("weights"), *conditions(entry.result)[2:])
            sweeps.setdefault(key, []).append(entry)
    best = {}
    for members in sweeps.values():
        for name in BEST_GUIDANCE_BY:
            values = [value.value for e in members if (value := e.result.metrics.get(name)) and value.value is not None]
            if len(members) > 1 and len(values) == len(members):
                best[id(members[int(np.argmin(values))])] = f"best of {len(members)} guidance scales by {name}"
                break
    return best


def _block(
    entries: list[ResultEntry], chosen: list[Column] | None, group: bool, title: str, known: Sequence[ResultEntry],
    remarks: Mapping[int, str],
) -> Block:  # fmt: skip
    gathered: dict[str, list[ResultEntry]] = {}
    for entry in entries:
        gathered.setdefault(compression(entry.result.tokenizer) if group else "", []).append(entry)
    if len(gathered) == 1:
        gathered = {"": entries}
    columns = chosen
    if columns is None:
        columns = [c for c in default_columns(entries, known) if c.key != "latent" or len(gathered) == 1]
    decimals = {c.key: _decimals(c, entries) for c in columns}
    ordered = sorted(gathered.items(), key=lambda item: _size_order(item[1][0].result.tokenizer))
    one_device = len({device(entry.result) for entry in entries}) == 1
    groups = [(heading, _ranked(members, columns, decimals, one_device)) for heading, members in ordered]
    asked = None if chosen is None else {c.key for c in chosen}
    notes = [_caption(entries), *_footnotes(entries, columns, one_device, asked)]
    notes += [f"{entry.name}: {remarks[id(entry)]}" for entry in entries if id(entry) in remarks]
    named = {entry.name: entry for entry in entries}
    shown = {row.name: named[row.name] for _, rows in groups for row in rows}
    return Block(title=title, names="tokenizer", columns=columns, groups=groups, notes=notes, entries=shown)


def _size_order(info: TokenizerInfo) -> tuple[float, ...]:
    sizes = (info.downsample, info.channels, info.codebook_size)
    return (*(size or math.inf for size in sizes), info.tokens_per_image or 0)


def _ranked(
    entries: list[ResultEntry], columns: list[Column], decimals: Mapping[str, int], one_device: bool
) -> list[TableRow]:
    """Rows of one group, ordered by the first column that has a direction, with best and second marked."""
    rivals = [entry for entry in entries if entry.result.tokenizer.family not in UNRANKED_FAMILIES]
    ranks = {c.key: ranking(rivals, c) for c in columns if c.ranked and (one_device or c.key not in TIMES + RATES)}
    rows = []
    for entry in entries:
        cells = {c.key: _cell(entry, c, decimals[c.key], ranks.get(c.key, {}).get(entry.name, 0)) for c in columns}
        rows.append(TableRow(entry.name, cells))
    for lead in (c for c in columns if c.better != "neither" and c.key not in TIMES + RATES):
        sign = 1 if lead.better == "lower" else -1
        values = {row.name: row.cells[lead.key].value for row in rows}
        return sorted(rows, key=lambda r: (sign * v if isinstance(v := values[r.name], float) else math.inf, r.name))
    return sorted(rows, key=lambda row: row.name)


def ranking(entries: Sequence[ResultEntry], c: Column) -> dict[str, int]:
    """{row name: 1 best or tied with it, 2 second or tied with that}. Needs two values to mark one."""
    values = [(entry, value) for entry in entries if isinstance(value := c.read(entry), Value)]
    left = [(entry, value.value, value) for entry, value in values if value.value is not None]
    if c.better == "neither" or len(left) < 2:
        return {}
    left.sort(key=lambda row: row[1], reverse=c.better == "higher")
    ranks: dict[str, int] = {}
    for rank in (1, 2):
        if left:
            best, _, value = left[0]
            ranks |= {entry.name: rank for entry, _, other in left if _tied((best, value), (entry, other), c.per_image)}
            left = [row for row in left if row[0].name not in ranks]
    return ranks


def _tied(a: tuple[ResultEntry, Value], b: tuple[ResultEntry, Value], per_image: str | None) -> bool:
    """Equal values, or a paired 95 % interval of the per-image difference that contains zero, over the same images."""
    (first, x), (second, y) = a, b
    assert x.value is not None
    assert y.value is not None
    if x.value == y.value:
        return True
    # Spare reading rows: a paired standard error is at most the sum of the two (triangle inequality).
    errors = 3 * (x.stderr + y.stderr) if x.stderr and y.stderr and min(x.n, y.n) >= 10 else math.inf
    if per_image is None or abs(x.value - y.value) > errors:
        return False
    ours, theirs = paired_columns(first, second, per_image)
    if len(ours) < 2:
        return False
    low, high = paired(ours, theirs, share=per_image in METRICS and METRICS[per_image].share).interval()
    return low <= 0 <= high


def _decimals(c: Column, entries: Sequence[ResultEntry]) -> int:
    """Digits after the point: the metric's own, fewer where two digits of the typical error already cover them."""
    errors = [v.stderr for e in entries if isinstance(v := c.read(e), Value) and v.stderr]
    if not errors:
        return c.digits
    return max(0, min(c.digits, 1 - math.floor(math.log10(float(np.median(errors))))))


def _cell(entry: ResultEntry, c: Column, decimals: int, rank: int) -> TableCell:
    value = c.read(entry)
    if isinstance(value, str) and value:
        return TableCell(value, value=value)
    if not isinstance(value, Value) or value.value is None:
        return TableCell("–", note=value.note if isinstance(value, Value) else "")
    error = f"±{value.stderr:.{decimals}f}" if value.stderr else ""
    own = is_training_loss(entry.result, c.key)
    return TableCell(f"{value.value:.{decimals}f}", error, rank, own, value.note, float(value.value))


def _caption(entries: Sequence[ResultEntry]) -> str:
    results = [entry.result for entry in entries]
    types = sorted({r.settings.dtype for r in results})
    devices = sorted({device(r) for r in results})
    errors = any(v.stderr for r in results for v in r.metrics.values())
    parts = [f"N = {results[0].dataset.num_images:,}", "; ".join(devices), ", ".join(types)]
    parts += [ERRORS if errors else "", MARKS]
    return " · ".join(part for part in parts if part)


def _footnotes(
    entries: Sequence[ResultEntry], columns: Sequence[Column], one_device: bool, asked: set[str] | None
) -> list[str]:
    """†, what the models say about themselves, why numbers are missing; equal remarks are gathered."""
    rows: dict[str, list[str]] = {}  # by remark
    for entry in entries:
        for remark in _remarks(entry.result, asked):
            rows.setdefault(remark, []).append(entry.name)
    notes = [DAGGER] if any(is_training_loss(entry.result, c.key) for entry in entries for c in columns) else []
    notes += [f"{_who(names, len(entries))}: {remark}" for remark, names in rows.items()]
    if not one_device and any(c.key in TIMES + RATES for c in columns):
        notes.append("times come from different machines and are not ranked")
    return notes


def _who(names: Sequence[str], everybody: int) -> str:
    """Whom a remark concerns, in few words."""
    if len(names) == everybody > 1:
        return "all rows"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _remarks(result: EvalResult, asked: set[str] | None) -> Iterator[str]:
    """What is to be known about a row, and why it lacks metrics of those asked for (None: of any)."""
    info, settings = result.tokenizer, result.settings
    if info.note:
        yield info.note
    if not info.verified:
        yield "facts not checked against the published weights"
    if settings.skipped:
        yield f"images left out: {settings.skipped}"
    if settings.upscaled:
        yield f"images enlarged: {settings.upscaled}"
    if result.provenance.warnings:
        yield result.provenance.warnings
    missing: dict[str, list[str]] = {}  # metrics by reason
    gone = {name: value.note for name, value in result.metrics.items() if value.value is None}
    for name, reason in (gone | dict(result.unavailable)).items():
        if "@" not in name if asked is None else name in asked:
            missing.setdefault(reason, []).append(name)
    yield from (f"no {', '.join(names)} ({reason or 'not given'})" for reason, names in missing.items())


# ---- how values spread over images ----------------------------------------------------------------------------------

SHARES = {"p5": 0.05, "median": 0.5, "p95": 0.95}
Values = NDArray[np.float64]


def spread_tables(
    blocks: Sequence[Block], metrics: Sequence[str] | None, reference: str | None, group_by: str | None
) -> list[Table]:
    """A table for each block and metric (default: the first headline metric that images have values of).

    Groups come worst first, as their mean over all rows says. InputError for a row or a column that is not there.
    """
    found = []
    for block in blocks:
        known = {name for entry in block.entries.values() for name in entry.rows[1]}
        chosen = [m for m in metrics if m in known] if metrics else [m for m in HEADLINE if m in known][:1]
        if reference is None or reference in block.entries:
            found += [_spread_table(block, name, reference, group_by) for name in chosen]
    if not found:
        rows = [name for block in blocks for name in block.entries]
        wrong = reference is not None and reference not in rows
        raise InputError(
            f"--reference {reference}: no such row; {suggest(str(reference), rows)}" if wrong
            else "no result here has values for each image of these metrics"
        )  # fmt: skip
    return found


def _spread_table(block: Block, name: str, reference: str | None, group_by: str | None) -> Table:
    metric = METRICS.get(name)
    better, digits = (metric.better, metric.digits + 1) if metric else ("neither", 4)
    base = block.entries[reference] if reference else None
    parts: dict[str, list[TableRow]] = {}
    means: dict[str, list[float]] = {}
    for row, entry in block.entries.items():
        for group, ids, ours, theirs in _parts(entry, base, name, group_by) if entry is not base else ():
            values = ours if theirs is None else ours - theirs
            parts.setdefault(group, []).append(
                TableRow(row, _spread_cells(ids, values, theirs is not None, better, digits))
            )
            means.setdefault(group, []).append(float(values.mean()))
    sign = 1 if better == "higher" else -1
    groups = sorted(parts.items(), key=lambda part: (sign * np.mean(means[part[0]]), part[0]))
    headings = [Heading(key="N"), Heading(key="mean", better="neither" if base else better)]
    headings += [Heading(key="95 % interval"), Heading(key="better")] if base else []
    headings += [Heading(key=key) for key in (*SHARES, "worst")] + [Heading(key="image", words=True, minor=True)]
    title = f"{name}, less that of {reference}" if base else name
    notes = [f"{ERRORS}; worst: of the image named" + ("; better: share of images" if base else "")]
    unit = f" ({metric.unit})" if metric and metric.unit else ""
    return Table(
        title=f"{title}{unit} · {block.title}", names="tokenizer", columns=headings, groups=groups, notes=notes
    )


def _parts(
    entry: ResultEntry, base: ResultEntry | None, name: str, group_by: str | None
) -> Iterator[tuple[str, list[str], Values, Values | None]]:
    """Of each group: its name, ids, this row's values and, of the same images, the base's."""
    ids, columns = entry.rows
    others: Mapping[str, float] = {}
    if base is not None:
        others = dict(zip(base.rows[0], base.rows[1].get(name, ()), strict=False))
    if name not in columns:
        return
    labels = entry.groups(group_by) if group_by else [""] * len(ids)
    if not labels:
        raise InputError(f"--group-by {group_by}: {entry.path} holds no such column of its data")
    members: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        if base is None or ids[i] in others:
            members.setdefault(label, []).append(i)
    for label, places in members.items():
        own = [ids[i] for i in places]
        yield label, own, columns[name][places], np.array([others[i] for i in own]) if base else None


def _spread_cells(ids: list[str], values: Values, paired: bool, better: str, digits: int) -> dict[str, TableCell]:
    mean = mean_and_error(values)
    sign = "+" if paired else ""
    error = f"±{mean.stderr:.{digits}f}" if mean.stderr else ""
    texts = {"N": TableCell(f"{len(values):,}"), "mean": TableCell(f"{mean.value:{sign}.{digits}f}", error)}
    if paired:
        interval = "–" if mean.low is None else f"[{mean.low:+.{digits}f}, {mean.high:+.{digits}f}]"
        texts["95 % interval"] = TableCell(interval)
        wins = float(np.mean(values > 0 if better == "higher" else values < 0))
        texts["better"] = TableCell("–" if better == "neither" else f"{wins:.0%}")
    for key, share in SHARES.items():
        texts[key] = TableCell(f"{quantile(values, share).value:{sign}.{digits}f}")
    place = worst(values, better)
    return texts | {"worst": TableCell(f"{values[place]:{sign}.{digits}f}"), "image": TableCell(ids[place])}
