"""What a GPU can tell that a CPU cannot, the most valuable first; each part leaves its files before the next begins.

    make gpu-check                       (PYTHON=python3: nothing is installed, the checkout alone is enough)
    python -m tests.gpu_check --device cpu --quick

Writes results/speed/<hardware>/ (--quick: runs/speed). All architectures are ours, with random weights. A part that
fails, or takes longer than its share of --minutes, stops no other.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tokbench.errors import first_line
from tokbench.records.files import slug, write_whole
from tokbench.records.result import SpeedResult
from tokbench.registry import create, parse, parse_all
from tokbench.report.speed import read_speeds
from tokbench.runtime.device import describe_device, precision, prepare, select_device
from tokbench.speed.measure import measure, show
from tokbench.speed.timing import QUICK, TimingBudget

REFERENCE = "klvae@arch=sd"  # the decoder that the paper is 1.4 times as fast as
GROUPS = (("s", "m"), ("xs", "b"), ("l", "xl", "h"))  # of SSDD's sizes; each is measured in turns with the reference
ARCHITECTURES = "klvae@arch=sdxl,klvae@arch=flux"
BUDGET = TimingBudget(seconds=0.4, iterations=8, search_seconds=0.1, warm_ups=4)
BATCHES = {128: (1, 8, 32, 128), 256: (1, 8, 32, 128), 512: (1, 8, 32)}


# ---- parts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Something to do, and the seconds that it may take."""

    name: str
    seconds: float
    call: Callable[[], object]


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupts what takes longer as Ctrl-C does: KeyboardInterrupt, or a training run that is saved first."""
    handlers = {
        signal.SIGALRM: lambda *_: os.kill(os.getpid(), signal.SIGINT),
        signal.SIGINT: signal.default_int_handler,  # a script's background jobs ignore it
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def run_parts(parts: Sequence[Part], seconds: float) -> int:
    """Do one after the other while there is time; the exit status, 1 if one failed or was cut short."""
    end, failed = time.monotonic() + seconds, []
    for part in parts:
        start = time.monotonic()
        allowed = min(part.seconds, end - start)
        print(f"== {part.name}", flush=True)
        try:
            if allowed <= 0:
                raise TimeoutError("no time is left")
            with at_most(allowed):
                part.call()
        except BaseException as error:  # minutes on a GPU are dear: whatever goes wrong, the others are wanted
            stopped = isinstance(error, KeyboardInterrupt | SystemExit) and time.monotonic() - start >= allowed
            # 130: a training that was told to stop, by Ctrl-C or SIGTERM, and has saved.
            if not stopped and (isinstance(error, KeyboardInterrupt) or getattr(error, "code", 0) == 130):
                raise  # the user's
            failed.append(f"{part.name}: {f'stopped after {allowed:.0f} s' if stopped else first_line(error)}")
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    print("\n".join(["== not done", *failed] if failed else []))
    return int(bool(failed))


def smoke(device: torch.device, models: str, file: Path) -> None:
    """Every model decodes on the device what it decodes on the CPU; AssertionError names those that do not."""
    lines, wrong = [], []
    for spec in parse_all(models):
        tokenizer, images = create(spec, random_weights=spec.row not in ("ssdd", "klvae")), []
        channels, side = tokenizer.info.channels or 4, 64 // (tokenizer.info.downsample or 8)
        latents = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
        for place in (torch.device("cpu"), device):
            prepare(tokenizer, place)
            with precision(place, torch.float32):
                decoded = tokenizer.decode(latents.to(place), seeds=torch.arange(2), size=(64, 64))
            images.append(decoded.cpu())
        difference = ((images[0] - images[1]).abs().max() / images[0].abs().max()).item()
        lines.append(f"{spec.row}: largest difference to the CPU {difference:.1e} of the largest value")
        print(lines[-1], flush=True)
        write_whole(file, "\n".join(lines) + "\n")
        if not difference < 1e-2:
            wrong.append(spec.row)
    assert not wrong, wrong


def speed(
    device: torch.device, out: Path, models: str, resolution: int, batches: Sequence[int], compiled: bool
) -> None:
    """Decoding in bfloat16 beside the reference's. AssertionError if a row failed."""
    results = measure(
        f"{models},{REFERENCE}", [resolution], device=device, out=out, dtype=torch.bfloat16, batch_sizes=batches,
        compile=compiled, random_weights=True, budget=BUDGET, stages=("decode",),
    )  # fmt: skip
    show(results, parse(REFERENCE).row, out / "plots")
    assert not (failed := [result.failed for result in results if result.failed]), failed


def try_speed(device: torch.device, out: Path) -> None:
    """The way through `speed` with the demo models."""
    show(measure("ssdd,klvae", [64], device=device, out=out, budget=QUICK, stages=("decode",)), None, out / "plots")


