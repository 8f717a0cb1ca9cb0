"""What disks and files do to a run in its middle: one line, nothing lost, and the same numbers when it goes on."""

import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import TINY, Ran
from tokbench.data.sources import FileSource
from tokbench.errors import InputError
from tokbench.records import samples
from tokbench.records.files import write_whole
from tokbench.records.result import EvalResult, read_result
from tokbench.records.samples import SampleStore
from tokbench.training.log import Log

Command = Callable[..., Ran]
MODEL = f"tiny={TINY}@noise=0.3"


def run(tokbench: Command, data: Path, out: Path, *more: object) -> Ran:
    return tokbench(
        "run", "--models", MODEL, "--data", data, "--out", out, "--res", 32, "--batch-size", 1, "--workers", 0,
        "--metrics", "psnr,ssim", "--save-images", 0, *more,
    )  # fmt: skip


def result(out: Path) -> EvalResult:
    (path,) = out.glob("adm/*/*.json")
    return read_result(path)


@pytest.fixture
def data(photographs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photographs, tmp_path / "photographs"))


@pytest.fixture
def undisturbed(tokbench: Command, data: Path, tmp_path: Path) -> EvalResult:
    assert run(tokbench, data, tmp_path / "undisturbed").status == 0
    return result(tmp_path / "undisturbed")


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A disk that fills up while a file is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def score(tokbench: Command, data: Path, out: Path) -> Ran:
    """The photographs in `data` against themselves, squeezed to 32 pixels."""
    fakes = data.with_name("tiny")
    fakes.mkdir(exist_ok=True)
    for path in data.iterdir():
        Image.open(path).convert("RGB").resize((32, 32)).save(fakes / f"{path.stem}.png")
    return tokbench("score", data, fakes, "--out", out, "--workers", 0, "--metrics", "psnr,ssim")


@pytest.mark.parametrize("command", [run, score])
def test_a_full_disk_ends_the_run_and_the_next_goes_on(
    command: Callable[[Command, Path, Path], Ran], tokbench: Command, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    left = iter(range(5))
    seen: list[str] = []

    def write_while_there_is_room(path: Path, data: bytes) -> None:
        with files_no_larger_than(100 if next(left, None) is None else 1 << 20):
            write_whole(path, data)

    def append(self: SampleStore, ids: Sequence[str], *arrays: Any) -> None:
        seen.extend(ids)
        return appended(self, ids, *arrays)

    appended = SampleStore.append
    assert command(tokbench, data, tmp_path / "undisturbed").status == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "FLUSH_SECONDS", 0)
        patch.setattr(samples, "write_whole", write_while_there_is_room)
        ran = command(tokbench, data, out)
    assert ran.status == 2
    assert "cannot be written" in ran.reason
    assert not list(out.glob("adm/*/*.json"))
    assert len(list(out.glob("adm/*/.tiny-*/*.npz"))) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleStore, "append", append)
        assert command(tokbench, data, out).status == 0
    assert len(seen) == 12 - 5
    assert result(out).metrics == result(tmp_path / "undisturbed").metrics


def test_a_full_disk_ends_a_training_log_in_one_line(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", 0)
    with files_no_larger_than(20), pytest.raises(InputError, match=r"log\.jsonl: cannot be written"):
        log.write(step=1, loss=0.25, l1=0.5)
    resumed = Log(tmp_path / "log.jsonl", 1)
    resumed.write(step=2)
    assert resumed.records() == [{"step": 2}]


def test_training_says_before_it_builds_that_it_cannot_write(tokbench: Command, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.touch()
    ran = tokbench("train", "klvae", "--data", data, "--out", out, "model.encoder.groups=5")
    assert ran.status == 2
    assert f"{out}: cannot be written (Not a directory)" in ran.reason


@pytest.mark.parametrize("model", ["klvae", "dit"])
def test_training_on_a_damaged_photograph_names_it_and_no_option_of_another_command(
    model: str, tokbench: Command, data: Path, tmp_path: Path
) -> None:
    settings = {"klvae": ["--preset", "small", "run.held_out=0", "perceptual_weight=0"],
                "dit": ["--preset", "tiny", f"tokenizer={MODEL}", "latents.resolution=32"]}  # fmt: skip
    damaged = sorted(data.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:500])
    ran = tokbench("train", model, "--data", data, "--out", tmp_path / "out", *settings[model])
    assert ran.status == 2
    assert str(damaged) in ran.reason
    assert "damaged" in ran.reason
    assert "--skip-bad" not in ran.reason


BROKEN = """
import builtins
from tests.tiny import Tiny

class Broken(Tiny):
    def encode(self, images, *, sample, seeds):
        raise getattr(builtins, self.fault)("said by the model")

def broken(error: str, at_once: bool = False):
    if at_once:
        raise getattr(builtins, error)("said by the model")
    return Broken(0.0, error, 0.0, 4, False, 0.0)
"""


def test_whatever_a_model_raises_costs_its_row_and_no_other(tokbench: Command, data: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "broken.py", tmp_path / "out"
    source.write_text(BROKEN)
    errors = ("AssertionError", "OSError", "ImportError", "NameError", "ZeroDivisionError", "KeyError")
    specs = [f"{error.lower()}={source}:broken@error={error}" for error in errors]
    specs += [f"{error.lower()}-built={source}:broken@error={error}@at_once=true" for error in errors]
    ran = tokbench(
        "run", "--models", ",".join([*specs, MODEL]), "--data", data, "--out", out, "--res", 32, "--metrics", "psnr",
        "--workers", 0, "--save-images", 0,
    )  # fmt: skip
    assert ran.status == 1
    assert f"1 done, 0 cached, {len(specs)} failed" in ran.reason
    failed = [line for line in ran.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == len(specs)
    assert all("said by the model" in line for line in failed)
    assert result(out).metrics["psnr"].n == 12


def test_a_file_that_vanishes_during_a_run_is_named(
    tokbench: Command, data: Path, tmp_path: Path, undisturbed: EvalResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = sorted(data.iterdir())[-1]
    kept = last.read_bytes()

    def vanish(self: FileSource, index: int, **how: bool) -> object:
        last.unlink(missing_ok=True)
        return load(self, index, **how)

    load = FileSource.load
    monkeypatch.setattr(FileSource, "load", vanish)
    ran = run(tokbench, data, tmp_path / "out")
    assert ran.status == 2
    assert f"{last}: cannot be read (No such file or directory)" in ran.reason
    monkeypatch.undo()
    last.write_bytes(kept)
    assert run(tokbench, data, tmp_path / "out").status == 0
    assert result(tmp_path / "out").metrics == undisturbed.metrics


def test_a_vanished_file_may_be_left_out_and_is_counted(
    tokbench: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(self: FileSource, index: int) -> bytes:
        if self.ids[index] == sorted(self.ids)[3]:
            raise FileNotFoundError(2, "No such file or directory")
        return read(self, index)

    read = FileSource.read_bytes
    assert run(tokbench, data, tmp_path / "before").status == 0  # now the cache of facts knows every file
    monkeypatch.setattr(FileSource, "read_bytes", vanish)
    ran = run(tokbench, data, tmp_path / "out", "--skip-bad")
    assert ran.status == 0
    assert result(tmp_path / "out").metrics["psnr"].n == 11
