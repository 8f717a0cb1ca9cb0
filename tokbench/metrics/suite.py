"""What runs in torch while images pass by: scorers that fill columns, extractors that fill features.

    tools = instruments(find_metrics(names), num_images, resolution, device)
    for score in tools.scorers:
        columns |= score(real, fake, decoded)   # uint8 [B, 3, H, W] twice -> {column: float [B]} on the device
    for name, extract in tools.extractors.items():
        features["fake", name] = extract(fake)
    tools.unavailable                       # {metric: reason}: those are not to be computed

`decoded` is the decoder's float output, which only lpips-vgg-unclamped reads; None where there is none.
Nothing here waits for a GPU. The side of the real images is computed once for all fakes of the same batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokbench import weights
from tokbench.data.pixels import to_float
from tokbench.errors import InputError
from tokbench.metrics import METRICS, Metric, dreamsim, perceptual, pixel
from tokbench.metrics.extractors import EXTRACTORS, Extractor, extractors
from tokbench.runtime.device import precision

Scorer = Callable[[Tensor, Tensor, Tensor | None], Mapping[str, Tensor]]


@dataclass
class Instruments:
    """Everything a set of metrics needs. `columns` are those the scorers fill."""

    scorers: list[Scorer] = field(default_factory=list)
    extractors: dict[str, Extractor] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)


def squared_error_and_psnr(real: Tensor, fake: Tensor, decoded: Tensor | None = None) -> dict[str, Tensor]:
    """Columns mse (on the scale [0, 1]) and psnr."""
    errors = pixel.squared_error(real, fake)
    return {"mse": errors, "psnr": pixel.psnr(errors)}


def _network_input(images: Tensor) -> Tensor:
    return to_float(images.contiguous(memory_format=torch.channels_last))


class NetworkScorer:
    """A column from a network that compares `features` of both sides; those of the last real batch are kept.

    `unclamped`: it takes the decoder's own output instead of the 8-bit image.
    """

    def __init__(self, column: str, network: Any, *, unclamped: bool = False) -> None:
        self.column, self.network, self.unclamped = column, network, unclamped
        self.real: Tensor | None = None
        self.kept: list[Tensor] = []

    def __call__(self, real: Tensor, fake: Tensor, decoded: Tensor | None = None) -> dict[str, Tensor]:
        with precision(real.device, torch.float32):
            if real is not self.real:
                self.real, self.kept = real, self.network.features(_network_input(real))
            if not self.unclamped:
                images = _network_input(fake)
            elif decoded is None:
                raise InputError(f"{self.column} needs a decoder's output, not images")
            else:
                images = decoded.float().contiguous(memory_format=torch.channels_last)
            return {self.column: self.network.distance(self.kept, self.network.features(images))}


UNCLAMPED = "lpips-vgg-unclamped"
_PIXELS: dict[str, tuple[Scorer, int]] = {  # column -> scorer, smallest side
    "mse": (squared_error_and_psnr, 1),
    "psnr": (squared_error_and_psnr, 1),
    "ssim": (lambda real, fake, _: {"ssim": pixel.ssim(real, fake)}, 7),
    "ssim-range2": (lambda real, fake, _: {"ssim-range2": pixel.ssim(real, fake, data_range=2)}, 7),
    "ssim-gauss": (lambda real, fake, _: {"ssim-gauss": pixel.ssim_gauss(real, fake)}, 11),
    "ssim-gauss-signed": (lambda real, fake, _: {"ssim-gauss-signed": pixel.ssim_gauss(real, fake, signed=True)}, 11),
    "ms-ssim": (lambda real, fake, _: {"ms-ssim": pixel.ms_ssim(real, fake)}, pixel.MS_MINIMUM),
}
_NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "lpips-alex": (lambda: perceptual.lpips_network("alex", safe=False), 32),
    "lpips-vgg": (lambda: perceptual.lpips_network("vgg", safe=False), 16),
    "lpips-vgg-unclamped": (lambda: perceptual.lpips_network("vgg", safe=False), 16),
    "dists": (perceptual.dists_network, 16),
    "dreamsim": (dreamsim.dreamsim_network, 1),
    "dreamsim-dino": (lambda: dreamsim.dreamsim_network("dreamsim-dino"), 1),
    "dreamsim-native": (lambda: dreamsim.dreamsim_network(native=True), 16),
}


def _scored(metric: Metric, real: Tensor, fake: Tensor, _: Tensor | None) -> dict[str, Tensor]:
    assert metric.score is not None
    return {metric.name: metric.score(real, fake)}


def scorers(columns: Sequence[str], device: torch.device | str = "cpu") -> list[Scorer]:
    """What fills these columns. WeightsError if a network's weights are missing."""
    found: list[Scorer] = []
    for column in columns:
        if column in _PIXELS:
            scorer = _PIXELS[column][0]
            if scorer not in found:
                found.append(scorer)
        elif column in METRICS and METRICS[column].score:
            found.append(partial(_scored, METRICS[column]))
        elif column in _NETWORKS:
            network = _NETWORKS[column][0]().to(device).to(memory_format=torch.channels_last)
            found.append(NetworkScorer(column, network, unclamped=column == UNCLAMPED))
    return found


def instruments(
    metrics: Sequence[Metric], num_images: int, resolution: int, device: torch.device | str = "cpu"
) -> Instruments:
    """Scorers and extractors for these metrics, networks fetched; what cannot be had is named with its reason.

    A metric that so few images cannot give needs nothing; its value will be null and say so.
    """
    tools = Instruments()
    wanted: dict[str, list[Metric]] = {}
    for metric in metrics:
        if num_images < metric.minimum:
            continue
        sides = [{**_PIXELS, **_NETWORKS}[c][1] for c in metric.columns if c in _PIXELS or c in _NETWORKS]
        if sides and resolution < max(sides):
            tools.unavailable[metric.name] = f"needs images of {max(sides)} pixels a side, these have {resolution}"
            continue
        try:
            for network in metric.networks:
                weights.fetch(network)
            new = [column for column in metric.columns if column not in tools.columns]
            tools.scorers += [scorer for scorer in scorers(new, device) if scorer not in tools.scorers]
        except weights.WeightsError as error:
            tools.unavailable[metric.name] = str(error)
            continue
        tools.columns += new
        if metric.extractor in EXTRACTORS:
            wanted.setdefault(EXTRACTORS[metric.extractor].network, []).append(metric)
    for readers in wanted.values():  # together: extractors of one network share it
        try:
            tools.extractors |= extractors([metric.extractor or "" for metric in readers], device)
        except weights.WeightsError as error:
            tools.unavailable |= {metric.name: str(error) for metric in readers}
    return tools
