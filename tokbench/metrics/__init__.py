"""The one table of all metrics. Never imports torch.

A metric is a pure function over what was stored per sample: columns of scores and features of images, in id order.
What fills them runs in torch and is in `metrics.scoring` (columns) and `features` (features); the loop asks
`metrics.scoring.instruments(metrics, ...)` for both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np

from tokbench.errors import InputError
from tokbench.metrics import distribution, frechet
from tokbench.metrics.statistics import mean_and_error
from tokbench.records.result import Value

INCEPTION_TENTHS = 10  # parts of the Inception score
IDENTICAL = 100.0  # dB of images that do not differ, whose PSNR would be infinite; also the cap
FRECHET_MINIMUM = (
    2048  # images: below it the covariance of 2048 features is singular, and the bias is most of the value
)


class Samples(Protocol):
    """The reading half of `store.SampleStore`."""

    @property
    def ids(self) -> list[str]: ...
    def column(self, name: str) -> np.ndarray: ...  # float64 [N]
    def features(self, side: str, extractor: str) -> np.ndarray: ...  # float32 [N, D]


@dataclass(frozen=True)
class Metric:
    """`networks` are names in `weights.NETWORKS`; `columns` and `extractor` what is read of the store, of `sides`."""

    name: str
    better: Literal["higher", "lower", "neither"]
    unit: str
    low: float | None  # range of possible values; None: unbounded
    high: float | None
    tolerance: float  # a smaller loss than this is no regression
    digits: int  # shown after the point
    description: str
    compute: Callable[[Samples], Value]
    columns: tuple[str, ...] = ()
    extractor: str | None = None
    sides: tuple[str, ...] = ("real", "fake")
    networks: tuple[str, ...] = ()
    scope: Literal["reconstruction", "generation", "both"] = "reconstruction"
    rows: Callable[[Samples], np.ndarray] | None = None  # values per image [N] that the features give, for the table
    minimum: int = 1  # images; below it the value is null, and neither networks nor features are needed


def mean_of(column: str, samples: Samples) -> Value:
    """The mean of a per-image column, with its standard error."""
    return mean_and_error(samples.column(column))


def mean_psnr(samples: Samples) -> Value:
    """Mean of the images' PSNR; identical images are counted as 100 dB, and named."""
    errors = samples.column("mse")
    identical = int((errors == 0).sum())
    note = f"{identical} of {len(errors)} images identical, counted as {IDENTICAL:g} dB" if identical else ""
    return mean_and_error(samples.column("psnr"), note)


def global_psnr(samples: Samples) -> Value:
    """-10 log10 of the squared error over all images; its error by the delta method."""
    errors = mean_and_error(samples.column("mse"))
    assert errors.value is not None
    if errors.value == 0:
        return Value(IDENTICAL, 0.0, n=errors.n, note="all images identical")
    decibel = min(IDENTICAL, -10 * float(np.log10(errors.value)))
    stderr = None if errors.stderr is None else 10 / float(np.log(10)) * errors.stderr / errors.value
    return Value(decibel, stderr, n=errors.n)


def frechet_of(extractor: str, samples: Samples) -> Value:
    """Fréchet distance between the features of both sides, its error from paired half-samples."""
    num_images = len(samples.ids)
    if num_images < FRECHET_MINIMUM:
        return too_few(num_images, FRECHET_MINIMUM)
    real, fake = samples.features("real", extractor), samples.features("fake", extractor)
    value = frechet.distance(frechet.moments(real), frechet.moments(fake))
    return Value(value, frechet.half_sample_error(real, fake), n=num_images)


def kernel_of(extractor: str, samples: Samples, *, subset: int = distribution.KID_SUBSET) -> Value:
    """Kernel distance (KID) of both sides; its error is of the images drawn and of the subsets drawn among them."""
    real, fake = samples.features("real", extractor), samples.features("fake", extractor)
    value, spread = distribution.kernel_distance(real, fake, subset=subset)
    note = "" if spread else "one subset of all images"
    if min(len(real), len(fake)) < 4:
        return Value(value, n=len(fake), note=note)
    error = np.hypot(distribution.kernel_error(real, fake, subset=subset), spread / distribution.KID_REPEATS**0.5)
    return Value(value, float(error), n=len(fake), note=note)


def paired_rows(extractor: str, samples: Samples) -> np.ndarray:
    """Squared distance between the features of each image and of its reconstruction."""
    return distribution.paired_distances(samples.features("real", extractor), samples.features("fake", extractor))


def agreement_rows(samples: Samples) -> np.ndarray:
    """1 where an image's top-1 class survives, else 0."""
    real, fake = samples.features("real", "mobilenet-class"), samples.features("fake", "mobilenet-class")
    return (real == fake).all(axis=1).astype(np.float64)


def mean_of_rows(rows: Callable[[Samples], np.ndarray], samples: Samples) -> Value:
    """The mean of what features give per image, with its standard error."""
    return mean_and_error(rows(samples))


