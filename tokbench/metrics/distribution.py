"""Distances between sets of features and properties of one set, in float64 and in blocks."""

from collections.abc import Iterator, Sequence

import numpy as np

from tokbench.errors import InputError

KID_SUBSET = 1000  # torch-fidelity's defaults: 100 subsets of 1000, seed 2020
KID_REPEATS = 100
VARIANCE_ROWS = 2000  # pairs that the variance of a kernel distance is estimated from
BLOCK = 1024  # rows of a matrix of distances held at a time
ROUNDING = 1e-12  # of squared lengths, in float64: more than equal distances may differ by
MIND_DIRECTIONS, MIND_SEED = 1000, 2020  # torch-fidelity's defaults
MIND_BLOCK = 100  # directions projected on at a time


def kernel_distance(
    real: np.ndarray, fake: np.ndarray, *, subset: int = KID_SUBSET, repeats: int = KID_REPEATS, seed: int = 2020
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018): unbiased squared MMD of kernel (xᵀy / D + 1)³, mean and spread over subsets.

    With fewer than `subset` samples a side the subset is all of the smaller side, drawn once if the sides are equal.
    The spread is torch-fidelity's figure and no error of the mean: that is `kernel_error`.
    """
    size = min(subset, len(real), len(fake))
    if size < 2:
        raise InputError("a kernel distance needs two samples a side")
    if np.array_equal(real, fake):  # one set is no two samples of a distribution, of which unbiased means below zero
        return 0.0, 0.0
    if len(real) == len(fake) == size:
        repeats = 1
    generator = np.random.RandomState(seed)
    values = []
    for _ in range(repeats):
        # fake first, as torch-fidelity draws its first input: the values then agree to the last digits.
        drawn = [side[np.sort(generator.choice(len(side), size, replace=False))] for side in (fake, real)]
        values.append(_mmd(*(np.asarray(side, dtype=np.float64) for side in drawn)))
    return float(np.mean(values)), float(np.std(values))


def kernel_error(real: np.ndarray, fake: np.ndarray) -> float:
    """Standard error of the kernel distance of features [N, D] and [M, D]: Hoeffding's variance of a U-statistic.

    Pairs (real, fake) are its samples, which has the pairing of reconstructions in it; of sides of unequal number the
    smaller counts. The distance's kernels between an image and its own reconstruction, which are in no U-statistic,
    add to what is linear. Both parts are estimated on at most VARIANCE_ROWS pairs. InputError below four samples.
    """
    count = min(len(real), len(fake))
    if count < 4:
        raise InputError("the error of a kernel distance needs four samples a side")
    if np.array_equal(real, fake):
        return 0.0
    rows = np.sort(np.random.default_rng(0).permutation(count)[:VARIANCE_ROWS])
    x, y = (np.asarray(side[rows], dtype=np.float64) for side in (real, fake))
    used, across = len(rows), _kernel(x, y)
    terms = _kernel(x, x) + _kernel(y, y) - across - across.T
    off_diagonal = terms[~np.eye(used, dtype=bool)]
    both = float(off_diagonal.var())  # of one term
    own = np.diag(across) - across.mean(0) - across.mean(1)
    means = (terms.sum(1) - np.diag(terms)) / (used - 1) - own / count
    one = max(0.0, (float(means.var(ddof=1)) * (used - 1) - both) / (used - 2))  # of a term given one of its pairs
    return float(np.sqrt((4 * (count - 2) * one + 2 * both) / (count * (count - 1))))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def _mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD of float64 [N, D] and [M, D]."""

    def within(side: np.ndarray) -> float:
        kernel = _kernel(side, side)
        return float((kernel.sum() - np.trace(kernel)) / (len(side) * (len(side) - 1)))

    return float(within(x) + within(y) - 2 * _kernel(x, y).mean())


