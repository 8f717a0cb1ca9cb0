"""`score` measures what `run` would, and `compare` says which of two results is better."""

import io
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import Ran
from tests.forked import start
from tokbench import registry
from tokbench.data.crops import crop
from tokbench.data.open import open_source
from tokbench.data.pixels import quantise
from tokbench.evaluation import score
from tokbench.metrics.extractors import Extractor, Shared
from tokbench.protocols import find_protocol
from tokbench.records.files import per_image_path, read_per_image
from tokbench.records.result import read_result

METRICS = "psnr,psnr-global,ssim"


@pytest.fixture
def copies(photographs: Path, tmp_path: Path) -> Path:
    """The photographs' crops at 32 pixels, each a little darker, as PNG."""
    source, folder = open_source(photographs), tmp_path / "copies"
    folder.mkdir()
    for index, sample in enumerate(source.ids):
        pixels = crop(source.read(index), 32, find_protocol("adm"))
        Image.fromarray(np.maximum(pixels, 3) - 3).save(folder / f"{sample}.png")
    return folder


def test_score_writes_the_record_of_the_fakes(
    tokbench: Callable[..., Ran], photographs: Path, copies: Path, tmp_path: Path
) -> None:
    ran = tokbench("score", photographs, copies, "--metrics", METRICS, "--out", tmp_path / "runs")
    assert ran.status == 0
    path = tmp_path / "runs" / "adm" / "photographs-32" / "copies.json"
    result = read_result(path)
    assert result.dataset.num_images == 12
    assert result.metrics["psnr"].value == pytest.approx(20 * np.log10(255 / 3), abs=0.5)
    ids, columns = read_per_image(per_image_path(path))
    assert ids == sorted(open_source(photographs).ids)
    assert result.metrics["ssim"].value == pytest.approx(columns["ssim"].mean())
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_score_equals_run_on_the_images_that_run_made(
    tokbench: Callable[..., Ran], photographs: Path, tmp_path: Path
) -> None:
    """Every image of a codec, made by hand and saved, gets the values that its row gets."""
    out = tmp_path / "runs"
    options = ("--res", 32, "--data", photographs, "--metrics", METRICS, "--out", out, "--save-images", 0)
    assert tokbench("run", "--models", "jpeg-q50", *options).status == 0
    folder = tmp_path / "made"
    folder.mkdir()
    tokenizer, source = registry.create("jpeg-q50"), open_source(photographs)
    for index, sample in enumerate(source.ids):
        pixels = torch.from_numpy(crop(source.read(index), 32, find_protocol("adm")).copy()).permute(2, 0, 1)[None]
        seeds = torch.zeros(1, dtype=torch.int64)
        latents = tokenizer.encode(pixels, sample=False, seeds=seeds)
        fake = quantise(tokenizer.decode(latents, seeds=seeds, size=(32, 32)), "nearest")
        Image.fromarray(fake[0].permute(1, 2, 0).numpy()).save(folder / f"{sample}.png")
    assert tokbench("score", photographs, folder, "--metrics", METRICS, "--out", out).status == 0
    place = out / "adm" / "photographs-32"
    ours, theirs = read_result(place / "made.json"), read_result(place / "jpeg-q50.json")
    assert ours.metrics == theirs.metrics
    assert ours.dataset == theirs.dataset


class Counting(nn.Module):
    """Stands for MobileNet and counts the images that it sees."""

    seen = 0

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += len(images)
        means = images.float().mean((2, 3))
        return {"mobilenet": means, "mobilenet-class": means.argmax(1, True).float()}


def test_each_image_passes_a_network_once_and_a_real_one_never_again(
    tokbench: Callable[..., Ran],
    photographs: Path,
    copies: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stand_ins: Callable[..., None],
) -> None:
    network = Counting()
    shared = Shared(network)
    stand_ins(**{n.replace("-", "_"): Extractor(n, 3, "", n, shared) for n in ("mobilenet", "mobilenet-class")})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ("--metrics", "pd-mobilenet,agreement", "--out", tmp_path / "runs")
    for name in ("first", "second"):
        assert tokbench("score", photographs, copies, "--name", name, *options).status == 0
    assert network.seen == (12 + 12) + 12
    assert tokbench("run", "--models", "identity", "--data", photographs, "--res", 32, *options).status == 0
    assert network.seen == (12 + 12) + 12 + 12
    first, second, identity = (
        read_result(tmp_path / "runs" / "adm" / "photographs-32" / f"{name}.json").metrics
        for name in ("first", "second", "identity")
    )
    assert first == second
    assert (first["pd-mobilenet"].value or 0) > 0 == identity["pd-mobilenet"].value


def test_fakes_of_unequal_sizes_are_scored_against_whole_originals(
    tokbench: Callable[..., Ran], tmp_path: Path
) -> None:
    reals, fakes, expected = tmp_path / "reals", tmp_path / "fakes", []
    for folder in (reals, fakes):
        folder.mkdir()
    for number, size in enumerate(((40, 64), (64, 40), (33, 17), (40, 64))):
        real = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(real).save(reals / f"{number}.png")
        Image.fromarray(np.maximum(real, 9) - 9).save(fakes / f"{number}.png")
        expected.append(10 * np.log10(255**2 / np.square(np.minimum(real, 9).astype(float)).mean()))
    ran = tokbench("score", reals, fakes, "--metrics", "psnr,ssim", "--out", tmp_path / "runs")
    assert ran.status == 0
    result = read_result(tmp_path / "runs" / "adm-native" / "reals-native" / "fakes.json")
    assert result.metrics["psnr"].value == pytest.approx(np.mean(expected), abs=1e-4)


