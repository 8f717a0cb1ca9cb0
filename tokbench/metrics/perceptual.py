"""Perceptual distances of image pairs: LPIPS (Zhang et al. 2018, v0.1), DISTS (Ding et al. 2020).

`lpips_network(net)` is an nn.Module for training losses, differentiable in both arguments; the scorers take uint8
images and run without gradients. Both sides go through the network in one batch.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokbench import weights

# Per backbone: channels, kernel, padding and the pooling before each convolution; taps are after these convolutions.
_ALEX = {"channels": (64, 192, 384, 256, 256), "kernels": (11, 5, 3, 3, 3), "strides": (4, 1, 1, 1, 1)}
_ALEX |= {"paddings": (2, 2, 1, 1, 1), "pooled": (1, 2), "taps": (0, 1, 2, 3, 4), "pool": (3,)}
_VGG = {"channels": (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512), "kernels": (3,) * 13}
_VGG |= {"strides": (1,) * 13, "paddings": (1,) * 13, "pooled": (2, 4, 7, 10), "taps": (1, 3, 6, 9, 12), "pool": (2,)}
_BACKBONES = {"alex": _ALEX, "vgg": _VGG}


class Backbone(nn.Module):
    """The convolutions of AlexNet or VGG16, giving the five activations that LPIPS and DISTS compare."""

    def __init__(self, net: str) -> None:
        super().__init__()
        plan = _BACKBONES[net]
        self.pooled, self.taps, self.pool = plan["pooled"], plan["taps"], plan["pool"][0]
        widths = (3, *plan["channels"])
        geometry = zip(plan["kernels"], plan["strides"], plan["paddings"], strict=True)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[index], widths[index + 1], kernel, stride, padding)
            for index, (kernel, stride, padding) in enumerate(geometry)
        )
        self.widths = tuple(plan["channels"][tap] for tap in self.taps)

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for index, conv in enumerate(self.convs):
            if index in self.pooled:
                x = F.max_pool2d(x, self.pool, 2)
            x = F.relu(conv(x))
            if index in self.taps:
                taps.append(x)
        return taps


class LPIPS(nn.Module):
    """LPIPS v0.1: weighted squared distances of unit-length activations, averaged over positions, summed over layers.

    eps is added to the activations' length: 1e-10 is the lpips package's value; 1e-8 under the root, as `safe` does,
    keeps the gradient finite where all activations of a position are zero.
    """

    def __init__(self, net: str, *, safe: bool = False) -> None:
        super().__init__()
        self.backbone = Backbone(net)
        self.heads = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in self.backbone.widths)
        self.safe = safe
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def normalised(self, activation: Tensor) -> Tensor:
        """Unit length over channels."""
        squares = activation.square().sum(1, keepdim=True)
        if self.safe:
            return activation * torch.rsqrt(squares + 1e-8)
        return activation / (squares.sqrt() + 1e-10)

    def features(self, images: Tensor) -> list[Tensor]:
        """float [B, 3, H, W] in [-1, 1] -> five unit-length activations [B, C, h, w]."""
        return [self.normalised(tap) for tap in self.backbone((images - self.shift) / self.scale)]

    def distance(self, real: list[Tensor], fake: list[Tensor]) -> Tensor:
        """Two lists of `features` -> [B]."""
        terms = [
            torch.einsum("bchw,c->b", (a - b).square(), head) / (a.shape[2] * a.shape[3])
            for a, b, head in zip(real, fake, self.heads, strict=True)
        ]
        return torch.stack(terms).sum(0)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1], twice -> [B]. At least 32 pixels a side (alex) or 16 (vgg)."""
        return self.distance(self.features(real), self.features(fake))


def lpips_network(net: str, *, safe: bool = True, fetch: bool = True) -> LPIPS:
    """LPIPS of "alex" or "vgg" with its weights, frozen, on the CPU: (real, fake) in [-1, 1] -> [B].

    `safe` normalises with a finite gradient everywhere, for use as a loss (values differ by less than 1e-4). Raises
    WeightsError if the weights are not here and cannot be fetched.
    """
    name = f"lpips-{net}"
    path = weights.fetch(name) if fetch else weights.locate(name)
    if path is None:
        raise weights.WeightsError(weights.missing(name))
    network = LPIPS(net, safe=safe)
    tensors = weights.load(path)
    renamed = {key if key.startswith("heads") else f"backbone.{key}": tensor for key, tensor in tensors.items()}
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        raise weights.WeightsError(f"{path} does not hold the weights of {name} ({error})") from None
    return network.eval().requires_grad_(False)
