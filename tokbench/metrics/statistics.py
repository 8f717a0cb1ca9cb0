"""Error bars and verdicts. Pure numpy in float64, never imports torch.

Means over images have a standard error and Student's t, corrected for skewed and for heavy tails; models are compared
image by image, which removes the spread between images. Shares have Wilson's interval, since their error is not 0 when
all images agree. A Fréchet distance is no mean, and a bootstrap of it is biased upwards (duplicates look like a
narrower distribution): its error comes from half-samples without replacement, the same for both sides and for both
models. `tests/bench_statistics.py` measures how often the intervals hold and the verdicts are right.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import chdtri, stdtr, stdtrit

from tokbench.records.result import Value

Direction = Literal["higher", "lower", "neither"]
Verdict = Literal["better", "worse", "same", "inconclusive"]
CONFIDENCE = 0.95
FALSE_ALARM = 0.01  # how often anything may be called worse, or better, where nothing has changed
POWER = 0.9  # how often a loss of twice the tolerance is to be found


@dataclass(frozen=True)
class Estimate:
    """A number whose error follows Student's t, leaning as `skewness` says: its intervals and its tests are one."""

    value: float
    error: float  # standard error
    freedom: float = math.inf
    skewness: float = 0.0  # of the mean's distribution

    def interval(self, tail: float = (1 - CONFIDENCE) / 2) -> tuple[float, float]:
        """The two bounds that the truth lies beyond with this probability each."""
        quantile = float(stdtrit(self.freedom, 1 - tail))
        return self.value - self._lean_back(quantile) * self.error, self.value - self._lean_back(-quantile) * self.error

    def above(self, bound: float) -> float:
        """How probable such a number, or a larger one, is if the truth is the bound or less."""
        if self.error == 0:
            return float(self.value <= bound)
        t, lean = (self.value - bound) / self.error, self.skewness
        return float(stdtr(self.freedom, -(t + lean * t**2 / 3 + lean**2 * t**3 / 27 + lean / 6)))

    def below(self, bound: float) -> float:
        """How probable such a number, or a smaller one, is if the truth is the bound or more."""
        return Estimate(-self.value, self.error, self.freedom, -self.skewness).above(-bound)

    def _lean_back(self, quantile: float) -> float:
        """The studentised mean that Hall's transformation (1992, eq. 3), as in `above`, turns into this quantile."""
        lean = self.skewness
        return quantile if abs(lean) < 1e-6 else 3 / lean * (float(np.cbrt(1 + lean * (quantile - lean / 6))) - 1)


def estimate(values: np.ndarray) -> Estimate:
    """The mean of float [N], N at least 2.

    Hall's transformation moves the interval of a skewed column towards its long tail, by half of what the sample says:
    a small sample says it badly. Heavy tails make the sample's variance itself uncertain: the degrees of freedom are
    those of a chi-square that varies as much (Satterthwaite).
    """
    values = np.asarray(values, dtype=np.float64)
    count, deviation = len(values), float(values.std())
    if count < 4 or deviation == 0:
        return Estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(count), count - 1)
    scaled = (values - values.mean()) / deviation
    skewness = float((scaled**3).mean()) * math.sqrt(count * (count - 1)) / (count - 2)
    freedom = 2 * count / max(1e-9, float((scaled**4).mean()) - (count - 3) / (count - 1))
    error = float(values.std(ddof=1)) / math.sqrt(count)
    return Estimate(float(values.mean()), error, min(count - 1.0, max(3.0, freedom)), skewness / math.sqrt(count) / 2)


def mean_and_error(values: np.ndarray, note: str = "") -> Value:
    """Mean of float [N] with its standard error and 95 % interval; no error from a single image."""
    if len(values) < 2:
        return Value(float(np.mean(values)), n=len(values), note=note)
    found = estimate(values)
    return Value(found.value, found.error, *found.interval(), len(values), note)


def share_and_error(hits: np.ndarray, note: str = "") -> Value:
    """Share of true entries of bool [N] with Wilson's 95 % interval; its error is that interval's half-width by z."""
    count, share = len(hits), float(np.mean(hits))
    z = float(stdtrit(math.inf, (1 + CONFIDENCE) / 2))
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Value(share, half / z, max(0.0, centre - half), min(1.0, centre + half), count, note)


