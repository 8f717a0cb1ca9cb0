"""Intervals cover as often as they say, verdicts follow from them."""

import numpy as np
import pytest

from tokbench.metrics import statistics


def test_t_quantiles_equal_scipys() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 8, 28, 1000):
        for probability in (0.9, 0.975):
            expected = scipy.t.ppf(probability, freedom)
            assert statistics.t_quantile(probability, freedom) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("num", [24, 29, 100])
@pytest.mark.parametrize(("kind", "truth"), [("normal", 0.0), ("gamma", 9.0), ("lognormal", np.exp(0.32))])
def test_intervals_of_a_mean_cover_the_truth_95_times_in_100(kind: str, truth: float, num: int) -> None:
    generator = np.random.default_rng(num)
    draw = {"normal": lambda: generator.standard_normal(num), "gamma": lambda: generator.gamma(9, 1, num),
            "lognormal": lambda: generator.lognormal(0, 0.8, num)}[kind]  # fmt: skip
    values = [statistics.mean_and_error(draw()) for _ in range(2000)]
    covered = np.mean([(v.low or 0) <= truth <= (v.high or 0) for v in values])
    assert 0.92 < covered < 0.97


@pytest.mark.parametrize(("share", "num"), [(0.95, 24), (0.99, 100), (0.04, 24), (0.5, 29)])
def test_intervals_of_a_share_cover_the_truth_95_times_in_100(share: float, num: int) -> None:
    generator = np.random.default_rng(0)
    values = [statistics.share_and_error(generator.random(num) < share) for _ in range(3000)]
    assert 0.91 < np.mean([(v.low or 0) <= share <= (v.high or 0) for v in values]) < 0.99  # it is discrete
    assert all(v.stderr for v in values)


def test_intervals_of_paired_shares_cover_the_truth() -> None:
    generator = np.random.default_rng(0)
    hits = []
    for _ in range(3000):
        first = generator.random(29) < 0.9
        second = np.where(generator.random(29) < 0.8, first, generator.random(29) < 0.9)
        low, high = statistics.paired_interval(first, second, share=True)
        hits.append(low <= 0 <= high)
    assert np.mean(hits) > 0.94  # more where few images change
    low, high = statistics.paired_interval(np.ones(24), np.ones(24), share=True)
    assert low < 0 < high  # equal on 24 images is not equal on all
    assert statistics.paired_interval(np.ones(24), np.ones(24)) == (0, 0)  # SSIM of the identity, which is no share


def test_one_image_has_a_mean_and_no_error() -> None:
    value = statistics.mean_and_error(np.array([2.0]))
    assert (value.value, value.stderr, value.low, value.n) == (2.0, None, None, 1)


def test_pairing_takes_the_spread_between_images_out() -> None:
    generator = np.random.default_rng(0)
    images = 10 * generator.standard_normal(100)
    low, high = statistics.paired_interval(images + 0.5 + 0.1 * generator.standard_normal(100), images)
    assert 0.4 < low < 0.5 < high < 0.6


def test_half_samples_are_complementary_and_the_same_for_everyone() -> None:
    halves = statistics.half_samples(11, 3)
    assert len(halves) == 6
    assert all(len(half) == 5 for half in halves)
    assert not set(halves[0]) & set(halves[1])
    assert all(np.array_equal(a, b) for a, b in zip(halves, statistics.half_samples(11, 3), strict=True))


def test_half_sample_error_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    halves = np.array([values[rows].mean() for rows in statistics.half_samples(400, 200)])
    assert statistics.half_sample_error(halves) == pytest.approx(values.std(ddof=1) / 20, rel=0.1)


@pytest.mark.parametrize(
    ("low", "high", "better", "expected"),
    [
        (-0.01, 0.02, "higher", "same"),
        (0.01, 0.04, "higher", "same"),
        (0.06, 0.2, "higher", "better"),
        (0.06, 0.2, "lower", "worse"),
        (-0.3, -0.2, "lower", "better"),
        (0.01, 0.2, "higher", "inconclusive"),  # better, but perhaps by less than counts
        (-0.1, 0.2, "higher", "inconclusive"),
        (0.1, 0.2, "neither", "worse"),
    ],
)
def test_verdicts_follow_from_interval_and_tolerance(low: float, high: float, better: str, expected: str) -> None:
    assert statistics.judge(low, high, 0.05, better) == expected


@pytest.mark.parametrize(("low", "high"), [(-0.01, 0.02), (0.06, 0.2), (-0.3, -0.2), (0.01, 0.2), (-0.3, -0.01)])
@pytest.mark.parametrize("better", ["higher", "lower"])
def test_exchanging_the_two_exchanges_better_and_worse(low: float, high: float, better: str) -> None:
    there, back = (statistics.judge(*ends, 0.05, better) for ends in ((low, high), (-high, -low)))
    assert {"better": "worse", "worse": "better"}.get(there, there) == back


def test_the_number_of_images_needed_settles_the_verdict() -> None:
    needed = statistics.images_needed(0.1, -0.1, 0.3, 100, 0.0)
    assert needed == 400  # half the half-width takes four times the images
    assert statistics.images_needed(0.0, -0.1, 0.1, 100, 0.05) == 400
    assert statistics.images_needed(0.0, -0.1, 0.1, 100, 0.0) is None
