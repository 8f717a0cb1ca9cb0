"""Laws of image sources: every layout, every file format, every way a file or an archive can be wrong."""

import io
import json
import os
import shutil
import tarfile
import time
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Ran
from tokbench.data import sources
from tokbench.data.open import SAMPLES, describe, open_source
from tokbench.data.sources import Source, class_labels, group_columns
from tokbench.errors import InputError
from tokbench.records.result import read_result


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def gray(value: int, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders with 12 images and things that are none."""
    root = tmp_path / "photos"
    for i in range(12):
        path = root / f"n{i % 3}" / f"img{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gray(i))
    (root / "labels.csv").write_text("x")
    (root / "n0" / "._img00.png").write_bytes(b"macOS")
    return root


def tar_of(folder: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, arcname=".")
    return path


def zip_of(folder: Path, path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return path


LAYOUTS: dict[str, Callable[[Path, Path], str]] = {
    "folder": lambda folder, out: f"folder:{folder}",
    "path": lambda folder, out: str(folder),
    "tar": lambda folder, out: str(tar_of(folder, out / "a.tar")),
    "zip": lambda folder, out: f"tar:{zip_of(folder, out / 'a.zip')}",
    "stored zip": lambda folder, out: str(zip_of(folder, out / "a.zip", zipfile.ZIP_STORED)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_data_set(layout: str, folder: Path, tmp_path: Path) -> None:
    plain = open_source(folder)
    source = open_source(LAYOUTS[layout](folder, tmp_path))
    assert source.ids == plain.ids == sorted(plain.ids)
    assert source.ids[0] == "n0/img00"
    assert source.fingerprint() == plain.fingerprint()
    assert [np.asarray(source.read(i))[0, 0, 0] for i in range(12)] == [int(x[-2:]) for x in source.ids]


def test_a_list_of_paths_is_read_relative_to_its_folder(folder: Path) -> None:
    (folder / "some.txt").write_text(f"n1/img01.png\n\nn0/img00.png\n{folder}/n2/img02.png\n")
    source = open_source(folder / "some.txt")
    assert sorted(source.ids)[:2] == ["n0/img00", "n1/img01"]
    assert [np.asarray(source.read(i))[0, 0, 0] for i in range(3)] == [int(x[-2:]) for x in source.ids]


def test_imagenet_has_the_same_ids_however_it_lies_on_disk(tmp_path: Path) -> None:
    flat, classes, kaggle, shipped = (tmp_path / name for name in ("flat", "classes", "kaggle", "shipped"))
    for i in range(4):
        name = f"ILSVRC2012_val_{i:08d}.JPEG"
        for place in (flat, classes / "val" / f"n{3 - i}", kaggle / "ILSVRC/Data/CLS-LOC/val"):
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(gray(i))
    shipped.mkdir()
    tar_of(flat, shipped / "ILSVRC2012_img_val.tar")
    found = [open_source(f"imagenet:{root}") for root in (flat, classes, kaggle, shipped)]
    assert all(source.ids == found[0].ids and source.name == "imagenet" for source in found)
    assert len({source.fingerprint() for source in found}) == 1
    assert "50000" in found[0].problems[0]
    with pytest.raises(InputError, match="holds no train"):
        open_source(f"imagenet:{classes}", "train")


def test_imagenet_training_tar_of_tars_is_read_in_place(folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    for part in ("n0", "n1", "n2"):
        tar_of(folder / part, inner / f"{part}.tar")
    root = tmp_path / "root"
    root.mkdir()
    tar_of(inner, root / "ILSVRC2012_img_train.tar")
    source = open_source(f"imagenet:{root}", "train")
    assert len(source) == 12
    assert [np.asarray(source.read(i))[0, 0, 0] for i in range(12)] == list(range(12))


def test_limit_takes_the_smallest_hashes_and_is_stable(folder: Path) -> None:
    five, seven = open_source(folder, limit=5), open_source(folder, limit=7)
    assert set(five.ids) < set(seven.ids)
    assert five.name == "photos-5"
    assert open_source(folder, limit=99).name == "photos"
    (folder / "n0" / "img00.png").rename(folder / "n0" / "zzz.png")
    assert len(set(open_source(folder, limit=5).ids) - set(five.ids)) <= 1
    with pytest.raises(InputError, match="at least 1"):
        open_source(folder, limit=0)


def test_split_is_a_subfolder(folder: Path) -> None:
    assert open_source(folder, "n1").name == "photos-n1"
    with pytest.raises(InputError, match="no split 'test'"):
        open_source(folder, "test")
    with pytest.raises(InputError, match="no splits"):
        open_source("samples", "val")
    (folder / "n0").rename(folder / "train")
    (folder / "n1").rename(folder / "val")
    with pytest.raises(InputError, match="choose one with --split"):
        open_source(folder)


def test_samples_all_have_an_attribution() -> None:
    lines = (SAMPLES / "ATTRIBUTION.tsv").read_text().splitlines()[1:]
    assert sorted(line.split("\t")[0] for line in lines) == sorted(path.name for path in SAMPLES.glob("*.jpg"))
    assert len(open_source("samples")) == len(lines) == 29


def test_fingerprint_follows_the_bytes(folder: Path) -> None:
    before = open_source(folder).fingerprint()
    path = folder / "n0" / "img00.png"
    path.write_bytes(gray(77))
    changed = open_source(folder).fingerprint()
    assert changed != before
    path.write_bytes(gray(0))
    assert open_source(folder).fingerprint() == before
    path.rename(folder / "n0" / "other.png")
    assert open_source(folder).fingerprint() != before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_run_reads_no_file(layout: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LAYOUTS[layout](folder, tmp_path)
    before = open_source(spec).fingerprint()
    monkeypatch.setattr(sources, "inspect", lambda *_: pytest.fail("read again"))
    assert open_source(spec).fingerprint() == before


def test_a_damaged_cache_is_named_and_made_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = open_source(folder).fingerprint()
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_bytes(path.read_bytes()[:-9])
    assert open_source(folder).fingerprint() == before
    assert "damaged" in caplog.text


def test_a_cache_that_cannot_be_written_only_warns(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_source(folder).fingerprint()
    assert "cannot be written" in caplog.text


def test_ids_that_clash_are_refused(folder: Path) -> None:
    (folder / "n0" / "img00.jpg").write_bytes(gray(0))
    with pytest.raises(InputError, match=r"n0/img00\.jpg and n0/img00\.png"):
        open_source(folder)


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "x/../../a.png", "C:\\a.png", "..\\a.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_whose_names_lead_out_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, gray(1))
    else:
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo(name)
            info.size = len(gray(1))
            tar.addfile(info, io.BytesIO(gray(1)))
    with pytest.raises(InputError, match="leads out"):
        open_source(path)


def test_damaged_archives_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.tar").write_bytes(b"junk" * 500)
    with pytest.raises(InputError, match="not a readable tar"):
        open_source(tmp_path / "junk.tar")
    with pytest.raises(InputError, match=r"a\.tar: a compressed tar cannot be read in place; unpack it"):
        open_source(tar_of(folder, tmp_path / "a.tar", "w:gz"))
    path = zip_of(folder, tmp_path / "a.zip", zipfile.ZIP_STORED)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(gray(9), gray(9)[:40] + b"x" + gray(9)[41:]))
    with pytest.raises(InputError, match=r"a\.zip:n0/img09\.png: cannot be read \(Bad CRC-32"):
        open_source(path).read(3)
    tar = tar_of(folder, tmp_path / "b.tar")
    source = open_source(tar)
    tar.write_bytes(tar.read_bytes()[: source.entries[-1].offset + 10])
    with pytest.raises(InputError, match="ends inside"):
        source.read(len(source) - 1)


def test_symlink_loops_end_and_are_noted(folder: Path) -> None:
    (folder / "n0" / "up").symlink_to(folder)
    (folder / "again").symlink_to(folder / "n1")
    source = open_source(folder)
    assert len(source) == 12
    assert len(source.problems) == 2


def test_linked_folders_and_files_are_followed(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "n").symlink_to(folder / "n1")
    (other / "x.png").symlink_to(folder / "n0" / "img00.png")
    assert open_source(other).ids == ["n/img01", "n/img04", "n/img07", "n/img10", "x"]


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    root = tmp_path / "odd"
    root.mkdir()
    try:
        with open(os.fsencode(root) + b"/caf\xe9.png", "wb") as file:
            file.write(gray(5))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    source = open_source(root)
    assert source.ids == ["caf\\xe9"]
    assert source.read(0).getpixel((0, 0)) == (5, 5, 5)
    assert source.fingerprint() == open_source(tar_of(root, tmp_path / "odd.tar")).fingerprint()
    source.ids[0].encode()
    source.where(0).encode()


def test_a_hundred_thousand_entries_are_listed_in_seconds(tmp_path: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    for i in range(100_000):
        if i % 30_000:
            os.link(root / f"{i // 30_000 * 30_000}.png", root / f"{i}.png")
        else:
            (root / f"{i}.png").write_bytes(gray(0))
    start = time.process_time()
    assert len(open_source(root, limit=10)) == 10
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "text", ["nowhere", "folder:nowhere", "tar:nowhere.tar", "list:nowhere.txt", "imagenet:nowhere"]
)
def test_what_is_not_there_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match="nowhere"):
        open_source(text)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images"):
        open_source(tmp_path / "empty")


# Files


def test_vanished_and_unreadable_files_are_named(folder: Path) -> None:
    source: Source = open_source(folder)
    (folder / "n0" / "img00.png").unlink()
    (folder / "n0" / "img03.png").unlink()
    (folder / "n0" / "img03.png").mkdir()
    for i in range(2):
        with pytest.raises(InputError, match=rf"n0/img0{3 * i}\.png: cannot be read"):
            source.read(i)


def test_info_is_a_command(tokbench: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tokbench("data", "info", "samples", "--limit", 3)
    assert ran.status == 0
    assert "samples-3" in ran.out
    assert "JPEG 3" in ran.out
    ran = tokbench("data", "info", tmp_path / "nowhere")
    assert (ran.status, ran.out) == (2, "")
    assert "nowhere" in ran.reason


def test_info_tells_what_a_run_would_meet(folder: Path) -> None:
    (folder / "n0" / "broken.png").write_bytes(gray(1)[:-30])
    (folder / "n0" / "text.jpg").write_text("not an image")
    (folder / "n1" / "loop").symlink_to(folder)
    text = "\n".join(describe(open_source(folder), decode=True))
    assert "images       14" in text
    assert "8x6 to 8x6" in text
    assert "PNG 13" in text
    assert "problems     3" in text
    assert all(name in text for name in ("broken.png: damaged", "text.jpg: not a readable image", "n1/loop"))


@pytest.mark.parametrize("features", [{}, {"label": {"_type": "Value", "dtype": "int64"}, "image": {"_type": "Image"}}])
def test_parquet_rows_are_samples(features: dict[str, object], tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the hf extra")
    import pyarrow as pa
    import pyarrow.parquet

    images = [{"bytes": gray(i), "path": None} for i in range(3)]
    table = pa.table(
        {"label": [0, 1, 2], "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    )
    if features:  # what `datasets` itself writes, so that the column is an Image
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pa.parquet.write_table(table, tmp_path / "part.parquet")
    for spec in (f"hf:{tmp_path}", str(tmp_path / "part.parquet")):
        source = open_source(spec)
        assert source.ids == ["00000000", "00000001", "00000002"]
        assert [source.read(i).getpixel((0, 0))[0] for i in range(3)] == [0, 1, 2]
        assert source.fingerprint() == open_source(spec).fingerprint()


@pytest.mark.parametrize("value", ["1", "true", "0", ""])
def test_offline_means_data_sets_too(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the hf extra")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("TOKBENCH_OFFLINE", value)
    with pytest.raises(InputError, match="cannot be loaded"):
        open_source(f"hf:{tmp_path}")
    assert os.environ["HF_DATASETS_OFFLINE"] == ("1" if value in ("1", "true") else "0")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_replacements_are_seen(layout: str, folder: Path, tmp_path: Path) -> None:
    """Other bytes of equal size and time, in place or under the name, as `cp -p`, `rsync -t` and tar leave them."""
    path = folder / "n0" / "img00.png"
    one, other = [data for data in map(gray, range(256)) if len(data) == len(gray(1))][:2]

    def fingerprint(data: bytes, written: Path) -> str:
        written.write_bytes(data)
        os.utime(written, (10**9, 10**9))
        written.replace(path)
        spec = LAYOUTS[layout](folder, tmp_path)
        for archive in tmp_path.glob("a.*"):
            os.utime(archive, (10**9, 10**9))
        return open_source(spec).fingerprint()

    before = fingerprint(one, path)
    assert fingerprint(other, path) != before
    assert fingerprint(one, tmp_path / "new.png") == before


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_files_that_are_not_read_are_counted_and_named(kind: str, folder: Path, tmp_path: Path) -> None:
    for name in ("a.npy", "b.npy", "n0/c.dng", "d.txt", "._e.heic", ".f.npy"):
        (folder / name).write_bytes(b"x")
    path = {"folder": lambda: folder, "tar": lambda: tar_of(folder, tmp_path / "a.tar"),
            "zip": lambda: Path(shutil.make_archive(str(tmp_path / "a"), "zip", folder))}[kind]()  # fmt: skip
    source = open_source(path)
    assert len(source) == 12
    assert source.problems == ["3 files of types that are not read here: .npy 2, .dng 1"]
    assert any(".npy 2" in line for line in describe(source))


def test_other_types_that_pillow_reads_are_images(tmp_path: Path) -> None:
    for suffix in ("gif", "jp2", "ppm", "tga", "webp"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{suffix}.{suffix}")
    assert open_source(tmp_path).ids == ["gif", "jp2", "ppm", "tga", "webp"]


def test_links_inside_a_tar_are_images_too(folder: Path, tmp_path: Path) -> None:
    os.link(folder / "n0" / "img00.png", folder / "n1" / "hard.png")
    (folder / "n1" / "soft.png").symlink_to("../n0/img00.png")
    (folder / "n1" / "again.png").symlink_to("soft.png")
    (folder / "n1" / "broken.png").symlink_to("nothing.png")
    source = open_source(tar_of(folder, tmp_path / "a.tar"))
    assert len(source) == 15
    assert source.problems == ["1 links lead to nothing in it"]
    assert open_source(tmp_path / "a.tar").problems == source.problems  # from the cache
    for name in ("hard", "soft", "again"):
        assert source.read(source.ids.index(f"n1/{name}")).getpixel((0, 0)) == (0, 0, 0)


def test_a_webdataset_has_one_image_a_sample(tmp_path: Path) -> None:
    root = tmp_path / "web"
    root.mkdir()
    for i in range(3):
        (root / f"{i:03d}.jpg").write_bytes(gray(i))
        (root / f"{i:03d}.seg.png").write_bytes(gray(99))
        (root / f"{i:03d}.json").write_text("{}")
    source = open_source(tar_of(root, tmp_path / "web.tar"))
    assert source.ids == ["000", "001", "002"]
    assert source.problems == ["3 images .seg.png beside their sample's own are not read"]
    assert len(open_source(root)) == 6  # in a folder each file is a sample


def test_lists_saved_on_windows_are_read(folder: Path) -> None:
    (folder / "some.txt").write_bytes(b"\xef\xbb\xbfn0/img00.png\r\nn1/img01.png\r\n")
    source = open_source(folder / "some.txt")
    assert source.ids == ["n0/img00", "n1/img01"]
    assert [source.read(i).getpixel((0, 0))[0] for i in range(2)] == [0, 1]


def test_names_with_line_breaks_stay_one_line_and_a_list_is_text(folder: Path) -> None:
    (folder / "some.txt").write_bytes(b"n0/img00.png\nn1/b\x0b.png\n")
    source = open_source(folder / "some.txt")
    assert source.ids == ["n0/img00", "n1/b\\x0b"]
    with pytest.raises(InputError, match=r"n1/b\\x0b\.png: cannot be read"):
        source.load(1)
    (folder / "other.txt").write_bytes(b"n0/img00.png\n\0")
    with pytest.raises(InputError, match=r"other.txt: not a list of paths"):
        open_source(folder / "other.txt")


def test_composed_and_decomposed_names_are_the_same_ids_and_it_is_said(
    tokbench: Callable[..., Ran], tmp_path: Path
) -> None:
    for form in ("NFC", "NFD"):
        (tmp_path / form).mkdir()
        (tmp_path / form / (unicodedata.normalize(form, "café") + ".png")).write_bytes(gray(5, (16, 16)))
    (tmp_path / "NFC" / "b.dng").touch()
    composed, decomposed = open_source(tmp_path / "NFC"), open_source(tmp_path / "NFD")
    assert composed.ids == decomposed.ids
    assert composed.fingerprint() == decomposed.fingerprint()
    assert decomposed.read(0).getpixel((0, 0)) == (5, 5, 5)
    ran = tokbench("score", tmp_path / "NFC", tmp_path / "NFD", "--metrics", "psnr", "--out", tmp_path / "runs")
    assert ran.status == 0
    assert "note: nfd: 1 names in Unicode's decomposed form (NFD); their ids are composed (NFC)" in ran.err
    assert "note: nfc: 1 files of types that are not read here: .dng 1" in ran.err


def test_the_column_of_images_is_chosen_or_asked_for(tokbench: Callable[..., Ran], tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the hf extra")
    import pyarrow as pa
    import pyarrow.parquet

    def write(name: str, **columns: list[bytes | None]) -> str:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        arrays = {key: pa.array([value and {"bytes": value, "path": None} for value in values], kind)
                  for key, values in columns.items()}  # fmt: skip
        pa.parquet.write_table(pa.table(arrays), tmp_path / f"{name}.parquet")
        return f"hf:{tmp_path / name}.parquet"

    both = write("both", conditioning_image=[gray(1)], image=[gray(2)])
    assert open_source(both).read(0).getpixel((0, 0)) == (2, 2, 2)
    assert open_source(f"{both}#conditioning_image").read(0).getpixel((0, 0)) == (1, 1, 1)
    neither = write("neither", a=[gray(1)], b=[gray(2)])
    with pytest.raises(InputError, match=r"images in the columns a, b; choose one, hf:.*#a"):
        open_source(neither)
    with pytest.raises(InputError, match="no column c among a, b"):
        open_source(f"{neither}#c")
    three = write("rows", image=[gray(1), None, b"rubbish"])
    rows = open_source(three)
    problems = [fact.problem for fact in rows.facts()]
    assert problems[0] == ""
    assert "row 1: cannot be read (no image in its column image)" in problems[1]
    assert "row 2: not a readable image" in problems[2]
    for index in (1, 2):
        with pytest.raises(InputError, match=f"row {index}: "):
            rows.load(index)
    command = ("run", "--models", "identity", "--data", three, "--res", 8, "--metrics", "psnr", "--out", tmp_path)
    ran = tokbench(*command)
    assert (ran.status, "row 1: " in ran.reason, "row 2: " in ran.reason) == (2, True, True)
    assert tokbench(*command, "--skip-bad").status == 0
    (path,) = tmp_path.glob("adm/*/*.json")
    assert read_result(path).settings.skipped == 2


def test_columns_that_sort_rows_into_groups_are_known_by_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the hf extra")
    rows = {
        "image": [{"bytes": gray(i), "path": None} for i in range(4)], "label": [0, 1, 1, 0],
        "light": ["day", "night", "day", "day"], "caption": list("abcd"), "score": [0.1, 0.2, 0.3, 0.4],
    }  # fmt: skip
    features = datasets.Features({
        "image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]),
        "light": datasets.Value("string"), "caption": datasets.Value("string"), "score": datasets.Value("float32"),
    })  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "part.parquet")
    found = group_columns(open_source(f"hf:{tmp_path}"))
    assert found == {"label": ["cat", "dog", "dog", "cat"], "light": ["day", "night", "day", "day"]}


def test_the_folders_of_images_are_classes(folder: Path, tmp_path: Path) -> None:
    for spec in (folder, tar_of(folder, tmp_path / "a.tar")):
        source = open_source(spec)
        assert group_columns(source)["class"] == [sample.partition("/")[0] for sample in source.ids]
        assert class_labels(source)[1] == sorted(set(group_columns(source)["class"]))
    assert group_columns(open_source("samples", limit=3)) == {}
