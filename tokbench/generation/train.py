"""Train a diffusion transformer in the latents of any tokenizer: `tokbench train dit`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokbench.checkpoints import write_checkpoint
from tokbench.config import to_dict
from tokbench.data.training_crops import CropConfig
from tokbench.errors import InputError
from tokbench.generation.compatibility import latent_space
from tokbench.generation.dit import Block, DiT, dit_config
from tokbench.generation.flow import draw_times, guided, integrate, noised, velocity
from tokbench.generation.latents import Images, LatentConfig, Latents, Normaliser, encode
from tokbench.registry import TrainOptions, choose, create
from tokbench.runtime.device import prepare
from tokbench.runtime.processes import Processes
from tokbench.runtime.seeding import normal, sample_seeds
from tokbench.runtime.terminal import say
from tokbench.tokenizer import Tokenizer
from tokbench.training.log import image_grid
from tokbench.training.optimisation import EmaConfig, OptimConfig, RunConfig, recompute
from tokbench.training.session import open_session

NOISE, UNIFORM = 1, 2  # streams of random numbers


@dataclass(frozen=True)
class DiTTraining:
    """Everything about a run but its data and its folder."""

    tokenizer: str = "klvae"  # spec; any that encodes to a grid of numbers
    size: Literal["tiny", "S", "B", "L", "XL"] = "XL"
    patch: int = 2
    label_dropout: float = 0.1
    normalise: Literal["scalar", "channel"] = "scalar"  # one mean and deviation, or one for each channel
    times: Literal["uniform", "logit-normal"] = "uniform"
    grid_guidance: float = 1.5  # of the sample grids
    grid_steps: int = 50
    latents: LatentConfig = field(default_factory=LatentConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig("adamw", 1e-4, weight_decay=0.0, clip=1e9))
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.9999, start_step=0))
    run: RunConfig = field(
        default_factory=lambda: RunConfig(
            steps=7_000_000, batch_size=256, log_every=100, sample_every=10_000, save_every=5_000
        )
    )


_PAPER = DiTTraining()
PRESETS: dict[str, DiTTraining] = {
    # DiT-XL/2 as published (arXiv 2212.09748), trained by SiT's flow: gFID 2.06 with guidance 1.5 in SiT's paper.
    "dit": _PAPER,
    # Cheap, and keeps the order of tokenizers: size B, 100,000 steps; patch 1 for f16, 2 for f8 (256 tokens at 256 px).
    "proxy": replace(
        _PAPER,
        size="B",
        times="logit-normal",
        optim=replace(_PAPER.optim, learning_rate=2e-4, betas=(0.9, 0.95), clip=1.0),
        run=replace(_PAPER.run, steps=100_000),
    ),
    # A CPU, minutes, a handful of photographs: shows that the loop closes, proves nothing about a tokenizer.
    "tiny": replace(
        _PAPER,
        size="tiny",
        latents=LatentConfig(resolution=128, crops=16, cut=CropConfig(short_side=(128, 256), flip=False)),
        optim=replace(_PAPER.optim, learning_rate=5e-4, clip=1.0, warmup_steps=100, schedule="cosine"),
        ema=EmaConfig(decay=0.999, start_step=0),
        run=replace(_PAPER.run, steps=3000, batch_size=32, log_every=20, sample_every=500, save_every=250),
    ),
}


def configure(options: TrainOptions) -> DiTTraining:
    """The preset that `tokbench train dit` names."""
    if options.stage or options.start or options.encoder_from or options.encoder or options.decoder:
        raise InputError("dit has no --stage, --from, --encoder-from, --encoder or --decoder; set tokenizer=SPEC")
    return choose(PRESETS, options.preset, "preset", "dit")


def row_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """In which order an epoch takes the rows."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def latent_batches(
    latents: Latents, run: RunConfig, first_step: int, processes: Processes
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """This process's share of every step: sample numbers, latents float32 [B, C, H, W] and labels int64 [B].

    Sample number -> row: every row once an epoch, in an order that depends on the seed and the epoch alone.
    """
    current, order = -1, np.empty(0, dtype=np.int64)
    size = run.batch_size // processes.size
    for step in range(first_step, run.steps):
        first = step * run.batch_size + processes.rank * size
        numbers, indices = range(first, first + size), []
        for number in numbers:
            epoch, position = divmod(number, len(latents))
            if epoch != current:
                current, order = epoch, row_order(len(latents), run.seed, epoch)
            indices.append(int(order[position]))
        yield numbers, *latents.rows(indices)


