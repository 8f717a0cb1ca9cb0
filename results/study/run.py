"""The controlled study of PLAN.md, by the command line alone: train every arm and seed, evaluate, print the tables.

    python -m results.study.run --preset cpu --train PHOTOS      (make study PRESET=cpu TRAIN=PHOTOS)

Every step is a `tokbench` command that goes on where it stopped, so this one does too. --quick goes the whole way in
seconds and says nothing.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from results.stages import AT_ONE, CONVOLUTIONAL, QUICK, REGRESSION, Budget, keep, split, tokbench, train, train_encoder

HERE = Path(__file__).parent
ARMS = ("a", "b", "c-teacher", "c-student", "c-control", "d")
FRONT = ("a", "c-teacher", "c-student")  # once more, on an encoder trained by SSDD
STEPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Preset(Budget):
    """Sizes of the study; teacher and student share an arm's steps half and half."""

    encoder: str | None = None  # a finished encoder instead of a trained one
    resolution: int = 256
    metrics: str = "psnr,ssim,lpips-alex,lpips-vgg,pd-mobilenet"
    noise: str = "0,1,2"  # seeds of a decode
    limit: int | None = None  # test photographs; None: all


PRESETS = {
    # Exploratory: 4,000 crops an arm; the encoder is the demo's, trained on the same photographs but 14 others.
    "cpu": Preset(250, 16, 64, 0, (0, 1), 500, "cpu", encoder="baselines/weights/klvae.safetensors"),
    # One H100, 25 minutes for everything: sized for 11 steps a second and 8 s to start each command, not yet timed.
    "gpu": Preset(500, 64, 96, 160, (0, 1, 2), 1600, "cuda"),
    # What is left of `make gpu-train` after its demo weights: 6 minutes by the same count.
    "gpu-short": Preset(200, 64, 96, 160, (0, 1), 400, "cuda"),
}


def quick(preset: Preset) -> Preset:
    """What takes seconds."""
    return replace(preset, **QUICK, resolution=32, metrics="psnr,ssim", noise="0", limit=4)


def main() -> None:
    """Run what is missing of a preset."""
    parser = argparse.ArgumentParser(description="The controlled study of PLAN.md.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--train", type=Path, help="folder of the photographs to train on")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny budgets, on the samples, no report")
    arguments = parser.parse_args()
    if not (arguments.train or arguments.quick):
        parser.error("--train FOLDER: the photographs to train on")
    name, preset = arguments.preset, PRESETS[arguments.preset]
    if arguments.quick:
        study(quick(preset), None, arguments.out / f"{name}-quick")
    else:
        study(preset, arguments.train, arguments.out / name)


def study(preset: Preset, photographs: Path | None, out: Path) -> None:
    """Train and measure what is missing in `out`, then report; without photographs on the samples, and no report."""
    from results.study.analyse import show

    data = ["--data", str(split(photographs, out)) if photographs else "samples"]
    development = str(out / "development.txt") if photographs else "samples"
    encoder = Path(preset.encoder) if preset.encoder else train_encoder(out / "encoder", "klvae", preset, *data)
    for seed in preset.seeds:
        for arm in ARMS:
            train_arm(arm, seed, preset, data, encoder, out)
    front = front_encoder(preset, data, out / "front")
    for arm in FRONT:
        train_arm(arm, preset.seeds[0], preset, data, front, out / "front")
    evaluate(preset, development, out)
    trained = {str(file.parent.relative_to(out)): file for file in out.glob("**/model.safetensors")}
    measured = ("eval/*/*/*.json", "eval/adm/samples-*/*.csv.gz", "speed/*/*.json")
    kept = keep(HERE / out.name if photographs else out / "kept", {"encoder": encoder} | trained, out, measured)
    if photographs:
        show(kept, out)


def front_encoder(preset: Preset, data: list[str], out: Path) -> Path:
    """An encoder that SSDD trained, with normalised latents."""
    taken = ["--encoder-from", str(train_encoder(out / "encoder", "ssdd", preset, *data)), "freeze_encoder=true"]
    return train(
        out / "encoder-normalised", "klvae", *data, *preset.settings("klvae"), *taken, "run.seed=0", "run.steps=1"
    )


def train_arm(arm: str, seed: int, preset: Preset, data: list[str], encoder: Path, out: Path) -> None:
    """One arm and seed, in the folder <arm>-<seed>."""
    half = preset.steps // 2
    # Student and control must not see the teacher's crops and noise again, which the seed alone decides.
    drawn = seed + 100 if arm in ("c-student", "c-control") else seed
    whole, part, taken = f"run.steps={preset.steps}", f"run.steps={half}", ["--encoder-from", str(encoder)]
    teacher = ["--from", str(out / f"c-teacher-{seed}" / "model.safetensors")]
    gan = ["gan.weight=0.5", f"gan.start_step={half}", "gan.learning_rate=2e-4"]
    convolutional = ["klvae", *taken, *CONVOLUTIONAL, whole]
    command = {
        "a": convolutional,
        "d": [*convolutional, *gan],
        "b": ["ssdd", *taken, *REGRESSION, whole],
        "c-teacher": ["ssdd", *taken, "--stage", "pretrain", part, "share_at_one=0"],
        "c-student": ["ssdd", *teacher, "--stage", "distill", part],
        "c-control": ["ssdd", *teacher, "--stage", "finetune", part, *AT_ONE],
    }[arm]
    train(
        out / f"{arm}-{seed}", *command, *data, *preset.settings(command[0]), f"run.seed={drawn}", "perceptual_start=0"
    )


def evaluate(preset: Preset, development: str, out: Path) -> None:
    """Quality on the test and the development photographs, the teacher's curve over steps, decode speed."""
    arms = [named(arm, seed, out) for seed in preset.seeds for arm in ARMS]
    longer = [named("c-teacher", seed, out, steps) for seed in preset.seeds for steps in STEPS[1:]]
    front = ["front-" + named(arm, preset.seeds[0], out / "front") for arm in FRONT]
    demo = ["demo-klvae=klvae", "demo-ssdd=ssdd"]
    size = ["--res", str(preset.resolution), "--device", preset.device]
    where, noise = [*size, "--out", str(out / "eval")], ["--seeds", preset.noise, "--metrics", preset.metrics]
    where += ["--limit", str(preset.limit)] if preset.limit else []
    tokbench("run", "--models", ",".join([*arms, *longer, *front]), *where, *noise)
    chosen_by = ",".join(metric for metric in ("psnr", "lpips-alex") if metric in preset.metrics.split(","))
    tokbench("run", "--models", ",".join([*arms, *demo]), *where, "--data", development, "--metrics", chosen_by)
    steps = [named("c-teacher", preset.seeds[0], out, number) for number in STEPS[1:]]
    timed = ",".join([*(named(arm, preset.seeds[0], out) for arm in ("a", "c-student")), *steps])
    quick = ["--quick"] if preset.device == "cpu" else []
    tokbench("speed", "--models", timed, *size, "--out", str(out / "speed"), *quick)


def named(arm: str, seed: int, out: Path, steps: int = 1) -> str:
    """NAME=SPEC of a trained arm."""
    name = f"{arm}-{seed}" + (f"-steps{steps}" if steps > 1 else "")
    family, options = ("klvae", "") if arm in ("a", "d") else ("ssdd", f"@steps={steps}")
    return f"{name}={family}:{out}/{arm}-{seed}/model.safetensors{options}"


if __name__ == "__main__":
    main()
