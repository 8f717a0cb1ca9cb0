"""Two results, one pairing: the difference of every metric with its interval and verdict. No torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from tokbench.errors import InputError
from tokbench.metrics import FRECHET_MINIMUM, METRICS, Metric, frechet
from tokbench.metrics.statistics import (
    Verdict,
    half_sample_error,
    images_needed,
    judge,
    mean_and_error,
    paired_interval,
    t_quantile,
)
from tokbench.protocols import size_text
from tokbench.records.files import read_results
from tokbench.records.result import EvalResult
from tokbench.records.samples import SampleStore
from tokbench.report.columns import (
    Conditions,
    ResultEntry,
    conditions,
    differing,
    is_training_loss,
    number,
    paired_columns,
)
from tokbench.report.tables import DAGGER, Heading, Table, plain

Z = 1.959964  # of a 95 % interval, where there are no degrees of freedom to count
BY_IMAGE, BY_HALVES = "paired by image", "paired half-samples"
UNPAIRED, UNKNOWN = "unpaired: wider than need be", "no error known"
STYLES = {"worse": "bold red", "better": "green", "same": "", "inconclusive": "yellow"}
CellKey = tuple[Conditions, str, int | None]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of two results: new - base, with its 95 % interval; None where no error is known."""

    cell: str
    metric: str
    base: float
    new: float
    low: float | None
    high: float | None
    how: str  # how the interval came about
    tolerance: float
    better: Literal["higher", "lower", "neither"]
    verdict: Verdict
    n: int  # images
    needed: int | None  # images that would settle an inconclusive one; None: no number would, or settled
    trained: tuple[bool, bool]  # whether the metric's network was in the base's, the new's loss

    @property
    def change(self) -> float:
        return self.new - self.base

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval; of a bare difference the difference alone."""
        return (self.change, self.change) if self.low is None or self.high is None else (self.low, self.high)

    def loss(self, change: float) -> float:
        """How much worse a change is, in the metric's unit; of a metric without a direction its size."""
        return {"higher": -change, "lower": change, "neither": abs(change)}[self.better]

    def fails(self, strict: bool) -> bool:
        """What is worse fails a check; if `strict`, also what may be, by its interval.

        Where no per-image rows tell chance from loss, that excuses nothing: the difference alone decides.
        """
        if self.verdict != "inconclusive":
            return self.verdict == "worse"
        at_worst = max(map(self.loss, self.bounds)) if strict else -math.inf
        return max(at_worst, self.loss(self.change) if self.how in (UNPAIRED, UNKNOWN) else at_worst) > self.tolerance


@dataclass(frozen=True, kw_only=True)
class Rules:
    """By what differences are judged. InputError for a metric that is not known, or a tolerance that is no number."""

    tolerances: Mapping[str, str] = field(default_factory=dict)  # metric -> "0.05", or "1%" of the base; else its own
    metrics: Sequence[str] = ()  # only these; (): all
    exact: bool = False  # any change is worse
    two_sided: bool = False  # a gain beyond the tolerance is worse too: where weights are fixed, the harness changed
    strict: bool = False  # an inconclusive loss fails a check too

    def __post_init__(self) -> None:
        for name in (*self.metrics, *self.tolerances):
            if name not in METRICS:
                raise InputError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
            self.tolerance(name, 1.0)

    def tolerance(self, metric: str, base: float) -> float:
        """The change of a metric that does not count, in its unit."""
        text = self.tolerances.get(metric, str(METRICS[metric].tolerance))
        try:
            amount = float(text.removesuffix("%"))
        except ValueError:
            amount = math.nan
        if not 0 <= amount < math.inf:
            raise InputError(f"--tolerance {metric}={text}: expected a number or a percentage, zero or more")
        return abs(base) * amount / 100 if text.endswith("%") else amount


def differences(base: ResultEntry, new: ResultEntry, metrics: Iterable[str], rules: Rules) -> list[Difference]:
    """Differences of these metrics, of which both results have a value.

    InputError for results that were not measured on the same images under the same protocol.
    """
    if reason := differing(base.result, new.result):
        raise InputError(f"not comparable: {reason}")
    return [_difference(METRICS[name], base, new, rules) for name in metrics]


