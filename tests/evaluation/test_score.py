"""`score` measures what `run` would, and `compare` says which of two results is better."""

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import Ran
from tests.made_records import record, rows
from tokbench import registry
from tokbench.comparison.compare import compare
from tokbench.data.crops import crop
from tokbench.data.open import open_source
from tokbench.data.pixels import quantise
from tokbench.errors import InputError
from tokbench.evaluation import kits, score
from tokbench.metrics import METRICS as TABLE
from tokbench.metrics import kernel_of
from tokbench.metrics.extractors import Extractor, Shared
from tokbench.metrics.suite import Instruments
from tokbench.protocols import find_protocol
from tokbench.records.files import per_image_path, read_per_image, write_per_image
from tokbench.records.result import Value, read_result, to_json
from tokbench.records.samples import SampleStore

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
    tokbench: Callable[..., Ran], photographs: Path, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Counting()
    shared = Shared(network)
    tools = Instruments(extractors={n: Extractor(n, 3, "", n, shared) for n in ("mobilenet", "mobilenet-class")})
    for module in (kits, score):
        monkeypatch.setattr(module, "instruments", lambda *_: tools)
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
    assert "squares of one size" in refused(sizes)
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


def results(folder: Path, *shifts: float, n: int = 200) -> list[Path]:
    """Result files with per-image rows; `records.rows` says what a shift does."""
    paths = []
    for index, shift in enumerate(shifts):
        path = folder / f"m{index}.json"
        result = record(f"m{index}", seed=index, n=n, shift=shift)
        path.write_text(to_json(result))
        columns = rows(index, n, shift)
        write_per_image(per_image_path(path), [f"{i:04d}" for i in range(n)], columns)
        paths.append(path)
    return paths


def test_compare_says_better_worse_same_and_inconclusive(tmp_path: Path) -> None:
    a, better, same, near = results(tmp_path, 0.0, 1.0, 0.0, 0.012)
    assert {d.metric: d.verdict for d in compare(a, better)} == dict.fromkeys(
        ("psnr", "ssim", "lpips-alex", "lpips-vgg"), "better"
    )
    assert {d.verdict for d in compare(better, a)} == {"worse"}
    first = compare(a, same)
    assert {d.verdict for d in first} <= {"same", "inconclusive"}
    for d in [*first, *compare(a, near)]:
        assert d.low is not None
        assert d.high is not None
        assert d.low <= d.difference <= d.high
        assert d.how == "paired by image"
        assert (d.needed is not None and d.needed >= d.n) == (d.verdict == "inconclusive")


def test_compare_gives_no_metric_the_interval_of_another(tmp_path: Path) -> None:
    paths = results(tmp_path, 0.0, 0.5)
    for path, spread in zip(paths, (1.0, 2.0), strict=True):
        base = read_result(path)
        metrics = {"latent-std": Value(spread, n=200), "kid": kernel_of("net", Noise(spread))}
        path.write_text(to_json(replace(base, metrics=metrics)))
        columns = {"latent-mean": np.arange(200.0), "latent-square": np.arange(200.0)}
        write_per_image(per_image_path(path), [f"{i:04d}" for i in range(200)], columns)
    assert {(d.metric, d.verdict, d.how) for d in compare(*paths)} == {
        ("latent-std", "inconclusive", "no error known"),
        ("kid", "inconclusive", "unpaired: wider than need be"),  # its own error
    }


class Noise:
    """Features of two sides, the fakes' wider."""

    def __init__(self, spread: float) -> None:
        self.ids, self.spread = [str(i) for i in range(20)], spread

    def features(self, side: str, extractor: str) -> np.ndarray:
        return np.random.default_rng(0).standard_normal((20, 3)) * (1 if side == "real" else self.spread)

    def column(self, name: str) -> np.ndarray:
        raise KeyError(name)


def test_the_interval_of_the_global_psnr_is_that_of_many_redrawn_sets(tmp_path: Path) -> None:
    generator, n, paths = np.random.default_rng(0), 300, results(tmp_path, 0.0, 0.0)
    errors = generator.gamma(2, 1e-3, (2, n))
    for path, own in zip(paths, errors, strict=True):
        value = Value(float(-10 * np.log10(own.mean())), n=n)
        path.write_text(to_json(replace(read_result(path), metrics={"psnr-global": value})))
        write_per_image(per_image_path(path), [f"{i:04d}" for i in range(n)], {"mse": own})
    (d,) = compare(*paths)
    redrawn = [errors[:, rows].mean(1) for rows in generator.integers(n, size=(4000, n))]
    expected = np.quantile([-10 * np.log10(b / a) for a, b in redrawn], [0.025, 0.975])
    assert (d.low, d.high) == pytest.approx(expected, abs=0.05)


def test_compare_without_rows_is_wider(tmp_path: Path) -> None:
    a, b = results(tmp_path, 0.0, 1.0)
    paired = {d.metric: d for d in compare(a, b)}
    per_image_path(a).unlink()
    for d in compare(a, b):
        assert d.how.startswith("unpaired")
        assert (d.high or 0) - (d.low or 0) > (paired[d.metric].high or 0) - (paired[d.metric].low or 0)


def test_compare_pairs_frechet_distances_by_kept_features(tmp_path: Path) -> None:
    generator, n = np.random.default_rng(0), 2100
    real = generator.standard_normal((n, 6)).astype(np.float32)
    ids = [f"{i:05d}" for i in range(n)]
    paths = []
    fake = real
    for name, amount in (("a", 0.5), ("b", 0.2)):  # b errs where a does, and a little more
        path = tmp_path / f"{name}.json"
        fake = fake + amount * generator.standard_normal((n, 6)).astype(np.float32)
        with SampleStore(path.with_suffix(".features")) as store:
            store.append(ids, {}, {("real", "inception"): real, ("fake", "inception"): fake})
        value = TABLE["rfid"].value(SampleStore(path.with_suffix(".features")))
        base = record(name, n=n)
        path.write_text(to_json(type(base)(**{**vars(base), "metrics": {"rfid": value}})))
        paths.append(path)
    (d,) = compare(*paths)
    assert (d.verdict, d.how) == ("worse", "paired half-samples")
    for path in paths:
        shutil.rmtree(path.with_suffix(".features"))
    (loose,) = compare(*paths)
    assert (loose.high or 0) - (loose.low or 0) > (d.high or 0) - (d.low or 0)


def test_results_on_other_images_are_not_compared(tokbench: Callable[..., Ran], tmp_path: Path) -> None:
    a, _ = results(tmp_path, 0.0, 1.0)
    other = json.loads(a.read_text())
    other["dataset"]["fingerprint"] = "e" * 16
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="not comparable: images"):
        compare(a, tmp_path / "other.json")
    assert tokbench("compare", a, tmp_path / "missing.json").status == 2


def test_compare_prints_intervals_verdicts_and_n(tokbench: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tokbench("compare", *results(tmp_path, 0.0, 1.0))
    assert ran.status == 0
    for text in ("psnr", "better", "N = 200", "[+"):
        assert text in ran.out
