"""Scores of generated images against a reference: ADM's statistics file, or images of any source."""

import hashlib
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from tokbench.data.loader import Loader
from tokbench.data.open import open_source
from tokbench.errors import ARRAY_ERRORS, InputError, first_line, unreadable
from tokbench.metrics import FRECHET_MINIMUM, METRICS, RENAMED, find_metrics, frechet
from tokbench.metrics.extractors import Extractor
from tokbench.metrics.statistics import from_half_samples, half_samples
from tokbench.protocols import find_protocol
from tokbench.records import provenance
from tokbench.records.result import Value
from tokbench.records.samples import SampleStore
from tokbench.runtime.processes import Processes
from tokbench.runtime.terminal import bar

DEFAULT = ("gfid", "is", "precision", "recall", "kid", "fd-dinov2", "fd-mobilenet")
INCEPTION_DIM = 2048
BATCH = 32  # reference images at a time
Batches = Iterable[tuple[Sequence[str], torch.Tensor]]  # ids and images uint8 [B, 3, H, W]


def generation_metrics(asked: Sequence[str]) -> list[str]:
    """The metrics asked for, else all, in the table's order. InputError for one that needs what was reconstructed."""
    names = asked or DEFAULT
    for metric in find_metrics(names):
        if metric.scope == "reconstruction" or metric.name.startswith("rfid"):
            known = ", ".join(m.name for m in METRICS.values() if m.scope != "reconstruction" and m.name != "rfid")
            raise InputError(
                f"--metrics {metric.name}: compares an image with its reconstruction; generation has {known}"
            )
    return [metric.name for metric in find_metrics(names)]


@dataclass
class Reference:
    """What generated images are compared with. `stored` moments are those of a statistics file.

    Features lie in stores under the extractor's identity, so that other weights or another resize are not mixed up
    with them; `identities` gives it by the extractor's name.
    """

    name: str
    fingerprint: str
    num_images: int  # whose features are at hand
    store: SampleStore | None
    stored: Mapping[str, frechet.Moments]
    identities: Mapping[str, str]

    def moments(self, extractor: str) -> frechet.Moments:
        if extractor in self.stored:
            return self.stored[extractor]
        return frechet.moments(self.features(extractor))

    def features(self, extractor: str) -> np.ndarray:
        """float32 [N, D]; LookupError with the reason if the reference holds no images."""
        if self.store is None:
            raise LookupError(f"{self.name} holds statistics only, no images (arr_0); give a folder as --reference")
        return self.store.features("real", self.identities[extractor])


