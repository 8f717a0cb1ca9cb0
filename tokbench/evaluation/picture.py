"""The picture beside a result: input, reconstruction and error of the first and of the worst images."""

import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from tokbench.records.files import image_folders, image_name, write_whole

GAIN = 4  # errors are shown four times as large
LABEL = 14  # pixels above each triple
GAP = 6


def draw(rows: Sequence[tuple[str, Tensor, Tensor]], columns: int = 2) -> bytes:
    """(label, real, fake uint8 [3, H, W]) -> PNG of triples (input, reconstruction, error), `columns` side by side."""
    width, height = rows[0][1].shape[2], rows[0][1].shape[1]
    columns = min(columns, len(rows))
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (3 * width + GAP) - GAP, lines * (height + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (label, real, fake) in enumerate(rows):
        left, top = (place % columns) * (3 * width + GAP), (place // columns) * (height + LABEL)
        pen.text((left + 2, top + 1), label, fill="black")
        for offset, pixels in enumerate((real.numpy(), fake.numpy(), error_map(real.numpy(), fake.numpy()))):
            tile = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            sheet.paste(tile, (left + offset * width, top + LABEL))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def save_pairs(result: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """(real, fake uint8 [3, H, W]) by id, one by one for `tokbench report --format html`; replaces earlier fakes."""
    folders = image_folders(result)
    shutil.rmtree(folders[1], ignore_errors=True)
    for sample, images in pairs.items():
        for folder, pixels in zip(folders, images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(pixels.numpy().transpose(1, 2, 0))).save(
                buffer, "PNG", compress_level=1
            )
            write_whole(folder / image_name(sample), buffer.getvalue())


def error_map(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
    """uint8 [3, H, W], twice -> uint8 [3, H, W]: absolute difference per channel times GAIN, clipped at white."""
    return np.minimum(np.abs(real.astype(np.int16) - fake) * GAIN, 255).astype(np.uint8)
