"""Sources to batches of crops with sample ids, decoded by worker processes ahead of their use."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from tokbench.data.crops import crop
from tokbench.data.decode import ENLARGED, NOTES
from tokbench.data.sources import Source
from tokbench.errors import ARRAY_ERRORS, InputError, preview
from tokbench.protocols import NATIVE, Protocol, Resolution, sides_of
from tokbench.runtime.processes import cores
from tokbench.runtime.seeding import image_seeds


class CropCache:
    """Crops of one source, resolution and crop rule, a file each, so that a second model need not decode them again.

    A file is written aside and then renamed: any number of processes may write, and none reads a part of one.
    """

    def __init__(self, folder: Path, source: Source, resolution: Resolution, protocol: Protocol) -> None:
        rule = f"{protocol.crop}-{protocol.real_rounding}-{protocol.orientation}"
        name = f"{source.fingerprint()[:16]}-{rule}-{resolution}"
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def fits(folder: Path, source: Source, resolution: Resolution, protocol: Protocol) -> bool:
        """Whether the crops would take at most a quarter of what is free on the disk."""
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        size = sides_of(resolution)
        pixels = sum(w * h for w, h in ([size] * len(source) if size else source.sizes(protocol)))
        return 3 * pixels <= shutil.disk_usage(existing).free // 4

    def get(self, index: int) -> tuple[np.ndarray, int] | None:
        """The crop uint8 [H, W, 3] and its notes, or None."""
        try:
            with open(self.folder / f"{index}.npy", "rb") as file:
                return np.load(file), int(np.load(file))
        except ARRAY_ERRORS:  # not there, or damaged
            return None

    def put(self, index: int, pixels: np.ndarray, notes: int) -> None:
        """Keep a crop; a full disk is not an error, only slower."""
        aside = self.folder / f".{index}.{os.getpid()}"
        try:
            with open(aside, "wb") as file:
                np.save(file, pixels)
                np.save(file, notes)
            os.replace(aside, self.folder / f"{index}.npy")
        except OSError:
            aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Crop:
    """One sample: its pixels uint8 [3, H, W] and what `image_seeds` gives of them, or why there are none."""

    index: int
    image: Tensor | None = None
    seeds: tuple[int, ...] = ()
    notes: int = 0
    problem: str = ""


class _Batch(NamedTuple):  # a named tuple, whose tensors the loader can pin
    indices: list[int]
    images: Tensor  # uint8 [B, 3, H, W]
    seeds: Tensor  # int64 [B, S]
    notes: list[int]
    problems: list[tuple[int, str]]  # of samples that are not in it


class _Crops(Dataset[_Crop]):
    """Crops by index, decoded in whichever process asks."""

    def __init__(self, source: Source, resolution: Resolution, protocol: Protocol, cache: CropCache | None) -> None:
        self.source, self.resolution, self.protocol, self.cache = source, resolution, protocol, cache
        self.seeds: tuple[int, ...] = ()

    def __getitem__(self, index: int) -> _Crop:
        kept = self.cache.get(index) if self.cache else None
        if kept is None:
            try:
                kept = self._make(index)
            except InputError as error:  # as a value: the loader would wrap it in a traceback
                return _Crop(index, problem=str(error))
            if self.cache:
                self.cache.put(index, *kept)
        pixels, notes = kept
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return _Crop(index, image, tuple(int(image_seeds(image[None], seed)) for seed in self.seeds), notes)

    def _make(self, index: int) -> tuple[np.ndarray, int]:
        image, notes = self.source.load(index, upright=self.protocol.orientation == "apply")
        size = sides_of(self.resolution)
        try:
            if size is not None and (image.width < size[0] or image.height < size[1]):
                if self.protocol.small != "enlarge":
                    raise InputError(f"{image.width}x{image.height} is smaller than {self.resolution}")
                notes |= ENLARGED
            return crop(image, self.resolution, self.protocol), notes
        except InputError as error:
            raise InputError(f"{self.source.where(index)}: {error}") from None


def _same_size(indices: Sequence[int], sizes: Sequence[tuple[int, int]] | None, batch_size: int) -> list[list[int]]:
    """The samples in batches of one size each, in order; all are of one size if there are no `sizes`."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index in indices:
        groups.setdefault(sizes[index] if sizes else (0, 0), []).append(index)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


