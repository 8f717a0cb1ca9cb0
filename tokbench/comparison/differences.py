"""Two results, one pairing: the difference of every metric with its interval and verdict. No torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tokbench.errors import InputError
from tokbench.metrics import METRICS, Metric
from tokbench.metrics.statistics import (
    FALSE_ALARM,
    Direction,
    Estimate,
    Verdict,
    estimate,
    from_half_samples,
    images_needed,
    judge,
    paired,
)
from tokbench.protocols import size_text
from tokbench.records.files import read_results
from tokbench.records.result import EvalResult
from tokbench.records.samples import SampleStore
from tokbench.report.columns import Conditions, ResultEntry, conditions, differing, is_training_loss, number
from tokbench.report.tables import DAGGER, Heading, Table, plain

BY_IMAGE, BY_HALVES = "paired by image", "paired half-samples"
UNPAIRED, UNKNOWN = "unpaired: wider than need be", "no error known"
TOGETHER = f"worse, better: of all rows together; without any change {FALSE_ALARM:.0%} of tables hold one (Holm)"
NEEDED = "needs N: as many images find a loss of twice the tolerance in nine runs of ten"
STYLES = {"worse": "bold red", "better": "green", "same": "", "inconclusive": "yellow"}
CellKey = tuple[Conditions, str, int | None]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of two results: new - base with its error, and what `judged` made of it among all others."""

    cell: str
    metric: str
    base: float
    new: float
    estimate: Estimate | None  # of new - base; None where no error is known
    how: str  # how the error came about
    tolerance: float
    better: Direction
    n: int  # images
    trained: tuple[bool, bool]  # whether the metric's network was in the base's, the new's loss
    verdict: Verdict = "inconclusive"
    needed: int | None = None  # images that would settle an inconclusive one; None: no number would, or settled
    versions: tuple[str, ...] = ()  # "torch 2.13 and 2.14": libraries that the two were not measured with alike

    @property
    def change(self) -> float:
        return self.new - self.base

    @property
    def interval(self) -> tuple[float, float]:
        """95 %; of a bare difference the difference alone."""
        return (self.change, self.change) if self.estimate is None else self.estimate.interval()

    def loss(self, change: float) -> float:
        """How much worse a change is, in the metric's unit; of a metric without a direction its size."""
        return {"higher": -change, "lower": change, "neither": abs(change)}[self.better]

    def fails(self, strict: bool) -> bool:
        """What is worse fails a check; if `strict`, also what may be, by its interval.

        Where no error is known to tell chance from loss, that excuses nothing: the difference alone decides.
        """
        if self.verdict != "inconclusive":
            return self.verdict == "worse"
        return (strict or self.estimate is None) and max(map(self.loss, self.interval)) > self.tolerance


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
    """Differences of these metrics, of which both results have a value, yet to be `judged`.

    InputError for results that were not measured on the same images under the same protocol.
    """
    if reason := differing(base.result, new.result):
        raise InputError(f"not comparable: {reason}")
    versions = other_versions(base.result, new.result)
    return [replace(_difference(METRICS[name], base, new, rules), versions=versions) for name in metrics]


def other_versions(a: EvalResult, b: EvalResult) -> tuple[str, ...]:
    """Libraries that two results were measured with in different versions."""
    then, now = a.provenance.versions, b.provenance.versions
    return tuple(f"{name} {then[name]} and {now[name]}" for name in then if now.get(name, then[name]) != then[name])


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
    return judged(found)


def judged(found: Sequence[Difference], *, exact: bool = False) -> list[Difference]:
    """All differences of one comparison with their verdicts: as many as they are, they share one chance of an error.

    Of `exact` rules the verdicts are there already; of a metric without an error the difference alone tells.
    """
    if exact:
        return list(found)
    sure = [(d.estimate, d.tolerance, d.better) for d in found if d.estimate is not None]
    verdicts = iter(judge(sure))
    return [_settled(d, next(verdicts) if d.estimate is not None else None, len(sure)) for d in found]


def _settled(d: Difference, verdict: Verdict | None, comparisons: int) -> Difference:
    if d.estimate is None or verdict is None:
        return replace(d, verdict="same" if abs(d.change) <= d.tolerance else "inconclusive")
    needed = images_needed(d.estimate, d.n, d.tolerance, comparisons) if verdict == "inconclusive" else None
    return replace(d, verdict=verdict, needed=needed)


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
    found, how = _change(metric, base, new)
    verdict: Verdict = "inconclusive"
    if rules.exact:
        same = x.value == y.value and np.array_equal(*_terms(metric, base, new))
        verdict = "same" if same else "worse"
    return Difference(
        cell=cell_name(new), metric=name, base=x.value, new=y.value, estimate=found, how=how,
        tolerance=0.0 if rules.exact else rules.tolerance(name, x.value),
        better="neither" if rules.two_sided else metric.better, n=min(x.n, y.n), verdict=verdict,
        trained=(is_training_loss(base.result, name), is_training_loss(new.result, name)),
    )  # fmt: skip


