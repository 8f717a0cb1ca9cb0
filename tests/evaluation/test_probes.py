"""Probes against closed forms and outside implementations; their frame against that of run."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.filters import sobel
from torch import Tensor, nn

import tokbench as tb
from tests.conftest import TINY, Ran
from tests.forked import start
from tokbench import registry
from tokbench.data.open import open_source
from tokbench.evaluation.evaluate import evaluate
from tokbench.evaluation.probes import boxes, equivariance, legibility, look, robustness, seeds, spectrum
from tokbench.evaluation.reconstruct import Timer
from tokbench.metrics import METRICS, metrics_of
from tokbench.metrics.suite import MetricSuite
from tokbench.records.files import per_image_path, read_per_image
from tokbench.records.measurement import Measurement
from tokbench.records.result import EvalResult, TokenizerInfo, read_result
from tokbench.runtime.seeding import normal

NOISY = f"{TINY}@noise=0.3"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(suite: MetricSuite) -> dict[str, str]:
        return {metric.name: "its network is not here" for metric in suite.metrics if metric.networks}

    monkeypatch.setattr(MetricSuite, "unavailable", property(missing))


@pytest.fixture
def probe(tokbench: Callable[..., Ran], photographs: Path, tmp_path: Path) -> Callable[..., EvalResult]:
    """The record that `tokbench probe` writes of a model at 32 pixels."""

    def measured(names: str, model: str, **options: object) -> EvalResult:
        given = {"data": photographs, "res": 32, "limit": 4, "workers": 0} | options
        arguments = [part for key, value in given.items() for part in (f"--{key}", value)]
        ran = tokbench("probe", names, "--models", f"row={model}", "--out", tmp_path, *arguments)
        assert ran.status == 0, ran.err
        return read_result(max(tmp_path.glob("*/*/*.json"), key=lambda path: path.stat().st_mtime_ns))

    return measured


def values(result: EvalResult, *names: str) -> list[float]:
    return [result.metrics[name].value for name in names]


class Plain:
    """A tokenizer whose latents are pooled pixels, plus noise by the seeds."""

    def __init__(self, noise: float = 0.0, factor: int = 4) -> None:
        self.networks: dict[str, nn.Module] = {}
        self.noise, self.factor = noise, factor
        self.info = TokenizerInfo("plain", "plain", factor, 3, size_multiple=factor, deterministic=not noise)

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images / 127.5 - 1, self.factor)

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        images = nn.functional.interpolate(latents, scale_factor=self.factor)
        return images + self.noise * normal(seeds, images.shape[1:], device="cpu")


def looking(tokenizer: Any, images: Sequence[Tensor]) -> tuple[look.Look, look.Base]:
    """A tokenizer's `Look`, and the base of these images uint8 [3, H, W]."""
    suite = MetricSuite(["psnr"], len(images), 32)
    held = look.Look(tokenizer, Measurement(resolution=32), lambda _: suite, Timer(torch.device("cpu")))
    real, numbers = torch.stack(list(images)), torch.arange(len(images))
    return held, held.reconstruct([str(i) for i in range(len(images))], real, numbers)


def noise_images(count: int = 2, side: int = 32, low: int = 60, high: int = 190) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(low, high, (count, 3, side, side), generator=generator, dtype=torch.uint8))


# ---- drift --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["identity", NOISY, "bicubic-f8"])
def test_the_first_round_trip_is_what_run_measures_and_the_next_lose_more_unless_nothing_is_lost(
    model: str, photographs: Path, probe: Callable[..., EvalResult]
) -> None:
    result = probe("drift", model)
    psnr = values(result, "psnr", "psnr@x2", "psnr@x5", "psnr@x10")
    measured = evaluate(registry.create(f"row={model}"), photographs, 32, ["psnr"], limit=4, workers=0).metrics["psnr"]
    assert psnr[0] == pytest.approx(measured.value, abs=1e-4)
    assert psnr == [100] * 4 if model == "identity" else psnr == sorted(psnr, reverse=True) and psnr[0] < 100
    assert result.metrics["psnr-drift"].value == pytest.approx(psnr[0] - psnr[-1])
    assert result.unavailable["lpips-alex@x10"] == "its network is not here"


