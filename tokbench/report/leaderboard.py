"""From result records to ranked, formatted blocks: what every table, the page and the plots are drawn from."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokbench.metrics.statistics import paired_interval
from tokbench.records.result import EvalResult, TokenizerInfo, Value
from tokbench.report.columns import (
    DAGGER,
    TIMES,
    Column,
    ResultEntry,
    column,
    compression,
    default_columns,
    device,
    is_training_loss,
    number_of,
)

# Say much the same as their neighbour: the first to go where a table has no room.
SECONDARY = ("psnr-global", "ssim-gauss", "ms-ssim", "encode", "params", "steps")
UNRANKED_FAMILIES = ("identity",)  # it wins every column and says nothing
ERRORS = "± standard error over images"
MARKS = "best bold, second underlined, ties by paired 95 % interval"


@dataclass(frozen=True)
class Cell:
    """`text` and `error` are formatted with the column's digits; rank 1 is best or tied with it, 2 second."""

    text: str
    error: str = ""
    rank: int = 0
    dagger: bool = False
    note: str = ""
    value: float | str | None = None


@dataclass(frozen=True)
class Row:
    entry: ResultEntry
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Block:
    """Rows that may be compared: one protocol, data set, resolution and number of images."""

    title: str
    caption: str
    columns: tuple[Column, ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]  # (heading, rows); one group with an empty heading if ungrouped
    footnotes: tuple[str, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for _, rows in self.groups for row in rows)


def block_key(result: EvalResult) -> tuple[Any, ...]:
    """Only rows with equal keys are ranked together; fingerprints keep other images of the same name apart."""
    data = result.dataset
    return (
        result.protocol,
        data.name,
        data.split or "",
        data.resolution,
        data.num_images,
        data.fingerprint,
        result.protocol_fingerprint,
    )


def blocks(entries: Iterable[ResultEntry], columns: Sequence[str] | None = None, group: bool = True) -> list[Block]:
    """Split entries into comparable blocks and rank each.

    `columns` are keys in the order wanted (default: everything measured); with `group`, rows are gathered by
    compression (f, c) and ranked within it. Raises InputError for an unknown column.
    """
    entries = list(entries)
    chosen = None if columns is None else [column(key, entries) for key in columns if key != "tokenizer"]
    by_key: dict[tuple[Any, ...], list[ResultEntry]] = {}
    for entry in entries:
        by_key.setdefault(block_key(entry.result), []).append(entry)
    keys = sorted(by_key)
    titles = [_title(key) for key in keys]
    return [
        _block(
            by_key[key],
            chosen,
            group,
            title if titles.count(title) == 1 else f"{title} {key[6][:8]} · data {key[5][:8]}, N = {key[4]:,}",
        )
        for key, title in zip(keys, titles, strict=True)
    ]


def _title(key: tuple[Any, ...]) -> str:
    protocol, name, split, resolution = key[:4]
    where = f"{name} ({split})" if split else name
    return f"{where} at {resolution} px · protocol {protocol}"


def _block(entries: list[ResultEntry], chosen: list[Column] | None, group: bool, title: str) -> Block:
    gathered: dict[str, list[ResultEntry]] = {}
    for entry in entries:
        gathered.setdefault(compression(entry.result.tokenizer) if group else "", []).append(entry)
    if len(gathered) == 1:
        gathered = {"": entries}
    columns = chosen
    if columns is None:
        columns = [c for c in default_columns(entries) if c.key != "latent" or len(gathered) == 1]
    decimals = {c.key: _decimals(c, entries) for c in columns}
    ordered = sorted(gathered.items(), key=lambda item: _size_order(item[1][0].result.tokenizer))
    one_device = len({device(entry.result) for entry in entries}) == 1
    groups = tuple((heading, _ranked(members, columns, decimals, one_device)) for heading, members in ordered)
    asked = None if chosen is None else {c.key for c in chosen}
    footnotes = _footnotes(entries, columns, one_device, asked)
    return Block(title, _caption(entries), tuple(columns), groups, tuple(footnotes))


def _size_order(info: TokenizerInfo) -> tuple[float, ...]:
    return (
        info.downsample or math.inf,
        info.channels or math.inf,
        info.codebook_size or math.inf,
        info.tokens_per_image or 0,
    )


def _ranked(
    entries: list[ResultEntry], columns: list[Column], decimals: Mapping[str, int], one_device: bool
) -> tuple[Row, ...]:
    """Rows of one group, ordered by the first column that has a direction, with best and second marked."""
    ranked = [entry for entry in entries if entry.result.tokenizer.family not in UNRANKED_FAMILIES]
    ranks = {c.key: ranking(ranked, c) for c in columns if one_device or c.key not in TIMES}
    rows = [
        Row(entry, {c.key: _cell(entry, c, decimals[c.key], ranks.get(c.key, {}).get(entry.name, 0)) for c in columns})
        for entry in entries
    ]
    lead = next((c for c in columns if c.better != "neither" and c.key not in TIMES and c.key in ranks), None)
    return tuple(sorted(rows, key=lambda row: _order(row, lead)))


def _order(row: Row, lead: Column | None) -> tuple[float, str]:
    value = row.cells[lead.key].value if lead is not None else None
    if not isinstance(value, float):
        return (math.inf, row.entry.name)
    return (value if lead is not None and lead.better == "lower" else -value, row.entry.name)


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


def paired_columns(a: ResultEntry, b: ResultEntry, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A per-image column of both over the images that both have, in the order of a's ids; empty where one lacks it."""
    (ids, ours), (other_ids, theirs) = a.rows, b.rows
    if name not in ours or name not in theirs:
        return np.empty(0), np.empty(0)
    if ids == other_ids:
        return ours[name], theirs[name]
    place = {sample: i for i, sample in enumerate(other_ids)}
    shared = [(i, place[sample]) for i, sample in enumerate(ids) if sample in place]
    return ours[name][[i for i, _ in shared]], theirs[name][[j for _, j in shared]]


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


def _cell(entry: ResultEntry, c: Column, decimals: int, rank: int) -> Cell:
    value = c.read(entry.result)
    if value is None or value == "":
        return Cell("–")
    if isinstance(value, str):
        return Cell(value, value=value)
    if value.value is None:
        return Cell("–", note=value.note)
    error = f"±{value.stderr:.{decimals}f}" if value.stderr else ""
    return Cell(
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
        for setting, what in (("skipped", "unreadable images left out"), ("upscaled", "images enlarged")):
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
    if not one_device and any(c.key in TIMES for c in columns):
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
