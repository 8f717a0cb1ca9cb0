"""TiTok (Yu et al., arXiv 2406.07550): 32 to 256 tokens for an image of 256 px, in the layout of the published files.

Facts from github.com/bytedance/1d-tokenizer. Images are in [0, 1]. The first three models predict codes of MaskGIT's
VQGAN, whose decoder lies in the same file; the later ones predict pixels.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.quantisers import Codebook, nearest_codes
from baselines.families.transformers import Block, to_pixels
from baselines.pretrained import Codes, Continuous, Sequence, from_file
from baselines.published import PUBLISHED
from ssdd_models.encoder import Posterior
from ssdd_models.layers import ResBlock

PATCH, GRID = 16, 16  # pixels of a patch, patches along the side of an image
SIZES = {"S": (512, 8, 8), "B": (768, 12, 12), "L": (1024, 24, 16)}  # width, blocks, heads


@dataclass(frozen=True)
class TiTokConfig:
    """`codebook_size` None: a Gaussian posterior of `token_size` channels."""

    encoder: str
    decoder: str
    tokens: int
    token_size: int
    codebook_size: int | None = None
    first_version: bool = False  # unit codes, tokens out in the wrong order, the decoder of MaskGIT's VQGAN


CONFIGS = {
    "titok-l32": TiTokConfig("L", "L", 32, 12, 4096, first_version=True),
    "titok-b64": TiTokConfig("B", "B", 64, 12, 4096, first_version=True),
    "titok-s128": TiTokConfig("S", "S", 128, 12, 4096, first_version=True),
    "titok-bl64-vq": TiTokConfig("B", "L", 64, 64, 8192),
    "titok-bl128-vq": TiTokConfig("B", "L", 128, 64, 8192),
    "titok-sl256-vq": TiTokConfig("S", "L", 256, 64, 8192),
    "titok-ll32-vae": TiTokConfig("L", "L", 32, 16),
    "titok-bl64-vae": TiTokConfig("B", "L", 64, 16),
    "titok-bl128-vae": TiTokConfig("B", "L", 128, 16),
}


class Transformer(nn.Module):
    """What encoder and decoder share: a class token, one token a patch, and the latent tokens, each with its place."""

    def __init__(self, size: str, tokens: int) -> None:
        super().__init__()
        width, depth, heads = SIZES[size]
        self.width = width
        self.class_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.positional_embedding = nn.Parameter(torch.randn(GRID**2 + 1, width) / width**0.5)
        self.latent_token_positional_embedding = nn.Parameter(torch.randn(tokens, width) / width**0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Sequential(*(Block(width, heads) for _ in range(depth)))

    def run(self, patches: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 256, width] and [B, N, width] -> the same, after all blocks; the latents unnormalised."""
        first = self.class_embedding.expand(len(patches), 1, -1)
        grid = torch.cat([first, patches], dim=1) + self.positional_embedding
        h = torch.cat([grid, latents + self.latent_token_positional_embedding], dim=1)
        h = self.ln_post(self.transformer(self.ln_pre(h)))
        return h[:, 1 : 1 + GRID**2], h[:, 1 + GRID**2 :]


class Encoder(Transformer):
    """[B, 3, 256, 256] in [0, 1] -> [B, token size, N]"""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config.encoder, config.tokens)
        self.first_version = config.first_version
        self.latent_tokens = nn.Parameter(torch.randn(config.tokens, self.width) / self.width**0.5)
        self.patch_embed = nn.Conv2d(3, self.width, PATCH, stride=PATCH)
        outputs = config.token_size * (1 if config.codebook_size else 2)
        self.conv_out = nn.Conv2d(self.width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x).flatten(2).mT
        _, h = self.run(patches, self.latent_tokens.expand(len(x), -1, -1))
        # The first version reads the memory of [N, width] as [width, N].
        h = h.reshape(len(x), self.width, -1) if self.first_version else h.mT
        return self.conv_out(h[..., None])[..., 0]


