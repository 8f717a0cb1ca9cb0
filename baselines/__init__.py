"""Baselines: classical codecs and linear floors, a KL-VAE, and published tokenizers.

from baselines import KLVAE, KLVAEConfig
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baselines.kl_vae import KLVAE, KLVAEConfig

__all__ = ["KLVAE", "KLVAEConfig"]


def __getattr__(name: str) -> Any:
    if name not in __all__:  # the zoo is read without torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("baselines.kl_vae"), name)