def command(file: Path, *arguments: str) -> None:
    """Another module of the checkout in a process of its own, what it prints in a file. CalledProcessError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as output:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=output)
        try:
            status = process.wait()
        finally:  # its time may be up
            process.kill()
            process.wait()
            print(file.read_text())
    if status:
        raise subprocess.CalledProcessError(status, arguments)


def slowest(out: Path, hardware: str) -> str:
    """The spec of the decoder with the fewest operations a second at 256 px, the reference where none was timed."""

    def rate(result: SpeedResult) -> float:
        return result.stages["decode"].images_per_second * (result.flops or {}).get("decode", 0)

    rows = [row for row in read_speeds(out)[0] if row.hardware == hardware and row.resolution == 256]
    rows = [row for row in rows if "decode" in row.stages and row.settings.get("random_weights")]
    return str(min(rows, key=rate).settings["spec"]) if rows else REFERENCE


def kernels(device: torch.device, out: Path, *, quick: bool) -> None:
    """The ten kernels that take most of the decode of the slowest model, into kernels.txt."""
    hardware = describe_device(device)
    spec = "ssdd" if quick else slowest(out, hardware)
    tokenizer = create(parse(spec), random_weights=not quick)
    prepare(tokenizer, device)
    side, kind = (8, torch.float32) if quick else (32, torch.bfloat16)
    latents = torch.randn(8, tokenizer.info.channels or 4, side, side, device=device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with precision(device, kind):
        decode = partial(tokenizer.decode, latents, seeds=torch.arange(8), size=(8 * side, 8 * side))
        decode()
        with profile(activities=activities) as profiler:
            decode()
    table = profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=10)
    write_whole(out / slug(hardware) / "kernels.txt", f"{spec}, batch 8, {8 * side} px, {kind}\n{table}")
    print(table)


def parts_of(device: torch.device, out: Path) -> list[Part]:
    """All of them; seconds are guesses that add up to --minutes, no card has run them yet."""
    folder = out / slug(describe_device(device))
    groups = [",".join(f"ssdd-{size}-f8c4@steps=1" for size in sizes) for sizes in GROUPS]
    groups[1] += f",{ARCHITECTURES}"
    everything = ",".join(["ssdd", "klvae", *groups, REFERENCE])

    def timed(index: int, resolution: int, seconds: float, compiled: bool = False) -> Part:
        name = f"group {index}, {resolution} px{', compiled' if compiled else ''}"
        batches = (32,) if compiled else BATCHES[resolution]
        return Part(name, seconds, partial(speed, device, out, groups[index], resolution, batches, compiled))

    attention = ("tests.bench_attention", "--device", str(device), "--compile", "--grids", "16,32,64")
    return [
        Part("smoke", 40, partial(smoke, device, everything, folder / "smoke.txt")),
        timed(0, 256, 40),
        timed(0, 256, 100, compiled=True),
        timed(1, 256, 30),
        timed(2, 256, 40),
        Part("kernels", 15, partial(kernels, device, out, quick=False)),
        Part("attention", 45, partial(command, folder / "attention.txt", *attention)),
        Part("tests", 60, partial(command, folder / "tests.txt", "pytest", "-m", "gpu", "tests")),
        *(timed(index, resolution, 30) for resolution in (128, 512) for index in (0, 1, 2)),
        *(timed(index, 256, 300, compiled=True) for index in (1, 2)),
        *(timed(0, resolution, 300, compiled=True) for resolution in (128, 512)),
    ]


def quick_parts(device: torch.device, out: Path) -> list[Part]:
    """The same ways through in seconds."""
    folder = out / slug(describe_device(device))
    attention = ("--device", str(device), "--quick", "--grids", "16", "--batch", "1", "--dtype", "float32")
    return [
        Part("smoke", 60, partial(smoke, device, "ssdd,klvae", folder / "smoke.txt")),
        Part("speed", 60, partial(try_speed, device, out)),
        Part("kernels", 60, partial(kernels, device, out, quick=True)),
        Part("attention", 60, partial(command, folder / "attention.txt", "tests.bench_attention", *attention)),
    ]


def main() -> int:
    """Run all parts; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="the demo models at 64 px, 3 iterations")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so many")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    os.environ.setdefault("TOKBENCH_OFFLINE", "1")  # nothing is worth waiting for a network
    os.environ.setdefault("COLUMNS", "180")  # of all tables
    out = arguments.out or Path("runs/speed" if arguments.quick else "results/speed")
    make = quick_parts if arguments.quick else parts_of
    return run_parts(make(select_device(arguments.device), out), 60 * arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
