"""RGB images to the crops that protocols prescribe."""

import sys

import numpy as np
from PIL import Image

from tokbench.errors import InputError
from tokbench.protocols import Protocol, Resolution, sides_of


def crop(image: Image.Image, resolution: Resolution, protocol: Protocol) -> np.ndarray:
    """RGB image -> uint8 [H, W, 3]: the protocol's centre crop. Smaller images are enlarged.

    InputError for one so long and narrow that it would not fit into memory.
    """
    size = sides_of(resolution)
    if size is None:
        return np.asarray(image)
    width, height = _covering(image, size)
    if width * height > (Image.MAX_IMAGE_PIXELS or sys.maxsize):
        raise InputError(
            f"{image.width}x{image.height}: would have {width * height} pixels at {resolution}; leave it out"
        )
    if protocol.crop == "adm":
        return _adm(image, size)
    if protocol.crop == "tensor-bilinear":
        return _tensor(image, size, protocol)
    resample = Image.Resampling.BILINEAR if protocol.crop == "pil-bilinear" else Image.Resampling.BICUBIC
    resized = image if image.size == (width, height) else image.resize((width, height), resample)
    return _centre(np.asarray(resized), size)


def _adm(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """guided-diffusion's crop: box halvings while the image allows, bicubic, cut the middle (rounded down)."""
    width, height = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def _covering(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height that just cover the size, as torchvision's Resize has them: the longer one is rounded down."""
    width, height = size
    if image.width * height <= image.height * width:
        return width, int(width * image.height / image.width)
    return int(height * image.width / image.height), height


def _centre(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """torchvision's CenterCrop of [H, W, ...]: the offset is rounded half to even."""
    width, height = size
    top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
    return pixels[top : top + height, left : left + width]


def _tensor(image: Image.Image, size: tuple[int, int], protocol: Protocol) -> np.ndarray:
    """ToTensor, Resize on floats (antialiased, torchvision's default since 0.17), CenterCrop, back to 8 bits."""
    import torch

    from tokbench.data.pixels import quantise

    width, height = _covering(image, size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    if (width, height) != image.size:
        pixels = torch.nn.functional.interpolate(
            pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=True
        )
    cut = _centre(pixels[0].permute(1, 2, 0).numpy(), size)
    return quantise(torch.from_numpy(cut) * 2 - 1, protocol.real_rounding).numpy()
