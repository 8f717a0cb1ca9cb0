"""What 20 minutes of a GPU can train: demo weights of two latents by the sweep's recipe, then the study, shortened.

    make gpu-train TRAIN=PHOTOS
    python -m tests.gpu_train --device cpu --quick

Writes results/gpu-train/ (--quick: runs/gpu-train), each model, log and record when it is there. What was stopped goes
on with the same command: a part that reaches its share of the time saves its training first. LPIPS has to be on the
machine: `tokbench weights export DIR` on another, TOKBENCH_WEIGHTS=DIR on this one.
"""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from results.stages import split, tokbench
from results.study import run as study
from results.sweep.run import PRESETS, Preset, named, quick, train_decoder, train_klvae
from tests.gpu_check import Part, run_parts

LATENTS = ("f8c4", "f16c16")
# Sized for 11 steps a second, on which the sweep's and the study's presets count too; no card has run it yet.
# Other times than 1 are kept to the end, for decoding in four steps. At the demo's scale that alone did not do: four
# steps are no worse than one only with a sampler that stays near t = 1 (ssdd_models/weights/ssdd.md).
DEMO = replace(PRESETS["gpu"], steps=1600, encoder_steps=1600, seeds=(0,), share_at_one=0.5)


def demo(latent: str, preset: Preset, data: list[str], out: Path) -> None:
    """An encoder and SSDD's decoder for it, and what they reach on the bundled photographs, in one step and in four."""
    folder = out / latent
    encoder = train_klvae(latent, preset, data, folder / "encoder")
    train_decoder("ssdd", latent, 0, preset, data, encoder, folder)
    ssdd = named("ssdd", latent, 0, out)
    models = f"klvae-{latent}=klvae:{encoder},{ssdd},four-steps-{ssdd}@steps=4"
    where = ["--res", preset.resolutions, "--device", preset.device, "--out", str(out / "eval")]
    tokbench("run", "--models", models, "--metrics", preset.metrics, *where)


def main() -> int:
    """Run all parts; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="folder of the photographs to train on; the study needs them too")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="two steps of each training, on the samples")
    parser.add_argument("--minutes", type=float, default=20.0, help="stop after so many")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if not (arguments.train or arguments.quick):
        parser.error("--train FOLDER: the photographs to train on")
    os.environ.setdefault("TOKBENCH_OFFLINE", "1")  # nothing is worth waiting for a network
    out = arguments.out or Path("runs/gpu-train" if arguments.quick else "results/gpu-train")
    data = ["--data", "samples" if arguments.quick else str(split(arguments.train, out))]
    preset, short, latents = DEMO, study.PRESETS["gpu-short"], LATENTS
    if arguments.quick:
        preset, short, latents = quick(preset), study.quick(short), LATENTS[1:]
    preset, short = (replace(sizes, device=arguments.device) for sizes in (preset, short))
    parts = [Part(f"demo {latent}", 400, partial(demo, latent, preset, data, out)) for latent in latents]
    photographs = None if arguments.quick else arguments.train
    parts.append(Part("study", 900, partial(study.study, short, photographs, out / "study" / "gpu-short")))
    return run_parts(parts, 60 * arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
