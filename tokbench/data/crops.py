"""RGB images to the crops that protocols prescribe."""

import sys

import numpy as np
from PIL import Image

from tokbench.errors import InputError
from tokbench.protocols import Protocol


def crop(image: Image.Image, resolution: int, protocol: Protocol) -> np.ndarray:
    """RGB image -> uint8 [resolution, resolution, 3]: the protocol's centre crop. Smaller images are enlarged.

    InputError for one so long and narrow that it would not fit into memory.
    """
    pixels = max(image.size) * resolution**2 // min(image.size)
    if pixels > (Image.MAX_IMAGE_PIXELS or sys.maxsize):
        raise InputError(f"{image.width}x{image.height}: would have {pixels} pixels at {resolution}; leave it out")
    if protocol.crop == "adm":
        return _adm(image, resolution)
    if protocol.crop == "tensor-bilinear":
        return _tensor(image, resolution, protocol)
    resample = Image.Resampling.BILINEAR if protocol.crop == "pil-bilinear" else Image.Resampling.BICUBIC
    size = _short_side(image, resolution)
    return _centre(np.asarray(image if image.size == size else image.resize(size, resample)), resolution)


def _adm(image: Image.Image, resolution: int) -> np.ndarray:
    """guided-diffusion's crop: box halvings while the short side allows, bicubic, cut the middle (rounded down)."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def _short_side(image: Image.Image, resolution: int) -> tuple[int, int]:
    """Width and height after torchvision's Resize(resolution): the long side is rounded down."""
    short, long = min(image.size), max(image.size)
    other = int(resolution * long / short)
    return (resolution, other) if image.width <= image.height else (other, resolution)


def _centre(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """torchvision's CenterCrop of [H, W, ...]: the offset is rounded half to even."""
    top, left = (round((length - resolution) / 2) for length in pixels.shape[:2])
    return pixels[top : top + resolution, left : left + resolution]


def _tensor(image: Image.Image, resolution: int, protocol: Protocol) -> np.ndarray:
    """ToTensor, Resize on floats (antialiased, torchvision's default since 0.17), CenterCrop, back to 8 bits."""
    import torch

    from tokbench.data.pixels import quantise

    width, height = _short_side(image, resolution)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    if (width, height) != image.size:
        pixels = torch.nn.functional.interpolate(
            pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=True
        )
    cut = _centre(pixels[0].permute(1, 2, 0).numpy(), resolution)
    return quantise(torch.from_numpy(cut) * 2 - 1, protocol.real_rounding).numpy()
