"""From a folder of result files to entries, and from entries to a table that can be queried."""

import tokenize
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tokbench.errors import InputError, first_line
from tokbench.records.files import read_results, results_frame
from tokbench.records.result import SpeedResult, Value
from tokbench.report.columns import FACTS, Conditions, ResultEntry, conditions
from tokbench.report.speed import read_speeds


def gather(*folders: Path) -> tuple[list[ResultEntry], list[SpeedResult], list[str]]:
    """All results and speed records in folders or files, and a warning for every file that is neither or is superseded.

    Of two results for the same cell the newer one counts. InputError where there is no folder or nothing in it.
    """
    entries, speeds, warnings = [], [], []
    for folder in folders:
        results, unreadable = read_results(folder)
        measured, other = read_speeds(folder / "speed")
        entries += [ResultEntry(result, path) for path, result in results]
        speeds += measured
        warnings += [f"skipped {warning}" for warning in unreadable + other]
    if not entries and not speeds:
        reasons = f" ({warnings[0]})" if warnings else ""
        raise InputError(f"{', '.join(map(str, folders))}: no results in it{reasons}; make some with `tokbench run`")
    kept, superseded = newest(entries)
    return kept, speeds, warnings + superseded


def known_results(*folders: Path) -> list[ResultEntry]:
    """The results below those folders that are there."""
    found = (read_results(folder)[0] for folder in folders if folder.exists())
    return [ResultEntry(result, path) for pairs in found for path, result in pairs]


def newest(entries: Sequence[ResultEntry]) -> tuple[list[ResultEntry], list[str]]:
    """One entry per comparable cell and row name, the latest by date; and a warning for each that it replaced."""
    kept: dict[tuple[Conditions, str], ResultEntry] = {}
    warnings = []
    for entry in sorted(entries, key=lambda e: (e.result.provenance.date, str(e.path))):
        key = (conditions(entry.result), entry.name)
        if key in kept:
            warnings.append(f"skipped {kept[key].path}: the same cell as {entry.path}, which is newer")
        kept[key] = entry
    return sorted(kept.values(), key=lambda e: str(e.path)), warnings


def frame(entries: Sequence[ResultEntry]) -> pd.DataFrame:
    """One row per result: what `--where` can ask for, what CSV holds, at full precision."""
    table = results_frame(entry.result for entry in entries)
    table.insert(0, "tokenizer", table.pop("name"))
    for key, column in FACTS.items():
        values = [column.read(entry) for entry in entries]
        table[key] = [value.value if isinstance(value, Value) else value for value in values]
    table["note"] = [entry.result.tokenizer.note for entry in entries]
    return table


def where(entries: Sequence[ResultEntry], query: str) -> list[ResultEntry]:
    """The entries that a pandas query keeps, for example "f == 8 and resolution == 256"; `lpips-alex` in backticks.

    InputError names what is wrong with the query and which columns there are.
    """
    table = frame(entries)
    try:
        kept = table.query(query, engine="python").index
    except (ValueError, TypeError, KeyError, SyntaxError, NameError, AttributeError, tokenize.TokenError) as error:
        reason = first_line(error)
        names = ", ".join(str(name) for name in table.columns if not str(name).endswith(".stderr"))
        raise InputError(
            f"--where {query!r}: {reason}; columns are {names} (in backticks if they hold a dash)"
        ) from error
    if len(kept) == 0:
        raise InputError(f"--where {query!r}: no result is left of {len(table)}")
    return [entries[i] for i in kept]
