"""DreamSim (Fu et al. 2023): fine-tuned ViT-B/16 of DINO, alone or with CLIP's and OpenCLIP's, as one embedding.

Built from timm's vision transformer: the dreamsim package, which tests compare with, would fetch code through
torch.hub and run it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokbench import weights
from tokbench.metrics.extractors import IMAGENET_MEAN, IMAGENET_STD, resize_positions
from tokbench.weights.convert import DREAMSIM_PARTS

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE = 224  # pixels that DreamSim was trained at


class QuickGELU(nn.Module):
    """OpenAI CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class DreamSim(nn.Module):
    """1 - cosine of two embeddings: the class token of DINO before its last norm, and CLIP's two image embeddings.

    native: images keep their size, and position tables are stretched instead (SSDD's evaluation); else they are
    brought to 224 pixels, antialiased bicubic.
    """

    def __init__(self, tensors: Mapping[str, Tensor], parts: Sequence[str], *, native: bool = False) -> None:
        super().__init__()
        self.native = native
        self.parts = nn.ModuleDict({part: _transformer(tensors, part) for part in parts})
        for part in parts:
            mean, std = (IMAGENET_MEAN, IMAGENET_STD) if part == "dino" else (CLIP_MEAN, CLIP_STD)
            self.register_buffer(f"means_{part}", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
            self.register_buffer(f"stds_{part}", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.projections = nn.ParameterDict({part: nn.Parameter(tensors[f"{part}.proj"]) for part in parts[1:]})

    def features(self, images: Tensor) -> list[Tensor]:
        """float [B, 3, H, W] in [-1, 1] -> one embedding [B, D], without mean and of length one."""
        images = (images / 2 + 0.5).contiguous()
        if not self.native and images.shape[-2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(
                0, 1
            )
        parts = []
        for name, part in self.parts.items():
            part = self._fitted(part, *images.shape[-2:])
            tokens = (images - getattr(self, f"means_{name}")) / getattr(self, f"stds_{name}")
            tokens = part.patch_embed(tokens)
            tokens = part.norm_pre(
                part.pos_drop(torch.cat([part.cls_token.expand(len(images), -1, -1), tokens], 1) + part.table)
            )
            for block in part.blocks:
                tokens = block(tokens)
            token = tokens[:, 0]
            parts.append(token if name == "dino" else part.norm(token) @ self.projections[name])
        embedding = torch.cat(parts, 1)
        embedding = embedding - embedding.mean(1, keepdim=True)
        return [embedding / embedding.norm(dim=1, keepdim=True)]

    def _fitted(self, part: Any, height: int, width: int) -> Any:
        """The transformer with its position table for images of this size."""
        patch = part.patch_embed.proj.kernel_size[0]
        grid = height // patch, width // patch
        if part.grid != grid:
            part.table, part.grid = resize_positions(part.pos_embed, *grid), grid
        return part

    def distance(self, real: list[Tensor], fake: list[Tensor]) -> Tensor:
        """Two embeddings -> [B], from 0 to 2; half the squared distance, which is exactly 0 for equal ones."""
        return (real[0] - fake[0]).square().sum(1) / 2

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1], twice -> [B]."""
        return self.distance(self.features(real), self.features(fake))


def _transformer(tensors: Mapping[str, Tensor], part: str) -> Any:
    """A ViT of the sizes that the tensors have."""
    from timm.models.vision_transformer import VisionTransformer

    own = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
    own = {key: value for key, value in own.items() if key != "proj" and not key.startswith("head.")}
    width, _, patch, _ = own["patch_embed.proj.weight"].shape
    clip = part != "dino"
    depth = 1 + max(int(key.split(".")[1]) for key in own if key.startswith("blocks."))
    side = patch * round((own["pos_embed"].shape[1] - 1) ** 0.5)
    network: Any = VisionTransformer(
        img_size=side, patch_size=patch, embed_dim=width, depth=depth, num_heads=max(1, width // 64),
        num_classes=0, pre_norm=clip, act_layer=QuickGELU if part == "clip" else nn.GELU,
        norm_layer=partial(nn.LayerNorm, eps=1e-5 if clip else 1e-6), global_pool="token",
    )  # fmt: skip
    if clip:  # timm leaves the bias of the patches out where a norm follows; these files have one
        network.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
    network.patch_embed.strict_img_size = False
    network.load_state_dict(own)
    network.table, network.grid = None, None
    return network


def dreamsim_network(name: str = "dreamsim", *, native: bool = False) -> DreamSim:
    """DreamSim with its weights, frozen, on the CPU: (real, fake) in [-1, 1] -> [B]. WeightsError without them."""
    dino, path = weights.fetch("dino-vitb16"), weights.fetch(name)
    tensors = dict(weights.load(path)) | {f"dino.{key}": tensor for key, tensor in weights.load(dino).items()}
    try:
        for key in [key for key in tensors if key.endswith(".lora_A")]:
            layer = key.removesuffix(".lora_A")
            down, up = tensors.pop(key), tensors.pop(f"{layer}.lora_B")
            tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] + up @ down
        return DreamSim(tensors, DREAMSIM_PARTS[name], native=native).eval().requires_grad_(False)
    except (RuntimeError, KeyError, ValueError) as error:
        raise weights.WeightsError(f"{dino} and {path} do not hold the weights of {name} ({error})") from None
