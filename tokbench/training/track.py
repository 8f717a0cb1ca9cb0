"""What a run's log says, in the places where people look: TensorBoard, Weights & Biases, Trackio."""

import hashlib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from tokbench.config import describe, to_dict
from tokbench.errors import InputError


class Tracker(Protocol):
    """One process writes; `close` brings everything to its place."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def show(self, step: int, picture: Image.Image) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in out/tensorboard; what a resumed run takes again replaces what was there."""

    def __init__(self, config: Any, out: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(out / "tensorboard", purge_step=first_step + 1 if first_step else None)
        self.writer.add_text("configuration", "\n".join(f"    {line}" for line in describe(config)), first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def show(self, step: int, picture: Image.Image) -> None:
        self.writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """Weights & Biases or Trackio, which has the same calls: a run of the project tokbench, named after `out`.

    Where it goes, or that it stays on this machine, is decided by their own settings (WANDB_MODE=offline, ...).
    """

    def __init__(self, library: str, config: Any, out: Path) -> None:
        self.library = import_module(library)
        facts: dict[str, Any] = {"project": "tokbench", "name": out.name, "config": to_dict(config), "resume": "allow"}
        if library == "wandb":
            facts |= {"id": hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12], "dir": str(out)}
        self.run: Any = self.library.init(**facts)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def show(self, step: int, picture: Image.Image) -> None:
        self.run.log({"samples": self.library.Image(picture)}, step=step)

    def close(self) -> None:
        self.run.finish()


def open_tracker(name: str, config: Any, out: Path, first_step: int) -> Tracker:
    """InputError if the library is not installed."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        return TensorBoard(config, out, first_step) if name == "tensorboard" else Hosted(name, config, out)
    except ImportError as error:
        raise InputError(f"--track {name}: {name} is not installed; pip install 'tokbench[{name}]'") from error
