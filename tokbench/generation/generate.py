"""`tokbench generate`: draw latents once a guidance scale, decode them by every tokenizer, score, write, tabulate."""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokbench import registry
from tokbench.data.pixels import to_float
from tokbench.errors import CellError, InputError
from tokbench.evaluation.model import model_key, with_facts
from tokbench.generation import Generation
from tokbench.generation.compatibility import check_fits
from tokbench.generation.sample import (
    FIRST,
    Draw,
    FlowGenerator,
    Generator,
    Sampling,
    balanced_labels,
    check_sampling,
    decode_latents,
    pack_npz,
    sample_id,
    sample_latents,
)  # fmt: skip
from tokbench.generation.score import Reference, generation_metrics, open_reference, score
from tokbench.metrics.suite import MetricSuite
from tokbench.records import provenance
from tokbench.records.files import in_turn, result_path, write_whole
from tokbench.records.measurement import Measurement
from tokbench.records.places import placed
from tokbench.records.result import Dataset, EvalResult, Settings, TokenizerInfo, to_json
from tokbench.records.samples import SampleStore
from tokbench.report.collect import known_results
from tokbench.report.columns import ResultEntry
from tokbench.report.leaderboard import blocks
from tokbench.report.tables import show
from tokbench.runtime.device import describe_device, find_dtype, prepare, select_device
from tokbench.runtime.processes import Processes, join
from tokbench.runtime.terminal import say
from tokbench.training.log import image_grid, save_image
from tokbench.weights.files import file_sha256

log = logging.getLogger("tokbench")
BATCH = {"cpu": 8, "cuda": 64, "mps": 8}


def open_generator(text: str, device: torch.device) -> Generator:
    """A folder or file of `tokbench train dit`, or hf:OWNER/NAME of a published DiT."""
    if text.startswith("hf:"):
        from tokbench.generation.published import PublishedDiT

        return PublishedDiT(text.removeprefix("hf:"), device)
    path = Path(text) / "generator.safetensors" if Path(text).is_dir() else Path(text)
    if not path.is_file():
        raise InputError(f"{path}: no such generator; train one with `tokbench train dit`, or hf:facebook/DiT-XL-2-256")
    return FlowGenerator(path, device, file_sha256(path))


def parse_labels(text: str) -> list[int]:
    """`207,360` or `0-9`: labels and ranges of them."""
    labels: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise InputError(f"--labels {part}: expected numbers and ranges, as 207,360 or 0-9")
        labels += range(int(first), int(last or first) + 1)
    return labels


def run_generate(
    asked: Generation, measurement: Measurement, *, out: Path = Path("runs"), results: Path = Path("results")
) -> int:
    """Generate, score, write a record for every tokenizer and guidance scale, print the table; 1 if a cell failed.

    The metrics and the batch size of `measurement`, its device and type are used; the adm protocol's rounding holds.
    Raises InputError for a generator, tokenizer, reference or setting that cannot be used, before anything is drawn.
    """
    with join() as processes:
        made, failures = _generate(asked, measurement, out, processes)
    if processes.main:
        entries = [ResultEntry(result, result_path(out, result)) for result in made]
        show(blocks(entries, known=known_results(out, results)), 130)
    return 1 if failures else 0


def _generate(
    asked: Generation, measurement: Measurement, out: Path, processes: Processes
) -> tuple[list[EvalResult], int]:
    """The records (rank 0) and how many cells failed."""
    # Everything that can be refused is refused before anything is drawn.
    device, dtype = select_device(measurement.device, processes.local_rank), find_dtype(measurement.dtype)
    specs, names = registry.parse_all(asked.tokenizer), generation_metrics(measurement.metrics)
    generator = open_generator(asked.generator, device)
    samplings = plan_samplings(asked, generator)
    labels = balanced_labels(asked.num_images, generator.classes, parse_labels(asked.labels))
    models = [(spec, registry.create(spec)) for spec in specs]
    for _, tokenizer in models:
        prepare(tokenizer, device)
        check_fits(generator.space, tokenizer, device)
    side = generator.space.resolution
    measurement = replace(measurement, resolution=side, metrics=tuple(names), seeds=(asked.seed,))
    suite = MetricSuite(names, asked.num_images, side, device)
    work = out / ".generate"
    reference = open_reference(asked.reference, side, suite.extractors, work, device, processes)

    results, failures = [], 0
    for how in samplings:
        folder = work / f"{generator.name}-{latents_key(generator, how, asked, measurement)}"
        batch_size = measurement.batch_size or BATCH[device.type]
        draw = Draw(generator, how, labels, folder, device, dtype, batch_size, processes)
        seconds = processes.together(partial(sample_latents, draw))
        for spec, tokenizer in models:
            info = with_facts(tokenizer)
            key = processes.broadcast(model_key(info, tokenizer) or secrets.token_hex(8))
            place = draw.folder / f"{info.name}-{key[:16]}"
            try:
                with SampleStore(place, rank=processes.rank) as store:
                    save_all = asked.save != "none"
                    images = place / "images"
                    decode_all = partial(decode_latents, draw, tokenizer, measurement, suite, store, images, save_all)
                    processes.together(decode_all)
            except CellError as error:
                log.error("%s", error)
                failures += 1
                continue
            if processes.main:
                store = SampleStore(place)
                made = record(draw, info, spec.text, store, measurement, suite, reference, asked, seconds)
                with in_turn(result_path(out, made).parent):
                    result = placed(out, made)
                    if result != made:
                        say(f"{out}/ holds other images of {info.name}: these are {result.tokenizer.name}")
                    keep(result, asked, out, place / "images", labels)
                results.append(result)
    return results, failures


