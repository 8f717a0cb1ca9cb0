"""Whole training runs, tiny: the laws of every loop, then what is one model's own."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from baselines.kl_vae import load
from baselines.train import KLVAETraining
from ssdd_models.ssdd import SSDD
from tests import ROOT
from tests.forked import start
from tokbench import register_trainer, registry
from tokbench.checkpoints import read_header
from tokbench.config import override
from tokbench.errors import CellError, InputError, LostPeerError
from tokbench.registry import TrainOptions
from tokbench.training.optimisation import RunConfig
from tokbench.training.session import open_session

RUN = ["run.batch_size=4", "run.log_every=1", "run.save_every=2", "run.sample_every=0", "run.dtype=float32"]
RUN += ["run.device=cpu", "ema.start_step=1"]
CROPS = [*RUN, "run.eval_every=0", "run.held_out=0", "crops.size=16", "crops.short_side=24,32"]
SSDD_TINY = [*CROPS, "weights.perceptual=0", "weights.repa=0", "encoder.downsample=4"]
SSDD_TINY += ["encoder.width=32", "decoder.widths=32,32,32,32", "decoder.layers=1", "decoder.heads=2"]
SSDD_TINY += ["encoder.groups=4", "decoder.groups=4", "init=fan-in"]
KLVAE_TINY = [*CROPS, "crops.sample_by=shuffle", "perceptual_weight=0", "model.encoder.downsample=4"]
KLVAE_TINY += ["model.decoder.width=16", "model.decoder.channel_mult=1,2,2", "model.decoder.blocks=1"]
KLVAE_TINY += ["model.encoder.width=32", "model.encoder.groups=4", "model.decoder.groups=4"]
KLVAE_TINY += ["gan.weight=0.5", "gan.start_step=1", "gan.width=8", "gan.layers=1"]
DIT_TINY = [*RUN, "size=tiny", "tokenizer=identity", "latents.resolution=16", "latents.crops=0", "patch=4"]
DIT_TINY += ["run.compile=false", "optim.warmup_steps=0"]
KLVAE, PCA = (str(ROOT / "baselines" / "weights" / f"{name}.safetensors") for name in ("klvae", "linear-f8c4"))
SSDD_FILE = str(ROOT / "ssdd_models" / "weights" / "ssdd.safetensors")
LOOPS = {"ssdd": SSDD_TINY, "klvae": KLVAE_TINY, "dit": DIT_TINY}
of_every_loop = pytest.mark.parametrize("model", LOOPS)


def command(model: str, data: Path, out: Path, *settings: str) -> list[str]:
    return ["train", model, "--data", str(data), "--out", str(out), *LOOPS[model], *settings]


def weights(out: Path) -> dict[str, torch.Tensor]:
    (path,) = [out / name for name in ("model.safetensors", "generator.safetensors") if (out / name).exists()]
    return load_file(path)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < until, "the run does not get on"
        time.sleep(0.01)


@of_every_loop
def test_resume_after_kill_9_is_bit_for_bit(
    model: str, photographs: Path, tmp_path: Path, tokbench: Callable[..., Any]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (process,) = start(command(model, photographs, killed, "run.steps=500"), tmp_path)
    wait_for(killed / "last.ckpt")
    process.signal(signal.SIGKILL)
    process.finish()
    saved = torch.load(killed / "last.ckpt", weights_only=True)["step"]
    for out in (killed, whole):
        assert tokbench(*command(model, photographs, out, f"run.steps={saved + 3}")).status == 0
    ours, theirs = weights(whole), weights(killed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert losses(whole) == losses(killed)


def test_a_second_run_in_the_same_folder_is_one_line(
    photographs: Path, tmp_path: Path, tokbench: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    (process,) = start(command("klvae", photographs, out, "run.steps=500"), tmp_path)
    wait_for(out / "last.ckpt")
    second = tokbench(*command("klvae", photographs, out, "run.steps=500"))
    process.signal(signal.SIGKILL)
    process.finish()
    assert second.status == 2
    assert second.reason.endswith("out: another run is at work in it; wait for it or use another --out")


@of_every_loop
def test_two_processes_take_the_steps_of_one(model: str, photographs: Path, tmp_path: Path) -> None:
    for name, world in (("one", 1), ("two", 2)):
        for process in start(command(model, photographs, tmp_path / name, "run.steps=3"), tmp_path, world):
            status, error = process.finish()
            assert status == 0, error
    # Sums in another order: float32 rounds them to 6e-8 of their size, which three steps enlarge.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-4)


def test_gradients_exchanged_in_buckets_beside_the_backward_pass_are_those_exchanged_at_once(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokbench.training.gradients.BUCKET", 1 << 14)
    for name, devices in (("flat", ()), ("buckets", ("cpu",))):
        monkeypatch.setattr("tokbench.training.gradients.OVERLAPPED", devices)
        settings = ("run.steps=3", "run.accumulate=2")
        for process in start(command("klvae", photographs, tmp_path / name, *settings), tmp_path, 2):
            status, error = process.finish()
            assert status == 0, error
    ours, theirs = weights(tmp_path / "flat"), weights(tmp_path / "buckets")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@of_every_loop
def test_a_process_told_to_stop_alone_stops_all_after_the_same_saved_step(
    model: str, photographs: Path, tmp_path: Path
) -> None:
    settings = ("run.steps=5000", "run.save_every=5000")
    pair = start(command(model, photographs, tmp_path / "out", *settings), tmp_path, world=2)
    wait_for(tmp_path / "out" / "log.jsonl")
    pair[1].signal(signal.SIGINT)
    for process in pair:
        status, error = process.finish()
        assert status == 130, error
        assert "the same command goes on" in error.strip().splitlines()[-1]
    saved = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["step"]
    assert 0 < saved == len(losses(tmp_path / "out")) < 5000


def test_a_dying_process_ends_the_run_of_the_others_with_a_reason(photographs: Path, tmp_path: Path) -> None:
    pair = start(command("dit", photographs, tmp_path / "out", "run.steps=5000"), tmp_path, world=2)
    wait_for(tmp_path / "out" / "log.jsonl")
    pair[1].signal(signal.SIGKILL)
    pair[1].finish()
    status, error = pair[0].finish()
    assert status == 1
    assert "another process ended" in error.strip().splitlines()[-1]
    assert not issubclass(LostPeerError, CellError)  # a lost process is no model that failed


@of_every_loop
def test_a_loss_that_is_no_number_stops_before_it_is_saved_or_logged(
    model: str, photographs: Path, tmp_path: Path, tokbench: Callable[..., Any]
) -> None:
    settings = ["optim.name=adamw", "optim.learning_rate=1e30", "run.log_every=100", "run.save_every=1", "run.steps=9"]
    run = tokbench(*command(model, photographs, tmp_path / "out", *settings))
    assert run.status == 1
    assert "step 2: " in run.reason
    assert f"last good checkpoint: {tmp_path / 'out' / 'last.ckpt'}" in run.reason
    assert torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["step"] == 1


@of_every_loop
def test_recomputed_activations_change_nothing(
    model: str, photographs: Path, tmp_path: Path, tokbench: Callable[..., Any]
) -> None:
    for name, value in (("kept", "false"), ("again", "true")):
        settings = ["run.steps=2", f"run.checkpoint_activations={value}"]
        assert tokbench(*command(model, photographs, tmp_path / name, *settings)).status == 0
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "again"), rel=1e-6)


def test_tensorboard_is_told_what_the_log_says(photographs: Path, tmp_path: Path, tokbench: Callable[..., Any]) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    judged = (
        "run.held_out=2",
        "run.eval_every=2",
        "run.eval_resolution=32",
        "run.best_by=psnr",
        "run.eval_metrics=psnr",
    )
    for steps in (2, 4):  # the second time it goes on
        settings = (f"run.steps={steps}", "run.sample_every=2", "run.eval_metrics=psnr", *judged)
        ran = tokbench(*command("klvae", photographs, tmp_path, *settings), "--track", "tensorboard")
        assert ran.status == 0, ran.err
    read = events.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    read.Reload()
    tags = read.Tags()
    said = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for group, key in (("train", "loss"), ("train", "gradient"), ("train", "images_per_second"), ("held-out", "psnr")):
        found = [(event.step, event.value) for event in read.Scalars(f"{group}/{key}")]
        assert found == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in said if key in line]
    assert [event.step for event in read.Images("samples")] == [2, 4]
    text = read.Tensors("configuration/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "run.batch_size=4" in text
    assert "optim.learning_rate" in text
    assert "train/rate" in tags["scalars"]


def test_a_tracker_that_is_not_there_is_one_line(
    photographs: Path, tmp_path: Path, tokbench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, said in ("wandb", "wandb is not installed; pip install 'tokbench[wandb]'"), ("x", "one of none, tensor"):
        ran = tokbench(*command("klvae", photographs, tmp_path), "--track", name)
        assert ran.status == 2
        assert said in ran.reason


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
    gan = ("weights.gan=0.5", "gan_start=0", "crops.size=32")
    student = stage("distill", "ssdd", "--stage", "distill", "--from", teacher, "teacher_steps=2", *gan)
    again = stage("klvae-on-ssdd", "klvae", "--preset", "small", "--encoder-from", teacher, "freeze_encoder=true")
    encoder = load(klvae)[0].encoder.state_dict()
    frozen = load(again)[0].encoder.state_dict()  # normalised anew, in its last layer alone
    assert all(torch.equal(frozen[key], value) for key, value in encoder.items() if "out_proj" not in key)
    state, metadata = load_file(student), read_header(student)[1]
    assert all(torch.equal(state[f"encoder.{key}"], value) for key, value in encoder.items())
    assert metadata["training"]["stage"] == "distill"
    assert metadata["training"]["started_from"]["model"].startswith("model.safetensors ")
    assert SSDD.from_pretrained(student).config.steps == 1
    for name in ("log.jsonl", "best.safetensors", "curves.png", "last.ckpt"):
        assert (student.parent / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ssdd", "--stage", "pretrain"], "needs a trained encoder: give --from or --encoder-from"),
        (["ssdd", "--stage", "distill", "--encoder-from", KLVAE], "distill needs --from"),
        (["ssdd", "--stage", "last"], 'unknown stage "last"; known: joint, pretrain, finetune, distill'),
        (["ssdd", "--encoder", "f8"], "--encoder: no network can be made of it: encoder 'f8': expected f<downsample>"),
        (["ssdd", "--decoder", "XXL"], 'unknown decoder "XXL"'),
        (["ssdd", "--encoder-from", PCA], "neither an SSDD nor a KL-VAE"),
        (["klvae", "--encoder-from", PCA], "holds no tokbench model, expected klvae or ssdd"),
        (["klvae", "--from", SSDD_FILE], "holds ssdd, expected klvae"),
        (["klvae", "--stage", "joint"], "klvae has no --stage"),
        (["klvae", "--encoder", "f8"], "--encoder: no network can be made of it"),
        (["klvae", "stepz=1"], "unknown setting"),
        (["dit", "--encoder", "f8c4"], "dit has no --stage, --from"),
        (["vae"], 'unknown model to train "vae"'),
    ],
    ids=str,
)
def test_options_that_lead_to_no_run_are_one_line(
    arguments: list[str], said: str, tokbench: Callable[..., Any], photographs: Path, tmp_path: Path
) -> None:
    run = tokbench("train", *arguments, "--data", photographs, "--out", tmp_path)
    assert run.status == 2
    assert said in run.reason
    assert tokbench("train", "klvae").status == 2


def test_a_trainer_from_outside_is_trained_by_the_same_command(
    tokbench: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: RunConfig, options: TrainOptions) -> Path:
        return options.out / f"{options.data}-{config.steps}"

    monkeypatch.setattr(registry.TRAINERS, "_known", {})
    trainer: Any = SimpleNamespace(configure=lambda options: RunConfig(steps=7), train=train)
    register_trainer("mine", lambda: trainer, summary="of mine")
    assert "mine     of mine" in tokbench("train", "--help").out
    assert "steps=7" in tokbench("train", "mine", "--help").out
    ran = tokbench("train", "mine", "--data", "photos", "--out", tmp_path, "steps=9")
    assert ran.out.strip() == str(tmp_path / "photos-9")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["klvae", "model.encoder.width=48"], "model.encoder.width: encoder channels 4, width 48: width must be"),
        (["klvae", "model.encoder.groups=5"], "model.*: no network can be made of it: num_channels"),
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
    run = tokbench(*command(model, photographs, tmp_path / "out", "run.steps=1", *wrong))
    assert run.status == 2
    assert said in run.reason
    assert not (tmp_path / "out").exists()


def test_help_lists_every_default_so_that_it_can_be_overridden(tokbench: Callable[..., Any]) -> None:
    shown = tokbench("train", "ssdd", "--stage", "distill", "--help").out
    for line in ("teacher_steps=7", "optim.learning_rate=0.0001", "stage=distill", "weights.perceptual=0.5"):
        assert line in shown


def test_batches_that_cannot_be_shared_evenly_are_refused(tmp_path: Path) -> None:
    config = override(KLVAETraining(), ["run.batch_size=5", "run.accumulate=2", "run.device=cpu"])
    with pytest.raises(InputError, match="batch_size=5"), open_session("klvae", config, tmp_path):
        pass
