"""Tables of speed records, one per hardware, setting and resolution."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tokbench.errors import InputError
from tokbench.metrics import METRICS
from tokbench.records.result import SpeedResult, read_speed
from tokbench.report.columns import ResultEntry, headline_metric, metric_column, number, place_of
from tokbench.report.tables import Heading, Table, plain

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


def cells(result: SpeedResult, reference: SpeedResult) -> list[str]:
    """A row's texts under HEADINGS; a stage that was not reached shows a dash."""
    info, decode = result.tokenizer, result.stages.get("decode")
    rates = [s.images_per_second if (s := result.stages.get(n)) else None for n in ("encode", "decode", "round-trip")]
    encode, rate, both = ("–" if r is None else f"{r:.3g}" if r < 999 else f"{r:,.0f}" for r in rates)
    base = reference.stages.get("decode")
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
        "–" if equal is None else "yes" if equal else "NO",
    ]


def footnotes(rows: Sequence[SpeedResult], reference: SpeedResult) -> list[str]:
    """What the columns mean and what went wrong."""
    first = rows[0].provenance
    notes = [
        f"{first.get('date', '')} · median of at least {rows[0].settings.get('iterations')} iterations "
        "at the best batch size, models in turns; uint8 to uint8, noise included; FLOP = 2 x MAC; "
        "peak: the better of a large matrix product and a 3x3 convolution, in the same run",
        f"speed-up against {reference.tokenizer.name}",
    ]
    if any(row.settings.get("random_weights") for row in rows):
        notes.append("random weights: speed only")
    if any(row.equality_check.get("passed") is False for row in rows):
        notes.append("equal NO: lpips-alex moved by more than .001 or PSNR by more than 0.02 dB against float32 eager")
    return notes + [f"{row.tokenizer.name}: {row.failed}" for row in rows if row.failed]


def speed_tables(
    results: Sequence[SpeedResult], reference: str | None = None, entries: Sequence[ResultEntry] = ()
) -> list[Table]:
    """One table per hardware, setting and resolution; with `entries` the headline metric of evaluation records of the
    same names and resolution too. InputError for a `reference` that a table does not have."""
    entries = of_one_place(entries)
    metric = headline_metric(entries)
    headings = [*HEADINGS, *([metric_column(metric)] if metric else [])]
    tables = []
    for (hardware, how, resolution), rows in comparable(results).items():
        names = [row.tokenizer.name for row in rows]
        if reference not in (None, *names):
            raise InputError(f"no speed row is called {reference!r}; choose from {', '.join(names)}")
        base = rows[names.index(reference)] if reference else rows[0]
        texts = [cells(row, base) for row in rows]
        if metric:
            here = [entry for entry in entries if entry.result.dataset.resolution == resolution]
            quality = {entry.name: number(entry.result, metric) for entry in here}
            for name, line in zip(names, texts, strict=True):
                line.append("–" if (value := quality.get(name)) is None else f"{value:.{METRICS[metric].digits}f}")
        title = f"speed at {resolution} px · {hardware} · {how}"
        tables.append(plain(title, headings, texts, footnotes(rows, base)))
    return tables
