"""Throughput, latency, memory and cost of tokenizers, measured side by side.

Method: every model of a resolution is loaded, the batch size is found by doubling, and then the models take turns
(A B A B ...) until each has run for the budget's seconds and iterations, so that drifting clocks favour nobody.
The median iteration counts. Timed is what a user waits for: uint8 images in, latents out; latents in, noise drawn,
network run, uint8 images out. Copies between host and device are not in it.
"""

import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokbench.data.crops import crop
from tokbench.data.open import open_source
from tokbench.data.pixels import quantise, to_float
from tokbench.errors import CellError, InputError, first_line, place, trace
from tokbench.evaluation.model import with_facts
from tokbench.metrics.perceptual import lpips_network
from tokbench.metrics.pixel import psnr, squared_error
from tokbench.protocols import find_protocol
from tokbench.records import provenance
from tokbench.records.files import slug, write_whole
from tokbench.records.result import SpeedResult, Stage, TokenizerInfo, to_json
from tokbench.registry import Spec, create, numbered, parse_all
from tokbench.runtime.device import (
    casts_kept,
    describe_device,
    precision,
    prepare,
    synchronise,
    unless_full,
    warn_of_emulation,
)
from tokbench.speed.timing import (
    QUICK,
    STANDARD,
    Step,
    TimingBudget,
    peak_memory,
    peak_rate,
    take_turns,
    time_block,
    warm_up,
)
from tokbench.tokenizer import Tokenizer

STAGES = ("encode", "decode", "round-trip")
NEAR_BEST = 0.98  # the smallest batch within 2 % of the best rate is reported
LARGEST_BATCH = {"cpu": 16, "cuda": 1024, "mps": 16}  # a CPU gains nothing beyond, and its memory is everybody's


