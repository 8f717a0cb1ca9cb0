"""Image sources by name, and the loader that turns them into batches of crops with sample ids."""

import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokbench.archives import list_archive, unpacked
from tokbench.errors import InputError
from tokbench.images import NOTES, UPSCALED, crop
from tokbench.protocols import Protocol
from tokbench.sources import (
    ArchiveSource,
    FileSource,
    HuggingFaceSource,
    Source,
    list_folder,
    sample_id,
    shown,
    unique_ids,
)

SAMPLES = Path(__file__).parent / "samples"
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
IMAGENET = {  # where each split lies, as shipped, as Kaggle unpacks it, or unpacked by hand
    "val": ("val", "ILSVRC2012_img_val", "ILSVRC/Data/CLS-LOC/val", "ILSVRC2012_img_val.tar"),
    "train": ("train", "ILSVRC2012_img_train", "ILSVRC/Data/CLS-LOC/train", "ILSVRC2012_img_train.tar"),
}
IMAGENET_IMAGES = {"val": 50_000, "train": 1_281_167}


def open_source(spec: str | Path, split: str | None = None, limit: int | None = None) -> Source:
    """`samples`, `imagenet:ROOT`, `folder:DIR`, `tar:FILE` (or zip), `list:FILE`, `hf:NAME`, or a path of one of these.

    InputError if there is nothing there, or no image in it, or two images share an id.
    """
    text = os.fspath(spec)
    kind, colon, rest = text.partition(":")
    openers = {"imagenet": _imagenet, "folder": _folder, "tar": _archive, "list": _list, "hf": _hugging_face}
    if text == "samples":
        _no_split("samples", split)
        source: Source = _files("samples", None, SAMPLES)
    elif colon and kind in openers:
        source = openers[kind](rest, split)
    else:
        source = _guess(Path(text), split)
    if not source.ids:
        raise InputError(f"{text}: no images in it ({', '.join(source.problems) or 'of a type that is read here'})")
    if limit is not None:
        source.limit(limit)
    return source


def _guess(path: Path, split: str | None) -> Source:
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder; --data takes samples, a path, or imagenet:ROOT, hf:NAME, ..."
        )
    name = path.name.lower()
    if path.is_dir():
        parquet = next(path.glob("*.parquet"), None)
        return _hugging_face(str(path), split) if parquet else _folder(str(path), split)
    if name.endswith(ARCHIVES):
        return _archive(str(path), split)
    if name.endswith(".parquet"):
        return _hugging_face(str(path), split)
    if name.endswith((".txt", ".lst")):
        return _list(str(path), split)
    raise InputError(f"{path}: not a folder, {', '.join(ARCHIVES)}, .parquet, or .txt list of paths")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "images"


def _no_split(name: str, split: str | None) -> None:
    if split is not None:
        raise InputError(f"{name}: has no splits; leave --split {split} out")


def _files(name: str, split: str | None, root: Path) -> Source:
    names, problems = list_folder(root)
    return FileSource(name, split, root, unique_ids(names, root), names, problems)


def _folder(root: str, split: str | None) -> Source:
    folder = Path(root)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    name = _slug(folder.resolve().name)
    if split is not None:
        if not (folder / split).is_dir():
            raise InputError(f"{folder}: has no split {split!r}")
        return _files(f"{name}-{_slug(split)}", split, folder / split)
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        raise InputError(f"{folder}: holds train and val; choose one with --split")
    return _files(name, None, folder)


def _archive(file: str, split: str | None) -> Source:
    path = Path(file)
    _no_split(file, split)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    name = path.name
    for suffix in ARCHIVES:
        name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    path = unpacked(path)
    members = list_archive(path)
    return ArchiveSource(_slug(name), None, path, unique_ids([m.name for m in members], path), members)


