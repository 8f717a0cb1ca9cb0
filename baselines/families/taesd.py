"""Tiny autoencoders of Ollin Boer Bohan (github.com/madebyollin/taesd) that diffusers' AutoencoderTiny cannot hold.

TAEF2 has FLUX.2's latents, TAESANA those of Sana's DC-AE. A model is two files of tensors numbered as in
nn.Sequential; images are in [0, 1] at both ends, and latents are the large autoencoder's, already normalised.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.hub import checkpoint, fetch_url, load_weights
from baselines.pretrained import Continuous, wrap
from baselines.published import PUBLISHED

WIDTH = 64  # of every level, but for the coarse ones of TAESANA's decoder


@dataclass(frozen=True)
class TAESDConfig:
    stem: tuple[int, ...]  # channels of the encoder's strided convolutions before its first block
    decoder: tuple[int, ...]  # channels of the decoder's levels, coarsest first; each doubles the resolution
    channels: int = 32
    pool: bool = False  # a global branch in the blocks of the coarsest level
    patch: int = 1  # latent positions along the side of one that travels


CONFIGS = {
    "taef2": TAESDConfig((), (WIDTH,) * 3, pool=True, patch=2),  # as FLUX.2 travels: 2 x 2 patches
    "taesana": TAESDConfig((32, WIDTH), (256, 128, WIDTH, WIDTH, WIDTH)),
}

UPSTREAM = "https://github.com/madebyollin/taesd/raw/5cccb12dc72074a4be35680c3b108548a7c69978"
FILES = {  # sha256, where it is known
    "taef2_encoder.pth": "10a4e1021e89d7551eaf161352da8dbd0b1aa83872ae28b150c1df1ce2f147b6",
    "taef2_decoder.pth": "0a44a31e1ae59eb9dbf9359d24942fd3ef5928162c1800d97a28c61d51be0ab5",
}


def conv(channels_in: int, channels: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=bias)


class Bound(nn.Module):
    """Keeps latents in (-3, 3), nearly unchanged near zero."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z / 3) * 3


class Block(nn.Module):
    """Three convolutions with a skip; `pool` first adds what the whole map's normalisation says."""

    def __init__(self, width: int, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))
        if pool:
            wide = 4 * width
            up, down = nn.Conv2d(width, wide, 1, bias=False), nn.Conv2d(wide, width, 1, bias=False)
            self.pool = nn.Sequential(up, nn.GroupNorm(4, wide), nn.ReLU(), down)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return F.relu(x + self.conv(x))


def encoder(config: TAESDConfig) -> nn.Sequential:
    """[B, 3, H, W] in [0, 1] -> [B, c, H / f, W / f]; f is 8 times 2 for each convolution of the stem."""
    layers: list[nn.Module] = []
    for before, width in zip((3, *config.stem), config.stem, strict=False):
        layers += [conv(before, width, stride=2), nn.ReLU()]
    layers += [Block(WIDTH)] if config.stem else [conv(3, WIDTH), Block(WIDTH)]
    for level in range(3):
        blocks = [Block(WIDTH, pool=config.pool and level == 2) for _ in range(3)]
        layers += [conv(WIDTH, WIDTH, stride=2, bias=False), *blocks]
    return nn.Sequential(*layers, conv(WIDTH, config.channels))


def decoder(config: TAESDConfig) -> nn.Sequential:
    """[B, c, h, w] -> [B, 3, h f, w f] in [0, 1]"""
    layers: list[nn.Module] = [Bound(), conv(config.channels, config.decoder[0]), nn.ReLU()]
    for i, (width, after) in enumerate(zip(config.decoder, (*config.decoder[1:], WIDTH), strict=True)):
        layers += [Block(width, pool=config.pool and i == 0) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), conv(width, after, bias=False)]
    return nn.Sequential(*layers, Block(WIDTH), conv(WIDTH, 3))


class TAESD(nn.Module):
    """The two networks with the methods that the adapter calls, in tokbench's range and in patches."""

    def __init__(self, config: TAESDConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = encoder(config), decoder(config)

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, 3, H, W] in [-1, 1] -> ([B, c p^2, H / (f p), W / (f p)],), p the patch"""
        return (F.pixel_unshuffle(self.encoder((x + 1) / 2), self.config.patch),)

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The other way."""
        return (self.decoder(F.pixel_shuffle(z, self.config.patch)) * 2 - 1,)


def published(name: str, file: Path | None, random_weights: bool, weights: str | None) -> Continuous:
    """A row of CONFIGS from the folder `file` with NAME_encoder.pth and NAME_decoder.pth, else from upstream or random.

    Raises CellError if a file cannot be had, is damaged, pickled or does not fit.
    """
    row, model = PUBLISHED[name], TAESD(CONFIGS[name])
    for side in () if random_weights else ("encoder", "decoder"):
        part = f"{name}_{side}.pth"
        if file is None and part in FILES:
            path = fetch_url(f"{UPSTREAM}/{part}", FILES[part], name)
        else:
            path = checkpoint(row, file) / part
        row = load_weights(getattr(model, side), path, row, weights)
    return wrap(model.eval(), row, random_weights)
