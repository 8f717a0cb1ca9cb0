"""From a full store to a result: metrics, rows, picture and the record, which is written last."""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokbench.data.pixels import quantise
from tokbench.errors import InputError, preview
from tokbench.evaluation import picture
from tokbench.evaluation.kits import Kits
from tokbench.evaluation.plan import Plan, dataset_of
from tokbench.evaluation.reconstruct import CODES, Cell, badness, reconstruct, seeded
from tokbench.metrics import METRICS, too_few
from tokbench.metrics.statistics import CONFIDENCE, t_quantile
from tokbench.records import provenance
from tokbench.records.files import hold, per_image_path, writable, write_per_image, write_whole
from tokbench.records.result import EvalResult, Settings, TokenizerInfo, Value, to_json
from tokbench.records.samples import CHUNK, SampleStore
from tokbench.runtime.device import describe_device


class SeedView:
    """A store as if only one of several seeds had been run: what metrics read."""

    def __init__(self, store: SampleStore, seed: int) -> None:
        self.store, self.seed, self.ids = store, seed, store.ids
        self._columns = set(store.columns)

    def column(self, name: str) -> np.ndarray:
        """float64 [N] in id order."""
        own = seeded(name, self.seed)
        return self.store.column(own if own in self._columns else name)

    def features(self, side: str, extractor: str) -> np.ndarray:
        """float32 [N, D] in id order; real images and codes are the same for every seed."""
        return self.store.features(
            side, extractor if side == "real" or extractor == CODES else seeded(extractor, self.seed)
        )


def over_seeds(values: Sequence[Value]) -> Value:
    """The mean over seeds, its standard error split into images and noise (said in the note).

    One seed's standard error over images holds the noise of that seed too; it is taken out before the noise of the
    mean over seeds is put in.
    """
    numbers = [value.value for value in values if value.value is not None]
    if len(values) == 1 or len(numbers) < len(values):
        return values[0]
    mean, spread = float(np.mean(numbers)), float(np.var(numbers, ddof=1))
    errors = [value.stderr for value in values if value.stderr is not None]
    images = math.sqrt(max(0.0, float(np.mean(np.square(errors))) - spread)) if errors else 0.0
    noise = math.sqrt(spread / len(numbers))
    stderr = math.hypot(images, noise)
    note = f"{len(numbers)} seeds; standard error {noise:.2g} by noise, {images:.2g} by images"
    n = values[0].n
    half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * stderr if values[0].low is not None else None
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Value(mean, stderr, low, high, n, "; ".join(filter(None, (values[0].note, note))))


@dataclass(frozen=True)
class Measured:
    """What the loop hands over: everything in the cell's store, and what is known besides."""

    cell: Cell
    metrics: Sequence[str]  # those that apply and are available
    unavailable: dict[str, str]
    seconds: Mapping[str, float]  # per image: encode, decode
    batch_size: int
    image_notes: dict[str, int]  # images turned, put on white, ... in this attempt


def finish(
    measured: Measured, info: TokenizerInfo, chosen: Mapping[str, Any], key: str | None, plan: Plan, path: Path | None,
    kits: Kits,
) -> EvalResult:  # fmt: skip
    """Compute every metric from the store and write the result, its rows and its picture; the JSON comes last."""
    cell = measured.cell
    real = {name: SampleStore(kept.folder) for name, kept in cell.store.real.items()}
    store = SampleStore(cell.store.folder, real=real)
    if not store.ids:
        raise InputError(f"{plan.source.name}: none of its {len(plan.source.ids)} images can be used")
    values = {name: checked(name, store, chosen["seeds"]) for name in measured.metrics}
    skipped = sorted(set(plan.source.ids) - set(store.ids))
    result = EvalResult(
        protocol=cell.conditions.protocol.name,
        protocol_fingerprint=cell.conditions.protocol.fingerprint(),
        tokenizer=info,
        dataset=dataset_of(plan, len(store.ids)),
        metrics=values,
        unavailable=measured.unavailable,
        settings=Settings(**chosen, skipped=len(skipped), skipped_ids=tuple(skipped[:100])),
        provenance=provenance.collect(
            describe_device(cell.conditions.device),
            cell.conditions.device.type,
            plan.world.size,
            batch_size=measured.batch_size,
            seconds=dict(measured.seconds),
            image_notes=measured.image_notes,
            extractors=dict(kits.networks),
            cell=key,
        ),
    )
    if path is not None:
        write_per_image(per_image_path(path), store.ids, table(list(values), store, chosen["seeds"]))
        if plan.save_images:
            write_whole(path.with_suffix(".png"), draw(cell, store, plan, path))
        write_whole(path, to_json(result))
    return result


