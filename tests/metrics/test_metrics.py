"""Per-image scores against scikit-image, lpips and DISTS's formula; laws of the table of metrics."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import convolve
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from tests import ROOT, example_plugin
from tests.conftest import SAMPLES
from tokbench import registry, weights
from tokbench.data.crops import crop
from tokbench.data.open import open_source
from tokbench.data.pixels import quantise
from tokbench.errors import InputError
from tokbench.evaluation.evaluate import evaluate
from tokbench.metrics import (
    DEFAULT,
    EXTRACTORS,
    LATENTS,
    METRICS,
    extractors,
    find_metrics,
    perceptual,
    pixel,
    register_extractor,
)
from tokbench.metrics.suite import MetricSuite
from tokbench.protocols import PROTOCOLS
from tokbench.registry import create
from tokbench.weights import convert as weights_convert

GAUSS = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def here(*names: str) -> pytest.MarkDecorator:
    """Skip where the weights of these networks are not on the machine."""
    missing = [name for name in names if weights.locate(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no weights of {', '.join(missing)}")


def photographs(size: int = 64, count: int = 3) -> Tensor:
    """uint8 [count, 3, size, size] from the bundled photographs."""
    crops = []
    for path in sorted(SAMPLES.glob("*.jpg"))[:count]:
        with Image.open(path) as image:
            crops.append(torch.from_numpy(np.array(image.convert("RGB").resize((size, size)))).permute(2, 0, 1))
    return torch.stack(crops)


def noisy(images: Tensor, amount: float = 15.0, seed: int = 0) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) * amount
    return (images.float() + noise).round().clamp(0, 255).to(torch.uint8)


def pairs(real: Tensor, fake: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """float64 [H, W, 3] in [0, 1]."""
    return [
        (r.permute(1, 2, 0).numpy() / 255, f.permute(1, 2, 0).numpy() / 255) for r, f in zip(real, fake, strict=True)
    ]


def test_psnr_equals_scikit_image() -> None:
    real = photographs()
    fake = noisy(real)
    expected = [peak_signal_noise_ratio(r, f, data_range=1) for r, f in pairs(real, fake)]
    np.testing.assert_allclose(pixel.psnr(pixel.squared_error(real, fake)), expected, rtol=1e-9)


@pytest.mark.parametrize("amount", [1.0, 15.0, 80.0])
def test_ssim_equals_scikit_image(amount: float) -> None:
    real = torch.cat([photographs(), torch.full((1, 3, 64, 64), 7, dtype=torch.uint8)])
    fake = noisy(real, amount)
    for score, options in ((pixel.ssim, {}), (pixel.ssim_gauss, GAUSS)):
        expected = [structural_similarity(r, f, data_range=1, channel_axis=2, **options) for r, f in pairs(real, fake)]
        np.testing.assert_allclose(score(real, fake), expected, atol=1e-5)


def test_llamagens_ssim_is_scikit_images_with_range_two() -> None:
    real = photographs()
    fake = noisy(real)
    expected = [structural_similarity(r, f, data_range=2, channel_axis=2) for r, f in pairs(real, fake)]
    np.testing.assert_allclose(pixel.ssim(real, fake, data_range=2), expected, atol=1e-5)


def test_vavaes_ssim_is_scikit_images_of_signed_images() -> None:
    real = torch.cat([photographs(), torch.full((1, 3, 64, 64), 7, dtype=torch.uint8)])
    fake = noisy(real)
    expected = [structural_similarity(2 * r - 1, 2 * f - 1, data_range=2, channel_axis=2, **GAUSS)
                for r, f in pairs(real, fake)]  # fmt: skip
    (score,) = MetricSuite(["ssim-gauss-signed"], 1, 256).scorers
    np.testing.assert_allclose(score(real, fake, None)["ssim-gauss-signed"], expected, atol=1e-5)
    assert (pixel.ssim_gauss(real, fake) - torch.tensor(expected)).abs().max() > 1e-3


def test_ms_ssim_equals_its_formula_over_scikit_images_maps() -> None:
    real = photographs(176, 1)
    fake = noisy(real, 30)
    (x, y), total = pairs(real, fake)[0], np.ones(3)
    for scale, weight in enumerate(pixel.MS_WEIGHTS):
        for channel in range(3):
            a, b = x[..., channel], y[..., channel]
            # With a huge first constant the luminance term is 1 everywhere and contrast times structure is left.
            constant = {} if scale == 4 else {"K1": 1e6}
            _, full = structural_similarity(a, b, data_range=1, full=True, **constant, **GAUSS)
            total[channel] *= full[5:-5, 5:-5].mean() ** weight
        x, y = (
            side.reshape(side.shape[0] // 2, 2, side.shape[1] // 2, 2, 3).mean((1, 3)) if scale < 4 else side
            for side in (
                x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2],
                y[: y.shape[0] // 2 * 2, : y.shape[1] // 2 * 2],
            )
        )
    np.testing.assert_allclose(pixel.ms_ssim(real, fake), [total.mean()], atol=1e-5)


def keep_random(name: str, layers: Sequence[nn.Module], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers for the convolutions of `layers`, and a file of them in the place of the network's own."""
    torch.manual_seed(0)
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    state: dict[str, Tensor] = {}
    for position, layer in zip(weights_convert.LAYERS[name], convolutions, strict=True):
        assert layer.bias is not None
        nn.init.kaiming_normal_(layer.weight)  # activations neither vanish nor explode
        nn.init.normal_(layer.bias, std=0.1)
        state |= {f"features.{position}.weight": layer.weight.data, f"features.{position}.bias": layer.bias.data}
    torch.save(state, folder / "raw.pth")
    monkeypatch.setenv("TOKBENCH_WEIGHTS", str(folder))
    monkeypatch.setitem(weights.NETWORKS, name, replace(weights.NETWORKS[name], sha256=""))
    weights_convert.from_torchvision(folder / "raw.pth", folder / weights.NETWORKS[name].file, name)


