"""The networks and formulas that a set of metrics needs, loaded once: from pairs of images to columns and features.

    suite = MetricSuite(["psnr", "lpips-alex", "rfid"], num_images=50_000, side=256, device=device)
    suite.unavailable                             # {metric: reason}: those are not to be computed
    suite.score(real, fake, decoded)              # uint8 [B, 3, H, W] twice -> {column: float [B]} on the device
    suite.features(real)                          # uint8 [B, 3, H, W] -> {extractor: float32 [B, D]} on the device

`decoded` is the decoder's float output, which only lpips-vgg-unclamped reads; None where there is none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokbench import weights
from tokbench.data.pixels import to_float
from tokbench.errors import InputError
from tokbench.metrics import CODES, LATENTS, METRICS, RENAMED, Metric, dreamsim, find_metrics, perceptual, pixel
from tokbench.metrics.extractors import Extractor, extractors, kinds
from tokbench.records import provenance
from tokbench.runtime.device import precision

Scorer = Callable[[Tensor, Tensor, Tensor | None], Mapping[str, Tensor]]


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
    **dict.fromkeys(pixel.COLOUR_COLUMNS, (pixel.colour_errors, 1)),
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


@cache
def _network(column: str, device: torch.device, weights_of: str) -> NetworkScorer:
    """The scorer of a column, one per process, device and file of weights (`weights_of`: their digests)."""
    network = _NETWORKS[column][0]().to(device).to(memory_format=torch.channels_last)
    return NetworkScorer(column, network, unclamped=column == UNCLAMPED)


@cache
def _extractors(names: tuple[str, ...], device: torch.device, weights_of: str) -> dict[str, Extractor]:
    return extractors(names, device)


class MetricSuite:
    """What measures images of a size; networks are fetched when they are first needed and shared by all suites.

    `metrics` are those asked for, in the table's order; `side` is the shorter side of the smallest image,
    `one_size` whether all are of one size. A metric that
    so few images cannot give needs nothing; its value will be null and say so. InputError for an unknown metric.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_images: int,
        side: int,
        device: torch.device | str = "cpu",
        *,
        one_size: bool = True,
    ) -> None:
        self.metrics = find_metrics(names)
        self.num_images, self.side, self.device, self.one_size = num_images, side, torch.device(device), one_size

    @property
    def needed(self) -> list[Metric]:
        """The metrics that this many images can give."""
        return [metric for metric in self.metrics if metric.minimum <= self.num_images]

    @cached_property
    def networks(self) -> dict[str, str]:
        """{network: digest of its weights} of all that is needed, without loading anything."""
        names = dict.fromkeys(name for metric in self.needed for name in metric.networks)
        return {name: weights.digest(name) for name in names if name in weights.NETWORKS}

    @cached_property
    def keys(self) -> dict[str, str | None]:
        """{metric: hash of its networks, of the libraries that run them, of a plugin's code}; None: nobody can tell.

        What is decided by images and by our own code alone has none.
        """
        keys: dict[str, str | None] = {}
        for metric in self.needed:
            own = [weights.NETWORKS[name] for name in metric.networks if name in self.networks]
            code = _plugins_code(metric)
            if own or code != "":
                libraries = provenance.versions(network.library for network in own)
                digests = {network.name: self.networks[network.name] for network in own}
                keys[metric.name] = None if code is None else provenance.key(digests, libraries, code)
        return keys

    @cached_property
    def unavailable(self) -> dict[str, str]:
        """{metric: reason} of those that cannot be had; fetches the networks of the others."""
        reasons = {}
        for metric in self.needed:
            least = max((_smallest_side(column) for column in metric.columns), default=1)
            try:
                if metric.extractor in (CODES, LATENTS) and not self.one_size:
                    reasons[metric.name] = f"needs images of one size, for equally many {metric.extractor} of each"
                elif self.side < least:
                    reasons[metric.name] = f"needs images of {least} pixels a side, these have {self.side}"
                else:
                    for network in metric.networks:
                        weights.fetch(network)
                    self._scorers_of(metric)
                    self._extractors_of(metric)
            except weights.WeightsError as error:
                reasons[metric.name] = str(error)
        return reasons

    @property
    def available(self) -> list[Metric]:
        """The metrics that are measured: enough images, and their networks are here."""
        return [metric for metric in self.needed if metric.name not in self.unavailable]

    @cached_property
    def scorers(self) -> list[Scorer]:
        """What fills the columns of the available metrics, each once."""
        return list(dict.fromkeys(scorer for metric in self.available for scorer in self._scorers_of(metric)))

    @cached_property
    def extractors(self) -> dict[str, Extractor]:
        """What fills the features of the available metrics, by name."""
        return {name: e for metric in self.available for name, e in self._extractors_of(metric).items()}

    def score(self, real: Tensor, fake: Tensor, decoded: Tensor | None = None) -> dict[str, Tensor]:
        """uint8 [B, 3, H, W] twice, and the decoder's float output -> {column: float [B]} on the device."""
        with torch.inference_mode():
            return {name: values for scorer in self.scorers for name, values in scorer(real, fake, decoded).items()}

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, H, W] -> {extractor: float32 [B, D]} on the device."""
        with torch.inference_mode():
            return {name: extract(images) for name, extract in self.extractors.items()}

    def _scorers_of(self, metric: Metric) -> list[Scorer]:
        if metric.score is not None:
            return [partial(_scored, metric)]
        found: list[Scorer] = [_PIXELS[column][0] for column in metric.columns if column in _PIXELS]
        columns = [column for column in metric.columns if column in _NETWORKS]
        return found + [_network(column, self.device, self._digests(metric)) for column in columns]

    def _extractors_of(self, metric: Metric) -> dict[str, Extractor]:
        known, base = kinds(), (metric.extractor or "").partition("@")[0]  # under a probe's condition: without it
        if base not in known:
            return {}
        network = known[base].network  # all that it gives together: they share one pass over a batch
        names = tuple(n for n, kind in known.items() if n == base or kind.network == network != "")
        return {base: _extractors(names, self.device, self._digests(metric))[base]}

    def _digests(self, metric: Metric) -> str:
        return " ".join(f"{self.networks.get(name, name)} {weights.locate(name)}" for name in metric.networks)


def _plugins_code(metric: Metric) -> str | None:
    """Hash of the code of a metric that is not ours, "" for one of ours; None where it has no source file."""
    functions = [getattr(f, "func", f) for f in (metric.score, metric.compute, metric.rows) if f is not None]
    modules = {f.__module__ for f in functions}
    others = {module for module in modules if module.partition(".")[0] != "tokbench"}
    return provenance.source_hash(others) if others else ""


def _smallest_side(column: str) -> int:
    column = column.partition("@")[0]
    return (_PIXELS.get(column) or _NETWORKS.get(column) or (None, 1))[1]


def use_weights(path: Path | None, unverified: bool) -> None:
    """Let a file in the layout of torch-fidelity's stand for Inception in this process.

    Unless it is FID's own, rfid becomes rfid-unverified-HASH, by the first digits of the file's sha256, and so do all
    that need this network: no such number passes for FID's, nor for that of another file. InputError without
    `unverified`, and for a file that is not there.
    """
    if path is None:
        if unverified:
            raise InputError("--unverified: which file? write --weights FILE --unverified")
        return
    if not path.is_file():
        raise InputError(f"--weights {path}: no such file")
    sha256, known = weights.file_sha256(path), weights.NETWORKS["inception"]
    if sha256.startswith(known.sha256):
        weights.NETWORKS["inception"] = replace(known, file=str(path.resolve()))
        return
    if not unverified:
        raise InputError(
            f"--weights {path}: not FID's Inception (sha256 {sha256[:16]}...); --unverified takes it, under names as "
            f"rfid-unverified-{sha256[:8]}"
        )
    ending = f"-unverified-{sha256[:8]}"
    own = replace(known, name=f"inception{ending}", file=str(path.resolve()), sha256=sha256, licence="unknown")
    weights.NETWORKS["inception"] = weights.NETWORKS[own.name] = own
    for metric in [metric for metric in METRICS.values() if "inception" in metric.networks]:
        networks = tuple(own.name if name == "inception" else name for name in metric.networks)
        RENAMED[metric.name] = f"{metric.name}{ending}"
        METRICS[RENAMED[metric.name]] = replace(metric, name=RENAMED[metric.name], networks=networks)
