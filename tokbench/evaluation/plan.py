"""What a cell is: the conditions and metrics that all share, and the key that says whether it was measured before."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tokbench import registry
from tokbench.data.loader import Loader
from tokbench.data.sources import Source
from tokbench.errors import InputError
from tokbench.evaluation.kits import Kits
from tokbench.evaluation.reconstruct import Conditions
from tokbench.records import provenance
from tokbench.records.files import result_path
from tokbench.records.result import Dataset, EvalResult, TokenizerInfo
from tokbench.runtime.device import count_parameters, hash_state
from tokbench.runtime.processes import Processes
from tokbench.tokenizer import Tokenizer


@dataclass(frozen=True)
class Plan:
    """What all cells of a resolution share."""

    source: Source
    fingerprint: str
    conditions: Conditions
    batches: Callable[[Sequence[int]], Loader]  # of these samples, by index
    skip_bad: bool = False  # images that cannot be read are left out and counted
    upscaled: int | None = None  # how many images are enlarged; None: none may be
    world: Processes = field(default_factory=Processes)
    out: Path | None = None  # None: nothing is kept
    fresh: bool = False
    keep_features: bool = False
    save_images: int = 0


def with_facts(tokenizer: Tokenizer) -> TokenizerInfo:
    """The tokenizer's info with what the harness itself finds out: parameters and the hash of the state."""
    return replace(
        tokenizer.info,
        encoder_params=count_parameters(tokenizer.networks.get("encoder")),
        decoder_params=count_parameters(tokenizer.networks.get("decoder")),
        weights=hash_state(tokenizer),
    )


def check_size(tokenizer: Tokenizer, resolution: int) -> None:
    """InputError if the model cannot take images of this size."""
    multiple = tokenizer.info.size_multiple
    if resolution % multiple:
        nearest = max(1, resolution // multiple) * multiple
        raise InputError(
            f"{tokenizer.info.name}: needs sizes divisible by {multiple}, got --res {resolution}; try {nearest}"
        )


def settings(tokenizer: Tokenizer, spec: str, plan: Plan) -> dict[str, Any]:
    """What the user chose and what of it changes a number. One seed is enough where nothing is drawn."""
    conditions = plan.conditions
    drawn = not tokenizer.info.deterministic or conditions.protocol.posterior == "sample"
    return {
        "spec": spec,
        "dtype": str(conditions.autocast).removeprefix("torch."),
        "seeds": conditions.seeds if drawn else conditions.seeds[:1],
        **({"upscaled": plan.upscaled} if plan.upscaled is not None else {}),
    }


def cell_key(
    info: TokenizerInfo, tokenizer: Tokenizer, plan: Plan, chosen: Mapping[str, Any], kits: Kits
) -> str | None:
    """sha256 over everything that can change the cell's numbers, the code included; None: never to be cached."""
    parts, source = parts_of(tokenizer), code_of(tokenizer)
    if info.weights is None or source is None:
        return None
    record = {
        "protocol": plan.conditions.protocol.fingerprint(),
        "dataset": plan.fingerprint,
        "resolution": plan.conditions.resolution,
        "device": plan.conditions.device.type,
        "weights": info.weights,
        "attributes": [attributes(part) for part in parts]
        + [attributes(m) for name in sorted(tokenizer.networks) for m in tokenizer.networks[name].modules()],
        "settings": dict(chosen),
        "metrics": {m.name: [kits.networks.get(name, name) for name in m.networks] for m in kits.metrics},
        "source": source,
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def parts_of(tokenizer: Tokenizer) -> list[object]:
    """The tokenizer and, of two that were joined, each."""
    parts = (tokenizer, getattr(tokenizer, "encoding", None), getattr(tokenizer, "decoding", None))
    return [part for part in parts if part is not None]


def code_of(tokenizer: Tokenizer) -> str | None:
    """sha256 over the source of tokbench and of the packages that define the tokenizer; None if one has none."""
    inside = {type(m).__module__ for network in tokenizer.networks.values() for m in network.modules()}
    known = registry.packages()
    own = [m for m in inside if m.partition(".")[0] in known or not provenance.installed(m)]
    return provenance.source_hash([type(part).__module__ for part in parts_of(tokenizer)] + own)


def attributes(owner: object) -> list[str]:
    """What a part of a model holds besides tensors and other parts: two objects may differ in nothing else."""
    kinds = (bool, int, float, str, tuple, torch.dtype)
    found = [f"{k}={v!r}" for k, v in getattr(owner, "__dict__", {}).items() if isinstance(v, kinds) or is_dataclass(v)]
    return sorted(text for text in found if " at 0x" not in text and not text.startswith(("training=", "_")))


def cell_path(out: Path, plan: Plan, name: str) -> Path:
    """Where the result of a cell lies."""
    empty = EvalResult(
        protocol=plan.conditions.protocol.name,
        protocol_fingerprint="",
        tokenizer=TokenizerInfo(name, ""),
        dataset=dataset_of(plan, 0),
        metrics={},
    )
    return result_path(out, empty)


def dataset_of(plan: Plan, num_images: int) -> Dataset:
    return Dataset(plan.source.name, plan.source.split, plan.conditions.resolution, num_images, plan.fingerprint)
