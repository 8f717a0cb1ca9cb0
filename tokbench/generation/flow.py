"""Flow matching along straight lines, in the convention of SiT's code (Ma et al. 2024, arXiv 2401.08740).

t runs from noise, t = 0, to data, t = 1:  x_t = t x + (1 - t) noise,  v = dx_t / dt = x - noise.
SSDD's decoder counts the other way (its t = 0 is the image); its v is the same difference at 1 - t.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Field = Callable[[Tensor, float], Tensor]  # x_t [B, ...] and t -> velocity
SAMPLERS = ("euler", "heun")


def _broadcast(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1))


def noised(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of data x and noise [B, ...] at times t [B]."""
    t = _broadcast(t, x)
    return t * x + (1 - t) * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """The regression target, the same at every t."""
    return x - noise


def draw_times(normal: Tensor, law: Literal["uniform", "logit-normal"]) -> Tensor:
    """Training times in [0, 1] from standard normal numbers of the same shape."""
    return torch.special.ndtr(normal) if law == "uniform" else torch.sigmoid(normal)


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    null: int,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Field:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): v_null + scale (v_label - v_null).

    Outside of the interval of t (Kynkaanniemi et al., arXiv 2404.07724), and at scale 1, it is v_label alone and
    costs one evaluation of the model instead of two.
    """

    def field(x_t: Tensor, t: float) -> Tensor:
        times = torch.full((len(x_t),), t, device=x_t.device)
        if scale == 1 or not interval[0] <= t <= interval[1]:
            return model(x_t, times, labels).float()
        both = torch.cat((labels, torch.full_like(labels, null)))
        with_label, without = model(torch.cat((x_t, x_t)), torch.cat((times, times)), both).float().chunk(2)
        return without + scale * (with_label - without)

    return field


def integrate(field: Field, noise: Tensor, steps: int, sampler: str) -> Tensor:
    """Follow the field from noise at t = 0 to data at t = 1 in equal steps.

    Euler evaluates the field once a step, Heun (the trapezoidal rule with an Euler predictor) twice.
    """
    x = noise
    for step in range(steps):
        t, t_next = step / steps, (step + 1) / steps
        v = field(x, t)
        if sampler == "heun":
            v = (v + field(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    return x
