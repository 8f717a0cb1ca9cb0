import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tokbench.errors import InputError
from tokbench.records.result import TokenizerInfo, read_speed
from tokbench.registry import parse
from tokbench.report import speed as report
from tokbench.speed.measure import SpeedOptions, equality_gate, measure, other_steps, parse_numbers
from tokbench.speed.timing import QUICK, Row, count_flops, find_batch, interleave


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


def row(resolution: int = 8, width: int = 4) -> Row:
    return Row("tiny", Tiny(width), resolution, torch.float32, torch.device("cpu"))


def test_flops_of_attention_are_counted_by_hand():
    tokens, width = 64, 4
    project = 2 * tokens * 3 * 3 * width
    attention = 2 * tokens * tokens * width * 2  # scores and weighted sum
    assert count_flops(row(8, width)) == {"encode": 0, "decode": project + attention}


def test_batch_search_takes_the_smallest_near_the_best(monkeypatch):
    rates = {1: 10.0, 2: 50.0, 4: 99.5, 8: 100.0, 16: 100.5, 32: None}
    monkeypatch.setattr("tokbench.speed.timing.rate_at", lambda row, stage, size, effort: rates[size])
    assert find_batch(row(), "decode", (1, 2, 4, 8, 16, 32), QUICK) == 4


def test_models_take_turns():
    calls: list[str] = []

    def step(name: str):
        return lambda: (calls.append(name), torch.zeros(1))[1]

    seconds = interleave([step("a"), step("b")], torch.device("cpu"), QUICK)
    assert "".join(calls) == "ababab"
    assert [len(times or []) for times in seconds] == [3, 3]


def test_a_model_that_runs_out_of_memory_stops_nobody_else():
    def full():
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 bytes")

    seconds = interleave([full, lambda: torch.zeros(1)], torch.device("cpu"), QUICK)
    assert seconds[0] is None
    assert len(seconds[1] or []) == 3


def test_gate_tells_equal_from_unequal():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=generator)
    exact = (images.int() + torch.randint(-20, 20, images.shape, generator=generator)).clamp(0, 255).byte()
    worse = (exact.int() + torch.randint(-9, 9, images.shape, generator=generator)).clamp(0, 255).byte()
    assert equality_gate(images, exact, exact)["psnr_shift"] == 0
    assert float(equality_gate(images, exact, worse)["psnr_shift"]) < -0.02
    assert equality_gate(images, exact, worse)["passed"] in (False, None)  # None: no LPIPS weights here


def test_quick_run_writes_records_that_read_back(tmp_path):
    options = SpeedOptions("bicubic-f8,small=bicubic-f16", (16, 24), torch.device("cpu"), tmp_path, effort=QUICK)
    results = measure(options)
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
    options = SpeedOptions("bicubic-f8,small=bicubic-f16", (24,), torch.device("cpu"), tmp_path, effort=QUICK)
    results = measure(options)
    console = Console(width=report.WIDTH, record=True, file=io.StringIO())
    console.print(report.speed_table(results))
    text = console.export_text()
    assert "small: 24 px is not divisible by 16" in text
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert "1.00x" in report.speed_markdown(results)
    with pytest.raises(InputError, match="no speed row is called 'nobody'"):
        report.speed_table(results, "nobody")


def test_other_hardware_and_settings_are_other_blocks(tmp_path):
    result = measure(SpeedOptions("bicubic-f8", (16,), torch.device("cpu"), tmp_path, effort=QUICK))[0]
    elsewhere = replace(result, hardware="another machine")
    compiled = replace(result, settings={**result.settings, "compile": True})
    assert len(report.blocks([result, elsewhere, compiled])) == 3


def test_only_diffusion_decoders_get_more_steps():
    assert other_steps(parse("bicubic-f8"), Tiny()) == []
    assert other_steps(parse("ssdd"), Tiny(steps=1)) == [2, 4, 8]
    assert other_steps(parse("ssdd@steps=2"), Tiny(steps=2)) == []


@pytest.mark.parametrize("text", ["", "a", "0", "128,", "-1"])
def test_numbers_are_read_strictly(text):
    with pytest.raises(InputError, match="--res"):
        parse_numbers(text, "--res")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_timing_and_memory(tmp_path):
    options = SpeedOptions("ssdd-s-f8c4", (128,), torch.device("cuda"), tmp_path, random_weights=True, effort=QUICK)
    stage = measure(options)[0].stages["decode"]
    assert stage.memory_allocated
    assert stage.images_per_second > 0
