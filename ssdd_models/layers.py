"""Building blocks shared by the encoder, both decoders and the discriminator. Imports torch alone."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import spectral_norm

Init = Literal["normal", "fan-in"]


def initialise(module: nn.Module, init: Init) -> None:
    """Set every convolution and linear layer below `module`; biases become 0, norms keep 1 and 0.

    "normal" is SSDD's own: convolutions N(0, 0.02), linear layers Xavier-uniform. "fan-in" draws convolutions from
    N(0, 1 / fan_in) instead: below about 128 channels N(0, 0.02) starves the signal and training stalls.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.is_meta:  # about to be loaded: spare the time
            return
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=0.02 if init == "normal" else 1 / math.sqrt(fan_in))
        elif isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of a time: [B] -> float32 [B, dim], cosines before sines, frequencies 10000^(-i / (dim / 2))."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(steps * (-math.log(10000.0) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


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
    if torch.is_grad_enabled():
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return ScaledGroupNorm.apply(x, scale, shift, groups, eps)
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


def affine_group_norm(
    norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """`norm(x)`, or norm(x) * (1 + scale) + shift with scale and shift [B, C, 1, 1]; [B, C, H, W] -> the same."""
    weight, bias = norm.weight.view(1, -1, 1, 1), norm.bias.view(1, -1, 1, 1)
    if scale is not None and shift is not None:
        weight, bias = weight * (1.0 + scale), bias * (1.0 + scale) + shift
    return group_norm(x, norm.num_groups, weight, bias, norm.eps)


class ResBlock(nn.Module):
    """The residual block of VQGAN and LDM (GroupNorm, swish, 3x3, twice), without a time input."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H, W]"""
        h = self.conv1(F.silu(affine_group_norm(self.norm1, x)))
        h = self.conv2(F.silu(affine_group_norm(self.norm2, h)))
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return skip + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map, with a residual."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        h = affine_group_norm(self.norm, x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # [B, 1, HW, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Half the size by a strided 3x3 convolution, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2]"""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def upsample_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3x3 convolution (padding 1) of the nearest-neighbour enlargement: [B, C, H, W] -> [B, out, 2 H, 2 W].

    On a CPU by the one 4x4 transposed convolution that is the same map with 4/9 of the products.
    """
    if x.device.type != "cpu":
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    taps = x.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=conv.weight.dtype)
    kernel = torch.einsum("ka,lb,oiab->iokl", taps, taps, conv.weight)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


class Upsample(nn.Module):
    """Twice the size by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]"""
        return upsample_conv(x, self.conv)


class Discriminator(nn.Module):
    """SSDD's optional GAN: is x the real image behind x_t at time t? Logits [B].

    Four strided 4x4 convolutions and a fifth without stride, spectrally normalised; each GroupNorm is shifted and
    scaled by the time. Widths, and that t enters unscaled, are those of public forks: the paper does not say.
    """

    def __init__(self, width: int = 64, time: int = 128) -> None:
        super().__init__()
        self.time = time
        self.time_embedding = nn.Sequential(nn.Linear(time, time), nn.SiLU(), nn.Linear(time, time))
        widths = [6, *(width * min(2**i, 8) for i in range(5))]
        self.convs = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride=2 if i < 4 else 1, padding=1))
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.modulations = nn.ModuleList(nn.Linear(time, 2 * b) for b in widths[1:])
        self.norms = nn.ModuleList(nn.GroupNorm(min(32, b), b, affine=False) for b in widths[1:])
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x, x_t [B, 3, H, W], at least 32 pixels a side; t [B] -> [B]"""
        temb = self.time_embedding(timestep_embedding(t, self.time))
        h = torch.cat([x, x_t], dim=1).clamp(-1.0, 1.0)
        for conv, norm, modulation in zip(self.convs, self.norms, self.modulations, strict=True):
            shift, scale = modulation(temb)[:, :, None, None].chunk(2, dim=1)
            h = F.leaky_relu(norm(conv(h)) * (1 + scale) + shift, 0.2)
        return self.head(h.mean((2, 3)))[:, 0]
