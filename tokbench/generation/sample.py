"""Draw latents from a generator and decode them: resumable, by any number of processes, the time of each part apart.

Sample i has the label and the noise that the seed and i alone decide, so batch size and number of processes change
nothing, and asking for more samples later goes on from those that are there.
"""

import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tokbench.checkpoints import load_strictly, read_checkpoint
from tokbench.config import from_dict
from tokbench.data.pixels import quantise
from tokbench.errors import CellError, InputError
from tokbench.evaluation.reconstruct import (
    Timer,
    autocast_dtype,
    decode,
    first_batch_size,
    measure,
    model_errors_as_cell_errors,
)
from tokbench.generation.compatibility import LatentSpace
from tokbench.generation.dit import DiT, DiTConfig
from tokbench.generation.flow import SAMPLERS, guided, integrate
from tokbench.generation.latents import Normaliser, shard_path, shards
from tokbench.metrics.suite import MetricSuite
from tokbench.records.files import writable, write_whole
from tokbench.records.measurement import Measurement
from tokbench.records.samples import SampleStore
from tokbench.runtime.device import is_out_of_memory, precision, synchronise, to_host
from tokbench.runtime.processes import Processes
from tokbench.runtime.seeding import normal, sample_seeds
from tokbench.runtime.terminal import bar
from tokbench.tokenizer import Tokenizer, checks_deferred, refuse

CHUNK = 128  # samples of a file of latents
FIRST = 16  # samples whose images are always kept, for a picture
LATENT, DECODER = 11, 12  # streams of random numbers


@dataclass(frozen=True)
class Sampling:
    """How latents are drawn."""

    guidance: float = 1.0  # 1: none
    interval: tuple[float, float] = (0.0, 1.0)  # of t, from noise 0 to data 1, in which guidance acts
    steps: int = 50
    sampler: str = "euler"
    seed: int = 0


class Generator(Protocol):
    """Something that draws latents of a known space for given classes."""

    name: str  # [a-z0-9._-]+
    classes: Sequence[str]
    space: LatentSpace
    steps_trained: int | None
    training: Mapping[str, Any]  # what besides the steps makes two trainings alike
    weights: str  # sha256 of the state
    samplers: Sequence[str]  # the first is the default
    default_steps: int
    note: str

    def sample(self, seeds: Tensor, labels: Tensor, how: Sampling) -> Tensor:
        """Latents float32 [B, C, H, W] as the tokenizer's encode would give them, for seeds int64 and labels [B]."""
        ...


class FlowGenerator:
    """A DiT trained by `tokbench train dit`. Raises InputError for a file that is none."""

    samplers: Sequence[str] = SAMPLERS
    default_steps = 50

    def __init__(self, file: Path, device: torch.device, weights: str) -> None:
        tensors, metadata = read_checkpoint(file, "dit")
        self.model = DiT(from_dict(DiTConfig, metadata["config"]))
        load_strictly(self.model, tensors, file)
        self.model.to(device).eval().requires_grad_(False)
        info = metadata["info"]
        self.space = from_dict(LatentSpace, info["space"])
        self.normaliser = from_dict(Normaliser, info["normaliser"])
        self.classes: Sequence[str] = info["classes"]
        self.steps_trained: int | None = metadata["training"]["step"]
        alike = ("size", "times", "label_dropout", "optim", "ema")
        self.training: Mapping[str, Any] = {key: metadata["training"][key] for key in alike} | {
            "batch_size": metadata["training"]["run"]["batch_size"]
        }
        self.name = f"dit-{metadata['training']['size'].lower()}-{self.model.config.patch}"
        self.weights, self.device = weights, device
        self.note = f"trained on {info['trained_on']}, encoded by {self.space.tokenizer}"

    def sample(self, seeds: Tensor, labels: Tensor, how: Sampling) -> Tensor:
        """As in Generator."""
        labels = labels.to(self.device)
        field = guided(self.model, labels, len(self.classes), how.guidance, how.interval)
        noise = normal(seeds, self.space.shape, device=self.device)
        return self.normaliser.undo(integrate(field, noise, how.steps, how.sampler))


