"""Perceptual distances of image pairs: LPIPS (Zhang et al. 2018, v0.1), DISTS (Ding et al. 2020).

`lpips_network(net)` is an nn.Module for training losses, differentiable in both arguments; the scorers take uint8
images and run without gradients. Both sides go through the network in one batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokbench import weights
from tokbench.metrics.extractors import imagenet_normalised


@dataclass(frozen=True)
class BackboneLayout:
    """A backbone: its convolutions, before which of them it pools, and after which LPIPS reads activations."""

    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    paddings: tuple[int, ...]
    pooled: tuple[int, ...]
    pool: int  # window of the pooling, of stride 2
    taps: tuple[int, ...]


_VGG_CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
BACKBONES = {
    "alex": BackboneLayout(
        (64, 192, 384, 256, 256), (11, 5, 3, 3, 3), (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (1, 2), 3, (0, 1, 2, 3, 4)
    ),
    "vgg": BackboneLayout(_VGG_CHANNELS, (3,) * 13, (1,) * 13, (1,) * 13, (2, 4, 7, 10), 2, (1, 3, 6, 9, 12)),
}


class Backbone(nn.Module):
    """The convolutions of AlexNet or VGG16, giving the five activations that LPIPS and DISTS compare."""

    def __init__(self, net: str) -> None:
        super().__init__()
        self.layout = layout = BACKBONES[net]
        widths = (3, *layout.channels)
        geometry = zip(layout.kernels, layout.strides, layout.paddings, strict=True)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[index], widths[index + 1], kernel, stride, padding)
            for index, (kernel, stride, padding) in enumerate(geometry)
        )
        self.widths = tuple(layout.channels[tap] for tap in layout.taps)

    def forward(self, x: Tensor, pool: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        taps = []
        for index, conv in enumerate(self.convs):
            if index in self.layout.pooled:
                x = pool(x) if pool else F.max_pool2d(x, self.layout.pool, 2)
            x = F.relu(conv(x), inplace=True)  # saves a pass over memory, a sixth of the time on a CPU
            if index in self.layout.taps:
                taps.append(x)
        return taps


class LPIPS(nn.Module):
    """LPIPS v0.1: weighted squared distances of unit-length activations, averaged over positions, summed over layers.

    eps is added to the activations' length: 1e-10 is the lpips package's value; 1e-8 under the root, as `safe` does,
    keeps the gradient finite where all activations of a position are zero.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str, *, safe: bool = False) -> None:
        super().__init__()
        self.backbone = Backbone(net)
        self.heads = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in self.backbone.widths)
        self.safe = safe
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def normalised(self, activation: Tensor) -> Tensor:
        """Unit length over channels."""
        if self.safe:
            return activation * torch.rsqrt(activation.square().sum(1, keepdim=True) + 1e-8)
        length = torch.linalg.vector_norm(activation, dim=1, keepdim=True) + 1e-10
        return activation / length if torch.is_grad_enabled() else activation.div_(length)

    def features(self, images: Tensor) -> list[Tensor]:
        """float [B, 3, H, W] in [-1, 1] -> five unit-length activations [B, C, h, w]."""
        return [self.normalised(tap) for tap in self.backbone((images - self.shift) / self.scale)]

    def distance(self, real: list[Tensor], fake: list[Tensor]) -> Tensor:
        """Two lists of `features` -> float32 [B]; what autocast made bfloat16 is not added up in it."""
        terms = []
        with torch.autocast(real[0].device.type, enabled=False):
            for a, b, head in zip(real, fake, self.heads, strict=True):
                squares = (a.float() - b.float()).square_()
                # Channels last: the product with the head copies nothing.
                terms.append((squares.permute(0, 2, 3, 1) @ head).mean((1, 2)))
        return torch.stack(terms).sum(0)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1], twice -> [B]. At least 32 pixels a side (alex) or 16 (vgg)."""
        return self.distance(self.features(real), self.features(fake))


def lpips_network(net: str, *, safe: bool = True) -> LPIPS:
    """LPIPS of "alex" or "vgg" with its weights, frozen, on the CPU: (real, fake) in [-1, 1] -> [B].

    `safe` normalises with a finite gradient everywhere, for use as a loss (values differ by less than 1e-4). Raises
    WeightsError if the weights are not here and cannot be fetched.
    """
    name = f"lpips-{net}"
    return _filled(LPIPS(net, safe=safe), name, weights.fetch(name))


def _filled(network: LPIPS, name: str, path: Path) -> LPIPS:
    """The network with the tensors of a kept file, frozen."""
    tensors = weights.load(path)
    renamed = {key if key.startswith("heads") else f"backbone.{key}": tensor for key, tensor in tensors.items()}
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        raise weights.WeightsError(f"{path} does not hold the weights of {name} ({error})") from None
    return network.eval().requires_grad_(False)


class DISTS(nn.Module):
    """DISTS (Ding et al. 2020, eqs. 5-7): similarities of means and covariances of VGG16's activations and the image.

    Its VGG16 pools with the root of a blurred square instead of the maximum.
    """

    alpha: Tensor
    beta: Tensor
    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone("vgg")
        self.widths = (3, *self.backbone.widths)
        for name in ("alpha", "beta"):
            self.register_buffer(name, torch.zeros(sum(self.widths)))
        side = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("window", torch.outer(side, side).view(1, 1, 3, 3), persistent=False)

    def pool(self, x: Tensor) -> Tensor:
        """Root of the blurred square, every second position."""
        channels = x.shape[1]
        blurred = F.conv2d(x.square(), self.window.repeat(channels, 1, 1, 1), stride=2, padding=1, groups=channels)
        return (blurred + 1e-12).sqrt()

    def features(self, images: Tensor) -> list[Tensor]:
        """float [B, 3, H, W] in [-1, 1] -> the image in [0, 1] and five activations [B, C, h, w]."""
        images = images / 2 + 0.5
        return [images, *self.backbone(imagenet_normalised(images), self.pool)]

    def distance(self, real: list[Tensor], fake: list[Tensor]) -> Tensor:
        """Two lists of `features` -> [B]."""
        total = self.alpha.sum() + self.beta.sum()
        dissimilarity = torch.zeros(len(real[0]), device=real[0].device)
        alphas, betas = ((w / total).split(self.widths) for w in (self.alpha, self.beta))
        for x, y, alpha, beta in zip(real, fake, alphas, betas, strict=True):
            mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
            x, y = x - mean_x[..., None, None], y - mean_y[..., None, None]
            variances = (x * x).mean((2, 3)) + (y * y).mean((2, 3))
            means_agree = (2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6)
            texture_agrees = (2 * (x * y).mean((2, 3)) + 1e-6) / (variances + 1e-6)
            # Summed from the differences to 1, so that equal images are exactly 0 apart.
            dissimilarity = dissimilarity + (1 - means_agree) @ alpha + (1 - texture_agrees) @ beta
        return dissimilarity

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1], twice -> [B]."""
        return self.distance(self.features(real), self.features(fake))


def dists_network() -> DISTS:
    """DISTS with VGG16's convolutions from LPIPS's file, frozen. WeightsError if weights cannot be had."""
    network = DISTS()
    network.backbone = _filled(LPIPS("vgg"), "lpips-vgg", weights.fetch("lpips-vgg")).backbone
    path = weights.fetch("dists")
    tensors = weights.load(path)
    try:
        network.alpha.copy_(tensors["alpha"].flatten())
        network.beta.copy_(tensors["beta"].flatten())
    except (KeyError, RuntimeError) as error:
        raise weights.WeightsError(f"{path} does not hold the weights of dists ({error})") from None
    return network.eval().requires_grad_(False)
