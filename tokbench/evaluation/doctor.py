"""`tokbench doctor`: what this machine has, and what is missing for which metric."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from tokbench import weights
from tokbench.metrics import METRICS
from tokbench.records import provenance
from tokbench.records.cache import cache_folder
from tokbench.runtime.device import describe_device, has_bfloat16
from tokbench.weights.transfer import megabytes

OPTIONAL = {"datasets": "--data hf:NAME", "pillow_heif": "HEIC images", "pillow_jxl": "JPEG XL images",
            "playwright": "tests of the page"}  # fmt: skip


def examine() -> Iterator[str]:
    """A line for each thing that a run can depend on."""
    yield "versions     " + ", ".join(
        f"{name} {version}" for name, version in provenance.collect("", "").versions.items()
    )
    absent = [f"{name} ({use})" for name, use in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    yield f"optional     {'not installed: ' + ', '.join(absent) if absent else 'all installed'}"
    yield from _devices()
    caches = {"cache": cache_folder(), "weights": weights.weights_dir(), "torch": weights.torch_cache()}
    for what, folder in (caches | {"hub": Path(HF_HUB_CACHE), "here": Path.cwd()}).items():
        yield f"{what:<12} {folder}: {_room(folder)}"
    yield f"network      {'none is used: TOKBENCH_OFFLINE is set' if weights.offline() else 'used where needed'}"
    lacking: dict[str, list[str]] = {}
    known = {name: metric for name, metric in METRICS.items() if not metric.probe}
    for metric in known.values():
        for network in metric.networks:
            lacking.setdefault(network, []).append(metric.name)
    reasons = {network: _missing(network) for network in lacking}
    ready = [name for name, metric in known.items() if not any(reasons[network] for network in metric.networks)]
    yield f"metrics      ready: {', '.join(ready)}"
    for network, names in lacking.items():
        if reasons[network]:
            yield f"{'':<12} not yet: {', '.join(names)}: {reasons[network]}"


def _devices() -> Iterator[str]:
    for device in [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]:
        has = "bfloat16" if has_bfloat16(device) else "no bfloat16 (emulated, many times slower than float32)"
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            has += f", {megabytes(free)} of {megabytes(total)} free"
        yield f"{device!s:<12} {describe_device(device)}; {has}"
    if not torch.cuda.is_available():
        yield f"cuda         none ({'torch is built without it' if torch.version.cuda is None else 'no GPU is seen'})"


def _room(folder: Path) -> str:
    """Free space, and whether anything can be written there."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    state = "" if os.access(place, os.W_OK) else ", cannot be written"
    return f"{megabytes(shutil.disk_usage(place).free)} free{state}{'' if folder.exists() else ', not there yet'}"


def _missing(network: str) -> str:
    """Why a network cannot be used as things are; "" if it can."""
    try:
        return "" if weights.locate(network) is not None else weights.missing(network)
    except weights.WeightsError as error:
        return str(error)


def show() -> None:
    """Print it."""
    sys.stdout.writelines(f"{line}\n" for line in examine())
