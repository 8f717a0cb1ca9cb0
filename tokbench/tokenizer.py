"""The one interface a tokenizer has to offer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tokbench.errors import InputError
from tokbench.records.result import TokenizerInfo


class Tokenizer(Protocol):
    """uint8 images go in, float images come out; the harness alone clamps, rounds and checks for NaN.

    Scale and shift of a latent space live inside encode and decode, so no caller can forget them: the latents that
    travel are normalised, (z - shift) * scale, and decode undoes it.

    `networks` names the parts ("encoder", "decoder") that hold parameters; {} for a codec. The harness moves them to
    the device, sets eval mode and the memory format, counts their parameters and hashes their state: a factory
    returns them as loaded, on the CPU. A part shared by both directions is named once, under "encoder".
    """

    info: TokenizerInfo
    networks: Mapping[str, nn.Module]

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> latents [B, ...] of any shape, on the images' device; int64 are codes.

        `sample` draws from the posterior instead of taking its mode, with a generator per image (tokbench.seeding).
        """
        ...

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """latents -> float32 [B, 3, H, W], nominal [-1, 1], unclamped. `seeds` int64 [B]: one generator per image."""
        ...

    # optional: bits(latents) -> float64 Tensor [B], the measured size of the code, for codecs and discrete tokenizers


class NotFiniteError(ValueError):
    """NaN or infinity where a model may have none; `rows` are the images of the batch that are concerned."""

    def __init__(self, where: str, rows: Sequence[int]) -> None:
        super().__init__(f"NaN or infinity in {where}")
        self.rows = rows


Checks = dict[tuple[str, int], Tensor]
_deferred: ContextVar[Checks | None] = ContextVar("deferred checks", default=None)


def finite(x: Tensor, where: str) -> Tensor:
    """`x` [B, ...] itself. NotFiniteError, in which the harness names the images, if it holds NaN or infinity.

    To be called before a quantiser, which makes some code of whatever it is given.
    """
    good, deferred = torch.isfinite(x).reshape(len(x), -1).all(1), _deferred.get()
    if deferred is None or x.device.type == "cpu":
        refuse({(where, 0): good.cpu().numpy()})
    else:
        deferred[where, len(deferred)] = good
    return x


def refuse(checks: Mapping[tuple[str, int], np.ndarray]) -> None:
    """NotFiniteError for the images of a batch that are not good somewhere, bool [B] by where and number."""
    for (where, _), good in checks.items():
        if not good.all():
            raise NotFiniteError(where, np.flatnonzero(~good).tolist())


@contextmanager
def checks_deferred() -> Iterator[Checks]:
    """Inside, `finite` waits for no GPU: what it found, bool [B] by where and number, waits for `refuse`."""
    checks: Checks = {}
    token = _deferred.set(checks)
    try:
        yield checks
    finally:
        _deferred.reset(token)


def _latents(info: TokenizerInfo) -> str:
    kind = f"{info.codebook_size} codes" if info.codebook_size else f"{info.channels} channels"
    return f"{info.name} has f{info.downsample}, {kind}, latent space {info.latent_space or 'unnamed'}"


class Joined:
    """`A+B`: the encoder of one tokenizer and the decoder of another that shares its latent space.

    Raises InputError describing both if their latents differ in downsampling, channels, codebook or latent space.
    """

    def __init__(self, encoding: Tokenizer, decoding: Tokenizer) -> None:
        first, second = encoding.info, decoding.info
        same = ("downsample", "channels", "codebook_size", "tokens_per_image", "latent_space")
        if any(getattr(first, what) != getattr(second, what) for what in same):
            raise InputError(f"{first.name}+{second.name}: latents differ: {_latents(first)}; {_latents(second)}")
        self.encoding, self.decoding = encoding, decoding
        # A decoder may need parts that its own encoder shares with it: they move along, but are counted as neither.
        parts = [("encoder", encoding, "encoder"), ("decoder", decoding, "decoder")]
        parts += [("rest.decoder", encoding, "decoder"), ("rest.encoder", decoding, "encoder")]
        self.networks: Mapping[str, nn.Module] = {
            name: owner.networks[part] for name, owner, part in parts if part in owner.networks
        }
        self.info = replace(
            second,
            name=f"{first.name}+{second.name}",
            family=first.family if first.family == second.family else f"{first.family}+{second.family}",
            size_multiple=math.lcm(first.size_multiple, second.size_multiple),
            trained_on="; ".join(dict.fromkeys(filter(None, (first.trained_on, second.trained_on)))),
            losses=tuple(dict.fromkeys((*first.losses, *second.losses))),
            licence="; ".join(dict.fromkeys(filter(None, (first.licence, second.licence)))),
            verified=first.verified and second.verified,
            note="; ".join(dict.fromkeys(filter(None, (first.note, second.note)))),
        )
        if hasattr(encoding, "bits"):
            self.bits = encoding.bits

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> latents of the first tokenizer."""
        return self.encoding.encode(images, sample=sample, seeds=seeds)

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """latents -> float32 [B, 3, H, W] of the second tokenizer."""
        return self.decoding.decode(latents, seeds=seeds, size=size)
