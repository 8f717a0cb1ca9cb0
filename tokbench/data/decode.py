"""Files to 8-bit RGB images: right pixels, or one line that names the file.

Pixels are all that is read. Metadata, whatever is wrong with it, decides nothing but the orientation where a protocol
asks for it.
"""

import contextlib
import io
import struct
import sys
from collections.abc import Iterator
from functools import cache

import numpy as np
from PIL import Image

from tokbench.errors import InputError

# Types that are read where Pillow, or a plugin of it that is installed, can. Others are counted and named.
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff", ".gif",
     ".jp2", ".j2k", ".jpx", ".jpc", ".jpf", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi", ".sgi", ".pcx", ".heic",
     ".heif", ".jxl")
)  # fmt: skip
# What Pillow's readers raise on damaged files; anything else is a fault of ours and should show.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, ArithmeticError, RuntimeError,
                 TypeError, MemoryError)  # fmt: skip

# What was done to an image besides decoding it: bits of a number, because crops are cached with it.
ON_WHITE, TURNED, ENLARGED, MENDED, FIRST_FRAME = 1, 2, 4, 8, 16
NOTES = {
    ON_WHITE: "transparent, put on white", TURNED: "turned as EXIF says", ENLARGED: "enlarged",
    MENDED: "read in spite of damage outside the pixels", FIRST_FRAME: "first frame of several",
}  # fmt: skip
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"  # how they begin
ORIENTATIONS = {  # EXIF's values 2 to 8
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


@cache
def readable_suffixes() -> frozenset[str]:
    """Those of SUFFIXES that can be read here: HEIC and JPEG XL need pillow-heif and pillow-jxl-plugin."""
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix in SUFFIXES if formats.get(suffix) in Image.OPEN)


def open_header(data: bytes, where: str) -> Image.Image:
    """The image, not yet decoded: size, mode and format. InputError naming `where` if it is none, or a bomb."""
    readable_suffixes()  # Pillow's plugins are in
    limit = Image.MAX_IMAGE_PIXELS or sys.maxsize
    bomb = f"{where}: more than Pillow's limit of {limit} pixels; make it smaller"
    try:
        try:
            image = Image.open(io.BytesIO(data))
        except ValueError:  # Pillow refuses a PNG with over a megabyte of text
            image = Image.open(io.BytesIO(_without_metadata(data)))
            image.info["mended"] = True
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:  # a warning where they are errors
        raise InputError(bomb) from error
    except DECODE_ERRORS as error:
        raise InputError(f"{where}: not a readable image ({_reason(error)}); remove it") from error
    if image.width * image.height > limit:  # Pillow itself only warns up to twice its limit
        raise InputError(bomb)
    return image


def decode(data: bytes, where: str, *, upright: bool = False, least: int = 0) -> tuple[Image.Image, int]:
    """A file's bytes -> RGB image and notes (bits of NOTES). Raises InputError naming `where` if it is damaged.

    Gray of 9 to 16 bits is rescaled to 8; colour of 16 bits comes from Pillow with its high bytes. Transparency is put
    on white. `upright` turns the image as its EXIF orientation says (Pillow always does so with TIFF). Of several
    frames the first is taken. `least`: a JPEG may be decoded at a half, a quarter or an eighth of its size, by its own
    transform, as long as both sides keep so many pixels: for training alone, as these are other pixels.
    """
    image, notes = open_header(data, where), 0
    if least and image.format == "JPEG":
        image.draft(None, (least, least))
    try:
        frames = getattr(image, "n_frames", 1)
    except DECODE_ERRORS:
        frames = 1
    if frames > 1 and image.format != "MPO":  # an MPO is a photograph, with previews behind it
        notes |= FIRST_FRAME
    try:
        try:
            image.load()
        except DECODE_ERRORS as error:
            image = _mended(data, error)
            notes |= MENDED
        notes |= MENDED if image.info.get("mended") else 0
        turn = orientation(image) if upright else 1
        rgb, transparent = _to_rgb(image, data, where)
        notes |= ON_WHITE if transparent else 0
        if turn in ORIENTATIONS:
            return rgb.transpose(ORIENTATIONS[turn]), notes | TURNED
        return rgb, notes
    except DECODE_ERRORS as error:
        raise InputError(f"{where}: damaged ({_reason(error)}); remove it") from error