def inception_score(samples: Samples) -> Value:
    """exp of the mean divergence of p(class | image) from p(class), over unshuffled tenths (ADM)."""
    value, spread = distribution.inception_score(samples.features("fake", "inception-logits"), INCEPTION_TENTHS)
    # The spread is a population's; the error of the mean of n parts is their sample deviation by the root of n.
    error = spread / (INCEPTION_TENTHS - 1) ** 0.5
    return Value(value, error, n=len(samples.ids), note="error from the spread of the tenths")


def precision(samples: Samples) -> Value:
    """Share of fake images inside the manifold of the real ones."""
    real, fake = samples.features("real", "inception"), samples.features("fake", "inception")
    return Value(distribution.coverage(fake, real), n=len(fake))


def recall(samples: Samples) -> Value:
    """Share of real images inside the manifold of the fake ones."""
    real, fake = samples.features("real", "inception"), samples.features("fake", "inception")
    return Value(distribution.coverage(real, fake), n=len(fake))


def perplexity(samples: Samples) -> Value:
    """exp of the entropy of the codes used over the whole set."""
    codes = samples.features("fake", "codes")
    return Value(distribution.perplexity(codes), n=len(codes), note=f"{np.unique(codes).size} codes used")


def codebook_use(samples: Samples) -> Value:
    """How many different codes occur in the whole set."""
    codes = samples.features("fake", "codes")
    return Value(float(np.unique(codes).size), n=len(codes))


def latent_deviation(samples: Samples) -> Value:
    """Standard deviation of all numbers of all latents, and what would bring it to one."""
    mean, square = samples.column("latent-mean").mean(), samples.column("latent-square").mean()
    deviation = float(np.sqrt(max(0.0, square - mean**2)))
    note = f"its scale times {1 / deviation:.4g} would make it 1" if deviation else "all latents are equal"
    return Value(deviation, n=len(samples.ids), note=note)


def too_few(num_images: int, minimum: int) -> Value:
    """The value of a metric that so few images cannot give."""
    return Value(None, n=num_images, note=f"needs {minimum:,} images, here {num_images:,}; pd-* serves at any number")


def _mean(name: str, better: Literal["higher", "lower"], high: float | None, tolerance: float, digits: int,
          description: str, networks: tuple[str, ...] = (), unit: str = "", low: float = 0.0) -> Metric:  # fmt: skip
    compute = partial(mean_of, name)
    return Metric(name, better, unit, low, high, tolerance, digits, description, compute, (name,), networks=networks)


def _frechet(
    name: str, extractor: str, what: str, network: str, scope: Literal["generation", "both"] = "both"
) -> Metric:
    return Metric(
        name, "lower", "", 0.0, None, 0.02, 3, f"Fréchet distance of {what}", partial(frechet_of, extractor),
        extractor=extractor, networks=(network,), scope=scope, minimum=FRECHET_MINIMUM,
    )  # fmt: skip


def _paired(extractor: str, what: str) -> Metric:
    rows = partial(paired_rows, extractor)
    return Metric(
        f"pd-{extractor}", "lower", "", 0.0, None, 1.0, 2, f"mean squared distance of {what}, image by image",
        partial(mean_of_rows, rows), extractor=extractor, networks=(extractor,), rows=rows,
    )  # fmt: skip


