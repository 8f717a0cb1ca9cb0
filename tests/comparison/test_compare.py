"""`compare` of results with several seeds, of models trained with the metric's network, and of other images."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Ran
from tests.made_records import record, rows, write
from tokbench.comparison.check import check
from tokbench.comparison.differences import Difference, cells, compare
from tokbench.errors import InputError
from tokbench.evaluation.reconstruct import seed_column
from tokbench.evaluation.summary import compute
from tokbench.metrics import METRICS, kernel_of
from tokbench.records.files import per_image_path, write_per_image
from tokbench.records.result import Value, read_result, to_json
from tokbench.records.samples import SampleStore

N, DIM = 2100, 6


def stochastic(
    folder: Path, name: str, error: np.ndarray, seeds: Sequence[int], *, first_id: int = 0, noise: float = 0.3
) -> Path:
    """A result with its kept features: real ones, and fakes that err by `error` and by noise of their own per seed."""
    generator = np.random.default_rng(7)
    real = generator.standard_normal((N, DIM)).astype(np.float32)
    features = {("real", "inception"): real}
    for seed in seeds:
        drawn = noise * np.random.default_rng((seed, len(name))).standard_normal((N, DIM))
        extractor = seed_column("inception", seed) if len(seeds) > 1 else "inception"
        features["fake", extractor] = (real + error + drawn).astype(np.float32)
    path = folder / f"{name}.json"
    with SampleStore(path.with_suffix(".features")) as store:
        store.append([f"{first_id + i:05d}" for i in range(N)], {}, features)
    value = compute("rfid", SampleStore(path.with_suffix(".features")), seeds)
    base = replace(record(name, n=N), metrics={"rfid": value}, settings={"dtype": "float32", "seeds": list(seeds)})
    path.write_text(to_json(base))
    return path


def checked_alike(folder: Path, paths: Sequence[Path]) -> Sequence[Difference]:
    """What `check` says of the same two results: under one name, each in a folder of its own."""
    for path in paths:
        (folder / path.stem).mkdir()
        renamed = replace(read_result(path), tokenizer=read_result(paths[0]).tokenizer)
        (folder / path.stem / "cell.json").write_text(to_json(renamed))
        shutil.copytree(path.with_suffix(".features"), folder / path.stem / "cell.features")
    base, new = (folder / path.stem / "cell.json" for path in paths)
    return check(new, base).differences


def width(d: Difference) -> float:
    return d.interval[1] - d.interval[0]


def errors(amount: float) -> np.ndarray:
    return amount * np.random.default_rng(3).standard_normal((N, DIM))


@pytest.mark.parametrize("seeds", [((0, 1, 2), (0, 1, 2)), ((0,), (4, 5))])
def test_frechet_distances_of_several_seeds_are_paired(tmp_path: Path, seeds: tuple[Sequence[int], ...]) -> None:
    paths = [stochastic(tmp_path, n, errors(e), s) for n, e, s in zip("ab", (0.5, 0.55), seeds, strict=True)]
    (d,) = compare(*paths)
    assert d.how == "paired half-samples"
    (checked,) = checked_alike(tmp_path, paths)
    assert (checked.interval, checked.verdict) == (d.interval, d.verdict)
    for path in paths:
        path.with_suffix(".features").rename(path.with_suffix(".gone"))
    (loose,) = compare(*paths)
    assert loose.how.startswith("unpaired")
    assert width(loose) > width(d)


@pytest.mark.parametrize("command", [("compare",), ("check", "--against")])
def test_versions_that_differ_are_said(command: Sequence[str], tokbench: Callable[..., Ran], tmp_path: Path) -> None:
    for name, version in {"a": "2.13", "b": "2.14"}.items():
        result = record("model")
        versions = {"torch": version, "pillow": "12.0", **({"cuda": "12.8"} if name == "a" else {})}
        made = replace(result, provenance=replace(result.provenance, versions=versions))
        (tmp_path / f"{name}.json").write_text(to_json(made))
    ran = tokbench(command[0], tmp_path / "a.json", *command[1:], tmp_path / "b.json")
    first, second = ("2.13", "2.14") if command == ("compare",) else ("2.14", "2.13")
    assert f"measured with other versions: torch {first} and {second}" in ran.out


def test_more_seeds_narrow_the_interval_of_noise(tmp_path: Path) -> None:
    widths = []
    for seeds in ((0,), tuple(range(6))):
        (tmp_path / str(len(seeds))).mkdir()
        paths = [stochastic(tmp_path / str(len(seeds)), name, errors(0.1), seeds, noise=1.0) for name in ("a", "bb")]
        (d,) = compare(*paths)
        widths.append(width(d))
    assert widths[1] < 0.7 * widths[0]  # noise alone differs: about 1 / sqrt(6)


def test_features_of_other_images_are_not_paired(tmp_path: Path) -> None:
    paths = [stochastic(tmp_path, name, errors(0.5), (0,), first_id=i) for i, name in enumerate(("a", "b"))]
    (d,) = compare(*paths)
    assert d.how.startswith("unpaired")


def test_a_metric_whose_network_was_a_training_loss_is_marked(tokbench: Callable[..., Ran], tmp_path: Path) -> None:
    paths = []
    for name, losses in (("a", ()), ("b", ("lpips-vgg",))):
        values = {metric: Value(0.3, 0.01, n=29) for metric in ("psnr", "lpips-vgg", "dists")}
        path = tmp_path / f"{name}.json"
        path.write_text(to_json(replace(record(name, losses=losses), metrics=values)))
        paths.append(path)
    rows = {d.metric: cells(d)[3:5] for d in compare(*paths)}
    assert rows["psnr"] == ["0.300", "0.300"]
    assert rows["lpips-vgg"] == ["0.30000", "0.30000†"]
    assert rows["dists"] == ["0.30000", "0.30000†"]  # the same VGG
    assert "† the metric's network was part of this model's training loss" in tokbench("compare", *paths).out
    assert "†" not in tokbench("compare", paths[0], paths[0]).out


def test_a_difference_that_rounds_to_zero_has_no_minus(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(to_json(replace(record("a"), metrics={"psnr": Value(24.0, 1.0, n=29)})))
    other = tmp_path / "b.json"
    other.write_text(to_json(replace(record("b"), metrics={"psnr": Value(24.0 - 1e-6, 1.0, n=29)})))
    (d,) = compare(path, other)
    assert cells(d)[5] == "+0.000"


def results(folder: Path, *shifts: float, n: int = 200) -> list[Path]:
    """Result files with per-image rows; `records.rows` says what a shift does."""
    paths = []
    for index, shift in enumerate(shifts):
        path = folder / f"m{index}.json"
        result = record(f"m{index}", seed=index, n=n, shift=shift)
        path.write_text(to_json(result))
        columns = rows(index, n, shift)
        write_per_image(per_image_path(path), [f"{i:04d}" for i in range(n)], columns)
        paths.append(path)
    return paths


def test_compare_says_better_worse_same_and_inconclusive(tmp_path: Path) -> None:
    a, better, same, near = results(tmp_path, 0.0, 1.0, 0.0, 0.012)
    assert {d.metric: d.verdict for d in compare(a, better)} == dict.fromkeys(
        ("psnr", "ssim", "lpips-alex", "lpips-vgg"), "better"
    )
    assert {d.verdict for d in compare(better, a)} == {"worse"}
    first = compare(a, same)
    assert {d.verdict for d in first} <= {"same", "inconclusive"}
    for d in [*first, *compare(a, near)]:
        assert d.interval[0] <= d.change <= d.interval[1]
        assert d.how == "paired by image"
        assert (d.needed or d.n) >= d.n
        assert d.needed is None or d.verdict == "inconclusive"


def test_compare_gives_no_metric_the_interval_of_another(tmp_path: Path) -> None:
    paths = results(tmp_path, 0.0, 0.5)
    for path, spread in zip(paths, (1.0, 2.0), strict=True):
        base = read_result(path)
        metrics = {"latent-std": Value(spread, n=200), "kid": kernel_of("net", Noise(spread))}
        path.write_text(to_json(replace(base, metrics=metrics)))
        columns = {"latent-mean": np.arange(200.0), "latent-square": np.arange(200.0)}
        write_per_image(per_image_path(path), [f"{i:04d}" for i in range(200)], columns)
    assert {(d.metric, d.verdict, d.how) for d in compare(*paths)} == {
        ("latent-std", "worse", "paired by image"),  # by rows that are equal here
        ("kid", "inconclusive", "unpaired: wider than need be"),  # its own error
    }


class Noise:
    """Features of two sides, the fakes' wider."""

    def __init__(self, spread: float) -> None:
        self.ids, self.spread = [str(i) for i in range(20)], spread

    def features(self, side: str, extractor: str) -> np.ndarray:
        return np.random.default_rng(0).standard_normal((20, 3)) * (1 if side == "real" else self.spread)

    def column(self, name: str) -> np.ndarray:
        raise KeyError(name)


