"""Everything that needs CUDA, in one command: the gpu tests, then the speed table with random weights.

    make gpu-check                       (PYTHON=python3: nothing is installed, the checkout alone is enough)
    python -m tests.gpu_check --device cpu --quick

Writes results/speed/<hardware>/. Rows whose packages are missing stay in the table with the reason.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from tokbench.speed import measure
from tokbench.speed.measure import SpeedOptions, show
from tokbench.speed.timing import Effort

OURS = ("ssdd-s-f8c4@steps=1", "ssdd-b-f8c4@steps=1", "ssdd-m-f8c4@steps=1")
PUBLISHED = ("sd-vae-ft-mse", "sdxl-vae")
EFFORT = Effort(seconds=1.0)  # five architectures at three resolutions have to fit into minutes


def main() -> int:
    """Run tests and speed; the exit status, 1 if a test or a row of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="the demo models at 128 px, 3 iterations")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    out = arguments.out or Path("runs/speed" if arguments.quick else "results/speed")
    shared = {"device": arguments.device, "quick": arguments.quick, "out": out, "batch_sizes": None}
    if arguments.quick:
        options = SpeedOptions.read(models="ssdd,klvae", resolutions=(128,), dtype="float32", **shared)
        return show(measure(options), None, None)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "tests"])
    status = int(tests.returncode not in (0, 5))  # 5: none was collected
    for compiled, resolutions, sizes in ((False, (128, 256, 512), (1, 8, 32)), (True, (256,), (8,))):
        settings = {**shared, "batch_sizes": sizes, "compile": compiled, "random_weights": True}
        options = SpeedOptions.read(
            models=",".join(OURS + PUBLISHED), resolutions=resolutions, dtype="bfloat16", **settings
        )
        results = measure(SpeedOptions(**{**vars(options), "effort": EFFORT}))
        show(results, "sd-vae-ft-mse", out / "plots")
        status |= int(any(result.failed and result.tokenizer.name.startswith("ssdd") for result in results))
    return status


if __name__ == "__main__":
    sys.exit(main())
