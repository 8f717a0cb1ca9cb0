"""`tokbench run`: cells, cache, resume, what is written, and what happens when something is wrong."""

import gzip
import importlib
import importlib.metadata
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import TESTS
from tests.conftest import TINY, Ran
from tokbench.evaluation import cell
from tokbench.evaluation.reconstruct import first_batch_size
from tokbench.evaluation.summary import compute
from tokbench.metrics import METRICS, Metric
from tokbench.metrics.suite import MetricSuite
from tokbench.protocols import PROTOCOLS
from tokbench.records.files import read_per_image, read_results
from tokbench.records.result import EvalResult, read_result
from tokbench.records.samples import SampleStore
from tokbench.weights.networks import find_network

Command = Callable[..., Ran]
FAST = ("--metrics", "psnr,psnr-global,ssim", "--res", "32", "--batch-size", "5")


def results(out: Path) -> dict[str, EvalResult]:
    found = [read_result(path) for path in sorted(out.glob("*/*/*.json"))]
    return {f"{result.tokenizer.name}-{result.dataset.resolution}": result for result in found}


class Quadrants:
    """An extractor that needs no weights: mean colours of quadrants."""

    dim, sha256 = 12, "0" * 64

    def __init__(self, name: str) -> None:
        self.name = self.identity = name

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def read_rows(out: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    return read_per_image(out / "adm" / "photographs-32" / "tiny.per_image.csv.gz")


def rows(out: Path) -> dict[str, bytes]:
    return {path.name: gzip.decompress(path.read_bytes()) for path in sorted(out.glob("*/*/*.csv.gz"))}


def test_a_run_leaves_record_rows_picture_and_plot(tokbench: Command, photographs: Path, tmp_path: Path) -> None:
    ran = tokbench("run", "--models", f"tiny={TINY},bicubic-f8", "--data", photographs, "--out", tmp_path, *FAST)
    assert ran.status == 0, ran.err
    folder = tmp_path / "adm" / "photographs-32"
    names = {path.name for path in folder.iterdir()}
    own = {f"tiny{end}" for end in (".json", ".png", ".per_image.csv.gz", ".images")}
    assert names == own | {name.replace("tiny", "bicubic-f8") for name in own} | {"quality-vs-time.png", "+real.images"}
    assert {path.name for path in tmp_path.iterdir()} == {"adm"}
    result = read_result(folder / "tiny.json")
    assert result.dataset.num_images == 12
    assert result.tokenizer.encoder_params == 4 * 3 * 16 + 4
    ids, columns = read_per_image(folder / "tiny.per_image.csv.gz")
    assert ids == sorted(path.stem for path in photographs.iterdir())
    assert np.isclose(columns["psnr"].mean(), result.metrics["psnr"].value)
    assert "tiny" in ran.out
    assert "12 images of photographs" in ran.err
    with Image.open(folder / "tiny.png") as image:
        assert image.width == 2 * 3 * 32 + 6


def test_the_identity_is_perfect(tokbench: Command, photographs: Path, tmp_path: Path) -> None:
    assert tokbench("run", "--models", "identity", "--data", photographs, "--out", tmp_path, *FAST).status == 0
    metrics = results(tmp_path)["identity-32"].metrics
    assert metrics["psnr"].value == 100
    assert metrics["ssim"].value == 1


def test_a_second_run_answers_from_the_cache_and_says_so(tokbench: Command, photographs: Path, tmp_path: Path) -> None:
    command = ("run", "--models", f"tiny={TINY}", "--data", photographs, "--out", tmp_path, *FAST)
    assert tokbench(*command).status == 0
    before = results(tmp_path)["tiny-32"]
    ran = tokbench(*command)
    assert "0 done, 1 cached, 0 failed" in ran.err
    assert results(tmp_path)["tiny-32"] == before
    assert "1 done, 0 cached" in tokbench(*command, "--fresh").err


def test_edited_code_changed_images_and_other_weights_are_measured_again(
    tokbench: Command, photographs: Path, tmp_path: Path
) -> None:
    code, data = tmp_path / "model.py", tmp_path / "data"
    shutil.copy(TESTS / "tiny.py", code)
    shutil.copytree(photographs, data)
    command = ("run", "--data", data, "--out", tmp_path / "runs", *FAST)
    spec = f"m={code}:tiny"
    assert "1 done" in tokbench(*command, "--models", spec).err
    assert "1 cached" in tokbench(*command, "--models", spec).err
    ran = tokbench(*command, "--models", f"{spec}@bias=0.1")
    assert "1 done" in ran.err
    assert "runs/ holds another measurement of m: this one is m-2" in ran.err
    assert "1 cached" in tokbench(*command, "--models", spec).err
    code.write_text(code.read_text() + "\n# edited\n")
    assert "1 done" in tokbench(*command, "--models", spec).err
    first = sorted(data.iterdir())[0]
    Image.new("RGB", (50, 50)).save(first)
    assert "1 done" in tokbench(*command, "--models", spec).err


def test_another_version_of_a_library_behind_a_number_measures_it_again(
    tokbench: Command, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.metadata.version
    model = tmp_path / "model.py"
    model.write_text("from torchvision.ops import Permute\nfrom tests.tiny import tiny\n\n\ndef load():\n"
                     "    made = tiny()\n    made.networks = {**made.networks, 'more': Permute([0, 1, 2, 3])}\n"
                     "    return made\n")  # fmt: skip
    command = ("run", "--models", f"m={model}:load", "--data", photographs, "--out", tmp_path / "runs", *FAST)
    assert "1 done" in tokbench(*command).err
    for package, said in {"diffusers": "cached", "torch": "done", "pillow": "done", "torchvision": "done"}.items():
        changed = {package: "9"}
        monkeypatch.setattr(importlib.metadata, "version", lambda name, to=changed: to.get(name) or installed(name))
        assert f"1 {said}" in tokbench(*command).err, package


def test_edited_code_of_a_plugins_metric_measures_it_again_and_no_other(
    tokbench: Command, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "own_metric.py"
    code.write_text("def score(real, fake):\n    return (real.float() - fake.float()).abs().flatten(1).mean(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = importlib.import_module("own_metric")
    monkeypatch.setitem(METRICS, "own", Metric("own", "lower", "mean absolute error", score=own.score))
    command = ("run", "--models", f"tiny={TINY}", "--data", photographs, "--out", tmp_path / "runs", "--res", 32)
    assert "1 done" in tokbench(*command, "--metrics", "psnr,own").err
    assert "1 cached" in tokbench(*command, "--metrics", "psnr,own").err
    before = results(tmp_path / "runs")["tiny-32"].metrics
    code.write_text(code.read_text().replace("mean(1)", "amax(1)"))
    monkeypatch.setitem(METRICS, "own", replace(METRICS["own"], score=importlib.reload(own).score))
    assert "1 cached" in tokbench(*command, "--metrics", "psnr").err
    assert "1 done" in tokbench(*command, "--metrics", "own").err
    after = results(tmp_path / "runs")["tiny-32"].metrics
    assert after["psnr"] == before["psnr"]
    assert after["own"].value > before["own"].value


def test_batch_size_and_workers_change_nothing(tokbench: Command, photographs: Path, tmp_path: Path) -> None:
    tables = []
    for number, extra in enumerate((("--batch-size", 1), ("--batch-size", 7, "--workers", 1))):
        out = tmp_path / str(number)
        command = ("run", "--models", f"tiny={TINY}@noise=0.3", "--data", photographs, "--out", out, *FAST)
        assert tokbench(*command, *extra).status == 0
        tables.append(rows(out))
    assert tables[0] == tables[1]


def test_seeds_are_averaged_and_the_spread_is_split(tokbench: Command, photographs: Path, tmp_path: Path) -> None:
    command = ("run", "--data", photographs, "--out", tmp_path, "--seeds", "0,1,2", *FAST)
    assert tokbench(*command, "--models", f"drawn={TINY}@noise=0.5,fixed={TINY}").status == 0
    drawn, fixed = results(tmp_path)["drawn-32"], results(tmp_path)["fixed-32"]
    assert fixed.settings.seeds == (0,)
    assert drawn.settings.seeds == (0, 1, 2)
    assert "by noise" in drawn.metrics["psnr"].note
    _, columns = read_per_image(tmp_path / "adm/photographs-32/drawn.per_image.csv.gz")
    per_seed = [columns[f"psnr.seed{seed}"] for seed in (0, 1, 2)]
    assert np.allclose(columns["psnr"], np.mean(per_seed, axis=0))
    assert np.isclose(np.mean(per_seed), drawn.metrics["psnr"].value)
    assert not np.array_equal(per_seed[0], per_seed[1])


def test_codes_give_perplexity(tokbench: Command, photographs: Path, tmp_path: Path) -> None:
    command = ("run", "--data", photographs, "--out", tmp_path, "--res", "32", "--metrics", "psnr,perplexity,bpp")
    assert tokbench(*command, "--models", f"codes={TINY}@codes=true,plain={TINY}").status == 0
    found = results(tmp_path)
    assert 1 < found["codes-32"].metrics["perplexity"].value <= 8
    assert set(found["plain-32"].metrics) == {"psnr"}
    reasons = {"perplexity": "needs codes", "bpp": "needs measured bits: of a codec, or codes"}
    assert found["plain-32"].unavailable == reasons  # asked for, so not left out without a word
    ran = tokbench(*command[:-1], "perplexity", "--models", f"x={TINY}")
    assert ran.status == 1
    assert "failed: x at 32 px: nothing could be measured: no perplexity (needs codes)" in ran.err
    assert "0 done, 0 cached, 1 failed" in ran.err


def test_a_failed_cell_costs_its_row_and_no_other(tokbench: Command, photographs: Path, tmp_path: Path) -> None:
    specs = [f"{fault}={TINY}@fault={fault}" for fault in ("load", "nan", "shape")]
    ran = tokbench(
        "run", "--models", ",".join([*specs, f"good={TINY}"]), "--data", photographs, "--out", tmp_path, *FAST
    )
    assert ran.status == 1
    assert list(results(tmp_path)) == ["good-32"]
    assert "1 done, 0 cached, 3 failed" in ran.reason
    lines = [line for line in ran.err.splitlines() if line.startswith("failed: ")]
    assert "the weights are gone" in lines[0]
    assert "NaN or infinity in the reconstruction of" in lines[1]
    assert "decode gave (1, 3, 31, 32), expected (1, 3, 32, 32)" in lines[2]


def test_all_images_that_a_model_makes_nan_of_are_named(
    tokbench: Command, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell, "images_at_once", first_batch_size)  # as on a GPU
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from tests.tiny import Tiny\n\n\nclass Broken(Tiny):\n    def decode(self, latents, **how):\n"
        "        images = super().decode(latents, **how).clone()\n        images[1:, 0, 0, 0] = float('nan')\n"
        "        return images\n\n\ndef broken():\n    return Broken(0.0, '', 0.0, 4, False, 0.0)\n"
    )
    command = ("--data", photographs, "--out", tmp_path / "runs", "--res", "32", "--metrics", "psnr")
    ids = sorted(path.stem for path in photographs.iterdir())
    ran = tokbench("run", "--models", f"broken={broken}:broken", *command, "--batch-size", 4)
    assert f"NaN or infinity in the reconstruction of {ids[1]}, {ids[2]}, {ids[3]}\n" in ran.err
    ran = tokbench("run", "--models", f"broken={broken}:broken", *command, "--batch-size", 12)
    assert f"{ids[5]} and 6 more\n" in ran.err


def test_a_metric_of_what_is_not_finite_is_null_and_names_the_samples(tmp_path: Path) -> None:
    ids, broken = ["a", "b", "c"], np.array([0.0, np.nan, np.inf])
    features = np.stack([broken, np.zeros(3)], axis=1)
    with SampleStore(tmp_path) as store:
        columns = {"psnr": np.zeros(3), "mse": np.ones(3), "latent-mean": broken, "latent-square": broken}
        store.append(ids, columns, {("real", "mobilenet"): np.zeros((3, 2)), ("fake", "mobilenet"): features})
    for name in ("latent-std", "pd-mobilenet"):
        value = compute(name, store, (0,))
        assert (value.value, value.n, value.note) == (None, 3, "NaN or infinity in b, c")
    assert compute("psnr", store, (0,)).value == 0


def test_memory_decides_the_batch_size_unless_the_user_did(
    tokbench: Command, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell, "images_at_once", first_batch_size)  # as on a GPU
    command = ("run", "--models", f"big={TINY}@fault=memory", "--data", photographs, "--out", tmp_path, *FAST)
    ran = tokbench(*command)
    assert ran.status == 1
    assert "big at 32 px: out of memory with batch size 5; try --batch-size 2, or auto" in ran.err
    assert not list(tmp_path.glob("*/*/*.json"))
    assert tokbench(*command, "--batch-size", "auto").status == 0
    assert results(tmp_path)["big-32"].provenance.batch_size == 1


def test_a_size_the_model_cannot_take_is_wrong_use(tokbench: Command, photographs: Path, tmp_path: Path) -> None:
    command = ("run", "--models", f"odd={TINY}@multiple=5", "--data", photographs, "--out", tmp_path)
    ran = tokbench(*command, "--res", "32,40", "--metrics", "psnr")
    assert ran.status == 2
    assert "odd: needs sizes divisible by 5, got --res 32; try 30" in ran.err
    assert list(results(tmp_path)) == ["odd-40"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--models", "jpgq-50"), 'unknown model "jpgq-50"; did you mean'),
        (("--models", "identity", "--metrics", "pnsr"), "did you mean psnr"),
        (("--models", "identity", "--protocol", "adn"), "unknown protocol"),
        (("--models", "identity", "--res", "big"), "--res big: must be a side"),
        (("--models", "identity", "--res", "0"), "from 8 to 8192"),
        (("--models", "identity", "--batch-size", "0"), "at least 1"),
        (("--models", "identity", "--device", "tpu"), "unknown device"),
        (("--models", "identity", "--dtype", "int8"), "--dtype=int8: expected one of float32, bfloat16"),
        (("--models", "identity", "--seeds", "x"), "--seeds"),
        (("--models", "identity", "--limit", "0"), "at least 1"),
        (("--models", "identity", "--data", "/nowhere"), "no such file or folder"),
        (("--models", "identity", "--resolution", "64"), "No such option"),
        ((), "Missing option"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    arguments: tuple[str, ...], said: str, tokbench: Command, tmp_path: Path
) -> None:
    ran = tokbench("run", "--out", tmp_path / "runs", *arguments)
    assert ran.status == 2
    assert said in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))


def test_an_empty_folder_is_named(tokbench: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = tokbench("run", "--models", "identity", "--data", tmp_path / "empty", "--out", tmp_path / "runs")
    assert ran.status == 2
    assert "empty: no images" in ran.reason


def test_an_unreadable_image_stops_the_run_unless_it_may_be_left_out(
    tokbench: Command, photographs: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(photographs, data)
    good = sorted(data.iterdir())[3]
    (data / "broken.png").write_bytes(good.read_bytes()[:1500])
    command = ("run", "--models", f"tiny={TINY}", "--data", data, "--out", tmp_path / "runs", *FAST)
    ran = tokbench(*command)
    assert ran.status == 2
    assert "broken.png: damaged" in ran.reason
    assert not list(tmp_path.rglob("*.json"))
    ran = tokbench(*command, "--skip-bad")
    assert ran.status == 0
    assert "left out: " in ran.err
    result = results(tmp_path / "runs")["tiny-32"]
    assert (result.dataset.num_images, result.settings.skipped_ids) == (12, ("broken",))
    assert "0 done, 1 cached" in tokbench(*command, "--skip-bad").err
    assert tokbench(*command).status == 2  # not answered by a result that leaves an image out


def test_small_images_are_refused_by_name_enlarged_and_counted_or_left_out(
    tokbench: Command, photographs: Path, tmp_path: Path
) -> None:
    command = (
        "run",
        "--models",
        "identity",
        "--data",
        photographs,
        "--out",
        tmp_path,
        "--metrics",
        "psnr",
        "--res",
        "48",
    )
    ran = tokbench(*command, "--small", "refuse")
    assert ran.status == 2
    assert "12 images are smaller than 48" in ran.reason
    assert tokbench(*command).status == 0
    result = results(tmp_path)["identity-48"]
    assert result.settings.upscaled == 12
    assert result.protocol_fingerprint == PROTOCOLS["adm"].fingerprint()
    ran = tokbench(*command, "--small", "skip")
    assert (ran.status, "none of its 12 images" in ran.reason) == (2, True)


SIZES = {"wide": (64, 40), "tall": (31, 57), "same": (57, 31), "other": (64, 40), "line": (1, 30)}


def test_images_are_measured_at_their_own_sizes(tokbench: Command, tmp_path: Path) -> None:
    """Padded for the model alone: a model that changes nothing changes nothing, and means are over whole images."""
    folder = tmp_path / "sizes"
    folder.mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    names = "psnr,latent-std,bpp,perplexity"
    models = f"identity,{TINY},jpeg-q50,codes={TINY}@codes=true@multiple=8"
    ran = tokbench(
        "run", "--models", models, "--res", "native", "--data", folder, "--out", tmp_path, "--metrics", names
    )
    assert ran.status == 0
    found = {result.tokenizer.name: result for _, result in read_results(tmp_path)[0]}
    assert len(found) == 4
    for result in found.values():
        assert (result.protocol, result.dataset.resolution, result.dataset.num_images) == ("adm-native", "native", 5)
        assert result.protocol_fingerprint != PROTOCOLS["adm"].fingerprint()
    assert found["identity"].metrics["psnr"].value == 100
    ids, columns = read_per_image(tmp_path / "adm-native" / "sizes-native" / "jpeg-q50.per_image.csv.gz")
    assert ids == sorted(SIZES)
    for sample, psnr, bits in zip(ids, columns["psnr"], columns["bpp"], strict=True):
        image, buffer = Image.open(folder / f"{sample}.png"), io.BytesIO()
        image.save(buffer, "JPEG", quality=50, optimize=True)
        error = np.subtract(Image.open(buffer), image, dtype=float)
        assert psnr == pytest.approx(10 * np.log10(255**2 / np.square(error).mean()), abs=1e-4)
        assert bits == pytest.approx(len(buffer.getvalue()) * 8 / image.width / image.height)
    assert "one size" in found["codes"].unavailable["perplexity"]
    for command in (["report", "--results", tmp_path], ["report", "--results", tmp_path, "--format", "html", "--out",
                    tmp_path / "page"], ["check", tmp_path, "--against", tmp_path, "--exact"]):  # fmt: skip
        assert tokbench(*command).status == 0
    again = tokbench("run", "--models", "identity", "--res", "native", "--data", folder, "--out", tmp_path,
                     "--metrics", "psnr")  # fmt: skip
    assert "1 cached" in again.reason


def test_a_rectangle_is_a_resolution(tokbench: Command, tmp_path: Path) -> None:
    command = ("run", "--models", "bicubic-f8", "--limit", 2, "--out", tmp_path, "--metrics", "psnr", "--res")
    assert tokbench(*command, "96x64,64x64").status == 0
    found = {result.dataset.resolution: result for _, result in read_results(tmp_path)[0]}
    assert found.keys() == {"96x64", 64}
    ran = tokbench(*command, "96x60")
    assert (ran.status, "divisible by 8, got --res 96x60; try 96x56" in ran.err) == (2, True)
    for wrong in ("96x", "x", "4", "9999", "naive"):
        assert tokbench(*command, wrong).status == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_output_folder_that_cannot_be_written_is_wrong_use(tokbench: Command, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    ran = tokbench("run", "--models", "identity", "--out", tmp_path / "runs", *FAST)
    assert (ran.status, "cannot be written" in ran.reason) == (2, True)


def test_an_output_path_that_is_a_file_is_wrong_use(tokbench: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = tokbench("run", "--models", "identity", "--out", tmp_path / "file" / "runs", *FAST)
    assert (ran.status, "cannot be written" in ran.reason) == (2, True)


def test_a_damaged_record_is_named_set_aside_and_measured_again(
    tokbench: Command, photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ("run", "--models", f"tiny={TINY}", "--data", photographs, "--out", tmp_path, *FAST)
    assert tokbench(*command).status == 0
    path = tmp_path / "adm/photographs-32/tiny.json"
    before, text = rows(tmp_path), path.read_text()
    path.write_text(text[: len(text) // 2])
    assert "1 done" in tokbench(*command).err
    assert "damaged, set aside as tiny.json.damaged" in caplog.text
    assert rows(tmp_path) == before
    assert json.loads(path.read_text())["metrics"] == json.loads(text)["metrics"]


def test_an_unavailable_metric_is_named_and_measured_as_soon_as_it_can_be(
    tokbench: Command, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_ssim(suite: MetricSuite) -> dict[str, str]:
        return {"ssim": "its network is not here"} if "ssim" in [m.name for m in suite.metrics] else {}

    command = ("run", "--models", f"tiny={TINY}", "--data", photographs, "--out", tmp_path, *FAST)
    monkeypatch.setattr(MetricSuite, "unavailable", property(without_ssim))
    assert tokbench(*command).status == 0
    assert results(tmp_path)["tiny-32"].unavailable == {"ssim": "its network is not here"}
    assert "ssim" not in results(tmp_path)["tiny-32"].metrics
    ran = tokbench(*command, "--strict")
    assert (ran.status, "1 cached" in ran.reason) == (1, True)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "1 done" in tokbench(*command).err
    assert results(tmp_path)["tiny-32"].metrics["ssim"].value is not None


def test_a_damaged_weight_file_costs_its_metric_and_no_other(
    tokbench: Command, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKBENCH_WEIGHTS", str(tmp_path))
    damaged = tmp_path / find_network("lpips-alex").file
    damaged.write_bytes(b"the first bytes")
    command = ("run", "--models", f"tiny={TINY}", "--data", photographs, "--out", tmp_path / "runs", "--res", "32")
    ran = tokbench(*command, "--metrics", "psnr,lpips-alex")
    assert ran.status == 0
    result = results(tmp_path / "runs")["tiny-32"]
    assert set(result.metrics) == {"psnr"}
    assert str(damaged) in result.unavailable["lpips-alex"]
    assert str(damaged) in ran.err


def test_features_are_dropped_unless_they_are_wanted(tokbench: Command, photographs: Path, tmp_path: Path) -> None:
    command = ("run", "--data", photographs, "--out", tmp_path, "--res", "32", "--metrics", "psnr,perplexity")
    assert tokbench(*command, "--models", f"codes={TINY}@codes=true").status == 0
    assert not list(tmp_path.rglob("*.npz"))
    assert "1 done" in tokbench(*command, "--models", f"codes={TINY}@codes=true", "--keep-features").err
    assert "1 cached" in tokbench(*command, "--models", f"codes={TINY}@codes=true", "--keep-features").err
    assert list(tmp_path.glob("adm/photographs-32/codes.features/*.npz"))


def test_kept_features_are_those_of_both_sides(
    tokbench: Command, photographs: Path, tmp_path: Path, stand_ins: Callable[..., None]
) -> None:
    stand_ins(mobilenet=Quadrants("mobilenet"), mobilenet_class=Quadrants("mobilenet-class"))
    command = ("run", "--data", photographs, "--out", tmp_path, "--res", "32", "--keep-features", "--metrics")
    for model in ("first", "second"):  # the second finds the real images' features in the cache
        assert tokbench(*command, "pd-mobilenet", "--models", f"{model}={TINY}").status == 0
    assert tokbench(*command, "agreement", "--models", f"second={TINY}").status == 0  # adds to what is kept
    store = SampleStore(tmp_path / "adm/photographs-32/second.features")
    for extractor in ("mobilenet", "mobilenet-class"):
        assert store.features("real", extractor).shape == store.features("fake", extractor).shape == (12, 12)


@pytest.mark.parametrize("metrics", ["psnr", "ssim,bpp", "latent-std,psnr-global", "ssim-gauss,perplexity,psnr"])
@pytest.mark.parametrize("more", [(), ("--keep-features",), ("--save-images", "1")], ids=str)
def test_what_one_run_has_measured_the_next_still_prints(
    metrics: str, more: tuple[str, ...], tokbench: Command, photographs: Path, tmp_path: Path
) -> None:
    command = ("run", "--models", f"tiny={TINY}", "--data", photographs, "--out", tmp_path, "--res", "32", "--metrics")
    assert tokbench(*command, "ssim,psnr").status == 0
    before, (_, rows_before) = results(tmp_path)["tiny-32"], read_rows(tmp_path)
    assert tokbench(*command, metrics, *more).status == 0
    after, (_, rows_after) = results(tmp_path)["tiny-32"], read_rows(tmp_path)
    assert {name: after.metrics[name] for name in before.metrics} == before.metrics
    assert set(metrics.split(",")) & set(after.metrics) == set(metrics.split(",")) - {"bpp", "perplexity"}
    assert all(np.array_equal(rows_after[name], column) for name, column in rows_before.items())
    assert "1 cached" in tokbench(*command, f"psnr,{metrics}", *more).err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--workers", "-1"), "--workers"),
        (("--save-images", "-1"), "--save-images"),
        (("--metrics", "gfid"), "gfid is a generator's"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: tuple[str, str], words: str, tokbench: Command, photographs: Path, tmp_path: Path
) -> None:
    ran = tokbench("run", "--models", "identity", "--data", photographs, "--out", tmp_path, "--res", "32", *options)
    assert (ran.status, words in ran.reason) == (2, True)


def test_known_models_metrics_and_protocols_are_listed(tokbench: Command) -> None:
    assert "jpeg-q{quality}" in tokbench("list", "models").out
    assert "lpips-vgg" in tokbench("list", "metrics").out
    assert "adm" in tokbench("list", "protocols").out
    assert tokbench("list", "colours").status == 2


def test_two_data_sets_of_one_name_have_two_results(tokbench: Command, photographs: Path, tmp_path: Path) -> None:
    for index, parent in enumerate(("coco", "imagenet")):
        shutil.copytree(photographs, tmp_path / parent / "val")
        (tmp_path / parent / "val" / sorted(path.name for path in photographs.iterdir())[index]).unlink()
    command = ("run", "--models", "identity", "--out", tmp_path / "runs", *FAST, "--data")
    for _ in range(2):
        for parent in ("coco", "imagenet"):
            assert tokbench(*command, tmp_path / parent / "val").status == 0
    assert len(read_results(tmp_path / "runs")[0]) == 2
    assert "1 cached" in tokbench(*command, tmp_path / "coco" / "val").err
