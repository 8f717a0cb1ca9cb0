"""Timing of one direction of a tokenizer: batch search, warm-up, turns, latency, memory and cost."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tokbench.data.pixels import quantise
from tokbench.errors import CellError, first_line
from tokbench.records.result import Stage
from tokbench.runtime.device import is_out_of_memory, precision, release
from tokbench.tokenizer import Tokenizer

STAGES = ("encode", "decode", "round-trip")
NEAR_BEST = 0.98  # the smallest batch within 2 % of the best rate is reported


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float = 3.0  # at least, per model and stage
    iterations: int = 20  # at least
    search_seconds: float = 0.3  # per batch size tried
    max_batch: int = 1024


STANDARD = Effort()
QUICK = Effort(seconds=0.0, iterations=3, search_seconds=0.0, max_batch=2)
CPU_MAX_BATCH = 16  # a CPU gains nothing beyond, and its memory is everybody's


@dataclass
class Row:
    """One model at one resolution while it is being measured."""

    spec: str
    tokenizer: Tokenizer
    resolution: int
    dtype: torch.dtype
    device: torch.device
    stages: dict[str, Stage] = field(default_factory=dict)
    sweep: dict[str, dict[int, float]] = field(default_factory=dict)
    memory: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    compile_seconds: float | None = None
    gate: Mapping[str, object] = field(default_factory=dict)
    failed: str | None = None

    def step(self, stage: str, batch_size: int) -> Callable[[], Tensor]:
        """What is timed: a call without arguments on fixed inputs."""
        tokenizer, size = self.tokenizer, (self.resolution, self.resolution)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (batch_size, 3, *size), dtype=torch.uint8, generator=generator).to(self.device)
        seeds = torch.arange(batch_size).to(self.device)

        def encode() -> Tensor:
            with precision(self.device, self.dtype):
                return tokenizer.encode(images, sample=False, seeds=seeds)

        def decode(latents: Tensor) -> Tensor:
            with precision(self.device, self.dtype):
                return quantise(tokenizer.decode(latents, seeds=seeds, size=size), "nearest")

        if stage == "encode":
            return encode
        if stage == "round-trip":
            return lambda: decode(encode())
        latents = encode().clone()
        return lambda: decode(latents)

    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] on the CPU -> the same, in batches of four."""
        parts = []
        for index, batch in enumerate(images.split(4)):
            seeds = torch.arange(len(batch)) + 4 * index
            with precision(self.device, self.dtype):
                latents = self.tokenizer.encode(batch.to(self.device), sample=False, seeds=seeds)
                size = (batch.shape[2], batch.shape[3])
                parts.append(quantise(self.tokenizer.decode(latents, seeds=seeds, size=size), "nearest").cpu())
        return torch.cat(parts)


