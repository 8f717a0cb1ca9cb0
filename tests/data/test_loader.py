"""Laws of the loader: the same crops for any batch size, workers and cache; bad images stop it or are counted."""

import os
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokbench.data.crops import crop
from tokbench.data.loader import CropCache, Loader, refuse_unusable
from tokbench.data.open import SAMPLES, describe, open_source
from tokbench.data.sources import Source
from tokbench.errors import InputError
from tokbench.protocols import PROTOCOLS
from tokbench.runtime.seeding import image_seeds

ADM = PROTOCOLS["adm"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    root = tmp_path / "photos"
    root.mkdir()
    for i, path in enumerate(sorted(SAMPLES.glob("*.jpg"))[:9]):
        Image.open(path).resize((100 + i, 90)).save(root / f"{i}.png")
    return open_source(root)


def everything(loader: Loader) -> tuple[list[str], torch.Tensor]:
    batches = list(loader)
    return [name for ids, _ in batches for name in ids], torch.cat([images for _, images in batches])


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 2), (9, 1), (50, 2)])
def test_crops_do_not_depend_on_batch_size_or_workers(batch_size: int, workers: int, source: Source) -> None:
    ids, images = everything(Loader(source, 64, ADM, batch_size=batch_size, workers=workers))
    assert ids == source.ids
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    for i in range(len(source)):
        assert (images[i].permute(1, 2, 0).numpy() == crop(source.read(i), 64, ADM)).all()


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 2)])
def test_seeds_come_with_the_images_they_are_hashes_of(batch_size: int, workers: int, source: Source) -> None:
    batches = list(Loader(source, 32, ADM, batch_size=batch_size, workers=workers).seeded((0, 7)))
    assert sum(len(ids) for ids, _, _ in batches) == len(source)
    for _, images, seeds in batches:
        assert torch.equal(seeds, torch.stack([image_seeds(images, 0), image_seeds(images, 7)], dim=1))


def test_only_the_wanted_samples_come_in_the_wanted_order(source: Source) -> None:
    ids, images = everything(Loader(source, 64, ADM, batch_size=2, workers=0, indices=[7, 1, 4]))
    assert ids == ["7", "1", "4"]
    assert (images[1].permute(1, 2, 0).numpy() == crop(source.read(1), 64, ADM)).all()
    assert list(Loader(source, 64, ADM, batch_size=2, indices=[])) == []


def test_ranks_shares_are_every_image_exactly_once(source: Source) -> None:
    for world in (1, 2, 4, 16):
        shares = [list(range(rank, len(source), world)) for rank in range(world)]
        ids = [name for share in shares for name in everything_ids(source, share)]
        assert sorted(ids) == source.ids


def everything_ids(source: Source, share: list[int]) -> list[str]:
    return [name for ids, _ in Loader(source, 32, ADM, batch_size=2, workers=0, indices=share) for name in ids]