def paired(a: np.ndarray, b: np.ndarray, *, share: bool = False) -> Estimate:
    """mean(a - b) over the same images, [N] each, N at least 2.

    Of a `share`, whose columns say yes or no (1 or 0) of an image, it is Agresti and Min's (2005), who add half an
    image to each of the four cells. The values cannot tell: identical images have an SSIM of 1 throughout.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if share:
        count, gains, losses = len(a) + 2, (a > b).sum() + 0.5, (a < b).sum() + 0.5
        change = float(gains - losses) / count
        return Estimate(change, math.sqrt(((gains + losses) / count - change**2) / count))
    return estimate(a - b)


def half_samples(num_images: int, repeats: int = 8, seed: int = 0) -> list[np.ndarray]:
    """2 * repeats sorted index arrays: random halves and their complements. The same for everyone who asks."""
    generator = np.random.default_rng(seed)
    halves = []
    for _ in range(repeats):
        order = generator.permutation(num_images)
        halves += [np.sort(order[: num_images // 2]), np.sort(order[num_images // 2 : num_images // 2 * 2])]
    return halves


def from_half_samples(value: float, halves: np.ndarray) -> Estimate:
    """A statistic of all images with its error from its values on `half_samples`.

    A statistic of n of N images varies by V (1/n - 1/N), that of all N by V / N: for halves the two are equal. A half
    and its complement share no image and mirror each other's deviation, so the mean of the squared half-differences of
    such pairs is that variance without the bias that all halves have in common. Of a distance, it is the error of what
    so many images give on average.
    """
    pairs = np.asarray(halves, dtype=np.float64).reshape(-1, 2)
    return Estimate(value, float(np.sqrt(np.mean(((pairs[:, 0] - pairs[:, 1]) / 2) ** 2))), len(pairs))


def surely(chances: Sequence[float], level: float = FALSE_ALARM) -> list[bool]:
    """Which of several hypotheses are refuted, given the chance of what was seen under each (Holm 1979).

    The chance that any of those that hold is among them is at most the level, however they depend on each other.
    """
    refuted = [False] * len(chances)
    for place, index in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        if chances[index] > level / (len(chances) - place):
            break
        refuted[index] = True
    return refuted


def judge(changes: Sequence[tuple[Estimate, float, Direction]]) -> list[Verdict]:
    """What all differences (new - base) of one comparison say together, each with its tolerance and better direction.

    "same": the 95 % interval lies within ±tolerance; "better" or "worse": the change is beyond it, so surely that
    without any change at most FALSE_ALARM of all comparisons call one of theirs so; else "inconclusive". Who exchanges
    new and base exchanges better and worse. A metric with no direction only gets worse.
    """
    chances = []
    for change, tolerance, better in changes:
        least = min(change.above(tolerance), change.below(-tolerance))
        chances.append(2 * least if better == "neither" else least)
    verdicts: list[Verdict] = []
    for (change, tolerance, better), sure in zip(changes, surely(chances), strict=True):
        low, high = change.interval()
        if -tolerance <= low and high <= tolerance:
            verdicts.append("same")
        elif not sure:
            verdicts.append("inconclusive")
        else:
            verdicts.append("better" if better == ("higher" if change.value > 0 else "lower") else "worse")
    return verdicts


def images_needed(change: Estimate, num_images: int, tolerance: float, comparisons: int = 1) -> int | None:
    """How many images find a loss of twice the tolerance in more than nine of ten runs, among so many comparisons.

    The spread seen in these is itself a guess: it is taken as large as it may well be. None if no more are needed than
    there are, since the loss is then too near to the tolerance, and if no number would do.
    """
    if tolerance == 0 or num_images < 2:
        return None
    freedom = min(change.freedom, num_images - 1)
    error = change.error * math.sqrt(freedom / chdtri(freedom, POWER))
    needed, tail = float(num_images), FALSE_ALARM / comparisons
    for _ in range(3):  # the quantiles depend a little on the number
        quantiles = stdtrit(freedom * needed / num_images, (1 - tail, POWER)).sum()
        needed = max(2.0, num_images * (quantiles * error / tolerance) ** 2)
    return math.ceil(needed) if needed > num_images else None
