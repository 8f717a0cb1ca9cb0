"""Between uint8 and float: the one place where pixels are scaled and rounded."""

import torch
from torch import Tensor

from tokbench.protocols import Rounding


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]; `quantise` inverts it exactly."""
    return images.float() / 127.5 - 1


def quantise(images: Tensor, rounding: Rounding) -> Tensor:
    """float [B, 3, H, W], nominal [-1, 1] -> uint8 by the protocol's rule, computed in float32."""
    images = images.float().clamp(-1, 1)
    if rounding == "nearest":  # floor(127.5 x + 128) is round half up, and exact for every x = u / 127.5 - 1
        return images.mul(127.5).add_(128).clamp_(max=255).to(torch.uint8)
    return images.add(1).div_(2).mul_(255).to(torch.uint8)
