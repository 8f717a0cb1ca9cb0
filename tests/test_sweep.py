"""The sweep's report (results/sweep/analyse.py) on made-up records, and its estimate of a latent's bits."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from results.sweep import analyse, measure
from tests import made_records
from tokbench.records.result import TokenizerInfo, Value


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Two latents and two seeds, SSDD better at f8c4 alone, and a codec."""
    for latent, factor in (("f8c4", 8), ("f16c4", 16)):
        for decoder in ("conv", "ssdd"):
            better = 0.5 if (latent, decoder) == ("f8c4", "ssdd") else 0.0
            for seed in (0, 1):
                own = {"seed": seed + 2 * (decoder == "ssdd"), "shift": better}
                for side in (128, 256):
                    name = f"{decoder}-{latent}-{seed}"
                    facts = {"downsample": factor, "losses": ("lpips-vgg",)}
                    result = made_records.record(name, res=side, **own, **facts)
                    made_records.write(tmp_path / "eval", result, made_records.rows(own["seed"], 29, better))
                for part in ("", "-start"):
                    training = tmp_path / "training" / latent / f"{decoder}-{seed}{part}.json"
                    training.parent.mkdir(parents=True, exist_ok=True)
                    training.write_text('{"images_seen": 1600, "seconds": 60.0}')
            (tmp_path / "latents").mkdir(exist_ok=True)
            (tmp_path / "latents" / f"{decoder}-{latent}-0.json").write_text(
                json.dumps({"bits_per_pixel": {"128": 0.3, "256": 16 / factor**2}, "decode_bytes": {"256": 5e8}})
            )
    for quality, bits in ((10, 0.3), (50, 1.0)):
        codec = made_records.record(f"jpeg-q{quality}", family="codec", downsample=None, channels=None)
        codec = codec.__class__(**vars(codec) | {"metrics": dict(codec.metrics) | {"bpp": Value(bits)}})
        made_records.write(tmp_path / "eval", codec, made_records.rows(5, 29, 0.0))
    return tmp_path


def test_the_report_follows_from_the_records(kept: Path) -> None:
    analyse.write(kept)
    report = " ".join((kept / "REPORT.md").read_text().split())
    assert re.search(r"- f8c4: SSDD's decoder is \*\*better\*\* than .* one by 0.02\d lpips-alex", report)
    assert "- f16c4: **not resolved**" in report
    assert "**f16c4** spends 0.0156 numbers on a pixel and reaches 0." in report
    assert "the largest of all is that at f8c4" in report
    assert "| ssdd-f8c4 | 0.0625 | 0.250 | 6.10 | 3,200 | 120 |" in report
    beside = report.partition("## Beside codecs at 256 px")[2]
    order = re.findall(r"\| ([a-z]+-[a-z0-9]+) \| ([\d.]+) \|", beside)
    assert order == [("conv-f16c4", "0.062"), ("ssdd-f16c4", "0.062"), ("conv-f8c4", "0.250"), ("ssdd-f8c4", "0.250"),
                     ("jpeg-q10", "0.300"), ("jpeg-q50", "1.000")]  # fmt: skip
    assert "## Beside codecs at 128 px" in report
    figures = {
        f"{metric}-{along}.png" for metric in ("lpips-alex", "psnr") for along in ("numbers", "bits", "resolution")
    }
    assert {path.name for path in kept.glob("*.png")} == figures


class Pixels:
    """A tokenizer whose latents are the image."""

    info = TokenizerInfo(name="pixels", family="identity")

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        return images / 127.5 - 1

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        return 0.9 * latents  # so that there is an error to add to


def test_bits_of_latents_are_the_entropy_of_their_symbols() -> None:
    symbols = torch.tensor([0, 255, 0, 255], dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)  # -1 and 1
    assert measure.bits_per_pixel(Pixels(), [symbols], 1.0) == pytest.approx(3)  # a bit in each of three channels
    assert measure.bits_per_pixel(Pixels(), [symbols], 8.0) == 0


def test_the_step_is_the_coarsest_within_the_loss() -> None:
    images = [torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(i)).to(torch.uint8)
              for i in range(2)]  # fmt: skip
    step, best, quantised = measure.coarsest_step(Pixels(), images)
    coarser = measure.STEPS[measure.STEPS.index(step) + 1]
    latents = [
        (Pixels().encode(image, sample=False, seeds=torch.zeros(1)) / coarser).round() * coarser for image in images
    ]
    assert best - quantised <= measure.LOSS < best - measure.quality(Pixels(), images, latents)
