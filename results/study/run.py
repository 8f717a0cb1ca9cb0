"""The controlled study of PLAN.md, by the command line alone: train every arm and seed, evaluate, write REPORT.md.

    python results/study/run.py --preset cpu --train PHOTOS      (make study PRESET=cpu TRAIN=PHOTOS)

Every step is a `tokbench` command that goes on where it stopped, so this one does too.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ARMS = ("a", "b", "c-teacher", "c-student", "c-control", "d")
STEPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Preset:
    """Sizes of the study. `steps` are those of a one-part arm; teacher and student share them half and half."""

    steps: int
    batch_size: int
    crop: int
    late_crop: int
    seeds: tuple[int, ...]
    encoder_steps: int
    device: str
    encoder: str | None = None  # a finished encoder instead of a trained one

    @property
    def settings(self) -> list[str]:
        """Overrides that all arms share: data, optimiser, budget."""
        return [
            f"run.batch_size={self.batch_size}", f"crops.size={self.crop}", f"crops.late_size={self.late_crop}",
            f"run.device={self.device}", "run.held_out=0", "run.eval_every=1000000", "run.sample_every=1000000",
            f"run.save_every={max(50, self.steps // 20)}", "optim.name=adamw", "optim.learning_rate=1e-3",
        ]  # fmt: skip


PRESETS = {
    # Exploratory: 4,000 crops an arm; the encoder is the demo's, trained on the same photographs but 14 others.
    "cpu": Preset(250, 16, 64, 0, (0, 1), 0, "cpu", "baselines/weights/klvae.safetensors"),
    # One H100, 25 minutes for everything.
    "gpu": Preset(3000, 64, 96, 160, (0, 1, 2), 6000, "cuda"),
}


def main() -> None:
    """Run what is missing of a preset."""
    parser = argparse.ArgumentParser(description="The controlled study of PLAN.md.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--train", type=Path, required=True, help="folder of the photographs to train on")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    preset, out = PRESETS[arguments.preset], arguments.out / arguments.preset
    out.mkdir(parents=True, exist_ok=True)
    train = split(arguments.train, out)
    encoder = preset.encoder or str(train_encoder(preset, train, out))
    for seed in preset.seeds:
        for arm in ARMS:
            train_arm(arm, seed, preset, train, encoder, out)
    evaluate(preset, out)
    tokbench(sys.executable, str(HERE / "analyse.py"), str(out))


def split(folder: Path, out: Path) -> Path:
    """Write the list of training photographs: all of the folder but the development ids of PLAN.md."""
    plan = (HERE / "PLAN.md").read_text()
    listed = plan.split("on both sides); all others (128) train.")[1].split("`")[1]
    development = set(listed.split())
    if not folder.is_dir():
        sys.exit(f"study: no such folder: {folder}")
    paths = [path.resolve() for path in sorted(folder.glob("*.jpg")) if path.stem not in development]
    if len(paths) + len(development) != len(list(folder.glob("*.jpg"))):
        sys.exit(f"study: {folder} lacks development photographs of PLAN.md")
    listing = out / "train.txt"
    listing.write_text("".join(f"{path}\n" for path in paths))
    return listing


def train_encoder(preset: Preset, train: Path, out: Path) -> Path:
    """The frozen encoder of all arms, from KL-VAE training."""
    folder = out / "encoder"
    steps = [f"run.steps={preset.encoder_steps}", "run.seed=0"]
    step(
        folder,
        "train",
        "klvae",
        "--preset",
        "small",
        "--data",
        str(train),
        "--out",
        str(folder),
        *preset.settings,
        *steps,
    )
    return folder / "model.safetensors"


def train_arm(arm: str, seed: int, preset: Preset, train: Path, encoder: str, out: Path) -> None:
    """One arm and seed, in the folder <arm>-<seed>."""
    folder = out / f"{arm}-{seed}"
    half = preset.steps // 2
    shared = ["--data", str(train), "--out", str(folder), *preset.settings, f"run.seed={seed}"]
    late = ["perceptual_start=0"]
    if arm in ("a", "d"):
        gan = ["gan.weight=0.5", f"gan.start_step={half}", "gan.learning_rate=2e-4"] if arm == "d" else []
        command = ["klvae", "--preset", "small", "--encoder-from", encoder, "freeze_encoder=true"]
        step(folder, "train", *command, *shared, f"run.steps={preset.steps}", *late, *gan)
        return
    ssdd = ["ssdd", "--preset", "small"]
    if arm == "b":
        regression = ["share_at_one=1", "weights.flow=0", "weights.l1=1", "eval_steps=1"]
        command = [*ssdd, "--stage", "pretrain", "--encoder-from", encoder]
        step(folder, "train", *command, *shared, f"run.steps={preset.steps}", *late, *regression)
    elif arm == "c-teacher":
        command = [*ssdd, "--stage", "pretrain", "--encoder-from", encoder]
        step(folder, "train", *command, *shared, f"run.steps={half}", *late)
    else:
        teacher = str(out / f"c-teacher-{seed}" / "model.safetensors")
        kind = ["--stage", "distill"] if arm == "c-student" else ["--stage", "finetune"]
        control = [] if arm == "c-student" else ["share_at_one=1", "eval_steps=1"]
        step(folder, "train", *ssdd, *kind, "--from", teacher, *shared, f"run.steps={half}", *control)


def evaluate(preset: Preset, out: Path) -> None:
    """Quality of every arm and seed on the test photographs, the teacher's curve over steps, decode speed."""
    models = []
    for seed in preset.seeds:
        models += [f"{arm}-{seed}={spec(arm, seed, out)}" for arm in ARMS]
        models += [
            f"c-teacher-{seed}-steps{n}=ssdd:{out}/c-teacher-{seed}/model.safetensors@steps={n}" for n in STEPS[1:]
        ]
    metrics = "psnr,ssim,lpips-alex,lpips-vgg,pd-mobilenet"
    what = [
        "--res",
        "256",
        "--metrics",
        metrics,
        "--seeds",
        "0,1,2",
        "--out",
        str(out / "eval"),
        "--device",
        preset.device,
    ]
    tokbench("tokbench", "run", "--models", ",".join(models), *what)
    seed = preset.seeds[0]
    timed = f"a={spec('a', seed, out)},c-student={spec('c-student', seed, out)}"
    quick = ["--quick"] if preset.device == "cpu" else []
    tokbench(
        "tokbench",
        "speed",
        "--models",
        timed,
        "--res",
        "256",
        "--device",
        preset.device,
        "--out",
        str(out / "speed"),
        *quick,
    )


def spec(arm: str, seed: int, out: Path) -> str:
    """The model spec of a trained arm, one decode step."""
    family = "klvae" if arm in ("a", "d") else "ssdd"
    return f"{family}:{out}/{arm}-{seed}/model.safetensors" + ("@steps=1" if family == "ssdd" else "")


def step(folder: Path, *arguments: str) -> None:
    """A training command, unless its model is there already; its seconds are added up in <folder>/seconds.json."""
    if (folder / "model.safetensors").exists():
        return
    start = time.monotonic()
    tokbench("tokbench", *arguments)
    record = folder / "seconds.json"
    spent = json.loads(record.read_text())["seconds"] if record.exists() else 0.0
    record.write_text(
        json.dumps({"seconds": spent + time.monotonic() - start, "command": shlex.join(["tokbench", *arguments])})
    )


def tokbench(*command: str) -> None:
    """Run a command of this environment; stop with its status if it fails."""
    print("$", shlex.join(command), flush=True)
    program = str(Path(sys.executable).parent / command[0]) if command[0] == "tokbench" else command[0]
    done = subprocess.run([program, *command[1:]])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
