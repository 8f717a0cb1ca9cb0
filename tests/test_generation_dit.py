"""The diffusion transformer and its flow, against closed forms."""

import pytest
import torch

from tokbench.errors import InputError
from tokbench.generation.dit import DiT, DiTConfig, dit_config


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameter_counts_are_the_papers(size: str, millions: int) -> None:
    with torch.device("meta"):
        model = DiT(dit_config(size, patch=2, channels=4, num_classes=1000))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
