"""RAEv2 (Singh et al., arXiv 2605.18324): a frozen DINOv3-L, whose last layers' mean a transformer decodes.

Facts from github.com/nanovisionx/RAEv2: images of 256 px, normalised by ImageNet's mean and deviation for the encoder
and in [0, 1] from the decoder; the layers' norm has no weights; the mean over the image of the last layer is added;
latents are normalised by statistics of every place. The decoder is RAE's, as diffusers has it. DINOv3 comes in the
layout of its authors, whose bias of keys is masked.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.families.rotary_vit import RotaryViT, ViTConfig, to_imagenet
from baselines.families.transformers import to_pixels
from baselines.hub import load_weights, part, read_tensors
from baselines.pretrained import Continuous, wrap
from baselines.published import PUBLISHED
from tokbench.errors import CellError

ENCODER = ViTConfig(1024, 24, 16, layer_scale=True)
PATCH, SIDE, STORAGE_TOKENS = 16, 16, 4
DECODER = {"width": 1152, "depth": 28, "heads": 16, "hidden": 4096}
CONFIGS = {  # layers that are averaged
    "raev2-k7": tuple(range(11, 24, 2)),
    "raev2-k23": tuple(range(1, 24)),
    "raev2-k7-general": tuple(range(11, 24, 2)),
    "raev2-k23-general": tuple(range(1, 24)),
}


class Encoder(RotaryViT):
    """[B, 3, 256, 256], as ImageNet is normalised, -> [B, 1024, 16, 16]"""

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__(ENCODER, PATCH, STORAGE_TOKENS)
        self.layers, self.norm = layers, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.outputs(x)
        kept = [F.layer_norm(outputs[layer], outputs[layer].shape[2:]) for layer in self.layers]
        tokens = torch.stack(kept).mean(0) + kept[-1].mean(1, keepdim=True)
        return tokens.mT.unflatten(2, (SIDE, SIDE))


class RAEv2(nn.Module):
    """The two networks with the methods that the adapter calls."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__()
        from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

        self.config = None
        self.encoder: nn.Module = Encoder(layers)
        self.decoder: Any = RAEDecoder(
            hidden_size=ENCODER.width,
            decoder_hidden_size=DECODER["width"],
            decoder_num_hidden_layers=DECODER["depth"],
            decoder_num_attention_heads=DECODER["heads"],
            decoder_intermediate_size=DECODER["hidden"],
            num_patches=SIDE**2,
            patch_size=PATCH,
        )
        self.decoder.register_buffer("decoder_pos_embed", self.decoder.decoder_pos_embed)  # it lies in the file

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """[B, 3, 256, 256] in [-1, 1] -> ([B, 1024, 16, 16],)"""
        return (self.encoder(to_imagenet(x)),)

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The other way."""
        return (to_pixels(self.decoder(z.flatten(2).mT).logits, PATCH, SIDE) * 2 - 1,)


def encoder_names(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv3's tensors without the norm and the mask of pre-training, which are not used, its biases masked."""
    own = {key: value for key, value in held.items() if not key.startswith(("norm.", "mask_token"))}
    masks = {key: own.pop(key) for key in list(own) if key.endswith(".bias_mask")}
    for key, mask in masks.items():
        bias = key.removesuffix("_mask")
        own[bias] = own[bias] * mask
    return own


def decoder_names(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's tensors under diffusers' names."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v"}
    own = {key.replace("attention.output.dense.", "attention.to_out.0."): value for key, value in held.items()}
    return {re.sub(r"attention\.attention\.(\w+)", lambda found: f"attention.{names[found[1]]}", key): value
            for key, value in own.items()}  # fmt: skip


def published(name: str, file: Path | None, random_weights: bool, weights: str | None) -> Continuous:
    """A row of CONFIGS from the folder `file`, laid out as the hub's, or from there, or with random weights.

    Raises CellError if a file is missing, damaged, pickled or does not fit.
    """
    row, model = PUBLISHED[name], RAEv2(CONFIGS[name])
    if random_weights:
        return wrap(model.eval(), row, random_weights)
    row = load_weights(model.encoder, part(row, file, row.file), row, weights, encoder_names)
    row = load_weights(model.decoder, part(row, file, f"{row.subfolder}/decoder.pt"), row, weights, decoder_names)
    path, shape = part(row, file, f"{row.subfolder}/stats.pt"), (ENCODER.width, SIDE, SIDE)
    held, _ = read_tensors(path, name)
    if not all(key in held and held[key].shape[-3:] == shape for key in ("mean", "var")):
        raise CellError(f"{name}: {path} does not hold mean and var of {' x '.join(map(str, shape))} values")
    tokenizer = wrap(model.eval(), row, random_weights)
    tokenizer.shift, tokenizer.scale = held["mean"].float(), (held["var"].float() + 1e-5).rsqrt()
    return tokenizer
