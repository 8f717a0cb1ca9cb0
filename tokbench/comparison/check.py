"""Has reconstruction quality got worse? New results against a committed baseline, by metric. Never imports torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokbench.errors import InputError
from tokbench.metrics import METRICS
from tokbench.metrics.statistics import paired_interval
from tokbench.records.files import per_image_path, read_per_image, read_results, result_path, write_whole
from tokbench.records.result import EvalResult, SpeedResult, Value, read_speed
from tokbench.report.columns import is_training_loss

Verdict = Literal["worse", "same", "better", "inconclusive"]
SPEED_TOLERANCE = 0.3  # share of the baseline's rate; clocks and neighbours move a machine by a tenth or more


@dataclass(frozen=True)
class Comparison:
    """One metric of one cell. `loss` is how much worse the new value is, in the metric's unit: negative is better."""

    cell: str
    metric: str
    base: float
    new: float
    loss: float
    low: float | None  # 95 % interval of the loss from paired images; None where only means are known
    high: float | None
    tolerance: float
    verdict: Verdict
    warning: str = ""
    n: int = 0  # images; 0 for a speed
    trained: tuple[bool, bool] = (False, False)  # whether the metric's network was in the base's, the new's loss


@dataclass(frozen=True)
class CheckResult:
    """Everything that was compared, and the rules it was compared by."""

    comparisons: tuple[Comparison, ...]
    strict: bool = False
    pairs: tuple[tuple[Path, Path], ...] = ()  # (new, base) result files

    @property
    def failures(self) -> list[Comparison]:
        bad = ("worse", "inconclusive") if self.strict else ("worse",)
        return [c for c in self.comparisons if c.verdict in bad]


def parse_tolerances(text: str | None) -> dict[str, str]:
    """`psnr=0.05,lpips-alex=1%` -> {metric: text}; InputError for an unknown metric or a number that is none."""
    found = {}
    for part in filter(None, (text or "").split(",")):
        name, separator, amount = (piece.strip() for piece in part.partition("="))
        if not separator or name not in METRICS:
            raise InputError(
                f"--tolerance {part}: expected METRIC=NUMBER or METRIC=NUMBER%, metric one of {', '.join(METRICS)}"
            )
        _amount(amount, 1.0, part)
        found[name] = amount
    return found


def _amount(text: str, base: float, where: str) -> float:
    try:
        amount = float(text.removesuffix("%"))
    except ValueError:
        raise InputError(f"--tolerance {where}: {text!r} is not a number") from None
    if not (math.isfinite(amount) and amount >= 0):
        raise InputError(f"--tolerance {where}: must be zero or more")
    return abs(base) * amount / 100 if text.endswith("%") else amount


def cell_key(result: EvalResult) -> tuple[Any, ...]:
    """What has to agree for two cells to be compared. Weights and seeds may differ: that is what is checked."""
    data, info = result.dataset, result.tokenizer
    return (
        result.protocol,
        result.protocol_fingerprint,
        data.fingerprint,
        data.num_images,  # --skip-bad may have left some out
        data.resolution,
        info.name,
        info.decode_steps,
    )


def cell_name(result: EvalResult) -> str:
    return f"{result.tokenizer.name} at {result.dataset.resolution} px"


def check(
    new: Path,
    against: Path,
    *,
    tolerances: Mapping[str, str] | None = None,
    metrics: Sequence[str] | None = None,
    exact: bool = False,
    two_sided: bool = False,
    strict: bool = False,
) -> CheckResult:
    """Compare every cell of `new` (a result file or a folder) with its counterpart in `against`.

    Raises InputError when something cannot be compared: a cell or metric that the baseline lacks, another protocol or
    data set, nothing at all. `metrics` restricts what is compared; `exact` fails on any change, `two_sided` on a gain
    beyond the tolerance too: where weights are fixed, a gain is a change of the harness.
    """
    for name in metrics or ():
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
    candidates = _readable(new)
    baselines = {cell_key(result): (path, result) for path, result in _readable(against)}
    comparisons: list[Comparison] = []
    pairs = []
    for path, result in candidates:
        if cell_key(result) not in baselines:
            raise InputError(
                f"{cell_name(result)}: {_why_missing(result, [r for _, r in baselines.values()], against)}"
            )
        base_path, base = baselines[cell_key(result)]
        pairs.append((path, base_path))
        comparisons += compare_cells(
            (path, result), (base_path, base), tolerances or {}, metrics, exact=exact, two_sided=two_sided
        )
    if not comparisons:
        raise InputError(f"{new}: nothing was compared; measure something that {against} holds")
    return CheckResult(tuple(comparisons), strict, tuple(pairs))


