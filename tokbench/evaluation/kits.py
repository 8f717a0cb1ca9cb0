"""The metrics of a run and the networks behind them: named at once, loaded when the first cell needs them."""

from collections.abc import Sequence

import torch

from tokbench import weights
from tokbench.metrics import find_metrics
from tokbench.metrics.suite import Instruments, instruments


class Kits:
    """What measures images of any resolution; each network is loaded once per resolution and kept."""

    def __init__(self, names: Sequence[str], num_images: int, device: torch.device) -> None:
        """InputError for an unknown metric. `networks` {name: sha256} leaves out what so few images do not need."""
        self.metrics = find_metrics(names, "reconstruction")
        self.num_images, self.device = num_images, device
        needed = [metric for metric in self.metrics if metric.minimum <= num_images]
        self.networks = {
            name: weights.digest(name) for metric in needed for name in metric.networks if name in weights.NETWORKS
        }
        self._loaded: dict[int, Instruments] = {}

    def load(self, resolution: int) -> Instruments:
        """Scorers and extractors, on the device, and the reasons why some metrics are unavailable."""
        if resolution not in self._loaded:
            self._loaded[resolution] = instruments(self.metrics, self.num_images, resolution, self.device)
        return self._loaded[resolution]
