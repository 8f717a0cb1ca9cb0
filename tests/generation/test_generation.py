"""From images to latents to a trained generator to scored samples, on tiny images and the identity tokenizer."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tokbench.config import override
from tokbench.errors import InputError
from tokbench.evaluation.model import model_key
from tokbench.generation import Generation
from tokbench.generation.compatibility import check_fits, latent_space
from tokbench.generation.generate import open_generator, parse_labels, run_generate
from tokbench.generation.latents import Latents, Normaliser
from tokbench.generation.sample import Draw, Sampling, balanced_labels, pack_npz, sample_latents
from tokbench.generation.score import read_statistics
from tokbench.generation.train import PRESETS, configure, train
from tokbench.records.measurement import Measurement
from tokbench.records.result import read_result
from tokbench.registry import TrainOptions, create
from tokbench.runtime.processes import Processes

CPU = torch.device("cpu")
SETTINGS = [
    "tokenizer=identity", "latents.resolution=16", "latents.crops=0", "patch=4", "grid_steps=2",
    "optim.learning_rate=0.005", "optim.warmup_steps=0", "optim.schedule=constant",
    "run.batch_size=4", "run.log_every=2", "run.save_every=2", "run.sample_every=100",
    "run.dtype=float32", "run.device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator after four steps."""
    out = tmp_path_factory.mktemp("generator")
    train_tiny(str(labelled), out, [*SETTINGS, "run.steps=4"])
    return out


def train_tiny(data: str, out: Path, settings: list[str]) -> Path:
    return train(override(PRESETS["tiny"], settings), TrainOptions(data, out))


def generate(trained: Path, labelled: Path, out: Path, **more: Any) -> int:
    """`tokbench generate` of five images by the identity; the metrics and any field of `Generation` can be changed."""
    measurement = Measurement(metrics=more.pop("metrics", ("kid",)), device="cpu")
    asked = Generation(generator=str(trained), tokenizer="identity", num_images=5, reference=str(labelled), steps=2)
    return run_generate(replace(asked, **more), measurement, out=out, results=out)


def brightness(images: Tensor) -> Tensor:
    """A feature extractor that needs no weights: means of quadrants."""
    return torch.nn.functional.avg_pool2d(images.float(), 8).flatten(1) / 255


# ---- training -----------------------------------------------------------------------------------------------------


