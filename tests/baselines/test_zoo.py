"""Every name that the baselines announce, the example of the README, and what results say about latents."""

import csv
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.published import PUBLISHED
from tests import ROOT, TESTS
from tests.baselines.test_classic import crops, psnr, reconstruct
from tests.conftest import Ran
from tokbench.errors import CellError
from tokbench.evaluation.evaluate import evaluate
from tokbench.records.result import EvalResult
from tokbench.registry import TOKENIZERS, create
from tokbench.tokenizer import Tokenizer

EXAMPLE = TESTS / "example_tokenizer.py"
README = ROOT / "README.md"
FIXED = {"quality": "50", "factor": "8"}
# Names that are quick to build; those of the table's other rows are checked without memory in test_pretrained.
SMALL = ["identity", "bicubic-f8", "pca-f8c4", "linear-f8c4", "jpeg-q50", "webp-q50", "taesd", "taef1", "llamagen-vq16"]
SEEDS = torch.tensor([5, 6])


def build(spec: str) -> Tokenizer:
    return create(spec, random_weights=True)


@torch.no_grad()
def both_ways(tokenizer: Tokenizer, images: Tensor, seeds: Tensor = SEEDS) -> tuple[Tensor, Tensor]:
    latents = tokenizer.encode(images, sample=False, seeds=seeds)
    return latents, tokenizer.decode(latents, seeds=seeds, size=(images.shape[2], images.shape[3]))


def test_every_published_row_has_a_name_and_a_licence_in_the_list() -> None:
    known = TOKENIZERS.all()
    for name, row in PUBLISHED.items():
        assert known[name].facts["licence"] == row.licence
        assert {"file", "random_weights"} <= set(known[name].options)
    assert {"identity", "klvae", "hf", "jpeg-q{quality}", "avif-q{quality}", "jxl-q{quality}"} <= set(known)


def test_models_are_listed_by_family_with_chosen_columns_in_four_forms(tokbench: Callable[..., Ran]) -> None:
    ask = ("list", "models", "--family", "lfq", "--columns", "codes,bpp,verified", "--sort", "bpp")
    rows = json.loads(tokbench(*ask, "--format", "json").out)
    assert [row["model"] for row in rows[:2]] == ["wetok-f32-general", "open-magvit2-f16-14bit-pretrain"]
    assert rows[1] == {"model": rows[1]["model"], "codes": 16384, "bpp": 14 / 256, "verified": False}
    assert {row["model"] for row in rows} == {row.name for row in PUBLISHED.values() if row.family == "lfq"}
    lines = tokbench(*ask, "--format", "csv").out.splitlines()
    assert lines[:2] == ["model,codes,bpp,verified", "wetok-f32-general,256,0.03125,no"]
    assert "| wetok-f32-general | 256 | 0.03125 | no |" in tokbench(*ask, "--format", "markdown").out
    assert "wetok-f32-general" in tokbench(*ask).out
    for wrong in (("--family", "nix"), ("--columns", "nix"), ("--sort", "nix"), ("--format", "nix")):
        assert tokbench("list", "models", *wrong).status == 2


