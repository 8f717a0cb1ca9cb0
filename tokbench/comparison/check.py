"""Has reconstruction quality got worse? New results against a committed baseline, by metric. Never imports torch."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokbench.comparison.differences import UNKNOWN, UNPAIRED, Difference, cell_key, cell_name, differences, readable
from tokbench.errors import InputError
from tokbench.metrics import METRICS
from tokbench.records.files import per_image_path, read_results, result_path, write_whole
from tokbench.report.columns import ResultEntry, differing, number


@dataclass(frozen=True)
class CheckResult:
    """Everything that was compared, and the rules it was compared by."""

    differences: tuple[Difference, ...]
    strict: bool = False

    @property
    def failures(self) -> list[Difference]:
        return [d for d in self.differences if fails(d, self.strict)]


def fails(d: Difference, strict: bool = False) -> bool:
    """Does a difference fail the check? What is worse does; with `strict` also what may be, by its interval.

    Where no per-image rows tell chance from loss, that excuses nothing: the difference alone decides.
    """
    if d.verdict != "inconclusive":
        return d.verdict == "worse"
    if d.how in (UNPAIRED, UNKNOWN) and d.loss(d.change) > d.tolerance:
        return True
    return strict and max(map(d.loss, d.bounds)) > d.tolerance


def parse_tolerances(text: str | None) -> dict[str, str]:
    """`psnr=0.05,lpips-alex=1%` -> {metric: text}; InputError for an unknown metric or no number."""
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
    if not against.exists():
        raise InputError(f"{against}: no such baseline; make NEW the first with `tokbench check --update`")
    baselines = {cell_key(entry.result): entry for entry in readable(against)}
    found: list[Difference] = []
    for entry in readable(new):
        base = baselines.get(cell_key(entry.result))
        if base is None:
            raise InputError(f"{cell_name(entry)}: {_why_missing(entry, list(baselines.values()), against)}")
        found += compare_cells(base, entry, tolerances, metrics, exact=exact, two_sided=two_sided)
    if not found:
        raise InputError(f"{new}: nothing was compared; measure something that {against} holds")
    return CheckResult(tuple(found), strict)


def _why_missing(entry: ResultEntry, baselines: Sequence[ResultEntry], against: Path) -> str:
    """What keeps the nearest baseline cell from being this one's."""
    for base in baselines:
        if cell_name(base) == cell_name(entry):
            steps = f"decode steps {base.result.tokenizer.decode_steps} and {entry.result.tokenizer.decode_steps}"
            return f"not comparable with the baseline: {differing(base.result, entry.result) or steps}"
    return f"{against} has no such cell; add it with `tokbench check --update`"


def compare_cells(
    base: ResultEntry,
    new: ResultEntry,
    tolerances: Mapping[str, str] | None = None,
    metrics: Sequence[str] | None = None,
    *,
    exact: bool = False,
    two_sided: bool = False,
) -> list[Difference]:
    """All metrics of a cell but those that are null on both sides. InputError for one that only one side has."""
    asked = metrics or dict.fromkeys([*new.result.metrics, *base.result.metrics])
    for name, entry in itertools.product(asked, (new, base)):
        if name not in METRICS or name not in entry.result.metrics:
            reason = entry.result.unavailable.get(name, "not measured" if name in METRICS else "this version lacks it")
            raise InputError(f"{entry.path}: {name} cannot be compared: {reason}; restrict the check with --metrics")
    names = [name for name in asked if number(base.result, name) is not None]
    if one_sided := set(names) ^ {name for name in asked if number(new.result, name) is not None}:
        raise InputError(f"{cell_name(new)}: {', '.join(one_sided)} has a value on one side only")
    amounts = {
        name: _amount(text, base.result.metrics[name].value or 0.0, name)
        for name, text in (tolerances or {}).items()
        if name in names
    }
    return differences(base, new, names, tolerances=amounts, exact=exact, two_sided=two_sided)


def update(
    new: Path,
    against: Path,
    *,
    accept: bool = False,
    tolerances: Mapping[str, str] | None = None,
    metrics: Sequence[str] | None = None,
) -> list[str]:
    """Make `new` the baseline: copy its results and per-image tables. Returns what changed, a line each.

    A baseline that the new results are worse than is kept (InputError) unless `accept`. Cells that only the baseline
    holds stay.
    """
    candidates = readable(new)
    results = read_results(against)[0] if against.exists() else []
    known = {cell_key(result): ResultEntry(result, path) for path, result in results}
    lines = []
    for entry in candidates:
        base = known.get(cell_key(entry.result))
        if base is None:
            lines.append(f"{cell_name(entry)}: new")
            continue
        for d in compare_cells(base, entry, tolerances, metrics):
            change = f"{d.cell}: {d.metric} {d.base:.5g} -> {d.new:.5g}"
            if fails(d) and not accept:
                raise InputError(f"{change} is worse; --accept takes it")
            if d.change:
                lines.append(f"{change} ({d.verdict})")
    for entry in candidates:
        assert entry.path is not None
        target = result_path(against, entry.result)
        if per_image_path(entry.path).exists():  # the record last: it vouches for its table
            write_whole(per_image_path(target), per_image_path(entry.path).read_bytes())
        write_whole(target, entry.path.read_bytes())
    return lines or ["nothing changed"]
