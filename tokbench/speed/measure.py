"""Throughput, latency, memory and cost of tokenizers, measured side by side.

Method: every model of a resolution is loaded, the batch size is found by doubling, and then the models take turns
(A B A B ...) until each has run for `Effort.seconds` and `Effort.iterations`, so that drifting clocks favour nobody.
The median iteration counts. Timed is what a user waits for: uint8 images in, latents out; latents in, noise drawn,
network run, uint8 images out. Copies between host and device are not in it.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokbench.data.crops import crop
from tokbench.data.open import open_source
from tokbench.data.pixels import to_float
from tokbench.errors import CellError, InputError, first_line
from tokbench.evaluation.plan import with_facts
from tokbench.metrics.perceptual import lpips_network
from tokbench.metrics.pixel import psnr, squared_error
from tokbench.protocols import find_protocol
from tokbench.records import provenance
from tokbench.records.files import slug, write_whole
from tokbench.records.result import SpeedResult, TokenizerInfo, to_json
from tokbench.registry import Spec, create, parse, parse_all
from tokbench.runtime.device import describe_device, find_dtype, prepare, select_device
from tokbench.speed.timing import (
    CPU_MAX_BATCH,
    QUICK,
    STAGES,
    STANDARD,
    Effort,
    Row,
    count_flops,
    measure_stage,
    time_block,
    warm_up,
)
from tokbench.tokenizer import Tokenizer


def compile_networks(row: Row) -> float:
    """torch.compile every network in place; seconds that the first round trip takes."""
    for network in row.tokenizer.networks.values():
        network.compile(dynamic=False)
    start = time.perf_counter()
    row.step("round-trip", 1)()
    if row.device.type == "cuda":
        torch.cuda.synchronize(row.device)
    return time.perf_counter() - start


def to_result(row: Row, settings: Mapping[str, object], about: Mapping[str, object], hardware: str) -> SpeedResult:
    return SpeedResult(
        tokenizer=row.tokenizer.info,
        resolution=row.resolution,
        hardware=hardware,
        settings={**settings, "spec": row.spec},
        stages=row.stages,
        flops=row.flops,
        compile_seconds=row.compile_seconds,
        gate=row.gate,
        failed=row.failed,
        provenance=about,
    )


@dataclass(frozen=True)
class SpeedOptions:
    """What `tokbench speed` was asked for."""

    models: str
    resolutions: tuple[int, ...]
    device: torch.device
    out: Path
    dtype: torch.dtype = torch.float32
    compile: bool = False
    batch_sizes: tuple[int, ...] | None = None  # None: doubled until memory ends
    random_weights: bool = False
    effort: Effort = STANDARD  # QUICK also means: the default decode steps, no equality gate

    @classmethod
    def read(cls, *, device: str, dtype: str, quick: bool, **others: Any) -> "SpeedOptions":
        """The options with device, dtype and effort given by name; InputError for an unknown one."""
        effort = QUICK if quick else STANDARD
        return cls(device=select_device(device), dtype=find_dtype(dtype), effort=effort, **others)

    @property
    def quick(self) -> bool:
        return self.effort == QUICK


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """`128,256` -> (128, 256); InputError naming the option for anything but positive whole numbers."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise InputError(f"{option} {text}: expected positive whole numbers, comma-separated")
    return numbers


def show(results: Sequence[SpeedResult], reference: str | None, plots: Path | None) -> int:
    """Print the table and draw the plots; the exit status, 1 if a row failed."""
    from rich.console import Console

    from tokbench.report import speed as report

    Console(width=None if sys.stdout.isatty() else report.WIDTH).print(report.speed_table(results, reference))
    if plots is not None:
        report.rate_against_resolution(results, plots / "speed.png")
        report.memory_against_resolution(results, plots / "memory.png")
    return int(any(result.failed for result in results))


def measure(options: SpeedOptions) -> list[SpeedResult]:
    """Time every model at every resolution; one record each under `out`/<hardware>/, failed ones with their reason.

    Raises InputError for a wrong spec before anything is loaded. Models of a resolution are measured in turns.
    """
    if options.compile:
        torch._dynamo.config.recompile_limit = 64  # one graph per batch size and resolution
    tokenizers, failures = load(parse_all(options.models), options)
    results: list[SpeedResult] = []
    for resolution in options.resolutions:
        rows = [Row(spec, t, resolution, options.dtype, options.device) for spec, t in tokenizers]
        measure_resolution(rows, options)
        settings, about = conditions(options)
        hardware = str(about["device"])
        new = [to_result(row, settings, about, hardware) for row in rows]
        new += [replace(blank, resolution=resolution, hardware=hardware, settings=settings) for blank in failures]
        for result in new:
            write_whole(options.out / slug(hardware) / f"{file_name(result)}.json", to_json(result))
        results += new
    return results


