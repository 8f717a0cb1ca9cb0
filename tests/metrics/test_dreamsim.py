"""DreamSim against its own package, on small networks with the package's files."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokbench import weights
from tokbench.metrics.dreamsim import dreamsim_network


def small_vit(patch_size: int = 16, **_: Any) -> nn.Module:
    """The package's ViT at width 64 instead of 768; layer 11 is read, so twelve layers."""
    from dreamsim.feature_extraction.vision_transformer import VisionTransformer

    norm = partial(nn.LayerNorm, eps=1e-6)
    return VisionTransformer(patch_size=patch_size, embed_dim=64, depth=12, num_heads=1, qkv_bias=True, norm_layer=norm)


def clip_state() -> dict[str, Tensor]:
    vit = small_vit()
    vit.pos_drop = nn.LayerNorm(64)
    state = {key: tensor + torch.randn_like(tensor) * 0.05 for key, tensor in vit.state_dict().items()}
    return state | {"proj": torch.randn(64, 32) / 8}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's network, built from the files that it leaves in its cache folder, and that folder in our store."""
    pytest.importorskip("dreamsim")
    from dreamsim import model
    from dreamsim.feature_extraction import extractor, load_clip_as_dino, load_open_clip_as_dino

    torch.manual_seed(0)
    folder = tmp_path / "dreamsim"
    (folder / "ensemble_lora").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    dino = small_vit()
    dino.load_state_dict({key: tensor + torch.randn_like(tensor) * 0.05 for key, tensor in dino.state_dict().items()})
    torch.save(dino.state_dict(), folder / "checkpoints" / "dino_vitbase16_pretrain.pth")
    names = ("module.head.mlp.0", "module.head.mlp.2", "module.head.mlp.4")
    head = {f"{name}.{part}": torch.zeros(1) for name in names for part in ("weight", "bias")}
    torch.save(
        {"student": head | {"module.head.last_layer.weight": torch.zeros(1)}}, folder / "dino_vitb16_pretrain.pth"
    )
    for name in ("clip", "open_clip"):
        torch.save({"state_dict": clip_state()}, folder / f"{name}_vitb16_pretrain.pth.tar")
    config = {
        "r": 4,
        "lora_alpha": 2,
        "lora_dropout": 0.3,
        "bias": "none",
        "target_modules": ["qkv"],
        "peft_type": "LORA",
    }
    (folder / "ensemble_lora" / "adapter_config.json").write_text(json.dumps(config))
    place = "base_model.model.extractor_list.{}.model.blocks.{}.attn.qkv.lora_{}.weight"
    shapes = {"A": (4, 64), "B": (192, 4)}
    lora = {place.format(part, block, side): torch.randn(shape) * 0.1 for part in range(3) for block in range(12)
            for side, shape in shapes.items()}  # fmt: skip
    torch.save(lora, folder / "ensemble_lora" / "adapter_model.bin")
    for module in (load_clip_as_dino, load_open_clip_as_dino):
        monkeypatch.setattr(module, "vit_base", small_vit)
    monkeypatch.setattr(extractor.torch.hub, "load", lambda *_: dino)  # never its remote code
    monkeypatch.setattr(extractor.torch.hub, "set_dir", lambda *_: None)
    monkeypatch.setenv("TOKBENCH_WEIGHTS", str(tmp_path))
    return model.dreamsim(device="cpu", cache_dir=str(folder))[0]


@pytest.mark.filterwarnings("ignore")
def test_dreamsim_equals_its_package(package: Any) -> None:
    real, fake = torch.rand(2, 3, 224, 224), torch.rand(2, 3, 224, 224)
    network = dreamsim_network()
    with torch.no_grad():
        expected = package(real, fake)
        torch.testing.assert_close(network(real * 2 - 1, fake * 2 - 1), expected, atol=1e-5, rtol=0)
        assert network(real, real).tolist() == [0, 0]
    assert weights.locate("dreamsim") is not None


@pytest.mark.filterwarnings("ignore")
def test_native_dreamsim_equals_its_package_at_another_size(package: Any) -> None:
    real, fake = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = package(real, fake)
        found = dreamsim_network(native=True)(real * 2 - 1, fake * 2 - 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