# ---- robustness ---------------------------------------------------------------------------------------------------


def test_noise_on_latents_that_are_pixels_adds_its_variance_to_the_error() -> None:
    held, base = looking(Plain(factor=1), noise_images(side=64))
    found = robustness.robustness(held, base)
    deviation = (base.real / 127.5 - 1).flatten(1).std(1)
    for sigma in (0.1, 0.3):
        expected = (sigma * deviation / 2) ** 2 + 1 / (12 * 255**2)  # on the scale [0, 1], with rounding
        assert found[f"mse@{sigma}"] == pytest.approx(expected.double().numpy(), rel=0.1)


class Curves:
    """Stored columns without a store."""

    def __init__(self, **columns: Sequence[float]) -> None:
        self.ids, self.columns = ["a", "b"], columns

    def column(self, name: str) -> np.ndarray:
        return np.array(self.columns[name.replace("-", "_").replace("@", "_at_").replace(".", "")], dtype=float)


def test_area_and_doubling_of_a_curve_that_is_a_line() -> None:
    lines = {f"lpips_alex_at_{str(s).replace('.', '')}": [0.1 + s / 2, 0.1 + s / 2] for s in (0.1, 0.2, 0.3, 0.5)}
    curve = Curves(lpips_alex=[0.1, 0.1], **lines)
    assert METRICS["noise-doubling"].value(curve).value == pytest.approx(0.2)  # 0.1 + s / 2 = 0.2
    assert METRICS["noise-area"].value(curve).value == pytest.approx(0.1 * 0.5 + 0.5**2 / 4)
    flat = Curves(lpips_alex=[0.1, 0.1], **{name: [0.1, 0.1] for name in lines})
    assert METRICS["noise-doubling"].value(flat).note == "not doubled at 0.5"


# ---- seeds --------------------------------------------------------------------------------------------------------


def test_the_share_of_seed_noise_follows_the_law_of_total_variance() -> None:
    gray, noise = [torch.full((3, 64, 64), level, dtype=torch.uint8) for level in (100, 140)], 0.08
    held, base = looking(Plain(noise), gray)
    found = seeds.seeds(held, base)
    assert found["noise-share"] == pytest.approx(np.ones(2), abs=0.02)  # a gray image has no other error
    assert found["noise-deviation"] == pytest.approx(np.full(2, noise * 127.5 * 0.965), rel=0.02)  # E s of 8 draws
    off = look.Base(base.ids, base.real - 20, base.seeds, base.fake, base.latents)  # a bias of 20 levels
    share = (noise * 127.5) ** 2 / ((noise * 127.5) ** 2 + 20**2)
    assert seeds.seeds(held, off)["noise-share"] == pytest.approx(np.full(2, share), rel=0.03)
    assert (found["psnr@worst"] < found["psnr@mean"]).all()
    assert (found["psnr@mean"] < found["psnr@best"]).all()


# ---- where the error lies -----------------------------------------------------------------------------------------


def test_power_is_counted_in_the_octave_of_a_wave_and_scales_with_its_square() -> None:
    place = torch.arange(128, dtype=torch.float64)
    for octave, wavelength in enumerate((3, 6, 12, 24)):
        wave = torch.cos(2 * torch.pi * place / wavelength).expand(1, 1, 128, 128)
        found = spectrum.power(wave)[0]
        assert found.argmax() == octave
        assert found[octave] > 0.9 * found.sum()
        assert spectrum.power(0.1 * wave)[0, octave] == pytest.approx(0.01 * found[octave].item())
    whole = noise_images(1)[0][None].double()
    window = torch.outer(torch.hann_window(32, dtype=torch.float64), torch.hann_window(32, dtype=torch.float64))
    centred = whole - (whole * window).mean((2, 3), keepdim=True) / window.mean()
    assert spectrum.power(whole).sum() == pytest.approx(32**2 * (centred * window).square().sum().item())  # Parseval


def test_bicubic_loses_the_short_wavelengths_and_keeps_the_long_and_the_identity_has_no_error(
    probe: Callable[..., EvalResult],
) -> None:
    short, long = values(probe("spectrum", "bicubic-f8", res=40), "error-luma@2px", "error-luma@32px")
    assert short == pytest.approx(0, abs=1)
    assert long < short - 5
    result = probe("spectrum", "identity", res=40)
    assert values(result, "error-luma@2px", "error-chroma@8px", "psnr-edges", "edge-gap") == [-100, -100, 100, 0]


