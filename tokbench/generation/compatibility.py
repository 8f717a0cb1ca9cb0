"""Whether a tokenizer decodes the latents that a generator makes: same grid, and the same numbers for the same images.

Two latent spaces can agree in shape and still differ in scale, shift or meaning, which no metadata tells and which
ruins every image. So a generator records what the encoder it was trained with makes of a few bundled photographs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokbench.data.crops import crop
from tokbench.data.open import open_source
from tokbench.errors import InputError
from tokbench.generation.latents import check_grid
from tokbench.protocols import find_protocol
from tokbench.runtime.device import hash_state, in_float64, precision
from tokbench.runtime.seeding import image_seeds
from tokbench.tokenizer import Tokenizer

NUM_PROBES = 4
TOLERANCE = 0.1  # relative distance of the recorded numbers: far above reduced precision, far below another space


@dataclass(frozen=True)
class LatentSpace:
    """What a generator says about the latents it makes."""

    tokenizer: str  # row name of the tokenizer whose encoder made the training latents
    weights: str | None  # sha256 of its state
    resolution: int  # of the images, pixels
    shape: tuple[int, ...]  # [channels, height, width] of a latent
    dtype: str  # float32, or uint8 of latents that are pixels
    probe: tuple[float, ...]  # mean, then standard deviation, of each channel of each probe image

    @property
    def downsample(self) -> float:
        return self.resolution / self.shape[1]


def probe_images(resolution: int) -> Tensor:
    """uint8 [NUM_PROBES, 3, resolution, resolution]: the first bundled photographs."""
    source = open_source("samples")
    crops = [crop(source.read(i), resolution, find_protocol("adm")) for i in range(NUM_PROBES)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def latent_space(tokenizer: Tokenizer, resolution: int, device: torch.device) -> LatentSpace:
    """The latent space of a tokenizer on the device. InputError if it makes no grid of continuous latents."""
    if resolution % tokenizer.info.size_multiple:
        raise InputError(
            f"{tokenizer.info.name}: resolution {resolution} is no multiple of {tokenizer.info.size_multiple}"
        )
    images = probe_images(resolution)

    def encode() -> Tensor:
        return tokenizer.encode(images.to(device), sample=False, seeds=image_seeds(images, 0))

    return measure(encode, tokenizer.info.name, hash_state(tokenizer), resolution, device)


def measure(
    encode: Callable[[], Tensor], name: str, weights: str | None, resolution: int, device: torch.device
) -> LatentSpace:
    """The latent space of whatever encodes the probe images."""
    with precision(device, torch.float32):
        latents = encode()
    check_grid(latents, name)
    flat = in_float64(latents).flatten(2)
    numbers = torch.cat((flat.mean(2), flat.std(2)), dim=1).flatten().cpu()
    dtype = "uint8" if latents.dtype == torch.uint8 else "float32"
    probe = tuple(round(value, 6) for value in numbers.tolist())
    return LatentSpace(name, weights, resolution, tuple(latents.shape[1:]), dtype, probe)


def check_fits(recorded: LatentSpace, tokenizer: Tokenizer, device: torch.device) -> None:
    """InputError with both values if the tokenizer's latents are not those that the generator was trained on."""
    info = tokenizer.info
    channels, factor = recorded.shape[0], recorded.downsample
    for what, mine, theirs in (("channels", channels, info.channels), ("downsampling", factor, info.downsample)):
        if theirs is not None and theirs != mine:
            raise InputError(f"{info.name} does not fit the generator: {what} {theirs:g}, the generator has {mine:g}")
    space = latent_space(tokenizer, recorded.resolution, device)
    if space.shape != recorded.shape:
        raise InputError(
            f"{info.name} does not fit the generator: latents {space.shape}, the generator makes {recorded.shape}"
        )
    trained, offered = np.array(recorded.probe), np.array(space.probe)
    distance = float(np.linalg.norm(trained - offered) / np.linalg.norm(trained))
    if distance > TOLERANCE:
        (m1, s1), (m2, s2) = (v.reshape(NUM_PROBES, 2, channels).mean((0, 2)) for v in (offered, trained))
        raise InputError(
            f"{info.name} does not fit the generator: its latents of {NUM_PROBES} test images have mean {m1:.3f} and "
            f"deviation {s1:.3f}, those of {recorded.tokenizer}, which the generator was trained on, {m2:.3f} and "
            f"{s2:.3f}; {distance:.0%} apart, so another latent space or normalisation"
        )
