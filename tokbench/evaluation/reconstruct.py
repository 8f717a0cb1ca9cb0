"""From images to reconstructions to rows: the one way of run, score, generate and held-out images.

Everything between a model's float output and a metric's uint8 input happens here and nowhere else: clamp, rounding by
the protocol, the check for NaN. What is measured is stored per sample; metrics are computed later from the store.
A GPU is waited for once a batch, while it works on the next one: see `measure`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokbench.data.pixels import quantise
from tokbench.errors import MODEL_ERRORS, CellError, first_line, place, preview
from tokbench.metrics import GRID, SEAM
from tokbench.metrics.pixel import seam
from tokbench.metrics.suite import MetricSuite
from tokbench.protocols import Protocol, sides_of
from tokbench.records.measurement import Measurement
from tokbench.records.samples import SampleStore
from tokbench.runtime.device import (
    casts_kept,
    find_dtype,
    in_float64,
    is_out_of_memory,
    precision,
    release,
    synchronise,
    to_host,
    unless_full,
)
from tokbench.runtime.tiling import tiling_of
from tokbench.tokenizer import Checks, NotFiniteError, Tokenizer, finite, refuse

PIXELS_PER_BATCH = {"cpu": 8 * 256 * 256, "cuda": 64 * 256 * 256, "mps": 8 * 256 * 256}
TYPICAL = (1024, 1024)  # what native images are taken for; a batch that does not fit into memory is halved
LARGEST_BATCH = {"cpu": 16, "cuda": 256, "mps": 16}
# Of the latents or of the data, so the same for all seeds; or a mean over seeds.
SHARED_COLUMNS = frozenset(("bpp", "latent-mean", "latent-square", "label", *GRID, SEAM, "tile-borders"))

Batch = tuple[Sequence[str], Tensor, Tensor]  # ids, uint8 [B, 3, H, W], int64 [B, S] with the image's seeds
Mark = float | torch.cuda.Event  # a moment, on the clock of the CPU or in the queue of a GPU
Fakes = Mapping[int, tuple[Tensor, Tensor | None]]  # by seed: uint8 [B, 3, H, W], and the decoder's float output

Columns = Mapping[str, Tensor]  # [B] each
Features = Mapping[tuple[str, str], Tensor]  # by side and extractor, [B, ...] each


def first_batch_size(measurement: Measurement, device: torch.device) -> int:
    """How many images are loaded together: as asked for, else by the resolution."""
    width, height = sides_of(measurement.resolution) or TYPICAL
    fitting = max(1, PIXELS_PER_BATCH[device.type] // (width * height))
    return measurement.batch_size or min(fitting, LARGEST_BATCH[device.type])


def images_at_once(measurement: Measurement, device: torch.device) -> int:
    """How many images go through the networks together, at first.

    One on a CPU, which gains nothing from more: kernels for different batch sizes round differently, and so the numbers
    do not depend on batch size, number of processes or interruptions to the last bit.
    """
    return 1 if device.type == "cpu" else first_batch_size(measurement, device)


def autocast_dtype(measurement: Measurement) -> torch.dtype:
    """What the model runs under: the protocol's choice, else the user's."""
    return find_dtype(measurement.rules.autocast or measurement.dtype)


@dataclass
class Timer:
    """Seconds of encoding and decoding; the first batch pays for warming up and counts only if it is the only one."""

    device: torch.device
    marks: dict[str, list[tuple[int, Mark, Mark]]] = field(default_factory=lambda: {"encode": [], "decode": []})

    def time(self, part: str, num_images: int, call: Callable[[], Tensor]) -> Tensor:
        """The call's value; when it began and ended is kept under `part`. Does not wait for a GPU."""
        start = self._mark()
        output = call()
        self.marks[part].append((num_images, start, self._mark()))
        return output

    def per_image(self) -> dict[str, float]:
        """Mean seconds an image, {} before anything was timed."""
        means = {}
        for part, timed in self.marks.items():
            timed = timed[1:] or timed
            if timed:
                means[part] = sum(_seconds(*marks) for _, *marks in timed) / sum(count for count, *_ in timed)
        return means

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            synchronise(self.device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


@contextmanager
def model_errors_as_cell_errors(name: str, ids: Sequence[str] = ()) -> Iterator[None]:
    """Whatever a model's code raises, except for want of memory, becomes a CellError that names it, and images `ids`
    that are not finite."""
    try:
        yield
    except NotFiniteError as error:
        images = f" of {preview([ids[row] for row in error.rows])}" if ids else ""
        raise CellError(f"{name}: {error}{images}") from error
    except MODEL_ERRORS as error:
        if is_out_of_memory(error):
            raise
        reason = repr(error) if isinstance(error, KeyError) else first_line(error)
        raise CellError(f"{name}: {reason}{place(error)}") from error


def decode(
    tokenizer: Tokenizer, latents: Tensor, seeds: Tensor, size: tuple[int, int], ids: Sequence[str], timer: Timer
) -> Tensor:
    """latents -> float [B, 3, H, W]. NotFiniteError for NaN or infinity, CellError for a wrong shape or type."""
    images = timer.time("decode", len(ids), partial(tokenizer.decode, latents, seeds=seeds, size=size))
    if images.shape != (len(ids), 3, *size):
        raise CellError(f"{tokenizer.info.name}: decode gave {tuple(images.shape)}, expected {(len(ids), 3, *size)}")
    if not images.is_floating_point():
        raise CellError(f"{tokenizer.info.name}: decode gave {images.dtype}, expected floats, nominally from -1 to 1")
    return finite(images, "the reconstruction")


def reconstruct(
    tokenizer: Tokenizer, batch: Batch, protocol: Protocol, dtype: torch.dtype, timer: Timer
) -> tuple[list[Tensor], Tensor]:
    """A batch whose images are on the device -> (S float reconstructions [B, 3, H, W], the latents of the first).

    The image seeds [B, S] stay on the CPU. A posterior's mode is encoded once; a sample of it is drawn anew for every
    seed. Raises CellError for whatever the model gets wrong, except a lack of memory.
    """
    ids, real, seeds = batch
    height, width = real.shape[2:]
    real = padded(real, tokenizer.info.size_multiple) if protocol.native else real
    sample, size = protocol.posterior == "sample", (real.shape[2], real.shape[3])
    decoded: list[Tensor] = []
    latents: list[Tensor] = []
    with model_errors_as_cell_errors(tokenizer.info.name, ids), precision(real.device, dtype):
        for own in seeds.unbind(1):
            if sample or not latents:
                # A copy: what an encoder writes into its input must not change the image that it is measured against.
                encode = partial(tokenizer.encode, real.clone(), sample=sample, seeds=own)
                latents.append(timer.time("encode", len(ids), encode))
                if latents[-1].is_floating_point():  # a decoder may quantise them
                    finite(latents[-1], "the latents")
            decoded.append(decode(tokenizer, latents[-1], own, size, ids, timer)[..., :height, :width])
    return decoded, latents[0]


def padded(images: Tensor, multiple: int) -> Tensor:
    """[B, 3, H, W] -> sides that are multiples, by reflection at the right and at the bottom."""
    for dim in (2, 3):
        length = images.shape[dim]
        if missing := -length % multiple:
            order = np.pad(np.arange(length), (0, missing), mode="reflect")
            images = images.index_select(dim, torch.from_numpy(order).to(images.device))
    return images


def seed_column(name: str, seed: int) -> str:
    """What the column or feature `name` is called for one of several seeds."""
    return f"{name}.seed{seed}"


def append_scores(
    store: SampleStore,
    suite: MetricSuite,
    name: str,
    ids: Sequence[str],
    real: Tensor,
    fakes: Fakes,
    known: Mapping[str, set[str]],
    columns: Mapping[str, Tensor],
    features: Mapping[tuple[str, str], Tensor],
    checks: Checks,
) -> Callable[[], dict[str, np.ndarray]]:
    """Measure uint8 [B, 3, H, W] against its reconstructions; the call stores that and returns the columns [B].

    `fakes` are, by seed, the reconstruction uint8 and the decoder's float output (None: there is none). With several
    seeds a column is their mean, beside one column (and feature) per seed. `known` are, by extractor, ids whose real
    features are there already. `columns` and `features` are stored as well. The call is the one that waits for a GPU,
    and raises CellError in the `name` of the model for `checks` that were deferred and fail.
    """
    several = len(fakes) > 1
    lacking = [name for name in suite.extractors if not known.get(name, set()).issuperset(ids)]
    with torch.inference_mode():
        scores = [suite.score(real, fake, decoded) for fake, decoded in fakes.values()]
        found = {**features, **{("real", name): suite.extractors[name](real) for name in lacking}}
        for seed, (fake, _) in fakes.items():
            for extractor, extract in suite.extractors.items():
                found["fake", seed_column(extractor, seed) if several else extractor] = extract(fake)
    landing = to_host([found, columns, checks, *scores])

    def finish() -> dict[str, np.ndarray]:
        found, columns, checks, *scores = landing()
        with model_errors_as_cell_errors(name, ids):
            refuse(checks)
        rows = {column: np.mean([score[column] for score in scores], axis=0) for column in scores[0]}
        if several:
            for seed, score in zip(fakes, scores, strict=True):
                rows |= {seed_column(column, seed): values for column, values in score.items()}
        store.append(ids, rows | columns, found)
        return rows | columns

    return finish


def latent_columns(tokenizer: Tokenizer, latents: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Columns [B] of the latents of images of this size: measured bits, mean and mean square, and their shape."""
    columns = {}
    pixels = size[0] * size[1]
    with model_errors_as_cell_errors(tokenizer.info.name):
        if hasattr(tokenizer, "bits"):
            columns["bpp"] = in_float64(tokenizer.bits(latents).reshape(len(latents))) / pixels
        if tokenizer.info.channels is not None and latents.is_floating_point():
            values = in_float64(latents).reshape(len(latents), -1)
            columns |= {"latent-mean": values.mean(1), "latent-square": values.square().mean(1)}
            _, channels, *grid = latents.shape if latents.ndim > 2 else (0, tokenizer.info.channels)
            height = grid[0] if len(grid) == 2 else 1
            shape = torch.tensor([channels, height, size[0] / height], dtype=values.dtype).expand(len(latents), 3)
            columns |= dict(zip(GRID, shape.unbind(1), strict=True))
    return columns


def seam_columns(tokenizer: Tokenizer, real: Tensor, fakes: Fakes) -> dict[str, Tensor]:
    """Columns [B] of how tile borders show, the mean over seeds; {} for a tokenizer without tiles."""
    tiling = tiling_of(tokenizer)
    if tiling is None:
        return {}
    found = [seam(real, fake, tiling) for fake, _ in fakes.values()]
    return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}


def measure(
    step: Callable[..., Callable[[], object]],
    batches: Iterable[tuple[Sequence[str], *tuple[Tensor, ...]]],
    *,
    name: str,
    device: torch.device,
    limit: int,
    batch_size: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Call `step(ids, ...)` with every batch, cut into parts of at most `limit` samples; returns the limit in the end.

    A step tells a GPU what to do and returns the call that waits for it and keeps the results, which is made when the
    next part is under way: so the GPU works while the host stores. When memory runs out, the part is halved, and so are
    all that follow. CellError if even one sample needs too much, or if the `batch_size` was the user's wish. `progress`
    is told how many are under way.
    """
    held: list[Callable[[], object]] = []  # of the part before, if it is not kept yet
    with casts_kept(device):
        try:
            for ids, *tensors in batches:
                start = 0
                while start < len(ids):
                    part = slice(start, min(start + limit, len(ids)))
                    size = part.stop - part.start
                    finish = unless_full(partial(step, ids[part], *(tensor[part] for tensor in tensors)))
                    if held:
                        held.pop()()
                    if finish is not None:
                        held.append(finish)
                        progress(size)
                        start = part.stop
                        continue
                    release(device)
                    if batch_size is not None or size == 1:
                        hint = f"; try --batch-size {size // 2}, or auto" if size > 1 else ""
                        raise CellError(f"{name}: out of memory with batch size {size}{hint}")
                    limit = size // 2
        finally:  # what was measured before an error is kept
            if held:
                held.pop()()
    return limit


def round_trip(tokenizer: Tokenizer, batch: Batch, measurement: Measurement, timer: Timer) -> tuple[Fakes, Tensor]:
    """The `fakes` of `append_scores`, by the measurement's seeds and the protocol's rounding, and the latents."""
    protocol = measurement.rules
    decoded, latents = reconstruct(tokenizer, batch, protocol, autocast_dtype(measurement), timer)
    fakes = [quantise(images, protocol.fake_rounding) for images in decoded]
    return dict(zip(measurement.seeds, zip(fakes, decoded, strict=True), strict=True)), latents
