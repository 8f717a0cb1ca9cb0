"""SoftVQ-VAE (Chen et al., arXiv 2412.10958) and MAETok (Chen et al., arXiv 2502.03444): 32 to 128 continuous tokens.

Facts from github.com/Hhhhhhao/continuous_tokenizer: DINOv2-shaped transformers of timm with patches of 16 pixels,
images in [-1, 1] at 256 or 512 px. SoftVQ: each quarter of the tokens has a codebook, and a token is a mean of its
codes by a softmax. MAETok: no codebook, and learned rotary places. What the config.json beside a file says goes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.transformers import rotate, to_pixels
from baselines.hub import fetch, read_config
from baselines.pretrained import Continuous, Sequence, from_file
from baselines.published import PUBLISHED
from tokbench.errors import CellError


@dataclass(frozen=True)
class SoftVQConfig:
    """Under the names of config.json."""

    encoder_model: str
    decoder_model: str
    num_latent_tokens: int
    codebook_embed_dim: int
    image_size: int = 256
    enc_patch_size: int = 16
    dec_patch_size: int = 16
    use_rope: bool = False  # learned rotary places, in the decoder in place of the added ones
    rope_mixed: bool = True  # else it has rotary places that its authors' code cannot run
    dec_cls_token: bool = True
    to_pixel: str = "linear"
    num_codebooks: int = 4  # 0: MAETok
    codebook_size: int = 8192
    tau: float = 0.07


BASE, LARGE = "vit_base_patch14_dinov2.lvd142m", "vit_large_patch14_dinov2.lvd142m"
CONFIGS = {
    **{f"softvq-{size}-{tokens}": SoftVQConfig(encoder, decoder, tokens, 2048 // tokens)
       for size, (encoder, decoder) in {"b": (BASE, BASE), "bl": (BASE, LARGE), "l": (LARGE, LARGE)}.items()
       for tokens in (32, 64)},
    "softvq-bl-64-512": SoftVQConfig(BASE, LARGE, 64, 32, image_size=512),
    "softvq-l-32-512": SoftVQConfig(LARGE, LARGE, 32, 64, image_size=512),
    "maetok-b-128": SoftVQConfig(BASE, BASE, 128, 32, use_rope=True, num_codebooks=0),
    "maetok-b-128-512": SoftVQConfig(BASE, BASE, 128, 32, image_size=512, use_rope=True, num_codebooks=0),
}  # fmt: skip


class Side(nn.Module):
    """A vision transformer with further tokens behind its patches."""

    def __init__(self, size: str, resolution: int, patch: int, config: SoftVQConfig) -> None:
        super().__init__()
        import timm

        self.model: Any = timm.create_model(
            size, pretrained=False, img_size=resolution, patch_size=patch, num_classes=0
        )
        self.width: int = self.model.embed_dim
        self.patch, self.columns = patch, resolution // patch
        self.latent_pos_embed = nn.Parameter(torch.randn(1, config.num_latent_tokens, self.width) * 0.02)
        if config.use_rope:
            heads = self.model.blocks[0].attn.num_heads
            self.freqs = nn.Parameter(torch.randn(2, len(self.model.blocks), self.width // 2))
            self.heads = heads

    def run(self, grid: Tensor, tokens: Tensor) -> Tensor:
        """The class token and the patches, [B, n + 256, width], and [B, N, width] -> both, after all blocks."""
        h = self.model.norm_pre(torch.cat([grid, tokens + self.latent_pos_embed], dim=1))
        if not hasattr(self, "freqs"):
            return self.model.norm(self.model.blocks(h))
        first = grid.shape[1] - self.columns**2
        for block, places in zip(self.model.blocks, self.places(), strict=True):
            h = h + block.ls1(self.attend(block.attn, block.norm1(h), places, first))
            h = h + block.ls2(block.mlp(block.norm2(h)))
        return self.model.norm(h)

    def places(self) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines [heads, patches, d / 2] of each block."""
        index = torch.arange(self.columns**2, device=self.freqs.device)[:, None]
        columns, rows = index % self.columns, index // self.columns
        angles = [columns * across + rows * down for across, down in zip(*self.freqs.float(), strict=True)]
        split = [one.unflatten(1, (self.heads, -1)).transpose(0, 1) for one in angles]
        return [(one.cos(), one.sin()) for one in split]

    def attend(self, attention: Any, x: Tensor, places: tuple[Tensor, Tensor], first: int) -> Tensor:
        """timm's attention with rotary places for the patches, which begin at token `first`."""
        q, k, v = attention.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        patches = slice(first, first + self.columns**2)
        for one in (q, k):
            one[:, :, patches] = rotate(one[:, :, patches], places)
        return attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(Side):
    """[B, 3, H, W] in [-1, 1] -> [B, N, width]"""

    def __init__(self, config: SoftVQConfig) -> None:
        super().__init__(config.encoder_model, config.image_size, config.enc_patch_size, config)
        self.latent_tokens = nn.Parameter(torch.randn(1, config.num_latent_tokens, self.width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.latent_tokens.expand(len(x), -1, -1)
        return self.run(self.model._pos_embed(self.model.patch_embed(x)), tokens)[:, -tokens.shape[1] :]


class ToPixel(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.model = nn.Linear(width, 3 * patch**2)


class Decoder(Side):
    """[B, N, width] -> [B, 3, H, W]"""

    def __init__(self, config: SoftVQConfig) -> None:
        super().__init__(config.decoder_model, config.image_size, config.dec_patch_size, config)
        self.mask_token = nn.Parameter(torch.randn(1, 1, self.width) * 0.02)
        self.to_pixel = ToPixel(self.width, config.dec_patch_size)
        self.added_places = not config.use_rope
        if not config.dec_cls_token:
            self.model.cls_token = None

    def forward(self, tokens: Tensor) -> Tensor:
        grid = self.mask_token.expand(len(tokens), self.columns**2, -1)
        if self.model.cls_token is not None:
            grid = torch.cat([self.model.cls_token.expand(len(tokens), -1, -1), grid], dim=1)
        h = self.run(grid + self.model.pos_embed if self.added_places else grid, tokens)
        h = h[:, : grid.shape[1]][:, -(self.columns**2) :]
        return to_pixels(self.to_pixel.model(h), self.patch, self.columns)


class SoftQuantizer(nn.Module):
    """The mean of a codebook's unit vectors, weighted by how well each agrees: [B, N, c] -> the same."""

    def __init__(self, config: SoftVQConfig) -> None:
        super().__init__()
        self.tau = config.tau
        self.embedding = nn.Parameter(
            torch.randn(config.num_codebooks, config.codebook_size, config.codebook_embed_dim)
        )

    def forward(self, z: Tensor) -> Tensor:
        codes = F.normalize(self.embedding, dim=-1)
        parts = F.normalize(z.unflatten(1, (len(codes), -1)), dim=-1)
        weights = (torch.einsum("bnsc,nkc->bnsk", parts, codes) / self.tau).softmax(-1)
        return torch.einsum("bnsk,nkc->bnsc", weights, codes).flatten(1, 2)


class SoftVQ(nn.Module):
    """Latents [B, c channels, N tokens]."""

    def __init__(self, config: SoftVQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Linear(self.encoder.width, config.codebook_embed_dim)
        self.post_quant_conv = nn.Linear(config.codebook_embed_dim, self.decoder.width)
        self.quantize = SoftQuantizer(config) if config.num_codebooks else nn.Identity()

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, 3, H, W] in [-1, 1] -> ([B, c, N],)"""
        return (self.quantize(self.quant_conv(self.encoder(x))).mT,)

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, c, N] -> ([B, 3, H, W],)"""
        return (self.decoder(self.post_quant_conv(z.mT)),)


def stated(held: Mapping[str, Any], default: SoftVQConfig, name: str) -> SoftVQConfig:
    """The default with what a config.json says. Raises CellError for what is not read here."""
    held = held.get("config", held)
    own = {one.name: held[one.name] for one in fields(default) if one.name in held}
    if not default.num_codebooks:  # its config.json counts codebooks that it does not have
        own.pop("num_codebooks", None)
    config = replace(default, **own)
    if config.to_pixel != "linear" or (config.use_rope and not config.rope_mixed) or "movq" in config.decoder_model:
        raise CellError(
            f"{name}: its config.json asks for a part that is not read here: to_pixel={config.to_pixel}, "
            f"rope_mixed={config.rope_mixed}, decoder_model={config.decoder_model}"
        )
    return config


def needed(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what only training needs."""
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding")
    unused = ("encoder.mask_token", "encoder.freqs_t_", "decoder.freqs_t_")
    return {key: held[key] for key in held if key.startswith(parts) and not key.startswith(unused)}


def published(name: str, file: Path | None, random_weights: bool, weights: str | None) -> Continuous:
    """A row of CONFIGS from `file`, or from the hub, or with random weights; what only training needs is ignored.

    Raises CellError if the file is missing, damaged, pickled or does not fit.
    """
    row, config = PUBLISHED[name], CONFIGS[name]
    if not random_weights:
        beside = file.with_name("config.json") if file else fetch(row.repo, "config.json", name)
        config = stated(read_config(beside, name), config, name)
    row = replace(row, channels=config.codebook_embed_dim)
    return from_file(row, file, random_weights, weights, partial(SoftVQ, config), needed, Sequence)