def test_a_tar_gives_the_same_batches_as_its_folder(source: Source, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(source.root, arcname=".")
    packed = everything(Loader(open_source(tmp_path / "a.tar"), 64, ADM, batch_size=4, workers=2))
    plain = everything(Loader(source, 64, ADM, batch_size=4, workers=2))
    assert packed[0] == plain[0]
    assert torch.equal(packed[1], plain[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_the_loader_with_one_line(workers: int, source: Source) -> None:
    path = source.root / "5.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"^[^\n]*5\.png: damaged[^\n]*$"):
        everything(Loader(source, 64, ADM, batch_size=4, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_and_counted_on_demand(workers: int, source: Source) -> None:
    (source.root / "5.png").write_bytes(b"")
    (source.root / "0.png").unlink()
    loader = Loader(source, 64, ADM, batch_size=1, workers=workers, skip_bad=True)
    ids, images = everything(loader)
    assert ids == ["1", "2", "3", "4", "6", "7", "8"]
    assert len(images) == 7
    assert loader.skipped.keys() == {"0", "5"}


def test_a_killed_loading_process_is_one_line_and_no_hang(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(source), "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="a loading process was killed"):
        everything(Loader(source, 64, ADM, batch_size=4, workers=2))


def test_small_images_are_enlarged_left_out_or_refused_as_the_protocol_says(source: Source) -> None:
    refuse, skip = (replace(ADM, small=rule) for rule in ("refuse", "skip"))
    refuse_unusable(source, 91, ADM)
    refuse_unusable(source, 90, refuse)
    with pytest.raises(InputError, match=r"9 images are smaller than 91: .*0\.png, .*4\.png and 4 more"):
        refuse_unusable(source, 91, refuse)
    with pytest.raises(InputError, match=r"0\.png: 100x90 is smaller than 91"):
        everything(Loader(source, 91, refuse, batch_size=4, workers=0))
    loader = Loader(source, "104x90", skip, batch_size=4, workers=0)
    assert everything(loader)[0] == ["4", "5", "6", "7", "8"]
    assert loader.skipped.keys() == {"0", "1", "2", "3"}
    loader = Loader(source, 96, ADM, batch_size=4, workers=0)
    assert everything(loader)[1].shape == (9, 3, 96, 96)
    assert loader.notes == {"enlarged": 9}


def test_images_are_turned_only_where_the_protocol_says_so(tmp_path: Path) -> None:
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:20] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    source, turning = open_source(tmp_path), replace(ADM, orientation="apply")
    assert any("1 image" in line for line in describe(source) if line.startswith("orientation"))
    for protocol, shape, notes in ((ADM, (3, 40, 64), {}), (turning, (3, 64, 40), {"turned as EXIF says": 1})):
        loader = Loader(source, "native", protocol, batch_size=4, workers=0)
        assert everything(loader)[1][0].shape == shape
        assert loader.notes == notes
    assert source.sizes(ADM) == [(64, 40)]
    assert source.sizes(turning) == [(40, 64)]
    assert ADM.fingerprint() != turning.fingerprint()


@pytest.mark.parametrize("workers", [0, 2])
def test_native_images_come_whole_in_batches_of_one_size(source: Source, tmp_path: Path, workers: int) -> None:
    Image.new("RGB", (100, 90), "red").save(source.root / "more.png")
    Image.new("RGB", (1, 50), "red").save(source.root / "narrow.png")
    source = open_source(source.root)
    cache = CropCache(tmp_path / "crops", source, "native", ADM)
    for _ in range(2):
        batches = list(Loader(source, "native", ADM, batch_size=2, workers=workers, cache=cache))
        assert sorted(name for ids, _ in batches for name in ids) == sorted(source.ids)
        assert ["0", "more"] in [ids for ids, _ in batches]
        for ids, images in batches:
            for name, image in zip(ids, images, strict=True):
                expected = np.asarray(source.read(source.ids.index(name)))
                assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_files_that_are_no_images_are_refused_before_the_start(source: Source) -> None:
    for name in ("2.png", "7.png"):
        (source.root / name).write_text("text")
    with pytest.raises(InputError, match=r"2\.png: not a readable image .*; .*7\.png: not a readable image"):
        refuse_unusable(open_source(source.root), 32, ADM)


def test_notes_are_counted_across_workers_and_from_the_cache(source: Source, tmp_path: Path) -> None:
    image = Image.open(source.root / "3.png").convert("RGBA")
    image.putalpha(100)
    image.save(source.root / "3.png")
    cache = CropCache(tmp_path / "crops", source, 64, ADM)
    for _ in range(2):
        loader = Loader(source, 64, ADM, batch_size=2, workers=2, cache=cache)
        everything(loader)
        assert loader.notes == {"transparent, put on white": 1}


def test_cached_crops_are_equal_and_not_decoded_again(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CropCache(tmp_path / "crops", source, 64, ADM)
    first = everything(Loader(source, 64, ADM, batch_size=4, workers=2, cache=cache))
    monkeypatch.setattr(Source, "load", lambda *_, **__: pytest.fail("decoded again"))
    again = everything(Loader(source, 64, ADM, batch_size=3, workers=0, cache=cache))
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])


def test_a_damaged_crop_is_decoded_again(source: Source, tmp_path: Path) -> None:
    cache = CropCache(tmp_path / "crops", source, 64, ADM)
    first = everything(Loader(source, 64, ADM, batch_size=4, workers=0, cache=cache))[1]
    kept = cache.folder / "4.npy"
    for length in (0, 50, 1000):
        kept.write_bytes(kept.read_bytes()[:length])
        assert cache.get(4) is None
    assert torch.equal(everything(Loader(source, 64, ADM, batch_size=4, workers=0, cache=cache))[1], first)
    assert cache.get(4) is not None


def test_crops_of_another_rule_size_or_content_are_kept_apart(source: Source, tmp_path: Path) -> None:
    paths = {CropCache(tmp_path, source, size, PROTOCOLS[name]).folder for size in (32, 64) for name in ("adm", "ssdd")}
    assert len(paths) == 4
    Image.fromarray(np.zeros((99, 99, 3), np.uint8)).save(source.root / "3.png")
    assert CropCache(tmp_path, open_source(source.root), 64, ADM).folder not in paths


def test_a_full_disk_only_costs_time(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CropCache(tmp_path / "crops", source, 64, ADM)
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    assert len(everything(Loader(source, 64, ADM, batch_size=4, workers=0, cache=cache))[0]) == len(source)
    assert list(cache.folder.iterdir()) == []


def test_crops_that_would_fill_the_disk_are_not_kept(source: Source, tmp_path: Path) -> None:
    for resolution in (64, "native"):
        assert CropCache.fits(tmp_path / "not" / "yet", source, resolution, ADM)
    assert not CropCache.fits(tmp_path, source, "9000000x9000000", ADM)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_strip_that_would_fill_the_memory_is_one_line(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (60_000, 2)).save(tmp_path / "strip.png")
    loader = Loader(open_source(tmp_path), 512, PROTOCOLS[name], batch_size=1)
    with pytest.raises(InputError, match=r"strip\.png: 60000x2: would have .* pixels at 512; leave it out"):
        list(loader)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (1, 40), (40, 1), (8000, 90), (16, 16), (17, 33)])
def test_crops_of_any_size_are_what_was_asked_for(name: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    for resolution, shape in ((32, (32, 32, 3)), ("48x32", (32, 48, 3)), ("native", (size[1], size[0], 3))):
        assert (crop(image, resolution, PROTOCOLS[name]) == (255, 0, 0)).all()
        assert crop(image, resolution, PROTOCOLS[name]).shape == shape


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_rectangle_is_cut_from_the_middle_after_covering_it(name: str) -> None:
    """Against torchvision's own two steps with sizes worked out by hand."""
    image = Image.open(next(SAMPLES.glob("*.jpg"))).resize((300, 200))
    wide = crop(image, "96x96", PROTOCOLS[name])
    assert np.array_equal(wide, crop(image, 96, PROTOCOLS[name]))
    part = crop(image, "144x96", PROTOCOLS[name])
    assert part.shape == (96, 144, 3)
    assert np.array_equal(part[:, 24:120], wide)  # 300x200 becomes 144x96 either way