def time_block(step: Callable[[], Tensor], iterations: int, device: torch.device) -> list[float]:
    """Seconds of each of `iterations` calls; one synchronisation at the end on CUDA."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(iterations):
            step()
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]


def warm_up(step: Callable[[], Tensor], device: torch.device, limit: int = 10) -> float:
    """Run until two calls in a row agree within 10 % (autotuning, allocator, clocks); seconds of the last call."""
    last = math.inf
    for _ in range(limit):
        now = time_block(step, 1, device)[0]
        if abs(now - last) <= 0.1 * now:
            return now
        last = now
    return last


def rate_at(row: Row, stage: str, batch_size: int, effort: Effort) -> float | None:
    """Images/s at a batch size, None if it does not fit. Raises what is not a lack of memory."""

    def measure() -> list[float]:
        step = row.step(stage, batch_size)
        if effort == QUICK:
            return time_block(step, 1, row.device)
        last = warm_up(step, row.device)
        return time_block(step, max(2, min(50, math.ceil(effort.search_seconds / max(last, 1e-6)))), row.device)

    seconds = _unless_full(measure)
    if seconds is None:
        release(row.device)
        return None
    return batch_size / statistics.median(seconds)


def find_batch(row: Row, stage: str, batch_sizes: Sequence[int], effort: Effort) -> int:
    """The smallest batch within 2 % of the best rate; doubles until memory ends or two doublings gain nothing."""
    rates: dict[int, float] = {}
    for batch_size in batch_sizes:
        rate = rate_at(row, stage, batch_size, effort)
        if rate is None:
            break
        rates[batch_size] = rate
        tried = list(rates.values())
        if len(tried) > 3 and max(tried[-2:]) * NEAR_BEST < max(tried[:-2]):
            break
    if not rates:
        raise CellError(f"{row.spec}: out of memory at {row.resolution} px with batch size {batch_sizes[0]}")
    row.sweep[stage] = rates
    return min(size for size, rate in rates.items() if rate >= NEAR_BEST * max(rates.values()))


def peak_memory(step: Callable[[], Tensor], device: torch.device) -> tuple[int, int] | None:
    """Bytes allocated and reserved beyond what lay there before (weights, inputs); None on a CPU."""
    if device.type != "cuda":
        return None
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    reserved_before = torch.cuda.memory_reserved(device)
    step()
    torch.cuda.synchronize(device)
    reserved = torch.cuda.max_memory_reserved(device) - reserved_before
    return torch.cuda.max_memory_allocated(device) - before, reserved


def interleave(steps: Sequence[Callable[[], Tensor]], device: torch.device, effort: Effort) -> list[list[float] | None]:
    """Seconds per iteration of every step, the steps taking turns until each has had its time; None: out of memory."""
    quick = effort == QUICK
    singles = [[math.inf] if quick else _unless_full(partial(_warm, step, device)) for step in steps]
    seconds: list[list[float] | None] = [None if single is None else [] for single in singles]
    blocks = [max(1, min(10, int(0.2 / max(single[0], 1e-6)))) if single else 0 for single in singles]
    while True:
        waiting = [
            index
            for index, times in enumerate(seconds)
            if times is not None and (len(times) < effort.iterations or sum(times) < effort.seconds)
        ]
        if not waiting:
            return seconds
        for index in waiting:
            more = _unless_full(partial(time_block, steps[index], blocks[index], device))
            seconds[index] = None if more is None else [*(seconds[index] or []), *more]


def _warm(step: Callable[[], Tensor], device: torch.device) -> list[float]:
    return [warm_up(step, device)]


def _unless_full(measure: Callable[[], list[float]]) -> list[float] | None:
    """What `measure` gives, None if memory does not suffice; the traceback, which keeps tensors alive, ends here."""
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def count_flops(row: Row) -> dict[str, int]:
    """Floating-point operations an image of encode and decode, 2 x MAC, attention included (eager, batch 1)."""
    counts = {}
    for stage in ("encode", "decode"):
        step = row.step(stage, 1)
        with FlopCounterMode(display=False) as counter:
            step()
        counts[stage] = int(counter.get_total_flops())
    return counts


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def summarise(row: Row, stage: str, batch_size: int, seconds: list[float], single: list[float]) -> Stage:
    rate = batch_size / statistics.median(seconds)
    memory = row.memory[stage]
    return Stage(
        batch_size=batch_size,
        images_per_second=rate,
        megapixels_per_second=rate * row.resolution**2 / 1e6,
        latency_ms=1000 * statistics.median(single),
        latency_p10_ms=1000 * percentile(single, 0.1),
        latency_p90_ms=1000 * percentile(single, 0.9),
        memory_allocated=memory[0] if memory else None,
        memory_reserved=memory[1] if memory else None,
        sweep={str(size): rate for size, rate in row.sweep[stage].items()},
    )


def measure_stage(rows: Sequence[Row], stage: str, batch_sizes: Sequence[int], effort: Effort) -> None:
    """Fill `stages[stage]` of every row, or its `failed`."""
    chosen: list[tuple[Row, int]] = []
    for row in rows:
        try:
            chosen.append((row, find_batch(row, stage, batch_sizes, effort)))
            row.memory[stage] = peak_memory(row.step(stage, chosen[-1][1]), row.device)
        except (CellError, RuntimeError, ValueError) as error:
            row.failed = f"{stage}: {first_line(error)}"
    chosen = [(row, size) for row, size in chosen if row.failed is None]
    if not chosen:
        return
    device = chosen[0][0].device
    seconds = interleave([row.step(stage, size) for row, size in chosen], device, effort)
    singles = interleave([row.step(stage, 1) for row, _ in chosen], device, effort)
    for (row, size), times, single in zip(chosen, seconds, singles, strict=True):
        if times is None or single is None:
            row.failed = f"{stage}: out of memory beside the other models; measure it by itself"
        else:
            row.stages[stage] = summarise(row, stage, size, times, single)
