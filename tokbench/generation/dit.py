"""Diffusion transformer with adaLN-zero blocks (Peebles and Xie 2023, arXiv 2212.09748) for any grid of latents.

It predicts a velocity, so its last layer has `channels` outputs where the paper's has twice as many.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokbench.errors import InputError


@dataclass(frozen=True)
class DiTConfig:
    channels: int = 4  # of the latents
    patch: int = 2  # latent positions along one side of a token
    width: int = 384
    depth: int = 12
    heads: int = 6
    num_classes: int = 1000
    label_dropout: float = 0.1  # share of training samples that are told the null class


SIZES: dict[str, DiTConfig] = {
    "tiny": DiTConfig(width=192, depth=6, heads=3),  # 4 million parameters, for a CPU
    "S": DiTConfig(width=384, depth=12, heads=6),
    "B": DiTConfig(width=768, depth=12, heads=12),
    "L": DiTConfig(width=1024, depth=24, heads=16),
    "XL": DiTConfig(width=1152, depth=28, heads=16),
}


def dit_config(size: str, *, patch: int, channels: int, num_classes: int, label_dropout: float = 0.1) -> DiTConfig:
    """The config of a named size; InputError for another size or patch."""
    if size not in SIZES:
        raise InputError(f"unknown DiT size {size!r}: choose one of {', '.join(SIZES)}")
    if patch not in (1, 2, 4, 8):
        raise InputError(f"DiT patch {patch}: choose 1, 2, 4 or 8")
    return replace(SIZES[size], patch=patch, channels=channels, num_classes=num_classes, label_dropout=label_dropout)


def sincos(positions: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """float32 [N] -> [N, dim]: cosines, then sines, of geometrically spaced frequencies from 1 to 1 / max_period."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=positions.device) / half)
    angles = positions.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, D]; shift, scale [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and MLP, each with shift, scale and gate from the condition; the gates start at zero (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=1)  # [B, D] each
        tokens = modulate(self.norm1(x), shift1, scale1)  # [B, N, D]
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d] each
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, N, D]
        x = x + gate1[:, None] * self.out(mixed)
        out: Tensor = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return out


class DiT(nn.Module):
    """Velocity of noisy latents, given the time and a class. The null class, `num_classes`, stands for any."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_in = nn.Conv2d(config.channels, width, config.patch, stride=config.patch)
        first, second = nn.Linear(256, width), nn.Linear(width, width)
        self.time_mlp = nn.Sequential(first, nn.SiLU(), second)
        self.classes = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.last_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.last_modulation = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, config.patch**2 * config.channels)
        self.apply(self._initialise)
        nn.init.xavier_uniform_(self.patch_in.weight.view(width, -1))
        for weight in (self.classes.weight, first.weight, second.weight):
            nn.init.normal_(weight, std=0.02)
        blocks = [module.modulation for module in self.modules() if isinstance(module, Block)]
        for layer in (*blocks, self.last_modulation, self.patch_out):  # every block starts as the identity
            nn.init.zeros_(layer.weight)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)

    def drop_labels(self, labels: Tensor, uniform: Tensor) -> Tensor:
        """Labels int64 [B] with the null class where uniform [B], in [0, 1), is below the dropout rate."""
        return torch.where(uniform < self.config.label_dropout, self.config.num_classes, labels)

    def positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Fixed position code [1, rows * columns, width]: half of it for the row, half for the column, in tokens."""
        half = self.config.width // 2
        by_row = sincos(torch.arange(rows, device=device), half)[:, None].expand(-1, columns, -1)
        by_column = sincos(torch.arange(columns, device=device), half)[None].expand(rows, -1, -1)
        return torch.cat((by_row, by_column), dim=2).reshape(1, rows * columns, -1)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x_t float [B, C, H, W]; t float [B] in [0, 1]; labels int64 [B] in 0..num_classes -> velocity [B, C, H, W].

        t is embedded as 1000 t, the range of the paper's timesteps. H and W must be multiples of the patch.
        """
        patch, (height, width) = self.config.patch, x_t.shape[2:]
        if height % patch or width % patch:
            raise InputError(f"latents of {height} x {width} do not divide into patches of {patch}: set patch=1")
        rows, columns = height // patch, width // patch
        tokens = self.patch_in(x_t).flatten(2).transpose(1, 2)  # [B, N, D]
        tokens = tokens + self.positions(rows, columns, x_t.device).to(tokens.dtype)
        condition = self.time_mlp(sincos(1000 * t, 256)) + self.classes(labels)  # [B, D]
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.last_modulation(F.silu(condition)).chunk(2, dim=1)
        pixels: Tensor = self.patch_out(modulate(self.last_norm(tokens), shift, scale))  # [B, N, patch * patch * C]
        pixels = pixels.unflatten(1, (rows, columns)).unflatten(3, (patch, patch, -1))  # [B, r, c, p, p, C]
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(x_t), -1, height, width)
