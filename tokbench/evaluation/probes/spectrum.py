"""Where the error lies: by octave of spatial frequency, in luma and chroma, at edges and in flat areas."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokbench import registry
from tokbench.evaluation.probes.look import Base, Found, Look
from tokbench.metrics import IDENTICAL
from tokbench.metrics.conditions import OCTAVES, at
from tokbench.runtime.device import in_float64

# Y, Cb and Cr of R, G and B: ITU-R BT.601 as JPEG has it.
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
EDGES = 0.2  # of the pixels


def spectrum(look: Look, base: Base) -> Found:
    """All from the reconstruction that `run` measures."""
    with torch.inference_mode():
        real, fake = (ycbcr(images) for images in (base.real, base.fake))
        error = fake - real
        squares = error.square()
        steep = steepest(real[:, 0])
        rgb = (in_float64(base.real) - in_float64(base.fake)).square().mean(1)
        found = {
            "psnr-luma": decibel(squares[:, 0].mean((1, 2))),
            "psnr-chroma": decibel(squares[:, 1:].mean((1, 2, 3))),
            "psnr-edges": decibel((rgb * steep).sum((1, 2)) / steep.sum((1, 2))),
            "psnr-flat": decibel((rgb * ~steep).sum((1, 2)) / (~steep).sum((1, 2))),
        }
        for part, channels in (("luma", slice(0, 1)), ("chroma", slice(1, 3))):
            ratios = power(error[:, channels]) / power(real[:, channels])
            limited = (10 * ratios.nan_to_num(nan=0.0).log10()).clamp(-IDENTICAL, IDENTICAL)
            found |= {at(f"error-{part}", f"{octave}px"): limited[:, i] for i, octave in enumerate(OCTAVES)}
    return found


def ycbcr(images: Tensor) -> Tensor:
    """uint8 RGB [B, 3, H, W] -> float64 luma and chroma, both of levels from 0 to 255 without an offset."""
    levels = in_float64(images)
    return torch.einsum("yc,bchw->byhw", torch.tensor(YCBCR, dtype=torch.float64, device=levels.device), levels)


def decibel(squares: Tensor) -> Tensor:
    """Mean squared errors of 8-bit levels -> PSNR, at most that of identical images."""
    return (-10 * (squares / 255**2).log10()).clamp(max=IDENTICAL)


def steepest(luma: Tensor) -> Tensor:
    """float [B, H, W] -> bool: the fifth of each image's pixels where Sobel's gradient is largest."""
    smooth, slope = torch.tensor([[1.0, 2.0, 1.0]]), torch.tensor([[-1.0, 0.0, 1.0]])
    kernels = torch.stack([smooth.T @ slope, slope.T @ smooth])[:, None].to(luma)
    edges = F.conv2d(F.pad(luma[:, None], (1, 1, 1, 1), mode="reflect"), kernels).square().sum(1)
    chosen = torch.zeros_like(edges, dtype=torch.bool).flatten(1)
    count = math.ceil(EDGES * chosen.shape[1])
    return chosen.scatter(1, edges.flatten(1).topk(count).indices, True).view_as(edges)


def power(channels: Tensor) -> Tensor:
    """float64 [B, C, H, W] -> [B, octaves]: power by octave of spatial frequency, without the mean.

    Of the image under a Hann window: without one the jump between opposite borders would fill the short wavelengths.
    """
    height, width = channels.shape[2:]
    window = torch.outer(*(torch.hann_window(side, dtype=channels.dtype, device=channels.device)
                           for side in (height, width)))  # fmt: skip
    mean = (channels * window).mean((2, 3), keepdim=True) / window.mean()
    power = torch.fft.fft2((channels - mean) * window).abs().square().sum(1)
    rows, columns = (torch.fft.fftfreq(side, dtype=channels.dtype, device=channels.device) for side in (height, width))
    wavelength = 1 / torch.hypot(rows[:, None], columns[None])  # in pixels; infinite for the mean
    bands = []
    for i, shortest in enumerate(OCTAVES):
        longest = OCTAVES[i + 1] if i + 1 < len(OCTAVES) else math.inf
        inside = (wavelength < longest) & ((wavelength >= shortest) | (i == 0))  # corners are beyond two pixels
        bands.append((power * inside).sum((1, 2)))
    return torch.stack(bands, 1)


registry.register_probe(
    "spectrum", spectrum, summary="error by octave of spatial frequency, in luma and chroma, at edges and elsewhere"
)
