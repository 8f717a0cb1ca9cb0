"""Photographs kept out of training: which they are, and how a model in training does on them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokbench.crops import hold_out
from tokbench.device import precision
from tokbench.images import crop
from tokbench.protocols import PROTOCOLS
from tokbench.reconstruct import quantise
from tokbench.seeding import image_seeds
from tokbench.tokenizer import Tokenizer
from tokbench.training import RunConfig


def open_photographs(data: str, run: RunConfig) -> tuple[Any, list[int], list[int]]:
    """The source, and which of its images train and which are held out for scoring, by subject."""
    from tokbench.data import open_source

    source = open_source(data, None, None)
    train, held = hold_out(source.ids, run.held_out) if run.held_out else (list(range(len(source.ids))), [])
    return source, train, held


def held_out_images(source: Any, indices: Sequence[int], resolution: int) -> Tensor:
    """The adm crops of these photographs, uint8 [N, 3, R, R]."""
    crops = [crop(source.read(index), resolution, PROTOCOLS["adm"]).transpose(2, 0, 1) for index in indices]
    return torch.from_numpy(np.stack(crops)) if crops else torch.empty(0, 3, resolution, resolution, dtype=torch.uint8)


def score(tokenizer: Tokenizer, real: Tensor, device: torch.device) -> dict[str, float]:
    """Means of the harness's per-image metrics on held-out photographs, uint8 [N, 3, R, R], under its adm protocol."""
    from tokbench.metrics.perceptual import lpips_network

    alex = lpips_network("alex", safe=False).to(device)
    rows: dict[str, list[float]] = {"psnr": [], "lpips-alex": []}
    with precision(device, torch.float32):
        for part in real.split(2):
            seeds = image_seeds(part, 0)
            latents = tokenizer.encode(part.to(device), sample=False, seeds=seeds)
            size = (part.shape[2], part.shape[3])
            fake = quantise(tokenizer.decode(latents, seeds=seeds, size=size), "nearest").float()
            part = part.to(device).float()
            rows["psnr"] += (20 * math.log10(255) - 10 * (fake - part).square().mean((1, 2, 3)).log10()).tolist()
            rows["lpips-alex"] += alex(part / 127.5 - 1, fake / 127.5 - 1).tolist()
    return {name: sum(values) / len(values) for name, values in rows.items()}
