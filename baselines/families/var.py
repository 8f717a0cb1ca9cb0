"""VAR's multi-scale tokenizer (Tian et al., arXiv 2404.02905), in the layout of its published file.

Facts from github.com/FoundationVision/VAR: VQGAN's network 160 wide; ten maps of codes, coarse to fine, each of what
the maps before it left over, smoothed by one of four convolutions. Images are in [-1, 1].
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.ldm import LDMAutoencoder, LDMConfig
from baselines.families.quantisers import nearest_codes
from baselines.pretrained import Codes, Continuous, from_file
from baselines.published import PUBLISHED

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of the maps, in codes
SMOOTHING = (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)  # which convolution smooths each map
CONFIGS = {"var-f16": LDMConfig((1, 1, 2, 2, 4), 32, 32, codebook_size=4096, width=160)}


class MultiScale(LDMAutoencoder):
    """Codes int64 [B, 680], the maps one after the other."""

    def __init__(self, config: LDMConfig) -> None:
        super().__init__(config)
        channels = config.latent_channels
        self.quant_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.smoothings = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(1 + max(SMOOTHING)))

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, 3, 256, 256] in [-1, 1] -> (codes,)"""
        left = self.quant_conv(self.encoder(x))
        codes = []
        for scale, side in enumerate(SIDES):
            reduced = F.interpolate(left, size=(side, side), mode="area")
            codes.append(nearest_codes(reduced, self.quantize.embedding.weight))
            left = left - self.spread(codes[-1], scale)
        return (torch.cat([one.flatten(1) for one in codes], dim=1),)

    def decode(self, z: Tensor, return_dict: bool = False, force_not_quantize: bool = True) -> tuple[Tensor]:
        """codes -> ([B, 3, 256, 256],)"""
        maps = z.split([side * side for side in SIDES], dim=1)
        parts = [
            self.spread(one.unflatten(1, (side, side)), i)
            for i, (one, side) in enumerate(zip(maps, SIDES, strict=True))
        ]
        return super().decode(torch.stack(parts).sum(0))

    def spread(self, codes: Tensor, scale: int) -> Tensor:
        """What one map adds: codes int64 [B, s, s] -> [B, c, 16, 16]."""
        h = self.quantize.embedding(codes).permute(0, 3, 1, 2)
        if scale < len(SIDES) - 1:
            h = F.interpolate(h, size=(SIDES[-1], SIDES[-1]), mode="bicubic")
        return (h + self.smoothings[SMOOTHING[scale]](h)) / 2


def own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """VAR's parameters under latent diffusion's names; it keeps the three maps of an attention in one."""
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if ".qkv." in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                renamed[key.replace(".qkv.", f".{name}.")] = part
        elif key != "quantize.ema_vocab_hit_SV":  # counts of use
            renamed[key.replace("quantize.quant_resi.qresi_ls.", "smoothings.")] = value
    return renamed


def published(name: str, file: Path | None, random_weights: bool, weights: str | None) -> Continuous:
    """A row of CONFIGS from `file`, or from the hub, or with random weights.

    Raises CellError if the file is missing, damaged, pickled or does not fit.
    """
    build = partial(MultiScale, CONFIGS[name])
    return from_file(PUBLISHED[name], file, random_weights, weights, build, own_names, Codes)
