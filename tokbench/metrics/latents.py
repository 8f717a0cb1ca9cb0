"""What latents tell of their space without a generator: sums over images, and statistics of the sums. Float64 numpy.

Every statistic of channels or frequencies is a function of `Sums`, which add up: leaving out one group of images after
the other gives its error (the jackknife), from one pass over the latents. Latents are those that travel, normalised by
the tokenizer's own scale and shift.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

GROUPS = 16  # of the jackknife
BLOCK = 1 << 23  # numbers turned to float64 at a time
NEAR, FAR = 32.0, 96.0  # pixels: up to here positions are neighbours, from here on they are distant
RING = 16.0  # pixels, width of the rings that similarity is averaged over; one step of the slope
RINGS = 8
SEC_SHARE = 0.5  # of the largest u + v
NEIGHBOURS = 10
ROUNDS = 5  # of the flip-flop
_kept: list[tuple[Any, "Sums"]] = []  # the last latents and their sums: a dozen statistics ask for them in turn


@dataclass(frozen=True)
class Latents:
    """Of N images: float [N, C * H * W]. `step`: pixels of the image per position."""

    rows: np.ndarray
    channels: int
    height: int = 1
    step: float = 0.0

    def blocks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """float64 [n, C, H, W] of these rows."""
        size = max(1, BLOCK // self.rows.shape[1])
        for start in range(0, len(rows), size):
            part = np.asarray(self.rows[rows[start : start + size]], dtype=np.float64)
            yield part.reshape(len(part), self.channels, self.height, -1)


@dataclass(frozen=True)
class Sums:
    """Over images and positions. With a leading dimension of groups, or added up."""

    count: np.ndarray  # positions
    first: np.ndarray  # [C] of z
    second: np.ndarray  # [C, C] of z zᵀ
    third: np.ndarray  # [C] of z³
    fourth: np.ndarray  # [C] of z⁴
    energy: np.ndarray  # [H, W] of the squared cosine transform, over channels too

    def without(self, group: int | None) -> "Sums":
        """Those of all groups, but for one."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Sums(**{k: v.sum(0) - (0 if group is None else v[group]) for k, v in parts.items()})


def sums_of(latents: Latents) -> Sums:
    """By group of images (every 16th)."""
    if _kept and _kept[0][0]() is latents.rows and _kept[0][1].first.shape[1] == latents.channels:
        found = _kept[0][1]
        if found.energy.shape[1] == latents.height:
            return found
    num = min(GROUPS, len(latents.rows))
    found = _added([sums_over(latents, np.arange(g, len(latents.rows), num)) for g in range(num)])
    _kept[:] = [(weakref.ref(latents.rows), found)]
    return found


def _added(parts: list[Sums]) -> Sums:
    return Sums(**{f.name: np.stack([getattr(part, f.name) for part in parts]) for f in fields(Sums)})


def sums_over(latents: Latents, rows: np.ndarray) -> Sums:
    """Of these images, without groups."""
    c, h = latents.channels, latents.height
    w = latents.rows.shape[1] // (c * h)
    down, across = cosines(h), cosines(w)
    first, second, third, fourth = np.zeros(c), np.zeros((c, c)), np.zeros(c), np.zeros(c)
    energy = np.zeros((h, w))
    for z in latents.blocks(rows):
        flat = z.transpose(1, 0, 2, 3).reshape(c, -1)
        first += flat.sum(1)
        second += flat @ flat.T
        third += (flat**3).sum(1)
        fourth += (flat**4).sum(1)
        energy += ((down @ z @ across.T) ** 2).sum((0, 1))
    return Sums(np.array(float(len(rows) * h * w)), first, second, third, fourth, energy)


def cosines(size: int) -> np.ndarray:
    """The orthonormal cosine transform (DCT-II) as a matrix [size, size], frequency by position."""
    k, n = np.arange(size)[:, None], np.arange(size)[None]
    return np.asarray(np.cos(np.pi * k * (2 * n + 1) / (2 * size)) * np.sqrt(np.where(k == 0, 1, 2) / size))


def jackknife(statistic: Callable[[Sums], float], sums: Sums) -> tuple[float, float | None]:
    """A statistic of all images and its standard error, which three groups are the fewest for."""
    value, num = statistic(sums.without(None)), len(sums.count)
    if num < 3 or not np.isfinite(value):
        return value, None
    left = np.array([statistic(sums.without(group)) for group in range(num)])
    return value, float(np.sqrt((num - 1) / num * ((left - left.mean()) ** 2).sum()))


# ---- of channels --------------------------------------------------------------------------------------------------


def mean(sums: Sums) -> np.ndarray:
    """Of each channel [C]."""
    return np.asarray(sums.first / sums.count)


