"""Our checkpoint format: safetensors, with one metadata entry "tokbench" that says what the file is.

{"model": "ssdd" | "klvae" | "dit", "config": {...}, "info": {trained_on, losses, licence, note, ...},
 "training": {...}}
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from tokbench.errors import InputError
from tokbench.records.files import write_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def write_model(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, Any], dtype: "torch.dtype") -> None:
    """Write the tensors as `dtype`, whole or not at all."""
    from safetensors.torch import save

    plain = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(plain, metadata={"tokbench": json.dumps(metadata)}))


def read_model(path: Path, *models: str) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """The tensors as float32 and the metadata. Raises InputError if the file is no checkpoint of one of `models`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("tokbench", "{}"))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable checkpoint ({error})") from error
    if metadata.get("model") not in models:
        held = metadata.get("model") or "no tokbench model"
        raise InputError(f"{path}: holds {held}, expected {' or '.join(models)}")
    return tensors, metadata


def load_strictly(module: "nn.Module", tensors: Mapping[str, "Tensor"], where: Path) -> None:
    """Load all tensors. Raises InputError listing missing, unexpected and misshapen keys."""
    own = module.state_dict()
    wrong = [f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}" for name in own.keys() & tensors.keys()
             if own[name].shape != tensors[name].shape]  # fmt: skip
    faults = {"missing": sorted(own.keys() - tensors.keys()), "unexpected": sorted(tensors.keys() - own.keys())}
    text = "; ".join(f"{kind}: {', '.join(keys[:5])}" for kind, keys in (faults | {"shape": wrong}).items() if keys)
    if text:
        raise InputError(f"{where}: does not fit this model; {text}")
    module.load_state_dict(dict(tensors))


HEADER_LIMIT = 100_000_000  # bytes; the safetensors format allows no longer header


def checkpoint_metadata(path: Path) -> dict[str, Any]:
    """The `tokbench` metadata of a safetensors file ({} without one), read without torch.

    Raises InputError for a file that is no safetensors file.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT, path.stat().st_size):
                raise ValueError("its header is not one of safetensors")
            metadata = json.loads(stream.read(length)).get("__metadata__", {})
        record = json.loads(metadata.get("tokbench", "{}"))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    return record if isinstance(record, dict) else {}
