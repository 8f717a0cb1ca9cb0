import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests import ROOT
from tests.conftest import Ran
from tests.made_records import record, rows, write
from tokbench.errors import InputError
from tokbench.metrics.statistics import paired
from tokbench.records.files import read_results
from tokbench.records.result import (
    EvalResult,
    Provenance,
    Settings,
    TokenizerInfo,
    Value,
    from_json,
    read_result,
    read_speed,
    to_json,
)
from tokbench.report.build import Report, build, text
from tokbench.report.collect import frame, gather, where
from tokbench.report.columns import ResultEntry, column, compression
from tokbench.report.leaderboard import blocks, ranking
from tokbench.report.tables import LATEX_PACKAGES, WIDTH, Heading, latex, markdown, plain, print_tables


def entry(folder: Path, name: str, **options: object) -> ResultEntry:
    result = record(name, **options)  # type: ignore[arg-type]
    columns = rows(options.get("seed", 0), result.dataset.num_images, options.get("shift", 0.0))  # type: ignore[arg-type]
    return ResultEntry(result, write(folder, result, columns))


def with_metrics(result: EvalResult, **metrics: Value) -> EvalResult:
    return dataclasses.replace(result, metrics={name.replace("_", "-"): value for name, value in metrics.items()})


def printed(entries: list[ResultEntry], terminal: bool = False) -> str:
    console = Console(width=WIDTH, force_terminal=terminal, no_color=not terminal)
    with console.capture() as capture:
        print_tables(console, blocks(entries))
    return capture.get()


def test_best_is_bold_and_second_underlined(tmp_path: Path) -> None:
    good, fair, poor = (
        entry(tmp_path, name, seed=i, shift=s) for i, (name, s) in enumerate([("a", 2), ("b", 1), ("c", 0)])
    )
    (block,) = blocks([poor, good, fair])
    ranks = {row.name: row.cells["psnr"].rank for row in block.rows}
    assert ranks == {"a": 1, "b": 2, "c": 0}
    assert [row.name for row in block.rows] == ["a", "b", "c"]
    text = markdown(block)
    assert f"**{good.result.metrics['psnr'].value:.2f}**" in text
    assert f"<ins>{fair.result.metrics['psnr'].value:.2f}</ins>" in text


def test_rows_whose_paired_interval_holds_zero_share_a_rank(tmp_path: Path) -> None:
    a, b = entry(tmp_path, "a", seed=1, shift=0.5), entry(tmp_path, "b", seed=2, shift=0.5)
    worse = entry(tmp_path, "c", seed=3, shift=0.3)  # far less than the spread over images, yet behind on nearly each
    assert ranking([a, b, worse], column("psnr", [a])) == {"a": 1, "b": 1, "c": 2}
    alone = [ResultEntry(e.result) for e in (a, b, worse)]  # without per-image rows only equal values tie
    assert sorted(ranking(alone, column("psnr", alone)).values()) == [1, 2]


def test_pairs_are_matched_by_id_not_by_place(tmp_path: Path) -> None:
    a, b = entry(tmp_path, "a", seed=1), entry(tmp_path, "b", seed=2)
    ids, columns = b.rows
    order = np.random.default_rng(0).permutation(len(ids))
    b.__dict__["rows"] = ([ids[i] for i in order], {k: v[order] for k, v in columns.items()})
    assert ranking([a, b], column("psnr", [a])) == {"a": 1, "b": 1}


def test_lower_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    a, b = entry(tmp_path, "a", seed=1, shift=3), entry(tmp_path, "b", seed=2, shift=0)
    assert ranking([a, b], column("lpips-alex", [a])) == {"a": 1, "b": 2}
    assert a.result.metrics["lpips-alex"].value < b.result.metrics["lpips-alex"].value


def test_one_value_is_not_best_of_anything(tmp_path: Path) -> None:
    (block,) = blocks([entry(tmp_path, "a")])
    assert {cell.rank for row in block.rows for cell in row.cells.values()} == {0}


