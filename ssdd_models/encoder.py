"""The encoder of VQGAN and LDM with a Gaussian posterior, as SSDD and the KL-VAE use it. Imports torch alone."""

import re
from dataclasses import dataclass

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

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """[B, c, h, w]; from given standard normal noise of that shape, or drawn on the latents' device."""
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Divergence from N(0, 1), summed over channels and positions: [B], in nats."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class Encoder(nn.Module):
    """Images to latents. `config` is an EncoderConfig or a name such as `f8c4` (width 128)."""

    def __init__(self, config: EncoderConfig | str = "f8c4", init: Init = "normal") -> None:
        super().__init__()
        self.config = EncoderConfig.parse(config) if isinstance(config, str) else config
        widths, groups = self.config.level_widths, self.config.groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level((widths[max(i - 1, 0)], width, width), groups, change=Downsample if i < len(widths) - 1 else None)
            for i, width in enumerate(widths)
        )
        last, moments = widths[-1], 2 * self.config.channels
        self.mid = Middle(last, groups)
        self.norm_out = nn.GroupNorm(groups, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, moments, 3, padding=1)
        self.out_proj = nn.Conv2d(moments, moments, 1)
        initialise(self, init)

    def moments(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> mean and log variance [B, 2 c, H / f, W / f], unclamped; H, W multiples of f."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.out_proj(self.conv_out(F.silu(affine_group_norm(self.norm_out, h))))

    def forward(self, x: Tensor) -> Posterior:
        """[B, 3, H, W] in [-1, 1] -> the posterior over [B, c, H / f, W / f]"""
        return Posterior(self.moments(x))