def _list(file: str, split: str | None) -> Source:
    """Paths, one a line, absolute or relative to the list's folder; ids are the paths as written."""
    path = Path(file)
    _no_split(file, split)
    try:
        names = [line for line in os.fsdecode(path.read_bytes()).splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    names.sort()
    return FileSource(_slug(path.stem), None, path.parent, unique_ids(names, path), names)


def _imagenet(root: str, split: str | None) -> Source:
    """ILSVRC 2012; every layout gives the same ids (the files' stems), hence the same fingerprint."""
    folder, split = Path(root), {"validation": "val", None: "val"}.get(split, split)
    if split not in IMAGENET:
        raise InputError(f"imagenet: has no split {split!r}; choose val or train")
    found = next((folder / place for place in IMAGENET[split] if (folder / place).exists()), folder)
    if not found.exists():
        raise InputError(f"{folder}: no such folder; it should hold {' or '.join(IMAGENET[split])}")
    name = "imagenet" if split == "val" else f"imagenet-{split}"
    if found.is_file():
        members = list_archive(found)
        ids = unique_ids([m.name for m in members], found, _stem)
        source: Source = ArchiveSource(name, split, found, ids, members)
    else:
        if any((found / other).is_dir() for other in IMAGENET):
            raise InputError(f"{folder}: holds no {' or '.join(IMAGENET[split])}")
        names, problems = list_folder(found)
        source = FileSource(name, split, found, unique_ids(names, found, _stem), names, problems)
    order = sorted(range(len(source)), key=lambda i: source.ids[i])
    source.ids, source.entries = [source.ids[i] for i in order], [source.entries[i] for i in order]
    if len(source) != IMAGENET_IMAGES[split]:
        source.problems.append(f"{len(source)} images; ImageNet's {split} split has {IMAGENET_IMAGES[split]}")
    return source


def _stem(name: str) -> str:
    return sample_id(name).rpartition("/")[2]


def _hugging_face(name: str, split: str | None) -> Source:
    """OWNER/NAME[:CONFIG][@REVISION] from the hub, or parquet files on this machine."""
    if os.environ.get("TOKBENCH_OFFLINE") == "1":
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        import datasets
    except ImportError as error:
        raise InputError("hf: needs the package `datasets`; pip install 'tokbench[hf]'") from error
    local = Path(name)
    split = split or ("train" if local.exists() else "validation")
    try:
        if local.exists():
            files = sorted(str(path) for path in local.glob("*.parquet")) if local.is_dir() else [str(local)]
            rows = datasets.load_dataset("parquet", data_files={split: files}, split=split)
            label = _slug(local.resolve().stem)
        else:
            repository, _, revision = name.partition("@")
            repository, _, config = repository.partition(":")
            rows = datasets.load_dataset(repository, config or None, split=split, revision=revision or None)
            label = _slug(name)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"hf:{name}: split {split!r} cannot be loaded ({reason})") from error
    column = _image_column(rows, datasets, name)
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return HuggingFaceSource(f"{label}-{_slug(split)}", split, rows, column)


def _image_column(rows: Any, datasets: Any, name: str) -> str:
    for column, feature in rows.features.items():
        packed = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
        if isinstance(feature, datasets.Image) or packed:
            return str(column)
    raise InputError(f"hf:{name}: no column of images among {', '.join(rows.features)}")


class CropCache:
    """Crops of one source, resolution and crop rule in a file, so that a second model need not decode them again.

    Plain reads and writes at offsets, safe for any number of processes; a record counts once its checksum is there.
    """

    RECORD = 5  # crc32 of the pixels, notes + 128

    def __init__(self, folder: Path, source: Source, resolution: int, protocol: Protocol) -> None:
        name = f"{source.fingerprint()[:16]}-{protocol.crop}-{protocol.real_rounding}-{resolution}"
        self.pixels, self.records = folder / f"{name}.u8", folder / f"{name}.crc"
        self.shape = (resolution, resolution, 3)
        self.bytes = 3 * resolution**2
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self.pixels, self.records):
            path.touch()

    @staticmethod
    def fits(folder: Path, num_images: int, resolution: int) -> bool:
        """Whether the crops would take at most half of what is free on the disk."""
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        status = os.statvfs(existing)
        return num_images * 3 * resolution**2 <= status.f_bavail * status.f_frsize // 2

    def get(self, index: int) -> tuple[np.ndarray, int] | None:
        """The crop uint8 [R, R, 3] and its notes, or None."""
        record = _read_at(self.records, index * self.RECORD, self.RECORD)
        if len(record) < self.RECORD or record[4] < 128:
            return None
        data = _read_at(self.pixels, index * self.bytes, self.bytes)
        if zlib.crc32(data) != int.from_bytes(record[:4], "little"):
            return None
        return np.frombuffer(data, dtype=np.uint8).reshape(self.shape), record[4] - 128

    def put(self, index: int, pixels: np.ndarray, notes: int) -> None:
        """Keep a crop; a full disk is not an error, only slower."""
        data = pixels.tobytes()
        try:
            _write_at(self.pixels, index * self.bytes, data)
            record = zlib.crc32(data).to_bytes(4, "little") + bytes([notes + 128])
            _write_at(self.records, index * self.RECORD, record)
        except OSError:
            return

    def drop(self) -> None:
        """Delete the files."""
        self.pixels.unlink(missing_ok=True)
        self.records.unlink(missing_ok=True)


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)


