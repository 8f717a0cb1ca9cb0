"""What the harness costs: a whole run divided by the pure calls of models and metrics on the same images.

    python -m tests.bench_pipeline [MODELS] [RESOLUTION]

Target: at most 1.15 by wall clock on an idle machine. The ratio of processor time, which other programs disturb
less, is printed beside it.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import torch

from tokbench import registry
from tokbench.data.crops import crop
from tokbench.data.open import open_source
from tokbench.data.pixels import quantise
from tokbench.evaluation.run import run
from tokbench.metrics import DEFAULT
from tokbench.metrics.suite import MetricSuite
from tokbench.protocols import find_protocol
from tokbench.records.measurement import Measurement
from tokbench.runtime.device import precision, prepare
from tokbench.runtime.seeding import image_seeds
from tokbench.weights import weights_dir

TARGET = 1.15
ROUNDS = 2  # in turns, so that a busy machine hurts both alike


def pure(models: str, resolution: int) -> tuple[float, float]:
    """Seconds (wall, processor) of encode, decode, rounding, scorers and extractors, image by image."""
    source, protocol = open_source("samples"), find_protocol("adm")
    crops = [crop(source.read(i), resolution, protocol) for i in range(len(source))]
    images = [torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].contiguous() for pixels in crops]
    suite = MetricSuite(DEFAULT, len(images), resolution)
    assert suite.available  # loads the networks
    device = torch.device("cpu")
    tokenizers = [registry.create(spec) for spec in registry.parse_all(models)]
    for tokenizer in tokenizers:
        prepare(tokenizer, device)
    wall, processor = time.perf_counter(), time.process_time()
    for first, tokenizer in enumerate(tokenizers):
        for real in images:
            seeds = image_seeds(real, 0)
            with precision(device, torch.float32):
                latents = tokenizer.encode(real, sample=False, seeds=seeds)
                decoded = tokenizer.decode(latents, seeds=seeds, size=(resolution, resolution))
            score(suite, real, decoded, with_real=first == 0)
    return time.perf_counter() - wall, time.process_time() - processor


def score(suite: MetricSuite, real: torch.Tensor, decoded: torch.Tensor, with_real: bool) -> None:
    """What is read off one pair; features of the real image are needed by the first model only."""
    with torch.inference_mode():
        fake = quantise(decoded, "nearest")
        suite.score(real, fake, decoded)
        suite.features(fake)
        if with_real:
            suite.features(real)


def whole(models: str, resolution: int) -> tuple[float, float]:
    """Seconds (wall, processor) of the run, from the options to the table, with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        wall, processor = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            status = run(models, [resolution], Measurement(), out=Path(folder) / "runs")
        assert status == 0
        return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    models = sys.argv[1] if len(sys.argv) > 1 else "ssdd,klvae"
    resolution = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    os.environ.setdefault("TOKBENCH_WEIGHTS", str(weights_dir()))
    os.environ.setdefault("MPLCONFIGDIR", matplotlib.get_cachedir())  # its list of fonts is made once per machine
    rounds = [(whole(models, resolution), pure(models, resolution)) for _ in range(ROUNDS)]
    (run_wall, run_processor), (pure_wall, pure_processor) = (
        [sum(measured[side][clock] for measured in rounds) for clock in (0, 1)] for side in (0, 1)
    )
    print(f"{models} at {resolution} px, {ROUNDS} rounds: run {run_wall:.1f} s, pure calls {pure_wall:.1f} s")
    print(f"ratio {run_wall / pure_wall:.3f} by wall clock, {run_processor / pure_processor:.3f} by processor time")
    print(f"target at most {TARGET}: {'met' if run_wall / pure_wall <= TARGET else 'missed'}")


if __name__ == "__main__":
    main()