@pytest.mark.parametrize("name", SMALL)
def test_a_row_keeps_the_contract(name: str) -> None:
    tokenizer, images = build(name), crops(2, 64)
    info = tokenizer.info
    latents, decoded = both_ways(tokenizer, images)
    assert info.name == name
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()
    assert (latents.dtype == torch.int64) == (info.codebook_size is not None)
    if info.downsample is not None:
        assert latents.shape[-2:] == (64 // info.downsample, 64 // info.downsample)
        assert info.channels is None or latents.shape[1] == info.channels
    torch.testing.assert_close(both_ways(tokenizer, images)[1], decoded, rtol=0, atol=0)
    torch.testing.assert_close(both_ways(tokenizer, images[1:], SEEDS[1:])[1], decoded[1:], rtol=1e-3, atol=1e-3)
    if name == "taesd":
        assert "random weights" in info.note
        assert not info.verified


def test_the_plugins_are_found_by_their_entry_points() -> None:
    assert "baselines.zoo:register" in {
        point.value for point in importlib.metadata.entry_points(group="tokbench.plugins")
    }


def measured(spec: str, photographs: Path) -> EvalResult:
    return evaluate(
        build(spec), photographs, 32, ("psnr", "bpp", "perplexity", "codebook-use", "latent-mean", "latent-std")
    )


def test_results_tell_the_mean_and_deviation_of_latents_and_the_scale_they_imply(photographs: Path) -> None:
    from tokbench.data.crops import crop
    from tokbench.data.open import open_source
    from tokbench.protocols import PROTOCOLS

    source = open_source(photographs)
    pixels = [torch.from_numpy(crop(source.read(i), 32, PROTOCOLS["adm"]).copy()) for i in range(len(source.ids))]
    images = torch.stack(pixels).permute(0, 3, 1, 2)
    latents = build("pca-f8c4").encode(images, sample=False, seeds=torch.zeros(len(images))).double()
    metrics = measured("pca-f8c4", photographs).metrics
    assert set(metrics) == {"psnr", "latent-mean", "latent-std"}
    assert metrics["latent-mean"].value == pytest.approx(latents.mean().item(), abs=1e-6)
    assert metrics["latent-std"].value == pytest.approx(latents.std(correction=0).item(), abs=1e-6)
    assert f"times {1 / latents.std(correction=0).item():.4g}" in metrics["latent-std"].note


def test_results_tell_the_rate_and_the_codes_in_use(photographs: Path) -> None:
    metrics = measured("llamagen-vq16", photographs).metrics
    assert set(metrics) == {"psnr", "bpp", "perplexity", "codebook-use"}
    assert metrics["bpp"].value == pytest.approx(14 / 16**2)
    used, perplexity = metrics["codebook-use"].value, metrics["perplexity"].value
    assert used is not None
    assert perplexity is not None
    assert 1 <= perplexity <= used <= 12 * 4
    assert metrics["perplexity"].note == f"{used:.0f} codes used; 12 images of 4 codes allow 48 at most"
    assert set(measured("jpeg-q50", photographs).metrics) == {"psnr", "bpp"}


def test_the_example_of_the_readme_is_a_tokenizer(photographs: Path) -> None:
    result = evaluate(f"{EXAMPLE}:Mine", photographs, 32, ("psnr", "latent-std"))
    assert result.metrics["psnr"].value is not None
    assert result.metrics["psnr"].value > 10
    readme = README.read_text(encoding="utf-8")
    if "class Mine" not in readme:
        pytest.skip("the README has no such section yet")
    assert EXAMPLE.read_text(encoding="utf-8").replace("  # noqa: RUF012", "") in readme


def published_psnr() -> dict[str, float]:
    """PSNR on ImageNet's validation images at 256 px that papers give for our rows."""
    with (ROOT / "results" / "reported.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["psnr"] and row["resolution"] == "256"]
    chosen = [row for row in rows if row["tokenizer"] in PUBLISHED and row["dataset"] == "ImageNet-1k val"]
    return {row["tokenizer"]: float(row["psnr"]) for row in chosen}


@pytest.mark.weights
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_give_about_the_published_psnr(name: str, request: pytest.FixtureRequest) -> None:
    """The photographs are not ImageNet: a wide band, which a wrong scale, range or key order does not stay in."""
    if "weights" not in str(request.config.getoption("-m")):
        pytest.skip("needs weights from the hub: make test-weights")
    try:
        tokenizer: Any = create(name)
    except CellError as error:
        pytest.skip(str(error))
    images = crops(8, 256)
    decibel = psnr(images, reconstruct(tokenizer, images)).mean().item()
    expected = published_psnr().get(name)
    print(f"{name}: {decibel:.2f} dB here, published {expected} dB on ImageNet; latents {tokenizer.info.note}")
    assert decibel == pytest.approx(expected, abs=4) if expected else decibel > 15
    if tokenizer.info.channels:
        deviation = tokenizer.encode(images, sample=False, seeds=torch.zeros(8, dtype=torch.int64)).std()
        assert 0.4 < deviation < 2.5
