"""Intervals cover as often as they say, verdicts follow from them, and no change is called worse once in a hundred.

`tests/bench_statistics.py` measures the same with many more draws and kinds.
"""

import numpy as np
import pytest

from tests import bench_statistics as bench
from tokbench.metrics import statistics
from tokbench.metrics.statistics import Estimate


@pytest.mark.parametrize("num", [29, 500])
def test_intervals_cover_the_truth_95_times_in_100(num: int) -> None:
    found: dict[str, list[bool]] = {}
    for seed in range(500):
        for name, ((low, high), truth) in bench.columns(np.random.default_rng((num, seed)), num).items():
            found.setdefault(name, []).append(low <= truth <= high)
    for name, hits in found.items():  # 93 to 97 %, and 2 % of chance; few images that change make a share's wider
        assert 0.91 < np.mean(hits) < (1.01 if "share" in name else 0.985), name


@pytest.mark.parametrize(("share", "num"), [(0.95, 24), (0.99, 100), (0.04, 24), (0.5, 29)])
def test_intervals_of_a_share_cover_the_truth_95_times_in_100(share: float, num: int) -> None:
    generator = np.random.default_rng(0)
    values = [statistics.share_and_error(generator.random(num) < share) for _ in range(3000)]
    assert 0.91 < np.mean([(v.low or 0) <= share <= (v.high or 0) for v in values]) < 0.99  # it is discrete
    assert all(v.stderr for v in values)


def test_equal_shares_may_differ_and_equal_columns_do_not() -> None:
    low, high = statistics.paired(np.ones(24), np.ones(24), share=True).interval()
    assert low < 0 < high  # equal on 24 images is not equal on all
    assert statistics.paired(np.ones(24), np.ones(24)).interval() == (0, 0)  # SSIM of the identity, which is no share


def test_one_image_has_a_mean_and_no_error() -> None:
    value = statistics.mean_and_error(np.array([2.0]))
    assert (value.value, value.stderr, value.low, value.n) == (2.0, None, None, 1)


def test_pairing_takes_the_spread_between_images_out() -> None:
    generator = np.random.default_rng(0)
    images = 10 * generator.standard_normal(100)
    low, high = statistics.paired(images + 0.5 + 0.1 * generator.standard_normal(100), images).interval()
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
    assert statistics.from_half_samples(0.0, halves).error == pytest.approx(values.std(ddof=1) / 20, rel=0.1)


@pytest.mark.parametrize("skewness", [0.0, 0.3, -0.2])
@pytest.mark.parametrize("freedom", [4.5, 28.0, np.inf])
def test_an_interval_ends_where_its_test_says_the_same(skewness: float, freedom: float) -> None:
    found = Estimate(2.0, 0.5, freedom, skewness)
    for tail in (0.025, 0.001):
        low, high = found.interval(tail)
        assert found.above(low) == pytest.approx(tail)
        assert found.below(high) == pytest.approx(tail)
        assert low < 2 < high


def of(low: float, high: float) -> Estimate:
    """The difference with this 95 % interval."""
    return Estimate((low + high) / 2, (high - low) / 2 / 1.959964)


@pytest.mark.parametrize(
    ("low", "high", "better", "expected"),
    [
        (-0.01, 0.02, "higher", "same"),
        (0.01, 0.04, "higher", "same"),
        (0.1, 0.2, "higher", "better"),
        (0.1, 0.2, "lower", "worse"),
        (-0.3, -0.2, "lower", "better"),
        (0.051, 0.2, "lower", "inconclusive"),  # 19 times in 20 is not often enough
        (0.01, 0.2, "higher", "inconclusive"),  # better, but perhaps by less than counts
        (-0.1, 0.2, "higher", "inconclusive"),
        (0.1, 0.2, "neither", "worse"),
    ],
)
def test_verdicts_follow_from_interval_and_tolerance(
    low: float, high: float, better: statistics.Direction, expected: str
) -> None:
    assert statistics.judge([(of(low, high), 0.05, better)]) == [expected]


