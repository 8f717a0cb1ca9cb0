"""The statistics of the controlled study (results/study/contrasts.py) and the split that its driver makes."""

import re
from pathlib import Path

import numpy as np
import pytest

from results import stages
from results.study import analyse, contrasts
from tests import ROOT
from tokbench.report.tables import markdown

STUDY = ROOT / "results" / "study"


def test_holm_is_the_step_down_correction() -> None:
    # Worked by hand: sorted .01 .03 .04 times 3 2 1 is .03 .06 .04, and may not fall again.
    assert contrasts.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert contrasts.holm([0.9, 0.8]) == [1.0, 1.0]


def test_crossed_bootstrap_has_the_variance_of_both_factors() -> None:
    """Additive effects: Var = var(seeds) / S + var(images) / N, of the empirical distributions."""
    rows, columns = np.array([-1.0, 0.0, 3.0]), np.linspace(0, 4, 12)
    draws = contrasts.crossed_bootstrap(rows[:, None] + columns[None], np.random.default_rng(0))
    assert draws.mean() == pytest.approx(rows.mean() + columns.mean(), abs=0.04)
    assert draws.var() == pytest.approx(rows.var() / 3 + columns.var() / 12, rel=0.05)


def test_a_claim_needs_the_corrected_test_and_every_seed() -> None:
    tables = {
        "c-student-0": {"lpips-alex": np.linspace(0.1, 0.2, 20), "psnr": np.full(20, 21.0)},
        "c-student-1": {"lpips-alex": np.linspace(0.1, 0.2, 20), "psnr": np.full(20, 21.0)},
        "a-0": {"lpips-alex": np.linspace(0.2, 0.3, 20), "psnr": np.full(20, 22.0)},
        "a-1": {"lpips-alex": np.linspace(0.2, 0.3, 20), "psnr": np.full(20, 22.0)},
    }
    c, psnr = (contrasts.contrast(tables, [0, 1], "c-student", "a", metric) for metric in ("lpips-alex", "psnr"))
    assert (c.mean, psnr.mean) == pytest.approx((-0.1, -1.0))
    assert c.p < 0.001
    assert contrasts.verdict(c, 0.001) == "better"
    assert contrasts.verdict(c, 0.06) == "not resolved"
    tables["c-student-1"]["lpips-alex"] = tables["a-1"]["lpips-alex"] + 0.01
    assert (
        contrasts.verdict(contrasts.contrast(tables, [0, 1], "c-student", "a", "lpips-alex"), 0.001) == "not resolved"
    )
    better = dict.fromkeys(("a", "b", "c-teacher", "c-control"), "better")
    assert list(contrasts.conclusions(better, psnr).values()) == ["against it", "for it", "for it"]
    tables["a-0"]["psnr"] = tables["a-1"]["psnr"] = np.linspace(19, 23, 20)  # -1.2 to 1.2 dB: perhaps inferior
    undecided = contrasts.contrast(tables, [0, 1], "c-student", "a", "psnr")
    assert list(contrasts.conclusions(better | {"c-control": "worse"}, undecided).values()) == [
        "undecided", "for it", "against it",
    ]  # fmt: skip


def test_the_split_is_the_plans(tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    listed = (STUDY / "development.txt").read_text().split()
    plan = (STUDY / "PLAN.md").read_text()
    assert len(listed) == 14
    assert all(name in plan for name in listed)
    for name in listed[:3]:
        (photographs / f"{name}.jpg").touch()
    with pytest.raises(SystemExit, match=rf"lacks development photographs of PLAN.md: {listed[3]} .*"):
        stages.split(photographs, tmp_path)
    for name in (*listed, "castle"):
        (photographs / f"{name}.jpg").touch()
    assert stages.split(photographs, tmp_path).read_text() == f"{photographs / 'castle.jpg'}\n"
    assert len((tmp_path / "development.txt").read_text().splitlines()) == len(listed)


def test_the_tables_of_the_report_are_what_the_records_say(tmp_path: Path) -> None:
    report = (STUDY / "REPORT.md").read_text()
    found = re.search(r"preset `(\w+)`", report)
    assert found is not None
    records = STUDY / found[1]
    for table in analyse.tables(records):
        assert markdown(table).strip() in report
    for question, answer in analyse.answers(records).items():
        assert f"- {question}: **{answer}**" in report
    analyse.draw(records, tmp_path, found[1])
    figures = set(re.findall(r"\]\((\S+\.(?:png|jpg))\)", report))
    assert {path.name for path in tmp_path.iterdir()} <= figures
    assert all((STUDY / name).stat().st_size > 0 for name in figures)
