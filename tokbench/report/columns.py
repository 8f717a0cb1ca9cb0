"""The columns of a leaderboard: metrics, and facts about a tokenizer or a run; and the results that they read."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokbench.errors import InputError
from tokbench.metrics import METRICS, Metric
from tokbench.protocols import Resolution, sides_of
from tokbench.records.files import per_image_path, read_groups, read_per_image
from tokbench.records.result import EvalResult, TokenizerInfo, Value
from tokbench.report.tables import Heading

MINOR = ("psnr-global", "ssim-gauss", "ms-ssim", "encode", "params", "steps")
WORDS = ("latent", "generator", "dtype", "seeds", "processor")
VARIED = ("dtype", "seeds", "processor")  # shown where rows of one table differ in them
TIMES = ["encode", "decode"]  # ranked on one machine only, as the next
HEADLINE = ("rfid", "lpips-alex", "lpips-vgg", "psnr")  # the first that is there is a figure's default metric
RATES = ["generator/s", "decoder/s", "both/s"]


class Conditions(NamedTuple):
    """What two results must share to be compared or ranked together, whatever the data set is called."""

    protocol: str
    protocol_fingerprint: str
    images: str  # the data set's fingerprint
    num_images: int  # --skip-bad may have left some out
    resolution: Resolution


def conditions(result: EvalResult) -> Conditions:
    data = result.dataset
    return Conditions(result.protocol, result.protocol_fingerprint, data.fingerprint, data.num_images, data.resolution)


def differing(a: EvalResult, b: EvalResult) -> str:
    """The conditions that two results do not share, as "resolution 128 and 256"; "" if they can be compared."""
    pairs = zip(Conditions._fields, conditions(a), conditions(b), strict=True)
    return ", ".join(f"{name.replace('_', ' ')} {x} and {y}" for name, x, y in pairs if x != y)


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

    def groups(self, name: str) -> list[str]:
        """Each row's group by a column of the data; [] where it is not known. A "class" may be the folder in an id."""
        if self.rows[0] and self.path is not None and name in (kept := read_groups(per_image_path(self.path))):
            return kept[name]
        folders = [sample.rpartition("/")[0] for sample in self.rows[0]]
        return folders if name == "class" and all(folders) else []


