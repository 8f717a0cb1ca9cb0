"""The capacitor decoder (huggingface.co/data-archetype/capacitor_decoder): FLUX.2's latents to images in one step.

A convolutional diffusion decoder. Facts from its card and from its author's later autoencoder, which has the same
decoder (ComfyUI nodes of "canter"): normalised latents in 2 x 2 patches, images in [-1, 1], a variance-preserving
process whose log signal-to-noise ratio is a cosine's between 10 and -10, DDIM from noise of deviation 0.558. Sizes are
read from config.json. The names of the file's tensors are that autoencoder's, not seen in this file.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.hub import load_weights, part, read_config
from baselines.pretrained import Continuous, wrap
from baselines.published import PUBLISHED
from tokbench.errors import CellError
from tokbench.runtime.seeding import normal

DEFAULTS = {
    "patch_size": 16, "model_dim": 896, "decoder_depth": 8, "decoder_start_blocks": 2, "decoder_end_blocks": 2,
    "bottleneck_dim": 128, "mlp_ratio": 4.0, "depthwise_kernel_size": 7, "adaln_low_rank_rank": 128,
    "logsnr_min": -10.0, "logsnr_max": 10.0, "pixel_noise_std": 0.558,
}  # fmt: skip


class GlobalResponse(nn.Module):
    """ConvNeXt V2's normalisation of a channel by its norm over the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, width, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True).float()
        share = norms / (norms.mean(1, keepdim=True) + 1e-6)
        return self.gamma * (x * share.to(x.dtype)) + self.beta + x


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.pwconv1, self.pwconv2 = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.grn = GlobalResponse(hidden)

    def forward(self, x: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """[B, width, h, w], [B, width] twice -> as x"""
        h = self.dwconv(x)
        h = h * (h.float().square().mean(1, keepdim=True) + 1e-6).rsqrt().to(h.dtype)
        h = self.pwconv1(h * (1 + scale[:, :, None, None]))
        return x + gate[:, :, None, None] * self.pwconv2(self.grn(F.gelu(h)))


class Time(nn.Module):
    """[B] in [0, 1] -> [B, width]"""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 10000.0 ** -torch.linspace(0, 1, 128))
        self.proj_in, self.proj_out = nn.Linear(256, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        angles = 1000 * t[:, None] * self.freqs
        sinusoids = torch.cat([angles.sin(), angles.cos()], dim=1)
        return self.proj_out(F.silu(self.proj_in(sinusoids.to(self.proj_in.weight.dtype))))


class LowRank(nn.Module):
    """[B, width] -> [B, 2 width]: what a block adds to the common modulation."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Decoder(nn.Module):
    """A noisy image [B, 3, H, W], a time [B] and latents [B, c, H / 16, W / 16] -> the image."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, patch, rank = config["model_dim"], config["patch_size"], config["adaln_low_rank_rank"]
        counts = [config["decoder_start_blocks"], 0, config["decoder_end_blocks"]]
        counts[1] = config["decoder_depth"] - sum(counts)
        self.patchify = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.latent_up = nn.Conv2d(config["bottleneck_dim"], width, 1)
        self.fuse_in, self.fuse_skip = (nn.Conv2d(2 * width, width, 1) for _ in range(2))
        self.time_embed = Time(width)
        self.adaln_base = nn.ModuleDict({"proj": nn.Linear(width, 2 * width)})
        self.adaln_deltas = nn.ModuleList(LowRank(width, rank) for _ in range(config["decoder_depth"]))
        hidden, kernel = int(width * config["mlp_ratio"]), config["depthwise_kernel_size"]
        self.start_blocks, self.middle_blocks, self.end_blocks = (
            nn.ModuleList(Block(width, hidden, kernel) for _ in range(count)) for count in counts
        )
        self.out_proj = nn.Conv2d(width, 3 * patch**2, 1)
        self.patch = patch

    def forward(self, x: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        changes = iter(self.changes(t))
        start = self.fuse_in(torch.cat([self.patchify["proj"](x), self.latent_up(latents)], dim=1))
        for block in self.start_blocks:
            start = block(start, *next(changes))
        h = start
        for block in self.middle_blocks:
            h = block(h, *next(changes))
        h = self.fuse_skip(torch.cat([start, h], dim=1))
        for block in self.end_blocks:
            h = block(h, *next(changes))
        return F.pixel_shuffle(self.out_proj(h), self.patch)

    def changes(self, t: Tensor) -> list[tuple[Tensor, ...]]:
        """Scale and gate [B, width] of each block."""
        condition = F.silu(self.time_embed(t))
        base = self.adaln_base["proj"](condition)
        return [(base + delta(condition)).chunk(2, dim=1) for delta in self.adaln_deltas]


def signal_and_noise(t: float, config: Mapping[str, Any]) -> tuple[float, float]:
    """Their scales at a time in [0, 1], whose squares are one in sum."""
    first, last = (math.atan(math.exp(-config[key] / 2)) for key in ("logsnr_max", "logsnr_min"))
    angle = first + t * (last - first)
    return math.cos(angle), math.sin(angle)


class Capacitor(Continuous):
    """A decoder alone, to be written behind `flux2-vae+`."""

    decoder_config: Mapping[str, Any]
    steps: int

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """Raises CellError: there is no encoder."""
        raise CellError(f"{self.info.name}: a decoder alone; write flux2-vae+ before it")

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """float32 [B, 128, h, w], normalised -> float32 [B, 3, H, W]; `seeds` give the noise."""
        config = self.decoder_config
        network: Any = self.networks["decoder"].parts[0]
        dtype = network.out_proj.weight.dtype
        times = [step / self.steps for step in range(self.steps, -1, -1)]
        scales = [signal_and_noise(t, config) for t in times]
        x = normal(seeds, (3, *size), device=latents.device) * config["pixel_noise_std"] * scales[0][1]
        for t, (signal, noise), (next_signal, next_noise) in zip(times, scales, scales[1:], strict=False):
            now = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
            image = network(x.to(dtype), now, latents.to(dtype)).float()
            x = next_signal * image + next_noise * (x - signal * image) / noise
        return x


class DecoderOnly(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config, self.decoder = None, Decoder(config)


def own_names(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what serves guidance by dropping the middle blocks, which is off."""
    own = {key.removeprefix("decoder."): value for key, value in held.items()}
    return {key: value for key, value in own.items() if key != "path_drop_mask_feature"}


def published(name: str, file: Path | None, random_weights: bool, weights: str | None, steps: int) -> Continuous:
    """The row from the folder `file` with config.json and model.safetensors, or from the hub, or with random weights.

    Raises CellError if a file is missing, damaged or does not fit.
    """
    row = replace(PUBLISHED[name], decode_steps=steps)
    config = DEFAULTS | ({} if random_weights else read_config(part(row, file, "config.json"), name))
    model = DecoderOnly(config)
    if not random_weights:
        row = load_weights(model.decoder, part(row, file, "model.safetensors"), row, weights, own_names)
    tokenizer = wrap(model.eval(), row, random_weights, Capacitor)
    assert isinstance(tokenizer, Capacitor)
    tokenizer.decoder_config, tokenizer.steps = config, steps
    del tokenizer.networks["encoder"]
    return tokenizer
