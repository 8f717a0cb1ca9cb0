"""Training of the KL-VAE as latent diffusion trains it (arXiv 2112.10752): one visible loop.

All losses are means: over the pixel values for the reconstruction, over the batch for everything. The KL divergence is
summed over an image's latent, as SSDD has it, so that kl_weight means the same in both; LDM sums over pixels too, which
makes its 1e-6 weaker by 3 * H * W.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from baselines.kl_vae import KLVAE, SMALL, ConvDecoderConfig, KLVAEConfig, KLVAETokenizer, PatchGAN, load
from ssdd_models.encoder import EncoderConfig
from ssdd_models.layers import AttentionBlock, ResBlock
from tokbench.checkpoints import load_strictly, read_model, write_model
from tokbench.config import describe, from_dict, override, to_dict
from tokbench.data.pixels import to_float
from tokbench.data.training_crops import CropConfig, PhotoCrops, batches
from tokbench.errors import InputError
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
    EmaConfig,
    OptimConfig,
    Perceptual,
    RunConfig,
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

DEFAULT = "ldm-f8c4"  # preset
POSTERIOR = 0  # stream of random numbers


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
    learn_logvar: bool = True  # the reconstruction's variance is a parameter, as in LDM
    freeze_encoder: bool = False  # decoder-only training, as of sd-vae-ft
    normalise_latents: bool = False  # the finished model's latents get mean 0 and deviation 1
    loss_limit: float = 1e4  # a loss above this stops the run


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


def train_klvae(config: KLVAETraining, data: str, out: Path, start: Path | None, encoder_from: Path | None) -> Path:
    """Train until config.run.steps, or go on from where `out` stopped; returns out/model.safetensors.

    Writes into `out`: last.ckpt, model.safetensors, best.safetensors, log.jsonl, curves.png, samples/. `start` gives
    all weights, `encoder_from` (a KL-VAE or an SSDD) those of the encoder. Raises InputError for data or files that
    cannot be used, CellError for a loss that is no number, KeyboardInterrupt after saving when asked to stop.
    """
    # Set up: processes, model, data, what judges it.
    run, machine = config.run, Machine(config.run)
    torch.manual_seed(run.seed)
    model, origin = build(config, start, encoder_from)
    check_sides(config.model.encoder.downsample, config.crops, run)
    source, train, real_held = open_photographs(data, run)
    crops = PhotoCrops(source, train, config.crops, run.seed)
    model.to(machine.device).to(memory_format=torch.channels_last)
    if run.checkpoint_activations:
        recompute(model, (ResBlock, AttentionBlock))
    if run.compile:
        model.encoder.compile()
        model.decoder.compile()
    perceptual = perceptual_loss(config.perceptual if config.perceptual_weight else "none", machine.device)
    logvar = nn.ParameterDict({"logvar": nn.Parameter(torch.zeros((), device=machine.device))})
    logvar.requires_grad_(config.learn_logvar)
    named = [*model.named_parameters(), *logvar.named_parameters()]
    parameters = [parameter for _, parameter in named if parameter.requires_grad]
    optimizer, ema = make_optimizer(named, config.optim), Ema(model, config.ema)
    with building("gan.*"):
        critic = PatchGAN(config.gan.width, config.gan.layers).to(machine.device)
    critic_parameters = list(critic.parameters())
    critic_optim = replace(config.optim, name="adamw", learning_rate=config.gan.learning_rate)
    critic_optimizer = make_optimizer(critic.named_parameters(), critic_optim)
    everything = {"model": model, "logvar": logvar, "ema": ema, "optimizer": optimizer}
    parts = Parts(everything | {"critic": critic, "critic_optimizer": critic_optimizer})

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
        finished = KLVAE(model.config)
        finished.load_state_dict(model.state_dict())
        if config.normalise_latents:
            finished.normalise_latents(*latent_statistics(finished, crops))
        about = {
            "losses": [config.perceptual] if config.perceptual_weight else [],
            "trained_on": f"{source.name}, {len(train)} images",
        }
        record = training_record(config, "frozen" if config.freeze_encoder else "joint", origin, log)
        metadata = {"model": "klvae", "config": to_dict(model.config), "info": about, "training": record}
        write_model(path, finished.state_dict(), metadata, torch.float32)

    # Loop. A step's batch is cut evenly over processes, then into `accumulate` parts.
    stream = batches(
        crops, first_step=first, num_steps=run.steps, batch_size=run.batch_size,
        rank=machine.rank, world=machine.world, num_workers=run.workers,
    )  # fmt: skip
    with interrupts() as stop, bar("train klvae", run.steps, "steps", first, machine.main) as advance:
        for step, (numbers, images, ids) in enumerate(stream, first + 1):
            adversarial = bool(config.gan.weight) and step > config.gan.start_step
            sums: dict[str, Tensor] = {}
            for part in range(run.accumulate):
                chosen = slice(part * len(ids) // run.accumulate, (part + 1) * len(ids) // run.accumulate)
                real = to_float(images[chosen].to(machine.device, non_blocking=True))  # [B, 3, H, W]
                real = real.contiguous(memory_format=torch.channels_last)
                with machine.autocast():
                    with torch.set_grad_enabled(not config.freeze_encoder):
                        posterior = model.encode(real)
                    noise = normal(
                        sample_seeds(run.seed, numbers[chosen], POSTERIOR),
                        posterior.mean.shape[1:],
                        device=machine.device,
                    )
                    fake = model.decode(posterior.sample(noise)).float()
                    losses = {"l1": (fake - real).abs().mean(), "kl": posterior.kl().mean()}
                    loss = config.l1_weight * losses["l1"]
                    if config.perceptual_weight and step > config.perceptual_start:
                        losses["perceptual"] = perceptual(real, fake).mean()
                        loss = loss + config.perceptual_weight * losses["perceptual"]
                if config.learn_logvar:
                    loss = loss / logvar["logvar"].exp() + logvar["logvar"]
                if not config.freeze_encoder:
                    loss = loss + config.kl_weight * losses["kl"]
                if adversarial:
                    critic.requires_grad_(False)
                    losses["generator"] = -critic(fake).mean()
                    losses["gan_weight"] = config.gan.weight * adaptive_weight(
                        loss, losses["generator"], model, machine
                    )
                    loss = loss + losses["gan_weight"] * losses["generator"]
                    critic.requires_grad_(True)
                (loss / run.accumulate).backward()
                if adversarial:
                    losses["critic"] = hinge(critic(real), critic(fake.detach()))
                    (losses["critic"] / run.accumulate).backward()
                for name, value in (losses | {"loss": loss}).items():
                    sums[name] = sums.get(name, 0) + value.detach() / run.accumulate
            rate = learning_rate(step - 1, run.steps, config.optim)
            norm = optimizer_step(optimizer, parameters, rate, config.optim.clip, machine)
            if adversarial:
                optimizer_step(
                    critic_optimizer, critic_parameters, config.gan.learning_rate, config.optim.clip, machine
                )
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
                save_image(image_grid([real[:8], fake[:8]]), out / "samples" / f"{step:07d}.png")
            if machine.main and len(real_held) and due(step, run.eval_every, run.steps):
                with averaged(optimizer), ema.applied():
                    log.write(
                        step=step, **score(KLVAETokenizer(model, {}), real_held, run.eval_metrics, machine.device)
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
    """`tokbench train klvae`."""
    if options.stage or options.decoder:
        raise InputError("klvae has no --stage and no --decoder; see --preset, freeze_encoder and model.decoder.*")
    config = PRESETS[choose(list(PRESETS), options.preset, "preset", DEFAULT)]
    if options.encoder_from:
        config = replace(config, model=replace(config.model, encoder=read_encoder(options.encoder_from)[0]))
    if options.start:
        config = replace(config, model=load(options.start)[0].config)
    if options.encoder:
        config = replace(config, model=replace(config.model, encoder=parse_encoder(options.encoder)))
    config = override(config, options.settings)
    return train_klvae(config, options.data, options.out, options.start, options.encoder_from)


def settings(stage: str | None, preset: str | None) -> list[str]:
    """The key=value lines of a preset."""
    return describe(PRESETS[choose(list(PRESETS), preset, "preset", DEFAULT)])


def parse_encoder(name: str) -> EncoderConfig:
    try:
        return EncoderConfig.parse(name)
    except ValueError as error:
        raise InputError(str(error)) from None


def build(config: KLVAETraining, start: Path | None, encoder_from: Path | None) -> tuple[KLVAE, dict[str, str]]:
    """The model to train and which files it was started from. Raises InputError for sizes or files that do not fit."""
    factor, levels = config.model.encoder.downsample, len(config.model.decoder.channel_mult)
    if factor != 2 ** (levels - 1):
        raise InputError(
            f"model.decoder.channel_mult has {levels} numbers, the encoder {config.model.encoder.name} needs "
            f"{factor.bit_length()}: one more than it has halvings"
        )
    origin = {}
    with building("model.*"):
        model = KLVAE(config.model)
    if start is not None:
        load_strictly(model, load(start)[0].state_dict(), start)
        origin["model"] = f"{start.name} {file_sha256(start)[:16]}"
    if encoder_from is not None:
        load_strictly(model.encoder, read_encoder(encoder_from)[1], encoder_from)
        origin["encoder"] = f"{encoder_from.name} {file_sha256(encoder_from)[:16]}"
    model.encoder.requires_grad_(not config.freeze_encoder)
    return model, origin


def read_encoder(path: Path) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """The encoder in a file of ours, KL-VAE or SSDD: its sizes and tensors. Raises InputError for another file."""
    tensors, metadata = read_model(path, "klvae", "ssdd")
    own = {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
    return from_dict(EncoderConfig, metadata["config"]["encoder"]), own


def adaptive_weight(loss: Tensor, generator: Tensor, model: KLVAE, machine: Machine) -> Tensor:
    """VQGAN's (arXiv 2012.09841, eq. 7): the ratio of both gradients' norms at the decoder's last layer."""
    last = model.decoder.conv_out.weight
    norms = [machine.mean(torch.autograd.grad(term, last, retain_graph=True)[0]).norm() for term in (loss, generator)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


@torch.no_grad()
def latent_statistics(model: KLVAE, crops: PhotoCrops, num_crops: int = 256) -> tuple[Tensor, Tensor]:
    """Mean and deviation [c] of the posterior modes of the first training crops."""
    modes = []
    for number in range(0, num_crops, 16):
        images = torch.stack([crops[i, crops.config.size][0] for i in range(number, number + 16)])
        modes.append(model.encode(to_float(images)).mode())
    z = torch.cat(modes)
    return z.mean((0, 2, 3)), z.std((0, 2, 3))
