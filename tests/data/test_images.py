"""Decoding: every format and mode becomes RGB, or an error that names the file."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from tokbench.data.decode import ON_WHITE, TURNED, decode
from tokbench.errors import InputError

COLOUR = (200, 100, 50)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1"])
def test_every_format_and_mode_becomes_rgb(format: str, mode: str) -> None:
    image = Image.new("RGB", (16, 12), COLOUR).convert(mode)
    expected = image.convert("RGB").getpixel((0, 0))
    try:
        data = encoded(image, format)
    except OSError:
        pytest.skip(f"{format} has no {mode}")
    decoded, notes = decode(data, "x")
    assert decoded.mode == "RGB"
    assert decoded.size == (16, 12)
    assert notes == 0
    tolerance = 3 if format in ("JPEG", "WEBP", "AVIF") else 0
    assert np.abs(np.subtract(decoded.getpixel((8, 6)), expected)).max() <= tolerance


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_transparency_is_put_on_white_and_noted(format: str) -> None:
    options = {} if format in ("PNG", "TIFF") else {"lossless": True} if format == "WEBP" else {"quality": 100}
    decoded, notes = decode(encoded(Image.new("RGBA", (16, 16), (*COLOUR, 0)), format, **options), "x")
    assert notes == ON_WHITE
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    _, notes = decode(encoded(Image.new("RGBA", (16, 16), (*COLOUR, 255)), format, **options), "x")
    assert notes == 0


def test_half_transparency_and_transparent_colours_are_put_on_white() -> None:
    decoded, _ = decode(encoded(Image.new("LA", (4, 4), (0, 128)), "PNG"), "x")
    assert decoded.getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("RGB", (4, 4), COLOUR).quantize(2)
    decoded, notes = decode(encoded(palette, "PNG", transparency=palette.getpixel((0, 0))), "x")
    assert notes == ON_WHITE
    assert decoded.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_rescaled(format: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    decoded, _ = decode(encoded(Image.fromarray(values), format), "x")
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_thirty_two_bit_values_are_refused() -> None:
    with pytest.raises(InputError, match="x: 32-bit"):
        decode(encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "x")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_applied_and_noted(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded, notes = decode(encoded(Image.new("RGB", (16, 8), COLOUR), format, exif=exif), "x")
    assert decoded.size == ((8, 16) if orientation in (6, 8) else (16, 8))
    assert notes == (TURNED if orientation > 1 and format != "TIFF" else 0)  # Pillow turns TIFF by itself


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF"])
def test_truncated_files_are_named(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    for length in (len(data) // 2, len(data) * 3 // 4, 5, 0):
        with pytest.raises(InputError, match=r"^x\.img: (damaged|not a readable image)"):
            decode(data[:length], "x.img")


def test_any_flipped_byte_is_an_image_or_an_input_error() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    for format in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF"):
        data = encoded(noise, format)
        for at in rng.integers(0, len(data), 60):
            broken = bytearray(data)
            broken[at] ^= int(rng.integers(1, 256))
            with contextlib.suppress(InputError):
                decode(bytes(broken), "x")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (300, 100):  # Pillow would warn at the first and refuse at the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match="x: more than Pillow's limit"):
            decode(encoded(Image.new("L", (20, 20)), "PNG"), "x")
