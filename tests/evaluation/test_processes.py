"""Several processes and sudden deaths: the numbers must not know of them."""

import gzip
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TINY, Ran
from tests.forked import start
from tokbench.records import samples
from tokbench.records.result import Value, read_result

METRICS = ("--metrics", "psnr,psnr-global,ssim")
SECONDS = 0.15  # an image takes
SLOW = f"tiny={TINY}@noise=0.3@slow={SECONDS}"

Numbers = tuple[dict[str, Value], bytes, bytes]


def command(data: Path, out: Path, model: str = SLOW) -> list[str]:
    return ["run", "--models", model, "--data", str(data), "--out", str(out), "--res", "32", "--batch-size", "1",
            "--save-images", "2", *METRICS]  # fmt: skip


def measured(out: Path) -> int:
    """Samples on the disk so far."""
    return sum(len(np.load(path)["ids"]) for path in out.glob("*/*/.tiny-*/*.npz"))


def wait_for(out: Path, rows: int) -> None:
    until = time.monotonic() + 60
    while measured(out) < rows:
        assert time.monotonic() < until, "the run does not get on"
        time.sleep(0.01)


def numbers(out: Path) -> Numbers:
    """Metrics, per-image table and picture."""
    folder = out / "adm" / "photographs-32"
    table = gzip.decompress((folder / "tiny.per_image.csv.gz").read_bytes())
    return dict(read_result(folder / "tiny.json").metrics), table, (folder / "tiny.png").read_bytes()


@pytest.fixture(autouse=True, scope="module")
def every_image_is_stored_at_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # the processes are forks of this one
        patch.setattr(samples, "FLUSH_SECONDS", 0)
        yield


@pytest.fixture
def errors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("errors")


