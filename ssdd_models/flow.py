"""Flow matching between images (t = 0) and noise (t = 1), and the sampler that runs it backwards. Imports torch alone.

SSDD (arXiv 2510.04961): x_t = (1 - t) x + t noise, and the network learns v = x - noise = -dx_t / dt.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], to multiply with a batch of any number of dimensions."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t noise; x, noise [B, ...], t [B] in [0, 1]"""
    t = per_sample(t, x)
    return (1.0 - t) * x + t * noise


def predict_clean(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The image at t = 0 on the straight line through x_t: x_t + t v."""
    return x_t + per_sample(t, x_t) * v


def sampler_times(steps: int, shift: float = 2.0) -> list[float]:
    """steps + 1 times from 1 to 0, linspace(1, 0) ** shift. ValueError if steps < 1 or shift <= 0."""
    if steps < 1 or shift <= 0:
        raise ValueError(f"sampler steps {steps}, time shift {shift}: both must be positive")
    return (torch.linspace(1.0, 0.0, steps + 1) ** shift).tolist()


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int, shift: float = 2.0) -> Tensor:
    """Integrate from noise [B, ...] at t = 1 to t = 0; velocity(x_t, t [B]) is called `steps` times. Float32 state."""
    x = noise
    times = sampler_times(steps, shift)
    for now, after in pairwise(times):
        v = velocity(x, torch.full((len(x),), now, device=x.device))
        x = x + (now - after) * v.to(x.dtype)
    return x