def test_the_interval_of_the_global_psnr_is_that_of_many_redrawn_sets(tmp_path: Path) -> None:
    generator, n, paths = np.random.default_rng(0), 300, results(tmp_path, 0.0, 0.0)
    errors = generator.gamma(2, 1e-3, (2, n))
    for path, own in zip(paths, errors, strict=True):
        value = Value(float(-10 * np.log10(own.mean())), n=n)
        path.write_text(to_json(replace(read_result(path), metrics={"psnr-global": value})))
        write_per_image(per_image_path(path), [f"{i:04d}" for i in range(n)], {"mse": own})
    (d,) = compare(*paths)
    redrawn = [errors[:, rows].mean(1) for rows in generator.integers(n, size=(4000, n))]
    expected = np.quantile([-10 * np.log10(b / a) for a, b in redrawn], [0.025, 0.975])
    assert d.interval == pytest.approx(expected, abs=0.05)


def test_compare_without_rows_is_wider(tmp_path: Path) -> None:
    a, b = results(tmp_path, 0.0, 1.0)
    paired = {d.metric: d for d in compare(a, b)}
    per_image_path(a).unlink()
    for d in compare(a, b):
        assert d.how.startswith("unpaired")
        assert width(d) > width(paired[d.metric])


def test_compare_pairs_frechet_distances_by_kept_features(tmp_path: Path) -> None:
    generator, n = np.random.default_rng(0), 2100
    real = generator.standard_normal((n, 6)).astype(np.float32)
    ids = [f"{i:05d}" for i in range(n)]
    paths = []
    fake = real
    for name, amount in (("a", 0.5), ("b", 0.4)):  # b errs where a does, and more
        path = tmp_path / f"{name}.json"
        fake = fake + amount * generator.standard_normal((n, 6)).astype(np.float32)
        with SampleStore(path.with_suffix(".features")) as store:
            store.append(ids, {}, {("real", "inception"): real, ("fake", "inception"): fake})
        value = METRICS["rfid"].value(SampleStore(path.with_suffix(".features")))
        base = record(name, n=n)
        path.write_text(to_json(type(base)(**{**vars(base), "metrics": {"rfid": value}})))
        paths.append(path)
    (d,) = compare(*paths)
    assert (d.verdict, d.how) == ("worse", "paired half-samples")
    for path in paths:
        shutil.rmtree(path.with_suffix(".features"))
    (loose,) = compare(*paths)
    assert width(loose) > width(d)