def test_edges_are_where_scikit_image_finds_the_steepest_gradients() -> None:
    luma = spectrum.ycbcr(torch.stack(noise_images(2, 40)))[:, 0]
    for image, chosen in zip(luma.numpy(), spectrum.steepest(luma).numpy(), strict=True):
        gradients = sobel(image)[1:-1, 1:-1]  # its border is another
        inner = chosen[1:-1, 1:-1]
        assert chosen.sum() == 0.2 * chosen.size
        assert gradients[inner].min() >= gradients[~inner].max()


def test_luma_and_chroma_are_pillows() -> None:
    image = noise_images(1)[0]
    theirs = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("YCbCr")).astype(float) - [0, 128, 128]
    assert spectrum.ycbcr(image[None])[0].permute(1, 2, 0).numpy() == pytest.approx(theirs, abs=1.01)


# ---- equivariance -------------------------------------------------------------------------------------------------


def test_pooling_follows_mirrored_and_halved_images_but_not_shifts() -> None:
    held, base = looking(Plain(factor=4), noise_images())
    found = equivariance.equivariance(held, base)
    assert (found["equi-flip"] == 100).all()
    assert found["latent-flip"] == pytest.approx(np.zeros(2), abs=1e-6)
    assert (found["decode-flip"] == 100).all()
    assert found["latent-half"] == pytest.approx(np.zeros(2), abs=0.02)  # means of means, but for rounding
    assert (found["equi-shift"] < 30).all()


def test_a_tokenizer_that_changes_no_pixel_follows_every_shift() -> None:
    held, base = looking(Plain(factor=1), noise_images())
    held.tokenizer.info = TokenizerInfo("plain", "plain", downsample=8)
    assert (equivariance.shifted(held, base) == 100).all()
    moved = equivariance.move(base.real[0], 3, 2)
    assert torch.equal(moved[:, 3:, 2:], base.real[0][:, :-3, :-2])


# ---- legibility ---------------------------------------------------------------------------------------------------


def test_legible_is_the_smallest_size_from_which_all_larger_ones_stay_readable() -> None:
    sizes = (8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
    kept = dict(zip(sizes, (0.95, 0.5, 0.91, 0.8, 0.91, 1, 1, 1, 1, 0), strict=True))
    columns = {f"read_at_{s}px": [0.8, 0.6] if s < 64 else [0, 0] for s in sizes}  # 64 px did not fit
    columns |= {f"reread_at_{s}px": [0.8 * kept[s], 0.6 * kept[s]] for s in sizes}
    assert METRICS["legible-px"].value(Curves(**columns)).value == 16
    lost = columns | {f"reread_at_{s}px": [0, 0] for s in sizes}
    assert METRICS["legible-px"].value(Curves(**lost)).value is None


def test_text_follows_from_the_seed_and_every_size_that_fits_is_written_once() -> None:
    pages = legibility.pages(7, (256, 256))
    assert pages == legibility.pages(7, (256, 256)) != legibility.pages(8, (256, 256))
    lines = [line for page in pages for line in page]
    assert [size for size, *_ in lines] == [8, 10, 12, 14, 16, 20, 24, 32, 48, 64]
    for page in pages:
        tops = [box[1] for *_, box in page]
        assert all(low[3] <= high for (*_, low), high in zip(page, tops[1:], strict=False))
        assert max(box[3] for *_, box in page) <= 256
    image = torch.full((3, 256, 256), 200, dtype=torch.uint8)
    written = legibility.write(image, pages[0])
    outside = written.clone()
    for *_, (left, top, right, bottom) in pages[0]:
        outside[:, top:bottom, left:right] = 200
    assert torch.equal(outside, image)
    assert legibility.pages(7, (16, 16)) == []


@pytest.mark.skipif(legibility.without_ocr(), reason="needs tokbench[ocr]")
def test_the_ocr_reads_what_was_written_and_not_what_was_blurred(probe: Callable[..., EvalResult]) -> None:
    result = probe("legibility", "bicubic-f8", res=128, limit=1)
    assert result.metrics["read@24px"].value > 0.8
    assert result.metrics["reread@12px"].value < 0.5
    assert legibility.accuracy("abcd", "ABcx") == 0.75


# ---- boxes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """Two images in TokBench's layout, one with words and one with a face."""
    root = tmp_path / "annotated"
    for number, (name, size) in enumerate({"text_data/ic13/a.png": (48, 36), "face_data/b.png": (40, 40)}.items()):
        (root / "images" / name).parent.mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / name)
    words = [
        {"bbox": [4, 6, 20, 14], "rec": "one", "ratio": 0.2},
        {"bbox": [[0, 0], [9, 0], [9, 5], [0, 5]], "rec": ""},
    ]
    faces = [{"box": [10.2, 10, 30, 30], "kps": [], "ratio": 0.5, "gt": 1}]
    (root / "annotations").mkdir()
    for name, content in {
        "text_ic13": [{"file_name": "a.png", "height": 36, "width": 48, "annotations": words}],
        "face_meta": [{"image_name": "b.png", "img_height": 40, "img_width": 40, "faces": faces}],
    }.items():
        (root / "annotations" / f"{name}.json").write_text(json.dumps(content))
    return root


