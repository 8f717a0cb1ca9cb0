"""Whole training runs, tiny: resumed after kill -9, in two processes, stopped by Ctrl-C, from stage to stage."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.kl_vae import load
from baselines.train import KLVAETraining, train_klvae
from ssdd_models.ssdd import SSDD, read_checkpoint
from tokbench.config import override
from tokbench.errors import CellError
from tokbench.runtime.processes import Machine
from tokbench.training.optimisation import RunConfig

RUN = ["run.batch_size=4", "run.log_every=1", "run.save_every=2", "run.eval_every=0", "run.sample_every=0"]
RUN += ["run.held_out=0", "run.dtype=float32", "run.device=cpu", "ema.start_step=1", "crops.size=16"]
SSDD_TINY = [*RUN, "crops.short_side=24,32", "perceptual=none", "weights.perceptual=0", "weights.repa=0"]
SSDD_TINY += ["encoder.downsample=4", "encoder.width=32", "decoder.widths=32,32,32,32", "decoder.layers=1"]
SSDD_TINY += ["decoder.heads=2", "encoder.groups=4", "decoder.groups=4", "init=fan-in"]
KLVAE_TINY = [
    *RUN,
    "crops.short_side=24,32",
    "crops.sample_by=shuffle",
    "perceptual_weight=0",
    "model.encoder.downsample=4",
]
KLVAE_TINY += ["model.decoder.width=16", "model.decoder.channel_mult=1,2,2", "model.decoder.blocks=1"]
KLVAE_TINY += ["model.encoder.width=32", "model.encoder.groups=4", "model.decoder.groups=4"]


def command(model: str, data: Path, out: Path, *settings: str) -> list[str]:
    return [sys.executable, "-m", "tokbench", "train", model, "--data", str(data), "--out", str(out), *settings]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out / "model.safetensors")[0]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_resume_after_kill_9_is_bit_for_bit(photographs: Path, tmp_path: Path, tokbench: Callable[..., Any]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        command("ssdd", photographs, killed, *SSDD_TINY, "run.steps=500"), stderr=subprocess.PIPE
    )
    while not (killed / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    saved = torch.load(killed / "last.ckpt", weights_only=True)["step"]
    for out in (killed, whole):
        assert tokbench(*command("ssdd", photographs, out, *SSDD_TINY, f"run.steps={saved + 3}")[3:]).status == 0
    ours, theirs = weights(whole), weights(killed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert losses(whole) == losses(killed)


def test_two_processes_take_the_steps_of_one(photographs: Path, tmp_path: Path, tokbench: Callable[..., Any]) -> None:
    settings = [*KLVAE_TINY, "run.steps=3", "gan.weight=0.5", "gan.start_step=1", "gan.width=8", "gan.layers=1"]
    single, double = tmp_path / "one", tmp_path / "two"
    assert tokbench(*command("klvae", photographs, single, *settings)[3:]).status == 0
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = command("klvae", photographs, double, *settings)[1:]
    subprocess.run([*start, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert losses(double) == pytest.approx(losses(single), rel=1e-5)
    ours, theirs = weights(single), weights(double)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-4)


def test_stages_follow_each_other_and_record_their_origin(
    photographs: Path, tmp_path: Path, tokbench: Callable[..., Any]
) -> None:
    def stage(name: str, model: str, *more: object) -> Path:
        settings = KLVAE_TINY if model == "klvae" else SSDD_TINY[: SSDD_TINY.index("weights.repa=0") + 1]
        extra = ["normalise_latents=true"] if model == "klvae" else []
        result = tokbench(
            "train", model, "--data", photographs, "--out", tmp_path / name, *settings, *extra, *more,
            "run.steps=1", "run.held_out=2", "run.eval_every=1", "run.eval_resolution=32", "run.best_by=psnr",
            "run.eval_metrics=psnr,ssim",
        )  # fmt: skip
        assert result.status == 0, result.err
        return Path(result.out.strip())

    klvae = stage("klvae", "klvae", "--preset", "small")
    sizes = ("decoder.widths=32,32,32,32", "decoder.layers=1", "decoder.heads=2", "decoder.groups=4")
    teacher = stage("pretrain", "ssdd", "--stage", "pretrain", "--encoder-from", klvae, *sizes)
    student = stage(
        "distill",
        "ssdd",
        "--stage",
        "distill",
        "--from",
        teacher,
        "teacher_steps=2",
        "weights.gan=0.5",
        "gan_start=0",
        "crops.size=32",
    )
    again = stage("klvae-on-ssdd", "klvae", "--preset", "small", "--encoder-from", teacher, "freeze_encoder=true")
    encoder = load(klvae)[0].encoder.state_dict()
    frozen = load(again)[0].encoder.state_dict()  # normalised anew, in its last layer alone
    assert all(torch.equal(frozen[key], value) for key, value in encoder.items() if "out_proj" not in key)
    state, metadata = read_checkpoint(student)
    assert all(torch.equal(state[f"encoder.{key}"], value) for key, value in encoder.items())
    assert metadata["training"]["stage"] == "distill"
    assert metadata["training"]["started_from"]["model"].startswith("model.safetensors ")
    assert SSDD.from_pretrained(student).config.steps == 1
    for name in ("log.jsonl", "best.safetensors", "curves.png", "last.ckpt"):
        assert (student.parent / name).stat().st_size > 0


def test_recomputed_activations_change_nothing(photographs: Path, tmp_path: Path, tokbench: Callable[..., Any]) -> None:
    for name, value in (("kept", "false"), ("again", "true")):
        settings = [*SSDD_TINY, "run.steps=2", f"run.checkpoint_activations={value}"]
        assert tokbench(*command("ssdd", photographs, tmp_path / name, *settings)[3:]).status == 0
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "again"), rel=1e-6)


def test_a_stage_without_what_it_starts_from_says_so(
    tokbench: Callable[..., Any], photographs: Path, tmp_path: Path
) -> None:
    run = tokbench("train", "ssdd", "--stage", "pretrain", "--data", photographs, "--out", tmp_path, *SSDD_TINY)
    assert run.status == 2
    assert "--encoder-from" in run.reason
    run = tokbench("train", "ssdd", "--stage", "distill", "--data", photographs, "--out", tmp_path, *SSDD_TINY)
    assert run.status == 2
    assert "--from" in run.reason
    assert tokbench("train", "klvae").status == 2
    assert "unknown setting" in tokbench("train", "klvae", "--data", "x", "--out", "y", "stepz=1").reason


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["klvae", "model.encoder.width=48"], "model.encoder.width: encoder channels 4, width 48: width must be"),
        (["klvae", "model.encoder.groups=5"], "model.*: no network can be made of it: num_channels (32) must"),
        (["klvae", "model.decoder.groups=0"], "model.*: no network"),
        (["klvae", "gan.width=5"], "gan.*: no network"),
        (["klvae", "model.encoder.downsample=16"], "channel_mult has 3 numbers, the encoder f16c4 needs 5"),
        (["klvae", "crops.size=33"], "crops.size=33: this model takes multiples of 4"),
        (["klvae", "crops.late_size=33"], "crops.late_size=33: this model takes multiples of 4"),
        (["klvae", "run.held_out=2", "run.eval_every=1", "run.eval_resolution=30"], "run.eval_resolution=30: this"),
        (["klvae", "optim.betas=0.9"], "optim.betas: betas (0.9,): two numbers"),
        (["klvae", "run.accumulate=0"], "run.accumulate: accumulate 0: must be at least 1"),
        (["klvae", "crops.short_side="], "crops.short_side: size 16, short_side ()"),
        (["ssdd", "decoder.widths=48,64,96,96"], "decoder.widths: decoder widths (48, 64, 96, 96): four multiples"),
        (["ssdd", "decoder.groups=5"], "encoder.*, decoder.*: no network"),
        (["ssdd", "crops.size=20"], "crops.size=20: this model takes multiples of 8"),
        (["ssdd", "eval_steps=0"], "eval_steps: teacher_steps 7, eval_steps 0: must be at least 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_one_line_before_anything_is_written(
    arguments: list[str], said: str, photographs: Path, tmp_path: Path, tokbench: Callable[..., Any]
) -> None:
    model, *wrong = arguments
    settings = KLVAE_TINY if model == "klvae" else SSDD_TINY
    run = tokbench(*command(model, photographs, tmp_path / "out", *settings, "run.steps=1", *wrong)[3:])
    assert run.status == 2
    assert said in run.reason
    assert not (tmp_path / "out").exists()


def test_help_lists_every_default_so_that_it_can_be_overridden(tokbench: Callable[..., Any]) -> None:
    shown = tokbench("train", "ssdd", "--stage", "distill", "--help").out
    for line in ("teacher_steps=7", "optim.learning_rate=0.0001", "stage=distill", "weights.perceptual=0.5"):
        assert line in shown


def test_ctrl_c_saves_and_nan_stops(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(KLVAETraining(), [*KLVAE_TINY, "run.steps=3", "gan.weight=0", "learn_logvar=false"])
    means = Machine.means

    def interrupt(self: Machine, values: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return means(self, values | {"stop": torch.tensor(1.0)})

    with monkeypatch.context() as patch:
        patch.setattr(Machine, "means", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_klvae(config, str(photographs), tmp_path, None, None)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 1
    monkeypatch.setattr(Machine, "means", lambda self, values: means(self, values | {"l1": torch.tensor(torch.nan)}))
    with pytest.raises(CellError, match=r"step 2: l1 is nan on .*; last good checkpoint: .*last\.ckpt"):
        train_klvae(config, str(photographs), tmp_path, None, None)


def test_batches_that_cannot_be_shared_evenly_are_refused() -> None:
    from tokbench.errors import InputError

    with pytest.raises(InputError, match="batch_size=5"):
        Machine(RunConfig(batch_size=5, accumulate=2, device="cpu"))
