"""Laws of the sample store and of the files of a run."""

import errno
import json
import logging
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Ran
from tests.made_records import record
from tokbench.errors import InputError
from tokbench.records import files as store_module
from tokbench.records import samples
from tokbench.records.files import (
    hold,
    image_name,
    per_image_path,
    read_per_image,
    read_results,
    result_path,
    results_frame,
    write_per_image,
    write_whole,
)
from tokbench.records.result import read_result, read_speed, to_json
from tokbench.records.samples import SampleStore

IDS = [f"s{i}" for i in range(10)]
PSNR = np.random.default_rng(0).random(10) * 40
FEATURES = np.random.default_rng(1).random((10, 7), dtype=np.float32)


def fill(folder: Path, order: list[int], rank: int = 0, batch: int = 3) -> None:
    with SampleStore(folder, rank=rank) as store:
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            store.append([IDS[i] for i in part], {"psnr": PSNR[part]}, {("fake", "net"): FEATURES[part]})


def test_read_back_is_exact_and_in_id_order_for_any_order_and_ranks(tmp_path: Path) -> None:
    fill(tmp_path, [9, 1, 5, 3, 7], rank=1, batch=2)
    fill(tmp_path, [8, 0, 2, 4, 6], rank=0)
    store = SampleStore(tmp_path)
    assert store.ids == IDS
    assert (store.column("psnr") == PSNR).all()
    assert (store.features("fake", "net") == FEATURES).all()
    assert isinstance(store.features("fake", "net"), np.memmap)