def test_the_identity_wins_nothing(tmp_path: Path) -> None:
    entries = [
        entry(tmp_path, "identity", family="identity", shift=9),
        *(entry(tmp_path, n, seed=i, shift=i) for i, n in enumerate("ab")),
    ]
    (block,) = blocks(entries, group=False)
    assert {row.name: row.cells["psnr"].rank for row in block.rows} == {"identity": 0, "a": 2, "b": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"protocol_fingerprint": "e" * 16},
        {"protocol": "ssdd"},
        {"dataset": dataclasses.replace(record("b").dataset, fingerprint="e" * 16)},
        {"dataset": dataclasses.replace(record("b").dataset, num_images=28)},
        {"dataset": dataclasses.replace(record("b").dataset, resolution=512)},
    ],
)
def test_different_conditions_are_never_ranked_together(change: dict[str, object]) -> None:
    found = blocks([ResultEntry(record("a", shift=3)), ResultEntry(dataclasses.replace(record("b"), **change))])  # type: ignore[arg-type]
    assert len(found) == 2
    assert len({block.title for block in found}) == 2


def test_rows_are_gathered_by_compression_and_ranked_within() -> None:
    entries = [
        ResultEntry(record(n, shift=i, seed=i, channels=c))
        for i, (n, c) in enumerate([("a", 4), ("b", 4), ("c", 16), ("d", 16)])
    ]
    (block,) = blocks(entries, ["psnr"])
    assert [(heading, [(row.name, row.cells["psnr"].rank) for row in rows]) for heading, rows in block.groups] == [
        ("f8c4", [("b", 1), ("a", 2)]),
        ("f8c16", [("d", 1), ("c", 2)]),
    ]
    (flat,) = blocks(entries, ["psnr"], group=False)
    assert [row.cells["psnr"].rank for row in flat.rows] == [1, 2, 0, 0]


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"downsample": 8, "channels": 4}, "f8c4"),
        ({"downsample": 16, "channels": 8, "codebook_size": 16384}, "f16 K16384"),
        ({"tokens_per_image": 32, "codebook_size": 4096}, "32 tokens K4096"),
        ({"tokens_per_image": 128, "channels": 16}, "128 tokens c16"),
        ({}, "x-family"),
    ],
)
def test_compression_is_named_as_the_field_does(facts: dict[str, int], name: str) -> None:
    assert compression(TokenizerInfo("x", "x-family", **facts)) == name  # type: ignore[arg-type]


@pytest.mark.parametrize("terminal", [False, True])
def test_terminal_table_fits_a_hundred_columns(tmp_path: Path, terminal: bool) -> None:
    names = ["ssdd", "klvae", "sd-vae-ft-mse-steps-8-and-a-name-that-never-ends-" + "x" * 60]
    entries = [
        entry(tmp_path, name, seed=i, shift=i, note="demo weights, undertrained") for i, name in enumerate(names)
    ]
    lines = printed(entries, terminal).splitlines()
    plain = [line for line in (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines) if line]
    assert max(map(len, plain)) <= 100
    assert not any(line.rstrip().endswith("…") for line in plain)


def test_names_are_whole_where_a_column_can_give_way(tmp_path: Path) -> None:
    names = ["ssdd", "sd-vae-ft-mse-steps-8-and-a-name-of-more-than-fifty-letters"]
    text = printed([entry(tmp_path, name, seed=i, shift=i) for i, name in enumerate(names)], False)
    assert any(line.startswith(names[1] + "  ") for line in text.splitlines())
    assert "hidden, 100 characters are too few (COLUMNS, report --columns): " in text


def test_table_says_units_directions_notes_numbers_and_machine(tmp_path: Path) -> None:
    entries = [entry(tmp_path, n, seed=i, losses=("lpips-vgg",), note="undertrained") for i, n in enumerate("ab")]
    text = printed(entries)
    for part in (
        "psnr ↑",
        "dB",
        "lpips-alex ↓",
        "N = 29",
        "CPU, 4 cores",
        "†",
        "all rows: undertrained",
        "all rows: no rfid (needs 2,048",
    ):
        assert part in text, part
    assert "*" in text  # no styles in a pipe: a star marks the best


def test_values_keep_the_digits_that_their_error_leaves() -> None:
    result = with_metrics(record("a"), psnr=Value(24.3456, 1.234, n=29), ssim=Value(0.71234, 0.0004, n=29))
    (block,) = blocks([ResultEntry(result)])
    cells = block.rows[0].cells
    assert (cells["psnr"].text, cells["psnr"].error) == ("24.3", "±1.2")
    assert (cells["ssim"].text, cells["ssim"].error) == ("0.7123", "±0.0004")


