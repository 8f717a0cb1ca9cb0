"""Train a diffusion transformer in the latents of any tokenizer: `tokbench train dit`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokbench.checkpoints import write_model
from tokbench.config import to_dict
from tokbench.data.training_crops import CropConfig
from tokbench.errors import InputError
from tokbench.generation.compatibility import latent_space, to_record
from tokbench.generation.dit import Block, DiT, dit_config
from tokbench.generation.flow import draw_times, guided, integrate, noised, velocity
from tokbench.generation.latents import Images, LatentConfig, Latents, Normaliser, encode
from tokbench.registry import create, row_name
from tokbench.runtime.device import prepare
from tokbench.runtime.processes import Machine
from tokbench.runtime.seeding import normal, sample_seeds
from tokbench.runtime.terminal import bar, say
from tokbench.tokenizer import Tokenizer
from tokbench.training.log import Log, Meter, check_losses, image_grid, interrupts, plot_curves, save_image
from tokbench.training.optimisation import (
    Ema,
    EmaConfig,
    OptimConfig,
    RunConfig,
    learning_rate,
    make_optimizer,
    optimizer_step,
    recompute,
)
from tokbench.training.session import load_checkpoint, save_checkpoint

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
            steps=7_000_000, batch_size=256, compile=True, log_every=100, sample_every=10_000, save_every=5_000
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
        run=replace(
            _PAPER.run, steps=3000, batch_size=32, compile=False, log_every=20, sample_every=500, save_every=250
        ),
    ),
}


def find_preset(name: str) -> DiTTraining:
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r} of dit: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def row_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """In which order an epoch takes the rows."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


class Batches:
    """Sample number -> row: every row once an epoch, in an order that depends on the seed and the epoch alone."""

    def __init__(self, latents: Latents, seed: int) -> None:
        self.latents, self.seed = latents, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def rows(self, numbers: range) -> tuple[Tensor, Tensor]:
        """Latents float32 [B, C, H, W] and labels int64 [B]."""
        indices = []
        for number in numbers:
            epoch, position = divmod(number, len(self.latents))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, row_order(len(self.latents), self.seed, epoch)
            indices.append(int(self._order[position]))
        return self.latents.rows(indices)


def flow_loss(
    model: Any,
    dit: DiT,
    x: Tensor,
    labels: Tensor,
    seeds: tuple[Tensor, Tensor],
    times: Literal["uniform", "logit-normal"],
) -> Tensor:
    """Mean squared error of the velocity at random times, float32; noise, time and dropped labels come from seeds."""
    noise = normal(seeds[0], x.shape[1:], device=x.device)
    numbers = normal(seeds[1], (2,), device=x.device)
    t = draw_times(numbers[:, 0], times)
    labels = dit.drop_labels(labels, torch.special.ndtr(numbers[:, 1]))
    return (model(noised(x, noise, t), t, labels).float() - velocity(x, noise)).square().mean()


