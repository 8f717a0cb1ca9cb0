"""Our checkpoint format: safetensors, with one metadata entry "tokbench" that says what the file is.

{"model": "ssdd" | "klvae" | "dit", "config": {...}, "info": {trained_on, losses, licence, note, ...},
 "training": {...}}
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokbench.errors import InputError, preview
from tokbench.records.files import write_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

HEADER_LIMIT = 100_000_000  # bytes; the safetensors format allows no longer header


def write_checkpoint(
    path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, Any], dtype: "torch.dtype"
) -> None:
    """Write the tensors as `dtype`, whole or not at all."""
    from safetensors.torch import save

    plain = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(plain, metadata={"tokbench": json.dumps(metadata)}))


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of a safetensors file's tensors and its `tokbench` metadata ({} for files of others), without torch.

    Raises InputError for a file that is no safetensors file.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT, path.stat().st_size):
                raise ValueError("its header is not one of safetensors")
            header = json.loads(stream.read(length))
        metadata = json.loads(header.pop("__metadata__", {}).get("tokbench", "{}"))
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    return shapes, metadata if isinstance(metadata, dict) else {}


def read_checkpoint(path: Path, *models: str) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """The tensors as float32 and the metadata of a file of one of `models`, or of any file if none is named.

    Raises InputError if the file is damaged or holds another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _, metadata = read_header(path)
    if models and metadata.get("model") not in models:
        held = metadata.get("model") or "no tokbench model"
        raise InputError(f"{path}: holds {held}, expected {' or '.join(models)}")
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}, metadata
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def load_strictly(
    module: "nn.Module", tensors: Mapping[str, "Tensor"], where: Path | str, assign: bool = False
) -> None:
    """Load all tensors. Raises InputError listing missing, unexpected and misshapen keys.

    `assign`: take the tensors themselves, for a module without memory of its own (on the meta device).
    """
    own = module.state_dict()
    unlike = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    wrong = sorted(f"{name} {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}" for name in unlike)
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if any(faults.values()):
        text = "; ".join(f"{len(keys)} {what}: {preview(keys)}" for what, keys in faults.items() if keys)
        raise InputError(f"{where}: not the tensors of this model; {text}")
    module.load_state_dict(dict(tensors), assign=assign)
