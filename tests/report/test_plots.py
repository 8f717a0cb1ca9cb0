import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests import ROOT
from tests.made_records import record, rows, write
from tokbench.errors import InputError
from tokbench.records.result import Value
from tokbench.report import plots
from tokbench.report.columns import ResultEntry, metric_column, number
from tokbench.report.curves import all_plots, bits_per_pixel, rate_distortion, rfid_vs_gfid
from tokbench.report.plots import Point, label_points, pareto, quality_vs_time, save, scatter
from tokbench.report.reported import papers_table, read_reported
from tokbench.report.speed import of_one_place

REPORTED = ROOT / "results" / "reported.csv"


def entry(folder: Path, name: str, seed: int, bpp: float | None = None, **info: object) -> ResultEntry:
    result = record(name, seed=seed, shift=0.2 * seed, **info)  # type: ignore[arg-type]
    if bpp is not None:
        result = dataclasses.replace(result, metrics={**result.metrics, "bpp": Value(bpp, n=29)})
    return ResultEntry(result, write(folder, result, rows(seed, 29, 0.2 * seed)))


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_results_give_the_same_bytes(tmp_path: Path, kind: str) -> None:
    results = [ResultEntry(record(name, seed=i, shift=i)) for i, name in enumerate("abc")]
    once, again = (quality_vs_time(results, tmp_path / f"{n}.{kind}") for n in (1, 2))
    assert once is not None
    assert again is not None
    assert once.read_bytes() == again.read_bytes()


def test_one_row_makes_no_plot(tmp_path: Path) -> None:
    assert quality_vs_time([ResultEntry(record("a"))], tmp_path / "a.png") is None
    assert not (tmp_path / "a.png").exists()


def test_plots_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.png", tmp_path / "a.gif"):
        with pytest.raises(InputError, match=r"a\.(png|gif)"):
            save(plots.figure()[0], path)


def test_pareto_front_is_what_nothing_beats() -> None:
    points = [Point(n, "", x, y) for n, x, y in [("a", 1, 5), ("b", 2, 3), ("c", 3, 4), ("d", 4, 1), ("e", 2, 9)]]
    assert [p.name for p in pareto(points, "lower", "lower")] == ["a", "b", "d"]
    assert [p.name for p in pareto(points, "higher", "higher")] == ["e", "c", "d"]


@pytest.mark.parametrize("seed", range(4))
def test_labels_never_overlap(seed: int) -> None:
    places = np.random.default_rng(seed).random((25, 2)) ** 2
    points = [Point(f"tokenizer-{i}", f"family {i % 3}", 0.1 + x, y) for i, (x, y) in enumerate(places)]
    fig = scatter(points, "decode (ms/img)", "lower", metric_column("psnr"))
    fig.draw_without_rendering()
    (ax,) = fig.axes
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # of an annotation without its line
    assert len(boxes) >= 12
    for i, box in enumerate(boxes):
        inner = box.shrunk(0.97, 0.75)  # line height is more than what is inked
        assert not any(inner.overlaps(other.shrunk(0.97, 0.75)) for other in boxes[:i])


def test_a_crowd_loses_labels_rather_than_legibility() -> None:
    fig, ax = plots.figure()
    label_points(ax, [Point(f"the-same-place-{i}", "", 0.5, 0.5) for i in range(80)])
    assert isinstance(fig, Figure)
    assert len(ax.texts) < 80


def test_rate_is_measured_or_follows_from_the_codebook(tmp_path: Path) -> None:
    assert bits_per_pixel(entry(tmp_path, "jpeg-q50", 1, bpp=0.7, downsample=None, channels=None)) == 0.7
    assert bits_per_pixel(entry(tmp_path, "vq", 2, downsample=16, channels=8, codebook_size=16384)) == 14 / 256
    assert bits_per_pixel(entry(tmp_path, "kl", 3)) is None
    assert number(record("kl", downsample=8, channels=4), "ratio") == 4 / 192


