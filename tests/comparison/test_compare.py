"""`compare` of results with several seeds, of models trained with the metric's network, and of other images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Ran
from tests.made_records import record
from tokbench.comparison.compare import compare, describe
from tokbench.evaluation.reconstruct import seeded
from tokbench.evaluation.summary import compute
from tokbench.records.result import Value, to_json
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
        extractor = seeded("inception", seed) if len(seeds) > 1 else "inception"
        features["fake", extractor] = (real + error + drawn).astype(np.float32)
    path = folder / f"{name}.json"
    with SampleStore(path.with_suffix(".features")) as store:
        store.append([f"{first_id + i:05d}" for i in range(N)], {}, features)
    value = compute("rfid", SampleStore(path.with_suffix(".features")), seeds)
    base = replace(record(name, n=N), metrics={"rfid": value}, settings={"dtype": "float32", "seeds": list(seeds)})
    path.write_text(to_json(base))
    return path


def errors(amount: float) -> np.ndarray:
    return amount * np.random.default_rng(3).standard_normal((N, DIM))


@pytest.mark.parametrize("seeds", [((0, 1, 2), (0, 1, 2)), ((0,), (4, 5))])
def test_frechet_distances_of_several_seeds_are_paired(tmp_path: Path, seeds: tuple[Sequence[int], ...]) -> None:
    paths = [stochastic(tmp_path, n, errors(e), s) for n, e, s in zip("ab", (0.5, 0.55), seeds, strict=True)]
    (d,) = compare(*paths)
    assert d.how == "paired half-samples"
    for path in paths:
        path.with_suffix(".features").rename(path.with_suffix(".gone"))
    (loose,) = compare(*paths)
    assert loose.how.startswith("unpaired")
    assert (loose.high or 0) - (loose.low or 0) > (d.high or 0) - (d.low or 0)


def test_more_seeds_narrow_the_interval_of_noise(tmp_path: Path) -> None:
    widths = []
    for seeds in ((0,), tuple(range(6))):
        (tmp_path / str(len(seeds))).mkdir()
        paths = [stochastic(tmp_path / str(len(seeds)), name, errors(0.1), seeds, noise=1.0) for name in ("a", "bb")]
        (d,) = compare(*paths)
        widths.append((d.high or 0) - (d.low or 0))
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
    rows = {d.metric: describe(d) for d in compare(*paths)}
    assert rows["psnr"][1:3] == ["0.300", "0.300"]
    assert rows["lpips-vgg"][1:3] == ["0.30000", "0.30000†"]
    assert rows["dists"][1:3] == ["0.30000", "0.30000†"]  # the same VGG
    assert "† the metric's network was part of this model's training loss" in tokbench("compare", *paths).out
    assert "†" not in tokbench("compare", paths[0], paths[0]).out


def test_a_difference_that_rounds_to_zero_has_no_minus(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(to_json(replace(record("a"), metrics={"psnr": Value(24.0, 1.0, n=29)})))
    other = tmp_path / "b.json"
    other.write_text(to_json(replace(record("b"), metrics={"psnr": Value(24.0 - 1e-6, 1.0, n=29)})))
    (d,) = compare(path, other)
    assert describe(d)[3] == "+0.000"
