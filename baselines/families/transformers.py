"""Parts of vision transformers that several families share."""

import torch
from torch import Tensor, nn

from tokbench.runtime.device import in_float64


class Block(nn.Module):
    """A pre-norm transformer block in CLIP's spelling."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential()
        for name, layer in layers.items():
            self.mlp.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> the same"""
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def rotate(x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of neighbouring channels: [B, heads, N, d] with cosines and sines [N, d / 2]."""
    cos, sin = places
    even, odd = x.float().unflatten(3, (-1, 2)).unbind(4)
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=4).flatten(3).to(x.dtype)


def rotary(positions: Tensor, channels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, d / 2] of positions [N, axes], `channels` of them for each axis."""
    angles, places = [], in_float64(positions)
    for axis, size in enumerate(channels):
        frequencies = 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64, device=places.device) / size)
        angles.append(places[:, axis, None] * frequencies)
    joined = torch.cat(angles, dim=1)
    return joined.cos().float().to(positions.device), joined.sin().float().to(positions.device)


def to_pixels(tokens: Tensor, patch: int, columns: int) -> Tensor:
    """[B, N, p * p * c], row, column and channel of a patch, -> [B, c, H, W]"""
    grid = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (-1, columns))  # [B, rows, columns, p, p, c]
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def to_patches(x: Tensor, patch: int) -> Tensor:
    """[B, c, H, W] -> [B, N, p * p * c]: the way back."""
    grid = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B, c, rows, p, columns, p]
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
