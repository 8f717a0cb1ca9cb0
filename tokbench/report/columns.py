"""The columns of a table: metrics, and facts about a tokenizer or a run; and the entries they read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokbench.errors import InputError
from tokbench.metrics import METRICS
from tokbench.records.files import per_image_path, read_per_image
from tokbench.records.result import EvalResult, TokenizerInfo, Value

ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}


@dataclass(frozen=True)
class ResultEntry:
    """A result and where it was read; `path` None for one that was not read from a file."""

    result: EvalResult
    path: Path | None = None

    @property
    def name(self) -> str:
        return self.result.tokenizer.name

    @cached_property
    def rows(self) -> tuple[list[str], Mapping[str, NDArray[np.float64]]]:
        """Ids and per-image columns [N], both empty where there is no such file beside the JSON."""
        if self.path is None or not per_image_path(self.path).exists():
            return [], {}
        return read_per_image(per_image_path(self.path))


@dataclass(frozen=True)
class Column:
    """A column of a table: a metric, or a fact about the tokenizer or the run."""

    key: str
    unit: str
    better: str  # "higher", "lower" or "neither": no best value is marked
    digits: int
    description: str
    read: Callable[[EvalResult], Value | str | None]
    per_image: str | None = None  # the per-image column that this is the mean (or a monotone function of the mean) of

    @property
    def heading(self) -> str:
        return f"{self.key} {ARROWS[self.better]}".strip()


def compression(info: TokenizerInfo) -> str:
    """How much a tokenizer compresses, in the field's shorthand: f8c4, f16 K16384, 32 tokens; else "codec"."""
    if info.downsample is None and info.tokens_per_image is None:
        return "codec" if info.codebook_size is None else f"K{info.codebook_size}"
    place = f"f{info.downsample}" if info.downsample is not None else f"{info.tokens_per_image} tokens"
    if info.codebook_size is not None:
        return f"{place} K{info.codebook_size}"
    return (
        place
        if info.channels is None
        else f"{place}c{info.channels}"
        if place[0] == "f"
        else f"{place} c{info.channels}"
    )


def milliseconds(result: EvalResult, part: str) -> Value | None:
    """Time per image of "encode" or "decode" as the run saw it, in ms."""
    seconds = result.provenance.seconds.get(part)
    return None if seconds is None else Value(1000 * float(seconds), n=result.dataset.num_images)


def clipped(name: str, limit: int = 32) -> str:
    """A row's name, shortened in its middle so that what tells rows apart (prefix and settings) stays."""
    return name if len(name) <= limit else f"{name[: limit - 13]}…{name[-12:]}"


def _count(number: float | None, scale: float = 1) -> Value | None:
    return None if number is None else Value(number / scale)


def tokens(result: EvalResult) -> int | None:
    """Latent positions of an image, or the tokens of a 1-D tokenizer; None for a codec."""
    info = result.tokenizer
    if info.tokens_per_image is not None or info.downsample is None:
        return info.tokens_per_image
    return (result.dataset.resolution // info.downsample) ** 2


def elements_ratio(info: TokenizerInfo) -> float | None:
    """Latent elements per element of the image, c / (3 f^2)."""
    return None if info.downsample is None or info.channels is None else info.channels / (3 * info.downsample**2)


_FACTS = (
    Column(
        "latent", "", "neither", 0, "downsampling f and channels c, or codebook K", lambda r: compression(r.tokenizer)
    ),
    Column("f", "", "neither", 0, "pixels per latent position along a side", lambda r: _count(r.tokenizer.downsample)),
    Column("c", "", "neither", 0, "channels of the latent", lambda r: _count(r.tokenizer.channels)),
    Column("codebook", "", "neither", 0, "number of codes", lambda r: _count(r.tokenizer.codebook_size)),
    Column("tokens", "", "neither", 0, "latent positions of an image", lambda r: _count(tokens(r))),
    Column(
        "ratio",
        "",
        "neither",
        4,
        "elements of the latent by those of the image",
        lambda r: _count(elements_ratio(r.tokenizer)),
    ),
    Column("steps", "", "neither", 0, "network evaluations of the decoder", lambda r: _count(r.tokenizer.decode_steps)),
    Column(
        "params",
        "M",
        "neither",
        2,
        "decoder's parameters, millions",
        lambda r: _count(r.tokenizer.decoder_params or None, 1e6),
    ),
    Column(
        "encode",
        "ms/img",
        "lower",
        1,
        "encoding time in the run that measured quality",
        lambda r: milliseconds(r, "encode"),
    ),
    Column(
        "decode",
        "ms/img",
        "lower",
        1,
        "decoding time in the run that measured quality",
        lambda r: milliseconds(r, "decode"),
    ),
    Column("n", "", "neither", 0, "images", lambda r: Value(r.dataset.num_images)),
    Column("device", "", "neither", 0, "machine", lambda r: device(r)),
    Column("date", "", "neither", 0, "day of the measurement", lambda r: r.provenance.date[:10]),
)
FACTS = {column.key: column for column in _FACTS}
TIMES = ("encode", "decode")
DAGGER = "† the metric's network was part of this model's training loss"


def metric_column(name: str) -> Column:
    """The column of a metric; one not known here gets four digits and no direction."""

    def read(result: EvalResult) -> Value | None:
        if name in result.metrics:
            return result.metrics[name]
        return Value(None, note=result.unavailable[name]) if name in result.unavailable else None

    metric = METRICS.get(name)
    if metric is None:
        return Column(name, "", "neither", 4, "unknown to this version", read)
    per_image = metric.columns[0] if metric.columns else name if metric.rows else None
    return Column(name, metric.unit, metric.better, metric.digits, metric.description, read, per_image)


def place_of(entry: ResultEntry) -> tuple[str, str]:
    """Data set and protocol: only numbers of one place belong into one line or column."""
    return entry.result.dataset.name, entry.result.protocol


def device(result: EvalResult) -> str:
    return result.provenance.device or "unknown device"


def column(key: str, entries: Sequence[ResultEntry]) -> Column:
    """The column called `key`; InputError with the names to choose from."""
    if key in FACTS:
        return FACTS[key]
    measured = {name for entry in entries for name in (*entry.result.metrics, *entry.result.unavailable)}
    if key in METRICS or key in measured:
        return metric_column(key)
    raise InputError(f"unknown column {key!r}; choose from {', '.join(['tokenizer', *FACTS, *sorted(measured)])}")


def default_columns(entries: Sequence[ResultEntry]) -> list[Column]:
    """Latent, steps and size, measured metrics that can be better or worse, time; without what no row has."""
    measured = {name for entry in entries for name, value in entry.result.metrics.items() if value.value is not None}
    told = (name for name, metric in METRICS.items() if name in measured and metric.better != "neither")
    names = [*told, *sorted(measured - set(METRICS))]
    columns = [FACTS[key] for key in ("latent", "steps", "params")]
    columns += [metric_column(name) for name in names] + [FACTS[key] for key in TIMES]
    return [c for c in columns if any(number_of(c.read(entry.result)) is not None for entry in entries)]


def number_of(value: Value | str | None) -> float | str | None:
    return value.value if isinstance(value, Value) else value or None


def is_training_loss(result: EvalResult, metric: str) -> bool:
    """Was the metric's network part of this model's training loss?"""
    networks = METRICS[metric].networks if metric in METRICS else ()
    return not {metric, *networks}.isdisjoint(result.tokenizer.losses)
