"""What our 95 % intervals really cover and how often our verdicts are right, on drawn data.

`python -m tests.bench_statistics [--draws N]` prints the tables of docs/concepts/intervals.md.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from tests.made_records import record, write
from tests.metrics.test_metrics import Stored
from tokbench.comparison.check import check
from tokbench.comparison.differences import compare
from tokbench.metrics import METRICS, frechet, global_psnr_terms, kernel_of
from tokbench.metrics.statistics import (
    FALSE_ALARM,
    Direction,
    Estimate,
    estimate,
    from_half_samples,
    images_needed,
    judge,
    mean_and_error,
    paired,
    share_and_error,
)
from tokbench.records.result import Value

NUMBERS = (29, 500, 5000)
Generator = np.random.Generator
Interval = tuple[float, float]
DIM = 16


def ends(value: Value) -> Interval:
    if value.low is not None and value.high is not None:
        return value.low, value.high
    assert value.value is not None
    return Estimate(value.value, value.stderr or 0.0).interval()


# ---- intervals ----------------------------------------------------------------------------------------------------


def columns(generator: Generator, num: int) -> dict[str, tuple[Interval, float]]:
    """Interval and truth of every kind of column, drawn once."""
    errors = generator.lognormal(-6, 0.9, num)
    other = errors * generator.lognormal(0, 0.4, num)
    hits = generator.random((2, num)) < 0.95
    hits[1] = np.where(generator.random(num) < 0.8, hits[0], hits[1])
    mean, change = math.exp(-6 + 0.405), math.exp(0.08)
    ratio = replace(
        estimate(global_psnr_terms({"mse": other}) - global_psnr_terms({"mse": errors})),
        value=-10 * math.log10(other.mean() / errors.mean()),
    )
    return {
        "mean, normal": (ends(mean_and_error(generator.standard_normal(num))), 0.0),
        "mean, log-normal of shape 0.8": (ends(mean_and_error(generator.lognormal(0, 0.8, num))), math.exp(0.32)),
        "mean, gamma of shape 1": (ends(mean_and_error(generator.gamma(1, 1, num))), 1.0),
        "paired difference, skewed": (paired(other, errors).interval(), mean * (change - 1)),
        "psnr-global": (ends(METRICS["psnr-global"].value(Stored({"mse": list(errors)}))), -10 * math.log10(mean)),
        "psnr-global, paired difference": (ratio.interval(), -10 * math.log10(change)),
        "share of 95 %": (ends(share_and_error(hits[0])), 0.95),
        "share, paired difference": (paired(hits[1], hits[0], share=True).interval(), 0.0),
    }


def pair(generator: Generator, num: int, *, heavy: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Features of images and of their reconstructions."""
    drawn = generator.standard_t(8, (2, num, DIM)) if heavy else generator.standard_normal((2, num, DIM))
    return drawn[0].astype(np.float32), (drawn[0] + 0.5 * drawn[1]).astype(np.float32)


def distance(generator: Generator, num: int, *, heavy: bool = False) -> Value:
    real, fake = pair(generator, num, heavy=heavy)
    value = frechet.distance(frechet.moments(real), frechet.moments(fake))
    found = from_half_samples(value, frechet.half_sample_distances(real, fake))
    return Value(value, found.error, *found.interval())


def kernel(generator: Generator, num: int) -> Value:
    real, fake = pair(generator, num)
    return kernel_of("x", Stored({}, {("real", "x"): real, ("fake", "x"): fake}))


def recall(generator: Generator, num: int) -> Value:
    """Of a generator, whose images have no originals."""
    sides = {(side, "inception"): generator.standard_normal((num, DIM)) for side in ("real", "fake")}
    return METRICS["recall"].value(Stored({}, sides))


# By name: draws, as a share of those of the columns, at each of NUMBERS, and what is drawn.
DISTANCES: dict[str, tuple[tuple[float, float, float], Callable[[Generator, int], Value]]] = {
    "kid": ((0.2, 0.2, 0.05), kernel),
    "Fréchet distance": ((0, 0.5, 0.1), distance),
    "Fréchet distance, t of 8 degrees": ((0, 0.5, 0.1), partial(distance, heavy=True)),
    "recall": ((0.5, 0.2, 0), recall),
}


def coverage(num: int, draws: int) -> dict[str, float]:
    """How often each kind of interval holds the truth; of a distance, its own mean at this number."""
    found: dict[str, list[bool]] = {}
    for seed in range(draws):
        for name, ((low, high), truth) in columns(np.random.default_rng((num, seed)), num).items():
            found.setdefault(name, []).append(low <= truth <= high)
    for name, (shares, draw) in DISTANCES.items():
        seeds = range(int(draws * shares[NUMBERS.index(num)]))
        values = [draw(np.random.default_rng((num, seed)), num) for seed in seeds]
        truth = np.mean([value.value for value in values]) if values else math.nan
        found[name] = [low <= truth <= high for low, high in map(ends, values)]
    return {name: float(np.mean(hits)) if hits else math.nan for name, hits in found.items()}


# ---- verdicts -----------------------------------------------------------------------------------------------------

LEVELS: Mapping[str, tuple[float, float, float]] = {  # mean, spread over images, spread of a model at an image
    "psnr": (22.0, 3.0, 0.5), "ssim": (0.62, 0.11, 0.02), "ssim-gauss": (0.6, 0.11, 0.02), "ms-ssim": (0.8, 0.1, 0.02),
    "lpips-alex": (0.3, 0.07, 0.02), "lpips-vgg": (0.4, 0.06, 0.02), "dists": (0.2, 0.04, 0.01),
    "dreamsim": (0.15, 0.05, 0.01),
}  # fmt: skip
SKEWED = {"pd-mobilenet": (326.0, 0.5, 0.05), "pd-inception": (200.0, 0.5, 0.05)}  # log-normal: median, shapes


