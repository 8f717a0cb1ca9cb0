"""Latents to codes and back, for every family: a codebook's nearest vector, or the signs of channels."""

import torch
from torch import Tensor, nn

from tokbench.tokenizer import finite


class Codebook(nn.Module):
    """[K, d] under the name that published files give it."""

    def __init__(self, size: int, dimensions: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dimensions)


def before_codes(z: Tensor) -> Tensor:
    """What is about to be quantised, [B, ...]. NotFiniteError for NaN or infinity, which would become some code."""
    return finite(z, "the encoder's output, before its quantiser")


def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """float [B, d, h, w], float [K, d] -> int64 [B, h, w], the nearest code of each position in squared distance.

    One image at a time: the distances of a 256 px image at f4 to 16,384 codes are 268 MB already.
    """
    halved = codebook.square().sum(1) / 2
    return torch.stack([(halved - image.permute(1, 2, 0) @ codebook.T).argmin(-1) for image in before_codes(z)])


def signs_to_codes(z: Tensor, dim: int) -> Tensor:
    """float [..., bits, ...] -> int64 without dimension `dim`; bit i of a code is one where entry i is positive."""
    signs = (before_codes(z) > 0).long().movedim(dim, -1)
    return (signs << torch.arange(signs.shape[-1], device=z.device)).sum(-1)


def codes_to_signs(codes: Tensor, bits: int, dim: int) -> Tensor:
    """int64 [...] -> int64 [..., bits, ...] of -1 and 1: the way back."""
    places = torch.arange(bits, device=codes.device)
    return ((codes[..., None] >> places & 1) * 2 - 1).movedim(-1, dim)


def code_bits(codes: Tensor, size: int) -> Tensor:
    """int64 [B, ...] -> float64 [B]: what a fixed-length code of `size` words takes."""
    return torch.log2(torch.tensor(float(size), dtype=torch.float64)).expand(len(codes)) * codes[0].numel()
