"""The sweep of PLAN.md over latents, by the command line alone: train, measure, print the tables, draw the figures.

    python -m results.sweep.run --preset cpu --train PHOTOS      (make sweep PRESET=cpu TRAIN=PHOTOS)

Stop it at any point; the same command goes on. --quick goes the whole way in seconds and says nothing.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from results.stages import CONVOLUTIONAL, QUICK, REGRESSION, Budget, keep, split, tokbench, train, train_encoder
from ssdd_models.encoder import EncoderConfig

HERE = Path(__file__).parent
FAMILIES = {"conv": "klvae", "ssdd": "ssdd"}  # decoder -> what trains it
# Channels of the convolutional decoder's levels, finest first, in units of 32; the bundled f8c4's and alike.
MULTIPLIERS = {4: "1,2,6", 8: "1,2,4,6", 16: "1,2,3,4,6"}
LADDERS = {"jpeg": (5, 10, 20, 40, 70, 90), "webp": (0, 10, 30, 60, 90), "avif": (5, 15, 30, 50, 75)}
CODECS = tuple(f"{name}-q{quality}" for name, ladder in LADDERS.items() for quality in ladder)


@dataclass(frozen=True)
class Preset(Budget):
    """Sizes of the sweep; the two parts of a decoder's training share its steps half and half."""

    latents: tuple[str, ...] = ("f8c4", "f16c4", "f16c16", "f4c3")
    resolutions: str = "128,256,512"  # and native: the bundled photographs have 512 px
    metrics: str = "psnr,ssim,lpips-alex,lpips-vgg,dists,pd-mobilenet,bpp"
    codecs: tuple[str, ...] = CODECS
    chosen_at: int = 256  # pixels at which the step of the entropy coder is chosen
    share_at_one: float = 1.0  # of SSDD's second half; below 1 for a decoder that is to gain by more steps


PRESETS = {
    # 3,200 crops a decoder: with two seeds at most 25 minutes a latent on two idle cores, its encoder 10 minutes.
    "cpu": Preset(200, 16, 64, 128, (0, 1), 400, "cpu"),
    # One H100, 25 minutes for everything: sized for 11 steps a second, not yet timed.
    "gpu": Preset(500, 64, 96, 160, (0, 1), 1200, "cuda"),
}


def quick(preset: Preset) -> Preset:
    """What takes seconds: one latent, a few steps."""
    return replace(
        preset, **QUICK, latents=("f16c4",), resolutions="32", metrics="psnr,ssim,bpp", codecs=("jpeg-q10",),
        chosen_at=32,
    )  # fmt: skip


def main() -> None:
    """Run what is missing of a preset."""
    from results.sweep.analyse import write
    from results.sweep.measure import measure_latents

    parser = argparse.ArgumentParser(description="The sweep of PLAN.md.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--train", type=Path, help="folder of the photographs to train on")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny budgets, on the samples")
    arguments = parser.parse_args()
    if not (arguments.train or arguments.quick):
        parser.error("--train FOLDER: the photographs to train on")
    name, preset = arguments.preset, PRESETS[arguments.preset]
    if arguments.quick:
        name, preset = f"{name}-quick", quick(preset)
    out = arguments.out / name
    kept = out / "kept" if arguments.quick else HERE / name
    data = ["--data", "samples" if arguments.quick else str(split(arguments.train, out))]
    for latent in preset.latents:
        encoder = train_klvae(latent, preset, data, out / latent / "encoder")
        for seed in preset.seeds:
            for decoder in FAMILIES:
                train_decoder(decoder, latent, seed, preset, data, encoder, out / latent)
    models = [named(decoder, latent, seed, out) for latent in preset.latents for seed in preset.seeds
              for decoder in FAMILIES]  # fmt: skip
    first = [model for model in models if model.partition("=")[0].endswith(f"-{preset.seeds[0]}")]
    where = ["--device", preset.device, "--metrics", preset.metrics, "--out", str(out / "eval")]
    for resolution in preset.resolutions.split(","):  # the small ones first: something to look at early
        tokbench("run", "--models", ",".join([*models, *preset.codecs]), "--res", resolution, *where)
    measure_latents(first, preset, out / "latents")
    speed = ["--device", preset.device, "--res", preset.resolutions, *(["--quick"] if preset.device == "cpu" else [])]
    tokbench("speed", "--models", ",".join(first), *speed, "--out", str(out / "speed"))
    trained = {str(file.parent.relative_to(out)): file for file in out.glob("*/*/model.safetensors")}
    measured = ("eval/*/*/*.json", "eval/*/*/*.csv.gz", "latents/*.json", "speed/*/*.json")
    write(keep(kept, trained, out, measured))


def train_klvae(latent: str, preset: Preset, data: list[str], folder: Path) -> Path:
    """The KL-VAE whose encoder the decoders of a latent share."""
    encoder = EncoderConfig.parse(latent)
    sizes = [f"model.encoder.downsample={encoder.downsample}", f"model.encoder.channels={encoder.channels}"]
    return train_encoder(folder, "klvae", preset, *data, *sizes, *model_options("klvae", latent))


def train_decoder(
    decoder: str, latent: str, seed: int, preset: Preset, data: list[str], encoder: Path, out: Path
) -> None:
    """A decoder in two parts, each half of the steps: the second on larger late crops and at half the learning rate.

    SSDD's network begins as plain regression and goes on as a one-step diffusion decoder at t = 1, a share of
    `share_at_one`; the convolutional one does the same twice.
    """
    family = FAMILIES[decoder]
    diffusion = ("--stage", "finetune", f"share_at_one={preset.share_at_one:g}", "eval_steps=1")
    first, second = {"conv": (CONVOLUTIONAL, CONVOLUTIONAL), "ssdd": (REGRESSION, diffusion)}[decoder]
    shared = [*data, *preset.settings(family), *model_options(family, latent), f"run.steps={preset.steps // 2}"]
    shared += ["perceptual_start=0"]
    taken = ["--encoder-from", str(encoder), "crops.late_size=0", f"run.seed={seed}"]
    start = train(out / f"{decoder}-{seed}-start", family, *shared, *first, *taken)
    taken = ["--from", str(start), "optim.learning_rate=5e-4", f"run.seed={seed + 100}"]  # and other crops
    train(out / f"{decoder}-{seed}", family, *shared, *second, *taken)


def model_options(family: str, latent: str) -> list[str]:
    """Overrides that a family needs for a latent."""
    multipliers = MULTIPLIERS[EncoderConfig.parse(latent).downsample]
    return [f"model.decoder.channel_mult={multipliers}"] if family == "klvae" else []


def named(decoder: str, latent: str, seed: int, out: Path) -> str:
    """NAME=SPEC of a trained decoder."""
    return f"{decoder}-{latent}-{seed}={FAMILIES[decoder]}:{out}/{latent}/{decoder}-{seed}/model.safetensors"


if __name__ == "__main__":
    main()
