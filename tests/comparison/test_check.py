import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.made_records import record, rows, write
from tokbench.comparison.check import check, update
from tokbench.comparison.differences import Rules, compare, difference_table, said
from tokbench.comparison.verdicts import verdict_junit, verdict_markdown
from tokbench.errors import InputError
from tokbench.metrics import METRICS
from tokbench.records.result import Value
from tokbench.report.tables import laid_out


def lay(folder: Path, **facts: object) -> Path:
    """One cell with its per-image rows."""
    shape = {key: facts.get(key, default) for key, default in (("seed", 0), ("n", 29), ("shift", 0.0))}
    return write(folder, record("klvae", **facts), rows(**shape))


def test_equal_results_are_the_same(tmp_path):
    lay(tmp_path / "base")
    lay(tmp_path / "new")
    result = check(tmp_path / "new", tmp_path / "base", Rules(exact=True))
    assert not result.failures
    assert {d.verdict for d in result.differences} == {"same"}
    assert {d.metric for d in result.differences} == {"psnr", "ssim", "lpips-alex", "lpips-vgg"}  # rfid: null on both


@pytest.mark.parametrize(("shift", "verdict"), [(-0.5, "worse"), (0.5, "better"), (0.0, "same")])
def test_direction_decides_what_is_worse(tmp_path, shift, verdict):
    lay(tmp_path / "base")
    lay(tmp_path / "new", shift=shift)
    result = check(tmp_path / "new", tmp_path / "base")
    assert {d.verdict for d in result.differences} == {verdict}
    assert bool(result.failures) == (verdict == "worse")


def test_inconclusive_passes_unless_strict(tmp_path):
    lay(tmp_path / "base")
    lay(tmp_path / "new", seed=7)
    rules = {"tolerances": {"psnr": "0", "ssim": "0", "lpips-alex": "0", "lpips-vgg": "0"}}
    assert not check(tmp_path / "new", tmp_path / "base", Rules(**rules)).failures
    assert check(tmp_path / "new", tmp_path / "base", Rules(strict=True, **rules)).failures


def test_a_certain_loss_below_the_tolerance_warns(tmp_path):
    lay(tmp_path / "base")
    lay(tmp_path / "new", shift=-0.02)
    result = check(tmp_path / "new", tmp_path / "base", Rules(metrics=["psnr"], tolerances={"psnr": "0.5"}))
    assert [d.verdict for d in result.differences] == ["same"]
    assert said(result.differences[0]) == "same (worse within the tolerance)"


def test_without_rows_the_wide_interval_judges_and_without_an_error_the_difference_alone(tmp_path):
    new = record("klvae", shift=-0.2)
    write(tmp_path / "base", record("klvae"))
    write(tmp_path / "new", replace(new, metrics={**new.metrics, "ssim": replace(new.metrics["ssim"], stderr=None)}))
    result = check(tmp_path / "new", tmp_path / "base", Rules(tolerances={"psnr": "10"}))
    verdicts = {d.metric: (d.verdict, d.how, d in result.failures) for d in result.differences}
    unpaired = "unpaired: wider than need be"
    assert verdicts["psnr"] == ("same", unpaired, False)
    assert verdicts["lpips-alex"] == ("inconclusive", unpaired, False)
    assert verdicts["ssim"] == ("inconclusive", "no error known", True)


def test_strict_forgives_a_gain_that_may_be_small(tmp_path):
    lay(tmp_path / "base")
    lay(tmp_path / "new", shift=0.1, seed=3)
    rules = {"metrics": ["psnr"], "tolerances": {"psnr": "0.3"}}
    result = check(tmp_path / "new", tmp_path / "base", Rules(strict=True, **rules))
    assert [d.verdict for d in result.differences] == ["inconclusive"]
    assert not result.failures
    assert check(tmp_path / "new", tmp_path / "base", Rules(strict=True, two_sided=True, **rules)).failures


def test_check_and_compare_judge_alike(tmp_path):
    """Per-image columns, and psnr-global by the delta method, whatever the command."""
    paths = []
    for name, shift in (("base", 0.0), ("new", -0.1)):
        columns = rows(0, 29, shift)
        columns["mse"] = 10 ** (-columns["psnr"] / 10)
        value = Value(float(-10 * np.log10(columns["mse"].mean())), n=29)
        result = record("klvae", shift=shift)
        result = replace(result, metrics={**result.metrics, "psnr-global": value})
        paths.append(write(tmp_path / name, result, columns))
    checked = check(tmp_path / "new", tmp_path / "base").differences
    assert {d.metric: d for d in checked} == {d.metric: d for d in compare(*paths)}
    (overall,) = [d for d in checked if d.metric == "psnr-global"]
    assert overall.how == "paired by image"
    low, high = overall.interval
    assert low < overall.change < high < 0


def test_exact_fails_on_any_change(tmp_path):
    lay(tmp_path / "base")
    write(tmp_path / "new", record("klvae"), {k: v + (np.arange(29) == 3) * 1e-9 for k, v in rows(0, 29, 0.0).items()})
    assert not check(tmp_path / "new", tmp_path / "base").failures
    assert len(check(tmp_path / "new", tmp_path / "base", Rules(exact=True)).failures) == 4


