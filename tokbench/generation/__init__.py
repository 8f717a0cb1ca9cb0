"""gFID: a diffusion transformer trained in any tokenizer's latents, sampled, decoded and scored.

In: a tokenizer and labelled images, or a trained generator; out: records like those of reconstruction.
"""

from dataclasses import dataclass
from typing import Literal

from tokbench.records.measurement import REQUIRED, option
from tokbench.registry import Trainer, register_trainer


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


def _dit() -> Trainer:
    from tokbench.generation import train

    return train


def register() -> None:
    """Make `tokbench train dit` known."""
    register_trainer("dit", _dit, summary="diffusion transformer in a tokenizer's latents, for gFID")