def _readable(path: Path) -> list[tuple[Path, EvalResult]]:
    results, warnings = read_results(path)
    if warnings:
        raise InputError(warnings[0])
    if not results:
        raise InputError(f"{path}: holds no results; write some with `tokbench run --out {path}`")
    return results


def _why_missing(result: EvalResult, baselines: Sequence[EvalResult], against: Path) -> str:
    """What keeps the nearest baseline cell from being this one's."""
    for base in baselines:
        if base.tokenizer.name != result.tokenizer.name or base.dataset.resolution != result.dataset.resolution:
            continue
        if base.protocol_fingerprint != result.protocol_fingerprint:
            ours, theirs = (f"{r.protocol} {r.protocol_fingerprint}" for r in (result, base))
            return f"protocol {ours}, the baseline's is {theirs}"
        if base.dataset != result.dataset:
            ours, theirs = (f"{r.dataset.name}, {r.dataset.num_images}" for r in (result, base))
            return f"measured on other images ({ours}) than the baseline ({theirs})"
        return f"{result.tokenizer.decode_steps} decode steps, the baseline has {base.tokenizer.decode_steps}"
    return f"{against} has no such cell; add it with `tokbench check --update`"


def compare_cells(
    new: tuple[Path, EvalResult],
    base: tuple[Path, EvalResult],
    tolerances: Mapping[str, str],
    metrics: Sequence[str] | None,
    *,
    exact: bool = False,
    two_sided: bool = False,
) -> list[Comparison]:
    """All metrics of a cell. InputError for one that only one side has."""
    names = list(metrics or dict.fromkeys([*new[1].metrics, *base[1].metrics]))
    rows = [_rows(path) for path, _ in (new, base)]
    found = []
    for name in names:
        sides = []
        for path, result in (new, base):
            if name not in result.metrics:
                reason = result.unavailable.get(name, "not measured")
                raise InputError(f"{path}: {name} cannot be compared: {reason}; restrict the check with --metrics")
            sides.append(result.metrics[name])
        if sides[0].value is None and sides[1].value is None:
            continue  # null on both sides, as rfid is on few images
        if sides[0].value is None or sides[1].value is None:
            raise InputError(
                f"{cell_name(new[1])}: {name} has a value on one side only ({sides[0].note or sides[1].note})"
            )
        compared = _compare(cell_name(new[1]), name, sides[0], sides[1], rows, tolerances, exact, two_sided)
        found.append(replace(compared, trained=(is_training_loss(base[1], name), is_training_loss(new[1], name))))
    return found


def _rows(path: Path) -> tuple[list[str], dict[str, np.ndarray]] | None:
    table = per_image_path(path)
    return read_per_image(table) if table.exists() else None


def _compare(
    cell: str,
    name: str,
    new: Value,
    base: Value,
    rows: Sequence[tuple[list[str], dict[str, np.ndarray]] | None],
    tolerances: Mapping[str, str],
    exact: bool,
    two_sided: bool,
) -> Comparison:
    metric = METRICS.get(name)
    if metric is None:
        raise InputError(f"{cell}: metric {name!r} is unknown to this version; restrict the check with --metrics")
    assert new.value is not None
    assert base.value is not None
    sign = {"higher": -1.0, "lower": 1.0, "neither": 1.0}[metric.better]
    loss = sign * (new.value - base.value)
    tolerance = _amount(tolerances.get(name, str(metric.tolerance)), base.value, name)
    low = high = None
    paired = _paired(name, rows)
    if paired is not None:
        low, high = paired_interval(sign * paired[0], sign * paired[1])
    if exact:
        changed = new.value != base.value or (paired is not None and not np.array_equal(*paired))
        verdict: Verdict = "worse" if changed else "same"
        tolerance = 0.0
    else:
        spread = (low, high) if low is not None and high is not None else (loss, loss)
        verdict = judge(*spread, tolerance, two_sided=two_sided or metric.better == "neither")
    certain = low is not None and low > 0 and verdict in ("same", "inconclusive")
    warning = "certainly a little worse" if certain and metric.better != "neither" else ""
    return Comparison(cell, name, base.value, new.value, loss, low, high, tolerance, verdict, warning, new.n)


