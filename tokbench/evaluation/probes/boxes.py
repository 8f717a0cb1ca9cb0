"""What becomes of text and faces: scores inside annotated boxes, without a network for either.

A folder in TokBench's layout (arXiv 2505.18142): images anywhere below it, and in annotations/*.json or *.json lists of
them, {file_name, annotations: [{bbox, rec}]} for words or {image_name, faces: [{box}]}. A box is left, top, right,
bottom, or its corners. Resolution means TokBench's: an image is padded to a square, resized to it, decoded, resized
back and cut to its own size. Where its padding goes is not said; here it is black, at the right and the bottom.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokbench import registry
from tokbench.data.sources import Source
from tokbench.errors import InputError
from tokbench.evaluation.probes.legibility import MISSING, accuracy, reader, without_ocr
from tokbench.evaluation.probes.look import Base, Found, Look
from tokbench.metrics import pixel
from tokbench.records.result import TokenizerInfo

LPIPS_SIDE = 32  # pixels that lpips-alex needs: a smaller box is seen with what is around it
KINDS = {"text": ("file_name", "annotations", "bbox"), "face": ("image_name", "faces", "box")}  # keys of TokBench


@dataclass(frozen=True)
class Box:
    left: int
    top: int
    right: int
    bottom: int
    text: str = ""


def annotated(source: Source, kind: str) -> tuple[Source, dict[str, list[Box]]]:
    """The images of a folder that have boxes of this kind, and the boxes by id; InputError where there are none."""
    root = Path(source.root)
    files = sorted([*root.glob("annotations/*.json"), *root.glob("*.json")])
    places: dict[str, list[int]] = {}
    for index in range(len(source)):
        places.setdefault(Path(str(source.entries[index])).name, []).append(index)
    boxes: dict[str, list[Box]] = {}
    for file in files:
        for name, found in read(file, kind):
            place = place_of(name, places.get(Path(name).name, []), source, file.stem.partition("_")[2])
            if place is not None and found:
                boxes.setdefault(source.ids[place], []).extend(found)
    if not boxes:
        raise InputError(f"{root}: no image with boxes of {kind}; it needs annotations/*.json in TokBench's layout")
    kept = [index for index, sample in enumerate(source.ids) if sample in boxes]
    entries, ids = [source.entries[i] for i in kept], [source.ids[i] for i in kept]
    return replace(source, name=f"{source.name}-{kind}", ids=ids, entries=entries, _facts=None), boxes


def place_of(name: str, among: Sequence[int], source: Source, data: str) -> int | None:
    """Which of the images with this file name is meant; of several the one in the folder of the annotations' data."""
    ends = [i for i in among if f"/{source.entries[i]}".endswith(f"/{name}")]
    own = [i for i in ends if data in Path(str(source.entries[i])).parts]
    return next(iter(own or ends), None)


def read(file: Path, kind: str) -> list[tuple[str, list[Box]]]:
    """Image names and their boxes of one kind; InputError for a file that is no list of images."""
    key, group, box = KINDS[kind]
    try:
        images = json.loads(file.read_text(encoding="utf-8"))
        return [
            (str(image[key]), [box_of(one[box], str(one.get("rec", ""))) for one in image[group]])
            for image in images
            if key in image and group in image
        ]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: no annotations in TokBench's layout ({error!r}); mend or remove it") from error


def box_of(numbers: Any, text: str) -> Box:
    """Of left, top, right, bottom, or of a polygon's corners, [[x, y], ...] or x, y, x, y, ..."""
    flat = [float(n) for point in numbers for n in (point if isinstance(point, list) else [point])]
    xs, ys = flat[0::2], flat[1::2]
    return Box(int(min(xs)), int(min(ys)), int(max(xs)) + 1, int(max(ys)) + 1, text)


def framed(look: Look, ids: Sequence[str], real: Tensor, seeds: Tensor) -> Base:
    """Images uint8 [B, 3, H, W] of any size and their reconstruction at the measurement's resolution."""
    height, width = real.shape[2:]
    side, resolution = max(height, width), int(look.measurement.resolution)
    square = F.pad(real, (0, side - width, 0, side - height))
    base = look.reconstruct(ids, resized(square, resolution), seeds)
    return replace(base, real=real, fake=resized(base.fake, side)[..., :height, :width])


def resized(images: Tensor, side: int) -> Tensor:
    """uint8 [B, 3, s, s] -> uint8 [B, 3, side, side], bicubic with antialiasing."""
    scaled = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True, align_corners=False)
    return scaled.round().clamp(0, 255).to(torch.uint8)


def in_boxes(kind: str, look: Look, base: Base) -> Found:
    """Columns [B]: means over each image's boxes."""
    rows: dict[str, list[float]] = {}
    for i, sample in enumerate(base.ids):
        sums: dict[str, float] = {}
        for box in look.boxes[sample]:
            for name, value in of_box(kind, look, base.real[i], base.fake[i], box).items():
                sums[name] = sums.get(name, 0.0) + value
        for name, value in sums.items():
            rows.setdefault(name, []).append(value / len(look.boxes[sample]))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}


def of_box(kind: str, look: Look, real: Tensor, fake: Tensor, box: Box) -> dict[str, float]:
    """Scores of one box of an image uint8 [3, H, W]."""
    height, width = real.shape[1:]
    left, right = grown(box.left, box.right, width, 1)
    top, bottom = grown(box.top, box.bottom, height, 1)
    inside = (slice(None), slice(top, bottom), slice(left, right))
    around = (
        slice(None),
        slice(*grown(top, bottom, height, LPIPS_SIDE)),
        slice(*grown(left, right, width, LPIPS_SIDE)),
    )
    found = {f"{kind}-psnr": float(pixel.psnr(pixel.squared_error(real[inside][None], fake[inside][None])))}
    if "lpips-alex" in (scores := look.score(("lpips-alex",), real[around][None], fake[around][None])):
        found[f"{kind}-lpips"] = float(scores["lpips-alex"])
    if kind == "text" and not without_ocr():
        read_again = reader()(fake[inside].cpu().numpy().transpose(1, 2, 0))
        found["text-ned"] = accuracy(box.text, read_again)
        found["text-accuracy"] = float(found["text-ned"] == 1)
    return found


def grown(low: int, high: int, length: int, least: int) -> tuple[int, int]:
    """An interval inside [0, length] of at least so many pixels around the same middle."""
    low, high = max(0, min(low, length - 1)), max(1, min(high, length))
    missing = max(0, least - (high - low))
    low = max(0, min(low - missing // 2, length - (high - low) - missing))
    return low, min(length, max(high, low + least))


def refuses_text(info: TokenizerInfo) -> Mapping[str, str]:
    return dict.fromkeys(("text-accuracy", "text-ned"), MISSING) if without_ocr() else {}


def text_boxes(look: Look, base: Base) -> Found:
    """Words: `rec` is what they say."""
    return in_boxes("text", look, base)


def face_boxes(look: Look, base: Base) -> Found:
    """Faces."""
    return in_boxes("face", look, base)


registry.register_probe(
    "text-boxes", text_boxes, summary="psnr, lpips-alex and OCR inside annotated boxes of text (TokBench's layout)",
    refuses=refuses_text, boxes="text",
)  # fmt: skip
registry.register_probe(
    "face-boxes", face_boxes, summary="psnr and lpips-alex inside annotated boxes of faces (TokBench's layout)",
    boxes="face",
)  # fmt: skip