def paired_columns(a: ResultEntry, b: ResultEntry, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A per-image column of both over the images that both have, in the order of a's ids; empty where one lacks it."""
    (ids, ours), (other_ids, theirs) = a.rows, b.rows
    if name not in ours or name not in theirs:
        return np.empty(0), np.empty(0)
    if ids == other_ids:
        return ours[name], theirs[name]
    place = {sample: i for i, sample in enumerate(other_ids)}
    shared = [(i, place[sample]) for i, sample in enumerate(ids) if sample in place]
    return ours[name][[i for i, _ in shared]], theirs[name][[j for _, j in shared]]


@dataclass(frozen=True, kw_only=True)
class Column(Heading):
    """A column that is read from results."""

    digits: int = 0  # after the point
    read: Callable[[ResultEntry], Value | str | None]
    ranked: bool = True
    per_image: str | None = None  # the per-image column that this is the mean (or a monotone function of the mean) of


def compression(info: TokenizerInfo) -> str:
    """How much a tokenizer compresses, in the field's shorthand: f8c4, f16 K16384, 32 tokens; else the family."""
    if info.downsample is None and info.tokens_per_image is None:
        return info.family if info.codebook_size is None else f"K{info.codebook_size}"
    place = f"{info.tokens_per_image} tokens" if info.downsample is None else f"f{info.downsample}"
    if info.codebook_size is not None:
        return f"{place} K{info.codebook_size}"
    if info.channels is None:
        return place
    return f"{place} c{info.channels}" if info.downsample is None else f"{place}c{info.channels}"


def _time(result: EvalResult, part: str) -> float | None:
    """Time per image of "encode" or "decode" as the run saw it, in ms."""
    seconds = result.provenance.seconds.get(part)
    return None if seconds is None else 1000 * float(seconds)


def _rate(result: EvalResult, *parts: str) -> float | None:
    """Generated images a second of one process, over these parts of the work."""
    seconds = sum(result.provenance.seconds.get(part, 0.0) for part in parts)
    return 1 / seconds if result.settings.generation and seconds else None


def _tokens(result: EvalResult) -> int | None:
    """Latent positions of an image, or the tokens of a 1-D tokenizer; None for a codec or unequal images."""
    info = result.tokenizer
    if info.tokens_per_image is not None or info.downsample is None:
        return info.tokens_per_image
    sides = sides_of(result.dataset.resolution)
    return None if sides is None else (sides[0] // info.downsample) * (sides[1] // info.downsample)


def _ratio(info: TokenizerInfo) -> float | None:
    """Latent elements per element of the image, c / (3 f^2)."""
    return None if info.downsample is None or info.channels is None else info.channels / (3 * info.downsample**2)


def device(result: EvalResult) -> str:
    return result.provenance.device or "unknown device"


def _seeds(result: EvalResult) -> str | None:
    """None where nothing is drawn."""
    seeds = result.settings.seeds
    return None if result.tokenizer.deterministic and len(seeds) == 1 else ",".join(map(str, seeds))


def _generator(result: EvalResult, fact: str) -> Any:
    return result.settings.generation.get("generator", {}).get(fact)


def _fact(
    key: str, description: str, read: Callable[[EvalResult], float | str | None], unit: str = "",
    better: Literal["higher", "lower", "neither"] = "neither", digits: int = 0,
) -> Column:  # fmt: skip
    def value(entry: ResultEntry) -> Value | str | None:
        found = read(entry.result)
        return Value(found) if isinstance(found, float | int) else found

    return Column(
        key=key, unit=unit, better=better, description=description, digits=digits, read=value,
        words=key in WORDS, minor=key in MINOR,
    )  # fmt: skip


FACTS = {
    fact.key: fact
    for fact in (
        _fact("latent", "downsampling f and channels c, or codebook K", lambda r: compression(r.tokenizer)),
        _fact("f", "pixels per latent position along a side", lambda r: r.tokenizer.downsample),
        _fact("c", "channels of the latent", lambda r: r.tokenizer.channels),
        _fact("codebook", "number of codes", lambda r: r.tokenizer.codebook_size),
        _fact("tokens", "latent positions of an image", _tokens),
        _fact("steps", "network evaluations of the decoder", lambda r: r.tokenizer.decode_steps),
        _fact("n", "images", lambda r: r.dataset.num_images),
        _fact("dtype", "number format of the model", lambda r: r.settings.dtype),
        _fact("seeds", "seeds of a stochastic decoder", _seeds),
        _fact("processor", "kind of machine", lambda r: r.provenance.device_type or None),
        _fact("device", "machine", device),
        _fact("date", "day of the measurement", lambda r: r.provenance.date[:10]),
        _fact("generator", "what drew the latents", lambda r: _generator(r, "name")),
        _fact("trained", "steps that the generator was trained", lambda r: _generator(r, "steps_trained")),
        _fact("ratio", "elements of the latent by those of the image", lambda r: _ratio(r.tokenizer), digits=4),
        _fact("params", "parameters of the decoder", lambda r: r.tokenizer.decoder_params / 1e6 or None, "M", digits=2),
        _fact("encode", "encoding time in the run that scored", lambda r: _time(r, "encode"), "ms/img", "lower", 1),
        _fact("decode", "decoding time in the run that scored", lambda r: _time(r, "decode"), "ms/img", "lower", 1),
        _fact("guidance", "classifier-free; 1 is none", lambda r: r.settings.generation.get("guidance"), digits=2),
        _fact("generator/s", "images drawn a second", lambda r: _rate(r, "generator"), "img/s", "higher", 2),
        _fact("decoder/s", "images decoded a second", lambda r: _rate(r, "decode"), "img/s", "higher", 2),
        _fact("both/s", "drawn and decoded a second", lambda r: _rate(r, "generator", "decode"), "img/s", "higher", 2),
    )
}  # fmt: skip


def _per_image(metric: Metric) -> str | None:
    """The per-image column that a metric is the mean (or a monotone function of the mean) of."""
    if metric.rows or metric.name in metric.columns:
        return metric.name
    return metric.columns[0] if metric.columns and not metric.probe else None  # a probe's: of many columns at once


def metric_column(name: str) -> Column:
    """The column of a metric; one not known here gets four digits and no direction."""

    def read(entry: ResultEntry) -> Value | None:
        result = entry.result
        if name in result.metrics:
            return result.metrics[name]
        return Value(None, note=result.unavailable[name]) if name in result.unavailable else None

    metric = METRICS.get(name)
    if metric is None:
        return Column(key=name, digits=4, description="unknown to this version", read=read)
    return Column(
        key=name, unit=metric.unit, better=metric.better, digits=metric.digits, description=metric.description,
        read=read, per_image=_per_image(metric),
        minor=name in MINOR,
    )  # fmt: skip


def quantile(values: NDArray[np.float64], share: float) -> Value:
    """The value [N] that this share of the images lies below; its error by order statistics, where there are enough."""
    half = (len(values) * share * (1 - share)) ** 0.5
    low, high = round(len(values) * share - half), round(len(values) * share + half)
    ordered = np.sort(values)
    error = float(ordered[high] - ordered[low]) / 2 if low > 0 and high < len(values) - 1 else None
    return Value(float(np.quantile(values, share)), error, n=len(values))


def worst(values: NDArray[np.float64], better: str) -> int:
    """Which image is worst; of what has no direction, furthest from zero."""
    signs = {"higher": -values, "lower": values, "neither": np.abs(values)}
    return int(np.argmax(signs[better]))


def quantile_column(key: str, entries: Sequence[ResultEntry]) -> Column:
    """The column METRIC:pNN, METRIC:median or METRIC:worst of a metric that images have values of.

    InputError for another. Not ranked: a tie of percentiles cannot be told by pairs.
    """
    name, _, which = key.partition(":")
    share = 0.5 if which == "median" else float(which[1:]) / 100 if re.fullmatch(r"p\d\d?", which) else None
    if share is None and which != "worst":
        raise InputError(f"column {key}: choose {name}:median, {name}:worst or a percentile as {name}:p5")
    if not any(name in entry.rows[1] for entry in entries):
        raise InputError(f"column {key}: no result has values of {name} for each image")
    whole = metric_column(name)

    def read(entry: ResultEntry) -> Value | None:
        if (values := entry.rows[1].get(name)) is None:
            return None
        if share is not None:
            return quantile(values, share)
        place = worst(values, whole.better)
        return Value(float(values[place]), n=len(values), note=entry.rows[0][place])

    what = "worst image" if share is None else f"{100 * share:g} % of the images lie below"
    return replace(
        whole, key=key, description=f"{whole.description}: {what}", read=read, ranked=False, per_image=None, minor=False
    )


def reconstruction_column(entries: Sequence[ResultEntry]) -> Column:
    """rfid of a generated row's tokenizer, as `tokbench run` measured it: by weights, or by name where it has none."""
    known = {
        (entry.result.tokenizer.weights or entry.name, entry.result.dataset.resolution): value
        for entry in entries
        if (value := entry.result.metrics.get("rfid")) is not None and value.value is not None
    }
    return Column(
        key="rfid", better="lower", digits=METRICS["rfid"].digits, description="of the tokenizer's reconstructions",
        read=lambda e: known.get((e.result.tokenizer.weights or e.name, e.result.dataset.resolution)),
    )  # fmt: skip


def place_of(entry: ResultEntry) -> tuple[str, str]:
    """Data set and protocol: only numbers of one place belong into one line or column."""
    return entry.result.dataset.name, entry.result.protocol


def column(key: str, entries: Sequence[ResultEntry]) -> Column:
    """The column called `key`; InputError with the names to choose from."""
    if key in FACTS:
        return FACTS[key]
    if ":" in key:
        return quantile_column(key, entries)
    measured = {name for entry in entries for name in (*entry.result.metrics, *entry.result.unavailable)}
    if key in METRICS or key in measured:
        return metric_column(key)
    raise InputError(f"unknown column {key!r}; choose from {', '.join(['tokenizer', *FACTS, *sorted(measured)])}")


def default_columns(entries: Sequence[ResultEntry], known: Sequence[ResultEntry] = ()) -> list[Column]:
    """Facts, measured metrics that can be better or worse, times; without what no row has.

    Of generated images the generator's facts, and the tokenizers' rfid looked up among the `known` results.
    """
    measured = {name for entry in entries for name, value in entry.result.metrics.items() if value.value is not None}
    directed = [name for name, metric in METRICS.items() if name in measured and metric.better != "neither"]
    directed = [name for name in directed if "@" not in name]  # a probe's curve: figures show it
    metrics = [metric_column(name) for name in (*directed, *sorted(measured - set(METRICS)))]
    if any(entry.result.settings.generation for entry in entries):
        facts, times = ["latent", "generator", "trained", "guidance"], RATES
        metrics.insert(0, reconstruction_column(known))
    else:
        facts, times = ["latent", "steps", "params"], TIMES
    facts[1:1] = [key for key in VARIED if len({FACTS[key].read(e) for e in entries} - {None}) > 1]
    columns = [*(FACTS[key] for key in facts), *metrics, *(FACTS[key] for key in times)]
    return [c for c in columns if any(number_of(c.read(entry)) is not None for entry in entries)]


def headline_metric(entries: Sequence[ResultEntry]) -> str | None:
    """The first of rfid, lpips, psnr that most of these rows have."""
    for name in HEADLINE:
        if 2 * sum(number(e.result, name) is not None for e in entries) > len(entries):
            return name
    return None


def number(result: EvalResult, key: str) -> float | None:
    """The number in the column of a metric or fact; None where there is none."""
    value = FACTS[key].read(ResultEntry(result)) if key in FACTS else result.metrics.get(key)
    return value.value if isinstance(value, Value) else None


def number_of(value: Value | str | None) -> float | str | None:
    return value.value if isinstance(value, Value) else value or None


def is_training_loss(result: EvalResult, metric: str) -> bool:
    """Was the metric's network part of this model's training loss?"""
    metric = metric.partition(":")[0]  # of a percentile
    networks = METRICS[metric].networks if metric in METRICS else ()
    return not {metric, *networks}.isdisjoint(result.tokenizer.losses)
