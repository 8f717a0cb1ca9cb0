"""A tokenizer small enough for tests, given to tokbench as `tests/tiny.py:tiny`; its options make it misbehave."""

import time

import torch
from torch import Tensor, nn

from tokbench.records.result import TokenizerInfo
from tokbench.runtime.seeding import normal


class Tiny:
    def __init__(self, noise: float, fault: str, slow: float, multiple: int, codes: bool, bias: float) -> None:
        generator = torch.Generator().manual_seed(0)
        encoder, decoder = nn.Conv2d(3, 4, 4, 4), nn.ConvTranspose2d(4, 3, 4, 4)
        for parameter in (*encoder.parameters(), *decoder.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + bias
        self.networks = {"encoder": encoder, "decoder": decoder}
        self.noise, self.fault, self.slow, self.codes = noise, fault, slow, codes
        self.info = TokenizerInfo(
            name="tiny",
            family="tiny",
            downsample=4,
            channels=None if codes else 4,
            codebook_size=8 if codes else None,
            size_multiple=multiple,
            deterministic=noise == 0,
        )

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        time.sleep(self.slow)
        if self.fault == "memory" and len(images) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        latents = self.networks["encoder"](images.float() / 127.5 - 1)
        if self.fault == "overwrite":
            images.zero_()
        if self.fault == "latents":
            return (latents,)  # type: ignore[return-value]
        return latents.abs().sum(1).mul(4).long().clamp(max=7) if self.codes else latents

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        if self.fault == "latents":
            (latents,) = latents
        if self.codes:
            latents = latents[:, None].float().expand(-1, 4, -1, -1) / 8
        images = self.networks["decoder"](latents)
        if self.noise:
            images = images + self.noise * normal(seeds, images.shape[1:], device=images.device)
        if self.fault == "nan":
            images = images.clone()
            images[-1, 0, 0, 0] = float("nan")
        if self.fault == "shape":
            images = images[:, :, 1:]
        return images.byte() if self.fault == "uint8" else images


def tiny(
    noise: float = 0.0, fault: str = "", slow: float = 0.0, multiple: int = 4, codes: bool = False, bias: float = 0.0
) -> Tiny:
    if fault == "load":
        raise OSError("the weights are gone")
    return Tiny(noise, fault, slow, multiple, codes, bias)