def test_boxes_are_scored_where_they_are_in_the_image_of_its_own_size(
    annotated: Path, probe: Callable[..., EvalResult]
) -> None:
    result = probe("text-boxes", "identity", data=annotated, res=48)
    assert result.dataset.num_images == 1
    assert result.metrics["text-psnr"].value == 100  # 48 pixels are the padded image's own


def test_a_box_is_found_in_either_form_and_grown_inside_the_image(annotated: Path) -> None:
    source, found = boxes.annotated(open_source(str(annotated)), "text")
    assert source.ids == ["images/text_data/ic13/a"]
    first, second = found["images/text_data/ic13/a"]
    assert (first.left, first.top, first.right, first.bottom, first.text) == (4, 6, 21, 15, "one")
    assert (second.left, second.top, second.right, second.bottom) == (0, 0, 10, 6)
    assert boxes.grown(4, 21, 48, 32) == (0, 32)
    assert boxes.grown(40, 47, 48, 32) == (16, 48)
    assert boxes.grown(-5, 60, 48, 1) == (0, 48)


def test_folders_without_boxes_and_broken_annotations_are_named(
    annotated: Path, photographs: Path, tokbench: Callable[..., Ran]
) -> None:
    ran = tokbench("probe", "face-boxes", "--models", "identity", "--data", photographs)
    assert (ran.status, "no image with boxes of face" in ran.reason) == (2, True)
    (annotated / "annotations" / "text_ic13.json").write_text('[{"file_name": "a.png", "annotations": [{"rec": 1}]}]')
    ran = tokbench("probe", "text-boxes", "--models", "identity", "--data", annotated)
    assert (ran.status, "text_ic13.json: no annotations in TokBench's layout" in ran.reason) == (2, True)


# ---- the frame ----------------------------------------------------------------------------------------------------


