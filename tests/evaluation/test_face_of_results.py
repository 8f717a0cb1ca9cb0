"""What `evaluate` takes and gives, and the mistakes of a model that it notices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tokbench as tb
from tests.conftest import Ran
from tokbench import registry
from tokbench.errors import InputError
from tokbench.records.result import from_json, to_json


class Plain:
    """A model that does everything right, and what is wrong with those below."""

    def __init__(self) -> None:
        self.info = tb.TokenizerInfo("plain", "plain", downsample=1, channels=3)
        self.networks: dict[str, nn.Module] = {}

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        return images / 127.5 - 1

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        return latents


class ZeroToOne(Plain):
    def decode(self, latents: Tensor, **how: Any) -> Tensor:
        return (latents + 1) / 2


class Levels(Plain):
    def decode(self, latents: Tensor, **how: Any) -> Tensor:
        return (latents + 1) * 127.5


class Constant(Plain):
    def decode(self, latents: Tensor, **how: Any) -> Tensor:
        return torch.zeros_like(latents)


class Blind(Plain):
    def encode(self, images: Tensor, **how: Any) -> Tensor:
        return torch.linspace(-1, 1, images[0].numel()).reshape(1, *images.shape[1:]).repeat(len(images), 1, 1, 1)


class Unscaled(Plain):
    def encode(self, images: Tensor, **how: Any) -> Tensor:
        return images.float()

    def decode(self, latents: Tensor, **how: Any) -> Tensor:
        return latents / 127.5 - 1


class Training(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Dropout(0.1))


MISTAKES = {
    Plain: None,
    ZeroToOne: "decode never gives a value below 0, as if from 0 to 1; expected -1 to 1: return 2 * x - 1",
    Levels: "decode gives values up to 255; expected -1 to 1: return x / 127.5 - 1",
    Constant: "every reconstruction has one value throughout",
    Blind: "the latents of all images are equal",
    Unscaled: "images / 127.5 - 1",
    Training: "hidden is in training mode",
}


@pytest.mark.parametrize("model", MISTAKES, ids=lambda model: model.__name__)
def test_a_common_mistake_is_named_with_its_cure_and_measured_all_the_same(
    model: type[Plain], photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tb.evaluate(model(), photographs, 32, ["psnr"], limit=3, out=tmp_path)
    said, noted = capsys.readouterr().err, result.provenance.warnings
    assert result.metrics["psnr"].value is not None
    if MISTAKES[model] is None:
        assert (noted, "warning" in said) == ("", False)
    else:
        assert MISTAKES[model] in noted
        assert f"warning: plain: {noted}" in said


@pytest.mark.parametrize("name", ["identity", "bicubic-f8", "pca-f8c4", "jpeg-q30", "webp-q50", "klvae", "ssdd"])
def test_models_that_are_right_are_not_warned_of(name: str, photographs: Path) -> None:
    assert tb.evaluate(name, photographs, 32, ["psnr"], limit=2).provenance.warnings == ""


def test_a_warning_stands_below_the_table(tokbench: Callable[..., Ran], photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from tests.evaluation.test_face_of_results import ZeroToOne\n")
    words = ("--data", photographs, "--limit", "2", "--res", "32", "--metrics", "psnr", "--out", tmp_path / "runs")
    ran = tokbench("run", "--models", f"{tmp_path}/mine.py:ZeroToOne", *words)
    assert "plain: decode never gives a value below 0" in " ".join(ran.out.split())


@pytest.mark.parametrize("out", [True, False])
def test_a_result_is_a_table_and_its_images_are_too(out: bool, photographs: Path, tmp_path: Path) -> None:
    where = tmp_path if out else None
    for _ in range(2):  # measured, then found
        result = tb.evaluate("jpeg-q50", photographs, 32, "psnr,ssim", limit=3, out=where)
        frame = result.per_image()
        assert len(frame) == 3
        assert frame.index.name == "id"
        assert np.isclose(frame.psnr.mean(), result.metrics["psnr"].value or 0.0)
    assert result.to_frame().loc[0, "ssim"] == result.metrics["ssim"].value
    assert result.to_dict()["metrics"]["psnr"]["value"] == result.metrics["psnr"].value
    assert from_json(to_json(result)) == result
    assert repr(result).startswith("EvalResult(jpeg-q50 on 3 images of photographs")
    assert "psnr" in repr(result)
    assert len(repr(result)) < 160
    with pytest.raises(InputError, match="its images' rows are not here"):
        from_json(to_json(result)).per_image()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((nn.Conv2d(3, 3, 1),), "Conv2d is no tokenizer, it lacks info, networks"),
        (("identity", torch.zeros(2, 3, 8, 8)), "data is a Tensor; give a folder"),
        (("identity", ["a.png"]), "data is a list"),
        (("identity", "samples", 256, "pnsr"), "unknown metric 'pnsr': did you mean psnr"),
        (("identity", "samples", "big"), "must be a side"),
        ((["identity"],), "list is no tokenizer"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(InputError) as refused:
        tb.evaluate(*arguments)
    assert said in str(refused.value)
    with pytest.raises(InputError, match="dtpye"):
        tb.evaluate("identity", dtpye="bfloat16")


def test_registered_needs_are_those_of_the_interface() -> None:
    assert set(registry.NEEDED) <= {*dir(tb.Tokenizer), *tb.Tokenizer.__annotations__}
