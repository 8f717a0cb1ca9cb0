"""Does the reconstruction of a changed image equal the changed reconstruction: shifted, mirrored, halved?

And in the latents, as EQ-VAE (arXiv 2502.09509) asks it: are the latents of the changed image the changed latents, and
what do the changed latents decode to? Only latents on a grid can be changed; a shift by less than f pixels cannot.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tokbench import registry
from tokbench.evaluation.probes.look import Base, Found, Look
from tokbench.metrics import pixel
from tokbench.records.result import TokenizerInfo
from tokbench.runtime.seeding import image_seeds

DEFAULT_DOWNSAMPLE = 8  # of shifts where a tokenizer has none


def equivariance(look: Look, base: Base) -> Found:
    """All reconstructions have the seeds of the unchanged image."""
    with torch.inference_mode():
        found = {"equi-shift": shifted(look, base)}
        found |= changed(look, base, "flip", mirror, mirror)
        if "equi-half" not in refuses(look.tokenizer.info):
            found |= changed(look, base, "half", halve, lambda latents: F.avg_pool2d(latents, 2))
    return found


def shifted(look: Look, base: Base) -> Tensor:
    """PSNR [B] where both images show the same: the shift is drawn per image, from 1 to f - 1 pixels both ways.

    What enters at the border is the reflection of what is there.
    """
    most = (look.tokenizer.info.downsample or DEFAULT_DOWNSAMPLE) - 1
    drawn = image_seeds(base.real.cpu(), look.seed + 1)
    down, right = (1 + drawn % most).tolist(), (1 + drawn // 1000 % most).tolist()
    moved = torch.stack([move(image, *by) for image, *by in zip(base.real, down, right, strict=True)])
    fake = look.reconstruct(base.ids, moved, base.seeds).fake
    errors = [
        pixel.squared_error(base.fake[i : i + 1, :, :-dy, :-dx], fake[i : i + 1, :, dy:, dx:])
        for i, (dy, dx) in enumerate(zip(down, right, strict=True))
    ]
    return pixel.psnr(torch.cat(errors))


def move(image: Tensor, down: int, right: int) -> Tensor:
    """uint8 [3, H, W] moved, filled by reflection."""
    height, width = image.shape[1:]
    padded = F.pad(image[None].float(), (right, 0, down, 0), mode="reflect")[0]
    return padded[:, :height, :width].to(torch.uint8)


def mirror(images: Tensor) -> Tensor:
    return images.flip(-1)


def halve(images: Tensor) -> Tensor:
    """uint8 -> uint8: means over 2x2 pixels, an odd last row or column left out."""
    return F.avg_pool2d(images.float(), 2).round().to(torch.uint8)


def changed(
    look: Look, base: Base, name: str, change: Callable[[Tensor], Tensor], of_latents: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Columns of one change, which the tokenizer's latents have to follow."""
    expected = change(base.fake)
    other = look.reconstruct(base.ids, change(base.real), base.seeds)
    found = {f"equi-{name}": pixel.psnr(pixel.squared_error(expected, other.fake))}
    if f"latent-{name}" in refuses(look.tokenizer.info):
        return found
    latents = of_latents(base.latents)
    factor, multiple = look.tokenizer.info.downsample, look.tokenizer.info.size_multiple
    assert factor is not None
    size = [cells * factor // multiple * multiple for cells in latents.shape[2:]]  # what the decoder can give whole
    latents = latents[..., : size[0] // factor, : size[1] // factor]
    theirs = other.latents[..., : latents.shape[2], : latents.shape[3]]
    apart = (latents - theirs).float().square().flatten(1).mean(1)
    deviation = base.latents.float().flatten(1).std(1)
    decoded = look.decode(base.ids, latents, base.seeds, size)
    size = [min(sides) for sides in zip(size, expected.shape[2:], strict=True)]
    found[f"latent-{name}"] = apart.sqrt() / deviation
    found[f"decode-{name}"] = pixel.psnr(
        pixel.squared_error(expected[..., : size[0], : size[1]], decoded[..., : size[0], : size[1]])
    )
    return found


def refuses(info: TokenizerInfo) -> Mapping[str, str]:
    """Latents that are no grid of numbers cannot be mirrored or halved; tokens in a row are of one image size."""
    names = [f"{what}-{change}" for what in ("latent", "decode") for change in ("flip", "half")]
    grid = info.channels is not None and info.downsample is not None and info.tokens_per_image is None
    reasons = {} if grid else dict.fromkeys(names, "its latents are no grid of numbers")
    return reasons | ({"equi-half": "takes images of one size"} if info.tokens_per_image is not None else {})


registry.register_probe(
    "equivariance", equivariance, summary="reconstructions of shifted, mirrored and halved images; and their latents",
    encodings=2.25, decodings=3.5, refuses=refuses,
)  # fmt: skip
