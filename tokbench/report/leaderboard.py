"""From result records to ranked, formatted blocks: what every table, the page and the plots are drawn from."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokbench.metrics.statistics import paired_interval
from tokbench.protocols import sides_of, size_text
from tokbench.records.result import EvalResult, TokenizerInfo, Value
from tokbench.report.columns import (
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
    number_of,
    paired_columns,
)
from tokbench.report.tables import DAGGER, ERRORS, MARKS, Table, TableCell, TableRow

UNRANKED_FAMILIES = ("identity",)  # it wins every column and says nothing
BEST_GUIDANCE_BY = ("gfid", "fd-dinov2", "fd-mobilenet", "kid")  # the first that all of a sweep have


@dataclass(frozen=True, kw_only=True)
class Block(Table):
    """Rows that may be compared: one protocol, set of images, resolution."""

    entries: Mapping[str, ResultEntry]  # by the rows' names, in their order


def blocks(
    entries: Iterable[ResultEntry],
    columns: Sequence[str] | None = None,
    group: bool = True,
    known: Sequence[ResultEntry] = (),
) -> list[Block]:
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
    return (
        info.downsample or math.inf,
        info.channels or math.inf,
        info.codebook_size or math.inf,
        info.tokens_per_image or 0,
    )


def _ranked(
    entries: list[ResultEntry], columns: list[Column], decimals: Mapping[str, int], one_device: bool
) -> list[TableRow]:
    """Rows of one group, ordered by the first column that has a direction, with best and second marked."""
    ranked = [entry for entry in entries if entry.result.tokenizer.family not in UNRANKED_FAMILIES]
    ranks = {c.key: ranking(ranked, c) for c in columns if one_device or c.key not in TIMES + RATES}
    rows = [
        TableRow(
            entry.name,
            {c.key: _cell(entry, c, decimals[c.key], ranks.get(c.key, {}).get(entry.name, 0)) for c in columns},
        )
        for entry in entries
    ]
    lead = next((c for c in columns if c.better != "neither" and c.key not in TIMES + RATES and c.key in ranks), None)
    return sorted(rows, key=lambda row: _order(row, lead))


def _order(row: TableRow, lead: Column | None) -> tuple[float, str]:
    value = row.cells[lead.key].value if lead is not None else None
    if not isinstance(value, float):
        return (math.inf, row.name)
    return (value if lead is not None and lead.better == "lower" else -value, row.name)


def ranking(entries: Sequence[ResultEntry], c: Column) -> dict[str, int]:
    """{row name: 1 best or tied with it, 2 second or tied with that}. Needs two values to mark one."""
    values = [
        (entry, number) for entry in entries if isinstance(number := number_of(c.read(entry.result)), float | int)
    ]
    if c.better == "neither" or len(values) < 2:
        return {}
    left = sorted(values, key=lambda pair: -pair[1] if c.better == "higher" else pair[1])
    ranks: dict[str, int] = {}
    for rank in (1, 2):
        if left:
            first = left[0]
            level = [pair for pair in left if tied(first, pair, c)]
            ranks |= {entry.name: rank for entry, _ in level}
            left = [pair for pair in left if pair[0].name not in ranks]
    return ranks


def tied(a: tuple[ResultEntry, float], b: tuple[ResultEntry, float], c: Column) -> bool:
    """Equal values, or a paired 95 % interval of the per-image difference that contains zero, over the same images."""
    if a[0] is b[0] or a[1] == b[1]:
        return True
    if c.per_image is None or _far_apart(a[0], b[0], c):
        return False
    ours, theirs = paired_columns(a[0], b[0], c.per_image)
    if len(ours) < 2:
        return False
    low, high = paired_interval(ours, theirs)
    return low <= 0 <= high


def _far_apart(a: ResultEntry, b: ResultEntry, c: Column) -> bool:
    """Spare reading rows: a paired standard error is at most the sum of the two (triangle inequality)."""
    x, y = c.read(a.result), c.read(b.result)
    if not isinstance(x, Value) or not isinstance(y, Value) or not x.stderr or not y.stderr or min(x.n, y.n) < 10:
        return False
    return abs((x.value or 0) - (y.value or 0)) > 3 * (x.stderr + y.stderr)


def _decimals(c: Column, entries: Sequence[ResultEntry]) -> int:
    """Digits after the point: the metric's own, fewer where two digits of the typical error already cover them."""
    errors = [v.stderr for e in entries if isinstance(v := c.read(e.result), Value) and v.stderr]
    if not errors:
        return c.digits
    return max(0, min(c.digits, 1 - math.floor(math.log10(float(np.median(errors))))))


def _cell(entry: ResultEntry, c: Column, decimals: int, rank: int) -> TableCell:
    value = c.read(entry.result)
    if value is None or value == "":
        return TableCell("–")
    if isinstance(value, str):
        return TableCell(value, value=value)
    if value.value is None:
        return TableCell("–", note=value.note)
    error = f"±{value.stderr:.{decimals}f}" if value.stderr else ""
    return TableCell(
        f"{value.value:.{decimals}f}",
        error,
        rank,
        is_training_loss(entry.result, c.key),
        value.note,
        float(value.value),
    )


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
    remarks: dict[str, list[str]] = {}
    for entry in entries:
        info = entry.result.tokenizer
        if info.note:
            remarks.setdefault(info.note, []).append(info.name)
        if not info.verified:
            remarks.setdefault("facts not checked against the published weights", []).append(info.name)
        for setting, what in (("skipped", "images left out"), ("upscaled", "images enlarged")):
            if count := getattr(entry.result.settings, setting):
                remarks.setdefault(f"{what}: {count}", []).append(entry.name)
    notes = [f"{', '.join(names)}: {remark}" for remark, names in remarks.items()]
    if any(is_training_loss(entry.result, c.key) for entry in entries for c in columns):
        notes.insert(0, DAGGER)
    missing: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        for name, reason in _missing(entry.result, asked):
            missing.setdefault((name, reason), []).append(entry.name)
    by_reason: dict[tuple[str, str], list[str]] = {}
    for (name, reason), names in missing.items():
        by_reason.setdefault((reason, _who(names, [entry.name for entry in entries])), []).append(name)
    notes += [f"{', '.join(names)} –{who}: {reason}" for (reason, who), names in by_reason.items()]
    if not one_device and any(c.key in TIMES + RATES for c in columns):
        notes.append("times come from different machines and are not ranked")
    return notes


def _who(names: Sequence[str], everybody: Sequence[str]) -> str:
    """Whom a remark concerns, in few words."""
    others = sorted(set(everybody) - set(names))
    if not others:
        return ""
    if len(others) <= 3 < len(names):
        return f" (all but {', '.join(others)})"
    return f" ({', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''})"


def _missing(result: EvalResult, asked: set[str] | None) -> list[tuple[str, str]]:
    """(metric, reason) of what a row lacks of the metrics asked for, None: of all."""
    gone = [(name, value.note or "not given") for name, value in result.metrics.items() if value.value is None]
    return [pair for pair in gone + list(result.unavailable.items()) if asked is None or pair[0] in asked]
