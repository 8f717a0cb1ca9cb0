"""Golden values of SSDD: the rule that fills weights from key names, inputs from seeds, and the files in golden/."""

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssdd_models.ssdd import SSDD

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-4
CASES = json.loads((GOLDEN / "index.json").read_text())["cases"]


def manifest() -> dict[str, dict[str, Any]]:
    """{"f8c4" | "z4_M" | ...: {"params": number, "shapes": {key: shape}}} of every encoder and decoder."""
    return json.loads(gzip.decompress((GOLDEN / "manifest.json.gz").read_bytes()))


def full_shapes(encoder: str, size: str) -> dict[str, list[int]]:
    """Keys and shapes of a whole checkpoint, as released."""
    known = manifest()
    parts = {"encoder": known[encoder], "decoder": known[f"z{encoder.split('c')[1]}_{size}"]}
    return {f"{part}.{key}": shape for part, record in parts.items() for key, shape in record["shapes"].items()}


def fill(key: str, shape: Iterable[int]) -> Tensor:
    shape = tuple(shape)
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("relative_bias_table"):
        n = np.float32(0.5) * n
    elif len(shape) >= 2:
        n = n * np.float32(1 / math.sqrt(math.prod(shape[1:])))
    else:
        n = np.float32(1) + np.float32(0.1) * n if key.endswith(".weight") else np.float32(0.05) * n
    return torch.from_numpy(n)


def filled(module: Any, prefix: str = "") -> Any:
    """Fill all weights of a module by their names below `prefix`."""
    module.load_state_dict({key: fill(prefix + key, value.shape) for key, value in module.state_dict().items()})
    return module


@cache
def _model(encoder: str, size: str) -> SSDD:
    with torch.device("meta"):
        built = SSDD(encoder, size)
    return SSDD.from_state(built.config, {key: fill(key, value.shape) for key, value in built.state_dict().items()})


def model(case: Mapping[str, Any]) -> SSDD:
    """The model of a case, filled; shared by the tests, which must not change its weights."""
    return _model(case["encoder"], case["decoder"]).eval()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def image(seed: int, batch: int, height: int, width: int) -> Tensor:
    """Smooth random images [B, 3, H, W] in [-1, 1]."""
    random = np.random.RandomState(seed)
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    out = np.zeros((batch, 3, height, width))
    for plane in out.reshape(-1, height, width):
        for _ in range(6):
            fx, fy, phase, size = (random.uniform(*span) for span in ((0, 6), (0, 6), (0, 6.28), (0.1, 0.4)))
            plane += size * np.sin(2 * np.pi * (fx * x + fy * y) + phase)
    out += 0.1 * random.standard_normal(out.shape)
    return torch.from_numpy(np.clip(out, -1, 1).astype(np.float32))


def inputs(case: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Images and noise of a case."""
    size = case["B"], case["H"], case["W"]
    return image(case["x_seed"], *size), noise(case["noise_seed"], size[0], 3, *size[1:])
