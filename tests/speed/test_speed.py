import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tests.conftest import TINY
from tokbench.errors import CellError, InputError
from tokbench.records.result import SpeedResult, TokenizerInfo, read_speed
from tokbench.registry import create, parse
from tokbench.report import speed as report
from tokbench.report.tables import markdown, print_tables
from tokbench.runtime.device import prepare
from tokbench.speed.measure import SpeedCase, best_batch, count_flops, equality_check, measure, search_batch
from tokbench.speed.timing import QUICK, take_turns
from tokbench.tokenizer import Tokenizer


class Attention(nn.Module):
    """A linear layer and one attention head, small enough to count by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(3, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Tiny:
    """Encodes pixels as they are; decodes through one attention over all pixels."""

    def __init__(self, width: int = 4, steps: int | None = None) -> None:
        self.network = Attention(width)
        self.networks = {"decoder": self.network}
        self.info = TokenizerInfo("tiny", "test", size_multiple=8, decode_steps=steps)

    def encode(self, images: Tensor, *, sample: bool, seeds: Tensor) -> Tensor:
        return images.float()

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        return self.network(latents.flatten(2).transpose(1, 2))[..., :3].transpose(1, 2).unflatten(2, size)


class Video(Tiny):
    """Decodes by a convolution over time, as models of video do."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = {"encoder": nn.Conv2d(3, 4, 3), "decoder": nn.Conv3d(3, 3, 1)}

    def decode(self, latents: Tensor, *, seeds: Tensor, size: tuple[int, int]) -> Tensor:
        return self.networks["decoder"](latents[:, :, None])[:, :, 0]


class Stuck(nn.Conv2d):
    def to(self, *_: object, **__: object) -> "Stuck":
        raise NotImplementedError("made for one device")


def stuck() -> Tiny:
    model = Tiny()
    model.networks = {"decoder": Stuck(3, 3, 1)}
    return model


CPU = torch.device("cpu")


def case(tokenizer: Tokenizer, resolution: int = 8) -> SpeedCase:
    return SpeedCase(tokenizer, CPU, torch.float32, SpeedResult(tokenizer.info, resolution, "", {}))


def quick(models: str, resolutions: tuple[int, ...], out: Path) -> list[SpeedResult]:
    return measure(models, resolutions, device=CPU, out=out, budget=QUICK)


@pytest.mark.parametrize(("resolution", "width"), [(8, 4), (16, 8), (24, 16)])  # kernels differ by size
def test_flops_of_attention_are_counted_whatever_kernel_computes_it(resolution: int, width: int):
    tokens = resolution**2
    project = 2 * tokens * 3 * 3 * width
    attention = 2 * 2 * tokens * tokens * width  # scores and weighted sum
    assert count_flops(case(Tiny(width), resolution)) == {"encode": 0, "decode": project + attention}


def test_flops_of_windowed_attention_are_those_of_the_keys_that_windows_reach():
    tokenizer = create(parse("ssdd@steps=1"), random_weights=True)
    for network in tokenizer.networks.values():
        network.requires_grad_(False)
    narrow, wide = (count_flops(case(tokenizer, size)) for size in (64, 256))
    assert 16 < wide["decode"] / narrow["decode"] < 16 * 1.05  # linear in the grid, but for attention's growing windows


def test_batch_search_takes_the_smallest_near_the_best(monkeypatch: pytest.MonkeyPatch):
    rates = {1: 10.0, 2: 50.0, 4: 99.5, 8: 100.0, 16: 100.5, 32: None}

    def seconds(case: SpeedCase, stage: str, size: int, budget: object) -> list[float]:
        if rates[size] is None:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 bytes")
        return [size / rates[size]]

    monkeypatch.setattr("tokbench.speed.measure.time_briefly", seconds)
    assert best_batch(search_batch(case(Tiny()), "decode", list(rates), QUICK)) == 4
    with pytest.raises(CellError, match="batch size 32"):
        search_batch(case(Tiny()), "decode", [32], QUICK)


def test_models_take_turns():
    calls: list[str] = []

    def step(name: str):
        return lambda: (calls.append(name), torch.zeros(1))[1]

    seconds = take_turns([step("a"), step("b")], CPU, QUICK)
    assert "".join(calls) == "ababab"
    assert [len(times or []) for times in seconds] == [3, 3]


