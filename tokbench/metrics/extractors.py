"""Frozen feature extractors behind one signature: uint8 [B, 3, H, W] -> float32 [B, D], on the images' device.

    extract = extractors(["mobilenet"], device)["mobilenet"]  # fetches the weights if they are not here
    extract(images)                                           # [B, 1280]
    extract.name, extract.dim, extract.identity               # identity: weights, library and preprocessing

| name | network | features | preprocessing |
|---|---|---|---|
| inception | FID's Inception, torch-fidelity's port | pool3, 2048 | TF1 bilinear resize to 299, (x - 128) / 128 |
| inception-logits | the same | 1008 logits without bias | the same |
| mobilenet | MobileNetV2, torchvision's weights | pooled, 1280 | antialiased bilinear to 224, ImageNet's mean and std |
| mobilenet-class | the same | index of the top class, 1 | the same |
| dinov2 | DINOv2 ViT-L/14 | normalised class token, 1024 | antialiased bicubic to 224, ImageNet's mean and deviation |

Extractors of one network made together share it, and one pass serves both when they see the same batch.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tokbench import weights
from tokbench.errors import InputError
from tokbench.metrics import EXTRACTORS, Kind
from tokbench.records import provenance
from tokbench.runtime.device import precision

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images: Tensor, size: int, mode: str) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, size, size], antialiased and in ImageNet's mean and deviation."""
    images = images.float() / 255
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode=mode, antialias=True, align_corners=False)
    return imagenet_normalised(images).contiguous(memory_format=torch.channels_last)


def imagenet_normalised(images: Tensor) -> Tensor:
    """float [B, 3, H, W] in [0, 1] -> in ImageNet's mean and deviation. Does not wait for a GPU."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean.to(images.device, non_blocking=True)) / std.to(images.device, non_blocking=True)


def fold_norms(network: nn.Module) -> nn.Module:
    """Put each batch norm that follows a convolution into its weights: the same function, fewer passes over memory."""
    for parent in network.modules():
        children = list(parent.named_children())
        for (name, layer), (next_name, after) in pairwise(children):
            if isinstance(layer, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(layer, after))
                setattr(parent, next_name, nn.Identity())
    return network


class Inception(nn.Module):
    """torch-fidelity's Inception, batch norms folded, in channels_last. -> {"inception", "inception-logits"}"""

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # Its constructor unpickles whatever is in the file: hand it a copy made of tensors that were loaded safely.
        copy = io.BytesIO()
        torch.save(weights.load(path), copy)
        copy.seek(0)
        self.network: Any = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=copy)
        fold_norms(self.network).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        (pooled,) = self.network(images)
        return {"inception": pooled, "inception-logits": pooled @ self.network.fc.weight.T}


