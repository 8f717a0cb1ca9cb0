"""Tars and zips whose members are read in place, without unpacking."""

import bz2
import gzip
import hashlib
import logging
import lzma
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tokbench.data.decode import SUFFIXES
from tokbench.errors import InputError
from tokbench.records.cache import cache_folder, load_cached, printable, save_cached, stamp_of

log = logging.getLogger("tokbench")


@dataclass(frozen=True)
class Member:
    """A file inside an archive: where its bytes lie and how they are packed (zip's method numbers)."""

    name: str
    offset: int
    packed: int
    size: int
    method: int = zipfile.ZIP_STORED
    crc: int | None = None


def list_archive(path: Path) -> list[Member]:
    """Images in a tar (also a tar of tars, as ImageNet's training set) or zip, sorted; kept for the next time.

    InputError if a name is absolute or climbs out of the archive, or if it is packed in a way that is not read here.
    """

    key = f"archive {path.resolve()}"
    try:
        stamp = stamp_of(path)
        kept = load_cached(key)
        if kept is not None and kept[0] == stamp:
            return [Member(*row) for row in kept[1]]
        members = sorted(_list_zip(path) if zipfile.is_zipfile(path) else _list_tar(path), key=lambda m: m.name)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
        raise InputError(f"{path}: not a readable tar or zip ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    save_cached(key, [stamp, [astuple(member) for member in members]])
    return members


def _wanted(name: str, archive: Path) -> bool:
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or parts[0].endswith(":") or ".." in parts:
        raise InputError(
            f"{archive}: refused, the name {printable(name)!r} leads out of it; make it again with relative names"
        )
    hidden = any(part.startswith(".") and part != "." for part in parts) or parts[0] == "__MACOSX"
    return not hidden and os.path.splitext(name)[1].lower() in SUFFIXES


def _list_tar(path: Path) -> Iterable[Member]:
    with open(path, "rb") as file:
        yield from _tar_members(file, 0, "", path)


def _tar_members(file: BinaryIO, start: int, prefix: str, path: Path) -> Iterable[Member]:
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            name = prefix + member.name.removeprefix("./")
            wanted = _wanted(name, path)
            if member.isreg() and not member.issparse():
                if wanted:
                    yield Member(name, member.offset_data, member.size, member.size)
                elif name.endswith(".tar"):
                    yield from _tar_members(file, member.offset_data, name.removesuffix(".tar") + "/", path)
            tar.members = []  # type: ignore[attr-defined] # else every header of a million files stays in memory


def _list_zip(path: Path) -> Iterable[Member]:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            if not _wanted(info.filename, path) or info.is_dir():
                continue
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"{path}: {info.filename} is encrypted or oddly compressed; make a plain zip of it")
            file.seek(info.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            offset = info.header_offset + 30 + name_length + extra_length
            yield Member(info.filename, offset, info.compress_size, info.file_size, info.compress_type, info.CRC)


def unpacked(path: Path) -> Path:
    """A tar itself; of a compressed one, which cannot be read in place, a plain copy in the cache."""
    try:
        with open(path, "rb") as file:
            magic = file.read(6)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    opener: Any = next((opener for start, opener in openers.items() if magic.startswith(start)), None)
    if opener is None:
        return path
    key = hashlib.sha256(f"{path.resolve()} {stamp_of(path)}".encode()).hexdigest()[:24]
    plain = cache_folder() / "archives" / f"{key}.tar"
    if not plain.exists():
        log.warning("%s: compressed, unpacked once to %s", path, plain)
        partial = plain.with_suffix(f".{os.getpid()}")
        try:
            plain.parent.mkdir(parents=True, exist_ok=True)
            with opener(path, "rb") as packed, open(partial, "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            os.replace(partial, plain)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise InputError(f"{path}: cannot be unpacked to {plain} ({error})") from error
        finally:
            partial.unlink(missing_ok=True)
    return plain
