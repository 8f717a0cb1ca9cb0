"""Building blocks shared by the encoder, both decoders and the discriminator. Imports torch alone."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ssdd_models.cpu_kernels import group_norm, upsample_conv

Init = Literal["normal", "fan-in"]


def initialise(module: nn.Module, init: Init) -> None:
    """Set every convolution and linear layer below `module`; biases become 0, norms keep 1 and 0.

    "normal" is SSDD's own: convolutions N(0, 0.02), linear layers Xavier-uniform. "fan-in" draws convolutions from
    N(0, 1 / fan_in) instead: below about 128 channels N(0, 0.02) starves the signal and training stalls.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.is_meta:  # about to be loaded: spare the time
            return
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=0.02 if init == "normal" else 1 / math.sqrt(fan_in))
        elif isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of a time: [B] -> float32 [B, dim], cosines before sines, frequencies 10000^(-i / (dim / 2))."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(steps * (-math.log(10000.0) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def affine_group_norm(
    norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """`norm(x)`, or norm(x) * (1 + scale) + shift with scale and shift [B, C, 1, 1]; [B, C, H, W] -> the same."""
    weight, bias = norm.weight.view(1, -1, 1, 1), norm.bias.view(1, -1, 1, 1)
    if scale is not None and shift is not None:
        weight, bias = weight * (1.0 + scale), bias * (1.0 + scale) + shift
    return group_norm(x, norm.num_groups, weight, bias, norm.eps)


class ResBlock(nn.Module):
    """The residual block of VQGAN and LDM (GroupNorm, swish, 3x3, twice), without a time input."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H, W]"""
        h = self.conv1(F.silu(affine_group_norm(self.norm1, x)))
        h = self.conv2(F.silu(affine_group_norm(self.norm2, h)))
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return skip + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map, with a residual."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        h = affine_group_norm(self.norm, x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # [B, 1, HW, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Half the size by a strided 3x3 convolution, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2]"""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]"""
        return upsample_conv(x, self.conv)


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if wanted, and the change to the next one.

    `widths` are the channels before, between and after the blocks.
    """

    def __init__(
        self,
        widths: Sequence[int],
        groups: int = 32,
        attention: bool = False,
        change: type[Downsample] | type[Upsample] | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(width, groups) for width in widths[1:] if attention)
        self.downsample = Downsample(widths[-1]) if change is Downsample else None
        self.upsample = Upsample(widths[-1]) if change is Upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, first width, H, W] -> [B, last width, H', W'], of half or twice the size where there is a change"""
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        change = self.downsample or self.upsample
        return x if change is None else change(x)


class Middle(nn.Module):
    """What lies between encoder or decoder and the latents: attention between two residual blocks."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same"""
        return self.block_2(self.attn_1(self.block_1(x)))


class Discriminator(nn.Module):
    """SSDD's optional GAN: is x the real image behind x_t at time t? Logits [B].

    Four strided 4x4 convolutions and a fifth without stride, spectrally normalised; each GroupNorm is shifted and
    scaled by the time. Widths, and that t enters unscaled, are those of public forks: the paper does not say.
    """

    def __init__(self, width: int = 64, time: int = 128) -> None:
        super().__init__()
        self.time = time
        self.time_embedding = nn.Sequential(nn.Linear(time, time), nn.SiLU(), nn.Linear(time, time))
        widths = [6, *(width * min(2**i, 8) for i in range(5))]
        self.convs = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride=2 if i < 4 else 1, padding=1))
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.modulations = nn.ModuleList(nn.Linear(time, 2 * b) for b in widths[1:])
        self.norms = nn.ModuleList(nn.GroupNorm(min(32, b), b, affine=False) for b in widths[1:])
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x, x_t [B, 3, H, W], at least 32 pixels a side; t [B] -> [B]"""
        temb = self.time_embedding(timestep_embedding(t, self.time))
        h = torch.cat([x, x_t], dim=1).clamp(-1.0, 1.0)
        for conv, norm, modulation in zip(self.convs, self.norms, self.modulations, strict=True):
            shift, scale = modulation(temb)[:, :, None, None].chunk(2, dim=1)
            h = F.leaky_relu(norm(conv(h)) * (1 + scale) + shift, 0.2)
        return self.head(h.mean((2, 3)))[:, 0]
