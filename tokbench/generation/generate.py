"""`tokbench generate`: draw latents once a guidance scale, decode them by every tokenizer, score, write, tabulate."""

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokbench import registry
from tokbench.data.pixels import to_float
from tokbench.errors import CellError, InputError
from tokbench.evaluation.plan import attributes, code_of, parts_of, with_facts
from tokbench.evaluation.reconstruct import Album, Cell, Conditions, Stopwatch
from tokbench.evaluation.run import numbers
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
from tokbench.metrics import find_metrics
from tokbench.metrics.suite import Instruments as Tools
from tokbench.metrics.suite import instruments
from tokbench.protocols import find_protocol
from tokbench.records import provenance
from tokbench.records.files import result_path, write_whole
from tokbench.records.result import Dataset, EvalResult, Settings, TokenizerInfo, to_json
from tokbench.records.samples import SampleStore
from tokbench.report.collect import known_results
from tokbench.report.columns import ResultEntry
from tokbench.report.leaderboard import blocks
from tokbench.report.tables import show
from tokbench.runtime.device import describe_device, find_dtype, prepare, select_device
from tokbench.runtime.processes import Processes, join
from tokbench.tokenizer import Tokenizer
from tokbench.training.log import image_grid, save_image
from tokbench.weights.files import file_sha256

log = logging.getLogger("tokbench")
BATCH = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True)
class GenerateOptions:
    """What the command line says."""

    generator: str
    tokenizer: str
    num_images: int
    reference: str
    guidance: str = "1"
    interval: str = "0,1"
    steps: int | None = None
    sampler: str | None = None
    labels: str = ""
    seed: int = 0
    metrics: str | None = None
    batch_size: str = "auto"
    device: str = "auto"
    dtype: str = "float32"
    save: str = "none"
    out: Path = Path("runs")
    results: Path = Path("results")


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


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text}: expected numbers, comma-separated") from None
    return numbers


def run_generate(options: GenerateOptions) -> int:
    """Generate, score, write a record for every tokenizer and guidance scale, print the table; 1 if a cell failed.

    Raises InputError for a generator, tokenizer, reference or setting that cannot be used, before anything is drawn.
    """
    with join() as world:
        return _generate(options, world)


def _generate(options: GenerateOptions, world: Processes) -> int:
    # Everything that can be refused is refused before anything is drawn.
    device, dtype = select_device(options.device, world.local_rank), find_dtype(options.dtype)
    specs, names = registry.parse_all(options.tokenizer), generation_metrics(options.metrics)
    generator = open_generator(options.generator, device)
    samplings = plan_samplings(options, generator)
    labels = balanced_labels(options.num_images, generator.classes, parse_labels(options.labels))
    models = [(spec, registry.create(spec)) for spec in specs]
    for _, tokenizer in models:
        prepare(tokenizer, device)
        check_fits(generator.space, tokenizer, device)
    resolution, work = generator.space.resolution, options.out / ".generate"
    tools = instruments(find_metrics(names), options.num_images, resolution, device)
    reference = open_reference(options.reference, resolution, tools.extractors, work, device, world)
    batch_size = None if options.batch_size == "auto" else numbers(options.batch_size, "--batch-size")[0]
    conditions = Conditions(find_protocol("adm"), resolution, device, dtype, (options.seed,), batch_size)

    results, failures = [], 0
    for how in samplings:
        folder = work / f"{generator.name}-{latents_key(generator, how, options)}"
        draw = Draw(generator, how, labels, folder, device, dtype, batch_size or BATCH[device.type], world)
        seconds = together(world, partial(sample_latents, draw))
        for spec, tokenizer in models:
            info = with_facts(tokenizer)
            place = draw.folder / f"{info.name}-{world.broadcast(images_key(tokenizer, info.weights))}"
            try:
                with SampleStore(place, rank=world.rank) as store:
                    cell = Cell(tokenizer, conditions, tools, store, Album(frozenset(), 0), Stopwatch(device))
                    together(world, partial(decode_latents, cell, draw, place / "images", options.save != "none"))
            except CellError as error:
                log.error("%s", error)
                failures += 1
                continue
            if world.rank == 0:
                result = record(draw, info, spec.text, SampleStore(place), names, tools, reference, options, seconds)
                keep(result, options, place / "images", labels)
                results.append(result)
    if world.rank == 0:
        entries = [ResultEntry(result, result_path(options.out, result)) for result in results]
        show(blocks(entries, known=known_results([options.out, options.results])), 130)
    return 1 if failures else 0


