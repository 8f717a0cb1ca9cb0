"""DreamSim against its own package, on small networks with the package's files."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokbench import weights
from tokbench.metrics.dreamsim import dreamsim_network
from tokbench.weights.convert import DREAMSIM_PARTS


def small_vit(patch_size: int = 16, **_: Any) -> nn.Module:
    """The package's ViT at width 64 instead of 768; layer 11 is read, so twelve layers."""
    from dreamsim.feature_extraction.vision_transformer import VisionTransformer

    norm = partial(nn.LayerNorm, eps=1e-6)
    return VisionTransformer(patch_size=patch_size, embed_dim=64, depth=12, num_heads=1, qkv_bias=True, norm_layer=norm)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class EmptyHead(nn.Module):
    """Where the package puts the head of DINO that it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = [nn.Linear(1, 1) for _ in range(5)]
        self.last_layer = nn.Linear(1, 1)


def clip_state() -> dict[str, Tensor]:
    vit = small_vit()
    vit.pos_drop = nn.LayerNorm(64)
    state = {key: tensor + torch.randn_like(tensor) * 0.05 for key, tensor in vit.state_dict().items()}
    return state | {"proj": torch.randn(64, 32) / 8}


KINDS = {"dreamsim": ("ensemble", "ensemble"), "dreamsim-dino": ("dino_vitb16", "dino_vitb16_single")}


def fill(folder: Path, name: str) -> None:
    """The files that the package unpacks into its cache folder, small, with its names."""
    names = ("module.head.mlp.0", "module.head.mlp.2", "module.head.mlp.4")
    head = {f"{layer}.{part}": torch.zeros(1) for layer in names for part in ("weight", "bias")}
    torch.save(
        {"student": head | {"module.head.last_layer.weight": torch.zeros(1)}}, folder / "dino_vitb16_pretrain.pth"
    )
    if name == "dreamsim":
        for part in ("clip", "open_clip"):
            torch.save({"state_dict": clip_state()}, folder / f"{part}_vitb16_pretrain.pth.tar")
    adapter = folder / f"{KINDS[name][1]}_lora"
    adapter.mkdir()
    config = {"r": 4, "lora_alpha": 2, "lora_dropout": 0.3, "bias": "none", "target_modules": ["qkv"],
              "peft_type": "LORA"}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    place = "base_model.model.extractor_list.{}.model.blocks.{}.attn.qkv.lora_{}.weight"
    shapes = {"A": (4, 64), "B": (192, 4)}
    lora = {place.format(part, block, side): torch.randn(shape) * 0.1 for part in range(len(DREAMSIM_PARTS[name]))
            for block in range(12) for side, shape in shapes.items()}  # fmt: skip
    torch.save(lora, adapter / "adapter_model.bin")


@pytest.fixture(params=KINDS)
def package(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Any]]:
    """A network's name, and the package's own, built from the files that ours fetches from a server on this machine."""
    pytest.importorskip("dreamsim")
    from dreamsim import model
    from dreamsim.feature_extraction import extractor, load_clip_as_dino, load_open_clip_as_dino

    torch.manual_seed(0)
    name: str = request.param
    published, folder = tmp_path / "published", tmp_path / "unpacked"
    published.mkdir()
    folder.mkdir()
    dino = small_vit()
    dino.load_state_dict({key: tensor + torch.randn_like(tensor) * 0.05 for key, tensor in dino.state_dict().items()})
    torch.save(dino.state_dict(), published / "dino_vitbase16_pretrain.pth")
    fill(folder, name)
    archive = f"dreamsim_{KINDS[name][0]}_checkpoint"
    shutil.make_archive(str(published / archive), "zip", folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(published)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for network in ("dino-vitb16", name):
        entry = weights.NETWORKS[network]
        address = f"http://127.0.0.1:{server.server_port}/{entry.sources[0].file}"
        moved = replace(entry, sources=(replace(entry.sources[0], where=address),))
        monkeypatch.setitem(weights.NETWORKS, network, moved)
    for variable in ("TOKBENCH_WEIGHTS", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for module in (load_clip_as_dino, load_open_clip_as_dino):
        monkeypatch.setattr(module, "vit_base", small_vit)
    monkeypatch.setattr(extractor.torch.hub, "load", lambda *_: dino)  # never its remote code
    monkeypatch.setattr(extractor.torch.hub, "set_dir", lambda *_: None)
    monkeypatch.setattr(extractor, "DINOHead", lambda *_: EmptyHead())
    yield name, model.dreamsim(device="cpu", cache_dir=str(folder), dreamsim_type=KINDS[name][0])[0]
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore")
def test_dreamsim_fetched_as_published_equals_its_package(package: tuple[str, Any]) -> None:
    name, reference = package
    real, fake = torch.rand(2, 3, 224, 224), torch.rand(2, 3, 224, 224)
    network = dreamsim_network(name)
    with torch.no_grad():
        torch.testing.assert_close(network(real * 2 - 1, fake * 2 - 1), reference(real, fake), atol=1e-5, rtol=0)
        assert network(real, real).tolist() == [0, 0]
    first = weights.digest(name)
    kept = weights.locate(name)
    assert kept is not None
    assert first == weights.file_sha256(kept)
    kept.unlink()
    weights.fetch(name)
    assert weights.digest(name) == first


@pytest.mark.filterwarnings("ignore")
def test_native_dreamsim_equals_its_package_at_other_sizes(package: tuple[str, Any]) -> None:
    name, reference = package
    network = dreamsim_network(name, native=True)
    for size in ((64, 64), (32, 128), (64, 96)):
        real, fake = torch.rand(1, 3, *size), torch.rand(1, 3, *size)
        with torch.no_grad():
            found = network(real * 2 - 1, fake * 2 - 1)
            torch.testing.assert_close(found, reference(real, fake), atol=1e-5, rtol=0)
