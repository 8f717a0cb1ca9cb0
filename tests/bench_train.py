"""Training's speed in its parts: loading alone by worker processes, the step alone, both, and how long a step waits.

    python -m tests.bench_train                    (--device cuda --data imagenet:/data/imagenet where there are such)
    python -m tests.bench_train --quick

Without --data, JPEGs of ImageNet's usual size, too many to keep decoded, are made of the bundled photographs. Target:
N workers load within 5 % of N times what one does, as long as there are cores.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ssdd_models.stages import SMALL_STAGES
from ssdd_models.train import Losses, build
from tests.bench_data import make_photos
from tokbench.data import training_crops
from tokbench.data.open import open_source
from tokbench.data.training_crops import CropConfig, PhotoCrops, batches
from tokbench.registry import TrainOptions
from tokbench.runtime.device import describe_device, select_device
from tokbench.runtime.processes import cores
from tokbench.runtime.seeding import sample_seeds
from tokbench.training.optimisation import make_optimizer, optimizer_step, place

Batches = Iterator[tuple[list[int], torch.Tensor, list[str]]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Training's speed in its parts.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    asked = parser.parse_args()
    if asked.quick:
        asked.size, asked.batch_size, asked.workers, asked.seconds = 32, 2, "1", 0.5
    training_crops.KEEP_BYTES = 1  # as of a data set that does not fit into memory
    with tempfile.TemporaryDirectory() as folder:
        data = asked.data or str(make_photos(Path(folder) / "photos", 64 if asked.quick else 512, (500, 375)))
        source = open_source(data)
        crops = PhotoCrops(source, range(len(source)), CropConfig(asked.size, (asked.size, 2 * asked.size)), seed=0)
        bench(crops, asked)


def bench(crops: PhotoCrops, asked: argparse.Namespace) -> None:
    device, seconds = select_device(asked.device), asked.seconds
    counts = [int(count) for count in asked.workers.split(",")]
    print(f"{describe_device(device)}, {cores()} cores; batches of {asked.batch_size} at {asked.size} px")

    def loaded(workers: int) -> Batches:
        return batches(
            crops, first_step=0, num_steps=1_000_000, batch_size=asked.batch_size, rank=0, world=1,
            num_workers=workers, pin_memory=device.type == "cuda",
        )  # fmt: skip

    alone = {}
    for count in counts:
        alone[count], _ = rate(loaded(count), lambda batch: None, seconds, asked.batch_size)
        ideal = alone[count] / (alone[counts[0]] * count / counts[0])
        print(f"loading, {count} workers      {alone[count]:8.1f} images/s  {ideal:5.0%} of {count} times one")
    take = step(asked.size, device)
    kept = next(loaded(0))
    repeated = (kept for _ in itertools.count())
    step_alone, _ = rate(repeated, take, seconds, asked.batch_size)
    print(f"step alone              {step_alone:8.1f} images/s")
    both, waiting = rate(loaded(counts[-1]), take, seconds, asked.batch_size)
    slower = min(step_alone, alone[counts[-1]])
    print(f"both, {counts[-1]} workers         {both:8.1f} images/s  {both / slower:5.0%} of the slower part")
    print(f"the step waits          {waiting:8.1%} of the time")


def rate(stream: Iterator[Any], take: Callable[[Any], None], seconds: float, size: int) -> tuple[float, float]:
    """(images a second, share of the time spent waiting for a batch) after two batches of warm-up."""
    for _ in range(2):
        take(next(stream))
    start, waited, done = time.perf_counter(), 0.0, 0
    while time.perf_counter() - start < seconds or done == 0:
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        take(batch)
        done += 1
    elapsed = time.perf_counter() - start
    return done * size / elapsed, waited / elapsed


def step(size: int, device: torch.device) -> Callable[[Any], None]:
    """A training step of the small SSDD, joint, without a loss network: loading is what is looked at."""
    small = SMALL_STAGES["joint"]
    config = replace(small, weights=replace(small.weights, perceptual=0.0), crops=replace(small.crops, size=size))
    model, _ = build(config, TrainOptions(data="", out=Path()))
    run = config.run.on(device)
    place([model.encoder, model.decoder], run, device, ())
    losses, optimizer = Losses(config, model, device), make_optimizer(model.named_parameters(), config.optim)
    parameters = list(model.parameters())

    def take(batch: tuple[list[int], torch.Tensor, list[str]]) -> None:
        numbers, pixels, _ = batch
        real = pixels.to(device, non_blocking=True).float().div_(127.5).sub_(1)
        real = real.contiguous(memory_format=torch.channels_last)
        seeds = [sample_seeds(0, numbers, stream) for stream in range(3)]
        with torch.autocast(device.type, torch.bfloat16, enabled=run.dtype == "bfloat16"):
            terms, *_ = losses.denoise(real, seeds, 0)
        torch.stack(list(terms.values())).sum().backward()
        norm = optimizer_step(optimizer, parameters, 1e-4, 1.0)
        if device.type == "cuda":
            norm.item()  # so that a step's time is its own

    return take


if __name__ == "__main__":
    main()
