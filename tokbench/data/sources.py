"""Where images come from: folders, lists, archives read in place, Hugging Face data sets. One id per sample, in order.

A sample's id is its path below the source's root without extension, so that two files of one id are refused; for
ImageNet it is the file's stem, so that a flat folder, class folders and the official archive are one data set.
"""

import hashlib
import os
import re
import sys
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from tokbench.data.archives import Member, opened_zip, readable
from tokbench.data.decode import SUFFIXES, decode, open_header, orientation
from tokbench.errors import InputError, first_line
from tokbench.protocols import Protocol, Resolution, sides_of
from tokbench.records.cache import load_cached, printable, save_cached, stamp_of


@dataclass(frozen=True)
class Facts:
    """What a file's bytes say before it is decoded. `problem` is the reason why it cannot be used, or empty."""

    sha256: str = ""
    width: int = 0
    height: int = 0
    format: str = ""
    mode: str = ""
    orientation: int = 1  # EXIF's: 1 is upright
    problem: str = ""


@dataclass
class Source:
    """Samples by index. Subclasses say how the bytes of an entry are read."""

    name: str  # [a-z0-9._-]+
    split: str | None
    root: Path
    ids: list[str]
    entries: list[Any]
    problems: list[str] = field(default_factory=list)  # what listing it showed, for the user to know
    _facts: list[Facts] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def read_bytes(self, index: int) -> bytes:
        """The file as it is stored. Raises OSError."""
        raise OSError("a Source has no bytes of its own")

    def where(self, index: int) -> str:
        """What a message calls this sample."""
        return str(self.root / self.ids[index])

    def stamp(self, index: int) -> str:
        """Changes when the bytes do (size and time), without reading them; "" where that cannot be told."""
        return ""

    def load(self, index: int, *, upright: bool = False, least: int = 0) -> tuple[Image.Image, int]:
        """The RGB image and notes (bits of decode.NOTES), turned as EXIF says if `upright`; `least` as for `decode`.

        InputError naming the file if it cannot be used.
        """
        try:
            data = self.read_bytes(index)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{self.where(index)}: cannot be read ({reason}); restore it") from error
        return decode(data, self.where(index), upright=upright, least=least)

    def read(self, index: int, *, least: int = 0) -> Image.Image:
        """The RGB image; `least` as for `decode`. InputError naming the file if it cannot be used."""
        return self.load(index, least=least)[0]

    def facts(self) -> list[Facts]:
        """Of every sample. Files are read once; a later call asks only whether size or time has changed."""
        if self._facts is None:
            self._facts = _survey(self)
        return self._facts

    def adopt(self, facts: list[Facts]) -> None:
        """Take the facts that another process found. InputError if they are not of these samples."""
        if len(facts) != len(self):
            raise InputError(f"{self.root}: {len(self)} images seen from here, {len(facts)} from the first process")
        self._facts = facts

    def fingerprint(self) -> str:
        """sha256 over (id, sha256 of the file's bytes), in id order."""
        digest = hashlib.sha256()
        for sample, facts in sorted(zip(self.ids, self.facts(), strict=True), key=lambda pair: pair[0]):
            digest.update(f"{sample}\n{facts.sha256}\n".encode())
        return digest.hexdigest()

    def sizes(self, protocol: Protocol) -> list[tuple[int, int]]:
        """(width, height) of every image as the protocol turns it; (0, 0) of those that cannot be used."""
        turned = protocol.orientation == "apply"
        return [(f.height, f.width) if turned and f.orientation >= 5 else (f.width, f.height) for f in self.facts()]

    def below(self, resolution: Resolution, protocol: Protocol) -> list[int]:
        """Indices of images that would have to be enlarged."""
        size, facts = sides_of(resolution), self.facts()
        if size is None:
            return []
        sizes = enumerate(self.sizes(protocol))
        return [i for i, (w, h) in sizes if not facts[i].problem and (w < size[0] or h < size[1])]

    def sort(self, among: Iterable[int] | None = None) -> None:
        """Bring the samples, or only those at these indices, into the order of their ids."""
        order = sorted(range(len(self)) if among is None else among, key=self.ids.__getitem__)
        self.ids, self.entries = [self.ids[i] for i in order], [self.entries[i] for i in order]
        if self._facts is not None:
            self._facts = [self._facts[i] for i in order]

    def limit(self, num_images: int) -> None:
        """Keep the N samples whose ids have the smallest sha256: a fair choice, stable when the set grows."""
        if num_images < 1:
            raise InputError(f"--limit {num_images}: must be at least 1")
        if num_images < len(self):
            by_hash = sorted(range(len(self)), key=lambda i: hashlib.sha256(self.ids[i].encode()).digest())
            self.sort(by_hash[:num_images])
            self.name = f"{self.name}-{num_images}"


