"""SSDD models for the registry: the bundled demo weights, the released ones, any file. Cheap to import."""

from pathlib import Path
from typing import Any

from tokbench.checkpoints import read_header
from tokbench.errors import CellError, InputError, first_line
from tokbench.registry import Trainer, register_trainer
from tokbench.registry import register as add

BUNDLED = Path(__file__).parent / "weights"
RANDOM = {"note": "random weights: for speed only"}  # info of a model without trained weights
RELEASED = "facebook/SSDD"  # folders F8C4, ..., SDVAE; files *_{S,B,M,L,XL}_256
SIZES = {
    "F8C4": "S B M L XL",
    "F16C4": "S B M L XL",
    "F16C16": "S B M L XL",
    "F32C64": "S B M L XL",
    "SDVAE": "S B M L",
}


def register() -> None:
    """Entry point of the group `tokbench.plugins`."""
    add("ssdd", ssdd, summary="SSDD trained with tokbench; the bundled demo weights, or ssdd:FILE", accepts=is_ssdd)
    add("ssdd-f16c16", ssdd_f16c16, summary="as ssdd, demo weights of another latent")
    add(
        "ssdd-{size}-{latent}",
        released,
        summary="SSDD as released, S B M L XL x f8c4 f16c4 f16c16 f32c64 or sdvae (for sd-vae-ft-mse+); CC-BY-NC 4.0",
    )
    register_trainer("ssdd", _trainer, summary="SSDD: stages joint, pretrain, finetune, distill")


def _trainer() -> Trainer:
    from ssdd_models import train

    return train


def ssdd(
    file: Path | None = None, steps: int | None = None, time_shift: float | None = None, random_weights: bool = False
) -> Any:
    """The bundled weights, or those of a file: ours, or a released one, whose sizes are read from its tensors.

    `steps` of the sampler (a file's own default otherwise: 1 for distilled ones of ours, 8 for released ones).
    """
    from ssdd_models.ssdd import SSDD, SSDDConfig
    from ssdd_models.stages import SMALL_STAGES
    from ssdd_models.tokenizer import SSDDTokenizer

    path = BUNDLED / "ssdd.safetensors" if file is None else Path(file)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.exists() and not random_weights:
        raise CellError(f"no demo weights at {path.name}; train some with `tokbench train ssdd`, or name a file")
    if not path.exists():
        small = SMALL_STAGES["pretrain"]
        return SSDDTokenizer(SSDD(small.encoder, small.decoder, steps=1), steps, time_shift, RANDOM)
    shapes, metadata = read_header(path)
    if metadata.get("model", "ssdd") != "ssdd":
        raise InputError(f"{path}: holds {metadata['model']}, not ssdd")
    if random_weights:
        return SSDDTokenizer(SSDD.from_config(SSDDConfig.of_file(shapes, metadata)), steps, time_shift, RANDOM)
    return SSDDTokenizer(SSDD.from_pretrained(path), steps, time_shift, metadata.get("info"))


def ssdd_f16c16(steps: int | None = None, time_shift: float | None = None, random_weights: bool = False) -> Any:
    return ssdd(BUNDLED / "ssdd-f16c16.safetensors", steps, time_shift, random_weights)


def released(
    size: str, latent: str, steps: int | None = None, time_shift: float | None = None, random_weights: bool = False
) -> Any:
    """Weights of the paper's authors from the hub, or any size XS ... G of any shape with random weights."""
    from ssdd_models.ssdd import SSDD
    from ssdd_models.tokenizer import SSDDTokenizer

    info = {"licence": "CC-BY-NC 4.0", "latent_space": f"ssdd-{latent.lower()}", "trained_on": "ImageNet"}
    external = latent.upper() == "SDVAE"
    if random_weights:
        try:
            model = SSDD("f8c4" if external else latent.lower(), size.upper(), external_encoder=external)
        except ValueError as error:
            raise InputError(f"ssdd-{size}-{latent}: {error}") from error
        return SSDDTokenizer(model, steps, time_shift, RANDOM)
    if size.upper() not in SIZES.get(latent.upper(), "").split():
        known = "; ".join(f"{name.lower()}: {sizes.lower()}" for name, sizes in SIZES.items())
        raise InputError(f"ssdd-{size}-{latent}: not among the released weights ({known})")
    path = fetch_released(latent.upper(), size.upper())
    return SSDDTokenizer(SSDD.from_pretrained(path), steps, time_shift, None if external else info)


def fetch_released(folder: str, size: str) -> Path:
    """The file of a released model, downloaded once to the hub's cache. CellError if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    from tokbench.weights.files import offline

    pattern = f"{folder}/*_{size}_256*"
    try:
        found = snapshot_download(RELEASED, allow_patterns=[pattern], local_files_only=offline())
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = first_line(error)
        raise CellError(f"{RELEASED}: {pattern} cannot be fetched ({reason}); or give a file: ssdd:FILE") from error
    files = sorted(path for path in Path(found, folder).rglob("*.safetensors") if f"_{size}_256" in str(path))
    if not files:
        raise CellError(f"{RELEASED}: no file {pattern}.safetensors; give one as ssdd:FILE")
    return files[0]


def is_ssdd(path: Path) -> bool:
    """Whether a safetensors file has the tensors of an SSDD decoder; reads its header alone."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return "decoder.ada_ctx_proj.0.weight" in read_header(path)[0]