def check_sampling(generator: Generator, how: Sampling) -> None:
    """InputError for settings that this generator cannot follow."""
    if how.sampler not in generator.samplers:
        raise InputError(f"unknown sampler {how.sampler!r} for {generator.name}: {' or '.join(generator.samplers)}")
    if how.steps < 1:
        raise InputError(f"--steps {how.steps}: must be at least 1")
    if not 0 <= how.interval[0] < how.interval[1] <= 1:
        raise InputError(f"--guidance-interval {how.interval[0]:g},{how.interval[1]:g}: must rise within 0..1")
    if how.guidance < 0:
        raise InputError(f"--guidance {how.guidance:g}: must not be negative")


def balanced_labels(num_images: int, classes: Sequence[str], chosen: Sequence[int]) -> list[int]:
    """A label for every sample: the chosen classes (none: all) in turn, so that counts differ by one at most.

    Raises InputError for a label out of range.
    """
    for label in chosen:
        if not 0 <= label < len(classes):
            raise InputError(f"label {label} is out of range: the generator knows 0..{len(classes) - 1}")
    wanted = list(chosen) or list(range(len(classes)))
    return [wanted[i % len(wanted)] for i in range(num_images)]


@dataclass(frozen=True)
class Draw:
    """One set of samples: which, by what, where, and on how many processes."""

    generator: Generator
    how: Sampling
    labels: Sequence[int]  # one a sample
    folder: Path  # of the latents
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    processes: Processes

    def chunks(self) -> list[tuple[int, range]]:
        """This process's files of latents: number and samples."""
        return shards(len(self.labels), CHUNK, self.processes)

    def read(self, k: int) -> tuple[Tensor, float]:
        """Latents of a file and the seconds one took."""
        with safe_open(shard_path(self.folder, k), framework="pt") as file:
            return file.get_tensor("latents"), float(json.loads(file.metadata()["tokbench"])["seconds"])

    def has(self, k: int, numbers: range) -> bool:
        """Whether a file holds all of these samples: that of a shorter draw may not."""
        path = shard_path(self.folder, k)
        return path.exists() and len(self.read(k)[0]) >= len(numbers)


def sample_latents(draw: Draw) -> float:
    """Draw what is missing of this process's share into files of CHUNK latents; returns the median seconds of one.

    Raises CellError when memory runs out or a latent is not finite.
    """
    generator, device = draw.generator, draw.device
    missing = [(k, numbers) for k, numbers in draw.chunks() if not draw.has(k, numbers)]
    with bar(f"sample {generator.name}", sum(len(numbers) for _, numbers in missing)) as advance:
        for k, numbers in missing:
            parts, start = [], _now(device)
            for i in range(0, len(numbers), draw.batch_size):
                batch = numbers[i : i + draw.batch_size]
                seeds = sample_seeds(draw.how.seed, batch, LATENT)
                chosen = torch.tensor([draw.labels[number] for number in batch])
                name = generator.name
                with _memory_errors(name, len(batch)), model_errors_as_cell_errors(name), precision(device, draw.dtype):
                    latents = generator.sample(seeds, chosen, draw.how)
                parts.append(latents.float().cpu().contiguous())
                advance(len(batch))
            seconds = (_now(device) - start) / len(numbers)
            latents = torch.cat(parts)
            if not latents.isfinite().all():
                raise CellError(f"{generator.name}: NaN or infinity in latents {numbers.start}..{numbers.stop - 1}")
            write_whole(
                shard_path(draw.folder, k), save({"latents": latents}, {"tokbench": json.dumps({"seconds": seconds})})
            )
    return float(np.median([draw.read(k)[1] for k, _ in draw.chunks()] or [np.nan]))


