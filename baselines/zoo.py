"""Names of the baselines, for the registry. Cheap to import: each factory imports what it needs."""

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from baselines.published import PUBLISHED, VERIFIED, Published
from tokbench.errors import InputError
from tokbench.registry import Trainer, register_trainer
from tokbench.registry import register as add

Tiling = Literal["diffusers"]  # its own tiles; tokbench's are @tile=


def register() -> None:
    """Entry point of the group `tokbench.plugins`."""
    add("identity", identity, summary="returns the image itself: the floor of every metric")
    add("bicubic-f{factor}", bicubic, summary="mean over blocks, bicubic up")
    add("pca-f8c4", pca, summary="linear floor: PCA of 8x8 blocks, 4 coefficients")
    add("linear-f8c4", linear, summary="linear floor: ridge decoder over 5x5 PCA latents")
    for file_format, title in (("jpeg", "JPEG"), ("webp", "WebP"), ("avif", "AVIF"), ("jxl", "JPEG XL")):
        add(f"{file_format}-q{{quality}}", _codec(file_format), summary=f"{title} with its measured size")
    add(
        "klvae",
        klvae,
        summary="KL-VAE trained with tokbench: the demo weights, or klvae:FILE; klvae@arch=sd|sdxl|flux for speed",
    )
    add("klvae-f16c16", klvae_f16c16, summary="as klvae, demo weights of another latent")
    for row in PUBLISHED.values():
        add(row.name, _published(row.name), summary=row.note, facts=_facts(row))
    add(
        "hf",
        any_autoencoder,
        summary="hf:OWNER/NAME[:FOLDER] or a folder: any diffusers autoencoder",
        accepts=_is_folder,
    )
    register_trainer("klvae", _trainer, summary="KL-VAE as latent diffusion trains it")


def _facts(row: Published) -> dict[str, Any]:
    """A row as `tokbench list models` shows it; None where it has no such thing."""
    bits = math.log2(row.codebook_size) if row.codebook_size else None
    if bits and row.tokens_per_image and row.resolution:
        bits *= row.tokens_per_image / row.resolution**2
    elif bits and row.downsample:
        bits *= row.codes_per_position / row.downsample**2
    return {
        "family": row.family,
        "f": row.downsample,
        "c": row.channels,
        "codes": row.codebook_size,
        "tokens": row.tokens_per_image,
        "bpp": bits,
        "params": row.params,
        "px": row.resolution,
        "licence": row.licence,
        "verified": row.name in VERIFIED,
        "source": row.repo or (row.paper if row.file == "FOLDER" else row.file),
    }


def _trainer() -> Trainer:
    from baselines import train

    return train


def identity() -> Any:
    from baselines.classic import Identity

    return Identity()


def bicubic(factor: int) -> Any:
    from baselines.classic import Resample

    return Resample(factor)


def pca() -> Any:
    from baselines.classic import linear

    return linear("pca-f8c4")


def linear() -> Any:
    from baselines.classic import linear

    return linear("linear-f8c4")


def klvae(file: Path | None = None, arch: str = "", random_weights: bool = False) -> Any:
    from baselines.kl_vae import load_tokenizer

    return load_tokenizer(file, arch, random_weights=random_weights)


def klvae_f16c16(random_weights: bool = False) -> Any:
    from baselines.kl_vae import BUNDLED, load_tokenizer

    return load_tokenizer(BUNDLED / "klvae-f16c16.safetensors", random_weights=random_weights)


def any_autoencoder(file: str, latent_space: str = "", tiling: Tiling | None = None) -> Any:
    from baselines.pretrained import any_autoencoder

    return any_autoencoder(file, latent_space, tiling == "diffusers")


def _is_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "vae/config.json"))


def _codec(file_format: str) -> Callable[..., Any]:
    def factory(quality: int) -> Any:
        from baselines.classic import codec

        return codec(file_format, quality)

    return factory


STEPS = {"flowmo": 25, "flextok": 20, "capacitor": 1}  # of families that decode by steps, unless a spec says otherwise


def _published(name: str) -> Callable[..., Any]:
    kind = PUBLISHED[name].kind  # a class of diffusers, or the module of a family
    module = f"baselines.{f'families.{kind}' if kind.islower() else 'pretrained'}"

    def scripted(file: Path | None = None, random_weights: bool = False) -> Any:
        return import_module(module).published(name, file, random_weights)

    def factory(file: Path | None = None, random_weights: bool = False, weights: str | None = None) -> Any:
        return import_module(module).published(name, file, random_weights, weights)

    def stepped(
        file: Path | None = None,
        random_weights: bool = False,
        weights: str | None = None,
        steps: int = STEPS.get(kind, 1),
    ) -> Any:
        if steps < 1:
            raise InputError(f"{name}: steps must be at least 1, not {steps}")
        return import_module(module).published(name, file, random_weights, weights, steps)

    def of_diffusers(
        file: Path | None = None, random_weights: bool = False, weights: str | None = None, tiling: Tiling | None = None
    ) -> Any:
        return import_module(module).published(name, file, random_weights, weights, tiling == "diffusers")

    if not kind.islower():
        return of_diffusers
    return stepped if kind in STEPS else {"cosmos": scripted}.get(kind, factory)
