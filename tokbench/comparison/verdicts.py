"""What a check found, for people (terminal, pull request, picture) and for machines (JUnit XML, JSON)."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokbench.comparison.check import CheckResult, Comparison, check, check_speed, parse_tolerances, update
from tokbench.metrics import METRICS
from tokbench.records.files import image_folders, image_name, per_image_path, read_per_image, writable, write_whole
from tokbench.report.columns import DAGGER
from tokbench.report.tables import markdown_escape
from tokbench.runtime.terminal import stdout_console

STYLES = {"worse": "bold red", "better": "green", "same": "", "inconclusive": "yellow"}
HEADINGS = ("cell", "metric", "N", "baseline", "new", "worse by", "tolerated", "verdict")


def cells(c: Comparison) -> list[str]:
    """Texts under HEADINGS. "Worse by" is positive for a loss whatever the metric's direction."""
    digits = METRICS[c.metric].digits + 1 if c.metric in METRICS else 3
    interval = f" [{c.low:+z.{digits}f}, {c.high:+z.{digits}f}]" if c.low is not None and c.high is not None else ""
    verdict = c.verdict + (f" ({c.warning})" if c.warning else "")
    values = [f"{v:z.{digits}f}{'†' if own else ''}" for v, own in zip((c.base, c.new), c.trained, strict=True)]
    values += [f"{c.loss:+z.{digits}f}{interval}", f"{c.tolerance:.{digits}f}"]
    return [c.cell, c.metric, f"{c.n:,}" if c.n else "–", *values, verdict]


def summary(result: CheckResult) -> str:
    """One line: how many comparisons and how they ended."""
    counts = {v: sum(c.verdict == v for c in result.comparisons) for v in STYLES}
    ended = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"{'FAILED' if result.failures else 'passed'}: {len(result.comparisons)} comparisons, {ended}"


def footnote(result: CheckResult) -> str:
    """What † means, where a comparison has one."""
    return DAGGER if any(any(c.trained) for c in result.comparisons) else ""


def verdict_table(result: CheckResult) -> Table:
    """The terminal table; "worse by" carries the 95 % interval of the paired difference where there is one."""
    table = Table(
        title=Text(summary(result), style="bold"), title_justify="left", box=None, padding=(0, 1), pad_edge=False,
        caption=Text(note) if (note := footnote(result)) else None, caption_justify="left",
    )  # fmt: skip
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if 2 <= index < 7 else "left", overflow="fold")
    for c in result.comparisons:
        table.add_row(*(Text(text, style=STYLES[c.verdict]) for text in cells(c)))
    return table


def verdict_markdown(result: CheckResult) -> str:
    """A pull-request comment: what failed first, then everything in a fold."""
    lines = [f"### tokbench check {summary(result)}", ""]
    for title, rows in (("", result.failures), ("all comparisons", result.comparisons)):
        if not rows:
            continue
        table = ["| " + " | ".join(HEADINGS) + " |", "|---|---|--:|--:|--:|--:|--:|---|"]
        table += ["| " + " | ".join(markdown_escape(text) for text in cells(c)) + " |" for c in rows]
        lines += [f"<details><summary>{title}</summary>", "", *table, "", "</details>"] if title else [*table, ""]
    note = footnote(result)
    return "\n".join([*lines, *([note, ""] if note else []), ""])


