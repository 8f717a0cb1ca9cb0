"""`tokbench score`: images made elsewhere, matched to real ones by id, measured and recorded like any model's."""

import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tokbench.data.decode import open_header
from tokbench.data.loader import Loader, refuse_unusable
from tokbench.data.open import open_source
from tokbench.data.sources import Source
from tokbench.errors import CellError, InputError, preview
from tokbench.evaluation.cell import shared_stores
from tokbench.evaluation.reconstruct import Conditions
from tokbench.evaluation.summary import compute, table
from tokbench.metrics import DEFAULT, Metric, find_metrics
from tokbench.metrics.suite import UNCLAMPED, Instruments, instruments
from tokbench.protocols import find_protocol
from tokbench.records import provenance
from tokbench.records.files import hold, per_image_path, result_path, write_per_image, write_whole
from tokbench.records.result import Dataset, EvalResult, Settings, TokenizerInfo, Value, to_json
from tokbench.records.samples import SampleStore
from tokbench.runtime.device import describe_device, release, select_device
from tokbench.runtime.terminal import bar

LOSSLESS = ("PNG", "WEBP", "BMP", "TIFF")
LOSSLESS_TIFF = ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "lzma", "zstd")
MODEL_ONLY = ("bpp", UNCLAMPED, "latent-mean", "latent-square")  # columns that need the model, not its images


@dataclass(frozen=True)
class ScoreOptions:
    """What `tokbench score` was asked for; see its --help."""

    real: str
    fake: str
    metrics: str | None = None
    protocol: str = "adm"
    name: str | None = None
    allow_lossy: bool = False
    workers: int | None = None
    device: str = "auto"
    out: Path = Path("runs")


def run_score(options: ScoreOptions) -> int:
    """Measure, write the record and print its table; the exit status."""
    from tokbench.report.columns import ResultEntry
    from tokbench.report.leaderboard import blocks
    from tokbench.report.tables import show

    result = score(options)
    show(blocks([ResultEntry(result, result_path(options.out, result))]))
    return 0


def score(options: ScoreOptions) -> EvalResult:
    """The record of FAKE against REAL, also written below `out`. The size of the fakes is the resolution.

    Real images are cropped to it by the protocol; those that have the size already are taken as they are. InputError
    for ids that do not match, fakes of several sizes, or lossy files.
    """
    protocol, device = find_protocol(options.protocol), select_device(options.device)
    names = [name.strip() for name in (options.metrics or "").split(",") if name.strip()]
    chosen = find_metrics(names or protocol.metrics or DEFAULT, "reconstruction")
    real, fake = open_source(options.real), open_source(options.fake)
    match(real, fake)
    resolution = common_size(fake)
    if not options.allow_lossy:
        refuse_lossy(fake)
    refuse_unusable(real, resolution, upscale=False)
    possible = [metric for metric in chosen if not needs_model(metric)]
    unavailable = {m.name: "needs the model, not only its images" for m in chosen if names and needs_model(m)}
    tools = instruments(possible, len(real), resolution, device)
    unavailable |= tools.unavailable
    name = options.name or fake.name
    if not re.fullmatch("[a-z0-9._-]+", name):
        raise InputError(f"--name {name}: use lower-case letters, digits, dot, underscore and hyphen")
    info = TokenizerInfo(name, family="images", note="images made elsewhere")
    dataset = Dataset(real.name, real.split, resolution, len(real), real.fingerprint())
    empty = EvalResult(
        protocol=protocol.name,
        protocol_fingerprint=protocol.fingerprint(),
        tokenizer=info,
        dataset=dataset,
        metrics={},
        unavailable=unavailable,
    )
    path = result_path(options.out, empty)
    work = path.with_name(f".{path.stem}-score")
    conditions = Conditions(protocol, resolution, device)
    batch = conditions.images_at_once  # as `run` has it, whose features of the real images are the same
    with hold(work):
        for old in work.glob("*-*"):  # of a run that was killed
            old.unlink()
        shared = shared_stores(dataset.fingerprint, conditions, tools)
        known = {name: kept.done([], [("real", name)]) for name, kept in shared.items()}
        loaders = [
            Loader(side, resolution, protocol, batch_size=batch, workers=options.workers) for side in (real, fake)
        ]
        store = SampleStore(work, real=shared)
        with ExitStack() as stack:
            for opened in (store, *shared.values()):
                stack.enter_context(opened)
            progress = stack.enter_context(bar(f"scoring {info.name}", len(real)))
            for (ids, reals), (_, fakes) in zip(*loaders, strict=True):
                measure(store, tools, known, ids, reals.to(device), fakes.to(device))
                progress(len(ids))
        release(device)
        values = {m.name: finite(compute(m.name, store, (0,))) for m in possible if m.name not in unavailable}
        extractors = {name: extract.sha256 for name, extract in tools.extractors.items()}
        settings = Settings(scored={"real": options.real, "fake": options.fake, "fake_fingerprint": fake.fingerprint()})
        made = provenance.collect(describe_device(device), device.type, batch_size=batch, extractors=extractors)
        result = replace(empty, metrics=values, settings=settings, provenance=made)
        write_per_image(per_image_path(path), store.ids, table(list(values), store, (0,)))
        write_whole(path, to_json(result))
        shutil.rmtree(work, ignore_errors=True)
    return result


