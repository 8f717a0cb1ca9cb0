"""Rows that need no training: the identity, resampling, image codecs and linear projections.

They are the floors and anchors of a table: a learned tokenizer that loses to `linear-f8c4` has not learned anything,
and "as good as jpeg q N" is a statement everybody understands.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, features
from torch import Tensor, nn

from tokbench.checkpoints import load_strictly, read_checkpoint
from tokbench.data.pixels import to_float
from tokbench.errors import InputError
from tokbench.records.result import TokenizerInfo

LENGTH_BYTES = 8  # a codec's latent row starts with the number of bytes that follow it, little-endian
PATCH = 8  # pixels along the side of a block of the linear projections
CHANNELS = 4
NEIGHBOURS = 5  # the ridge decoder sees 5 x 5 latents
FITTED = "linear-f8c4.safetensors"  # holds the PCA as well


class Identity:
    """Returns its input: every distance must be zero, and what a metric says then is its own floor."""

    networks: Mapping[str, nn.Module] = {}

    def __init__(self) -> None:
        self.info = TokenizerInfo(name="identity", family="identity", note="returns the image itself")

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> the same."""
        return images

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 in [-1, 1]."""
        return to_float(latents)


class Resample:
    """Mean over f x f pixels, then bicubic interpolation (torch's, a = -0.75): what 3 channels give for free."""

    networks: Mapping[str, nn.Module] = {}

    def __init__(self, factor: int) -> None:
        if factor < 1:
            raise InputError(f"bicubic-f{factor}: the factor must be at least 1")
        self.info = TokenizerInfo(
            name=f"bicubic-f{factor}",
            family="resampling",
            downsample=factor,
            channels=3,
            latent_space="pixels",
            size_multiple=factor,
            note="mean over blocks, bicubic up",
        )
        self.factor = factor

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, 3, H / f, W / f] in [-1, 1]."""
        return F.avg_pool2d(to_float(images), self.factor)

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """float32 [B, 3, H / f, W / f] -> float32 [B, 3, H, W]."""
        return F.interpolate(latents, size=size, mode="bicubic", align_corners=False)


# Options of Pillow besides the quality, and what they are.
CODECS: dict[str, tuple[dict[str, Any], str]] = {
    "jpeg": ({"optimize": True}, "4:2:0, optimised Huffman tables"),
    "webp": ({"method": 4}, "lossy, method 4"),
    "avif": ({"speed": 6, "max_threads": 1}, "4:2:0, speed 6"),
    "jxl": ({"effort": 7}, "effort 7"),
}


class Codec:
    """An image codec of Pillow; the latents are its files as uint8 [B, 8 + longest], each after its length."""

    networks: Mapping[str, nn.Module] = {}

    def __init__(self, name: str, file_format: str, note: str, **options: Any) -> None:
        self.info = TokenizerInfo(name=name, family="codec", note=note)
        self.file_format = file_format
        self.options = options

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> uint8 [B, 8 + longest file]."""
        files = [self._compress(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        rows = np.zeros((len(files), LENGTH_BYTES + max(map(len, files), default=0)), dtype=np.uint8)
        for row, file in zip(rows, files, strict=True):
            row[:LENGTH_BYTES] = np.frombuffer(len(file).to_bytes(LENGTH_BYTES, "little"), dtype=np.uint8)
            row[LENGTH_BYTES : LENGTH_BYTES + len(file)] = np.frombuffer(file, dtype=np.uint8)
        return torch.from_numpy(rows).to(images.device)

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """uint8 [B, 8 + longest file] -> float32 [B, 3, H, W] in [-1, 1]."""
        pixels = []
        for row, length in zip(latents.cpu().numpy(), self._lengths(latents).tolist(), strict=True):
            with Image.open(io.BytesIO(row[LENGTH_BYTES : LENGTH_BYTES + length].tobytes())) as image:
                pixels.append(np.asarray(image.convert("RGB")))
        return to_float(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(latents.device))

    def bits(self, latents: Tensor) -> Tensor:
        """float64 [B]: size of each whole file, headers included."""
        return 8 * self._lengths(latents).double()

    def _compress(self, pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, self.file_format, **self.options)
        return buffer.getvalue()

    def _lengths(self, latents: Tensor) -> Tensor:
        places = 256 ** torch.arange(LENGTH_BYTES - 1, dtype=torch.int64, device=latents.device)
        return (latents[:, : LENGTH_BYTES - 1].long() * places).sum(1)


def codec(file_format: str, quality: int) -> Codec:
    """`jpeg`, `webp`, `avif` or `jxl` at quality 0 to 100 (jpeg from 1); InputError if Pillow cannot write it."""
    name = f"{file_format}-q{quality}"
    lowest = 1 if file_format == "jpeg" else 0
    if not lowest <= quality <= 100:
        raise InputError(f"{name}: quality must be from {lowest} to 100")
    if file_format == "avif" and not features.check("avif"):
        raise InputError(f"{name}: this Pillow was built without AVIF; pip install --upgrade 'pillow>=11.3'")
    if file_format == "jxl":
        try:
            import pillow_jxl  # noqa: F401  # registers the format with Pillow
        except ImportError as error:
            raise InputError(f"{name}: Pillow writes JPEG XL by a plugin; pip install pillow-jxl-plugin") from error
    options, note = CODECS[file_format]
    return Codec(name, file_format.upper(), f"{note}; headers counted", quality=quality, **options)


class Linear:
    """A linear encoder of 8 x 8 blocks (PCA, whitened) and a linear decoder of one block or of its neighbourhood."""

    def __init__(self, name: str, encoder: nn.Module, decoder: nn.Module, note: str) -> None:
        self.networks = {"encoder": encoder, "decoder": decoder}
        self.info = TokenizerInfo(
            name=name,
            family="linear",
            downsample=PATCH,
            channels=CHANNELS,
            latent_space="pca-f8c4",
            size_multiple=PATCH,
            trained_on="142 photographs",
            note=note,
        )

    @torch.no_grad()
    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, 4, H / 8, W / 8], about unit variance."""
        return self.networks["encoder"](to_float(images))

    @torch.no_grad()
    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """float32 [B, 4, H / 8, W / 8] -> float32 [B, 3, H, W]."""
        return self.networks["decoder"](latents)


def linear(name: str, file: Path | None = None) -> Linear:
    """`pca-f8c4`: blocks decoded alone; `linear-f8c4`: ridge regression from 5 x 5 latents. `file`: another fit."""
    path = file or Path(__file__).parent / "weights" / FITTED
    state, _ = read_checkpoint(path)
    encoder = nn.Conv2d(3, CHANNELS, PATCH, stride=PATCH)
    size = 1 if name == "pca-f8c4" else NEIGHBOURS
    convolution = nn.Conv2d(CHANNELS, 3 * PATCH**2, size, padding=size // 2, padding_mode="replicate")
    decoder = nn.Sequential(convolution, nn.PixelShuffle(PATCH))
    for part, module in (("encoder.", encoder), (f"{name}.", decoder)):
        load_strictly(module, state, path, part)
    note = "8x8 block PCA" if name == "pca-f8c4" else "ridge decoder over 5x5 latents of an 8x8 block PCA"
    return Linear(name, encoder.requires_grad_(False), decoder.requires_grad_(False), note)