def test_what_cannot_be_compared_is_an_error(tmp_path):
    base = lay(tmp_path / "base")
    lay(tmp_path / "other", res=128)
    with pytest.raises(InputError, match="no such cell"):
        check(tmp_path / "other", tmp_path / "base")
    for field, value, words in (
        ("protocol_fingerprint", "e" * 16, "protocol"),
        ("dataset", {"fingerprint": "a" * 16}, "images"),
        ("tokenizer", {"decode_steps": 8}, "decode steps None and 8"),
        ("schema", 99, "schema 99"),
    ):
        changed = json.loads(base.read_text())
        changed[field] = {**changed[field], **value} if isinstance(value, dict) else value
        path = tmp_path / field / "adm" / "samples-256" / "klvae.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=words):
            check(tmp_path / field, tmp_path / "base")
    with pytest.raises(InputError, match="dists cannot be compared"):
        check(tmp_path / "base", tmp_path / "base", Rules(metrics=["dists"]))
    with pytest.raises(InputError, match="unknown metric 'psrn'"):
        check(tmp_path / "base", tmp_path / "base", Rules(metrics=["psrn"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no results"):
        check(tmp_path / "empty", tmp_path / "base")


@pytest.mark.parametrize("text", ["psnr", "psnr=x", "psnr=-1", "psnr=inf", "nothing=1"])
def test_tolerances_are_read_strictly(tokbench, tmp_path, text):
    lay(tmp_path / "base")
    right = Rules(tolerances={"psnr": "0.05", "lpips-alex": "1%"})
    assert [right.tolerance(name, 2.0) for name in ("psnr", "lpips-alex", "ssim")] == [
        0.05,
        0.02,
        METRICS["ssim"].tolerance,
    ]
    ran = tokbench("check", tmp_path / "base", "--against", tmp_path / "base", "--tolerance", text)
    assert (ran.status, ran.out) == (2, "")
    assert text.partition("=")[0] in ran.reason


def test_update_keeps_a_better_baseline_unless_told(tmp_path):
    lay(tmp_path / "base")
    lay(tmp_path / "new", shift=-1.0)
    before = {path: path.read_bytes() for path in (tmp_path / "base").rglob("*.*")}
    with pytest.raises(InputError, match="--accept"):
        update(tmp_path / "new", tmp_path / "base")
    assert before == {path: path.read_bytes() for path in (tmp_path / "base").rglob("*.*")}
    assert any("psnr" in line for line in update(tmp_path / "new", tmp_path / "base", accept=True))
    assert not check(tmp_path / "new", tmp_path / "base", Rules(exact=True)).failures
    lay(tmp_path / "more", res=128)
    assert update(tmp_path / "more", tmp_path / "base") == ["klvae at 128 px: new"]
    check(tmp_path / "new", tmp_path / "base", Rules(exact=True))


def test_a_file_of_this_folder_updates_the_baseline(tmp_path, monkeypatch):
    path = lay(tmp_path / "new")
    monkeypatch.chdir(path.parent)
    assert update(Path(path.name), tmp_path / "base") == ["klvae at 256 px: new"]
    assert not check(tmp_path / "new", tmp_path / "base", Rules(exact=True)).failures


def test_outputs_say_what_failed(tmp_path):
    lay(tmp_path / "base")
    lay(tmp_path / "new", shift=-1.0)
    result = check(tmp_path / "new", tmp_path / "base")
    suite = ElementTree.fromstring(verdict_junit(result).partition("\n")[2])
    assert suite.get("failures") == suite.get("tests") == "4"
    assert len(suite.findall("testcase/failure")) == 4
    assert "FAILED: 4 comparisons, 4 worse" in verdict_markdown(result)


def test_tables_give_n_and_mark_what_a_model_was_trained_for(tmp_path):
    lay(tmp_path / "base")
    lay(tmp_path / "new", losses=("lpips-alex",))
    result = check(tmp_path / "new", tmp_path / "base")
    table = difference_table("", result.differences)
    rows = {row.cells["metric"].text: {key: cell.text for key, cell in row.cells.items()} for row in table.rows}
    assert {row["N"] for row in rows.values()} == {"29"}
    assert [rows["lpips-alex"][side][-1] == "†" for side in ("baseline", "new")] == [False, True]
    assert "†" not in rows["psnr"]["new"]
    for text in (verdict_markdown(result), laid_out([table])):
        assert "† the metric's network was part of this model's training loss" in text
    plain = check(tmp_path / "base", tmp_path / "base")
    assert "†" not in verdict_markdown(plain) + laid_out([difference_table("", plain.differences)])


def test_no_loss_is_no_negative_zero(tmp_path):
    lay(tmp_path / "base")
    (row,) = difference_table("", check(tmp_path / "base", tmp_path / "base", Rules(metrics=["psnr"])).differences).rows
    assert [row.cells[key].text for key in ("difference", "95 % interval")] == ["+0.000", "[+0.000, +0.000]"]
