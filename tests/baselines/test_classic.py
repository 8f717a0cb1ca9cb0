"""Rows without training: codecs, resampling, linear projections."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import Tensor

from baselines.classic import FITTED, LENGTH_BYTES, codec, linear
from tests import ROOT
from tests.baselines.fit_linear import fit_linear
from tokbench.data.crops import crop
from tokbench.data.open import open_source
from tokbench.data.pixels import quantise
from tokbench.errors import InputError
from tokbench.protocols import PROTOCOLS
from tokbench.registry import create
from tokbench.tokenizer import Tokenizer

FORMATS = ["jpeg", "webp", pytest.param("avif", marks=pytest.mark.skipif(not features.check("avif"), reason="no AVIF"))]
SHARED = ROOT.resolve().parent / "shared" / "photos" / "train"


def crops(number: int, resolution: int) -> Tensor:
    """The first bundled photographs as the adm protocol crops them, uint8 [N, 3, R, R]."""
    source = open_source("samples")
    pixels = [crop(source.read(i), resolution, PROTOCOLS["adm"]) for i in range(min(number, len(source.ids)))]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def reconstruct(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    seeds = torch.zeros(len(images), dtype=torch.int64)
    with torch.no_grad():
        latents = tokenizer.encode(images, sample=False, seeds=seeds)
        decoded = tokenizer.decode(latents, seeds=seeds, size=(images.shape[2], images.shape[3]))
    return quantise(decoded, "nearest")


def psnr(real: Tensor, fake: Tensor) -> Tensor:
    return -10 * torch.log10(((real.double() - fake.double()) / 255).square().flatten(1).mean(1))


def test_the_identity_survives_rounding_for_every_level() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(reconstruct(create("identity"), images), images)


def test_floors_are_those_of_the_literature_on_the_bundled_photographs() -> None:
    images = crops(29, 256)
    expected = {"bicubic-f8": 20.84, "pca-f8c4": 21.03, "linear-f8c4": 21.56, "jpeg-q10": 24.30}
    for name, decibel in expected.items():
        assert psnr(images, reconstruct(create(name), images)).mean() == pytest.approx(decibel, abs=0.02), name


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_codec_is_pillows_file_and_its_rate_that_files_size(file_format: str) -> None:
    images, tokenizer = crops(3, 64), create(f"{file_format}-q60")
    latents = tokenizer.encode(images, sample=False, seeds=torch.zeros(3, dtype=torch.int64))
    sizes = tokenizer.bits(latents) / 8  # type: ignore[attr-defined]
    for row, size, fake in zip(latents, sizes, reconstruct(tokenizer, images), strict=True):
        file = row[LENGTH_BYTES : LENGTH_BYTES + int(size)].numpy().tobytes()
        with Image.open(io.BytesIO(file)) as image:
            assert (image.format or "").lower() == file_format
            assert np.array_equal(np.asarray(image.convert("RGB")), fake.permute(1, 2, 0).numpy())
        assert not row[LENGTH_BYTES + int(size) :].any()


@pytest.mark.parametrize("file_format", FORMATS)
def test_more_quality_costs_more_bits_and_gives_more_psnr(file_format: str) -> None:
    images = crops(3, 64)
    rate, quality = [], []
    for q in (5, 50, 95):
        tokenizer = codec(file_format, q)
        rate.append(tokenizer.bits(tokenizer.encode(images, sample=False, seeds=torch.zeros(3))).mean())
        quality.append(psnr(images, reconstruct(tokenizer, images)).mean())
    assert rate[0] < rate[1] < rate[2]
    assert quality[0] < quality[1] < quality[2]


@pytest.mark.parametrize("spec", ["jpeg-q0", "webp-q101", "bicubic-f0"])
def test_a_quality_out_of_range_is_refused_with_the_range(spec: str) -> None:
    with pytest.raises(InputError, match=r"quality must be from \d to 100|factor must be at least 1"):
        create(spec)


def test_a_format_that_pillow_cannot_write_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    with pytest.raises(InputError, match="pip install pillow-jxl-plugin"):
        create("jxl-q50")
    monkeypatch.setattr(features, "check", lambda _: False)
    with pytest.raises(InputError, match="without AVIF; pip install"):
        create("avif-q50")


def test_pca_loses_exactly_the_variance_it_leaves_out(tmp_path: Path) -> None:
    images = crops(2, 64)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    tokenizer, ridge = fitted(tmp_path)
    blocks = (
        torch.nn.functional.pixel_unshuffle(images.double() / 127.5 - 1, 8).flatten(2).transpose(1, 2).flatten(0, 1)
    )
    left_out = torch.linalg.eigvalsh(torch.cov(blocks.T, correction=0))[:-4].sum() / blocks.shape[1]
    seeds = torch.zeros(2, dtype=torch.int64)
    errors = []
    for one in (tokenizer, ridge):
        latents = one.encode(images, sample=False, seeds=seeds)
        decoded = one.decode(latents, seeds=seeds, size=(64, 64))
        errors.append((decoded - (images / 127.5 - 1)).square().mean().item())
        assert latents.std(dim=(0, 2, 3)).tolist() == pytest.approx([1.0] * 4, abs=0.01)
    assert errors[0] == pytest.approx(left_out.item(), rel=1e-4)
    assert errors[1] < errors[0]  # its neighbours tell something about a block


def fitted(folder: Path) -> tuple[Tokenizer, Tokenizer]:
    fit_linear(folder, folder / FITTED, short_side=64)
    return linear("pca-f8c4", folder / FITTED), linear("linear-f8c4", folder / FITTED)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the photographs it was fitted on are not here")
def test_the_bundled_fit_is_the_fit_of_the_training_photographs(tmp_path: Path) -> None:
    images = crops(4, 64)
    fit_linear(SHARED, tmp_path / FITTED)
    for name in ("pca-f8c4", "linear-f8c4"):
        again = reconstruct(linear(name, tmp_path / FITTED), images).int()
        assert (again - reconstruct(linear(name), images).int()).abs().max() <= 1