def _collate(crops: Sequence[_Crop]) -> _Batch:
    good = [crop for crop in crops if crop.image is not None]
    return _Batch(
        [crop.index for crop in good],
        default_collate([crop.image for crop in good]) if good else torch.empty(0),  # into shared memory
        torch.tensor([crop.seeds for crop in good], dtype=torch.int64),
        [crop.notes for crop in good],
        [(crop.index, crop.problem) for crop in crops if crop.image is None],
    )


class Loader:
    """Batches (ids, uint8 [B, 3, H, W]) of a source's crops, decoded by worker processes ahead of their use.

    At native resolution the images of a batch are of one size; others follow in batches of their own.

    `indices` are the samples wanted, in order (a rank's share that is not measured yet); None is all. An image that
    cannot be used raises InputError naming it, with `advice` (what the caller's options can do) at its end, or with
    `skip_bad` is left out and kept in `skipped` {id: reason}; a batch may then be smaller. `notes` counts what else was
    done to images. Iterate once, by `seeded` for seeds as well.
    """

    def __init__(
        self,
        source: Source,
        resolution: Resolution,
        protocol: Protocol,
        *,
        batch_size: int,
        indices: Sequence[int] | None = None,
        workers: int | None = None,
        pin_memory: bool = False,
        skip_bad: bool = False,
        cache: CropCache | None = None,
        advice: str = "",
    ) -> None:
        self.source, self.skip_bad, self.advice = source, skip_bad, advice
        self.skipped: dict[str, str] = {}
        self.notes: Counter[str] = Counter()
        wanted = list(range(len(source)) if indices is None else indices)
        workers = default_workers(len(wanted)) if workers is None else workers
        if protocol.small == "skip":
            for index in set(source.below(resolution, protocol)).intersection(wanted):
                self.skipped[source.ids[index]] = f"{source.where(index)}: smaller than {resolution}"
                wanted.remove(index)
        self._crops = _Crops(source, resolution, protocol, cache)
        sizes = source.sizes(protocol) if resolution == NATIVE else None
        self._batches: DataLoader[Any] = DataLoader(
            self._crops,
            batch_sampler=_same_size(wanted, sizes, batch_size),
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
        for batch in self._alive():
            for index, reason in batch.problems:
                if not self.skip_bad:
                    raise InputError(reason + self.advice)
                self.skipped[self.source.ids[index]] = reason
            self.notes.update(text for note in batch.notes for bit, text in NOTES.items() if note & bit)
            if batch.indices:
                yield [self.source.ids[index] for index in batch.indices], batch.images, batch.seeds

    def _alive(self) -> Iterator[_Batch]:
        try:
            yield from self._batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError("a loading process was killed (memory? /dev/shm?); try fewer --workers, or 0") from error


def default_workers(num_images: int) -> int:
    """0 for up to 64 images, where starting processes costs more than it saves; else one a core, at most 8."""
    return 0 if num_images <= 64 else min(8, cores())


def refuse_unusable(source: Source, resolution: Resolution, protocol: Protocol, advice: str = "") -> None:
    """InputError naming files that are no images, or that the protocol refuses as too small, before any is measured."""
    if problems := [fact.problem for fact in source.facts() if fact.problem]:
        raise InputError(preview(problems, "; ") + advice)
    if protocol.small == "refuse" and (small := source.below(resolution, protocol)):
        count = "1 image is" if len(small) == 1 else f"{len(small)} images are"
        raise InputError(f"{count} smaller than {resolution}: {preview(list(map(source.where, small)))}{advice}")
