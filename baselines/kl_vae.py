"""KL-VAE: SSDD's encoder with the convolutional decoder of latent diffusion (Rombach et al., arXiv 2112.10752)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdd_models.encoder import Encoder, EncoderConfig, Posterior
from ssdd_models.layers import Init, Level, Middle, Upsample, initialise
from tokbench.checkpoints import load_strictly, read_checkpoint, read_header
from tokbench.config import from_dict, to_dict
from tokbench.data.pixels import to_float
from tokbench.errors import InputError
from tokbench.records.result import TokenizerInfo
from tokbench.registry import choose
from tokbench.runtime.seeding import normal


@dataclass(frozen=True)
class ConvDecoderConfig:
    """LDM's decoder; the defaults are those of f8. One entry of channel_mult per level, finest first."""

    width: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 3  # residual blocks a level
    groups: int = 32  # of every group norm; 4 at width 32, as in the encoder


@dataclass(frozen=True)
class KLVAEConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: ConvDecoderConfig = field(default_factory=ConvDecoderConfig)
    projections: bool = True  # the 1x1 convolutions around the latents


# About 7 million parameters in all; the demo weights.
SMALL = KLVAEConfig(EncoderConfig(width=32, groups=4), ConvDecoderConfig(32, (1, 2, 4, 6), groups=4))
# Published autoencoders of the same networks, for their speed: tensor for tensor those of diffusers' AutoencoderKL.
ARCHITECTURES = {
    "sd": KLVAEConfig(),
    "sdxl": KLVAEConfig(),  # differs in its weights alone
    "flux": KLVAEConfig(EncoderConfig(channels=16), projections=False),
}
BUNDLED = Path(__file__).parent / "weights"
RANDOM = {"note": "random weights"}


class ConvDecoder(nn.Module):
    """Latents [B, c, h, w] -> images [B, 3, h * 2^(levels - 1), w * 2^(levels - 1)], nominal [-1, 1].

    `projection` is what comes first: the 1x1 convolution of a KL-VAE. `attention`: in the coarsest level too.
    """

    def __init__(
        self, channels: int, config: ConvDecoderConfig, projection: nn.Module | None = None, attention: bool = False
    ) -> None:
        super().__init__()
        widths, groups = [config.width * mult for mult in config.channel_mult], config.groups
        last = len(widths) - 1
        self.in_proj = projection or nn.Identity()
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        # Level 0 is the finest, so the list is run backwards.
        self.up = nn.ModuleList(
            Level([before, *[width] * config.blocks], groups, attention and i == last, Upsample if i > 0 else None)
            for i, (width, before) in enumerate(pairwise([*widths, widths[-1]]))
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(self.in_proj(z)))  # [B, widths[-1], h, w]
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # [B, 3, H, W]


class KLVAE(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> posterior over [B, c, H / f, W / f] -> images."""

    def __init__(self, config: KLVAEConfig, init: Init = "fan-in") -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, init)
        channels = config.encoder.channels
        self.decoder = ConvDecoder(channels, config.decoder, nn.Conv2d(channels, channels, 1))
        if not config.projections:
            self.encoder.out_proj, self.decoder.in_proj = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        initialise(self.decoder, init)

    def encode(self, x: Tensor) -> Posterior:
        return Posterior(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    @torch.no_grad()
    def normalise_latents(self, mean: Tensor, std: Tensor) -> None:
        """Shift and scale each latent channel, mean and std [c], inside the two 1x1 convolutions around the latents.

        The reconstruction stays the same, and latents come out with mean 0 and deviation 1 over the training crops:
        what a diffusion decoder and a latent generator want.
        """
        out: Any = self.encoder.out_proj
        into: Any = self.decoder.in_proj
        out.weight[: len(mean)].div_(std[:, None, None, None])
        out.bias.copy_(torch.cat(((out.bias[: len(mean)] - mean) / std, out.bias[len(mean) :] - 2 * std.log())))
        into.bias.add_(into.weight[:, :, 0, 0] @ mean)
        into.weight.mul_(std[None, :, None, None])


class PatchGAN(nn.Module):
    """The discriminator of pix2pix (Isola et al., arXiv 1611.07004): a map of logits [B, 1, h, w].

    Normalised by group, not by batch, so that one process and several see the same network.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            before, after = width * min(2 ** (i - 1), 8), width * min(2**i, 8)
            parts += [
                nn.Conv2d(before, after, 4, stride=2 if i < layers else 1, padding=1, bias=False),
                nn.GroupNorm(8, after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(width * min(2**layers, 8), 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def load(path: Path) -> tuple[KLVAE, dict[str, Any]]:
    """A KL-VAE of ours and its metadata. Raises InputError for another file."""
    tensors, metadata = read_checkpoint(path, "klvae")
    model = KLVAE(from_dict(KLVAEConfig, metadata["config"]))
    load_strictly(model, tensors, path)
    return model.eval(), metadata


class KLVAETokenizer:
    """tokbench's interface around a KLVAE, whose latents are normalised by the model itself."""

    def __init__(self, model: KLVAE, info: Mapping[str, Any]) -> None:
        self.networks: Mapping[str, nn.Module] = {"encoder": model.encoder, "decoder": model.decoder}
        encoder = model.config.encoder
        facts = dict(info)
        self.info = TokenizerInfo(
            name="klvae",
            family="kl-vae",
            downsample=encoder.downsample,
            channels=encoder.channels,
            size_multiple=encoder.downsample,
            losses=tuple(facts.pop("losses", ())),
            paper="arXiv 2112.10752",
            **facts,
        )

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        posterior = Posterior(self.networks["encoder"](to_float(images)))
        mean = posterior.mode()
        return posterior.sample(normal(seeds, mean.shape[1:], device=mean.device)) if sample else mean

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        return self.networks["decoder"](latents).float()


def load_tokenizer(file: Path | None = None, arch: str = "", *, random_weights: bool = False) -> KLVAETokenizer:
    """The bundled demo weights or those of a file; `random_weights` keeps their size alone, or takes that of `arch`."""
    if arch:
        config = choose(ARCHITECTURES, arch, "arch", arch)
        if file is not None or not random_weights:
            raise InputError(f"klvae@arch={arch}: an architecture without weights: tokbench speed --random-weights")
        return KLVAETokenizer(KLVAE(config), RANDOM)
    path = file or BUNDLED / "klvae.safetensors"
    if not random_weights:
        model, metadata = load(path)
        return KLVAETokenizer(model, metadata["info"])
    metadata = read_header(path)[1] if path.exists() else {"config": to_dict(SMALL)}
    return KLVAETokenizer(KLVAE(from_dict(KLVAEConfig, metadata["config"])), RANDOM)
