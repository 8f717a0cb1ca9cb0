"""Data sets that have a name everywhere: what they are, under which licence, and where their files come from."""

import os
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tokbench.data.archives import inside, readable
from tokbench.data.sources import Source
from tokbench.errors import InputError
from tokbench.records.cache import cache_folder
from tokbench.records.files import writable
from tokbench.weights.files import WeightsError, offline
from tokbench.weights.transfer import download, megabytes


@dataclass(frozen=True)
class DataSet:
    """`files` are addresses of images or of zips of them; without any it is not fetched, and `by_hand` says how."""

    name: str
    summary: str
    num_images: int
    licence: str
    size: int = 0  # bytes downloaded, about; shown only
    files: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()  # of the files, where their publisher states them
    by_hand: str = ""
    fingerprint: str = ""  # of the images, where it is known to us; checked whenever the set is opened


_ETH = "https://data.vision.ee.ethz.ch/cvl"
SETS = {
    one.name: one
    for one in (
        DataSet("kodak", "Kodak PhotoCD, 768x512", 24, "released by Kodak for unrestricted use", 15_400_000,
                tuple(f"https://r0k.us/graphics/kodak/kodak/kodim{n:02d}.png" for n in range(1, 25))),
        DataSet("clic2020-test", "CLIC 2020, mobile and professional test images", 428, "Unsplash licence",
                1_613_433_785,
                (f"{_ETH}/clic/test/CLIC2020Mobile_test.zip", f"{_ETH}/clic/test/CLIC2020Professional_test.zip")),
        DataSet("div2k-val", "DIV2K, high-resolution validation images", 100, "academic research only", 448_993_893,
                (f"{_ETH}/DIV2K/DIV2K_valid_HR.zip",)),
        DataSet("coco-val2017", "COCO 2017 validation images", 5000, "Flickr's terms; annotations CC BY 4.0",
                815_585_330, ("http://images.cocodataset.org/zips/val2017.zip",)),
        DataSet("imagenet-val", "ILSVRC 2012 validation images", 50_000, "non-commercial research and education",
                by_hand="register at image-net.org and put ILSVRC2012_img_val.tar there, or write imagenet:ROOT"),
        DataSet("ffhq", "Flickr-Faces-HQ, 1024x1024", 70_000, "CC BY-NC-SA 4.0",
                by_hand="get images1024x1024 by github.com/NVlabs/ffhq-dataset and put it there"),
        DataSet("celebahq", "CelebA-HQ, 1024x1024", 30_000, "non-commercial research and education",
                by_hand="make it as github.com/tkarras/progressive_growing_of_gans says and put the images there"),
    )
}  # fmt: skip


def folder_of(name: str) -> Path:
    """Where a named data set lies: below TOKBENCH_DATA, or in the cache."""
    root = os.environ.get("TOKBENCH_DATA")
    return (Path(root).expanduser() if root else cache_folder() / "datasets") / name


def find_set(name: str) -> DataSet:
    """InputError with all names for one that is not in the table."""
    if name not in SETS:
        raise InputError(f"unknown data set {name!r}: choose from {', '.join(SETS)}")
    return SETS[name]


def describe_sets() -> list[str]:
    """For `tokbench data list`: two lines a data set."""
    lines = []
    for one in SETS.values():
        size = megabytes(one.size) if one.files else "not fetched"
        lines.append(f"{one.name:<14} {one.num_images:>6,} images  {size:>11}  {one.summary}; {one.licence}")
        here = folder_of(one.name)
        how = f"tokbench data fetch {one.name}" if one.files else f"{one.by_hand}: {here}"
        lines.append(f"{'':<14} {f'at {here}' if here.is_dir() else how}")
    return lines


def require_set(name: str) -> Path:
    """Its folder; InputError that says how to get it."""
    one, here = find_set(name), folder_of(name)
    if not here.is_dir():
        how = (
            f"`tokbench data fetch {name}` gets it ({megabytes(one.size)}; {one.licence})" if one.files else one.by_hand
        )
        raise InputError(f"{name}: not in {here}; {how}")
    return here


def check_set(source: Source) -> None:
    """InputError if images under a set's name are not its own; a line among its problems for another number of them."""
    one = SETS[source.name]
    if len(source) != one.num_images:
        source.problems.append(f"{len(source)} images; {one.name} has {one.num_images}")
    if one.fingerprint and source.fingerprint() != one.fingerprint:
        raise InputError(f"{source.root}: not the images of {one.name}; remove it and fetch it again")


def fetch_set(name: str) -> Path:
    """Download and unpack a data set; the folder. Goes on where an earlier attempt stopped.

    InputError if it cannot be had; the folder appears when everything is in it.
    """
    one, here = find_set(name), folder_of(name)
    if here.is_dir():
        return here
    if not one.files or offline():
        reason = "TOKBENCH_OFFLINE is set" if one.files else one.by_hand
        raise InputError(f"{name}: not fetched into {here}: {reason}")
    print(
        f"tokbench: {name}: {one.num_images:,} images, {megabytes(one.size)}; licence: {one.licence}", file=sys.stderr
    )
    aside = here.with_name(f".{name}")
    images = aside / "images"
    with writable(here):
        images.mkdir(parents=True, exist_ok=True)
        for address, sha256 in zip(one.files, one.sha256 or [""] * len(one.files), strict=True):
            file = images / address.rpartition("/")[2]
            try:
                if not file.exists():
                    download(address, aside / f"{file.name}.part", sha256, f"{name}, {file.name}").replace(file)
            except WeightsError as error:
                raise InputError(f"{error}; the same command goes on from what is there") from None
        for file in images.glob("*.zip"):
            _unpack(file, images)
        images.replace(here)
        shutil.rmtree(aside)
    return here


def _unpack(file: Path, folder: Path) -> None:
    """The images of a zip into a folder of its name, in place of the zip."""
    try:
        with zipfile.ZipFile(file) as archive:
            names, _ = readable(inside(info.filename, file) for info in archive.infolist() if not info.is_dir())
            archive.extractall(folder / file.stem, names)
    except zipfile.BadZipFile as error:
        file.unlink()
        raise InputError(f"{file.name}: damaged ({error}); run the same command again") from None
    file.unlink()