def verdict_junit(result: CheckResult) -> str:
    """JUnit XML, a test case per comparison."""
    failed = set(result.failures)
    suite = ElementTree.Element(
        "testsuite", name="tokbench check", tests=str(len(result.comparisons)), failures=str(len(failed)), errors="0"
    )
    for c in result.comparisons:
        case = ElementTree.SubElement(suite, "testcase", classname=c.cell, name=c.metric)
        text = ", ".join(f"{heading} {value}" for heading, value in zip(HEADINGS[2:], cells(c)[2:], strict=True))
        if c in failed:
            ElementTree.SubElement(case, "failure", message=text)
        else:
            ElementTree.SubElement(case, "system-out").text = text
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def verdict_json(result: CheckResult) -> str:
    record = {
        "passed": not result.failures,
        "summary": summary(result),
        "comparisons": [asdict(c) for c in result.comparisons],
    }
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def most_lost(new: Path, base: Path, metrics: Sequence[str], count: int = 10) -> list[tuple[str, float]]:
    """(sample id, loss) of the images that lost most, by the first of these metrics that both sides have per image."""
    if not (per_image_path(new).exists() and per_image_path(base).exists()):
        return []
    (ids, ours), (base_ids, theirs) = read_per_image(per_image_path(new)), read_per_image(per_image_path(base))
    for name in metrics:
        if ids == base_ids and name in ours and name in theirs and METRICS[name].better != "neither":
            loss = (ours[name] - theirs[name]) * (1 if METRICS[name].better == "lower" else -1)
            order = np.argsort(-loss, kind="stable")[:count]
            return [(ids[i], float(loss[i])) for i in order if loss[i] > 0]
    return []


def strip(rows: Sequence[Sequence[Path]], path: Path) -> Path | None:
    """A PNG, one row an image: input, baseline, new. Files that are not there are left out; None if none is."""
    images = []
    for row in rows:
        found = [np.asarray(Image.open(file).convert("RGB")) for file in row if file.exists()]
        if len(found) == len(row) and len({image.shape for image in found}) == 1:
            images.append(np.concatenate(found, axis=1))
    images = [image for image in images if image.shape == images[0].shape]
    if not images:
        return None
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(images)).save(buffer, "PNG")
    write_whole(path, buffer.getvalue())
    return path


@dataclass(frozen=True)
class CheckOptions:
    """What `tokbench check` was asked for."""

    new: Path
    against: Path
    tolerance: str | None = None
    metrics: str | None = None
    exact: bool = False
    two_sided: bool = False
    strict: bool = False
    speed: bool = False
    markdown: Path | None = None
    junit: Path | None = None
    json: Path | None = None
    strips: Path | None = None
    update: bool = False
    accept: bool = False


def run_check(options: CheckOptions) -> int:
    """Compare, print, write what was asked for; 1 if something got worse. GitHub's step summary gets the Markdown."""
    tolerances = parse_tolerances(options.tolerance)
    metrics = [name.strip() for name in options.metrics.split(",")] if options.metrics else None
    console = stdout_console(120)
    if options.update:
        rules: dict[str, Any] = {"tolerances": tolerances, "metrics": metrics}
        for line in update(options.new, options.against, accept=options.accept, **rules):
            console.print(Text(line))
        return 0
    if options.speed:
        result = CheckResult(tuple(check_speed(options.new, options.against)), options.strict)
    else:
        rules = {"tolerances": tolerances, "metrics": metrics, "exact": options.exact, "strict": options.strict}
        rules["two_sided"] = options.two_sided
        result = check(options.new, options.against, **rules)
    console.print(verdict_table(result))
    texts = {options.markdown: verdict_markdown, options.junit: verdict_junit, options.json: verdict_json}
    for path, text in texts.items():
        if path is not None:
            write_whole(path, text(result))
    if step_summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with writable(Path(step_summary)), open(step_summary, "a", encoding="utf-8") as file:
            file.write(verdict_markdown(result))
    if options.strips is not None:
        draw_strips(result, options.strips, console)
    return int(bool(result.failures))


def draw_strips(result: CheckResult, folder: Path, console: Console) -> None:
    """A picture per cell of the ten images that lost most, and their names."""
    for new, base in result.pairs:
        lost = most_lost(new, base, ["lpips-alex", "psnr"])
        for sample, loss in lost:
            console.print(Text(f"{new.stem}: {sample} lost {loss:.4g}"))
        real, fakes = image_folders(new)
        folders = [real, image_folders(base)[1], fakes]
        rows = [[folder / image_name(sample) for folder in folders] for sample, _ in lost]
        if lost and strip(rows, folder / f"{new.parent.name}-{new.stem}.png") is None:
            console.print(Text(f"{new.stem}: no picture, both sides need `tokbench run --save-images`"))
