"""Noise that depends on the image alone, and what a waiting person sees."""

import io
import math
import sys
import time

import pytest
import torch
from scipy import stats

from tokbench.runtime.seeding import image_seeds, normal
from tokbench.runtime.terminal import bar
from tokbench.training.log import Meter


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    noise = normal(torch.tensor([1, 2]), (3, 128, 128), device="cpu").double()
    for row in noise:
        assert stats.kstest(row.flatten().numpy(), "norm").pvalue > 1e-3
        assert abs(row.mean()) < 4 / math.sqrt(row.numel())
        for shifted in (row.roll(1, -1), row.roll(1, -2), row.roll(1, 0)):
            assert abs((row * shifted).mean()) < 4 / math.sqrt(row.numel())
    assert abs((noise[0] * noise[1]).mean()) < 4 / math.sqrt(noise[0].numel())


def test_first_hash_is_splitmix64() -> None:
    # SplitMix64 seeded with 0 gives 0xE220A8397B1DCDAF first (reference value of its authors).
    value = 0xE220A8397B1DCDAF
    radius = math.sqrt(-2 * math.log(((value >> 32) + 1) / 2**32))
    angle = math.tau * (value & 0xFFFFFFFF) / 2**32
    assert torch.allclose(
        normal(torch.tensor([0]), (2,), device="cpu")[0],
        torch.tensor([radius * math.cos(angle), radius * math.sin(angle)]),
    )


def test_noise_depends_on_the_image_alone() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seeds = image_seeds(images, 0)
    together = normal(seeds, (3, 8, 8), device="cpu")
    assert torch.equal(together[2:3], normal(image_seeds(images[2:3], 0), (3, 8, 8), device="cpu"))
    assert len(set(seeds.tolist() + image_seeds(images, 1).tolist())) == 8
    assert normal(seeds, (3, 5, 5), device="cpu").shape == (4, 3, 5, 5)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stderr", [Terminal, io.StringIO])
def test_a_bar_shows_losses_and_rate_on_a_terminal_alone(
    stderr: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, meter = stderr(), Meter()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    meter.since -= 10
    meter.add({"l1": 0.25, "loss": 0.5}, 20)
    meter.add({"l1": 0.75, "loss": 1.5}, 20)
    with bar("train klvae", 25, "steps") as advance:
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 3)
        advance(2, meter.note())
    assert ("images/s, loss 1, l1 0.5" in screen.getvalue()) == screen.isatty()
