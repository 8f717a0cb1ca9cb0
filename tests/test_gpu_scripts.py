"""What `make gpu-check` and `make gpu-train` promise: a part that fails or takes too long stops no other."""

import signal
import time
from pathlib import Path

import pytest

from tests.gpu_check import Part, command, run_parts


def test_parts_that_fail_or_take_too_long_cost_themselves_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def fail() -> None:
        raise RuntimeError("no kernel image")

    def leave() -> None:
        raise SystemExit(2)

    parts = [
        Part("fails", 9, fail),
        Part("hangs", 0.05, lambda: time.sleep(60)),
        Part("leaves", 9, leave),
        Part("hangs in a process", 1, lambda: command(tmp_path / "said.txt", "timeit", "-n", "1", "while 1: pass")),
        Part("works", 9, lambda: done.append("works")),
    ]
    assert run_parts(parts, 60) == 1
    assert done == ["works"]
    said = capsys.readouterr().out.partition("== not done")[2].splitlines()[1:]
    assert [line.partition(":")[0] for line in said] == ["fails", "hangs", "leaves", "hangs in a process"]
    assert run_parts(parts[-1:], 60) == 0
    assert run_parts(parts[-1:], 0) == 1


def test_the_limit_holds_in_a_scripts_background_job_which_ignores_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run_parts([Part("hangs", 0.05, lambda: time.sleep(9))], 60) == 1
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(130)], ids=["here", "in a training"])
def test_ctrl_c_is_the_users(error: BaseException) -> None:
    def interrupt() -> None:
        raise error

    with pytest.raises(type(error)):
        run_parts([Part("interrupted", 9, interrupt)], 60)