class Decoder(Transformer):
    """[B, token size, N] -> [B, 1024, 16, 16], scores of MaskGIT's codes, or [B, 3, 256, 256] in [0, 1]"""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config.decoder, config.tokens)
        self.mask_token = nn.Parameter(torch.randn(1, 1, self.width) / self.width**0.5)
        self.decoder_embed = nn.Linear(config.token_size, self.width)
        if config.first_version:
            wide = 2 * self.width
            self.ffn = nn.Sequential(nn.Conv2d(self.width, wide, 1), nn.Tanh(), nn.Conv2d(wide, MASKGIT_CODES, 1))
            self.conv_out: nn.Module = nn.Identity()
        else:
            self.ffn = nn.Sequential(nn.Conv2d(self.width, 3 * PATCH**2, 1), Pixels())
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        patches = self.mask_token.expand(len(z), GRID**2, -1)
        h, _ = self.run(patches, self.decoder_embed(z.mT))
        return self.conv_out(self.ffn(h.mT.unflatten(2, (GRID, GRID))))


class Pixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return to_pixels(x.flatten(2).mT, PATCH, GRID)


MASKGIT_WIDTHS = (128, 128, 256, 256, 512)
MASKGIT_CODES, MASKGIT_CHANNELS = 1024, 256


class MaskGITBlock(ResBlock):
    """Without bias, and with its shortcut taken from the block's own output, as the published weights were trained."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels)
        self.conv1.bias = self.conv2.bias = None
        self.changes = channels_in != channels
        if self.changes:
            self.nin_shortcut = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(h) if self.changes else x)


class MaskGITLevel(nn.Module):
    def __init__(self, channels_in: int, channels: int, upsample: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(MaskGITBlock(channels_in, channels), MaskGITBlock(channels, channels))
        self.upsample_conv = nn.Conv2d(channels, channels, 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        return h if self.upsample_conv is None else self.upsample_conv(F.interpolate(h, scale_factor=2.0))


class MaskGITDecoder(nn.Module):
    """[B, 256, 16, 16] -> [B, 3, 256, 256] in [0, 1]: VQGAN's decoder without attention."""

    def __init__(self) -> None:
        super().__init__()
        widths, last = MASKGIT_WIDTHS, MASKGIT_WIDTHS[-1]
        self.conv_in = nn.Conv2d(MASKGIT_CHANNELS, last, 3, padding=1)
        self.mid = nn.Sequential(MaskGITBlock(last, last), MaskGITBlock(last, last))
        self.up = nn.ModuleList(
            MaskGITLevel(before, width, upsample=i > 0) for i, (width, before) in enumerate(pairwise((*widths, last)))
        )
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class TiTok(nn.Module):
    """Codes int64 [B, N], or continuous latents [B, c, N]."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        if config.codebook_size:
            self.quantize = Codebook(config.codebook_size, config.token_size)
        if config.first_version:
            self.pixel_quantize = Codebook(MASKGIT_CODES, MASKGIT_CHANNELS)
            self.pixel_decoder = MaskGITDecoder()

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Any]:
        """[B, 3, 256, 256] in [-1, 1] -> (codes,) or (posterior,)"""
        z = self.encoder((x + 1) / 2)
        if not self.config.codebook_size:
            return (Posterior(z),)
        z = F.normalize(z, dim=1) if self.config.first_version else z
        return (nearest_codes(z[:, :, None], self.codes())[:, 0],)

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """codes or latents -> ([B, 3, 256, 256],)"""
        h = self.decoder(F.embedding(z, self.codes()).mT if self.config.codebook_size else z)
        if self.config.first_version:  # the mean of the codes, by how probable each is
            h = torch.einsum("bkhw,kc->bchw", h.softmax(1), self.pixel_quantize.embedding.weight)
            h = self.pixel_decoder(h)
        return (h * 2 - 1,)

    def codes(self) -> Tensor:
        """[K, token size]"""
        weight = self.quantize.embedding.weight
        return F.normalize(weight, dim=1) if self.config.first_version else weight


def own_names(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tokens lie beside it."""
    return {"encoder.latent_tokens" if key == "latent_tokens" else key: value for key, value in held.items()}


def published(name: str, file: Path | None, random_weights: bool, weights: str | None) -> Continuous:
    """A row of CONFIGS from `file`, or from the hub, or with random weights.

    Raises CellError if the file is missing, damaged, pickled or does not fit.
    """
    row, build = PUBLISHED[name], partial(TiTok, CONFIGS[name])
    adapter = Codes if row.codebook_size else Sequence
    return from_file(row, file, random_weights, weights, build, own_names, adapter)
