"""The one table of all metrics, those of plugins included. Never imports torch.

A metric is a pure function over what was stored per sample: columns of scores and features of images, in id order.
What fills them runs in torch: `metrics.suite` (columns) and `metrics.extractors` (features).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np

from tokbench import registry
from tokbench.errors import InputError
from tokbench.metrics import conditions, distribution, frechet, latents
from tokbench.metrics.statistics import (
    Estimate,
    estimate,
    from_half_samples,
    half_samples,
    mean_and_error,
    share_and_error,
)
from tokbench.records.result import Value

INCEPTION_TENTHS = 10  # parts of the Inception score
SEAM = "seam"
IDENTICAL = 100.0  # dB of images that do not differ, whose PSNR would be infinite; also the cap
MANIFOLD_NOTE = "error of the images counted, the manifold taken as it is"
FRECHET_NOTE = "95 % interval: of the distance that so many images give on average, not of its limit"
CODES, LATENTS = "codes", "latents"  # features that are a tokenizer's own: codes [N, D], latents [N, C * H * W]
GRID = ("latent-channels", "latent-height", "latent-step")  # columns, equal for all images: C, H, pixels a position
# Images: below it the covariance of 2048 features is singular, and the bias is most of the value.
FRECHET_MINIMUM = 2048
# From here on the bias is about a tenth of the value, or less; of images far from the real ones far earlier
# (docs/concepts/frechet.md).
MIND_MINIMUM, MIND_MINIMUM_BETWEEN, MIND_BIAS = 512, 16, 0.02


class Samples(Protocol):
    """The reading half of `records.samples.SampleStore`."""

    @property
    def ids(self) -> list[str]: ...
    def column(self, name: str) -> np.ndarray: ...  # float64 [N]
    def features(self, side: str, extractor: str) -> np.ndarray: ...  # float32 [N, D]


@dataclass(frozen=True)
class Kind:
    """What an extractor of features is made of.

    `build` makes a torch module, uint8 [B, 3, H, W] -> {name: float [B, dim]}, of the file of its `network`, or of None
    if that is "": none of `weights.NETWORKS`.
    """

    network: str
    build: Callable[[Any], Any]
    dim: int
    preprocessing: str  # changes whenever equal weights (of network "": anything) would give other features


@dataclass(frozen=True)
class Metric:
    """A line of the table. The shortest: `Metric("mae", "lower", "mean absolute error", score=f)`.

    `score` takes real and fake images, uint8 [B, 3, H, W] tensors on one device, and gives a number an image, float
    [B], to the column of the metric's name. `compute` makes the value of what is stored; None is the mean of that
    column. `reads` names other columns that it needs, `extractor` and `sides` its features, `networks` are names in
    `weights.NETWORKS`. `terms` gives, from the columns that it reads, a number an image [N] whose spread is the
    metric's error: its pseudo-values (n times the value, less n - 1 times that without the image); of a mean, which
    needs none, they are the column itself.
    """

    name: str
    better: Literal["higher", "lower", "neither"]
    description: str
    _: KW_ONLY
    unit: str = ""
    low: float | None = None  # range of possible values; None: unbounded
    high: float | None = None
    tolerance: float = 0.0  # a smaller loss than this is no regression
    digits: int = 4  # shown after the point
    score: Callable[[Any, Any], Any] | None = None
    compute: Callable[[Samples], Value] | None = None
    reads: tuple[str, ...] = ()
    extractor: str | None = None
    sides: tuple[str, ...] = ("real", "fake")
    networks: tuple[str, ...] = ()
    scope: Literal["reconstruction", "generation", "both", "interpolation"] = "reconstruction"
    terms: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None = None
    probe: str = ""  # which one gives it; "": `run` does
    # Values on half-samples of what `keep_features` keeps, fakes under this name (of one seed): paired differences.
    halves: Callable[[Samples, str], np.ndarray] | None = None
    rows: Callable[[Samples], np.ndarray] | None = None  # values per image [N] that the features give, for the table
    share: bool = False  # an image counts 1 or 0
    minimum: int = 1  # images; below it the value is null, and neither networks nor features are needed

    @property
    def columns(self) -> tuple[str, ...]:
        """What `value` reads of the store, features apart."""
        return self.reads if self.compute else (self.name,)

    def value(self, samples: Samples) -> Value:
        """The metric of all stored samples."""
        return self.compute(samples) if self.compute else mean_of(self.name, samples)


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
    """-10 log10 of the squared error over all images, its error by the jackknife."""
    errors = samples.column("mse")
    value, note = float(decibels(errors.mean())), "" if errors.any() else "all images identical"
    return of_terms(value, global_psnr_terms({"mse": errors}), (0.0, IDENTICAL), note)


def decibels(errors: np.ndarray) -> np.ndarray:
    """PSNR of mean squared errors."""
    found: np.ndarray = -10 * np.log10(np.maximum(errors, 10 ** (-IDENTICAL / 10)))
    return found


def global_psnr_terms(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pseudo-values of the PSNR of all images."""
    errors = columns["mse"]
    count = len(errors)
    without = decibels((errors.sum() - errors) / max(1, count - 1))
    return np.asarray(count * decibels(errors.mean()) - (count - 1) * without)


