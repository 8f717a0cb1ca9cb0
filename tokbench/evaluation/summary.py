"""From a full store to values: every metric over all samples and seeds, and the per-image table."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from tokbench.errors import InputError, preview
from tokbench.evaluation.reconstruct import seed_column
from tokbench.metrics import CODES, GRID, LATENTS, METRICS, Samples, too_few
from tokbench.metrics.statistics import Estimate
from tokbench.records.result import Value
from tokbench.records.samples import SampleStore

ROWS = 1024  # of features looked at together


class SeedView:
    """A store as if only one of several seeds had been run: what metrics read."""

    def __init__(self, store: SampleStore, seed: int) -> None:
        self.store, self.seed, self.ids = store, seed, store.ids
        self._columns = set(store.columns)

    def column(self, name: str) -> np.ndarray:
        """float64 [N] in id order."""
        own = seed_column(name, self.seed)
        return self.store.column(own if own in self._columns else name)

    def features(self, side: str, extractor: str) -> np.ndarray:
        """float32 [N, D] in id order; real images, codes and latents are those of every seed."""
        shared = side == "real" or extractor in (CODES, LATENTS)
        return self.store.features(side, extractor if shared else seed_column(extractor, self.seed))


def views(store: SampleStore, seeds: Sequence[int]) -> Sequence[Samples]:
    """The store as each seed has filled it."""
    return [store] if len(seeds) == 1 else [SeedView(store, seed) for seed in seeds]


def over_seeds(values: Sequence[Value]) -> Value:
    """The mean over seeds, its standard error split into images and noise (said in the note).

    One seed's standard error over images holds the noise of that seed too; it is taken out before the noise of the
    mean over seeds is put in.
    """
    numbers = [value.value for value in values if value.value is not None]
    if len(values) == 1 or len(numbers) < len(values):
        return values[0]
    mean, spread = float(np.mean(numbers)), float(np.var(numbers, ddof=1))
    errors = [value.stderr for value in values if value.stderr is not None]
    images = math.sqrt(max(0.0, float(np.mean(np.square(errors))) - spread)) if errors else 0.0
    noise = math.sqrt(spread / len(numbers))
    stderr = math.hypot(images, noise)
    note = f"{len(numbers)} seeds; standard error {noise:.2g} by noise, {images:.2g} by images"
    n = values[0].n
    low, high = Estimate(mean, stderr, n - 1).interval() if values[0].low is not None else (None, None)
    return Value(mean, stderr, low, high, n, "; ".join(filter(None, (values[0].note, note))))


def table(names: Sequence[str], store: SampleStore, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """The columns of the per-image table: those stored, and what features give per image, averaged over seeds."""
    columns = {name: store.column(name) for name in store.columns if name not in (*GRID, "label")}
    for name in names:
        rows = METRICS[name].rows
        if rows is not None and len(store.ids) >= METRICS[name].minimum:
            columns[name] = np.mean([rows(view) for view in views(store, seeds)], axis=0)
    return columns


def compute(name: str, store: SampleStore, seeds: Sequence[int]) -> Value:
    """A metric of everything in the store, averaged over seeds.

    Null, naming the samples at fault, if what the metric reads of them is NaN or infinite.
    """
    metric, ids = METRICS[name], store.ids
    if len(ids) < metric.minimum:
        return too_few(len(ids), metric.minimum)
    bad = not_finite(ids, (store.column(column)[:, None] for column in metric.columns))
    if bad:
        return Value(None, n=len(ids), note=f"NaN or infinity in {preview(bad)}")
    try:
        value = over_seeds([metric.value(view) for view in views(store, seeds)])
    except InputError:
        if not (bad := _bad_features(name, store, seeds)):
            raise
        return Value(None, n=len(ids), note=f"NaN or infinity in {preview(bad)}")
    if value.value is None or math.isfinite(value.value):
        low, high = metric.low, metric.high  # what no interval goes beyond
        return replace(
            value,
            low=value.low if low is None or value.low is None else max(low, value.low),
            high=value.high if high is None or value.high is None else min(high, value.high),
        )
    bad = _bad_features(name, store, seeds)
    return Value(
        None, n=len(ids), note=f"NaN or infinity in {preview(bad)}" if bad else f"not a finite number ({value.value})"
    )


def _bad_features(name: str, store: SampleStore, seeds: Sequence[int]) -> list[str]:
    metric = METRICS[name]
    if metric.extractor is None:
        return []
    sides = [(view, side) for view in views(store, seeds) for side in metric.sides]
    return not_finite(store.ids, (view.features(side, metric.extractor) for view, side in sides))


def not_finite(ids: Sequence[str], arrays: Iterable[np.ndarray]) -> list[str]:
    """Ids of the samples with a NaN or infinity in one of these arrays [N, D]."""
    bad = np.zeros(len(ids), dtype=bool)
    for values in arrays:
        for start in range(0, len(ids), ROWS):
            bad[start : start + ROWS] |= ~np.isfinite(values[start : start + ROWS]).all(axis=1)
    return [sample for sample, wrong in zip(ids, bad, strict=True) if wrong]
