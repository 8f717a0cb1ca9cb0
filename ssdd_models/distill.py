"""Distillation of SSDD into one step: the student learns the image that its teacher samples from the same noise."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ssdd_models.losses import Repa, flow_losses
from ssdd_models.ssdd import SSDD


def make_teacher(model: SSDD) -> SSDD:
    """A frozen copy in eval mode of the checkpoint that the student starts from."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def distillation_losses(
    student: SSDD,
    teacher: SSDD,
    z: Tensor,
    real: Tensor,
    noise: Tensor,
    steps: int,
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    repa: Repa | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Losses at t = 1 against the teacher's sample of `steps` steps from the same noise and the same z (a mode).

    Not the one-shot prediction from a noised real image that circulates in a fork: see the README. Of the real image
    only REPA learns. Returns what flow_losses does.
    """
    target = teacher.decode(z, steps=steps, noise=noise)
    t = torch.ones(len(z), device=z.device)
    return flow_losses(student, z, target.clone(), noise, t, perceptual=perceptual, repa=repa, real=real)
