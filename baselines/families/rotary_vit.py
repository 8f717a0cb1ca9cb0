"""The vision transformer of DINOv3 (Siméoni et al., arXiv 2508.10104), which VTP and RAEv2 build on.

Facts from github.com/facebookresearch/dinov3: rotary places of patches alone, their coordinates from -1 to 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of images in [0, 1]


def to_imagenet(x: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> of mean 0 and deviation 1 over ImageNet."""
    mean, deviation = (torch.tensor(value).to(x)[:, None, None] for value in IMAGENET)
    return ((x + 1) / 2 - mean) / deviation


def from_imagenet(x: Tensor) -> Tensor:
    """The way back."""
    mean, deviation = (torch.tensor(value).to(x)[:, None, None] for value in IMAGENET)
    return (x * deviation + mean) * 2 - 1


def rotate_halves(x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of channel i with i + d / 2: [B, heads, N, d]; cosines and sines [N', d / 2] of the last N'."""
    cos, sin = places
    before, grid = x.split([x.shape[2] - len(cos), len(cos)], dim=2)
    first, second = grid.float().chunk(2, dim=3)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=3)
    return torch.cat((before, turned.to(x.dtype)), dim=2)


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer with rotary places, as DINOv3 has it."""

    width: int
    depth: int
    heads: int
    swiglu: bool = False
    rms_norm: bool = False  # else a layer norm
    eps: float = 1e-5  # of the norms
    layer_scale: bool = False
    qk_norm: bool = False
    places_dtype: torch.dtype = torch.float32  # in which places are computed

    def norm(self) -> nn.Module:
        return (nn.RMSNorm if self.rms_norm else nn.LayerNorm)(self.width, eps=self.eps)


class SelfAttention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv, self.proj = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        norms = [nn.RMSNorm(config.width // config.heads, eps=1e-5) if config.qk_norm else nn.Identity() for _ in "qk"]
        self.q_norm, self.k_norm = norms

    def forward(self, x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        """[B, 1 + N, width], of which the last tokens have cosines and sines [N', d / 2]"""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate_halves(self.q_norm(q), places), rotate_halves(self.k_norm(k), places)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (4 * width * 2 // 3 + 7) // 8 * 8
        self.w1, self.w2, self.w3 = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class RotaryBlock(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = config.norm(), config.norm()
        self.attn = SelfAttention(config)
        self.mlp = SwiGLU(config.width) if config.swiglu else MLP(config.width)
        self.ls1, self.ls2 = (LayerScale(config.width) if config.layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), places))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Places(nn.Module):
    """DINOv3's rotary places: rows and columns from -1 to 1, whatever the image's size."""

    periods: Tensor

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        quarter = config.width // config.heads // 4
        self.dtype = config.places_dtype
        self.register_buffer("periods", 100.0 ** (torch.arange(quarter) / quarter))

    def forward(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [rows * columns, d / 2]"""
        axes = [
            (torch.arange(size, device=self.periods.device, dtype=self.dtype) + 0.5) / size * 2 - 1
            for size in (rows, columns)
        ]
        grid = 2 * torch.pi * torch.cartesian_prod(*axes)  # in that precision too
        angles = (grid[:, :, None] / self.periods).flatten(1).float()
        return angles.cos(), angles.sin()


class RotaryViT(nn.Module):
    """Under DINOv3's names; a class token and `storage_tokens` go before the patches."""

    def __init__(self, config: ViTConfig, patch: int, storage_tokens: int = 0) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        if storage_tokens:
            self.storage_tokens = nn.Parameter(torch.randn(1, storage_tokens, config.width) * 0.02)
        self.prefix = 1 + storage_tokens
        self.rope_embed = Places(config)
        self.blocks = nn.ModuleList(RotaryBlock(config) for _ in range(config.depth))
        self.norm = config.norm()

    def outputs(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> what each block gives of the patches, [B, N, width]"""
        grid = self.patch_embed["proj"](x)
        before = [self.cls_token, self.storage_tokens] if self.prefix > 1 else [self.cls_token]
        tokens = torch.cat([*(one.expand(len(x), -1, -1) for one in before), grid.flatten(2).mT], dim=1)
        places = self.rope_embed(*grid.shape[2:])
        outputs = []
        for block in self.blocks:
            tokens = block(tokens, places)
            outputs.append(tokens[:, self.prefix :])
        return outputs
