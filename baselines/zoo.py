"""Names of the baselines, for the registry. Cheap to import: each factory imports what it needs."""

from pathlib import Path
from typing import TYPE_CHECKING

from tokbench.registry import register as add

if TYPE_CHECKING:
    from tokbench.tokenizer import Tokenizer


def register() -> None:
    """Entry point of the group `tokbench.plugins`."""
    add("identity", identity, summary="returns the image itself: the floor of every metric")
    add("bicubic-f{factor}", bicubic, summary="mean over blocks, bicubic up")
    add("pca-f8c4", pca, summary="linear floor: PCA of 8x8 blocks, 4 coefficients")
    add("linear-f8c4", linear, summary="linear floor: ridge decoder over 5x5 PCA latents")
    add("jpeg-q{quality}", jpeg, summary="JPEG with its measured size")
    add("webp-q{quality}", webp, summary="WebP with its measured size")
    add("avif-q{quality}", avif, summary="AVIF with its measured size")
    add("jxl-q{quality}", jxl, summary="JPEG XL with its measured size (pip install pillow-jxl-plugin)")
    add("klvae", klvae, summary="KL-VAE trained with tokbench; the bundled demo weights, or klvae:FILE")


def identity() -> "Tokenizer":
    from baselines.classic import Identity

    return Identity()


def bicubic(factor: int) -> "Tokenizer":
    from baselines.classic import Resample

    return Resample(factor)


def pca() -> "Tokenizer":
    from baselines.classic import linear

    return linear("pca-f8c4")


def linear() -> "Tokenizer":
    from baselines.classic import linear

    return linear("linear-f8c4")


def jpeg(quality: int) -> "Tokenizer":
    from baselines.classic import codec

    return codec("jpeg", quality)


def webp(quality: int) -> "Tokenizer":
    from baselines.classic import codec

    return codec("webp", quality)


def avif(quality: int) -> "Tokenizer":
    from baselines.classic import codec

    return codec("avif", quality)


def jxl(quality: int) -> "Tokenizer":
    from baselines.classic import codec

    return codec("jxl", quality)


def klvae(file: Path | None = None, random_weights: bool = False) -> "Tokenizer":
    from baselines.kl_vae import load_tokenizer

    return load_tokenizer(file, random_weights=random_weights)
