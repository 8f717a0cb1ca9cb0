"""The controlled study of PLAN.md, by the command line alone: train every arm and seed, evaluate, print the tables.

    python results/study/run.py --preset cpu --train PHOTOS      (make study PRESET=cpu TRAIN=PHOTOS)

Every step is a `tokbench` command that goes on where it stopped, so this one does too.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tokbench.checkpoints import read_header
from tokbench.records.files import write_whole

HERE = Path(__file__).parent
ARMS = ("a", "b", "c-teacher", "c-student", "c-control", "d")
FRONT = ("a", "c-teacher", "c-student")  # once more, on an encoder trained by SSDD
STEPS = (1, 2, 4, 8)
METRICS = "psnr,ssim,lpips-alex,lpips-vgg,pd-mobilenet"


@dataclass(frozen=True)
class Preset:
    """Sizes of the study. `steps` are those of a one-part arm; teacher and student share them half and half."""

    steps: int
    batch_size: int
    crop: int
    late_crop: int
    seeds: tuple[int, ...]
    encoder_steps: int  # of each encoder: KL-VAE's, for all arms, and SSDD's, for the front
    device: str
    workers: int  # processes that cut crops
    encoder: str | None = None  # a finished encoder instead of a trained one

    @property
    def settings(self) -> list[str]:
        """Overrides that all arms share: data, optimiser, budget."""
        return [
            f"run.batch_size={self.batch_size}", f"crops.size={self.crop}", f"crops.late_size={self.late_crop}",
            "crops.late_share=0.15", f"run.device={self.device}",
            *([f"run.workers={self.workers}"] if self.workers else []), "run.held_out=0",
            "run.eval_every=1000000", "run.sample_every=1000000", "run.save_every=50", "optim.name=adamw",
            "optim.learning_rate=1e-3", "optim.warmup_steps=20", "ema.decay=0.99",
        ]  # fmt: skip


PRESETS = {
    # Exploratory: 4,000 crops an arm; the encoder is the demo's, trained on the same photographs but 14 others.
    "cpu": Preset(250, 16, 64, 0, (0, 1), 500, "cpu", 0, "baselines/weights/klvae.safetensors"),
    # One H100, 25 minutes for everything: sized for 11 steps a second and 8 s to start each command, not yet timed.
    "gpu": Preset(500, 64, 96, 160, (0, 1, 2), 1600, "cuda", 12),
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
    photos = split(arguments.train, out)
    encoder = preset.encoder or train_encoder("klvae", preset, photos, out)
    for seed in preset.seeds:
        for arm in ARMS:
            train_arm(arm, seed, preset, photos, encoder, out)
    encoder = train_encoder("ssdd", preset, photos, out / "front")
    for arm in FRONT:
        train_arm(arm, preset.seeds[0], preset, photos, encoder, out / "front")
    evaluate(preset, out)
    python([sys.executable, str(HERE / "analyse.py"), str(keep(out, HERE / out.name, preset.encoder)), str(out)])


def split(folder: Path, out: Path) -> Path:
    """Write the lists train.txt, which is returned, and development.txt: the ids that PLAN.md lists."""
    if not folder.is_dir():
        sys.exit(f"study: no such folder: {folder}")
    paths = {path.stem: path.resolve() for path in sorted(folder.glob("*.jpg"))}
    development = set((HERE / "development.txt").read_text().split())
    if missing := development - paths.keys():
        sys.exit(f"study: {folder} lacks development photographs of PLAN.md: {' '.join(sorted(missing))}")
    for name, ids in (("train", paths.keys() - development), ("development", development)):
        (out / f"{name}.txt").write_text("".join(f"{paths[key]}\n" for key in sorted(ids)))
    return out / "train.txt"


def train_encoder(model: str, preset: Preset, photos: Path, out: Path) -> str:
    """A frozen encoder with normalised latents, of KL-VAE or SSDD training."""
    steps = preset.encoder_steps
    shared = ["--preset", "small", "--data", str(photos), *preset.settings, "run.seed=0"]
    first, normalised = out / "encoder", out / "encoder-normalised"
    train(first, model, *shared, "--out", str(first), f"run.steps={steps}", f"perceptual_start={steps // 4}")
    if model == "klvae":
        return str(first / "model.safetensors")  # normalises its latents itself
    taken = ["--encoder-from", str(first / "model.safetensors"), "freeze_encoder=true", "run.steps=1"]
    train(normalised, "klvae", *shared, "--out", str(normalised), *taken)
    return str(normalised / "model.safetensors")


def train_arm(arm: str, seed: int, preset: Preset, photos: Path, encoder: str, out: Path) -> None:
    """One arm and seed, in the folder <arm>-<seed>."""
    folder = out / f"{arm}-{seed}"
    half = preset.steps // 2
    # Student and control must not see the teacher's crops and noise again, which the seed alone decides.
    drawn = seed + 100 if arm in ("c-student", "c-control") else seed
    shared = ["--preset", "small", "--data", str(photos), "--out", str(folder), *preset.settings, f"run.seed={drawn}"]
    shared += ["perceptual_start=0"]
    whole, part, taken = f"run.steps={preset.steps}", f"run.steps={half}", ["--encoder-from", encoder]
    teacher = ["--from", str(out / f"c-teacher-{seed}" / "model.safetensors")]
    at_one = ["share_at_one=1", "eval_steps=1"]
    gan = ["gan.weight=0.5", f"gan.start_step={half}", "gan.learning_rate=2e-4"]
    convolutional = ["klvae", *taken, "freeze_encoder=true", "normalise_latents=false", whole]
    pretrain = ["ssdd", *taken, "--stage", "pretrain"]
    command = {
        "a": convolutional,
        "d": [*convolutional, *gan],
        "b": [*pretrain, whole, *at_one, "weights.flow=0", "weights.l1=1"],
        "c-teacher": [*pretrain, part, "share_at_one=0"],
        "c-student": ["ssdd", *teacher, "--stage", "distill", part],
        "c-control": ["ssdd", *teacher, "--stage", "finetune", part, *at_one],
    }[arm]
    train(folder, *command, *shared)


def evaluate(preset: Preset, out: Path) -> None:
    """Quality on the test and the development photographs, the teacher's curve over steps, decode speed."""
    arms = [named(arm, seed, out) for seed in preset.seeds for arm in ARMS]
    longer = [named("c-teacher", seed, out, steps) for seed in preset.seeds for steps in STEPS[1:]]
    front = ["front-" + named(arm, preset.seeds[0], out / "front") for arm in FRONT]
    demo = ["demo-klvae=klvae", "demo-ssdd=ssdd"]
    where = ["--res", "256", "--out", str(out / "eval"), "--device", preset.device]
    noise = ["--seeds", "0,1,2", "--metrics", METRICS]
    tokbench("run", "--models", ",".join([*arms, *longer, *front]), *where, *noise)
    development = ["--data", str(out / "development.txt"), "--metrics", "psnr,lpips-alex"]
    tokbench("run", "--models", ",".join([*arms, *demo]), *where, *development)
    steps = [named("c-teacher", preset.seeds[0], out, number) for number in STEPS[1:]]
    timed = ",".join([*(named(arm, preset.seeds[0], out) for arm in ("a", "c-student")), *steps])
    quick = ["--quick"] if preset.device == "cpu" else []
    where = ["--res", "256", "--out", str(out / "speed"), "--device", preset.device]
    tokbench("speed", "--models", timed, *where, *quick)


