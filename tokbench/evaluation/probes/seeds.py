"""How much of a stochastic decoder's error is its noise: eight seeds of every image."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tokbench import registry
from tokbench.evaluation.pictures import GAIN
from tokbench.evaluation.probes.look import Base, Found, Look
from tokbench.metrics import METRICS, SEEDED, metrics_of
from tokbench.metrics.conditions import at
from tokbench.records.result import TokenizerInfo
from tokbench.runtime.device import in_float64
from tokbench.runtime.seeding import image_seeds

NUM_SEEDS = 8


def seeds(look: Look, base: Base) -> Found:
    """Law of total variance: the squared error over seeds is that of their mean plus their variance."""
    real = in_float64(base.real)
    total, squares, errors = torch.zeros_like(real), torch.zeros_like(real), torch.zeros_like(real)
    scores: dict[str, list[Tensor]] = {}
    for fake in reconstructions(look, base):
        levels = in_float64(fake)
        total += levels
        squares += levels.square()
        errors += (levels - real).square()
        for name, values in look.score(SEEDED, base.real, fake).items():
            scores.setdefault(name, []).append(values)
    variance = (squares - total.square() / NUM_SEEDS).clamp(min=0) / (NUM_SEEDS - 1)  # unbiased
    error = errors.flatten(1).mean(1) / NUM_SEEDS
    found = {
        "noise-deviation": variance.sqrt().flatten(1).mean(1),
        "noise-share": torch.where(error > 0, variance.flatten(1).mean(1) / error, 0.0),
    }
    for name in scores.keys() & set(SEEDED):
        values = torch.stack(scores[name])
        ends = values.amax(0), values.amin(0)
        best, worst = ends if METRICS[name].better == "higher" else ends[::-1]
        found |= {at(name, "best"): best, at(name, "mean"): values.mean(0), at(name, "worst"): worst}
    return found


def reconstructions(look: Look, base: Base) -> Iterator[Tensor]:
    """uint8 [B, 3, H, W] for each seed, the measurement's own first, all of the same latents."""
    yield base.fake
    for number in range(1, NUM_SEEDS):
        drawn = image_seeds(base.real.cpu(), look.seed + number)
        yield look.decode(base.ids, base.latents, drawn, base.real.shape[2:])


def deviation_map(look: Look, base: Base) -> Tensor:
    """uint8 [B, 3, H, W]: deviation over seeds, GAIN times as large."""
    levels = torch.stack([fake.float() for fake in reconstructions(look, base)])
    return (levels.std(0) * GAIN).clamp(max=255).to(torch.uint8)


def refuses(info: TokenizerInfo) -> Mapping[str, str]:
    reason = "decodes without noise" if info.deterministic else ""
    return {metric.name: reason for metric in metrics_of("seeds") if reason}


registry.register_probe(
    "seeds", seeds, summary="share of a stochastic decoder's error that is its noise, over 8 seeds",
    decodings=NUM_SEEDS - 1, refuses=refuses,
)  # fmt: skip
