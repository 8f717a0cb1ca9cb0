"""What a training run writes and heeds besides its weights: log lines, sample grids, bad losses, interruptions."""

import io
import json
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokbench.errors import CellError
from tokbench.metrics import METRICS
from tokbench.records.files import read_log, writable, write_whole
from tokbench.training.track import Tracker


class Log:
    """A JSON line per record in log.jsonl; resuming at a step drops the lines of later ones. One process writes.

    A tracker gets the same, and the pictures.
    """

    def __init__(self, path: Path, first_step: int, main: bool = True, tracker: Tracker | None = None) -> None:
        self.path, self.main, self.tracker = path, main, tracker
        if not main:
            return
        kept = [record for record in self.records() if record["step"] <= first_step]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, **record: Any) -> None:
        if not self.main:
            return
        with writable(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.tracker is not None:
            group = "train" if "rate" in record else "held-out"
            values = {f"{group}/{name}": value for name, value in record.items() if name != "step"}
            self.tracker.write(record["step"], values)

    def show(self, step: int, picture: Image.Image) -> None:
        """A picture into samples/ beside the log."""
        save_image(picture, self.path.with_name("samples") / f"{step:07d}.png")
        if self.tracker is not None:
            self.tracker.show(step, picture)

    def records(self) -> list[dict[str, Any]]:
        return read_log(self.path)


class Meter:
    """Means of losses between two log lines, and the rate of images."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.images, self.since = 0, time.perf_counter()

    def add(self, losses: Mapping[str, Tensor | float], images: int) -> None:
        self.images += images
        for name, value in losses.items():
            self.values.setdefault(name, []).append(float(value))

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.values.items()}

    def note(self) -> str:
        """For the progress bar: the rate of images and the losses so far, "45 images/s, loss 0.412, l1 0.11"."""
        # The loss comes first: a narrow terminal cuts the others off.
        losses = sorted(self.means().items(), key=lambda item: item[0] != "loss")
        rate = f"{self.images / (time.perf_counter() - self.since):.3g} images/s"
        return ", ".join([rate, *(f"{name} {value:.3g}" for name, value in losses)])

    def take(self) -> dict[str, float]:
        """The means since the last call, and start again."""
        seconds = time.perf_counter() - self.since
        record = self.means() | {"seconds": round(seconds, 3), "images_per_second": round(self.images / seconds, 2)}
        self.values, self.images, self.since = {}, 0, time.perf_counter()
        return record


def is_best(records: Sequence[Mapping[str, Any]], metric: str) -> bool:
    """Whether the last record with this held-out metric is the best of all."""
    values = [record[metric] for record in records if metric in record]
    better = max if METRICS[metric].better == "higher" else min
    return bool(values) and values[-1] == better(values)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying, so that the loop can save and stop. A second one is not caught."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for name, handler in before.items():
            signal.signal(name, handler)

    before = {name: signal.signal(name, note) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def check_losses(losses: Mapping[str, float], step: int, ids: Sequence[str], checkpoint: Path, limit: float) -> None:
    """Raises CellError naming step, samples and last good checkpoint for a loss that is not finite or above limit.

    The KL alone has no limit: it is summed over the latent, so that it grows with the crop, and a weight of 1e-6 or the
    like is its own.
    """
    for name, value in losses.items():
        if not math.isfinite(value) or (abs(value) > limit and name != "kl"):
            saved = f"last good checkpoint: {checkpoint}" if checkpoint.exists() else "no checkpoint yet"
            raise CellError(f"step {step}: {name} is {value} on {', '.join(ids)}; {saved}")


def image_grid(rows: Sequence[Tensor]) -> Image.Image:
    """Rows of float [B, 3, H, W] in [-1, 1], one under the other."""
    lines = [torch.cat(list(row.detach().float().cpu().clamp(-1, 1)), dim=2) for row in rows]
    pixels = ((torch.cat(lines, dim=1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def save_image(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_whole(path, buffer.getvalue())