@pytest.mark.parametrize("net", ["alex", "vgg"])
@pytest.mark.parametrize("convolutions", ["published", "random"])
@pytest.mark.filterwarnings("ignore")
def test_lpips_equals_its_package_on_photographs(
    net: str, convolutions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lpips = pytest.importorskip("lpips")
    reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # with the heads of its own wheel
    layers = [layer for layer in reference.net.modules() if isinstance(layer, nn.Conv2d)]
    if convolutions == "random":
        keep_random(f"lpips-{net}", layers, tmp_path, monkeypatch)
    path = weights.locate(f"lpips-{net}")
    if path is None:
        pytest.skip(f"no weights of lpips-{net}")
    tensors = weights.load(path)
    with torch.no_grad():
        for index, layer in enumerate(layers):
            layer.weight.copy_(tensors[f"convs.{index}.weight"])
            assert layer.bias is not None
            layer.bias.copy_(tensors[f"convs.{index}.bias"])
        real = photographs()
        fake = noisy(real)
        expected = reference(real / 127.5 - 1, fake / 127.5 - 1).flatten()
        (score,) = MetricSuite([f"lpips-{net}"], 1, 256).scorers
        torch.testing.assert_close(score(real, fake, None)[f"lpips-{net}"], expected, atol=1e-5, rtol=0)
        safe = perceptual.lpips_network(net)(real / 127.5 - 1, fake / 127.5 - 1)
    torch.testing.assert_close(safe, expected, atol=1e-4, rtol=0)


@here("lpips-alex")
def test_the_loss_has_a_finite_gradient_where_images_are_equal_or_black() -> None:
    network = perceptual.lpips_network("alex")
    fake = torch.full((1, 3, 64, 64), -1.0, requires_grad=True)
    network(torch.full((1, 3, 64, 64), -1.0), fake).sum().backward()
    assert fake.grad is not None
    assert fake.grad.isfinite().all()


def dists_activations(layers: nn.Sequential, image: Tensor) -> list[np.ndarray]:
    """float64 [C, h, w] of torchvision's VGG16 layers in Ding et al.'s order; scipy's blur in the place of a maximum.

    image: [3, H, W] in [0, 1].
    """
    hann = np.hanning(5)[1:-1]
    window = np.outer(hann, hann) / np.outer(hann, hann).sum()
    x = (image - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    taps = [image.numpy()]
    for layer in layers[:-1]:  # the last pooling is not read
        if isinstance(layer, nn.MaxPool2d):
            taps.append(x.numpy())
            blurred = [convolve(channel**2, window, mode="constant")[::2, ::2] for channel in x.numpy()]
            x = torch.from_numpy(np.sqrt(np.stack(blurred)))
        else:
            x = layer(x)
    return [*taps, x.numpy()]


@pytest.mark.parametrize("size", [32, 45])
@torch.no_grad()
def test_dists_equals_its_formula(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ding et al. 2020, eqs. 5 to 7, written out per channel in float64, over random convolutions and weights."""
    layers = make_layers(cfgs["D"])
    keep_random("lpips-vgg", list(layers), tmp_path, monkeypatch)
    monkeypatch.setitem(weights.NETWORKS, "dists", replace(weights.NETWORKS["dists"], sha256=""))
    alpha, beta = torch.rand(2, 3 + 64 + 128 + 256 + 512 + 512).double()
    torch.save({"alpha": alpha.view(1, -1, 1, 1), "beta": beta.view(1, -1, 1, 1)}, tmp_path / "dists.pt")
    real, fake = photographs(size, 1), noisy(photographs(size, 1))
    x_all, y_all = (dists_activations(layers.double(), side[0].double() / 255) for side in (real, fake))
    place, similarity = 0, 0.0
    for x_maps, y_maps in zip(x_all, y_all, strict=True):
        for x, y in zip(x_maps, y_maps, strict=True):
            mean = (2 * x.mean() * y.mean() + 1e-6) / (x.mean() ** 2 + y.mean() ** 2 + 1e-6)
            cov = ((x * y).mean() - x.mean() * y.mean()) * 2 + 1e-6
            similarity += float(alpha[place]) * mean + float(beta[place]) * cov / (x.var() + y.var() + 1e-6)
            place += 1
    (score,) = MetricSuite(["dists"], 1, 256).scorers
    expected = 1 - similarity / float(alpha.sum() + beta.sum())
    np.testing.assert_allclose(score(real, fake, None)["dists"], [expected], atol=1e-5)


@here("lpips-vgg")
def test_lpips_as_a_loss_in_bfloat16_is_that_in_float32() -> None:
    network = perceptual.lpips_network("vgg").to(memory_format=torch.channels_last)
    real = (photographs() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    blurred = F.interpolate(F.avg_pool2d(real, 4), scale_factor=4, mode="bicubic")
    found = []
    for enabled in (False, True):
        fake = blurred.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = network(real, fake)
        loss.sum().backward()
        assert loss.dtype == torch.float32
        found.append((loss.detach(), fake.grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0.01, atol=0)
    assert F.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), 0) > 0.9


@here("lpips-alex", "lpips-vgg", "dists", "mobilenet")
def test_identity_scores_perfectly_and_blur_gets_worse_step_by_step() -> None:
    names = ["psnr", "ssim", "ssim-gauss", "ms-ssim", "lpips-alex", "lpips-vgg", "dists", "pd-mobilenet"]
    suite = MetricSuite(names, 1, 192)
    assert not suite.unavailable
    real = photographs(192, 1)
    small = [real] + [nn.functional.interpolate(real.float(), scale_factor=1 / k, mode="area") for k in (2, 4, 8)]
    fakes = [nn.functional.interpolate(s.float(), 192, mode="bilinear").round().to(torch.uint8) for s in small]
    with torch.inference_mode():
        scores = [{n: float(v) for n, v in suite.score(real, fake).items()} for fake in fakes]
    perfect = {
        "psnr": 100.0,
        "ssim": 1.0,
        "ssim-gauss": 1.0,
        "ms-ssim": 1.0,
        "lpips-alex": 0.0,
        "lpips-vgg": 0.0,
        "dists": 0.0,
    }
    assert {name: scores[0][name] for name in perfect} == pytest.approx(perfect, abs=1e-6)
    for name in perfect:
        values = [score[name] * (-1 if METRICS[name].better == "higher" else 1) for score in scores]
        assert values == sorted(values)
        assert len(set(values)) == 4
    extract = suite.extractors["mobilenet"]
    assert torch.equal(extract(real), extract(real.clone()))


@here("lpips-vgg")
def test_the_unclamped_column_sees_what_the_image_cannot_show() -> None:
    clamped, unclamped = MetricSuite(["lpips-vgg", "lpips-vgg-unclamped"], 1, 256).scorers
    real = photographs(32)
    decoded = real / 127.5 - 1
    with torch.inference_mode():
        equal = unclamped(real, real, decoded)["lpips-vgg-unclamped"]
        bright = unclamped(real, real, decoded * 1.5)["lpips-vgg-unclamped"]
        torch.testing.assert_close(equal, clamped(real, real, None)["lpips-vgg"])
    assert (bright > 0.01).all()
    with pytest.raises(InputError, match="needs a decoder's output"):
        unclamped(real, real, None)


class Stored:
    """Columns and features in memory, as metrics read them."""

    def __init__(
        self, columns: dict[str, list[float]], features: dict[tuple[str, str], np.ndarray] | None = None
    ) -> None:
        self.columns, self.stored = columns, features or {}
        first = next(iter([*columns.values(), *self.stored.values()]))
        self.ids = [f"{i:05d}" for i in range(len(first))]

    def column(self, name: str) -> np.ndarray:
        return np.array(self.columns[name])

    def features(self, side: str, extractor: str) -> np.ndarray:
        return self.stored[side, extractor]


def test_global_psnr_is_at_most_the_mean_and_identical_images_count() -> None:
    samples = Stored({"mse": [0.0, 0.01, 0.04], "psnr": [100.0, 20.0, 10 * np.log10(25)]})
    mean, overall = METRICS["psnr"].value(samples), METRICS["psnr-global"].value(samples)
    assert mean.value == pytest.approx((100 + 20 + 13.9794) / 3)
    assert "1 of 3 images identical" in mean.note
    assert overall.value == pytest.approx(-10 * np.log10(0.05 / 3))
    assert overall.stderr is not None
    assert METRICS["psnr-global"].value(Stored({"mse": [0.0], "psnr": [100.0]})).value == 100


@pytest.mark.parametrize(
    "name",
    [
        m.name
        for m in METRICS.values()
        if m.extractor not in (None, LATENTS) and m.scope != "generation" and not m.probe
    ],
)
def test_identity_gives_zero_distance_and_full_agreement(name: str) -> None:
    metric = METRICS[name]
    assert metric.extractor is not None
    rows = np.random.default_rng(0).standard_normal((max(metric.minimum, 20), 8)).astype(np.float32)
    value = metric.value(Stored({}, {(side, metric.extractor): rows for side in ("real", "fake")})).value
    assert value is not None
    if metric.better == "lower" and name != "kid":
        assert value == 0
    elif name == "kid":
        assert abs(value) < 1e-12 or value < 0  # the unbiased estimate of nothing is a little below zero
    elif name == "agreement":
        assert value == 1


def test_few_images_give_null_with_a_note_and_need_no_network() -> None:
    rows = np.zeros((29, 4), dtype=np.float32)
    value = METRICS["rfid"].value(Stored({}, {(side, "inception"): rows for side in ("real", "fake")}))
    assert value.value is None
    assert "2,048" in value.note
    suite = MetricSuite(["rfid", "fd-dinov2"], 29, 256)
    assert not suite.unavailable
    assert not suite.extractors


def test_a_missing_network_makes_its_metric_unavailable_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TOKBENCH_WEIGHTS", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("TOKBENCH_OFFLINE", "1")
    suite = MetricSuite(["psnr", "lpips-alex", "dreamsim", "pd-mobilenet"], 29, 64)
    assert set(suite.unavailable) == {"lpips-alex", "dreamsim", "pd-mobilenet"}
    assert "tokbench weights fetch lpips-alex" in suite.unavailable["lpips-alex"]
    assert [metric.name for metric in suite.available] == ["psnr"]


def test_a_file_of_other_weights_makes_its_metrics_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKBENCH_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(weights.NETWORKS, "mobilenet", replace(weights.NETWORKS["mobilenet"], sha256=""))
    torch.save({"x": torch.zeros(1)}, tmp_path / weights.NETWORKS["mobilenet"].file)
    suite = MetricSuite(["psnr", "pd-mobilenet", "agreement"], 29, 64)
    assert set(suite.unavailable) == {"pd-mobilenet", "agreement"}
    assert "does not hold the weights of mobilenet" in suite.unavailable["agreement"]
    assert [metric.name for metric in suite.available] == ["psnr"]


def test_images_too_small_for_a_metric_are_said_to_be() -> None:
    suite = MetricSuite(["psnr", "ms-ssim"], 3, 64)
    assert suite.unavailable == {"ms-ssim": "needs images of 161 pixels a side, these have 64"}


def test_the_table_is_consistent() -> None:
    for name, metric in METRICS.items():
        assert name == metric.name
        assert metric.columns or metric.extractor
        assert set(metric.networks) <= set(weights.NETWORKS)
        assert metric.low is None or metric.high is None or metric.low < metric.high
    assert set(DEFAULT) <= set(METRICS)
    assert {name for protocol in PROTOCOLS.values() for name in protocol.metrics} <= set(METRICS)


def test_an_unknown_metric_is_answered_with_close_ones() -> None:
    with pytest.raises(InputError, match="did you mean lpips"):
        find_metrics(["lpips"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_nothing_waits_for_the_gpu() -> None:
    names = [n for n in ("psnr", "ssim", "ssim-gauss", "lpips-alex", "lpips-vgg", "dists", "pd-mobilenet")
             if all(weights.locate(network) for network in METRICS[n].networks)]  # fmt: skip
    suite = MetricSuite(names, 3, 64, "cuda")
    real = photographs().cuda()
    fake = noisy(photographs()).cuda()
    for mode in ("default", "error"):  # the first pass may choose algorithms
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.inference_mode():
                for score in suite.scorers:
                    score(real, fake.clone(), None)
                for extract in suite.extractors.values():
                    extract(fake.clone())
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def plugin() -> Iterator[None]:
    """The README's, registered for one test."""
    example_plugin.register()
    yield
    del METRICS["mae"], METRICS["below-30-db"], registry.SOURCES._known["grays"]


@pytest.mark.usefixtures("plugin")
def test_metrics_and_sources_come_from_outside_too() -> None:
    names = ("mae", "below-30-db", "psnr")
    result = evaluate("identity", "grays:5", 32, names)
    assert result.dataset.num_images == 5
    assert [result.metrics[name].value for name in names] == [0, 0, 100]
    assert result.metrics["mae"].stderr == 0
    lossy = evaluate("jpeg-q10", "samples", 64, names, limit=5)
    assert lossy.metrics["below-30-db"].value == 1
    source = open_source("samples", limit=5)
    real = torch.stack([torch.tensor(crop(source.read(i), 64, PROTOCOLS["adm"])) for i in range(5)])
    model = create("jpeg-q10")
    fake = quantise(model.decode(model.encode(real.permute(0, 3, 1, 2), sample=False, seeds=torch.zeros(5)),
                                 seeds=torch.zeros(5), size=(64, 64)), "nearest").permute(0, 2, 3, 1)  # fmt: skip
    assert lossy.metrics["mae"].value == pytest.approx(float((real.double() - fake.double()).abs().mean()))
    with pytest.raises(ValueError, match="taken already"):
        example_plugin.register()
    with pytest.raises(InputError, match=r"nothing: no such file.* one of samples, .*, grays"):
        open_source("nothing")
    assert Path(example_plugin.__file__).read_text(encoding="utf-8") in (ROOT / "README.md").read_text(encoding="utf-8")


class Means(torch.nn.Module):
    """A plugin's extractor: the colours of the quarters of an image."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pooled = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2)
        return {"quarters": pooled.flatten(1)}


@pytest.mark.usefixtures("plugin")
def test_features_of_a_plugin_bring_two_distances() -> None:
    registered = {"dim": 12, "preprocessing": "v1", "summary": "colours of quarters"}
    register_extractor("quarters", lambda _: Means(), **registered)  # type: ignore[arg-type]
    try:
        made = extractors.extractors(["quarters"])["quarters"]
        images = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(1, 3, 8, 8)
        assert made(images).shape == (1, 12)
        result = evaluate("jpeg-q10", "grays:512", 32, ["fd-quarters", "mind-quarters"])
        assert result.metrics["fd-quarters"].note.startswith("needs 2,048 images, here 512")
        value = result.metrics["mind-quarters"].value
        assert value is not None
        assert value > 0
        with pytest.raises(ValueError, match="taken already"):
            register_extractor("quarters", lambda _: Means(), **registered)  # type: ignore[arg-type]
    finally:
        del METRICS["fd-quarters"], METRICS["mind-quarters"], EXTRACTORS["quarters"]
