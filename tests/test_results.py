"""What is committed under results/ belongs together: `make leaderboard` after every change."""

from pathlib import Path

import pytest

from tests import ROOT
from tokbench.errors import InputError
from tokbench.report.build import Report, text
from tokbench.report.collect import gather
from tokbench.report.curves import all_plots
from tokbench.report.reported import read_reported

RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def report() -> Report:
    try:
        entries, speeds, warnings = gather(RESULTS)
    except InputError:
        pytest.skip("no results are committed yet")
    assert warnings == []
    return Report(entries, speeds, read_reported(RESULTS / "reported.csv"))


@pytest.mark.parametrize(("format", "name"), [("markdown", "LEADERBOARD.md"), ("csv", "leaderboard.csv")])
def test_committed_leaderboard_is_that_of_the_committed_results(report: Report, format: str, name: str) -> None:
    fresh = text(report, format)
    committed = (RESULTS / name).read_text(encoding="utf-8")
    assert committed == fresh, f"results/{name} is stale: run make leaderboard and commit what it wrote"


def test_committed_plots_are_those_of_the_committed_results(report: Report, tmp_path: Path) -> None:
    logs = sorted(RESULTS.rglob("log.jsonl"))
    plots = all_plots(report.entries, report.speeds, report.reported, tmp_path, logs=logs)
    fresh = {path.name for path in plots}
    assert {path.name for path in (RESULTS / "plots").glob("*")} == fresh, (
        "results/plots is stale: run make leaderboard"
    )