def together(world: Processes, call: Callable[[], Any]) -> Any:
    """The call's value, once all processes have finished theirs; if one fails, all raise the same CellError."""
    value, failure = None, None
    try:
        value = call()
    except CellError as error:
        failure = error
    world.raise_first_error(failure)
    return value


def latents_key(generator: Generator, how: Sampling, options: GenerateOptions) -> str:
    """What decides the latents of a draw; an edit of the code draws them anew."""
    return _key(
        generator.weights, asdict(how), options.labels, options.dtype,
        provenance.source_hash([type(generator).__module__]),
    )  # fmt: skip


def images_key(tokenizer: Tokenizer, weights: str | None) -> str:
    """What decides the images of given latents, code and settings included; another every time where nobody can tell.

    `weights`: sha256 of the tokenizer's state.
    """
    code = code_of(tokenizer)
    if weights is None or code is None:
        return secrets.token_hex(8)
    modules = [m for name in sorted(tokenizer.networks) for m in tokenizer.networks[name].modules()]
    return _key(weights, code, [attributes(part) for part in (*parts_of(tokenizer), *modules)])


def record(
    draw: Draw, info: TokenizerInfo, spec: str, store: SampleStore, names: Sequence[str], tools: Tools,
    reference: Reference, options: GenerateOptions, seconds: float,
) -> EvalResult:  # fmt: skip
    """The scores of one tokenizer's images. Its protocol names the generator's recipe and the guidance scale, so that
    only tokenizers under the same recipe are ranked together."""
    generator, how = draw.generator, draw.how
    values, unavailable = score(
        [name for name in names if name not in tools.unavailable], store, reference, len(draw.labels)
    )
    times = {"generator": seconds, "decode": float(np.median(store.column("decode.seconds")))}
    networks = {name: extractor.sha256 for name, extractor in tools.extractors.items()}
    return EvalResult(
        protocol=f"generate-{recipe(generator)}-g{how.guidance:g}",
        protocol_fingerprint=_key(
            recipe(generator), generator.training, asdict(how), reference.fingerprint, options.labels
        ),
        tokenizer=info,
        dataset=Dataset(reference.name, None, generator.space.resolution, len(draw.labels), reference.fingerprint),
        metrics=values,
        unavailable={**tools.unavailable, **unavailable},
        settings=Settings(
            spec=spec,
            dtype=options.dtype,
            seeds=(options.seed,),
            generation=describe_run(generator, how, options.labels, reference),
        ),
        provenance=provenance.collect(
            describe_device(draw.device),
            draw.device.type,
            draw.world.size,
            batch_size=draw.batch_size,
            seconds=times,
            extractors=networks,
        ),
    )


def plan_samplings(options: GenerateOptions, generator: Generator) -> list[Sampling]:
    """One for every guidance scale. Raises InputError for settings that the generator cannot follow."""
    if options.num_images < 1:
        raise InputError(f"--num-images {options.num_images}: must be at least 1")
    if options.save not in ("none", "png", "npz"):
        raise InputError(f"--save {options.save}: none, png or npz")
    interval = parse_numbers(options.interval, "--guidance-interval")
    if len(interval) != 2:
        raise InputError(f"--guidance-interval {options.interval}: expected two numbers, as 0,0.7")
    samplings = [
        Sampling(scale, (interval[0], interval[1]), generator.default_steps if options.steps is None else options.steps,
                 options.sampler or generator.samplers[0], options.seed)
        for scale in dict.fromkeys(parse_numbers(options.guidance, "--guidance"))
    ]  # fmt: skip
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


def keep(result: EvalResult, options: GenerateOptions, images: Path, labels: Sequence[int]) -> None:
    """Write the record, a grid of the first samples and, if asked, ADM's npz beside it."""
    path = result_path(options.out, result)
    write_whole(path, to_json(result))
    rows = []
    for start in range(0, min(FIRST, len(labels)), 8):
        files = [images / f"{sample_id(number)}.png" for number in range(start, min(start + 8, len(labels)))]
        pixels = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]
        rows.append(to_float(torch.stack(pixels)))
    save_image(image_grid([row for row in rows if len(row) == len(rows[0])]), path.with_suffix(".png"))
    if options.save == "npz":
        pack_npz(images, labels, result.dataset.resolution, path.with_suffix(".npz"))
    log.info("%s%s", path, f"; images in {images}" if options.save != "none" else "")


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