def monge_distances(real: np.ndarray, fake: np.ndarray, subsets: Sequence[np.ndarray]) -> np.ndarray:
    """MIND (Berthet et al., arXiv 2605.06797) of features [N, D] and [M, D] on each of these subsets of rows.

    3 D times the mean squared 2-Wasserstein distance of their projections on random directions. Directions, and the
    rows drawn of the longer of unequal sides, are those that torch-fidelity draws; subsets index what was drawn.
    """
    import torch  # for its generator alone

    generator, count = torch.Generator().manual_seed(MIND_SEED), min(len(real), len(fake))
    sides = [np.asarray(side, dtype=np.float32) for side in (fake, real)]  # in the order of torch-fidelity's inputs
    for i, side in enumerate(sides):
        if len(side) > count:
            sides[i] = side[torch.randperm(len(side), generator=generator)[:count].numpy()]
    directions = torch.randn(MIND_DIRECTIONS, real.shape[1], generator=generator).numpy()
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    totals = np.zeros(len(subsets))
    for start in range(0, MIND_DIRECTIONS, MIND_BLOCK):
        projected = [directions[start : start + MIND_BLOCK] @ side.T for side in sides]
        for i, rows in enumerate(subsets):
            x, y = (np.sort(side[:, rows], axis=1) for side in projected)
            totals[i] += ((x - y) ** 2).mean(axis=1, dtype=np.float64).sum()
    return np.asarray(3 * real.shape[1] * totals / MIND_DIRECTIONS)


def paired_distances(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
    """|f(real) - f(fake)|² per image, float64 [N]."""
    if real.shape != fake.shape:
        raise InputError(f"features of shapes {real.shape} and {fake.shape} cannot be paired")
    distances = np.empty(len(real))
    for start in range(0, len(real), BLOCK):
        part = slice(start, start + BLOCK)
        distances[part] = ((np.asarray(real[part], np.float64) - np.asarray(fake[part], np.float64)) ** 2).sum(1)
    return distances


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL divergence of p(class | image) from p(class), mean and spread over consecutive parts (ADM).

    logits: float [N, classes], the bias left out (Salimans et al. 2016 through FID's Inception).
    """
    scores = []
    for index in range(splits):
        part = np.asarray(logits[index * len(logits) // splits : (index + 1) * len(logits) // splits], dtype=np.float64)
        part = part - part.max(1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(1, keepdims=True))
        p = np.exp(log_p)
        scores.append(float(np.exp((p * (log_p - np.log(p.mean(0, keepdims=True)))).sum(1).mean())))
    return float(np.mean(scores)), float(np.std(scores))


def covered(points: np.ndarray, manifold: np.ndarray, neighbours: int = 3) -> np.ndarray:
    """Which points lie within the k-th neighbour's distance of some sample of the manifold, bool [N], k = 3.

    Precision of Kynkäänniemi et al. 2019 is the share of fakes by the reals' manifold, recall that of reals by the
    fakes'. Both [N, D] of any float type, turned to float64 block by block. A distance equal to the radius is within:
    so is the copy of an image that the manifold holds several times.
    """
    radii = _radii(manifold, neighbours)
    found = []
    for rows in _blocks(points):
        inside, slack = np.zeros(len(rows), dtype=bool), ROUNDING * (rows**2).sum(1, keepdims=True)
        for start, others in zip(range(0, len(manifold), BLOCK), _blocks(manifold), strict=True):
            inside |= (_squared_distances(rows, others) <= radii[start : start + BLOCK] + slack).any(1)
        found.append(inside)
    return np.concatenate(found)


def _blocks(features: np.ndarray) -> Iterator[np.ndarray]:
    """float64 blocks of rows, one in memory at a time."""
    for start in range(0, len(features), BLOCK):
        yield np.asarray(features[start : start + BLOCK], dtype=np.float64)


def _squared_distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    squares: np.ndarray = (points**2).sum(1)[:, None] + (others**2).sum(1)[None] - 2 * points @ others.T
    return squares.clip(min=0)


def _radii(points: np.ndarray, neighbours: int) -> np.ndarray:
    """Squared distance of each point to its k-th neighbour, itself not counted."""
    if len(points) <= neighbours:
        raise InputError(f"{len(points)} samples: precision and recall need more than {neighbours}")
    radii = []
    for rows in _blocks(points):
        nearest = np.empty((len(rows), 0))
        for others in _blocks(points):
            nearest = np.concatenate([nearest, _squared_distances(rows, others)], 1)
            if nearest.shape[1] > neighbours:
                nearest = np.partition(nearest, neighbours, axis=1)[:, : neighbours + 1]
        radii.append(nearest[:, neighbours])
    return np.concatenate(radii)


def perplexity(codes: np.ndarray) -> float:
    """exp of the entropy of all codes, any shape of whole numbers: from 1 (one code) to the size of the codebook."""
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
