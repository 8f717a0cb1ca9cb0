"""Training of SSDD (arXiv 2510.04961): one visible loop for every stage."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssdd_models.encoder import EncoderConfig, Posterior, noised
from ssdd_models.layers import AttentionBlock, Discriminator, ResBlock
from ssdd_models.losses import Repa, critic_loss, flow_losses, generator_loss, training_times
from ssdd_models.ssdd import SSDD, SSDDConfig
from ssdd_models.stages import PRESETS, SSDDTraining
from ssdd_models.tokenizer import SSDDTokenizer
from ssdd_models.uvit import SIZES, DecoderConfig, ResidualBlock, TransformerBlock, UViT
from tokbench.checkpoints import read_header
from tokbench.config import from_dict
from tokbench.data.training_crops import PhotoCrops
from tokbench.errors import InputError, first_line
from tokbench.registry import TrainOptions, choose
from tokbench.runtime.seeding import normal, sample_seeds
from tokbench.training.gradients import average_gradients
from tokbench.training.held_out import open_images
from tokbench.training.log import image_grid
from tokbench.training.optimisation import (
    check_sides,
    make_optimizer,
    optimizer_step,
    perceptual_loss,
    place,
    size_errors_as_input_errors,
)
from tokbench.training.session import open_session, start_from

RECOMPUTED = (ResBlock, AttentionBlock, ResidualBlock, TransformerBlock)
POSTERIOR, TIME, NOISE, LATENT_NOISE = range(4)  # streams of random numbers


def train(config: SSDDTraining, options: TrainOptions) -> Path:
    """Train until config.run.steps, or go on from where options.out stopped; returns its model.safetensors.

    Writes there: model.safetensors, best.safetensors and what a Session writes. Raises InputError for data or files
    that cannot be used, CellError for a loss that is no number, KeyboardInterrupt after saving when told to stop.
    """
    run, out = config.run, options.out
    with open_session("ssdd", config, out) as session:
        # Set up: model, data, what judges it.
        torch.manual_seed(run.seed)
        model, origin = build(config, options)
        source, trained, held_out = open_images(options.data, run)
        crops = PhotoCrops(source, trained, config.crops, run.seed)
        place([model.encoder, model.decoder], session.run, session.device, RECOMPUTED)
        losses = Losses(config, model, session.device)
        if losses.teacher is not None and session.run.compile:  # a copy is not compiled as its original is
            losses.teacher.decoder.compile(dynamic=False)
        critic = Discriminator().to(session.device) if config.weights.gan else None
        critic_optimizer = make_optimizer(critic.named_parameters(), config.optim) if critic is not None else None
        named = [*model.named_parameters(), *(losses.repa.named_parameters() if losses.repa is not None else ())]
        session.start(
            model, named, repa=losses.repa, teacher=losses.teacher, critic=critic, critic_optimizer=critic_optimizer
        )
        info = {"losses": losses.networks(), "trained_on": f"{source.name}, {len(trained)} images"}

        for step in session.steps(session.batches(crops)):
            numbers, images, ids = step.batch
            judge = critic if step.number > config.gan_start else None
            for part in step.parts():
                real = session.images(images[part])  # [B, 3, H, W]
                seeds = [sample_seeds(run.seed, numbers[part], stream) for stream in range(LATENT_NOISE + 1)]
                with session.autocast():
                    terms, clean, x_t, t = losses.denoise(real, seeds, step.number)
                if judge is not None:
                    terms["gan"] = generator_loss(judge, clean, x_t, t)
                loss = torch.stack([getattr(config.weights, name) * value for name, value in terms.items()]).sum()
                step.backward(loss, loss=loss, **terms)
                if judge is not None:
                    judged = critic_loss(judge, real, clean, x_t, t)
                    step.backward(judged, critic=judged)
            if judge is not None and critic_optimizer is not None:
                weights = list(judge.parameters())
                average_gradients(weights, session.processes)
                optimizer_step(critic_optimizer, weights, step.rate, config.optim.clip)
            step.update(ids)
            if step.shows:
                step.show(image_grid([real[:8], clean[:8]]))
            if step.scores and len(held_out):
                with session.averaged_weights():
                    if session.score(SSDDTokenizer(model, config.eval_steps), held_out, step.number):
                        export(out / "best.safetensors", config, model, info, session.record(config.stage, origin))
        if session.processes.main:
            with session.averaged_weights():
                export(out / "model.safetensors", config, model, info, session.record(config.stage, origin))
    return out / "model.safetensors"


class Losses:
    """What a stage learns from, its critic apart: the networks and the losses of a part of a step."""

    def __init__(self, config: SSDDTraining, model: SSDD, device: torch.device) -> None:
        self.config, self.model = config, model
        # A frozen copy of the checkpoint that the student starts from.
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False) if config.stage == "distill" else None
        self.perceptual = perceptual_loss(config.perceptual, device) if config.weights.perceptual else None
        self.repa = make_repa(model, device) if config.weights.repa else None

    def networks(self) -> list[str]:
        """Those that a metric of the harness may share."""
        weights = {self.config.perceptual: self.config.weights.perceptual, "dinov2-base": self.config.weights.repa}
        return [name for name, weight in weights.items() if weight > 0]

    def denoise(
        self, real: Tensor, seeds: Sequence[Tensor], step: int
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Losses by name, the predicted clean image [B, 3, H, W], x_t and t, of images float [B, 3, H, W]."""
        config, device = self.config, real.device
        noise = normal(seeds[NOISE], real.shape[1:], device=device)
        perceptual = self.perceptual if step > config.perceptual_start else None
        with torch.set_grad_enabled(not config.freeze_encoder):
            posterior: Posterior = self.model.encode(real)
        if self.teacher is None:
            z = posterior.sample(normal(seeds[POSTERIOR], posterior.mean.shape[1:], device=device))
            t = training_times(normal(seeds[TIME], (2,), device=device), config.share_at_one)
            target = real
        else:
            # The teacher's sample from the same noise and latents, not the one-shot prediction from a noised real
            # image that circulates in a fork: see the README.
            z, t = posterior.mode(), torch.ones(len(real), device=device)
            target = self.teacher.decode(z, config.teacher_steps, noise).clone()
        if config.weights.latent_noise:
            z = noised(z, normal(seeds[LATENT_NOISE], (1 + z[0].numel(),), device=device), config.weights.latent_noise)
        losses, clean, x_t = flow_losses(
            self.model, z, target, noise, t, real=real, perceptual=perceptual, repa=self.repa
        )
        if not config.freeze_encoder:
            losses["kl"] = posterior.kl().mean()
        return losses, clean, x_t, t