@contextmanager
def _memory_errors(name: str, size: int) -> Iterator[None]:
    """A batch that does not fit ends the run: of the latents of a file, all or none are drawn."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CellError(f"{name}: out of memory with batch size {size}; try --batch-size {max(1, size // 2)}") from None


def _now(device: torch.device) -> float:
    synchronise(device)
    return time.perf_counter()


def sample_id(number: int) -> str:
    """Sorted as text, samples stay in order."""
    return f"{number:08d}"


def decode_latents(
    draw: Draw,
    tokenizer: Tokenizer,
    measurement: Measurement,
    suite: MetricSuite,
    store: SampleStore,
    images: Path,
    save_all: bool,
) -> None:
    """Decode this process's share of the latents; keep features and, of the first images or of all, PNG files.

    The column "decode.seconds" holds the time of each image; features lie under their extractor's identity. Raises
    CellError as `decode` does, or when memory runs out.
    """
    name, device, extractors = tokenizer.info.name, suite.device, suite.extractors.values()
    done = store.done(["decode.seconds"], [("fake", extract.identity) for extract in extractors])
    saved = {sample_id(number) for number in range(len(draw.labels) if save_all else FIRST)}
    done -= saved - {path.stem for path in images.glob("*.png")}
    share = [(k, [n for n in numbers if sample_id(n) not in done]) for k, numbers in draw.chunks()]

    def chunks() -> Iterator[tuple[list[str], Tensor, Tensor]]:
        for k, numbers in share:
            if numbers:
                latents = draw.read(k)[0][[number - k * CHUNK for number in numbers]]
                yield [sample_id(n) for n in numbers], latents, sample_seeds(draw.how.seed, numbers, DECODER)

    def step(ids: Sequence[str], latents: Tensor, seeds: Tensor) -> Callable[[], None]:
        latents, timer, side = latents.to(device), Timer(device), draw.generator.space.resolution
        if draw.generator.space.dtype == "uint8":
            latents = latents.round().clamp(0, 255).to(torch.uint8)
        safely = model_errors_as_cell_errors(name, ids)
        with safely, precision(device, autocast_dtype(measurement)), checks_deferred() as checks:
            fake = quantise(decode(tokenizer, latents, seeds, (side, side), ids, timer), "nearest")
        with torch.inference_mode():
            features = {("fake", e.identity): e(fake) for e in extractors}
        shown = {sample: image for sample, image in zip(ids, fake, strict=True) if sample in saved}
        landing = to_host([shown, features, checks])

        def finish() -> None:
            shown, features, checks = landing()
            with model_errors_as_cell_errors(name, ids):
                refuse(checks)
            write_images(images, shown)
            store.append(ids, {"decode.seconds": np.full(len(ids), timer.per_image()["decode"])}, features)

        return finish

    with bar(f"decode {name}", sum(len(numbers) for _, numbers in share)) as progress:
        measure(
            step,
            chunks(),
            name=name,
            device=device,
            limit=first_batch_size(measurement, device),
            batch_size=measurement.batch_size,
            progress=progress,
        )


def write_images(folder: Path, images: Mapping[str, np.ndarray]) -> None:
    """uint8 [3, H, W] by sample id, as PNG files, which lose nothing."""
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for sample, image in images.items():
            partial_file = folder / f".{sample}.tmp"
            Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(partial_file, format="PNG")
            partial_file.replace(folder / f"{sample}.png")


def pack_npz(folder: Path, labels: Sequence[int], resolution: int, path: Path) -> None:
    """The PNG files of `folder` as ADM's evaluator reads them: arr_0 uint8 [N, H, W, 3], arr_1 labels int64 [N].

    Images go through one by one, so any number of them fits into memory.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), resolution, resolution, 3)}
    with writable(path), zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for number in range(len(labels)):
                file.write(np.asarray(Image.open(folder / f"{sample_id(number)}.png")).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.array(labels, dtype=np.int64))
