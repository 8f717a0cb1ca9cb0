"""Randomness that depends on the image alone, so that batch size, order and number of processes change nothing."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def image_seeds(images: Tensor, seed: int) -> Tensor:
    """uint8 [B, 3, H, W] -> int64 [B]: a seed per image from (seed, hash of its pixels)."""
    salt = seed.to_bytes(8, "little", signed=True)
    digests = [hashlib.sha256(salt + image.contiguous().numpy().tobytes()).digest() for image in images.cpu()]
    return torch.tensor([int.from_bytes(digest[:8], "little") >> 1 for digest in digests], dtype=torch.int64)


def normal(seeds: Tensor, shape: Sequence[int], *, device: torch.device | str) -> Tensor:
    """Standard normal float32 [B, *shape], row i from a CPU generator seeded by seeds[i]: equal on every device."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds.tolist()]
    return torch.stack(rows).to(device, non_blocking=True)