def compare(path_a: Path, path_b: Path) -> list[Difference]:
    """B against A: two result files, or the cells that two folders have in common. InputError if nothing is."""
    a, b = readable(path_a), readable(path_b)
    known = {cell_key(entry.result): entry for entry in a}
    pairs = [(known[key], entry) for entry in b if (key := cell_key(entry.result)) in known]
    found = []
    for base, new in [(a[0], b[0])] if len(a) == len(b) == 1 else pairs:
        common = [name for name in METRICS if None not in (number(base.result, name), number(new.result, name))]
        found += differences(base, new, common, Rules())
    if not found:
        raise InputError(
            f"{path_a} and {path_b} have no metric of a cell in common; two models are compared by two files"
        )
    return found


def readable(path: Path) -> list[ResultEntry]:
    """The results in a file or folder; InputError where one cannot be read or there is none."""
    results, warnings = read_results(path)
    if warnings:
        raise InputError(warnings[0])
    if not results:
        raise InputError(f"{path}: holds no results; write some with `tokbench run --out {path}`")
    return [ResultEntry(result, file) for file, result in results]


def cell_key(result: EvalResult) -> CellKey:
    """What makes a cell the same again. Weights and seeds may differ: that is what is checked."""
    return conditions(result), result.tokenizer.name, result.tokenizer.decode_steps


def cell_name(entry: ResultEntry) -> str:
    return f"{entry.name} at {size_text(entry.result.dataset.resolution)}"


def _difference(metric: Metric, base: ResultEntry, new: ResultEntry, rules: Rules) -> Difference:
    name = metric.name
    x, y = base.result.metrics[name], new.result.metrics[name]
    assert x.value is not None
    assert y.value is not None
    change, n = y.value - x.value, min(x.n, y.n)
    low, high, how = _interval(metric, base, new)
    better = "neither" if rules.two_sided else metric.better
    tolerance = 0.0 if rules.exact else rules.tolerance(name, x.value)
    if rules.exact:
        same = x.value == y.value and np.array_equal(*paired_columns(base, new, _column(metric)))
        verdict: Verdict = "same" if same else "worse"
    elif low is None or high is None:
        verdict = "same" if abs(change) <= tolerance else "inconclusive"
    else:
        verdict = judge(low, high, tolerance, better)
    needed = None
    if verdict == "inconclusive" and low is not None and high is not None:
        needed = images_needed(change, low, high, n, tolerance)
    return Difference(
        cell=cell_name(new), metric=name, base=x.value, new=y.value, low=low, high=high, how=how, tolerance=tolerance,
        better=better, verdict=verdict, n=n, needed=needed,
        trained=(is_training_loss(base.result, name), is_training_loss(new.result, name)),
    )  # fmt: skip


def _column(metric: Metric) -> str:
    """The per-image column that a metric is a function of."""
    return "mse" if metric.name == "psnr-global" else metric.name


def _interval(metric: Metric, base: ResultEntry, new: ResultEntry) -> tuple[float | None, float | None, str]:
    """The 95 % interval of new - base: paired by per-image rows or kept features, else from the two standard errors."""
    x, y = base.result.metrics[metric.name], new.result.metrics[metric.name]
    assert x.value is not None
    assert y.value is not None
    change = y.value - x.value
    first, second = paired_columns(base, new, _column(metric))
    if len(first) > 1 and base.rows[0] == new.rows[0]:
        if metric.name != "psnr-global":
            return *paired_interval(second, first, share=metric.share), BY_IMAGE
        if (half := _half_of_logarithms(first, second)) is not None:
            return change - half, change + half, BY_IMAGE
    if (half := _half_of_features(metric, base, new)) is not None:
        return change - half, change + half, BY_HALVES
    if x.stderr is None or y.stderr is None:
        return None, None, UNKNOWN
    half = Z * float(np.hypot(x.stderr, y.stderr))
    return change - half, change + half, UNPAIRED


