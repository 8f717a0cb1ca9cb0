"""Does the check, as CI runs it, catch what goes wrong in practice, and let pass what is harmless?"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests import ROOT
from tokbench.comparison.check import CheckResult, check
from tokbench.comparison.differences import Rules
from tokbench.data import crops
from tokbench.evaluation import reconstruct
from tokbench.evaluation.evaluate import evaluate
from tokbench.metrics import pixel

METRICS = ("psnr", "ssim")
FILES = {"klvae": Path("baselines/weights/klvae.safetensors"), "ssdd": Path("ssdd_models/weights/ssdd.safetensors")}


def measure(spec: str, out: Path, **how: object) -> None:
    evaluate(spec, "samples", 64, METRICS, device="cpu", workers=0, out=out, **how)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What CI commits: the demo models and rows that no model can change."""
    out = tmp_path_factory.mktemp("baseline")
    for spec in ("klvae", "ssdd", "identity", "jpeg-q10"):
        measure(spec, out)
    return out


def verdict(out: Path, baseline: Path, **rules: object) -> CheckResult:
    """As `make check` judges: weights and seeds are fixed, so only rounding may differ between machines."""
    tight = {"tolerances": {"psnr": "0.002", "ssim": "0.0002"}, "strict": True}
    return check(out, baseline, Rules(**{"two_sided": True, **tight, **rules}))


def perturb(name: str, change: Callable[[str, Tensor], Tensor], folder: Path) -> str:
    """A spec of the demo model with some tensors changed, under the demo model's own name."""
    with safe_open(ROOT / FILES[name], framework="pt") as file:
        tensors = {key: change(key, file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file(tensors, folder / "perturbed.safetensors", metadata)
    return f"{name}={name}:{folder / 'perturbed.safetensors'}"


def noisy(key: str, tensor: Tensor) -> Tensor:
    """One percent of the tensor's spread as noise."""
    generator = torch.Generator().manual_seed(0)
    spread = 0.01 * tensor.float().std(correction=0)
    return (tensor + spread * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def transposed(key: str, tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous() if key.endswith("relative_bias_table") else tensor


@pytest.mark.parametrize(
    ("name", "change", "rules"),
    [("klvae", noisy, {}), ("ssdd", noisy, {}), ("ssdd", transposed, {"exact": True})],  # its biases are small
)
def test_changed_weights_are_caught(name, change, rules, baseline, tmp_path):
    measure(perturb(name, change, tmp_path), tmp_path / "new")
    assert verdict(tmp_path / "new", baseline, **rules).failures


def bilinear(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    resolution = size[0]
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def truncating(floats: Tensor, rounding: str) -> Tensor:
    return ((floats.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)


def test_a_wrong_crop_filter_is_caught(baseline, tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "_adm", bilinear)
    measure("jpeg-q10", tmp_path / "new")
    assert verdict(tmp_path / "new", baseline).failures


def test_a_truncating_cast_is_caught(baseline, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruct, "quantise", truncating)
    measure("identity", tmp_path / "new")
    assert verdict(tmp_path / "new", baseline, exact=True).failures


def test_a_wrong_data_range_is_caught(baseline, tmp_path, monkeypatch):
    right = pixel.ssim
    monkeypatch.setattr(pixel, "ssim", lambda real, fake, data_range=1.0: right(real, fake, data_range=2.0))
    measure("jpeg-q10", tmp_path / "new")
    assert verdict(tmp_path / "new", baseline).failures


def test_identity_is_exact(baseline, tmp_path):
    measure("identity", tmp_path / "new")
    assert not verdict(tmp_path / "new", baseline, exact=True).failures


@pytest.mark.parametrize(
    "how", [*({"seeds": (seed,)} for seed in (1, 2, 3, 4, 5)), {"batch_size": 1}, {"batch_size": 7}]
)
def test_seeds_and_batch_sizes_pass(how, baseline, tmp_path):
    measure("ssdd", tmp_path / "new", **how)
    assert not check(tmp_path / "new", baseline).failures
    if "batch_size" in how:
        assert not verdict(tmp_path / "new", baseline).failures
