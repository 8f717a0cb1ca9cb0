"""A data set's latents, encoded once: shards of safetensors, their statistics, and how a generator normalises them.

Shard k holds samples k * SHARD .. (k + 1) * SHARD - 1, each plain and, if asked, mirrored. A shard is written whole
by the process whose turn it is, so encoding resumes at the first missing one and any number of processes makes the
same files.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tokbench.data.loader import Loader
from tokbench.data.open import open_source
from tokbench.data.sources import class_labels
from tokbench.data.training_crops import CropConfig, PhotoCrops
from tokbench.errors import CellError, InputError
from tokbench.protocols import find_protocol
from tokbench.records.files import write_whole
from tokbench.runtime.device import find_dtype, hash_state, precision
from tokbench.runtime.processes import Processes
from tokbench.runtime.seeding import image_seeds
from tokbench.runtime.terminal import bar
from tokbench.tokenizer import Tokenizer

SHARD = 512  # samples, before mirroring


@dataclass(frozen=True)
class LatentConfig:
    """What is encoded, and how."""

    resolution: int = 256
    posterior: Literal["mode", "sample"] = "mode"
    flips: bool = True  # a mirrored copy of every image
    crops: int = 0  # random crops a photograph, as `cut` says; 0: one centre crop as in protocol adm
    cut: CropConfig = field(default_factory=lambda: CropConfig(flip=False))  # its size is `resolution`
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the encoder; ImageNet takes hours of a GPU in float32


@dataclass(frozen=True)
class Normaliser:
    """(z - mean) / std with one number for all channels or one for each. Sampling undoes it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, latents: Tensor) -> Tensor:
        return (latents - self._shaped(self.mean, latents)) / self._shaped(self.std, latents)

    def undo(self, latents: Tensor) -> Tensor:
        return latents * self._shaped(self.std, latents) + self._shaped(self.mean, latents)

    @staticmethod
    def _shaped(values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=like.is_cuda)[:, None, None]

    def __str__(self) -> str:
        mean, std = ([f"{value:.4g}" for value in values] for values in (self.mean, self.std))
        return f"(z - {', '.join(mean)}) / {', '.join(std)}"


class Images:
    """The images to encode, by sample number: centre crops of a data set, or random crops of photographs."""

    def __init__(self, data: str, config: LatentConfig, seed: int, workers: int | None = None) -> None:
        self.source, self.config, self.workers = open_source(data), config, workers
        self.random: PhotoCrops | None = None
        if config.crops:
            cut = replace(config.cut, size=config.resolution)
            self.random = PhotoCrops(self.source, range(len(self.source.ids)), cut, seed)
        self.num_images = len(self.source.ids) * max(1, config.crops)
        labels, self.classes = class_labels(self.source)
        self._labels = dict(zip(self.source.ids, labels, strict=True))

    def stream(self, numbers: Sequence[int]) -> Iterator[tuple[str, int, Tensor]]:
        """Sample id, label and uint8 [3, resolution, resolution] of these samples."""
        size = self.config.resolution
        if self.random is not None:
            for number in numbers:
                image, photograph = self.random[number, size]
                yield f"{photograph}#{number}", self._labels[photograph], image
            return
        loader = Loader(self.source, size, find_protocol("adm"), batch_size=32, indices=numbers, workers=self.workers)
        for ids, images in loader:
            for sample, image in zip(ids, images, strict=True):
                yield sample, self._labels[sample], image


def encode(
    tokenizer: Tokenizer,
    spec: str,
    images: Images,
    folder: Path,
    *,
    seed: int,
    processes: Processes,
    device: torch.device,
) -> None:
    """Encode this process's share of the shards that are not there yet.

    Raises InputError if the folder holds latents of something else (the first difference is named) or if the
    tokenizer's latents are no grids of numbers.
    """
    config = images.config
    tokenizer_weights = hash_state(tokenizer)
    made_from: dict[str, Any] = {
        "tokenizer": spec, "weights": tokenizer_weights, "data": images.source.fingerprint(), "seed": seed,
        "classes": images.classes, "num_images": images.num_images, "shard": SHARD,
        **{key: getattr(config, key) for key in ("resolution", "posterior", "flips", "crops", "dtype")},
        "cut": str(config.cut),
    }  # fmt: skip
    check_same(folder / "latents.json", made_from)
    if processes.main:
        write_whole(folder / "latents.json", json.dumps(made_from, indent=1))
    mine = shards(images.num_images, SHARD, processes)
    missing = [(k, numbers) for k, numbers in mine if not shard_path(folder, k).exists()]
    items = images.stream([number for _, numbers in missing for number in numbers])
    with bar("encode", sum(len(numbers) for _, numbers in missing)) as advance:
        for k, numbers in missing:
            rows = []
            for i in range(0, len(numbers), config.batch_size):
                batch = list(islice(items, len(numbers[i : i + config.batch_size])))
                rows.append(_encode_batch(tokenizer, batch, config, seed, device))
                advance(len(batch))
            tensors = {key: torch.cat([row[key] for row, _ in rows]) for key in rows[0][0]}
            ids = [sample for _, batch_ids in rows for sample in batch_ids]
            write_whole(shard_path(folder, k), save(tensors, metadata={"ids": json.dumps(ids)}))