def _half_of_logarithms(base: np.ndarray, new: np.ndarray) -> float | None:
    """Half the interval of the difference of two PSNR of mean squared errors [N]; None where one of them is zero.

    Delta method: what each image's squared error adds to the difference of the two logarithms.
    """
    if not (base.any() and new.any()):
        return None
    slopes = mean_and_error(-10 / np.log(10) * (new / new.mean() - base / base.mean()))
    assert slopes.high is not None
    assert slopes.value is not None
    return slopes.high - slopes.value


def _half_of_features(metric: Metric, base: ResultEntry, new: ResultEntry) -> float | None:
    """Half the interval of a difference of Fréchet distances, from half-samples of the features that both kept."""
    if metric.minimum < FRECHET_MINIMUM or metric.extractor is None or metric.sides != ("real", "fake"):
        return None
    folders = [entry.path.with_suffix(".features") for entry in (base, new) if entry.path is not None]
    if len(folders) < 2 or not all(folder.is_dir() for folder in folders):
        return None
    stores = [SampleStore(folder) for folder in folders]
    if stores[0].ids != stores[1].ids:
        return None
    try:
        halves = [
            _half_sample_distances(store, metric.extractor, entry.result.settings.seeds)
            for store, entry in zip(stores, (base, new), strict=True)
        ]
    except KeyError:  # features of other metrics were kept
        return None
    return t_quantile(0.975, len(halves[0]) // 2) * half_sample_error(halves[1] - halves[0])


def _half_sample_distances(store: SampleStore, extractor: str, seeds: Sequence[int]) -> np.ndarray:
    """Fréchet distances [2 * repeats] on half-samples, averaged over the seeds, as the value is; KeyError if features
    are missing."""
    names = [extractor] if len(seeds) == 1 else [f"{extractor}.seed{seed}" for seed in seeds]  # reconstruct.seeded
    real = store.features("real", extractor)
    distances = [frechet.half_sample_distances(real, store.features("fake", name)) for name in names]
    mean: np.ndarray = np.mean(distances, axis=0)
    return mean


def difference_table(title: str, found: Sequence[Difference], names: tuple[str, str] = ("baseline", "new")) -> Table:
    """All differences, a row each: what compare prints and check judges."""
    headings = [
        Heading(key="cell"), Heading(key="metric", words=True), Heading(key="N", minor=True),
        *(Heading(key=name) for name in names), Heading(key="difference"), Heading(key="95 % interval"),
        Heading(key="tolerated", minor=True), Heading(key="verdict", words=True),
    ]  # fmt: skip
    notes = [DAGGER] if any(any(d.trained) for d in found) else []
    return plain(title, headings, [cells(d) for d in found], notes, [STYLES[d.verdict] for d in found])


def cells(d: Difference) -> list[str]:
    """The texts of a difference's row."""
    digits = METRICS[d.metric].digits + 1
    values = [f"{v:z.{digits}f}{'†' if own else ''}" for v, own in zip((d.base, d.new), d.trained, strict=True)]
    interval = "–" if d.low is None or d.high is None else f"[{d.low:+z.{digits}f}, {d.high:+z.{digits}f}]"
    texts = [d.cell, d.metric, f"{d.n:,}", *values, f"{d.change:+z.{digits}f}", interval]
    return [*texts, f"±{d.tolerance:.{digits}f}", said(d)]


def said(d: Difference) -> str:
    """The verdict, and what qualifies it."""
    low, high = d.bounds
    remarks = []
    if d.verdict in ("same", "inconclusive") and d.low is not None and d.better != "neither" and (low > 0 or high < 0):
        side = "worse" if d.loss(d.change) > 0 else "better"
        remarks.append(f"certainly {side}, {'' if d.verdict == 'same' else 'perhaps '}within the tolerance")
    if d.needed:
        remarks.append(f"would need N = {d.needed:,}")
    if d.how in (UNPAIRED, UNKNOWN):
        remarks.append(d.how)
    return d.verdict + (f" ({'; '.join(remarks)})" if remarks else "")