def load(specs: Sequence[Spec], options: SpeedOptions) -> tuple[list[tuple[str, Tokenizer]], list[SpeedResult]]:
    """(spec, tokenizer on the device) of all that load, diffusion decoders at several steps; records of failures."""
    loaded: list[tuple[str, Tokenizer]] = []
    failures = []
    waiting = list(specs)
    while waiting:
        spec = waiting.pop(0)
        try:
            tokenizer = create(spec, random_weights=options.random_weights)
            prepare(tokenizer, options.device)
        except CellError as error:
            info = TokenizerInfo(name=spec.row, family="unknown")
            failures.append(SpeedResult(info, 0, "", {}, failed=str(error)))
            continue
        for network in tokenizer.networks.values():
            network.requires_grad_(False)  # the FLOP counter stumbles over parameters that want gradients
        tokenizer.info = with_facts(tokenizer)
        loaded.append((spec.text, tokenizer))
        more = () if options.quick else other_steps(spec, tokenizer)
        waiting[:0] = [parse(f"{spec.row}-steps{steps}={spec.text}@steps={steps}") for steps in more]
    return loaded, failures


def other_steps(spec: Spec, tokenizer: Tokenizer) -> list[int]:
    """The decode steps that a diffusion decoder is timed at besides its own, none if the spec fixes them."""
    own = tokenizer.info.decode_steps
    part = spec.parts[-1]
    if own is None or "steps" in part.options or "steps" not in part.entry.options:
        return []
    return [steps for steps in (1, 2, 4, 8) if steps != own]


def measure_resolution(rows: Sequence[Row], options: SpeedOptions) -> None:
    """Cost, equality gate and all stages of the rows of one resolution, with progress on stderr."""
    effort = options.effort
    cap = min(effort.max_batch, CPU_MAX_BATCH) if options.device.type == "cpu" else effort.max_batch
    sizes = options.batch_sizes or tuple(2**i for i in range(cap.bit_length()) if 2**i <= cap)
    for row in rows:
        multiple = row.tokenizer.info.size_multiple
        if row.resolution % multiple:
            row.failed = f"{row.resolution} px is not divisible by {multiple}"
            continue
        try:
            with torch.compiler.set_stance("force_eager"):
                row.flops = count_flops(row)
            set_up(row, options)
        except (RuntimeError, ValueError, CellError) as error:
            row.failed = first_line(error)
    for stage in STAGES:
        print(f"{rows[0].resolution} px: {stage}", file=sys.stderr)
        measure_stage([row for row in rows if row.failed is None], stage, sizes, effort)


def set_up(row: Row, options: SpeedOptions) -> None:
    """Compile if asked, and compare the fast setting with float32 eager on the bundled photographs."""
    fast = options.compile or options.dtype != torch.float32
    if not fast or options.quick:
        row.gate = {"passed": None, "reason": "quick" if fast else "this is the reference setting: float32, eager"}
        if options.compile:
            row.compile_seconds = compile_networks(row)
        return
    images = sample_images(row.resolution)
    with torch.compiler.set_stance("force_eager"):
        exact = replace(row, dtype=torch.float32).reconstruct(images)
    if options.compile:
        row.compile_seconds = compile_networks(row)
    row.gate = equality_gate(images, exact, row.reconstruct(images))


def sample_images(resolution: int) -> Tensor:
    """The bundled photographs, cropped by the default protocol: uint8 [29, 3, H, W]."""
    source = open_source("samples")
    protocol = find_protocol("adm")
    crops = [crop(source.read(index), resolution, protocol) for index in range(len(source.ids))]
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in crops])


def equality_gate(images: Tensor, exact: Tensor, fast: Tensor) -> dict[str, object]:
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


def file_name(result: SpeedResult) -> str:
    compiled = "-compile" if result.settings["compile"] else ""
    return f"{result.tokenizer.name}-{result.resolution}-{result.settings['dtype']}{compiled}"


def conditions(options: SpeedOptions) -> tuple[dict[str, object], dict[str, object]]:
    """(settings, provenance) of a record: all that a speed depends on besides model and resolution."""
    device, effort = options.device, options.effort
    settings: dict[str, object] = {
        "dtype": str(options.dtype).removeprefix("torch."),
        "compile": options.compile,
        "random_weights": options.random_weights,
        "quick": options.quick,
        "iterations": effort.iterations,
        "seconds": effort.seconds,
        "memory_format": "channels_last",
    }
    about: dict[str, object] = asdict(provenance.collect(describe_device(device), device.type))
    about |= {"load_average": os.getloadavg()[0], "host": platform.system()}
    about["peak_flops_per_second"] = peak_rate(device, options.dtype)
    if device.type != "cuda":
        return settings | {"threads": torch.get_num_threads()}, about
    settings |= {
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
    about |= {"cudnn": torch.backends.cudnn.version()}
    for name, query in (
        ("driver", "--query-gpu=driver_version"),
        ("power_limit_watts", "--query-gpu=power.limit"),
        ("clock_mhz", "--query-gpu=clocks.sm"),
        ("other_processes", "--query-compute-apps=pid"),
    ):
        about[name] = nvidia_smi(query, device)
    return settings, about


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


def nvidia_smi(query: str, device: torch.device) -> str | None:
    """One answer of nvidia-smi about the device; None where the program is missing or fails."""
    command = [
        "nvidia-smi",
        f"--id={torch.cuda.get_device_properties(device).uuid}",
        query,
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in done.stdout.split() if line != str(os.getpid())]
    return " ".join(lines) if done.returncode == 0 else None