def of_terms(value: float, terms: np.ndarray, limits: tuple[float, float], note: str = "") -> Value:
    """A value with the error and the interval that its terms [N] give."""
    if len(terms) < 2:
        return Value(value, n=len(terms), note=note)
    found = replace(estimate(terms), value=value)
    return Value(value, found.error, *within(found, limits), len(terms), note)


def within(found: Estimate, limits: tuple[float, float]) -> tuple[float, float]:
    """The 95 % interval, cut to the values that are possible."""
    low, high = found.interval()
    return max(limits[0], low), min(limits[1], high)


def frechet_of(extractor: str, samples: Samples) -> Value:
    """Fréchet distance between the features of both sides, its error from paired half-samples."""
    num_images = len(samples.ids)
    if num_images < FRECHET_MINIMUM:
        return too_few(num_images, FRECHET_MINIMUM)
    real, fake = samples.features("real", extractor), samples.features("fake", extractor)
    value = frechet.distance(frechet.moments(real), frechet.moments(fake))
    found = from_half_samples(value, frechet.half_sample_distances(real, fake))
    return Value(value, found.error, *within(found, (0.0, math.inf)), num_images, FRECHET_NOTE)


def monge_of(extractor: str, samples: Samples) -> Value:
    """MIND between the features of both sides, its error from paired half-samples."""
    real, fake = samples.features("real", extractor), samples.features("fake", extractor)
    count = min(len(real), len(fake))
    value, *halves = distribution.monge_distances(real, fake, [np.arange(count), *half_samples(count)])
    found = from_half_samples(float(value), np.array(halves))
    bias = (float(np.mean(halves)) - found.value) / max(found.value, 1e-30)  # of half as many it is twice as large
    note = f"{FRECHET_NOTE}; about {bias:.0%} of it is bias" if bias > MIND_BIAS else FRECHET_NOTE
    return Value(found.value, found.error, *within(found, (0.0, math.inf)), len(samples.ids), note)


def monge_halves(extractor: str, samples: Samples, fakes: str) -> np.ndarray:
    """MIND on half-samples."""
    real, fake = samples.features("real", extractor), samples.features("fake", fakes)
    return distribution.monge_distances(real, fake, half_samples(min(len(real), len(fake))))


def frechet_halves(extractor: str, samples: Samples, fakes: str) -> np.ndarray:
    """Fréchet distances on half-samples."""
    return frechet.half_sample_distances(samples.features("real", extractor), samples.features("fake", fakes))


def kernel_of(extractor: str, samples: Samples, *, subset: int = distribution.KID_SUBSET) -> Value:
    """Kernel distance (KID) of both sides; its error is of the images drawn and of the subsets drawn among them."""
    real, fake = samples.features("real", extractor), samples.features("fake", extractor)
    value, spread = distribution.kernel_distance(real, fake, subset=subset)
    note = "" if spread else "one subset of all images"
    if min(len(real), len(fake)) < 4:
        return Value(value, n=len(fake), note=note)
    error = np.hypot(distribution.kernel_error(real, fake), spread / distribution.KID_REPEATS**0.5)
    return Value(value, float(error), n=len(fake), note=note)


def paired_rows(extractor: str, samples: Samples) -> np.ndarray:
    """Squared distance between the features of each image and of its reconstruction."""
    return distribution.paired_distances(samples.features("real", extractor), samples.features("fake", extractor))


def agreement_rows(samples: Samples) -> np.ndarray:
    """1 where an image's top-1 class survives, else 0."""
    real, fake = samples.features("real", "mobilenet-class"), samples.features("fake", "mobilenet-class")
    same: np.ndarray = (real == fake).all(axis=1)
    return same.astype(np.float64)


def mean_of_rows(rows: Callable[[Samples], np.ndarray], samples: Samples) -> Value:
    """The mean of what features give per image, with its standard error."""
    return mean_and_error(rows(samples))


def share_of_rows(rows: Callable[[Samples], np.ndarray], samples: Samples) -> Value:
    """The mean of what is 0 or 1 per image, with its standard error."""
    return share_and_error(rows(samples) == 1)


