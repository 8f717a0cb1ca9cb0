"""The decoder of SSDD: a U-Net with a windowed transformer in the middle, conditioned on the latents everywhere.

What depends on the latents alone (`UViT.condition`) is computed once per image and reused by every sampling step.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdd_models.attention import SIDE, Layout, make_layout, windowed_attention
from ssdd_models.cpu_kernels import group_norm, upsample_conv
from ssdd_models.layers import Init, affine_group_norm, initialise, timestep_embedding

Tap = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class DecoderConfig:
    """Size of a decoder: channels of its four levels (multiples of 32), blocks and heads of the transformer."""

    widths: tuple[int, int, int, int]
    layers: int
    heads: int
    groups: int = 32  # of every group norm; fewer for narrow decoders, see EncoderConfig

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # a list when read from JSON
        if len(self.widths) != 4 or any(w < 32 or w % 32 for w in self.widths):
            raise ValueError(f"decoder widths {self.widths}: four multiples of 32")
        if self.layers < 1 or self.heads < 1 or self.widths[-1] % self.heads:
            raise ValueError(f"decoder layers {self.layers}, heads {self.heads}: heads must divide {self.widths[-1]}")

    @classmethod
    def scaled(
        cls, channels: int, multipliers: tuple[int, ...], layers: int, heads: int | None = None
    ) -> "DecoderConfig":
        """The paper's rule: widths rounded up to multiples of 32, heads of 64 channels, between 4 and 16 of them."""
        a, b, c, d = (-(-channels * m // 32) * 32 for m in multipliers)
        return cls((a, b, c, d), layers, heads or min(16, max(4, d // 64)))


SIZES = {
    "XS": DecoderConfig.scaled(32, (1, 2, 3, 3), 8, 4),  # 5.00 M parameters with f8c4
    "S": DecoderConfig.scaled(48, (1, 2, 3, 3), 8, 4),  # 14.06 M
    "B": DecoderConfig.scaled(64, (1, 2, 3, 3), 10),  # 21.14 M
    "M": DecoderConfig.scaled(96, (1, 2, 3, 3), 12),  # 50.28 M
    "L": DecoderConfig.scaled(96, (1, 2, 4, 4), 16),  # 90.76 M
    "XL": DecoderConfig.scaled(128, (1, 2, 4, 4), 16),  # 161.27 M
    "H": DecoderConfig.scaled(192, (1, 2, 4, 4), 16),  # 362.69 M
    "XH": DecoderConfig.scaled(256, (1, 2, 4, 4), 16),
    "G": DecoderConfig.scaled(384, (1, 2, 4, 4), 16),
}


def modulate(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """h (1 + scale) + shift; without gradients written over h, a fresh tensor: memory traffic is time."""
    if torch.is_grad_enabled():
        return torch.addcmul(shift, h, 1.0 + scale)
    return h.mul_(1.0 + scale).add_(shift)


def silu(h: Tensor) -> Tensor:
    """Swish of a fresh tensor, in place without gradients."""
    return F.silu(h, inplace=not torch.is_grad_enabled())


class AdaGroupNorm(nn.Module):
    """GroupNorm whose scale and shift are read from the context map (AdaGN)."""

    def __init__(self, context: int, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.groups = groups
        self.ctx_proj = nn.Conv2d(context, 2 * channels, 1)

    def modulation(self, ctx: Tensor) -> Tensor:
        """[B, context, h, w] -> scale and shift [B, 2 C, h, w]"""
        return self.ctx_proj(ctx)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W], with the nearest position's scale and shift"""
        height, width = x.shape[2:]
        if height % modulation.shape[2] or width % modulation.shape[3]:
            modulation = F.interpolate(modulation, size=(height, width), mode="nearest")
        scale, shift = modulation.chunk(2, dim=1)
        return group_norm(x, self.groups, 1.0 + scale, shift, eps=1e-5)


class AdaLayerNorm(nn.Module):
    """LayerNorm whose shift and scale are read from the context map (AdaLN)."""

    def __init__(self, context: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(context, 2 * dim)

    def modulation(self, ctx: Tensor) -> Tensor:
        """[B, N, context], after its SiLU -> shift and scale [B, N, 2 dim]"""
        return self.linear(ctx)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, dim]"""
        shift, scale = modulation.chunk(2, dim=-1)
        return modulate(F.layer_norm(x, x.shape[-1:], eps=1e-5), scale, shift)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the first norm reads the latents, the second one is shifted by the time."""

    def __init__(self, in_channels: int, out_channels: int, context: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1 = AdaGroupNorm(context, in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, modulation: Tensor, temb: Tensor) -> Tensor:
        """x [B, in, H, W], modulation [B, 2 in, h, w], temb [B, time] after its SiLU -> [B, out, H, W]"""
        scale, shift = self.time_emb_proj(temb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(silu(self.norm1(x, modulation)))
        h = self.conv2(silu(affine_group_norm(self.norm2, h, scale, shift)))
        skip = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        return h + skip if torch.is_grad_enabled() else h.add_(skip)


class Attention(nn.Module):
    """Projections around `windowed_attention`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: Tensor, layout: Layout) -> Tensor:
        """[B, N, dim] -> [B, N, dim]"""
        return self.out_proj(windowed_attention(self.to_q(x), self.to_k(x), self.to_v(x), table, layout))


class GEGLU(nn.Module):
    """A linear layer whose first half is gated by the GELU of the second."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, inner]"""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Windowed attention and a gated feed-forward layer, pre-norm. No time input: it comes with the features."""

    def __init__(self, dim: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(context, dim)
        self.attn1 = Attention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.ff = nn.ModuleDict({"proj_in_act": GEGLU(dim, 4 * dim), "proj_out": nn.Linear(4 * dim, dim)})
        self.relative_position_bias = nn.Module()
        self.relative_position_bias.relative_bias_table = nn.Parameter(torch.zeros(SIDE, SIDE, heads))

    def forward(self, x: Tensor, modulation: Tensor, layout: Layout) -> Tensor:
        """x [B, N, dim], modulation [B, N, 2 dim] -> [B, N, dim]"""
        table = self.relative_position_bias.relative_bias_table
        x = x + self.attn1(self.norm1(x, modulation), table, layout)
        return x + self.ff["proj_out"](self.ff["proj_in_act"](self.norm2(x)))


class Level(nn.Module):
    """Residual blocks of one resolution and, unless it is the last, the change to the next."""

    def __init__(self, blocks: list[ResidualBlock], change: str, conv: nn.Conv2d | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        if conv is not None:
            self.add_module(change, nn.ModuleList([nn.ModuleDict({"conv": conv})]))


class Middle(nn.Module):
    """The transformer over all positions of the coarsest level, with a residual around it. No position embedding."""

    def __init__(self, dim: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, heads, context) for _ in range(layers)])
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, modulations: Iterator[Tensor], layout: Layout, tap: Tap | None) -> Tensor:
        """[B, C, H / 8, W / 8] -> the same"""
        h = self.proj_in(affine_group_norm(self.norm, x).flatten(2).transpose(1, 2))  # [B, N, C]
        for i, block in enumerate(self.transformer_blocks):
            h = block(h, next(modulations), layout)
            if tap is not None:
                tap(i, h)
        return x + self.proj_out(h).transpose(1, 2).reshape(x.shape)


@dataclass(frozen=True)
class Condition:
    """What a decoder computes from the latents alone; the same for every step and time."""

    z: Tensor  # [B, c, H, W], the latents at the size of the image
    modulations: tuple[Tensor, ...]  # scale and shift of each adaptive norm, in the order they are used
    layout: Layout


class UViT(nn.Module):
    """Velocity network of SSDD; `z_channels` are those of the latent.

    Height and width must be multiples of 8 and of the latents' downsampling; any aspect. The grid of the transformer
    has a token for each 8 x 8 pixels, whatever the encoder.
    """

    def __init__(self, config: DecoderConfig, z_channels: int = 4, init: Init = "normal") -> None:
        super().__init__()
        self.config = config
        widths, first = self.config.widths, self.config.widths[0]
        time, groups = 4 * first, self.config.groups
        self.conv_in = nn.Conv2d(3 + z_channels, first, 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(first, time), "linear_2": nn.Linear(time, time)})
        self.ada_ctx_proj = nn.Sequential(
            nn.Conv2d(z_channels, first, 3, padding=1), nn.SiLU(), nn.Conv2d(first, first, 3, padding=1)
        )
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, width = [first], first
        for i, out in enumerate(widths):
            blocks = [ResidualBlock(width, out, first, time, groups), ResidualBlock(out, out, first, time, groups)]
            last = i == len(widths) - 1
            conv = None if last else nn.Conv2d(out, out, 3, stride=2, padding=1)
            self.down_blocks.append(Level(blocks, "downsamplers", conv))
            skips += [out, out] if last else [out, out, out]
            width = out
        self.mid_block = Middle(width, self.config.layers, self.config.heads, first)
        for i, out in enumerate(reversed(widths)):
            blocks = []
            for _ in range(3):
                blocks.append(ResidualBlock(width + skips.pop(), out, first, time, groups))
                width = out
            conv = None if i == len(widths) - 1 else nn.Conv2d(out, out, 3, padding=1)
            self.up_blocks.append(Level(blocks, "upsamplers", conv))
        self.conv_norm_out = nn.GroupNorm(groups, first, eps=1e-5)
        self.conv_out = nn.Conv2d(first, 3, 3, padding=1)
        initialise(self, init)
        for module in self.modules():
            if isinstance(module, ResidualBlock):  # blocks start as the identity, so that depth does not hurt at first
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, TransformerBlock):
                module.ff["proj_out"].get_parameter("weight").data.zero_()

    def condition(self, z: Tensor, size: tuple[int, int]) -> Condition:
        """Latents [B, c, h, w] and the image's (height, width) -> what the network needs of them."""
        height, width = size
        if height % 8 or width % 8 or min(height, width) < 8:
            raise ValueError(f"image size {height} x {width}: both sides must be multiples of 8")
        grid = (height // 8, width // 8)
        ctx = self.ada_ctx_proj(z)  # [B, C0, h, w]
        tokens = ctx if ctx.shape[2:] == grid else F.interpolate(ctx, size=grid, mode="nearest")
        tokens = F.silu(tokens).flatten(2).transpose(1, 2)  # [B, N, C0]
        down, up = self.residual_blocks(self.down_blocks), self.residual_blocks(self.up_blocks)
        transformer: Iterable[Any] = self.mid_block.transformer_blocks
        # In the order of `forward`. They stay at the latents' size: norms spread them, which saves enlarged maps.
        modulations = [block.norm1.modulation(ctx) for block in down]
        modulations += [block.norm1.modulation(tokens) for block in transformer]
        modulations += [block.norm1.modulation(ctx) for block in up]
        # The picture sees the latents a second time, as channels beside x_t.
        enlarged = F.interpolate(z, size=size, mode="nearest")
        return Condition(enlarged, tuple(modulations), make_layout(*grid, z.device))

    @staticmethod
    def residual_blocks(levels: Iterable[Any]) -> Iterator[Any]:
        return (block for level in levels for block in level.resnets)

    def forward(self, x_t: Tensor, t: Tensor, given: Condition | Tensor, tap: Tap | None = None) -> Tensor:
        """Velocity [B, 3, H, W] at x_t [B, 3, H, W] and t [B] in [0, 1].

        `given` are the latents, or `condition` of them where several steps share it. `tap(i, tokens [B, N, dim])` is
        called with the output of each transformer block (REPA).
        """
        condition = given if isinstance(given, Condition) else self.condition(given, (x_t.shape[2], x_t.shape[3]))
        modulations = iter(condition.modulations)
        # Times enter at the scale of diffusion's 1000 steps, for which these frequencies were chosen.
        temb = timestep_embedding(1000.0 * t, self.config.widths[0]).to(x_t.dtype)
        temb = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](temb)))
        temb = F.silu(temb)  # [B, 4 C0]
        h = self.conv_in(torch.cat([x_t, condition.z.to(x_t.dtype)], dim=1))  # [B, C0, H, W]
        skips = [h]
        down: Iterable[Any] = self.down_blocks
        up: Iterable[Any] = self.up_blocks
        for level in down:
            for block in level.resnets:
                h = block(h, next(modulations), temb)
                skips.append(h)
            if hasattr(level, "downsamplers"):  # its result is a skip as well: three a level and one of conv_in
                h = level.downsamplers[0]["conv"](h)
                skips.append(h)
        h = self.mid_block(h, modulations, condition.layout, tap)
        for level in up:
            for block in level.resnets:
                h = block(torch.cat([h, skips.pop()], dim=1), next(modulations), temb)
            if hasattr(level, "upsamplers"):
                h = upsample_conv(h, level.upsamplers[0]["conv"])
        return self.conv_out(silu(affine_group_norm(self.conv_norm_out, h)))