@pytest.fixture(scope="module")
def uninterrupted(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    """The numbers of one process that nobody disturbed."""
    out = tmp_path_factory.mktemp("one")
    (process,) = start(command(photographs, out), tmp_path_factory.mktemp("errors"))
    status, error = process.finish()
    assert status == 0, error
    return numbers(out)


def test_two_processes_killed_three_times_give_the_numbers_of_an_undisturbed_one(
    photographs: Path, tmp_path: Path, errors: Path, uninterrupted: Numbers
) -> None:
    dice = random.Random(os.getpid())
    for rows in (1, 3, 5):
        pair = start(command(photographs, tmp_path), errors, world=2)
        wait_for(tmp_path, rows + dice.randrange(3))
        time.sleep(dice.random() * SECONDS)
        for process in pair:
            process.signal(signal.SIGKILL)
        assert {process.finish()[0] for process in pair} == {-signal.SIGKILL}
        assert not list(tmp_path.glob("*/*/*.json"))
    assert 5 <= measured(tmp_path) < 12
    for process in start(command(photographs, tmp_path), errors, world=2):
        status, error = process.finish()
        assert status == 0, error
    assert numbers(tmp_path) == uninterrupted
    assert {path.name for path in tmp_path.iterdir()} == {"adm"}


def test_shards_at_different_times_merge_into_what_one_process_measures(
    photographs: Path, tmp_path: Path, uninterrupted: Numbers, tokbench: Callable[..., Ran]
) -> None:
    one = command(photographs, tmp_path, f"tiny={TINY}@noise=0.3")
    for shard in ("3/3", "1/3"):
        done = tokbench(*one, "--shards", shard)
        assert (done.status, done.out) == (0, "")
        assert f"shard {shard}: 1 done" in done.reason
    early = tokbench(*one, "--merge")
    assert early.status == 1
    assert "4 of 12 images are not measured yet" in early.err
    assert tokbench(*one, "--shards", "2/3").status == 0
    assert not list(tmp_path.glob("*/*/*.json"))
    assert tokbench(*one, "--merge").status == 0
    assert numbers(tmp_path) == uninterrupted
    made = read_result(tmp_path / "adm" / "photographs-32" / "tiny.json").provenance
    assert made.batch_size == 1
    assert made.seconds["decode"] > 0
    assert not list(tmp_path.glob("*/*/.tiny-*"))


@pytest.mark.parametrize("wrong", ["--shards 4/3", "--shards 1", "--shards 1/2 --merge", "--merge --fresh"])
def test_shards_that_do_not_exist_are_one_line(wrong: str, tokbench: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tokbench("run", "--models", "identity", "--out", tmp_path, *wrong.split())
    assert ran.status == 2
    assert "--shards" in ran.reason


def test_a_dying_process_ends_the_job_with_a_reason(photographs: Path, tmp_path: Path, errors: Path) -> None:
    first, second = start(command(photographs, tmp_path), errors, world=2)
    wait_for(tmp_path, 2)
    second.signal(signal.SIGKILL)
    second.finish()
    status, error = first.finish()
    assert status == 1
    assert "another process ended" in error.strip().splitlines()[-1]
    assert "Traceback" not in error


def test_an_error_of_one_process_is_the_error_of_all(photographs: Path, tmp_path: Path, errors: Path) -> None:
    model = f"tiny={TINY}@fault=nan,good={TINY}"
    for process in start(command(photographs, tmp_path, model), errors, world=2):
        status, error = process.finish()
        assert status == 1, error
    assert [path.stem for path in tmp_path.glob("*/*/*.json")] == ["good"]


def test_ctrl_c_says_how_to_go_on(photographs: Path, tmp_path: Path, errors: Path) -> None:
    (process,) = start(command(photographs, tmp_path), errors)
    wait_for(tmp_path, 2)
    process.signal(signal.SIGINT)
    status, error = process.finish()
    assert status == 130
    assert "the same command goes on" in error.strip().splitlines()[-1]
    assert "Traceback" not in error


def test_two_runs_of_one_cell_do_not_disturb_each_other(
    photographs: Path, tmp_path: Path, errors: Path, uninterrupted: Numbers
) -> None:
    (first,) = start(command(photographs, tmp_path), errors)
    wait_for(tmp_path, 1)
    first.signal(signal.SIGSTOP)
    (second,) = start(command(photographs, tmp_path), errors)
    status, error = second.finish()
    first.signal(signal.SIGCONT)
    assert status == 1
    assert "another run is at work in it" in error
    status, error = first.finish()
    assert status == 0, error
    assert numbers(tmp_path) == uninterrupted


def test_a_damaged_row_of_a_killed_run_is_named_and_measured_again(
    photographs: Path,
    tmp_path: Path,
    errors: Path,
    uninterrupted: Numbers,
    tokbench: Callable[..., Ran],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (process,) = start(command(photographs, tmp_path), errors)
    wait_for(tmp_path, 4)
    process.signal(signal.SIGKILL)
    process.finish()
    first, second = sorted(tmp_path.glob("*/*/.tiny-*/*.npz"))[:2]
    with np.load(first) as file:
        value = file["columns/psnr"].tobytes()
    data = bytearray(first.read_bytes())
    data[data.index(value) + 3] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-7])
    assert tokbench(*command(photographs, tmp_path)).status == 0
    assert all(f"{path.name}: damaged" in caplog.text for path in (first, second))
    assert numbers(tmp_path) == uninterrupted


def test_processes_meet_again_after_they_have_parted(tmp_path: Path) -> None:
    """torchrun's store keeps the addresses of the first meeting: the one that is early must not find them."""
    script = tmp_path / "meet.py"
    script.write_text(
        "import time\nfrom tokbench.runtime.processes import join\n"
        "for number in range(2):\n    with join() as processes:\n"
        "        assert processes.all_gather(processes.rank) == [0, 1]\n    time.sleep(processes.rank)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_incomplete_environment_of_torchrun_is_named(
    tokbench: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = tokbench("run", "--models", "identity")
    assert (ran.status, "RANK, MASTER_ADDR, MASTER_PORT is not set; start with torchrun" in ran.reason) == (2, True)
