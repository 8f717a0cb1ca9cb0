"""What can stand in front of an image: the right pixels, or one line that names the file."""

import contextlib
import io
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from tokbench.data.decode import ENLARGED, FIRST_FRAME, MENDED, ON_WHITE, TURNED, decode, readable_suffixes
from tokbench.data.open import open_source
from tokbench.errors import InputError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
GRAY, ALPHA = COLOUR[..., 0], COLOUR[..., 1]
WIDE = RNG.integers(0, 65536, (6, 8)).astype(np.uint16)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def triple(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(colour * share + 255 * (1 - share))


def to_eight(values: np.ndarray, bits: int) -> np.ndarray:
    return np.rint(values.astype(float) * 255 / (2**bits - 1))


def of_jfif(luma: np.ndarray, blue: np.ndarray, red: np.ndarray) -> np.ndarray:
    """RGB of YCbCr as JPEG files have it."""
    green = luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128)
    return np.dstack([luma + 1.402 * (red - 128), green, luma + 1.772 * (blue - 128)]).clip(0, 255)


# Made by Pillow: mode -> image, the RGB that it means.
PALETTE = Image.fromarray(COLOUR).quantize(16)
MODES: dict[str, tuple[Image.Image, np.ndarray]] = {
    "RGB": (Image.fromarray(COLOUR), COLOUR),
    "L": (Image.fromarray(GRAY), triple(GRAY)),
    "1": (Image.fromarray(GRAY > 99), triple(np.where(GRAY > 99, 255, 0))),
    "P": (PALETTE, np.array(PALETTE.getpalette(), dtype=np.uint8).reshape(-1, 3)[np.asarray(PALETTE)]),
    "LA": (Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(ALPHA)]), on_white(triple(GRAY), ALPHA)),
    "RGBA": (Image.fromarray(np.dstack([COLOUR, ALPHA])), on_white(COLOUR, ALPHA)),
    "I;16": (Image.fromarray(WIDE), triple(to_eight(WIDE, 16))),
    "I;16B": (Image.fromarray(WIDE.astype(">u2")), triple(to_eight(WIDE, 16))),
    "PA": (PALETTE.convert("PA"), np.asarray(PALETTE.convert("RGB"))),
    "RGBX": (Image.fromarray(COLOUR).convert("RGBX"), COLOUR),
    "YCbCr": (Image.fromarray(COLOUR, "YCbCr"), of_jfif(*np.moveaxis(COLOUR.astype(float), 2, 0))),
    "CMYK": (Image.fromarray(np.dstack([COLOUR, GRAY // 2]), "CMYK"),
             (255.0 - COLOUR) * (255 - GRAY // 2)[..., None] / 255),
}  # fmt: skip
EXACT = {"PNG": {}, "TIFF": {}, "BMP": {}, "DIB": {}, "GIF": {}, "TGA": {}, "PPM": {}, "PCX": {}, "SGI": {}, "QOI": {},
         "JPEG2000": {"irreversible": False}, "WEBP": {"lossless": True, "exact": True}}  # fmt: skip


def pillow_cases() -> Iterator[tuple[str, bytes, np.ndarray]]:
    for format, options in EXACT.items():
        for mode, (image, expected) in MODES.items():
            with contextlib.suppress(OSError, ValueError, KeyError):  # the format has no such mode
                data = encoded(image, format, **options)
                if (format == "WEBP" and mode.startswith("I;16")) or (format, mode) == ("JPEG2000", "I;16B"):
                    continue  # cut to 8 bits; written with bytes exchanged
                if (format, mode) == ("TIFF", "YCbCr") and int(PIL.__version__.partition(".")[0]) < 13:
                    continue  # which reads no such files, its own among them
                if format == "GIF" and mode not in ("L", "1", "P"):
                    continue  # reduced to a palette
                if format in ("BMP", "DIB", "PPM") and mode == "RGBA":
                    expected = COLOUR  # these have no alpha
                yield f"{format} {mode}", data, expected


# Made by hand, as Pillow writes no such files: PNG of every depth, type and transparency.
def png(depth: int, colour: int, samples: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """`samples` [H, W, channels] of `depth` bits."""
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def png_cases() -> Iterator[tuple[str, bytes, np.ndarray | None]]:
    for depth in (1, 2, 4, 8, 16):
        for colour, channels in ((0, 1), (2, 3), (3, 1), (4, 2), (6, 4)):
            if (colour == 3 and depth == 16) or (colour in (2, 4, 6) and depth < 8):
                continue
            samples = np.random.default_rng(depth).integers(0, 2**depth, (6, 8, channels))
            samples[0, 0] = 2**depth - 1
            table = np.random.default_rng(1).integers(0, 256, (2**depth, 3), dtype=np.uint8)
            chunks = [(b"PLTE", table.tobytes())] if colour == 3 else []
            eight = to_eight(samples, depth) if depth < 16 or colour == 0 else samples >> 8  # Pillow's high bytes
            plain = table[samples[..., 0]] if colour == 3 else eight[..., : 3 if channels > 2 else 1]
            plain = np.broadcast_to(plain, (6, 8, 3))
            if colour in (4, 6):
                yield f"PNG {depth} bit type {colour}", png(depth, colour, samples), on_white(plain, eight[..., -1])
                continue
            yield f"PNG {depth} bit type {colour}", png(depth, colour, samples, *chunks), plain
            levels = {"used": samples[2, 3]}
            if unused := [v for v in range(2**depth) if not (samples == v).any()]:
                levels["unused"] = np.full(channels, unused[0])
            for name, value in levels.items():
                opaque = [255 * int(i != value[0]) for i in range(2**depth)]
                trns = bytes(opaque) if colour == 3 else struct.pack(f">{channels}H", *value)
                expected = np.where((samples == value).all(axis=-1)[..., None], 255, plain)
                data = png(depth, colour, samples, *chunks, (b"tRNS", trns))
                yield (
                    f"PNG {depth} bit type {colour} tRNS {name}",
                    data,
                    None if (depth, colour) == (16, 2) else expected,
                )


def tiff(bits: int, samples: np.ndarray, photometric: int, order: str) -> bytes:
    """Gray, uncompressed, in one strip."""
    if bits == 12:
        flat = np.unpackbits(samples.astype(">u2").view(np.uint8).reshape(*samples.shape, 2), axis=-1)[..., 4:]
        body = b"".join(np.packbits(row.reshape(-1)).tobytes() for row in flat)
    else:
        body = samples.astype(f"{order}u{bits // 8}").tobytes()
    tags = [(256, samples.shape[1]), (257, samples.shape[0]), (258, bits), (259, 1), (262, photometric), (273, 8),
            (277, 1), (278, samples.shape[0]), (279, len(body))]  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value) for tag, value in tags)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(tags)) + entries + b"\0\0\0\0"


def tiff_cases() -> Iterator[tuple[str, bytes, np.ndarray | None]]:
    for bits in (8, 12, 16):
        samples = np.random.default_rng(bits).integers(0, 2**bits, (6, 8))
        for photometric in (0, 1):
            for order in "<>":
                means = samples if photometric else 2**bits - 1 - samples
                refused = (bits == 12 or (bits == 16 and order == ">")) and (order == ">" or not photometric)
                refused &= (bits, photometric) != (16, 1)  # by Pillow
                name = f"TIFF {bits} bit, {'black' if photometric else 'white'} is 0, {order}"
                expected = None if refused else triple(to_eight(means, bits))
                yield name, tiff(bits, samples, photometric, order), expected


def file_cases() -> Iterator[tuple[str, bytes, np.ndarray | None]]:
    """Several frames, of which the first counts, and files that end half-way."""
    first, others = Image.fromarray(COLOUR), [Image.fromarray(COLOUR[::-1].copy())]
    for format in ("PNG", "TIFF", "GIF", "WEBP"):
        options = EXACT[format] | {"save_all": True, "append_images": others}
        yield f"{format} of two frames", encoded(first, format, **options), COLOUR
    for format, options in EXACT.items():
        data = encoded(first, format, **options)
        yield f"{format} cut in half", data[: len(data) // 2], None


def exif(value: int, *others: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """An EXIF block with an orientation after other entries, each of whatever type."""
    entries = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in others)
    entries += struct.pack(f"{order}HHIHH", 0x0112, 3, 1, value, 0)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return b"Exif\0\0" + head + struct.pack(f"{order}H", len(others) + 1) + entries + b"\0\0\0\0"


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}  # fmt: skip


def orientation_cases() -> Iterator[tuple[str, bytes, np.ndarray]]:
    lossless = {"PNG": {}, "WEBP": EXACT["WEBP"], "TIFF": {}}
    for format, options in lossless.items():
        for value, turn in UPRIGHT.items():
            tags = Image.Exif()
            tags[0x0112] = value
            data = encoded(Image.fromarray(COLOUR), format, exif=tags if format == "TIFF" else exif(value), **options)
            yield f"{format} orientation {value}", data, turn(COLOUR)


# Where an image lies: a folder's files by name, and what is opened below it.
PLAIN = encoded(Image.fromarray(COLOUR), "PNG")
OTHER = encoded(Image.fromarray(255 - COLOUR), "PNG")
NAMES = {  # read, or not
    "a.png": True, "A.PNG": True, "a.b.png": True, "with space.png": True, "#1.png": True, "café.png": True,
    "cafe\u0301.png": True, "line\nbreak.png": True, "b/c/d.png": True, "a.jpg": True, "a.apng": True,
    "a": False, "a.txt": False, "a.npy": False, ".a.png": False, "._a.png": False,
}  # fmt: skip


def laid(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tarred(folder: Path, mode: str = "w", *, link: bytes = b"", masks: Mapping[str, bytes] = {}) -> Path:
    """`a.png`, perhaps as a link of this kind to an image behind it, and other files."""
    entries = [("a.png", PLAIN), *masks.items()]
    if link:
        entries = [("b.data", PLAIN), ("a.png", b"")]
    with tarfile.open(folder / "x.tar", mode) as tar:  # type: ignore[call-overload]
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            if not data:
                entry.type, entry.linkname = link, "b.data"
            tar.addfile(entry, io.BytesIO(data))
    return folder / "x.tar"


def zipped(folder: Path, method: int, name: str = "a.png") -> Path:
    with zipfile.ZipFile(folder / "x.zip", "w", method) as archive:
        archive.writestr(name, PLAIN)
    return folder / "x.zip"


def linked(folder: Path, kind: Callable[..., None], target: str = "b.data") -> Path:
    kind(laid(folder, **{"b.data": PLAIN}) / target, folder / "a.png")
    return folder


def listed(folder: Path, text: bytes) -> Path:
    return laid(folder, **{"a.png": PLAIN, "x.txt": text}) / "x.txt"


def table_of(folder: Path, column: str = "", **columns: bytes | None) -> str:
    datasets = pytest.importorskip("datasets", reason="needs the hf extra")
    features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
    rows = {name: [value and {"bytes": value, "path": None}] for name, value in columns.items()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "x.parquet")
    return f"hf:{folder / 'x.parquet'}{column}"


PLACES: dict[str, tuple[Callable[[Path], Path | str], bool]] = {
    **{f"name {name!r}": (partial(laid, **{name: PLAIN}), read) for name, read in NAMES.items()},
    "tar": (tarred, True),
    "tar, hard link": (partial(tarred, link=tarfile.LNKTYPE), True),
    "tar, symbolic link": (partial(tarred, link=tarfile.SYMTYPE), True),
    "tar, compressed": (partial(tarred, mode="w:gz"), False),
    "tar, WebDataset with a mask": (partial(tarred, masks={"a.seg.png": OTHER}), True),
    "zip, stored": (partial(zipped, method=zipfile.ZIP_STORED), True),
    "zip, deflated": (partial(zipped, method=zipfile.ZIP_DEFLATED), True),
    "zip, a name that leads out": (partial(zipped, method=zipfile.ZIP_STORED, name="../a.png"), False),
    "hard link": (partial(linked, kind=os.link), True),
    "symbolic link": (partial(linked, kind=os.symlink), True),
    "symbolic link to nothing": (partial(linked, kind=os.symlink, target="c.data"), False),
    "list": (partial(listed, text=b"a.png\n"), True),
    "list from Windows": (partial(listed, text=b"\xef\xbb\xbfa.png\r\n"), True),
    "list of what is not there": (partial(listed, text=b"b.png\n"), False),
    "list that is none": (partial(listed, text=b"a.png\n\0"), False),
    "column": (partial(table_of, picture=PLAIN), True),
    "column image among others": (partial(table_of, conditioning_image=OTHER, image=PLAIN), True),
    "column asked for": (partial(table_of, column="#b", a=OTHER, b=PLAIN), True),
    "columns, neither called image": (partial(table_of, a=OTHER, b=PLAIN), False),
    "column that is not there": (partial(table_of, column="#c", a=PLAIN), False),
    "column without an image": (partial(table_of, image=None), False),
    "column of rubbish": (partial(table_of, image=b"rubbish"), False),
}  # fmt: skip
CASES = [
    *pillow_cases(), *png_cases(), *tiff_cases(), *file_cases(), *orientation_cases(),
    *((name, place, COLOUR if read else None) for name, (place, read) in PLACES.items()),
]  # fmt: skip


@pytest.mark.parametrize(("where", "expected"), [case[1:] for case in CASES], ids=[ascii(case[0]) for case in CASES])
def test_right_pixels_or_a_line(
    where: bytes | Callable[[Path], Path | str], expected: np.ndarray | None, tmp_path: Path
) -> None:
    """Equal pixels, which score 100 dB, or one line that names the file; bytes are those of a file x.img."""
    said = r"^x\.img: |^x-train row 0: |" + re.escape(str(tmp_path))
    with pytest.raises(InputError, match=said) if expected is None else contextlib.nullcontext() as refused:
        if isinstance(where, bytes):
            image, _ = decode(where, "x.img", upright=True)
        else:
            image, _ = open_source(where(tmp_path)).load(0)
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image, dtype=float) - expected).max() <= 1  # roundings of Pillow's compositing
    assert expected is not None or "\n" not in str(refused.value)


def test_the_table_is_long() -> None:
    assert len({name for name, *_ in CASES}) == len(CASES) >= 120


@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_turns_only_where_it_is_asked_for(format: str, orientation: int) -> None:
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    for order in "<>":
        data = encoded(Image.fromarray(COLOUR), format, exif=exif(orientation, order=order), **options)
        plain, notes = decode(data, "x")
        assert notes == 0
        turned, notes = decode(data, "x", upright=True)
        assert notes == (TURNED if orientation in range(2, 9) else 0)
        expected = UPRIGHT.get(orientation, UPRIGHT[1])(np.asarray(plain))
        assert np.array_equal(np.asarray(turned), expected)


@pytest.mark.filterwarnings("ignore")
def test_no_other_metadata_is_in_the_way() -> None:
    """Tags of any number, type, count and content in front of the orientation: equal pixels, turned as it says."""
    rng = np.random.default_rng(0)
    plain = encoded(Image.fromarray(COLOUR), "JPEG")
    expected = np.asarray(decode(plain, "x")[0])
    for _ in range(1000):
        drawn = [
            (int(rng.choice([0x8825, 0x8769, 0x011A, 0x0100, rng.integers(1 << 16)])), int(rng.integers(14)),
             int(rng.choice([0, 1, 2, 1000, (1 << 32) - 1])), rng.bytes(4))
            for _ in range(rng.integers(4))
        ]  # fmt: skip
        drawn = [entry for entry in drawn if entry[0] != 0x0112]
        block = exif(6, *drawn)
        data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
        assert np.array_equal(np.asarray(decode(data, "x")[0]), expected)
        assert np.array_equal(np.asarray(decode(data, "x", upright=True)[0]), np.rot90(expected, -1))
        with contextlib.suppress(InputError):
            decode(plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + rng.bytes(len(block)) + plain[2:], "x")


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker_is_read_and_a_shorter_one_is_not(progressive: bool) -> None:
    data = encoded(Image.fromarray(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8))), "JPEG", progressive=progressive)
    whole, notes = decode(data, "x")
    assert notes == 0
    if not progressive:  # of which a missing scan would not be seen
        mended, notes = decode(data[:-2], "x")
        assert notes == MENDED
        assert np.array_equal(np.asarray(whole), np.asarray(mended))
    for length in range(len(data) - 3, 100, -len(data) // 20):
        with pytest.raises(InputError, match=r"x: (damaged|not a readable image)"):
            decode(data[:length], "x")


def test_metadata_of_a_png_may_be_of_any_size() -> None:
    chunk = b"Comment\0\0" + zlib.compress(b" " * 3_000_000)
    image, notes = decode(png(8, 2, COLOUR, (b"zTXt", chunk)), "x")
    assert notes == MENDED
    assert np.array_equal(np.asarray(image), COLOUR)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken_and_noted(format: str) -> None:
    first, second = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    image, notes = decode(encoded(first, format, save_all=True, append_images=[second]), "x")
    assert notes == FIRST_FRAME
    assert image.getpixel((4, 4))[0] > 150


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_transparency_is_noted_where_something_is_transparent(format: str) -> None:
    for alpha, note in ((0, ON_WHITE), (255, 0)):
        image, notes = decode(encoded(Image.new("RGBA", (16, 16), (9, 90, 9, alpha)), format), "x")
        assert notes == note
        assert alpha or image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_values_without_a_stated_meaning_are_refused(mode: str) -> None:
    with pytest.raises(InputError, match=r"x: (32-bit|Lab)"):
        decode(encoded(Image.new(mode, (4, 4)), "TIFF"), "x")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "JPEG2000"])
def test_truncated_files_are_named_and_any_flipped_byte_is_an_image_or_a_line(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    for length in (len(data) // 2, len(data) * 3 // 4, 5, 0):
        with pytest.raises(InputError, match=r"^x\.img: (damaged|not a readable image)"):
            decode(data[:length], "x.img")
    rng = np.random.default_rng(1)
    for at in rng.integers(0, min(len(data), 3000), 60):
        broken = bytearray(data)
        broken[at] ^= int(rng.integers(1, 256))
        with contextlib.suppress(InputError):
            decode(bytes(broken), "x", upright=True)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (300, 100):  # Pillow would warn at the first and refuse at the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match="x: more than Pillow's limit"):
            decode(encoded(Image.new("L", (20, 20)), "PNG"), "x")


def test_every_type_that_pillow_itself_can_read_is_read() -> None:
    assert {".jpg", ".png", ".webp", ".avif", ".tiff", ".gif", ".jp2", ".ppm", ".tga", ".bmp"} <= readable_suffixes()
    assert ENLARGED