def _terms(metric: Metric, base: ResultEntry, new: ResultEntry) -> tuple[np.ndarray, np.ndarray]:
    """What each image adds to a metric [N], of both results; both empty where their rows are not of the same images."""
    found = []
    for entry in (base, new):
        ids, columns = entry.rows
        reads = metric.reads if metric.terms else (metric.name,)
        if not columns.keys() >= set(reads) or ids != base.rows[0]:
            return np.empty(0), np.empty(0)
        found.append(metric.terms(columns) if metric.terms else columns[metric.name])
    return found[0], found[1]


def _change(metric: Metric, base: ResultEntry, new: ResultEntry) -> tuple[Estimate | None, str]:
    """new - base with its error: paired by per-image rows or kept features, else from the two standard errors."""
    x, y = base.result.metrics[metric.name], new.result.metrics[metric.name]
    assert x.value is not None
    assert y.value is not None
    change = y.value - x.value
    first, second = _terms(metric, base, new)
    if len(first) > 1:
        if metric.terms:
            return replace(estimate(second - first), value=change), BY_IMAGE
        return paired(second, first, share=metric.share), BY_IMAGE
    if (halves := _halves(metric, base, new)) is not None:
        return from_half_samples(change, halves), BY_HALVES
    if x.stderr is None or y.stderr is None:
        return None, UNKNOWN
    return Estimate(change, float(np.hypot(x.stderr, y.stderr))), UNPAIRED


def _halves(metric: Metric, base: ResultEntry, new: ResultEntry) -> np.ndarray | None:
    """Differences of a metric on half-samples of the features that both kept; None where they are not."""
    if metric.halves is None:
        return None
    folders = [entry.path.with_suffix(".features") for entry in (base, new) if entry.path is not None]
    if len(folders) < 2 or not all(folder.is_dir() for folder in folders):
        return None
    stores = [SampleStore(folder) for folder in folders]
    if stores[0].ids != stores[1].ids:
        return None
    try:
        halves = [
            _half_sample_distances(store, metric, entry.result.settings.seeds)
            for store, entry in zip(stores, (base, new), strict=True)
        ]
    except KeyError:  # features of other metrics were kept
        return None
    return np.asarray(halves[1] - halves[0])


def _half_sample_distances(store: SampleStore, metric: Metric, seeds: Sequence[int]) -> np.ndarray:
    """Distances [2 * repeats] on half-samples, averaged over the seeds, as the value is; KeyError if features
    are missing."""
    assert metric.halves is not None
    extractor = metric.extractor or ""
    names = [extractor] if len(seeds) == 1 else [f"{extractor}.seed{seed}" for seed in seeds]  # reconstruct.seeded
    distances = [metric.halves(store, name) for name in names]
    mean: np.ndarray = np.mean(distances, axis=0)
    return mean


def difference_table(title: str, found: Sequence[Difference], names: tuple[str, str] = ("baseline", "new")) -> Table:
    """All differences, a row each: what compare prints and check judges."""
    headings = [
        Heading(key="cell"), Heading(key="metric", words=True), Heading(key="N", minor=True),
        *(Heading(key=name) for name in names), Heading(key="difference"), Heading(key="95 % interval"),
        Heading(key="tolerated", minor=True), Heading(key="verdict", words=True),
    ]  # fmt: skip
    notes = [TOGETHER] if found else []
    notes += [NEEDED] if any(d.needed for d in found) else []
    notes += [DAGGER] if any(any(d.trained) for d in found) else []
    if others := dict.fromkeys(text for d in found for text in d.versions):
        notes.append(f"measured with other versions: {', '.join(others)}")
    return plain(title, headings, [cells(d) for d in found], notes, [STYLES[d.verdict] for d in found])


def cells(d: Difference) -> list[str]:
    """The texts of a difference's row."""
    digits = METRICS[d.metric].digits + 1
    values = [f"{v:z.{digits}f}{'†' if own else ''}" for v, own in zip((d.base, d.new), d.trained, strict=True)]
    low, high = d.interval
    interval = "–" if d.estimate is None else f"[{low:+z.{digits}f}, {high:+z.{digits}f}]"
    texts = [d.cell, d.metric, f"{d.n:,}", *values, f"{d.change:+z.{digits}f}", interval]
    return [*texts, f"±{d.tolerance:.{digits}f}", said(d)]


def said(d: Difference) -> str:
    """The verdict, and what qualifies it."""
    low, high = d.interval
    remarks = []
    if d.verdict in ("same", "inconclusive") and d.estimate is not None and d.better != "neither" and low * high > 0:
        side = "worse" if d.loss(d.change) > 0 else "better"
        within = "within the tolerance" if d.verdict == "same" else "by itself, perhaps within the tolerance"
        remarks.append(f"{side} {within}")
    if d.needed:
        remarks.append(f"needs N = {d.needed:,}")
    if d.how in (UNPAIRED, UNKNOWN):
        remarks.append(d.how)
    return d.verdict + (f" ({'; '.join(remarks)})" if remarks else "")
