"""The evaluation loop: images -> latents -> images -> rows and features on disk.

Everything between a model's float output and a metric's uint8 input happens here and nowhere else: clamp, rounding by
the protocol, the check for NaN. What is measured is stored per sample; metrics are computed later from the store.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tokbench.data.pixels import quantise
from tokbench.errors import MODEL_ERRORS, CellError, preview
from tokbench.metrics.suite import Instruments
from tokbench.protocols import Protocol
from tokbench.records.samples import SampleStore
from tokbench.runtime.device import is_out_of_memory, precision, release
from tokbench.tokenizer import Tokenizer

PIXELS_PER_BATCH = {"cpu": 8 * 256 * 256, "cuda": 64 * 256 * 256}
LARGEST_BATCH = {"cpu": 16, "cuda": 256}
CODES = "codes"  # the feature that holds a discrete tokenizer's codes
LATENT_COLUMNS = frozenset(("bpp", "latent-mean", "latent-square"))  # of the latents, so the same for all seeds


@dataclass(frozen=True)
class Conditions:
    """Under which a model reconstructs: what a cell's key holds besides the model and the images."""

    protocol: Protocol
    resolution: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    seeds: tuple[int, ...] = (0,)
    batch_size: int | None = None  # None: by the resolution, halved when memory runs out

    @property
    def first_batch_size(self) -> int:
        fitting = max(1, PIXELS_PER_BATCH[self.device.type] // self.resolution**2)
        return self.batch_size or min(fitting, LARGEST_BATCH[self.device.type])

    @property
    def images_at_once(self) -> int:
        """How many images go through the networks together, at first.

        One on a CPU, which gains nothing from more: kernels for different batch sizes round differently, and so the
        numbers do not depend on batch size, number of processes or interruptions to the last bit.
        """
        return 1 if self.device.type == "cpu" else self.first_batch_size

    @property
    def autocast(self) -> torch.dtype:
        return torch.bfloat16 if self.protocol.autocast == "bfloat16" else self.dtype


@dataclass
class Stopwatch:
    """Seconds of encoding and decoding; the first batch pays for warming up and counts only if it is the only one."""

    device: torch.device
    seconds: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: {"encode": [], "decode": []})

    def time(self, part: str, num_images: int, call: Callable[[], Tensor]) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        output = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[part].append((num_images, time.perf_counter() - start))
        return output

    def per_image(self) -> dict[str, float]:
        """Mean seconds an image, {} before anything was timed."""
        means = {}
        for part, timed in self.seconds.items():
            timed = timed[1:] or timed
            if timed:
                means[part] = sum(seconds for _, seconds in timed) / sum(count for count, _ in timed)
        return means


@dataclass
class Album:
    """The pairs that a picture may show: the first N samples and the N worst so far, as uint8 [3, H, W]."""

    first: frozenset[str]
    num_worst: int
    worst: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, ids: Sequence[str], badness: Sequence[float], real: Tensor, fake: Tensor) -> None:
        """Look at a batch, uint8 [B, 3, H, W] twice. Only what is kept is copied, since a copy waits for the GPU."""
        worst = self.worst | dict(zip(ids, badness, strict=True))
        ranked = sorted(worst, key=lambda sample: (worst[sample], sample), reverse=True)
        self.worst = {sample: worst[sample] for sample in ranked[: self.num_worst]}
        kept = self.first | self.worst.keys()
        self.pairs = {sample: pair for sample, pair in self.pairs.items() if sample in kept}
        for i, sample in enumerate(ids):
            if sample in kept:
                self.pairs[sample] = real[i].cpu(), fake[i].cpu()


@dataclass
class Cell:
    """One model under one set of conditions, and where its measurements go."""

    tokenizer: Tokenizer
    conditions: Conditions
    tools: Instruments
    store: SampleStore
    album: Album
    watch: Stopwatch
    known: Mapping[str, set[str]] = field(default_factory=dict)  # ids whose real features an earlier model left
    codes: bool = False  # keep a discrete tokenizer's codes


def badness(columns: Mapping[str, np.ndarray], num_images: int) -> np.ndarray:
    """What "worst" means in a picture: the first of these columns that was measured, else nothing."""
    for name, sign in (("lpips-vgg", 1), ("lpips-alex", 1), ("psnr", -1)):
        if name in columns:
            return sign * columns[name]
    return np.zeros(num_images)


def decode_uint8(cell: Cell, latents: Tensor, seeds: Tensor, ids: Sequence[str]) -> Tensor:
    """latents -> uint8 [B, 3, H, W]. Raises CellError as `decode` does."""
    return quantise(decode(cell, latents, seeds, ids), cell.conditions.protocol.fake_rounding)


def decode(cell: Cell, latents: Tensor, seeds: Tensor, ids: Sequence[str]) -> Tensor:
    """latents -> float [B, 3, H, W]. CellError naming images of NaN or infinity, or for a wrong shape."""
    name, size = cell.tokenizer.info.name, (cell.conditions.resolution, cell.conditions.resolution)
    images = cell.watch.time("decode", len(ids), lambda: cell.tokenizer.decode(latents, seeds=seeds, size=size))
    if images.shape != (len(ids), 3, *size):
        raise CellError(f"{name}: decode gave {tuple(images.shape)}, expected {(len(ids), 3, *size)}")
    finite = torch.isfinite(images).flatten(1).all(1).tolist()
    if not all(finite):
        bad = [sample for sample, good in zip(ids, finite, strict=True) if not good]
        raise CellError(f"{name}: NaN or infinity in the reconstruction of {preview(bad)}")
    return images