def measure(
    store: SampleStore, tools: Instruments, known: Mapping[str, set[str]], ids: Sequence[str], real: torch.Tensor,
    fake: torch.Tensor,
) -> None:  # fmt: skip
    """Append one batch, uint8 [B, 3, H, W] twice; `known` are, by extractor, ids whose real features are there."""
    with torch.inference_mode():
        columns = {name: value for scorer in tools.scorers for name, value in scorer(real, fake, None).items()}
        features = {
            (side, name): extract(images)
            for side, images in (("real", real), ("fake", fake))  # outside: extractors share one pass over a batch
            for name, extract in tools.extractors.items()
            if side == "fake" or not known.get(name, set()).issuperset(ids)
        }
    store.append(
        ids,
        {name: values.cpu().numpy() for name, values in columns.items()},
        {key: values.cpu().numpy() for key, values in features.items()},
    )


def needs_model(metric: Metric) -> bool:
    """Whether a metric reads more than two images."""
    return metric.extractor == "codes" or any(column in MODEL_ONLY for column in metric.columns)


def finite(value: Value) -> Value:
    """CellError for a NaN: images hold none, so it would be a fault here."""
    if value.value is not None and not np.isfinite(value.value):
        raise CellError(f"a metric came out as {value.value}")
    return value


def match(real: Source, fake: Source) -> None:
    """Both sides in the same order of ids; InputError that names ids which only one side has."""
    only = [(side.root, sorted(set(side.ids) - set(other.ids))) for side, other in ((real, fake), (fake, real))]
    missing = [f"only in {root}: {preview(ids)}" for root, ids in only if ids]
    if missing:
        raise InputError(f"images are matched by path without extension, and do not match; {'; '.join(missing)}")
    real.sort()
    fake.sort()


def common_size(fake: Source) -> int:
    """The one side length of all fakes; InputError for other shapes, for several, or for an unreadable file."""
    facts = fake.facts()
    for index, fact in enumerate(facts):
        if fact.problem:
            raise InputError(f"{fake.where(index)}: {fact.problem}")
        if fact.width != fact.height or fact.width != facts[0].width:
            size = f"{fact.width}x{fact.height}"
            raise InputError(f"{fake.where(index)}: {size}; all reconstructions must be squares of one size")
    return facts[0].width


def refuse_lossy(fake: Source) -> None:
    """InputError for a file that changes the pixels after the model made them."""
    for index in range(len(fake)):
        if loss := loss_of(fake.read_bytes(index), fake.where(index)):
            raise InputError(
                f"{fake.where(index)}: {loss} and would be measured as the model's error; "
                "save PNG of 8 bits, or use --allow-lossy"
            )


def loss_of(data: bytes, where: str) -> str:
    """What is lost between the model's 8 bits and those that are read from this file, or ""."""
    image = open_header(data, where)
    kind, compression = image.format or "", image.info.get("compression")
    if kind == "TIFF" and compression not in LOSSLESS_TIFF:
        return f"TIFF with {compression} is lossy"
    if kind not in LOSSLESS or (kind == "WEBP" and is_lossy_webp(data)):
        return f"{kind} is lossy"
    # Pillow reduces 16-bit colours to 8 without a word, and its mode does not tell.
    tags = getattr(image, "tag_v2", {})  # of a TIFF; 258 is BitsPerSample
    bits = data[24] if kind == "PNG" else int(np.max(tags.get(258, 8)))
    return f"{kind} of {bits} bits is reduced to 8" if bits > 8 else ""


def is_lossy_webp(data: bytes) -> bool:
    """Whether a RIFF file of WebP chunks holds a VP8 one (lossy) rather than VP8L, be it in a frame of an animation."""
    place = 12
    while place + 8 <= len(data):
        if data[place : place + 4] == b"VP8 ":
            return True
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + (16 if data[place : place + 4] == b"ANMF" else size + size % 2)  # a frame: its header, then chunks
    return False