def test_a_model_that_runs_out_of_memory_stops_nobody_else():
    def full():
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 bytes")

    seconds = take_turns([full, lambda: torch.zeros(1)], CPU, QUICK)
    assert seconds[0] is None
    assert len(seconds[1] or []) == 3


def test_equality_check_tells_equal_from_unequal():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=generator)
    exact = (images.int() + torch.randint(-20, 20, images.shape, generator=generator)).clamp(0, 255).byte()
    worse = (exact.int() + torch.randint(-9, 9, images.shape, generator=generator)).clamp(0, 255).byte()
    assert equality_check(images, exact, exact)["psnr_shift"] == 0
    assert float(equality_check(images, exact, worse)["psnr_shift"]) < -0.02
    assert equality_check(images, exact, worse)["passed"] in (False, None)  # None: no LPIPS weights here


def test_quick_run_writes_records_that_read_back(tmp_path):
    results = quick("bicubic-f8,small=bicubic-f16", (16, 24), tmp_path)
    assert [(r.tokenizer.name, r.resolution, bool(r.failed)) for r in results] == [
        ("bicubic-f8", 16, False), ("small", 16, False), ("bicubic-f8", 24, False), ("small", 24, True),
    ]  # fmt: skip
    assert "not divisible by 16" in str(results[3].failed)
    assert set(results[0].stages) == {"encode", "decode", "round-trip"}
    assert all(stage.images_per_second > 0 for stage in results[0].stages.values())
    read, warnings = report.read_speeds(tmp_path)
    assert not warnings
    names = [sorted((r.tokenizer.name, r.resolution) for r in found) for found in (read, results)]
    assert names[0] == names[1]
    assert read_speed(next(tmp_path.glob("*/bicubic-f8-16-*.json"))) == results[0]


def test_table_fits_and_keeps_failed_rows(tmp_path):
    results = quick("bicubic-f8,small=bicubic-f16", (24,), tmp_path)
    console = Console(width=report.WIDTH, record=True, file=io.StringIO())
    print_tables(console, report.speed_tables(results))
    text = console.export_text()
    assert "small: 24 px is not divisible by 16" in text
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert "1.00x" in "".join(map(markdown, report.speed_tables(results)))
    with pytest.raises(InputError, match="no speed row is called 'nobody'"):
        report.speed_tables(results, "nobody")


def test_other_hardware_and_settings_are_other_blocks(tmp_path):
    result = quick("bicubic-f8", (16,), tmp_path)[0]
    elsewhere = replace(result, hardware="another machine")
    compiled = replace(result, settings={**result.settings, "compile": True})
    assert len(report.comparable([result, elsewhere, compiled])) == 3


def test_a_broken_model_fails_its_own_row_only(tmp_path):
    own = f"video={__file__}:Video,stuck={__file__}:stuck"
    results = quick(f"{TINY}@fault=latents,{TINY}@fault=load,{own},bicubic-f8", (16,), tmp_path)
    failed = {result.tokenizer.name: result.failed for result in results}
    assert {name for name, why in failed.items() if why is None} == {"video", "bicubic-f8"}
    assert "cannot be put on cpu (made for one device)" in str(failed["stuck"])
    assert len(list(tmp_path.glob("*/*.json"))) == 5


def test_weights_of_convolutions_over_images_alone_are_in_channels_last():
    model = Video()
    prepare(model, CPU)
    image, video = (network.weight for network in model.networks.values())
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert video.is_contiguous()


@pytest.mark.parametrize("text", ["", "a", "0", "-1"])
def test_numbers_are_read_strictly(tokbench, text: str):
    ran = tokbench("speed", "--models", "bicubic-f8", "--res", text)
    assert ran.status == 2
    assert "--res" in ran.reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_timing_and_memory(tmp_path):
    results = measure(
        "ssdd-s-f8c4", (128,), device=torch.device("cuda"), out=tmp_path, random_weights=True, budget=QUICK
    )
    stage = results[0].stages["decode"]
    assert stage.memory_allocated
    assert stage.images_per_second > 0
