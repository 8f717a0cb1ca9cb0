"""Has reconstruction quality got worse? New results against a committed baseline, by metric. Never imports torch."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokbench.comparison.differences import Difference, Rules, cell_key, cell_name, differences, judged, readable
from tokbench.errors import InputError
from tokbench.metrics import METRICS
from tokbench.records.files import per_image_path, read_results, result_path, write_whole
from tokbench.report.columns import ResultEntry, differing, number


@dataclass(frozen=True)
class CheckResult:
    """Everything that was compared, and which of it failed."""

    differences: Sequence[Difference]
    failures: Sequence[Difference]


def check(new: Path, against: Path, rules: Rules = Rules()) -> CheckResult:
    """Compare every cell of `new` (a result file or a folder) with its counterpart in `against`.

    Raises InputError when something cannot be compared: a cell or metric that the baseline lacks, another protocol or
    data set, nothing at all.
    """
    if not against.exists():
        raise InputError(f"{against}: no such baseline; make NEW the first with `tokbench check --update`")
    baselines = {cell_key(entry.result): entry for entry in readable(against)}
    found: list[Difference] = []
    for entry in readable(new):
        base = baselines.get(cell_key(entry.result))
        if base is None:
            raise InputError(f"{cell_name(entry)}: {_why_missing(entry, list(baselines.values()), against)}")
        found += compare_cells(base, entry, rules)
    if not found:
        raise InputError(f"{new}: nothing was compared; measure something that {against} holds")
    found = judged(found, exact=rules.exact)
    return CheckResult(found, [d for d in found if d.fails(rules.strict)])


def _why_missing(entry: ResultEntry, baselines: Sequence[ResultEntry], against: Path) -> str:
    """What keeps the nearest baseline cell from being this one's."""
    for base in baselines:
        if cell_name(base) == cell_name(entry):
            steps = f"decode steps {base.result.tokenizer.decode_steps} and {entry.result.tokenizer.decode_steps}"
            return f"not comparable with the baseline: {differing(base.result, entry.result) or steps}"
    return f"{against} has no such cell; add it with `tokbench check --update`"


def compare_cells(base: ResultEntry, new: ResultEntry, rules: Rules) -> list[Difference]:
    """All metrics of a cell but those that are null on both sides. InputError for one that only one side has."""
    asked = rules.metrics or list(dict.fromkeys([*new.result.metrics, *base.result.metrics]))
    for name, entry in itertools.product(asked, (new, base)):
        if name not in METRICS or name not in entry.result.metrics:
            reason = entry.result.unavailable.get(name, "not measured" if name in METRICS else "this version lacks it")
            raise InputError(f"{entry.path}: {name} cannot be compared: {reason}; restrict the check with --metrics")
    given = [[name for name in asked if number(entry.result, name) is not None] for entry in (base, new)]
    if one_sided := set(given[0]) ^ set(given[1]):
        raise InputError(f"{cell_name(new)}: {', '.join(sorted(one_sided))} has a value on one side only")
    return differences(base, new, given[0], rules)


def update(new: Path, against: Path, rules: Rules = Rules(), *, accept: bool = False) -> list[str]:
    """Make `new` the baseline: copy its results and per-image tables. Returns what changed, a line each.

    A baseline that the new results are worse than is kept (InputError) unless `accept`. Cells that only the baseline
    holds stay.
    """
    candidates = readable(new)
    results = read_results(against)[0] if against.exists() else []
    known = {cell_key(result): ResultEntry(result, path) for path, result in results}
    pairs = [(known.get(cell_key(entry.result)), entry) for entry in candidates]
    lines = [f"{cell_name(entry)}: new" for base, entry in pairs if base is None]
    found = [d for base, entry in pairs if base is not None for d in compare_cells(base, entry, rules)]
    for d in judged(found, exact=rules.exact):
        change = f"{d.cell}: {d.metric} {d.base:.5g} -> {d.new:.5g}"
        if d.fails(rules.strict) and not accept:
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
