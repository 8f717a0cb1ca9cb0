"""SoftVQ-VAE (Chen et al., arXiv 2412.10958): 32 or 64 continuous tokens for an image of 256 px.

Facts from github.com/Hhhhhhao/continuous_tokenizer: DINOv2-shaped transformers of timm with patches of 16 pixels,
images in [-1, 1]; each quarter of the tokens has a codebook, and a token is a mean of its codes by a softmax.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.transformers import to_pixels
from baselines.hub import checkpoint, load_weights
from baselines.pretrained import Continuous, Sequence, wrap
from baselines.published import PUBLISHED

PATCH, RESOLUTION, CHANNELS = 16, 256, 32
CODEBOOKS, CODES, TEMPERATURE = 4, 8192, 0.07


@dataclass(frozen=True)
class SoftVQConfig:
    encoder: str
    decoder: str
    tokens: int


SIZES = {"B": "vit_base_patch14_dinov2", "L": "vit_large_patch14_dinov2"}
CONFIGS = {
    f"softvq-{size}-{tokens}": SoftVQConfig(encoder, decoder, tokens)
    for size, (encoder, decoder) in {"b": ("B", "B"), "bl": ("B", "L"), "l": ("L", "L")}.items()
    for tokens in (32, 64)
}


class Side(nn.Module):
    """A vision transformer with further tokens behind its patches."""

    def __init__(self, size: str, tokens: int) -> None:
        super().__init__()
        import timm

        self.model: Any = timm.create_model(SIZES[size], img_size=RESOLUTION, patch_size=PATCH, num_classes=0)
        self.width: int = self.model.embed_dim
        self.latent_pos_embed = nn.Parameter(torch.randn(1, tokens, self.width) * 0.02)

    def run(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """[B, 256, width] and [B, N, width] -> [B, 1 + 256 + N, width]"""
        h = torch.cat([self.model._pos_embed(patches), tokens + self.latent_pos_embed], dim=1)
        return self.model.norm(self.model.blocks(self.model.norm_pre(h)))


class Encoder(Side):
    """[B, 3, 256, 256] in [-1, 1] -> [B, N, width]"""

    def __init__(self, size: str, tokens: int) -> None:
        super().__init__(size, tokens)
        self.latent_tokens = nn.Parameter(torch.randn(1, tokens, self.width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.latent_tokens.expand(len(x), -1, -1)
        return self.run(self.model.patch_embed(x), tokens)[:, -tokens.shape[1] :]


class ToPixel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Linear(width, 3 * PATCH**2)


class Decoder(Side):
    """[B, N, width] -> [B, 3, 256, 256]"""

    def __init__(self, size: str, tokens: int) -> None:
        super().__init__(size, tokens)
        self.mask_token = nn.Parameter(torch.randn(1, 1, self.width) * 0.02)
        self.to_pixel = ToPixel(self.width)

    def forward(self, tokens: Tensor) -> Tensor:
        side = RESOLUTION // PATCH
        h = self.run(self.mask_token.expand(len(tokens), side**2, -1), tokens)[:, 1 : 1 + side**2]
        return to_pixels(self.to_pixel.model(h), PATCH, side)


class SoftQuantizer(nn.Module):
    """The mean of a codebook's unit vectors, weighted by how well each agrees: [B, N, c] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(CODEBOOKS, CODES, CHANNELS))

    def forward(self, z: Tensor) -> Tensor:
        codes = F.normalize(self.embedding, dim=-1)
        parts = F.normalize(z.unflatten(1, (CODEBOOKS, -1)), dim=-1)
        weights = (torch.einsum("bnsc,nkc->bnsk", parts, codes) / TEMPERATURE).softmax(-1)
        return torch.einsum("bnsk,nkc->bnsc", weights, codes).flatten(1, 2)


class SoftVQ(nn.Module):
    """Latents [B, 32 channels, N tokens]."""

    def __init__(self, config: SoftVQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config.encoder, config.tokens), Decoder(config.decoder, config.tokens)
        self.quant_conv = nn.Linear(self.encoder.width, CHANNELS)
        self.post_quant_conv = nn.Linear(CHANNELS, self.decoder.width)
        self.quantize = SoftQuantizer()

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, 3, 256, 256] in [-1, 1] -> ([B, c, N],)"""
        return (self.quantize(self.quant_conv(self.encoder(x))).mT,)

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, c, N] -> ([B, 3, 256, 256],)"""
        return (self.decoder(self.post_quant_conv(z.mT)),)


def without_training(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that decode and encode."""
    unused = ("repa_model.", "projection.", "quantize.codebook_used")
    return {key: value for key, value in held.items() if not key.startswith(unused)}


def published(
    name: str, file: Path | None = None, random_weights: bool = False, weights: str | None = None
) -> Continuous:
    """A row of CONFIGS from `file`, or from the hub, or with random weights; what only training needs is ignored.

    Raises CellError if the file is missing, damaged, pickled or does not fit.
    """
    row, model = PUBLISHED[name], SoftVQ(CONFIGS[name])
    if not random_weights:
        row = load_weights(model, checkpoint(row, file), row, weights, without_training)
    return wrap(model.eval(), row, random_weights, Sequence)
