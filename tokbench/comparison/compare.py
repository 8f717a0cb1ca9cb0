"""`tokbench compare A.json B.json`: is B better than A? Paired by image, with plain verdicts. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokbench.errors import InputError
from tokbench.metrics import FRECHET_MINIMUM, METRICS, Metric, frechet
from tokbench.metrics.statistics import (
    Verdict,
    half_sample_error,
    images_needed,
    mean_and_error,
    paired_interval,
    t_quantile,
    verdict,
)
from tokbench.records.files import per_image_path, read_per_image
from tokbench.records.result import EvalResult, read_result
from tokbench.records.samples import SampleStore
from tokbench.report.columns import DAGGER, is_training_loss
from tokbench.runtime.terminal import stdout_console

Z = 1.959964  # of a 95 % interval, where there are no degrees of freedom to count


@dataclass(frozen=True)
class Difference:
    """B minus A of one metric. `needed`: images that would settle an inconclusive one; None: no number, or settled."""

    metric: str
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    verdict: Verdict
    tolerance: float
    n: int
    needed: int | None = None
    how: str = ""  # how the interval came about
    trained: tuple[bool, bool] = (False, False)  # whether the metric's network was in A's, in B's training loss


Rows = tuple[list[str], dict[str, np.ndarray]]


def compare(path_a: Path, path_b: Path) -> list[Difference]:
    """Differences of all metrics that both results have. InputError if they were not measured on the same images."""
    a, b = read_result(path_a), read_result(path_b)
    refuse_different(a, b)
    rows = [read_per_image(per_image_path(p)) if per_image_path(p).is_file() else None for p in (path_a, path_b)]
    stores = [SampleStore(p.with_suffix(".features")) if p.with_suffix(".features").is_dir() else None
              for p in (path_a, path_b)]  # fmt: skip
    found = []
    for name, metric in METRICS.items():
        values = [result.metrics.get(name) for result in (a, b)]
        if any(value is None or value.value is None for value in values):
            continue
        found.append(_difference(metric, a, b, rows, stores))
    return found


def refuse_different(a: EvalResult, b: EvalResult) -> None:
    """InputError for results that cannot be compared: other protocol, images or resolution."""
    checks = {
        "protocol": (a.protocol, b.protocol),
        "protocol fingerprint": (a.protocol_fingerprint, b.protocol_fingerprint),
        "resolution": (a.dataset.resolution, b.dataset.resolution),
        "data set": (a.dataset.name, b.dataset.name),
        "images": (a.dataset.fingerprint, b.dataset.fingerprint),
        "number of images": (a.dataset.num_images, b.dataset.num_images),
    }
    for what, (first, second) in checks.items():
        if first != second:
            raise InputError(f"not comparable: {what} {first} and {second}")


def _difference(
    metric: Metric, a: EvalResult, b: EvalResult, rows: list[Rows | None], stores: list[SampleStore | None]
) -> Difference:
    x, y = a.metrics[metric.name], b.metrics[metric.name]
    assert x.value is not None
    assert y.value is not None
    difference, n = y.value - x.value, min(x.n, y.n)
    trained = (is_training_loss(a, metric.name), is_training_loss(b, metric.name))
    seeds: list[Sequence[int]] = [result.settings.seeds for result in (a, b)]
    low, high, how = _interval(metric, difference, rows, stores, seeds)
    if low is None and x.stderr is not None and y.stderr is not None:
        half = Z * float(np.hypot(x.stderr, y.stderr))
        low, high, how = difference - half, difference + half, "unpaired: wider than need be"
    if low is None or high is None:
        return Difference(metric.name, x.value, y.value, difference, None, None, "inconclusive", metric.tolerance, n,
                          how="no error known", trained=trained)  # fmt: skip
    said = verdict(low, high, metric.tolerance, metric.better)
    needed = images_needed(difference, low, high, n, metric.tolerance) if said == "inconclusive" else None
    return Difference(metric.name, x.value, y.value, difference, low, high, said, metric.tolerance, n, needed, how,
                      trained)  # fmt: skip


def _interval(
    metric: Metric, difference: float, rows: list[Rows | None], stores: list[SampleStore | None],
    seeds: list[Sequence[int]],
) -> tuple[float | None, float | None, str]:  # fmt: skip
    """A paired 95 % interval from per-image rows or kept features; (None, None, "") without them."""
    first, second = rows
    if first and second and first[0] == second[0] and len(first[0]) > 1:
        column = "mse" if metric.name == "psnr-global" else metric.name
        if column in first[1] and column in second[1]:
            return _of_columns(metric, difference, first[1][column], second[1][column])
    if metric.minimum < FRECHET_MINIMUM or metric.extractor is None or metric.sides != ("real", "fake"):
        return None, None, ""
    a, b = stores
    if a is None or b is None or a.ids != b.ids:
        return None, None, ""
    try:
        halves = [_half_sample_distances(s, metric.extractor, own) for s, own in zip((a, b), seeds, strict=True)]
    except KeyError:  # features of other metrics were kept
        return None, None, ""
    half = t_quantile(0.975, len(halves[0]) // 2) * half_sample_error(halves[1] - halves[0])
    return difference - half, difference + half, "paired half-samples"


def _half_sample_distances(store: SampleStore, extractor: str, seeds: Sequence[int]) -> np.ndarray:
    """Fréchet distances [2 * repeats] on half-samples, averaged over the seeds, as the value is; KeyError if features
    are missing."""
    names = [extractor] if len(seeds) == 1 else [f"{extractor}.seed{seed}" for seed in seeds]  # reconstruct.seeded
    real = store.features("real", extractor)
    return np.mean([frechet.half_sample_distances(real, store.features("fake", name)) for name in names], axis=0)


def _of_columns(
    metric: Metric, difference: float, a: np.ndarray, b: np.ndarray
) -> tuple[float | None, float | None, str]:
    if metric.name != "psnr-global":
        return *paired_interval(b, a), "paired by image"
    if not (a.any() and b.any()):
        return None, None, ""
    # Delta method: what each image's squared error adds to the difference of the two logarithms.
    slopes = mean_and_error(-10 / np.log(10) * (b / b.mean() - a / a.mean()))
    half = slopes.high - slopes.value if slopes.high is not None and slopes.value is not None else 0.0
    return difference - half, difference + half, "paired by image"


def run_compare(path_a: Path, path_b: Path) -> int:
    """Print the table; the exit status is 0 whatever the verdicts are."""
    from rich.table import Table
    from rich.text import Text

    differences = compare(path_a, path_b)
    if not differences:
        raise InputError(f"{path_a} and {path_b} have no metric in common")
    a, b = read_result(path_a), read_result(path_b)
    title = f"{b.tokenizer.name} against {a.tokenizer.name}: {a.dataset.name} at {a.dataset.resolution} px"
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    for index, heading in enumerate(("metric", a.tokenizer.name, b.tokenizer.name, "difference", "95 %", "verdict")):
        table.add_column(Text(heading), justify="right" if 0 < index < 5 else "left", overflow="fold")
    colours = {"better": "green", "worse": "bold red", "inconclusive": "yellow", "same": ""}
    for d in differences:
        table.add_row(*(Text(text, style=colours[d.verdict]) for text in describe(d)))
    console = stdout_console(100)
    console.print(table)
    console.print(Text(f"N = {a.dataset.num_images} · protocol {a.protocol} · same: within the metric's tolerance"))
    if any(any(d.trained) for d in differences):
        console.print(Text(DAGGER))
    return 0


def describe(d: Difference) -> list[str]:
    """The texts of a row."""
    digits = METRICS[d.metric].digits + 1
    said: str = d.verdict
    if d.verdict == "same":
        said = f"same (±{d.tolerance:g})"
    elif d.verdict == "inconclusive":
        said += f", would need N = {d.needed:,}" if d.needed else ""
    if d.how and not d.how.startswith("paired"):
        said += f" ({d.how})"
    interval = "" if d.low is None or d.high is None else f"[{d.low:+z.{digits}f}, {d.high:+z.{digits}f}]"
    values = [f"{v:z.{digits}f}{'†' if own else ''}" for v, own in zip((d.a, d.b), d.trained, strict=True)]
    return [d.metric, *values, f"{d.difference:+z.{digits}f}", interval, said]
