"""Everything that needs CUDA, in one command: the gpu tests, then the speed table with random weights.

    make gpu-check                       (PYTHON=python3: nothing is installed, the checkout alone is enough)
    python -m tests.gpu_check --device cpu --quick

Writes results/speed/<hardware>/. Rows whose packages are missing stay in the table with the reason.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from tokbench.runtime.device import select_device
from tokbench.speed.measure import measure, show
from tokbench.speed.timing import QUICK, TimingBudget

OURS = ("ssdd-s-f8c4@steps=1", "ssdd-b-f8c4@steps=1", "ssdd-m-f8c4@steps=1")
PUBLISHED = ("sd-vae-ft-mse", "sdxl-vae")
BUDGET = TimingBudget(seconds=1.0)  # five architectures at three resolutions have to fit into minutes


def main() -> int:
    """Run tests and speed; the exit status, 1 if a test or a row of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="the demo models at 128 px, 3 iterations")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    out = arguments.out or Path("runs/speed" if arguments.quick else "results/speed")
    device = select_device(arguments.device)
    if arguments.quick:
        return show(measure("ssdd,klvae", [128], device=device, out=out, budget=QUICK), None, None)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "tests"])
    status = int(tests.returncode not in (0, 5))  # 5: none was collected
    for compiled, resolutions, sizes in ((False, (128, 256, 512), (1, 8, 32)), (True, (256,), (8,))):
        results = measure(
            ",".join(OURS + PUBLISHED), resolutions, device=device, out=out, dtype=torch.bfloat16, batch_sizes=sizes,
            compile=compiled, random_weights=True, budget=BUDGET,
        )  # fmt: skip
        show(results, "sd-vae-ft-mse", out / "plots")
        status |= int(any(result.failed and result.tokenizer.name.startswith("ssdd") for result in results))
    return status


if __name__ == "__main__":
    sys.exit(main())
