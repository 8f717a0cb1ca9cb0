"""Files of weights: their hashes, and reading them without running anything."""

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tokbench.errors import FILE_ERRORS, InputError, unreadable
from tokbench.records.cache import stamp_of


class WeightsError(InputError):
    """A network's weights are missing, or are not what they should be; the message says how to get them."""


def offline() -> bool:
    """TOKBENCH_OFFLINE is set to something that is not 0."""
    return os.environ.get("TOKBENCH_OFFLINE", "0") not in ("", "0")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes; read once a process unless it changes."""
    return _sha256(path, stamp_of(path))


@cache
def _sha256(path: Path, stamp: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, expected: str, what: str) -> Path:
    """The path, if the file's sha256 begins with `expected`; WeightsError naming both digests if not."""
    found = file_sha256(path)
    if not found.startswith(expected):
        raise WeightsError(
            f"{what}: {path} has sha256 {found[:16]}..., expected {expected[:16]}...; "
            f"remove it and run `tokbench weights fetch {what}`"
        )
    return path


def load(path: Path) -> Mapping[str, Any]:
    """The tensors of a safetensors or torch file, by name, on the CPU. WeightsError if it is neither."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: Mapping[str, Any]
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except (*FILE_ERRORS, SafetensorError) as error:
        raise WeightsError(unreadable(path, "file of weights", error)) from None
