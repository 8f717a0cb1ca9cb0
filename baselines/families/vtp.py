"""VTP (Yao et al., arXiv 2512.13687): a vision transformer pre-trained to tell, to describe and to reconstruct.

Facts from github.com/MiniMax-AI/VTP: images normalised by ImageNet's mean and deviation at both ends, patches of 16
pixels, 64 latent channels; sizes are in the config.json beside a model. What serves its text side is not read. Its
authors compute places in bfloat16, and train generators on latents normalised by statistics of their repository.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.rotary_vit import Places, RotaryBlock, RotaryViT, ViTConfig, from_imagenet, to_imagenet
from baselines.hub import load_weights, part, read_config
from baselines.pretrained import Continuous, wrap
from baselines.published import PUBLISHED
from tokbench.errors import CellError

NORMS = {"layernorm": (False, 1e-6), "layernormbf16": (False, 1e-5), "rmsnorm": (True, 1e-5)}
DEFAULTS = {  # of its config.json
    "vision_patch_size": 16, "vision_embed_dim": 768, "vision_depth": 12, "vision_num_heads": 12,
    "vision_ffn_layer": "swiglu", "vision_norm_layer": "rmsnorm", "vision_init_values": None,
    "vision_use_qk_norm": False, "vision_feature_bottleneck": 64,
    "decoder_embed_dim": 768, "decoder_depth": 12, "decoder_num_heads": 12, "decoder_ffn_layer": "swiglu",
    "decoder_norm_layer": "layernorm", "decoder_init_values": None, "decoder_use_qk_norm": False,
}  # fmt: skip


def vit(config: Mapping[str, Any], side: str) -> ViTConfig:
    """The transformer of "vision" or "decoder"."""
    rms_norm, eps = NORMS[config[f"{side}_norm_layer"]]
    return ViTConfig(
        config[f"{side}_embed_dim"],
        config[f"{side}_depth"],
        config[f"{side}_num_heads"],
        swiglu=config[f"{side}_ffn_layer"] == "swiglu",
        rms_norm=rms_norm,
        eps=eps,
        layer_scale=bool(config[f"{side}_init_values"]),
        qk_norm=config[f"{side}_use_qk_norm"],
        places_dtype=torch.bfloat16,
    )


class Encoder(RotaryViT):
    """[B, 3, H, W] -> [B, c, H / 16, W / 16]"""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(vit(config, "vision"), config["vision_patch_size"])
        width = config["vision_embed_dim"]
        self.patch = config["vision_patch_size"]
        self.feature_bottleneck = nn.Linear(width, config["vision_feature_bottleneck"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.feature_bottleneck(self.norm(self.outputs(x)[-1]))
        return tokens.mT.unflatten(2, (-1, x.shape[3] // self.patch))


class Decoder(nn.Module):
    """[B, c, h, w] -> [B, 3, 16 h, 16 w]"""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        transformer, self.patch = vit(config, "decoder"), config["vision_patch_size"]
        self.proj_in = nn.Conv2d(config["vision_feature_bottleneck"], transformer.width, 1)
        self.rope_embed = Places(transformer)
        self.blocks = nn.ModuleList(RotaryBlock(transformer) for _ in range(transformer.depth))
        self.norm = transformer.norm()
        self.proj_out = nn.Conv2d(transformer.width, 3 * self.patch**2, 1)

    def forward(self, z: Tensor) -> Tensor:
        tokens, places = self.proj_in(z).flatten(2).mT, self.rope_embed(*z.shape[2:])
        for block in self.blocks:
            tokens = block(tokens, places)
        return F.pixel_shuffle(self.proj_out(self.norm(tokens).mT.unflatten(2, z.shape[2:])), self.patch)


class VTP(nn.Module):
    """The two networks with the methods that the adapter calls."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = None
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, 3, H, W] in [-1, 1] -> ([B, c, H / 16, W / 16],)"""
        return (self.encoder(to_imagenet(x)),)

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The other way."""
        return (from_imagenet(self.decoder(z)),)


def below(held: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one network; the mask token is pre-training's."""
    own = {key.removeprefix(prefix): value for key, value in held.items() if key.startswith(prefix)}
    return {key: value for key, value in own.items() if key != "mask_token"}


def published(name: str, file: Path | None, random_weights: bool, weights: str | None) -> Continuous:
    """A row of the table from the folder `file` with config.json and model.safetensors, or from the hub.

    Raises CellError if a file is missing, damaged or does not fit, and for random weights: sizes are in the files.
    """
    row = PUBLISHED[name]
    if random_weights:
        raise CellError(f"{name}: its sizes are in its config.json only, there is none for random weights")
    config = DEFAULTS | read_config(part(row, file, "config.json"), name)
    path = part(row, file, "model.safetensors")
    model = VTP(config)
    for prefix, network in (("trunk.", model.encoder), ("pixel_decoder.", model.decoder)):
        row = load_weights(network, path, row, weights, partial(below, prefix=prefix))
    return wrap(model.eval(), row, random_weights)
