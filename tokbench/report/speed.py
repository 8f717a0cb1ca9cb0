"""Tables of speed records, one per hardware, setting and resolution."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tokbench.errors import InputError
from tokbench.records.result import SpeedResult, read_speed
from tokbench.report.columns import ResultEntry, headline_metric, metric_column, number, place_of
from tokbench.report.tables import Heading, Table, TableCell, plain

WIDTH = 130  # characters of the tables where there is no terminal
HEADINGS = (
    Heading(key="tokenizer"),
    Heading(key="params", unit="M enc+dec", minor=True),
    Heading(key="GFLOP", unit="decode", minor=True),
    Heading(key="encode", unit="img/s", better="higher"),
    Heading(key="decode", unit="img/s", better="higher"),
    Heading(key="of peak", unit="decode", minor=True),
    Heading(key="round", unit="img/s", better="higher", minor=True),
    Heading(key="latency", unit="ms, batch 1", better="lower", description="decoding: median (10 to 90 %)"),
    Heading(key="memory", unit="GB", better="lower"),
    Heading(key="speed-up", unit="decode"),
    Heading(key="equal"),
)


def read_speeds(folder: Path) -> tuple[list[SpeedResult], list[str]]:
    """All speed records below a folder, by path, and a line for each file that is not one. [] for no such folder."""
    results, warnings = [], []
    for path in sorted(folder.glob("*/*.json")):
        try:
            results.append(read_speed(path))
        except InputError as error:
            warnings.append(str(error))
    return results, warnings


def setting(result: SpeedResult) -> str:
    """Everything besides the model that affects speed: dtype, compilation, TF32, threads."""
    parts = [str(result.settings.get("dtype", "")), "compiled" if result.settings.get("compile") else "eager"]
    if threads := result.settings.get("threads"):
        parts.append(f"{threads} threads")
    if result.settings.get("quick"):
        parts.append("quick: indicative only")
    return ", ".join(part for part in parts if part)


def comparable(results: Sequence[SpeedResult]) -> dict[tuple[str, str, int], list[SpeedResult]]:
    """Rows that may be compared: equal hardware, setting and resolution."""
    found: dict[tuple[str, str, int], list[SpeedResult]] = {}
    for result in results:
        found.setdefault((result.hardware, setting(result), result.resolution), []).append(result)
    return dict(sorted(found.items()))


def of_one_place(entries: Sequence[ResultEntry]) -> list[ResultEntry]:
    """The entries of the data set and protocol that most of them have: the others' numbers are not comparable."""
    places = Counter(map(place_of, entries)).most_common(1)
    return [entry for entry in entries if place_of(entry) == places[0][0]]


def _with_quality(table: Table, resolution: int, entries: Sequence[ResultEntry]) -> Table:
    """The table with a column more: the headline metric of evaluation records of the same names and resolution."""
    entries = of_one_place(entries)
    if (metric := headline_metric(entries)) is None:
        return table
    heading = metric_column(metric)
    values = {e.name: number(e.result, metric) for e in entries if e.result.dataset.resolution == resolution}
    texts = {name: f"{value:.{heading.digits}f}" for name, value in values.items() if value is not None}
    rows = [replace(row, cells={**row.cells, heading.key: TableCell(texts.get(row.name, "–"))}) for row in table.rows]
    return replace(table, columns=[*table.columns, heading], groups=[("", rows)])


def cells(result: SpeedResult, reference: SpeedResult | None) -> list[str]:
    """A row's texts under HEADINGS; a stage that was not reached shows a dash."""
    info, decode = result.tokenizer, result.stages.get("decode")
    rates = [s.images_per_second if (s := result.stages.get(n)) else None for n in ("encode", "decode", "round-trip")]
    encode, rate, both = ("–" if r is None else f"{r:.3g}" if r < 999 else f"{r:,.0f}" for r in rates)
    base = reference.stages.get("decode") if reference else None
    memory = max((s.memory_allocated or 0 for s in result.stages.values()), default=0)
    equal = result.equality_check.get("passed")
    flops = result.flops.get("decode")
    peak = result.provenance.get("peak_flops_per_second")
    return [
        info.name,
        f"{info.encoder_params / 1e6:.1f}+{info.decoder_params / 1e6:.1f}",
        f"{flops / 1e9:.1f}" if flops else "–",
        encode,
        rate,
        f"{flops * decode.images_per_second / peak:.0%}" if flops and decode and peak else "–",
        both,
        f"{decode.latency_ms:.3g} ({decode.latency_p10_ms:.3g}-{decode.latency_p90_ms:.3g})" if decode else "–",
        f"{memory / 1e9:.2f}" if memory else "–",
        f"{decode.images_per_second / base.images_per_second:.2f}x" if decode and base else "–",
        {True: "yes", False: "NO", None: "–"}[equal if isinstance(equal, bool) else None],
    ]


def find_reference(rows: Sequence[SpeedResult], name: str | None) -> SpeedResult | None:
    """The row that speed-ups refer to: the named one, else the first; InputError for a name that no row has."""
    if name is None:
        return rows[0] if rows else None
    for row in rows:
        if row.tokenizer.name == name:
            return row
    raise InputError(f"no speed row is called {name!r}; choose from {', '.join(r.tokenizer.name for r in rows)}")


def footnotes(rows: Sequence[SpeedResult], reference: SpeedResult | None) -> list[str]:
    """What the columns mean and what went wrong."""
    first = rows[0].provenance
    notes = [
        f"{first.get('date', '')} · median of at least {rows[0].settings.get('iterations')} iterations "
        "at the best batch size, models in turns; uint8 to uint8, noise included; FLOP = 2 x MAC; "
        "peak: the better of a large matrix product and a 3x3 convolution, in the same run"
    ]
    if reference is not None:
        notes.append(f"speed-up against {reference.tokenizer.name}")
    if any(row.settings.get("random_weights") for row in rows):
        notes.append("random weights: speed only")
    if any(row.equality_check.get("passed") is False for row in rows):
        notes.append("equal NO: lpips-alex moved by more than .001 or PSNR by more than 0.02 dB against float32 eager")
    return notes + [f"{row.tokenizer.name}: {row.failed}" for row in rows if row.failed]


def speed_tables(
    results: Sequence[SpeedResult], reference: str | None = None, entries: Sequence[ResultEntry] = ()
) -> list[Table]:
    """One table per hardware, setting and resolution; with `entries` the quality too. InputError for a `reference` that
    a table does not have."""
    tables = []
    for (hardware, how, resolution), rows in comparable(results).items():
        base = find_reference(rows, reference)
        title = f"speed at {resolution} px · {hardware} · {how}"
        table = plain(title, HEADINGS, [cells(row, base) for row in rows], footnotes(rows, base))
        tables.append(_with_quality(table, resolution, entries))
    return tables