def export(path: Path, config: SSDDTraining, model: SSDD, info: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """Write the weights that the model has now, averaged ones, as a model of their own."""
    finished = SSDD.from_state(replace(model.config, steps=config.eval_steps), model.state_dict())
    finished.save_pretrained(path, info=info, training=training)


def configure(options: TrainOptions) -> SSDDTraining:
    """The stage that `tokbench train ssdd` names. Sizes are those of the files it starts from, or of --encoder and
    --decoder."""
    stages = choose(PRESETS, options.preset, "preset", "paper")
    config = choose(stages, options.stage, "stage", "joint")
    with size_errors_as_input_errors("--encoder"):
        if options.encoder_from:
            config = replace(config, encoder=sizes(options.encoder_from)[0])
        if options.start:
            encoder, decoder = sizes(options.start)
            config = replace(config, encoder=encoder, decoder=decoder or config.decoder)
        if options.encoder:
            config = replace(config, encoder=EncoderConfig.parse(options.encoder))
        if options.decoder:
            config = replace(config, decoder=choose(SIZES, options.decoder, "decoder", "M"))
    return config


def sizes(path: Path) -> tuple[EncoderConfig, DecoderConfig | None]:
    """Encoder and decoder of a file: SSDD (ours or released) or KL-VAE, which has no such decoder.

    Raises InputError for any other file.
    """
    shapes, metadata = read_header(path)
    try:
        if metadata.get("model") == "klvae":
            return from_dict(EncoderConfig, metadata["config"]["encoder"]), None
        config = SSDDConfig.of_file(shapes, metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: neither an SSDD nor a KL-VAE: {error}") from error
    return config.encoder, config.decoder


def build(config: SSDDTraining, options: TrainOptions) -> tuple[SSDD, dict[str, str]]:
    """The model to train and which files it was started from. Raises InputError for sizes or files that do not fit."""
    if options.start is None and options.encoder_from is None and config.freeze_encoder:
        raise InputError(f"stage {config.stage} needs a trained encoder: give --from or --encoder-from")
    if options.start is None and config.stage == "distill":
        raise InputError("stage distill needs --from, the checkpoint that is both teacher and student")
    with size_errors_as_input_errors("encoder.*, decoder.*"):
        model = SSDD(config.encoder, config.decoder, init=config.init)
    check_sides(model.size_multiple, config.crops, config.run)
    if config.cancel_noise:
        cancel_noise(model.decoder)
    origin = start_from(model, options)
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
