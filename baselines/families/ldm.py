"""Checkpoints in the format of latent diffusion (Rombach et al., arXiv 2112.10752) and LlamaGen (arXiv 2406.06525).

One network with one table of configurations; parameters are called as in CompVis/latent-diffusion, and LlamaGen's
names are translated. Everything is checked strictly against these names and shapes when a file is loaded.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.quantisers import Codebook
from baselines.hub import checkpoint, fetch, load_weights, read_tensors
from baselines.kl_vae import ConvDecoder, ConvDecoderConfig
from baselines.pretrained import Continuous, wrap
from baselines.published import PUBLISHED
from ssdd_models.encoder import ConvEncoder, Posterior
from tokbench.errors import CellError

# Files beside a checkpoint with the statistics of each channel: mean and deviation, or shift and scale.
STATISTICS = {
    "va-vae-f16d32": "latents_stats.pt",
    "e2e-vavae": "e2e-vavae-400k-latents-stats.pt",
    "e2e-invae": "e2e-invae-400k-latents-stats.pt",
}


@dataclass(frozen=True)
class LDMConfig:
    """`z_channels` leave the encoder, `latent_channels` remain after the 1x1 convolution behind it."""

    channel_mult: tuple[int, ...]  # one level each, finest first; a level halves the resolution, but for the last
    z_channels: int
    latent_channels: int
    codebook_size: int | None = None
    unit_codes: bool = False  # codes are normalised to length one
    decoder_attention: bool = True  # at the coarsest level, where the encoder always has it
    width: int = 128
    blocks: int = 2  # residual blocks a level; the decoder has one more


CONFIGS = {
    "vq-f8": LDMConfig((1, 2, 2, 4), 4, 4, codebook_size=16384),
    "mar-kl16": LDMConfig((1, 1, 2, 2, 4), 16, 16, decoder_attention=False),
    "va-vae-f16d32": LDMConfig((1, 1, 2, 2, 4), 32, 32),
    "e2e-vavae": LDMConfig((1, 1, 2, 2, 4), 32, 32),
    "e2e-invae": LDMConfig((1, 1, 2, 2, 4), 32, 32),
    "taming-vqgan-f16-1024": LDMConfig((1, 1, 2, 2, 4), 256, 256, codebook_size=1024),
    "taming-vqgan-f16-16384": LDMConfig((1, 1, 2, 2, 4), 256, 256, codebook_size=16384),
    "llamagen-vq8": LDMConfig((1, 2, 2, 4), 256, 8, codebook_size=16384, unit_codes=True),
    "llamagen-vq16": LDMConfig((1, 1, 2, 2, 4), 256, 8, codebook_size=16384, unit_codes=True),
}


class LDMAutoencoder(nn.Module):
    """The two networks with the methods that the adapters of baselines.pretrained call."""

    def __init__(self, config: LDMConfig) -> None:
        super().__init__()
        self.config = config
        moments = 1 if config.codebook_size else 2
        widths = [config.width * mult for mult in config.channel_mult]
        self.encoder = ConvEncoder(widths, moments * config.z_channels, config.blocks, attention=True)
        layers = ConvDecoderConfig(config.width, config.channel_mult, config.blocks + 1)
        self.decoder = ConvDecoder(config.z_channels, layers, attention=config.decoder_attention)
        self.quant_conv = nn.Conv2d(moments * config.z_channels, moments * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.z_channels, 1)
        if config.codebook_size:
            self.quantize = Codebook(config.codebook_size, config.latent_channels)

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor | Posterior]:
        """[B, 3, H, W] in [-1, 1] -> (posterior,), or (vectors before quantisation,) with a codebook."""
        h = self.quant_conv(self.encoder(x))
        return (h if self.config.codebook_size else Posterior(h),)

    def decode(self, z: Tensor, return_dict: bool = False, force_not_quantize: bool = True) -> tuple[Tensor]:
        """[B, c, h, w] -> ([B, 3, H, W],)"""
        return (self.decoder(self.post_quant_conv(z)),)


def ldm_name(key: str, levels: int) -> str:
    """LlamaGen's parameter name in latent diffusion's spelling (which comes back unchanged).

    LlamaGen calls levels conv_blocks and counts the decoder's from the coarsest one; its middle is a list.
    """
    for number, name in enumerate(("block_1", "attn_1", "block_2")):
        key = key.replace(f".mid.{number}.", f".mid.{name}.")
    if found := re.fullmatch(r"(encoder|decoder)\.conv_blocks\.(\d+)\.(.*)", key):
        side, level, rest = found[1], int(found[2]), re.sub(r"^res\.", "block.", found[3])
        return f"encoder.down.{level}.{rest}" if side == "encoder" else f"decoder.up.{levels - 1 - level}.{rest}"
    return key


def own_names(held: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The networks' tensors; discriminators, loss networks and counters beside them are ignored."""
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding.")
    return {ldm_name(key, levels): value for key, value in held.items() if key.startswith(parts)} or held


def statistics(path: Path, channels: int, name: str) -> tuple[Tensor, Tensor]:
    """Shift and scale of each latent channel, [c, 1, 1] each, from a file of statistics."""
    held, _ = read_tensors(path, name)
    mean, deviation = held.get("mean"), held.get("std")
    shift, scale = held.get("latents_bias", mean), held.get("latents_scale")
    if scale is None and isinstance(deviation, Tensor):
        scale = 1 / deviation
    if not (isinstance(shift, Tensor) and isinstance(scale, Tensor) and shift.numel() == scale.numel() == channels):
        raise CellError(f"{name}: {path} does not hold mean and std of {channels} channels")
    return shift.float().reshape(-1, 1, 1), scale.float().reshape(-1, 1, 1)


def published(name: str, file: Path | None, random_weights: bool, weights: str | None) -> Continuous:
    """A row of CONFIGS from `file`, or from the hub where its authors keep it there, or with random weights.

    Raises CellError if the file is missing, damaged, pickled or does not fit.
    """
    row, config = PUBLISHED[name], CONFIGS[name]
    model = LDMAutoencoder(config)
    if not random_weights:
        file = checkpoint(row, file)
        row = load_weights(model, file, row, weights, partial(own_names, levels=len(config.channel_mult)))
    if config.unit_codes:  # only directions count: distances to unit codes order as products with them
        model.quantize.embedding.weight.data = F.normalize(model.quantize.embedding.weight.data, dim=-1)
    tokenizer = wrap(model.eval(), row, random_weights)
    if name in STATISTICS and file is not None:
        beside = file.with_name(STATISTICS[name])
        path = beside if beside.is_file() else fetch(row.repo, STATISTICS[name], name)
        tokenizer.shift, tokenizer.scale = statistics(path, config.latent_channels, name)
    return tokenizer
