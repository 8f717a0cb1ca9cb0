"""Training of SSDD (arXiv 2510.04961): one visible loop for every stage."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ssdd_models.distill import distillation_losses, make_teacher
from ssdd_models.encoder import EncoderConfig, Posterior
from ssdd_models.layers import AttentionBlock, Discriminator, ResBlock
from ssdd_models.losses import Repa, critic_loss, flow_losses, generator_loss, training_times
from ssdd_models.ssdd import SSDD, SSDDConfig, read_checkpoint
from ssdd_models.stages import PRESETS, SSDDTraining, Stage
from ssdd_models.tokenizer import SSDDTokenizer
from ssdd_models.uvit import SIZES, DecoderConfig, UViT
from tokbench.config import describe, from_dict, override
from tokbench.data.pixels import to_float
from tokbench.data.training_crops import PhotoCrops, batches
from tokbench.errors import InputError, first_line
from tokbench.registry import TrainOptions, choose
from tokbench.runtime.processes import Machine
from tokbench.runtime.seeding import normal, sample_seeds
from tokbench.runtime.terminal import bar, say
from tokbench.training.held_out import open_photographs, score
from tokbench.training.log import (
    Log,
    Meter,
    check_losses,
    due,
    image_grid,
    interrupts,
    is_best,
    plot_curves,
    save_image,
    training_record,
)
from tokbench.training.optimisation import (
    Ema,
    averaged,
    building,
    check_sides,
    learning_rate,
    make_optimizer,
    optimizer_step,
    perceptual_loss,
    recompute,
)
from tokbench.training.session import Parts, load_checkpoint, save_checkpoint
from tokbench.weights.files import file_sha256

POSTERIOR, TIME, NOISE = 0, 1, 2  # streams of random numbers


def train_ssdd(config: SSDDTraining, data: str, out: Path, start: Path | None, encoder_from: Path | None) -> Path:
    """Train until config.run.steps, or go on from where `out` stopped; returns out/model.safetensors.

    Writes into `out`: last.ckpt, model.safetensors, best.safetensors, log.jsonl, curves.png, samples/. `start` is the
    previous stage's file, `encoder_from` a file whose encoder is taken (SSDD or KL-VAE). Raises InputError for data or
    files that cannot be used, CellError for a loss that is no number, KeyboardInterrupt after saving when told to stop.
    """
    # Set up: processes, model, data, what judges it.
    run, machine = config.run, Machine(config.run)
    torch.manual_seed(run.seed)
    model, origin = build(config, start, encoder_from)
    check_sides(model.size_multiple, config.crops, run)
    source, train, real_held = open_photographs(data, run)
    crops = PhotoCrops(source, train, config.crops, run.seed)
    model.to(machine.device).to(memory_format=torch.channels_last)
    teacher = make_teacher(model) if config.stage == "distill" else None
    if run.checkpoint_activations:
        recompute(model.encoder, (ResBlock, AttentionBlock))
        model.decoder.checkpointing = True
    if run.compile:
        model.encoder.compile()
        model.decoder.compile()
    perceptual = perceptual_loss(config.perceptual, machine.device) if config.weights.perceptual else None
    repa = make_repa(model, machine.device) if config.weights.repa else None
    named = [*model.named_parameters(), *(repa.named_parameters() if repa is not None else ())]
    parameters = [parameter for _, parameter in named if parameter.requires_grad]
    optimizer, ema = make_optimizer(named, config.optim), Ema(model, config.ema)
    critic = Discriminator().to(machine.device) if config.weights.gan else None
    critic_parameters = list(critic.parameters()) if critic is not None else []
    critic_optimizer = make_optimizer(critic.named_parameters(), config.optim) if critic is not None else None
    everything = {"model": model, "ema": ema, "optimizer": optimizer}
    options = {"repa": repa, "teacher": teacher, "critic": critic, "critic_optimizer": critic_optimizer}
    parts = Parts(everything | {name: part for name, part in options.items() if part is not None})

    # Resume.
    checkpoint, first = out / "last.ckpt", 0
    if (state := load_checkpoint(checkpoint, config)) is not None:
        parts.restore(state["parts"])
        first = state["step"]
    log, meter = Log(out / "log.jsonl", first, machine.main), Meter()

    def save(step: int) -> None:
        if machine.main:
            save_checkpoint(checkpoint, config, {"parts": parts.state(), "step": step})

    def export(path: Path) -> None:
        """Write the averaged weights as a model of their own; inside `averaged` and `ema.applied`."""
        finished = SSDD.from_state(replace(model.config, steps=config.eval_steps), model.state_dict())
        networks = [config.perceptual] * (config.weights.perceptual > 0) + ["dinov2-base"] * (config.weights.repa > 0)
        about = {"losses": networks, "trained_on": f"{source.name}, {len(train)} images"}
        finished.save_pretrained(path, info=about, training=training_record(config, config.stage, origin, log))

    # Loop. A step's batch is cut evenly over processes, then into `accumulate` parts.
    stream = batches(
        crops, first_step=first, num_steps=run.steps, batch_size=run.batch_size,
        rank=machine.rank, world=machine.world, num_workers=run.workers,
    )  # fmt: skip
    with interrupts() as stop, bar("train ssdd", run.steps, "steps", first, machine.main) as advance:
        for step, (numbers, images, ids) in enumerate(stream, first + 1):
            sums: dict[str, Tensor] = {}
            for part in range(run.accumulate):
                chosen = slice(part * len(ids) // run.accumulate, (part + 1) * len(ids) // run.accumulate)
                real = to_float(images[chosen].to(machine.device, non_blocking=True))  # [B, 3, H, W]
                real = real.contiguous(memory_format=torch.channels_last)
                seeds = [sample_seeds(run.seed, numbers[chosen], stream) for stream in (POSTERIOR, TIME, NOISE)]
                noise = normal(seeds[NOISE], real.shape[1:], device=machine.device)
                judge = perceptual if step > config.perceptual_start else None
                with machine.autocast():
                    with torch.set_grad_enabled(not config.freeze_encoder):
                        posterior: Posterior = model.encode(real)
                    if teacher is not None:
                        t = torch.ones(len(real), device=machine.device)
                        losses, clean, x_t = distillation_losses(
                            model,
                            teacher,
                            posterior.mode(),
                            real,
                            noise,
                            config.teacher_steps,
                            perceptual=judge,
                            repa=repa,
                        )
                    else:
                        z = posterior.sample(normal(seeds[POSTERIOR], posterior.mean.shape[1:], device=machine.device))
                        t = training_times(normal(seeds[TIME], (2,), device=machine.device), config.share_at_one)
                        losses, clean, x_t = flow_losses(model, z, real, noise, t, perceptual=judge, repa=repa)
                if not config.freeze_encoder:
                    losses["kl"] = posterior.kl().mean()
                if critic is not None and step > config.gan_start:
                    losses["gan"] = generator_loss(critic, clean, x_t, t)
                loss = torch.stack([getattr(config.weights, name) * value for name, value in losses.items()]).sum()
                (loss / run.accumulate).backward()
                if critic is not None and step > config.gan_start:
                    losses["critic"] = critic_loss(critic, real, clean, x_t, t)
                    (losses["critic"] / run.accumulate).backward()
                for name, value in (losses | {"loss": loss}).items():
                    sums[name] = sums.get(name, 0) + value.detach() / run.accumulate
            rate = learning_rate(step - 1, run.steps, config.optim)
            norm = optimizer_step(optimizer, parameters, rate, config.optim.clip, machine)
            if critic_optimizer is not None and step > config.gan_start:
                optimizer_step(critic_optimizer, critic_parameters, rate, config.optim.clip, machine)
            means = machine.means(sums | {"stop": torch.tensor(float(len(stop)))}) | {"gradient": norm}
            stopping = means.pop("stop") > 0  # in all processes after the same step
            check_losses(means, step, ids, checkpoint, config.loss_limit)
            with averaged(optimizer):
                ema.update(step - 1)

            # Log, show, score, save.
            meter.add(means, run.batch_size)
            advance(1, meter.note())
            if due(step, run.log_every, run.steps):
                log.write(step=step, rate=rate, **meter.take())
            if machine.main and due(step, run.sample_every, run.steps):
                save_image(image_grid([real[:8], clean[:8]]), out / "samples" / f"{step:07d}.png")
            if machine.main and len(real_held) and due(step, run.eval_every, run.steps):
                with averaged(optimizer), ema.applied():
                    log.write(
                        step=step,
                        **score(SSDDTokenizer(model, config.eval_steps), real_held, run.eval_metrics, machine.device),
                    )
                    if is_best(log.records(), run.best_by):
                        export(out / "best.safetensors")
                plot_curves(log.records(), out / "curves.png")
            if due(step, run.save_every, run.steps) or stopping:
                save(step)
            if stopping:
                say(f"stopped at step {step} of {run.steps}, saved; the same command goes on")
                raise KeyboardInterrupt

    # Hand over the averaged weights.
    if machine.main:
        with averaged(optimizer), ema.applied():
            export(out / "model.safetensors")
    return out / "model.safetensors"


def run_command(options: TrainOptions) -> Path:
    """`tokbench train ssdd`. Sizes come from the files it starts from, then from --encoder and --decoder."""
    config = find_stage(options.stage, options.preset)
    try:
        if options.encoder_from:
            config = replace(config, encoder=sizes(options.encoder_from)[0])
        if options.start:
            encoder, decoder = sizes(options.start)
            config = replace(config, encoder=encoder, decoder=decoder or config.decoder)
        if options.encoder:
            config = replace(config, encoder=EncoderConfig.parse(options.encoder))
        if options.decoder:
            config = replace(config, decoder=SIZES[choose(list(SIZES), options.decoder, "decoder", "M")])
    except ValueError as error:
        raise InputError(str(error)) from error
    config = override(config, options.settings)
    return train_ssdd(config, options.data, options.out, options.start, options.encoder_from)


def find_stage(stage: str | None, preset: str | None) -> SSDDTraining:
    stages = PRESETS[choose(list(PRESETS), preset, "preset", "paper")]
    return stages[cast(Stage, choose(list(stages), stage, "stage", "joint"))]


def settings(stage: str | None, preset: str | None) -> list[str]:
    """The key=value lines of a stage."""
    return describe(find_stage(stage, preset))


def sizes(path: Path) -> tuple[EncoderConfig, DecoderConfig | None]:
    """Encoder and decoder of a file: SSDD (ours or released) or KL-VAE, which has no such decoder.

    Raises InputError for any other file.
    """
    try:
        state, metadata = read_checkpoint(path)
        if metadata.get("model") == "klvae":
            return from_dict(EncoderConfig, metadata["config"]["encoder"]), None
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        config = SSDDConfig.from_json(metadata["config"]) if metadata else SSDDConfig.from_shapes(shapes)
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: neither an SSDD nor a KL-VAE: {error}") from error
    return config.encoder, config.decoder


def build(config: SSDDTraining, start: Path | None, encoder_from: Path | None) -> tuple[SSDD, dict[str, str]]:
    """The model to train and which files it was started from. Raises InputError for sizes or files that do not fit."""
    if start is None and encoder_from is None and config.freeze_encoder:
        raise InputError(f"stage {config.stage} needs a trained encoder: give --from or --encoder-from")
    if start is None and config.stage == "distill":
        raise InputError("stage distill needs --from, the checkpoint that is both teacher and student")
    origin = {}
    with building("encoder.*, decoder.*"):
        model = SSDD(config.encoder, config.decoder, init=config.init)
    if config.cancel_noise:
        cancel_noise(model.decoder)
    for path, name, part in ((start, "model", model), (encoder_from, "encoder", model.encoder)):
        if path is not None:
            load_part(part, path, "" if name == "model" else "encoder.")
            origin[name] = f"{path.name} {file_sha256(path)[:16]}"
    model.encoder.requires_grad_(not config.freeze_encoder)
    return model, origin


@torch.no_grad()
def cancel_noise(decoder: UViT) -> None:
    """Initial weights with v = -x_t + what the rest of the network adds, so that one step need not learn to do that.

    Six channels carry x_t and -x_t from the input to the last residual block's shortcut, and the output takes the
    difference of their SiLU: silu(a) - silu(-a) = a. The last norm only scales them, for the noise has variance 1.
    """
    last = decoder.get_parameter("up_blocks.3.resnets.2.conv_shortcut.weight")  # of [features, the first skip]
    width = decoder.conv_in.weight.shape[0]
    decoder.conv_in.weight[:6] = 0
    last[:6] = 0
    decoder.conv_out.weight.mul_(0.1)
    for channel in range(6):
        colour, sign = channel // 2, 1 - 2 * (channel % 2)
        decoder.conv_in.weight[channel, colour, 1, 1] = sign
        last[channel, last.shape[1] - width + channel, 0, 0] = 1
        decoder.conv_out.weight[colour, channel, 1, 1] = -sign


def load_part(part: torch.nn.Module, path: Path, prefix: str) -> None:
    """Load the file's tensors below `prefix` into a module. Raises InputError for a file that does not fit."""
    try:
        state, _ = read_checkpoint(path)
        part.load_state_dict({k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)})
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit this model: {first_line(error)}") from error


def make_repa(model: SSDD, device: torch.device) -> Repa:
    """REPA on DINOv2-base. Raises InputError if its network cannot be had."""
    try:
        from transformers import AutoModel

        dino: Any = AutoModel.from_pretrained("facebook/dinov2-base").to(device).eval().requires_grad_(False)
    except (ImportError, OSError) as error:
        reason = first_line(error)
        raise InputError(
            f"REPA needs facebook/dinov2-base ({reason}); `hf download facebook/dinov2-base`, or weights.repa=0"
        ) from error

    def features(images: Tensor) -> Tensor:
        tokens: Tensor = dino(pixel_values=images).last_hidden_state
        return tokens[:, 1:]  # without the class token

    return Repa(model.decoder.config.widths[-1], features).to(device)