def _conv(width: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)]


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, filter each channel, narrow; a residual where the shape stays."""

    def __init__(self, width: int, out: int, stride: int, widening: int) -> None:
        super().__init__()
        inner = width * widening
        wide = [nn.Sequential(*_conv(width, inner, 1), nn.ReLU6())] if widening > 1 else []
        depthwise = nn.Sequential(*_conv(inner, inner, 3, stride, inner), nn.ReLU6())
        self.conv = nn.Sequential(*wide, depthwise, *_conv(inner, out, 1))
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNet(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) with the keys of torchvision, whose import takes longer than its work here.

    -> {"mobilenet", "mobilenet-class"}
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Sequential(*_conv(3, 32, 3, 2), nn.ReLU6())]
        width = 32
        for widening, out, count, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for index in range(count):
                blocks.append(InvertedResidual(width, out, stride if index == 0 else 1, widening))
                width = out
        self.features = nn.Sequential(*blocks, nn.Sequential(*_conv(320, 1280, 1), nn.ReLU6()))
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(1280, 1000))  # torchvision has its dropout first
        self.load_state_dict(weights.load(path))
        fold_norms(self.eval()).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pooled = self.features(normalised(images, 224, "bilinear")).mean((2, 3))
        return {"mobilenet": pooled, "mobilenet-class": self.classifier(pooled).argmax(1, True).float()}


# What transformers 5 renamed within its modules; files, the published one too, keep the names on the left.
DINOV2_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def _dinov2_name(key: str) -> str:
    """A tensor's name in transformers 5, from either version's."""
    for old, new in DINOV2_RENAMED.items():
        key = key.replace(old, new)
    return key


class DINOv2(nn.Module):
    """DINOv2 ViT-L/14 through transformers, its size read from the file. -> {"dinov2"}

    The position table of 37 x 37 patches is brought to 16 x 16 as in DINOv2's own code: bicubic, with 0.1 added to
    the target size (transformers leaves that out).
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model

        tensors = dict(weights.load(path))
        key = "embeddings.position_embeddings"
        width, patch = tensors[key].shape[-1], tensors["embeddings.patch_embeddings.projection.weight"].shape[-1]
        depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer."))
        tensors[key] = resize_positions(tensors[key], 224 // patch, 224 // patch)
        config = Dinov2Config(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=max(1, width // 64), image_size=224,
            patch_size=patch,
        )  # fmt: skip
        self.network = Dinov2Model(config)
        own = {_dinov2_name(key): key for key in self.network.state_dict()}  # as the installed transformers calls them
        renamed = {_dinov2_name(key): tensor for key, tensor in tensors.items()}
        self.network.load_state_dict({own.get(key, key): tensor for key, tensor in renamed.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"dinov2": self.network(pixel_values=normalised(images, 224, "bicubic")).pooler_output}


def resize_positions(table: Tensor, height: int, width: int) -> Tensor:
    """[1, 1 + s * s, C] -> [1, 1 + height * width, C], the class token's entry kept."""
    start = round((table.shape[1] - 1) ** 0.5)
    if start == height == width:
        return table
    grid = table[:, 1:].reshape(1, start, start, -1).permute(0, 3, 1, 2)
    factors = ((height + 0.1) / start, (width + 0.1) / start)
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, height * width, -1)], 1)


OURS = {
    "inception": Kind("inception", Inception, 2048, "tf1-bilinear-299"),
    "inception-logits": Kind("inception", Inception, 1008, "tf1-bilinear-299"),
    "mobilenet": Kind("mobilenet", MobileNet, 1280, "antialiased-bilinear-224"),
    "mobilenet-class": Kind("mobilenet", MobileNet, 1, "antialiased-bilinear-224"),
    "dinov2": Kind("dinov2", DINOv2, 1024, "antialiased-bicubic-224"),
}


def kinds() -> dict[str, Kind]:
    """All extractors by name, those of plugins included."""
    return OURS | EXTRACTORS


class Shared:
    """A network and its answer to the last batch: several extractors ask about the same one."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.images: Tensor | None = None
        self.answer: dict[str, Tensor] = {}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        if images is not self.images:
            with precision(images.device, torch.float32):  # whatever the model ran under
                self.answer = self.network(images)
            self.images = images
        return self.answer


@dataclass(frozen=True)
class Extractor:
    """uint8 [B, 3, H, W] -> float32 [B, dim] on the images' device, without waiting for it."""

    name: str
    dim: int
    sha256: str  # of the weights
    identity: str  # equal identities give equal features of equal images
    shared: Shared

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"{self.name}: expected uint8 [B, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        return self.shared(images)[self.name]


def extractors(names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Extractor]:
    """Extractors by name on a device, networks shared. InputError for an unknown one, WeightsError without weights."""
    made: dict[str, tuple[Shared, str]] = {}
    found, known = {}, kinds()
    for name in names:
        if name not in known:
            raise InputError(f"unknown feature extractor {name!r}: choose from {', '.join(known)}")
        kind = known[name]
        if (network := kind.network or name) not in made:
            path = weights.fetch(kind.network) if kind.network else None
            made[network] = Shared(_build(kind, path).to(device)), weights.file_sha256(path) if path else ""
        shared, sha256 = made[network]
        code = provenance.versions(("torch", weights.NETWORKS[kind.network].library) if kind.network else ("torch",))
        identity = f"{name}-{kind.preprocessing}-{provenance.key(sha256, code)[:16]}"
        found[name] = Extractor(name, kind.dim, sha256, identity, shared)
    return found


def _build(kind: Kind, path: Path | None) -> nn.Module:
    try:
        network: nn.Module = kind.build(path)
        return network.eval().requires_grad_(False)
    except (RuntimeError, KeyError, ValueError) as error:  # a file of other tensors
        raise weights.WeightsError(f"{path} does not hold the weights of {kind.network} ({error})") from None
