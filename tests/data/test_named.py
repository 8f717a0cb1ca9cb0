"""Data sets with a name: fetched from a server on this machine by the code that fetches the real ones."""

import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Ran
from tokbench.data import named
from tokbench.data.named import SETS, DataSet, fetch_set
from tokbench.data.open import open_source
from tokbench.errors import InputError


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two data sets as their publisher has them: three files, and two zips of two."""
    folder = tmp_path / "published"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    for name in ("first", "second"):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for number in range(2):
                archive.writestr(f"pictures/{number}.png", picture(number + len(name)))
            archive.writestr("pictures/readme.txt", "text")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    files = tuple(f"{address}/{number}.png" for number in range(3))
    monkeypatch.setitem(SETS, "loose", DataSet("loose", "three files", 3, "CC0", 500, files))
    zips = (f"{address}/first.zip", f"{address}/second.zip")
    monkeypatch.setitem(SETS, "zipped", DataSet("zipped", "two zips", 4, "MIT", 900, zips))
    monkeypatch.setenv("TOKBENCH_DATA", str(tmp_path / "sets"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TOKBENCH_OFFLINE", raising=False)
    yield folder
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("name", "ids"), [
    ("loose", ["0", "1", "2"]),
    ("zipped", [f"{name}/pictures/{number}" for name in ("first", "second") for number in range(2)]),
])  # fmt: skip
def test_a_set_is_fetched_once_with_its_licence_and_opened_by_name(
    name: str, ids: list[str], published: Path, tokbench: Callable[..., Ran], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"{name}: not in .*`tokbench data fetch {name}` gets it"):
        open_source(name)
    assert f"tokbench data fetch {name}" in tokbench("data", "list").out
    ran = tokbench("data", "fetch", name)
    assert ran.status == 0
    assert f"licence: {SETS[name].licence}" in ran.err
    assert "fingerprint" in ran.out
    source = open_source(name)
    assert (source.name, source.ids, source.problems) == (name, ids, [])
    assert f"at {tmp_path / 'sets' / name}" in tokbench("data", "list").out
    for path in published.iterdir():
        path.unlink()
    assert fetch_set(name) == tmp_path / "sets" / name  # nothing is fetched twice
    assert [path.name for path in (tmp_path / "sets").iterdir()] == [name]
    assert tokbench("run", "--models", "identity", "--res", "8", "--data", name, "--metrics", "psnr", "--out",
                    tmp_path / "runs").status == 0  # fmt: skip


def test_an_interrupted_fetch_goes_on(published: Path, tmp_path: Path) -> None:
    whole = (published / "second.zip").read_bytes()
    (published / "second.zip").unlink()
    with pytest.raises(InputError, match="goes on from what is there"):
        fetch_set("zipped")
    assert not named.folder_of("zipped").exists()
    (published / "first.zip").unlink()  # is here already
    (published / "second.zip").write_bytes(whole)
    fetch_set("zipped")
    assert len(open_source("zipped")) == 4


def test_a_known_fingerprint_and_number_are_checked(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_set("loose")
    right = open_source("loose").fingerprint()
    for fingerprint, number in ((right, 3), ("0" * 64, 3), ("", 9)):
        known = DataSet("loose", "", number, "CC0", fingerprint=fingerprint)
        monkeypatch.setitem(SETS, "loose", known)
        if fingerprint == "0" * 64:
            with pytest.raises(InputError, match="not the images of loose"):
                open_source("loose")
        else:
            assert open_source("loose").problems == (["3 images; loose has 9"] if number == 9 else [])


@pytest.mark.usefixtures("published")
def test_what_is_not_fetched_says_where_to_put_it(
    monkeypatch: pytest.MonkeyPatch, tokbench: Callable[..., Ran]
) -> None:
    for command in (("data", "fetch", "imagenet-val"), ("data", "info", "imagenet-val")):
        ran = tokbench(*command)
        assert (ran.status, "register at image-net.org" in ran.reason) == (2, True)
    assert tokbench("data", "fetch", "nothing").status == 2
    monkeypatch.setenv("TOKBENCH_OFFLINE", "1")
    assert "TOKBENCH_OFFLINE" in tokbench("data", "fetch", "loose").reason


def test_every_set_says_what_it_is() -> None:
    for one in SETS.values():
        assert one.summary
        assert one.licence
        assert bool(one.files) != bool(one.by_hand)
        assert len(one.sha256) in (0, len(one.files))