def test_every_figure_is_drawn_once_there_is_something_to_show(tmp_path: Path) -> None:
    entries = [
        entry(tmp_path, f"jpeg-q{q}", i, bpp=0.1 * q, family="codec", downsample=None, channels=None)
        for i, q in enumerate((10, 50))
    ]
    entries += [entry(tmp_path, f"ssdd-steps-{s}", 3 + s, family="ssdd", decode_steps=s) for s in (1, 2, 4)]
    entries += [entry(tmp_path, "f16", 4, downsample=16, channels=8), entry(tmp_path, "f16", 3, downsample=16, res=512)]
    log = tmp_path / "train" / "a" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps({"step": i, "l1": 1 / i, "lr": 1e-4}) + "\n" for i in (1, 2, 3)))
    made = all_plots(entries, [], read_reported(REPORTED), tmp_path / "plots", "svg", [log])
    kinds = {path.name.split("-adm")[0].split(".")[0] for path in made}
    assert kinds == {
        "quality-time", "rate-psnr", "rate-lpips-alex", "dimensions-psnr", "dimensions-lpips-alex", "steps",
        "resolution", "rfid-gfid", "training",
    }  # fmt: skip
    assert all(path.stat().st_size > 1000 for path in made)
    assert all_plots([], [], [], tmp_path / "none") == []


def test_a_torn_line_of_a_log_is_forgiven_here_as_in_training(tmp_path: Path) -> None:
    log = tmp_path / "run" / "log.jsonl"
    log.parent.mkdir()
    log.write_text("".join(json.dumps({"step": i, "l1": 1 / i}) + "\n" for i in (1, 2)) + '{"step": 3, "l')
    assert [path.name for path in all_plots([], [], [], tmp_path / "plots", logs=[log])] == ["training.png"]


def test_rate_needs_two_rates(tmp_path: Path) -> None:
    assert rate_distortion([entry(tmp_path, "a", 1)], "psnr", tmp_path / "a.png") is None
    assert rfid_vs_gfid([entry(tmp_path, "a", 1)], [], tmp_path / "a.png") is None


def test_reported_rows_are_readable_and_name_known_tokenizers() -> None:
    from tokbench.registry import TOKENIZERS

    found = read_reported(REPORTED)
    assert len(found) == 322
    assert {row.tokenizer for row in found} - {""} <= set(TOKENIZERS.all())
    assert all(row.source for row in found)


def ours(**change: object) -> ResultEntry:
    result = record("sd-vae-ft-mse", n=50_000)
    data = dataclasses.replace(result.dataset, **{"name": "imagenet", "split": "val", **change})  # type: ignore[arg-type]
    metrics = {**result.metrics, "rfid": Value(0.7, n=50_000)}
    return ResultEntry(dataclasses.replace(result, dataset=data, metrics=metrics))


def test_quality_beside_speed_comes_from_one_data_set(tmp_path: Path) -> None:
    entries = [ours(name=name, split=None) for name in ("samples", "samples", "other")]
    assert [e.result.dataset.name for e in of_one_place(entries)] == ["samples", "samples"]
    assert of_one_place([]) == []


def papers(metric: str, source: str, **change: object) -> dict[str, str]:
    """The row of one metric of one source against `ours(**change)`."""
    rows = [row for row in read_reported(REPORTED) if row.source.startswith(source)]
    table = papers_table(rows, [ours(**change)])
    assert table is not None
    (row,) = [row for row in table.rows if row.cells["metric"].text == metric]
    return {key: cell.text for key, cell in row.cells.items()}


def test_papers_are_compared_on_the_same_images_only() -> None:
    source = "lavinal712/AutoencoderKL README.md (main)"
    same = papers("rfid", source)
    assert [same[key] for key in ("paper", "ours", "difference", "remark")] == ["0.69", "0.70", "+0.01", ""]
    assert "network not stated" in papers("lpips-alex", source)["remark"]
    assert papers("rfid", source, name="samples", split=None)["difference"] == "–"
    assert papers_table(read_reported(REPORTED), [ours(resolution=512)]) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("model,", "modell,", 1),
        lambda text: text + "x,,eight,,,,,,,,,,,,,,\n",
        lambda text: text + "short\n",
    ],
)
def test_damaged_reported_numbers_are_named_by_line(tmp_path: Path, damage: Callable[[str], str]) -> None:
    path = tmp_path / "reported.csv"
    path.write_text(damage(REPORTED.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(InputError, match=r"reported\.csv, line \d+"):
        read_reported(path)