def flow_loss(
    model: Any, dit: DiT, x: Tensor, labels: Tensor, seeds: Sequence[Tensor], times: Literal["uniform", "logit-normal"]
) -> Tensor:
    """Mean squared error of the velocity at random times, float32; noise, time and dropped labels come from seeds."""
    noise = normal(seeds[0], x.shape[1:], device=x.device)
    numbers = normal(seeds[1], (2,), device=x.device)
    t = draw_times(numbers[:, 0], times)
    labels = dit.drop_labels(labels, torch.special.ndtr(numbers[:, 1]))
    v: Tensor = model(noised(x, noise, t), t, labels)
    return (v.float() - velocity(x, noise)).square().mean()


def train(config: DiTTraining, options: TrainOptions) -> Path:
    """Encode the data once, train on the latents, write generator.safetensors and return its path.

    Continues where an interrupted run stopped. In several processes each encodes and trains its share.
    Raises InputError for settings that do not fit and CellError when the loss is no number.
    """
    run, out = config.run, options.out
    for name, default in vars(RunConfig()).items():
        if name.startswith(("eval_", "held_out", "best_by")) and getattr(run, name) != default:
            raise InputError(f"run.{name} is of tokenizers: a generator has no images held out")
    with open_session("dit", config, out) as session:
        # Latents: encoded once, read by all. Their statistics make every tokenizer's latents alike to the generator.
        tokenizer = create(config.tokenizer)
        prepare(tokenizer, session.device)
        space = latent_space(tokenizer, config.latents.resolution, session.device)
        images = Images(options.data, config.latents, run.seed, None if run.workers == "auto" else run.workers)
        encode(
            tokenizer, config.tokenizer, images, out / "latents",
            seed=run.seed, processes=session.processes, device=session.device,
        )  # fmt: skip
        session.processes.wait()
        latents = Latents(out / "latents")
        normaliser = latents.statistics(config.normalise)
        if session.processes.main:
            count, classes = f"{len(latents)} latents {latents.shape}", len(images.classes)
            say(f"{count} of {tokenizer.info.name}, {classes} classes; normalised as {normaliser}")

        # Model. All processes start from the same weights.
        torch.manual_seed(run.seed)
        dit = make_dit(config, latents.shape[0], len(images.classes)).to(session.device)
        model = torch.compile(dit, dynamic=False) if session.run.compile else dit
        session.start(dit, dit.named_parameters())
        info = {
            "space": to_dict(space),
            "normaliser": to_dict(normaliser),
            "classes": images.classes,
            "trained_on": f"{images.source.name}, {len(latents)} latents",
        }

        for step in session.steps(latent_batches(latents, run, session.first_step, session.processes)):
            numbers, *batch = step.batch
            for part in step.parts():
                x, labels = (tensor[part].to(session.device, non_blocking=True) for tensor in batch)
                seeds = [sample_seeds(run.seed, numbers[part], stream) for stream in (NOISE, UNIFORM)]
                with session.autocast():
                    loss = flow_loss(model, dit, normaliser(x), labels, seeds, config.times)
                step.backward(loss, loss=loss)
            step.update([f"samples {numbers[0]} to {numbers[-1]}"])
            if step.shows:
                with session.averaged_weights():
                    step.show(sample_grid(dit, tokenizer, normaliser, latents.shape, config, session.device))
            if session.processes.main and (step.saves or step.number == run.steps):
                training = {**to_dict(config), "step": step.number}
                with session.averaged_weights():
                    write_checkpoint(out / "generator.safetensors", "dit", dit, info, training)
        session.processes.wait()  # nobody opens the generator before it is written
    return out / "generator.safetensors"


def make_dit(config: DiTTraining, channels: int, num_classes: int) -> DiT:
    sizes = dit_config(
        config.size, patch=config.patch, channels=channels, num_classes=num_classes, label_dropout=config.label_dropout
    )
    dit = DiT(sizes)
    if config.run.checkpoint_activations:
        recompute(dit, (Block,))
    return dit


@torch.no_grad()
def sample_grid(
    dit: DiT,
    tokenizer: Tokenizer,
    normaliser: Normaliser,
    shape: tuple[int, ...],
    config: DiTTraining,
    device: torch.device,
) -> Any:
    """16 samples of the first classes, always of the same noise, in 2 rows."""
    seeds = torch.arange(16)
    labels = (torch.arange(16) % dit.config.num_classes).to(device)
    dit.eval()
    field = guided(dit, labels, dit.config.num_classes, config.grid_guidance)
    latents = normaliser.undo(integrate(field, normal(seeds, shape, device=device), config.grid_steps, "euler"))
    resolution = config.latents.resolution
    images = tokenizer.decode(latents, seeds=seeds, size=(resolution, resolution))
    dit.train()
    return image_grid([images[:8], images[8:]])
