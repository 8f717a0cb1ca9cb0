"""Bias and spread of MIND against the number of images: `python -m tests.bench_mind --photos DIR [--images N]`.

Random crops of photographs and what models make of them, by MobileNetV2 features. What few crops give, against the
value of all: on average (bias), from draw to draw (spread), and how often two models are in the order of all.
"""

import argparse
from itertools import combinations
from statistics import mean

import numpy as np
import torch

from tokbench import registry
from tokbench.data.open import open_source
from tokbench.data.pixels import quantise
from tokbench.data.training_crops import CropConfig, PhotoCrops
from tokbench.metrics.distribution import monge_distances
from tokbench.metrics.extractors import extractors
from tokbench.metrics.statistics import from_half_samples, half_samples
from tokbench.runtime.device import prepare
from tokbench.runtime.seeding import image_seeds

NUMBERS, DRAWS, SIDE, BATCH = (8, 16, 29, 64, 128, 256, 512, 1024), 20, 64, 32


def features(photos: str, models: list[str], num_images: int) -> dict[str, np.ndarray]:
    """float32 [N, 1280] of the crops ("") and of each model's reconstructions."""
    source, extract = open_source(photos), extractors(["mobilenet"])["mobilenet"]
    crops = PhotoCrops(source, range(len(source)), CropConfig(size=SIDE, short_side=(SIDE, 2 * SIDE), flip=False), 0)
    tokenizers = {name: registry.create(name) for name in models}
    for tokenizer in tokenizers.values():
        prepare(tokenizer, torch.device("cpu"))
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("", *models)}
    with torch.inference_mode():
        for start in range(0, num_images, BATCH):
            images = torch.stack([crops[number, SIDE][0] for number in range(start, min(start + BATCH, num_images))])
            seeds = image_seeds(images, 0)
            found[""].append(extract(images).numpy())
            for name, tokenizer in tokenizers.items():
                latents = tokenizer.encode(images, sample=False, seeds=seeds)
                fake = quantise(tokenizer.decode(latents, seeds=seeds, size=(SIDE, SIDE)), "nearest")
                found[name].append(extract(fake).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--models", default="ssdd,klvae,bicubic-f4,bicubic-f8")
    parser.add_argument("--images", type=int, default=2048)
    asked = parser.parse_args()
    real, *fakes = (kept := features(asked.photos, asked.models.split(","), asked.images)).values()
    whole = [float(monge_distances(real, fake, [np.arange(len(real))])[0]) for fake in fakes]
    print(" | ".join(["N", *list(kept)[1:], "order kept", "error / spread"]))
    for num in NUMBERS:
        generator = np.random.default_rng(num)
        draws = [np.sort(generator.choice(len(real), num, replace=False)) for _ in range(DRAWS)]
        values = np.array([monge_distances(real, fake, draws) for fake in fakes])  # [models, draws]
        cells = [
            f"{row.mean() / all_ - 1:+.0%} ± {row.std(ddof=1) / all_:.0%}"
            for row, all_ in zip(values, whole, strict=True)
        ]
        pairs = list(combinations(range(len(fakes)), 2))
        kept_order = mean(np.mean((values[a] < values[b]) == (whole[a] < whole[b])) for a, b in pairs)
        own = real[draws[0]], fakes[0][draws[0]]
        error = from_half_samples(0.0, monge_distances(*own, half_samples(num))).error
        print(" | ".join([str(num), *cells, f"{kept_order:.0%}", f"{error / values[0].std(ddof=1):.2f}"]), flush=True)
    print(" | ".join([str(len(real)), *(f"{value:.1f}" for value in whole), "", ""]))


if __name__ == "__main__":
    main()
