"""Per-image scores from pixels: squared error, the SSIM family, colour. uint8 [B, 3, H, W], real and fake -> [B].

Windows are only placed where they fit ("valid"), which is what scikit-image's crop of the border comes to.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokbench.metrics import IDENTICAL, SEAM
from tokbench.runtime.device import exact_device, precision
from tokbench.runtime.tiling import Tiling

C1, C2 = 0.01**2, 0.03**2  # Wang et al. 2004, for data_range 1
GAUSSIAN = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
GAUSSIAN /= GAUSSIAN.sum()
UNIFORM = torch.full((7,), 1 / 7, dtype=torch.float64)
MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli & Bovik 2003
MS_MINIMUM = 161  # pixels a side, for an 11-pixel window after four halvings
# sRGB (IEC 61966-2-1) to XYZ, and its white D65 seen at 2 degrees.
XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)
COLOUR_COLUMNS = ("bias-red", "bias-green", "bias-blue", "bias-saturation", "ciede2000", "clipped")


def squared_error(real: Tensor, fake: Tensor) -> Tensor:
    """Mean squared error on the scale [0, 1], float64 [B], exact: it is summed from whole numbers."""
    difference = real.to(torch.int16) - fake.to(torch.int16)
    squares = difference.float().square_().flatten(1).to(exact_device(real.device))
    return squares.mean(1, dtype=torch.float64) / 255**2


def psnr(errors: Tensor) -> Tensor:
    """Squared error [B] -> decibels, at most 100, which is also what identical images get."""
    return (-10 * torch.log10(errors)).clamp(max=IDENTICAL)


def seam(real: Tensor, fake: Tensor, tiling: Tiling) -> dict[str, Tensor]:
    """What tile borders do: columns seam, in levels of 255, and tile-borders, how many lines of the image are one.

    The error is fake - real. Its mean absolute change from one side of an overlap to the other, less the same change
    over the same distance elsewhere: 0 where no border shows, about the step where colours shift from tile to tile.
    """
    error = fake.to(torch.int16) - real.to(torch.int16)
    reach = tiling.overlap // 2
    distance = 2 * reach + 1
    across, elsewhere = [], []
    for dim in (2, 3):
        borders = tiling.borders(error.shape[dim])
        pairs = error.shape[dim] - distance  # of lines that far apart, by the first of them
        if not borders or pairs < 1:
            continue
        change = error.narrow(dim, distance, pairs) - error.narrow(dim, 0, pairs)
        lines = change.abs_().float().mean((1, 5 - dim))  # [B, pairs]
        middles = [border - 1 - reach for border in borders]
        across.append(lines[:, [line for line in middles if 0 <= line < pairs]])
        within = [i for i in range(pairs) if not any(i < border <= i + distance for border in borders)]
        elsewhere.append(lines[:, within])
    if not across or not torch.cat(elsewhere, 1).shape[1]:
        zero = torch.zeros(len(real), dtype=torch.float64)
        return {SEAM: zero, "tile-borders": zero}
    there = torch.cat(across, 1)
    value = there.mean(1, dtype=torch.float64) - torch.cat(elsewhere, 1).mean(1, dtype=torch.float64)
    return {SEAM: value, "tile-borders": torch.full_like(value, there.shape[1])}


def ssim(real: Tensor, fake: Tensor, *, data_range: float = 1.0) -> Tensor:
    """scikit-image's default for RGB: uniform 7x7 window, sample covariance, mean over channels. At least 7 pixels.

    data_range other than 1 is LlamaGen's mistake: constants for a range of 2 with images in [0, 1].
    """
    luminance, structure = _ssim_maps(_unit(real), _unit(fake), UNIFORM, 49 / 48, data_range)
    return (luminance * structure).mean((1, 2, 3))


def ssim_gauss(real: Tensor, fake: Tensor, *, signed: bool = False) -> Tensor:
    """Wang et al. 2004 on RGB: 11x11 Gaussian of sigma 1.5, population covariance. At least 11 pixels a side.

    signed: of the images in [-1, 1] with constants for a range of 2, as VA-VAE measures. SSIM's luminance term depends
    on where black is.
    """
    luminance, structure = _ssim_maps(_unit(real), _unit(fake), GAUSSIAN, 1.0, zero=0.5 if signed else 0.0)
    return (luminance * structure).mean((1, 2, 3))


def ms_ssim(real: Tensor, fake: Tensor) -> Tensor:
    """Multi-scale SSIM, five scales, RGB, 2x2 means between them; negative terms count as 0. At least 161 pixels."""
    x, y = _unit(real), _unit(fake)
    score = torch.ones(len(x), 3, dtype=x.dtype, device=x.device)
    for scale, weight in enumerate(MS_WEIGHTS):
        luminance, structure = _ssim_maps(x, y, GAUSSIAN, 1.0)
        last = scale == len(MS_WEIGHTS) - 1
        term = (luminance * structure if last else structure).mean((2, 3))
        score = score * term.clamp(min=0) ** weight
        if not last:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return score.mean(1)


def _unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return images.float().div_(255)


def _ssim_maps(
    x: Tensor, y: Tensor, window: Tensor, correction: float, data_range: float = 1.0, zero: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure terms [B, 3, h, w]; `correction` turns population into sample covariances.

    `zero`: the brightness in [0, 1] that luminance is counted from.

    Written as 1 - (squared difference) / (sum of squares): with d = x - y, 2 cov = var x + var y - var d. A flat area
    then costs no digits, as the small var d is not the difference of large numbers; centring helps the rest.
    """
    c1, c2 = C1 * data_range**2, C2 * data_range**2
    centre = x.mean((2, 3), keepdim=True)
    a, b = x - centre, y - centre
    mean_a, mean_b, squares, errors = _filter([a, b, a * a + b * b, (a - b).square()], window)
    apart = (mean_a - mean_b).square()
    variances = correction * (squares - mean_a.square() - mean_b.square())
    mean_x, mean_y = mean_a + centre - zero, mean_b + centre - zero
    luminance = 1 - apart / (mean_x.square() + mean_y.square() + c1)
    return luminance, 1 - correction * (errors - apart) / (variances + c2)


