"""What the harness finds out about a tokenizer by itself: its size, its state, the code behind it."""

from dataclasses import is_dataclass, replace

import torch

from tokbench import registry
from tokbench.errors import InputError
from tokbench.metrics import CODES, GRID, LATENTS, SEAM, Metric
from tokbench.protocols import Resolution, sides_of
from tokbench.records import provenance
from tokbench.records.result import TokenizerInfo
from tokbench.runtime.device import count_parameters, hash_state
from tokbench.runtime.tiling import Tiled, tiling_of
from tokbench.tokenizer import Joined, Tokenizer


def with_facts(tokenizer: Tokenizer) -> TokenizerInfo:
    """The tokenizer's info with what the harness itself finds out: parameters and the hash of the state."""
    return replace(
        tokenizer.info,
        encoder_params=count_parameters(tokenizer.networks.get("encoder")),
        decoder_params=count_parameters(tokenizer.networks.get("decoder")),
        weights=hash_state(tokenizer),
    )


def check_size(tokenizer: Tokenizer, resolution: Resolution) -> None:
    """InputError if the model cannot take images of this size; native ones are padded."""
    multiple, sides = tokenizer.info.size_multiple, sides_of(resolution) or ()
    if any(side % multiple for side in sides):
        nearest = "x".join(str(max(1, side // multiple) * multiple) for side in dict.fromkeys(sides))
        raise InputError(
            f"{tokenizer.info.name}: needs sizes divisible by {multiple}, got --res {resolution}; try {nearest}"
        )


def applies(metric: Metric, tokenizer: Tokenizer) -> bool:
    """bpp needs `tokenizer.bits`, code metrics a codebook, latent metrics channels, or a grid of them, seam tiles."""
    if "bpp" in metric.columns:
        return hasattr(tokenizer, "bits")
    if SEAM in metric.columns:
        return tiling_of(tokenizer) is not None
    if "latent-mean" in metric.columns or metric.extractor == LATENTS or metric.scope == "interpolation":
        grid = tokenizer.info.downsample is not None
        return tokenizer.info.channels is not None and (grid or GRID[-1] not in metric.columns)
    return metric.extractor != CODES or tokenizer.info.codebook_size is not None


def model_key(info: TokenizerInfo, tokenizer: Tokenizer) -> str | None:
    """What decides a model's output: its state, its attributes, and all code behind it; None where nobody can tell."""
    parts = _parts(tokenizer)
    modules = [m for name in sorted(tokenizer.networks) for m in tokenizer.networks[name].modules()]
    known = registry.packages()
    inside = {type(m).__module__ for m in (*parts, *modules)}
    own = {m for m in inside if m.partition(".")[0] in known or not provenance.installed(m)}
    source = provenance.source_hash(sorted(own | {type(part).__module__ for part in parts}))
    libraries = provenance.versions(sorted({m.partition(".")[0] for m in inside - own}))
    if info.weights is None or source is None:
        return None
    return provenance.key(info.weights, source, libraries, [attributes(part) for part in (*parts, *modules)])


def _parts(tokenizer: Tokenizer) -> list[Tokenizer]:
    """The tokenizer and those that it is made of."""
    joined = (tokenizer.encoding, tokenizer.decoding) if isinstance(tokenizer, Joined) else ()
    inner = (tokenizer.inner,) if isinstance(tokenizer, Tiled) else joined
    return [tokenizer, *(part for one in inner for part in _parts(one))]


def attributes(owner: object) -> list[str]:
    """What a part of a model holds besides tensors and other parts: two objects may differ in nothing else."""
    kinds = (bool, int, float, str, tuple, torch.dtype)
    found = [f"{k}={v!r}" for k, v in getattr(owner, "__dict__", {}).items() if isinstance(v, kinds) or is_dataclass(v)]
    return sorted(text for text in found if " at 0x" not in text and not text.startswith(("training=", "_")))
