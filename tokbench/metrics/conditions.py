"""What probes store: metrics under a condition (`psnr@x10`: psnr after ten round trips), and what their curves say.

Pure functions of columns and features, as all metrics. Never imports torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tokbench.metrics.statistics import CONFIDENCE
from tokbench.records.result import Value

if TYPE_CHECKING:
    from tokbench.metrics import Metric, Samples

ROUND_TRIPS = (1, 2, 5, 10)
SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.5)  # of the latents' own deviation: RAC's (arXiv 2603.05925)
OCTAVES = (2, 4, 8, 16, 32)  # shortest wavelength of each in pixels; the last holds all that is longer
TEXT_HEIGHTS = (8, 10, 12, 14, 16, 20, 24, 32, 48, 64)  # font sizes in pixels
LEGIBLE = 0.9  # of what was readable before


def at(name: str, condition: object) -> str:
    """What a column, features or metric is called under a condition."""
    return f"{name}@{condition}"


class Under:
    """A store as if what was found under one condition were all: what a metric reads. Real images are the same."""

    def __init__(self, samples: "Samples", condition: object) -> None:
        self.samples, self.condition, self.ids = samples, condition, samples.ids

    def column(self, name: str) -> np.ndarray:
        """float64 [N] in id order."""
        return self.samples.column(at(name, self.condition))

    def features(self, side: str, extractor: str) -> np.ndarray:
        """float32 [N, D] in id order."""
        return self.samples.features(side, extractor if side == "real" else at(extractor, self.condition))


def under(metric: "Metric", condition: object, probe: str, what: str) -> "Metric":
    """A metric of columns and features that a probe stored under a condition."""
    rows = metric.rows
    return replace(
        metric,
        name=at(metric.name, condition),
        description=f"{metric.name} {what}",
        probe=probe,
        score=None,
        compute=lambda samples: metric.value(Under(samples, condition)),
        reads=tuple(at(column, condition) for column in metric.columns),
        extractor=None if metric.extractor is None else at(metric.extractor, condition),
        rows=None if rows is None else lambda samples: rows(Under(samples, condition)),
        terms=None,
    )


def difference(first: str, second: str, samples: "Samples") -> np.ndarray:
    """A column less another, [N]."""
    return np.asarray(samples.column(first) - samples.column(second))


def over_sigmas(metric: str) -> tuple[str, ...]:
    """A metric's names under each of SIGMAS."""
    return tuple(at(metric, sigma) if sigma else metric for sigma in SIGMAS)


def area(values: np.ndarray) -> np.ndarray:
    """Of curves [S, N] over SIGMAS, by trapezoids, [N]."""
    return np.asarray(np.trapezoid(values, SIGMAS, axis=0))


def doubling(values: np.ndarray) -> float:
    """The sigma at which the mean of curves [S, N] is twice that without noise, on lines between SIGMAS; else NaN."""
    means = values.mean(axis=1)
    return first_crossing(SIGMAS, means, 2 * means[0])


def doubling_terms(values: np.ndarray) -> np.ndarray:
    """Its pseudo-values, [N]; where it is not doubled without an image, the largest of SIGMAS stands for it."""
    count = values.shape[1]
    without = np.array([doubling(np.delete(values, i, axis=1)) for i in range(count)])
    return np.asarray(count * doubling(values) - (count - 1) * np.nan_to_num(without, nan=SIGMAS[-1]))


def first_crossing(places: Sequence[float], values: np.ndarray, level: float) -> float:
    """Where a line through values at these places first reaches a level from below; NaN if it does not."""
    for i in range(1, len(places)):
        if values[i] >= level > values[i - 1]:
            share = (level - values[i - 1]) / (values[i] - values[i - 1])
            return float(places[i - 1] + share * (places[i] - places[i - 1]))
    return float("nan")


def legible(samples: "Samples") -> Value:
    """The smallest text height from which on LEGIBLE of what was readable before stays readable, at all larger ones."""
    before, after = (
        np.stack([samples.column(at(side, f"{height}px")) for height in TEXT_HEIGHTS]) for side in ("read", "reread")
    )

    def smallest(rows: np.ndarray) -> float:
        readable, kept = before[:, rows].sum(axis=1), after[:, rows].sum(axis=1)
        shown = np.flatnonzero(readable > 0)  # the others do not fit into the images, or nobody can read them
        lost = shown[kept[shown] < LEGIBLE * readable[shown]]
        rest = shown[shown > lost[-1]] if len(lost) else shown
        return float(TEXT_HEIGHTS[rest[0]]) if len(rest) else float("nan")

    return of_resamples(smallest, before.shape[1], f"less than 90 % stays readable at {TEXT_HEIGHTS[-1]} px")


def of_resamples(statistic: Callable[[np.ndarray], float], num_images: int, missing: str, repeats: int = 400) -> Value:
    """A statistic of rows of images that may be NaN, which is null and noted; error and 95 % interval by a bootstrap.

    Each resample is drawn with a fixed seed, so that two models see the same images. Without an interval where a
    resample has no value.
    """
    value = statistic(np.arange(num_images))
    if not np.isfinite(value):
        return Value(None, n=num_images, note=missing)
    generator = np.random.default_rng(0)
    drawn = np.array([statistic(generator.integers(0, num_images, num_images)) for _ in range(repeats)])
    if num_images < 2 or not np.isfinite(drawn).all():
        return Value(value, n=num_images)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Value(value, float(drawn.std(ddof=1)), float(low), float(high), num_images)
