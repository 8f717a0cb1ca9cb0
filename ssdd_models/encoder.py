"""The encoder of VQGAN and LDM with a Gaussian posterior, as SSDD and the KL-VAE use it. Imports torch alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdd_models.layers import Downsample, Init, Level, Middle, affine_group_norm, initialise


@dataclass(frozen=True)
class EncoderConfig:
    """Size of an encoder. Raises ValueError for values that make no encoder."""

    downsample: int = 8  # pixels per latent position along one side, a power of two
    channels: int = 4  # of the latent
    width: int = 128  # channels of the first level, a multiple of 32
    groups: int = 32  # of every group norm; 4 at width 32, where 32 groups of one channel each erase the colours

    def __post_init__(self) -> None:
        if self.downsample < 2 or self.downsample & (self.downsample - 1):
            raise ValueError(f"encoder downsample {self.downsample}: must be a power of two, at least 2")
        if self.channels < 1 or self.width < 32 or self.width % 32:
            raise ValueError(f"encoder channels {self.channels}, width {self.width}: width must be a multiple of 32")

    @classmethod
    def parse(cls, name: str, width: int = 128) -> "EncoderConfig":
        """`f8c4` -> 8 pixels per latent position, 4 channels. Raises ValueError for any other form."""
        match = re.fullmatch(r"f(\d+)c(\d+)", name)
        if match is None:
            raise ValueError(f"encoder {name!r}: expected f<downsample>c<channels>, for example f8c4")
        return cls(int(match[1]), int(match[2]), width)

    @property
    def name(self) -> str:
        return f"f{self.downsample}c{self.channels}"

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Channels of each level: width times 1, 2, 4, 4, ...; one level more than there are halvings."""
        halvings = self.downsample.bit_length() - 1
        return tuple(self.width * m for m in [1, 2, *[4] * (halvings - 1)])


def noised(z: Tensor, drawn: Tensor, most: float) -> Tensor:
    """Latents [B, ...] with noise, for a decoder that is to bear it: RAE's noise_tau (arXiv 2510.11690).

    Its deviation is drawn per latent, evenly from 0 to `most` of the latent's own. drawn: standard normals
    [B, 1 + elements of a latent].
    """
    flat = z.flatten(1)
    own = flat.detach().std(1, keepdim=True)
    return (flat + most * torch.special.ndtr(drawn[:, :1]) * own * drawn[:, 1:]).view_as(z)


class Posterior:
    """A diagonal Gaussian over latents; log variances are clamped to [-30, 20].

    `mean` and `logvar` are float32 [B, c, h, w] whatever the precision of the network.
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """[B, c, h, w]"""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """[B, c, h, w], from standard normal noise of that shape."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Divergence from N(0, 1), summed over channels and positions: [B], in nats."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class ConvEncoder(nn.Module):
    """VQGAN's: a level for each width, of half the size of the one before, with attention in the last if wanted."""

    def __init__(
        self, widths: Sequence[int], outputs: int, blocks: int = 2, groups: int = 32, attention: bool = False
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level([before, *[width] * blocks], groups, attention and i == last, Downsample if i < last else None)
            for i, (before, width) in enumerate(pairwise([widths[0], *widths]))
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, outputs, H / f, W / f]; H, W multiples of f"""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(affine_group_norm(self.norm_out, self.mid(h))))


class Encoder(ConvEncoder):
    """Images to mean and log variance of their latents, for a `Posterior`."""

    def __init__(self, config: EncoderConfig, init: Init = "normal") -> None:
        moments = 2 * config.channels
        super().__init__(config.level_widths, moments, groups=config.groups)
        self.config = config
        self.out_proj = nn.Conv2d(moments, moments, 1)
        initialise(self, init)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 2 c, H / f, W / f]; H, W multiples of f"""
        return self.out_proj(super().forward(x))
