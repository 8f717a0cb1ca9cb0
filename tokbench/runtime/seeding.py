"""Randomness that depends on the image alone: batch size, order, device and number of processes change nothing."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor

from tokbench.runtime.device import exact_device


def image_seeds(images: Tensor, seed: int) -> Tensor:
    """uint8 [B, 3, H, W] -> int64 [B], on the CPU: a seed per image from (seed, hash of its pixels)."""
    salt = seed.to_bytes(8, "little", signed=True)
    digests = [hashlib.sha256(salt + image.contiguous().numpy().tobytes()).digest() for image in images.cpu()]
    return torch.tensor([int.from_bytes(digest[:8], "little") >> 1 for digest in digests], dtype=torch.int64)


@dataclass
class Window:
    """A tile of an image, in pixels: what a model sees at a time."""

    top: int
    left: int
    size: tuple[int, int]  # height and width
    image: tuple[int, int]  # those of the whole image
    number: int
    drawn: bool = False  # whether noise was asked for

    def part(self, unit: int) -> tuple[EllipsisType, slice, slice]:
        """Its place in what has one value in `unit` pixels, [..., H / unit, W / unit]."""
        height, width = self.size
        rows = slice(self.top // unit, (self.top + height) // unit)
        return ..., rows, slice(self.left // unit, (self.left + width) // unit)


_window: ContextVar[Window | None] = ContextVar("window", default=None)


@contextmanager
def seen_through(window: Window) -> Iterator[None]:
    """Meanwhile `normal` gives the window's part of the whole image's noise."""
    token = _window.set(window)
    try:
        yield
    finally:
        _window.reset(token)


def normal(seeds: Tensor, shape: Sequence[int], *, device: torch.device | str) -> Tensor:
    """Standard normal float32 [B, *shape]; row i depends on seeds[i] alone, on every device alike to rounding.

    Counter based: SplitMix64 (Steele, Lea and Flood 2014) hashes (seed, position), Box-Muller makes two normals of
    each 64-bit hash. torch's own generators differ between CPU and CUDA and would need a call per image.
    """
    wanted, device = device, exact_device(device)
    seeds, window = seeds.to(device, non_blocking=True), _window.get()
    if window is not None:
        window.drawn = True
        if (unit := _unit(window, shape)) is not None:
            return _cut(window, unit, seeds, shape).to(wanted)
        seeds = seeds ^ (window.number << 40)  # what has no rows and columns is another in every tile
    count = math.prod(shape)
    radius, angle = _polar(seeds, torch.arange((count + 1) // 2, device=device))
    pairs = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)
    return pairs[:, :count].reshape(len(seeds), *shape).to(wanted)


def _unit(window: Window, shape: Sequence[int]) -> int | None:
    """Pixels between two values of [..., h, w] that lies on the window's grid; None for what does not."""
    unit = window.size[0] // shape[-2] if len(shape) > 2 else 0
    return unit if unit and window.size == (shape[-2] * unit, shape[-1] * unit) else None


def _cut(window: Window, unit: int, seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """The window's part of what `normal` gives for the whole image."""
    height, width = window.image[0] // unit, window.image[1] // unit
    planes, rows, columns = (torch.arange(n, device=seeds.device) for n in (math.prod(shape[:-2]), *shape[-2:]))
    rows, columns = rows + window.top // unit, columns + window.left // unit
    place = ((planes[:, None, None] * height + rows[:, None]) * width + columns).flatten()
    half = (len(planes) * height * width + 1) // 2
    radius, angle = _polar(seeds, place % half)
    return (radius * torch.where(place < half, angle.cos(), angle.sin())).reshape(len(seeds), *shape)


def _polar(seeds: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [B], int64 [N] -> Rayleigh radius and uniform angle, float32 [B, N], of each position."""
    state = seeds[:, None] + (position + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15
    state = (state ^ _shift_right(state, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    state = (state ^ _shift_right(state, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    state = state ^ _shift_right(state, 31)
    radius = ((_shift_right(state, 32) + 1).double() * 2.0**-32).log().mul(-2).sqrt().float()  # uniform in (0, 1]
    return radius, (state & 0xFFFFFFFF).double().mul(math.tau * 2.0**-32).float()


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: torch's >> keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def sample_seeds(seed: int, numbers: Sequence[int], stream: int) -> Tensor:
    """int64 [B]: a seed per sample number; `stream` separates the uses (posterior, time, noise)."""
    states = [np.random.SeedSequence((seed, stream, number)).generate_state(1, np.uint64)[0] for number in numbers]
    return torch.tensor([int(state >> np.uint64(1)) for state in states], dtype=torch.int64)