def inception_score(samples: Samples) -> Value:
    """exp of the mean divergence of p(class | image) from p(class), over unshuffled tenths (ADM)."""
    value, spread = distribution.inception_score(samples.features("fake", "inception-logits"), INCEPTION_TENTHS)
    # The spread is a population's; the error of the mean of n parts is their sample deviation by the root of n.
    error = spread / (INCEPTION_TENTHS - 1) ** 0.5
    return Value(value, error, n=len(samples.ids), note="error from the spread of the tenths")


def precision(samples: Samples) -> Value:
    """Share of fake images inside the manifold of the real ones."""
    real, fake = samples.features("real", "inception"), samples.features("fake", "inception")
    return share_and_error(distribution.covered(fake, real), MANIFOLD_NOTE)


def recall(samples: Samples) -> Value:
    """Share of real images inside the manifold of the fake ones."""
    real, fake = samples.features("real", "inception"), samples.features("fake", "inception")
    value = float(distribution.covered(real, fake).mean())
    if min(len(real), len(fake)) < 8:
        return Value(value, n=len(fake))
    # The reals share the fakes' manifold, so they are no independent hits: halves of both sides, each with its own.
    halves = zip(half_samples(len(real), 4), half_samples(len(fake), 4), strict=True)
    shares = [distribution.covered(real[rows], fake[others]).mean() for rows, others in halves]
    found = from_half_samples(value, np.array(shares))
    return Value(value, found.error, *within(found, (0.0, 1.0)), len(fake), "its 95 % interval covers 90 to 93 %")


def seam(samples: Samples) -> Value:
    """The mean over images of more than one tile."""
    several = samples.column("tile-borders") > 0
    left = int(len(several) - several.sum())
    note = f"{left} image{' lies' if left == 1 else 's lie'} in one tile, not counted" if left else ""
    return mean_and_error(samples.column(SEAM)[several], note) if several.any() else Value(None, n=left, note=note)


def perplexity(samples: Samples) -> Value:
    """exp of the entropy of the codes used over the whole set."""
    codes = samples.features("fake", CODES)
    return _of_codes(codes, distribution.perplexity, f"{np.unique(codes).size} codes used; {most_codes(codes)}")


def codebook_use(samples: Samples) -> Value:
    """How many different codes occur in the whole set."""
    codes = samples.features("fake", CODES)
    return _of_codes(codes, lambda codes: float(np.unique(codes).size), most_codes(codes))


def most_codes(codes: np.ndarray) -> str:
    """The ceiling that codes [N, L] allow, whatever the codebook."""
    return f"{len(codes):,} images of {codes[0].size:,} codes allow {codes.size:,} at most"


def _of_codes(codes: np.ndarray, statistic: Callable[[np.ndarray], float], note: str = "") -> Value:
    """A statistic of all codes [N, L] with its error from half-samples of the images."""
    value, count = statistic(codes), len(codes)
    if count < 8:
        return Value(value, n=count, note=note)
    halves = np.array([statistic(codes[rows]) for rows in half_samples(count)])
    return Value(value, from_half_samples(value, halves).error, n=count, note=note)


def latent_deviation(samples: Samples) -> Value:
    """Standard deviation of all numbers of all latents, its error by the jackknife, and what would bring it to one."""
    columns = {name: samples.column(name) for name in ("latent-mean", "latent-square")}
    value = float(_deviation(*(column.mean() for column in columns.values())))
    note = f"its scale times {1 / value:.4g} would make it 1" if value else "all latents are equal"
    return of_terms(value, latent_deviation_terms(columns), (0.0, math.inf), note)


def _deviation(mean: np.ndarray, square: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(np.maximum(0.0, square - mean**2)))


