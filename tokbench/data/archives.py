"""Tars and zips whose members are read in place, without unpacking."""

import os
import posixpath
import tarfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from tokbench.data.decode import readable_suffixes
from tokbench.errors import InputError, unreadable
from tokbench.records.cache import load_cached, printable, save_cached, stamp_of

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # how gzip, bzip2, xz and zstd begin
TEXTS = frozenset(  # what lies beside images and is none: not worth a line
    (".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".html", ".yaml", ".yml", ".lst", ".log", ".py", ".cls")
)


@dataclass(frozen=True)
class Member:
    """A file inside a tar: where its bytes lie."""

    name: str
    offset: int
    size: int


def list_tar(path: Path) -> tuple[list[Member], list[str]]:
    """Images in a tar, also in a tar of tars (as ImageNet's training set), sorted, and what was left out, in words.

    Links to members are members. Kept for the next time. InputError if it is compressed or damaged, or if a name is
    absolute or climbs out of it.
    """
    key = f"tar {path.resolve()}"
    try:
        stamp = stamp_of(path)
        kept = load_cached(key)
        if kept is not None and kept[0] == stamp:
            return [Member(*row) for row in kept[1]], kept[2]
        with open(path, "rb") as file:
            if file.read(6).startswith(COMPRESSED):
                raise InputError(f"{path}: a compressed tar cannot be read in place; unpack it, or make a .tar or .zip")
            found = dict(_scan(file, 0, "", path))
    except (tarfile.TarError, OSError) as error:
        raise InputError(unreadable(path, "tar", error)) from error
    names, problems = readable(found)
    members = {}
    for name in names:
        target: Member | str | None = found[name]
        for _ in range(10):  # a link to a link
            target = found.get(target) if isinstance(target, str) else target
        if isinstance(target, Member):
            members[name] = Member(name, target.offset, target.size)
    if broken := len(names) - len(members):
        problems.append(f"{broken} links lead to nothing in it")
    members, second = _one_a_sample(members)
    save_cached(key, [stamp, [astuple(member) for member in members.values()], problems + second])
    return list(members.values()), problems + second


def _scan(file: BinaryIO, start: int, prefix: str, path: Path) -> Iterator[tuple[str, Member | str]]:
    """Names of files with where they lie, and of links with what they lead to; nested tars included."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            name = prefix + inside(member.name, path).removeprefix("./")
            if member.islnk():
                yield name, prefix + member.linkname.removeprefix("./")
            elif member.issym():
                yield name, posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif member.isreg() and not member.issparse():
                if name.endswith(".tar"):
                    yield from _scan(file, member.offset_data, name.removesuffix(".tar") + "/", path)
                elif not name.endswith((".json", ".txt", ".cls")):  # a WebDataset's labels are many
                    yield name, Member(name, member.offset_data, member.size)
            tar.members = []  # type: ignore[attr-defined] # else every header of a million files stays in memory


def _one_a_sample(members: dict[str, Member]) -> tuple[dict[str, Member], list[str]]:
    """Of `x.jpg` and `x.seg.png`, which WebDataset counts as one sample, the first alone; and a line on the others."""

    def parts(name: str) -> tuple[str, str]:
        folder, _, file = name.rpartition("/")
        stem, _, ending = file.partition(".")
        return f"{folder}/{stem}", ending

    samples = {parts(name)[0] for name in members if "." not in parts(name)[1]}
    kept = {n: member for n, member in members.items() if "." not in parts(n)[1] or parts(n)[0] not in samples}
    others = Counter(parts(name)[1] for name in members.keys() - kept.keys())
    return kept, [
        f"{n} images .{ending} beside their sample's own are not read" for ending, n in sorted(others.items())
    ]


def readable(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Images among the names of files, sorted, and a line on what is not read; hidden files and texts are neither."""
    wanted, others = [], Counter[str]()
    for name in names:
        parts = name.split("/")
        if any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX":
            continue
        suffix = os.path.splitext(name)[1].lower()
        if suffix in readable_suffixes():
            wanted.append(name)
        elif suffix and suffix not in TEXTS:
            others[suffix] += 1
    problems = []
    if others:
        listed = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common())
        problems.append(f"{others.total()} files of types that are not read here: {listed}")
    if decomposed := sum(not unicodedata.is_normalized("NFC", name) for name in wanted):
        problems.append(f"{decomposed} names in Unicode's decomposed form (NFD); their ids are composed (NFC)")
    return sorted(wanted), problems


def list_zip(path: Path) -> tuple[list[str], list[str]]:
    """Names of the images in a zip, sorted, and what was left out. InputError as for `list_tar`."""
    try:
        names = [inside(info.filename, path) for info in opened_zip(path).infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(unreadable(path, "zip", error)) from error
    return readable(names)


def opened_zip(path: Path) -> zipfile.ZipFile:
    """Open for reading, once in every process: forked readers must not share a position. Raises OSError."""
    return _opened_zip(path, stamp_of(path), os.getpid())


@lru_cache(maxsize=4)
def _opened_zip(path: Path, stamp: str, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def inside(name: str, archive: Path) -> str:
    """The name; InputError if it leads out of its archive."""
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or parts[0].endswith(":") or ".." in parts:
        raise InputError(
            f"{archive}: refused, the name {printable(name)!r} leads out of it; make it again with relative names"
        )
    return name
