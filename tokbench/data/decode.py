"""Files to 8-bit RGB photographs, and photographs to the crops that protocols prescribe."""

import io
import struct
import sys

import numpy as np
from PIL import Image, ImageOps

from tokbench.errors import InputError

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