def latents_key(generator: Generator, how: Sampling, asked: Generation, measurement: Measurement) -> str:
    """What decides the latents of a draw; an edit of the code draws them anew."""
    code = provenance.source_hash([type(generator).__module__])
    libraries = provenance.versions(("torch", "diffusers"))
    return provenance.key(generator.weights, asdict(how), asked.labels, measurement.dtype, code, libraries)[:16]


def record(
    draw: Draw,
    info: TokenizerInfo,
    spec: str,
    store: SampleStore,
    measurement: Measurement,
    suite: MetricSuite,
    reference: Reference,
    asked: Generation,
    seconds: float,
) -> EvalResult:
    """The scores of one tokenizer's images. Its protocol names the generator's recipe and the guidance scale, so that
    only tokenizers under the same recipe are ranked together."""
    generator, how = draw.generator, draw.how
    names = [name for name in measurement.metrics if name not in suite.unavailable]
    values, unavailable = score(names, store, reference, len(draw.labels))
    alike = [recipe(generator), generator.training, asdict(how), reference.fingerprint, asked.labels]
    return EvalResult(
        protocol=f"generate-{recipe(generator)}-g{how.guidance:g}",
        protocol_fingerprint=provenance.key(*alike)[:16],
        tokenizer=info,
        dataset=Dataset(reference.name, None, measurement.resolution, len(draw.labels), reference.fingerprint),
        metrics=values,
        unavailable={**suite.unavailable, **unavailable},
        settings=Settings(
            spec=spec,
            dtype=measurement.dtype,
            seeds=measurement.seeds,
            generation=describe_run(generator, how, asked.labels, reference),
        ),
        measurement=measurement,
        provenance=provenance.collect(
            describe_device(draw.device),
            draw.device.type,
            draw.processes.size,
            batch_size=draw.batch_size,
            seconds={"generator": seconds, "decode": float(np.median(store.column("decode.seconds")))},
            extractors={name: extractor.sha256 for name, extractor in suite.extractors.items()},
        ),
    )


def plan_samplings(asked: Generation, generator: Generator) -> list[Sampling]:
    """One for every guidance scale. Raises InputError for settings that the generator cannot follow."""
    if asked.num_images < 1:
        raise InputError(f"--num-images {asked.num_images}: must be at least 1")
    if len(asked.guidance_interval) != 2:
        raise InputError(f"--guidance-interval {asked.guidance_interval}: expected two numbers, as 0,0.7")
    steps = generator.default_steps if asked.steps is None else asked.steps
    sampler = asked.sampler or generator.samplers[0]
    interval = (asked.guidance_interval[0], asked.guidance_interval[1])
    samplings = [Sampling(scale, interval, steps, sampler, asked.seed) for scale in dict.fromkeys(asked.guidance)]
    for how in samplings:
        check_sampling(generator, how)
    return samplings


def recipe(generator: Generator) -> str:
    """What generators of different tokenizers must share for their gfid to be compared: size and steps of training."""
    return generator.name if generator.steps_trained is None else f"{generator.name}-{generator.steps_trained}"


def describe_run(generator: Generator, how: Sampling, labels: str, reference: Reference) -> dict[str, Any]:
    """The part of a record's settings that only generated images have."""
    return {
        "generator": {
            "name": generator.name,
            "weights": generator.weights,
            "steps_trained": generator.steps_trained,
            "note": generator.note,
        },
        **asdict(how),
        "labels": labels or "balanced over all classes",
        "reference": {
            "name": reference.name, "fingerprint": reference.fingerprint, "num_images": reference.num_images,
            "statistics": sorted(reference.stored),
        },
    }  # fmt: skip


def keep(result: EvalResult, asked: Generation, out: Path, images: Path, labels: Sequence[int]) -> None:
    """Write the record, a grid of the first samples and, if asked, ADM's npz beside it."""
    path = result_path(out, result)
    write_whole(path, to_json(result))
    rows = []
    for start in range(0, min(FIRST, len(labels)), 8):
        files = [images / f"{sample_id(number)}.png" for number in range(start, min(start + 8, len(labels)))]
        pixels = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]
        rows.append(to_float(torch.stack(pixels)))
    save_image(image_grid([row for row in rows if len(row) == len(rows[0])]), path.with_suffix(".png"))
    if asked.save == "npz":
        pack_npz(images, labels, int(result.dataset.resolution), path.with_suffix(".npz"))
    log.info("%s%s", path, f"; images in {images}" if asked.save != "none" else "")
