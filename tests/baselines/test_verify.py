"""Running published rows with their files: what is said, and what is written down."""

import shutil
from pathlib import Path

import pytest

from baselines import verify
from baselines.published import PUBLISHED, VERIFIED
from tests.baselines.test_taesd import SHARED


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A table and a cache of the test's, and no network."""
    monkeypatch.setattr(verify, "TABLE", tmp_path / "verified.csv")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TOKBENCH_OFFLINE", "1")
    return tmp_path / "verified.csv"


def test_only_rows_of_the_table_are_verified() -> None:
    assert set(VERIFIED) <= set(PUBLISHED)
    assert all(set(line) == set(verify.COLUMNS) for line in VERIFIED.values())


def test_rows_that_cannot_be_had_are_said_and_do_not_stop_the_others(
    own_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main(["--models", "mar-kl16,titok-l32,taef2"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("2 rows, 0.0 GB by the hub,")
    assert said[0].endswith("1 left out")  # taef2 was run before
    assert said[1].startswith("[1/2] mar-kl16: mar-kl16: not on the hub; download kl16.ckpt")
    assert "is not on this machine and cannot be fetched" in said[2]
    assert not own_table.exists()


def test_an_unknown_name_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--models", "nonsense"]) == 2
    assert "no published row is called nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("psnr", "papers", "said"),
    [
        (24.0, [22.0, 27.0], ""),
        (31.5, [22.0, 27.0], "papers give 22.00, 27.00 dB on ImageNet"),
        (16.0, [], ""),
        (9.0, [], "below 15 dB"),
    ],
)
def test_a_psnr_is_judged_by_what_papers_give(psnr: float, papers: list[float], said: str) -> None:
    assert verify.judge(psnr, papers).startswith(said)
    assert bool(verify.judge(psnr, papers)) == bool(said)


def test_papers_are_found_at_the_rows_resolution() -> None:
    assert verify.expected("open-magvit2-f8", 128) == [25.08]
    assert verify.expected("taef2", 256) == []


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the published files of TAEF2 are not here")
def test_a_row_that_works_is_written_down_as_the_table_has_it(
    own_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SHARED, tmp_path / "tokbench" / "models")
    assert verify.main(["--models", "taef2", "--again"]) == 0
    assert "taef2: loads, 26.70 dB at 256 px" in capsys.readouterr().out
    written = own_table.read_text(encoding="utf-8").splitlines()[1].split(",")
    before = VERIFIED["taef2"]
    assert (written[0], written[2], written[3]) == ("taef2", before["psnr"], before["weights"])
