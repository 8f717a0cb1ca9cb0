"""What the drivers of results/study and results/sweep share: stages that are `tokbench` commands, run in this process.

A stage that is done is not done again, and one that was stopped goes on: so do the drivers.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokbench import cli
from tokbench.checkpoints import read_header
from tokbench.records.files import write_whole

DEVELOPMENT = Path(__file__).parent / "study" / "development.txt"  # ids that no driver trains on
AT_ONE = ("share_at_one=1", "eval_steps=1")  # SSDD as a one-step decoder
REGRESSION = ("--stage", "pretrain", *AT_ONE, "weights.flow=0", "weights.l1=1")  # its network without diffusion
CONVOLUTIONAL = ("freeze_encoder=true", "normalise_latents=false")  # a KL-VAE's decoder on a finished encoder
NO_LOSS_NETWORK = {"klvae": "perceptual_weight=0", "ssdd": "weights.perceptual=0"}


@dataclass(frozen=True)
class Budget:
    """What all trainings of a preset share. Steps of `batch_size` crops."""

    steps: int  # of a decoder, over all its parts
    batch_size: int
    crop: int
    late_crop: int  # for the last 15 % of a command's steps; 0: none
    seeds: tuple[int, ...]
    encoder_steps: int
    device: str
    perceptual: bool = True  # whether LPIPS is a training loss

    def settings(self, model: str) -> list[str]:
        """Overrides of every training of a model: data, optimiser, nothing measured on the way."""
        plain = [] if self.perceptual else [NO_LOSS_NETWORK[model]]
        return [
            "--preset", "small", f"run.batch_size={self.batch_size}", f"run.device={self.device}",
            f"crops.size={self.crop}", f"crops.late_size={self.late_crop}", "crops.late_share=0.15",
            "run.held_out=0", "run.eval_every=1000000", "run.sample_every=1000000", "run.save_every=50",
            "optim.name=adamw", "optim.learning_rate=1e-3", "optim.warmup_steps=20", "ema.decay=0.99", *plain,
        ]  # fmt: skip


# What takes seconds and says nothing: a few steps of one seed, on the samples, without a loss network.
QUICK: dict[str, Any] = {
    "steps": 2, "batch_size": 2, "crop": 32, "late_crop": 0, "seeds": (0,), "encoder_steps": 1, "perceptual": False,
}  # fmt: skip


def split(folder: Path, out: Path) -> Path:
    """Write the lists train.txt, which is returned, and development.txt: the ids that the study's PLAN.md lists."""
    if not folder.is_dir():
        sys.exit(f"no such folder: {folder}")
    paths = {path.stem: path.resolve() for path in sorted(folder.glob("*.jpg"))}
    development = set(DEVELOPMENT.read_text().split())
    if missing := development - paths.keys():
        sys.exit(f"{folder} lacks development photographs of PLAN.md: {' '.join(sorted(missing))}")
    for name, ids in (("train", paths.keys() - development), ("development", development)):
        write_whole(out / f"{name}.txt", "".join(f"{paths[key]}\n" for key in sorted(ids)))
    return out / "train.txt"


def train_encoder(folder: Path, model: str, budget: Budget, *options: str) -> Path:
    """An encoder of KL-VAE or SSDD training, in a folder; the perceptual loss counts after a quarter of its steps."""
    steps = budget.encoder_steps
    return train(
        folder,
        model,
        *budget.settings(model),
        "run.seed=0",
        f"run.steps={steps}",
        f"perceptual_start={steps // 4}",
        *options,
    )


def train(folder: Path, *arguments: str) -> Path:
    """`tokbench train` into a folder, unless its model is there; status 1 if another command made that."""
    model, command = folder / "model.safetensors", ["train", *arguments, "--out", str(folder)]
    if not model.exists():
        tokbench(*command)
    elif shlex.split(read_header(model)[1]["training"]["command"])[1:] != command:
        sys.exit(f"{model} was trained by another command; remove it or choose another --out")
    return model


def tokbench(*arguments: str) -> None:
    """A `tokbench` command in this process: its packages are loaded once. SystemExit with its status if it fails."""
    sys.argv = ["tokbench", *arguments]
    print("$", shlex.join(sys.argv), flush=True)
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise


def keep(kept: Path, trained: Mapping[str, Path], out: Path, measured: Sequence[str]) -> Path:
    """Put small records, which can be committed, into the folder `kept`: how models (name -> file) were trained, and
    the files of `out` that match the patterns in `measured`."""
    shutil.rmtree(kept, ignore_errors=True)
    for name, model in trained.items():
        record = json.dumps(read_header(model)[1]["training"], indent=1)
        write_whole(kept / "training" / f"{name}.json", record + "\n")
    for file in (file for pattern in measured for file in out.glob(pattern)):
        write_whole(kept / file.relative_to(out), file.read_bytes())
    return kept
