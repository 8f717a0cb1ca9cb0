"""The training toolbox: data order, averages, decay groups, overrides, checkpoints."""

import io
import json
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from baselines.train import KLVAETraining
from tests.reference import GOLDEN
from tokbench.config import describe, from_dict, override, to_dict
from tokbench.data.open import open_source
from tokbench.data.sources import Source
from tokbench.data.training_crops import CropConfig, PhotoCrops, batches, hold_out
from tokbench.errors import CellError, InputError
from tokbench.runtime.processes import Processes
from tokbench.training.log import Log, check_losses, is_best
from tokbench.training.optimisation import Ema, EmaConfig, OptimConfig, RunConfig, learning_rate
from tokbench.training.session import load_checkpoint, open_session, save_checkpoint


class Photos:
    def __init__(self, num: int) -> None:
        rng = np.random.default_rng(0)
        self.ids = [f"subject{i // 2}-{i % 2}" for i in range(num)]
        self.images = [Image.fromarray(rng.integers(0, 255, (40 + 8 * i, 56, 3), np.uint8)) for i in range(num)]

    def read(self, index: int, *, least: int = 0) -> Image.Image:
        return self.images[index]


@dataclass(frozen=True)
class Inner:
    weight: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Settings:
    steps: int = 10
    sizes: tuple[int, ...] = (1, 2)
    folder: Path | None = None
    on: bool = False
    inner: Inner = field(default_factory=Inner)
    run: RunConfig = field(default_factory=RunConfig)


def crops(config: CropConfig) -> PhotoCrops:
    return PhotoCrops(Photos(6), range(6), config, seed=3)


def stream(config: CropConfig, rank: int, world: int, first: int = 0, workers: int = 0) -> list[torch.Tensor]:
    sources = batches(
        crops(config), first_step=first, num_steps=5, batch_size=4, rank=rank, world=world, num_workers=workers
    )
    return [images for _, images, _ in sources]


CONFIG = CropConfig(size=16, short_side=(24, 40), late_size=24, late_share=0.4)