def test_the_normalisation_is_measured_shown_and_kept(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tiny(str(labelled), tmp_path, [*SETTINGS, "run.steps=1", "normalise=channel"])
    statistics = Latents(tmp_path / "latents").statistics("channel")
    assert f"normalised as {statistics}" in capsys.readouterr().err
    generator = open_generator(str(tmp_path), CPU)
    assert generator.normaliser == statistics  # type: ignore[attr-defined]
    assert generator.classes == ["class0", "class1"]
    assert generator.steps_trained == 1


def test_settings_without_meaning_for_a_generator_are_refused(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.held_out is of tokenizers"):
        train_tiny(str(labelled), tmp_path, [*SETTINGS, "run.held_out=3"])


def test_presets_are_the_recipes_they_name(tmp_path: Path) -> None:
    paper, proxy = PRESETS["dit"], PRESETS["proxy"]
    assert (paper.size, paper.optim.learning_rate, paper.ema.decay, paper.run.batch_size) == ("XL", 1e-4, 0.9999, 256)
    assert (proxy.size, proxy.run.steps) == ("B", 100_000)
    with pytest.raises(InputError, match="known: dit, proxy, tiny"):
        configure(TrainOptions("", tmp_path, preset="large"))


# ---- sampling and scoring -----------------------------------------------------------------------------------------


def test_identity_end_to_end_gives_a_record_images_and_a_table(
    trained: Path, labelled: Path, tmp_path: Path, stand_ins: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_ins(inception=Brightness())
    assert generate(trained, labelled, tmp_path, guidance=(1.0, 3.0), save="npz") == 0
    paths = sorted(tmp_path.glob("generate-*/*/identity.json"))
    assert [path.parts[-3] for path in paths] == ["generate-dit-tiny-4-4-g1", "generate-dit-tiny-4-4-g3"]
    result = read_result(paths[0])
    assert result.settings.generation["generator"]["steps_trained"] == 4
    assert result.dataset.name == labelled.name.lower()
    assert result.metrics["kid"].value is not None
    assert set(result.provenance.seconds) == {"generator", "decode"}
    with np.load(paths[0].with_suffix(".npz")) as file:
        assert file["arr_0"].shape == (5, 16, 16, 3)
        assert file["arr_1"].tolist() == [0, 1, 0, 1, 0]
    table = capsys.readouterr().out
    assert f"generated, against {result.dataset.name}" in table
    assert "N = 5" in table
    assert "trained" in table
    assert "decoder/s" in table


def test_more_images_go_on_from_those_that_are_there_and_guidance_changes_them(
    trained: Path, labelled: Path, tmp_path: Path, stand_ins: Callable[..., None]
) -> None:
    stand_ins(inception=Brightness())
    generate(trained, labelled, tmp_path, save="png")
    first = images_below(tmp_path)
    generate(trained, labelled, tmp_path, save="png", num_images=7)
    assert len(images_below(tmp_path)) == 7
    assert {name: images_below(tmp_path)[name] for name in first} == first
    generate(trained, labelled, tmp_path / "guided", save="png", guidance=(4.0,))
    assert images_below(tmp_path / "guided") != first


def test_one_process_and_two_and_any_batch_size_draw_the_same(trained: Path, tmp_path: Path) -> None:
    generator = open_generator(str(trained), CPU)
    one = Draw(generator, Sampling(2.0, steps=2), [0, 1] * 65, tmp_path / "one", CPU, torch.float32, 50, Processes())
    two = [replace(one, folder=tmp_path / "two", batch_size=33, processes=Processes(rank, 2)) for rank in range(2)]
    for draw in (one, *two):
        sample_latents(draw)
    for k in range(2):
        torch.testing.assert_close(one.read(k)[0], two[0].read(k)[0])
    assert one.read(1)[0].shape == (2, 3, 16, 16)


def test_two_real_processes_train_and_generate_what_one_does(
    labelled: Path, trained: Path, tmp_path: Path, stand_ins: Callable[..., None]
) -> None:
    stand_ins(inception=Brightness())
    script = tmp_path / "both.py"
    script.write_text(TWO_PROCESSES)
    settings = [*SETTINGS, "run.steps=4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKBENCH_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(labelled), str(tmp_path), *settings],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    how, labels = Sampling(steps=2), torch.tensor([0, 1])
    one, two = (open_generator(str(folder), CPU) for folder in (trained, tmp_path))
    torch.testing.assert_close(
        one.sample(torch.arange(2), labels, how), two.sample(torch.arange(2), labels, how), atol=0.05, rtol=1e-4
    )  # the latents are pixels, 0 to 255
    generate(tmp_path, labelled, tmp_path / "alone", num_images=130, metrics=("gfid",), save="png")
    assert images_below(tmp_path / "alone") == images_below(tmp_path / "together")


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from tokbench.generation import Generation
from tokbench.generation.generate import run_generate
from tokbench.records.measurement import Measurement
from tokbench.config import override
from tokbench.generation.train import PRESETS, train
from tokbench.registry import TrainOptions
torch.set_num_threads(1)
data, out, *settings = sys.argv[1:]
train(override(PRESETS["tiny"], settings), TrainOptions(data, Path(out)))
asked = Generation(generator=out, tokenizer="identity", num_images=130, reference=data, steps=2, save="png")
sys.exit(run_generate(asked, Measurement(device="cpu", metrics=("gfid",)), out=Path(out) / "together"))
"""


def images_below(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(".generate/*/*/images/*.png")}


class Brightness(nn.Module):
    """An extractor that needs no weights, and counts the images it has seen."""

    sha256 = "0" * 64

    def __init__(self, identity: str = "brightness") -> None:
        super().__init__()
        self.identity, self.seen = identity, 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return brightness(images)


def test_a_decoder_that_fails_is_named_and_the_other_goes_on(
    trained: Path, labelled: Path, tmp_path: Path, stand_ins: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    stand_ins(inception=Brightness())
    (tmp_path / "failing.py").write_text("from tests.generation.test_generation import Failing as failing")
    tokenizers = f"bad={tmp_path}/failing.py:failing,identity"
    assert generate(trained, labelled, tmp_path, tokenizer=tokenizers) == 1
    assert "bad: no decoder today" in caplog.text
    assert [path.name for path in tmp_path.glob("generate-*/*/*.json")] == ["identity.json"]


def test_the_packed_npz_holds_the_png_files(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number:08d}.png")
    pack_npz(tmp_path, [4, 5, 6], 8, tmp_path / "all.npz")
    assert read_statistics(tmp_path / "all.npz")[0] is None
    with np.load(tmp_path / "all.npz") as file:
        assert np.array_equal(file["arr_0"], pixels)
        assert file["arr_1"].tolist() == [4, 5, 6]


def test_classes_are_balanced() -> None:
    labels = balanced_labels(10, ["a", "b", "c"], [])
    assert sorted(labels.count(k) for k in range(3)) == [3, 3, 4]
    assert balanced_labels(4, ["a", "b", "c"], [2, 0]) == [2, 0, 2, 0]
    assert parse_labels("207,3-5") == [207, 3, 4, 5]


def test_other_weights_settings_or_code_of_a_tokenizer_decode_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(tokenizer: Any, weights: str | None = "a") -> str | None:
        return model_key(replace(tokenizer.info, weights=weights), tokenizer)

    scaled = Scaled(2.0)
    first = key(scaled)
    assert key(Scaled(2.0)) == first
    assert len({first, key(scaled, "b"), key(Scaled(3.0)), key(Failing())}) == 4
    assert key(scaled, None) is None  # nobody can tell whether it is the same
    monkeypatch.setattr("tokbench.records.provenance.source_hash", lambda modules: "other code")
    assert key(scaled) != first


# ---- what does not fit --------------------------------------------------------------------------------------------


class Failing:
    """The identity, without a decoder."""

    networks: Mapping[str, nn.Module] = {}

    def __init__(self) -> None:
        self.info = create("identity").info

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        raise RuntimeError("no decoder today")


class Scaled:
    """bicubic-f4 with its latents multiplied."""

    networks: Mapping[str, nn.Module] = {}

    def __init__(self, scale: float) -> None:
        self.inner, self.scale = create("bicubic-f4"), scale
        self.info = replace(self.inner.info, name="scaled")

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        return self.inner.encode(images, sample=sample, seeds=seeds) * self.scale

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        return self.inner.decode(latents / self.scale, seeds=seeds, size=size)


def test_a_tokenizer_of_another_grid_or_normalisation_is_refused_with_both_values() -> None:
    space = latent_space(create("bicubic-f4"), 32, CPU)
    check_fits(space, create("bicubic-f4"), CPU)
    check_fits(space, Scaled(1.0), CPU)
    with pytest.raises(InputError, match="downsampling 8, the generator has 4"):
        check_fits(space, create("bicubic-f8"), CPU)
    with pytest.raises(InputError, match="channels 4, the generator has 3"):
        check_fits(space, create("pca-f8c4"), CPU)
    with pytest.raises(InputError, match=r"deviation \d\.\d+, those of bicubic-f4.*; 82% apart"):
        check_fits(space, Scaled(0.18215), CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "7"}, "label 7 is out of range: the generator knows 0..1"),
        ({"sampler": "dopri"}, "unknown sampler 'dopri' for dit-tiny-4: euler or heun"),
        ({"steps": 0}, "--steps 0"),
        ({"num_images": 0}, "--num-images 0"),
        ({"guidance_interval": (0.7, 0.2)}, "must rise"),
        ({"metrics": ("psnr",)}, "psnr: compares an image with its reconstruction"),
        ({"tokenizer": "bicubic-f2"}, "bicubic-f2 does not fit the generator"),
        ({"generator": "nowhere"}, "no such generator"),
        ({"reference": "missing.npz"}, "no such file; check the path"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(
    trained: Path, labelled: Path, tmp_path: Path, stand_ins: Callable[..., None], change: dict[str, Any], message: str
) -> None:
    stand_ins(inception=Brightness())
    with pytest.raises(InputError, match=message):
        generate(trained, labelled, tmp_path, **change)
    assert not list(tmp_path.glob(".generate/dit*"))


def test_normaliser_says_what_it_does() -> None:
    assert str(Normaliser((0.5, -1.0), (2.0, 3.0))) == "(z - 0.5, -1) / 2, 3"


def test_the_command_says_in_one_line_what_is_wrong(tokbench: Any, labelled: Path) -> None:
    arguments = ("--tokenizer", "identity", "--num-images", "4", "--reference", labelled)
    ran = tokbench("generate", "--generator", "nowhere", *arguments)
    assert ran.status == 2
    assert ran.reason.startswith("tokbench: nowhere: no such generator; train one with `tokbench train dit`")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_training_compiles_and_samples_are_the_cpus(labelled: Path, trained: Path, tmp_path: Path) -> None:
    cuda = [setting for setting in SETTINGS if not setting.startswith(("run.dtype", "run.device"))]
    train_tiny(str(labelled), tmp_path, [*cuda, "run.steps=4", "run.compile=true"])
    cpu, gpu = (open_generator(str(trained), torch.device(name)) for name in ("cpu", "cuda"))
    how, labels = Sampling(2.0, steps=4), torch.tensor([0, 1])
    samples = [generator.sample(torch.arange(2), labels, how).cpu() for generator in (cpu, gpu)]
    torch.testing.assert_close(*samples, atol=2, rtol=1e-3)  # pixels, 0 to 255; training had switched TF32 on
    assert generate(tmp_path, labelled, tmp_path / "runs", device="cuda") == 0
