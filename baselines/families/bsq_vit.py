"""BSQ-ViT (Zhao et al., arXiv 2406.07548): a transformer on patches of 8 pixels, a code the signs of its channels.

Facts from github.com/zhaoyue-zephyrus/bsq-vit: images in [-1, 1] at 256 px; what is decoded are the signs, scaled to
length one. A file holds the trained weights and their moving average, which is taken.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.quantisers import codes_to_signs, signs_to_codes
from baselines.families.transformers import Block
from baselines.pretrained import Codes, Continuous, from_file
from baselines.published import PUBLISHED

PATCH, RESOLUTION, WIDTH, DEPTH, HEADS, HIDDEN = 8, 256, 768, 12, 12, 3072
CONFIGS = {"bsq-vit-18bit": 18, "bsq-vit-18bit-grouped": 18, "bsq-vit-36bit": 36}  # bits of a code


class Transformer(nn.Module):
    """Positions, blocks and the norms around them."""

    def __init__(self) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn((RESOLUTION // PATCH) ** 2, WIDTH) * 0.02)
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(DEPTH)))})

    def run(self, x: Tensor) -> Tensor:
        """[B, N, width] -> the same"""
        return self.ln_post(self.transformer["resblocks"](self.ln_pre(x + self.positional_embedding)))


class Encoder(Transformer):
    """[B, 3, 256, 256] in [-1, 1] -> [B, 1024, width]"""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Linear(3 * PATCH**2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.conv1(F.pixel_unshuffle(x, PATCH).flatten(2).mT))


class Decoder(Transformer):
    """[B, 1024, width] -> [B, 3, 256, 256]"""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh())
        self.conv_out = nn.Linear(HIDDEN, 3 * PATCH**2)

    def forward(self, h: Tensor) -> Tensor:
        side = RESOLUTION // PATCH
        return F.pixel_shuffle(self.conv_out(self.ffn(self.run(h))).mT.unflatten(2, (side, side)), PATCH)


class BSQViT(nn.Module):
    """Codes int64 [B, 32, 32], the first channel's sign the highest bit."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.config, self.bits = None, bits
        self.encoder, self.decoder = Encoder(), Decoder()
        self.quant_embed, self.post_quant_embed = nn.Linear(WIDTH, bits), nn.Linear(bits, WIDTH)

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, 3, 256, 256] in [-1, 1] -> (codes,)"""
        side = RESOLUTION // PATCH
        return (signs_to_codes(self.quant_embed(self.encoder(x)).flip(2), 2).unflatten(1, (side, side)),)

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """codes -> ([B, 3, 256, 256],)"""
        signs = codes_to_signs(z.flatten(1), self.bits, 2).flip(2)
        units = signs.to(self.post_quant_embed.weight.dtype) / self.bits**0.5
        return (self.decoder(self.post_quant_embed(units)),)


def own_names(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the averaging's counter and the quantiser's tables."""
    return {name: value for name, value in held.items() if not name.startswith(("quantize.", "n_averaged"))}


def published(name: str, file: Path | None, random_weights: bool, weights: str | None) -> Continuous:
    """A row of CONFIGS from `file`, or with random weights.

    Raises CellError if the file is missing, damaged, pickled or does not fit.
    """
    build = partial(BSQViT, CONFIGS[name])
    return from_file(PUBLISHED[name], file, random_weights, weights, build, own_names, Codes)
