"""The frame of all probes: what is missing is measured in one pass over the images, and written as `run` writes it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokbench import registry
from tokbench.data.open import open_source
from tokbench.data.sources import Source
from tokbench.errors import CellError, InputError, trace
from tokbench.evaluation.cell import Cell, find_earlier, lacks, measure_cell, suite_for
from tokbench.evaluation.evaluate import Reconstructions, check_images, checked, settings_of
from tokbench.evaluation.model import check_size, model_key, with_facts
from tokbench.evaluation.pictures import draw
from tokbench.evaluation.probes.boxes import Box, annotated, framed
from tokbench.evaluation.probes.look import Base, Look
from tokbench.evaluation.probes.seeds import deviation_map
from tokbench.evaluation.reconstruct import Columns, Fakes, Features, Timer
from tokbench.evaluation.run import share_facts
from tokbench.metrics import DRIFTING, NOISED, SEEDED, metrics_of
from tokbench.protocols import NATIVE, size_text
from tokbench.records.files import per_image_path, read_per_image, result_path, write_whole
from tokbench.records.measurement import Measurement
from tokbench.records.places import placed
from tokbench.records.result import EvalResult
from tokbench.registry import Probe
from tokbench.report.columns import ResultEntry
from tokbench.report.probes.table import probe_tables
from tokbench.report.tables import show
from tokbench.runtime.device import describe_device, prepare, release, select_device
from tokbench.runtime.processes import Processes, join
from tokbench.runtime.terminal import say
from tokbench.tokenizer import Tokenizer

BASE = tuple(dict.fromkeys((*DRIFTING, *SEEDED)))
Probes = Mapping[str, Probe]


@dataclass
class Probed:
    """The `Pairs` of images and reconstructions, with what probes find out about them."""

    plain: Reconstructions
    look: Look
    probes: Sequence[Probe]

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[Sequence[str], Tensor, Tensor]]:
        """Crops as `run` has them; whole images where boxes are looked at."""
        if not self.look.boxes:
            yield from self.plain.batches(indices)
        else:
            whole = replace(self.plain, measurement=replace(self.plain.measurement, resolution=NATIVE))
            yield from whole.batches(indices)

    def base(self, ids: Sequence[str], real: Tensor, seeds: Tensor) -> Base:
        """The reconstruction that all probes start from."""
        return (framed if self.look.boxes else Look.reconstruct)(self.look, ids, real, seeds)

    def fakes(self, ids: Sequence[str], real: Tensor, beside: Tensor) -> tuple[Fakes, Columns, Features]:
        """The reconstruction, and all that the probes give."""
        base, found = self.base(ids, real, beside[:, 0]), dict[Any, Tensor]()
        for probe in self.probes:
            found |= probe.measure(self.look, base)
        columns = {name: values for name, values in found.items() if isinstance(name, str)}
        features = {name: values for name, values in found.items() if not isinstance(name, str)}
        return {self.look.seed: (base.fake, None)}, columns, features

    def facts(self, processes: Processes) -> dict[str, Any]:
        """What was done to images; nothing is timed."""
        return self.plain.facts(processes)


@dataclass(frozen=True)
class Asked:
    """What is the same for every model: probes and the images that they look at."""

    probes: Probes
    source: Source
    measurement: Measurement
    device: torch.device
    processes: Processes
    out: Path
    fresh: bool
    boxes: Mapping[str, list[Box]] = field(default_factory=dict)  # by id, where probes look at boxes

    @property
    def base(self) -> tuple[str, ...]:
        """Metrics of the reconstruction itself: curves begin there."""
        noised = NOISED if "robustness" in self.probes else ()
        return () if self.boxes else tuple(dict.fromkeys((*BASE, *noised)))


def run_probes(
    names: str | None, models: str, measurement: Measurement, *, data: str = "samples", split: str | None = None,
    limit: int | None = None, out: Path = Path("runs/probes"), fresh: bool = False,
) -> int:  # fmt: skip
    """Probe every model and print the table; the exit status, 1 if a model failed. Without names: all that need no
    annotated boxes.

    Raises InputError for an unknown probe or model, options that are wrong or images that cannot be used.
    """
    known = registry.PROBES.all()
    asked = [name.strip() for name in names.split(",")] if names else [n for n, p in known.items() if not p.boxes]
    probes, specs = {name: registry.PROBES.find(name) for name in asked}, registry.parse_all(models)
    measurement = checked(replace(measurement, metrics=BASE, seeds=measurement.seeds[:1], save_images=0))
    failed = False
    with join() as processes:
        device = select_device(measurement.device, processes.local_rank)
        for kind in dict.fromkeys(probe.boxes for probe in probes.values()):
            source = open_source(data, split, limit)
            boxes: dict[str, list[Box]] = {}
            if kind:
                if not isinstance(measurement.resolution, int):
                    raise InputError(f"--res {measurement.resolution}: boxes need a side, as --res 256")
                source, boxes = annotated(source, kind)
            share_facts(source, out, processes)
            check_images(source, measurement)
            own = {name: probe for name, probe in probes.items() if probe.boxes == kind}
            group = Asked(own, source, measurement, device, processes, out, fresh, boxes)
            if processes.main:
                announce(group, len(specs))
            failed |= probe_models(specs, group)
    return int(failed)


def announce(asked: Asked, num_models: int) -> None:
    """Before a run: how many passes over how many images."""
    probes, images = asked.probes, f"{len(asked.source)} images of {asked.source.name}"
    say(f"{images} at {size_text(asked.measurement.resolution)}, {num_models} models, on "
        f"{describe_device(asked.device)}; results in {asked.out}/")  # fmt: skip
    passes = {name: (probe.encodings + probe.decodings) / 2 for name, probe in probes.items()}
    say(f"encode-decode passes of the set, for each model at most: {1 + sum(passes.values()):.3g}, of which 1 shared, "
        + ", ".join(f"{name} {number:.3g}" for name, number in passes.items()))  # fmt: skip


def probe_models(specs: Sequence[registry.Spec], asked: Asked) -> bool:
    """Probe one model after the other and print the table; whether one failed."""
    entries = []
    for spec in specs:
        try:
            tokenizer = asked.processes.together(partial(registry.create, spec))
            if not asked.boxes:
                check_size(tokenizer, asked.measurement.resolution)
            result, path = probe_one(tokenizer, spec.text, asked)
            entries.append(ResultEntry(result, path))
        except CellError as error:
            trace(error)
            say(f"failed: {spec.row}: {error}")
        release(asked.device)
    if entries and asked.processes.main:
        show(probe_tables(entries, list(asked.probes)), 130)
    return len(entries) < len(specs)


def probe_one(tokenizer: Tokenizer, spec: str, asked: Asked) -> tuple[EvalResult, Path]:
    """The record of a tokenizer, with what these probes give of it, and its file; errors as of `measure_cell`."""
    info, source, measurement = with_facts(tokenizer), asked.source, asked.measurement
    taken = replace(measurement, resolution=NATIVE) if asked.boxes else measurement  # whole images, never enlarged
    settings = settings_of(tokenizer, spec, source, taken)
    refused = {name: why for probe in asked.probes.values() for name, why in probe.refuses(info).items()}
    given = {name: [m.name for m in metrics_of(name) if m.name not in refused] for name in asked.probes}
    metrics = (*asked.base, *(metric for names in given.values() for metric in names))
    measurement = replace(measurement, metrics=metrics, seeds=settings.seeds)
    model = model_key(info, tokenizer)
    cell = Cell(info, source, measurement, settings, model, asked.device, asked.out, asked.processes, refused)
    cell = replace(cell, info=asked.processes.by_main(lambda: placed(asked.out, cell.blank).tokenizer))
    earlier = asked.processes.by_main(lambda: None if asked.fresh else find_earlier(cell))
    todo = [
        name for name, own in given.items() if any(earlier is None or lacks(earlier, one, cell.suite) for one in own)
    ]
    prepare(tokenizer, asked.device)
    suite = cache(lambda names: suite_for(source, replace(measurement, metrics=names), asked.device))
    look = Look(tokenizer, measurement, suite, Timer(asked.device), asked.boxes)
    plain = Reconstructions(tokenizer, source, measurement, Timer(asked.device))
    pairs = Probed(plain, look, [asked.probes[name] for name in todo])
    result, _ = measure_cell(cell, pairs, fresh=asked.fresh)
    path = result_path(asked.out, result)
    if "seeds" in todo and asked.processes.main:
        write_whole(path.with_suffix(".seeds.png"), seeds_picture(pairs, path))
    return result, path


def seeds_picture(pairs: Probed, path: Path, count: int = 4) -> bytes:
    """PNG of the first images and of those whose pixels differ most between seeds: input, reconstruction, deviation."""
    ids, columns = read_per_image(per_image_path(path))
    deviations = columns["noise-deviation"]
    most = [ids[i] for i in np.argsort(-deviations, kind="stable")[:count]]
    shown = dict.fromkeys((*ids[:count], *most))
    rows: dict[str, tuple[str, Tensor, Tensor, Tensor]] = {}
    for names, real, seeds in pairs.batches([i for i, sample in enumerate(pairs.plain.source.ids) if sample in shown]):
        for i, sample in enumerate(names):  # one by one: memory may not hold the batch
            base = pairs.base([sample], real[i : i + 1].to(pairs.look.timer.device), seeds[i : i + 1, 0])
            title = f"{sample} {deviations[ids.index(sample)]:.2f}/255"
            rows[sample] = (title, real[i], base.fake[0].cpu(), deviation_map(pairs.look, base)[0].cpu())
    return draw([rows[sample] for sample in shown], titles=("real", "reconstruction", "deviation"))