def _paired(
    name: str, rows: Sequence[tuple[list[str], dict[str, np.ndarray]] | None]
) -> tuple[np.ndarray, np.ndarray] | None:
    """(new, base) per-image values of a metric, in the same order; None where a side has none or other images."""
    new, base = rows
    if new is None or base is None or name not in new[1] or name not in base[1] or new[0] != base[0] or len(new[0]) < 2:
        return None
    return new[1][name], base[1][name]


def judge(low: float, high: float, tolerance: float, *, two_sided: bool = False) -> Verdict:
    """A verdict on the interval [low, high] of a loss, given what loss is tolerated.

    Worse: all of it beyond the tolerance. Same: all of it within. Better: all of it below zero. Else inconclusive.
    `two_sided`: worse on either side, as for a metric without a direction.
    """
    if low > tolerance or (two_sided and high < -tolerance):
        return "worse"
    if -tolerance <= low and high <= tolerance:
        return "same"
    if high < 0 and not two_sided:
        return "better"
    return "inconclusive"


def check_speed(new: Path, against: Path, tolerance: float = SPEED_TOLERANCE) -> list[Comparison]:
    """Decode rates against the baseline's, for rows of the same name, resolution, setting and hardware only."""
    sides = [{_speed_key(r): r for r in _speeds(path)} for path in (new, against)]
    found = []
    for key, result in sides[0].items():
        base = sides[1].get(key)
        if base is None or "decode" not in result.stages or "decode" not in base.stages:
            continue
        rates = result.stages["decode"].images_per_second, base.stages["decode"].images_per_second
        loss, allowed = rates[1] - rates[0], tolerance * rates[1]
        name = f"{result.tokenizer.name} at {result.resolution} px"
        verdict = judge(loss, loss, allowed)
        found.append(Comparison(name, "decode img/s", rates[1], rates[0], loss, None, None, allowed, verdict))
    if not found:
        raise InputError(f"{against}: no speed record of this hardware and setting; nothing was compared")
    return found


def _speeds(path: Path) -> list[SpeedResult]:
    return [read_speed(path)] if path.is_file() else [read_speed(file) for file in sorted(path.rglob("*.json"))]


def _speed_key(result: SpeedResult) -> tuple[Any, ...]:
    setting = tuple(result.settings.get(name) for name in ("dtype", "compile", "threads"))
    return (result.hardware, result.tokenizer.name, result.resolution, setting)


def update(new: Path, against: Path, *, accept: bool = False, **rules: Any) -> list[str]:
    """Make `new` the baseline: copy its results and per-image tables. Returns what changed, a line each.

    A baseline that the new results are worse than is kept (InputError) unless `accept`. Cells that only the baseline
    holds stay.
    """
    candidates = _readable(new)
    known = {cell_key(r): (p, r) for p, r in read_results(against)[0]} if against.exists() else {}
    lines = []
    for path, result in candidates:
        if cell_key(result) in known:
            old = known[cell_key(result)]
            changes = compare_cells((path, result), old, rules.get("tolerances") or {}, rules.get("metrics"))
            worse = [c for c in changes if c.verdict == "worse"]
            if worse and not accept:
                first = worse[0]
                change = f"{first.metric} {first.base:.5g} -> {first.new:.5g}"
                raise InputError(f"{first.cell}: {change} is worse; --accept takes it")
            lines += [
                f"{c.cell}: {c.metric} {c.base:.5g} -> {c.new:.5g} ({c.verdict})" for c in changes if c.base != c.new
            ]
        else:
            lines.append(f"{cell_name(result)}: new")
    for path, result in candidates:
        target = result_path(against, result)
        if per_image_path(path).exists():  # the record last: it vouches for its table
            write_whole(per_image_path(target), per_image_path(path).read_bytes())
        write_whole(target, path.read_bytes())
    return lines or ["nothing changed"]
