"""Numbers from papers beside our own: shown, subtracted, never ranked together."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokbench.errors import InputError, unreadable
from tokbench.report.columns import ResultEntry, number
from tokbench.report.tables import Heading, Table, plain

FACTS = ("f", "c", "codebook", "tokens", "resolution", "num_images", "params_m")
MAIN = "ImageNet-1k val"  # the data set that most rows are on, shown first
METRICS = {"rfid": 2, "psnr": 2, "ssim": 3, "lpips": 3, "gfid": 2}  # and their digits


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A row of a paper, README or thread. `tokenizer` is the row name here of the same weights, "" if we have none."""

    model: str
    tokenizer: str
    dataset: str
    numbers: Mapping[str, float | None]  # FACTS and METRICS
    lpips_net: str  # "" where the source does not say
    source: str
    notes: str


def read_reported(path: Path) -> list[Reported]:
    """The rows of reported.csv in the order of tables; InputError naming the line that is wrong."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [_row(line, f"{path}, line {i}") for i, line in enumerate(csv.DictReader(file), 2)]
        return sorted(rows, key=_place)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(unreadable(path, "table of reported numbers", error)) from error


def _row(line: dict[str, str], where: str) -> Reported:
    if None in line or None in line.values():
        raise InputError(f"{where}: too few or too many cells")
    try:
        numbers = {name: float(text) if (text := line.pop(name)) else None for name in (*FACTS, *METRICS)}
        return Reported(**line, numbers=numbers)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{where}: not a row of reported numbers ({error})") from error


def _place(row: Reported) -> tuple[object, ...]:
    """Reconstruction before generation, then by data set, resolution and compression; numbers decide nothing."""
    sizes = (row.numbers[name] for name in ("resolution", "f", "c", "codebook"))
    generated = row.numbers["rfid"] is None and row.numbers["psnr"] is None
    place = (math.inf if size is None else size for size in sizes)
    return (generated, row.dataset != MAIN, row.dataset, *place, row.model.lower())


def _against(row: Reported, entry: ResultEntry, metric: str) -> str:
    """What speaks against comparing a row's number with ours."""
    reasons = []
    data = entry.result.dataset
    if _words(row.dataset) != _words(f"{data.name} {data.split or ''}"):
        reasons.append(f"other images ({row.dataset} / {data.name})")
    if row.numbers["num_images"] not in (None, data.num_images):
        reasons.append(f"N {row.numbers['num_images']:,.0f} / {data.num_images:,}")
    if metric == "lpips" and not row.lpips_net:
        reasons.append("network not stated")
    if metric == "ssim":
        reasons.append("not comparable" if "not comparable" in row.notes else "window not stated")
    return ", ".join(reasons)


def _words(dataset: str) -> list[str]:
    return dataset.lower().replace("imagenet-1k", "imagenet").replace("validation", "val").replace("-", " ").split()


def papers_table(rows: Sequence[Reported], entries: Sequence[ResultEntry]) -> Table | None:
    """Every reported number whose tokenizer we measured at the same resolution, and what speaks against comparing.

    No difference is given between different images, there it would mean nothing. None without such a number.
    """
    texts = []
    for row in rows:
        for entry in entries:
            if entry.name != row.tokenizer or entry.result.dataset.resolution != row.numbers["resolution"]:
                continue
            for name in METRICS:
                paper = row.numbers[name]
                metric = name if name != "lpips" else f"lpips-{row.lpips_net or 'alex'}"
                ours, digits = number(entry.result, metric), METRICS[name]
                if paper is not None and ours is not None:
                    remark = _against(row, entry, name)
                    difference = "–" if "other images" in remark else f"{ours - paper:+.{digits}f}"
                    values = [f"{paper:.{digits}f}", f"{ours:.{digits}f}", difference]
                    texts.append([entry.name, metric, *values, remark, row.source])
    keys = ("tokenizer", "metric", "paper", "ours", "difference", "remark", "source")
    headings = [Heading(key=key, words=key in ("metric", "remark", "source")) for key in keys]
    return plain("Paper against ours", headings, texts) if texts else None


def reported_table(rows: Sequence[Reported]) -> Table | None:
    """All that papers say."""

    def text(value: float | None, digits: int = 0) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    keys = ("model", *FACTS[:5], "images", "N", *METRICS, "source")
    headings = [Heading(key=key, words=key in ("images", "source")) for key in keys]
    texts = []
    for row in rows:
        facts = [text(row.numbers[name]) for name in (*FACTS[:5], "num_images")]
        scores = [text(row.numbers[name], digits) for name, digits in METRICS.items()]
        texts.append([row.model, *facts[:5], row.dataset, facts[5], *scores, row.source])
    notes = ["Not measured here and not ranked: other protocols, often unstated ones."]
    return plain("Reported in papers", headings, texts, notes) if texts else None