def model(images: Generator, own: Generator, num: int) -> dict[str, np.ndarray]:
    """Per-image columns of a model; two with the same `images` and other `own` are drawn alike."""
    shared, luck = images.standard_normal(num), own.standard_normal(num)
    found = {}
    for name, (mean, spread, noise) in LEVELS.items():
        sign = 1 if METRICS[name].better == "higher" else -1
        found[name] = mean + sign * (spread * shared + noise * (luck + own.standard_normal(num)) / 2**0.5)
    for name, (median, spread, noise) in SKEWED.items():
        found[name] = median * np.exp(spread * images.standard_normal(num) + noise * own.standard_normal(num))
    found["agreement"] = (images.random(num) + 0.02 * own.standard_normal(num) < 0.9).astype(np.float64)
    found["mse"] = 10 ** (-found["psnr"] / 10)
    return found


def cell(folder: Path, found: Mapping[str, np.ndarray]) -> Path:
    """A record of these columns, with its rows."""
    rows = Stored({name: list(values) for name, values in found.items()})
    metrics = {name: mean_and_error(values) for name, values in found.items() if name in METRICS}
    metrics["psnr-global"] = METRICS["psnr-global"].value(rows)
    return write(folder, replace(record("model", n=len(found["psnr"])), metrics=metrics), dict(found))


def alarms(num: int, runs: int) -> tuple[float, float]:
    """How often `check`, and one of its rows by itself, finds anything worse where both sides are drawn alike."""
    together = alone = 0
    for seed in range(runs):
        with tempfile.TemporaryDirectory() as name:
            sides = [
                cell(
                    Path(name) / str(side),
                    model(np.random.default_rng((num, seed)), np.random.default_rng((num, seed, side)), num),
                )
                for side in (1, 2)
            ]
            result = check(sides[1], sides[0])
            assert {d.metric: d for d in result.differences} == {d.metric: d for d in compare(*sides)}
        together += bool(result.failures)
        alone += any(
            max(map(d.loss, d.interval)) > min(map(d.loss, d.interval)) > d.tolerance for d in result.differences
        )
    return together / runs, alone / runs


def changes(num: int, seed: int, loss: float) -> dict[str, Estimate]:
    """What every metric shows of two models of which the second is worse by `loss` tolerances."""
    base, new = (
        model(np.random.default_rng((num, seed)), np.random.default_rng((num, seed, side)), num) for side in (1, 2)
    )
    found = {}
    for name in base:
        tolerance = METRICS[name].tolerance if name in METRICS else 0
        if name == "agreement":
            flipped = np.random.default_rng((seed, num)).random(num) < loss * tolerance / 0.9
            found[name] = paired(np.where(flipped, 0, new[name]), base[name], share=True)
        elif name != "mse":
            worse = loss * tolerance * (-1 if METRICS[name].better == "higher" else 1)
            found[name] = paired(new[name] + worse, base[name])
    scaled = {"mse": new["mse"] * 10 ** (loss * METRICS["psnr-global"].tolerance / 10)}
    terms = global_psnr_terms(scaled) - global_psnr_terms(base)
    value = -10 * math.log10(scaled["mse"].mean() / base["mse"].mean())
    return {**found, "psnr-global": replace(estimate(terms), value=value)}


def rule(name: str) -> tuple[float, Direction]:
    """Tolerance and direction of a metric."""
    return METRICS[name].tolerance, METRICS[name].better


def power(runs: int, pilots: int = 40, names: Sequence[str] = ()) -> dict[str, tuple[float, float]]:
    """Of each metric: how many images a run of 29 says are needed (median), and how often so many find the loss."""
    needed: dict[str, list[int]] = {}
    found: dict[str, list[bool]] = {}
    for pilot in range(pilots):
        first = changes(29, pilot, 0.0)
        for name in names or first:
            num = images_needed(first[name], 29, METRICS[name].tolerance, len(first)) or 29
            needed.setdefault(name, []).append(num)
            for seed in range(runs // pilots):
                own = changes(num, 1000 * pilot + seed, 2.0)[name]
                others = [(Estimate(0.0, 1.0), *rule(name))] * (len(first) - 1)
                (verdict, *_) = judge([(own, *rule(name)), *others])
                found.setdefault(name, []).append(verdict == "worse")
    return {name: (float(np.median(needed[name])), float(np.mean(found[name]))) for name in needed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    draws = parser.parse_args().draws
    covers = {num: coverage(num, draws) for num in NUMBERS}
    print(
        "| interval | " + " | ".join(f"N = {num:,}" for num in NUMBERS) + " |\n| --- " + "| --: " * len(NUMBERS) + "|"
    )
    for name in covers[NUMBERS[0]]:
        shares = [f"{covers[num][name]:.1%}" if covers[num][name] >= 0 else "" for num in NUMBERS]
        print(f"| {name} | {' | '.join(shares)} |")
    print(f"\n| no change, 12 metrics | `check` says worse (asked: below {FALSE_ALARM:.0%}) | one 95 % interval does |")
    print("| --- | --: | --: |")
    for num in (24, 29, 100):
        print("| N = {} | {:.1%} | {:.1%} |".format(num, *alarms(num, draws)))
    print("\n| metric | tolerance | N said to be needed | finds twice the tolerance |\n| --- | --: | --: | --: |")
    for name, (num, share) in power(draws // 5).items():
        print(f"| {name} | {METRICS[name].tolerance:g} | {num:,.0f} | {share:.0%} |")


if __name__ == "__main__":
    main()
