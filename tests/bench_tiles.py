"""Peak memory of one image through a tokenizer, whole and in tiles, each in a process of its own.

    python -m tests.bench_tiles [MODEL] [DEVICE]

Encoded and decoded, as `tokbench run` does it; without metrics. "beyond idle" leaves out what the process and its
weights take; "pixels" is the image as uint8 and its reconstruction in float32, which no way of cutting can save.
"""

import resource
import subprocess
import sys

import torch

from tokbench.registry import create
from tokbench.runtime.device import precision, prepare, select_device

CASES = ((1024, ""), (1024, "@tile=512@overlap=64"), (4096, "@tile=512@overlap=64"))


def peak(device: torch.device) -> float:
    """MiB that were ever taken: on a GPU by tensors, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**20 if sys.platform == "darwin" else 1024)


@torch.inference_mode()
def measure(spec: str, side: int, device: torch.device) -> None:
    """Print the peak before and after one round trip of a smooth image."""
    tokenizer, seeds = create(spec), torch.tensor([1])
    prepare(tokenizer, device)
    with precision(device, torch.float32):
        small = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)
        tokenizer.decode(tokenizer.encode(small, sample=False, seeds=seeds), seeds=seeds, size=(64, 64))
        idle = peak(device)
        ramp = torch.arange(side, device=device)
        image = ((ramp[:, None] + 2 * ramp) // 16 % 256).to(torch.uint8).expand(1, 3, side, side).contiguous()
        latents = tokenizer.encode(image, sample=False, seeds=seeds)
        decoded = tokenizer.decode(latents, seeds=seeds, size=(side, side))
    assert decoded.isfinite().all()
    print(idle, peak(device))


def main(model: str = "klvae", device: str = "auto") -> None:
    print(f"{model} on {select_device(device)}: MiB at the peak, beyond idle, pixels")
    first = 0.0
    for side, tiles in CASES:
        command = [sys.executable, "-m", "tests.bench_tiles", "--one", model + tiles, str(side), device]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        idle, most = map(float, output.split())
        first = first or most - idle
        pixels = side * side * 3 * 5 / 2**20
        print(f"{side:5} px {tiles or 'whole':<22}{most:9.0f}{most - idle:9.0f}{pixels:9.0f}")
    print(f"4096 px in tiles against 1024 px whole: {(most - idle) / first:.2f}x the memory for 16x the pixels")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2], int(sys.argv[3]), select_device(sys.argv[4]))
    else:
        main(*sys.argv[1:])
