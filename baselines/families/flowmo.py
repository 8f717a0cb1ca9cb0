"""FlowMo (Sargent et al., arXiv 2503.11056): a tokenizer of 256 tokens with a rectified-flow decoder on pixels.

Facts from github.com/kylesargent/FlowMo: two transformers of FLUX's double blocks, images in [-1, 1] at 256 px, a
lookup-free quantiser of 9 or 14 bits whose codes share a token, 25 Euler steps that crowd near the image, guidance of
1.5 at middle noise. A file holds several sets of weights; the moving average is the one its authors evaluate. Their
muP base is their own width, so that its readouts are plain linear layers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.quantisers import codes_to_signs, signs_to_codes
from baselines.families.transformers import rotary, rotate, to_patches, to_pixels
from baselines.pretrained import Codes, Continuous, from_file
from baselines.published import PUBLISHED
from ssdd_models.layers import timestep_embedding
from tokbench.records.result import TokenizerInfo
from tokbench.runtime.seeding import normal

PATCH, TOKENS, HEADS = 4, 256, 12
GUIDANCE = 1.5
GUIDED = (0.17 / 1.17, 1.02 / 2.02)  # times between which it is applied: sigma / (1 + sigma) of 0.17 and 1.02
POWER = 4  # times are (i / steps) ** POWER


@dataclass(frozen=True)
class FlowMoConfig:
    bits: int  # of a code
    codes: int  # of a token
    encoder_width: int = 768
    decoder_width: int = 1152
    encoder_depth: int = 8
    decoder_depth: int = 16


CONFIGS = {"flowmo-lo": FlowMoConfig(9, 2), "flowmo-hi": FlowMoConfig(14, 4)}


class UnitScale(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype) * self.scale


class Embedding(nn.Module):
    """A time in [0, 1] -> [B, width]"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(256, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        sinusoids = timestep_embedding(1000 * t, 256).to(self.in_layer.weight.dtype)
        return self.out_layer(F.silu(self.in_layer(sinusoids)))


class Attention(nn.Module):
    """The projections of one stream; both streams attend to each other in DoubleBlock."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.ModuleDict({name: UnitScale(width // HEADS) for name in ("query_norm", "key_norm")})

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, width] -> three of [B, heads, N, d]"""
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.norm["query_norm"](q), self.norm["key_norm"](k), v


class Modulation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, 6 * width)


class Stream(nn.Module):
    """A block's weights for the codes or for the patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mod, self.attn = Modulation(width), Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def changes(self, time: Tensor | None) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention and of the MLP; without a time none changes anything."""
        if time is None:
            zero, one = torch.zeros(()), torch.ones(())
            return zero, zero, one, zero, zero, one
        return self.mod.lin(F.silu(time))[:, None].chunk(6, dim=2)