def _write_at(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)


Loaded = tuple[int, np.ndarray | None, int, str]  # index, crop, notes, why there is none


class _Crops(Dataset[Any]):
    """Crops by index, decoded in whichever process asks."""

    def __init__(self, source: Source, resolution: int, protocol: Protocol, upscale: bool, cache: CropCache | None):
        self.source, self.resolution, self.protocol = source, resolution, protocol
        self.upscale, self.cache = upscale, cache

    def __getitem__(self, index: int) -> Loaded:
        kept = self.cache.get(index) if self.cache else None
        if kept is None:
            try:
                kept = self._make(index)
            except InputError as error:  # as a value: the loader would wrap it in a traceback
                return index, None, 0, str(error)
            if self.cache:
                self.cache.put(index, *kept)
        return index, *kept, ""

    def _make(self, index: int) -> tuple[np.ndarray, int]:
        image, notes = self.source.load(index)
        if min(image.size) < self.resolution:
            if not self.upscale:
                size, where = f"{image.width}x{image.height}", self.source.where(index)
                raise InputError(f"{where}: {size} is smaller than {self.resolution}; use --upscale or --skip-bad")
            notes |= UPSCALED
        return crop(image, self.resolution, self.protocol), notes


def _collate(items: Sequence[Loaded]) -> tuple[list[int], Tensor, list[int], list[tuple[int, str]]]:
    good = [(index, pixels, notes) for index, pixels, notes, _ in items if pixels is not None]
    bad = [(index, reason) for index, pixels, _, reason in items if pixels is None]
    stacked = np.stack([pixels for _, pixels, _ in good]) if good else np.empty((0, 1, 1, 3), np.uint8)
    images = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
    return [index for index, _, _ in good], images, [notes for _, _, notes in good], bad


class Loader:
    """Batches (ids, uint8 [B, 3, R, R]) of a source's crops, decoded by worker processes ahead of their use.

    `indices` are the samples wanted, in order (a rank's share that is not measured yet); None is all. An image that
    cannot be used raises InputError naming it, or with `skip_bad` is left out and kept in `skipped` {id: reason}; a
    batch may then be smaller. `notes` counts what else was done to images. Iterate once.
    """

    def __init__(
        self,
        source: Source,
        resolution: int,
        protocol: Protocol,
        *,
        batch_size: int,
        indices: Sequence[int] | None = None,
        workers: int | None = None,
        pin_memory: bool = False,
        upscale: bool = False,
        skip_bad: bool = False,
        cache: CropCache | None = None,
    ) -> None:
        self.source, self.skip_bad = source, skip_bad
        self.skipped: dict[str, str] = {}
        self.notes: Counter[str] = Counter()
        wanted = list(range(len(source)) if indices is None else indices)
        workers = default_workers(len(wanted)) if workers is None else workers
        self._batches: DataLoader[Any] = DataLoader(
            _Crops(source, resolution, protocol, upscale, cache),
            batch_size=batch_size,
            sampler=wanted,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory and torch.cuda.is_available(),
            prefetch_factor=4 if workers else None,
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[list[str], Tensor]]:
        for indices, images, notes, bad in self._alive():
            for index, reason in bad:
                if not self.skip_bad:
                    raise InputError(reason)
                self.skipped[self.source.ids[index]] = reason
            self.notes.update(text for note in notes for bit, text in NOTES.items() if note & bit)
            if indices:
                yield [self.source.ids[index] for index in indices], images

    def _alive(self) -> Iterator[Any]:
        try:
            yield from self._batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError("a loading process was killed (memory? /dev/shm?); try fewer --workers, or 0") from error


def default_workers(num_images: int) -> int:
    """None for so few images that starting processes costs more than it saves; else one a core, at most 8."""
    return 0 if num_images <= 64 else min(8, len(os.sched_getaffinity(0)))


def refuse_small(source: Source, resolution: int) -> None:
    """InputError naming the images that are smaller than the resolution, before anything is measured."""
    if names := source.small(resolution):
        count = "1 image is" if len(names) == 1 else f"{len(names)} images are"
        raise InputError(f"{count} smaller than {resolution} px: {shown(names)}; use --upscale or --skip-bad")
