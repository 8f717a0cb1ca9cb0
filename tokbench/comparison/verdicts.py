"""What a comparison found, for people (terminal, pull request, picture) and for machines (JUnit XML, JSON)."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from tokbench.comparison.check import CheckResult, check, check_speed, parse_tolerances, update
from tokbench.comparison.differences import STYLES, compare, difference_table
from tokbench.metrics import METRICS
from tokbench.protocols import size_text
from tokbench.records.files import image_folders, image_name, writable, write_whole
from tokbench.records.result import read_result
from tokbench.report.columns import ResultEntry, paired_columns
from tokbench.report.tables import Table, markdown, show

WIDTH = 130  # characters of the table where there is no terminal


def run_compare(path_a: Path, path_b: Path) -> int:
    """Print B against A; the exit status is 0 whatever the verdicts are."""
    found = compare(path_a, path_b)
    a, b = (read_result(path) for path in (path_a, path_b))
    title = f"{b.tokenizer.name} against {a.tokenizer.name}: {a.dataset.name} at {size_text(a.dataset.resolution)}"
    names = (a.tokenizer.name, b.tokenizer.name) if a.tokenizer.name != b.tokenizer.name else ("A", "B")
    show([difference_table(f"{title} · protocol {a.protocol}", found, names)], WIDTH)
    return 0


def summary(result: CheckResult) -> str:
    """One line: how many comparisons and how they ended."""
    counts = {v: sum(d.verdict == v for d in result.differences) for v in STYLES}
    ended = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"{'FAILED' if result.failures else 'passed'}: {len(result.differences)} comparisons, {ended}"


def verdict_table(result: CheckResult) -> Table:
    return difference_table(summary(result), result.differences)


def verdict_markdown(result: CheckResult) -> str:
    """A pull-request comment: what failed first, then everything in a fold."""
    failed = [markdown(difference_table("", result.failures))] if result.failures else []
    everything = markdown(difference_table("", result.differences))
    fold = ["<details><summary>all comparisons</summary>", "", everything, "</details>", ""]
    return "\n".join([f"### tokbench check {summary(result)}", "", *failed, *fold])


def verdict_junit(result: CheckResult) -> str:
    """JUnit XML, a test case per comparison."""
    failed, table = set(result.failures), verdict_table(result)
    suite = ElementTree.Element(
        "testsuite", name="tokbench check", tests=str(len(table.rows)), failures=str(len(failed)), errors="0"
    )
    for d, row in zip(result.differences, table.rows, strict=True):
        case = ElementTree.SubElement(suite, "testcase", classname=d.cell, name=d.metric)
        text = ", ".join(f"{key} {cell.text}" for key, cell in row.cells.items() if key != "metric")
        if d in failed:
            ElementTree.SubElement(case, "failure", message=text)
        else:
            ElementTree.SubElement(case, "system-out").text = text
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def verdict_json(result: CheckResult) -> str:
    record = {
        "passed": not result.failures,
        "summary": summary(result),
        "comparisons": [asdict(d) for d in result.differences],
    }
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def most_lost(
    base: ResultEntry, new: ResultEntry, metrics: Sequence[str] = ("lpips-alex", "psnr"), count: int = 10
) -> list[tuple[str, float]]:
    """(sample id, loss) of the images that lost most, by the first of these metrics that both sides have per image."""
    for name in metrics:
        theirs, ours = paired_columns(base, new, name)
        if len(ours) and base.rows[0] == new.rows[0]:
            loss = (ours - theirs) * (1 if METRICS[name].better == "lower" else -1)
            order = np.argsort(-loss, kind="stable")[:count]
            return [(new.rows[0][i], float(loss[i])) for i in order if loss[i] > 0]
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


def run_check(
    new: Path, against: Path, *, tolerance: str | None = None, metrics: str | None = None, exact: bool = False,
    two_sided: bool = False, strict: bool = False, speed: bool = False, markdown: Path | None = None,
    junit: Path | None = None, json: Path | None = None, strips: Path | None = None, overwrite: bool = False,
    accept: bool = False,
) -> int:  # fmt: skip
    """Compare, print, write what was asked for; 1 if something got worse. GitHub's step summary gets the Markdown."""
    names = [name.strip() for name in metrics.split(",")] if metrics else None
    rules: dict[str, Any] = {"tolerances": parse_tolerances(tolerance), "metrics": names}
    if overwrite:
        print("\n".join(update(new, against, accept=accept, **rules)))
        return 0
    if speed:
        result = CheckResult(tuple(check_speed(new, against)), strict)
    else:
        result = check(new, against, exact=exact, two_sided=two_sided, strict=strict, **rules)
    show([verdict_table(result)], WIDTH)
    texts = {markdown: verdict_markdown, junit: verdict_junit, json: verdict_json}
    for path, text in texts.items():
        if path is not None:
            write_whole(path, text(result))
    if step_summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with writable(Path(step_summary)), open(step_summary, "a", encoding="utf-8") as file:
            file.write(verdict_markdown(result))
    if strips is not None:
        draw_strips(result, strips)
    return int(bool(result.failures))


def draw_strips(result: CheckResult, folder: Path) -> None:
    """A picture per cell of the ten images that lost most, and their names."""
    for base, new in result.pairs:
        assert base.path is not None
        assert new.path is not None
        lost = most_lost(base, new)
        for sample, loss in lost:
            print(f"{new.name}: {sample} lost {loss:.4g}")
        real, fakes = image_folders(new.path)
        folders = [real, image_folders(base.path)[1], fakes]
        rows = [[folder / image_name(sample) for folder in folders] for sample, _ in lost]
        if lost and strip(rows, folder / f"{new.path.parent.name}-{new.name}.png") is None:
            print(f"{new.name}: no picture, both sides need `tokbench run --save-images`")
