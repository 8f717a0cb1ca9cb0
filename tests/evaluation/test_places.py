"""Any two measurements into one folder: everything that the first printed can still be printed afterwards."""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, Ran
from tests.made_records import record
from tokbench.evaluation import cell
from tokbench.evaluation.evaluate import evaluate
from tokbench.records.files import per_image_path, read_per_image, read_results, result_path, write_whole
from tokbench.records.measurement import Measurement
from tokbench.records.places import placed
from tokbench.records.result import EvalResult, to_json
from tokbench.report.build import Report, text
from tokbench.report.collect import gather

MODEL = f"tiny={TINY}@noise=0.2"
# Another value of every option than that of the first line.
FIRST: dict[str, Any] = {"tokenizer": MODEL, "resolution": 32, "metrics": ("psnr",), "device": "cpu"}
OTHER: dict[str, Any] = {
    "tokenizer": f"tiny={TINY}@noise=0.1",
    "resolution": 40,
    "metrics": ("ssim",),
    "protocol": "llamagen",
    "seeds": (0, 1),
    "dtype": "bfloat16",
    "device": "auto",  # another kind of machine is below
    "batch_size": 2,
    "workers": 1,
    "small": "refuse",
    "skip_bad": True,
    "keep_features": True,
    "save_images": 1,
    "limit": 3,
}


def test_every_option_of_a_measurement_has_another_value_here() -> None:
    assert {field.name for field in fields(Measurement)} <= OTHER.keys()


@pytest.fixture(scope="module")
def few(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few") / "photographs"
    folder.mkdir()
    for path in sorted(photographs.iterdir())[:4]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def first(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first")
    evaluate(data=few, out=out, **FIRST)
    return out


def printed(out: Path) -> set[tuple[str, ...]]:
    """Every value of a metric that a report of the folder holds, with what it is of."""
    entries, _, warnings = gather(out)
    assert warnings == []
    assert text(Report(entries), "table")
    return {
        (entry.result.protocol_fingerprint, entry.result.dataset.fingerprint, metric, repr(value.value))
        for entry in entries
        for metric, value in entry.result.metrics.items()
    }


@pytest.mark.parametrize("option", OTHER)
def test_nothing_that_was_printed_is_lost_by_another_value_of(
    option: str, few: Path, first: Path, tmp_path: Path
) -> None:
    other = {**FIRST, option: OTHER[option]}
    shutil.copytree(first, tmp_path / "there")
    evaluate(data=few, out=tmp_path / "back", **other)
    for out, then in ((tmp_path / "there", other), (tmp_path / "back", FIRST)):
        before = printed(out)
        result = evaluate(data=few, out=out, **then)
        assert before <= printed(out)
        again = evaluate(data=few, out=out, **then)
        assert (again.tokenizer.name, again.metrics) == (result.tokenizer.name, result.metrics)
        assert again.provenance.date == result.provenance.date  # found again, by its own name


def test_another_spelling_of_a_path_is_the_same_model(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(TINY.partition(":")[0], tmp_path / "own.py")
    found = [
        evaluate(f"{place}own.py:tiny", few, 32, [metric], out=tmp_path / "runs")
        for place, metric in (("", "psnr"), ("./", "ssim"), (f"{tmp_path}/", "psnr"))
    ]
    assert {result.tokenizer.name for result in found} == {"tiny"}
    assert [set(result.metrics) for result in found] == [{"psnr"}, {"psnr", "ssim"}, {"psnr", "ssim"}]


def test_tables_show_what_tells_rows_apart(
    tokbench: Callable[..., Ran], few: Path, first: Path, tmp_path: Path
) -> None:
    shutil.copytree(first, tmp_path / "runs")
    command = ("run", "--models", MODEL, "--res", "32", "--metrics", "psnr", "--data", few, "--out", tmp_path / "runs")
    ran = tokbench(*command, "--dtype", "bfloat16", "--seeds", "0,1")
    assert "runs/ holds another measurement of tiny: this one is tiny-bfloat16-seeds-0-1" in ran.err
    lines = tokbench("report", "--results", tmp_path / "runs").out.splitlines()
    assert lines[1].split()[:4] == ["tokenizer", "latent", "dtype", "seeds"]
    rows = {line.split()[0]: line.split()[1:4] for line in lines if line.startswith("tiny")}
    assert rows["tiny"] == ["f4c4", "float32", "0"]
    assert rows["tiny-bfloat16-seeds-0-1"] == ["f4c4", "bfloat16", "0,1"]
    assert tokbench("check", tmp_path / "runs", "--against", tmp_path / "runs").status == 0


def test_of_jobs_that_begin_at_once_none_takes_the_name_of_another(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is done measuring when the second begins, and writes its record when the second is done."""
    second: list[EvalResult] = []

    def write_later(*arguments: Any) -> EvalResult:
        monkeypatch.undo()
        second.append(evaluate(data=few, out=tmp_path, **FIRST))
        return cell.write_record(*arguments)

    monkeypatch.setattr(cell, "write_record", write_later)
    first = evaluate(data=few, out=tmp_path, **{**FIRST, "dtype": "bfloat16", "seeds": (0, 1)})
    found = {result.tokenizer.name: result for _, result in read_results(tmp_path)[0]}
    assert found == {"tiny": second[0], "tiny-bfloat16-seeds-0-1": first}
    for path, result in read_results(tmp_path)[0]:
        assert read_per_image(per_image_path(path))[1]["psnr"].mean() == pytest.approx(result.metrics["psnr"].value)
    assert not list(tmp_path.rglob(".tiny*"))


KINDS = {
    "cuda": lambda r: replace(r, provenance=replace(r.provenance, device_type="cuda")),
    "v1": lambda r: replace(r, protocol_fingerprint="e" * 16, measurement=Measurement()),
    "2": lambda r: replace(r, settings=replace(r.settings, scored={"fake_fingerprint": "f"})),
}


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(KINDS, 2)))
def test_a_record_gives_way_to_one_that_is_there_and_says_why(one: str, other: str, tmp_path: Path) -> None:
    def write(result: EvalResult) -> str:
        found = placed(tmp_path, result)
        write_whole(result_path(tmp_path, found), to_json(found))
        return found.tokenizer.name

    base = replace(record("model"), measurement=Measurement())
    assert write(base) == "model"
    assert write(replace(base, tokenizer=replace(base.tokenizer, weights="cd" * 32))) == "model"  # trained on
    named = [write(KINDS[kind](base)) for kind in (one, other, one)]
    assert named[0] == named[2] == f"model-{one}"
    assert named[1] == f"model-{other}"


def test_a_generated_record_says_what_was_sampled_otherwise(tmp_path: Path) -> None:
    names = []
    for sampling in ({"steps": 5, "labels": "0-9"}, {"steps": 10, "labels": "0-9"}, {"steps": 5, "labels": "0-9"}):
        base = record("model")
        found = placed(tmp_path, replace(base, settings=replace(base.settings, generation=sampling)))
        write_whole(result_path(tmp_path, found), to_json(found))
        names.append(found.tokenizer.name)
    assert names == ["model", "model-steps-10", "model"]
