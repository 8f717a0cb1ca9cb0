"""Open-MAGVIT2 (arXiv 2409.04410), IBQ (arXiv 2412.02692) and WeTok (arXiv 2508.05599), in their files' layout.

Facts from github.com/TencentARC/SEED-Voken and github.com/zhuangshaobin/WeTok. Images are in [-1, 1]. A file holds the
trained weights and their moving average, which is what its authors evaluate.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.ldm import LDMAutoencoder, LDMConfig, own_names
from baselines.families.quantisers import before_codes, codes_to_signs, signs_to_codes
from baselines.pretrained import Codes, Continuous, from_file
from baselines.published import PUBLISHED
from ssdd_models.layers import ResBlock


@dataclass(frozen=True)
class LookupConfig:
    """A lookup-free quantiser's network: a code is the signs of its bits. `groups` codes lie at each position."""

    channel_mult: tuple[int, ...]
    bits: int = 18  # of one code
    groups: int = 1
    width: int = 128
    blocks: int = 4  # of each level, and of the middle


def _ibq(size: int) -> LDMConfig:
    return LDMConfig((1, 1, 2, 2, 4), 256, 256, codebook_size=size, blocks=4)


F8, F16, F32 = (1, 2, 2, 4), (1, 1, 2, 2, 4), (1, 1, 2, 2, 4, 8)
CONFIGS: dict[str, LookupConfig | LDMConfig] = {
    "open-magvit2-f16": LookupConfig(F16),
    "open-magvit2-f8": LookupConfig(F8),
    "open-magvit2-f16-pretrain": LookupConfig(F16),
    "open-magvit2-f16-14bit-pretrain": LookupConfig(F16, bits=14),
    "ibq-f16-1024": _ibq(1024),
    "ibq-f16-8192": _ibq(8192),
    "ibq-f16-16384": _ibq(16384),
    "ibq-f16-262144": _ibq(262144),
    "wetok-f8": LookupConfig(F8, bits=8, groups=4, width=256),
    "wetok-f16": LookupConfig(F16, bits=8, groups=4, width=256),
    "wetok-f8-64bit-general": LookupConfig(F8, bits=8, groups=8, width=256),
    "wetok-f8-general": LookupConfig(F8, bits=8, groups=4, width=256),
    "wetok-f16-general": LookupConfig(F16, bits=8, groups=4, width=256),
    "wetok-f32-general": LookupConfig(F32, bits=8, groups=4, width=256),
}


def plain_block(channels_in: int, channels: int) -> ResBlock:
    """A residual block whose convolutions have no bias."""
    block = ResBlock(channels_in, channels)
    for layer in block.modules():
        if isinstance(layer, nn.Conv2d):
            layer.bias = None
    return block


class DepthToSpace(nn.Module):
    """Twice the size: a convolution whose outputs are the four pixels of each place, one after the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x).unflatten(1, (2, 2, -1))  # [B, row, column, C, H, W]
        return h.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


class Level(nn.Module):
    """Residual blocks of one resolution, then the change to the next, if there is one."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        blocks: int,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.Sequential(plain_block(channels_in, channels))
        self.block.extend(plain_block(channels, channels) for _ in range(blocks - 1))
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        resize = self.downsample or self.upsample
        return h if resize is None else resize(h)


class Encoder(nn.Module):
    """[B, 3, H, W] in [-1, 1] -> [B, groups * bits, H / f, W / f], whose signs are the code."""

    def __init__(self, config: LookupConfig) -> None:
        super().__init__()
        widths = [config.width * mult for mult in (1, *config.channel_mult)]
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1, bias=False)
        halve = [nn.Conv2d(width, width, 3, stride=2, padding=1) for width in widths[1:-1]]
        self.down = nn.ModuleList(
            Level(before, width, config.blocks, downsample=resize)
            for (before, width), resize in zip(pairwise(widths), [*halve, None], strict=True)
        )
        last = widths[-1]
        self.mid_block = nn.Sequential(*(plain_block(last, last) for _ in range(config.blocks)))
        self.norm_out = nn.GroupNorm(32, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, config.groups * config.bits, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(h))))


