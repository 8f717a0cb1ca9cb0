"""`tokbench score`: images made elsewhere, matched to real ones by id, measured and recorded like any model's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokbench.data.decode import open_header
from tokbench.data.loader import Loader, refuse_unusable
from tokbench.data.open import open_source
from tokbench.data.sources import Source
from tokbench.errors import InputError, preview
from tokbench.evaluation.cell import Cell, measure_cell
from tokbench.evaluation.evaluate import checked
from tokbench.evaluation.reconstruct import Columns, Fakes, Features, images_at_once
from tokbench.evaluation.run import share_facts
from tokbench.metrics import CODES, LATENTS, SEAM, Metric, find_metrics
from tokbench.metrics.suite import UNCLAMPED
from tokbench.protocols import NATIVE, Resolution, find_protocol, parse_resolution
from tokbench.records import provenance
from tokbench.records.files import result_path
from tokbench.records.measurement import Measurement
from tokbench.records.result import EvalResult, Settings, TokenizerInfo
from tokbench.registry import ROW_NAME
from tokbench.runtime.device import select_device
from tokbench.runtime.processes import Processes, join

LOSSLESS = ("PNG", "WEBP", "BMP", "TIFF")
LOSSLESS_TIFF = ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "lzma", "zstd")
MODEL_ONLY = ("bpp", UNCLAMPED, "latent-mean", "latent-square", SEAM)  # columns that need the model, not its images


def run_score(
    real: str,
    fake: str,
    measurement: Measurement,
    *,
    name: str | None = None,
    allow_lossy: bool = False,
    out: Path = Path("runs"),
) -> int:
    """Measure, write the record below `out` and print its table; the exit status."""
    from tokbench.report.columns import ResultEntry
    from tokbench.report.leaderboard import blocks
    from tokbench.report.tables import show

    with join() as processes:
        result = score(real, fake, measurement, name=name, allow_lossy=allow_lossy, out=out, processes=processes)
    if processes.main:
        show(blocks([ResultEntry(result, result_path(out, result))]))
    return 0


def score(
    real_data: str,
    fake_data: str,
    asked: Measurement | None = None,
    *,
    name: str | None = None,
    allow_lossy: bool = False,
    out: Path = Path("runs"),
    processes: Processes | None = None,
) -> EvalResult:
    """The record of FAKE against REAL, also written below `out`. The size of the fakes is the resolution.

    Real images are cropped to it by the protocol; those that have the size already are taken as they are. An
    interrupted scoring goes on from what it has stored, and a record of the same images gains the metrics that it
    lacks. InputError for ids that do not match, fakes of several sizes, or lossy files.
    """
    processes, asked = processes or Processes(), asked or Measurement()
    real, fake = open_source(real_data), open_source(fake_data)
    match(real, fake)
    for source in (real, fake):
        share_facts(source, out, processes)
    measurement = checked(replace(asked, resolution=common_size(real, fake), seeds=(0,), save_images=0))
    if not allow_lossy:
        refuse_lossy(fake)
    refuse_unusable(real, measurement.resolution, replace(measurement.rules, small="refuse"))
    row = name or fake.name
    if not ROW_NAME.fullmatch(row):
        raise InputError(f"--name {row}: use lower-case letters, digits, dot, underscore and hyphen")
    names = [metric for metric in find_metrics(measurement.metrics) if not needs_model(metric)]
    refused = [metric.name for metric in find_metrics(asked.metrics) if needs_model(metric)]
    cell = Cell(
        info=TokenizerInfo(row, family="images", note="images made elsewhere"),
        source=real,
        measurement=replace(measurement, metrics=tuple(metric.name for metric in names)),
        settings=Settings(scored={"real": real_data, "fake": fake_data, "fake_fingerprint": fake.fingerprint()}),
        model=provenance.key(fake.fingerprint(), provenance.source_hash([])),
        device=select_device(measurement.device, processes.local_rank),
        out=out,
        processes=processes,
        refused=dict.fromkeys(refused, "needs the model, not only its images"),
    )
    return measure_cell(cell, SavedPairs(real, fake, cell.measurement, cell.device))[0]


@dataclass(frozen=True)
class SavedPairs:
    """The `Pairs` of images and of files that somebody made of them."""

    real: Source
    fake: Source
    measurement: Measurement
    device: torch.device

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[Sequence[str], Tensor, Tensor]]:
        """Ids and both sides, uint8 [B, 3, H, W]."""
        asked, size = self.measurement, images_at_once(self.measurement, self.device)
        real, fake = (
            Loader(
                side,
                asked.resolution,
                asked.rules,
                batch_size=size,
                indices=indices,
                workers=asked.workers,
                pin_memory=self.device.type == "cuda",
            )
            for side in (self.real, self.fake)
        )
        for (ids, reals), (_, fakes) in zip(real, fake, strict=True):
            yield ids, reals, fakes

    def fakes(self, ids: Sequence[str], real: Tensor, beside: Tensor) -> tuple[Fakes, Columns, Features]:
        """The fakes as they were read: no columns, no features."""
        return {0: (beside.to(self.device, non_blocking=True), None)}, {}, {}

    def facts(self, processes: Processes) -> dict[str, Any]:
        """Nothing to say."""
        return {}


def needs_model(metric: Metric) -> bool:
    """Whether a metric reads more than two images."""
    return metric.extractor in (CODES, LATENTS) or any(column in MODEL_ONLY for column in metric.columns)


def match(real: Source, fake: Source) -> None:
    """Both sides in the same order of ids; InputError that names ids which only one side has."""
    only = [(side.root, sorted(set(side.ids) - set(other.ids))) for side, other in ((real, fake), (fake, real))]
    missing = [f"only in {root}: {preview(ids)}" for root, ids in only if ids]
    if missing:
        raise InputError(f"images are matched by path without extension, and do not match; {'; '.join(missing)}")
    for side in (real, fake):
        side.sort()


def common_size(real: Source, fake: Source) -> Resolution:
    """The size of all fakes, or native if each has its original's; InputError for others, and for unreadable ones."""
    for index, fact in enumerate(fake.facts()):
        if fact.problem:
            raise InputError(f"{fake.where(index)}: {fact.problem}")
    stored = find_protocol("adm")
    sizes = fake.sizes(stored)
    if len(set(sizes)) == 1:
        return parse_resolution("{}x{}".format(*sizes[0]))
    for index, (size, own) in enumerate(zip(real.sizes(stored), sizes, strict=True)):
        if size != own and size != (0, 0):
            shape = f"{own[0]}x{own[1]}"
            raise InputError(
                f"{fake.where(index)}: {shape}; reconstructions are of one size, or each of its original's"
            )
    return NATIVE


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