class DoubleBlock(nn.Module):
    """Codes and patches with weights of their own and one attention over both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.txt, self.img = Stream(width), Stream(width)

    def forward(
        self, codes: Tensor, patches: Tensor, time: Tensor | None, places: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """[B, N, width] each; `places` are cosines and sines [N, d / 2] of both in turn."""
        parts, changes = [], []
        for stream, x in ((self.txt, codes), (self.img, patches)):
            shift, scale, *rest = stream.changes(time)
            parts.append(stream.attn.split(norm(x) * (1 + scale) + shift))
            changes.append(rest)
        q, k, v = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        # muP's scale, which is the usual one at 64 channels a head.
        h = F.scaled_dot_product_attention(rotate(q, places), rotate(k, places), v, scale=8 / q.shape[3])
        seen = h.transpose(1, 2).flatten(2).split([codes.shape[1], patches.shape[1]], dim=1)
        out = []
        for stream, x, attended, rest in zip((self.txt, self.img), (codes, patches), seen, changes, strict=True):
            gate, shift, scale, last_gate = rest
            x = x + gate * stream.attn.proj(attended)
            out.append(x + last_gate * stream.mlp(norm(x) * (1 + scale) + shift))
        return out[0], out[1]


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Last(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        if time is not None:
            shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, dim=2)
            x = (1 + scale) * norm(x) + shift
        return self.linear(norm(x))


class Transformer(nn.Module):
    """Patches of an image and a sequence of codes, both in and both out."""

    def __init__(self, width: int, depth: int, channels: int) -> None:
        super().__init__()
        pixels = 3 * PATCH**2
        unit = width // HEADS // 16
        self.channels = (2 * unit, 7 * unit, 7 * unit)  # of a head: for the place in the codes, row and column
        self.time_in = Embedding(width)
        self.img_in, self.txt_in = nn.Linear(pixels, width), nn.Linear(channels, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(width) for _ in range(depth))
        self.final_layer_img, self.final_layer_txt = Last(width, pixels), Last(width, channels)

    def forward(self, image: Tensor, codes: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W], [B, N, c], times [B] or None -> the same shapes"""
        rows, columns = image.shape[2] // PATCH, image.shape[3] // PATCH
        index = torch.arange(rows * columns, device=image.device)
        grid = torch.stack((torch.zeros_like(index), index // columns, index % columns), dim=1)
        order = torch.arange(codes.shape[1], device=image.device)[:, None].expand(-1, 3)
        places = rotary(torch.cat((order, grid)), self.channels)
        time = None if t is None else self.time_in(t)
        txt, img = self.txt_in(codes), self.img_in(to_patches(image, PATCH))
        for block in self.double_blocks:
            txt, img = block(txt, img, time, places)
        return to_pixels(self.final_layer_img(img, time), PATCH, columns), self.final_layer_txt(txt, time)


class FlowMo(nn.Module):
    """Codes int64 [B, 256 * codes a token], those of a token one after the other."""

    def __init__(self, config: FlowMoConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.bits * config.codes
        self.encoder = Transformer(config.encoder_width, config.encoder_depth, channels)
        self.decoder = Transformer(config.decoder_width, config.decoder_depth, channels + 1)

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, 3, 256, 256] in [-1, 1] -> (codes,); bit i of a code is the sign of its i-th channel"""
        z = self.encoder(x, x.new_zeros(len(x), TOKENS, self.config.bits * self.config.codes), None)[1]
        return (signs_to_codes(z.unflatten(2, (self.config.bits, self.config.codes)), 2).flatten(1),)

    def signs(self, codes: Tensor) -> Tensor:
        """codes -> [B, 256, channels + 1], the last channel one: "there is a code"."""
        signs = codes_to_signs(codes.unflatten(1, (TOKENS, -1)), self.config.bits, 2).flatten(2)
        return F.pad(signs.float(), (0, 1), value=1.0)

    def sample(self, noise: Tensor, codes: Tensor, steps: int) -> Tensor:
        """Euler's method from noise [B, 3, H, W] at time 1 to the image at time 0."""
        dtype = self.decoder.img_in.weight.dtype
        condition = self.signs(codes).to(dtype)
        x, times = noise.to(dtype), schedule(steps)
        for t, following in zip(times, [*times[1:], 0.0], strict=True):
            now = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
            velocity = self.decoder(x, condition, now)[0]
            if guided(t):
                free = self.decoder(x, torch.zeros_like(condition), now)[0]
                velocity = free + GUIDANCE * (velocity - free)
            x = x - (t - following) * velocity
        return x


def schedule(steps: int) -> list[float]:
    """Times of the steps, from 1 down."""
    return [(i / steps) ** POWER for i in range(steps, 0, -1)]


def guided(t: float) -> bool:
    return GUIDED[0] <= t <= GUIDED[1]


class Stochastic(Codes):
    """Decodes from noise that belongs to each image's seed."""

    steps: int

    def __init__(self, model: FlowMo, info: TokenizerInfo, shift: Any = 0.0, scale: Any = 1.0) -> None:
        super().__init__(model, info)
        self.model = model

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """codes int64 [B, N] -> float32 [B, 3, H, W]; `seeds` give the noise."""
        noise = normal(seeds, (3, *size), device=latents.device)
        return self.model.sample(noise, latents, self.steps).float()


def own_names(held: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameters of the blocks' streams by stream, then by part."""
    return {re.sub(r"\.(img|txt)_(mod|attn|mlp)\.", r".\1.\2.", key): value for key, value in held.items()}


def published(name: str, file: Path | None, random_weights: bool, weights: str | None, steps: int) -> Continuous:
    """A row of CONFIGS from `file`, or from the hub, or with random weights.

    Raises CellError if the file is missing, damaged, pickled or does not fit.
    """
    row = replace(PUBLISHED[name], decode_steps=steps + sum(map(guided, schedule(steps))))
    tokenizer = from_file(row, file, random_weights, weights, partial(FlowMo, CONFIGS[name]), own_names, Stochastic)
    assert isinstance(tokenizer, Stochastic)
    tokenizer.steps = steps
    return tokenizer