def table(names: Sequence[str], store: SampleStore, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """The columns of the per-image table: those stored, and what features give per image, averaged over seeds."""
    columns = {name: store.column(name) for name in store.columns}
    views = [store] if len(seeds) == 1 else [SeedView(store, seed) for seed in seeds]
    for name in names:
        rows = METRICS[name].rows
        if rows is not None and len(store.ids) >= METRICS[name].minimum:
            columns[name] = np.mean([rows(view) for view in views], axis=0)
    return columns


def compute(name: str, store: SampleStore, seeds: Sequence[int]) -> Value:
    """A metric of everything in the store, averaged over seeds."""
    if len(store.ids) < METRICS[name].minimum:
        return too_few(len(store.ids), METRICS[name].minimum)
    if len(seeds) == 1:
        return METRICS[name].value(store)
    return over_seeds([METRICS[name].value(SeedView(store, seed)) for seed in seeds])


def checked(name: str, store: SampleStore, seeds: Sequence[int]) -> Value:
    """What `compute` gives; null, with the samples at fault, if what the metric reads of them is NaN or infinite."""
    metric, num_images = METRICS[name], len(store.ids)
    if num_images < metric.minimum:
        return compute(name, store, seeds)
    bad = not_finite(store.ids, [store.column(column)[:, None] for column in metric.columns])
    value, fault = Value(None), None
    if not bad:
        try:
            value = compute(name, store, seeds)
        except InputError as error:
            fault = error
        if fault is None and (value.value is None or math.isfinite(value.value)):
            return value
        views = [store] if len(seeds) == 1 else [SeedView(store, seed) for seed in seeds]
        sides = metric.sides if metric.extractor else ()
        bad = not_finite(store.ids, [view.features(side, metric.extractor or "") for view in views for side in sides])
    if fault is not None and not bad:
        raise fault
    note = f"NaN or infinity in {preview(bad)}" if bad else f"not a finite number ({value.value})"
    return Value(None, n=num_images, note=note)


def not_finite(ids: Sequence[str], arrays: Sequence[np.ndarray]) -> list[str]:
    """Ids of the samples with a NaN or infinity in one of these arrays [N, D]."""
    bad = np.zeros(len(ids), dtype=bool)
    for values in arrays:
        for start in range(0, len(ids), CHUNK):
            bad[start : start + CHUNK] |= ~np.isfinite(values[start : start + CHUNK]).all(axis=1)
    return [sample for sample, wrong in zip(ids, bad, strict=True) if wrong]


def draw(cell: Cell, store: SampleStore, plan: Plan, path: Path) -> bytes:
    """The picture of the first and the worst images, also saved one by one; those measured earlier are made again."""
    columns = {name: store.column(name) for name in store.columns}
    bad = badness(columns, len(store.ids))
    first = store.ids[: plan.save_images]
    worst = [store.ids[i] for i in np.argsort(-bad, kind="stable")[: plan.save_images] if store.ids[i] not in first]
    pairs = cell.album.pairs
    missing = [index for index, sample in enumerate(plan.source.ids) if sample in {*first, *worst} - pairs.keys()]
    for ids, batch, seeds in plan.batches(missing).seeded(cell.conditions.seeds[:1]) if missing else ():
        for sample, real, own in zip(ids, batch, seeds, strict=True):  # one by one: memory may not hold the batch
            decoded, _ = reconstruct(cell, [sample], real[None].to(cell.conditions.device), own[None])
            pairs[sample] = real, quantise(decoded[0], cell.conditions.protocol.fake_rounding)[0].cpu()
    picture.save_pairs(path, {sample: pairs[sample] for sample in (*first, *worst) if sample in pairs})
    psnr = dict(zip(store.ids, columns["psnr"], strict=True)) if "psnr" in columns else {}
    labels = {sample: f"{sample} {psnr[sample]:.2f} dB" if psnr else sample for sample in (*first, *worst)}
    rows = [(labels[sample], *pairs[sample]) for sample in first if sample in pairs]
    return picture.draw(rows + [("worst: " + labels[sample], *pairs[sample]) for sample in worst if sample in pairs])


def clear(path: Path, store: SampleStore, keep_features: bool) -> None:
    """Remove the finished cell's working folder, and those that older code or other settings left unfinished.

    Kept features are those of both sides, so that `compare` can pair them: the real ones are copied from their folders.
    """
    kept = path.with_suffix(".features")
    if keep_features:
        with writable(kept):
            for shared in store.real.values():
                for file in shared.folder.glob("real-*.bin"):
                    shutil.copyfile(file, store.folder / file.name)
            shutil.rmtree(kept, ignore_errors=True)
            store.folder.rename(kept)
    for folder in path.parent.glob(f".{path.stem}-*"):
        if re.fullmatch(re.escape(f".{path.stem}-") + "[0-9a-f]{12}", folder.name):
            with suppress(InputError), hold(folder):
                shutil.rmtree(folder, ignore_errors=True)
