"""Files to 8-bit RGB photographs, and photographs to the crops that protocols prescribe."""

import io
import struct
import sys

import numpy as np
from PIL import Image, ImageOps

from tokbench.errors import InputError
from tokbench.protocols import Protocol

SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff"))
# What Pillow's readers raise on damaged files; anything else is a fault of ours and should show.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, ArithmeticError, RuntimeError)

# What was done to an image besides decoding it: bits of a number, because crops are cached with it.
ON_WHITE, TURNED, UPSCALED = 1, 2, 4
NOTES = {ON_WHITE: "transparent, put on white", TURNED: "turned as EXIF says", UPSCALED: "upscaled"}


def open_header(data: bytes, where: str) -> Image.Image:
    """The image, not yet decoded: size, mode and format. InputError naming `where` if it is none, or a bomb."""
    limit = Image.MAX_IMAGE_PIXELS or sys.maxsize
    bomb = f"{where}: more than Pillow's limit of {limit} pixels; make it smaller"
    try:
        image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:  # a warning where they are errors
        raise InputError(bomb) from error
    except DECODE_ERRORS as error:
        raise InputError(f"{where}: not a readable image ({_reason(error)}); remove it") from error
    if image.width * image.height > limit:  # Pillow itself only warns up to twice its limit
        raise InputError(bomb)
    return image


def decode(data: bytes, where: str) -> tuple[Image.Image, int]:
    """A file's bytes -> RGB image and notes (bits of NOTES). Raises InputError naming `where` if it is damaged.

    16-bit gray is rescaled to 8; other 16-bit files come from Pillow with their high bytes. Transparency is put on
    white. The EXIF orientation is applied (the original protocols ignore it). Of several frames the first is taken.
    """
    image = open_header(data, where)
    try:
        image.load()
        image, notes = _upright(image)
        if image.has_transparency_data:
            return _on_white(image, notes)
        if image.mode.startswith("I;16"):
            image = Image.fromarray(((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise InputError(f"{where}: 32-bit values have no stated range; convert it to 8 bits")
        return image.convert("RGB"), notes
    except DECODE_ERRORS as error:
        raise InputError(f"{where}: damaged ({_reason(error)}); remove it") from error


def _reason(error: BaseException) -> str:
    return str(error).replace("\n", " ").partition(" <_io")[0] or type(error).__name__


def _upright(image: Image.Image) -> tuple[Image.Image, int]:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except DECODE_ERRORS:  # EXIF that cannot be read says nothing about the pixels
        orientation = 1
    return (ImageOps.exif_transpose(image), TURNED) if orientation in range(2, 9) else (image, 0)


def _on_white(image: Image.Image, notes: int) -> tuple[Image.Image, int]:
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return rgba.convert("RGB"), notes
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return white.convert("RGB"), notes | ON_WHITE


def crop(image: Image.Image, resolution: int, protocol: Protocol) -> np.ndarray:
    """RGB image -> uint8 [resolution, resolution, 3]: the protocol's centre crop. Smaller images are enlarged."""
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

    from tokbench.reconstruct import quantise

    width, height = _short_side(image, resolution)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    if (width, height) != image.size:
        pixels = torch.nn.functional.interpolate(
            pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=True
        )
    cut = _centre(pixels[0].permute(1, 2, 0).numpy(), resolution)
    return quantise(torch.from_numpy(cut) * 2 - 1, protocol.real_rounding).numpy()