@contextmanager
def blaming(tokenizer: Tokenizer) -> Iterator[None]:
    """Whatever its code raises, except for want of memory, becomes a CellError that names the tokenizer."""
    try:
        yield
    except MODEL_ERRORS as error:
        if is_out_of_memory(error):
            raise
        reason = repr(error) if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
        raise CellError(f"{tokenizer.info.name}: {reason.splitlines()[0]}") from error


def reconstruct(cell: Cell, ids: Sequence[str], real: Tensor, seeds: Tensor) -> tuple[list[Tensor], Tensor]:
    """uint8 [B, 3, H, W] on the device, int64 [B, S] -> (S float reconstructions, the latents of the first).

    `seeds` are those of `image_seeds`, on the CPU. A posterior's mode is encoded once; a sample of it is drawn anew for
    every seed. Raises CellError for whatever the model gets wrong, except a lack of memory.
    """
    conditions, tokenizer = cell.conditions, cell.tokenizer
    sample = conditions.protocol.posterior == "sample"
    decoded: list[Tensor] = []
    latents: list[Tensor] = []
    with blaming(tokenizer), precision(conditions.device, conditions.autocast):
        for own in seeds.unbind(1):
            if sample or not latents:
                encode = partial(tokenizer.encode, real, sample=sample, seeds=own)
                latents.append(cell.watch.time("encode", len(ids), encode))
            decoded.append(decode(cell, latents[-1], own, ids))
    return decoded, latents[0]


def seeded(name: str, seed: int) -> str:
    """What the column or feature `name` is called for one of several seeds."""
    return f"{name}.seed{seed}"


def measure_batch(cell: Cell, ids: Sequence[str], real: Tensor, image_seeds: Tensor) -> None:
    """Reconstruct and measure uint8 [B, 3, H, W] and append it to the store: all of it or, if anything fails, nothing.

    `image_seeds` are int64 [B, S]. With several seeds a column is their mean, beside one column (and feature) per seed.
    """
    tools, seeds = cell.tools, cell.conditions.seeds
    real = real.to(cell.conditions.device, non_blocking=True)
    decoded, latents = reconstruct(cell, ids, real, image_seeds)
    fakes = [quantise(images, cell.conditions.protocol.fake_rounding) for images in decoded]
    columns: dict[str, np.ndarray] = {}
    features: dict[tuple[str, str], np.ndarray] = {}
    with torch.inference_mode():
        scores = [
            {name: _numpy(v) for score in tools.scorers for name, v in score(real, fake, images).items()}
            for fake, images in zip(fakes, decoded, strict=True)
        ]
        for name in scores[0]:
            columns[name] = np.mean([score[name] for score in scores], axis=0)
        for name, extractor in tools.extractors.items():
            if not cell.known.get(name, set()).issuperset(ids):
                features["real", name] = _numpy(extractor(real))
        for seed, score, fake in zip(seeds, scores, fakes, strict=True):
            several = len(seeds) > 1
            if several:
                columns |= {seeded(name, seed): values for name, values in score.items()}
            for name, extractor in tools.extractors.items():
                features["fake", seeded(name, seed) if several else name] = _numpy(extractor(fake))
        with blaming(cell.tokenizer):
            if hasattr(cell.tokenizer, "bits"):
                columns["bpp"] = _numpy(cell.tokenizer.bits(latents).reshape(len(ids))) / cell.conditions.resolution**2
            if cell.tokenizer.info.channels is not None and latents.is_floating_point():
                values = latents.double().reshape(len(ids), -1)
                columns |= {"latent-mean": _numpy(values.mean(1)), "latent-square": _numpy(values.square().mean(1))}
            if cell.codes:
                features["fake", CODES] = _numpy(latents.reshape(len(ids), -1))
    cell.store.append(ids, columns, features)
    cell.album.add(ids, badness(columns, len(ids)).tolist(), real, fakes[0])


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def measure(
    cell: Cell,
    batches: Iterable[tuple[Sequence[str], Tensor, Tensor]],
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Measure every batch (ids, uint8 [B, 3, H, W], int64 [B, S] with a column of image seeds for each of S seeds).

    `progress` is told how many images are done. Returns the batch size in the end.

    When memory runs out, the batch is cut into halves, and so are all that follow. CellError if even one image needs
    too much, or if the batch size was the user's wish.
    """
    limit = cell.conditions.images_at_once
    for ids, real, seeds in batches:
        start = 0
        while start < len(ids):
            part = slice(start, min(start + limit, len(ids)))
            size = part.stop - part.start
            if _fits(cell, ids[part], real[part], seeds[part]):
                progress(size)
                start = part.stop
                continue
            release(cell.conditions.device)
            if cell.conditions.batch_size is not None or size == 1:
                where = f"{cell.tokenizer.info.name}: out of memory at {cell.conditions.resolution} px"
                hint = f"; try --batch-size {size // 2}, or auto" if size > 1 else ""
                raise CellError(f"{where} with batch size {size}{hint}")
            limit = size // 2
    return limit


def _fits(cell: Cell, ids: Sequence[str], real: Tensor, seeds: Tensor) -> bool:
    """Whether memory was enough for the batch. The traceback, which would keep its tensors alive, ends here."""
    try:
        measure_batch(cell, ids, real, seeds)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