def latent_deviation_terms(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pseudo-values of the standard deviation of all latents."""
    both, count = [columns[name] for name in ("latent-mean", "latent-square")], len(columns["latent-mean"])
    without = _deviation(*((column.sum() - column) / max(1, count - 1) for column in both))
    return np.asarray(count * _deviation(*(column.mean() for column in both)) - (count - 1) * without)


def latents_of(samples: Samples) -> latents.Latents:
    """The stored latents and the shape that the columns of their metrics say."""
    shape = [float(samples.column(name)[0]) for name in GRID]
    return latents.Latents(samples.features("fake", LATENTS), int(shape[0]), int(shape[1]), shape[2])


def latent_statistic(statistic: Callable[[latents.Sums], float], samples: Samples) -> Value:
    """What the sums over all latents give, its error by leaving out groups of images."""
    value, error = latents.jackknife(statistic, latents.sums_of(latents_of(samples)))
    return Value(value, error, n=len(samples.ids))


def latent_halves(statistic: Callable[[latents.Sums], float], samples: Samples, _: str) -> np.ndarray:
    """A statistic on half-samples of the latents."""
    own = latents_of(samples)
    return np.array([statistic(latents.sums_over(own, rows)) for rows in half_samples(len(own.rows))])


def similarity(rows: Callable[[Samples], np.ndarray], samples: Samples) -> Value:
    """The mean over images of what positions near and far give."""
    values = rows(samples)
    if np.isnan(values).any():
        note = f"needs positions within {latents.NEAR:g} px of one another and beyond {latents.FAR:g} px"
        return Value(None, n=len(values), note=note)
    return mean_and_error(values)


def latent_rows(rows: Callable[[latents.Latents], np.ndarray], samples: Samples) -> np.ndarray:
    """What latents give per image."""
    return rows(latents_of(samples))


def mean_kurtosis(sums: latents.Sums) -> float:
    """Of all channels."""
    return float(latents.kurtosis(sums).mean())


def consistency_rows(samples: Samples) -> np.ndarray:
    """Share of an image's neighbours among the latents that are of its class."""
    return latents.lnc(latents_of(samples), samples.column("label"))


def irreducible_variance(which: int, samples: Samples) -> Value:
    """VIV (0) or the share of variance within classes (1), mean over the classes that have images enough."""
    own, labels = latents_of(samples), samples.column("label")
    found = latents.viv(own, labels, latents.sums_of(own))
    if not found:
        return Value(None, n=len(labels), note=f"needs {latents.least_of_a_class(own)} images of a class")
    value = mean_and_error(np.array(found)[:, which])
    return Value(value.value, value.stderr, value.low, value.high, len(labels), f"{len(found)} classes")


def too_few(num_images: int, minimum: int) -> Value:
    """The value of a metric that so few images cannot give."""
    return Value(None, n=num_images, note=f"needs {minimum:,} images, here {num_images:,}; pd-* serves at any number")


def _frechet(
    name: str, extractor: str, what: str, networks: tuple[str, ...],
    scope: Literal["generation", "both", "interpolation"] = "both",
) -> Metric:  # fmt: skip
    return Metric(
        name, "lower", f"Fréchet distance of {what}", low=0.0, tolerance=0.02, digits=3,
        compute=partial(frechet_of, extractor), extractor=extractor, networks=networks, scope=scope,
        minimum=FRECHET_MINIMUM, halves=partial(frechet_halves, extractor),
    )  # fmt: skip


def _monge(
    name: str, extractor: str, what: str, networks: tuple[str, ...], scope: Literal["both", "interpolation"] = "both",
    minimum: int = MIND_MINIMUM,
) -> Metric:  # fmt: skip
    return Metric(
        name, "lower", f"MIND, sliced Wasserstein distance of {what}", low=0.0, tolerance=0.02, digits=2,
        compute=partial(monge_of, extractor), extractor=extractor, networks=networks, scope=scope, minimum=minimum,
        halves=partial(monge_halves, extractor),
    )  # fmt: skip


def _latent(
    name: str, better: Literal["higher", "lower", "neither"], what: str, statistic: Callable[[latents.Sums], float],
    *, grid: bool = False, **options: Any,
) -> Metric:  # fmt: skip
    return Metric(
        name, better, what, reads=GRID if grid else GRID[:2], extractor=LATENTS, sides=("fake",),
        compute=partial(latent_statistic, statistic), halves=partial(latent_halves, statistic), minimum=2, **options,
    )  # fmt: skip


def _from_rows(rows: Callable[[Samples], np.ndarray]) -> dict[str, Any]:
    return {"rows": rows, "compute": partial(mean_of_rows, rows)}


def _positions(of: Callable[[latents.Latents], np.ndarray]) -> dict[str, Any]:
    rows = partial(latent_rows, of)
    return {"rows": rows, "compute": partial(similarity, rows), "reads": GRID, "extractor": LATENTS, "sides": ("fake",)}


def _paired(extractor: str, what: str) -> Metric:
    return Metric(
        f"pd-{extractor}", "lower", f"mean squared distance of {what}, image by image", low=0.0, tolerance=1.0,
        digits=2, extractor=extractor, networks=(extractor,), **_from_rows(partial(paired_rows, extractor)),
    )  # fmt: skip


_INCEPTION = "FID Inception features (torch-fidelity's weights and resize)"
_FEATURES = {"inception": _INCEPTION, "dinov2": "DINOv2 ViT-L/14 features", "mobilenet": "MobileNetV2 features"}
_SHORT = {"inception": "Inception", "dinov2": "DINOv2", "mobilenet": "MobileNetV2"}
_LABELLED: dict[str, Any] = {"extractor": LATENTS, "sides": ("fake",), "reads": (*GRID[:2], "label"), "minimum": 2}

_SSIM: dict[str, Any] = {"low": -1.0, "high": 1.0, "tolerance": 0.002}
_PERCEPTUAL: dict[str, Any] = {"low": 0.0, "tolerance": 0.002}
_DREAMSIM: dict[str, Any] = {"low": 0.0, "high": 2.0, "tolerance": 0.002, "networks": ("dino-vitb16", "dreamsim")}
_SHARE: dict[str, Any] = {"low": 0.0, "high": 1.0, "tolerance": 0.01, "digits": 3, "share": True}
_PSNR: dict[str, Any] = {"unit": "dB", "low": 0.0, "high": IDENTICAL, "tolerance": 0.05, "digits": 2}
_CODES: dict[str, Any] = {"low": 1.0, "tolerance": 1.0, "extractor": CODES, "sides": ("fake",)}
_GENERATED: dict[str, Any] = {"networks": ("inception",), "scope": "generation"}

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("psnr", "higher", "peak signal-to-noise ratio, mean over images", compute=mean_psnr,
               reads=("psnr", "mse"), **_PSNR),
        Metric("psnr-global", "higher", "PSNR of the squared error over all images", compute=global_psnr,
               reads=("mse",), terms=global_psnr_terms, **_PSNR),
        Metric("ssim", "higher", "SSIM, uniform 7x7 window, sample covariance (scikit-image)", **_SSIM),
        Metric("ssim-gauss", "higher", "SSIM, 11x11 Gaussian window (Wang et al. 2004)", **_SSIM),
        Metric("ms-ssim", "higher", "multi-scale SSIM, five scales (Wang et al. 2003)", **_SSIM | {"low": 0.0}),
        Metric("lpips-alex", "lower", "LPIPS v0.1, AlexNet", networks=("lpips-alex",), **_PERCEPTUAL),
        Metric("lpips-vgg", "lower", "LPIPS v0.1, VGG16", networks=("lpips-vgg",), **_PERCEPTUAL),
        Metric("dists", "lower", "DISTS (VGG16)", networks=("lpips-vgg", "dists"), **_PERCEPTUAL),
        Metric("dreamsim", "lower", "DreamSim ensemble at 224 px", **_DREAMSIM),
        Metric("dreamsim-dino", "lower", "DreamSim, its DINO branch alone, at 224 px",
               **_DREAMSIM | {"networks": ("dino-vitb16", "dreamsim-dino")}),
        # What some papers measured under the names above; a protocol says which are its own.
        Metric("ssim-range2", "higher", "ssim with constants for a range of 2: too high", **_SSIM),
        Metric("ssim-gauss-signed", "higher", "ssim-gauss of images in [-1, 1]: another number", **_SSIM),
        Metric("lpips-vgg-unclamped", "lower", "lpips-vgg of the decoder's own output, unclamped",
               networks=("lpips-vgg",), **_PERCEPTUAL),
        Metric("dreamsim-native", "lower", "DreamSim ensemble at the image's own size", **_DREAMSIM),
        *(Metric(f"bias-{name}", "neither", f"{name}, reconstruction less image", unit="/255", tolerance=0.2, digits=2)
          for name in ("red", "green", "blue")),
        Metric("bias-saturation", "neither", "saturation (HSV), reconstruction less image", tolerance=0.002),
        Metric("ciede2000", "lower", "colour difference CIEDE2000 of a pixel", low=0.0, tolerance=0.05, digits=2),
        Metric("clipped", "lower", "share of values that became 0 or 255", low=0.0, high=1.0, tolerance=0.001),
        *(_paired(name, _FEATURES[name]) for name in ("mobilenet", "dinov2", "inception")),
        Metric("agreement", "higher", "share of images whose MobileNetV2 top-1 class survives",
               extractor="mobilenet-class", networks=("mobilenet",), rows=agreement_rows,
               compute=partial(share_of_rows, agreement_rows), **_SHARE),
        _frechet("rfid", "inception", f"{_INCEPTION}, against the same crops", ("inception",)),
        _frechet("gfid", "inception", f"{_INCEPTION}, against the stated reference", ("inception",), "generation"),
        _frechet("fd-dinov2", "dinov2", _FEATURES["dinov2"], ("dinov2",)),
        _frechet("fd-mobilenet", "mobilenet", _FEATURES["mobilenet"], ("mobilenet",)),
        *(_monge(f"mind-{name}", name, what, (name,)) for name, what in _FEATURES.items()),
        Metric("kid", "lower", f"kernel distance of {_INCEPTION}", tolerance=0.0001, digits=5,
               compute=partial(kernel_of, "inception"), extractor="inception", networks=("inception",), scope="both",
               minimum=2),
        Metric("is", "higher", "Inception score, unshuffled tenths (ADM)", low=1.0, tolerance=1.0, digits=1,
               compute=inception_score, extractor="inception-logits", sides=("fake",), minimum=10, **_GENERATED),
        Metric("precision", "higher", "share of fakes in the real manifold (Inception, k = 3)", compute=precision,
               extractor="inception", minimum=4, **_SHARE, **_GENERATED),
        Metric("recall", "higher", "share of reals in the fake manifold (Inception, k = 3)", compute=recall,
               extractor="inception", minimum=4, **_SHARE, **_GENERATED),
        Metric("bpp", "lower", "measured size of the code", unit="bit/px", low=0.0, tolerance=0.01, digits=3),
        Metric(SEAM, "lower", "change of the error across tile borders, less that elsewhere", unit="of 255",
               tolerance=0.05, digits=3, compute=seam, reads=(SEAM, "tile-borders")),
        Metric("perplexity", "higher", "codebook perplexity: exp of the codes' entropy", digits=1, compute=perplexity,
               **_CODES),
        Metric("codebook-use", "higher", "different codes that occur", unit="codes", digits=0, compute=codebook_use,
               **_CODES),
        Metric("latent-mean", "neither", "mean of the normalised latents", tolerance=0.01),
        Metric("latent-std", "neither", "standard deviation of the normalised latents", low=0.0, tolerance=0.01,
               compute=latent_deviation, reads=("latent-mean", "latent-square"), terms=latent_deviation_terms),
        _latent("latent-rank", "higher", "effective rank of the channels' covariance, of C", latents.effective_rank,
                low=1.0, tolerance=0.05, digits=2),
        _latent("latent-condition", "lower", "condition number of the channels' covariance", latents.condition_number,
                low=1.0, tolerance=0.5, digits=1),
        _latent("latent-correlation", "neither", "mean absolute correlation of two channels", latents.mean_correlation,
                low=0.0, high=1.0, tolerance=0.01, digits=3),
        _latent("latent-kurtosis", "neither", "excess kurtosis, mean over channels; 0 of a Gaussian", mean_kurtosis,
                low=-2.0, tolerance=0.1, digits=2),
        _latent("latent-slope", "neither", "slope of the spectrum, log by log; 0 of white noise", latents.slope,
                grid=True, tolerance=0.05, digits=2),
        _latent("latent-high", "lower", "share of power above half the Nyquist rate", latents.high_share, grid=True,
                low=0.0, high=1.0, tolerance=0.01, digits=3),
        _latent("latent-sec", "lower", "SEC: share of cosine-transform energy in the upper half", latents.sec,
                grid=True, low=0.0, high=1.0, tolerance=0.01, digits=3),
        Metric("latent-lds", "higher", "LDS: cosine within 32 px less that beyond 96 px", low=-2.0, high=2.0,
               tolerance=0.01, digits=3, **_positions(latents.lds)),
        Metric("latent-cds", "higher", "CDS: fall of the cosine every 16 px", tolerance=0.005,
               **_positions(latents.cds)),
        Metric("latent-lnc", "higher", "LNC: share of 10 neighbours that are of the image's class", low=0.0, high=1.0,
               tolerance=0.01, digits=3, **_LABELLED, **_from_rows(consistency_rows)),
        Metric("latent-viv", "lower", "VIV by dimension; compares latents of one size only", low=0.0, tolerance=0.01,
               digits=3, compute=partial(irreducible_variance, 0), **_LABELLED),
        Metric("latent-within", "lower", "share of variance within classes", low=0.0, tolerance=0.01, digits=3,
               compute=partial(irreducible_variance, 1), **_LABELLED),
        *(_frechet("ifid-val" if name == "inception" else f"ifd-val-{name}", name,
                   f"images decoded between neighbouring latents ({what})", (name,), "interpolation")
          for name, what in _SHORT.items()),
        *(_monge(f"imind-val-{name}", name, f"images decoded between neighbouring latents ({what})", (name,),
                 "interpolation", MIND_MINIMUM_BETWEEN) for name, what in _SHORT.items()),
    )
}  # fmt: skip

