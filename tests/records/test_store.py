"""Laws of the sample store and of the files of a run."""

import errno
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.made_records import record
from tokbench.errors import InputError
from tokbench.records import files as store_module
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
from tokbench.records.result import to_json
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
    store.close()


def test_torn_tail_costs_only_its_own_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, list(range(10)))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        store = SampleStore(tmp_path)
        assert store.done(["psnr"], [("fake", "net")]) == set(IDS[:-1])
    assert "rows-000" in caplog.text
    assert "fake-net-000" in caplog.text
    fill(tmp_path, [9])
    assert (SampleStore(tmp_path).features("fake", "net") == FEATURES).all()


def test_flipped_byte_is_detected_and_only_its_record_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, list(range(10)))
    for pattern, at in (("rows-*", 30), ("fake-*", 60)):
        (path,) = tmp_path.glob(pattern)
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1
        path.write_bytes(raw)
    store = SampleStore(tmp_path)
    assert store.done(["psnr"], []) == set(IDS[1:])
    assert store.done([], [("fake", "net")]) == set(IDS[1:])
    assert "damaged" in caplog.text


def test_damaged_feature_header_sets_the_file_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, list(range(10)))
    (path,) = tmp_path.glob("fake-*")
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert SampleStore(tmp_path).done(["psnr"], [("fake", "net")]) == set()
    assert path.name in caplog.text


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
    assert not list((tmp_path / "cell").glob("real-*.bin"))
    store.close()
    real.close()
    shutil.rmtree(tmp_path / "cell")
    other = SampleStore(tmp_path / "other", real={"net": SampleStore(tmp_path / "real")})
    other.append(IDS[:4], {"psnr": PSNR[:4]})
    assert other.done([], [("real", "net")]) == set(IDS[:4])
    assert (other.features("real", "net") == FEATURES[:4]).all()
    other.close()


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
    first.close()
    second.close()
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


def test_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "a.json", "old")
    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_whole(tmp_path / "a.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_append_that_fits_only_in_part_leaves_none_of_it(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that fills up in the middle of a write."""
    code = f"""
import pathlib, resource, numpy
from tokbench.errors import InputError
from tokbench.records.samples import SampleStore
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = SampleStore(pathlib.Path({str(tmp_path)!r}))
for i in range(20):
    try:
        store.append([f"s{{i}}"], {{"psnr": numpy.ones(1)}}, {{("fake", "net"): numpy.ones((1, 20))}})
    except InputError as error:
        print(i, error)
        break
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot be written" in process.stdout
    assert SampleStore(tmp_path).done(["psnr"], [("fake", "net")]) == {
        f"s{i}" for i in range(int(process.stdout.split()[0]))
    }


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_whole(tmp_path / "file" / "a.json", "x")
    with pytest.raises(InputError, match="cannot be written"):
        SampleStore(tmp_path / "file" / "cell").append(["a"], {"psnr": np.zeros(1)})


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
