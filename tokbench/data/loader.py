"""Sources to batches of crops with sample ids, decoded by worker processes ahead of their use."""

import os
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from tokbench.data.crops import crop
from tokbench.data.decode import NOTES, UPSCALED
from tokbench.data.sources import Source
from tokbench.errors import InputError, preview
from tokbench.protocols import Protocol
from tokbench.runtime.seeding import image_seeds


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
        """Whether the crops would take at most a quarter of what is free on the disk."""
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        return num_images * 3 * resolution**2 <= shutil.disk_usage(existing).free // 4

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


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)


def _write_at(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)


# index, crop uint8 [3, R, R], its seeds, notes, why there is no crop
Loaded = tuple[int, Tensor | None, list[int], int, str]


class _Crops(Dataset[Any]):
    """Crops by index, decoded in whichever process asks."""

    def __init__(self, source: Source, resolution: int, protocol: Protocol, upscale: bool, cache: CropCache | None):
        self.source, self.resolution, self.protocol = source, resolution, protocol
        self.upscale, self.cache = upscale, cache
        self.seeds: tuple[int, ...] = ()

    def __getitem__(self, index: int) -> Loaded:
        kept = self.cache.get(index) if self.cache else None
        if kept is None:
            try:
                kept = self._make(index)
            except InputError as error:  # as a value: the loader would wrap it in a traceback
                return index, None, [], 0, str(error)
            if self.cache:
                self.cache.put(index, *kept)
        pixels, notes = kept
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return index, image, [int(image_seeds(image[None], seed)) for seed in self.seeds], notes, ""

    def _make(self, index: int) -> tuple[np.ndarray, int]:
        image, notes = self.source.load(index)
        if min(image.size) < self.resolution:
            if not self.upscale:
                size, where = f"{image.width}x{image.height}", self.source.where(index)
                raise InputError(f"{where}: {size} is smaller than {self.resolution}")
            notes |= UPSCALED
        return crop(image, self.resolution, self.protocol), notes


def _collate(items: Sequence[Loaded]) -> tuple[list[int], Tensor, Tensor, list[int], list[tuple[int, str]]]:
    good = [(index, pixels, seeds, notes) for index, pixels, seeds, notes, _ in items if pixels is not None]
    bad = [(index, reason) for index, pixels, _, _, reason in items if pixels is None]
    images = default_collate([pixels for _, pixels, _, _ in good]) if good else torch.empty(0)  # into shared memory
    seeds = torch.tensor([seeds for _, _, seeds, _ in good], dtype=torch.int64)
    return [index for index, *_ in good], images, seeds, [notes for *_, notes in good], bad


class Loader:
    """Batches (ids, uint8 [B, 3, R, R]) of a source's crops, decoded by worker processes ahead of their use.

    `indices` are the samples wanted, in order (a rank's share that is not measured yet); None is all. An image that
    cannot be used raises InputError naming it, with `advice` (what the caller's options can do) at its end, or with
    `skip_bad` is left out and kept in `skipped` {id: reason}; a batch may then be smaller. `notes` counts what else was
    done to images. Iterate once, by `seeded` for seeds as well.
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
        advice: str = "",
    ) -> None:
        self.source, self.skip_bad, self.advice = source, skip_bad, advice
        self.skipped: dict[str, str] = {}
        self.notes: Counter[str] = Counter()
        wanted = list(range(len(source)) if indices is None else indices)
        workers = default_workers(len(wanted)) if workers is None else workers
        self._crops = _Crops(source, resolution, protocol, upscale, cache)
        self._batches: DataLoader[Any] = DataLoader(
            self._crops,
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
        for ids, images, _ in self.seeded(()):
            yield ids, images

    def seeded(self, seeds: Sequence[int]) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Batches with int64 [B, S]: what `image_seeds` gives for each image and each of S seeds.

        Hashed where images are decoded, so that a GPU does not wait for it.
        """
        self._crops.seeds = tuple(seeds)  # worker processes start, and get their copy, at the first batch
        for indices, images, own, notes, bad in self._alive():
            for index, reason in bad:
                if not self.skip_bad:
                    raise InputError(reason + self.advice)
                self.skipped[self.source.ids[index]] = reason
            self.notes.update(text for note in notes for bit, text in NOTES.items() if note & bit)
            if indices:
                yield [self.source.ids[index] for index in indices], images, own

    def _alive(self) -> Iterator[Any]:
        try:
            yield from self._batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError("a loading process was killed (memory? /dev/shm?); try fewer --workers, or 0") from error


def default_workers(num_images: int) -> int:
    """None for so few images that starting processes costs more than it saves; else one a core, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if num_images <= 64 else min(8, cores)


def refuse_unusable(source: Source, resolution: int, *, upscale: bool, advice: str = "") -> None:
    """InputError naming files that are no images, or are smaller than the resolution, before anything is measured."""
    if problems := [fact.problem for fact in source.facts() if fact.problem]:
        raise InputError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "") + advice)
    if not upscale and (names := source.small(resolution)):
        count = "1 image is" if len(names) == 1 else f"{len(names)} images are"
        raise InputError(f"{count} smaller than {resolution} px: {preview(names)}{advice}")
