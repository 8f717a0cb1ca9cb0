"""Timing of calls without arguments: warm-up, turns, peak memory. Nothing here knows what a call computes."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tokbench.runtime.device import release, synchronise, unless_full

Step = Callable[[], object]


@dataclass(frozen=True)
class TimingBudget:
    """How long to measure."""

    seconds: float = 3.0  # at least, per model and stage
    iterations: int = 20  # at least
    search_seconds: float = 0.3  # per batch size tried
    warm_ups: int = 10  # at most, before each timing


STANDARD = TimingBudget()
QUICK = TimingBudget(seconds=0.0, iterations=3, search_seconds=0.0, warm_ups=0)


def time_block(step: Step, iterations: int, device: torch.device) -> list[float]:
    """Seconds of each of `iterations` calls; one synchronisation at the end on CUDA."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(iterations):
            step()
            synchronise(device)
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    synchronise(device)
    return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]


def warm_up(step: Step, device: torch.device, limit: int = STANDARD.warm_ups) -> float:
    """Run until two calls in a row agree within 10 % (autotuning, allocator, clocks), at most `limit` times.

    -> seconds of the last call, infinity if `limit` is 0
    """
    last = math.inf
    for _ in range(limit):
        now = time_block(step, 1, device)[0]
        if abs(now - last) <= 0.1 * now:
            return now
        last = now
    return last


def take_turns(steps: Sequence[Step], device: torch.device, budget: TimingBudget) -> list[list[float] | None]:
    """Seconds of each call of every step, the steps taking turns until each has had its time; None: out of memory."""
    singles = [unless_full(partial(warm_up, step, device, budget.warm_ups)) for step in steps]
    seconds: list[list[float] | None] = [None if single is None else [] for single in singles]
    blocks = [max(1, min(10, int(0.2 / max(single, 1e-6)))) if single else 0 for single in singles]
    while True:
        waiting = [
            index
            for index, times in enumerate(seconds)
            if times is not None and (len(times) < budget.iterations or sum(times) < budget.seconds)
        ]
        if not waiting:
            return seconds
        for index in waiting:
            more = unless_full(partial(time_block, steps[index], blocks[index], device))
            seconds[index] = None if more is None else [*(seconds[index] or []), *more]


def peak_memory(step: Step, device: torch.device) -> tuple[int, int] | None:
    """Bytes allocated and reserved beyond what lay there before (weights, inputs); None on a CPU."""
    if device.type != "cuda":
        return None
    step()  # the first call may compile and try kernels
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    step()
    synchronise(device)
    after = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return after[0] - before[0], after[1] - before[1]


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that a large matrix product or a wide 3x3 convolution reaches, the better of them: decoding's ceiling.

    Both, because libraries differ: on AMD CPUs matrix products may reach less than convolutions.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    x, w = (torch.randn(n, 256, side, side, device=device, dtype=dtype) for n, side in ((4, 64), (256, 3)))
    x, w = x.contiguous(memory_format=torch.channels_last), w.contiguous(memory_format=torch.channels_last)
    rates = []
    for step, flops in (
        (lambda: a @ b, 2 * size**3),
        (lambda: torch.nn.functional.conv2d(x, w, padding=1), 2 * 4 * 64**2 * 256**2 * 9),
    ):
        warm_up(step, device)
        rates.append(flops / min(time_block(step, 10, device)))
    return max(rates)