def _filter(maps: Sequence[Tensor], window: Tensor) -> tuple[Tensor, ...]:
    """Separable window over each map [B, 3, H, W]. Depthwise in channels_last is several times faster than the rest."""
    stacked = torch.cat(list(maps), 1).contiguous(memory_format=torch.channels_last)
    channels = stacked.shape[1]
    kernel = window.to(stacked.dtype).to(stacked.device, non_blocking=True).repeat(channels, 1, 1, 1)
    with precision(stacked.device, torch.float32):
        stacked = F.conv2d(stacked, kernel.transpose(2, 3), groups=channels)
        return F.conv2d(stacked, kernel, groups=channels).chunk(len(maps), 1)


# ---- colour: signed errors are fake less real -----------------------------------------------------------------------


def colour_errors(real: Tensor, fake: Tensor, _: Tensor | None = None) -> dict[str, Tensor]:
    """All columns of colour, of one pass over the pixels."""
    bias = (fake.float() - real.float()).mean((2, 3))  # [B, 3], exact up to 16 million
    saturated = (saturation(fake) - saturation(real)).mean((1, 2))
    clipped = (extreme(fake) & ~extreme(real)).float().mean((1, 2, 3))
    columns = (*bias.unbind(1), saturated, ciede2000(lab(real), lab(fake)).mean((1, 2)), clipped)
    return dict(zip(COLOUR_COLUMNS, columns, strict=True))


def extreme(images: Tensor) -> Tensor:
    """Which values are 0 or 255, bool."""
    return (images == 0) | (images == 255)


def saturation(images: Tensor) -> Tensor:
    """HSV's saturation, (max - min) / max, 0 of black: float [B, H, W] in [0, 1]."""
    least, most = images.float().aminmax(dim=1)
    return (most - least) / most.clamp(min=1)


def lab(images: Tensor) -> Tensor:
    """uint8 sRGB -> CIELAB, float [B, 3, H, W]."""
    rgb = images.float() / 255
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    matrix = rgb.new_tensor(XYZ) / rgb.new_tensor(WHITE)[:, None]
    relative = torch.einsum("ij,bjhw->bihw", matrix, linear)
    x, y, z = torch.where(relative > 0.008856, relative.clamp(min=1e-9) ** (1 / 3), 7.787 * relative + 16 / 116).unbind(
        1
    )
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)


def ciede2000(first: Tensor, second: Tensor) -> Tensor:
    """Colour difference CIEDE2000 (CIE 142-2001; Sharma, Wu and Dalal 2005) of CIELAB [B, 3, H, W] -> [B, H, W]."""
    (l1, a1, b1), (l2, a2, b2) = first.unbind(1), second.unbind(1)
    chroma7 = ((torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * (chroma7 / (chroma7 + 25**7)).sqrt()
    c1, c2 = torch.hypot(a1 * stretch, b1), torch.hypot(a2 * stretch, b2)
    h1, h2 = torch.atan2(b1, a1 * stretch), torch.atan2(b2, a2 * stretch)
    lightness, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    turn = torch.remainder(h2 - h1 + torch.pi, 2 * torch.pi) - torch.pi  # the shorter way round
    hue = h1 + turn / 2
    along_hue = 2 * (c1 * c2).sqrt() * torch.sin(turn / 2)
    weight = 1 - 0.17 * torch.cos(hue - torch.pi / 6) + 0.24 * torch.cos(2 * hue)
    weight = weight + 0.32 * torch.cos(3 * hue + torch.pi / 30) - 0.20 * torch.cos(4 * hue - 7 * torch.pi / 20)
    centre = (lightness - 50) ** 2
    by_lightness = (l2 - l1) / (1 + 0.015 * centre / (20 + centre).sqrt())
    by_chroma, by_hue = (c2 - c1) / (1 + 0.045 * chroma), along_hue / (1 + 0.015 * chroma * weight)
    blue = torch.exp(-(((torch.remainder(torch.rad2deg(hue), 360) - 275) / 25) ** 2))
    chroma7 = chroma**7
    rotation = -2 * (chroma7 / (chroma7 + 25**7)).sqrt() * torch.sin(torch.deg2rad(60 * blue))
    squared = by_lightness**2 + by_chroma**2 + by_hue**2 + rotation * by_chroma * by_hue
    return squared.clamp(min=0).sqrt()