def covariance(sums: Sums) -> np.ndarray:
    """Of the channels, over images and positions, [C, C]."""
    centre = mean(sums)
    return np.asarray(sums.second / sums.count - np.outer(centre, centre))


def deviation(sums: Sums) -> np.ndarray:
    """Of each channel [C]."""
    return np.asarray(np.sqrt(np.diag(covariance(sums)).clip(min=0)))


def eigenvalues(sums: Sums) -> np.ndarray:
    """Of the channels' covariance, largest first, [C]."""
    return np.linalg.eigvalsh(covariance(sums))[::-1].clip(min=0)


def effective_rank(sums: Sums) -> float:
    """exp of the entropy of the covariance's eigenvalues (Roy and Vetterli 2007): 1 to C."""
    shares = eigenvalues(sums)
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def condition_number(sums: Sums) -> float:
    """Largest by smallest eigenvalue of the channels' covariance; infinite where a channel is a sum of others."""
    values = eigenvalues(sums)
    return float(values[0] / values[-1]) if values[-1] > 0 else float("inf")


def correlations(sums: Sums) -> np.ndarray:
    """Of the channels, [C, C]; 0 with a channel that does not vary."""
    spread = deviation(sums)
    return np.asarray(covariance(sums) / np.outer(spread, spread).clip(min=1e-300))


def mean_correlation(sums: Sums) -> float:
    """Mean absolute correlation of two channels; 0 of a single one."""
    matrix = np.abs(correlations(sums))
    num = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (num * (num - 1))) if num > 1 else 0.0


def kurtosis(sums: Sums) -> np.ndarray:
    """Excess kurtosis of each channel [C]: 0 of a Gaussian, below it where values are bounded."""
    m = mean(sums)
    second, third, fourth = np.diag(sums.second) / sums.count, sums.third / sums.count, sums.fourth / sums.count
    central = fourth - 4 * m * third + 6 * m**2 * second - 3 * m**4
    return np.asarray(central / (deviation(sums) ** 4).clip(min=1e-300) - 3)


# ---- of frequencies -----------------------------------------------------------------------------------------------


def radius(height: int, width: int) -> np.ndarray:
    """Spatial frequency of each coefficient [H, W], in units of the Nyquist rate of an axis."""
    return np.hypot(np.arange(height)[:, None] / height, np.arange(width)[None] / width)


