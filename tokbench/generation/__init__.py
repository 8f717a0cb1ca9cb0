"""gFID: a diffusion transformer trained in any tokenizer's latents, sampled, decoded and scored.

In: a tokenizer and labelled images, or a trained generator; out: records like those of reconstruction.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokbench.errors import InputError
from tokbench.records.measurement import REQUIRED, option
from tokbench.registry import Trainer, TrainOptions, register_trainer


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What is generated: everything besides how it is measured. The texts are those of `tokbench generate --help`."""

    generator: str = option(REQUIRED, "Folder of `train dit`, or hf:facebook/DiT-XL-2-256.")
    tokenizer: str = option(REQUIRED, "Specs of the tokenizers that decode, comma-separated.")
    num_images: int = option(REQUIRED, "How many, equally many of every class.")
    reference: str = option(REQUIRED, "ADM statistics (.npz), or images as for run --data.")
    guidance: tuple[float, ...] = option((1.0,), "Classifier-free guidance scales, comma-separated; 1: none.")
    guidance_interval: tuple[float, ...] = option((0.0, 1.0), "Guide from t=A to t=B; 0 is noise, 1 data.")
    steps: int | None = option(None, "Steps of the sampler; auto: 50, or 250 for hf:.")
    sampler: str | None = option(None, "euler or heun; for hf: ddim or ddpm.")
    labels: str = option("", "Only these classes: 207,360 or 0-9.")
    seed: int = option(0, "Of all noise.")
    save: Literal["none", "png", "npz"] = option("none", "none, png, or npz as ADM's evaluator reads it.")


def _run_dit(options: TrainOptions) -> Path:
    from tokbench.config import override
    from tokbench.generation.train import find_preset, train

    if options.stage or options.start or options.encoder_from or options.encoder or options.decoder:
        raise InputError("dit has no --stage, --from, --encoder-from, --encoder or --decoder; set tokenizer=SPEC")
    return train(override(find_preset(options.preset), options.settings), options.data, options.out)


def _dit_settings(stage: str | None, preset: str | None) -> list[str]:
    from tokbench.config import describe
    from tokbench.generation.train import find_preset

    return describe(find_preset(preset))


def register() -> None:
    """Make `tokbench train dit` known."""
    register_trainer(
        "dit", Trainer(_run_dit, _dit_settings, "diffusion transformer in a tokenizer's latents, for gFID")
    )
