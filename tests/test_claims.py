"""Every command of results/CLAIMS.md runs, in order, on eight images with small or random weights."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import ROOT
from tests.conftest import SAMPLES, Ran
from tests.tiny import tiny
from tokbench import registry

CLAIMS = (ROOT / "results" / "CLAIMS.md").read_text()
COMMANDS = re.findall(r"`(?:torchrun --nproc-per-node 8 -m )?(tokbench (?:run|speed|train|generate) [^`]+)`", CLAIMS)
PUBLISHED = [command for command in COMMANDS if "hf:facebook" in command]  # dry-run in test_generation_published
# Landscape, portrait, below the resolution, one pixel high, very wide.
SHAPES = ((80, 72), (72, 80), (500, 375), (75, 56), (40, 30), (64, 1), (8000, 120), (333, 500))
RUN = "run.steps=2 run.batch_size=2 run.device=cpu run.dtype=float32 run.compile=false run.log_every=1"
SCORED = f"{RUN} run.held_out=1 run.eval_metrics=psnr run.best_by=psnr"
SSDD = (
    "encoder.width=32 encoder.groups=4 decoder.widths=32,32,32,32 decoder.layers=1 decoder.heads=4 decoder.groups=4 "
    "crops.size=64 crops.short_side=64,64 run.eval_resolution=64 weights.repa=0 weights.perceptual=0 teacher_steps=2"
)
SMALL = {  # what makes a command small; later options and overrides win
    "run": "--res 32 --limit 8 --device cpu",
    "speed": "--res 32 --device cpu --dtype float32 --batch-size 1 --quick",
    "generate": "--num-images 8 --steps 2 --device cpu",
    "train ssdd": f"{SCORED} {SSDD}",
    "train klvae": (
        f"{SCORED} model.encoder.width=32 model.decoder.width=32 model.decoder.blocks=1 crops.size=32 gan.width=4 "
        "crops.short_side=32,32 run.eval_resolution=32 perceptual_weight=0"
    ),
    "train dit": f"{RUN} size=tiny latents.resolution=32 grid_steps=2",
}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKBENCH_OFFLINE", "1")
    monkeypatch.setenv("TOKBENCH_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Eight validation images of real shapes, flat, and as many training images in class folders."""
    for i, (path, size) in enumerate(zip(sorted(SAMPLES.glob("*.jpg")), SHAPES, strict=False)):
        image = Image.open(path).resize(size)
        for name in (f"val/ILSVRC2012_val_{i:08d}.JPEG", f"train/n{i % 2:08d}/n{i % 2:08d}_{i}.JPEG"):
            (tmp_path / "imagenet" / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "imagenet" / name, "JPEG")
    return tmp_path / "imagenet"


def test_the_page_has_commands_for_every_status() -> None:
    rows = [line for line in CLAIMS.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) == len(COMMANDS)
    assert all(re.search(r"\| (not measured yet|measured: .+) \|$", row) for row in rows)


def test_every_model_that_is_named_exists() -> None:
    for command in COMMANDS:
        words = shlex.split(command)
        for option in ("--models", "--tokenizer"):
            if option in words:
                for model in words[words.index(option) + 1].split(","):
                    if "runs/" not in model:  # else trained by a command before it
                        registry.parse(model)


def test_every_command_runs_small(
    imagenet: Path, tmp_path: Path, tokbench: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_build", lambda part, random_weights: tiny())
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for command in COMMANDS:
        if command in PUBLISHED:
            continue
        words = shlex.split(command.replace("/data/", f"{tmp_path}{os.sep}"))[1:]
        kind = " ".join(words[:2]) if words[0] == "train" else words[0]
        ran = tokbench(*(word for word in words if word != "--compile"), *shlex.split(SMALL[kind]))
        assert ran.status == 0, f"{command}\n{ran.err}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("tokbench run") and "runs/" not in c])
def test_every_run_at_its_size_with_random_weights(
    command: str, imagenet: Path, tokbench: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = registry._build
    monkeypatch.setattr(registry, "_build", lambda part, random_weights: build(part, True))
    words = shlex.split(command.replace("/data/imagenet", str(imagenet)))[1:]
    ran = tokbench(*words, "--limit", 8)
    assert ran.status == 0, ran.err
