"""How baselines/weights/linear-f8c4.safetensors was made: python -m tests.baselines.fit_linear FOLDER OUT."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from baselines.classic import CHANNELS, NEIGHBOURS, PATCH
from tokbench.data.pixels import to_float


def read_blocks(path: Path, short_side: int) -> Tensor:
    """A photograph reduced as the adm protocol reduces it, trimmed to whole blocks: uint8 [3, H, W]."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short_side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.array(image.crop((0, 0, image.width // PATCH * PATCH, image.height // PATCH * PATCH)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def fit_linear(photographs: Path, out: Path, short_side: int = 256, ridge: float = 1e-3) -> None:
    """Fit both linear rows on a folder of .jpg and .png files and write them to `out` (safetensors).

    Normal equations in float64: mean and covariance of the blocks, then the ridge regression (penalty `ridge` per
    sample, latents have unit variance) of a block on its 5 x 5 neighbourhood.
    """
    paths = [path for path in sorted(photographs.iterdir()) if path.suffix.lower() in (".jpg", ".png")]
    images = [read_blocks(path, short_side) for path in paths]
    blocks = [F.pixel_unshuffle(to_float(image)[None], PATCH).double() for image in images]  # [1, 192, h, w]
    flat = torch.cat([block.flatten(2)[0].T for block in blocks])  # [n, 192], channel-major, then row, then column
    mean = flat.mean(0)
    variances, vectors = torch.linalg.eigh(torch.cov(flat.T))
    deviation, basis = variances[-CHANNELS:].sqrt().flip(0), vectors[:, -CHANNELS:].flip(1)  # [4], [192, 4]
    project = (basis / deviation).T  # [4, 192]
    gram, cross = torch.zeros(101, 101, dtype=torch.float64), torch.zeros(101, 192, dtype=torch.float64)
    for block in blocks:
        latents = torch.einsum("cd,bdhw->bchw", project, block - mean[:, None, None])
        padded = F.pad(latents, [NEIGHBOURS // 2] * 4, mode="replicate")
        inputs = F.pad(F.unfold(padded, NEIGHBOURS)[0].T, (0, 1), value=1.0)  # [n, 101], the last one the bias
        gram += inputs.T @ inputs
        cross += inputs.T @ block.flatten(2)[0].T
    penalty = torch.full((101,), ridge * len(flat), dtype=torch.float64)
    penalty[-1] = 0
    weights = torch.linalg.solve(gram + penalty.diag(), cross).T  # [192, 101]
    state = {
        "encoder.weight": project.reshape(CHANNELS, 3, PATCH, PATCH),
        "encoder.bias": -project @ mean,
        "pca-f8c4.0.weight": (basis * deviation)[:, :, None, None],
        "pca-f8c4.0.bias": mean,
        "linear-f8c4.0.weight": weights[:, :-1].reshape(3 * PATCH**2, CHANNELS, NEIGHBOURS, NEIGHBOURS),
        "linear-f8c4.0.bias": weights[:, -1],
    }
    save_file({key: value.float().contiguous() for key, value in state.items()}, out)


if __name__ == "__main__":
    fit_linear(Path(sys.argv[1]), Path(sys.argv[2]))
