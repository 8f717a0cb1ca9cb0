"""The record of a measurement and its JSON form. Never imports torch."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokbench.config import from_dict
from tokbench.errors import InputError, unreadable
from tokbench.protocols import Resolution, size_text
from tokbench.records.measurement import Measurement

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 2


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
    resolution: Resolution
    num_images: int
    fingerprint: str  # hash over (sample id, sha256 of the file's bytes)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was chosen, as it took effect: everything besides protocol, images and weights that can change a number."""

    spec: str = ""
    tiling: str = ""  # of the decoder, where images go through it in tiles
    dtype: str = "float32"
    seeds: tuple[int, ...] = (0,)  # those that were run: one is enough where nothing is drawn
    upscaled: int | None = None  # images below the resolution, which were enlarged; None: there were none
    skipped: int = 0  # unreadable or small images that were left out
    skipped_ids: tuple[str, ...] = ()  # the first hundred of them
    scored: Mapping[str, str] = field(default_factory=dict)  # `score`: real, fake, fake_fingerprint
    # `generate`: generator {name, weights, steps_trained, note}, reference {name, fingerprint, num_images, statistics},
    # guidance, interval, steps, sampler, seed, labels
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a number came about."""

    tokbench: str = ""
    commit: str | None = None
    dirty: bool | None = None
    date: str = ""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    device_type: str = ""
    world_size: int = 1
    batch_size: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)  # an image: encode, decode, generator
    image_notes: Mapping[str, int] = field(default_factory=dict)  # images turned, put on white, ...
    extractors: Mapping[str, str] = field(default_factory=dict)  # name -> sha256 of its weights
    metrics: Mapping[str, str] = field(default_factory=dict)  # metric -> key of its networks, libraries, plugin's code
    warnings: str = ""  # what the model does that is seldom meant
    cell: str | None = None  # the key by which a later run knows that it may answer from this record


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One cell: a tokenizer measured on a data set at a resolution under a protocol."""

    protocol: str  # name
    protocol_fingerprint: str  # rows of different fingerprints are never ranked together
    tokenizer: TokenizerInfo
    dataset: Dataset
    metrics: Mapping[str, Value]
    unavailable: Mapping[str, str] = field(default_factory=dict)  # metric -> reason and the command that helps
    latents: Mapping[str, Any] = field(default_factory=dict)  # `latents`: values by channel and by frequency, scale
    settings: Settings = field(default_factory=Settings)
    measurement: Measurement | None = None  # what was asked for; None: not known, of an older schema
    provenance: Provenance = field(default_factory=Provenance)
    schema: int = SCHEMA
    # {"id": [...], column: values [N]} of one that was just measured; a file keeps them beside its record.
    rows: Mapping[str, Any] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        name, data = self.tokenizer.name, self.dataset
        shown = [f"{metric} {value.value:.4g}" + (f" ±{value.stderr:.2g}" if value.stderr else "")
                 for metric, value in self.metrics.items() if value.value is not None]  # fmt: skip
        where = f"{name} on {data.num_images} images of {data.name} at {size_text(data.resolution)}"
        return f"EvalResult({where}: {', '.join(shown) or 'nothing measured'})"

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values, as its file holds it."""
        record: dict[str, Any] = json.loads(to_json(self))
        return record

    def row(self) -> dict[str, Any]:
        """What was measured, on what, and `<metric>`, `<metric>.stderr`: a row of `results_frame`."""
        info, dataset = self.tokenizer, self.dataset
        row: dict[str, object] = {
            "protocol": self.protocol,
            "protocol_fingerprint": self.protocol_fingerprint,
            "dataset": dataset.name,
            "split": dataset.split,
            "resolution": dataset.resolution,
            "num_images": dataset.num_images,
            "fingerprint": dataset.fingerprint,
            "name": info.name,
            "family": info.family,
            "downsample": info.downsample,
            "channels": info.channels,
            "codebook_size": info.codebook_size,
            "decode_steps": info.decode_steps,
            "device": self.provenance.device,
        }
        for metric, value in self.metrics.items():
            row[metric], row[f"{metric}.stderr"] = value.value, value.stderr
        return row

    def to_frame(self) -> "pd.DataFrame":
        """A DataFrame of one row, as `tokbench.results` has one for each record of a folder."""
        import pandas as pd

        return pd.DataFrame([self.row()])

    def per_image(self) -> "pd.DataFrame":
        """A DataFrame of every measured column, a row an image, by id. InputError for a record that was only read."""
        import pandas as pd

        if self.rows is None:
            raise InputError(
                f"{self.tokenizer.name}: its images' rows are not here; evaluate it, or read the file beside it"
            )
        return pd.DataFrame(self.rows).set_index("id")


def to_json(result: "EvalResult | SpeedResult") -> str:
    """The record as JSON text. Raises ValueError for a NaN or infinity: such a value belongs in `unavailable`."""
    if isinstance(result, EvalResult):
        result = dataclasses.replace(result, rows=None)
    record = {key: value for key, value in dataclasses.asdict(result).items() if key != "rows"}
    return json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False, default=str) + "\n"


def from_json(text: str, where: str = "result") -> EvalResult:
    """Read `to_json`'s text, of this or an older schema; InputError naming `where` for anything else."""
    try:
        record = json.loads(text)
        if not isinstance(record, dict) or "schema" not in record:
            raise InputError(f"{where}: not a tokbench result")
        if record["schema"] not in (1, SCHEMA):
            raise InputError(f"{where}: schema {record['schema']}, this tokbench reads up to {SCHEMA}; update tokbench")
        result = from_dict(EvalResult, _of_schema_1(record) if record["schema"] == 1 else record)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: not a readable tokbench result ({error})") from error
    except InputError as error:
        raise error if str(error).startswith(where) else InputError(f"{where}: {error}") from error
    for name, value in result.metrics.items():
        for number in (value.value, value.stderr, value.low, value.high):
            if number is not None and not (isinstance(number, int | float) and math.isfinite(number)):
                raise InputError(f"{where}: metric {name} holds {number!r}, which is no finite number")
    return result


def _of_schema_1(record: Mapping[str, Any]) -> dict[str, Any]:
    """Schema 1 had no `measurement` and put all that only `score` or `generate` has among the settings."""
    settings = {key: value for key, value in record["settings"].items() if key != "scope"}
    own = {field.name for field in dataclasses.fields(Settings)}
    others = {key: settings.pop(key) for key in list(settings) if key not in own}
    settings["generation" if "generator" in others else "scored"] = others
    return {**record, "settings": settings, "schema": SCHEMA}


def read_result(path: Path) -> EvalResult:
    """The record in a file; InputError if it is missing or is not one."""
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(unreadable(path, "tokbench result", error)) from error


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
    equality_check: Mapping[str, Any] = field(default_factory=dict)  # passed, lpips_alex_shift, psnr_shift | reason
    failed: str | None = None  # a row that failed is kept with its reason
    provenance: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "speed"
    schema: int = SCHEMA


def read_speed(path: Path) -> SpeedResult:
    """The speed record in a file; InputError if it is missing or is not one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("kind") != "speed" or record.get("schema") not in (1, SCHEMA):
            raise InputError(f"{path}: not a tokbench speed record")
        if "gate" in record:  # its name in schema 1
            record["equality_check"] = record.pop("gate")
        return from_dict(SpeedResult, record)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(unreadable(path, "speed record", error)) from error