class FileSource(Source):
    """Files on disk; an entry is a path below the root, or an absolute one."""

    def read_bytes(self, index: int) -> bytes:
        return self.root.joinpath(self.entries[index]).read_bytes()

    def where(self, index: int) -> str:
        return printable(str(self.root / self.entries[index]))

    def stamp(self, index: int) -> str:
        return stamp_of(self.root / self.entries[index])


class TarSource(Source):
    """Members of a tar, read in place; an entry is a Member."""

    def stamp(self, index: int) -> str:
        return stamp_of(self.root)

    def read_bytes(self, index: int) -> bytes:
        return read_member(self.root, self.entries[index])

    def where(self, index: int) -> str:
        return printable(f"{self.root}:{self.entries[index].name}")


class ShardSource(Source):
    """Members of a folder's tars, WebDataset's layout, read in place; an entry is a tar's name and a Member.

    In place, not as a stream: sample number k of a training run is any image, whatever was read before it.
    """

    def stamp(self, index: int) -> str:
        return stamp_of(self.root / self.entries[index][0])

    def read_bytes(self, index: int) -> bytes:
        shard, member = self.entries[index]
        return read_member(self.root / shard, member)

    def where(self, index: int) -> str:
        shard, member = self.entries[index]
        return printable(f"{self.root / shard}:{member.name}")


def read_member(tar: Path, member: Member) -> bytes:
    """The bytes of a tar's member. Raises OSError."""
    with open(tar, "rb", buffering=0) as file:  # a file of its own: forked readers must not share a position
        file.seek(member.offset)
        data = file.read(member.size)
    if len(data) != member.size:
        raise OSError("the archive ends inside it")
    return data


class ZipSource(Source):
    """Members of a zip, read in place; an entry is a name."""

    def stamp(self, index: int) -> str:
        return stamp_of(self.root)

    def read_bytes(self, index: int) -> bytes:
        try:
            return opened_zip(self.root).read(self.entries[index])
        except (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError, NotImplementedError) as error:
            raise OSError(first_line(error)) from error  # damaged, gone, encrypted or oddly packed

    def where(self, index: int) -> str:
        return printable(f"{self.root}:{self.entries[index]}")


class HuggingFaceSource(Source):
    """Rows of a `datasets` data set; an entry is a row number."""

    def __init__(self, name: str, split: str, dataset: Any, column: str) -> None:
        super().__init__(name, split, Path(name), [f"{i:08d}" for i in range(len(dataset))], list(range(len(dataset))))
        self.dataset, self.column = dataset, column

    def read_bytes(self, index: int) -> bytes:
        value = self.dataset[self.entries[index]][self.column]
        if isinstance(value, dict):
            path, value = value["path"], value["bytes"]
            value = Path(path).read_bytes() if value is None and path else value
        if not isinstance(value, bytes):
            raise OSError(f"no image in its column {self.column}")
        return value

    def stamp(self, index: int) -> str:
        return str(self.dataset._fingerprint)  # of the data set's files and of what was done to them

    def where(self, index: int) -> str:
        return f"{self.name} row {self.entries[index]}"


def group_columns(source: Source) -> dict[str, list[str]]:
    """What the data says of each sample beside its image, by name: "class" where images lie in folders of classes.

    Of a Hugging Face data set all columns of labels, yes or no, whole numbers and texts that sort images into groups.
    """
    if not isinstance(source, HuggingFaceSource):
        paths = [entry.name if isinstance(entry, Member) else str(entry) for entry in source.entries]
        folders = [PurePath(path).parent.name for path in paths]
        return {"class": folders} if all(folders) else {}
    found = {}
    for name, feature in source.dataset.features.items():
        names = getattr(feature, "names", None)
        if names is None and not re.match("bool|u?int|(large_)?string", str(getattr(feature, "dtype", ""))):
            continue
        column = source.dataset.with_format(None)[name]
        values = [column[row] for row in source.entries]
        texts = [str(value) if names is None or value in (None, -1) else names[value] for value in values]
        if 2 * len(set(texts)) <= len(texts):
            found[name] = texts
    return found


