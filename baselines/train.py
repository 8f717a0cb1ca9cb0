"""Training of the KL-VAE as latent diffusion trains it (arXiv 2112.10752): one visible loop.

All losses are means: over the pixel values for the reconstruction, over the batch for everything. The KL divergence is
summed over an image's latent, as SSDD has it, so that kl_weight means the same in both; LDM sums over pixels too, which
makes its 1e-6 weaker by 3 * H * W.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from baselines.kl_vae import KLVAE, SMALL, ConvDecoderConfig, KLVAEConfig, KLVAETokenizer, PatchGAN
from ssdd_models.encoder import EncoderConfig, noised
from ssdd_models.layers import AttentionBlock, ResBlock
from tokbench.checkpoints import read_header, write_checkpoint
from tokbench.config import from_dict
from tokbench.data.pixels import to_float
from tokbench.data.training_crops import CropConfig, PhotoCrops
from tokbench.errors import InputError
from tokbench.registry import TrainOptions, choose
from tokbench.runtime.processes import Processes
from tokbench.runtime.seeding import normal, sample_seeds
from tokbench.training.gradients import average_gradients
from tokbench.training.held_out import open_images
from tokbench.training.log import image_grid
from tokbench.training.optimisation import (
    EmaConfig,
    OptimConfig,
    Perceptual,
    RunConfig,
    check_sides,
    make_optimizer,
    optimizer_step,
    perceptual_loss,
    place,
    size_errors_as_input_errors,
)
from tokbench.training.session import open_session, start_from

POSTERIOR, LATENT_NOISE = 0, 3  # streams of random numbers


@dataclass(frozen=True)
class GanConfig:
    weight: float = 0.5  # times the adaptive weight; 0: no discriminator
    start_step: int = 50_001
    width: int = 64
    layers: int = 3
    learning_rate: float = 4.5e-6


@dataclass(frozen=True)
class KLVAETraining:
    """Everything that decides a run's result."""

    model: KLVAEConfig = field(default_factory=KLVAEConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    l1_weight: float = 1.0
    perceptual: Perceptual = "lpips-vgg"
    perceptual_weight: float = 1.0
    perceptual_start: int = 0  # step from which it counts: colours are learnt faster without it
    kl_weight: float = 1e-6
    latent_noise: float = 0.0  # the most noise on the latents that the decoder sees, in their own deviations
    learn_logvar: bool = True  # the reconstruction's variance is a parameter, as in LDM
    freeze_encoder: bool = False  # decoder-only training, as of sd-vae-ft
    normalise_latents: bool = False  # the finished model's latents get mean 0 and deviation 1


_SMALL_RUN = RunConfig(steps=1700, batch_size=16, log_every=20, sample_every=500, save_every=100, eval_every=500)
_SMALL_CROPS = CropConfig(64, (192, 320), enlarge=1.1, sample_by="area", flat=8.0, late_size=128, late_share=0.06)
_SMALL_OPTIM = OptimConfig("adamw", 1e-3, (0.9, 0.99), clip=1.0, warmup_steps=100, schedule="cosine", final_share=0.05)
_LDM_OPTIM = OptimConfig("adamw", 4.5e-6 * 12, (0.5, 0.9), weight_decay=0.0, clip=1e9)
_LDM_GAN = GanConfig(learning_rate=_LDM_OPTIM.learning_rate)
PRESETS = {
    # The demo weights began so: after 27,000 crops 24.6 dB and lpips-alex .41 at 256 px on 14 held-out photographs,
    # whose bicubic-f8 has 24.0 and .60. Half an hour on three cores. The bundled file went on, see weights/klvae.md.
    "small": KLVAETraining(
        SMALL, _SMALL_CROPS, _SMALL_RUN, _SMALL_OPTIM, EmaConfig(start_step=0), GanConfig(weight=0.0),
        perceptual_weight=0.5, perceptual_start=750, learn_logvar=False, normalise_latents=True,
    ),
    "ldm-f8c4": KLVAETraining(
        crops=CropConfig(256, (256, 256)), run=RunConfig(batch_size=12), optim=_LDM_OPTIM, gan=_LDM_GAN,
    ),
    "ldm-f16c16": KLVAETraining(
        KLVAEConfig(EncoderConfig(16, 16), ConvDecoderConfig(channel_mult=(1, 1, 2, 2, 4))),
        crops=CropConfig(256, (256, 256)), run=RunConfig(batch_size=12), optim=_LDM_OPTIM, gan=_LDM_GAN,
    ),
    "sd-vae-ft": KLVAETraining(
        crops=CropConfig(256, (256, 256)), run=RunConfig(batch_size=192), optim=_LDM_OPTIM, gan=GanConfig(weight=0.0),
        perceptual_weight=0.1, learn_logvar=False, freeze_encoder=True,
    ),
}  # fmt: skip


def train(config: KLVAETraining, options: TrainOptions) -> Path:
    """Train until config.run.steps, or go on from where options.out stopped; returns its model.safetensors.

    Writes there: model.safetensors, best.safetensors and what a Session writes. Raises InputError for data or files
    that cannot be used, CellError for a loss that is no number, KeyboardInterrupt after saving when told to stop.
    """
    run, gan, out = config.run, config.gan, options.out
    with open_session("klvae", config, out) as session:
        # Set up: model, data, what judges it.
        torch.manual_seed(run.seed)
        model, origin = build(config, options)
        source, trained, held_out = open_images(options.data, run)
        crops = PhotoCrops(source, trained, config.crops, run.seed)
        place([model.encoder, model.decoder], session.run, session.device, (ResBlock, AttentionBlock))
        losses = Losses(config, model, session.device)
        critic = make_critic(gan, session.device)
        critic_optim = replace(config.optim, name="adamw", learning_rate=gan.learning_rate)
        critic_optimizer = make_optimizer(critic.named_parameters(), critic_optim)
        session.start(
            model, [*model.named_parameters(), *losses.logvar.named_parameters()],
            logvar=losses.logvar, critic=critic, critic_optimizer=critic_optimizer,
        )  # fmt: skip
        networks = [config.perceptual] if config.perceptual_weight else []
        info = {"losses": networks, "trained_on": f"{source.name}, {len(trained)} images"}
        normalised_on = crops if config.normalise_latents else None
        stage = "frozen" if config.freeze_encoder else "joint"

        for step in session.steps(session.batches(crops)):
            numbers, images, ids = step.batch
            adversarial = bool(gan.weight) and step.number > gan.start_step
            for part in step.parts():
                real = session.images(images[part])  # [B, 3, H, W]
                with session.autocast():
                    seeds = [sample_seeds(run.seed, numbers[part], stream) for stream in (POSTERIOR, LATENT_NOISE)]
                    fake, terms = losses.reconstruct(real, seeds, step.number)
                loss = losses.total(terms)
                if adversarial:
                    terms |= generator_terms(gan, critic, fake, loss, model, session.processes)
                    loss = loss + terms["gan_weight"] * terms["generator"]
                step.backward(loss, loss=loss, **terms)
                if adversarial:
                    critic_loss = hinge(critic(real), critic(fake.detach()))
                    step.backward(critic_loss, critic=critic_loss)
            if adversarial:
                weights = list(critic.parameters())
                average_gradients(weights, session.processes)
                optimizer_step(critic_optimizer, weights, gan.learning_rate, config.optim.clip)
            step.update(ids)
            if step.shows:
                step.show(image_grid([real[:8], fake[:8]]))
            if step.scores and len(held_out):
                with session.averaged_weights():
                    if session.score(KLVAETokenizer(model, {}), held_out, step.number):
                        export(out / "best.safetensors", model, normalised_on, info, session.record(stage, origin))
        if session.processes.main:
            with session.averaged_weights():
                export(out / "model.safetensors", model, normalised_on, info, session.record(stage, origin))
    return out / "model.safetensors"


def configure(options: TrainOptions) -> KLVAETraining:
    """The preset that `tokbench train klvae` names. Sizes are those of the files it starts from, or of --encoder."""
    if options.stage or options.decoder:
        raise InputError("klvae has no --stage and no --decoder; see --preset, freeze_encoder and model.decoder.*")
    config = choose(PRESETS, options.preset, "preset", "ldm-f8c4")
    model = config.model
    if options.encoder_from:
        _, metadata = read_header(options.encoder_from, "klvae", "ssdd")
        model = replace(model, encoder=from_dict(EncoderConfig, metadata["config"]["encoder"]))
    if options.start:
        model = from_dict(KLVAEConfig, read_header(options.start, "klvae")[1]["config"])
    if options.encoder:
        with size_errors_as_input_errors("--encoder"):
            model = replace(model, encoder=EncoderConfig.parse(options.encoder))
    return replace(config, model=model)


def build(config: KLVAETraining, options: TrainOptions) -> tuple[KLVAE, dict[str, str]]:
    """The model to train and which files it was started from. Raises InputError for sizes or files that do not fit."""
    factor, levels = config.model.encoder.downsample, len(config.model.decoder.channel_mult)
    if factor != 2 ** (levels - 1):
        raise InputError(
            f"model.decoder.channel_mult has {levels} numbers, the encoder {config.model.encoder.name} needs "
            f"{factor.bit_length()}: one more than it has halvings"
        )
    if config.normalise_latents and not config.model.projections:
        raise InputError("normalise_latents=true needs model.projections=true, which it writes into")
    check_sides(factor, config.crops, config.run)
    with size_errors_as_input_errors("model.*"):
        model = KLVAE(config.model)
    origin = start_from(model, options)
    model.encoder.requires_grad_(not config.freeze_encoder)
    return model, origin


def make_critic(gan: GanConfig, device: torch.device) -> PatchGAN:
    with size_errors_as_input_errors("gan.*"):
        return PatchGAN(gan.width, gan.layers).to(device)


class Losses:
    """Reconstruction, divergence, and the reconstruction's variance, a parameter (`logvar`) as in LDM."""

    def __init__(self, config: KLVAETraining, model: KLVAE, device: torch.device) -> None:
        self.config, self.model = config, model
        self.perceptual = perceptual_loss(config.perceptual, device) if config.perceptual_weight else None
        self.logvar = nn.ParameterDict({"logvar": nn.Parameter(torch.zeros((), device=device))})
        self.logvar.requires_grad_(config.learn_logvar)

    def reconstruct(self, real: Tensor, seeds: Sequence[Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Images float [B, 3, H, W], seeds by stream -> their reconstructions and what these lose, by name."""
        with torch.set_grad_enabled(not self.config.freeze_encoder):
            posterior = self.model.encode(real)
        z = posterior.sample(normal(seeds[0], posterior.mean.shape[1:], device=real.device))
        if self.config.latent_noise:
            z = noised(z, normal(seeds[1], (1 + z[0].numel(),), device=real.device), self.config.latent_noise)
        fake = self.model.decode(z).float()
        terms = {"l1": (fake - real).abs().mean(), "kl": posterior.kl().mean()}
        if self.perceptual is not None and step > self.config.perceptual_start:
            terms["perceptual"] = self.perceptual(real, fake).mean()
        return fake, terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        config, logvar = self.config, self.logvar["logvar"]
        loss = config.l1_weight * terms["l1"]
        if "perceptual" in terms:
            loss = loss + config.perceptual_weight * terms["perceptual"]
        if config.learn_logvar:
            loss = loss / logvar.exp() + logvar
        return loss if config.freeze_encoder else loss + config.kl_weight * terms["kl"]


def generator_terms(
    gan: GanConfig, critic: PatchGAN, fake: Tensor, loss: Tensor, model: KLVAE, processes: Processes
) -> dict[str, Tensor]:
    """What the decoder gains by being taken for real, and with which weight; the critic itself gets no gradient."""
    critic.requires_grad_(False)
    generator = -critic(fake).mean()
    weight = gan.weight * adaptive_weight(loss, generator, model, processes)
    critic.requires_grad_(True)
    return {"generator": generator, "gan_weight": weight}


def adaptive_weight(loss: Tensor, generator: Tensor, model: KLVAE, processes: Processes) -> Tensor:
    """VQGAN's (arXiv 2012.09841, eq. 7): the ratio of both gradients' norms at the decoder's last layer."""
    last = model.decoder.conv_out.weight
    norms = [processes.mean(torch.autograd.grad(term, last, retain_graph=True)[0]).norm() for term in (loss, generator)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def export(
    path: Path, model: KLVAE, normalised_on: PhotoCrops | None, info: Mapping[str, Any], training: Mapping[str, Any]
) -> None:
    """Write the weights that the model has now, averaged ones, as a model of their own."""
    finished = KLVAE(model.config)
    finished.load_state_dict(model.state_dict())
    if normalised_on is not None:
        finished.normalise_latents(*latent_statistics(finished, normalised_on))
    write_checkpoint(path, "klvae", finished, info, training)


@torch.no_grad()
def latent_statistics(model: KLVAE, crops: PhotoCrops, num_crops: int = 256) -> tuple[Tensor, Tensor]:
    """Mean and deviation [c] of the posterior modes of the first training crops."""
    modes = []
    for number in range(0, num_crops, 16):
        images = torch.stack([crops[i, crops.config.size][0] for i in range(number, number + 16)])
        modes.append(model.encode(to_float(images)).mode())
    z = torch.cat(modes)
    return z.mean((0, 2, 3)), z.std((0, 2, 3))
