"""How small a text stays readable: text of known content on the images, read before and after by an OCR.

The OCR is RapidOCR's recognition (PP-OCR), which pip brings with its weights: the extra `tokbench[ocr]`. It is shown
where each line is, so only reading is measured. A reading counts by its characters: one less the edit distance to the
text, by the length of the longer of the two.
"""

import hashlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tokbench import registry
from tokbench.evaluation.probes.look import Base, Found, Look
from tokbench.metrics import metrics_of
from tokbench.metrics.conditions import TEXT_HEIGHTS, at
from tokbench.records.result import TokenizerInfo

LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"  # without those that look alike: l and 1, o and 0
MARGIN = 4  # pixels around a line
LONGEST = 12  # characters
MISSING = "needs an OCR: pip install 'tokbench[ocr]'"
Line = tuple[int, str, tuple[int, int, int, int]]  # font size, text, its box: left, top, right, bottom


class Reader:
    """RapidOCR's recognition; it remembers what it has read, as all models see the same originals."""

    def __init__(self) -> None:
        from rapidocr_onnxruntime import RapidOCR

        self.read, self.known = RapidOCR(intra_op_num_threads=1), dict[bytes, str]()

    def __call__(self, line: np.ndarray) -> str:
        """uint8 [h, w, 3] -> the text in it."""
        key = hashlib.sha256(repr(line.shape).encode() + line.tobytes()).digest()
        if key not in self.known:
            found, _ = self.read(line[..., ::-1], use_det=False, use_cls=False, use_rec=True)  # as OpenCV has colours
            self.known[key] = found[0][0] if found else ""
        return self.known[key]


reader = cache(Reader)


def accuracy(text: str, read: str) -> float:
    """Share of characters that were read, upper and lower case alike: 1 - normalised edit distance."""
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(text.casefold(), read.casefold()))


def legibility(look: Look, base: Base) -> Found:
    """As many copies of each image as its lines of all sizes take, each copy a round trip."""
    size = (base.real.shape[3], base.real.shape[2])
    found = {at(side, f"{height}px"): torch.zeros(len(base.ids)) for side in ("read", "reread")
             for height in TEXT_HEIGHTS}  # fmt: skip
    read = reader()
    for i, sample in enumerate(base.ids):
        seed = int(base.seeds[i])
        for lines in pages(seed, size):
            written = write(base.real[i], lines)[None].to(base.real.device)
            fake = look.reconstruct([sample], written, base.seeds[i : i + 1]).fake
            for side, image in (("read", written[0]), ("reread", fake[0])):
                pixels = image.cpu().numpy().transpose(1, 2, 0)
                for height, text, (left, top, right, bottom) in lines:
                    found[at(side, f"{height}px")][i] = accuracy(text, read(pixels[top:bottom, left:right]))
    return found


def font_of(height: int) -> Any:
    """DejaVu Sans as matplotlib brings it; the height is the font's size in pixels."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), height)


def pages(seed: int, size: tuple[int, int]) -> list[list[Line]]:
    """The lines of all font sizes that fit into images of (width, height), one above the other on as few as hold them.

    The text follows from the image's seed and the font size.
    """
    width, height = size
    found: list[list[Line]] = [[]]
    top = 0
    for font_size in TEXT_HEIGHTS:
        font = font_of(font_size)
        letters = np.random.default_rng((seed, font_size)).choice(list(LETTERS), LONGEST)
        fitting = [n for n in range(1, LONGEST + 1) if font.getlength("".join(letters[:n])) <= width - 2 * MARGIN]
        line = sum(font.getmetrics()) + 2 * MARGIN
        if not fitting or line > height:
            continue
        if top + line > height:
            found.append([])
            top = 0
        text = "".join(letters[: fitting[-1]])
        box = (0, top, min(width, int(font.getlength(text)) + 2 * MARGIN + 1), top + line)
        found[-1].append((font_size, text, box))
        top += line
    return [lines for lines in found if lines]


def write(image: Tensor, lines: list[Line]) -> Tensor:
    """uint8 [3, H, W] with the lines on it: black or white, whichever stands out, with an outline of the other."""
    picture = Image.fromarray(np.ascontiguousarray(image.cpu().numpy().transpose(1, 2, 0)))
    pen = ImageDraw.Draw(picture)
    for font_size, text, (left, top, right, bottom) in lines:
        dark = float(image[:, top:bottom, left:right].float().mean()) < 128
        ink, outline = ("white", "black") if dark else ("black", "white")
        pen.text((left + MARGIN, top + MARGIN), text, fill=ink, font=font_of(font_size),
                 stroke_width=max(1, font_size // 12), stroke_fill=outline)  # fmt: skip
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())


def without_ocr() -> bool:
    return any(importlib.util.find_spec(name) is None for name in ("rapidocr_onnxruntime", "rapidfuzz"))


def refuses(info: TokenizerInfo) -> Mapping[str, str]:
    return {metric.name: MISSING for metric in metrics_of("legibility") if without_ocr()}


registry.register_probe(
    "legibility", legibility, summary="text of 8 to 64 px that an OCR still reads (extra tokbench[ocr])",
    encodings=2, decodings=2, refuses=refuses,
)  # fmt: skip
