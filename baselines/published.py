"""Published tokenizers: where each is, its latent space and what it may be used for. Never imports torch.

Latents travel normalised, (z - shift) * scale. `scale` None: what the checkpoint's own config says. `config` rebuilds
the architecture for `random_weights`; None: the class's defaults are the published model's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Published:
    """One row. `kind` is the diffusers class, or "ldm" for a checkpoint in latent diffusion's own format."""

    name: str
    family: str
    repo: str
    kind: str
    downsample: int
    channels: int | None = None
    codebook_size: int | None = None
    subfolder: str = ""
    file: str = ""  # of an LDM checkpoint
    scale: float | None = None
    shift: float = 0.0
    latent_space: str = ""  # decoders of one latent space can be swapped; in PUBLISHED the name of the row if not given
    resolution: int | None = None  # the only one that it decodes to
    decode_steps: int | None = None
    losses: tuple[str, ...] = ()
    trained_on: str = ""
    licence: str = ""
    paper: str = ""
    note: str = ""
    config: Mapping[str, Any] | None = None


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


_SANA = {
    "latent_channels": 32,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
}
_RAE = {  # DINOv2-B with registers, decoder ViT-XL
    "decoder_hidden_size": 1152,
    "decoder_num_hidden_layers": 28,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 4096,
}
_VQ_F4 = {
    **_levels(3),
    "block_out_channels": (128, 256, 512),
    "layers_per_block": 2,
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
    "vq_embed_dim": 3,
}
_LDM, _DCAE, _SD3 = "arXiv 2112.10752", "arXiv 2410.10733", "arXiv 2403.03206"
_LAION = "OpenImages; decoder LAION-Aesthetics and LAION-Humans"
_LPIPS = ("lpips-vgg",)  # the perceptual loss of latent diffusion and its descendants
_TAE: dict[str, Any] = {
    "family": "taesd",
    "kind": "AutoencoderTiny",
    "downsample": 8,
    "licence": "MIT",
    "paper": "github.com/madebyollin/taesd",
}


def _sd(name: str, repo: str, scale: float | None, space: str, licence: str, **rest: Any) -> Published:
    facts: dict[str, Any] = {
        "family": "kl-vae",
        "kind": "AutoencoderKL",
        "downsample": 8,
        "channels": 4,
        "paper": _LDM,
        "losses": _LPIPS,
    }
    return Published(
        name=name, repo=repo, scale=scale, latent_space=space, licence=licence, **(facts | {"config": _kl(4)} | rest)
    )


def _dcae(name: str, levels: int, channels: int, scale: float | None) -> Published:
    return Published(
        name=name,
        family="dc-ae",
        repo=f"mit-han-lab/{name}-1.0-diffusers",
        kind="AutoencoderDC",
        downsample=2 ** (levels - 1),
        channels=channels,
        scale=scale,
        config=_dc(levels, channels),
        losses=_LPIPS,
        trained_on="ImageNet" if name.endswith("-in") else "a mixture of sets",
        licence="Apache-2.0",
        paper=_DCAE,
    )