def test_unavailable_metrics_are_named_with_their_reason() -> None:
    result = dataclasses.replace(record("a"), unavailable={"dists": "no network; tokbench weights fetch dists"})
    (block,) = blocks([ResultEntry(result), ResultEntry(record("b"))])
    assert "a: no dists (no network; tokbench weights fetch dists)" in block.notes


def test_only_what_was_asked_for_is_said_to_be_missing() -> None:
    (block,) = blocks([ResultEntry(record("a"))], ["psnr"])
    assert not any("rfid" in note for note in block.notes)


def test_images_that_were_left_out_or_enlarged_are_said() -> None:
    settings = dataclasses.replace(record("a").settings, skipped=2, upscaled=3)
    (block,) = blocks([ResultEntry(dataclasses.replace(record("a"), settings=settings)), ResultEntry(record("b"))])
    assert "a: images left out: 2" in block.notes
    assert "a: images enlarged: 3" in block.notes


def test_times_of_different_machines_are_not_ranked() -> None:
    a, b = record("a", seed=1), record("b", seed=2)
    b = dataclasses.replace(b, provenance=dataclasses.replace(b.provenance, device="GPU"))
    (block,) = blocks([ResultEntry(a), ResultEntry(b)])
    assert {row.cells["decode"].rank for row in block.rows} == {0}
    assert any("different machines" in note for note in block.notes)


def test_metrics_this_version_does_not_know_are_shown() -> None:
    (block,) = blocks([ResultEntry(with_metrics(record("a"), new_metric=Value(1.5, n=29)))])
    assert block.rows[0].cells["new-metric"].text == "1.5000"


def test_query_keeps_rows(tmp_path: Path) -> None:
    entries = [entry(tmp_path, "a"), entry(tmp_path, "b", downsample=16), entry(tmp_path, "c", res=512)]
    assert [e.name for e in where(entries, "f==8 and resolution==256")] == ["a"]
    assert [e.name for e in where(entries, "`lpips-alex` < 9 and tokenizer == 'b'")] == ["b"]


@pytest.mark.parametrize("query", ["nonsense == 1", "f ==", "f.missing", "1 +", "resolution", "f == 99", "f ~ 'a'"])
def test_bad_query_is_one_clear_line(query: str) -> None:
    with pytest.raises(InputError) as caught:
        where([ResultEntry(record("a"))], query)
    assert query in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_column_names_the_known() -> None:
    with pytest.raises(InputError, match=r"unknown column 'nope'; choose from .*psnr"):
        blocks([ResultEntry(record("a"))], ["nope"])