class AdaptiveNorm(nn.Module):
    """A group norm scaled by the code's deviation over the image, and shifted by its mean."""

    def __init__(self, code_channels: int, channels: int) -> None:
        super().__init__()
        self.gn = nn.GroupNorm(32, channels, eps=1e-6, affine=False)
        self.gamma, self.beta = nn.Linear(code_channels, channels), nn.Linear(code_channels, channels)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        variance, mean = torch.var_mean(code.flatten(2), dim=2)  # with Bessel's correction
        scale, shift = self.gamma((variance + self.gn.eps).sqrt()), self.beta(mean)
        return scale[:, :, None, None] * self.gn(x) + shift[:, :, None, None]


class Decoder(nn.Module):
    """Signs [B, groups * bits, h, w] -> [B, 3, h f, w f]. Level 0 is the finest, so lists are run backwards."""

    def __init__(self, config: LookupConfig) -> None:
        super().__init__()
        channels = config.groups * config.bits
        widths = [config.width * mult for mult in config.channel_mult]
        last = widths[-1]
        levels = list(zip([*widths[1:], last], widths, strict=True))  # channels in and out
        self.conv_in = nn.Conv2d(channels, last, 3, padding=1)
        self.mid_block = nn.Sequential(*(plain_block(last, last) for _ in range(config.blocks)))
        double = [None, *(DepthToSpace(width) for width in widths[1:])]
        self.up = nn.ModuleList(
            Level(before, width, config.blocks, upsample=resize)
            for (before, width), resize in zip(levels, double, strict=True)
        )
        self.adaptive = nn.ModuleList(AdaptiveNorm(channels, before) for before, _ in levels)
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(code))
        for norm, level in zip(reversed(self.adaptive), reversed(self.up), strict=True):
            h = level(norm(h, code))
        return self.conv_out(F.silu(self.norm_out(h)))


class LookupFree(nn.Module):
    """Codes int64 [B, groups, h, w]; bit i of a code is the sign of channel i of its group."""

    def __init__(self, config: LookupConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, 3, H, W] in [-1, 1] -> (codes,)"""
        return (signs_to_codes(self.encoder(x).unflatten(1, (self.config.groups, self.config.bits)), 2),)

    def decode(self, codes: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """codes -> ([B, 3, H, W],)"""
        signs = codes_to_signs(codes, self.config.bits, 2).flatten(1, 2)
        return (self.decoder(signs.to(self.decoder.conv_in.weight.dtype)),)


class IndexBackpropagation(LDMAutoencoder):
    """IBQ: VQGAN's network; the code of a position is the one with the largest product."""

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, 3, H, W] in [-1, 1] -> (codes int64 [B, h, w],)"""
        h = before_codes(self.quant_conv(self.encoder(x)))
        codebook = self.quantize.embedding.weight
        return (torch.stack([(image.permute(1, 2, 0) @ codebook.T).argmax(-1) for image in h]),)

    def decode(self, z: Tensor, return_dict: bool = False, force_not_quantize: bool = True) -> tuple[Tensor]:
        """codes -> ([B, 3, H, W],)"""
        return super().decode(self.quantize.embedding(z).permute(0, 3, 1, 2))


def published(name: str, file: Path | None, random_weights: bool, weights: str | None) -> Continuous:
    """A row of CONFIGS from `file`, or from the hub, or with random weights.

    Raises CellError if the file is missing, damaged, pickled or does not fit.
    """
    config, names = CONFIGS[name], partial(own_names, levels=0)
    build = partial(LookupFree, config) if isinstance(config, LookupConfig) else partial(IndexBackpropagation, config)
    return from_file(PUBLISHED[name], file, random_weights, weights, build, names, Codes)