def train(config: DiTTraining, data: str, out: Path) -> Path:
    """Encode `data` once, train on the latents, write `out`/generator.safetensors and return its path.

    Continues from `out` where an interrupted run stopped. Under torchrun or accelerate every process encodes and
    trains its share. Raises InputError for settings that do not fit and CellError when the loss is no number.
    """
    for name, default in vars(RunConfig()).items():
        if name.startswith(("eval_", "held_out", "best_by")) and getattr(config.run, name) != default:
            raise InputError(f"run.{name} is of tokenizers: a generator has no photographs held out")
    run, machine = config.run, Machine(config.run)

    # Latents: encoded once, read by all. Their statistics make every tokenizer's latents alike to the generator.
    tokenizer = create(config.tokenizer)
    prepare(tokenizer, machine.device)
    space = latent_space(tokenizer, config.latents.resolution, machine.device)
    images = Images(data, config.latents, run.seed, run.workers or None)
    encode(
        tokenizer, config.tokenizer, images, out / "latents",
        seed=run.seed, rank=machine.rank, world=machine.world, device=machine.device,
    )  # fmt: skip
    machine.accelerator.wait_for_everyone()
    latents = Latents(out / "latents")
    normaliser = latents.statistics(config.normalise)
    if machine.main:
        count, classes = f"{len(latents)} latents {latents.shape}", len(images.classes)
        say(f"{count} of {row_name(config.tokenizer)}, {classes} classes; normalised as {normaliser}")

    # Model, average, optimiser. All processes start from the same weights.
    torch.manual_seed(run.seed)
    dit = DiT(
        dit_config(
            config.size, patch=config.patch, channels=latents.shape[0], num_classes=len(images.classes),
            label_dropout=config.label_dropout,
        )
    ).to(machine.device)  # fmt: skip
    if run.checkpoint_activations:
        recompute(dit, (Block,))
    model = torch.compile(dit) if run.compile else dit
    parameters = list(dit.parameters())
    ema, optimizer = Ema(dit, config.ema), make_optimizer(dit.named_parameters(), config.optim)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # `prepare` had turned it off

    # Resume.
    checkpoint, first_step = out / "checkpoint.pt", 0
    if (state := load_checkpoint(checkpoint, config)) is not None:
        dit.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow = {name: tensor.to(machine.device) for name, tensor in state["ema"].items()}
        ema.updates, first_step = state["ema_updates"], state["step"]

    def save(step: int) -> None:
        state = {"model": dit.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.shadow}
        save_checkpoint(checkpoint, config, {**state, "ema_updates": ema.updates, "step": step})
        metadata = {
            "model": "dit",
            "config": to_dict(dit.config),
            "info": {
                "space": to_record(space),
                "normaliser": {"mean": normaliser.mean, "std": normaliser.std},
                "classes": images.classes,
                "trained_on": f"{images.source.name}, {len(latents)} latents",
            },
            "training": {**to_dict(config), "step": step},
        }
        with ema.applied():
            write_model(out / "generator.safetensors", dit.state_dict(), metadata, torch.float32)

    # Loop. A step's batch is cut evenly over processes, then into `accumulate` parts.
    batches, part = Batches(latents, run.seed), run.batch_size // machine.world // run.accumulate
    records = Log(out / "log.jsonl", first_step) if machine.main else None
    meter, step = Meter(), first_step
    with interrupts() as stop, bar("train dit", run.steps, "steps", first_step, machine.main) as advance:
        while step < run.steps and not stop:
            start, loss_sum = (
                step * run.batch_size + machine.rank * part * run.accumulate,
                torch.zeros((), device=machine.device),
            )
            for i in range(run.accumulate):
                numbers = range(start + i * part, start + (i + 1) * part)
                x, labels = batches.rows(numbers)
                x, labels = normaliser(x.to(machine.device, non_blocking=True)), labels.to(machine.device)
                seeds = (sample_seeds(run.seed, numbers, NOISE), sample_seeds(run.seed, numbers, UNIFORM))
                with machine.autocast():
                    loss = flow_loss(model, dit, x, labels, seeds, config.times) / run.accumulate
                loss.backward()
                loss_sum += loss.detach()
            rate = learning_rate(step, run.steps, config.optim)
            norm = optimizer_step(optimizer, parameters, rate, config.optim.clip, machine)
            ema.update(step)
            step += 1

            # Log, sample, save.
            meter.add({"loss": loss_sum, "gradient": norm}, run.batch_size)
            advance(1, meter.note())
            if step % run.log_every == 0 or step == run.steps:
                means = meter.take()
                means["loss"] = float(machine.mean(torch.tensor(means["loss"], device=machine.device)))
                check_losses(means, step, [f"rows of steps {step - run.log_every}..{step - 1}"], checkpoint, 1e6)
                if records is not None:
                    records.write(step=step, rate=rate, **means)
                    rate_text = f"{means['images_per_second']:.1f} images/s"
                    say(f"step {step} of {run.steps}: loss {means['loss']:.4f}, {rate_text}")
            if machine.main and (step % run.save_every == 0 or step == run.steps):
                save(step)
            if machine.main and (step % run.sample_every == 0 or step == run.steps):
                with ema.applied():
                    grid = sample_grid(dit, tokenizer, normaliser, latents.shape, config, machine.device)
                save_image(grid, out / "samples" / f"{step:07d}.png")
    if machine.main and stop:
        save(step)
    if stop:
        raise KeyboardInterrupt
    if records is not None:
        plot_curves(records.records(), out / "curves.png")
    machine.accelerator.wait_for_everyone()  # nobody opens the generator before it is written
    return out / "generator.safetensors"


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
