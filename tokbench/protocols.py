"""Evaluation protocols: everything besides the model and the images that decides a number, named and versioned.

Never imports torch. Two results are ranked together only if their protocols' fingerprints are equal.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Literal

from tokbench.errors import InputError

Crop = Literal["adm", "pil-bilinear", "pil-bicubic", "tensor-bilinear"]
Rounding = Literal["nearest", "truncate"]
Small = Literal["enlarge", "skip", "refuse"]
Resolution = int | str  # pixels of a square's side; "768x512", width by height; "native": every image at its own size
NATIVE = "native"
# Fields that were added when results existed: with these values they do nothing new, so old fingerprints stay.
UNCHANGED = {"small": "enlarge", "orientation": "ignore", "native": False}


@dataclass(frozen=True)
class Protocol:
    """How images are prepared, encoded and put back on the 8-bit grid.

    crop: "adm" halves with a box filter while the short side is at least twice the resolution, then bicubic, then
    cuts the centre (guided-diffusion's center_crop_arr); "pil-*" is torchvision's Resize of the short side and
    CenterCrop on PIL images; "tensor-bilinear" the same on float tensors with antialiasing.
    posterior: latents are the posterior's mode, or a sample of it (a generator per image).
    real_rounding, fake_rounding: "nearest" is floor(127.5 x + 128) in float32 of x clamped to [-1, 1], that is
    round half up; "truncate" is floor(255 (x + 1) / 2), which is off by one for 63 of the 256 levels.
    autocast: "bfloat16" runs the model under autocast; None leaves it in the run's dtype.
    small: what becomes of images below the resolution. Every reference that is followed here enlarges them.
    orientation: "ignore" takes pixels as they are stored, as the references do; "apply" turns them as EXIF says.
    native: no crop and no resize; for the model alone an image is padded by reflection, at its right and bottom.
    """

    name: str
    version: int
    crop: Crop = "adm"
    posterior: Literal["mode", "sample"] = "mode"
    real_rounding: Rounding = "nearest"
    fake_rounding: Rounding = "nearest"
    autocast: Literal["bfloat16"] | None = None
    small: Small = "enlarge"
    orientation: Literal["ignore", "apply"] = "ignore"
    native: bool = False
    summary: str = ""
    metrics: tuple[str, ...] = ()  # what its paper reports, mistakes included; () is tokbench's own set
    notes: tuple[str, ...] = ()  # where the original's code is mistaken, or where this preset cannot follow it

    def fingerprint(self) -> str:
        """16 hex digits over every field that can change a number (all but texts and names of metrics)."""
        record = {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if key not in ("summary", "notes", "metrics") and (key not in UNCHANGED or value != UNCHANGED[key])
        }
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("adm", 1, summary="ADM centre crop, posterior mode, both sides rounded to 8 bits; the default"),
        Protocol(
            "ssdd",
            1,
            crop="pil-bilinear",
            autocast="bfloat16",
            summary="SSDD's evaluation (arXiv 2510.04961)",
            metrics=("psnr-global", "ssim", "lpips-alex", "dreamsim-native", "rfid"),
            notes=(
                "its PSNR is psnr-global, its SSIM ssim, its LPIPS lpips-alex",
                "its DreamSim runs at the native size (dreamsim-native), not at the 224 pixels it was trained for",
                "its LPIPS and DreamSim pad images with zeros to a power of two, which tells at other sizes",
                "its noise comes from one generator for the whole set; here every image has its own",
            ),
        ),
        Protocol(
            "titok",
            1,
            crop="pil-bicubic",
            summary="1d-tokenizer's evaluation (TiTok, arXiv 2406.07550)",
            metrics=("rfid",),
            notes=(
                "it truncates to 8 bits after rounding to k / 255, which moves none of the 256 levels",
                "its Inception network runs in float64, which moves features by less than 1e-6 of their range",
            ),
        ),
        Protocol(
            "vavae",
            1,
            crop="tensor-bilinear",
            posterior="sample",
            summary="LightningDiT's evaluate_tokenizer (VA-VAE, arXiv 2501.01423)",
            metrics=("psnr", "ssim-gauss-signed", "lpips-vgg-unclamped", "rfid"),
            notes=(
                "its LPIPS sees the decoder's unclamped output (lpips-vgg-unclamped)",
                "its latents are a sample of the posterior, so its numbers depend on the seed",
                "its SSIM is of images in [-1, 1], range 2, another number: ssim-gauss-signed",
                "its SSIM sees the decoder's output before it is rounded to 8 bits, averages batch means and counts a "
                "padded border; ours is of 8-bit images, their mean, inside the border",
                "its model sees the resized image before it is rounded to 8 bits",
                "its rFID uses pytorch-fid's resize, ours torch-fidelity's",
            ),
        ),
        Protocol(
            "autoencoderkl",
            1,
            crop="pil-bilinear",
            posterior="sample",
            summary="lavinal712/AutoencoderKL's eval.py, the source of often cited rows of SD, SDXL and FLUX VAEs",
            metrics=("psnr", "ssim", "rfid"),
            notes=(
                "its latents are a sample of the posterior, so its numbers depend on the seed",
                "the network of its LPIPS is not stated, so none is compared",
            ),
        ),
        Protocol(
            "dcae",
            1,
            summary="DC-AE's eval_dc_ae_model (arXiv 2410.10733)",
            metrics=("psnr", "ssim-gauss", "lpips-alex", "rfid"),
            notes=(
                "its SSIM has an 11x11 Gaussian window (ssim-gauss), its LPIPS is lpips-alex",
                "its SSIM counts a border padded by reflection, ours only what lies inside it",
                "its runner has autocast on, by default in float32, which changes nothing; with its bf16 option the "
                "numbers are others",
                "its rFID uses pytorch-fid's resize, ours torch-fidelity's",
            ),
        ),
        Protocol(
            "llamagen",
            1,
            summary="LlamaGen's reconstruction scripts (arXiv 2406.06525)",
            metrics=("psnr", "ssim-range2", "rfid"),
            notes=(
                "its SSIM uses data_range 2 on images in [0, 1] and reads higher (0.675 for 0.55): ssim-range2",
                "its distributed sampler counts padded images twice when ranks do not divide their number",
                "its rFID comes from ADM's TensorFlow graph, ours from torch-fidelity's port of it",
            ),
        ),
    )
}


def parse_resolution(text: str) -> Resolution:
    """`256`, `768x512` or `native`; InputError for anything else, and for sides below 8 or above 8192 pixels."""
    if text == NATIVE:
        return NATIVE
    sides = [int(side) for side in text.split("x")] if re.fullmatch(r"\d+(x\d+)?", text) else []
    if not sides or not 8 <= min(sides) <= max(sides) <= 8192:
        raise InputError(f"--res {text}: must be a side or WIDTHxHEIGHT from 8 to 8192 pixels, or native")
    return sides[0] if len(set(sides)) == 1 else text


def sides_of(resolution: Resolution) -> tuple[int, int] | None:
    """(width, height) in pixels; None for native."""
    if resolution == NATIVE:
        return None
    width, _, height = str(resolution).partition("x")
    return int(width), int(height or width)


def size_text(resolution: Resolution) -> str:
    """The resolution for people: 256 px, 768x512 px, native size."""
    return "native size" if resolution == NATIVE else f"{resolution} px"


def find_protocol(name: str) -> Protocol:
    """The protocol of that name; InputError with all names for another."""
    if name not in PROTOCOLS:
        raise InputError(f"unknown protocol {name!r}: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
