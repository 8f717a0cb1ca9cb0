"""Randomness that depends on the image alone: batch size, order, device and number of processes change nothing."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokbench.runtime.device import exact_device


def image_seeds(images: Tensor, seed: int) -> Tensor:
    """uint8 [B, 3, H, W] -> int64 [B], on the CPU: a seed per image from (seed, hash of its pixels)."""
    salt = seed.to_bytes(8, "little", signed=True)
    digests = [hashlib.sha256(salt + image.contiguous().numpy().tobytes()).digest() for image in images.cpu()]
    return torch.tensor([int.from_bytes(digest[:8], "little") >> 1 for digest in digests], dtype=torch.int64)


def normal(seeds: Tensor, shape: Sequence[int], *, device: torch.device | str) -> Tensor:
    """Standard normal float32 [B, *shape]; row i depends on seeds[i] alone, on every device alike to rounding.

    Counter based: SplitMix64 (Steele, Lea and Flood 2014) hashes (seed, position), Box-Muller makes two normals of
    each 64-bit hash. torch's own generators differ between CPU and CUDA and would need a call per image.
    """
    wanted, device = device, exact_device(device)
    count = math.prod(shape)
    position = torch.arange(1, (count + 1) // 2 + 1, device=device, dtype=torch.int64)
    state = seeds.to(device, non_blocking=True)[:, None] + position * -7046029254386353131  # 0x9E3779B97F4A7C15
    state = (state ^ _shift_right(state, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    state = (state ^ _shift_right(state, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    state = state ^ _shift_right(state, 31)
    radius = ((_shift_right(state, 32) + 1).double() * 2.0**-32).log().mul(-2).sqrt().float()  # uniform in (0, 1]
    angle = (state & 0xFFFFFFFF).double().mul(math.tau * 2.0**-32).float()
    pairs = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)
    return pairs[:, :count].reshape(len(seeds), *shape).to(wanted)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: torch's >> keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def sample_seeds(seed: int, numbers: Sequence[int], stream: int) -> Tensor:
    """int64 [B]: a seed per sample number; `stream` separates the uses (posterior, time, noise)."""
    states = [np.random.SeedSequence((seed, stream, number)).generate_state(1, np.uint64)[0] for number in numbers]
    return torch.tensor([int(state >> np.uint64(1)) for state in states], dtype=torch.int64)
