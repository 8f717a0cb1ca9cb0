"""Distances between sets of features against torch-fidelity's own functions, and where they are ill-posed."""

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.metrics.test_metrics import Stored
from tokbench.errors import InputError
from tokbench.metrics import METRICS, distribution, frechet, kernel_of
from tokbench.metrics.statistics import from_half_samples, half_samples


def features(num: int, dim: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Correlated non-negative float32 features, like those behind a ReLU."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((dim, dim)) / np.sqrt(dim)
    return (np.maximum(generator.standard_normal((num, dim)) @ mixing + 0.3, 0) * scale).astype(np.float32)


def fidelity(real: np.ndarray, fake: np.ndarray) -> float:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    sides = [fid_features_to_statistics(torch.from_numpy(side.astype(np.float64))) for side in (real, fake)]
    return fid_statistics_to_metric(*sides, False)["frechet_inception_distance"]


def fd(real: np.ndarray, fake: np.ndarray) -> float:
    return frechet.distance(frechet.moments(real), frechet.moments(fake))


def test_frechet_distance_equals_torch_fidelity() -> None:
    real, fake = features(600, 64, 0), features(500, 64, 1, 1.1)
    assert fd(real, fake) == pytest.approx(fidelity(real, fake), rel=1e-6)


def test_frechet_distance_equals_its_formula_for_commuting_covariances() -> None:
    a = frechet.Moments(10, np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = frechet.Moments(10, np.array([0.0, 0.0]), np.diag([1.0, 16.0]))
    assert frechet.distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 4) ** 2)


@pytest.mark.parametrize("num", [20, 63, 65, 400])
def test_fewer_images_than_features_is_no_trouble(num: int) -> None:
    real, fake = features(num, 64, 0), features(num, 64, 1)
    expected = fidelity(real, fake)
    assert fd(real, fake) == pytest.approx(expected, rel=1e-4)
    assert frechet.few_samples_distance(real, fake) == pytest.approx(fd(real, fake), rel=1e-7)


def test_identical_features_are_exactly_zero_apart() -> None:
    for real in (features(300, 32, 0), features(10, 32, 0), np.ones((5, 32), dtype=np.float32)):
        assert fd(real, real.copy()) == 0
        assert frechet.few_samples_distance(real, real.copy()) == 0
        assert fd(real, real[::-1].copy()) == pytest.approx(0, abs=1e-4)


def test_singular_and_ill_scaled_features_stay_right() -> None:
    real, fake = features(500, 24, 0), features(500, 24, 1)
    base = fd(real, fake)
    dead = [np.concatenate([side, np.zeros((500, 8), dtype=np.float32)], 1) for side in (real, fake)]
    twice = [np.concatenate([side, side], 1) for side in (real, fake)]
    assert fd(*dead) == pytest.approx(base, rel=1e-6)
    assert fd(*twice) == pytest.approx(2 * base, rel=1e-5)
    for scale in (1e-6, 1e6):
        scaled = [side.astype(np.float64) * scale for side in (real, fake)]
        assert fd(*scaled) == pytest.approx(base * scale**2, rel=1e-6)
    mixed = np.geomspace(1e-5, 1e5, 24)
    wide = [side.astype(np.float64) * mixed for side in (real, fake)]
    # Eigenvalues hold about half the digits of singular values: 1e-8 of the traces, of which this is a small rest.
    traces = sum(np.trace(np.cov(side, rowvar=False)) for side in wide)
    assert fd(*wide) == pytest.approx(frechet.few_samples_distance(*wide), abs=1e-7 * traces)


def test_a_large_common_offset_costs_no_digits() -> None:
    real, fake = features(500, 16, 0).astype(np.float64), features(500, 16, 1).astype(np.float64)
    assert fd(real + 1e5, fake + 1e5) == pytest.approx(fd(real, fake), rel=1e-6)


def test_nan_and_wrong_shapes_are_refused() -> None:
    bad = features(30, 8, 0)
    bad[3, 2] = np.nan
    with pytest.raises(InputError, match="NaN"):
        frechet.moments(bad)
    with pytest.raises(InputError, match="NaN"):
        frechet.few_samples_distance(bad, features(30, 8, 1))
    good = frechet.moments(features(30, 8, 0))
    for part in ("mean", "cov"):
        for value in (np.nan, np.inf):
            broken = replace(good, **{part: np.where(np.eye(8, 8)[0] > 0, value, getattr(good, part))})
            with pytest.raises(InputError, match="NaN"):
                frechet.distance(good, broken)
            with pytest.raises(InputError, match="NaN"):
                frechet.distance(broken, broken)
    with pytest.raises(InputError, match="two rows"):
        frechet.moments(bad[:1])
    with pytest.raises(InputError, match="dimensions"):
        fd(features(30, 8, 0), features(30, 9, 0))


