"""Published tokenizers: published.csv says where each is, its latent space and licence. Never imports torch.

Latents travel normalised, (z - shift) * scale. `scale` None: what the checkpoint's own config says. `config` rebuilds
the architecture for `random_weights`; None: the class's defaults are the published model's.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Published:
    """A row of published.csv, whose columns these are; an empty one is the default, `losses` are cut at spaces.

    `kind` is the diffusers class, or the module of baselines.families that reads the checkpoint ("ldm", "taesd", ...).
    """

    name: str
    family: str
    kind: str
    downsample: int | None = None  # None: a sequence of tokens without a grid
    repo: str = ""
    channels: int | None = None
    codebook_size: int | None = None
    tokens_per_image: int | None = None
    codes_per_position: int = 1
    subfolder: str = ""
    file: str = ""  # of an LDM checkpoint
    scale: float | None = None
    shift: float = 0.0
    latent_space: str = ""  # decoders of one latent space can be swapped; the name if not given
    params: float | None = None  # millions of parameters of both networks; None: only its files say
    resolution: int | None = None  # the only one that it decodes to
    decode_steps: int | None = None
    losses: tuple[str, ...] = ()
    trained_on: str = ""
    licence: str = ""
    paper: str = ""
    note: str = ""
    config: Mapping[str, Any] | None = None
    files: tuple[Path, ...] = ()  # that its weights were read from, once they are


def _levels(count: int) -> dict[str, Any]:
    return {"down_block_types": ("DownEncoderBlock2D",) * count, "up_block_types": ("UpDecoderBlock2D",) * count}


def _kl(channels: int, quant: bool = True) -> dict[str, Any]:
    """Latent diffusion's kl-f8 network, shared by every Stable Diffusion and by FLUX.1."""
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": channels}
    return {**_levels(4), **widths, "use_quant_conv": quant, "use_post_quant_conv": quant}


def _dc(levels: int, channels: int) -> dict[str, Any]:
    """DC-AE for ImageNet and the mixed set: residual blocks at the three finest levels, linear attention below."""
    widths = (128, 256, 512, 512, 1024, 1024, 2048, 2048)[:levels]
    deep = levels - 3
    config: dict[str, Any] = {
        "latent_channels": channels,
        "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * deep,
        "decoder_act_fns": ("relu",) * 3 + ("silu",) * deep,
        "encoder_layers_per_block": (0, 4, 8) + (2,) * deep,
        "decoder_layers_per_block": (0, 5, 10) + (2,) * deep,
    }
    for side in ("encoder", "decoder"):
        config[f"{side}_block_types"] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * deep
        config[f"{side}_block_out_channels"] = widths
        config[f"{side}_qkv_multiscales"] = ((),) * levels
    return config


_CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "sd-vae-ft-mse",
            "sd-vae-ft-ema",
            "sd15-vae",
            "sdxl-vae",
            "sdxl-vae-fp16-fix",
            "eq-vae",
            "eq-vae-ema",
            "e2e-sdvae",
            "flextok-vae-c4",
        ),
        _kl(4),
    ),
    "flextok-vae-c8": _kl(8),
    "flextok-vae-c16": _kl(16),
    **dict.fromkeys(("sd3-vae", "flux1-vae", "e2e-sd3.5-vae", "e2e-flux-vae"), _kl(16, quant=False)),
    **dict.fromkeys(("dc-ae-f32c32-in", "dc-ae-f32c32-mix"), _dc(6, 32)),
    **dict.fromkeys(("dc-ae-f64c128-in", "dc-ae-f64c128-mix"), _dc(7, 128)),
    **dict.fromkeys(("dc-ae-f128c512-in", "dc-ae-f128c512-mix"), _dc(8, 512)),
    "dc-ae-f32c32-sana": {
        "latent_channels": 32,
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
    },
    "dc-ae-lite-f32c32-sana": {
        "latent_channels": 32,
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "decoder_block_types": "ResBlock",
        "decoder_layers_per_block": (0, 3, 5, 4, 4, 4),
        "downsample_block_type": "conv",
        "decoder_conv_act_fn": "silu",
    },
    "taesd3": {"latent_channels": 16},
    "taef1": {"latent_channels": 16},
    "flux2-small-decoder": {"decoder_block_out_channels": (96, 192, 384, 384)},
    "asymmetric-vae-x2": {
        **_levels(4),
        "down_block_out_channels": (128, 256, 512, 512),
        "layers_per_down_block": 2,
        "up_block_out_channels": (256, 512, 1024, 1024),
        "layers_per_up_block": 5,
    },
    "hunyuanimage-2.1-vae": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 64,
        "block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "layers_per_block": 2,
        "spatial_compression_ratio": 32,
        "sample_size": 384,
    },
    "rae-dinov2-b": {  # DINOv2-B with registers, decoder ViT-XL
        "decoder_hidden_size": 1152,
        "decoder_num_hidden_layers": 28,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 4096,
    },
    "vq-f4": {
        **_levels(3),
        "block_out_channels": (128, 256, 512),
        "layers_per_block": 2,
        "latent_channels": 3,
        "num_vq_embeddings": 8192,
        "vq_embed_dim": 3,
    },
}


def _row(line: Mapping[str, str]) -> Published:
    kinds = {field.name: field.type for field in fields(Published)}
    values: dict[str, Any] = {"latent_space": line["name"], "config": _CONFIGS.get(line["name"])}
    for column, text in line.items():
        if text:
            kind = str(kinds[column])
            number = int if "int" in kind else float if "float" in kind else str
            values[column] = tuple(text.split()) if column == "losses" else number(text)
    return Published(**values)


with (Path(__file__).parent / "published.csv").open(newline="", encoding="utf-8") as _file:
    PUBLISHED = {row.name: row for row in map(_row, csv.DictReader(_file))}

# Rows that were run with their published files: day, PSNR on the bundled photographs (adm), the sha256 of each file,
# and that of the state, as records have it; `make verify` adds to it.
with (Path(__file__).parent / "verified.csv").open(newline="", encoding="utf-8") as _file:
    VERIFIED = {line["name"]: line for line in csv.DictReader(_file)}
