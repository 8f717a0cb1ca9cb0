"""The study's statistics: crossed bootstrap over images and seeds, Holm's correction, what follows from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
MARGIN = 0.3  # dB of psnr that do not count as inferior
Tables = Mapping[str, Mapping[str, np.ndarray]]  # name of a trained model -> column -> float64 [N]


@dataclass(frozen=True)
class Contrast:
    """A difference of two arms with its crossed-bootstrap interval."""

    arm: str
    base: str
    metric: str
    mean: float
    low: float
    high: float
    p: float
    by_seed: tuple[float, ...]

    @property
    def seeds_agree(self) -> bool:
        return len({np.sign(value) for value in self.by_seed}) == 1

    @property
    def signs(self) -> str:
        """The difference for every training seed."""
        return " ".join(f"{value:+.4f}" for value in self.by_seed)


def values(tables: Tables, arm: str, seeds: Sequence[int], metric: str) -> np.ndarray:
    """float64 [S, N]: per training seed and image."""
    return np.stack([tables[f"{arm}-{seed}"][metric] for seed in seeds])


def crossed_bootstrap(matrix: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means [DRAWS] of [S, N] with seeds and images drawn anew, each with replacement."""
    num_seeds, num_images = matrix.shape
    seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=DRAWS) / num_seeds
    images = generator.multinomial(num_images, np.full(num_images, 1 / num_images), size=DRAWS) / num_images
    return np.asarray(((images @ matrix.T) * seeds).sum(1))


def contrast(tables: Tables, seeds: Sequence[int], arm: str, base: str, metric: str) -> Contrast:
    """arm - base on a metric, paired by image and seed."""
    difference = values(tables, arm, seeds, metric) - values(tables, base, seeds, metric)
    draws = crossed_bootstrap(difference, np.random.default_rng(0))
    low, high = np.quantile(draws, [0.025, 0.975])
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (DRAWS + 1))
    return Contrast(
        arm, base, metric, float(difference.mean()), float(low), float(high), float(p), tuple(difference.mean(1))
    )


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given."""
    order = np.argsort(p_values)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def conclusions(verdicts: dict[str, str], psnr: Contrast) -> dict[str, str]:
    """PLAN.md's "What would count", from the verdicts on c-student by the arm that it is compared with."""
    inferior = psnr.high < -MARGIN and psnr.seeds_agree
    against_a = "worse" if inferior else verdicts["a"]
    if against_a == "better" and psnr.low <= -MARGIN:
        against_a = "not resolved"
    pair = {verdicts["c-teacher"], verdicts["c-control"]}
    distilled = "worse" if "worse" in pair else "better" if pair == {"better"} else "not resolved"
    words = {"better": "for it", "worse": "against it", "not resolved": "undecided"}
    answers = {
        f"SSDD instead of a convolutional decoder (c-student below a, psnr not inferior by {MARGIN} dB)": against_a,
        "diffusion, not the network, as the cause (c-student below b)": verdicts["b"],
        "distillation (c-student below c-teacher in one step and below c-control, the latter uncorrected)": distilled,
    }
    return {question: words[answer] for question, answer in answers.items()}


def verdict(c: Contrast, p: float) -> str:
    """A claim only if the corrected test and every seed agree."""
    if p >= 0.05 or not c.seeds_agree:
        return "not resolved"
    return "worse" if c.mean > 0 else "better"