def test_moments_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = features(1000, 16, 0)
    whole = frechet.moments(rows)
    monkeypatch.setattr(frechet, "CHUNK", 37)
    parts = frechet.moments(rows)
    np.testing.assert_allclose(parts.cov, whole.cov, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(whole.cov, np.cov(rows, rowvar=False), rtol=1e-6, atol=1e-8)


def test_half_sample_error_is_the_spread_over_fresh_samples() -> None:
    """Paired features, drawn anew forty times: the error estimated from one draw is about the spread of all."""
    values, errors = [], []
    for seed in range(40):
        real = features(400, 8, seed)
        fake = real + 0.5 * features(400, 8, 1000 + seed)
        values.append(fd(real, fake))
        errors.append(from_half_samples(0.0, frechet.half_sample_distances(real, fake)).error)
    assert np.median(errors) == pytest.approx(np.std(values), rel=0.35)


def test_kid_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    real, fake = features(120, 16, 0), features(150, 16, 1, 1.3)
    options: dict[str, Any] = {"kid_subsets": 10, "kid_subset_size": 60, "verbose": False}
    sides = [torch.from_numpy(side.astype(np.float64)) for side in (fake, real)]
    expected = kid_features_to_metric(*sides, **options)
    value, spread = distribution.kernel_distance(real, fake, subset=60, repeats=10)
    assert value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert spread == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("num", [110, 400, 1000])
def test_error_of_kid_is_the_spread_over_fresh_samples(num: int, paired: bool) -> None:
    """Whether the images fill one subset or ten, and whether the fakes are made of the reals or not."""
    values, errors = [], []
    for seed in range(40):
        real, other = features(num, 16, seed), features(num, 16, 1000 + seed)
        sides = {("real", "x"): real, ("fake", "x"): real + 0.3 * other if paired else 1.1 * other}
        found = kernel_of("x", Stored({}, sides), subset=100)
        values.append(found.value)
        errors.append(found.stderr)
    assert 0.75 < np.median(errors) / np.std(values) < 1.35


def test_the_error_of_recall_is_its_spread_over_fresh_samples() -> None:
    values = []
    for seed in range(30):
        sides = {
            ("real", "inception"): features(200, 4, seed),
            ("fake", "inception"): 0.8 * features(200, 4, 99 + seed),
        }
        values.append(METRICS["recall"].value(Stored({}, sides)))
    ratio = np.median([value.stderr for value in values]) / np.std([value.value for value in values])
    assert 0.6 < ratio < 1.6


def test_kid_of_identical_sets_is_zero() -> None:
    real = features(60, 16, 0)
    value = kernel_of("x", Stored({}, {("real", "x"): real, ("fake", "x"): real.copy()}))
    assert value.value == 0
    assert value.stderr == pytest.approx(0, abs=1e-12)


def test_kid_of_sides_of_different_numbers_has_an_error_and_three_images_have_none() -> None:
    sides = {("real", "x"): features(900, 16, 0), ("fake", "x"): features(150, 16, 1)}
    fewer = kernel_of("x", Stored({}, sides), subset=100).stderr
    sides["fake", "x"] = features(900, 16, 1)
    more = kernel_of("x", Stored({}, sides), subset=100).stderr
    assert fewer is not None
    assert more is not None
    assert 0 < more < fewer
    few = {("real", "x"): features(3, 16, 0), ("fake", "x"): features(3, 16, 1)}
    assert kernel_of("x", Stored({}, few)).stderr is None
    with pytest.raises(InputError, match="four samples"):
        distribution.kernel_error(few["real", "x"], few["fake", "x"])


def test_inception_score_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = np.random.default_rng(0).standard_normal((205, 30)).astype(np.float32) * 4
    expected = isc_features_to_metric(torch.from_numpy(logits), shuffle=False)
    value, spread = distribution.inception_score(logits)
    assert value == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert spread == pytest.approx(expected["inception_score_std"], rel=1e-6)
    assert distribution.inception_score(np.zeros((50, 7)))[0] == pytest.approx(1)


def test_error_of_the_inception_score_is_the_spread_over_fresh_samples() -> None:
    found = []
    for seed in range(60):
        logits = np.random.default_rng(seed).standard_normal((500, 30)) * 4
        found.append(METRICS["is"].value(Stored({}, {("fake", "inception-logits"): logits})))
    spread = np.std([value.value for value in found])
    assert np.median([value.stderr for value in found]) == pytest.approx(spread, rel=0.3)


def test_precision_and_recall_are_not_swapped() -> None:
    """Fakes of one of two real clusters: every fake is plausible, half of the reals are missed."""
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    generator = np.random.default_rng(0)
    centres = np.repeat([[0.0] * 4, [100.0] * 4], 50, axis=0)
    real = (generator.standard_normal((100, 4)) + centres).astype(np.float32)
    fake = (0.3 * generator.standard_normal((80, 4))).astype(np.float32)
    precision, recall = distribution.covered(fake, real).mean(), distribution.covered(real, fake).mean()
    assert precision > 0.95
    assert recall <= 0.5
    # torch-fidelity takes the generated side first
    expected = calculate_precision_recall_full(torch.from_numpy(fake), torch.from_numpy(real))
    assert (precision, recall) == pytest.approx(expected, abs=1e-6)


def test_a_sample_at_the_very_edge_of_a_manifold_is_covered() -> None:
    """On a line at 0, 1, 2, 3 the third neighbours of all are 3, 2, 2, 3 away; of equal samples they are at hand."""
    line, edge = np.arange(4.0)[:, None], np.array([[-3.0], [-3.001], [6.0], [6.001]])
    assert distribution.covered(edge, line).tolist() == [True, False, True, False]
    equal = features(1, 2048, 0).repeat(4, axis=0)
    assert distribution.covered(equal[:1], equal).all()
    assert not distribution.covered(equal[:1] + np.float32(1e-4), equal).any()


def test_precision_does_not_depend_on_blocks_and_holds_few_of_them_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = features(1000, 64, 0), features(900, 64, 1)
    whole = distribution.covered(fake, real).mean()
    monkeypatch.setattr(distribution, "BLOCK", 37)
    tracemalloc.start()
    try:
        assert distribution.covered(fake, real).mean() == whole
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0 < whole < 1
    assert peak < real.nbytes  # in float64 it would be twice that for either side


def test_perplexity_is_one_for_one_code_and_the_number_of_codes_for_equal_use() -> None:
    assert distribution.perplexity(np.zeros((4, 5))) == 1
    assert distribution.perplexity(np.arange(12).reshape(3, 4)) == pytest.approx(12)


def test_paired_distances_need_the_same_images() -> None:
    with pytest.raises(InputError, match="paired"):
        distribution.paired_distances(features(4, 3, 0), features(5, 3, 0))


def mind(real: np.ndarray, fake: np.ndarray) -> float:
    count = min(len(real), len(fake))
    return float(distribution.monge_distances(real, fake, [np.arange(count)])[0])


def test_mind_is_the_number_that_torch_fidelity_gives() -> None:
    """Of mind_features_to_metric in torch-fidelity's main branch of 2026-05-11, fake first; no release has it yet."""
    real, fake = features(60, 16, 0), features(50, 16, 1, 1.1)
    assert mind(fake, real) == pytest.approx(1.9229960, rel=1e-4)
    assert mind(real[:50], fake) == pytest.approx(1.7427299, rel=1e-4)


def test_mind_of_a_shift_is_three_times_its_squared_length_and_of_a_scale_that_of_the_variance() -> None:
    """The projections of Gaussians are Gaussians, whose distance is (m1 - m2)² + (s1 - s2)²."""
    x = np.random.default_rng(0).standard_normal((3000, 32)).astype(np.float32)
    shift = np.linspace(-1, 1, 32).astype(np.float32)
    assert mind(x, x) == 0
    assert mind(x, x + shift) == pytest.approx(3 * float(shift @ shift), rel=0.1)
    assert mind(x, 1.5 * x[::-1]) == pytest.approx(3 * 0.25 * 32, rel=0.05)


def test_mind_of_one_feature_is_optimal_transport() -> None:
    from scipy.optimize import linear_sum_assignment

    generator = np.random.default_rng(1)
    x, y = generator.standard_normal((40, 1)), generator.exponential(size=(40, 1))
    cost = (x - y.T) ** 2
    assert mind(x, y) == pytest.approx(3 * cost[linear_sum_assignment(cost)].mean(), rel=1e-5)


def test_mind_has_the_error_of_its_half_samples() -> None:
    metric = METRICS["mind-mobilenet"]
    real = features(512, 8, 2)
    fake = real + 0.3 * features(len(real), 8, 3)
    stored = Stored({}, {("real", "mobilenet"): real, ("fake", "mobilenet"): fake})
    value = metric.value(stored)
    assert value.value == pytest.approx(mind(real, fake))
    assert value.stderr is not None
    assert value.low is not None
    assert 0 < value.stderr < 0.3 * value.value
    assert value.low < value.value


def test_the_bias_of_mind_is_told_from_half_samples() -> None:
    generator, (real, fake) = np.random.default_rng(4), (features(4000, 16, 0), features(4000, 16, 1, 1.1))
    real, truth, values, told = np.asarray(real), mind(real, fake), [], []
    for _ in range(20):
        rows = generator.choice(4000, 64, replace=False)
        value = mind(real[rows], fake[rows])
        values.append(value)
        told.append(distribution.monge_distances(real[rows], fake[rows], half_samples(64)).mean() - value)
    assert np.mean(values) - truth == pytest.approx(np.mean(told), rel=0.3)
