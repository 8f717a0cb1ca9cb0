"""NVIDIA's Cosmos image tokenizers: two TorchScript files a model, which bring their network along.

Facts from github.com/NVIDIA/Cosmos-Tokenizer: images in [-1, 1]; CI has 16 continuous channels, DI codes of six values
on 8, 8, 8, 5, 5 and 5 levels; both in bfloat16. Reading TorchScript runs its own small language only, no Python.
"""

import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from baselines.families.quantisers import before_codes
from baselines.hub import part
from baselines.pretrained import Codes, Continuous, wrap
from baselines.published import PUBLISHED
from tokbench.errors import CellError, first_line


class Scripted(nn.Module):
    """The two networks with the methods that the adapter calls; what an encoder returns besides latents is dropped."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.config = None

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, 3, H, W] in [-1, 1] -> ([B, 16, h, w],) or (codes int64 [B, h, w],)"""
        out = self.encoder(x)
        z, *beside = (out,) if isinstance(out, Tensor) else out
        if not z.is_floating_point():
            for values in beside[:1]:  # what the codes stand for
                before_codes(values)
        return (z if z.is_floating_point() else z.long(),)

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The other way."""
        return (self.decoder(z if z.is_floating_point() else z.int()),)


def read_script(path: Path, name: str) -> nn.Module:
    """A TorchScript module in its own precision, which its steps may name. Raises CellError if it is none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch calls TorchScript old; these files are nothing else
            return torch.jit.load(path, map_location="cpu").eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise CellError(f"{name}: {path} is no TorchScript file ({first_line(error)})") from error


def published(name: str, file: Path | None, random_weights: bool) -> Continuous:
    """A row of the table from the folder `file` with encoder.jit and decoder.jit, or from the hub.

    Raises CellError if a file is missing or damaged, and for random weights: the files are the only architecture.
    """
    row = PUBLISHED[name]
    if random_weights:
        raise CellError(f"{name}: its network is in its files only, there is none for random weights")
    paths = [part(row, file, one) for one in ("encoder.jit", "decoder.jit")]
    model = Scripted(*(read_script(path, name) for path in paths))
    return wrap(model, replace(row, files=tuple(paths)), random_weights, Codes if row.codebook_size else None)
