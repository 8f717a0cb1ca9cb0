"""Big images in overlapping tiles: any tokenizer on what its memory or its trained positions cannot take whole.

    klvae@tile=512@overlap=64       # encoded and decoded in tiles of 512 px, blended linearly where they overlap

Latents on a grid are blended as pixels are, so an image has one latent of its usual shape; codes change hands in the
middle of an overlap. Latents without a grid (1-D tokens) stay one set a tile. Noise drawn by `seeding.normal` is the
tile's part of the whole image's, so that tiles agree where they overlap.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, pairwise, product

import torch
from torch import Tensor, nn

from tokbench.errors import CellError, InputError
from tokbench.runtime.seeding import Window, seen_through
from tokbench.tokenizer import Joined, Tokenizer


@dataclass(frozen=True)
class Tiling:
    """How images are cut, in pixels.

    The last tile of a side is moved inwards until it is whole, or cut short, as diffusers does it.
    """

    tile: int
    overlap: int
    cut_short: bool = False

    def __str__(self) -> str:
        return f"{self.tile} px, overlap {self.overlap} px" + (", by diffusers" if self.cut_short else "")

    def starts(self, length: int) -> list[int]:
        """Where the tiles along a side begin."""
        step = self.tile - self.overlap
        if length <= self.tile:
            return [0]
        if self.cut_short:
            return list(range(0, length, step))
        return [*range(0, length - self.tile, step), length - self.tile]

    def borders(self, length: int) -> list[int]:
        """Where along a side one tile gives way to the next: the middles of the overlaps."""
        starts = self.starts(length)
        return [(min(before + self.tile, length) + start) // 2 for before, start in pairwise(starts)]

    def windows(self, height: int, width: int) -> list[Window]:
        """The tiles of an image, row by row; a side shorter than a tile is taken whole."""
        places = product(self.starts(height), self.starts(width))
        size = min(self.tile, height), min(self.tile, width)
        return [Window(top, left, size, (height, width), number) for number, (top, left) in enumerate(places)]

    def weights(self, length: int) -> Tensor:
        """float32 [tiles, length]: what each counts at each place of a side, in all 1; linear where two overlap."""
        place = torch.arange(length, dtype=torch.float64) + 0.5
        starts = self.starts(length)
        rows = torch.stack([((place > start) & (place < start + self.tile)).double() for start in starts])
        for i, (before, start) in enumerate(pairwise(starts)):
            rise = ((place - start) / max(before + self.tile - start, 1e-9)).clamp(0, 1)
            rows[i] *= 1 - rise
            rows[i + 1] *= rise
        return (rows / rows.sum(0)).float()


class Tiled:
    """A tokenizer run in tiles, behind the same interface. `overlap` is an eighth of the tile if not given.

    InputError for a tile or an overlap that is no multiple of what the model needs, or an overlap of half a tile.
    """

    def __init__(self, inner: Tokenizer, tile: int, overlap: int | None = None) -> None:
        info = inner.info
        if tiling_of(inner):
            raise InputError(f"{info.name}: is in tiles already; leave tile={tile} out")
        self.unit = info.downsample or 1
        multiple = math.lcm(info.size_multiple, self.unit)
        overlap = tile // 8 // multiple * multiple if overlap is None else overlap
        if tile < 1 or tile % multiple or overlap % multiple:
            raise InputError(f"{info.name}: tile={tile}, overlap={overlap}: both must be multiples of {multiple}")
        if not 0 <= 2 * overlap < tile:
            raise InputError(f"{info.name}: overlap={overlap}: must be from 0 to less than half of tile={tile}")
        self.inner, self.tiling = inner, Tiling(tile, overlap)
        self.networks: Mapping[str, nn.Module] = inner.networks
        note = "; ".join(filter(None, (info.note, f"in tiles of {self.tiling}")))
        self.info = replace(info, tokens_per_image=None, note=note)  # as many a tile
        if hasattr(inner, "bits"):
            self.bits = inner.bits

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> latents [B, ..., H / f, W / f], or of a model without a grid [B, tiles, ...]."""
        windows = self.tiling.windows(images.shape[2], images.shape[3])
        if len(windows) == 1:
            return self.inner.encode(images, sample=sample, seeds=seeds)
        parts = self._encoded(images, windows, sample, seeds)
        first = next(parts)
        if self._on_grid(first, windows[0].size):
            return self._joined(chain([first], parts), windows[0].image, self.unit)
        kept = [first, *parts]
        if len({part.shape for part in kept}) > 1:
            raise CellError(f"{self.info.name}: its code is not equally long in every tile; measure it whole")
        return torch.stack(kept, 1)

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        """What `encode` gives -> float32 [B, 3, H, W]. CellError for noise that cannot be cut into tiles."""
        windows = self.tiling.windows(*size)
        if len(windows) == 1:
            return self.inner.decode(latents, seeds=seeds, size=size)
        return self._joined(self._decoded(latents, windows, seeds), size, 1)

    def _encoded(self, images: Tensor, windows: list[Window], sample: bool, seeds: Tensor) -> Iterator[Tensor]:
        for window in windows:
            with seen_through(window):
                part = self.inner.encode(images[window.part(1)].contiguous(), sample=sample, seeds=seeds)
            yield part

    def _decoded(self, latents: Tensor, windows: list[Window], seeds: Tensor) -> Iterator[Tensor]:
        grid = self._on_grid(latents, windows[0].image)
        for window in windows:
            own = latents[window.part(self.unit)].contiguous() if grid else latents[:, window.number]
            with seen_through(window):
                part = self.inner.decode(own, seeds=seeds, size=window.size)
            if not (self.info.deterministic or window.drawn):
                raise CellError(f"{self.info.name}: its noise is not that of tokbench's `normal`, tiles would disagree")
            if part.shape[-2:] != window.size:
                raise CellError(f"{self.info.name}: decode gave {tuple(part.shape)} for a tile of {window.size}")
            yield part

    def _on_grid(self, latents: Tensor, size: tuple[int, int]) -> bool:
        """Whether the latents of so many pixels lie where those lie."""
        return latents.ndim > 2 and latents.shape[-2:] == (size[0] // self.unit, size[1] // self.unit)

    def _joined(self, parts: Iterable[Tensor], size: tuple[int, int], unit: int) -> Tensor:
        """The tiles' latents or pixels (`unit` pixels apart) as those of the whole image; one at a time in memory."""
        height, width = size[0] // unit, size[1] // unit
        small = Tiling(self.tiling.tile // unit, self.tiling.overlap // unit)
        rows, columns = small.weights(height), small.weights(width)
        whole: Tensor | None = None
        for window, part in zip(small.windows(height, width), parts, strict=True):
            if whole is None:
                kind = torch.float32 if part.is_floating_point() else part.dtype
                whole = part.new_zeros((*part.shape[:-2], height, width), dtype=kind)
                rows, columns = rows.to(part.device), columns.to(part.device)
            i, j = divmod(window.number, len(columns))
            *_, y, x = place = window.part(1)
            if part.is_floating_point():
                whole[place] += part * (rows[i, y, None] * columns[j, x])
            else:
                own = (rows.argmax(0)[y, None] == i) & (columns.argmax(0)[x] == j)
                whole[place] = torch.where(own, part, whole[place])
        assert whole is not None
        return whole


def tiling_of(tokenizer: Tokenizer) -> Tiling | None:
    """How the decoder of a tokenizer cuts images, if it does."""
    if isinstance(tokenizer, Joined):
        return tiling_of(tokenizer.decoding)
    found = getattr(tokenizer, "tiling", None)
    return found if isinstance(found, Tiling) else None
