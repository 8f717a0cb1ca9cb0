"""Damaged files for everything that reads others' bytes: `make fuzz SECONDS=300`, or `python -m tests.fuzz 300 NAME`.

Hypothesis changes files that are right; each reader must give something or one line (InputError, CellError). A
traceback, half a minute, a gigabyte or the death of the process is a find: its file is kept below .fuzz/, and the
status is 1.
"""

import gzip
import io
import json
import logging
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from baselines.hub import read_tensors
from tests.made_records import per_image, record, rows
from tokbench.checkpoints import read_checkpoint
from tokbench.comparison.differences import compare
from tokbench.data.decode import decode
from tokbench.data.open import open_source
from tokbench.errors import CellError, InputError
from tokbench.generation import score
from tokbench.generation.score import read_statistics
from tokbench.records.files import read_per_image, slug
from tokbench.records.result import SpeedResult, Stage, read_result, read_speed, to_json
from tokbench.records.samples import SampleStore
from tokbench.report.build import Report, text
from tokbench.report.collect import gather
from tokbench.report.speed import speed_tables
from tokbench.weights.files import load

SECONDS, MEMORY = 30, 1 << 30  # of one file
KEPT = Path(".fuzz")
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)


def image(format: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def images() -> list[bytes]:
    plain = [image(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "JPEG2000", "TGA", "PPM", "AVIF")]
    exif = Image.Exif()
    exif[0x0112] = 6
    more = [image("GIF", "P"), image("PNG", "P", transparency=3), image("PNG", "RGBA"), image("PNG", "I;16")]
    return [*plain, *more, image("JPEG", exif=exif, progressive=True), image("TIFF", compression="tiff_lzw")]


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("a.png", "b/c.jpg"):
            data = image("PNG")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        file.addfile(link)
    return buffer.getvalue()


def zipped(kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as file:
        file.writestr("a.png", image("PNG"))
        file.writestr("b/c.jpg", image("JPEG"))
    return buffer.getvalue()


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def arrays(**values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **values)  # type: ignore[arg-type]
    return buffer.getvalue()


def look(path: Path) -> None:
    source = open_source(path)
    source.facts()
    for index in range(min(len(source), 3)):
        source.load(index)


def shard(path: Path) -> None:
    store = SampleStore(path.parent)
    for name in store.columns:
        store.column(name)
    if set(store.ids) == store.done([], [KEPT_FEATURE]) != set():
        store.features(*KEPT_FEATURE)


def statistics(path: Path) -> None:
    _, images = read_statistics(path)
    if images is not None:
        list(images.batches(range(min(images.shape[0], 3))))


def told(path: Path) -> None:
    """Everything that is told of a record."""
    read_result(path)
    entries, _, _ = gather(path)
    for format in ("table", "csv"):
        text(Report(entries), format)
    compare(path, path)


@dataclass(frozen=True)
class Target:
    """A reader, what its files end with, and bytes that are right; `pack` puts them, damaged, into a container."""

    read: Callable[[Path], object]
    suffix: str
    good: Callable[[], list[bytes]]
    pack: Callable[[bytes], bytes] = bytes


def members(packed: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(packed)) as file:
        return {name: file.read(name) for name in file.namelist()}


def inside(target: Target, name: str) -> Target:
    """A target whose zip and its checksums are right, but not what one of its members says."""
    found = members(target.good()[0])

    def pack(data: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for other, kept in found.items():
                file.writestr(other, data if other == name else kept)
        return buffer.getvalue()

    return replace(target, good=lambda: [found[name]], pack=pack)


TABLE = rows(0, 4, 0.0)
KEPT_FEATURE = ("fake", "inception")
TENSORS = {"encoder.a": torch.zeros(3, 2), "b": torch.ones(1, dtype=torch.float16)}
STATISTICS = {"mu": np.zeros(4), "sigma": np.eye(4), "arr_0": np.zeros((2, 8, 8, 3), np.uint8)}
SHARD = {"ids": np.array(["a", "b"]), "columns/psnr": np.ones(2), "fake/inception": np.ones((2, 3), "<f4")}
STAGE = Stage(1, 9.5, 0.6, 100.0, 99.0, 101.0, None, None, {"1": 9.5})
SPEED = SpeedResult(record("row").tokenizer, 256, "CPU", {"dtype": "float32"}, {"decode": STAGE}, {"decode": 9})
TARGETS = {
    "image": Target(lambda path: decode(path.read_bytes(), "x", upright=True), ".img", images),
    "tar": Target(look, ".tar", lambda: [tar()]),
    "zip": Target(look, ".zip", lambda: [zipped(), zipped(zipfile.ZIP_STORED)]),
    "list": Target(look, ".txt", lambda: [b"a.png\nb.png\n", b"\xef\xbb\xbfa.png\r\n"]),
    "safetensors": Target(lambda path: (read_checkpoint(path), read_tensors(path, "x")), ".safetensors",
                          lambda: [save(TENSORS), save(TENSORS, {"tokbench": json.dumps({"model": "ssdd"})})]),
    "torch": Target(lambda path: (read_tensors(path, "x"), load(path)), ".pt",
                    lambda: [saved(TENSORS), saved({"ema": TENSORS})]),
    "record": Target(told, ".json", lambda: [to_json(record("row")).encode()]),
    "speed": Target(lambda path: speed_tables([read_speed(path)]), ".json", lambda: [to_json(SPEED).encode()]),
    "rows": Target(read_per_image, ".csv.gz", lambda: [per_image(TABLE)]),
    "statistics": Target(statistics, ".npz", lambda: [arrays(**STATISTICS)]),
    "store": Target(shard, ".npz", lambda: [arrays(**SHARD)]),
}  # fmt: skip
TARGETS |= {
    "rows inside": replace(TARGETS["rows"], good=lambda: [gzip.decompress(per_image(TABLE))], pack=gzip.compress),
    "torch inside": inside(TARGETS["torch"], "archive/data.pkl"),
    **{f"{target} {name}": inside(TARGETS[target], f"{name}.npy")
       for target, names in (("statistics", STATISTICS), ("store", SHARD)) for name in names},
}  # fmt: skip


def damaged(good: list[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes exchanged, put in, left out, doubled or set to the ends of their range, up to eight times."""
    change = st.tuples(st.sampled_from(["set", "put", "cut", "double", "end"]), st.floats(0, 1), st.binary(max_size=8))

    def apply(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
        for kind, place, new in changes:
            at = int(place * len(data))
            if kind == "set":
                data = data[:at] + new + data[at + len(new) :]
            elif kind == "put":
                data = data[:at] + new + data[at:]
            elif kind == "cut":
                data = data[:at] + data[at + 16 * len(new) :]
            elif kind == "double":
                data = data[:at] + 2 * data[at : at + 16 * len(new)] + data[at + 16 * len(new) :]
            else:
                data = data[:at] + len(new) * b"\xff" + data[at + len(new) :] if place < 0.95 else data[:at]
        return data

    return st.builds(apply, st.sampled_from(good), st.lists(change, max_size=8))


class Hang(BaseException):
    """More time than a file may take."""


def stop(_: int, __: FrameType | None) -> None:
    raise Hang(f"more than {SECONDS} s")


def try_one(target: Target, path: Path) -> None:
    """Read a file, however it is. Raises whatever is no line, for more time or memory too."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        target.read(path)
    except (InputError, CellError) as error:
        if len(str(error).splitlines()) != 1:
            raise ValueError("not one line") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MEMORY, f"{grown >> 20} MB"


def fuzz(name: str, seconds: float) -> int:
    """Damage files of one reader for so long; 1 for a find."""
    target, until, number, tried = TARGETS[name], time.monotonic() + seconds, 0, 0
    signal.signal(signal.SIGALRM, stop)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * MEMORY, resource.RLIM_INFINITY))  # a find is no fault of others
    score.INCEPTION_DIM = len(STATISTICS["mu"])
    warnings.simplefilter("ignore")
    logging.disable()
    good = target.good()
    KEPT.mkdir(exist_ok=True)
    kept = KEPT / f"{slug(name)}{target.suffix}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"file{target.suffix}")

        def one(data: bytes) -> None:
            nonlocal tried
            tried += 1
            data = target.pack(data)
            path.write_bytes(data)
            kept.write_bytes(data)  # the one that is being read, should the process die
            try_one(target, path)

        while time.monotonic() < until:
            rule = settings(max_examples=100, database=None, deadline=None, suppress_health_check=list(HealthCheck))
            try:
                seed(number)(rule(given(damaged(good))(one)))()
            except BaseException:  # anything but a line is a find
                traceback.print_exc()
                print(f"find: {kept}", flush=True)
                return 1
            number += 1
    kept.unlink()
    print(f"{name}: {tried} files", flush=True)
    return 0


def main(seconds: str = "300", only: str = "") -> int:
    if only:
        return fuzz(only, float(seconds))
    share = str(float(seconds) / len(TARGETS))
    return max(abs(subprocess.run([sys.executable, "-m", "tests.fuzz", share, name]).returncode) for name in TARGETS)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