@pytest.mark.parametrize("metrics", ["psnr", "ssim,psnr", "ssim-gauss,psnr-global", "ms-ssim,ssim-gauss", "bpp,psnr"])
def test_what_one_scoring_has_measured_the_next_still_prints(
    metrics: str, tokbench: Callable[..., Ran], photographs: Path, copies: Path, tmp_path: Path
) -> None:
    command = ("score", photographs, copies, "--out", tmp_path / "runs", "--metrics")
    path = tmp_path / "runs" / "adm" / "photographs-32" / "copies.json"
    assert tokbench(*command, "ssim,psnr").status == 0
    before, (_, rows_before) = read_result(path), read_per_image(per_image_path(path))
    assert tokbench(*command, metrics).status == 0
    after, (_, rows_after) = read_result(path), read_per_image(per_image_path(path))
    assert {name: after.metrics[name] for name in before.metrics} == before.metrics
    assert all(np.array_equal(rows_after[name], column) for name, column in rows_before.items())
    assert set(metrics.split(",")) <= after.metrics.keys() | after.unavailable.keys() | {"bpp"}
    text = path.read_text()
    assert tokbench(*command, metrics).status == 0
    assert path.read_text() == text  # not measured again


def test_two_processes_score_what_one_does(
    tokbench: Callable[..., Ran], photographs: Path, copies: Path, tmp_path: Path
) -> None:
    command = ["score", str(photographs), str(copies), "--metrics", METRICS, "--out"]
    assert tokbench(*command, tmp_path / "one").status == 0
    for process in start([*command, str(tmp_path / "two")], tmp_path, world=2):
        status, error = process.finish()
        assert status == 0, error
    one, two = (tmp_path / name / "adm" / "photographs-32" / "copies.json" for name in ("one", "two"))
    assert read_result(two).metrics == read_result(one).metrics
    assert read_result(two).provenance.world_size == 2
    assert per_image_path(two).read_bytes() == per_image_path(one).read_bytes()


def test_wrong_folders_are_refused_by_name(
    tokbench: Callable[..., Ran], photographs: Path, copies: Path, tmp_path: Path
) -> None:
    def refused(fake: Path, *options: str) -> str:
        ran = tokbench("score", photographs, fake, "--metrics", METRICS, "--out", tmp_path / "runs", *options)
        assert ran.status == 2
        return ran.reason

    first, second = sorted(copies.glob("*.png"))[:2]
    few = shutil.copytree(copies, tmp_path / "few")
    (few / first.name).rename(few / "stranger.png")
    assert "stranger" in refused(few)
    assert first.stem in refused(few)
    sizes = shutil.copytree(copies, tmp_path / "sizes")
    Image.open(second).resize((16, 16)).save(sizes / second.name)
    assert "of one size, or each of its original's" in refused(sizes)
    lossy = shutil.copytree(copies, tmp_path / "lossy")
    Image.open(first).save(lossy / f"{first.stem}.webp", quality=80)
    (lossy / first.name).unlink()
    assert "lossy" in refused(lossy)
    assert "unknown metric" in refused(copies, "--metrics", "psrn")
    assert "--name" in refused(copies, "--name", "A B")
    Image.open(first).save(lossy / f"{first.stem}.webp", lossless=True)
    arguments = ("--metrics", "psnr", "--out", tmp_path / "runs")
    assert tokbench("score", photographs, lossy, *arguments).status == 0
    small = shutil.copytree(copies, tmp_path / "large")
    for path in small.glob("*.png"):
        Image.open(path).resize((64, 64)).save(path)
    assert "smaller than 64" in refused(small)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_what_changes_pixels_after_the_model_is_lossy_and_nothing_else() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image, other = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [other]}
    header = b"IHDR" + struct.pack(">2I5B", 32, 32, 16, 2, 0, 0, 0)  # 16-bit colours, which Pillow reads but not writes
    rows = b"".join(b"\0" + row.tobytes() for row in np.repeat(pixels, 2, axis=2))
    chunks = (header, b"IDAT" + zlib.compress(rows), b"IEND")
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    lossless = (
        saved(image, "PNG"),
        saved(image, "BMP"),
        saved(image, "WEBP", lossless=True),
        saved(image, "WEBP", lossless=True, **frames),
        *(saved(image, "TIFF", compression=c) for c in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")),
    )
    lossy = (
        saved(image, "JPEG"),
        saved(image, "WEBP"),
        saved(image, "WEBP", **frames),
        saved(image, "TIFF", compression="jpeg"),
        saved(deep, "PNG"),
        saved(deep, "TIFF"),
        b"\x89PNG\r\n\x1a\n" + b"".join(parts),
    )
    assert [score.loss_of(data, "") for data in lossless] == [""] * 8
    assert [bool(score.loss_of(data, "")) for data in lossy] == [True] * 7
    for data in lossless:
        with Image.open(io.BytesIO(data)) as read:
            assert np.array_equal(read.convert("RGB"), pixels)


def test_metrics_that_need_the_model_are_said_to(
    tokbench: Callable[..., Ran], photographs: Path, copies: Path, tmp_path: Path
) -> None:
    assert tokbench("score", photographs, copies, "--metrics", "psnr,bpp", "--out", tmp_path).status == 0
    result = read_result(tmp_path / "adm" / "photographs-32" / "copies.json")
    assert result.unavailable == {"bpp": "needs the model, not only its images"}
