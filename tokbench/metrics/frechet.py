"""Fréchet distance of two Gaussians fitted to features (Heusel et al. 2017, eq. 6), in float64, without sqrtm.

d² = |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1 S2)^½. With S1 = L Lᵀ the last trace is the sum of the roots of the
eigenvalues of Lᵀ S2 L, which is symmetric: real, fast and stable. Where S1 has no Cholesky factor (fewer images than
features) L is made of its eigenvectors, and where both sides have few images the trace is the nuclear norm of the
N x N matrix of their products.
"""

from dataclasses import dataclass

import numpy as np

from tokbench.errors import InputError
from tokbench.metrics.statistics import half_samples

CHUNK = 4096  # rows turned to float64 at a time


@dataclass(frozen=True)
class Moments:
    """Number of samples, mean [D] and sample covariance [D, D] (ddof 1), float64."""

    n: int
    mean: np.ndarray
    cov: np.ndarray


def moments(features: np.ndarray, rows: np.ndarray | None = None) -> Moments:
    """float [N, D] -> its moments, in chunks; `rows`: of these rows only. InputError for NaN or fewer than two rows."""
    count = len(features) if rows is None else len(rows)
    if features.ndim != 2 or count < 2:
        raise InputError(f"features of shape {features.shape}: a covariance needs two rows or more")
    dim = features.shape[1]
    # Centred on the first rows' mean: sums of squares then lose no digits to a large common offset.
    shift = np.asarray(features[:CHUNK], dtype=np.float64).mean(0)
    total, products = np.zeros(dim), np.zeros((dim, dim))
    for start in range(0, count, CHUNK):
        part = features[start : start + CHUNK] if rows is None else features[rows[start : start + CHUNK]]
        chunk = np.asarray(part, dtype=np.float64) - shift
        total += chunk.sum(0)
        products += chunk.T @ chunk
    mean = total / count
    cov = (products - count * np.outer(mean, mean)) / (count - 1)
    _check_finite(mean, cov)
    return Moments(count, mean + shift, cov)


def check_moments(found: Moments, where: str) -> Moments:
    """The moments, if they can be those of any features; InputError naming `where` if not.

    Of a covariance with negative eigenvalues, or with one triangle alone, the distance could be a perfect 0.
    """
    largest = float(np.abs(found.cov).max())
    if np.abs(found.cov - found.cov.T).max() > 1e-6 * largest:
        raise InputError(f"{where}: its covariance is not symmetric")
    least = float(np.linalg.eigvalsh(found.cov)[0])
    if least < -1e-6 * float(np.trace(found.cov)) or largest == 0:
        raise InputError(f"{where}: its covariance has the eigenvalue {least:.3g}, which no features have")
    return found


def _check_finite(*arrays: np.ndarray) -> None:
    """InputError for NaN, which max(0.0, ...) would otherwise make a perfect distance of."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise InputError("features or their moments hold NaN or infinity")


def distance(real: Moments, fake: Moments) -> float:
    """Squared Fréchet distance of two sets of moments, at least 0 and exactly 0 for equal ones.

    Raises InputError for NaN, infinity or different dimensions.
    """
    if real.mean.shape != fake.mean.shape:
        raise InputError(f"features of {real.mean.shape[0]} and {fake.mean.shape[0]} dimensions cannot be compared")
    _check_finite(real.mean, real.cov, fake.mean, fake.cov)
    if np.array_equal(real.mean, fake.mean) and np.array_equal(real.cov, fake.cov):
        return 0.0
    difference = real.mean - fake.mean
    traces = float(np.trace(real.cov) + np.trace(fake.cov))
    return max(0.0, float(difference @ difference) + traces - 2 * trace_sqrt_product(real.cov, fake.cov))


def trace_sqrt_product(a: np.ndarray, b: np.ndarray) -> float:
    """tr (A B)^½ of two symmetric positive semi-definite matrices [D, D], whatever their rank and scale."""
    try:
        inner = _lower_product(np.linalg.cholesky(a), b)
    except np.linalg.LinAlgError:  # singular: as many columns as the rank, each an eigenvector by the root of its value
        eigenvalues, vectors = np.linalg.eigh(a)
        kept = eigenvalues > eigenvalues[-1] * len(a) * np.finfo(np.float64).eps
        factor = vectors[:, kept] * np.sqrt(eigenvalues[kept])
        inner = factor.T @ b @ factor
    return float(np.sqrt(np.clip(np.linalg.eigvalsh(inner), 0, None)).sum())  # which reads the lower triangle


def _lower_product(factor: np.ndarray, b: np.ndarray, block: int = 256) -> np.ndarray:
    """The lower triangle of Lᵀ B L for a lower triangular L, zeros left out: a third of the work of two products."""
    product = np.zeros_like(b)
    for column in range(0, len(b), block):
        columns = slice(column, column + block)
        right = b[:, column:] @ factor[column:, columns]
        for row in range(column, len(b), block):
            product[row : row + block, columns] = factor[row:, row : row + block].T @ right[row:]
    return product


def few_samples_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """The same distance from features [N, D] with N below D: tr (S1 S2)^½ is the nuclear norm of X1 X2ᵀ, N x N."""
    first, second = (np.asarray(side, dtype=np.float64) for side in (real, fake))
    _check_finite(first, second)
    if np.array_equal(first, second):
        return 0.0
    means = first.mean(0), second.mean(0)
    first, second = ((x - m) / np.sqrt(len(x) - 1) for x, m in zip((first, second), means, strict=True))
    nuclear = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    apart = float(((means[0] - means[1]) ** 2).sum())
    return max(0.0, apart + float((first**2).sum() + (second**2).sum()) - 2 * float(nuclear))


def half_sample_distances(real: np.ndarray, fake: np.ndarray, repeats: int = 8) -> np.ndarray:
    """Distances on half-samples [2 * repeats]: the same images on both sides, and for every model measured on them."""
    values = []
    for rows in half_samples(min(len(real), len(fake)), repeats):
        if len(rows) < real.shape[1]:
            values.append(few_samples_distance(real[rows], fake[rows]))
        else:
            values.append(distance(moments(real, rows), moments(fake, rows)))
    return np.array(values)
