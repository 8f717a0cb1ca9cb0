"""gFID: a diffusion transformer trained in any tokenizer's latents, sampled, decoded and scored.

In: a tokenizer and labelled images, or a trained generator; out: records like those of reconstruction.
"""

from pathlib import Path

from tokbench.errors import InputError
from tokbench.registry import Trainer, TrainOptions, register_trainer


def _run_dit(options: TrainOptions) -> Path:
    from tokbench.config import override
    from tokbench.generation.train import find_preset, train

    if options.stage or options.start or options.encoder_from or options.encoder or options.decoder:
        raise InputError("dit has no --stage, --from, --encoder-from, --encoder or --decoder; set tokenizer=SPEC")
    return train(override(find_preset(options.preset or "dit"), options.settings), options.data, options.out)


def _dit_settings(stage: str | None, preset: str | None) -> list[str]:
    from tokbench.config import describe
    from tokbench.generation.train import find_preset

    return describe(find_preset(preset or "dit"))


def register() -> None:
    """Make `tokbench train dit` known."""
    register_trainer(
        "dit", Trainer(_run_dit, _dit_settings, "diffusion transformer in a tokenizer's latents, for gFID")
    )
