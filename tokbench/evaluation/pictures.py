"""Pairs of images that people look at: those kept while a cell is measured, and the picture beside its result."""

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tokbench.records.files import image_folders, image_name, write_whole

GAIN = 4  # errors are shown four times as large
LABEL = 14  # pixels above each triple, and of the titles above all
TITLES = ("real", "reconstruction", f"difference x{GAIN}")
GAP = 6


def error_rank(columns: Mapping[str, np.ndarray], num_images: int) -> np.ndarray:
    """What "worst" means in a picture, [N]: the first of these columns that was measured, else nothing."""
    for name, sign in (("lpips-vgg", 1), ("lpips-alex", 1), ("psnr", -1)):
        if name in columns:
            return sign * columns[name]
    return np.zeros(num_images)


@dataclass
class KeptImages:
    """The pairs that a picture may show: the first N samples and the N worst so far, as uint8 [3, H, W]."""

    first: frozenset[str]
    num_worst: int
    worst: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, ids: Sequence[str], ranks: Sequence[float], real: Tensor, fake: Tensor) -> None:
        """Look at a batch, uint8 [B, 3, H, W] twice. Only what is kept is copied, since a copy waits for the GPU."""
        worst = self.worst | dict(zip(ids, ranks, strict=True))
        ranked = sorted(worst, key=lambda sample: (worst[sample], sample), reverse=True)
        self.worst = {sample: worst[sample] for sample in ranked[: self.num_worst]}
        kept = self.first | self.worst.keys()
        self.pairs = {sample: pair for sample, pair in self.pairs.items() if sample in kept}
        for i, sample in enumerate(ids):
            if sample in kept:
                self.pairs[sample] = real[i].cpu(), fake[i].cpu()


def png(image: Image.Image) -> bytes:
    """Quickly compressed: pictures are read once or twice."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def as_image(pixels: np.ndarray | Tensor) -> Image.Image:
    """uint8 [3, H, W] -> RGB."""
    return Image.fromarray(np.ascontiguousarray(np.asarray(pixels).transpose(1, 2, 0)))


def draw(rows: Sequence[tuple[str, Tensor, Tensor, Tensor]], columns: int = 2, titles: Sequence[str] = TITLES) -> bytes:
    """(label, real, fake, map uint8 [3, H, W]) -> PNG of such triples below their titles, `columns` side by side.

    Images of unequal sizes stand in frames of the largest.
    """
    height, width = (max(real.shape[dim] for _, real, *_ in rows) for dim in (1, 2))
    columns = min(columns, len(rows))
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (3 * width + GAP) - GAP, LABEL + lines * (height + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for place in range(3 * columns):
        left = place * width + place // 3 * GAP
        title = titles[place % 3]
        while pen.textlength(title) > width:  # a tiny image
            title = title[:-1]
        pen.text((left + 2, 1), title, fill="gray")
    for place, (label, *panels) in enumerate(rows):
        left, top = (place % columns) * (3 * width + GAP), LABEL + (place // columns) * (height + LABEL)
        pen.text((left + 2, top + 1), label, fill="black")
        for offset, pixels in enumerate(panels):
            sheet.paste(as_image(pixels), (left + offset * width, top + LABEL))
    return png(sheet)


def save_pairs(result: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """(real, fake uint8 [3, H, W]) by id, one by one for `tokbench report --format html`; replaces earlier fakes."""
    folders = image_folders(result)
    shutil.rmtree(folders[1], ignore_errors=True)
    for sample, images in pairs.items():
        for folder, pixels in zip(folders, images, strict=True):
            write_whole(folder / image_name(sample), png(as_image(pixels)))


def error_map(real: Tensor, fake: Tensor) -> Tensor:
    """uint8 [3, H, W], twice -> uint8 [3, H, W]: absolute difference per channel times GAIN, clipped at white."""
    difference = (real.to(torch.int16) - fake).abs() * GAIN
    return difference.clamp(max=255).to(torch.uint8)