@dataclass
class SpeedCase:
    """A tokenizer on its device and, for one resolution, the record that is being filled."""

    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    record: SpeedResult

    def add(self, **found: Any) -> None:
        self.record = replace(self.record, **found)

    def encode(self, images: Tensor, seeds: Tensor) -> Tensor:
        with precision(self.device, self.dtype):
            return self.tokenizer.encode(images, sample=False, seeds=seeds)

    def decode(self, latents: Tensor, seeds: Tensor) -> Tensor:
        """Latents -> uint8 [B, 3, H, W]"""
        with precision(self.device, self.dtype):
            size = (self.record.resolution, self.record.resolution)
            return quantise(self.tokenizer.decode(latents, seeds=seeds, size=size), "nearest")

    def step(self, stage: str, batch_size: int) -> Callable[[], Tensor]:
        """What is timed: a call without arguments on fixed inputs."""
        shape = (batch_size, 3, self.record.resolution, self.record.resolution)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(self.device)
        seeds = torch.arange(batch_size).to(self.device)
        if stage == "encode":
            return lambda: self.encode(images, seeds)
        if stage == "round-trip":
            return lambda: self.decode(self.encode(images, seeds), seeds)
        with torch.compiler.set_stance("force_eager"):  # not what is timed: not worth a graph
            latents = self.encode(images, seeds).clone()
        return lambda: self.decode(latents, seeds)

    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] on the CPU -> the same, one at a time: no other batch size has to be compiled."""
        parts = []
        for index, image in enumerate(images.split(1)):
            seeds = torch.tensor([index])
            parts.append(self.decode(self.encode(image.to(self.device), seeds), seeds).cpu())
        return torch.cat(parts)

    @contextlib.contextmanager
    def survives(self, doing: str = "") -> Iterator[None]:
        """An error ends this case alone."""
        try:
            yield
        except Exception as error:  # a model is others' code, under a compiler: whatever it raises, the others go on
            trace(error)
            self.add(failed=(f"{doing}: " if doing else "") + first_line(error) + place(error))


# Beyond the limit of graphs, for each model, resolution and batch size one, a model would silently run eagerly.
@torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True)  # type: ignore[untyped-decorator]
def measure(
    models: str,
    resolutions: Sequence[int],
    *,
    device: torch.device,
    out: Path,
    dtype: torch.dtype = torch.float32,
    batch_sizes: Sequence[int] | None = None,
    compile: bool = False,
    random_weights: bool = False,
    budget: TimingBudget = STANDARD,
    stages: Sequence[str] = STAGES,
) -> list[SpeedResult]:
    """Time every model at every resolution; one record each under `out`/<hardware>/, failed ones with their reason,
    written anew after each stage.

    `batch_sizes` None: doubled until memory ends. The budget QUICK also means: batches of 1 and 2, no equality check.
    Raises InputError for a wrong spec before anything is loaded.
    """
    warn_of_emulation(dtype, device)
    tokenizers = load(models, device, random_weights=random_weights)
    largest = 2 if budget == QUICK else LARGEST_BATCH[device.type]
    sizes = batch_sizes or [2**power for power in range(largest.bit_length())]
    chosen = {"compile": compile, "random_weights": random_weights, "quick": budget == QUICK}
    settings, machine = conditions(device, dtype, budget)
    results = []
    for resolution in resolutions:
        cases, failures = [], []
        for spec, tokenizer in tokenizers:
            record = SpeedResult(
                tokenizer=TokenizerInfo(spec.row, "unknown"),
                resolution=resolution,
                hardware=str(machine["device"]),
                settings={**settings, **chosen, "spec": spec.text},
                provenance=machine,
            )
            if isinstance(tokenizer, CellError):
                failures.append(replace(record, failed=str(tokenizer)))
            else:
                cases.append(SpeedCase(tokenizer, device, dtype, replace(record, tokenizer=tokenizer.info)))
        for case in cases:
            with case.survives():
                set_up(case, stages[0])
        for stage in stages:
            with casts_kept(device):
                measure_stage(cases, stage, device, sizes, budget)
            for result in [case.record for case in cases] + failures:
                write_whole(record_path(out, result), to_json(result))
        results += [case.record for case in cases] + failures
    return results


def load(models: str, device: torch.device, *, random_weights: bool) -> list[tuple[Spec, Tokenizer | CellError]]:
    """Every tokenizer, on the device, or why it cannot be loaded."""
    loaded: list[tuple[Spec, Tokenizer | CellError]] = []
    for spec in parse_all(models):
        try:
            tokenizer = create(spec, random_weights=random_weights)
            prepare(tokenizer, device)
        except CellError as error:
            trace(error)
            loaded.append((spec, error))
            continue
        names = [other.info.name for _, other in loaded if not isinstance(other, CellError)]
        tokenizer.info = replace(tokenizer.info, name=numbered(tokenizer.info.name, names))
        tokenizer.info = with_facts(tokenizer)
        loaded.append((spec, tokenizer))
    return loaded


def set_up(case: SpeedCase, stage: str) -> None:
    """Count the cost, compile if asked (timed on a stage of one image), compare a fast setting with float32 eager.

    Raises what the model raises.
    """
    info, asked = case.tokenizer.info, case.record.settings
    if case.record.resolution % info.size_multiple:
        raise CellError(f"{case.record.resolution} px is not divisible by {info.size_multiple}")
    with torch.compiler.set_stance("force_eager"):
        case.add(flops=count_flops(case))
    if asked["compile"]:
        for network in case.tokenizer.networks.values():
            network.compile(dynamic=False)
        start = time.perf_counter()
        case.step(stage, 1)()
        synchronise(case.device)
        case.add(compile_seconds=time.perf_counter() - start)
    if not asked["compile"] and case.dtype == torch.float32:
        check: dict[str, object] = {"passed": None, "reason": "this is the reference setting: float32, eager"}
    elif asked["quick"] or asked["random_weights"]:
        check = {"passed": None, "reason": "quick" if asked["quick"] else "random weights"}
    else:
        check = check_equality(case)
    case.add(equality_check=check)


def count_flops(case: SpeedCase) -> dict[str, int]:
    """Floating-point operations an image of encode and decode, 2 x MAC, attention included (eager, batch 1).

    Attention is computed plainly meanwhile: of its fused kernels torch knows some and counts the others as nothing.
    """
    counts = {}
    for stage in ("encode", "decode"):
        step = case.step(stage, 1)
        with frozen(case.tokenizer), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step()
        counts[stage] = int(counter.get_total_flops())
    return counts


@contextlib.contextmanager
def frozen(tokenizer: Tokenizer) -> Iterator[None]:
    """Inside, no parameter wants gradients: torch's counter of operations stumbles over those that do."""
    wanting = [p for network in tokenizer.networks.values() for p in network.parameters() if p.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_()


def check_equality(case: SpeedCase) -> dict[str, object]:
    """`equality_check` of the case's setting against float32, eager, on the bundled photographs."""
    source, protocol = open_source("samples"), find_protocol("adm")
    crops = [crop(source.read(index), case.record.resolution, protocol) for index in range(len(source.ids))]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in crops])
    with torch.compiler.set_stance("force_eager"):
        exact = replace(case, dtype=torch.float32).reconstruct(images)
    return equality_check(images, exact, case.reconstruct(images))


