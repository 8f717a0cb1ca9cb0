"""Tokenizers in tiles: on what is local, the same as whole; on what is not, right in size, noise and blending."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tokbench
from tests.conftest import TINY
from tests.tiny import Tiny
from tokbench.errors import CellError, InputError
from tokbench.metrics.pixel import seam
from tokbench.registry import create
from tokbench.runtime.seeding import Window, normal, seen_through
from tokbench.runtime.tiling import Tiled, Tiling

SEEDS = torch.tensor([5, 2**62])


class Tokens(Tiny):
    """Its latents [B, N, 4] have no grid, as those of a 1-D tokenizer."""

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        return super().encode(images, sample=sample, seeds=seeds).flatten(2).mT

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        grid = latents.mT.reshape(len(latents), 4, size[0] // 4, size[1] // 4)
        return super().decode(grid, seeds=seeds, size=size)


class Sampling(Tiny):
    """Its encoder draws from a posterior, its decoder pixels of noise."""

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        latents = super().encode(images, sample=sample, seeds=seeds)
        return latents + normal(seeds, latents.shape[1:], device=latents.device)


def random_images(height: int, width: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, height, width), dtype=np.uint8))


@torch.no_grad()
def both_ways(tokenizer: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    latents = tokenizer.encode(images, sample=True, seeds=SEEDS)
    return latents, tokenizer.decode(latents, seeds=SEEDS, size=(images.shape[2], images.shape[3]))


@pytest.mark.parametrize("make", [Tiny, Sampling, Tokens, lambda *given: Tiny(*given[:4], True, 0.0)])
@pytest.mark.parametrize("size", [(104, 72), (32, 76), (16, 20), (64, 64)])
@pytest.mark.parametrize("overlap", [0, 8, 12])
def test_what_is_local_is_the_same_in_tiles(make: Callable[..., Tiny], size: tuple[int, int], overlap: int) -> None:
    whole = make(0.5, "", 0.0, 4, False, 0.0)
    tiled = Tiled(whole, 32, overlap)
    (expected, pixels), (latents, found) = (both_ways(one, random_images(*size)) for one in (whole, tiled))
    if not isinstance(whole, Tokens):
        torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, pixels, atol=1e-5, rtol=0)


def test_both_directions_see_tiles_alone_and_the_image_is_covered() -> None:
    seen: list[tuple[int, int]] = []

    class Watched(Tiny):
        def encode(self, images: Tensor, **given: Any) -> Tensor:
            seen.append((images.shape[2], images.shape[3]))
            return super().encode(images, **given)

        def decode(self, latents: Tensor, *, size: tuple[int, int], **given: Any) -> Tensor:
            assert latents.shape[2:] == (size[0] // 4, size[1] // 4)
            seen.append(size)
            return super().decode(latents, size=size, **given)

    both_ways(Tiled(Watched(0.0, "", 0.0, 4, False, 0.0), 32, 8), random_images(104, 72))
    assert seen == [(32, 32)] * 2 * 4 * 3


@pytest.mark.parametrize("length", [40, 64, 68, 104, 1000])
@pytest.mark.parametrize("overlap", [0, 4, 12])
def test_weights_are_linear_and_one_in_all(length: int, overlap: int) -> None:
    weights = Tiling(32, overlap).weights(length)
    torch.testing.assert_close(weights.sum(0), torch.ones(length))
    assert weights.shape[0] == -(-(length - overlap) // (32 - overlap))
    if overlap and length == 1000:
        ramp = (torch.arange(overlap) + 0.5) / overlap
        torch.testing.assert_close(weights[1, 32 - overlap : 32], ramp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(3, 24, 40), (4, 3, 5), (4, 1, 6, 10), (3, 3, 5)])
def test_noise_of_a_tile_is_its_part_of_the_images(shape: tuple[int, ...]) -> None:
    whole = normal(SEEDS, shape, device="cpu")
    unit = 24 // shape[-2]
    window = Window(8, 16, (8, 24), (24, 40), 5)
    part = whole[window.part(unit)]
    with seen_through(window):
        torch.testing.assert_close(normal(SEEDS, part.shape[1:], device="cpu"), part)
    assert torch.equal(normal(SEEDS, shape, device="cpu"), whole)


def test_noise_without_rows_and_columns_is_another_in_every_tile() -> None:
    drawn = []
    for number in range(2):
        with seen_through(Window(0, 0, (32, 32), (64, 64), number)):
            drawn.append(normal(SEEDS, (16, 4), device="cpu"))
    assert not torch.equal(*drawn)


def test_noise_of_torchs_own_generators_is_refused() -> None:
    class Own(Tiny):
        def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
            return torch.stack(
                [torch.randn(3, *size, generator=torch.Generator().manual_seed(s)) for s in seeds.tolist()]
            )

    tokenizer = Tiled(Own(1.0, "", 0.0, 4, False, 0.0), 32, 8)
    both_ways(tokenizer, random_images(32, 32))  # one tile: nothing to agree with
    with pytest.raises(CellError, match="tiles would disagree"):
        both_ways(tokenizer, random_images(64, 32))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("klvae@tile=100", "tile=100, overlap=8: both must be multiples of 8"),
        ("klvae@tile=64@overlap=32", "less than half of tile=64"),
        ("klvae@tile=0", "multiples of 8"),
        ("klvae@overlap=8", "overlap is that of tiles; add @tile=512"),
        ("klvae@tile=big", "option tile=big: expected int"),
        ("klvae@tiles=64", "did you mean tile"),
    ],
)
def test_tiles_that_cannot_be_are_refused(spec: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        create(spec)


def test_a_codec_whose_files_differ_in_length_is_measured_whole() -> None:
    images = random_images(64, 64)
    images[:, :, :32] = 0
    with pytest.raises(CellError, match="not equally long in every tile; measure it whole"):
        both_ways(create("jpeg-q50@tile=32@overlap=0"), images)


@pytest.mark.parametrize("spec", ["ssdd@steps=1", "klvae@tile=32+ssdd"])
def test_the_bundled_models_run_in_tiles(spec: str) -> None:
    images = random_images(40, 32)
    latents, decoded = both_ways(create(f"{spec}@tile=32@overlap=8"), images)
    assert latents.shape == (2, 4, 5, 4)
    assert decoded.shape == images.shape
    assert decoded.isfinite().all()


def test_seam_is_the_step_between_tiles_and_zero_without_one() -> None:
    tiling = Tiling(32, 8)
    real = random_images(104, 72) // 2 + 50
    assert seam(real, real, tiling)["seam"].tolist() == [0, 0]
    shifted = real.to(torch.int16)
    for number, (top, left) in enumerate((y, x) for y in (0, 28, 52, 76) for x in (0, 28, 44)):
        shifted[:, :, top:, left:] += 3 if number % 2 else -3  # a step of 3 at every border, somewhere along it
    flat = real.to(torch.int16) + 5
    assert seam(real, flat.byte(), tiling)["seam"].tolist() == [0, 0]
    found = seam(real, shifted.byte(), tiling)
    assert all(1.5 < value < 4 for value in found["seam"].tolist())
    assert found["tile-borders"].tolist() == [5, 5]
    assert seam(real, shifted.byte(), Tiling(128, 8))["tile-borders"].tolist() == [0, 0]


def test_tiles_are_in_the_row_and_its_settings(tmp_path: Any) -> None:
    for name, size in (("large", (80, 48)), ("small", (24, 16))):
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    spec = f"{TINY}@tile=32@overlap=8"
    result = tokbench.evaluate(spec, tmp_path, "native", ["psnr", "seam"])
    whole = tokbench.evaluate(f"{TINY}@noise=0", tmp_path, "native", ["psnr", "seam"])
    assert result.tokenizer.name == "tiny-tile-32-overlap-8"
    assert result.settings.tiling == "32 px, overlap 8 px"
    assert (whole.settings.tiling, set(whole.metrics)) == ("", {"psnr"})
    assert result.metrics["psnr"].value == pytest.approx(whole.metrics["psnr"].value)
    assert result.metrics["seam"].n == 1
    assert "1 image lies" in result.metrics["seam"].note