def test_store_reads_its_own_appends(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    store.append(["b"], {"x": np.array([1.0])}, {("fake", "net"): FEATURES[:1]})
    store.append(["a"], {"x": np.array([2.0])}, {("fake", "net"): FEATURES[1:2]})
    assert store.column("x").tolist() == [2.0, 1.0]
    assert (store.features("fake", "net") == FEATURES[[1, 0]]).all()


@pytest.mark.parametrize("damage", ["torn", "flipped byte", "not an archive", "empty"])
def test_a_damaged_shard_is_named_and_costs_its_own_samples_only(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(samples, "FLUSH_SECONDS", 0)
    fill(tmp_path, list(range(10)), batch=2)
    path = sorted(tmp_path.iterdir())[2]
    with np.load(path) as file:
        lost = set(file["ids"])
    data = bytearray(path.read_bytes())
    data[data.index(FEATURES[IDS.index(min(lost))].tobytes()) + 5] ^= 1
    damaged = {"torn": data[:-5], "flipped byte": data, "not an archive": b"x" * 50, "empty": b""}
    path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert SampleStore(tmp_path).done(["psnr"], [("fake", "net")]) == set(IDS) - lost
    assert f"{path.name}: damaged" in caplog.text
    fill(tmp_path, [IDS.index(sample) for sample in lost])
    assert (SampleStore(tmp_path).features("fake", "net") == FEATURES).all()


@pytest.mark.parametrize(
    "broken",
    [
        {"ids": np.array(IDS[:3])}, {"columns/psnr": np.zeros((4, 2))}, {"columns/psnr": np.array(["1.5"] * 4)},
        {"fake/net": np.zeros((3, 7), np.float32)}, {"fake/net": np.array([b"x"] * 4)},
    ],
    ids=["fewer ids", "two columns in one", "texts", "fewer features", "bytes"],
)  # fmt: skip
def test_a_shard_of_other_arrays_is_one_line(
    broken: dict[str, np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Checksums are right, and what they are of is not."""
    arrays = {"ids": np.array(IDS[:4]), "columns/psnr": PSNR[:4], "fake/net": FEATURES[:4]} | broken
    np.savez(tmp_path / "000-a.npz", **arrays)
    store = SampleStore(tmp_path)
    if "fake/net" in broken:
        with pytest.raises(InputError, match=r"000-a\.npz: damaged \(.*\); remove it"):
            store.features("fake", "net")
    else:
        assert store.ids == []
        assert "000-a.npz: damaged" in caplog.text


def test_numpy_alone_opens_a_shard(tmp_path: Path) -> None:
    fill(tmp_path, [3, 1])
    (path,) = tmp_path.iterdir()
    with np.load(path) as file:
        assert set(file.files) == {"ids", "columns/psnr", "fake/net"}
        assert file["ids"].tolist() == ["s3", "s1"]
        assert (file["columns/psnr"] == PSNR[[3, 1]]).all()
        assert (file["fake/net"] == FEATURES[[3, 1]]).all()


def test_features_are_assembled_once_and_in_a_file(tmp_path: Path) -> None:
    fill(tmp_path, list(range(10)))
    store = SampleStore(tmp_path)
    assert store.features("fake", "net") is store.features("fake", "net")
    store.append(["z"], {"psnr": np.zeros(1)}, {("fake", "net"): FEATURES[:1]})
    assert store.features("fake", "net").shape == (11, 7)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npz"}


def test_later_rows_add_columns(tmp_path: Path) -> None:
    fill(tmp_path, list(range(10)))
    with SampleStore(tmp_path) as store:
        store.append(IDS, {"lpips": PSNR / 40})
    store = SampleStore(tmp_path)
    assert store.columns == ["lpips", "psnr"]
    assert store.done(["lpips", "psnr"], []) == set(IDS)
    assert store.done(["ssim"], []) == set()


def test_real_features_are_shared_and_survive_the_cell(tmp_path: Path) -> None:
    real = SampleStore(tmp_path / "real")
    store = SampleStore(tmp_path / "cell", real={"net": real})
    store.append(IDS, {"psnr": PSNR}, {("real", "net"): FEATURES, ("fake", "net"): FEATURES + 1})
    store.flush()
    with np.load(next((tmp_path / "cell").iterdir())) as file:
        assert "real/net" not in file.files
    shutil.rmtree(tmp_path / "cell")
    other = SampleStore(tmp_path / "other", real={"net": SampleStore(tmp_path / "real")})
    other.append(IDS[:4], {"psnr": PSNR[:4]})
    assert other.done([], [("real", "net")]) == set(IDS[:4])
    assert (other.features("real", "net") == FEATURES[:4]).all()


def test_missing_feature_is_named(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1])
    with SampleStore(tmp_path) as store:
        store.append(["zz"], {"psnr": np.zeros(1)})
        with pytest.raises(KeyError, match="zz"):
            store.features("fake", "net")


def test_two_stores_in_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    first, second = SampleStore(tmp_path), SampleStore(tmp_path)
    for i in range(10):
        (first if i % 2 else second).append([IDS[i]], {"psnr": PSNR[i : i + 1]}, {("fake", "net"): FEATURES[i : i + 1]})
        second.append([IDS[i]], {"psnr": PSNR[i : i + 1]}, {("fake", "net"): FEATURES[i : i + 1]})
    first.flush()
    second.flush()
    store = SampleStore(tmp_path)
    assert (store.column("psnr") == PSNR).all()
    assert (store.features("fake", "net") == FEATURES).all()


def test_held_folder_refuses_another_run_and_is_free_after_a_kill(tmp_path: Path) -> None:
    code = (
        f"import pathlib,time\nfrom tokbench.records.files import hold\nwith hold(pathlib.Path({str(tmp_path)!r})):\n"
    )
    code += " print('held', flush=True)\n time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another run"), hold(tmp_path):
            pass
        process.kill()
    with hold(tmp_path):
        pass


def test_who_holds_a_folder_removes_what_killed_writes_have_left(tmp_path: Path) -> None:
    code = f"""
import os, pathlib
from tokbench.records import files
files.os.replace = lambda *_: os.kill(os.getpid(), 9)
files.write_whole(pathlib.Path({str(tmp_path)!r}) / "last.ckpt", "whole")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (left,) = tmp_path.iterdir()
    for kept in (".hidden", "last.ckpt.0123abcd", ".crops-0123abcd"):
        (tmp_path / kept).write_text("")
    (tmp_path / ".folder.0123abcd").mkdir()
    with hold(tmp_path, shared=True):
        assert left.exists()
    with hold(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".crops-0123abcd",
            ".folder.0123abcd",
            ".hidden",
            "last.ckpt.0123abcd",
            "lock",
        ]


def test_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "a.json", "old")
    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_whole(tmp_path / "a.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_disk_that_fills_up_costs_nothing_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for a disk that fills up in the middle of a write."""
    fill(tmp_path, [0, 1, 2])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    store = SampleStore(tmp_path)
    store.append([IDS[3]], {"psnr": PSNR[3:4]})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            store.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    store.flush()  # space was made: what was waiting is stored
    assert SampleStore(tmp_path).done(["psnr"], []) == set(IDS[:4])


def test_a_disk_too_full_to_assemble_features_is_one_line_and_kills_nothing(tmp_path: Path) -> None:
    fill(tmp_path, list(range(10)))
    store = SampleStore(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            store.features("fake", "net")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (store.features("fake", "net") == FEATURES).all()


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_whole(tmp_path / "file" / "a.json", "x")
    with pytest.raises(InputError, match="cannot be written"), SampleStore(tmp_path / "file" / "cell") as store:
        store.append(["a"], {"psnr": np.zeros(1)})


def test_per_image_table_is_exact_and_deterministic(tmp_path: Path) -> None:
    columns = {"psnr": PSNR, "lpips": np.where(PSNR > 20, PSNR, np.nan)}
    paths = [tmp_path / "a.csv.gz", tmp_path / "b.csv.gz"]
    for path in paths:
        write_per_image(path, ['odd, "id"', *IDS[1:]], columns)
    ids, back = read_per_image(paths[0])
    assert ids[0] == 'odd, "id"'
    assert all(np.array_equal(back[name], columns[name], equal_nan=True) for name in columns)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    paths[0].write_bytes(paths[0].read_bytes()[:40])
    with pytest.raises(InputError, match=r"a\.csv\.gz"):
        read_per_image(paths[0])


def test_results_are_read_back_and_bad_files_named(tmp_path: Path) -> None:
    result = record("ssdd")
    path = result_path(tmp_path, result)
    write_whole(path, to_json(result))
    path.with_name("broken.json").write_text("{")
    results, warnings = read_results(tmp_path)
    assert results == [(path, result)]
    assert len(warnings) == 1
    assert "broken.json" in warnings[0]
    frame = results_frame(result for _, result in results)
    assert frame.loc[0, "name"] == "ssdd"
    assert frame.loc[0, "psnr"] == result.metrics["psnr"].value
    assert per_image_path(path).name == "ssdd.per_image.csv.gz"


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "a metric is a text": lambda made: made["metrics"].update(psnr="high"),
    "its value is a text": lambda made: made["metrics"]["psnr"].update(value="high"),
    "it counts in halves": lambda made: made["metrics"]["psnr"].update(n=2.5),
    "the data set is a text": lambda made: made.update(dataset="samples"),
    "the number of images is a text": lambda made: made["dataset"].update(num_images="29"),
    "settings are a list": lambda made: made.update(settings=[]),
    "seeds are texts": lambda made: made["settings"].update(seeds=["0"]),
    "the tokenizer has no name": lambda made: made["tokenizer"].update(name=None),
    "the measurement is another": lambda made: made.update(measurement={"dtype": "int8"}),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("command", ["check {0} --against {0}", "compare {0} {0}", "report --results {0}"])
def test_a_record_that_holds_another_type_is_one_line_of_every_command(
    command: str, wrong: str, tokbench: Callable[..., Ran], tmp_path: Path
) -> None:
    made = record("row").to_dict()
    WRONG[wrong](made)
    path = tmp_path / "row.json"
    path.write_text(json.dumps(made))
    ran = tokbench(*command.format(path).split())
    assert ran.status == 2
    assert f"{path}: " in ran.err
    assert "Traceback" not in ran.err
    with pytest.raises(InputError, match=r"row\.json: .* is no "):
        read_result(path)


@pytest.mark.parametrize("read", [read_result, read_speed])
def test_what_is_no_record_is_one_line(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    for text in ("[" * 100_000, '{"schema": ' + "9" * 5000 + "}", "[]", "\0", ""):
        path.write_text(text)
        with pytest.raises(InputError, match=r"row\.json: not a "):
            read(path)


def test_any_sample_id_names_a_file_of_its_own(tmp_path: Path) -> None:
    ids = ["a/b", "a%2Fb", "x" * 300, "x" * 299 + "y", "ü" * 100]
    names = [image_name(sample) for sample in ids]
    assert len(set(names)) == len(ids)
    for name in names:
        write_whole(tmp_path / name, b"")
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_a_held_folder_stays_only_if_something_was_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images"), hold(tmp_path / "empty"):
        raise InputError("no images")
    assert not (tmp_path / "empty").exists()
    with hold(tmp_path / "used"):
        (tmp_path / "used" / "rows").touch()
    assert (tmp_path / "used" / "rows").exists()