def class_labels(source: Source) -> tuple[list[int], list[str]]:
    """A label for every sample, and the classes' names: the label column of a Hugging Face data set, else the folders
    that hold the images. Unlabelled images are of one class."""
    if isinstance(source, HuggingFaceSource):
        if "label" not in source.dataset.column_names:
            return [0] * len(source), ["all"]
        column = source.dataset.with_format(None)["label"]
        labels = [int(column[row]) for row in source.entries]
        names = getattr(source.dataset.features["label"], "names", None)
        return labels, list(names or map(str, range(max(labels) + 1)))
    folders = group_columns(source).get("class")
    if folders is None:
        return [0] * len(source), ["all"]
    classes = sorted(set(folders))
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[folder] for folder in folders], classes


def sample_id(name: str) -> str:
    """A file's name without its type, in Unicode's composed form: a copy that went through a Mac has the same ids."""
    stem, suffix = os.path.splitext(name)
    return unicodedata.normalize("NFC", printable(stem if suffix.lower() in SUFFIXES else name).lstrip("/"))


def unique_ids(names: Sequence[str], where: Path, to_id: Callable[[str], str] = sample_id) -> list[str]:
    """Ids of files; InputError naming two files that share one."""
    ids = [to_id(name) for name in names]
    if len(set(ids)) < len(ids):
        seen: dict[str, str] = {}
        for sample, name in zip(ids, names, strict=True):
            if sample in seen:
                both = printable(f"{seen[sample]} and {name}")
                raise InputError(f"{where}: {both} have the same id {sample!r}; rename or remove one")
            seen[sample] = name
    return ids


def list_folder(root: Path) -> tuple[list[str], list[str]]:
    """Image files below a folder, sorted, and what was odd. Links are followed; each folder is listed once."""
    names: list[str] = []
    problems: list[str] = []
    visited: set[tuple[int, int]] = set()
    folders = [""]
    links: list[str] = []  # they wait until all real folders are done, so that a loop never decides a name
    while folders or links:
        prefix = folders.pop() if folders else links.pop(0)
        status = os.stat(os.path.join(root, prefix))
        if (status.st_dev, status.st_ino) in visited:
            problems.append(f"{printable(prefix)}: a link to a folder that is listed already; not followed")
            continue
        visited.add((status.st_dev, status.st_ino))
        try:
            entries = sorted(os.scandir(os.path.join(root, prefix)), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{root / prefix}: cannot be listed ({error.strerror})") from error
        for entry in entries:
            name = os.path.join(prefix, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(name)
            else:
                names.append(name)
    names, unread = readable(names)
    return names, problems + unread


def _survey(source: Source) -> list[Facts]:
    """Facts of all samples, from the cache where size and time are unchanged; read by a few threads otherwise."""
    from rich.console import Console
    from rich.progress import track

    key = f"facts {type(source).__name__} {source.root.resolve()}"
    kept: dict[str, list[Any]] = load_cached(key) or {}
    lock = threading.Lock()
    fresh = 0

    def look(index: int) -> Facts:
        nonlocal fresh
        try:
            stamp = source.stamp(index)
            known = kept.get(source.ids[index])
            if stamp and known is not None and known[0] == stamp:
                return Facts(**known[1])
            facts = inspect(source.read_bytes(index), source.where(index))
        except OSError as error:
            return Facts(problem=f"{source.where(index)}: cannot be read ({error.strerror or error})")
        with lock:
            kept[source.ids[index]] = [stamp, asdict(facts)]
            fresh += 1
        return facts

    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        answers = pool.map(look, range(len(source)))
        quiet = not sys.stderr.isatty() or len(source) < 1000
        facts = list(track(answers, "reading files", len(source), console=Console(stderr=True), disable=quiet))
    if fresh:
        save_cached(key, kept)
    return facts


def inspect(data: bytes, where: str) -> Facts:
    """Facts of a file's bytes; what is wrong with it becomes its `problem`."""
    digest = hashlib.sha256(data).hexdigest()
    try:
        image = open_header(data, where)
    except InputError as error:
        return Facts(digest, problem=str(error))
    width, height, turned = image.width, image.height, orientation(image)
    if image.format == "TIFF" and turned >= 5:  # Pillow turns it when it is decoded
        width, height = height, width
    return Facts(digest, width, height, image.format or "", image.mode, 1 if image.format == "TIFF" else turned)
