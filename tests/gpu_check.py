"""What a GPU can tell that a CPU cannot, the most valuable first; each part leaves its files before the next begins.

    make gpu-check                       (PYTHON=python3: nothing is installed, the checkout alone is enough)
    python -m tests.gpu_check --device cpu --quick

Writes results/speed/<hardware>/ (--quick: runs/speed). Models whose packages are missing stay in the tables with the
reason, and a part that fails stops no other.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tokbench.errors import first_line
from tokbench.records.files import slug, write_whole
from tokbench.registry import create, parse
from tokbench.runtime.device import describe_device, precision, prepare, select_device
from tokbench.speed.measure import measure, show
from tokbench.speed.timing import QUICK, TimingBudget

OURS = ",".join(f"ssdd-{size}-f8c4@steps=1" for size in ("s", "b", "m"))
PUBLISHED = "sd-vae-ft-mse,sdxl-vae"
BUDGET = TimingBudget(seconds=1.0)  # five architectures at three resolutions have to fit into minutes


def smoke(device: torch.device) -> None:
    """The bundled models decode on the device what they decode on the CPU. AssertionError if not."""
    for name in ("ssdd", "klvae"):
        tokenizer, images = create(parse(name)), []
        latents, seeds = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(2)
        for place in (torch.device("cpu"), device):
            prepare(tokenizer, place)
            with precision(place, torch.float32):
                images.append(tokenizer.decode(latents.to(place), seeds=seeds, size=(128, 128)).cpu())
        difference = (images[0] - images[1]).abs().max().item()
        print(f"{name}: largest difference to the CPU {difference:.1e}")
        assert difference < 1e-2


def speed(device: torch.device, out: Path, *, quick: bool, compiled: bool) -> None:
    """Throughput with random weights, speed-ups against SD-VAE's decoder. AssertionError if a row of ours failed."""
    if quick:
        results = measure("ssdd,klvae", [128], device=device, out=out, budget=QUICK)
    else:
        results = measure(
            f"{OURS},{PUBLISHED}", [256] if compiled else [128, 256, 512], device=device, out=out,
            dtype=torch.bfloat16, batch_sizes=[8] if compiled else [1, 8, 32], compile=compiled,
            random_weights=True, budget=BUDGET,
        )  # fmt: skip
    show(results, None if quick else "sd-vae-ft-mse", out / "plots")
    failed = [result.failed for result in results if result.failed and result.tokenizer.name.startswith("ssdd")]
    assert not failed, failed


def command(*arguments: str) -> None:
    """Another module of the checkout in a process of its own. CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def kernels(device: torch.device, folder: Path, *, quick: bool) -> None:
    """The ten kernels that take most of a decode, into kernels.txt."""
    tokenizer = create(parse("ssdd" if quick else "ssdd-m-f8c4@steps=1"), random_weights=not quick)
    prepare(tokenizer, device)
    side, kind = (8, torch.float32) if quick else (32, torch.bfloat16)
    latents, seeds = torch.randn(8, 4, side, side, device=device), torch.arange(8)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with precision(device, kind):
        tokenizer.decode(latents, seeds=seeds, size=(8 * side, 8 * side))
        with profile(activities=activities) as profiler:
            tokenizer.decode(latents, seeds=seeds, size=(8 * side, 8 * side))
    table = profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=10)
    write_whole(folder / "kernels.txt", table)
    print(table)


def main() -> int:
    """Run all parts; the exit status, 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="the demo models at 128 px, 3 iterations")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    device, quick = select_device(arguments.device), arguments.quick
    out = arguments.out or Path("runs/speed" if quick else "results/speed")
    grids = ["--quick", "--grids", "16", "--batch", "1", "--dtype", "float32"] if quick else ["--compile"]
    parts: dict[str, Callable[[], None]] = {
        "smoke": partial(smoke, device),
        "speed": partial(speed, device, out, quick=quick, compiled=False),
        "kernels": partial(kernels, device, out / slug(describe_device(device)), quick=quick),
        "attention": partial(command, "tests.bench_attention", "--device", arguments.device, *grids),
    }
    if not quick:
        parts["speed, compiled"] = partial(speed, device, out, quick=False, compiled=True)
        parts["tests"] = partial(command, "pytest", "-m", "gpu", "tests")
    failed = []
    for name, part in parts.items():
        print(f"== {name}", flush=True)
        try:
            part()
        except Exception as error:  # minutes on a GPU are dear: whatever goes wrong, the other parts are wanted
            print(f"{name} failed: {first_line(error)}")
            failed.append(name)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
