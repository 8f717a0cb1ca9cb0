"""Percentiles, paired differences and groups against numpy."""

from pathlib import Path

import numpy as np
import pytest

from tests.made_records import record, rows, write
from tests.report.test_report import entry
from tokbench.errors import InputError
from tokbench.records.files import per_image_path, read_groups, read_per_image, write_per_image
from tokbench.report.build import build
from tokbench.report.columns import ResultEntry, column, quantile
from tokbench.report.leaderboard import blocks, spread_tables


def test_percentiles_are_columns(tmp_path: Path) -> None:
    one = entry(tmp_path, "a", n=200)
    values = one.rows[1]["psnr"]
    (block,) = blocks([one], ["psnr:p5", "psnr:median", "psnr:worst", "lpips-alex:worst"])
    cells = block.rows[0].cells
    assert cells["psnr:p5"].value == pytest.approx(np.quantile(values, 0.05))
    assert cells["psnr:median"].value == pytest.approx(np.median(values))
    assert cells["psnr:worst"].value == values.min()
    assert cells["psnr:worst"].note == one.rows[0][int(values.argmin())]
    assert cells["lpips-alex:worst"].value == one.rows[1]["lpips-alex"].max()
    assert not any(cell.rank for cell in cells.values())


def test_the_error_of_a_percentile_is_its_spread_over_fresh_samples() -> None:
    drawn = np.random.default_rng(0).standard_normal((2000, 400))
    spread = np.quantile(drawn, 0.05, axis=1).std()
    errors = [error for values in drawn[:200] if (error := quantile(values, 0.05).stderr)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)
    assert quantile(drawn[0, :20], 0.05).stderr is None


@pytest.mark.parametrize("key", ["psnr:p500", "psnr:best", "rfid:p5", "nothing:p5"])
def test_a_percentile_that_cannot_be_is_one_line(key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"column {key}"):
        column(key, [entry(tmp_path, "a")])


def test_csv_holds_percentiles(tmp_path: Path) -> None:
    one = entry(tmp_path / "results", "a")
    build([tmp_path / "results"], format="csv", columns=["psnr:median"], out=tmp_path / "a.csv")
    header, line = (tmp_path / "a.csv").read_text().splitlines()
    assert header.endswith("psnr:median")
    assert float(line.rpartition(",")[2]) == pytest.approx(np.median(one.rows[1]["psnr"]))


def test_differences_are_those_of_the_same_images(tmp_path: Path) -> None:
    a, b = entry(tmp_path, "a"), entry(tmp_path, "b", seed=1, shift=0.5)
    (table,) = spread_tables(blocks([a, b]), ["lpips-alex"], "a", None)
    difference = b.rows[1]["lpips-alex"] - a.rows[1]["lpips-alex"]
    (row,) = table.rows
    assert row.name == "b"
    assert float(row.cells["mean"].text) == pytest.approx(difference.mean(), abs=1e-5)
    assert float(row.cells["p95"].text) == pytest.approx(np.quantile(difference, 0.95), abs=1e-5)
    assert float(row.cells["worst"].text) == pytest.approx(difference.max(), abs=1e-5)
    assert row.cells["better"].text == f"{(difference < 0).mean():.0%}"


def test_groups_come_worst_first_and_hold_their_own_images(tmp_path: Path) -> None:
    values = rows(0, 30, 0.0)
    path = write(tmp_path, record("a", n=30))
    groups = [f"class {i % 3}" for i in range(30)]
    write_per_image(per_image_path(path), [f"{i}" for i in range(30)], values, {"class": groups, "light": ["day"] * 30})
    assert read_groups(per_image_path(path))["class"] == groups
    assert read_per_image(per_image_path(path))[1].keys() == values.keys()
    one = ResultEntry(record("a", n=30), path)
    (table,) = spread_tables(blocks([one]), ["psnr"], None, "class")
    means = [values["psnr"][i::3].mean() for i in range(3)]
    assert [heading for heading, _ in table.groups] == [f"class {i}" for i in np.argsort(means)]
    assert [float(row.cells["mean"].text) for row in table.rows] == pytest.approx(sorted(means), abs=1e-3)
    assert len(spread_tables(blocks([one]), None, None, "light")[0].groups) == 1


def test_a_folder_in_the_id_is_a_class(tmp_path: Path) -> None:
    path = write(tmp_path, record("a", n=4))
    write_per_image(per_image_path(path), ["x/1", "x/2", "y/1", "y/2"], {"psnr": np.arange(4.0)})
    assert ResultEntry(record("a", n=4), path).groups("class") == ["x", "x", "y", "y"]


@pytest.mark.parametrize(("options", "reason"), [
    ({"reference": "bb"}, "no such row; did you mean b"),
    ({"group_by": "colour"}, "no such column"),
    ({"reference": "a", "columns": ["params"]}, "no result here has values"),
])  # fmt: skip
def test_what_cannot_be_compared_is_one_line(options: dict[str, object], reason: str, tmp_path: Path) -> None:
    for name in "ab":
        entry(tmp_path, name)
    with pytest.raises(InputError, match=reason):
        build([tmp_path], **options)  # type: ignore[arg-type]