def spectrum(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Radially averaged: frequencies [K] from one period on up to the Nyquist rate, mean power of a coefficient [K]."""
    num = min(sums.energy.shape)
    ring = np.rint(radius(*sums.energy.shape) * num).astype(int)
    power = [sums.energy[ring == k].mean() for k in range(1, num)]
    return np.arange(1, num) / num, np.array(power) / sums.count * sums.energy.size / len(sums.first)


def slope(sums: Sums) -> float:
    """Of log power against log frequency: 0 of white noise, about -2 of images."""
    frequency, power = spectrum(sums)
    return float(np.polyfit(np.log(frequency), np.log(power.clip(min=1e-300)), 1)[0])


def high_share(sums: Sums) -> float:
    """Power above half the Nyquist rate, by that of all frequencies but zero."""
    power, frequency = sums.energy, radius(*sums.energy.shape)
    return float(power[frequency > 0.5].sum() / power[frequency > 0].sum())


def sec(sums: Sums) -> float:
    """Spectral Energy Concentration (arXiv 2606.03578, eq. 9): share of energy where u + v is beyond half its range."""
    height, width = sums.energy.shape
    far = np.arange(height)[:, None] + np.arange(width)[None] > SEC_SHARE * (height - 1 + width - 1)
    return float(sums.energy[far].sum() / sums.energy.sum())


# ---- of positions -------------------------------------------------------------------------------------------------


def similarity(latents: Latents) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For blocks of images: mean cosine of positions by displacement [n, K], its distance in pixels and pairs [K].

    Latents are centred on their image's mean, without which a common direction makes all positions alike. The cosines
    are summed for all pairs at once: they are the autocorrelation of the unit vectors.
    """
    for z in latents.blocks(np.arange(len(latents.rows))):
        _, _, h, w = z.shape
        z = z - z.mean((2, 3), keepdims=True)
        z /= np.linalg.norm(z, axis=1, keepdims=True).clip(min=1e-12)
        power = (np.abs(np.fft.rfft2(z, (2 * h, 2 * w))) ** 2).sum(1)
        both = np.fft.irfft2(power, (2 * h, 2 * w))
        y, x = np.arange(-h + 1, h), np.arange(-w + 1, w)
        pairs = (h - np.abs(y))[:, None] * (w - np.abs(x))[None]
        distance = latents.step * np.hypot(y[:, None], x[None])
        yield (both[:, y][:, :, x] / pairs).reshape(len(z), -1), distance.ravel(), pairs.ravel()


def lds(latents: Latents) -> np.ndarray:
    """Local-versus-distant similarity (iREPA, arXiv 2512.10794) of each image [N], near and far in pixels of the image.

    NaN where the grid is too coarse or too small to have both.
    """

    def of(cosine: np.ndarray, distance: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        near, far = (distance > 0) & (distance <= NEAR), distance >= FAR
        if not (near.any() and far.any()):
            return np.full(len(cosine), np.nan)
        means = [cosine[:, part] @ pairs[part] / pairs[part].sum() for part in (near, far)]
        return np.asarray(means[0] - means[1])

    return np.concatenate([of(*block) for block in similarity(latents)])


def cds(latents: Latents) -> np.ndarray:
    """Correlation-decay slope (iREPA) of each image [N]: how much the cosine falls every 16 pixels, up to 128."""

    def of(cosine: np.ndarray, distance: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        ring = np.rint(distance / RING)
        places = [k for k in range(1, RINGS + 1) if (ring == k).any()]
        if len(places) < 2:
            return np.full(len(cosine), np.nan)
        means = [cosine[:, ring == k] @ pairs[ring == k] / pairs[ring == k].sum() for k in places]
        return np.asarray(-np.polyfit(places, np.array(means), 1)[0])

    return np.concatenate([of(*block) for block in similarity(latents)])


# ---- of classes ---------------------------------------------------------------------------------------------------


def lnc(latents: Latents, labels: np.ndarray, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Latent neighbour consistency (arXiv 2606.03578) of each image [N]: share of its neighbours that share its class.

    Neighbours by cosine of the latents' means over positions, centred on the mean of all; no masks of foregrounds.
    """
    rows = np.arange(len(latents.rows))
    pooled = np.concatenate([z.mean((2, 3)) for z in latents.blocks(rows)])
    pooled -= pooled.mean(0)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True).clip(min=1e-12)
    num, found = min(neighbours, len(rows) - 1), []
    for start in range(0, len(rows), 1024):
        part = rows[start : start + 1024]
        cosine = pooled[part] @ pooled.T
        cosine[np.arange(len(part)), part] = -np.inf
        nearest = np.argpartition(-cosine, num - 1, axis=1)[:, :num]
        found.append((labels[nearest] == labels[part, None]).mean(1))
    return np.concatenate(found)


def least_of_a_class(latents: Latents) -> int:
    """Images that a separable covariance needs for its estimate to exist (Dutilleul 1999), and one more."""
    positions = latents.rows.shape[1] // latents.channels
    return int(np.ceil(max(positions / latents.channels, latents.channels / positions))) + 2


def viv(latents: Latents, labels: np.ndarray, sums: Sums) -> list[tuple[float, float]]:
    """Velocity irreducible variance (arXiv 2606.03578, eq. 5) by the number of dimensions, and the share of variance
    that lies within the class, of each class that has images enough; channels brought to deviation 1.

    Covariance of a class: positions times channels, by flip-flop.
    """
    whole = sums.without(None)
    scale = deviation(whole).clip(min=1e-12)[:, None, None]
    found = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) >= least_of_a_class(latents):
            z = np.concatenate(list(latents.blocks(rows))) / scale
            z = (z - z.mean(0)).reshape(len(z), latents.channels, -1)
            roots = np.sqrt(separable_eigenvalues(z))
            found.append((float(np.pi / 2 * roots.mean()), float((z**2).sum(0).mean() / (len(z) - 1))))
    return found


def separable_eigenvalues(z: np.ndarray) -> np.ndarray:
    """Of the covariance of centred [n, C, S], taken as a product of one of channels and one of positions: [C * S]."""
    num, c, s = z.shape
    by_position, by_channel = np.eye(s), np.eye(c)
    for _ in range(ROUNDS):
        solved = np.linalg.solve(by_position, z.transpose(2, 0, 1).reshape(s, -1)).reshape(s, num, c)
        by_channel = _regular(np.einsum("ncs,snd->cd", z, solved, optimize=True) / ((num - 1) * s))
        solved = np.linalg.solve(by_channel, z.transpose(1, 0, 2).reshape(c, -1)).reshape(c, num, s)
        by_position = _regular(np.einsum("ncs,cnt->st", z, solved, optimize=True) / ((num - 1) * c))
    values = [np.linalg.eigvalsh(matrix).clip(min=0) for matrix in (by_channel, by_position)]
    return np.outer(*values).ravel()


def _regular(matrix: np.ndarray) -> np.ndarray:
    """With what a channel that does not vary lacks to be solved for."""
    return matrix + max(1e-12, 1e-9 * float(np.trace(matrix)) / len(matrix)) * np.eye(len(matrix))