def equality_check(images: Tensor, exact: Tensor, fast: Tensor) -> dict[str, object]:
    """Is the fast reconstruction as good as the exact one? uint8 [N, 3, H, W] each.

    Passed when the mean lpips-alex to the input moves by at most .001 and the mean PSNR by at most 0.02 dB.
    """

    def shift(score: Callable[[Tensor, Tensor], Tensor]) -> float:
        parts = zip(images.split(4), exact.split(4), fast.split(4), strict=True)
        with torch.inference_mode():
            return float(sum((score(i, f) - score(i, e)).sum() for i, e, f in parts)) / len(images)

    psnr_shift = shift(lambda real, fake: psnr(squared_error(real, fake)))
    record: dict[str, object] = {"images": len(images), "psnr_shift": psnr_shift}
    try:
        network = lpips_network("alex", safe=False)
    except InputError as error:  # its weights are not here and cannot be fetched
        return record | {"passed": None, "reason": str(error)}
    lpips_shift = shift(lambda real, fake: network(to_float(real), to_float(fake)))
    passed = abs(psnr_shift) <= 0.02 and abs(lpips_shift) <= 0.001
    return record | {"passed": passed, "lpips_alex_shift": lpips_shift}


def measure_stage(
    cases: Sequence[SpeedCase], stage: str, device: torch.device, batch_sizes: Sequence[int], budget: TimingBudget
) -> None:
    """Fill `stages[stage]` of every case that has not failed, or its `failed`."""
    found: list[tuple[SpeedCase, dict[int, float], tuple[int, int] | None]] = []
    steps: list[Step] = []
    singles: list[Step] = []
    for case in (case for case in cases if case.record.failed is None):
        print(f"{case.record.resolution} px: {stage} of {case.record.tokenizer.name}", file=sys.stderr)
        with case.survives(stage):
            rates = search_batch(case, stage, batch_sizes, budget)
            step, single = case.step(stage, best_batch(rates)), case.step(stage, 1)
            found.append((case, rates, peak_memory(step, case.device)))
            steps.append(step)
            singles.append(single)
    times = zip(take_turns(steps, device, budget), take_turns(singles, device, budget), strict=True)
    for (case, rates, memory), (seconds, single_seconds) in zip(found, times, strict=True):
        if seconds is None or single_seconds is None:
            case.add(failed=f"{stage}: out of memory beside the other models; measure it by itself")
        else:
            figures = summarise(case.record.resolution, rates, memory, seconds, single_seconds)
            case.add(stages={**case.record.stages, stage: figures})


def search_batch(case: SpeedCase, stage: str, batch_sizes: Sequence[int], budget: TimingBudget) -> dict[int, float]:
    """Images/s at growing batch sizes until memory ends or two of them gain nothing; CellError if none fits.

    In eager mode: to compile for every size would take hours.
    """
    rates: dict[int, float] = {}
    for batch_size in batch_sizes:
        with torch.compiler.set_stance("force_eager"):
            seconds = unless_full(partial(time_briefly, case, stage, batch_size, budget))
        if seconds is None:
            break
        rates[batch_size] = batch_size / statistics.median(seconds)
        tried = list(rates.values())
        if len(tried) > 3 and max(tried[-2:]) * NEAR_BEST < max(tried[:-2]):
            break
    if not rates:
        raise CellError(f"out of memory with batch size {batch_sizes[0]}")
    return rates


