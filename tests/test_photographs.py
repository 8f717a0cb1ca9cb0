"""The list of photographs that Debian's packages carry, and the script that takes them out (results/photographs)."""

import csv
import dataclasses
import hashlib
import io
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from results import stages
from results.photographs import build
from tests import ROOT
from tokbench.data.open import SAMPLES
from tokbench.errors import InputError

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this machine")


def picture(seed: int, kind: str) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((96, 64)).save(file, kind)
    return file.getvalue()


def listed(name: str, content: bytes) -> build.Photograph:
    key = hashlib.sha256(content).hexdigest()
    return build.Photograph(name, "made", "made", "1.0", "usr/share/made", "CC0-1.0", "nobody", "copyright:1", "", key)


def package(folder: Path, *files: bytes) -> Path:
    """A folder with the package "made", of these files."""
    (folder / "made/DEBIAN").mkdir(parents=True)
    (folder / "made/DEBIAN/control").write_text(
        "Package: made\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: made\n"
    )
    for number, content in enumerate(files):
        (folder / f"made/{number}").write_bytes(content)
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", folder / "made", folder / "made_1.0_all.deb"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def table(path: Path, *photographs: build.Photograph) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(build.Photograph)])
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, photographs))
    return path


def test_the_list_is_sound() -> None:
    photographs = build.read_list(build.LIST)
    names = {photograph.name for photograph in photographs}
    assert len(names) == len({photograph.sha256 for photograph in photographs}) == len(photographs)
    assert {photograph.licence for photograph in photographs} == set(build.LICENCES)
    for photograph in photographs:
        assert photograph.name.startswith(photograph.subject), photograph
        assert len(bytes.fromhex(photograph.sha256)) == 32, photograph
        assert all(value for key, value in vars(photograph).items() if key != "url"), photograph


def test_the_list_names_no_photograph_of_training_development_or_test() -> None:
    attributions = (SAMPLES / "ATTRIBUTION.tsv", ROOT / "baselines/weights/ATTRIBUTION.tsv")
    known = {line.partition(".")[0] for path in attributions for line in path.read_text().splitlines()[1:]}
    known |= set(stages.DEVELOPMENT.read_text().split())
    assert not known & {photograph.name for photograph in build.read_list(build.LIST)}


@needs_dpkg
def test_photographs_are_found_by_their_hash_alone(tmp_path: Path) -> None:
    plain, inside = picture(0, "JPEG"), picture(1, "PNG")
    parts = b"".join(struct.pack(">I", len(part)) + part for part in (b"readme", inside))
    resource = struct.pack(">4s4I", b"qres", 1, 0, 20, 20 + len(parts)) + parts
    names = table(tmp_path / "list.csv", listed("made-a", plain), listed("made-b", inside))
    debs = package(tmp_path / "debs", plain, resource, b"else")
    said = build.build(tmp_path / "out", names, debs, [])
    assert "2 photographs" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ATTRIBUTION.tsv", "made-a.jpg", "made-b.jpg"]
    assert (tmp_path / "out/made-a.jpg").read_bytes() == plain
    error = np.asarray(Image.open(tmp_path / "out/made-b.jpg"), float) - np.asarray(Image.open(io.BytesIO(inside)))
    assert np.abs(error).mean() < 2
    line = (tmp_path / "out/ATTRIBUTION.tsv").read_text().splitlines()[1]
    assert line == "made-a.jpg\tnobody\tCC0-1.0\t\tmade 1.0 (deb)"
    with pytest.raises(InputError, match="exists"):
        build.build(tmp_path / "out", names, debs, [])


@needs_dpkg
def test_a_file_of_another_hash_costs_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = table(tmp_path / "list.csv", listed("made-a", picture(0, "JPEG")), listed("made-b", picture(1, "JPEG")))
    debs = package(tmp_path / "debs", picture(0, "JPEG"), picture(2, "JPEG"))
    monkeypatch.setattr(build, "LIST", names)
    monkeypatch.setattr("sys.argv", ["build", str(tmp_path / "out"), "--packages", str(debs)])
    with pytest.raises(SystemExit) as end:
        build.main()
    assert end.value.code == 2
    lacking = "1 not in their packages: made-b"
    assert capsys.readouterr().err == f"nothing written; {lacking} (--partial builds without them)\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["debs", "list.csv"]
    assert build.build(tmp_path / "out", names, debs, [], partial=True).endswith(lacking)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ATTRIBUTION.tsv", "made-a.jpg"]


@needs_dpkg
def test_a_damaged_package_is_named(tmp_path: Path) -> None:
    names = table(tmp_path / "list.csv", listed("made-a", picture(0, "JPEG")))
    (tmp_path / "made_1.0_all.deb").write_bytes(b"no package")
    with pytest.raises(InputError, match=r"made_1.0_all.deb: not a whole .deb"):
        build.build(tmp_path / "out", names, tmp_path, [])


def test_without_debians_tools_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="dpkg-deb is not here"):
        build.build(tmp_path / "out", build.LIST, None, [])


def test_a_crop_of_a_sample_at_another_size_is_a_near_copy() -> None:
    sample = (SAMPLES / "red-panda.jpg").read_bytes()
    other = {"crab": (SAMPLES / "crab.jpg").read_bytes()}
    assert build.check_apart({"made": sample}, other) > build.NEAR
    image, file = Image.open(io.BytesIO(sample)), io.BytesIO()
    image.resize((300, 300)).save(file, "JPEG", quality=60)
    with pytest.raises(InputError, match="made is a near copy of panda"):
        build.check_apart({"made": file.getvalue()}, {"panda": sample, **other})
    wide = Image.new("RGB", (900, 512), "gray")  # the sample is a square of it
    wide.paste(image, (194, 0))
    file = io.BytesIO()
    wide.save(file, "JPEG")
    with pytest.raises(InputError, match="made is a near copy of panda"):
        build.check_apart({"made": file.getvalue()}, {"panda": sample})
