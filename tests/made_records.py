"""Result folders made up for the tests of reports: real records and per-image rows, seeded numbers."""

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np

from tokbench.records.result import Dataset, EvalResult, Provenance, TokenizerInfo, Value, to_json

MEANS = {"psnr": (24.0, 3.0), "ssim": (0.7, 0.1), "lpips-alex": (0.2, 0.05), "lpips-vgg": (0.3, 0.06)}


def rows(seed: int, n: int, shift: float) -> dict[str, np.ndarray]:
    """Per-image columns; `shift` makes the model better (in standard deviations over images)."""
    images, noise = np.random.default_rng(0).standard_normal(n), np.random.default_rng(seed).standard_normal(n)
    sign = {"psnr": 1, "ssim": 1, "lpips-alex": -1, "lpips-vgg": -1}
    return {k: mean + spread * (images + sign[k] * shift + 0.1 * noise) for k, (mean, spread) in MEANS.items()}


def record(name: str, *, seed: int = 0, n: int = 29, shift: float = 0.0, res: int = 256, **info: Any) -> EvalResult:
    """A result whose means and standard errors are those of `rows(seed, n, shift)`."""
    facts = {
        "family": "kl-vae",
        "downsample": 8,
        "channels": 4,
        "decoder_params": 6_100_000,
        "weights": "ab" * 32,
        **info,
    }
    metrics = {k: Value(float(v.mean()), float(v.std(ddof=1) / n**0.5), n=n) for k, v in rows(seed, n, shift).items()}
    metrics["rfid"] = Value(None, n=n, note="needs 2,048 images")
    return EvalResult(
        protocol="adm",
        protocol_fingerprint="f" * 16,
        tokenizer=TokenizerInfo(name=name, **facts),
        dataset=Dataset("samples", None, res, n, "d" * 16),
        metrics=metrics,
        provenance=Provenance(
            commit="0" * 40,
            dirty=False,
            date="2026-11-20T10:00:00+00:00",
            command=f"tokbench run --models {name} --res {res}",
            versions={"torch": "2.14.1"},
            device="CPU, 4 cores",
            seconds={"encode": 0.02, "decode": 0.04 * (1 + seed)},
        ),
    )


def per_image(columns: dict[str, np.ndarray]) -> bytes:
    """The gzipped CSV that lies beside a result."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["id", *columns])
    table.writerows(
        [f"img{i:05}", *map(repr, map(float, line))] for i, line in enumerate(zip(*columns.values(), strict=True))
    )
    return gzip.compress(text.getvalue().encode(), 1, mtime=0)


def write(folder: Path, result: EvalResult, columns: dict[str, np.ndarray] | None = None) -> Path:
    """Lay a result out as `tokbench run` does; with `columns` its per-image rows beside it."""
    place = (
        folder
        / result.protocol
        / f"{result.dataset.name}-{result.dataset.resolution}"
        / f"{result.tokenizer.name}.json"
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(to_json(result), encoding="utf-8")
    if columns is not None:
        place.with_suffix(".per_image.csv.gz").write_bytes(per_image(columns))
    return place