def test_a_record_gains_the_probes_that_it_lacks_and_is_not_measured_twice(
    probe: Callable[..., EvalResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = probe("drift", NOISY)
    monkeypatch.setattr(look.Look, "decode", None)
    both = probe("drift,spectrum", NOISY)
    assert both.metrics["psnr@x10"] == first.metrics["psnr@x10"]
    assert "edge-gap" in both.metrics
    monkeypatch.setattr(look.Look, "reconstruct", None)
    assert probe("spectrum,drift", NOISY) == both


def test_batch_size_and_processes_change_no_number(photographs: Path, tmp_path: Path, probe: Any) -> None:
    alone = probe("drift,seeds,equivariance", NOISY)
    command = ["probe", "drift,seeds,equivariance", "--models", f"row={NOISY}", "--data", str(photographs), "--res",
               "32", "--limit", "4", "--workers", "0", "--out", str(tmp_path / "two")]  # fmt: skip
    (errors := tmp_path / "errors").mkdir()
    for process in start(command, errors, world=2):
        assert process.finish()[0] == 0
    path = next((tmp_path / "two").glob("*/*/row.json"))
    assert read_result(path).metrics == alone.metrics
    assert path.with_suffix(".seeds.png").exists()
    ids, columns = read_per_image(per_image_path(path))
    assert len(ids) == 4
    assert {"psnr-drift", "noise-deviation", "equi-half"} <= columns.keys()


def test_compare_and_check_judge_what_probes_found(
    tokbench: Callable[..., Ran], photographs: Path, tmp_path: Path
) -> None:
    for name, noise in (("base", 0.1), ("new", 0.5)):
        tokbench("probe", "seeds", "--models", f"row={TINY}@noise={noise}", "--data", photographs, "--res", 32,
                 "--out", tmp_path / name, "--limit", 4)  # fmt: skip
    shown = tokbench("compare", tmp_path / "base", tmp_path / "new").out
    assert "noise-share" in shown
    assert "worse" in shown
    checked = tokbench("check", tmp_path / "new", "--against", tmp_path / "base", "--metrics", "noise-deviation")
    assert checked.status == 1


def brightness(held: look.Look, base: look.Base) -> look.Found:
    return {"brightness": base.fake.float().flatten(1).mean(1)}


@pytest.fixture
def brightness_probe() -> Iterator[None]:
    tb.register_probe("brightness", brightness, summary="for tests")
    tb.register_metric(tb.Metric("brightness", "neither", "mean level", probe="brightness"))
    yield
    del registry.PROBES._known["brightness"], METRICS["brightness"]


@pytest.mark.usefixtures("brightness_probe")
def test_a_probe_from_outside_is_listed_run_on_every_model_and_printed(
    tokbench: Callable[..., Ran], photographs: Path, tmp_path: Path
) -> None:
    assert "brightness" in (listed := tokbench("list", "probes").out)
    assert "psnr-drift" in listed
    command = ("--models", f"tiny={TINY},bad={TINY}@fault=load", "--data", photographs, "--res", 32, "--out", tmp_path)
    ran = tokbench("probe", "brightness", *command)
    assert ran.status == 1
    assert "failed: bad" in ran.err
    assert "at most: 1, of which 1 shared, brightness 0" in ran.err
    assert "brightness" in ran.out
    with pytest.raises(ValueError, match="taken already"):
        tb.register_probe("brightness", brightness, summary="again")


def test_all_probes_but_legibility_take_at_most_twenty_passes() -> None:
    own = [p for name, p in registry.PROBES.all().items() if not p.boxes and name != "legibility"]
    assert 1 + sum(probe.encodings + probe.decodings for probe in own) / 2 <= 20


def test_what_a_tokenizer_cannot_have_is_said(tokbench: Callable[..., Ran], photographs: Path, tmp_path: Path) -> None:
    ran = tokbench("probe", "robustness,seeds", "--models", f"codes={TINY}@codes=true", "--data", photographs,
                   "--res", 32, "--limit", 2, "--out", tmp_path)  # fmt: skip
    assert ran.status == 0
    assert "has no continuous latents" in ran.out
    assert "decodes without noise" in ran.out
    assert {metric.probe for metric in metrics_of("seeds")} == {"seeds"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("drif", "--models", "identity"), 'unknown probe "drif"; did you mean drift?'),
     (("drift", "--models", "identiti"), "did you mean identity"),
     (("drift", "--models", f"{TINY}@multiple=5"), "needs sizes divisible by 5"),
     (("text-boxes", "--models", "identity", "--res", "native"), "boxes need a side"),
     (("drift", "--models", "identity", "--res", "64", "--small", "refuse"), "smaller than 64:")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    arguments: tuple[str, ...], said: str, tokbench: Callable[..., Ran], photographs: Path, tmp_path: Path
) -> None:
    ran = tokbench("probe", "--res", 32, "--data", photographs, "--out", tmp_path, *arguments)
    assert (ran.status, said in ran.reason) == (2, True)


def test_run_refuses_what_only_a_probe_measures(tokbench: Callable[..., Ran]) -> None:
    ran = tokbench("run", "--models", "identity", "--metrics", "psnr@x10")
    assert (ran.status, "`tokbench probe drift`" in ran.reason) == (2, True)
