"""What the harness finds out about a tokenizer by itself: its size, its state, the code behind it."""

from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace

import torch
from torch import Tensor

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


def lacks(tokenizer: Tokenizer, metric: Metric) -> str:
    """What a metric needs that this tokenizer has not; "" if nothing."""
    info = tokenizer.info
    if "bpp" in metric.columns:
        return "" if hasattr(tokenizer, "bits") else "needs measured bits: of a codec, or codes"
    if SEAM in metric.columns:
        return "" if tiling_of(tokenizer) is not None else "needs a model that works in tiles"
    if "latent-mean" in metric.columns or metric.extractor == LATENTS or metric.scope == "interpolation":
        if info.channels is None:
            return "needs continuous latents"
        return "needs a grid of latents" if GRID[-1] in metric.columns and info.downsample is None else ""
    return "needs codes" if metric.extractor == CODES and info.codebook_size is None else ""


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


# What computes otherwise in training.
TRAINED_OTHERWISE = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._BatchNorm)


@dataclass
class Watch:
    """What a model does that is seldom meant, looked for in all of its batches without waiting for the device."""

    tokenizer: Tokenizer
    seen: dict[str, Tensor] = field(default_factory=dict)
    first: tuple[Tensor, Tensor] | None = None

    def see(self, real: Tensor, latents: Tensor, decoded: Tensor | None) -> None:
        """uint8 [B, 3, H, W], its latents [B, ...] and what decode gave [B, 3, H, W]."""
        if self.first is None:
            self.first = real[:1], latents[:1]
        self._more("images", torch.maximum, _unlike(real, self.first[0]))
        self._more("latents", torch.maximum, _unlike(latents, self.first[1]))
        self._more("darkest", torch.minimum, real.amin().float())
        if latents.is_floating_point():
            self._more("size", torch.maximum, latents.float().square().mean().sqrt())
        if decoded is not None:
            self._more("least", torch.minimum, decoded.amin().float())
            self._more("most", torch.maximum, decoded.amax().float())
            self._more(
                "spread", torch.maximum, (decoded.flatten(1).amax(1) - decoded.flatten(1).amin(1)).amax().float()
            )

    def _more(self, name: str, join: Callable[[Tensor, Tensor], Tensor], value: Tensor) -> None:
        self.seen[name] = join(self.seen[name], value) if name in self.seen else value

    def found(self) -> list[str]:
        """A warning for each, that names the cure."""
        seen = {name: float(value) for name, value in self.seen.items()}
        parts = getattr(self.tokenizer, "__dict__", {}).items()
        says = [f"{name} is in training mode: name it in `networks`, which are set to eval mode"
                for name, part in parts if isinstance(part, torch.nn.Module)
                and any(m.training for m in part.modules() if isinstance(m, TRAINED_OTHERWISE))]  # fmt: skip
        if "most" in seen:
            if seen["spread"] == 0:
                says.append("every reconstruction has one value throughout")
            elif seen["most"] > 20:
                says.append(f"decode gives values up to {seen['most']:.0f}; expected -1 to 1: return x / 127.5 - 1")
            elif seen["least"] >= 0 and seen["darkest"] < 64:
                says.append("decode never gives a value below 0, as if from 0 to 1; expected -1 to 1: return 2 * x - 1")
        if seen.get("latents") == 0 and seen["images"] > 0:
            says.append("the latents of all images are equal")
        if (size := seen.get("size", 0.0)) > 20:
            says.append(f"latents are of size {size:.0f}: does encode take pixels as they come, from 0 to 255? "
                        "Scale them: images / 127.5 - 1")  # fmt: skip
        return says


def _unlike(batch: Tensor, first: Tensor) -> Tensor:
    """1 if anything in a batch [B, ...] differs from a first [1, ...], else 0."""
    same_size = batch.shape[1:] == first.shape[1:]
    return (batch != first).any().float() if same_size else torch.ones((), device=batch.device)
