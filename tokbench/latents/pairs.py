"""The `Pairs` of a card: images and their latents alone, or what is decoded halfway between neighbouring latents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tokbench.data.pixels import quantise
from tokbench.evaluation.evaluate import Reconstructions
from tokbench.evaluation.reconstruct import (
    Columns,
    Fakes,
    Features,
    autocast_dtype,
    decode,
    model_errors_as_cell_errors,
)
from tokbench.metrics.latents import BLOCK
from tokbench.runtime.device import in_float64, precision

CANDIDATES = 10  # nearest latents that a neighbour is drawn of
SMALL_ANGLE = 1e-6


@dataclass
class Encodings(Reconstructions):
    """Images and their latents; nothing is decoded."""

    def fakes(self, ids: Sequence[str], real: Tensor, beside: Tensor) -> tuple[Fakes, Columns, Features]:
        """The images themselves, which no metric of latents looks at, and the columns of the latents, and these."""
        latents = self.encode(ids, real, beside)
        columns = self.columns(ids, latents, (real.shape[2], real.shape[3]))
        return dict.fromkeys(self.measurement.seeds, (real, None)), columns, self.features(latents)

    def encode(self, ids: Sequence[str], real: Tensor, seeds: Tensor) -> Tensor:
        """The latents of images on the device, by the first seed."""
        sample, tokenizer = self.measurement.rules.posterior == "sample", self.tokenizer
        call = partial(tokenizer.encode, real.clone(), sample=sample, seeds=seeds[:, 0])
        with model_errors_as_cell_errors(tokenizer.info.name), precision(real.device, autocast_dtype(self.measurement)):
            return self.timer.time("encode", len(ids), call)


@dataclass
class Midpoints(Encodings):
    """Images, and what is decoded halfway from each one's latent to a neighbour's (iFID, arXiv 2603.05630).

    A neighbour is drawn of the ten latents of largest cosine, as their code does, with probability softmax of minus the
    mean squared distance; unlike theirs it is of the same images. `latents` are those of all images, [N, D] by id.
    """

    latents: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    ids: Sequence[str] = ()
    neighbours: dict[str, int] = field(default_factory=dict)

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[Sequence[str], Tensor, Tensor]]:
        """Ids, images uint8 [B, 3, H, W] and their seeds int64 [B, S]; first the neighbours of all are found."""
        place = {sample: i for i, sample in enumerate(self.ids)}
        own = [self.source.ids[index] for index in indices if self.source.ids[index] in place]
        found = neighbours(self.latents, [place[sample] for sample in own], self.timer.device)
        self.neighbours |= dict(zip(own, found.tolist(), strict=True))
        yield from super().batches(indices)

    def fakes(self, ids: Sequence[str], real: Tensor, beside: Tensor) -> tuple[Fakes, Columns, Features]:
        """What is decoded between, by seed; no columns."""
        own = self.encode(ids, real, beside)
        rows = np.stack([self.latents[self.neighbours[sample]] for sample in ids])
        mixed = slerp(own.float(), torch.from_numpy(rows).to(own.device).reshape(own.shape)).to(own.dtype)
        fakes, size, dtype = {}, (real.shape[2], real.shape[3]), autocast_dtype(self.measurement)
        with model_errors_as_cell_errors(self.tokenizer.info.name), precision(real.device, dtype):
            for seed, seeds in zip(self.measurement.seeds, beside.unbind(1), strict=True):
                image = decode(self.tokenizer, mixed, seeds, size, ids, self.timer)
                fakes[seed] = quantise(image, self.measurement.rules.fake_rounding), image
        return fakes, {}, {}


def neighbours(latents: np.ndarray, rows: Sequence[int], device: torch.device, seed: int = 0) -> np.ndarray:
    """A neighbour of each of these rows of float [N, D], another row: drawn the same for a row whoever asks."""
    count = min(CANDIDATES, len(latents) - 1)
    draws = np.random.default_rng(seed).random(len(latents))
    block = max(1, BLOCK // latents.shape[1])
    chosen = []
    for start in range(0, len(rows), block):
        part = np.asarray(rows[start : start + block])
        own = torch.from_numpy(np.asarray(latents[part])).to(device)
        best, places, apart = (torch.empty(len(part), 0, device=device) for _ in range(3))
        for first in range(0, len(latents), block):
            others = torch.from_numpy(np.array(latents[first : first + block])).to(device)
            index = torch.arange(first, first + len(others), device=device)
            cosine = torch.nn.functional.normalize(own) @ torch.nn.functional.normalize(others).T
            cosine[torch.from_numpy(part).to(device)[:, None] == index] = -torch.inf
            squared = own.square().sum(1)[:, None] + others.square().sum(1) - 2 * own @ others.T
            best, order = torch.cat((best, cosine), 1).topk(min(count, best.shape[1] + len(others)), dim=1)
            places = torch.cat((places, index.expand(len(part), -1)), 1).gather(1, order)
            apart = torch.cat((apart, squared / own.shape[1]), 1).gather(1, order)
        shares = torch.softmax(-in_float64(apart), dim=1).cumsum(1).cpu().numpy()
        picked = (shares < draws[part][:, None]).sum(1).clip(max=count - 1)
        chosen.append(places.cpu().numpy()[np.arange(len(part)), picked].astype(int))
    return np.concatenate(chosen) if chosen else np.empty(0, int)


def slerp(a: Tensor, b: Tensor, share: float = 0.5) -> Tensor:
    """Spherical interpolation of each sample as one vector, [B, ...] twice; straight where they point the same way."""
    x, y = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(x, y).clamp(-1, 1)
    angle = torch.acos(cosine)[:, None]
    straight = angle.sin() < SMALL_ANGLE
    divisor = torch.where(straight, 1.0, angle.sin())
    first = torch.where(straight, 1 - share, torch.sin((1 - share) * angle) / divisor)
    second = torch.where(straight, share, torch.sin(share * angle) / divisor)
    return (first * x + second * y).reshape(a.shape)
