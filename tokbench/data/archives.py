"""Tars and zips whose members are read in place, without unpacking."""

import os
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from tokbench.data.decode import SUFFIXES
from tokbench.errors import InputError
from tokbench.records.cache import load_cached, printable, save_cached, stamp_of

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # how gzip, bzip2, xz and zstd begin


@dataclass(frozen=True)
class Member:
    """A file inside a tar: where its bytes lie."""

    name: str
    offset: int
    size: int


def list_tar(path: Path) -> list[Member]:
    """Images in a tar, also in a tar of tars (as ImageNet's training set), sorted; kept for the next time.

    InputError if it is compressed or damaged, or if a name is absolute or climbs out of it.
    """
    key = f"tar {path.resolve()}"
    try:
        stamp = stamp_of(path)
        kept = load_cached(key)
        if kept is not None and kept[0] == stamp:
            return [Member(*row) for row in kept[1]]
        with open(path, "rb") as file:
            if file.read(6).startswith(COMPRESSED):
                raise InputError(f"{path}: a compressed tar cannot be read in place; unpack it, or make a .tar or .zip")
            members = sorted(_tar_members(file, 0, "", path), key=lambda member: member.name)
    except tarfile.TarError as error:
        raise InputError(f"{path}: not a readable tar ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    save_cached(key, [stamp, [astuple(member) for member in members]])
    return members


def _tar_members(file: BinaryIO, start: int, prefix: str, path: Path) -> Iterator[Member]:
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            name = prefix + member.name.removeprefix("./")
            wanted = _wanted(name, path)
            if member.isreg() and not member.issparse():
                if wanted:
                    yield Member(name, member.offset_data, member.size)
                elif name.endswith(".tar"):
                    yield from _tar_members(file, member.offset_data, name.removesuffix(".tar") + "/", path)
            tar.members = []  # type: ignore[attr-defined] # else every header of a million files stays in memory


def list_zip(path: Path) -> list[str]:
    """Names of the images in a zip, sorted. InputError as for `list_tar`."""
    try:
        names = opened_zip(path).namelist()
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: not a readable zip ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return sorted(name for name in names if _wanted(name, path))


def opened_zip(path: Path) -> zipfile.ZipFile:
    """Open for reading, once in every process: forked readers must not share a position. Raises OSError."""
    return _opened_zip(path, stamp_of(path), os.getpid())


@lru_cache(maxsize=4)
def _opened_zip(path: Path, stamp: str, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _wanted(name: str, archive: Path) -> bool:
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or parts[0].endswith(":") or ".." in parts:
        raise InputError(
            f"{archive}: refused, the name {printable(name)!r} leads out of it; make it again with relative names"
        )
    hidden = any(part.startswith(".") and part != "." for part in parts) or parts[0] == "__MACOSX"
    return not hidden and os.path.splitext(name)[1].lower() in SUFFIXES
