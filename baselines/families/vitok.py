"""ViTok-v2 (Hansen-Estruch et al., arXiv 2605.05331): vision transformers as encoder and decoder, any image size.

Facts from github.com/Na-VAE/vitok-release, its author's public reimplementation: images in [-1, 1], a token a patch,
normalised over its channels; blocks whose attention and MLP read the same input; two files a model. Its evaluation uses
full attention unless a window is asked for, and bfloat16; here it is float32.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.transformers import rotary, rotate
from baselines.hub import load_weights, part
from baselines.pretrained import Continuous, wrap
from baselines.published import PUBLISHED

SIZES = {"L": (1024, 16), "T": (3072, 24)}  # width, heads
ENCODER_DEPTH = 4


@dataclass(frozen=True)
class ViTokConfig:
    size: str
    depth: int  # of the decoder
    patch: int
    channels: int


CONFIGS = {
    **{f"vitok-v2-350m-f16c{c}": ViTokConfig("L", 24, 16, c) for c in (16, 32, 64)},
    **{f"vitok-v2-5b-f16c{c}": ViTokConfig("T", 40, 16, c) for c in (16, 32, 64)},
    **{f"vitok-v2-5b-f32c{c}": ViTokConfig("T", 40, 32, c) for c in (64, 128, 256)},
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.qkv_proj, self.out_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        """[B, N, width]; cosines and sines [N, d / 2]"""
        q, k, v = self.qkv_proj(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(rotate(self.norm_q(q), places), rotate(self.norm_k(k), places), v)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (int(2.67 * width) + 8) // 16 * 16
        self.fc1, self.fc2 = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-4))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.layer_scale = nn.RMSNorm(width, eps=1e-6), Scale(width)
        self.attn, self.ffn = Attention(width, heads), GatedMLP(width)

    def forward(self, x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        h = self.norm1(x)
        return x + self.layer_scale.gamma * (self.attn(h, places) + self.ffn(h))


def transform(blocks: nn.ModuleList, h: Tensor, into: nn.Linear, out: nn.Linear, heads: int) -> Tensor:
    """A map [B, c, h, w] through `into`, the blocks and `out`: [B, d, h, w]."""
    rows, columns = h.shape[2:]
    index = torch.arange(rows * columns, device=h.device)
    axis = into.out_features // heads // 2
    places = rotary(torch.stack((index // columns, index % columns), dim=1), (axis, axis))
    tokens = into(h.flatten(2).mT)
    for block in blocks:
        tokens = block(tokens, places)
    return out(tokens).mT.unflatten(2, (rows, columns))


class Encoder(nn.Module):
    """[B, 3, H, W] in [-1, 1] -> [B, c, H / p, W / p], each position normalised over its channels"""

    def __init__(self, config: ViTokConfig) -> None:
        super().__init__()
        width, self.heads = SIZES[config.size]
        self.patch = config.patch
        self.patch_embed = nn.Linear(3 * config.patch**2, width)
        self.encoder_blocks = nn.ModuleList(Block(width, self.heads) for _ in range(ENCODER_DEPTH))
        self.to_code = nn.Linear(width, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(x, self.patch)
        z = transform(self.encoder_blocks, patches, self.patch_embed, self.to_code, self.heads)
        return F.layer_norm(z.permute(0, 2, 3, 1), z.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)


class Decoder(nn.Module):
    """[B, c, h, w] -> [B, 3, p h, p w]"""

    def __init__(self, config: ViTokConfig) -> None:
        super().__init__()
        width, self.heads = SIZES[config.size]
        self.patch = config.patch
        self.decoder_embed = nn.Linear(config.channels, width)
        self.decoder_blocks = nn.ModuleList(Block(width, self.heads) for _ in range(config.depth))
        self.to_pixels = nn.Linear(width, 3 * config.patch**2)

    def forward(self, z: Tensor) -> Tensor:
        pixels = transform(self.decoder_blocks, z, self.decoder_embed, self.to_pixels, self.heads)
        return F.pixel_shuffle(pixels, self.patch)


class ViTok(nn.Module):
    """The two networks with the methods that the adapter calls."""

    def __init__(self, config: ViTokConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.encoder(x),)

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.decoder(z),)


def published(name: str, file: Path | None, random_weights: bool, weights: str | None) -> Continuous:
    """A row of CONFIGS from the folder `file` with encoder.safetensors and decoder.safetensors, or from the hub, or
    with random weights.

    Raises CellError if a file is missing, damaged or does not fit.
    """
    row, model = PUBLISHED[name], ViTok(CONFIGS[name])
    for side in () if random_weights else ("encoder", "decoder"):
        path = part(row, file, f"{side}.safetensors")
        row = load_weights(getattr(model, side), path, row, weights)
    return wrap(model.eval(), row, random_weights)
