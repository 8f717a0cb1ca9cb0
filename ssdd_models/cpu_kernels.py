"""Group norm and enlargement as this decoder needs them, where PyTorch's own kernels are slow or inexact on CPUs.

Elsewhere the same functions call PyTorch's kernels: what is computed is the same.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ScaledGroupNorm(torch.autograd.Function):
    """GroupNorm times a map plus a map, with a backward pass for CPUs: PyTorch's own takes ten times as long there.

    With n the normalised input and g = dy * scale, the gradient is rstd * (g - mean(g) - n * mean(g * n)) within
    each group; both means follow from the gradients of shift and scale, so that only two reductions are needed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float) -> Tensor:
        parts = num_strips(x, scale.shape[2])
        n, ratio, delta, rstd = strip_norm(x, groups, eps, parts)
        if parts > 1:
            n = strips(n.mul_(ratio).add_(delta), len(x), back=True)
        ctx.save_for_backward(n, scale, rstd)
        ctx.shift_batch, ctx.shift_dtype = len(shift), shift.dtype
        return spread(torch.addcmul, shift.to(n.dtype), n, scale.to(n.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        n, scale, rstd = ctx.saved_tensors
        square = (n.shape[2] // scale.shape[2], n.shape[3] // scale.shape[3])
        pixels = square[0] * square[1]
        dshift, dscale = ((F.avg_pool2d(m, square) if pixels > 1 else m).to(rstd.dtype) for m in (dy, dy * n))
        means = [(m * scale).mean((2, 3)).unflatten(1, (rstd.shape[1], -1)).mean(2) for m in (dshift, dscale)]
        per_channel = n.shape[1] // rstd.shape[1]
        first, second = ((-m * rstd).repeat_interleave(per_channel, 1)[:, :, None, None].to(n.dtype) for m in means)
        gain = scale * rstd.repeat_interleave(per_channel, 1)[:, :, None, None]
        dx = spread(torch.addcmul, torch.addcmul(first, n, second), dy, gain.to(n.dtype))
        dscale, dshift = dscale * pixels, dshift * pixels
        if len(scale) < len(n):
            dscale = dscale.sum(0, keepdim=True)
        if ctx.shift_batch < len(n):
            dshift = dshift.sum(0, keepdim=True)
        return dx, dscale.to(scale.dtype), dshift.to(ctx.shift_dtype), None, None


def spread(combine: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """Combine maps of pixels [B, C, H, W] with coarser ones [B, C, h, w], each of whose values serves a whole square.

    Broadcasting over the squares spares writing out the coarse maps enlarged.
    """
    rows, columns = min(m.shape[2] for m in maps), min(m.shape[3] for m in maps)
    cut = [m.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)) for m in maps]
    return combine(*cut).flatten(4, 5).flatten(2, 3)


def num_strips(x: Tensor, rows: int) -> int:
    """Into how many strips of rows to cut an image for its statistics: of 2,048 pixels at most, where sizes allow.

    PyTorch's kernel for channels_last on CPUs adds up squares one by one: its results are off by 3e-4 at 512 pixels
    and by 2e-3 at 1024. Other kernels are right. `rows` are those of a map that has to be cut as well (1: none).
    """
    if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
        return 1
    height, width = x.shape[2:]
    most = height if rows == 1 else rows
    return next((n for n in range(1, most) if most % n == 0 and height // n * width <= 2048), most)


def strips(x: Tensor, number: int, back: bool = False) -> Tensor:
    """[B, C, H, W] -> [B * number, C, H / number, W], or with `back` to a batch of `number`; a view."""
    batch = number if back else len(x) * number
    width, channels = x.shape[3], x.shape[1]
    return x.permute(0, 2, 3, 1).reshape(batch, -1, width, channels).permute(0, 3, 1, 2)


def strip_norm(x: Tensor, groups: int, eps: float, parts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise each strip by itself: n [B * parts, C, H / parts, W], ratio and delta [B * parts, C, 1, 1] with which
    n * ratio + delta is the whole image's GroupNorm, and its 1 / deviation [B, groups].
    """
    batch, channels, height, width = x.shape
    x = strips(x, parts) if parts > 1 else x
    ones = torch.ones(channels, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    n, mean, rstd = torch.native_group_norm(x, ones, None, len(x), channels, height // parts * width, groups, eps)
    mean, squares = mean.view(batch, parts, groups), rstd.view(batch, parts, groups) ** -2  # of each: variance + eps
    middle = mean.mean(1, keepdim=True)
    whole = (squares.mean(1, keepdim=True) + (mean - middle).square().mean(1, keepdim=True)).rsqrt()
    ratio, delta = (
        m.reshape(-1, groups).repeat_interleave(channels // groups, 1)[:, :, None, None]
        for m in (squares.sqrt() * whole, (mean - middle) * whole)
    )
    return n, ratio, delta, whole[:, 0]


def group_norm(x: Tensor, groups: int, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """GroupNorm(x) * scale + shift: x [B, C, H, W]; scale and shift [B or 1, C, h, w] with h | H and w | W."""
    on_cpu, gradients = x.device.type == "cpu", torch.is_grad_enabled()
    if on_cpu and gradients and not torch.compiler.is_compiling():
        return ScaledGroupNorm.apply(x, scale, shift, groups, eps)
    if not on_cpu and len(scale) == scale.shape[2] == scale.shape[3] == 1:
        return F.group_norm(x, groups, scale.flatten(), shift.flatten(), eps)
    if not on_cpu or gradients:
        return spread(torch.addcmul, shift, F.group_norm(x, groups, eps=eps), scale)
    if (parts := num_strips(x, scale.shape[2])) == 1:
        h = F.group_norm(x, groups, eps=eps)
    else:
        h, ratio, delta, _ = strip_norm(x, groups, eps, parts)
        if scale.shape[2] > 1:
            scale, shift = strips(scale, parts), strips(shift, parts)
        elif len(scale) > 1:
            scale, shift = scale.repeat_interleave(parts, 0), shift.repeat_interleave(parts, 0)
        scale, shift = scale * ratio, shift + scale * delta
    # h is a fresh tensor and may be written over: memory traffic is time, and mixed types are slow.
    h = spread(lambda h, scale, shift: h.mul_(scale).add_(shift), h, scale.to(h.dtype), shift.to(h.dtype))
    return strips(h, len(x), back=True) if parts > 1 else h


def upsample_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3x3 convolution (padding 1) of the nearest-neighbour enlargement: [B, C, H, W] -> [B, out, 2 H, 2 W].

    On a CPU by the one 4x4 transposed convolution that is the same map with 4/9 of the products.
    """
    if x.device.type != "cpu":
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    taps = x.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=conv.weight.dtype)
    kernel = torch.einsum("ka,lb,oiab->iokl", taps, taps, conv.weight)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)