def test_results_on_other_images_are_not_compared(tokbench: Callable[..., Ran], tmp_path: Path) -> None:
    a, _ = results(tmp_path, 0.0, 1.0)
    other = json.loads(a.read_text())
    other["dataset"]["fingerprint"] = "e" * 16
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="not comparable: images"):
        compare(a, tmp_path / "other.json")
    assert tokbench("compare", a, tmp_path / "missing.json").status == 2


def test_cells_that_two_folders_have_in_common_are_compared(tokbench: Callable[..., Ran], tmp_path: Path) -> None:
    a, b = (tmp_path / name for name in "ab")
    for folder, names in ((a, ("klvae", "ssdd")), (b, ("ssdd", "klvae", "other"))):
        for name in names:
            write(folder, record(name), rows(0, 29, 0.0))
    assert {d.cell for d in compare(a, b)} == {"klvae at 256 px", "ssdd at 256 px"}
    write(tmp_path / "c", record("klvae", res=128)), write(tmp_path / "c", record("ssdd", res=128))
    ran = tokbench("compare", a, tmp_path / "c")
    assert ran.status == 2
    assert "no metric of a cell in common" in ran.reason


def test_compare_prints_intervals_verdicts_and_n(
    tokbench: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # a narrow terminal hides columns, and says so
    ran = tokbench("compare", *results(tmp_path, 0.0, 1.0))
    assert ran.status == 0
    for text in ("psnr", "better", " 200 ", "[+"):
        assert text in ran.out
