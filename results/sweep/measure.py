"""What `tokbench run` does not measure: the bits of latents, estimated by quantising them and counting symbols, and the
memory of a decode on a CPU.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from results.sweep.run import Preset
from tokbench import registry
from tokbench.data.loader import Loader
from tokbench.data.open import open_source
from tokbench.data.pixels import quantise
from tokbench.metrics.pixel import psnr, squared_error
from tokbench.protocols import PROTOCOLS
from tokbench.records.files import write_whole
from tokbench.runtime.device import precision, prepare, select_device
from tokbench.tokenizer import Tokenizer

LOSS = 0.1  # dB of psnr that quantising may cost
STEPS = tuple(2.0 ** (k / 4) for k in range(-24, 9))  # in units of the latents, whose deviation is about 1


def measure_latents(models: Sequence[str], preset: Preset, out: Path) -> None:
    """Write NAME.json for each model: the coarsest of STEPS that costs at most LOSS dB on the bundled photographs at
    `preset.chosen_at` pixels, with it the bits per pixel at each resolution, and the bytes of a decode there."""
    for spec in registry.parse_all(",".join(models)):
        if (path := out / f"{spec.row}.json").exists():
            continue
        print(f"$ latents of {spec.row}", flush=True)
        tokenizer, device = registry.create(spec), select_device(preset.device)
        prepare(tokenizer, device)
        with precision(device, torch.float32):
            images = crops(preset.chosen_at, device)
            step, psnr, quantised = coarsest_step(tokenizer, images)
            pictures = {side: crops(int(side), device) for side in preset.resolutions.split(",")}
            rates = {side: bits_per_pixel(tokenizer, found, step) for side, found in pictures.items()}
            memory = {side: decode_bytes(tokenizer, found[0]) for side, found in pictures.items()}
        record = {"step": step, "psnr": psnr, "psnr_quantised": quantised, "bits_per_pixel": rates,
                  "decode_bytes": memory}  # fmt: skip
        write_whole(path, json.dumps(record, indent=1) + "\n")


def crops(side: int, device: torch.device) -> list[Tensor]:
    """The bundled photographs as `run` sees them, uint8 [1, 3, H, W] each."""
    loader = Loader(open_source("samples"), side, PROTOCOLS["adm"], batch_size=1, workers=0)
    return [images.to(device) for _, images in loader]


def coarsest_step(tokenizer: Tokenizer, images: Sequence[Tensor]) -> tuple[float, float, float]:
    """(step, psnr of the latents as they are, psnr of the quantised ones), by bisection over STEPS."""
    latents = [encode(tokenizer, image) for image in images]
    best = quality(tokenizer, images, latents)
    found, quantised = STEPS[0], best
    low, high = 0, len(STEPS) - 1
    while low <= high:
        middle = (low + high) // 2
        step = STEPS[middle]
        value = quality(tokenizer, images, [(z / step).round() * step for z in latents])
        if best - value <= LOSS:
            found, quantised, low = step, value, middle + 1
        else:
            high = middle - 1
    return found, best, quantised


def quality(tokenizer: Tokenizer, images: Sequence[Tensor], latents: Sequence[Tensor]) -> float:
    """Mean psnr, as `run` measures it but for the seeds of the noise."""
    errors = []
    for number, (real, z) in enumerate(zip(images, latents, strict=True)):
        decoded = tokenizer.decode(z, seeds=torch.tensor([number]), size=(real.shape[2], real.shape[3]))
        errors.append(squared_error(real, quantise(decoded, PROTOCOLS["adm"].fake_rounding)))
    return float(psnr(torch.cat(errors)).mean())


def bits_per_pixel(tokenizer: Tokenizer, images: Sequence[Tensor], step: float) -> float:
    """Entropy of the rounded latents, each channel's symbols counted over all images: what an ideal entropy coder that
    knows the counts, and no neighbours, would need."""
    symbols = [(encode(tokenizer, image) / step).round().long().cpu() for image in images]
    bits = 0.0
    for channel in range(symbols[0].shape[1]):
        _, counts = torch.cat([z[:, channel].flatten() for z in symbols]).unique(return_counts=True)
        bits -= float((counts * (counts / counts.sum()).log2()).sum())
    return bits / sum(image.shape[2] * image.shape[3] for image in images)


def decode_bytes(tokenizer: Tokenizer, image: Tensor) -> int | None:
    """By how much the process grows at most while it decodes one image; None where that cannot be told (not Linux)."""
    latents, seeds, size = encode(tokenizer, image), torch.zeros(1, dtype=torch.int64), (image.shape[2], image.shape[3])
    tokenizer.decode(latents, seeds=seeds, size=size)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        before = resident("VmRSS")
        tokenizer.decode(latents, seeds=seeds, size=size)
        return resident("VmHWM") - before
    except OSError:
        return None


def resident(key: str) -> int:
    """Bytes of this process in memory: now (VmRSS), at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def encode(tokenizer: Tokenizer, image: Tensor) -> Tensor:
    """The posterior's mode."""
    return tokenizer.encode(image, sample=False, seeds=torch.zeros(1, dtype=torch.int64)).float()
