"""The record of a measurement and its JSON form. Never imports torch."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokbench.errors import InputError

SCHEMA = 1


@dataclass(frozen=True)
class TokenizerInfo:
    """What a table says about a tokenizer besides its numbers.

    `channels` are those of a continuous latent, `codebook_size` the number of codes of a discrete one; both are None
    for a codec. `losses` name the networks a model was trained with ("lpips-vgg"): a metric of the same network is
    marked † in every table.
    """

    name: str  # the row's name: an alias or the lower-cased spec, [a-z0-9._-]+
    family: str  # "ssdd", "kl-vae", "codec", ...
    downsample: int | None = None  # pixels per latent position, along one side
    channels: int | None = None
    codebook_size: int | None = None
    tokens_per_image: int | None = None  # for 1-D tokenizers; else (H / downsample) * (W / downsample)
    latent_space: str = ""  # A+B joins models of one latent space; both "": any of equal shape
    size_multiple: int = 1  # height and width must be divisible by this
    decode_steps: int | None = None  # network evaluations of a diffusion decoder
    deterministic: bool = True  # decode does not depend on its seeds
    encoder_params: int = 0
    decoder_params: int = 0
    weights: str | None = None  # sha256 of the state; None: not hashable, never cached
    trained_on: str = ""
    losses: tuple[str, ...] = ()
    licence: str = ""
    paper: str = ""
    verified: bool = True  # False: facts (scale, key names) that could not be checked against the weights themselves
    note: str = ""  # shown under the table ("demo weights, undertrained")


@dataclass(frozen=True)
class Value:
    """A number with its uncertainty. `value` None means that it cannot be given, and `note` says why."""

    value: float | None
    stderr: float | None = None  # standard error of a mean over images
    low: float | None = None  # 95 % interval, where one is computed
    high: float | None = None
    n: int = 0  # images behind it
    note: str = ""


@dataclass(frozen=True)
class Dataset:
    name: str
    split: str | None
    resolution: int
    num_images: int
    fingerprint: str  # hash over (sample id, sha256 of the file's bytes)


@dataclass(frozen=True)
class EvalResult:
    """One cell: a tokenizer measured on a data set at a resolution under a protocol."""

    protocol: str  # name
    protocol_fingerprint: str  # rows of different fingerprints are never ranked together
    tokenizer: TokenizerInfo
    dataset: Dataset
    metrics: Mapping[str, Value]
    unavailable: Mapping[str, str] = field(default_factory=dict)  # metric -> reason and the command that helps
    settings: Mapping[str, Any] = field(default_factory=dict)  # spec, dtype, seeds, skipped images, ...
    # commit, dirty, date, command, versions, device, world_size, batch_size, extractors {name: sha256},
    # seconds {encode, decode} per image
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


def to_json(result: "EvalResult | SpeedResult") -> str:
    """The record as JSON text. Raises ValueError for a NaN or infinity: such a value belongs in `unavailable`."""
    return json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str, where: str = "result") -> EvalResult:
    """Read `to_json`'s text; raises InputError naming `where` for anything that is not such a record."""
    try:
        record = json.loads(text)
        if not isinstance(record, dict) or "schema" not in record:
            raise InputError(f"{where}: not a tokbench result")
        if record["schema"] != SCHEMA:
            raise InputError(f"{where}: schema {record['schema']}, this tokbench reads {SCHEMA}; measure it again")
        info = record.pop("tokenizer")
        info["losses"] = tuple(info["losses"])
        metrics = {name: Value(**value) for name, value in record.pop("metrics").items()}
        dataset = Dataset(**record.pop("dataset"))
        result = EvalResult(tokenizer=TokenizerInfo(**info), metrics=metrics, dataset=dataset, **record)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: not a readable tokbench result ({error})") from error
    for name, value in metrics.items():
        if value.value is not None and not math.isfinite(value.value):
            raise InputError(f"{where}: metric {name} is {value.value}")
    return result


def read_result(path: Path) -> EvalResult:
    """The record in a file; InputError if it is missing or is not one."""
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


@dataclass(frozen=True)
class Stage:
    """How fast one direction of a tokenizer is (encode, decode, round-trip), uint8 to latents and back to uint8."""

    batch_size: int  # the smallest within 2 % of the best rate
    images_per_second: float  # batch_size / median seconds of an iteration
    megapixels_per_second: float
    latency_ms: float  # batch 1: median, 10th and 90th percentile
    latency_p10_ms: float
    latency_p90_ms: float
    memory_allocated: int | None  # peak bytes beyond the weights at batch_size; None where it cannot be told (CPU)
    memory_reserved: int | None
    sweep: Mapping[str, float]  # batch size -> images/s of the search for it


@dataclass(frozen=True)
class SpeedResult:
    """Speed of one tokenizer at one resolution on one piece of hardware under one setting."""

    tokenizer: TokenizerInfo
    resolution: int
    hardware: str  # rows of different hardware are never ranked together
    settings: Mapping[str, Any]  # spec, dtype, compile, random_weights, threads, tf32, ...
    stages: Mapping[str, Stage] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)  # stage -> floating-point operations an image, 2 x MAC
    compile_seconds: float | None = None
    gate: Mapping[str, Any] = field(default_factory=dict)  # passed, lpips_alex_shift, psnr_shift, images | reason
    failed: str | None = None  # a row that failed is kept with its reason
    provenance: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "speed"
    schema: int = SCHEMA


def read_speed(path: Path) -> SpeedResult:
    """The speed record in a file; InputError if it is missing or is not one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("kind") != "speed" or record.get("schema") != SCHEMA:
            raise InputError(f"{path}: not a tokbench speed record of schema {SCHEMA}")
        info = record.pop("tokenizer")
        info["losses"] = tuple(info["losses"])
        stages = {name: Stage(**stage) for name, stage in record.pop("stages").items()}
        return SpeedResult(tokenizer=TokenizerInfo(**info), stages=stages, **record)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable speed record ({error})") from error
