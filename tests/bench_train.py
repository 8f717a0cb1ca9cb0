"""Training's speed in its parts: loading alone by worker processes, the step alone, both, and how long a step waits.

    python -m tests.bench_train                    (--device cuda --data imagenet:/data/imagenet where there are such)
    python -m tests.bench_train --loading          (a minute and a half of an idle machine: loading alone)
    python -m tests.bench_train --quick

Without --data, JPEGs of ImageNet's usual size, too many to keep decoded, are made of the bundled photographs. Target:
N workers load within 5 % of N times what one does, as long as there are cores. --loading takes turns, so that a machine
which is not quite idle slows all alike, and holds N workers against N processes that cut the same crops without a
loader: two threads of one core are not two cores.
"""

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
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
from tokbench.data.training_crops import AHEAD, CropConfig, PhotoCrops, batches
from tokbench.registry import TrainOptions
from tokbench.runtime.device import describe_device, select_device
from tokbench.runtime.processes import cores
from tokbench.runtime.seeding import sample_seeds
from tokbench.training.optimisation import make_optimizer, optimizer_step, place

Batches = Iterator[tuple[list[int], torch.Tensor, list[str]]]
TURNS, SECONDS = 5, 4.0  # of --loading: four measurements a turn


def main() -> None:
    parser = argparse.ArgumentParser(description="Training's speed in its parts.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--loading", action="store_true", help="loading alone, by 1 and 2 workers in turns")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    asked = parser.parse_args()
    if asked.quick:
        asked.size, asked.batch_size, asked.workers, asked.seconds = 32, 2, "1", 0.5
    training_crops.KEEP_BYTES = 1  # as of a data set that does not fit into memory
    with tempfile.TemporaryDirectory() as folder:
        data = asked.data or str(make_photos(Path(folder) / "photos", 64 if asked.quick else 512, (500, 375)))
        source = open_source(data)
        crops = PhotoCrops(source, range(len(source)), CropConfig(asked.size, (asked.size, 2 * asked.size)), seed=0)
        device = select_device(asked.device)
        print(f"{describe_device(device)}, {cores()} cores; batches of {asked.batch_size} at {asked.size} px")
        (loading if asked.loading else bench)(crops, asked, device)


def load(crops: PhotoCrops, workers: int, asked: argparse.Namespace, device: torch.device) -> Batches:
    """Batches without end. Those that workers have ready before anybody asks are dropped: the others come at their own
    pace."""
    stream = batches(
        crops, first_step=0, num_steps=1_000_000, batch_size=asked.batch_size, rank=0, world=1, num_workers=workers,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    return itertools.islice(stream, AHEAD * workers, None)


def loading(crops: PhotoCrops, asked: argparse.Namespace, device: torch.device) -> None:
    """1 and 2 workers beside 1 and 2 processes that cut the same crops without a loader, in turns."""
    turns, seconds = (1, 0.5) if asked.quick else (TURNS, SECONDS)
    rates: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for turn in range(turns):
        for count in (1, 2) if turn % 2 else (2, 1):
            rates["processes", count].append(cut_beside(crops, count, asked.size, seconds))
            loaded, _ = rate(load(crops, count, asked, device), lambda batch: None, seconds, asked.batch_size)
            rates["workers", count].append(loaded)
    factors = {}
    for kind in ("processes", "workers"):
        one, two = rates[kind, 1], rates[kind, 2]
        factors[kind] = statistics.median(b / a for a, b in zip(one, two, strict=True))
        means = f"{statistics.median(one):8.1f} {statistics.median(two):8.1f} images/s"
        print(f"one and two {kind:<10}{means}  {factors[kind]:.2f} times")
    reached = factors["workers"] / factors["processes"]
    print(f"two workers reach {reached:.0%} of what two such processes do; target: 95 %")
    worker, taker = cpu_times(crops, asked, device)
    print(f"CPU time of an image: {worker:.2f} ms in a worker, {taker:.3f} ms in the process that trains")


def cut_beside(crops: PhotoCrops, count: int, size: int, seconds: float) -> float:
    """Images a second of `count` processes without a loader, together; their start is not timed."""
    fork = multiprocessing.get_context("fork")
    start, rates = fork.Barrier(count), fork.SimpleQueue()
    children = [fork.Process(target=cut, args=(crops, size, k, seconds, start, rates)) for k in range(count)]
    for child in children:
        child.start()
    total = sum(rates.get() for _ in children)
    for child in children:
        child.join()
    return total


def cut(crops: PhotoCrops, size: int, first: int, seconds: float, start: Any, rates: Any) -> None:
    """One of these processes: every second crop from `first` on, for as long."""
    start.wait()
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        crops[first + 2 * done, size]
        done += 1
    rates.put(done / (time.perf_counter() - begin))


def cpu_times(crops: PhotoCrops, asked: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Milliseconds of CPU time an image costs where it is decoded and where it is received: a busy machine does not
    change them much."""
    images = 16 if asked.quick else 256
    begin = time.process_time()
    for number in range(images):
        crops[number, asked.size]
    decoded = time.process_time() - begin
    stream = load(crops, 1, asked, device)
    next(stream)
    begin, received = time.process_time(), 0
    while received < images:
        received += len(next(stream)[1])
    return 1000 * decoded / images, 1000 * (time.process_time() - begin) / received


def bench(crops: PhotoCrops, asked: argparse.Namespace, device: torch.device) -> None:
    counts, seconds, alone = [int(count) for count in asked.workers.split(",")], asked.seconds, {}
    for count in counts:
        alone[count], _ = rate(load(crops, count, asked, device), lambda batch: None, seconds, asked.batch_size)
        ideal = alone[count] / (alone[counts[0]] * count / counts[0])
        print(f"loading, {count} workers      {alone[count]:8.1f} images/s  {ideal:5.0%} of {count} times one")
    take = step(asked.size, device)
    kept = next(load(crops, 0, asked, device))
    repeated = (kept for _ in itertools.count())
    step_alone, _ = rate(repeated, take, seconds, asked.batch_size)
    print(f"step alone              {step_alone:8.1f} images/s")
    both, waiting = rate(load(crops, counts[-1], asked, device), take, seconds, asked.batch_size)
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