def test_exchanging_the_two_exchanges_better_and_worse() -> None:
    swapped = {"better": "worse", "worse": "better"}
    for ends in ((-0.01, 0.02), (0.06, 0.2), (-0.3, -0.2), (0.1, 0.2), (-0.3, -0.01)):
        for better in ("higher", "lower"):
            changes = of(*ends), of(-ends[1], -ends[0])
            there, back = (statistics.judge([(change, 0.05, better)])[0] for change in changes)
            assert swapped.get(there, there) == back


def test_the_more_is_compared_the_surer_a_verdict_has_to_be() -> None:
    none, strong = (of(-0.3, 0.3), 0.05, "lower"), (of(0.3, 0.4), 0.05, "lower")
    assert statistics.judge([strong, *[none] * 100])[0] == "worse"
    border = Estimate(0.05 + 2.45 * 0.03, 0.03)  # 2.45 errors beyond: surer than 1 in 100, not than 1 in 200
    assert statistics.judge([(border, 0.05, "lower")]) == ["worse"]
    assert statistics.judge([(border, 0.05, "lower"), none])[0] == "inconclusive"
    assert statistics.judge([(border, 0.05, "lower"), strong])[0] == "worse"  # what is refuted leaves its share


def test_no_change_is_called_worse_less_than_once_in_a_hundred() -> None:
    """Both sides drawn alike, twelve metrics, every verdict; `bench` does the same through files and `check`."""
    alarms = 0
    for seed in range(300):
        found = bench.changes(24, seed, 0.0)
        verdicts = statistics.judge([(change, *bench.rule(name)) for name, change in found.items()])
        alarms += "worse" in verdicts
    assert alarms <= 6  # 3 expected at most; more than 6 of 300 at 1 % has a chance of 3 %
    assert bench.alarms(24, 3)[0] == 0


@pytest.mark.parametrize("name", ["dists", "psnr-global", "agreement"])
def test_so_many_images_as_are_said_to_be_needed_find_a_loss_of_twice_the_tolerance(name: str) -> None:
    (_, share) = bench.power(20, pilots=20, names=[name])[name]
    assert share >= 0.8  # 90 % and more, less the chance of 20 draws


def test_no_number_is_needed_where_none_would_do_or_these_do() -> None:
    assert statistics.images_needed(Estimate(0.1, 0.1, 28), 29, 0.0) is None
    assert statistics.images_needed(Estimate(0.1, 0.001, 28), 29, 0.05) is None
    assert statistics.images_needed(Estimate(0.1, 0.1), 0, 0.05) is None
    few, many = (statistics.images_needed(Estimate(0.1, 0.1, 28), 29, 0.05, n) or 0 for n in (1, 12))
    assert 29 < few < many


def test_the_jackknife_of_the_global_psnr_is_the_error_of_redrawn_sets() -> None:
    generator = np.random.default_rng(0)
    errors = generator.gamma(2, 1e-3, 300)
    value = bench.METRICS["psnr-global"].value(bench.Stored({"mse": list(errors)}))
    redrawn = [-10 * np.log10(errors[rows].mean()) for rows in generator.integers(300, size=(2000, 300))]
    assert value.stderr == pytest.approx(np.std(redrawn), rel=0.1)
    assert (value.low, value.high) == pytest.approx(np.quantile(redrawn, [0.025, 0.975]), abs=0.1)


@pytest.mark.parametrize("name", ["psnr-global", "latent-std"])
def test_pseudo_values_are_n_times_the_value_less_the_values_without_an_image(name: str) -> None:
    metric = bench.METRICS[name]
    columns = {key: np.random.default_rng(1).gamma(2, 1, 9) + (key == "latent-square") * 9 for key in metric.reads}

    def value(rows: np.ndarray) -> float:
        return metric.value(bench.Stored({key: list(column[rows]) for key, column in columns.items()})).value or 0.0

    every = np.arange(9)
    expected = [9 * value(every) - 8 * value(np.delete(every, i)) for i in every]
    assert metric.terms is not None
    np.testing.assert_allclose(metric.terms(columns), expected)
