"""Images kept out of training: which they are, and how a model in training does on them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokbench.data.crops import crop
from tokbench.data.pixels import quantise
from tokbench.data.training_crops import hold_out
from tokbench.errors import CellError, InputError
from tokbench.evaluation.reconstruct import Timer, reconstruct
from tokbench.metrics.suite import MetricSuite
from tokbench.protocols import PROTOCOLS
from tokbench.runtime.seeding import image_seeds
from tokbench.tokenizer import Tokenizer
from tokbench.training.optimisation import RunConfig


def open_images(data: str, run: RunConfig) -> tuple[Any, list[int], Tensor]:
    """The source, which of its images train, and the adm crops that are held out, uint8 [N, 3, R, R].

    Held out are run.held_out images of run.held_out_data or, without it, whole subjects of the source itself.
    """
    from tokbench.data.open import open_source

    if run.held_out and run.best_by not in run.eval_metrics:
        raise InputError(f"run.best_by={run.best_by} is none of run.eval_metrics={','.join(run.eval_metrics)}")
    source = judged = open_source(data)
    train, held = list(range(len(source))), []
    if run.held_out and run.held_out_data:
        judged = open_source(run.held_out_data, None, run.held_out)
        held = list(range(len(judged)))
    elif run.held_out:
        train, held = hold_out(source.ids, run.held_out)
    size = run.eval_resolution
    crops = [crop(judged.read(index), size, PROTOCOLS["adm"]).transpose(2, 0, 1) for index in held]
    return source, train, torch.from_numpy(np.stack(crops)) if crops else torch.empty(0, 3, size, size)


def score(tokenizer: Tokenizer, real: Tensor, metrics: Sequence[str], device: torch.device) -> dict[str, float]:
    """Means of the harness's per-image metrics on held-out images, uint8 [N, 3, R, R], under its adm protocol.

    Raises CellError if a metric cannot be had, for then no checkpoint could be chosen by it.
    """
    suite = MetricSuite(metrics, len(real), real.shape[2], device)
    for name, reason in suite.unavailable.items():
        raise CellError(f"held-out images cannot be scored: {name}: {reason}; see run.eval_metrics")
    rows: dict[str, list[float]] = {}
    protocol = PROTOCOLS["adm"]
    for part in real.split(2):
        batch = ([""] * len(part), part.to(device), image_seeds(part, 0)[:, None])
        decoded, _ = reconstruct(tokenizer, batch, protocol, torch.float32, Timer(device))
        fake = quantise(decoded[0], protocol.fake_rounding)
        for name, values in suite.score(batch[1], fake, decoded[0]).items():
            rows.setdefault(name, []).extend(values.tolist())
    return {name: sum(values) / len(values) for name, values in rows.items()}