def _encode_batch(
    tokenizer: Tokenizer, batch: list[tuple[str, int, Tensor]], config: LatentConfig, seed: int, device: torch.device
) -> tuple[dict[str, Tensor], list[str]]:
    """Latents of a few images (those of mirrored ones after each) with labels and flips, and their ids."""
    copies = 2 if config.flips else 1
    pixels = torch.stack([image for _, _, image in batch])
    if config.flips:
        pixels = torch.stack((pixels, pixels.flip(3)), dim=1).flatten(0, 1)
    with precision(device, find_dtype(config.dtype)):
        seeds = image_seeds(pixels, seed)
        latents = tokenizer.encode(pixels.to(device), sample=config.posterior == "sample", seeds=seeds).cpu()
    check_grid(latents, tokenizer.info.name)
    half = latents.to(torch.float16).contiguous()
    if not half.isfinite().all():
        raise CellError(f"{tokenizer.info.name}: latents of {batch[0][0]} and following are not finite in 16 bits")
    tensors = {
        "latents": half,
        "labels": torch.tensor([label for _, label, _ in batch]).repeat_interleave(copies),
        "flips": torch.arange(copies, dtype=torch.uint8).repeat(len(batch)),
    }
    return tensors, [sample for sample, _, _ in batch for _ in range(copies)]


def check_grid(latents: Tensor, name: str) -> None:
    """InputError unless latents are [B, C, H, W], float or uint8 (pixels): what a DiT can generate."""
    if latents.ndim != 4 or not (latents.is_floating_point() or latents.dtype == torch.uint8):
        raise InputError(
            f"{name}: encodes an image to {str(latents.dtype).removeprefix('torch.')} {tuple(latents.shape[1:])}; "
            "a DiT needs continuous latents [channels, height, width]"
        )


def check_same(path: Path, made_from: dict[str, Any]) -> None:
    """InputError naming the first difference if `path` says that its folder was made from something else."""
    if not path.exists():
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    for key, value in json.loads(json.dumps(made_from)).items():
        if then.get(key) != value:
            raise InputError(f"{path.parent} was made with {key} {then.get(key)}, asked is {value}; use another --out")


def shards(num_samples: int, size: int, processes: Processes) -> list[tuple[int, range]]:
    """The files of `size` samples that are this process's to write: number and samples."""
    mine = range(processes.rank, -(-num_samples // size), processes.size)
    return [(k, range(k * size, min((k + 1) * size, num_samples))) for k in mine]


def shard_path(folder: Path, k: int) -> Path:
    return folder / f"latents-{k:06d}.safetensors"


class Latents:
    """The shards of a folder, mapped into memory: row i is (latent float32 [C, H, W], label)."""

    def __init__(self, folder: Path) -> None:
        self.made_from: dict[str, Any] = json.loads((folder / "latents.json").read_text(encoding="utf-8"))
        numbers = [k for k, _ in shards(self.made_from["num_images"], SHARD, Processes())]
        self._shards = [safe_open(shard_path(folder, k), framework="pt") for k in numbers]
        self._rows = [shard.get_slice("latents") for shard in self._shards]
        self.labels = torch.cat([shard.get_tensor("labels") for shard in self._shards])
        self.shape: tuple[int, int, int] = tuple(self._rows[0].get_shape()[1:])
        self._per_shard = self._rows[0].get_shape()[0]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """float32 [B, C, H, W] and labels int64 [B]."""
        places = [divmod(index, self._per_shard) for index in indices]
        return torch.stack([self._rows[k][i] for k, i in places]).float(), self.labels[list(indices)]

    def ids(self) -> list[str]:
        return [sample for shard in self._shards for sample in json.loads(shard.metadata()["ids"])]

    def statistics(self, kind: Literal["scalar", "channel"]) -> Normaliser:
        """Mean and standard deviation over all rows, float64: of all channels together, or of each."""
        count, total, squares = 0, 0.0, 0.0
        for shard in self._shards:
            values = shard.get_tensor("latents").double().transpose(0, 1).flatten(1)  # [C, n]
            count, total, squares = count + values.shape[1], total + values.sum(1), squares + values.square().sum(1)
        mean, square = torch.as_tensor(total) / count, torch.as_tensor(squares) / count
        if kind == "scalar":
            mean, square = mean.mean(0, keepdim=True), square.mean(0, keepdim=True)
        std = (square - mean.square()).clamp(min=0).sqrt()
        if not (std > 1e-6).all():
            raise InputError(f"latents of {self.made_from['tokenizer']} do not vary (deviation {std.min():.3g})")
        return Normaliser(tuple(mean.tolist()), tuple(std.tolist()))
