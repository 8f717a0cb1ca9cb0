"""evaluate() as a notebook or a training loop calls it, and the loop's own arithmetic."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import TINY
from tests.tiny import Tiny, tiny
from tokbench import registry
from tokbench.data.pixels import quantise
from tokbench.errors import CellError, InputError
from tokbench.evaluation.evaluate import evaluate
from tokbench.evaluation.pictures import KeptImages
from tokbench.evaluation.reconstruct import measure
from tokbench.evaluation.summary import over_seeds
from tokbench.records.cache import cache_folder
from tokbench.records.result import Value
from tokbench.runtime.device import hash_state


def test_an_object_and_its_spec_give_the_same_numbers(photographs: Path, tmp_path: Path) -> None:
    by_object = evaluate(tiny(), photographs, 32, ["psnr", "ssim"])
    by_spec = evaluate(TINY, str(photographs), 32, ["psnr", "ssim"], out=tmp_path)
    assert by_object.metrics == by_spec.metrics
    assert by_object.tokenizer.weights == by_spec.tokenizer.weights
    assert (tmp_path / "adm" / "photographs-32").is_dir()


def test_a_name_that_is_no_file_name_is_not_written(photographs: Path, tmp_path: Path) -> None:
    model = tiny()
    model.info = replace(model.info, name="../Mine")
    assert evaluate(model, photographs, 32, ["psnr"], limit=2).tokenizer.name == "../Mine"
    with pytest.raises(InputError, match="may hold only"):
        evaluate(model, photographs, 32, ["psnr"], out=tmp_path)


def test_a_training_loop_gets_its_model_back_as_it_was(photographs: Path) -> None:
    model = tiny()
    model.networks["decoder"].train()
    model.networks["encoder"].eval()
    state = torch.random.get_rng_state()
    evaluate(model, photographs, 32, ["psnr"], limit=2)
    assert model.networks["decoder"].training
    assert not model.networks["encoder"].training
    assert all(parameter.requires_grad for parameter in model.networks["decoder"].parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_changed_weight_changes_the_numbers_of_an_object(photographs: Path, tmp_path: Path) -> None:
    model = tiny()
    before = evaluate(model, photographs, 32, ["psnr"], out=tmp_path)
    model.networks["decoder"].bias.data += 0.5
    after = evaluate(model, photographs, 32, ["psnr"], out=tmp_path)
    assert before.metrics["psnr"] != after.metrics["psnr"]


def test_a_changed_attribute_changes_the_numbers_of_an_object(photographs: Path, tmp_path: Path) -> None:
    model = tiny()
    before = evaluate(model, photographs, 32, ["psnr"], out=tmp_path)
    model.noise = 0.5
    after = evaluate(model, photographs, 32, ["psnr"], out=tmp_path)
    assert before.metrics["psnr"] != after.metrics["psnr"]
    assert evaluate(model, photographs, 32, ["psnr"], out=tmp_path) == after


def test_state_outside_of_the_networks_is_hashed_where_it_is(photographs: Path, tmp_path: Path) -> None:
    class Hiding(Tiny):
        gain: torch.Tensor | torch.nn.Module

    model = Hiding(0.0, "", 0.0, 4, False, 0.0)
    hashes = [hash_state(model)]
    for gain in (torch.ones(3), torch.zeros(3), torch.nn.Linear(3, 3)):
        model.gain = gain
        hashes += [hash_state(model)]
    model.gain.weight.data += 1
    hashes += [hash_state(model)]
    assert len(set(hashes) - {None}) == 5
    cells = [evaluate(model, photographs, 32, ["psnr"], out=tmp_path).provenance.cell for _ in range(2)]
    assert cells[0] == cells[1] is not None


def test_the_hash_of_a_state_sees_names_shapes_and_values() -> None:
    first, second = tiny(), tiny()
    assert hash_state(first) == hash_state(second)
    with torch.no_grad():
        second.networks["encoder"].weight[0, 0, 0, 0] += 1e-6
    assert hash_state(first) != hash_state(second)
    assert hash_state(first) != hash_state(tiny(bias=0.1))


class Mean:
    """An extractor that counts the images it sees."""

    dim = 3

    def __init__(self, name: str) -> None:
        self.name = self.identity = name
        self.calls = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += len(images)
        return images.float().mean((2, 3))


def test_real_features_are_computed_once_for_all_models(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_ins: Callable[..., None]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mean = Mean("mobilenet")
    stand_ins(mobilenet=mean)
    metrics = ["psnr", "pd-mobilenet"]
    first = evaluate(tiny(), photographs, 32, metrics)
    assert mean.calls == 24
    second = evaluate(tiny(), photographs, 32, metrics)
    assert mean.calls == 36
    assert first.metrics == second.metrics
    path = next((cache_folder() / "real").rglob("*.npz"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert evaluate(tiny(), photographs, 32, metrics).metrics == first.metrics


def test_another_metric_leaves_the_real_features_of_the_others(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_ins: Callable[..., None]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = Mean("mobilenet"), Mean("mobilenet-class")
    stand_ins(mobilenet=first, mobilenet_class=second)
    for metrics in (["pd-mobilenet"], ["pd-mobilenet", "agreement"]):
        result = evaluate(tiny(), photographs, 32, metrics)
    assert set(result.metrics) == {"pd-mobilenet", "agreement"}
    assert (first.calls, second.calls) == (12 + 12 + 12, 12 + 12)  # real images once each


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_ins: Callable[..., None]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mean = Mean("mobilenet")
    stand_ins(mobilenet=mean)
    first = evaluate(tiny(), photographs, 32, ["pd-mobilenet"])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert evaluate(tiny(), photographs, 32, ["pd-mobilenet"]).metrics == first.metrics
    assert mean.calls == 48


def test_an_unknown_option_is_named(photographs: Path) -> None:
    with pytest.raises(InputError, match="batchsize"):
        evaluate(tiny(), photographs, 32, ["psnr"], batchsize=4)


def test_every_8_bit_value_survives_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.float32) / 127.5 - 1
    assert torch.equal(quantise(levels, "nearest"), torch.arange(256, dtype=torch.uint8))


def test_rounding_is_half_up_and_clamps() -> None:
    values = torch.tensor([-2.0, -1.0, 0.5 / 127.5 - 1, 0.49 / 127.5 - 1, 1.0, 9.0])
    assert quantise(values, "nearest").tolist() == [0, 0, 1, 0, 255, 255]
    assert quantise(torch.tensor([0.999, 1.0]), "truncate").tolist() == [254, 255]


def test_seeds_split_the_standard_error_into_images_and_noise() -> None:
    rng = np.random.default_rng(0)
    images, noise = rng.normal(0, 3, 4000), rng.normal(0, 2, (30, 4000))
    scores = 20 + images + noise
    values = [Value(float(s.mean()), float(s.std(ddof=1)) / 4000**0.5, n=4000) for s in scores]
    joint = over_seeds(values)
    assert joint.value == pytest.approx(scores.mean())
    assert joint.stderr == pytest.approx(scores.mean(0).std(ddof=1) / 4000**0.5, rel=0.1)
    assert "30 seeds" in joint.note


def test_the_first_and_the_worst_images_are_kept() -> None:
    kept = KeptImages(frozenset(["a"]), num_worst=2)
    pixels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    kept.add(["a", "b", "c", "d"], [0.0, 3.0, 1.0, 2.0], pixels, pixels)
    assert set(kept.pairs) == {"a", "b", "d"}


def test_an_image_that_is_not_kept_is_not_copied() -> None:
    pixels = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    uncopied = pixels.to("meta")  # a copy of it is an error, where one from a GPU is a wait
    KeptImages(frozenset(), num_worst=0).add(["a"], [1.0], uncopied, uncopied)
    kept = KeptImages(frozenset(["a"]), num_worst=1)
    kept.add(["a"], [1.0], pixels, pixels)
    kept.add(["b"], [0.5], uncopied, uncopied)
    kept.add(["c"], [2.0], pixels, pixels)
    assert set(kept.pairs) == {"a", "c"}


@pytest.mark.parametrize(
    ("model", "resolution", "metrics", "error"),
    [("identity", 32, ["nothing"], InputError), ("bicubic-f8", 36, ["psnr"], InputError),
     (f"{TINY}@fault=nan", 32, ["psnr"], CellError), (f"{TINY}@fault=latents", 32, ["psnr"], CellError),
     (f"{TINY}@fault=uint8", 32, ["psnr"], CellError)],
)  # fmt: skip
def test_errors_are_of_the_two_kinds(
    model: str, resolution: int, metrics: list[str], error: type[Exception], photographs: Path
) -> None:
    with pytest.raises(error):
        evaluate(registry.create(model), photographs, resolution, metrics)


def test_an_encoder_that_writes_into_its_input_leaves_the_real_image_alone(photographs: Path) -> None:
    first, second = (
        evaluate(f"{TINY}@fault={fault}", photographs, 32, ("psnr", "ssim")) for fault in ("", "overwrite")
    )
    assert first.metrics == second.metrics


def test_what_overflows_in_float16_is_reported_and_no_number(photographs: Path) -> None:
    assert evaluate(f"{TINY}@bias=1e4", photographs, 32, ["psnr"]).metrics["psnr"].value is not None
    with pytest.raises(CellError, match="NaN or infinity in the latents of astronaut"):
        evaluate(f"{TINY}@bias=1e4", photographs, 32, ["psnr"], dtype="float16")


def test_float16_is_a_dtype(photographs: Path) -> None:
    half = evaluate(TINY, photographs, 32, ("psnr",), dtype="float16", limit=3)
    whole = evaluate(TINY, photographs, 32, ("psnr",), limit=3)
    assert half.settings.dtype == "float16"
    assert half.metrics["psnr"].value == pytest.approx(whole.metrics["psnr"].value, abs=0.05)
    assert half.metrics["psnr"].value != whole.metrics["psnr"].value


def test_a_part_is_kept_when_the_next_is_under_way_and_before_an_error_ends_it_all() -> None:
    happened: list[str] = []

    def step(ids: Sequence[str]) -> Callable[[], None]:
        if ids[0] == "broken":
            raise CellError("broken")
        happened.append(f"start {ids[0]}")
        return lambda: happened.append(f"keep {ids[0]}")

    with pytest.raises(CellError, match="broken"):
        measure(step, [(["a", "b"],), (["c"],), (["broken"],)], name="", device=torch.device("cpu"), limit=1)
    assert happened == ["start a", "start b", "keep a", "start c", "keep b", "keep c"]
