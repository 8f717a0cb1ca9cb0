"""What a probe has in its hands: one tokenizer, and the ways of `run` to reconstruct, decode and score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokbench.data.pixels import quantise
from tokbench.evaluation.reconstruct import (
    Timer,
    autocast_dtype,
    decode,
    model_errors_as_cell_errors,
    padded,
    round_trip,
)
from tokbench.metrics.conditions import at
from tokbench.metrics.suite import MetricSuite
from tokbench.records.measurement import Measurement
from tokbench.runtime.device import precision
from tokbench.tokenizer import Tokenizer

Found = dict[Any, Tensor]  # columns [B] by name, features [B, D] by (side, extractor)


@dataclass(frozen=True)
class Base:
    """A batch and its reconstruction, as `run` makes it."""

    ids: Sequence[str]
    real: Tensor  # uint8 [B, 3, H, W]
    seeds: Tensor  # int64 [B], on the CPU
    fake: Tensor  # uint8 [B, 3, H, W]
    latents: Tensor


@dataclass(frozen=True)
class Look:
    """A tokenizer under a measurement of one seed. What is timed here is no part of the record's times."""

    tokenizer: Tokenizer
    measurement: Measurement
    suite: Callable[[tuple[str, ...]], MetricSuite]  # of these metrics
    timer: Timer
    boxes: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # by id, of images that are annotated

    @property
    def seed(self) -> int:
        return self.measurement.seeds[0]

    def reconstruct(self, ids: Sequence[str], real: Tensor, seeds: Tensor) -> Base:
        """What the saved reconstruction of images uint8 [B, 3, H, W] of any size would be; they are padded for it."""
        height, width = real.shape[2:]
        whole = padded(real, self.tokenizer.info.size_multiple)
        fakes, latents = round_trip(self.tokenizer, (ids, whole, seeds[:, None]), self.measurement, self.timer)
        return Base(ids, real, seeds, fakes[self.seed][0][..., :height, :width], latents)

    def decode(self, ids: Sequence[str], latents: Tensor, seeds: Tensor, size: Sequence[int]) -> Tensor:
        """latents -> uint8 [B, 3, *size], rounded by the protocol."""
        height, width = (side + -side % self.tokenizer.info.size_multiple for side in size)
        name, dtype = self.tokenizer.info.name, autocast_dtype(self.measurement)
        with model_errors_as_cell_errors(name), precision(latents.device, dtype):
            images = decode(self.tokenizer, latents, seeds, (height, width), ids, self.timer)
        return quantise(images, self.measurement.rules.fake_rounding)[..., : size[0], : size[1]]

    def score(self, names: tuple[str, ...], real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Columns [B] of these metrics, of uint8 [B, 3, H, W] twice."""
        return self.suite(names).score(real, fake)

    def under(self, condition: object, names: tuple[str, ...], real: Tensor, fake: Tensor) -> Found:
        """Columns, and features of the fakes, of metrics as `metrics.conditions.under` reads them."""
        found: Found = {at(name, condition): values for name, values in self.score(names, real, fake).items()}
        with torch.inference_mode():
            for name, extract in self.suite(names).extractors.items():
                found["fake", at(name, condition)] = extract(fake)
        return found
