"""The one interface a tokenizer has to offer."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from tokbench.result import TokenizerInfo


class Tokenizer(Protocol):
    """uint8 images go in, float images come out; the harness alone clamps, rounds and checks for NaN.

    Scale and shift of a latent space live inside encode and decode, so no caller can forget them: the latents that
    travel are normalised, (z - shift) * scale, and decode undoes it.

    `networks` names the parts ("encoder", "decoder") that hold parameters; {} for a codec. The harness moves them to
    the device, sets eval mode and the memory format, counts their parameters and hashes their state: a factory
    returns them as loaded, on the CPU. A part shared by both directions is named once, under "encoder".
    """

    info: TokenizerInfo
    networks: Mapping[str, nn.Module]

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> latents [B, ...] of any shape, on the images' device; int64 are codes.

        `sample` draws from the posterior instead of taking its mode, with a generator per image (tokbench.seeding).
        """
        ...

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """latents -> float32 [B, 3, H, W], nominal [-1, 1], unclamped. `seeds` int64 [B]: one generator per image."""
        ...

    # optional: bits(latents) -> float64 Tensor [B], the measured size of the code, for codecs and discrete tokenizers