# What probes look at under their conditions.
DRIFTING = ("psnr", "lpips-alex", "ciede2000", "bias-red", "bias-green", "bias-blue", "bias-saturation")
NOISED = ("psnr", "lpips-alex", "pd-mobilenet", "fd-mobilenet", "mind-mobilenet")
SEEDED = ("psnr", "lpips-alex")
_OVER_SIGMA = conditions.over_sigmas("lpips-alex")
_LPIPS: dict[str, Any] = {"networks": ("lpips-alex",), **_PERCEPTUAL}
_DECIBEL: dict[str, Any] = {"unit": "dB", "tolerance": 0.05, "digits": 2}
_READ: dict[str, Any] = {**_SHARE, "share": False}  # an image counts by its share of characters


def _of_round_trips() -> Iterator[Metric]:
    last = conditions.at("psnr", f"x{conditions.ROUND_TRIPS[-1]}")
    yield Metric("psnr-drift", "lower", f"psnr lost from the first to the tenth round trip, psnr - {last}",
                 probe="drift", reads=("psnr", "mse", last),
                 **_from_rows(partial(conditions.difference, "psnr", last)), **_DECIBEL)  # fmt: skip
    for trip, name in itertools.product(conditions.ROUND_TRIPS[1:], DRIFTING):
        yield conditions.under(METRICS[name], f"x{trip}", "drift", f"after {trip} round trips")


