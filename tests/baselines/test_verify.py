"""Running published rows with their files: what is said, and what is written down."""

import csv
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baselines import verify
from baselines.published import PUBLISHED, VERIFIED
from tests import ROOT
from tests.baselines.test_taesd import SHARED
from tokbench.registry import create
from tokbench.weights.files import file_sha256

PHOTOGRAPHS = ROOT / "tokbench" / "samples"


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A table and a cache of the test's, and no network."""
    monkeypatch.setattr(verify, "TABLE", tmp_path / "verified.csv")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TOKBENCH_OFFLINE", "1")
    return tmp_path / "verified.csv"


def written(table: Path) -> dict[str, dict[str, str]]:
    return {line["name"]: line for line in csv.DictReader(table.read_text(encoding="utf-8").splitlines())}


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
    assert said[3].startswith("0 of 2 work")
    assert not own_table.exists()


def test_an_unknown_name_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--models", "nonsense"]) == 2
    assert "no published row is called nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("psnr", "papers", "spread", "right", "said"),
    [
        (24.0, [22.0, 27.0], 4.0, True, "PSNR as printed (22.00, 27.00 dB) within 4 dB"),
        (28.5, [22.0, 27.0], 1.0, False, "range wrong: papers give 22.00, 27.00 dB on ImageNet"),
        (16.0, [], 4.0, True, "no paper's PSNR"),
        (9.0, [], 4.0, False, "range wrong: below 15 dB"),
    ],
)
def test_a_psnr_is_judged_by_what_papers_give(
    psnr: float, papers: list[float], spread: float, right: bool, said: str
) -> None:
    found, verdict = verify.judge(psnr, papers, spread)
    assert found is right
    assert verdict.startswith(said)


def test_papers_are_found_at_the_rows_resolution() -> None:
    assert verify.expected("open-magvit2-f8", 128) == [25.08]
    assert verify.expected("taef2", 256) == []


def test_a_row_is_written_down_with_its_files_and_left_out_next_time(
    own_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers", reason="a machine may have torch and no diffusers")
    from tests.baselines.test_pretrained import SD, save

    folder = save("AutoencoderKL", SD, tmp_path / "kl")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({"encoder.conv_in.bias": torch.zeros(8)}, tmp_path / "odd" / "diffusion_pytorch_model.safetensors")
    for name, place in (("sd-vae-ft-mse", folder), ("eq-vae", tmp_path / "odd")):
        row = replace(PUBLISHED[name], repo=str(place), resolution=32, scale=None)
        monkeypatch.setitem(PUBLISHED, name, row)
    monkeypatch.setattr(verify, "LEAST", 0.0)
    ask = ["--models", "eq-vae,sd-vae-ft-mse", "--data", str(PHOTOGRAPHS)]
    assert verify.main(ask) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[1].startswith("[1/2] eq-vae: keys differ: eq-vae: ")
    assert re.search(r"loads; samples at 32 px \d+.\d\d dB: no paper's .*; .*samples at 32 px", said.out)
    assert "[2/2] sd-vae-ft-mse: 0.00 GB" in said.err
    line = written(own_table)["sd-vae-ft-mse"]
    assert line["files"] == file_sha256(folder / "diffusion_pytorch_model.safetensors")
    monkeypatch.setitem(VERIFIED, "sd-vae-ft-mse", line)
    assert create("sd-vae-ft-mse").info.verified
    assert verify.main(["--models", "sd-vae-ft-mse"]) == 0
    assert "0 rows" in capsys.readouterr().out
    save_file({key: value + 1 for key, value in load_file(weights_of(folder)).items()}, weights_of(folder))
    assert not create("sd-vae-ft-mse").info.verified  # another file under the name


def weights_of(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def test_what_does_not_fit_on_the_disk_is_not_fetched(
    own_table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "size", lambda row: {"sdxl-vae": 10**18}.get(row.name, 2 * 10**9))
    assert verify.main(["--models", "sdxl-vae,eq-vae"]) == 1
    assert "[1/2] sdxl-vae: does not fit on the disk" in capsys.readouterr().out
    assert verify.main(["--models", "sdxl-vae,eq-vae", "--max-size", "1"]) == 0
    assert capsys.readouterr().out.startswith("0 rows, 0.0 GB by the hub,")


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the published files of TAEF2 are not here")
def test_a_row_that_works_is_written_down_as_the_table_has_it(
    own_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SHARED, tmp_path / "tokbench" / "models")
    assert verify.main(["--models", "taef2", "--again"]) == 0
    assert "taef2: loads; samples at 256 px 26.70 dB: no paper's PSNR" in capsys.readouterr().out
    assert written(own_table)["taef2"] | {"date": ""} == VERIFIED["taef2"] | {"date": ""}
