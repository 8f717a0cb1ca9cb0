"""Our checkpoint format: safetensors, with one metadata entry "tokbench" that says what the file is.

{"model": "ssdd" | "klvae" | "dit", "config": {...}, "info": {trained_on, losses, licence, note, ...},
 "training": {...}}
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from tokbench.config import to_dict
from tokbench.errors import InputError, preview, unreadable
from tokbench.records.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor, nn


def write_checkpoint(
    path: Path, model: str, network: "nn.Module", info: Mapping[str, Any], training: Mapping[str, Any]
) -> None:
    """Write a network with its `config`, a dataclass, as float32: whole or not at all."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().float().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {"model": model, "config": to_dict(network.config), "info": info, "training": training}
    write_whole(path, save(plain, metadata={"tokbench": json.dumps(metadata)}))


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework) as file:
            yield file
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(unreadable(path, "safetensors file", error)) from error


def read_header(path: Path, *models: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of a safetensors file's tensors and its `tokbench` metadata ({} for files of others), without torch.

    Raises InputError if the file is damaged or holds none of `models`, where any are named.
    """
    with _opened(path, "np") as file:
        metadata = json.loads((file.metadata() or {}).get("tokbench", "{}"))
        names = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    if models and metadata.get("model") not in models:
        held = metadata.get("model") or "no tokbench model"
        raise InputError(f"{path}: holds {held}, expected {' or '.join(models)}")
    return shapes, metadata


def read_checkpoint(path: Path, *models: str) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """The tensors as float32 and the metadata of a file. InputError as `read_header`."""
    _, metadata = read_header(path, *models)
    with _opened(path, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name).float() for name in names}, metadata


def load_strictly(
    module: "nn.Module", tensors: Mapping[str, "Tensor"], where: Path | str, prefix: str = "", assign: bool = False
) -> None:
    """Load all tensors whose names begin with `prefix`, less that. Raises InputError listing missing, unexpected and
    misshapen keys.

    `assign`: take the tensors themselves, for a module without memory of its own (on the meta device).
    """
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    own = module.state_dict()
    unlike = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    wrong = sorted(f"{name} {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}" for name in unlike)
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if any(faults.values()):
        text = "; ".join(f"{len(keys)} {what}: {preview(keys)}" for what, keys in faults.items() if keys)
        raise InputError(f"{where}: not the tensors of this model; {text}")
    module.load_state_dict(tensors, assign=assign)