def keep(out: Path, kept: Path, encoder: str | None) -> Path:
    """Put the records of a driver's folder, which are small, into `kept`, where they can be committed."""
    shutil.rmtree(kept, ignore_errors=True)
    models = {file.parent.relative_to(out): file for file in out.glob("**/model.safetensors")}
    models |= {Path("encoder"): Path(encoder)} if encoder else {}
    for name, file in models.items():
        record = json.dumps(read_header(file)[1]["training"], indent=1)
        write_whole(kept / "training" / name.with_suffix(".json"), record + "\n")
    samples = out / "eval" / "adm" / "samples-256"
    for file in (*out.glob("eval/*/*/*.json"), *samples.glob("*.csv.gz"), *out.glob("speed/*/*.json")):
        write_whole(kept / file.relative_to(out), file.read_bytes())
    return kept


def named(arm: str, seed: int, out: Path, steps: int = 1) -> str:
    """NAME=SPEC of a trained arm."""
    name = f"{arm}-{seed}" + (f"-steps{steps}" if steps > 1 else "")
    family, options = ("klvae", "") if arm in ("a", "d") else ("ssdd", f"@steps={steps}")
    return f"{name}={family}:{out}/{arm}-{seed}/model.safetensors{options}"


def train(folder: Path, *arguments: str) -> None:
    """`tokbench train`, unless its model is in the folder already; status 1 if another command made that."""
    model, command = folder / "model.safetensors", ["train", *arguments]
    if not model.exists():
        tokbench(*command)
    elif shlex.split(read_header(model)[1]["training"]["command"])[1:] != command:
        sys.exit(f"study: {model} was trained by another command; remove it or choose another --out")


def tokbench(*arguments: str) -> None:
    """A `tokbench` command; stop with its status if it fails."""
    print("$", shlex.join(["tokbench", *arguments]), flush=True)
    python([sys.executable, "-m", "tokbench", *arguments])


def python(command: list[str]) -> None:
    """Run a command; on Ctrl-C, which it gets too, let it save first."""
    process = subprocess.Popen(command)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        status = process.wait() or 130
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
