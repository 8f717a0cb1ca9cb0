"""Feature extractors against the packages that they stand for, on weight files made here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.metrics.test_metrics import noisy, photographs
from tokbench import weights
from tokbench.errors import InputError
from tokbench.metrics import extractors as features
from tokbench.metrics.extractors import DINOv2, Extractor, Inception, MobileNet, Shared, resize_positions


def of(network: nn.Module, name: str, dim: int) -> Extractor:
    return Extractor(name, dim, "", "", Shared(network.eval().requires_grad_(False)))


@pytest.mark.parametrize("size", [64, 320])
def test_inception_equals_torch_fidelity_with_its_resize(inception_file: Path, size: int) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    reference = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    images = photographs(size, 2)
    pooled, logits = reference(images)
    network = Inception(inception_file)
    scale = float(pooled.abs().max())
    assert scale > 1e-3
    torch.testing.assert_close(of(network, "inception", 2048)(images), pooled, atol=1e-5 * scale, rtol=0)
    found = of(network, "inception-logits", 1008)(images)
    torch.testing.assert_close(found, logits, atol=1e-5 * float(logits.abs().max()), rtol=0)


@pytest.fixture(params=["published", "random"])
def mobilenet(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """torchvision's network with the weights that ours loads."""
    from torchvision.models import mobilenet_v2

    network = mobilenet_v2()
    if request.param == "published":
        path = weights.locate("mobilenet")
        if path is None:
            pytest.skip("no weights of mobilenet")
        network.load_state_dict(weights.load(path))
        return network.eval()
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
            layer.momentum = None  # the statistics of the next batch, so that activations do not vanish
    nn.init.normal_(network.classifier[1].weight)
    with torch.no_grad():
        network.train()(features.normalised(photographs(224, 3), 224, "bilinear"))
    monkeypatch.setenv("TOKBENCH_WEIGHTS", str(tmp_path))
    kept = replace(weights.NETWORKS["mobilenet"], sha256="")
    monkeypatch.setitem(weights.NETWORKS, "mobilenet", kept)
    torch.save(network.state_dict(), tmp_path / kept.file)
    return network.eval()


@pytest.mark.filterwarnings("ignore")
def test_mobilenet_equals_torchvisions(mobilenet: Any) -> None:
    real = photographs(224, 2)
    with torch.no_grad():
        inputs = features.normalised(real, 224, "bilinear")
        pooled = mobilenet.features(inputs).mean((2, 3))
        top = mobilenet(inputs).argmax(1)
    made = features.extractors(["mobilenet", "mobilenet-class"])
    scale = float(pooled.abs().max())
    assert scale > 0.1
    torch.testing.assert_close(made["mobilenet"](real), pooled, atol=5e-5 * scale, rtol=0)  # random layers round worse
    assert made["mobilenet-class"](real).flatten().tolist() == top.tolist()
    path = weights.locate("mobilenet")
    assert path is not None
    assert made["mobilenet"].sha256 == weights.file_sha256(path)


@pytest.mark.usefixtures("mobilenet")
def test_features_do_not_depend_on_the_batch() -> None:
    extract = features.extractors(["mobilenet"])["mobilenet"]
    images = photographs(64, 3)
    alone = torch.cat([extract(image[None]) for image in images])
    torch.testing.assert_close(extract(images), alone, atol=1e-5, rtol=1e-5)
    assert (extract(noisy(images)) - alone).abs().max() > 0.1


def dinov2_file(folder: Path, image_size: int) -> tuple[Path, nn.Module]:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "patch_size": 14}
    network = Dinov2Model(Dinov2Config(image_size=image_size, **shape)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    network.save_pretrained(folder)  # with the names of the published file, whatever the modules are called
    path = folder / "model.safetensors"
    assert "encoder.layer.0.attention.attention.query.weight" in weights.load(path)
    return path, network


@pytest.mark.parametrize("names", ["published", "transformers 5"])
def test_dinov2_equals_transformers_whichever_names_the_file_has(tmp_path: Path, names: str) -> None:
    path, reference = dinov2_file(tmp_path, 224)
    if names == "transformers 5":
        tensors = dict(weights.load(path))
        for old, new in (("attention.query", "q_proj"), ("attention.key", "k_proj"), ("attention.value", "v_proj"),
                         ("output.dense", "o_proj")):  # fmt: skip
            tensors = {key.replace(f"attention.{old}", f"attention.{new}"): tensors[key] for key in tensors}
        save_file(tensors, path)
    images = photographs(224, 2)
    with torch.no_grad():
        expected = reference(pixel_values=features.normalised(images, 224, "bicubic")).pooler_output
    torch.testing.assert_close(of(DINOv2(path), "dinov2", 64)(images), expected, atol=1e-5, rtol=0)


def test_dinov2s_position_table_is_stretched_as_its_authors_do(tmp_path: Path) -> None:
    """Close to transformers' own stretching, which leaves the added 0.1 out, and not equal to it."""
    path, reference = dinov2_file(tmp_path, 518)
    images = photographs(224, 1)
    with torch.no_grad():
        theirs = reference(pixel_values=features.normalised(images, 224, "bicubic"))
    ours = of(DINOv2(path), "dinov2", 64)(images)
    difference = (ours - theirs.pooler_output).abs().max()
    assert 0 < difference < 0.1 * theirs.pooler_output.abs().max()
    table = torch.randn(1, 1 + 37 * 37, 8)
    assert resize_positions(table, 37, 37) is table
    assert resize_positions(table, 16, 16).shape == (1, 257, 8)
    assert torch.equal(resize_positions(table, 16, 16)[:, 0], table[:, 0])


def test_one_pass_serves_two_extractors() -> None:
    calls = []

    class Counting(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            calls.append(len(images))
            return {"a": images.float().mean((2, 3)), "b": images.float().sum((2, 3))}

    shared = Shared(Counting())
    first, second = Extractor("a", 3, "", "", shared), Extractor("b", 3, "", "", shared)
    images = photographs(32, 2)
    first(images)
    second(images)
    assert calls == [2]
    first(noisy(images))
    assert calls == [2, 2]


def test_wrong_images_and_names_are_refused() -> None:
    extract = Extractor("a", 3, "", "", Shared(nn.Identity()))
    with pytest.raises(InputError, match="expected uint8"):
        extract(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="expected uint8"):
        extract(torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(InputError, match="unknown feature extractor"):
        features.extractors(["vgg19"])


def test_a_file_of_other_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"x": torch.from_numpy(np.zeros(3))}, path)
    for name, build in (("mobilenet", MobileNet), ("inception", Inception), ("dinov2", DINOv2)):
        kind = features.Kind(name, build, 1, "")
        with pytest.raises(weights.WeightsError, match=f"does not hold the weights of {name}"):
            features._build(kind, path)