def test_foreign_newer_and_half_written_files_are_named_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = entry(tmp_path, "good")
    assert good.path is not None
    folder = good.path.parent
    (folder / "foreign.json").write_text('{"a": 1}')
    (folder / "half.json").write_text(good.path.read_text()[:200])
    (folder / "newer.json").write_text(json.dumps({**json.loads(good.path.read_text()), "schema": 99}))
    (folder / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (folder / "list.json").write_text("[]")
    entries, _, warnings = gather(tmp_path)
    assert [e.name for e in entries] == ["good"]
    for name in ("foreign", "half", "newer", "bytes", "list"):
        assert any(f"{name}.json" in warning for warning in warnings), name
    assert build([tmp_path]) == 0
    assert build([tmp_path], strict=True) == 1
    assert "foreign.json" in capsys.readouterr().err


def test_of_two_results_for_a_cell_the_newer_counts(tmp_path: Path) -> None:
    old = record("a", shift=0)
    new = dataclasses.replace(record("a", shift=1), provenance=dataclasses.replace(old.provenance, date="2026-12-01"))
    write(tmp_path, old)
    (tmp_path / "adm" / "samples-256" / "copy.json").write_text(write(tmp_path / "other", new).read_text())
    entries, _, warnings = gather(tmp_path)
    (kept,) = entries
    assert kept.result.metrics == new.metrics
    assert any("the same cell" in warning for warning in warnings)


@pytest.mark.parametrize("below", ["adm/samples-256/a.json", "adm/samples-256", "adm", "."])
def test_a_folder_of_any_level_and_a_file_are_read(tmp_path: Path, below: str) -> None:
    entry(tmp_path, "a")
    assert [e.name for e in gather(tmp_path / below)[0]] == ["a"]


def test_several_folders_are_one_report(tmp_path: Path) -> None:
    entry(tmp_path / "one", "a"), entry(tmp_path / "two", "b")
    assert [e.name for e in gather(tmp_path / "one", tmp_path / "two")[0]] == ["a", "b"]


def test_runs_are_reported_before_results_and_it_is_said(
    tmp_path: Path, tokbench: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry(tmp_path / "results", "committed")
    for folder, name in (("results", "committed"), ("runs", "mine")):
        entry(tmp_path / folder, name)
        ran = tokbench("report")
        assert f"results of {folder}/" in ran.err
        assert name in ran.out


@pytest.mark.parametrize("options", [{"columns": ("psnr",)}, {"where": "resolution == 256"}])
def test_what_was_not_asked_for_is_not_shown(tmp_path: Path, options: dict[str, Any]) -> None:
    """A filter is of measured rows: numbers of papers are not among them."""
    entry(tmp_path, "a")
    shutil.copy(ROOT / "results" / "reported.csv", tmp_path)
    build([tmp_path], format="markdown", out=tmp_path / "all.md")
    build([tmp_path], format="markdown", out=tmp_path / "some.md", **options)
    shown = [("Reported in papers" in (tmp_path / name).read_text()) for name in ("all.md", "some.md")]
    assert shown == [True, False]


@pytest.mark.parametrize("make", [lambda p: p / "missing", lambda p: p])
def test_no_results_is_one_clear_line(tmp_path: Path, make: object) -> None:
    with pytest.raises(InputError, match="results"):
        gather(make(tmp_path))  # type: ignore[operator]


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    a, b = entry(tmp_path, "a", seed=1), entry(tmp_path, "b", seed=2)
    assert a.path is not None
    a.path.with_suffix(".per_image.csv.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match=r"a\.per_image\.csv\.gz"):
        blocks([a, b])


def test_csv_holds_full_precision(tmp_path: Path) -> None:
    a = entry(tmp_path, "a")
    table = text(Report([a]), "csv")
    assert repr(a.result.metrics["psnr"].value) in table
    head = text(Report([a], columns=("ssim", "psnr")), "csv").splitlines()[0]
    assert head.endswith("ssim,psnr")
    assert frame([a])["f"].tolist() == [8]


def generated(name: str, guidance: float = 1.0, **metrics: Value) -> ResultEntry:
    """A result of `tokbench generate`."""
    base = record(name, n=50_000, losses=("dinov2",))
    run = {"guidance": guidance, "generator": {"name": "dit-b-2", "weights": "w", "steps_trained": 1000}}
    return ResultEntry(
        dataclasses.replace(
            with_metrics(base, **metrics), protocol=f"generate-dit-b-2-1000-g{guidance:g}",
            settings=Settings(generation=run), provenance=Provenance(seconds={"generator": 1.0, "decode": 0.25}),
        )
    )  # fmt: skip


def test_generated_rows_have_columns_of_their_own_and_the_rfid_of_their_tokenizer() -> None:
    rows = [generated(n, gfid=Value(3.21, 0.05, n=50_000), fd_dinov2=Value(75.0, 1.5, n=50_000)) for n in "ab"]
    known = [ResultEntry(with_metrics(record("other-name"), rfid=Value(0.87, n=50_000)))]  # of the same weights
    (block,) = blocks(rows, known=known)
    cells = {key: cell.text + ("†" if cell.dagger else "") for key, cell in block.rows[0].cells.items()}
    assert cells == {
        "latent": "f8c4", "generator": "dit-b-2", "trained": "1000", "guidance": "1.00", "rfid": "0.870",
        "gfid": "3.210", "fd-dinov2": "75.0†", "generator/s": "1.00", "decoder/s": "4.00", "both/s": "0.80",
    }  # fmt: skip
    assert block.title.startswith("generated, against samples at 256 px")
    assert "N = 50,000" in block.notes[0]


def test_the_best_guidance_of_a_sweep_is_the_lowest_distance() -> None:
    found = blocks([generated(n, g, gfid=Value(v)) for n, g, v in [("a", 1, 3.0), ("a", 2, 2.0), ("b", 1, 1.0)]])
    remarks = [[note for note in block.notes if "guidance" in note] for block in found]
    assert remarks == [[], ["a: best of 2 guidance scales by gfid"]]


def test_all_committed_records_are_read_and_kept_by_their_json() -> None:
    """Those of schema 1 too: whatever the leaderboard leaves out."""
    records = {path: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "results").rglob("*.json")}
    paths = [path for path, record in records.items() if "metrics" in record]
    assert len(paths) > 70
    assert all(read_speed(path).stages for path, record in records.items() if record.get("kind") == "speed")
    for path in paths:
        result = read_result(path)
        assert from_json(to_json(result)) == result
        assert [found for _, found in read_results(path)[0]] == [result]
    names = {result.protocol for _, result in read_results(ROOT / "results")[0]}
    assert names >= {"adm", "generate-dit-tiny-2-1500-g1"}


NASTY = "<script>alert(1)</script> | ` * _ [x](y) \\ & % $ # { } ~ ^ é 中"


def test_markdown_lets_nothing_through(tmp_path: Path) -> None:
    (block,) = blocks([ResultEntry(record("a", note=NASTY))])
    out = markdown(block)
    assert "<script" not in out
    assert r"\[x\](y)" in out
    assert all(line.count("|") - line.count("\\|") == out.splitlines()[2].count("|") for line in out.splitlines()[2:5])


def test_latex_compiles_with_booktabs(tmp_path: Path) -> None:
    found = shutil.which("pdflatex") and subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False)
    if not found or found.returncode:
        pytest.skip("pdflatex with booktabs is not installed")
    entries = [
        entry(tmp_path, n, seed=i, shift=i, losses=("lpips-vgg",), note=NASTY, channels=4 + i % 2)
        for i, n in enumerate("abcd")
    ]
    papers = latex(plain(NASTY, [Heading(key="a"), Heading(key="b")], [[NASTY, "1"]]))
    tables = [*(latex(block) for block in blocks(entries)), papers]
    document = [r"\documentclass{article}", LATEX_PACKAGES, r"\begin{document}", *tables, r"\end{document}"]
    (tmp_path / "t.tex").write_text("\n".join(document), encoding="utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in done.stdout
    assert "Overfull \\hbox" not in done.stdout


def test_what_changed_is_paired_image_by_image_and_names_what_came_and_went(
    tmp_path: Path, tokbench: Callable[..., Ran]
) -> None:
    then, now = tmp_path / "then", tmp_path / "now"
    for folder, shift, only in ((then, 0.0, "gone"), (now, 0.5, "new")):
        entry(folder, "better", seed=1, shift=shift)
        entry(folder, "same", seed=2)
        entry(folder, only, seed=3)
    noisy = rows(1, 29, 0.5)["psnr"] + np.random.default_rng(0).normal(0, 30, 29)
    write(now, with_metrics(record("noise"), psnr=Value(25.0, n=29)), {"psnr": noisy})
    write(then, with_metrics(record("noise"), psnr=Value(24.0, n=29)), {"psnr": noisy[::-1]})
    ran = tokbench("report", "--results", now, "--against", then, "--format", "markdown")
    changed = ran.out.partition("## Changed since")[2]
    gain = paired(rows(1, 29, 0.5)["psnr"], rows(1, 29, 0.0)["psnr"])
    assert re.search(rf"better \| psnr ↑ .*\| \+{gain.value:.2f} .*\| better", changed), changed
    assert re.search(r"better \| lpips-alex ↓ .*\| better", changed)
    assert re.search(r"noise \| psnr ↑ .* \| within error", changed)
    assert "unchanged rows: 1" in changed
    assert re.search("only here, .*: new", changed)
    assert re.search("only there, .*: gone", changed)
    with pytest.raises(InputError, match="no such folder of results"):
        build([now], against=tmp_path / "none", format="markdown")


def test_report_never_imports_torch(tmp_path: Path) -> None:
    entry(tmp_path, "a"), entry(tmp_path, "b", seed=1)
    code = (
        "import sys; from pathlib import Path; from tokbench.report.build import *;"
        "d = Path(sys.argv[1]); build([d], format='html', out=d / 'site', plots=d / 'plots');"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("options", [{"format": "word"}, {"format": "html"}, {"columns": ("nope",)}, {"where": "x"}])
def test_wrong_use_is_an_input_error(tmp_path: Path, options: dict[str, object]) -> None:
    entry(tmp_path, "a")
    with pytest.raises(InputError):
        build([tmp_path], **options)  # type: ignore[arg-type]