@dataclass(frozen=True)
class StoredImages:
    """The images uint8 [N, H, W, 3] of an .npz file, which are read one after the other and never all at once."""

    path: Path
    shape: tuple[int, ...]

    def batches(self, wanted: Sequence[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Numbers, in order, and images uint8 [B, 3, H, W]. InputError where the file is damaged."""
        image = self.shape[1:]
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _read_header(file)
            for start in range(0, max(wanted, default=-1) + 1, BATCH):
                count = min(BATCH, self.shape[0] - start)
                try:
                    block = np.frombuffer(file.read(count * math.prod(image)), np.uint8).reshape(count, *image)
                except ARRAY_ERRORS as error:
                    where = f"images {start} to {start + count - 1} of arr_0"
                    raise InputError(f"{self.path}: {where} cannot be read ({first_line(error)})") from error
                if numbers := sorted(set(range(start, start + count)).intersection(wanted)):
                    yield numbers, torch.from_numpy(block[np.array(numbers) - start]).permute(0, 3, 1, 2).contiguous()


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of an .npy file, which is left where its data begins."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _stored_images(path: Path) -> StoredImages | None:
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            return None
        with archive.open("arr_0.npy") as file:
            shape, fortran, dtype = _read_header(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        order = " in Fortran order" if fortran else ""
        raise InputError(f"{path}: arr_0 is {dtype} {shape}{order}, expected uint8 [N, H, W, 3]")
    if not shape[0]:
        raise InputError(f"{path}: arr_0 holds no images")
    return StoredImages(path, shape)


def read_statistics(path: Path) -> tuple[frechet.Moments | None, StoredImages | None]:
    """Moments of Inception features and images of an ADM reference (mu, sigma, arr_0), either or both.

    Raises InputError for another file, another dimension or numbers that are not finite.
    """
    try:
        images = _stored_images(path)
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files) and images is None:
                raise InputError(f"{path}: holds {', '.join(file.files) or 'nothing'}; expected mu and sigma, or arr_0")
            if any(np.iscomplexobj(file[key]) for key in ("mu", "sigma") if key in file.files):
                raise InputError(f"{path}: mu or sigma is complex; make the statistics again")
            mean, cov = (np.asarray(file[k], np.float64) if k in file.files else None for k in ("mu", "sigma"))
    except ARRAY_ERRORS as error:
        raise InputError(unreadable(path, "statistics file", error)) from error
    if mean is None or cov is None:
        return None, images
    if mean.shape != (INCEPTION_DIM,) or cov.shape != (INCEPTION_DIM, INCEPTION_DIM):
        raise InputError(
            f"{path}: statistics of shapes {mean.shape} and {cov.shape}; FID's Inception features have "
            f"{INCEPTION_DIM} dimensions"
        )
    for name, array in (("mu", mean), ("sigma", cov)):
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name} holds NaN or infinity")
    return frechet.check_moments(frechet.Moments(0, mean, cov), str(path)), images


def open_reference(
    text: str,
    resolution: int,
    extractors: Mapping[str, Extractor],
    folder: Path,
    device: torch.device,
    processes: Processes,
) -> Reference:
    """The reference of a text: an .npz file, or what `--data` takes. Features of its images are kept under `folder`.

    Raises InputError for a file that is no reference, or whose images have another size.
    """
    stored: dict[str, frechet.Moments] = {}
    identities = {name: extractor.identity for name, extractor in extractors.items()}
    if text.endswith(".npz"):
        path = Path(text)
        moments, images = read_statistics(path)
        with open(path, "rb") as file:
            fingerprint, name = hashlib.file_digest(file, "sha256").hexdigest(), path.stem.lower()
        if moments is not None and not RENAMED:
            stored["inception"] = moments
        if images is None:
            if RENAMED:
                raise InputError(f"{path}: statistics of FID's own Inception, not of --weights; give images")
            return Reference(name, fingerprint, 0, None, stored, identities)
        if images.shape[1:3] != (resolution, resolution):
            raise InputError(
                f"{path}: images of {images.shape[1]} x {images.shape[2]} px, generated are {resolution} px"
            )
        ids, batches = [f"{i:08d}" for i in range(images.shape[0])], images.batches

        def read(wanted: list[int]) -> Batches:
            return (([ids[number] for number in numbers], real) for numbers, real in batches(wanted))
    else:
        source = open_source(text)
        fingerprint, name, ids = source.fingerprint(), source.name, source.ids

        def read(wanted: list[int]) -> Batches:
            return Loader(source, resolution, find_protocol("adm"), batch_size=BATCH, indices=wanted)

    # Any edit of the code starts anew: crop, resize and network decide the features as much as weights do.
    code = provenance.source_hash([]) or "unknown"
    folder = folder / f"reference-{fingerprint[:16]}-{resolution}-{code[:16]}"
    mine = range(processes.rank, len(ids), processes.size)
    with SampleStore(folder, rank=processes.rank) as store:
        measure_reference(store, [(i, ids[i]) for i in mine], read, extractors, device)
    processes.wait()
    return Reference(name, fingerprint, len(ids), SampleStore(folder), stored, identities)


def measure_reference(
    store: SampleStore, samples: Sequence[tuple[int, str]],
    read: Callable[[list[int]], Batches], extractors: Mapping[str, Extractor], device: torch.device,
) -> None:  # fmt: skip
    """Put the features that the store lacks of these samples (number and id) into it; `read` gives their images."""
    everyone = {sample for _, sample in samples}
    lacking = {name: everyone - store.done([], [("real", e.identity)]) for name, e in extractors.items()}
    wanted = [number for number, sample in samples if any(sample in ids for ids in lacking.values())]
    with bar("reference", len(wanted)) as advance, torch.inference_mode():
        for ids, real in read(wanted) if wanted else ():
            on_device = real.to(device)
            needed = [e for name, e in extractors.items() if not lacking[name].isdisjoint(ids)]
            store.append(ids, {}, {("real", e.identity): e(on_device).cpu().numpy() for e in needed})
            advance(len(ids))


@dataclass(frozen=True)
class _Both:
    """Generated samples and their reference, as metrics read them; the two sides may differ in number."""

    store: SampleStore
    reference: Reference
    num_images: int  # the store may hold more, of a longer run

    @property
    def ids(self) -> list[str]:
        return self.store.ids[: self.num_images]

    def column(self, name: str) -> np.ndarray:
        return self.store.column(name)[: self.num_images]

    def features(self, side: str, extractor: str) -> np.ndarray:
        if side == "real":
            return self.reference.features(extractor)
        return self.store.features(side, self.reference.identities[extractor])[: self.num_images]


def score(
    names: Sequence[str], store: SampleStore, reference: Reference, num_images: int
) -> tuple[dict[str, Value], dict[str, str]]:
    """Values of the metrics whose features are there, and why others cannot be given."""
    values: dict[str, Value] = {}
    unavailable: dict[str, str] = {}
    both = _Both(store, reference, num_images)
    for name in names:
        metric = METRICS[name]
        try:
            if num_images < metric.minimum:
                note = f"needs {metric.minimum:,} images, here {num_images:,}; kid serves at any number"
                values[name] = Value(None, n=num_images, note=note)
            elif metric.minimum == FRECHET_MINIMUM:
                assert metric.extractor is not None
                values[name] = frechet_value(reference, both.features("fake", metric.extractor), metric.extractor)
            else:
                values[name] = metric.value(both)
        except LookupError as error:
            unavailable[name] = str(error.args[0])
    return values, unavailable


def frechet_value(reference: Reference, fake: np.ndarray, extractor: str) -> Value:
    """The distance from the reference's moments; fewer reference images than FRECHET_MINIMUM give none either."""
    real = reference.moments(extractor)
    if 0 < real.n < FRECHET_MINIMUM:
        return Value(
            None, n=len(fake), note=f"needs {FRECHET_MINIMUM:,} reference images, {reference.name} has {real.n}"
        )
    value = frechet.distance(real, frechet.moments(fake))
    # The reference stays whole: it is the same for everyone, and what varies is which images were generated.
    halves = [frechet.distance(real, frechet.moments(fake, rows)) for rows in half_samples(len(fake))]
    note = f"against {reference.name}; error: over the generated images, the reference taken as it is"
    return Value(value, from_half_samples(value, np.array(halves)).error, n=len(fake), note=note)
