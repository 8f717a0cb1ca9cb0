"""The estimate of docs/scale.md (results/scale.py)."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from results import scale
from tokbench import registry


def test_hours_are_shared_but_for_the_statistics() -> None:
    machine = scale.Machine({"float32": 1000.0, "bfloat16": 4000.0}, decode=0.01, statistics=60.0)
    whole, alone = (scale.hours(gpus, "bfloat16", machine, {}) for gpus in (1, 1_000_000_000))
    assert alone == pytest.approx(60 * 10 * 3 / 3600)
    gflop = sum(map(sum, scale.COUNTED.values())) / 4000 + 10 * scale.METRICS / 1000
    assert whole - alone == pytest.approx(scale.IMAGES * gflop * (1 / 4 + 1 + 4) / 3600)
    measured = {("taesd", 256): 0.5}
    assert scale.seconds_an_image("taesd", 256, "float32", machine, measured) == 0.5 + scale.METRICS / 1000
    assert scale.cores("taesd", 256, "float32", machine, measured) == pytest.approx(0.01 / (0.5 + 0.107))


def test_costs_are_those_that_torch_counts() -> None:
    with FakeTensorMode(), torch.inference_mode():
        tokenizer = registry.create(registry.parse("taesd"), random_weights=True)
        seeds = torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as encoder:
            latents = tokenizer.encode(torch.zeros(1, 3, 256, 256, dtype=torch.uint8), sample=False, seeds=seeds)
        with FlopCounterMode(display=False) as decoder:
            tokenizer.decode(latents, seeds=seeds, size=(256, 256))
    counted = tuple(round(counter.get_total_flops() / 1e9) for counter in (encoder, decoder))
    assert counted == scale.COUNTED["taesd"]


def test_the_page_has_a_row_a_tokenizer(tmp_path: Path) -> None:
    page = scale.tables(tmp_path)
    assert all(f"| {name} |" in page for name in scale.COUNTED)
    assert "measured" not in page
