"""The face of the command line: help, versions, completion, plans, reasons, widths."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import tokbench as tb
from tests import ROOT
from tests.conftest import TINY, Ran
from tokbench import cli, weights
from tokbench.runtime.terminal import stdout_console

Command = Callable[..., Ran]


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


APP: Any = typer.main.get_command(cli.app)
COMMANDS = dict(commands(APP))


@pytest.mark.parametrize("path", [path for path in COMMANDS if path[-1] != "list" or len(path) == 1], ids=" ".join)
def test_every_help_ends_with_examples_that_parse(path: tuple[str, ...], tokbench: Command) -> None:
    ran = tokbench(*path, "--help")
    assert ran.status == 0
    lines = ran.out.partition("Examples:\n")[2].partition("\n\n")[0].strip().splitlines()
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[: 1 + len(path)] == ["tokbench", *path]
        if "--help" not in words:
            COMMANDS[path].make_context(path[-1], words[1 + len(path) :])  # raises for what there is not


def test_the_first_help_cuts_no_sentence(tokbench: Command) -> None:
    ran = tokbench("--help")
    assert "..." not in ran.out.partition("Commands:")[2]
    assert all(f"\n  {path[0]} " in ran.out for path in COMMANDS)


def test_the_version_is_said(tokbench: Command) -> None:
    assert tokbench("--version").out == f"tokbench {tb.__version__}\n"


@pytest.mark.parametrize(
    ("words", "offered"), [("tokbench ru", "run"), ("tokbench run --models ssdd,klv", "ssdd,klvae")]
)
def test_shells_complete_commands_and_models(words: str, offered: str) -> None:
    environment = {**os.environ, "_TOKBENCH_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    code = "import sys; sys.argv = ['tokbench']; from tokbench.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert offered in done.stdout.split()


BROKEN = """
def load():
    return None.weights


class Late:
    networks = {}

    def __init__(self):
        from tokbench import TokenizerInfo

        self.info = TokenizerInfo("late", "late")

    def encode(self, images, *, sample, seeds):
        return images.float().foo

    def decode(self, latents, *, seeds, size):
        return latents
"""


@pytest.mark.parametrize(("name", "line"), [("load", 3), ("Late", 15)])
def test_a_models_own_error_is_placed_and_debug_shows_the_rest(
    name: str, line: int, tokbench: Command, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "broken.py").write_text(BROKEN)
    words = ["run", "--models", f"{tmp_path}/broken.py:{name}", "--data", photographs, "--res", "32", "--metrics",
             "psnr", "--out", tmp_path / "runs", "--limit", "1"]  # fmt: skip
    ran = tokbench(*words)
    assert ran.status == 1
    assert f"({tmp_path}/broken.py:{line})" in ran.err
    monkeypatch.setenv("TOKBENCH_DEBUG", "0")  # put back what --debug sets
    monkeypatch.setattr(sys, "argv", ["tokbench", *map(str, words), "--debug"])
    with pytest.raises(SystemExit):
        cli.main()
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert f'broken.py", line {line}' in err


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    tokbench: Command, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.txt").write_text(f"tiny={TINY}\nsd-vae-ft-mse\n")
    words = ("run", "--models", "models.txt", "--models", "identity", "--data", photographs, "--res", "32,40")
    ran = tokbench(*words, "--metrics", "psnr,pd-mobilenet", "--dry-run")
    assert ran.status == 0, ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["models.txt"]
    rows = [line.split()[0] for line in ran.out.splitlines() if " px " in line]
    assert rows == ["tiny", "tiny", "sd-vae-ft-mse", "sd-vae-ft-mse", "identity", "identity"]
    assert "unknown" in ran.out
    assert "sd-vae-ft-mse: from stabilityai/sd-vae-ft-mse, about 335 MB" in ran.err
    assert "MB free" in ran.err
    tokbench("run", "--models", f"tiny={TINY}", "--data", photographs, "--res", "32", "--metrics", "psnr")
    ran = tokbench(*words, "--metrics", "psnr", "--dry-run")
    assert "at least" in ran.out
    assert "there; answers unless" in " ".join(ran.out.split())


def test_the_doctor_names_what_is_missing_and_how_to_get_it(tokbench: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "locate", lambda name: Path("there") if name == "lpips-alex" else None)
    out = tokbench("doctor").out
    for word in ("python ", "torch ", "bfloat16", "cuda", "MB free", "ready: psnr", "lpips-alex"):
        assert word in out
    (line,) = [line for line in out.splitlines() if "no weights of dinov2" in line]
    assert line.split()[:4] == ["not", "yet:", "pd-dinov2,", "fd-dinov2,"]
    assert "`tokbench weights fetch dinov2` gets them (" in line


def test_a_pipe_is_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert stdout_console(100).width == 100
    monkeypatch.setenv("COLUMNS", "160")
    assert stdout_console(100).width == 160


def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = stdout_console(80)
    with console.capture() as capture:
        console.print("[red]loss[/red]")
    assert "\x1b[3" not in capture.get()  # bold and underlined are no colours


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(photographs: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tokbench", "run", "--models", f"slow={TINY}@slow=0.5", "--data", str(photographs),
             "--res", "32", "--metrics", "psnr", "--out", str(tmp_path), "--workers", "0"]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "tokbench: interrupted; the same command goes on from what is done"
    assert list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize(
    "command",
    [
        "check NONE --against NONE", "compare NONE NONE", "report --results NONE", "card NONE --benchmark a/b",
        "report --results results/adm --reported NONE", "report --results results/adm --votes NONE",
        "results add NONE", "score NONE NONE", "run --models identity --data NONE", "data info list:NONE",
        "generate --generator NONE --tokenizer identity --num-images 1 --reference samples",
        "train klvae --preset small --data samples --out OUT --from NONE",
    ],
)  # fmt: skip
def test_a_file_that_is_not_there_is_named_in_one_line(command: str, tokbench: Command, tmp_path: Path) -> None:
    places = {"NONE": tmp_path / "none", "OUT": tmp_path / "out", "results/adm": ROOT / "results" / "adm"}
    ran = tokbench(*(places.get(word, word) for word in command.replace("list:NONE", f"list:{tmp_path}/none").split()))
    assert ran.status == 2
    assert f"{tmp_path}/none" in ran.reason
    assert "Errno" not in ran.err
    assert len(ran.err.splitlines()) == 1
