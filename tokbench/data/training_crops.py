"""Training crops from photographs: which sample number gives which crop is fixed by the seed alone.

Sample k of a run depends on (seed, k) and on nothing else: not on the batch size, the number of workers or of
processes, nor on where a run was interrupted. So the state of the data order is the number of samples seen.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokbench.data.sources import Source
from tokbench.errors import InputError

KEEP_BYTES = 4 << 30  # images are kept decoded in memory up to this size in all
AHEAD = 4  # batches that each worker has ready before they are asked for


@dataclass(frozen=True)
class CropConfig:
    """How a training crop is cut. Lengths in pixels. Raises ValueError for values that cut none."""

    size: int = 128
    short_side: tuple[int, ...] = (128, 256)  # the photograph's shorter side becomes a random length between these two
    enlarge: float = 1.0e9  # but is never enlarged by more than this factor; the crop still has to fit
    sample_by: Literal["shuffle", "area"] = "shuffle"  # each once an epoch, or by the square root of its area
    flip: bool = True
    flat: float = 0.0  # a crop whose standard deviation (of 255) is below this is drawn again, up to four times
    late_size: int = 0  # crop size for the end of training; 0: none
    late_share: float = 0.15  # which share of the steps that is

    def __post_init__(self) -> None:
        if min(self.size, *self.short_side, self.late_size + 1) < 1 or not self.short_side:
            raise ValueError(f"size {self.size}, short_side {self.short_side}, late_size {self.late_size}: too small")
        if not 0 <= self.late_share <= 1:
            raise ValueError(f"late_share {self.late_share}: from 0 to 1")


def hold_out(ids: Sequence[str], num_images: int) -> tuple[list[int], list[int]]:
    """Indices (train, held out): whole subjects are held out, so that no photograph has a near twin in training.

    A subject is a file name without its trailing numbers ("fishes-fish10" -> "fishes-fish"); every n-th subject in
    the order of names is taken until there are `num_images`. Raises InputError if that would leave no training image.
    """
    if num_images >= len(ids):
        raise InputError(f"cannot hold out {num_images} of {len(ids)} photographs")
    subjects: dict[str, list[int]] = {}
    for index in sorted(range(len(ids)), key=lambda i: ids[i]):
        subjects.setdefault(re.sub(r"[-_ ]*\d*(-[ab])?$", "", ids[index]), []).append(index)
    if min(len(members) for members in subjects.values()) > num_images:  # classes, not subjects: take single images
        subjects = {ids[index]: [index] for index in range(len(ids))}
    held: list[int] = []
    names = list(subjects)
    stride = max(1, len(names) // max(1, num_images))
    for name in [name for start in range(stride) for name in names[start::stride]]:
        if len(held) + len(subjects[name]) <= num_images:
            held += subjects[name]
    return sorted(set(range(len(ids))) - set(held)), sorted(held)


class PhotoCrops(Dataset[tuple[Tensor, str]]):
    """Item (sample number, size) -> (uint8 [3, size, size], sample id)."""

    def __init__(self, source: Source, indices: Sequence[int], config: CropConfig, seed: int) -> None:
        self.source, self.indices, self.config, self.seed = source, list(indices), config, seed
        if not self.indices:
            raise InputError("no photograph to train on")
        self.sides = 2 * max(*config.short_side, config.size, config.late_size)  # pixels: what a crop can make use of
        self.kept: dict[int, Image.Image] = {}
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._keep()
        self.weights: np.ndarray | None = None
        if config.sample_by == "area":
            if len(self.kept) < len(self.indices):
                raise InputError("crops.sample_by=area needs photographs that fit into memory; use shuffle")
            areas = np.array([self.kept[index].info["area"] for index in self.indices], dtype=np.float64)
            self.weights = np.sqrt(areas) / np.sqrt(areas).sum()

    def _keep(self) -> None:
        """Decode small collections once, reduced to what a crop can make use of."""
        used = 0
        for index in self.indices:
            image = self.source.read(index, least=0 if self.config.sample_by == "area" else self.sides)
            area, factor = image.width * image.height, min(image.size) / self.sides
            if factor > 1:
                image = image.resize(
                    (round(image.width / factor), round(image.height / factor)), Image.Resampling.LANCZOS
                )
            used += image.width * image.height * 3
            if used / (len(self.kept) + 1) * len(self.indices) > KEEP_BYTES:
                self.kept.clear()
                return
            image.info["area"] = area
            self.kept[index] = image

    def photograph(self, number: int) -> int:
        """Which photograph the sample `number` is cut from, as an index into the source."""
        if self.weights is not None:
            return self.indices[
                int(np.random.default_rng((self.seed, number)).choice(len(self.indices), p=self.weights))
            ]
        epoch, position = divmod(number, len(self.indices))
        if self._epoch != epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.indices))
        return self.indices[int(self._order[position])]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, str]:
        number, size = item
        index = self.photograph(number)
        image = self.kept.get(index) or self.source.read(index, least=self.sides)
        rng = np.random.default_rng((self.seed, number, 1))
        for _ in range(5):
            crop = self._cut(image, size, rng)
            if not self.config.flat or crop.std() >= self.config.flat:
                break
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))), self.source.ids[index]

    def _cut(self, image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
        """Resize the shorter side to a random length and crop, in one resampling of the region that the crop needs."""
        low, high = min(self.config.short_side), max(self.config.short_side)
        short = min(image.size)
        scale = max(min(rng.uniform(low, high) / short, self.config.enlarge), size / short)
        region = size / scale
        left, top = rng.uniform(0, image.width - region), rng.uniform(0, image.height - region)
        box = (left, top, min(left + region, image.width), min(top + region, image.height))
        crop = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))
        return crop[:, ::-1] if self.config.flip and rng.random() < 0.5 else crop


@dataclass(frozen=True)
class BatchSampler:
    """Which samples a process takes in each step: lists of (sample number, crop size), made as they are needed.

    The global batch of a step is cut into `world` equal parts, so that any number of processes sees the same batch.
    """

    config: CropConfig
    first_step: int
    num_steps: int
    batch_size: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        late = self.num_steps - round(self.num_steps * self.config.late_share * (self.config.late_size > 0))
        part = self.batch_size // self.world
        for step in range(self.first_step, self.num_steps):
            first, size = step * self.batch_size + self.rank * part, self.config.size
            yield [(first + i, size if step < late else self.config.late_size) for i in range(part)]

    def __len__(self) -> int:
        return self.num_steps - self.first_step


def batches(
    crops: PhotoCrops,
    *,
    first_step: int,
    num_steps: int,
    batch_size: int,
    rank: int,
    world: int,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[tuple[list[int], Tensor, list[str]]]:
    """Steps first_step..num_steps-1: (sample numbers, uint8 [batch_size / world, 3, s, s], sample ids) of this rank.

    Raises InputError naming a photograph that cannot be read.
    """
    sampler = BatchSampler(crops.config, first_step, num_steps, batch_size, rank, world)
    loader = DataLoader(
        crops, batch_sampler=sampler, num_workers=num_workers, prefetch_factor=AHEAD if num_workers else None,
        pin_memory=pin_memory,
    )  # fmt: skip
    try:
        for items, (images, ids) in zip(sampler, loader, strict=True):
            yield [number for number, _ in items], images, list(ids)
    except InputError as error:  # a worker's has its traceback before it
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error