_INCEPTION = "FID Inception features (torch-fidelity's weights and resize)"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("psnr", "higher", "dB", 0.0, IDENTICAL, 0.05, 2, "peak signal-to-noise ratio, mean over images",
               mean_psnr, ("psnr", "mse")),
        Metric("psnr-global", "higher", "dB", 0.0, IDENTICAL, 0.05, 2, "PSNR of the squared error over all images",
               global_psnr, ("mse",)),
        _mean("ssim", "higher", 1.0, 0.002, 4, "SSIM, uniform 7x7 window, sample covariance (scikit-image)", low=-1.0),
        _mean("ssim-gauss", "higher", 1.0, 0.002, 4, "SSIM, 11x11 Gaussian window (Wang et al. 2004)", low=-1.0),
        _mean("ms-ssim", "higher", 1.0, 0.002, 4, "multi-scale SSIM, five scales (Wang et al. 2003)"),
        _mean("lpips-alex", "lower", None, 0.002, 4, "LPIPS v0.1, AlexNet", ("lpips-alex",)),
        _mean("lpips-vgg", "lower", None, 0.002, 4, "LPIPS v0.1, VGG16", ("lpips-vgg",)),
        _mean("dists", "lower", None, 0.002, 4, "DISTS (VGG16)", ("lpips-vgg", "dists")),
        _mean("dreamsim", "lower", 2.0, 0.002, 4, "DreamSim ensemble at 224 px", ("dino-vitb16", "dreamsim")),
        _mean("dreamsim-dino", "lower", 2.0, 0.002, 4, "DreamSim, its DINO branch alone, at 224 px",
              ("dino-vitb16", "dreamsim-dino")),
        # What some papers measured under the names above; a protocol says which are its own.
        _mean("ssim-range2", "higher", 1.0, 0.002, 4, "ssim with constants for a range of 2: too high", low=-1.0),
        _mean("ssim-gauss-signed", "higher", 1.0, 0.002, 4, "ssim-gauss of images in [-1, 1]: reads higher", low=-1.0),
        _mean("lpips-vgg-unclamped", "lower", None, 0.002, 4, "lpips-vgg of the decoder's own output, unclamped",
              ("lpips-vgg",)),
        _mean("dreamsim-native", "lower", 2.0, 0.002, 4, "DreamSim ensemble at the image's own size",
              ("dino-vitb16", "dreamsim")),
        _paired("mobilenet", "MobileNetV2 features"),
        _paired("dinov2", "DINOv2 ViT-L/14 features"),
        _paired("inception", _INCEPTION),
        Metric("agreement", "higher", "", 0.0, 1.0, 0.01, 3, "share of images whose MobileNetV2 top-1 class survives",
               partial(mean_of_rows, agreement_rows), extractor="mobilenet-class", networks=("mobilenet",),
               rows=agreement_rows),
        _frechet("rfid", "inception", f"{_INCEPTION}, against the same crops", "inception"),
        _frechet("gfid", "inception", f"{_INCEPTION}, against the stated reference", "inception", "generation"),
        _frechet("fd-dinov2", "dinov2", "DINOv2 ViT-L/14 features", "dinov2"),
        _frechet("fd-mobilenet", "mobilenet", "MobileNetV2 features", "mobilenet"),
        Metric("kid", "lower", "", None, None, 0.0001, 5, f"kernel distance of {_INCEPTION}",
               partial(kernel_of, "inception"), extractor="inception", networks=("inception",), scope="both",
               minimum=2),
        Metric("is", "higher", "", 1.0, None, 1.0, 1, "Inception score, unshuffled tenths (ADM)", inception_score,
               extractor="inception-logits", sides=("fake",), networks=("inception",), scope="generation", minimum=10),
        Metric("precision", "higher", "", 0.0, 1.0, 0.01, 3, "share of fakes in the real manifold (Inception, k = 3)",
               precision, extractor="inception", networks=("inception",), scope="generation", minimum=4),
        Metric("recall", "higher", "", 0.0, 1.0, 0.01, 3, "share of reals in the fake manifold (Inception, k = 3)",
               recall, extractor="inception", networks=("inception",), scope="generation", minimum=4),
        _mean("bpp", "lower", None, 0.01, 3, "measured size of the code", unit="bit/px"),
        Metric("perplexity", "higher", "", 1.0, None, 1.0, 1, "codebook perplexity: exp of the codes' entropy",
               perplexity, extractor="codes", sides=("fake",)),
        Metric("codebook-use", "higher", "codes", 1.0, None, 1.0, 0, "different codes that occur", codebook_use,
               extractor="codes", sides=("fake",)),
        Metric("latent-mean", "neither", "", None, None, 0.01, 4, "mean of the normalised latents",
               partial(mean_of, "latent-mean"), ("latent-mean",)),
        Metric("latent-std", "neither", "", 0.0, None, 0.01, 4, "standard deviation of the normalised latents",
               latent_deviation, ("latent-mean", "latent-square")),
    )
}  # fmt: skip

# What `run` measures when nobody asks for less or more; the last five only where there are codes or latents.
DEFAULT = ("psnr", "psnr-global", "ssim", "ssim-gauss", "lpips-alex", "lpips-vgg", "pd-mobilenet", "rfid",
           "bpp", "perplexity", "codebook-use", "latent-mean", "latent-std")  # fmt: skip


def find_metrics(names: Sequence[str], scope: Literal["reconstruction", "both"] = "both") -> list[Metric]:
    """The metrics of these names, in the table's order, each once; InputError with close matches for another.

    `scope` "reconstruction" refuses gfid, which would not be against the reference that its name promises.
    """
    from difflib import get_close_matches

    for name in names:
        if name not in METRICS:
            close = get_close_matches(name, METRICS, 3, 0.5)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise InputError(f"unknown metric {name!r}: {hint}known are {', '.join(METRICS)}")
        if scope == "reconstruction" and name == "gfid":
            raise InputError("gfid is a generator's: `tokbench generate`; of reconstructions the name is rfid")
    return [metric for metric in METRICS.values() if metric.name in names]


def users_of_networks() -> dict[str, list[str]]:
    """Which metrics need each network, by the network's name."""
    users: dict[str, list[str]] = {}
    for metric in METRICS.values():
        for network in metric.networks:
            users.setdefault(network, []).append(metric.name)
    return users