def test_two_processes_workers_and_a_resumed_run_see_the_same_crops() -> None:
    whole = stream(CONFIG, 0, 1)
    halves = zip(stream(CONFIG, 0, 2), stream(CONFIG, 1, 2), strict=True)
    for again, start in (
        ([torch.cat(pair) for pair in halves], 0),
        (stream(CONFIG, 0, 1, first=3), 3),
        (stream(CONFIG, 0, 1, workers=1), 0),
    ):
        assert all(torch.equal(batch, other) for batch, other in zip(whole[start:], again, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photograph_that_cannot_be_read_is_one_line(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: Photos, index: int, *, least: int) -> Image.Image:
        raise InputError("dog.png: damaged")

    taken = crops(CONFIG)
    taken.kept.clear()  # as of photographs that do not fit into memory
    monkeypatch.setattr(Photos, "read", damaged)
    with pytest.raises(InputError, match=r"^dog.png: damaged$"):
        list(batches(taken, first_step=0, num_steps=1, batch_size=2, rank=0, world=1, num_workers=workers))


def test_an_epoch_takes_every_photograph_once_and_late_crops_are_larger() -> None:
    assert sorted(crops(CONFIG).photograph(k) for k in range(6)) == list(range(6))
    assert [batch.shape[-1] for batch in stream(CONFIG, 0, 1)] == [16, 16, 16, 24, 24]


def test_larger_photographs_are_sampled_by_the_root_of_their_area() -> None:
    drawn = crops(CropConfig(16, (24, 40), sample_by="area"))
    counts = np.bincount([drawn.photograph(k) for k in range(3000)], minlength=6) / 3000
    wanted = np.sqrt([(40 + 8 * i) * 56 for i in range(6)])
    assert np.abs(counts - wanted / wanted.sum()).max() < 0.03


def test_held_out_subjects_are_not_in_training() -> None:
    ids = Photos(12).ids
    train, held = hold_out(ids, 4)
    assert len(held) == 4
    assert not {ids[i].split("-")[0] for i in train} & {ids[i].split("-")[0] for i in held}
    assert len(hold_out([f"n0144/n0144_{i}" for i in range(50)], 4)[1]) == 4
    with pytest.raises(InputError, match="cannot hold out"):
        hold_out(ids, 12)


def test_overrides_are_strict_and_typed() -> None:
    config = override(Settings(), ["steps=20", "sizes=3,4", "inner.weight=0", "inner.kind=b", "on=true", "folder=x"])
    assert (config.steps, config.sizes, config.inner, config.on) == (20, (3, 4), Inner(0.0, "b"), True)
    assert config.folder == Path("x")
    for wrong, message in (
        ("step=1", "did you mean steps"), ("steps=1.5", "expected int"), ("inner.kind=c", "one of a, b"),
        ("steps", "key=value"), ("inner=1", "a group"), ("steps.x=1", "not a group"), ("on=yes", "true or false"),
        ("run.batch_size=0", "run.batch_size: batch_size 0: must be at least 1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            override(Settings(), [wrong])


def test_config_survives_json_and_its_description_overrides_it_to_itself() -> None:
    config = override(Settings(), ["folder=x", "sizes=5", "run.held_out=0"])
    assert from_dict(Settings, json.loads(json.dumps(to_dict(config)))) == config
    assert override(Settings(), describe(config)) == config


def test_an_average_starts_as_a_copy_and_decays_as_the_golden_ones() -> None:
    golden = np.load(GOLDEN / "units.npz")
    module = nn.Linear(1, 1, bias=False)
    late = Ema(module, EmaConfig(start_step=1))
    torch.nn.init.ones_(module.weight)
    late.update(0)
    assert (float(late.shadow["weight"]), late.updates) == (1.0, 0)
    late.shadow["weight"].fill_(0.5)
    with late.applied():
        assert module.weight.item() == 0.5
    assert module.weight.item() == 1.0
    for updates, decay in zip(golden["ema_decay_n"], golden["ema_decay"], strict=True):
        ema = Ema(module, EmaConfig(decay=0.999, start_step=0))
        ema.updates = int(updates)
        ema.shadow["weight"].zero_()
        ema.update(0)  # 0 * decay + 1 * (1 - decay)
        assert float(ema.shadow["weight"]) == pytest.approx(1 - decay, rel=1e-6)
        assert ema.updates == updates + 1


def test_learning_rate_warms_up_and_ends_at_its_share() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine", final_share=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.25, rel=0.01)
    assert rates[100] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, rel=0.01)


def test_checkpoint_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    assert load_checkpoint(path, Settings()) is None
    save_checkpoint(path, Settings(), {"step": 3})
    assert load_checkpoint(path, override(Settings(), ["run.workers=3"])) is not None
    with pytest.raises(InputError, match="steps=10"):
        load_checkpoint(path, Settings(steps=11))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="not a readable training checkpoint"):
        load_checkpoint(path, Settings())


def test_processes_that_find_checkpoints_of_different_steps_are_told_to_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = KLVAETraining(run=RunConfig(device="cpu"), optim=OptimConfig("adamw"))
    monkeypatch.setattr(Processes, "all_gather", lambda processes, step: [step, step + 50])
    network = nn.Linear(1, 1)
    with open_session("klvae", config, tmp_path) as session, pytest.raises(InputError, match="at steps 0, 50"):
        session.start(network, network.named_parameters())


def test_a_loss_that_is_no_number_names_step_samples_and_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    for value in (math.nan, 1e9):
        with pytest.raises(CellError, match=r"step 7: flow .* cat, dog; last good checkpoint: .*last.ckpt"):
            check_losses({"flow": value}, 7, ["cat", "dog"], tmp_path / "last.ckpt", 1e4)
    check_losses({"kl": 14_000.0}, 7, ["cat"], tmp_path / "last.ckpt", 1e4)  # a sum over 3 x 32 x 32
    with pytest.raises(CellError, match="kl is nan"):
        check_losses({"kl": math.nan}, 7, ["cat"], tmp_path / "last.ckpt", 1e4)


def test_resumed_log_drops_what_is_trained_again_and_knows_the_best(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", 0)
    for step, psnr in ((1, 20.0), (2, 30.0), (3, 25.0)):
        log.write(step=step, psnr=psnr)
    assert not is_best(log.records(), "psnr")
    log = Log(tmp_path / "log.jsonl", 2)
    assert [record["step"] for record in log.records()] == [1, 2]
    assert is_best(log.records(), "psnr")


def test_a_torn_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert Log(path, 2).records() == [{"step": 1, "loss": 0.5}]
    with path.open("ab") as file:
        file.write(b'{"step": 3, "name": "\xc3')
    log = Log(path, 3)
    log.write(step=4)
    assert log.records() == [{"step": 1, "loss": 0.5}, {"step": 4}]


def test_a_tar_shard_gives_the_crops_of_its_folder(photographs: Path, tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as archive:
        for path in sorted(photographs.iterdir()):
            archive.add(path, path.name)
    both = [open_source(str(place)) for place in (photographs, shard)]
    assert both[0].ids == both[1].ids
    config = CropConfig(16, (24, 40))
    folder, tar = (PhotoCrops(source, range(len(source.ids)), config, seed=0) for source in both)
    for number in range(4):
        assert torch.equal(folder[number, 16][0], tar[number, 16][0])


def test_imagenet_in_webdatasets_shards_gives_the_crops_of_its_class_folders(photographs: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folders, shards = tmp_path / "folders" / "train", tmp_path / "shards" / "train"
    shards.mkdir(parents=True)
    with webdataset.ShardWriter(f"{shards}/imagenet-%06d.tar", maxcount=3, verbose=0) as writer:
        for number, path in enumerate(sorted(photographs.iterdir(), reverse=True)):
            label = f"n{number % 2:08d}"
            (folders / label).mkdir(parents=True, exist_ok=True)
            (folders / label / f"{label}_{number}{path.suffix}").write_bytes(path.read_bytes())
            sample = {"__key__": f"{label}_{number}", path.suffix[1:]: path.read_bytes(), "cls": number % 2}
            writer.write(sample)
    both = [open_source(f"imagenet:{place.parent}", "train") for place in (folders, shards)]
    assert len(list(shards.iterdir())) > 1
    assert both[0].ids == both[1].ids
    assert both[0].fingerprint() == both[1].fingerprint()
    assert all(str(shards) in both[1].where(i) and ".tar:" in both[1].where(i) for i in range(len(both[1])))
    folder, tar = (PhotoCrops(source, range(len(source.ids)), CropConfig(16, (24, 40)), seed=0) for source in both)
    for number in range(4):
        assert torch.equal(folder[number, 16][0], tar[number, 16][0])


def test_photographs_that_do_not_fit_into_memory_give_the_same_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [crops(CONFIG)[number, 16][0] for number in range(4)]
    monkeypatch.setattr("tokbench.data.training_crops.KEEP_BYTES", 1)
    streamed = crops(CONFIG)
    assert not streamed.kept
    assert all(torch.equal(streamed[number, 16][0], kept[number]) for number in range(4))
    with pytest.raises(InputError, match="sample_by=area"):
        crops(CropConfig(16, (24, 40), sample_by="area"))


def test_what_is_left_to_auto_follows_from_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr("tokbench.training.optimisation.find_spec", lambda name: name)
    for flags, dtype in ({"avx2"}, "float32"), ({"avx2", "avx512_bf16"}, "bfloat16"):
        monkeypatch.setattr("tokbench.runtime.device.cpu_flags", lambda flags=flags: flags)
        assert (RunConfig().on(cpu).dtype, RunConfig().on(cpu).compile) == (dtype, False)
    assert (RunConfig().on(gpu).dtype, RunConfig().on(gpu).compile) == ("float32", True)
    assert not RunConfig(steps=500).on(gpu).compile
    said = override(RunConfig(), ["dtype=bfloat16", "compile=false", "workers=3"])
    assert said.on(gpu) == said
    assert override(said, ["workers=auto", "dtype=auto", "compile=auto"]) == RunConfig()


def test_emulated_bfloat16_is_warned_of(
    tokbench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = ["run", "--models", "identity", "--res", "32", "--limit", "1", "--metrics", "psnr", "--dtype", "bfloat16"]
    timed = ["speed", "--models", "bicubic-f8", "--res", "32", "--quick", "--dtype", "bfloat16"]
    for flags, arguments in (set(), run), (set(), timed), ({"amx_bf16"}, run):
        monkeypatch.setattr("tokbench.runtime.device.cpu_flags", lambda flags=flags: flags)
        said = tokbench(*arguments, "--device", "cpu", "--out", tmp_path / str(len(flags))).err
        assert ("has no bfloat16" in said) == (not flags)


class Jpegs(Source):
    """One large photograph, as its bytes."""

    def read_bytes(self, index: int) -> bytes:
        return bytes(self.entries[index])


def test_large_jpegs_are_decoded_small_for_crops_and_whole_for_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.linspace(0, 255, 640)
    pixels = np.stack([np.tile(ramp, (400, 1)), np.tile(ramp[:400, None], (1, 640)), np.full((400, 640), 90.0)], 2)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
    source = Jpegs("jpegs", None, Path("jpegs"), ["a"], [file.getvalue()])
    monkeypatch.setattr("tokbench.data.training_crops.KEEP_BYTES", 0)
    small = PhotoCrops(source, [0], CropConfig(16, (24, 40)), seed=0)
    assert (source.read(0, least=small.sides).size, source.read(0).size) == ((160, 100), (640, 400))
    crops = [small[number, 16][0] for number in range(4)]
    monkeypatch.setattr(Image.Image, "draft", lambda *_: None)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
    for number, crop in enumerate(crops):
        assert (crop.int() - small[number, 16][0].int()).abs().max() <= 4  # the same places, other rounding
