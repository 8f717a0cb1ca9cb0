"""What a training run continues from."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokbench.config import to_dict
from tokbench.errors import InputError
from tokbench.records.files import write_whole

FREE_SETTINGS = (
    "device", "workers", "steps", "compile", "log_every", "sample_every", "save_every",
    "eval_every", "eval_resolution", "eval_metrics", "best_by",
)  # fmt: skip


def save_checkpoint(path: Path, config: Any, state: Mapping[str, Any]) -> None:
    """Write a training state whole or not at all."""
    buffer = io.BytesIO()
    torch.save({"config": json.dumps(to_dict(config)), **state}, buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: Path, config: Any) -> dict[str, Any] | None:
    """The state saved in `path`, or None if there is none yet. Raises InputError for a file that is no checkpoint or
    was written with settings that change the result, naming the first that differs."""
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        then = json.loads(state["config"])
    except (RuntimeError, KeyError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a training checkpoint ({error}); remove it to start again") from error
    now = json.loads(json.dumps(to_dict(config)))
    for settings in (then, now):
        settings |= {f"run.{k}": v for k, v in settings.pop("run").items() if k not in FREE_SETTINGS}
    for key in sorted(set(then) | set(now)):
        if then.get(key) != now.get(key):
            raise InputError(f"{path}: trained with {key}={then.get(key)}, not {now.get(key)}; use another --out")
    return state


@dataclass(frozen=True)
class Parts:
    """Everything with a state_dict that a run continues from, by name."""

    parts: Mapping[str, Any]

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
