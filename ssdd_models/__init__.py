"""SSDD, the single-step diffusion decoder (arXiv 2510.04961): model, losses, training.

from ssdd_models import SSDD, SSDDConfig
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssdd_models.ssdd import SSDD, SSDDConfig

__all__ = ["SSDD", "SSDDConfig"]


def __getattr__(name: str) -> Any:
    if name not in __all__:  # the zoo is read without torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("ssdd_models.ssdd"), name)
