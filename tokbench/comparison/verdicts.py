"""What a comparison found, for people (terminal, pull request) and for machines (JUnit XML)."""

import os
from pathlib import Path
from xml.etree import ElementTree

from tokbench.comparison.check import CheckResult
from tokbench.comparison.differences import STYLES, compare, difference_table
from tokbench.records.files import writable, write_whole
from tokbench.report.tables import markdown, show

WIDTH = 130  # characters of the table where there is no terminal


def show_comparison(path_a: Path, path_b: Path) -> None:
    """Print B against A."""
    show([difference_table(f"B {path_b} against A {path_a}", compare(path_a, path_b), ("A", "B"))], WIDTH)


def show_check(result: CheckResult, markdown: Path | None, junit: Path | None) -> int:
    """Print and write what was found; 1 if something got worse. GitHub's step summary gets the Markdown."""
    show([difference_table(summary(result), result.differences)], WIDTH)
    if markdown is not None:
        write_whole(markdown, verdict_markdown(result))
    if junit is not None:
        write_whole(junit, verdict_junit(result))
    if step_summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with writable(Path(step_summary)), open(step_summary, "a", encoding="utf-8") as file:
            file.write(verdict_markdown(result))
    return int(bool(result.failures))


def summary(result: CheckResult) -> str:
    """One line: how many comparisons and how they ended."""
    counts = {v: sum(d.verdict == v for d in result.differences) for v in STYLES}
    ended = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"{'FAILED' if result.failures else 'passed'}: {len(result.differences)} comparisons, {ended}"


def verdict_markdown(result: CheckResult) -> str:
    """A pull-request comment: what failed first, then everything in a fold."""
    failed = [markdown(difference_table("", result.failures))] if result.failures else []
    everything = markdown(difference_table("", result.differences))
    fold = ["<details><summary>all comparisons</summary>", "", everything, "</details>", ""]
    return "\n".join([f"### tokbench check {summary(result)}", "", *failed, *fold])


def verdict_junit(result: CheckResult) -> str:
    """JUnit XML, a test case per comparison."""
    failed, rows = result.failures, difference_table("", result.differences).rows
    counts = {"tests": str(len(rows)), "failures": str(len(failed)), "errors": "0"}
    suite = ElementTree.Element("testsuite", {"name": "tokbench check", **counts})
    for d, row in zip(result.differences, rows, strict=True):
        case = ElementTree.SubElement(suite, "testcase", classname=d.cell, name=d.metric)
        text = ", ".join(f"{key} {cell.text}" for key, cell in row.cells.items() if key != "metric")
        if d in failed:
            ElementTree.SubElement(case, "failure", message=text)
        else:
            ElementTree.SubElement(case, "system-out").text = text
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"