_ROWS = (
    _sd("sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse", 0.18215, "sd", "MIT", trained_on=_LAION),
    _sd("sd-vae-ft-ema", "stabilityai/sd-vae-ft-ema", 0.18215, "sd", "MIT", trained_on=_LAION),
    _sd(
        "sd15-vae",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        0.18215,
        "sd",
        "CreativeML OpenRAIL-M",
        subfolder="vae",
        trained_on="OpenImages",
    ),
    _sd("sdxl-vae", "stabilityai/sdxl-vae", 0.13025, "sdxl", "MIT", paper="arXiv 2307.01952"),
    _sd("sdxl-vae-fp16-fix", "madebyollin/sdxl-vae-fp16-fix", 0.13025, "sdxl", "MIT", paper="arXiv 2307.01952"),
    _sd("eq-vae", "zelaki/eq-vae", None, "", "none stated", paper="arXiv 2502.09509", trained_on="OpenImages"),
    _sd(
        "sd3-vae",
        "stabilityai/stable-diffusion-3-medium-diffusers",
        1.5305,
        "sd3",
        "Stability AI Community",
        subfolder="vae",
        channels=16,
        shift=0.0609,
        config=_kl(16, quant=False),
        paper=_SD3,
        note="gated",
    ),
    _sd(
        "flux1-vae",
        "black-forest-labs/FLUX.1-schnell",
        0.3611,
        "flux1",
        "Apache-2.0",
        subfolder="vae",
        channels=16,
        shift=0.1159,
        config=_kl(16, quant=False),
        paper="github.com/black-forest-labs/flux",
        losses=(),
    ),
    Published(
        name="flux2-vae",
        family="kl-vae",
        repo="black-forest-labs/FLUX.2-dev",
        kind="AutoencoderKLFlux2",
        subfolder="vae",
        downsample=16,
        channels=128,
        licence="Apache-2.0",
        paper="github.com/black-forest-labs/flux2",
        note="gated; f8c32 in 2x2 patches, normalised by its batch-norm statistics",
    ),
    _dcae("dc-ae-f32c32-in", 6, 32, 0.3189),
    _dcae("dc-ae-f64c128-in", 7, 128, 0.2889),
    _dcae("dc-ae-f128c512-in", 8, 512, None),
    _dcae("dc-ae-f32c32-mix", 6, 32, 0.4552),
    _dcae("dc-ae-f64c128-mix", 7, 128, 0.4538),
    _dcae("dc-ae-f128c512-mix", 8, 512, None),
    Published(
        name="dc-ae-f32c32-sana",
        family="dc-ae",
        repo="mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
        kind="AutoencoderDC",
        downsample=32,
        channels=32,
        scale=0.41407,
        latent_space="dc-ae-f32c32-sana",
        config=_SANA,
        losses=_LPIPS,
        licence="Apache-2.0",
        paper="arXiv 2410.10629",
    ),
    Published(name="taesd", repo="madebyollin/taesd", channels=4, scale=1.0, latent_space="sd", **_TAE),
    Published(name="taesdxl", repo="madebyollin/taesdxl", channels=4, scale=1.0, latent_space="sdxl", **_TAE),
    Published(
        name="taesd3",
        repo="madebyollin/taesd3",
        channels=16,
        scale=1.0,
        latent_space="sd3",
        config={"latent_channels": 16},
        **_TAE,
    ),
    Published(
        name="taef1",
        repo="madebyollin/taef1",
        channels=16,
        scale=1.0,
        latent_space="flux1",
        config={"latent_channels": 16},
        **_TAE,
    ),
    Published(
        name="consistency-decoder",
        family="consistency",
        repo="openai/consistency-decoder",
        kind="ConsistencyDecoderVAE",
        downsample=8,
        channels=4,
        scale=0.18215,
        latent_space="sd",
        decode_steps=2,
        licence="MIT",
        paper="github.com/openai/consistencydecoder",
        note="its encoder is Stable Diffusion's",
    ),
    Published(
        name="qwen-image-vae",
        family="wan-vae",
        repo="Qwen/Qwen-Image",
        kind="AutoencoderKLQwenImage",
        subfolder="vae",
        downsample=8,
        channels=16,
        latent_space="wan21",
        licence="Apache-2.0",
        paper="arXiv 2508.02324",
        note="decoder fine-tuned on Wan 2.1's frozen encoder",
    ),
    Published(
        name="wan-vae",
        family="wan-vae",
        repo="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        kind="AutoencoderKLWan",
        subfolder="vae",
        downsample=8,
        channels=16,
        latent_space="wan21",
        licence="Apache-2.0",
        paper="arXiv 2503.20314",
        note="video autoencoder on one frame",
    ),
    Published(
        name="rae-dinov2-b",
        family="rae",
        repo="nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08",
        kind="AutoencoderRAE",
        downsample=16,
        channels=768,
        scale=1.0,
        resolution=256,
        config=_RAE,
        losses=("lpips-vgg", "dinov2"),
        trained_on="ImageNet",
        licence="MIT",
        paper="arXiv 2510.11690",
        note="frozen DINOv2-B at 224 px; latents normalised by its own statistics",
    ),
    Published(
        name="vq-f4",
        family="vq",
        repo="CompVis/ldm-celebahq-256",
        kind="VQModel",
        subfolder="vqvae",
        downsample=4,
        codebook_size=8192,
        config=_VQ_F4,
        losses=_LPIPS,
        trained_on="OpenImages",
        licence="MIT",
        paper=_LDM,
    ),
    Published(
        name="vq-f8",
        family="vq",
        repo="",
        kind="ldm",
        file="vq-f8.ckpt",
        downsample=8,
        codebook_size=16384,
        losses=_LPIPS,
        trained_on="OpenImages",
        licence="MIT",
        paper=_LDM,
        note="CompVis's zip, ommer-lab.com/files/latent-diffusion/vq-f8.zip",
    ),
    Published(
        name="mar-kl16",
        family="kl-vae",
        repo="",
        kind="ldm",
        file="kl16.ckpt",
        downsample=16,
        channels=16,
        scale=0.2325,
        losses=_LPIPS,
        trained_on="ImageNet",
        licence="MIT",
        paper="arXiv 2406.11838",
        note="scale from engine_mar.py; the address of the file is in util/download.py of github.com/LTH14/mar",
    ),
    Published(
        name="va-vae-f16d32",
        family="kl-vae",
        repo="hustvl/vavae-imagenet256-f16d32-dinov2",
        kind="ldm",
        file="vavae-imagenet256-f16d32-dinov2.pt",
        downsample=16,
        channels=32,
        losses=("lpips-vgg", "dinov2"),
        trained_on="ImageNet",
        licence="MIT",
        paper="arXiv 2501.01423",
        note="statistics of each channel from latents_stats.pt beside it",
    ),
    Published(
        name="llamagen-vq8",
        family="vq",
        repo="FoundationVision/LlamaGen",
        kind="ldm",
        file="vq_ds8_c2i.pt",
        downsample=8,
        codebook_size=16384,
        losses=_LPIPS,
        trained_on="ImageNet",
        licence="MIT",
        paper="arXiv 2406.06525",
    ),
    Published(
        name="llamagen-vq16",
        family="vq",
        repo="FoundationVision/LlamaGen",
        kind="ldm",
        file="vq_ds16_c2i.pt",
        downsample=16,
        codebook_size=16384,
        losses=_LPIPS,
        trained_on="ImageNet",
        licence="MIT",
        paper="arXiv 2406.06525",
    ),
)
PUBLISHED = {row.name: replace(row, latent_space=row.latent_space or row.name) for row in _ROWS}
