"""What our 95 % intervals really cover, on drawn data: `python -m tests.bench_statistics [--draws N]`."""

import argparse
import math
from collections.abc import Callable

import numpy as np

from tests.metrics.test_frechet import Stored
from tokbench.metrics import METRICS, kernel_of
from tokbench.metrics.statistics import mean_and_error, paired_interval, share_and_error
from tokbench.records.result import Value

NUMBERS = (29, 500, 5000)
Z = 1.959964


def ends(value: Value) -> tuple[float, float]:
    if value.low is not None and value.high is not None:
        return value.low, value.high
    assert value.value is not None
    return value.value - Z * (value.stderr or 0), value.value + Z * (value.stderr or 0)


def columns(generator: np.random.Generator, num: int) -> dict[str, tuple[tuple[float, float], float]]:
    """Interval and truth of every kind of column, drawn once."""
    normal, skewed = generator.standard_normal(num), generator.lognormal(0, 0.8, num)
    hits = generator.random(num) < 0.95
    errors = generator.lognormal(-6, 0.9, num)
    other = errors * generator.lognormal(0, 0.2, num)
    mean = math.exp(-6 + 0.405)
    psnr = METRICS["psnr-global"].value(Stored({"mse": list(errors)}))
    return {
        "mean, normal": (ends(mean_and_error(normal)), 0.0),
        "mean, log-normal (0.8)": (ends(mean_and_error(skewed)), math.exp(0.32)),
        "share, 95 %": (ends(share_and_error(hits)), 0.95),
        "psnr-global": (ends(psnr), -10 * math.log10(mean)),
        "paired difference, skewed": (paired_interval(other, errors), mean * (math.exp(0.02) - 1)),
    }


def kernel(generator: np.random.Generator, num: int) -> Value:
    real = generator.standard_normal((num, 16)).astype(np.float32)
    fake = 1.1 * generator.standard_normal((num, 16)).astype(np.float32)
    return kernel_of("x", Stored({}, {("real", "x"): real, ("fake", "x"): fake}))


def coverage(draw: Callable[[], tuple[tuple[float, float], float]], draws: int) -> float:
    return float(np.mean([low <= truth <= high for (low, high), truth in (draw() for _ in range(draws))]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    draws = parser.parse_args().draws
    for num in NUMBERS:
        found: dict[str, list[bool]] = {}
        for seed in range(draws):
            for name, ((low, high), truth) in columns(np.random.default_rng((num, seed)), num).items():
                found.setdefault(name, []).append(low <= truth <= high)
        for name, hits in found.items():
            print(f"N = {num:5,}  {name:<28} covers {np.mean(hits):6.1%}")
        values = [kernel(np.random.default_rng((num, seed)), num) for seed in range(max(20, draws // 20))]
        truth = float(np.mean([value.value for value in values]))
        hits = [low <= truth <= high for low, high in map(ends, values)]
        ratio = np.median([value.stderr for value in values]) / np.std([value.value for value in values])
        print(
            f"N = {num:5,}  {'kid (of its own mean)':<28} covers {np.mean(hits):6.1%}, error {ratio:.2f} of the spread"
        )


if __name__ == "__main__":
    main()