def time_briefly(case: SpeedCase, stage: str, batch_size: int, budget: TimingBudget) -> list[float]:
    """Seconds of at least two iterations, for about `search_seconds`."""
    step = case.step(stage, batch_size)
    last = warm_up(step, case.device, budget.warm_ups)
    return time_block(step, max(2, min(50, math.ceil(budget.search_seconds / max(last, 1e-6)))), case.device)


def best_batch(rates: Mapping[int, float]) -> int:
    """The smallest batch size within 2 % of the best rate."""
    return min(size for size, rate in rates.items() if rate >= NEAR_BEST * max(rates.values()))


def summarise(
    resolution: int,
    rates: Mapping[int, float],
    memory: tuple[int, int] | None,
    seconds: Sequence[float],
    singles: Sequence[float],
) -> Stage:
    """A stage's figures from the seconds of iterations at the best batch size and at batch size 1."""
    rate = best_batch(rates) / statistics.median(seconds)
    p10, median, p90 = (1000 * float(value) for value in np.quantile(singles, (0.1, 0.5, 0.9)))
    allocated, reserved = memory or (None, None)
    return Stage(
        batch_size=best_batch(rates),
        images_per_second=rate,
        megapixels_per_second=rate * resolution**2 / 1e6,
        latency_ms=median,
        latency_p10_ms=p10,
        latency_p90_ms=p90,
        memory_allocated=allocated,
        memory_reserved=reserved,
        sweep={str(size): rate for size, rate in rates.items()},
    )


def conditions(
    device: torch.device, dtype: torch.dtype, budget: TimingBudget
) -> tuple[dict[str, object], dict[str, object]]:
    """(settings, provenance) of a record: what a speed depends on besides model, resolution and what was chosen."""
    settings: dict[str, object] = {
        "dtype": str(dtype).removeprefix("torch."),
        "iterations": budget.iterations,
        "seconds": budget.seconds,
        "memory_format": "channels_last",
    }
    about: dict[str, object] = asdict(provenance.collect(describe_device(device), device.type))
    about["load_average"] = os.getloadavg()[0]
    with precision(device, dtype):
        about["peak_flops_per_second"] = peak_rate(device, dtype)
        if device.type == "cuda":
            settings["tf32"] = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
            about |= {"cudnn": torch.backends.cudnn.version(), **nvidia_smi(device)}
        else:
            settings["threads"] = torch.get_num_threads()
    return settings, about


def nvidia_smi(device: torch.device) -> dict[str, str]:
    """Driver, power limit and clock of a GPU, {} where the program is missing or fails."""
    wanted = ("driver_version", "power.limit", "clocks.sm", "utilization.gpu")
    uuid = torch.cuda.get_device_properties(device).uuid  # without the prefix that nvidia-smi wants
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(wanted)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(wanted, done.stdout.strip().split(", "), strict=False))


def record_path(out: Path, result: SpeedResult) -> Path:
    """Where a record lies: by hardware, name, resolution, dtype and compilation."""
    compiled = "-compile" if result.settings["compile"] else ""
    return (
        out
        / slug(result.hardware)
        / f"{result.tokenizer.name}-{result.resolution}-{result.settings['dtype']}{compiled}.json"
    )


def show(results: Sequence[SpeedResult], reference: str | None, plots: Path | None) -> int:
    """Print the table and draw the plot; the exit status, 1 if a row failed."""
    from tokbench.report import speed as report
    from tokbench.report import tables

    tables.show(report.speed_tables(results, reference), report.WIDTH)
    if plots is not None:
        from tokbench.report.curves import rate_against_resolution

        rate_against_resolution(results, plots / "speed.png")
    return int(any(result.failed for result in results))