def _noise_doubling(samples: Samples) -> Value:
    columns = {name: samples.column(name) for name in _OVER_SIGMA}
    value, last = conditions.doubling(np.stack(list(columns.values()))), conditions.SIGMAS[-1]
    if math.isnan(value):
        return Value(None, n=len(samples.ids), note=f"not doubled at {last}")
    return of_terms(value, _noise_doubling_terms(columns), (0.0, last))


def _noise_doubling_terms(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    return conditions.doubling_terms(np.stack([columns[name] for name in _OVER_SIGMA]))


def _noise_area(samples: Samples) -> np.ndarray:
    return conditions.area(np.stack([samples.column(name) for name in _OVER_SIGMA]))


def _of_noise() -> Iterator[Metric]:
    common = {"probe": "robustness", "reads": _OVER_SIGMA, **_LPIPS}
    yield Metric("noise-area", "lower", "area under lpips-alex over noise on the latents, to 0.5 deviations",
                 **_from_rows(_noise_area), **common)  # fmt: skip
    yield Metric("noise-doubling", "higher", "noise on the latents, in their own deviations, that doubles lpips-alex",
                 compute=_noise_doubling, terms=_noise_doubling_terms,
                 **common | {"tolerance": 0.005, "digits": 3})  # fmt: skip
    for sigma, name in itertools.product(conditions.SIGMAS[1:], NOISED):
        yield conditions.under(METRICS[name], sigma, "robustness", f"with noise of {sigma} of the latents' deviation")


def _of_seeds() -> Iterator[Metric]:
    yield Metric("noise-share", "lower", "share of the squared error that is the seed's: variance over seeds by error",
                 probe="seeds", low=0.0, tolerance=0.01, digits=3)  # fmt: skip
    yield Metric("noise-deviation", "lower", "deviation of a pixel over seeds", unit="/255", probe="seeds", low=0.0,
                 tolerance=0.05, digits=2)  # fmt: skip
    for name, which in itertools.product(SEEDED, ("best", "mean", "worst")):
        metric = METRICS[name]
        yield Metric(conditions.at(name, which), metric.better, f"{name}, {which} of eight seeds", unit=metric.unit,
                     tolerance=metric.tolerance, digits=metric.digits, networks=metric.networks,
                     probe="seeds")  # fmt: skip


def _of_spectrum() -> Iterator[Metric]:
    yield Metric("edge-gap", "lower", "psnr-flat - psnr-edges", probe="spectrum", reads=("psnr-flat", "psnr-edges"),
                 **_from_rows(partial(conditions.difference, "psnr-flat", "psnr-edges")), **_DECIBEL)  # fmt: skip
    for part, what in {"luma": "of luma", "chroma": "of both chroma channels", "flat": "of the other pixels",
                       "edges": "of the fifth of the pixels where luma is steepest"}.items():  # fmt: skip
        yield Metric(f"psnr-{part}", "higher", f"psnr {what}", probe="spectrum", **_DECIBEL)
    for part, octave in itertools.product(("luma", "chroma"), conditions.OCTAVES):
        longest = f" to {2 * octave}" if octave < conditions.OCTAVES[-1] else ""
        yield Metric(conditions.at(f"error-{part}", f"{octave}px"), "lower",
                     f"power of the error by that of the image, {part}, wavelengths from {octave}{longest} px",
                     probe="spectrum", **_DECIBEL)  # fmt: skip


def _of_equivariance() -> Iterator[Metric]:
    changes = {"shift": "shifted by 1 to f - 1 px", "flip": "mirrored", "half": "halved in size"}
    for change, what in changes.items():
        yield Metric(f"equi-{change}", "higher", f"psnr of the reconstruction of the image {what} against the "
                     f"reconstruction {what}", probe="equivariance", **_DECIBEL)  # fmt: skip
    for change in ("flip", "half"):
        what = changes[change]
        yield Metric(f"latent-{change}", "lower", f"distance of the latents of the image {what} from its latents "
                     f"{what}, by their deviation", probe="equivariance", low=0.0, tolerance=0.01,
                     digits=3)  # fmt: skip
        yield Metric(f"decode-{change}", "higher", f"psnr of the image that latents {what} give against the "
                     f"reconstruction {what}", probe="equivariance", **_DECIBEL)  # fmt: skip


def _of_text() -> Iterator[Metric]:
    columns = [conditions.at(side, f"{height}px") for side in ("read", "reread") for height in conditions.TEXT_HEIGHTS]
    yield Metric("legible-px", "lower", "font size from which on 90 % of what was readable stays readable", unit="px",
                 probe="legibility", reads=tuple(columns), compute=conditions.legible, digits=0)  # fmt: skip
    for name in columns:
        before = name.startswith("read@")
        yield Metric(name, "neither" if before else "higher", f"share of characters of so large a font that OCR reads "
                     f"in the {'original' if before else 'reconstruction'}", probe="legibility", **_READ)  # fmt: skip
    for kind in ("text", "face"):
        yield Metric(f"{kind}-psnr", "higher", f"psnr inside boxes of {kind}", probe=f"{kind}-boxes", **_DECIBEL)
        yield Metric(f"{kind}-lpips", "lower", f"lpips-alex inside boxes of {kind}", probe=f"{kind}-boxes", **_LPIPS)
    for name, what in {"accuracy": "words in boxes that OCR reads without error",
                       "ned": "characters of words in boxes that OCR reads"}.items():  # fmt: skip
        yield Metric(f"text-{name}", "higher", f"share of {what}", probe="text-boxes", **_READ)


_PROBED = (_of_round_trips, _of_noise, _of_seeds, _of_spectrum, _of_equivariance, _of_text)
METRICS |= {metric.name: metric for given in _PROBED for metric in list(given())}


def metrics_of(probe: str) -> list[Metric]:
    """What a probe gives, its headline first."""
    return [metric for metric in METRICS.values() if metric.probe == probe]


# What `run` measures when nobody asks for less or more; the last five only where there are codes or latents.
DEFAULT = ("psnr", "psnr-global", "ssim", "ssim-gauss", "lpips-alex", "lpips-vgg", "pd-mobilenet", "rfid",
           "mind-inception", "mind-dinov2", "mind-mobilenet",
           "bpp", "perplexity", "codebook-use", "latent-mean", "latent-std")  # fmt: skip


RENAMED: dict[str, str] = {}  # metrics of which this process has another network: `suite.use_weights`


def register_metric(metric: Metric) -> None:
    """Make a metric known to every command; a plugin's `register` calls it. ValueError for a wrong or taken name."""
    if metric.name in METRICS or not registry.ROW_NAME.fullmatch(metric.name):
        raise ValueError(f"metric {metric.name!r}: taken already, or not of a-z 0-9 . _ -")
    METRICS[metric.name] = metric


EXTRACTORS: dict[str, Kind] = {}  # those of plugins; the others are in `metrics.extractors`


def register_extractor(
    name: str, build: Callable[[Any], Any], *, dim: int, preprocessing: str, summary: str, network: str = ""
) -> None:
    """Make features known, and their distances fd-NAME and mind-NAME; a plugin's `register` calls it.

    The rest is as in `Kind`. ValueError for a wrong or taken name.
    """
    networks = (network,) if network else ()
    register_metric(_frechet(f"fd-{name}", name, summary, networks))
    register_metric(_monge(f"mind-{name}", name, summary, networks))
    EXTRACTORS[name] = Kind(network, build, dim, preprocessing)


def find_metrics(names: Sequence[str], scope: Literal["reconstruction", "both"] = "both") -> list[Metric]:
    """The metrics of these names, in the table's order, each once; InputError with close matches for another.

    `scope` "reconstruction" refuses what would not be measured on the images that its name promises.
    """
    from difflib import get_close_matches

    for name in names:
        if name not in METRICS:
            close = get_close_matches(name, METRICS, 3, 0.5)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise InputError(f"unknown metric {name!r}: {hint}known are {', '.join(METRICS)}")
        if scope == "reconstruction" and name == "gfid":
            raise InputError("gfid is a generator's: `tokbench generate`; of reconstructions the name is rfid")
        if scope == "reconstruction" and METRICS[name].scope == "interpolation":
            raise InputError(f"{name} is of interpolated latents: `tokbench latents`")
    wanted = {RENAMED.get(name, name) for name in names}
    return [metric for metric in METRICS.values() if metric.name in wanted]


def users_of_networks() -> dict[str, list[str]]:
    """Which metrics need each network, by the network's name."""
    users: dict[str, list[str]] = {}
    for metric in METRICS.values():
        for network in metric.networks if not metric.probe else ():
            users.setdefault(network, []).append(metric.name)
    return users


registry.load_plugins()  # METRICS holds theirs from here on