def _reason(error: BaseException) -> str:
    return str(error).replace("\n", " ").partition(" <_io")[0] or type(error).__name__


def _mended(data: bytes, error: Exception) -> Image.Image:
    """An image whose pixels are whole though its metadata or its end is not; raises the error if they are not."""
    plain, endings = _without_metadata(data), [b""]
    if data.startswith(JPEG) and b"\xff\xc2" not in plain[: plain.find(b"\xff\xda")]:  # and not progressive
        # Where pixels are missing, what follows would show in them: so try two endings.
        endings = [ending + b"\xff\xd9" for ending in (b"", np.random.default_rng(0).bytes(4096).replace(b"\xff", b""))]
    images = [Image.open(io.BytesIO(plain + ending)) for ending in endings]
    try:
        pixels = {image.tobytes() for image in images}
    except DECODE_ERRORS:
        raise error from None
    if len(pixels) > 1:
        raise error
    return images[0]


def _without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG whose chunks or segments that no pixel depends on are left out; other files as they are."""
    if data.startswith(PNG):
        kept = [data[:8]]
        for kind, chunk in _png_chunks(data):
            if kind[:1].isupper() or kind == b"tRNS":  # an upper-case letter: critical
                kept.append(chunk)
        return b"".join(kept)
    if data.startswith(JPEG):
        place, kept = 2, [data[:2]]
        while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":
            size = 2 + int.from_bytes(data[place + 2 : place + 4])
            if data[place + 1] in (0xE0, 0xEE) or not 0xE1 <= data[place + 1] <= 0xEF:  # JFIF, Adobe's colour transform
                kept.append(data[place : place + size])
            place += size
        return b"".join([*kept, data[place:]])
    return data


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 8
    while place + 8 <= len(data):
        size = 12 + int.from_bytes(data[place : place + 4])
        yield data[place + 4 : place + 8], data[place : place + size]
        place += size


def orientation(image: Image.Image) -> int:
    """The orientation of EXIF's first directory, read by hand so that no other tag can be in its way; 1 without it."""
    if image.format == "TIFF":
        return _tag(image, 274, 1)
    exif = image.info.get("exif")
    if not isinstance(exif, bytes):
        return 1
    exif = exif.removeprefix(b"Exif\0\0")
    order = "<" if exif[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _ = struct.unpack_from(f"{order}HHI", exif, entry)
            if tag == 0x0112:
                (value,) = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", exif, entry + 8)
                return int(value)
    except struct.error:
        pass
    return 1


def _to_rgb(image: Image.Image, data: bytes, where: str) -> tuple[Image.Image, bool]:
    """RGB on white, and whether anything was transparent. ValueError for a mode that has no stated meaning."""
    level = image.info.get("transparency")
    if image.format == "PNG" and level is not None:
        depth, colour = data[24], data[25]
        if depth == 16 and colour == 2:
            raise InputError(f"{where}: 16 bits with a transparent colour cannot be read exactly; convert it to 8 bits")
        if colour == 0 and depth in (2, 4):  # Pillow scales the pixels to 8 bits, and leaves the level
            image.info["transparency"] = level * 255 // (2**depth - 1)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _gray_to_rgb(image, level)
    if image.mode in ("I", "F"):
        raise InputError(f"{where}: 32-bit values have no stated range; convert it to 8 bits")
    if image.mode == "LAB":
        raise InputError(f"{where}: Lab colours are not read; convert it to RGB")
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return rgba.convert("RGB"), False
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), True


def _gray_to_rgb(image: Image.Image, level: int | None) -> tuple[Image.Image, bool]:
    """Of more than 8 bits; `level` is the transparent one."""
    values, white = np.asarray(image).astype(np.int64), 65535
    if image.format == "TIFF":
        white = 2 ** _tag(image, 258, 16) - 1
        if _tag(image, 262, 1) == 0:  # 0 is white
            values = white - values
    gray = ((values * 255 + white // 2) // white).clip(0, 255)
    transparent = values == level if level is not None else np.zeros_like(values, dtype=bool)
    gray[transparent] = 255
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB"), bool(transparent.any())


def _tag(image: Image.Image, tag: int, default: int) -> int:
    value = image.tag_v2.get(tag, default)  # type: ignore[attr-defined]  # of a TIFF
    return int(value[0] if isinstance(value, tuple) else value)
